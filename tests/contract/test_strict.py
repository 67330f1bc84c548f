"""Level strict: files, network and what else is out of reach, layer by layer as this machine has them."""

from __future__ import annotations

import ast
import errno
import os
import socket
import subprocess
import sys

import pytest
import strict_attempts
from observing import wait_until
from test_sandbox import needs_filter

from scaleout_mp import ConfigError, Sandbox, TaskExecutor
from scaleout_mp.sandbox import landlock, namespaces, probe, process


def refusal_of_landlock():
    def restrict():
        process.forbid_new_privileges()
        with landlock.Ruleset(files=True) as rules:
            rules.restrict()

    return probe.refusal(restrict)


def refusal_of_namespaces():
    def enter():
        namespaces.enter_own_users()
        namespaces.enter_own_mounts()
        namespaces.enter_own_network()

    return probe.refusal(enter)


NO_LANDLOCK = refusal_of_landlock()
NO_NAMESPACES = refusal_of_namespaces()
needs_files = pytest.mark.skipif(
    NO_LANDLOCK is not None and NO_NAMESPACES is not None,
    reason=f"nothing here restricts files: {NO_LANDLOCK}; {NO_NAMESPACES}",
)
needs_namespaces = pytest.mark.skipif(NO_NAMESPACES is not None, reason=f"no namespaces here: {NO_NAMESPACES}")

#: By whatever layer, and seen as which error.
FORBIDDEN = {"EACCES", "EPERM", "ENOENT", "EROFS", "EXDEV"}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    base = tmp_path_factory.mktemp("strict")
    for name in ("secret", "declared", "output"):
        (base / name).mkdir()
    (base / "secret" / "file").write_text("secret")
    (base / "declared" / "file").write_text("data")
    return base


@pytest.fixture(scope="module", params=["template", "spawn"])
def executor(request, folders):
    sandbox = Sandbox(level="strict", read=[folders / "declared"], write=[folders / "output"])
    with TaskExecutor(start_method=request.param, sandbox=sandbox, echo_output=False) as running:
        yield running


@needs_files
def test_only_declared_files_are_within_reach(executor, folders):
    before = os.stat(folders / "secret" / "file"), os.stat(folders / "declared" / "file")
    results = executor.submit(
        strict_attempts.files,
        str(folders / "secret" / "file"),
        str(folders / "declared" / "file"),
        str(folders / "output"),
        str(folders / "output"),
    ).result(30)
    allowed = {
        "read what is declared",
        "write where it is declared",
        "make a folder there",
        "read it again",
        "run a program",
        "write to null",
        "write shared memory",
    }
    if NO_NAMESPACES is not None:
        # Landlock says nothing about modes and times, see docs/security.md.
        gaps = {"change its mode", "change its times", "change the mode of what is declared for reading"}
        results = {what: error for what, error in results.items() if what not in gaps}
    assert {what for what, error in results.items() if not error} == allowed
    assert {error for what, error in results.items() if what not in allowed} <= FORBIDDEN
    after = os.stat(folders / "secret" / "file"), os.stat(folders / "declared" / "file")
    assert [(a.st_mode, a.st_size, a.st_mtime) for a in after] == [(b.st_mode, b.st_size, b.st_mtime) for b in before]
    assert (folders / "output" / "result").read_bytes() == b"x"


@pytest.fixture
def servers(tmp_path):
    """Servers outside of the sandbox, one of each kind."""
    path, abstract = str(tmp_path / "socket"), f"\0scaleout-strict-{os.getpid()}"
    with (
        socket.create_server(("127.0.0.1", 0)) as tcp,
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as udp,
        socket.socket(socket.AF_UNIX) as named,
        socket.socket(socket.AF_UNIX) as nameless,
    ):
        udp.bind(("127.0.0.1", 0))
        udp.setblocking(False)
        named.bind(path)
        nameless.bind(abstract)
        for server in (named, nameless):
            server.listen()
        yield tcp.getsockname(), udp.getsockname(), path, abstract, udp


@needs_filter
def test_no_network(executor, servers):
    *addresses, udp = servers
    results = executor.submit(strict_attempts.network, *addresses).result(30)
    with pytest.raises(BlockingIOError):
        udp.recv(1)
    out = {what: error for what, error in results.items() if what != "itself"}
    # Nobody listens in the task's own network, where it may send what it likes.
    out["udp"] = out["udp"] or "sent into nothing"
    if NO_NAMESPACES is not None:
        # Landlock says nothing about sockets with a path, see docs/security.md.
        del out["unix socket"]
        assert results["itself"]
    else:
        assert results["itself"] == ""
    if NO_LANDLOCK is not None or landlock.abi() < landlock.SCOPES_SINCE:
        del out["abstract socket"]
    assert {what for what, error in out.items() if not error} == set()


def test_network_when_it_is_declared(servers):
    *addresses, udp = servers
    with TaskExecutor(sandbox=Sandbox(level="strict", network=True), echo_output=False) as running:
        results = running.submit(strict_attempts.network, *addresses).result(30)
    assert results["tcp"] == results["udp"] == results["itself"] == ""
    assert udp.recv(1) == b"x"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"level": "very"}, "sandbox must be one of 'auto', 'none', 'basic', 'strict', or a Sandbox, not 'very'"),
        ({"read": ["/no/such/folder"]}, "read names '/no/such/folder', which is not there"),
        ({"write": ["/no/such/folder"]}, "write names '/no/such/folder', which is not there"),
        ({"read": "/usr"}, "read must be a list of paths, not '/usr'"),
        ({"read": 5}, "read must be a list of paths, not 5"),
        ({"write": [3]}, "write must be a list of paths; 3 is none"),
        ({"network": 1}, "network must be True or False, not 1"),
        ({"level": "auto", "network": True}, 'for level "strict"'),
    ],
)
def test_a_wrong_sandbox_is_named(arguments, message):
    with pytest.raises(ConfigError, match=message):
        Sandbox(**arguments)


