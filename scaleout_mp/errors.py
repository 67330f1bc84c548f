"""Every error that this package raises, as one tree.

The docstring of a class is its default message and says what to do next; facts sit in attributes.
"""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from scaleout_mp.task import ExitReport


class ScaleoutError(Exception):
    """Something in scaleout_mp went wrong."""

    def __init__(self, message: str | None = None) -> None:
        super().__init__(message or " ".join(inspect.cleandoc(self.__doc__ or type(self).__name__).split()))


class ConfigError(ScaleoutError, ValueError):
    """A setting has a value that cannot work."""


class RestartError(ScaleoutError):
    """The client could not be started again in its own place; start it by hand, or have a service manager do that."""


class TargetError(ScaleoutError):
    """There is no callable of that name, or it does not take what it is to be called with."""


class StoppedException(ScaleoutError):  # noqa: N818 - the name that users of the published client catch
    """The task was asked to stop. Let it pass, or clean up and raise it again."""


# --- Tasks ---------------------------------------------------------------------------------------------------------


class TaskError(ScaleoutError):
    """A task did not complete; `report` says how it ended."""

    def __init__(self, message: str | None = None, *, report: ExitReport | None = None) -> None:
        super().__init__(message or (report.explain() if report is not None else None))
        #: How the task ended.
        self.report = report

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild_task_error, (type(self), str(self), self.report)


def _rebuild_task_error(kind: type[TaskError], message: str, report: ExitReport | None) -> TaskError:
    return kind(message, report=report)


class TaskFailed(TaskError):  # noqa: N818 - an outcome, named like its siblings
    """The task's own code raised, or returned what cannot be sent back."""


class TaskCrashed(TaskError):  # noqa: N818
    """The task's process died without a result: a signal that nobody here sent, or an exit of its own."""


class TaskKilled(TaskError):  # noqa: N818
    """The task was stopped: it passed a limit or was aborted."""


class TaskRefused(TaskError):  # noqa: N818
    """The task was never started."""


class ExecutorClosedError(ScaleoutError, RuntimeError):
    """No more is taken: what runs tasks is closing, or closed."""


class CallbackNotSendable(ScaleoutError):  # noqa: N818
    """A callback could not be sent to the process that runs it.

    Keep locks, sockets and open files out of what it captures; open them inside the callback.
    """

    def __init__(self, message: str | None = None, *, callback: str = "", culprit: str = "") -> None:
        super().__init__(message)
        #: Qualified name of the callback.
        self.callback = callback
        #: What inside it could not be pickled.
        self.culprit = culprit

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild_not_sendable, (str(self), self.callback, self.culprit)


def _rebuild_not_sendable(message: str, callback: str, culprit: str) -> CallbackNotSendable:
    return CallbackNotSendable(message, callback=callback, culprit=culprit)


class PackageError(ConfigError):
    """A compute package cannot be used."""


class LauncherError(ScaleoutError):
    """A task process could not be started."""


class ImportedForTaskError(ScaleoutError):
    """A module that is imported for a task runs tasks or a client. Do so below `if __name__ == "__main__":`."""


class ChannelError(ScaleoutError):
    """The other end of a control channel is gone."""


class ProtocolViolation(ScaleoutError):  # noqa: N818
    """A child sent something that the control channel does not allow."""


class ValueNotSendable(ScaleoutError, TypeError):  # noqa: N818
    """A value cannot cross the process boundary. Return models, numpy arrays and plain JSON-like values."""


# --- Models --------------------------------------------------------------------------------------------------------


class ModelError(ScaleoutError):
    """A model could not be used."""


class ModelFormatError(ModelError, ValueError):
    """The bytes are not a model that this package accepts."""


class IncompatibleModelFormatError(ModelFormatError):
    """The model container is of a newer version than this package reads. Upgrade scaleout-mp."""


class ModelSignatureError(ModelError):
    """A model has no signature of a trusted signer, and the policy requires one."""


class StagingError(ModelError):
    """A model could not be made ready for inference; what became of the tries is in the log."""


class ModelNotFoundError(ModelError):
    """The server does not have the model."""


# --- The network ---------------------------------------------------------------------------------------------------


class TransportError(ScaleoutError):
    """The server could not be reached or did not answer as the protocol says."""


class ModelTransferError(TransportError):
    """A model did not arrive whole."""


class AuthenticationError(TransportError):
    """The server refused the token. Ask the network's owner for a new one."""


class ApiUnavailableError(TransportError):
    """The REST API did not answer, or answered that it cannot at the moment. Try again later."""


class WrongAddressError(TransportError):
    """What answers at this address is no Scaleout API. Check the URL."""


class CallError(TransportError):
    """The combiner did not answer a call, or refused it."""

    def __init__(self, message: str | None = None, *, call: str = "", code: str = "", transient: bool = False) -> None:
        super().__init__(message)
        #: Name of the remote call.
        self.call = call
        #: Name of the gRPC status code.
        self.code = code
        #: Whether the same call may succeed later.
        self.transient = transient

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild_call_error, (str(self), self.call, self.code, self.transient)


def _rebuild_call_error(message: str, call: str, code: str, transient: bool) -> CallError:
    return CallError(message, call=call, code=code, transient=transient)


class NotConnectedError(TransportError):
    """The client is not connected. Call connect_to_api and init_grpchandler before run."""


class StateError(ScaleoutError):
    """The folder that keeps what must not be lost cannot be used. Choose another with SCALEOUT_MP_STATE_DIR."""


class StateInUseError(StateError):
    """Another client with the same id runs on this machine. End it, or give this one an id of its own."""


class LocalNetworkError(ScaleoutError):
    """The local network could not start or could not do what it was asked."""


class DemoError(ScaleoutError):
    """The demo could not go on."""


class ControlError(ScaleoutError):
    """A running client could not be reached, or did not do what it was asked."""


class MissingExtraError(ScaleoutError):
    """A part of the package that is installed on request is not there."""
