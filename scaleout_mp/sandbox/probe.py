"""What this machine lets a task put on, tried out: containers and security modules refuse what the kernel has."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Callable

_LONGEST: Final = 4096


def refusal(action: Callable[[], object]) -> str | None:
    """Do something in a child that is thrown away; return why it did not work there, None when it did.

    Call it only in a process of one thread: it forks.
    """
    reader, writer = os.pipe2(os.O_CLOEXEC)
    pid = os.fork()
    if pid == 0:
        try:
            action()
        except BaseException as error:  # noqa: BLE001 - whatever it is, it is the answer
            os.write(writer, f"{type(error).__name__}: {error}"[:_LONGEST].encode("utf-8", "replace") or b"?")
        finally:
            os._exit(0)
    os.close(writer)
    try:
        answer = os.read(reader, _LONGEST * 4).decode("utf-8", "replace")
    finally:
        os.close(reader)
    _, status = os.waitpid(pid, 0)
    code = os.waitstatus_to_exitcode(status)
    return answer or (f"it died of signal {-code}" if code < 0 else None)
