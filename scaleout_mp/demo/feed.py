"""What a client's own runtime sees of its tasks, as JSON lines on a pipe to whoever watches."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import threading
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from scaleout_mp.supervisor import GrpcEdgeClientRuntime
    from scaleout_mp.supervisor.snapshot import ClientSnapshot

#: Seconds between two lines.
INTERVAL: Final = 0.1


@dataclasses.dataclass(frozen=True, kw_only=True)
class TaskView:
    """One running task, as a live view needs it."""

    correlation_id: str
    type: str
    #: pending, downloading, running, uploading or reporting; stopping when it is being killed.
    state: str
    #: Bytes of its own.
    memory: int
    #: Bytes; None: no limit.
    limit: int | None
    step: int | None
    metrics: Mapping[str, float]


def encode(snapshot: ClientSnapshot) -> bytes:
    """Return a snapshot as one line."""
    tasks = [
        TaskView(
            correlation_id=task.correlation_id,
            type=task.type,
            state="stopping" if task.process_state == "stopping" else task.phase,
            memory=task.memory_now,
            limit=task.memory_limit,
            step=task.last_step,
            metrics=dict(task.last_metrics),
        )
        for task in snapshot.tasks
    ]
    return json.dumps([dataclasses.asdict(task) for task in tasks]).encode() + b"\n"


def decode(line: bytes) -> tuple[TaskView, ...]:
    """Return the tasks of one line."""
    found: list[dict[str, Any]] = json.loads(line)
    return tuple(TaskView(**task) for task in found)


@contextlib.contextmanager
def feeding(runtime: GrpcEdgeClientRuntime, descriptor: int) -> Iterator[None]:
    """Write a line to a pipe ten times a second during the block.

    When nobody reads the pipe any more, because whoever started this client is gone, the client ends too.
    """
    # Tasks must not hold the pipe open. A reader that was suspended must not suspend the client.
    os.set_inheritable(descriptor, False)
    os.set_blocking(descriptor, False)
    ended = threading.Event()

    def feed() -> None:
        while not ended.wait(INTERVAL):
            try:
                os.write(descriptor, encode(runtime.snapshot()))
            except BlockingIOError:
                continue
            except BrokenPipeError:
                # At once, which is what the second call means: the network is gone too, nobody hears a goodbye.
                runtime.stop()
                runtime.stop()
                return

    thread = threading.Thread(target=feed, name="feed", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        os.close(descriptor)
