"""One round: train on every client, average what comes, validate the new model."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
import uuid
from typing import TYPE_CHECKING, Any, TypeVar

from scaleout_mp.errors import ModelError
from scaleout_mp.localnet.aggregation import FedAvg, num_examples
from scaleout_mp.localnet.events import (
    RoundFinished,
    RoundStarted,
    UpdateReceived,
    UpdateRejected,
    ValidationReceived,
)
from scaleout_mp.localnet.results import RoundResult, RunStatus, SessionPlan, UpdateResult, ValidationResult
from scaleout_mp.localnet.tasks import MODEL_UPDATE, VALIDATION, IssuedTask, TaskOutcome
from scaleout_mp.model import ScaleoutModel

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable, Coroutine, Sequence

    from scaleout_mp.localnet.parts import NetworkParts

logger = logging.getLogger(__name__)

T = TypeVar("T")


class Round:
    """One try of one round. Lives on the network's loop; `run` once."""

    def __init__(self, parts: NetworkParts, plan: SessionPlan, *, number: int, attempt: int, model_id: str) -> None:
        self.round_id = str(uuid.uuid4())
        self._parts = parts
        self._plan = plan
        self._number = number
        self._attempt = attempt
        self._model_id = model_id
        self._aborted = asyncio.Event()
        self._updates: list[UpdateResult] = []
        self._validations: list[ValidationResult] = []
        self._tasks: list[IssuedTask] = []
        self._outcomes: list[TaskOutcome] = []

    def abort(self) -> None:
        """End the round now: its tasks are told INTERRUPTED.

        Updates are dropped; a model that was made already is kept.
        """
        self._aborted.set()

    async def run(self) -> RoundResult:
        """Run the round; its failure is a result, not an exception. Cancelled: its tasks are interrupted."""
        started = time.monotonic()
        try:
            new_model_id = await self._train()
            if new_model_id is not None and self._plan.validate:
                await self._validate(new_model_id)
        finally:
            for task in self._tasks:
                task.closed = True
                if not task.ended.done():
                    self._parts.book.interrupt(task)
            await asyncio.to_thread(self._remove_unused)
        status = RunStatus.FINISHED
        if new_model_id is None:
            status = RunStatus.ABORTED if self._aborted.is_set() else RunStatus.FAILED
        result = RoundResult(
            session_id=self._plan.session_id,
            round_id=self.round_id,
            number=self._number,
            attempt=self._attempt,
            status=status,
            model_id=self._model_id,
            new_model_id=new_model_id,
            updates=tuple(self._updates),
            validations=tuple(self._validations),
            tasks=tuple(self._outcomes),
            seconds=time.monotonic() - started,
        )
        self._announce(result)
        return result

    def _remove_unused(self) -> None:
        """Remove the models of updates that came but were never looked at."""
        looked_at = {update.correlation_id for update in self._updates}
        for task in self._tasks:
            if task.update.done() and task.correlation_id not in looked_at and not self._plan.keep_updates:
                self._parts.models.remove(task.update.result().model_update_id)

    def _announce(self, result: RoundResult) -> None:
        self._parts.log.emit(
            RoundFinished(
                session_id=result.session_id,
                round_id=result.round_id,
                number=result.number,
                status=result.status,
                model_id=result.new_model_id or "",
                updates=len(result.used_updates),
                metrics=result.metrics,
                seconds=result.seconds,
            )
        )

    async def _train(self) -> str | None:
        """Collect updates and return the id of the new model; None when there is none."""
        clients = tuple(client.client_id for client in self._parts.registry.connected())
        self._parts.log.emit(
            RoundStarted(
                session_id=self._plan.session_id,
                round_id=self.round_id,
                number=self._number,
                attempt=self._attempt,
                model_id=self._model_id,
                clients=clients,
            )
        )
        average = await asyncio.to_thread(self._start_average)
        tasks = self._issue(clients, MODEL_UPDATE, self._model_id, {"client_settings": self._plan.client_settings})
        ends = self._as_they_end(tasks, self._update_of, self._plan.round_timeout)
        async with contextlib.aclosing(ends):
            async for task, update in ends:
                if update is not None:
                    await self._take_update(average, task, update)
        if self._aborted.is_set():
            return None
        # Time ran out between an update and its done report: the work is done, so it counts.
        for task in tasks:
            if not task.ended.done() and task.update.done():
                await self._take_update(average, task, task.update.result())
        used = [update for update in self._updates if not update.rejected]
        if len(used) < self._plan.min_updates:
            return None
        try:
            model = await asyncio.to_thread(average.result)
        except ModelError as error:
            logger.error("round %d: %s", self._number, error, extra={"action": "average_refused"})  # noqa: TRY400
            return None
        return await asyncio.to_thread(self._parts.models.put, model)

    def _start_average(self) -> FedAvg:
        with ScaleoutModel.from_file(self._parts.models.path(self._model_id)) as model:
            return FedAvg(model)

    async def _take_update(self, average: FedAvg, task: IssuedTask, update: UpdateReceived) -> None:
        """Average an update in, or note why not."""
        path = self._parts.models.path(update.model_update_id)
        rejected, examples = "", 0.0
        try:
            examples = num_examples(update.meta)
            await asyncio.to_thread(average.add, path, examples)
        except (ModelError, ValueError, TypeError, ArithmeticError, OSError) as error:
            rejected, examples = str(error) or type(error).__name__, 0.0
            self._reject(task, rejected)
        finally:
            if not self._plan.keep_updates:
                await asyncio.to_thread(self._parts.models.remove, update.model_update_id)
        self._updates.append(
            UpdateResult(
                client_id=update.client_id,
                correlation_id=update.correlation_id,
                model_update_id=update.model_update_id,
                num_examples=examples,
                meta=dict(update.meta),
                rejected=rejected,
            )
        )

    def _reject(self, task: IssuedTask, reason: str) -> None:
        self._parts.log.emit(
            UpdateRejected(client_id=task.client_id, correlation_id=task.correlation_id, reason=reason)
        )

    async def _update_of(self, task: IssuedTask) -> UpdateReceived | None:
        """Wait for a task's end and return its update, if it is to be used.

        A client's own word that the task failed or was interrupted is believed. Where the network gave the
        client up, an update that had arrived still counts.
        """
        outcome = await asyncio.shield(task.ended)
        if outcome.completed:
            update = await self._late(task.update)
            if update is None:
                self._reject(task, "the task was reported as completed but sent no update")
            return update
        return task.update.result() if outcome.reason and task.update.done() else None

    async def _validate(self, model_id: str) -> None:
        clients = tuple(client.client_id for client in self._parts.registry.connected())
        tasks = self._issue(clients, VALIDATION, model_id, {})
        timeout = self._plan.validation_timeout
        timeout = self._plan.round_timeout if timeout is None else timeout
        ends = self._as_they_end(tasks, self._validation_of, timeout)
        async with contextlib.aclosing(ends):
            async for _, validation in ends:
                if validation is not None:
                    self._validations.append(
                        ValidationResult(
                            client_id=validation.client_id,
                            correlation_id=validation.correlation_id,
                            metrics=dict(validation.metrics),
                        )
                    )

    async def _validation_of(self, task: IssuedTask) -> ValidationReceived | None:
        outcome = await asyncio.shield(task.ended)
        if outcome.completed:
            return await self._late(task.validation)
        return task.validation.result() if outcome.reason and task.validation.done() else None

    async def _late(self, result: asyncio.Future[T]) -> T | None:
        try:
            return await asyncio.wait_for(asyncio.shield(result), self._plan.late_grace)
        except TimeoutError:
            return None

    def _issue(
        self, clients: Sequence[str], task_type: str, model_id: str, data: dict[str, object]
    ) -> list[IssuedTask]:
        tasks = [
            self._parts.book.issue(
                client_id,
                task_type,
                model_id=model_id,
                session_id=self._plan.session_id,
                round_id=self.round_id,
                data=data,
            )
            for client_id in clients
        ]
        self._tasks.extend(tasks)
        return tasks

    async def _as_they_end(
        self,
        tasks: Sequence[IssuedTask],
        result_of: Callable[[IssuedTask], Coroutine[Any, Any, T | None]],
        timeout: float,  # noqa: ASYNC109 - ends in results, not in an exception
    ) -> AsyncGenerator[tuple[IssuedTask, T | None], None]:
        """Yield each task with its result as it ends, and note every outcome.

        After `timeout` seconds what is left is told TIMEOUT, after an abort INTERRUPTED.
        """
        deadline = time.monotonic() + timeout
        pending = {asyncio.ensure_future(result_of(task)): task for task in tasks}
        aborted = asyncio.ensure_future(self._aborted.wait())
        try:
            while pending and not aborted.done():
                left = max(0.0, deadline - time.monotonic())
                waiters: set[asyncio.Future[Any]] = {*pending, aborted}
                done, _ = await asyncio.wait(waiters, timeout=left, return_when=asyncio.FIRST_COMPLETED)
                if not done:
                    break
                for waiter in [waiter for waiter in pending if waiter in done]:
                    task = pending.pop(waiter)
                    self._outcomes.append(task.ended.result())
                    yield task, waiter.result()
            for task in list(pending.values()):
                self._give_up(task, "INTERRUPTED" if aborted.done() else "TIMEOUT")
        finally:
            left_over: list[asyncio.Future[Any]] = [*pending, aborted]
            for future in left_over:
                future.cancel()
            await asyncio.gather(*left_over, return_exceptions=True)

    def _give_up(self, task: IssuedTask, status: str) -> None:
        self._parts.book.interrupt(task, status)
        if task.ended.done():
            self._outcomes.append(task.ended.result())
            return
        self._outcomes.append(
            TaskOutcome(
                correlation_id=task.correlation_id,
                client_id=task.client_id,
                task_type=task.task_type,
                status=status,
                reason="the round was over",
                seconds=time.monotonic() - task.issued_at,
            )
        )
