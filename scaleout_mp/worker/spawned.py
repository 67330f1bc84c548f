"""The `spawn` start method: a fresh interpreter for one task.

Run by the template as `python -m scaleout_mp.worker.spawned`, with the task's channel as descriptor 3 and, in a memfd
as descriptor 5, the module search path, the pickled callable and what the process has to put on. What the callable
captured, where it is large, is descriptor 6.
"""

from __future__ import annotations

import dataclasses
import faulthandler
import fcntl
import os
import sys
from typing import TYPE_CHECKING, Any, Final, NoReturn, Self

import msgpack

from scaleout_mp.config.machine import THREAD_VARIABLES
from scaleout_mp.ipc.callables import SentCallable
from scaleout_mp.sandbox import process
from scaleout_mp.sandbox.confinement import Confinement
from scaleout_mp.sandbox.layers import OwnLayers
from scaleout_mp.worker import resident, task
from scaleout_mp.worker.script import Script
from scaleout_mp.worker.task import CHANNEL_DESCRIPTOR

if TYPE_CHECKING:
    from collections.abc import Sequence

_ORDER_DESCRIPTOR: Final = process.STACK_DESCRIPTOR + 1
_MEMORY_DESCRIPTOR: Final = _ORDER_DESCRIPTOR + 1
#: Above the descriptors that the new process gets, so that no move overwrites another's source.
_HIGH: Final = 64


@dataclasses.dataclass(frozen=True, kw_only=True)
class Program:
    """What a fresh interpreter needs beside its confinement."""

    script: Script
    callable: SentCallable
    own: OwnLayers

    def to_fields(self) -> dict[str, Any]:
        """Return what is packed for the interpreter."""
        return {
            "script": dataclasses.asdict(self.script),
            "callable": self.callable.table,
            "memory": self.callable.fileno() is not None,
            "own": self.own.to_fields(),
        }

    @classmethod
    def from_fields(cls, fields: dict[str, Any]) -> Self:
        """Read what `to_fields` returned, in the interpreter that was started with it."""
        return cls(
            script=Script(**fields["script"]),
            callable=SentCallable(fields["callable"], _MEMORY_DESCRIPTOR if fields["memory"] else None),
            own=OwnLayers.from_fields(fields["own"]),
        )


def start_interpreter(descriptors: Sequence[int], confinement: Confinement, program: Program) -> int:
    """Start an interpreter for a task and return its pid. Called in the template.

    `descriptors` are channel, standard output, standard error and stacks; the caller keeps its own.
    """
    order = os.memfd_create("scaleout-order", os.MFD_CLOEXEC)
    high = []
    try:
        packed = msgpack.packb([os.getpid(), confinement.to_fields(), program.to_fields()])
        _write_all(order, packed)
        memory = program.callable.fileno()
        given = (*descriptors, order) if memory is None else (*descriptors, order, memory)
        high = [fcntl.fcntl(descriptor, fcntl.F_DUPFD_CLOEXEC, _HIGH) for descriptor in given]
        channel, stdout, stderr, stacks, moved_order, *moved_memory = high
        return os.posix_spawn(
            sys.executable,
            [sys.executable, "-m", "scaleout_mp.worker.spawned"],
            {**os.environ, **dict.fromkeys(THREAD_VARIABLES, str(confinement.threads))},
            file_actions=[
                (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
                (os.POSIX_SPAWN_DUP2, stdout, 1),
                (os.POSIX_SPAWN_DUP2, stderr, 2),
                (os.POSIX_SPAWN_DUP2, channel, CHANNEL_DESCRIPTOR),
                (os.POSIX_SPAWN_DUP2, stacks, process.STACK_DESCRIPTOR),
                (os.POSIX_SPAWN_DUP2, moved_order, _ORDER_DESCRIPTOR),
                *((os.POSIX_SPAWN_DUP2, moved, _MEMORY_DESCRIPTOR) for moved in moved_memory),
            ],
        )
    finally:
        for descriptor in (order, *high):
            os.close(descriptor)


def _write_all(descriptor: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]


def main() -> NoReturn:
    """Serve the task whose channel is descriptor 3."""
    with open(_ORDER_DESCRIPTOR, "rb") as file:
        # The descriptor shares its offset with the template's, which stands at the end.
        file.seek(0)
        template, confinement_fields, program_fields = msgpack.unpackb(file.read())
    confinement = Confinement(**confinement_fields)
    program = Program.from_fields(program_fields)
    memory = program.callable.fileno()
    for descriptor in (CHANNEL_DESCRIPTOR, process.STACK_DESCRIPTOR, *([] if memory is None else [memory])):
        os.set_inheritable(descriptor, False)
    process.reset_signals(process.changed_signals())
    faulthandler.enable(file=2)
    os.setsid()
    process.die_with_parent(template)
    # Before the limits: it needs descriptors for a moment.
    streams = task.line_streams()
    program.own.put_on_early()
    confinement.apply(program.own)
    program.script.apply_search_path()
    serve = resident.run if confinement.resident else task.run
    serve(program.callable.load, confinement, program.script, streams)


if __name__ == "__main__":
    main()
