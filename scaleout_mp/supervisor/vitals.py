"""Signs of life: heartbeats, and how the machine does."""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING, Final

import psutil

from scaleout_mp.errors import CallError
from scaleout_mp.supervisor import messages
from scaleout_mp.supervisor.rhythm import keep_calling
from scaleout_mp.task import TelemetryRecord
from scaleout_mp.transport.link_quality import LinkState
from scaleout_mp.wire import edge_pb2 as pb
from scaleout_mp.wire import methods

if TYPE_CHECKING:
    from scaleout_mp.transport.calls import CombinerCalls
    from scaleout_mp.transport.outbox import Outbox

logger = logging.getLogger(__name__)

#: Seconds between two looks at the machine.
TELEMETRY_INTERVAL: Final = 5.0
#: The same over a degraded link, which has more important things to carry.
TELEMETRY_INTERVAL_DEGRADED: Final = 30.0
#: Seconds between two reports of what waits for the server.
BACKLOG_INTERVAL: Final = 30.0


async def send_heartbeats(calls: CombinerCalls, *, client_id: str, interval: float) -> None:
    """Send a heartbeat every `interval` seconds, for ever."""
    message = pb.Heartbeat(client_id=client_id, heartbeat_interval_ms=_milliseconds(interval))
    refused = False

    async def beat() -> None:
        nonlocal refused
        try:
            await calls.once(methods.SEND_HEARTBEAT, message)
        except CallError as error:
            if error.transient:
                raise
            # An answer is an answer: the link is not to blame, and polls are signs of life as well.
            if not refused:
                logger.warning("the server takes no heartbeats: %s", error, extra={"action": "heartbeat_refused"})
            refused = True
        else:
            refused = False

    await keep_calling("the heartbeat", interval, beat, calls)


async def send_backlog_reports(calls: CombinerCalls, outbox: Outbox, *, client_id: str, interval: float) -> None:
    """Say every `interval` seconds how much waits for the server; to one that takes such reports, for ever."""

    async def report() -> None:
        # How much waits while nothing arrives is told once something does.
        if calls.link.down or not calls.speaks(methods.SEND_BACKLOG_REPORT):
            return
        counts, age = outbox.counts, outbox.oldest_age(time.time())
        message = pb.BacklogReport(
            client_id=client_id,
            backlog_total=counts.pending,
            backlog_dropped_total=counts.dropped,
            backlog_oldest_age_ms=None if age is None else age * 1e3,
        )
        try:
            await calls.once(methods.SEND_BACKLOG_REPORT, message)
        except CallError as error:
            if error.transient:
                raise
            # Told by UNIMPLEMENTED; what refuses it otherwise need not be asked again and again, either.
            calls.lacks(methods.SEND_BACKLOG_REPORT)

    await keep_calling("the backlog report", interval, report, calls)


def _milliseconds(seconds: float) -> int:
    return min(round(seconds * 1e3), (1 << 32) - 1)


async def send_machine_telemetry(calls: CombinerCalls, outbox: Outbox, *, client_id: str) -> None:
    """Send use of memory and processor in percent every five seconds, less often over a degraded link, for ever."""
    # The first figure is the use since the call before, which there was not.
    psutil.cpu_percent()

    moments = messages.Moments()

    async def look() -> None:
        figures = {"memory_usage": psutil.virtual_memory().percent, "cpu_usage": psutil.cpu_percent()}
        record = TelemetryRecord(telemetry=figures, timestamp=time.time())
        message = messages.record_message(client_id, record, moments)
        # Figures of an outage help nobody once it is over, and there is one every five seconds.
        if message is not None and not calls.link.down:
            outbox.put(*message)

    def interval() -> float:
        healthy = calls.link.quality.state is LinkState.HEALTHY
        return TELEMETRY_INTERVAL if healthy else TELEMETRY_INTERVAL_DEGRADED

    await keep_calling("machine telemetry", interval, look, calls)
