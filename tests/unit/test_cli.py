"""The command line without a network: help, versions, and what users get wrong."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import tomllib
from pathlib import Path

import click
import numpy as np
import pytest

import scaleout_mp
from scaleout_mp.cli import app as app_module
from scaleout_mp.cli import extras
from scaleout_mp.cli.app import run
from scaleout_mp.cli.models import open_seed
from scaleout_mp.errors import LocalNetworkError, MissingExtraError, ModelFormatError
from scaleout_mp.model import ScaleoutModel


def without(monkeypatch, *missing):
    """Let modules look as if they were not installed."""
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in missing else find(name))


def one_line(text):
    assert text.endswith("\n")
    assert text.count("\n") == 1, text
    return text.strip()


@pytest.fixture
def failing(monkeypatch):
    """Return a function that puts a command `fail` into the group which raises an error."""

    def install(error):
        @click.command
        def fail():
            raise error

        monkeypatch.setattr(app_module.LazyGroup, "get_command", lambda _self, _ctx, _name: fail)

    return install


def test_version(capsys):
    assert run(["--version"]) == 0
    assert capsys.readouterr().out == f"scaleout-mp, version {scaleout_mp.__version__}\n"


def test_the_module_is_the_command():
    done = subprocess.run(
        [sys.executable, "-m", "scaleout_mp", "--version"], check=False, capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert scaleout_mp.__version__ in done.stdout


def test_help_names_every_command_and_imports_none():
    code = (
        "import sys; from scaleout_mp.cli.app import run; code = run(['--help']); "
        "bad = {'scaleout_mp.localnet', 'scaleout_mp.demo', 'grpc', 'rich', 'numpy'} & set(sys.modules); "
        "sys.exit(f'imported {bad}' if bad else code)"
    )
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert "demo " in done.stdout
    assert "localnet " in done.stdout


@pytest.mark.parametrize("command", ["demo", "localnet"])
def test_each_command_has_help_with_examples(command, capsys):
    assert run([command, "--help"]) == 0
    help_text = capsys.readouterr().out
    assert f"  scaleout-mp {command}" in help_text
    assert "Examples:" in help_text


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["frobnicate"], "No such command 'frobnicate'"),
        (["localnet", "--bogus"], "No such option '--bogus'"),
        (["localnet", "--rounds", "2"], "--rounds and --seed go together"),
        (["localnet", "--rounds", "2", "--seed", "/nowhere/seed.npz"], "File '/nowhere/seed.npz' does not exist"),
        (["localnet", "--api-port", "70000"], "70000 is not in the range"),
        (["demo", "--rounds", "0"], "0 is not in the range"),
    ],
)
def test_wrong_usage_is_said_and_ends_with_2(arguments, said, capsys):
    assert run(arguments) == 2
    captured = capsys.readouterr()
    line = one_line(captured.err)
    assert line.startswith("error: ")
    assert said in line
    assert "--help" in line
    assert captured.out == ""


def test_without_a_command_there_is_the_help(capsys):
    run([])
    captured = capsys.readouterr()
    assert "Commands:" in captured.out + captured.err


def test_too_few_rounds_for_the_faults(capsys):
    assert run(["demo", "--rounds", "2"]) == 1
    assert one_line(capsys.readouterr().err).startswith("error: the planned faults need at least 3 rounds")


def test_errors_of_ours_take_one_line(failing, capsys):
    failing(LocalNetworkError("the port\nis taken"))
    assert run(["fail"]) == 1
    assert capsys.readouterr().err == "error: the port is taken\n"


def test_errors_of_the_system_name_the_file(failing, capsys):
    failing(PermissionError(13, "Permission denied", "/root/network"))
    assert run(["fail"]) == 1
    assert capsys.readouterr().err == "error: /root/network: Permission denied\n"


def test_debug_shows_the_traceback(failing, capsys):
    failing(LocalNetworkError("the port is taken"))
    assert run(["--debug", "fail"]) == 1
    said = capsys.readouterr().err
    assert "Traceback" in said
    assert said.endswith("error: the port is taken\n")


def test_ctrl_c_is_no_traceback(failing, capsys):
    failing(KeyboardInterrupt())
    assert run(["fail"]) == 130
    assert "Traceback" not in capsys.readouterr().err


def test_bugs_are_not_hidden(failing):
    failing(RuntimeError("a bug"))
    with pytest.raises(RuntimeError, match="a bug"):
        run(["fail"])


@pytest.mark.parametrize(
    ("arguments", "module", "requirement"),
    [(["demo", "--no-install"], "sklearn", "scikit-learn>=1.5"), (["localnet"], "aiohttp", "aiohttp>=3.11")],
)
def test_a_missing_extra_is_named(arguments, module, requirement, monkeypatch, capsys):
    without(monkeypatch, module)
    assert run(arguments) == 2
    said = one_line(capsys.readouterr().err)
    assert said == f'error: scaleout-mp {arguments[0]} needs what is not installed: pip install "{requirement}"'


def test_the_extras_are_those_of_the_package(monkeypatch):
    without(monkeypatch, "aiohttp", "rich", "sklearn")
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    wanted = project["optional-dependencies"]
    assert extras.missing_requirements("localnet") == wanted["localnet"]
    named = {"scaleout-mp[cli,localnet]", *extras.missing_requirements("demo")}
    assert named - set(wanted["cli"]) - set(wanted["localnet"]) == set(wanted["demo"])
    # The program of a plain installation has its parser.
    assert any(line.startswith("click") for line in project["dependencies"])


def test_an_extra_that_is_there_passes(monkeypatch):
    extras.require_extra("demo")
    without(monkeypatch, "rich")
    with pytest.raises(MissingExtraError):
        extras.require_extra("demo")


def weights():
    return [np.arange(6.0).reshape(2, 3), np.ones(2, np.float32)]


def test_seed_from_savez_keeps_the_order_of_the_arrays(tmp_path):
    np.savez(tmp_path / "seed.npz", *weights())
    with open_seed(tmp_path / "seed.npz") as model:
        for found, wanted in zip(model.get_training_model(), weights(), strict=True):
            np.testing.assert_array_equal(found, wanted)
        assert model.model_id


def test_seed_from_a_model_file_keeps_its_metadata(tmp_path):
    made = ScaleoutModel.from_training_model(weights(), metadata={"tag": "v1"})
    made.save_to_file(tmp_path / "seed.scm")
    with open_seed(tmp_path / "seed.scm") as model:
        assert model.metadata["tag"] == "v1"
        assert model.model_id == made.model_id
    made.close()


def test_seed_that_is_none_names_the_file(tmp_path):
    (tmp_path / "junk.npz").write_text("junk")
    with pytest.raises(ModelFormatError, match=r"junk\.npz is neither"):
        open_seed(tmp_path / "junk.npz")
    # A pickle inside would run code.
    np.savez(tmp_path / "objects.npz", np.array([{}], dtype=object))
    with pytest.raises(ModelFormatError, match=r"objects\.npz holds no model"):
        open_seed(tmp_path / "objects.npz")
