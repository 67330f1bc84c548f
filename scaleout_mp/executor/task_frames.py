"""What a task says while it is at work: records go to who listens, how it ends to its answer."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from scaleout_mp.errors import ProtocolViolation
from scaleout_mp.ipc import messages
from scaleout_mp.ipc.channel import close_all
from scaleout_mp.ipc.frames import Kind
from scaleout_mp.task import LogLine, MetricRecord

if TYPE_CHECKING:
    from scaleout_mp.executor.answer import Answer
    from scaleout_mp.executor.output import OutputRelay
    from scaleout_mp.executor.plan import ExecutionPlan
    from scaleout_mp.executor.report import Evidence
    from scaleout_mp.ipc.frames import Frame
    from scaleout_mp.task import Record

logger = logging.getLogger(__name__)


class TaskFrames:
    """Takes the frames of one task. Use it on the executor's event loop only."""

    def __init__(self, plan: ExecutionPlan, relay: OutputRelay, evidence: Evidence, answer: Answer) -> None:
        """`plan` says who listens to records; `relay` gets log lines."""
        self._plan = plan
        self._relay = relay
        self._evidence = evidence
        self._answer = answer

    def take(self, frame: Frame) -> bool:
        """Take a frame; return whether the task has decided its end by it. Raises ProtocolViolation."""
        if frame.kind in messages.RECORD_KINDS:
            self._take_record(messages.parse_record(frame))
            return False
        if frame.kind is Kind.PROGRESS:
            if frame.descriptors:
                close_all(frame.descriptors)
                raise ProtocolViolation("a PROGRESS frame came with descriptors")
            return False
        if self._answer.came:
            close_all(frame.descriptors)
            raise ProtocolViolation(f"a {frame.kind.name} frame came after the task's end")
        if frame.kind is Kind.RESULT:
            self._answer.take_result(frame)
            return True
        if frame.kind is Kind.FAILURE:
            self._answer.take_failure(frame)
            return True
        if frame.kind is Kind.STATE and self._plan.state is not None:
            self._plan.state.receive(frame)
            return False
        close_all(frame.descriptors)
        raise ProtocolViolation(f"a task sent {frame.kind.name}")

    def _take_record(self, record: Record) -> None:
        if isinstance(record, LogLine):
            self._relay.log(record)
            return
        if isinstance(record, MetricRecord) and record.step is not None:
            self._evidence.last_step = record.step
        if self._plan.on_record is not None:
            try:
                self._plan.on_record(record)
            except Exception:
                # The listener's fault must not cost the task the frames that came with this one.
                logger.exception("a record could not be passed on", extra={"action": "record_listener_failed"})
