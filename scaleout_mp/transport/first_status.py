"""The status with which a server ended a call while this side was still writing.

grpc.aio loses it: a write that fails because the call has ended puts INTERNAL, "Internal error from Core", in the place
of what the server said (https://github.com/grpc/grpc/issues/36066). Of the two one comes first, and the callbacks for a
call's end are called with that one, while the call itself raises the other: so the server's can be told.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, TypeVar

import grpc
import grpc.aio

if TYPE_CHECKING:
    from collections.abc import Coroutine

T = TypeVar("T")

_LOST: Final = "Internal error from Core"


class FirstStatus:
    """What a call ended with at first. Make it before the call has ended."""

    def __init__(self, call: Any) -> None:
        self._code: grpc.StatusCode | None = None
        self._details = ""
        call.add_done_callback(self._note)

    def _note(self, call: Any) -> None:
        code, details = _at_once(call.code()), _at_once(call.details())
        if self._code is None and code is not None and not _is_lost(code, details):
            self._code, self._details = code, details or ""

    def instead_of(self, error: grpc.aio.AioRpcError) -> grpc.aio.AioRpcError:
        """Return the error that the server meant, for the one that the call raised. Its code may be OK."""
        if self._code is None or not _is_lost(error.code(), error.details()):
            return error
        nothing = grpc.aio.Metadata()
        return grpc.aio.AioRpcError(self._code, nothing, nothing, details=self._details, debug_error_string=None)


def _is_lost(code: grpc.StatusCode, details: str | None) -> bool:
    return code is grpc.StatusCode.INTERNAL and (details or "").startswith(_LOST)


def _at_once(coroutine: Coroutine[Any, Any, T]) -> T | None:
    """Return what a coroutine returns that has nothing to wait for; None when it waits all the same."""
    try:
        coroutine.send(None)
    except StopIteration as done:
        value: T = done.value
        return value
    coroutine.close()
    return None
