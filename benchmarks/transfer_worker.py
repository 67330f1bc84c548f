"""Uploads and downloads as its standard input says: `transfer_worker.py ours|published PORT MODEL_FILE`.

Runs in an environment of its own, so it imports nothing of this folder. Answers each line "up" or "down" with seconds,
seconds of processor time, and the largest memory meanwhile, in bytes beyond what there was before.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
import threading
import time
import types
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator

MODEL_ID = "benchmark"


class Ours:
    """This package: a model in sealed memory, as a task hands it over."""

    def __init__(self, port: int, path: str) -> None:
        from scaleout_mp.model import MemoryWriter, ScaleoutModel
        from scaleout_mp.transport.calls import CombinerCalls
        from scaleout_mp.transport.channel import CallCredentials, open_channel
        from scaleout_mp.transport.transfer import ModelTransfer

        self._runner = asyncio.Runner()

        async def opened() -> ModelTransfer:
            credentials = CallCredentials(client_id="ours", name="ours")
            return ModelTransfer(CombinerCalls(open_channel("127.0.0.1", port, secure=False), credentials))

        self._transfer = self._runner.run(opened())
        writer = MemoryWriter()
        with open(path, "rb") as file:
            while data := file.read(1 << 20):
                writer.write(data)
        self._model = ScaleoutModel.from_memory(writer.seal())

    def up(self) -> None:
        """Upload a model whose checksum nobody knows yet."""
        from scaleout_mp.model import ScaleoutModel

        with ScaleoutModel.from_fd(self._model.fileno(), verify=False) as model:
            self._runner.run(self._transfer.upload(model))

    def again(self) -> None:
        """Upload a model whose checksum is known."""
        self._runner.run(self._transfer.upload(self._model))

    def down(self) -> Any:
        """Download a model into sealed memory, verified."""
        return self._runner.run(self._transfer.download(MODEL_ID))


class Published:
    """The published package's handler."""

    def __init__(self, port: int, path: str) -> None:
        os.environ["SCALEOUT_GRPC_SECURE"] = "false"
        from scaleout.client.grpc_handler import GrpcHandler
        from scaleoututil.utils.model import ScaleoutModel

        client = types.SimpleNamespace(client_id="theirs", name="theirs", token_manager=None)
        self._handler = GrpcHandler(client, "127.0.0.1", port)
        self._open, self._path = ScaleoutModel.from_file, path

    def up(self) -> None:
        """Upload."""
        self._handler.send_model_to_combiner(self._model)

    again = up

    def down(self) -> Any:
        """Download, verified."""
        return self._handler.get_model_from_combiner(MODEL_ID)

    def before_up(self) -> None:
        """Have a model that was not used yet; what it takes to have it is not measured."""
        self._model = self._open(self._path)


def memory() -> int:
    """Return the bytes that this process has for itself: private memory, and files in memory that it holds open."""
    with open("/proc/self/status", encoding="ascii") as file:
        total = next(int(line.split()[1]) * 1024 for line in file if line.startswith("RssAnon:"))
    seen = set()
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            path = f"/proc/self/fd/{name}"
            facts = os.stat(path)
            if os.readlink(path).startswith(("/memfd:", "/dev/shm/")) and facts.st_ino not in seen:
                seen.add(facts.st_ino)
                total += facts.st_blocks * 512
    return total


@contextlib.contextmanager
def peak() -> Iterator[list[int]]:
    """Give a list whose last element will be the largest memory within the block, beyond what there was before it."""
    before, most, over = memory(), [0], threading.Event()

    def look() -> None:
        while not over.wait(0.02):
            most[0] = max(most[0], memory() - before)

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield most
    finally:
        most[0] = max(most[0], memory() - before)
        over.set()
        thread.join()


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    # The published package logs to where nobody listens here.
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    os.dup2(1, 2)
    kind, port, path = sys.argv[1:]
    worker = {"ours": Ours, "published": Published}[kind](int(port), path)
    print("ready", file=answers, flush=True)
    for line in sys.stdin:
        what = line.strip()
        getattr(worker, f"before_{what}", lambda: None)()
        with peak() as most:
            begun, used = time.perf_counter(), time.process_time()
            got = getattr(worker, what)()
            seconds, used = time.perf_counter() - begun, time.process_time() - used
        print(seconds, used, most[0], file=answers, flush=True)
        if hasattr(got, "close"):
            got.close()
        del got


if __name__ == "__main__":
    main()
