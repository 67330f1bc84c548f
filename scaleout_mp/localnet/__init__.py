"""A local Scaleout Edge network for demos, development and tests; clients of any version can join it."""

from scaleout_mp.localnet.certificates import CertificateAuthority, CertificateFiles, ServerTls
from scaleout_mp.localnet.event_log import EventLog
from scaleout_mp.localnet.fault_text import FaultOrder, read_fault
from scaleout_mp.localnet.faults import Fault, FaultPlan
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
from scaleout_mp.localnet.serve import Tls, serve
from scaleout_mp.localnet.tasks import IssuedTask, TaskOutcome
from scaleout_mp.localnet.thread import LocalNetworkThread, ThreadIssuedTask
from scaleout_mp.localnet.tokens import TokenKind

__all__ = [
    "CertificateAuthority",
    "CertificateFiles",
    "ClientInfo",
    "ClientState",
    "EventLog",
    "Fault",
    "FaultOrder",
    "FaultPlan",
    "IssuedTask",
    "LocalNetwork",
    "LocalNetworkThread",
    "RoundResult",
    "RunStatus",
    "ServerTls",
    "SessionPlan",
    "SessionResult",
    "TaskOutcome",
    "ThreadIssuedTask",
    "Tls",
    "TokenKind",
    "UpdateResult",
    "ValidationResult",
    "read_fault",
    "serve",
]
