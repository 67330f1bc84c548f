"""A session: rounds one after the other, each from the model of the one before."""

from __future__ import annotations

import asyncio
import json
import os
import time
from typing import TYPE_CHECKING, Any

from scaleout_mp.errors import LocalNetworkError
from scaleout_mp.localnet.events import SessionFinished, SessionStarted
from scaleout_mp.localnet.results import RoundResult, RunStatus, SessionPlan, SessionResult
from scaleout_mp.localnet.rounds import Round

if TYPE_CHECKING:
    from pathlib import Path

    from scaleout_mp.localnet.parts import NetworkParts


class Session:
    """One session. Lives on the network's loop; `run` once."""

    def __init__(self, parts: NetworkParts, plan: SessionPlan, *, folder: Path, seed_model_id: str) -> None:
        self._parts = parts
        self._plan = plan
        self._folder = folder
        self._seed_model_id = seed_model_id
        self._model_id = seed_model_id
        self._round: Round | None = None
        self._results: list[RoundResult] = []

    def abort_round(self) -> bool:
        """End the current round; False when none runs."""
        if self._round is None:
            return False
        self._round.abort()
        return True

    async def run(self) -> SessionResult:
        """Run all rounds; a session that fails is a result, not an exception."""
        started = time.monotonic()
        plan = self._plan
        self._parts.log.emit(SessionStarted(session_id=plan.session_id, rounds=plan.rounds, model_id=self._model_id))
        status, reason = RunStatus.ABORTED, "it was aborted"
        try:
            reason = await self._run_rounds()
            status = RunStatus.FAILED if reason else RunStatus.FINISHED
        except Exception as error:
            status, reason = RunStatus.FAILED, str(error)
            raise
        finally:
            result = SessionResult(
                session_id=plan.session_id,
                status=status,
                reason=reason,
                seed_model_id=self._seed_model_id,
                model_id=self._model_id,
                rounds=tuple(self._results),
                seconds=time.monotonic() - started,
            )
            write_json(self._folder / "sessions" / f"{plan.session_id}.json", result.to_dict())
            self._parts.log.emit(
                SessionFinished(session_id=plan.session_id, status=status, model_id=self._model_id, reason=reason)
            )
        return result

    async def _run_rounds(self) -> str:
        """Return why the session ends early; empty when it ran to its end."""
        for number in range(1, self._plan.rounds + 1):
            for attempt in range(1, self._plan.round_retries + 2):
                try:
                    await wait_for_clients(self._parts, self._plan.min_clients, self._plan.client_timeout)
                except LocalNetworkError as error:
                    return str(error)
                result = await self._run_round(number, attempt)
                if result.status is not RunStatus.FAILED:
                    break
            else:
                return f"round {number} got {len(result.used_updates)} of {self._plan.min_updates} updates"
            if result.new_model_id is not None:
                self._model_id = result.new_model_id
        return ""

    async def _run_round(self, number: int, attempt: int) -> RoundResult:
        self._round = Round(self._parts, self._plan, number=number, attempt=attempt, model_id=self._model_id)
        try:
            result = await self._round.run()
        finally:
            self._round = None
        self._results.append(result)
        await asyncio.to_thread(_write_round, self._folder / "rounds", result)
        return result


async def wait_for_clients(
    parts: NetworkParts,
    count: int,
    timeout: float | None,  # noqa: ASYNC109 - the message tells how many came
) -> None:
    """Wait until `count` clients are connected; LocalNetworkError after `timeout` seconds."""

    def enough(_event: object = None) -> bool:
        return len(parts.registry.connected()) >= count

    if enough():
        return
    arrived = asyncio.Event()
    unsubscribe = parts.log.subscribe(lambda event: arrived.set() if enough(event) else None)
    try:
        await asyncio.wait_for(arrived.wait(), timeout)
    except TimeoutError:
        there = len(parts.registry.connected())
        raise LocalNetworkError(f"{there} of {count} clients were connected after {timeout:g} s") from None
    finally:
        unsubscribe()


def _write_round(folder: Path, result: RoundResult) -> None:
    """Write a round under the next free number: a retry, or a second session in the folder, overwrites nothing."""
    taken = [int(path.stem) for path in folder.glob("[0-9]*.json") if path.stem.isdigit()]
    write_json(folder / f"{max(taken, default=0) + 1:04d}.json", result.to_dict())


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Write a value as JSON, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_suffix(".part")
    beside.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
    os.replace(beside, path)
