"""The unit and the container file, as far as they can be checked without installing them."""

from __future__ import annotations

import configparser
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from scaleout_mp.config import Limits
from scaleout_mp.supervisor.farewell import ABORT_MARGIN, LAST_WORDS

DEPLOY = Path(__file__).parents[2] / "examples" / "deploy"
UNIT = DEPLOY / "scaleout-mp.service"


def service():
    unit = configparser.ConfigParser(strict=False, interpolation=None, comment_prefixes=("#",))
    unit.optionxform = str
    unit.read_string(UNIT.read_text())
    return unit["Service"]


def test_the_unit_gives_the_client_what_it_needs():
    unit = service()
    assert unit["Type"] == "notify"
    assert unit["KillMode"] == "mixed"
    assert unit["Delegate"] == "yes"
    assert unit["OOMPolicy"] == "continue"
    assert unit["LimitRTPRIO"] == "1"
    assert float(unit["TimeoutStopSec"]) > Limits().abort_grace_seconds + ABORT_MARGIN + LAST_WORDS + 5
    assert float(unit["WatchdogSec"]) >= 30
    assert f"Environment=SCALEOUT_MP_STATE_DIR=%S/{unit['StateDirectory']}" in UNIT.read_text()


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd-analyze is not installed")
def test_systemd_takes_the_unit(tmp_path):
    # It looks whether the program is there.
    text = UNIT.read_text().replace("/opt/scaleout-mp/venv/bin/python", sys.executable)
    copy = tmp_path / UNIT.name
    copy.write_text(text)
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", str(copy)], capture_output=True, text=True, timeout=60, check=False
    )
    complaints = [line for line in (done.stdout + done.stderr).splitlines() if UNIT.stem in line]
    assert complaints == []
    copy.write_text(text.replace("KillMode=mixed", "KillMode=sometimes"))
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", str(copy)], capture_output=True, text=True, timeout=60, check=False
    )
    assert "kill mode" in done.stdout + done.stderr


def test_the_container_file_says_what_podman_needs():
    lines = (DEPLOY / "Containerfile").read_text().replace("\\\n", " ").splitlines()
    instructions = [line.split(maxsplit=1) for line in lines if line and not line.startswith("#")]
    names = [name for name, _ in instructions]
    assert names[0] == "FROM"
    assert set(names) <= {"FROM", "RUN", "COPY", "ENV", "VOLUME", "USER", "WORKDIR", "STOPSIGNAL", "ENTRYPOINT"}
    given = dict(instructions)
    assert json.loads(given["ENTRYPOINT"])[0] == "python"
    assert given["STOPSIGNAL"] == "SIGTERM"
    folder = re.search(r"SCALEOUT_MP_STATE_DIR=(\S+)", given["ENV"])[1]
    assert given["VOLUME"] == folder
    assert given["USER"] == "edge"
