"""The line of waiting tasks: who goes when. Pure, with made-up processes of workers."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from scaleout_mp import ConfigError, Limits, Resources
from scaleout_mp.config.resources import gpu_environment, parse_gpus, parse_memory_budget
from scaleout_mp.executor.residents import WorkerSpec
from scaleout_mp.executor.scheduling import NOTHING, Demand, Holding, Ledger, Line, Place, require_room


@dataclasses.dataclass(eq=False)
class Process:
    """A process of a worker."""

    spec: WorkerSpec
    holding: Holding


class Pool:
    """The processes that wait, oldest first, and those that are ending."""

    def __init__(self):
        self.idle = []
        self.ending = []

    def find(self, wanted):
        return next((process for process in reversed(self.idle) if process.spec.name == wanted.worker.name), None)

    def take(self, process):
        self.idle.remove(process)

    def give_back(self, process):
        self.idle.append(process)

    def retire_oldest(self, kinds, *, kept_too):
        holders = [process for process in self.idle if process.holding.demand.kinds & kinds]
        found = [process for process in holders if process.spec.idle_seconds is not None] or holders * kept_too
        for process in found[:1]:
            self.idle.remove(process)
            self.ending.append(process)
        return bool(found)

    @property
    def coming(self):
        held = [process.holding for process in self.ending]
        return Demand(memory=sum(each.memory for each in held), gpus=sum(len(each.gpus) for each in held))


class Machine:
    """A line, and what becomes of those whose turn has come."""

    def __init__(self, *, slots=2, memory=None, gpus=None):
        self.pool = Pool()
        self.ledger = Ledger(slots=slots, memory=memory, gpus=gpus)
        self.line = Line(self.ledger, self.pool)

    def enter(self, memory=0, gpus=0, worker=None):
        place = Place(demand=Demand(memory=memory, gpus=gpus), worker=worker, fits=lambda _: True)
        assert self.line.refusal(place) is None
        self.line.enter(place)
        return place

    def end(self, place):
        """End a task; the process of a worker stays, as a completed task leaves it."""
        if place.worker is not None and place.at_work and place.resident is None:
            place.resident = Process(place.worker, place.holding)
            place.holding = None
        self.line.leave(place)

    def all_gone(self):
        """Have the processes that are ending be gone."""
        while self.pool.ending:
            self.line.give_back(self.pool.ending.pop().holding)


A, B = WorkerSpec(name="a"), WorkerSpec(name="b")
KEPT = dataclasses.replace(B, idle_seconds=None)


def test_tasks_go_in_order_as_slots_come_free():
    machine = Machine(slots=2)
    places = [machine.enter() for _ in range(5)]
    assert [place.at_work for place in places] == [True, True, False, False, False]
    machine.end(places[1])
    assert [place.at_work for place in places] == [True, False, True, False, False]
    machine.end(places[3])
    machine.end(places[0])
    assert [place.at_work for place in places] == [False, False, True, False, True]


def test_the_sum_of_limits_stays_within_the_budget_and_a_large_task_is_not_overtaken():
    machine = Machine(slots=10, memory=10)
    first, second = machine.enter(memory=6), machine.enter(memory=3)
    large = machine.enter(memory=8)
    small = machine.enter(memory=1)
    assert not large.at_work
    assert not small.at_work
    machine.end(first)
    assert not large.at_work
    assert not small.at_work
    machine.end(second)
    assert large.at_work
    assert small.at_work


def test_who_waits_for_a_gpu_does_not_hold_up_others():
    machine = Machine(slots=10, gpus=("0", "1"))
    first, second = machine.enter(gpus=1), machine.enter(gpus=1)
    assert (first.holding.gpus, second.holding.gpus) == (("0",), ("1",))
    both, one, none = machine.enter(gpus=2), machine.enter(gpus=1), machine.enter()
    assert (both.at_work, one.at_work, none.at_work) == (False, False, True)
    machine.end(second)
    assert not one.at_work
    machine.end(first)
    assert sorted(both.holding.gpus) == ["0", "1"]
    assert not one.at_work
    machine.end(both)
    assert one.at_work


@pytest.mark.parametrize(
    ("demand", "says"),
    [
        (Demand(memory=11 << 30), "its memory limit of 11.0 GiB is over the memory budget of 10.0 GiB"),
        (Demand(), "it has no memory limit"),
        (Demand(memory=1 << 30, gpus=3), "it wants 3 GPUs, and there are 2"),
    ],
)
def test_what_can_never_run_is_refused(demand, says):
    ledger = Ledger(slots=1, memory=10 << 30, gpus=("0", "1"))
    assert says in ledger.refusal(demand)
    assert ledger.refusal(Demand(memory=10 << 30, gpus=2)) is None


def test_tasks_of_a_worker_go_one_by_one_and_do_not_hold_up_others():
    machine = Machine(slots=10)
    first, second, third = (machine.enter(worker=A) for _ in range(3))
    other = machine.enter(worker=B)
    assert (first.at_work, second.at_work, other.at_work) == (True, False, True)
    machine.end(second)
    machine.end(first)
    assert third.at_work
    assert third.resident is not None
    machine.end(third)
    machine.end(other)
    assert machine.ledger.free_slots == 10


def test_as_many_tasks_of_a_worker_as_it_has_processes():
    machine = Machine(slots=10)
    spec = WorkerSpec(name="pair", processes=2)
    places = [machine.enter(worker=spec) for _ in range(4)]
    assert [place.at_work for place in places] == [True, True, False, False]
    machine.end(places[0])
    assert places[2].at_work
    assert not places[3].at_work


def test_an_idle_process_keeps_its_memory_until_somebody_needs_it():
    machine = Machine(slots=10, memory=10)
    for spec in (A, B):
        machine.end(machine.enter(memory=4, worker=spec))
    small = machine.enter(memory=2)
    assert small.at_work
    assert len(machine.pool.idle) == 2
    large = machine.enter(memory=3)
    # The one that has waited longest goes; what it has comes back once it is gone.
    assert [process.spec.name for process in machine.pool.idle] == ["b"]
    assert not large.at_work
    again = machine.enter(memory=4, worker=A)
    assert not again.at_work
    machine.all_gone()
    # Its memory was the other's, which went as well.
    assert large.at_work
    assert again.at_work
    assert machine.pool.idle == []


def test_a_process_that_is_to_stay_is_ended_for_its_memory_only_when_nobody_else_will_give_some_back():
    machine = Machine(slots=10, memory=10)
    machine.end(machine.enter(memory=4, worker=KEPT))
    machine.end(machine.enter(memory=2, worker=A))
    at_work = machine.enter(memory=4)
    waiting = machine.enter(memory=7)
    # The one that may be ended for being idle went; the other waits for what is at work.
    assert [process.spec.name for process in machine.pool.idle] == ["b"]
    machine.all_gone()
    assert not waiting.at_work
    machine.end(at_work)
    assert machine.pool.idle == []
    machine.all_gone()
    assert waiting.at_work


def test_a_busy_worker_does_not_starve_who_waits_for_its_memory():
    machine = Machine(slots=10, memory=10)
    busy = machine.enter(memory=6, worker=A)
    large = machine.enter(memory=8)
    next_one = machine.enter(memory=6, worker=A)
    machine.end(busy)
    assert not next_one.at_work
    machine.all_gone()
    assert large.at_work
    machine.end(large)
    assert next_one.at_work


def test_a_process_that_was_taken_and_not_used_goes_back():
    machine = Machine(slots=10)
    machine.end(machine.enter(worker=A))
    place = machine.enter(worker=A)
    process = place.resident
    machine.line.leave(place)
    assert machine.pool.idle == [process]


class Rush(RuleBasedStateMachine):
    """Whatever comes and goes, nothing is given out twice, and who comes first is not overtaken for what it lacks."""

    def __init__(self):
        super().__init__()
        self.machine = Machine(slots=3, memory=8, gpus=("0", "1"))
        self.places = []

    @rule(memory=st.integers(1, 8), gpus=st.integers(0, 2), worker=st.sampled_from([None, None, A, KEPT]))
    def enter(self, memory, gpus, worker):
        self.places.append(self.machine.enter(memory, gpus, worker))

    @rule(data=st.data())
    def end(self, data):
        if self.places:
            place = data.draw(st.sampled_from(self.places))
            self.places.remove(place)
            self.machine.end(place)

    @rule()
    def gone(self):
        self.machine.all_gone()

    def holdings(self):
        held = [place.holding for place in self.places if place.holding]
        held += [place.resident.holding for place in self.places if place.resident]
        return held + [process.holding for process in (*self.machine.pool.idle, *self.machine.pool.ending)]

    @invariant()
    def nothing_is_given_twice(self):
        held = self.holdings()
        assert sum(each.memory for each in held) <= 8
        gpus = [gpu for each in held for gpu in each.gpus]
        assert len(gpus) == len(set(gpus))
        assert sum(place.at_work for place in self.places) == 3 - self.machine.ledger.free_slots
        for name in "ab":
            assert sum(place.at_work for place in self.places if place.worker and place.worker.name == name) <= 1

    @invariant()
    def the_first_in_line_waits_only_for_what_it_lacks(self):
        waiting = [place for place in self.places if not place.at_work]
        if waiting and self.machine.ledger.free_slots and not self.machine.pool.ending and waiting[0].worker is None:
            assert self.machine.ledger.lacks(waiting[0].demand, Demand())

    def teardown(self):
        """Let all go: everybody gets a turn, and all comes back."""
        while self.places:
            self.machine.all_gone()
            at_work = [place for place in self.places if place.at_work]
            assert at_work, "nobody's turn comes"
            for place in at_work:
                self.places.remove(place)
                self.machine.end(place)
        machine = self.machine
        while machine.pool.retire_oldest({"memory", "gpus"}, kept_too=True):
            machine.all_gone()
        machine.all_gone()
        assert not machine.ledger.lacks(Demand(memory=8, gpus=2), Demand())
        assert machine.ledger.free_slots == 3


TestRush = Rush.TestCase
TestRush.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("gpus", -1),
        ("gpus", True),
        ("gpus", "all"),
        ("nice", -1),
        ("nice", 20),
        ("nice", 1.0),
        ("affinity", []),
        ("affinity", [4096]),
        ("affinity", ["0"]),
        ("affinity", 0),
    ],
)
def test_a_wrong_resource_names_its_field(field, value):
    with pytest.raises(ConfigError, match=field):
        Resources(**{field: value})


@pytest.mark.parametrize("budget", ["much", 0.0, 1.5, -1, 0, "1KiB", True, "1" + "0" * 400, 2**61])
def test_a_wrong_budget_names_its_field(budget):
    with pytest.raises(ConfigError, match="memory_budget"):
        parse_memory_budget(budget)


@pytest.mark.parametrize("gpus", ["0", [0, "0"], [-1], [""], [1.5], ["0,1"], ["0\0"], ["\udc80"], 2])
def test_wrong_gpus_are_refused(gpus):
    with pytest.raises(ConfigError, match="gpus"):
        parse_gpus(gpus)


def test_budgets_and_gpus_as_people_give_them():
    assert parse_memory_budget("16GiB") == 16 << 30
    assert 0 < parse_memory_budget(0.5) < parse_memory_budget(1.0)
    assert parse_memory_budget(None) is None
    assert parse_gpus([0, "GPU-8f1c"]) == ("0", "GPU-8f1c")
    assert parse_gpus([]) == ()
    assert gpu_environment(("0", "2"))["CUDA_VISIBLE_DEVICES"] == "0,2"
    assert gpu_environment(()) == {
        "CUDA_VISIBLE_DEVICES": "-1",
        "HIP_VISIBLE_DEVICES": "-1",
        "NVIDIA_VISIBLE_DEVICES": "void",
    }


def test_a_client_whose_tasks_could_never_run_is_refused():
    with pytest.raises(ConfigError, match="over the memory budget"):
        require_room(Limits(memory="2GiB"), Resources(), memory_budget=1 << 30, gpus=None)
    with pytest.raises(ConfigError, match="no memory limit"):
        require_room(Limits(), Resources(), memory_budget=1 << 30, gpus=None)
    with pytest.raises(ConfigError, match="wants 1 GPUs"):
        require_room(Limits(), Resources(gpus=1), memory_budget=None, gpus=None)
    require_room(Limits(), Resources(), memory_budget=None, gpus=None)
    assert NOTHING.demand == Demand()
