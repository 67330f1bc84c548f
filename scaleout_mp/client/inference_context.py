"""Which inference, of which model, a result that is logged belongs to."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator


class InferenceContext:
    """Ids for `EdgeClient.log_inference_result`."""

    def __init__(self, *, inference_id: str, model_id: str) -> None:
        self.inference_id = inference_id
        self.model_id = model_id


_of_task: InferenceContext | None = None


def task_inference_context() -> InferenceContext | None:
    """Return the context of the inference that this process runs; None while it runs none."""
    return _of_task


@contextlib.contextmanager
def entered_inference(context: InferenceContext) -> Iterator[None]:
    """Make `context` this process's inference context for the block. Called around a callback, in the child."""
    global _of_task  # noqa: PLW0603 - a process runs one task
    previous, _of_task = _of_task, context
    try:
        yield
    finally:
        _of_task = previous
