"""The client's callbacks, made ready for the processes that run them."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

from scaleout_mp.client.calls import CustomCall, TrainCall, ValidateCall
from scaleout_mp.client.values import callback_name
from scaleout_mp.errors import ConfigError
from scaleout_mp.supervisor.messages import CUSTOM_PREFIX, TaskType

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from scaleout_mp.client import EdgeClient
    from scaleout_mp.executor import PreparedCallable


class CallbackTable:
    """Pickles each callback once, and again only when the client has another one in its place."""

    def __init__(self, client: EdgeClient, prepare: Callable[[Callable[..., Any]], PreparedCallable]) -> None:
        """Read the callbacks off `client`; `prepare` is the executor's."""
        self._client = client
        self._prepare = prepare
        self._ready: dict[str, tuple[Callable[..., Any], PreparedCallable]] = {}

    def require_any(self) -> None:
        """Raise ConfigError, in one line, when the client could not serve a single task."""
        if not any(True for _ in self._registered()):
            raise ConfigError(
                "no callback registered: call set_train_callback, set_validate_callback or "
                "set_custom_callback before run"
            )

    def prepare_all(self) -> None:
        """Make all callbacks ready. Raises CallbackNotSendable that names the one that cannot be sent."""
        for task_type, callback in self._registered():
            self._ready[task_type] = callback, self._prepare(_call_for(task_type)(callback))

    async def prepared(self, task_type: str) -> PreparedCallable:
        """Return what runs a task of this type.

        Raises ConfigError when nothing does, CallbackNotSendable when what replaced a callback cannot be sent.
        """
        callback = self._callback(task_type)
        known = self._ready.get(task_type)
        if known is not None and known[0] is callback:
            return known[1]
        # On a thread: a closure may hold gigabytes, and polls must not wait for them.
        ready = await asyncio.to_thread(self._prepare, _call_for(task_type)(callback))
        self._ready[task_type] = callback, ready
        return ready

    def name(self, task_type: str) -> str:
        """Return a task's name for people: its type and what runs."""
        return f"{task_type} ({callback_name(self._callback(task_type))})"

    def _registered(self) -> Iterator[tuple[str, Callable[..., Any]]]:
        if self._client.train_callback is not None:
            yield TaskType.MODEL_UPDATE, self._client.train_callback
        if self._client.validate_callback is not None:
            yield TaskType.VALIDATION, self._client.validate_callback
        yield from self._client.registered_callbacks.items()

    def _callback(self, task_type: str) -> Callable[..., Any]:
        for known, callback in self._registered():
            if known == task_type:
                return callback
        what = {TaskType.MODEL_UPDATE.value: "train callback", TaskType.VALIDATION.value: "validate callback"}
        if task_type in what:
            raise ConfigError(f"this client has no {what[task_type]}")
        if task_type.startswith(CUSTOM_PREFIX):
            raise ConfigError(f"this client has no custom callback for {task_type}")
        raise ConfigError(f"this client does not know tasks of type {task_type!r}")


def _call_for(task_type: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    if task_type == TaskType.MODEL_UPDATE:
        return TrainCall
    if task_type == TaskType.VALIDATION:
        return ValidateCall
    return CustomCall
