"""Whether all came out as planned. Pure: it judges what others saw."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Final

from scaleout_mp.demo.ledger import TRAINING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from scaleout_mp.demo.faults import PlannedFault
    from scaleout_mp.demo.fleet import ClientExit
    from scaleout_mp.demo.ledger import TaskEnd
    from scaleout_mp.localnet import SessionResult

#: Part of the held-out images that the last model must get right.
WANTED_ACCURACY: Final = 0.90


@dataclasses.dataclass(frozen=True, kw_only=True)
class RoundScore:
    """One round, as the summary shows it."""

    number: int
    updates: int
    #: On the held-out images.
    accuracy: float
    seconds: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Observations:
    """All that was seen of a demo that ran to its end."""

    rounds: int
    planned: Sequence[PlannedFault]
    session: SessionResult
    scores: Sequence[RoundScore]
    failures: Sequence[TaskEnd]
    contradictions: Sequence[TaskEnd]
    client_exits: Sequence[ClientExit]
    #: A line for each process that is still there.
    leftovers: Sequence[str]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Check:
    """One thing that had to come out."""

    passed: bool
    #: What was wanted.
    text: str
    #: What is wrong; empty when it passed.
    problem: str = ""
    #: A figure to go with the text when it passed.
    detail: str = ""


def judge(seen: Observations) -> tuple[Check, ...]:
    """Return every check, passed or not."""
    checks = [_rounds(seen), _accuracy(seen)]
    if seen.planned:
        checks += [_faults(seen), _comebacks(seen)]
    return (*checks, _nothing_else(seen), _clients(seen), _processes(seen))


def matches(fault: PlannedFault, end: TaskEnd) -> bool:
    """Whether a bad end belongs to a planned fault, however it ended."""
    return (end.client, end.round, end.task_type) == (fault.client, fault.round, TRAINING)


def _check(text: str, problems: Sequence[str]) -> Check:
    return Check(passed=not problems, text=text, problem="; ".join(problems))


def _rounds(seen: Observations) -> Check:
    problems = []
    if not seen.session.finished:
        problems.append(f"the session ended as {seen.session.status}: {seen.session.reason}")
    bad = [result for result in seen.session.rounds if result.new_model_id is None]
    problems += [f"round {result.number}, attempt {result.attempt}: {result.status}" for result in bad]
    if not problems and len(seen.scores) != seen.rounds:
        problems.append(f"{len(seen.scores)} did")
    return _check(f"{seen.rounds} round{'s' if seen.rounds > 1 else ''} finished", problems)


def _accuracy(seen: Observations) -> Check:
    reached = seen.scores[-1].accuracy if seen.scores else 0.0
    passed = reached >= WANTED_ACCURACY
    return Check(
        passed=passed,
        text=f"accuracy on the held-out images is at least {WANTED_ACCURACY:.2f}",
        problem="" if passed else f"it is {reached:.3f}",
        detail=f" (it is {reached:.3f})",
    )


def _faults(seen: Observations) -> Check:
    text = f"{len(seen.planned)} planned faults each ended once, for the reason that was planned"
    return _check(text, [problem for fault in seen.planned if (problem := _fault_problem(seen, fault))])


def _fault_problem(seen: Observations, fault: PlannedFault) -> str:
    who = f"{fault.kind} of {fault.client} in round {fault.round}"
    ends = [end for end in seen.failures if matches(fault, end)]
    if len(ends) != 1:
        return f"{who}: {len(ends) or 'no'} failed tasks"
    end, wanted = ends[0], fault.kind.expected
    if (end.status, end.reason) != (wanted.status, wanted.reason):
        return f"{who}: {end.status} ({end.reason}), not {wanted.status} ({wanted.reason})"
    if wanted.mentions not in end.explanation:
        return f"{who}: {end.explanation!r} does not tell of {wanted.mentions}"
    return ""


def _comebacks(seen: Observations) -> Check:
    problems = []
    for fault in seen.planned:
        later = [result for result in seen.session.rounds if result.number > fault.round]
        back = any(update.client_id == fault.client for result in later for update in result.used_updates)
        if not back:
            problems.append(f"{fault.client} did not after its {fault.kind}")
    return _check("every faulty client trained again in a later round", problems)


def _nothing_else(seen: Observations) -> Check:
    unplanned = [end for end in seen.failures if not any(matches(fault, end) for fault in seen.planned)]
    problems = [f"{end.client}, round {end.round}, {end.task_type}: {end.explanation}" for end in unplanned]
    problems += [f"{end.client} reported {end.correlation_id} again as {end.status}" for end in seen.contradictions]
    return _check("no other task failed, and no task was reported with two ends", problems)


def _clients(seen: Observations) -> Check:
    problems = [
        f"{end.name} had to be killed" if end.killed else f"{end.name} ended with exit code {end.code}"
        for end in seen.client_exits
        if end.killed or end.code
    ]
    return _check("every client outlived its tasks and ended cleanly when told to", problems)


def _processes(seen: Observations) -> Check:
    return _check("no process is left", list(seen.leftovers))
