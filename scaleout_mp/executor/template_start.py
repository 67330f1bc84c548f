"""How a template process is started: its command, its environment, and what it is told first."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import scaleout_mp
from scaleout_mp.config.machine import THREAD_VARIABLES
from scaleout_mp.executor import standard
from scaleout_mp.ipc import frames
from scaleout_mp.ipc.frames import Kind
from scaleout_mp.sandbox.layers import Rules

if TYPE_CHECKING:
    import socket
    from collections.abc import Mapping, Sequence

    from scaleout_mp.config import Sandbox
    from scaleout_mp.executor.interpreter import Interpreter
    from scaleout_mp.sandbox.tree_group import TreeGroup


@dataclasses.dataclass(frozen=True, kw_only=True)
class TemplatePlace:
    """What a template finds around it."""

    #: Its environment, which tasks inherit.
    environment: Mapping[str, str]
    #: The folder that holds the scratch folders, for who is left when the supervisor is killed.
    scratch: str
    #: Other folders in which each task has something of its own.
    shared: tuple[str, ...] = ()
    #: Around the groups of all templates, where there is one.
    group: TreeGroup | None = None
    #: Where all tasks start; "" for where the template stands, None for each in its own folder.
    start_folder: str | None = None


def start_process(
    place: TemplatePlace,
    interpreter: Interpreter,
    *,
    channel: socket.socket,
    lookout: socket.socket,
    group: TreeGroup | None,
) -> subprocess.Popen[bytes]:
    """Start a template with its ends of both channels; `group` is what it is to join.

    Called when this process has all three standard streams.
    """
    command = [
        sys.executable if interpreter.environment is None else interpreter.environment.executable,
        # A module of the user's folder must not stand in for one of the standard library.
        "-P",
        "-m",
        "scaleout_mp.worker",
        place.scratch,
        str(lookout.fileno()),
        *([] if group is None else [group.folder]),
    ]
    # Through vfork and exec, never a plain fork: this process may have gRPC's threads.
    return subprocess.Popen(
        command,
        pass_fds=[lookout.fileno()],
        stdin=channel.fileno(),
        stdout=standard.for_child(1),
        stderr=standard.for_child(2),
        env=_template_environment(place.environment, interpreter),
        # Out of reach of what a terminal, or `timeout`, sends to a process group.
        start_new_session=True,
    )


def setup_frame(
    place: TemplatePlace,
    interpreter: Interpreter,
    *,
    spawns: bool,
    preload: Sequence[str],
    threads: int,
    sandbox: Sandbox,
) -> bytes:
    """Return the first frame that a template gets: how it starts tasks, and what it has to have for them."""
    return frames.encode(
        Kind.SETUP,
        spawns,
        preload,
        interpreter.script_fields(_script_fields()),
        threads,
        _rules(sandbox, place).to_fields(),
    )


def _template_environment(environment: Mapping[str, str], interpreter: Interpreter) -> dict[str, str]:
    """Add what the template itself needs; it puts PYTHONPATH back once it has found this package."""
    if interpreter.environment is not None:
        search_path = interpreter.environment.package_root
    else:
        package_root = os.path.dirname(os.path.dirname(scaleout_mp.__file__))
        search_path = os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH"), package_root]))
    return {**environment, **dict.fromkeys(THREAD_VARIABLES, "1"), "PYTHONPATH": search_path}


def _rules(sandbox: Sandbox, place: TemplatePlace) -> Rules:
    start = [] if place.start_folder is None else [place.start_folder or os.getcwd()]
    return Rules.of(sandbox, read=start, places=(place.scratch, *place.shared))


def _script_fields() -> dict[str, Any]:
    entries = []
    for entry in sys.path:
        try:
            entries.append(os.fsencode(_from_anywhere(entry)))
        except (OSError, TypeError):
            # A folder that is gone, or something that only an import hook understands.
            continue
    main_file = getattr(sys.modules.get("__main__"), "__file__", None)
    return {
        "search_path": entries,
        "main_file": None if main_file is None else os.fsencode(os.path.abspath(main_file)),
        "python_path": _python_path(),
    }


def _python_path() -> bytes | None:
    path = os.environ.get("PYTHONPATH")
    return os.fsencode(os.pathsep.join(map(_from_anywhere, path.split(os.pathsep)))) if path else None


def _from_anywhere(entry: str) -> str:
    """Return an entry of the search path as it has to be for tasks, which stand elsewhere; "" is where we stand."""
    # What is no file is the name of an import hook.
    return os.path.abspath(entry) if not entry or os.path.exists(entry) else entry
