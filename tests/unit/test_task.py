"""The task's vocabulary: states, limits, reports, errors, settings."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

import scaleout_mp
from scaleout_mp import CallbackNotSendable, ConfigError, EndReason, ExitReport, Limits, TaskKilled
from scaleout_mp.config import Settings
from scaleout_mp.display import readable_size
from scaleout_mp.executor.launcher import Exited
from scaleout_mp.executor.report import Evidence, StopCause, make_report
from scaleout_mp.ipc.messages import Failure, Refusal
from scaleout_mp.task import AbortOrigin, StopStage, TaskLife, TaskState


class Life(RuleBasedStateMachine):
    """Whatever is tried, a task only moves forward and ends once."""

    def __init__(self):
        super().__init__()
        self.life = TaskLife()
        self.seen = [TaskState.PENDING]

    @rule(to=st.sampled_from(TaskState))
    def advance(self, to):
        try:
            self.life.advance(to)
        except RuntimeError:
            return
        self.seen.append(to)

    @invariant()
    def moves_forward(self):
        order = list(TaskState)
        positions = [order.index(state) for state in self.seen]
        assert positions == sorted(set(positions))
        assert self.life.ended == (self.seen[-1] is TaskState.ENDED)


TestLife = Life.TestCase


@pytest.mark.parametrize(
    ("memory", "expected"),
    [("512MiB", 512 << 20), ("2GB", 2 * 10**9), ("1.5 GiB", 3 << 29), ("64m", 64 << 20), (1 << 30, 1 << 30), (None, 0)],
)
def test_memory_sizes(memory, expected):
    assert Limits(memory=memory).memory_bytes == expected


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("memory", "much"),
        ("memory", "2 apples"),
        ("memory", 0),
        ("memory", -1),
        ("memory", True),
        ("memory", 2.5),
        ("memory", 0.0),
        ("memory", "1KiB"),
        ("wall_time", 0),
        ("wall_time", -1),
        ("wall_time", "an hour"),
        ("cpu_time", 0),
        ("no_progress", "1 fortnight"),
        ("pids", 0),
        ("pids", "2"),
        ("open_files", 3),
        ("threads", 0),
        ("threads", True),
        ("file_size", -1),
        ("file_size", "1 page"),
        ("scratch_size", -1),
        ("scratch_size", 2**61),
        ("output_bytes", -1),
        ("wall_time", float("nan")),
        ("wall_time", True),
        ("abort_grace", -1),
        ("abort_grace", None),
        ("abort_grace", "soon"),
        ("memory", "1" + "0" * 400),
        ("output_bytes", "1" + "0" * 400),
        ("output_bytes", 10**30),
        ("file_size", "1" + "0" * 320 + "k"),
        ("scratch_size", "1" + "0" * 320 + "k"),
        ("wall_time", 10**400),
        ("wall_time", float("inf")),
        ("wall_time", "1" + "0" * 400 + "s"),
        ("cpu_time", float("inf")),
        ("cpu_time", 1e30),
        ("no_progress", 10**10),
        ("abort_grace", float("inf")),
        ("abort_grace", -(10**400)),
        ("pids", 10**30),
        ("open_files", 10**30),
        ("threads", 10**30),
    ],
)
def test_wrong_limits_name_their_field(field, value):
    with pytest.raises(ConfigError, match=f"^{field} must be"):
        Limits(**{field: value})


def test_a_wrong_limit_is_told_in_whole_numbers_and_briefly():
    with pytest.raises(ConfigError, match=r"^memory must be at least 8388608 bytes \(8MiB\), not 1024$"):
        Limits(memory="1KiB")
    with pytest.raises(ConfigError, match=r"^pids must be at least 1, not 0$"):
        Limits(pids=0)
    for long in ("1" + "0" * 4000, 10**4000, 10**5000):
        with pytest.raises(ConfigError) as caught:
            Limits(memory=long)
        assert len(str(caught.value)) < 200


def test_the_largest_limits_are_taken():
    largest = Limits(
        memory=2**60, file_size=2**60, output_bytes="1048576TiB", wall_time=10**9, cpu_time=1e9, threads=2**31 - 1
    )
    assert largest.memory_bytes == largest.output_size == 2**60
    assert largest.seconds("cpu_time") == 10**9


def test_a_fraction_is_of_what_this_process_may_use():
    whole = Limits(memory=1.0).memory_bytes
    assert 0 < whole <= os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert Limits(memory=0.5).memory_bytes == whole // 2


@pytest.mark.parametrize(("time", "seconds"), [("90s", 90), ("10m", 600), ("1.5h", 5400), ("2 d", 172800), (3, 3.0)])
def test_times(time, seconds):
    assert Limits(wall_time=time).seconds("wall_time") == seconds
    assert Limits().seconds("wall_time") is None


def evidence(**seen):
    return Evidence(task_id="1", name="train", **seen)


def exited(code):
    return Exited(code=code, cpu_seconds=1.0, max_rss=1, strays=False)


BOOM = Failure(error_type="ValueError", message="no\nreally", traceback="tb")
NO_MEMORY = Failure(error_type="MemoryError", message="", traceback="tb", refused=Refusal.MEMORY)
TOO_LARGE = Failure(error_type="OSError", message="File too large", traceback="tb", refused=Refusal.FILE_SIZE)
STOP = StopCause(reason=EndReason.WALL_TIME, message="ran too long")


@pytest.mark.parametrize(
    ("seen", "reason", "message"),
    [
        ({"has_result": True, "exited": exited(0)}, EndReason.COMPLETED, "completed in 0.00 s"),
        ({"failure": BOOM, "exited": exited(1)}, EndReason.FAILED, "raised ValueError: no"),
        ({"failure": NO_MEMORY, "exited": exited(1)}, EndReason.FAILED, "raised MemoryError"),
        (
            {"failure": NO_MEMORY, "limits": Limits(memory="1GiB"), "peak_memory": 1 << 29, "exited": exited(1)},
            EndReason.MEMORY_LIMIT,
            "ran out of memory: an allocation past its limit of 1.0 GiB was refused (peak 512 MiB)",
        ),
        ({"failure": TOO_LARGE}, EndReason.FAILED, "raised OSError: File too large"),
        (
            {"failure": TOO_LARGE, "limits": Limits(file_size="1MiB")},
            EndReason.FILE_SIZE,
            "wrote a file up to its limit of 1.0 MiB",
        ),
        ({"exited": exited(-24)}, EndReason.CRASHED, "crashed with SIGXCPU"),
        (
            {"exited": exited(-24), "limits": Limits(cpu_time=2)},
            EndReason.CPU_TIME,
            "used more than its 2 s of processor time",
        ),
        ({"exited": exited(-11)}, EndReason.CRASHED, "crashed with SIGSEGV"),
        ({"exited": exited(-60)}, EndReason.CRASHED, "crashed with signal 60"),
        ({"exited": exited(0)}, EndReason.CRASHED, "exited with code 0 before it returned a result"),
        (
            {"stop": STOP, "stopped_by": StopStage.SIGKILL, "start_method": "template", "exited": exited(-9)},
            EndReason.WALL_TIME,
            "ran too long; killed with SIGKILL",
        ),
        ({"stop": STOP}, EndReason.WALL_TIME, "ran too long; it was never started"),
        ({"launcher_problem": "no more processes"}, EndReason.REFUSED, "no more processes"),
        (
            {"launcher_problem": "the template died", "start_method": "template"},
            EndReason.CRASHED,
            "the template died",
        ),
    ],
)
def test_conclusions(seen, reason, message):
    report = make_report(evidence(**seen))
    assert (report.reason, report.message) == (reason, message)
    json.dumps(report.to_dict())


def test_every_bad_end_has_an_error_that_links_to_its_section_and_pickles():
    page = (subprocess.os.path.dirname(__file__)) + "/../../docs/why-was-my-task-killed.md"
    with open(page, encoding="utf-8") as file:
        headings = {line[3:].strip().lower() for line in file if line.startswith("## ")}
    for reason in EndReason:
        report = ExitReport(task_id="1", name="train", reason=reason, message="ended")
        if reason is EndReason.COMPLETED:
            assert report.explain() == "task train: ended"
            continue
        error = pickle.loads(pickle.dumps(report.to_error()))
        assert error.report == report
        assert str(error) == report.explain()
        assert report.explain().rpartition("#")[2].rstrip(")").replace("-", " ") in headings
    assert isinstance(make_report(evidence(stop=STOP)).to_error(), TaskKilled)


def test_errors_have_their_docstring_as_message_and_keep_their_facts():
    assert "scaleout_mp went wrong" in str(scaleout_mp.ScaleoutError())
    error = pickle.loads(pickle.dumps(CallbackNotSendable("no", callback="train", culprit="lock")))
    assert (str(error), error.callback, error.culprit) == ("no", "train", "lock")


@pytest.mark.parametrize(
    ("size", "shown"), [(0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (200 << 20, "200 MiB"), (5 << 40, "5120 GiB")]
)
def test_sizes_for_people(size, shown):
    assert readable_size(size) == shown


@pytest.mark.parametrize("origin", AbortOrigin)
def test_abort_origins_have_a_reason(origin):
    assert origin.end_reason is not EndReason.COMPLETED


@pytest.mark.parametrize(("value", "read"), [("true", True), ("1", True), ("OFF", False), ("no", False), ("", None)])
def test_flags_are_read(value, read):
    assert Settings.from_environ({"SCALEOUT_GRPC_SECURE": value}).grpc_secure is read


FLAGS = {"1", "true", "yes", "on", "0", "false", "no", "off"}


@given(st.text(min_size=1).filter(lambda text: text.lower() not in FLAGS))
def test_other_flags_are_refused_by_name(value):
    with pytest.raises(ConfigError, match="SCALEOUT_CHECK_COMPATIBILITY must be true or false"):
        Settings.from_environ({"SCALEOUT_CHECK_COMPATIBILITY": value})


def test_settings_from_the_environment():
    settings = Settings.from_environ(
        {
            "SCALEOUT_GRPC_SECURE": "false",
            "SCALEOUT_CLIENT_TASK_POLLING_INTERVAL": "0.5",
            "SCALEOUT_AUTH_SCHEME": "Token",
        }
    )
    assert (settings.grpc_secure, settings.polling_interval, settings.auth_scheme) == (False, 0.5, "Token")
    assert Settings.from_environ({}) == Settings()
    assert Settings.from_environ({}, report_status=False).report_status is False
    with pytest.raises(ConfigError, match="SCALEOUT_CLIENT_TASK_POLLING_INTERVAL must be a number of seconds"):
        Settings.from_environ({"SCALEOUT_CLIENT_TASK_POLLING_INTERVAL": "often"})


def test_public_names_exist_and_the_import_is_light():
    for name in scaleout_mp.__all__:
        assert getattr(scaleout_mp, name) is not None
    assert set(scaleout_mp.__all__) <= set(dir(scaleout_mp))
    with pytest.raises(AttributeError):
        scaleout_mp.nothing_of_this_name  # noqa: B018
    code = (
        "import scaleout_mp, sys; print(sorted({'grpc', 'numpy', 'requests', 'psutil', 'msgpack'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout == b"[]\n"
