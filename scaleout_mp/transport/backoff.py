"""How long to wait before trying again."""

from __future__ import annotations

import dataclasses
import random
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

#: Past this many doublings every backoff has reached its cap.
_MAX_EXPONENT = 64


@dataclasses.dataclass(frozen=True, kw_only=True)
class Backoff:
    """Waits that grow from `first` to `cap` seconds, spread so that clients do not come back as one."""

    first: float = 1.0
    factor: float = 2.0
    cap: float = 30.0
    #: Share of the wait by which it varies, both ways.
    jitter: float = 0.25

    def delay(self, failures: int, rand: Callable[[], float] = random.random) -> float:
        """Return the seconds to wait after that many failures in a row; `rand` gives numbers in [0, 1)."""
        exponent = min(max(failures, 1) - 1, _MAX_EXPONENT)
        wait = min(self.cap, self.first * self.factor**exponent)
        return wait * (1 + self.jitter * (2 * rand() - 1))
