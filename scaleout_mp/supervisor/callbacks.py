"""The client's callbacks, made ready for the processes that run them."""

from __future__ import annotations

import abc
import asyncio
import dataclasses
from typing import TYPE_CHECKING, Any, Final

from scaleout_mp.client.calls import CallbackSet, CustomCall, TrainCall, ValidateCall
from scaleout_mp.client.inference_calls import calls_of
from scaleout_mp.client.values import callback_name
from scaleout_mp.errors import CallbackNotSendable, ConfigError
from scaleout_mp.executor.residents import WorkerSpec
from scaleout_mp.supervisor.messages import CUSTOM_PREFIX, TaskType

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from scaleout_mp.client import EdgeClient
    from scaleout_mp.executor import PreparedCallable


#: Name of the worker that runs callbacks.
CALLBACK_WORKER: Final = "callbacks"


_CALLBACK_NAMES: Final = {
    TaskType.MODEL_UPDATE.value: "train callback",
    TaskType.VALIDATION.value: "validate callback",
    TaskType.STAGE_MODEL.value: "stage-model callback and no inference callback",
    TaskType.INFERENCE.value: "inference callback: call set_inference_callback",
}
#: Tasks that run in the process of a staged model; their callbacks go there together.
OF_STAGED_MODELS: Final = frozenset({TaskType.STAGE_MODEL, TaskType.INFERENCE})


class MissingCallbackError(ConfigError):
    """This client has no callback for tasks of that type."""


class Callbacks(abc.ABC):
    """What runs the tasks of each type."""

    def require_any(self) -> None:  # noqa: B027 - what can be said before the executor runs
        """Raise ConfigError, in one line, when the client could not serve a single task."""

    def prepare_all(self) -> None:  # noqa: B027
        """Make ready what can be made ready before the executor runs. Raises CallbackNotSendable."""

    async def open(self) -> None:  # noqa: B027 - most have nothing to open
        """Get ready to run tasks; called once the executor runs."""

    async def aclose(self) -> None:  # noqa: B027
        """End what `open` began."""

    @abc.abstractmethod
    async def worker(self, task_type: str) -> WorkerSpec | None:
        """Return the worker that is to run a task of this type; None: a fresh process does. Raises as `prepared`."""

    @abc.abstractmethod
    async def prepared(self, task_type: str) -> PreparedCallable:
        """Return what runs a task of this type. Raises a ScaleoutError when nothing does, or it cannot be sent."""

    @abc.abstractmethod
    def leading(self, task_type: str) -> tuple[Any, ...]:
        """Return the arguments that what is `prepared` takes before those of the task."""

    @abc.abstractmethod
    def name(self, task_type: str) -> str:
        """Return a task's name for people: its type and what runs."""


class CallbackTable(Callbacks):
    """Pickles each callback once, and again only when the client has another one in its place."""

    def __init__(self, client: EdgeClient, prepare: Callable[[Callable[..., Any]], PreparedCallable]) -> None:
        """Read the callbacks off `client`; `prepare` is the executor's."""
        self._client = client
        self._prepare = prepare
        self._ready: dict[str, tuple[Callable[..., Any], PreparedCallable]] = {}
        #: Stage and inference callback, and what they are together.
        self._pair: tuple[tuple[Any, Any], PreparedCallable] | None = None

    async def worker(self, _task_type: str) -> WorkerSpec | None:
        """Return None: a fresh process runs each task."""
        return None

    def require_any(self) -> None:
        """Raise ConfigError, in one line, when the client could not serve a single task."""
        if not any(True for _ in self._registered()) and not any(self._pair_now()):
            raise ConfigError(
                "no callback registered: call set_train_callback, set_validate_callback, set_inference_callback or "
                "set_custom_callback before run"
            )

    def prepare_all(self) -> None:
        """Make all callbacks ready. Raises CallbackNotSendable that names the one that cannot be sent."""
        for task_type, callback in self._registered():
            self._ready[task_type] = callback, self._prepare(_call_for(task_type)(callback))
        self._prepare_pair()

    def _pair_now(self) -> tuple[Callable[..., Any] | None, Callable[..., Any] | None]:
        return self._client.stage_model_callback, self._client.inference_callback

    def _prepare_pair(self) -> None:
        stage, infer = self._pair_now()
        calls = calls_of(stage, infer)
        if not calls:
            return
        self._pair = (stage, infer), self._prepare_together(calls, name=callback_name(infer or stage))

    def _prepare_together(
        self, calls: Mapping[str, Callable[..., Any]], *, name: str | None = None
    ) -> PreparedCallable:
        try:
            ready = self._prepare(CallbackSet(calls))
        except CallbackNotSendable:
            for call in calls.values():
                # Raises for the one that it is about.
                self._prepare(call)
            raise
        return ready if name is None else dataclasses.replace(ready, name=name)

    async def _prepared_pair(self, task_type: str) -> PreparedCallable:
        """Return the callbacks of staged models. Raises MissingCallbackError and CallbackNotSendable."""
        pair = self._pair_now()
        if task_type not in calls_of(*pair):
            raise missing(task_type)
        if self._pair is None or self._pair[0] != pair:
            await asyncio.to_thread(self._prepare_pair)
        assert self._pair is not None
        return self._pair[1]

    async def prepared(self, task_type: str) -> PreparedCallable:
        """Return what runs a task of this type.

        Raises ConfigError when nothing does, CallbackNotSendable when what replaced a callback cannot be sent.
        """
        if task_type in OF_STAGED_MODELS:
            return await self._prepared_pair(task_type)
        callback = self._callback(task_type)
        known = self._ready.get(task_type)
        if known is not None and known[0] is callback:
            return known[1]
        # On a thread: a closure may hold gigabytes, and polls must not wait for them.
        ready = await asyncio.to_thread(self._prepare, _call_for(task_type)(callback))
        self._ready[task_type] = callback, ready
        return ready

    def leading(self, task_type: str) -> tuple[Any, ...]:
        """Return the arguments that what is `prepared` takes before those of the task."""
        return (str(task_type),) if task_type in OF_STAGED_MODELS else ()

    def name(self, task_type: str) -> str:
        """Return a task's name for people: its type and what runs."""
        if task_type in OF_STAGED_MODELS:
            stage, infer = self._pair_now()
            callback = stage if task_type == TaskType.STAGE_MODEL else infer
            return str(task_type) if callback is None else f"{task_type} ({callback_name(callback)})"
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
        raise missing(task_type)


