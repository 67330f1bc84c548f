"""Staging and inference that the program itself asks for: in the client that runs, or without any network."""

from __future__ import annotations

import asyncio
import atexit
import concurrent.futures
import logging
import os
import threading
import uuid
from typing import TYPE_CHECKING, Any, Final, TypeVar

from scaleout_mp.client.calls import RequestInfo
from scaleout_mp.client.inference_calls import INFERENCE
from scaleout_mp.errors import ConfigError, ExecutorClosedError, ModelError
from scaleout_mp.executor.threads import Threads
from scaleout_mp.ipc.arguments import pack_plain
from scaleout_mp.ipc.lent import Lender
from scaleout_mp.model import ScaleoutModel
from scaleout_mp.supervisor.callbacks import CallbackTable
from scaleout_mp.supervisor.staged_model import inference_arguments
from scaleout_mp.supervisor.staged_models import StagedModels

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Coroutine

    from scaleout_mp.client import EdgeClient
    from scaleout_mp.executor import Outcome
    from scaleout_mp.ipc.arguments import PackedArguments
    from scaleout_mp.supervisor.service import ClientService
    from scaleout_mp.supervisor.service_plan import ServicePlan
    from scaleout_mp.task import Record

logger = logging.getLogger(__name__)

T = TypeVar("T")

#: Seconds between two looks at whether a loop is still there that somebody waits for.
_LOOK_EVERY: Final = 1.0


class LocalInference:
    """Blocking calls, from any thread. What they start outside a client that runs stays until `close`."""

    def __init__(
        self,
        *,
        make_plan: Callable[[], ServicePlan],
        client: Callable[[], EdgeClient],
        at_work: Callable[[], tuple[asyncio.AbstractEventLoop, ClientService] | None],
        fetch: Callable[[str], Awaitable[ScaleoutModel]],
        on_record: Callable[[Record], None],
    ) -> None:
        """`at_work` says which service runs; `fetch` gets a model where none does. `on_record` is called on a loop."""
        self._make_plan = make_plan
        self._client = client
        self._at_work = at_work
        self._fetch = fetch
        self._on_record = on_record
        self._start_anew()

    def _start_anew(self) -> None:
        self._pid = os.getpid()
        self._lock = threading.Lock()
        self._host: _Host | None = None
        self._lender = Lender()

    def _require_own(self) -> None:
        """Have a process that was forked from the program begin with nothing: what there was is its parent's."""
        if self._pid != os.getpid():
            self._start_anew()

    def stage(self, model: ScaleoutModel | str) -> ScaleoutModel:
        """Put a model into the cache and have a process stage it; return it as it lies in the cache.

        Raises a ScaleoutError; a TaskError when it was the stage callback that did not complete.
        """
        require_model(model)
        self._require_own()

        async def stage(models: StagedModels) -> tuple[ScaleoutModel, Outcome | None]:
            staged = await models.stage(model)
            try:
                assert staged.model_id is not None
                return staged, await models.warm(staged.model_id, task_id=uuid.uuid4().hex)
            except BaseException:
                staged.close()
                raise

        staged, outcome = self._wait(*self._placed(stage))
        if outcome is not None and not outcome.report.completed:
            staged.close()
            raise outcome.report.to_error()
        return staged

    def infer(self, model: ScaleoutModel | str, parameters: Any) -> Any:
        """Run the inference callback in the model's process and return what it returned.

        Raises a ScaleoutError; a TaskError when it was the callback that did not complete.
        """
        require_model(model)
        self._require_own()
        task_id = uuid.uuid4().hex
        model_id = model if isinstance(model, str) else model.model_id or ""
        request = RequestInfo(type=INFERENCE, correlation_id=task_id, model_id=model_id, round_id="", session_id="")
        # Packed here: a large array must not hold up the loop, and errors belong to the caller.
        packed = pack_plain(
            inference_arguments(parameters, request), lend=lambda size: self._lender.lend(model_id, size)
        )
        outcome = self._ask(model, model_id, packed, task_id)
        if outcome.report.completed:
            return outcome.value
        raise outcome.report.to_error()

    def _ask(self, model: ScaleoutModel | str, borrower: str, packed: PackedArguments, task_id: str) -> Outcome:
        lent, back = packed.lent, False
        try:
            try:
                place = self._placed(
                    lambda models: models.infer(model, packed, task_id=task_id, on_record=self._on_record)
                )
            except BaseException:
                packed.close()
                raise
            try:
                outcome = self._wait(*place)
            except ExecutorClosedError:
                # Maybe before anybody took them over.
                packed.close()
                raise
            back = outcome.lent_back
            return outcome
        finally:
            if lent is not None and back:
                self._lender.take_back(borrower, lent)
            elif lent is not None:
                lent.close()

    @staticmethod
    def _wait(loop: asyncio.AbstractEventLoop, work: Coroutine[Any, Any, T]) -> T:
        try:
            future = asyncio.run_coroutine_threadsafe(work, loop)
        except RuntimeError:
            work.close()
            raise ExecutorClosedError from None
        try:
            while True:
                try:
                    return future.result(_LOOK_EVERY)
                except TimeoutError:
                    if future.done():
                        return future.result()
                    # A loop that ended in between answers nobody.
                    if loop.is_closed():
                        raise ExecutorClosedError from None
        except concurrent.futures.CancelledError:
            raise ExecutorClosedError from None
        except BaseException:
            # Ctrl-C while it waits: nobody wants the answer any more.
            future.cancel()
            raise

    def _placed(
        self, act: Callable[[StagedModels], Coroutine[Any, Any, T]]
    ) -> tuple[asyncio.AbstractEventLoop, Coroutine[Any, Any, T]]:
        at_work = self._at_work()
        if at_work is not None:
            loop, service = at_work

            async def when_ready() -> T:
                await service.ready.wait()
                return await act(service.models)

            return loop, when_ready()
        with self._lock:
            if self._host is None:
                plan = self._make_plan()
                if plan.package is not None:
                    raise ConfigError("the callbacks of a compute package are there while the client runs: call run")
                self._host = _Host(plan, self._client(), self._fetch)
            return self._host.loop, act(self._host.models)

    def close(self) -> None:
        """End the processes that hold models outside a client that runs; later calls start anew."""
        self._require_own()
        with self._lock:
            host, self._host = self._host, None
            lender, self._lender = self._lender, Lender()
        lender.close()
        if host is not None:
            host.close()


