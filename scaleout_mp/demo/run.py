"""The demo from its first line to its last: network, clients, session, judgement."""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import logging
import queue
import secrets
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Final

from scaleout_mp.config import Limits
from scaleout_mp.demo import digits, perceptron
from scaleout_mp.demo.faults import PlannedFault, plan_faults
from scaleout_mp.demo.fleet import ClientExit, ClientSpec, Fleet
from scaleout_mp.demo.ledger import Ledger, Line, Tone
from scaleout_mp.demo.stopping import DemoStopped, StopRequest, stop_request
from scaleout_mp.demo.summary import DemoResult
from scaleout_mp.demo.verdict import Observations, RoundScore, judge
from scaleout_mp.demo.views import View, make_view
from scaleout_mp.localnet import LocalNetworkThread, SessionPlan, SessionResult
from scaleout_mp.localnet.events import Event, RoundFinished
from scaleout_mp.model import ScaleoutModel

if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import TextIO

CLIENTS: Final = ("client-1", "client-2", "client-3", "client-4")

#: Seconds between two looks at what goes on.
_TICK: Final = 0.1
#: Seconds until all clients must be there, and for the reports of tasks that outlive the session.
_CLIENT_TIMEOUT: Final = 60.0
_LATE_REPORTS: Final = 10.0
#: Seconds that clients get to say goodbye: at the end, and when the user wants to leave.
_FAREWELL: Final = 15.0
_STOP_PATIENCE: Final = 4.0
#: Seconds after the clients' end within which nothing of theirs may be left.
_SWEEP: Final = 2.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class DemoOptions:
    """How a demo is run. `run_demo` raises ConfigError for what cannot work."""

    rounds: int = 8
    #: Where everything is kept; None: a temporary folder that is removed.
    folder: Path | None = None
    #: Let tasks misbehave.
    faults: bool = True
    #: Memory limit of each task.
    memory: str = "128MiB"
    #: Seconds that training may take in one round: a task that hangs is ended then.
    round_timeout: float = 8.0
    #: What of this process goes to demo.log, as a level of the logging module.
    log_level: int = logging.WARNING


def run_demo(options: DemoOptions, *, stream: TextIO) -> DemoResult:
    """Run a demo, showing it on `stream`; blocks. For the main thread, whose signals it takes meanwhile.

    Raises DemoStopped on Ctrl-C or SIGTERM and DemoError when a client is lost; nothing is left behind then either.
    """
    Limits(memory=options.memory)
    planned = plan_faults(CLIENTS, options.rounds) if options.faults else ()
    with (
        stop_request() as stop,
        _workplace(options.folder) as folder,
        _log_file(folder / "demo.log", options.log_level),
    ):
        return _Demo(options, planned, folder=folder, stop=stop, view=make_view(stream)).run()


