"""Building, loading, renaming, hashing and streaming models, beside scaleoututil 1.0.7.

Each package works in a process of its own, on the same arrays, with files and temporary files in memory where the
machine has a tmpfs. `python -m benchmarks.models` prints these rows alone. Deflating, and hashing while
building, are done on several cores: beside other work these two rows say little.
"""

from __future__ import annotations

import contextlib
import functools
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.harness import Row, beside, compare, interleaved, show

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

PEER = "scaleoututil 1.0.7"
PEER_PYTHON = Path(__file__).parents[1] / ".venv-compat" / "bin" / "python"
#: Both packages shall be spared the disk.
_SHM = "/dev/shm"


@contextlib.contextmanager
def worker(python: str, package: str, megabytes: int, folder: str) -> Iterator[Callable[[str], float]]:
    """Start a worker; gives a function that has it do an operation and returns the milliseconds."""
    script = Path(__file__).with_name("model_worker.py")
    with subprocess.Popen(
        [python, str(script), package, str(megabytes), folder],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "TMPDIR": folder},
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        stdin, stdout = process.stdin, process.stdout

        def measure(operation: str) -> float:
            stdin.write(operation + "\n")
            stdin.flush()
            return float(stdout.readline())

        try:
            if stdout.readline() != "ready\n":
                raise RuntimeError(f"the worker for {package} did not start")
            yield measure
        finally:
            stdin.close()


@contextlib.contextmanager
def both(megabytes: int) -> Iterator[tuple[Callable[[str], float], Callable[[str], float], float, float]]:
    """Start a worker of each kind; gives them, and the sizes of the files that they made."""
    with (
        tempfile.TemporaryDirectory(dir=_SHM if os.path.isdir(_SHM) else None) as folder,
        worker(sys.executable, "ours", megabytes, folder) as ours,
        worker(str(PEER_PYTHON), "scaleoututil", megabytes, folder) as theirs,
    ):
        yield ours, theirs, ours("save"), theirs("save")


def models(runs: int = 5) -> list[Row]:
    """Return the rows for 100 MB, which have targets, and for 1 GB."""
    if not PEER_PYTHON.exists():
        print(f"no rows for models: {PEER_PYTHON} is missing (`make test` makes it)", file=sys.stderr)
        return []
    return [*_with_targets(100, runs), *_without(1000)]


def _with_targets(megabytes: int, runs: int) -> list[Row]:
    with both(megabytes) as (ours, theirs, _, their_size):

        def rows(peer_operation: str, *wanted: tuple[str, str, float | None], times: int = 3) -> list[Row]:
            """Measure several operations of ours in turn with one of the peer's."""
            mine = [functools.partial(ours, operation) for _, operation, _ in wanted]
            *values, peers = interleaved(
                runs, *mine, functools.partial(theirs, peer_operation), times=[*[times] * len(mine), 1]
            )
            return [
                _row(f"{megabytes} MB model, {what}", measured, peers, at_least)
                for (what, _, at_least), measured in zip(wanted, values, strict=True)
            ]

        size = ours("deflated_size") / 1e6
        own, stored = interleaved(runs, lambda: theirs("load"), lambda: theirs("load_ours"))
        return [
            *rows(
                "build",
                ("build stored", "build", 60),
                ("build auto", "auto", 60),
                ("build deflated", "deflate", 25),
            ),
            *rows("build_and_checksum", ("build and checksum", "build_and_checksum", 45)),
            compare("its size, deflated", [size], PEER, [their_size / 1e6], unit="MB", at_most=1),
            *rows("load", ("open and touch every array", "load", 50)),
            *rows("new_id", ("a new id", "new_id", 40), ("a new id for a file", "new_id_of_file", None)),
            *rows("checksum", ("checksum of a file", "checksum", None), times=1),
            *rows("chunks", ("chunk stream", "chunks", None), times=1),
            compare(f"our file, read by {PEER}", stored, "its own file", own, unit="ms", at_least=2),
        ]


def _row(what: str, ours: list[float], theirs: list[float], at_least: float | None) -> Row:
    if at_least is None:
        return beside(what, ours, theirs, peer=PEER, unit="ms")
    return compare(what, ours, PEER, theirs, unit="ms", at_least=at_least)


def _without(megabytes: int) -> list[Row]:
    """Return rows of one run of the peer's: it takes minutes for them."""
    operations = {
        "build stored": ("build", "build"),
        "build deflated": ("deflate", "build"),
        "open and touch every array": ("load", "load"),
        "a new id": ("new_id", "new_id"),
        "checksum of a file": ("checksum", "checksum"),
        "chunk stream": ("chunks", "chunks"),
    }
    with both(megabytes) as (ours, theirs, _, _):
        peers = {operation: theirs(operation) for operation in dict.fromkeys(peer for _, peer in operations.values())}
        return [
            _row(f"{megabytes} MB model, {what}", [ours(mine) for _ in range(3)], [peers[operation]], None)
            for what, (mine, operation) in operations.items()
        ]


if __name__ == "__main__":
    found = models()
    show(found)
    sys.exit(not all(row.holds for row in found))
