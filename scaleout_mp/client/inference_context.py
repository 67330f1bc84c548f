"""Which inference, of which model, a result that is logged belongs to."""

from __future__ import annotations

from typing import Final

from scaleout_mp.client.of_task import OfTask


class InferenceContext:
    """Ids for `EdgeClient.log_inference_result`."""

    def __init__(self, *, inference_id: str, model_id: str) -> None:
        self.inference_id = inference_id
        self.model_id = model_id


#: That of the inference which this process runs.
inference_of_task: Final = OfTask[InferenceContext]()
