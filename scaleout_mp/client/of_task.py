"""What is of a task for all threads of its process, also for those that have no context variables of the callback's."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Generic, TypeVar

if TYPE_CHECKING:
    from collections.abc import Iterator

T = TypeVar("T")


class OfTask(Generic[T]):
    """A value that this process has while it runs a callback."""

    def __init__(self) -> None:
        self._value: T | None = None

    def get(self) -> T | None:
        """Return the value; None while no callback runs."""
        return self._value

    @contextlib.contextmanager
    def entered(self, value: T) -> Iterator[None]:
        """Have the value for the block. Called around a callback, in the child."""
        previous, self._value = self._value, value
        try:
            yield
        finally:
            self._value = previous
