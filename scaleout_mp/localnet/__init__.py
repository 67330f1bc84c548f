"""A local Scaleout Edge network for demos, development and tests; clients of any version can join it."""

from scaleout_mp.localnet.event_log import EventLog
from scaleout_mp.localnet.faults import Fault
from scaleout_mp.localnet.network import LocalNetwork
from scaleout_mp.localnet.registry import ClientInfo, ClientState
from scaleout_mp.localnet.results import (
    RoundResult,
    RunStatus,
    SessionPlan,
    SessionResult,
    UpdateResult,
    ValidationResult,
)
from scaleout_mp.localnet.serve import serve
from scaleout_mp.localnet.tasks import IssuedTask, TaskOutcome
from scaleout_mp.localnet.thread import LocalNetworkThread, ThreadIssuedTask

__all__ = [
    "ClientInfo",
    "ClientState",
    "EventLog",
    "Fault",
    "IssuedTask",
    "LocalNetwork",
    "LocalNetworkThread",
    "RoundResult",
    "RunStatus",
    "SessionPlan",
    "SessionResult",
    "TaskOutcome",
    "ThreadIssuedTask",
    "UpdateResult",
    "ValidationResult",
    "serve",
]
