"""Runs callables in confined processes: launch, watch, stop, report. Knows nothing of Scaleout."""

from scaleout_mp.executor.core import ExecutorCore
from scaleout_mp.executor.execution import Execution
from scaleout_mp.executor.interpreter import Environment, Interpreter
from scaleout_mp.executor.launcher import Child, Exited, Launcher, Started, StartOrder
from scaleout_mp.executor.plan import Outcome
from scaleout_mp.executor.residents import SetUp, WorkerSpec
from scaleout_mp.executor.task_executor import Task, TaskExecutor
from scaleout_mp.executor.worker_handle import Worker
from scaleout_mp.ipc.callables import PreparedCallable

__all__ = [
    "Child",
    "Environment",
    "Execution",
    "ExecutorCore",
    "Exited",
    "Interpreter",
    "Launcher",
    "Outcome",
    "PreparedCallable",
    "SetUp",
    "StartOrder",
    "Started",
    "Task",
    "TaskExecutor",
    "Worker",
    "WorkerSpec",
]
