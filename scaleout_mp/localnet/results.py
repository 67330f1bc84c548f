"""What a session is asked to do, and what came of it."""

from __future__ import annotations

import dataclasses
import enum
import json
import math
import re
import uuid
from typing import TYPE_CHECKING, Any, Final

from scaleout_mp.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from scaleout_mp.localnet.tasks import TaskOutcome

_PLAIN_NAME: Final = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,127}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class SessionPlan:
    """How a session is run. A wrong value raises ConfigError, which names the field.

    A round trains on every client that is connected when it starts. It is over when each task has ended or
    `round_timeout` has passed; stragglers are then told TIMEOUT. With at least `min_updates` usable updates it
    makes a new model, else it has failed and is tried again from the same model, `round_retries` times; after
    that the session ends as FAILED. A round that is aborted is not tried again: the session goes on.
    """

    rounds: int
    session_id: str = dataclasses.field(default_factory=lambda: str(uuid.uuid4()))
    #: Given to every train callback.
    client_settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    #: A round starts when this many clients are connected.
    min_clients: int = 1
    #: Seconds to wait for them; None: for ever.
    client_timeout: float | None = None
    #: A round makes a new model from at least this many updates.
    min_updates: int = 1
    #: Seconds that training may take in one round.
    round_timeout: float = 300.0
    #: How often a failed round is tried again.
    round_retries: int = 1
    #: Validate each new model on every client that is connected.
    validate: bool = True
    #: Seconds that validation may take in one round; None: as long as training.
    validation_timeout: float | None = None
    #: Seconds by which an update or validation may come after the report that its task is completed: clients
    #: of 1.1 send both from queues of their own.
    late_grace: float = 2.0
    #: Keep the clients' models after they were averaged.
    keep_updates: bool = False

    def __post_init__(self) -> None:
        for name, least in (("rounds", 1), ("min_clients", 1), ("min_updates", 1), ("round_retries", 0)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ConfigError(f"{name} must be a whole number of at least {least}, not {value!r}")
        for name in ("round_timeout", "client_timeout", "validation_timeout", "late_grace"):
            value = getattr(self, name)
            if value is None and name in {"client_timeout", "validation_timeout"}:
                continue
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
                raise ConfigError(f"{name} must be a number of seconds, not {value!r}")
        try:
            json.dumps(dict(self.client_settings))
        except (TypeError, ValueError) as error:
            raise ConfigError(f"client_settings must be JSON: {error}") from error
        if not _PLAIN_NAME.fullmatch(self.session_id):
            raise ConfigError(f"session_id must be a plain name, not {self.session_id!r}")


class RunStatus(enum.StrEnum):
    """How a round or a session ended."""

    FINISHED = "FINISHED"
    FAILED = "FAILED"
    ABORTED = "ABORTED"


@dataclasses.dataclass(frozen=True, kw_only=True)
class UpdateResult:
    """One update that came in a round."""

    client_id: str
    correlation_id: str
    model_update_id: str
    #: Its weight in the average; 0 when it was left out.
    num_examples: float
    meta: Mapping[str, Any]
    #: Why it was left out; empty when it counts.
    rejected: str = ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ValidationResult:
    """What one client's validation found."""

    client_id: str
    correlation_id: str
    metrics: Mapping[str, Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class RoundResult:
    """What came of one round."""

    session_id: str
    round_id: str
    #: 1 for the first round of the session.
    number: int
    #: 1 for the first try.
    attempt: int
    status: RunStatus
    #: The model that was trained on.
    model_id: str
    #: The model that came of it; None when none did.
    new_model_id: str | None
    updates: tuple[UpdateResult, ...]
    validations: tuple[ValidationResult, ...]
    #: How every task of the round ended.
    tasks: tuple[TaskOutcome, ...]
    seconds: float

    @property
    def used_updates(self) -> tuple[UpdateResult, ...]:
        """The updates that count."""
        return tuple(update for update in self.updates if not update.rejected)

    @property
    def metrics(self) -> dict[str, float]:
        """The mean over the clients of every number that they validated."""
        return mean_metrics(validation.metrics for validation in self.validations)

    def to_dict(self) -> dict[str, Any]:
        """Return the result as JSON-serialisable values."""
        return {**dataclasses.asdict(self), "metrics": self.metrics}


@dataclasses.dataclass(frozen=True, kw_only=True)
class SessionResult:
    """What came of a session."""

    session_id: str
    status: RunStatus
    #: Why it did not finish; else empty.
    reason: str
    seed_model_id: str
    #: The last global model.
    model_id: str
    #: Every round in order, failed tries included.
    rounds: tuple[RoundResult, ...]
    seconds: float

    @property
    def finished(self) -> bool:
        """Whether all rounds were run."""
        return self.status is RunStatus.FINISHED

    def to_dict(self) -> dict[str, Any]:
        """Return the result as JSON-serialisable values."""
        return {**dataclasses.asdict(self), "rounds": [result.to_dict() for result in self.rounds]}


def mean_metrics(found: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    """Return the plain mean of each key that is a number, over those who have it."""
    values: dict[str, list[float]] = {}
    for metrics in found:
        for key, value in metrics.items():
            if isinstance(value, int | float) and not isinstance(value, bool):
                values.setdefault(key, []).append(float(value))
    return {key: sum(numbers) / len(numbers) for key, numbers in values.items()}
