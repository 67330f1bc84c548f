"""A model of 1 GB up to a combiner and down from it, beside the published client's handler.

Both talk to a server that costs next to nothing, in a process of its own, and find their files in memory where the
machine has a tmpfs. `python -m benchmarks.transfer` prints these rows alone.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.handover import GIGABYTE, weights
from benchmarks.harness import Row, alone, compare, show
from scaleout_mp.model import ScaleoutModel

if TYPE_CHECKING:
    from collections.abc import Iterator

PEER = "scaleout 1.0.7"
PEER_PYTHON = Path(__file__).parents[1] / ".venv-compat" / "bin" / "python"
HERE = Path(__file__).parent
_SHM = "/dev/shm"
RUNS = 3


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cost:
    """What one transfer cost."""

    seconds: float
    processor: float
    #: Bytes.
    memory: float


class Worker:
    """A program that transfers what it is told to."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process
        self.answer()

    def answer(self) -> list[str]:
        """Read a line of its answers."""
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self._process.args} ended")
        return line.split()

    def do(self, what: str) -> Cost:
        """Have it upload ("up") or download ("down")."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{what}\n")
        self._process.stdin.flush()
        seconds, processor, memory = map(float, self.answer())
        return Cost(seconds=seconds, processor=processor, memory=memory)


@contextlib.contextmanager
def workers(size: int) -> Iterator[tuple[Worker, Worker]]:
    """Start the server and a worker of each kind."""
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory(dir=_SHM if os.path.isdir(_SHM) else None))
        path = os.path.join(folder, "model.scm")
        with ScaleoutModel.from_training_model(weights(size), compression="stored") as plain:
            builder = plain.to_builder().set_model_id("benchmark")
            with builder.build() as model:
                model.save_to_file(path)

        def start(python: str, script: str, *arguments: str) -> subprocess.Popen[str]:
            process = stack.enter_context(
                subprocess.Popen(
                    [python, str(HERE / script), *arguments],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    text=True,
                    env={**os.environ, "TMPDIR": folder},
                )
            )
            stack.callback(process.kill)
            return process

        server = start(sys.executable, "transfer_server.py", path)
        assert server.stdout is not None
        port = server.stdout.readline().strip()
        ours = start(sys.executable, "transfer_worker.py", "ours", port, path)
        theirs = start(str(PEER_PYTHON), "transfer_worker.py", "published", port, path)
        yield Worker(ours), Worker(theirs)


def transfer(runs: int = RUNS, size: int = GIGABYTE) -> list[Row]:
    """Return the rows for models on their way."""
    if not PEER_PYTHON.exists():
        print(f"no rows for transfers: {PEER_PYTHON} is missing (`make test` makes it)", file=sys.stderr)
        return []
    rows = []
    with workers(size) as (ours, theirs):
        for what, title, at_least in (
            ("up", "up", 2.0),
            ("again", "up, checksum known", None),
            ("down", "down into sealed memory", 1.6),
        ):
            pairs = [(ours.do(what), theirs.do(what)) for _ in range(runs)]
            mine, peers = [mine for mine, _ in pairs], [peer for _, peer in pairs]
            name = f"{size // 10**6} MB {title}"
            rows += [
                compare(
                    name,
                    [cost.seconds for cost in mine],
                    PEER,
                    [cost.seconds for cost in peers],
                    unit="s",
                    at_least=at_least or 1.0,
                ),
                compare(
                    f"{name}, processor time",
                    [cost.processor for cost in mine],
                    PEER,
                    [cost.processor for cost in peers],
                    unit="s",
                    at_most=0.75,
                ),
            ]
            # Uploaded from sealed memory, which is there already.
            copies = [cost.memory / size + (what != "down") for cost in mine]
            rows.append(alone(f"{name}, copies in memory", copies, unit="copies", at_most=1.1))
    return rows


if __name__ == "__main__":
    found = transfer()
    show(found)
    sys.exit(not all(row.holds for row in found))