class _Demo:
    """One run. Everything happens in the main thread; the network, in its own, only queues its events."""

    def __init__(
        self,
        options: DemoOptions,
        planned: tuple[PlannedFault, ...],
        *,
        folder: Path,
        stop: StopRequest,
        view: View,
    ) -> None:
        self._options = options
        self._planned = planned
        self._folder = folder
        self._stop = stop
        self._view = view
        self._events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self._ledger = Ledger(rounds=options.rounds)
        self._scores: list[RoundScore] = []

    def run(self) -> DemoResult:
        started = time.monotonic()
        division = digits.divide(digits.load(), len(CLIENTS))
        specs = [self._prepare(name, shard) for name, shard in zip(CLIENTS, division.shards, strict=True)]
        token_file = self._folder / "token"
        token_file.touch(mode=0o600)
        token_file.write_text(secrets.token_urlsafe(), encoding="ascii")
        network = LocalNetworkThread(
            self._folder / "network", token=token_file.read_text(encoding="ascii"), on_event=self._events.put
        )
        with network, self._view:
            self._tell_plan(division)
            with Fleet(specs, api_url=network.api_url, token_file=token_file, memory=self._options.memory) as fleet:
                session, exits = self._attend(network, fleet, division.held_out)
                leftovers = fleet.leftovers(within=_SWEEP)
        seen = Observations(
            rounds=self._options.rounds,
            planned=self._planned,
            session=session,
            scores=tuple(self._scores),
            failures=tuple(self._ledger.failures),
            contradictions=tuple(self._ledger.contradictions),
            client_exits=exits,
            leftovers=tuple(leftovers),
        )
        return DemoResult(
            seen=seen,
            checks=judge(seen),
            metrics=sum(record.metrics for record in self._ledger.clients.values()),
            seconds=time.monotonic() - started,
            folder=None if self._options.folder is None else str(self._folder),
        )

    def _prepare(self, name: str, shard: digits.Shard) -> ClientSpec:
        """Give a client its folder, with its own images in it."""
        own = tuple(fault for fault in self._planned if fault.client == name)
        spec = ClientSpec(name=name, folder=self._folder / "clients" / name, faults=own)
        spec.folder.mkdir(parents=True, exist_ok=True)
        shard.save(spec.data)
        return spec

    def _tell_plan(self, division: digits.Division) -> None:
        own = len(division.shards[0].training) + len(division.shards[0].validation)
        self._tell(
            f"{len(CLIENTS)} clients with {own} handwritten digits each, {len(division.held_out)} held out; "
            f"every task may use {self._options.memory}"
        )
        for fault in self._planned:
            self._tell(f"planned: in round {fault.round} {fault.client} {fault.kind.description}")

    def _attend(
        self, network: LocalNetworkThread, fleet: Fleet, held_out: digits.Images
    ) -> tuple[SessionResult, tuple[ClientExit, ...]]:
        """See the session through and the clients off."""
        try:
            future = network.start_session(self._session_plan(), _seed_model(held_out))
            while not future.done():
                self._look(network, fleet, held_out)
                concurrent.futures.wait([future], _TICK)
            deadline = time.monotonic() + _LATE_REPORTS
            self._look(network, fleet, held_out)
            while self._ledger.unreported and time.monotonic() < deadline:
                self._wait_for_events(_TICK)
                self._look(network, fleet, held_out)
        except DemoStopped:
            self._tell("stopping; Ctrl-C again ends the clients at once")
            self._view.show(self._ledger, fleet.clients, self._scores)
            fleet.stop(patience=_STOP_PATIENCE, hurry=lambda: self._stop.impatient)
            raise
        asked = self._stop.count
        exits = fleet.stop(patience=_FAREWELL, hurry=lambda: self._stop.count > asked)
        self._take_events(network, held_out)
        self._view.show(self._ledger, fleet.clients, self._scores)
        return future.result(), exits

    def _session_plan(self) -> SessionPlan:
        return SessionPlan(
            rounds=self._options.rounds,
            client_settings=dataclasses.asdict(perceptron.Schedule()),
            min_clients=len(CLIENTS),
            client_timeout=_CLIENT_TIMEOUT,
            # Even when two clients misbehave in the same round.
            min_updates=len(CLIENTS) // 2,
            round_timeout=self._options.round_timeout,
        )

    def _look(self, network: LocalNetworkThread, fleet: Fleet, held_out: digits.Images) -> None:
        self._stop.check()
        fleet.require_all()
        self._take_events(network, held_out)
        self._view.show(self._ledger, fleet.clients, self._scores)

    def _wait_for_events(self, seconds: float) -> None:
        """Wait until the network has something to say, at most so long."""
        with contextlib.suppress(queue.Empty):
            self._events.put(self._events.get(timeout=seconds))

    def _take_events(self, network: LocalNetworkThread, held_out: digits.Images) -> None:
        with contextlib.suppress(queue.Empty):
            while True:
                event = self._events.get_nowait()
                line = self._ledger.take(event)
                if line is not None:
                    self._view.tell(line)
                if isinstance(event, RoundFinished) and event.model_id:
                    self._score(network, event, held_out)

    def _score(self, network: LocalNetworkThread, event: RoundFinished, held_out: digits.Images) -> None:
        """Measure a new global model on images that no client has."""
        with network.open_model(event.model_id) as model:
            accuracy = perceptron.measure(model.get_training_model(), held_out.images, held_out.labels)["accuracy"]
        self._scores.append(
            RoundScore(number=event.number, updates=event.updates, accuracy=accuracy, seconds=event.seconds)
        )
        self._tell(
            f"round {event.number} of {self._options.rounds} finished: {event.updates} updates, "
            f"held-out accuracy {accuracy:.3f}, {event.seconds:.1f} s",
            Tone.GOOD,
        )

    def _tell(self, text: str, tone: Tone = Tone.PLAIN) -> None:
        self._view.tell(Line(text=text, tone=tone))


def _seed_model(images: digits.Images) -> ScaleoutModel:
    return ScaleoutModel.from_training_model(perceptron.initial(images.images.shape[1]))


@contextlib.contextmanager
def _workplace(folder: Path | None) -> Iterator[Path]:
    """Yield the folder to work in; a temporary one is removed after the block."""
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        yield folder.resolve()
        return
    with tempfile.TemporaryDirectory(prefix="scaleout-demo-") as temporary:
        yield Path(temporary)


@contextlib.contextmanager
def _log_file(path: Path, level: int) -> Iterator[None]:
    """Send this process's log to a file during the block: on the terminal it would tear the table."""
    handler = logging.FileHandler(path, mode="w", encoding="utf-8", delay=True)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    root = logging.getLogger()
    before = root.level
    root.addHandler(handler)
    root.setLevel(level)
    try:
        yield
    finally:
        root.setLevel(before)
        root.removeHandler(handler)
        handler.close()