class _Host:
    """An executor on a loop of its own, on a thread, with the models that are staged there."""

    loop: asyncio.AbstractEventLoop
    models: StagedModels

    def __init__(self, plan: ServicePlan, client: EdgeClient, fetch: Callable[[str], Awaitable[ScaleoutModel]]) -> None:
        """Start it. Raises what kept it from starting."""
        self._plan = plan
        self._client = client
        self._fetch = fetch
        self._pid = os.getpid()
        self._threads = Threads()
        ready: concurrent.futures.Future[None] = concurrent.futures.Future()
        self._thread = threading.Thread(target=self._work, args=(ready,), name="scaleout-inference", daemon=True)
        self._thread.start()
        ready.result()
        atexit.register(self.close)

    def _work(self, ready: concurrent.futures.Future[None]) -> None:
        # The template's death signal is bound to the thread that starts it: this one, which lives as long as needed.
        self.loop = asyncio.new_event_loop()
        # A program that does not close the client does so in an exit handler.
        self.loop.set_default_executor(self._threads)
        try:
            self.loop.run_until_complete(self._open())
            ready.set_result(None)
            self.loop.run_forever()
        except BaseException as error:
            if ready.done():
                raise
            # It is raised in the thread that wanted it.
            ready.set_exception(error)
        finally:
            self.loop.run_until_complete(self._give_up_rest())
            self._threads.shutdown()
            self.loop.close()

    @staticmethod
    async def _give_up_rest() -> None:
        """Let nobody wait who came while it closed."""
        rest = asyncio.all_tasks() - {asyncio.current_task()}
        for task in rest:
            task.cancel()
        await asyncio.gather(*rest, return_exceptions=True)

    async def _open(self) -> None:
        self._core = self._plan.make_core()
        await self._core.start()
        callbacks = CallbackTable(self._client, self._core.prepare)
        self.models = StagedModels(self._core, callbacks, self._plan.inference, self._fetch)

    async def _aclose(self) -> None:
        await self._core.aclose("the program ends what it started for inference")
        await self.models.aclose()

    def close(self) -> None:
        """Abort what runs and end all processes."""
        atexit.unregister(self.close)
        if self._pid != os.getpid():
            # A fork of the program ends, which has no part in this.
            return
        asyncio.run_coroutine_threadsafe(self._aclose(), self.loop).result()
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join()


def require_model(model: Any) -> None:
    """Raise ModelError unless this is a model or an id."""
    if not isinstance(model, ScaleoutModel | str) or not model:
        raise ModelError(f"a model is a ScaleoutModel or the id of one, not {model!r}")
