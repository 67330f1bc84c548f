"""The models that are staged for inference: in the cache on the disk, and each with a worker of its own."""

from __future__ import annotations

import asyncio
import logging
import os
import weakref
from typing import TYPE_CHECKING

from scaleout_mp.client.inference_calls import INFERENCE, STAGE_MODEL
from scaleout_mp.errors import ModelError, ModelFormatError, ModelNotFoundError
from scaleout_mp.ipc import arguments
from scaleout_mp.model import ModelStore, ScaleoutModel
from scaleout_mp.supervisor.callbacks import MissingCallbackError
from scaleout_mp.supervisor.staged_model import InferencePlan, StagedModel, staging_arguments
from scaleout_mp.transport.aside import close_aside

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from scaleout_mp.executor import ExecutorCore, Outcome, PreparedCallable
    from scaleout_mp.ipc.arguments import PackedArguments
    from scaleout_mp.supervisor.callbacks import Callbacks
    from scaleout_mp.task import Record

logger = logging.getLogger(__name__)


class StagedModels:
    """On the executor's event loop. A model that nobody asks for the plan's `idle_seconds` is given back."""

    def __init__(
        self,
        core: ExecutorCore,
        callbacks: Callbacks,
        plan: InferencePlan,
        fetch: Callable[[str], Awaitable[ScaleoutModel]],
    ) -> None:
        """`fetch` gets a model that is not in the cache. Raises a ScaleoutError when it cannot."""
        self._core = core
        self._callbacks = callbacks
        self._plan = plan
        self._fetch = fetch
        self._staged: dict[str, StagedModel] = {}
        #: Those that were replaced by others of the same id and are still in use.
        self._replaced: set[StagedModel] = set()
        #: Who stages a model, so that nobody does it at the same time; those who wait keep the lock.
        self._locks: weakref.WeakValueDictionary[str, asyncio.Lock] = weakref.WeakValueDictionary()
        self._store: ModelStore | None = None
        self._timer: asyncio.TimerHandle | None = None

    # Who uses which

    async def open(self, model_id: str) -> StagedModel:
        """Return a model that is staged by now: out of the cache, or fetched. `release` it.

        Raises a ScaleoutError when it cannot be had.
        """
        staged = self._staged.get(model_id)
        if staged is None:
            async with self._lock(model_id):
                staged = self._staged.get(model_id)
                if staged is None:
                    staged = self._enter(model_id, await self._cached_or_fetched(model_id))
        staged.users += 1
        return staged

    async def open_given(self, model: ScaleoutModel) -> StagedModel:
        """Return a model that the program has, without a place in the cache. `release` it."""
        key = model.model_id or str(await asyncio.to_thread(lambda: model.checksum[:16]))
        staged = self._staged.get(key)
        if staged is None or not staged.was_given(model):
            async with self._lock(key):
                staged = self._staged.get(key)
                if staged is None or not await asyncio.to_thread(staged.is_made_of, model):
                    staged = self._enter(key, ScaleoutModel.from_fd(model.fileno(), verify=False))
                    staged.made_of(model)
        staged.users += 1
        return staged

    def release(self, staged: StagedModel) -> None:
        """Say that one user is done with it."""
        staged.users -= 1
        if staged.users:
            return
        staged.idle_since = asyncio.get_running_loop().time()
        if staged in self._replaced:
            self._replaced.remove(staged)
            self._give_back(staged)
        elif self._timer is None and self._plan.idle_seconds is not None:
            self._timer = asyncio.get_running_loop().call_later(self._plan.idle_seconds, self._on_timer)

    def _lock(self, key: str) -> asyncio.Lock:
        return self._locks.setdefault(key, asyncio.Lock())

    def _enter(self, key: str, model: ScaleoutModel) -> StagedModel:
        before = self._staged.pop(key, None)
        if before is not None:
            if before.users:
                self._replaced.add(before)
            else:
                self._give_back(before)
        staged = self._staged[key] = StagedModel(key, model, self._core, self._plan)
        return staged

    def _on_timer(self) -> None:
        self._timer = None
        loop, seconds = asyncio.get_running_loop(), self._plan.idle_seconds
        assert seconds is not None
        idle = [staged for staged in self._staged.values() if not staged.users]
        for staged in idle:
            if staged.idle_since + seconds <= loop.time():
                del self._staged[staged.key]
                self._give_back(staged)
        left = [staged.idle_since + seconds for staged in self._staged.values() if not staged.users]
        if left:
            self._timer = loop.call_at(min(left), self._on_timer)

    def _give_back(self, staged: StagedModel) -> None:
        if staged.key not in self._staged:
            self._core.retire_worker(staged.worker_name)
        close_aside(staged)

    # The cache

    async def stage(self, model: ScaleoutModel | str) -> ScaleoutModel:
        """Put a model into the cache and return it as it lies there; the caller closes it.

        Raises a ScaleoutError.
        """
        if isinstance(model, str):
            staged = await self.open(model)
        else:
            if model.model_id is None:
                raise ModelError("a model without an id cannot be staged: give it one by to_builder().set_model_id")
            staged = await self._open_cached(model, model.model_id)
        try:
            return ScaleoutModel.from_fd(staged.model.fileno(), verify=False)
        finally:
            self.release(staged)

    async def _open_cached(self, model: ScaleoutModel, model_id: str) -> StagedModel:
        def is_cached(staged: StagedModel) -> bool:
            try:
                return staged.is_made_of(model) and os.path.exists(self._path(model_id))
            except OSError:
                # There can be no cache; who puts it there says so.
                return False

        async with self._lock(model_id):
            staged = self._staged.get(model_id)
            if staged is None or not await asyncio.to_thread(is_cached, staged):
                staged = self._enter(model_id, await self._kept(model, model_id))
                staged.made_of(model)
        staged.users += 1
        return staged

    def _path(self, model_id: str) -> str:
        """Return where a model lies in the cache, or would. Raises ModelError for an id that is no plain name."""
        try:
            return self._opened_store().path(model_id)
        except ValueError as error:
            raise ModelError(str(error)) from None

    async def _cached_or_fetched(self, model_id: str) -> ScaleoutModel:
        def cached() -> ScaleoutModel:
            self._path(model_id)
            return self._opened_store().get(model_id)

        try:
            return await asyncio.to_thread(cached)
        except ModelFormatError as error:
            logger.warning(
                "model %s in the cache is damaged and loaded anew: %s",
                model_id,
                error,
                extra={"action": "cached_model_damaged", "model_id": model_id},
            )
        except ModelNotFoundError:
            pass
        except OSError as error:
            self._warn(model_id, error)
        model = await self._fetch(model_id)
        try:
            return await self._kept(model, model_id)
        finally:
            close_aside(model)

    async def _kept(self, model: ScaleoutModel, model_id: str) -> ScaleoutModel:
        """Return a model as it lies in the cache; in memory when there is no room for it."""

        def keep() -> ScaleoutModel:
            store = self._opened_store()
            self._path(model_id)
            named = model if model.model_id == model_id else model.to_builder().set_model_id(model_id).build()
            store.put(named)
            return store.get(model_id, verify=False)

        try:
            return await asyncio.to_thread(keep)
        except (OSError, ModelError) as error:
            self._warn(model_id, error)
            return ScaleoutModel.from_fd(model.fileno(), verify=False)

    def _warn(self, model_id: str, error: Exception) -> None:
        logger.warning(
            "model %s cannot be kept in the model cache %s: %s; a restart loads it again",
            model_id,
            self._plan.cache_dir,
            error,
            extra={"action": "model_not_cached", "model_id": model_id},
        )

    def _opened_store(self) -> ModelStore:
        if self._store is None:
            self._store = ModelStore(self._plan.cache_dir)
        return self._store

    # Asking, for the program itself

    async def warm(self, model_id: str, *, task_id: str) -> Outcome | None:
        """See to it that a process has staged the model; None when no callback has anything to do with models."""
        try:
            call = await self._callbacks.prepared(STAGE_MODEL)
        except MissingCallbackError:
            return None
        packed = arguments.pack(staging_arguments(), {})
        return await self._ask(model_id, STAGE_MODEL, call, packed, task_id=task_id, on_record=None)

    async def infer(
        self,
        model: ScaleoutModel | str,
        packed: PackedArguments,
        *,
        task_id: str,
        on_record: Callable[[Record], None] | None,
    ) -> Outcome:
        """Run the inference callback. Takes over `packed`. Raises a ScaleoutError when it could not even begin."""
        try:
            call = await self._callbacks.prepared(INFERENCE)
        except BaseException:
            packed.close()
            raise
        return await self._ask(model, INFERENCE, call, packed, task_id=task_id, on_record=on_record)

    async def _ask(
        self,
        model: ScaleoutModel | str,
        task_type: str,
        call: PreparedCallable,
        packed: PackedArguments,
        *,
        task_id: str,
        on_record: Callable[[Record], None] | None,
    ) -> Outcome:
        try:
            staged = await (self.open(model) if isinstance(model, str) else self.open_given(model))
        except BaseException:
            packed.close()
            raise
        try:
            name = self._callbacks.name(task_type)
            return await staged.ask(call, packed, task_id=task_id, name=name, on_record=on_record)
        finally:
            self.release(staged)

    async def aclose(self) -> None:
        """Give all models back; the executor is closed."""
        if self._timer is not None:
            self._timer.cancel()
        for staged in [*self._staged.values(), *self._replaced]:
            staged.close()
        self._staged.clear()
        self._replaced.clear()