@needs_namespaces
def test_shared_memory_of_a_killed_task_is_gone(executor):
    before = sorted(os.listdir("/dev/shm"))
    assert executor.submit(strict_attempts.leave_shared_memory).report(20).signal == "SIGKILL"
    assert wait_until(lambda: executor.submit(strict_attempts.shared_memory).result(20) == [])
    assert not set(os.listdir("/dev/shm")) - set(before) & {"folder", "left-over"}


@needs_files
def test_modules_are_confined_while_they_are_imported(folders):
    import imported_at_strict

    surroundings = {"TEST_SUPERVISOR": str(os.getpid()), "TEST_SECRET": str(folders / "secret" / "file")}
    with TaskExecutor(sandbox="strict", environment=surroundings, echo_output=False) as running:
        pid, results = running.submit(imported_at_strict.results).result(20)
        assert pid == running.submit(os.getppid).result(20)
    assert len(results) == 6
    assert {what for what, error in results.items() if not error} == set()


def test_the_working_directory_can_be_read(folders):
    sandbox = Sandbox(level="strict")
    with TaskExecutor(sandbox=sandbox, working_directory=folders / "declared", echo_output=False) as running:
        assert running.submit(os.listdir, ".").result(20) == ["file"]


def test_the_report_says_what_was_in_force():
    with TaskExecutor(sandbox="strict", echo_output=False) as running:
        report = running.submit(abs, -1).report(20)
        missing = running.missing_layers
    assert "no new privileges" in report.layers
    assert ("Landlock files" in report.layers) == (NO_LANDLOCK is None)
    assert ("mount namespace" in report.layers) == (NO_NAMESPACES is None)
    everything = {"Landlock signals and sockets", "IPC namespace", "mount namespace", "system call filter"}
    assert (missing == ()) == (everything <= set(report.layers))
    assert report.to_dict()["layers"] == list(report.layers)


#: Runs a program on a machine that lacks something: a filter of its own refuses calls, as a container's does.
WITHOUT = """
import ctypes, os, struct, sys
from scaleout_mp.sandbox import process, seccomp
from scaleout_mp.sandbox.system_calls import NUMBERS

program = seccomp._program()
for name in sys.argv[2].split(","):
    program.on(name, [seccomp._instruction(seccomp._RETURN, seccomp._ERRNO | int(sys.argv[1]))])
process.forbid_new_privileges()
seccomp.install(program.finish())

import strict_attempts
from scaleout_mp import Sandbox, TaskExecutor

def main():
    level, secret, declared, output = sys.argv[3:]
    sandbox = Sandbox(level="strict", read=[declared], write=[output]) if level == "strict" else level
    with TaskExecutor(sandbox=sandbox, echo_output=False) as executor:
        task = executor.submit(strict_attempts.files, secret, declared + "/file", output, output)
        results = task.result(60)
        print(repr((results, task.report().layers, executor.missing_layers)))

if __name__ == "__main__":
    main()
"""


@needs_filter
@pytest.mark.parametrize("lacking", ["namespaces", "landlock", "both"])
@pytest.mark.parametrize("level", ["auto", "strict"])
def test_each_layer_works_where_another_is_missing(lacking, level, folders, tmp_path):
    calls = {"namespaces": ["unshare"], "landlock": ["landlock_create_ruleset"]}
    refused = calls["namespaces"] + calls["landlock"] if lacking == "both" else calls[lacking]
    (tmp_path / "program.py").write_text(WITHOUT)
    (tmp_path / "output").mkdir()
    number = errno.EPERM if lacking == "namespaces" else errno.ENOSYS
    secret, declared = folders / "secret" / f"{level}-{lacking}", folders / "declared"
    secret.write_text("secret")
    command = [tmp_path / "program.py", str(number), ",".join(refused), level, secret, declared, tmp_path / "output"]
    search_path = os.pathsep.join([os.path.dirname(__file__) + "/..", *filter(None, sys.path)])
    done = subprocess.run(
        [sys.executable, *map(str, command)],
        check=False,
        capture_output=True,
        text=True,
        timeout=100,
        env={**os.environ, "PYTHONPATH": search_path},
    )
    assert done.returncode == 0, done.stderr
    results, layers, missing = ast.literal_eval(done.stdout.strip().splitlines()[-1])
    succeeded = {what for what, error in results.items() if not error}
    assert {"read what is declared", "write where it is declared", "write to null", "run a program"} <= succeeded
    assert "system call filter" in layers
    if lacking in {"landlock", "both"}:
        assert "Landlock domain" not in layers
        assert any("no Landlock" in problem or "Function not implemented" in problem for problem in missing)
    elif NO_LANDLOCK is None:
        assert "Landlock domain" in layers
    if level == "strict" and lacking != "both" and (NO_LANDLOCK if lacking == "namespaces" else NO_NAMESPACES) is None:
        assert succeeded & {"read a secret", "overwrite it", "remove it", "list its folder"} == set()
    if level == "strict":
        # Said once, for each layer that is missing.
        assert done.stderr.count("tasks see the file tree of this machine") == (lacking != "landlock")
        assert "tasks see the file tree of this machine" in " ".join(missing) or lacking == "landlock"
