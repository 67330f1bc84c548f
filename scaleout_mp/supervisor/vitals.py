"""Signs of life: heartbeats, and how the machine does."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import psutil

from scaleout_mp.supervisor import messages
from scaleout_mp.supervisor.rhythm import keep_calling
from scaleout_mp.task import TelemetryRecord
from scaleout_mp.wire import edge_pb2 as pb
from scaleout_mp.wire import methods

if TYPE_CHECKING:
    from scaleout_mp.transport.calls import CombinerCalls
    from scaleout_mp.transport.outbox import Outbox

#: Seconds between two looks at the machine.
TELEMETRY_INTERVAL = 5.0


async def send_heartbeats(calls: CombinerCalls, *, client_id: str, interval: float) -> None:
    """Send a heartbeat every `interval` seconds, for ever."""

    async def beat() -> None:
        await calls.once(methods.SEND_HEARTBEAT, pb.Heartbeat(client_id=client_id))

    await keep_calling("the heartbeat", interval, beat, calls)


async def send_machine_telemetry(calls: CombinerCalls, outbox: Outbox, *, client_id: str) -> None:
    """Send use of memory and processor in percent every five seconds, for ever."""
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

    await keep_calling("machine telemetry", TELEMETRY_INTERVAL, look, calls)
