"""Scaleout Edge client that runs every task in a confined process of its own.

Public names are loaded when they are first used, so that importing the package costs little and a task's process
never loads what only the supervisor needs.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from scaleout_mp.client import ConnectToApiResult as ConnectToApiResult
    from scaleout_mp.client import EdgeClient as EdgeClient
    from scaleout_mp.client import EdgeClientRuntime as EdgeClientRuntime
    from scaleout_mp.client import GrpcConnectionOptions as GrpcConnectionOptions
    from scaleout_mp.client import InferenceContext as InferenceContext
    from scaleout_mp.client import LoggingContext as LoggingContext
    from scaleout_mp.config import Limits as Limits
    from scaleout_mp.config import Resources as Resources
    from scaleout_mp.config import Sandbox as Sandbox
    from scaleout_mp.errors import CallbackNotSendable as CallbackNotSendable
    from scaleout_mp.errors import ConfigError as ConfigError
    from scaleout_mp.errors import IncompatibleModelFormatError as IncompatibleModelFormatError
    from scaleout_mp.errors import ModelFormatError as ModelFormatError
    from scaleout_mp.errors import PackageError as PackageError
    from scaleout_mp.errors import ScaleoutError as ScaleoutError
    from scaleout_mp.errors import StoppedException as StoppedException
    from scaleout_mp.errors import TaskCrashed as TaskCrashed
    from scaleout_mp.errors import TaskError as TaskError
    from scaleout_mp.errors import TaskFailed as TaskFailed
    from scaleout_mp.errors import TaskKilled as TaskKilled
    from scaleout_mp.errors import TaskRefused as TaskRefused
    from scaleout_mp.executor import Task as Task
    from scaleout_mp.executor import TaskExecutor as TaskExecutor
    from scaleout_mp.executor import Worker as Worker
    from scaleout_mp.model import ScaleoutModel as ScaleoutModel
    from scaleout_mp.model import ScaleoutModelBuilder as ScaleoutModelBuilder
    from scaleout_mp.supervisor import GrpcEdgeClientRuntime as GrpcEdgeClientRuntime
    from scaleout_mp.task import EndReason as EndReason
    from scaleout_mp.task import ExitReport as ExitReport
    from scaleout_mp.task import current_task as current_task
    from scaleout_mp.transport.signatures import TrustedSigners as TrustedSigners

__version__ = "0.1.0"

_HOME = {
    "CallbackNotSendable": "errors",
    "ConfigError": "errors",
    "ConnectToApiResult": "client",
    "EdgeClient": "client",
    "EdgeClientRuntime": "client",
    "EndReason": "task",
    "ExitReport": "task",
    "GrpcConnectionOptions": "client",
    "GrpcEdgeClientRuntime": "supervisor",
    "IncompatibleModelFormatError": "errors",
    "InferenceContext": "client",
    "Limits": "config",
    "LoggingContext": "client",
    "ModelFormatError": "errors",
    "PackageError": "errors",
    "Resources": "config",
    "Sandbox": "config",
    "ScaleoutError": "errors",
    "ScaleoutModel": "model",
    "ScaleoutModelBuilder": "model",
    "StoppedException": "errors",
    "Task": "executor",
    "TaskCrashed": "errors",
    "TaskError": "errors",
    "TaskExecutor": "executor",
    "TaskFailed": "errors",
    "TaskKilled": "errors",
    "TaskRefused": "errors",
    "TrustedSigners": "transport.signatures",
    "Worker": "executor",
    "current_task": "task",
}

__all__ = [*_HOME, "__version__"]  # noqa: PLE0604 - the names are strings


def __getattr__(name: str) -> Any:
    home = _HOME.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{home}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
