"""Whose turn it is: slots, the memory budget, GPUs and the places in workers, shared out in the order of arrival.

A task overtakes those before it only if they wait for something that it does not need itself. So nobody starves: what
a waiting task lacks is not given to anyone behind it.
"""

from __future__ import annotations

import bisect
import collections
import dataclasses
import itertools
from typing import TYPE_CHECKING, Final, Protocol

from scaleout_mp.display import readable_size
from scaleout_mp.errors import ConfigError

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable

    from scaleout_mp.config import Limits, Resources
    from scaleout_mp.executor.residents import Resident, WorkerSpec

MEMORY: Final = "memory"
GPUS: Final = "gpus"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Demand:
    """What a process wants for as long as it lives."""

    #: Bytes, its limit; 0: it has none.
    memory: int = 0
    gpus: int = 0

    @property
    def kinds(self) -> set[str]:
        """What it wants at all."""
        return {kind for kind, wanted in ((MEMORY, self.memory), (GPUS, self.gpus)) if wanted}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Holding:
    """What a process has."""

    memory: int = 0
    gpus: tuple[str, ...] = ()

    @property
    def demand(self) -> Demand:
        """What was asked for to get it."""
        return Demand(memory=self.memory, gpus=len(self.gpus))


NOTHING: Final = Holding()


class Ledger:
    """What is left of the machine. Pure."""

    def __init__(self, *, slots: int, memory: int | None = None, gpus: tuple[str, ...] | None = None) -> None:
        """`memory` is the budget in bytes; None: it is not counted."""
        self.free_slots = slots
        self._budget = memory
        self._memory = memory or 0
        self._all_gpus = len(gpus or ())
        self._gpus = list(gpus or ())

    def demand(self, limits: Limits, resources: Resources) -> Demand:
        """Return what a task asks of what is counted here: memory only where there is a budget."""
        memory = 0 if self._budget is None else limits.memory_bytes
        return Demand(memory=memory, gpus=resources.gpus)

    def refusal(self, demand: Demand) -> str | None:
        """Say why a task can never run; None when it can."""
        if self._budget is not None and not demand.memory:
            budget = readable_size(self._budget)
            return f"cannot be fitted into the memory budget of {budget}, for it has no memory limit"
        if self._budget is not None and demand.memory > self._budget:
            limit, budget = readable_size(demand.memory), readable_size(self._budget)
            return f"cannot run: its memory limit of {limit} is over the memory budget of {budget} for all tasks"
        if demand.gpus > self._all_gpus:
            return f"cannot run: it wants {demand.gpus} GPUs, and there are {self._all_gpus}"
        return None

    def lacks(self, demand: Demand, coming: Demand) -> set[str]:
        """Return of what there is too little for it, even with what is about to come back."""
        lacking = set()
        if self._budget is not None and demand.memory > self._memory + coming.memory:
            lacking.add(MEMORY)
        if demand.gpus > len(self._gpus) + coming.gpus:
            lacking.add(GPUS)
        return lacking

    def take(self, demand: Demand) -> Holding:
        """Give out what is there for sure."""
        if self._budget is None and not demand.gpus:
            return NOTHING
        self._memory -= demand.memory
        gpus, self._gpus = self._gpus[: demand.gpus], self._gpus[demand.gpus :]
        return Holding(memory=demand.memory, gpus=tuple(gpus))

    def give_back(self, holding: Holding) -> None:
        """Take back what a process had that is gone."""
        self._memory += holding.memory
        self._gpus += holding.gpus


def require_room(
    limits: Limits, resources: Resources, *, memory_budget: int | None, gpus: tuple[str, ...] | None
) -> None:
    """Raise ConfigError when a task with these could never run."""
    ledger = Ledger(slots=1, memory=memory_budget, gpus=gpus)
    refusal = ledger.refusal(ledger.demand(limits, resources))
    if refusal is not None:
        raise ConfigError(f"a task {refusal}")


class IdleWorkers(Protocol):
    """What the line must know of processes that wait for a task."""

    def find(self, wanted: Place) -> Resident | None:
        """Return one that could run the task, and end those of its worker that could not any more."""
        ...

    def take(self, resident: Resident) -> None:
        """Take it out of the pool."""
        ...

    def give_back(self, resident: Resident) -> None:
        """Put one into the pool that has done its task, or was not needed."""
        ...

    def retire_oldest(self, kinds: set[str], *, kept_too: bool) -> bool:
        """End the one that has waited longest and has such things; False when there is none.

        `kept_too`: also one that is not to be ended for being idle, when there is no other.
        """
        ...

    @property
    def coming(self) -> Demand:
        """What those that are ending will give back."""
        ...


