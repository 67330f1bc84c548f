"""The client's main process: polls for tasks, runs each in a process of its own, reports every end.

Never runs user code.
"""

from scaleout_mp.supervisor.runtime import GrpcEdgeClientRuntime
from scaleout_mp.supervisor.snapshot import ClientSnapshot, TaskSnapshot

__all__ = ["ClientSnapshot", "GrpcEdgeClientRuntime", "TaskSnapshot"]
