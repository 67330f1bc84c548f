"""What the parts of a local network share."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from scaleout_mp.localnet.event_log import EventLog
    from scaleout_mp.localnet.model_files import ModelFiles
    from scaleout_mp.localnet.registry import ClientRegistry
    from scaleout_mp.localnet.tasks import TaskBook
    from scaleout_mp.localnet.tokens import Tokens

#: What a network speaks: "1.0" has no streams, takes no backlog and knows no tasks that clients start by themselves.
Release = Literal["1.0", "1.1"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class NetworkParts:
    """The state of one network, for those who serve it."""

    log: EventLog
    registry: ClientRegistry
    book: TaskBook
    models: ModelFiles
    tokens: Tokens