@dataclasses.dataclass(eq=False, kw_only=True)
class Place:
    """A task's place: in the line, and then at work."""

    demand: Demand
    worker: WorkerSpec | None
    #: Whether a process between two tasks is fit to run this one.
    fits: Callable[[Resident], bool]
    number: int = 0
    #: Done when the task's turn has come; None before somebody waits for that.
    turn: asyncio.Future[None] | None = None
    #: Whether its turn has come.
    at_work: bool = False
    #: What its process has or is to have; None while that is `resident`'s.
    holding: Holding | None = None
    #: The process of its worker; None: a new one is needed.
    resident: Resident | None = None


class Line:
    """The tasks that wait for their turn."""

    def __init__(self, ledger: Ledger, idle: IdleWorkers) -> None:
        self._ledger = ledger
        self._idle = idle
        self._numbers = itertools.count()
        #: In the order of arrival.
        self._waiting: list[Place] = []
        self._working: set[Place] = set()
        #: For each worker with a task at work or in line: how many those are, and who waits for one of them to leave.
        self._seats: dict[str, int] = {}
        self._behind: dict[str, collections.deque[Place]] = {}

    def refusal(self, place: Place) -> str | None:
        """Say why a task can never run; None when it can."""
        return self._ledger.refusal(place.demand)

    def enter(self, place: Place) -> None:
        """Line up; when it is its turn at once, it is `at_work` after this."""
        place.number = next(self._numbers)
        if place.worker is not None:
            name = place.worker.name
            taken = self._seats.get(name, 0)
            if taken >= place.worker.processes:
                self._behind.setdefault(name, collections.deque()).append(place)
                return
            self._seats[name] = taken + 1
        self._waiting.append(place)
        self.advance()

    def leave(self, place: Place) -> None:
        """Give up a place, at work or in line; what it has goes to others."""
        name = None if place.worker is None else place.worker.name
        if place.at_work:
            place.at_work = False
            self._working.discard(place)
            self._ledger.free_slots += 1
            resident, place.resident = place.resident, None
            holding, place.holding = place.holding, None
            if resident is not None:
                self._idle.give_back(resident)
            if holding is not None:
                self._ledger.give_back(holding)
        elif name is not None and place in self._behind.get(name, ()):
            self._behind[name].remove(place)
            return
        else:
            self._waiting.remove(place)
        if name is not None:
            self._leave_seat(name)
        self.advance()

    def _leave_seat(self, name: str) -> None:
        behind = self._behind.get(name)
        if behind:
            bisect.insort(self._waiting, behind.popleft(), key=lambda place: place.number)
        else:
            self._behind.pop(name, None)
            self._seats[name] -= 1
            if not self._seats[name]:
                del self._seats[name]

    def give_back(self, holding: Holding) -> None:
        """Take back what a worker's process had that is gone."""
        self._ledger.give_back(holding)
        self.advance()

    def advance(self) -> None:
        """Let all go whose turn has come."""
        taken: set[str] = set()
        index = 0
        while index < len(self._waiting) and self._ledger.free_slots:
            place = self._waiting[index]
            if self._admit(place, taken):
                del self._waiting[index]
                place.at_work = True
                self._working.add(place)
                if place.turn is not None and not place.turn.done():
                    place.turn.set_result(None)
            else:
                index += 1

    def _at_work_with(self, kinds: set[str]) -> bool:
        return any(place.demand.kinds & kinds for place in self._working)

    def _admit(self, place: Place, taken: set[str]) -> bool:
        """Give a task what it needs, unless that is not there or somebody before it waits for it."""
        resident = None if place.worker is None else self._idle.find(place)
        kinds = (place.demand if resident is None else resident.holding.demand).kinds
        if kinds & taken:
            taken |= kinds
            return False
        if resident is None:
            while lacking := self._ledger.lacks(place.demand, self._idle.coming):
                # What somebody at work has comes back in time; what idle workers keep for good does not.
                if not self._idle.retire_oldest(lacking, kept_too=not self._at_work_with(lacking)):
                    break
            if self._ledger.lacks(place.demand, Demand()):
                taken |= kinds
                return False
            place.holding = self._ledger.take(place.demand)
        else:
            self._idle.take(resident)
            place.resident = resident
        self._ledger.free_slots -= 1
        return True
