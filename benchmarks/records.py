"""What `log_metric` costs a callback, and how fast metrics reach the combiner, beside the published client's handler.

Both talk to one local network, which runs in this process and counts what arrives; a round trip is injected by having
it hold up each call. `python -m benchmarks.records` prints these rows alone.
"""

from __future__ import annotations

import contextlib
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.harness import Row, alone, compare, show
from scaleout_mp.localnet import Fault, LocalNetworkThread
from scaleout_mp.localnet.events import MetricReceived

if TYPE_CHECKING:
    from collections.abc import Iterator

    from scaleout_mp.localnet.events import Event

PEER = "scaleout 1.0.7"
PEER_PYTHON = Path(__file__).parents[1] / ".venv-compat" / "bin" / "python"
HERE = Path(__file__).parent
#: Metrics of one task; and how many are enough to know the rate of one call after the other.
COUNT = 100_000
PEER_COUNT = 5_000
PEER_COUNT_SLOW = 100
PACED = 1_000
#: Seconds of work before each metric: as often as training logs at the most, and as one of short steps does. What a
#: processor has not run for milliseconds is no longer in its caches, which makes any call dearer.
STEP = 50e-6
LONG_STEP = 5e-3
ROUND_TRIP = 0.05


class Bench:
    """Two clients of one network."""

    def __init__(self, net: LocalNetworkThread, published: subprocess.Popen[str]) -> None:
        self._net = net
        self._published = published
        # The network's own log forgets the oldest.
        self._moments: list[float] = []
        net.events.subscribe(self._note)

    def ours(self, task: str, count: int, step: float = STEP) -> tuple[float, float]:
        """Have our client run a task; return its figure, and how many metrics arrived in a second.

        A paced one works for `step` seconds before each metric.
        """
        issued = self._net.issue("ours", f"Custom_{task}", data={"parameters": {"count": count, "step": step}})
        outcome = issued.done(600)
        if outcome.status != "COMPLETED":
            raise RuntimeError(f"the task ended {outcome.status}: {outcome.response}")
        return next(iter(outcome.response.values())), self._rate(count)

    def theirs(self, count: int, pause: float = 0.0) -> tuple[float, float]:
        """Have the published handler send; return the median of a call in microseconds, and the rate."""
        assert self._published.stdin is not None
        assert self._published.stdout is not None
        self._published.stdin.write(f"{count} {pause}\n")
        self._published.stdin.flush()
        return float(self._published.stdout.readline()), self._rate(count)

    def _note(self, event: Event) -> None:
        if isinstance(event, MetricReceived):
            self._moments.append(event.monotonic)

    def _rate(self, count: int) -> float:
        moments, self._moments = self._moments, []
        if len(moments) != count:
            raise RuntimeError(f"{len(moments)} metrics arrived instead of {count}")
        return (count - 1) / (moments[-1] - moments[0])

    @contextlib.contextmanager
    def round_trip(self, seconds: float) -> Iterator[None]:
        """Hold up each metric's call."""
        self._net.faults.always("SendModelMetric", Fault(delay=seconds))
        yield
        self._net.faults.clear()


@contextlib.contextmanager
def bench() -> Iterator[Bench]:
    """Start the network and both clients."""
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        net = stack.enter_context(LocalNetworkThread(Path(folder) / "net"))
        host, _, port = net.combiner_address.rpartition(":")
        published = stack.enter_context(
            subprocess.Popen(
                [str(PEER_PYTHON), str(HERE / "records_published.py"), host, port],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
        )
        stack.callback(published.kill)
        ours = stack.enter_context(
            subprocess.Popen([sys.executable, str(HERE / "records_client.py"), net.api_url, f"{folder}/state"])
        )
        stack.callback(ours.terminate)
        assert published.stdout is not None
        if published.stdout.readline() != "ready\n":
            raise RuntimeError("the published handler did not start")
        net.wait_for_clients(1, timeout=60)
        yield Bench(net, published)


def records(runs: int = 3, count: int = COUNT) -> list[Row]:
    """Return the rows for records."""
    if not PEER_PYTHON.exists():
        print(f"no rows for records: {PEER_PYTHON} is missing (`make test` makes it)", file=sys.stderr)
        return []
    with bench() as both:
        both.ours("paced", 200), both.theirs(200)
        calls = [(both.ours("paced", PACED)[0], both.theirs(PACED, STEP)[0]) for _ in range(runs)]
        rare = [(both.ours("paced", PACED, LONG_STEP)[0], both.theirs(PACED, LONG_STEP)[0]) for _ in range(runs)]
        rates = [(both.ours("burst", count)[1], both.theirs(PEER_COUNT)[1]) for _ in range(runs)]
        with both.round_trip(ROUND_TRIP):
            slow_calls = [both.ours("paced", PACED)[0] for _ in range(runs)]
            slow = both.ours("burst", count)[1], both.theirs(PEER_COUNT_SLOW)[1]
    ours, theirs = [call for call, _ in calls], [call for _, call in calls]
    return [
        alone("log_metric in a callback, paced", ours, unit="us", at_most=5),
        alone(f"the same with {ROUND_TRIP * 1e3:g} ms round trip", slow_calls, unit="us", at_most=5),
        compare("log_metric in a callback, paced", ours, PEER, theirs, unit="us", at_least=40),
        compare(
            f"the same with {LONG_STEP * 1e3:g} ms of work between",
            [call for call, _ in rare],
            PEER,
            [call for _, call in rare],
            unit="us",
            at_least=1,
        ),
        compare(
            f"{count} metrics of a task delivered",
            [statistics.median(mine for mine, _ in rates)],
            PEER,
            [statistics.median(peer for _, peer in rates)],
            unit="metrics/s",
            at_least=1.3,
        ),
        compare(
            f"{count} metrics, {ROUND_TRIP * 1e3:g} ms round trip",
            [slow[0]],
            PEER,
            [slow[1]],
            unit="metrics/s",
            at_least=30,
        ),
    ]


if __name__ == "__main__":
    found = records()
    show(found)
    sys.exit(not all(row.holds for row in found))
