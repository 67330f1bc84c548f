"""What the parts of a local network share."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from scaleout_mp.localnet.event_log import EventLog
    from scaleout_mp.localnet.model_files import ModelFiles
    from scaleout_mp.localnet.registry import ClientRegistry
    from scaleout_mp.localnet.tasks import TaskBook
    from scaleout_mp.localnet.tokens import Tokens


@dataclasses.dataclass(frozen=True, kw_only=True)
class NetworkParts:
    """The state of one network, for those who serve it."""

    log: EventLog
    registry: ClientRegistry
    book: TaskBook
    models: ModelFiles
    tokens: Tokens