class SharedCallbacks(CallbackTable):
    """Pickles all callbacks together, for one worker in which they share what they hold."""

    def __init__(self, client: EdgeClient, prepare: Callable[[Callable[..., Any]], PreparedCallable]) -> None:
        """Read the callbacks off `client`; `prepare` is the executor's."""
        super().__init__(client, prepare)
        self._known: dict[str, Callable[..., Any]] = {}
        self._shared: PreparedCallable | None = None

    async def worker(self, task_type: str) -> WorkerSpec | None:
        """Return the client's worker; when callbacks were replaced, one that has nothing of those before.

        Raises ConfigError and CallbackNotSendable.
        """
        return callback_worker(await self.prepared(task_type))

    def prepare_all(self) -> None:
        """Make all callbacks ready. Raises CallbackNotSendable that names the one that cannot be sent."""
        self._known = dict(self._registered())
        self._shared = self._prepare_all_of(self._known)
        self._prepare_pair()

    async def prepared(self, task_type: str) -> PreparedCallable:
        """Return what runs a task of any type. Raises ConfigError and CallbackNotSendable."""
        if task_type in OF_STAGED_MODELS:
            return await self._prepared_pair(task_type)
        self._callback(task_type)
        now = dict(self._registered())
        if self._shared is None or now != self._known:
            self._shared = await asyncio.to_thread(self._prepare_all_of, now)
            self._known = now
        return self._shared

    def leading(self, task_type: str) -> tuple[Any, ...]:
        """Return the arguments that what is `prepared` takes before those of the task."""
        return (str(task_type),)

    def _prepare_all_of(self, callbacks: Mapping[str, Callable[..., Any]]) -> PreparedCallable:
        # Plain strings: the enum would have the task's process import this layer.
        calls = {str(task_type): _call_for(task_type)(callback) for task_type, callback in callbacks.items()}
        return self._prepare_together(calls)


def callback_worker(call: PreparedCallable) -> WorkerSpec:
    """Return the client's worker, when it is made for these callbacks."""
    # Never ended for being idle: a round may be hours away, and what the callbacks keep would be lost.
    return WorkerSpec(name=CALLBACK_WORKER, idle_seconds=None, edition=call.key)


def missing(task_type: str) -> MissingCallbackError:
    """Return the error that says which callback there is not."""
    if task_type in _CALLBACK_NAMES:
        return MissingCallbackError(f"this client has no {_CALLBACK_NAMES[task_type]}")
    if task_type.startswith(CUSTOM_PREFIX):
        return MissingCallbackError(f"this client has no custom callback for {task_type}")
    return MissingCallbackError(f"this client does not know tasks of type {task_type!r}")


def _call_for(task_type: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    if task_type == TaskType.MODEL_UPDATE:
        return TrainCall
    if task_type == TaskType.VALIDATION:
        return ValidateCall
    return CustomCall
