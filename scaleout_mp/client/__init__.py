"""What users program against: EdgeClient, what it needs from a runtime, and the logging context."""

from scaleout_mp.client.edge_client import EdgeClient
from scaleout_mp.client.inference_context import InferenceContext
from scaleout_mp.client.logging_context import LoggingContext
from scaleout_mp.client.options import ConnectToApiResult, GrpcConnectionOptions
from scaleout_mp.client.runtime import EdgeClientRuntime

__all__ = [
    "ConnectToApiResult",
    "EdgeClient",
    "EdgeClientRuntime",
    "GrpcConnectionOptions",
    "InferenceContext",
    "LoggingContext",
]
