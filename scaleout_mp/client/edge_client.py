"""EdgeClient: the surface that user code programs against, in the supervisor and inside a task alike."""

from __future__ import annotations

import importlib
import logging
from typing import TYPE_CHECKING, Any, cast

from scaleout_mp.client.inference_client import InferenceClient
from scaleout_mp.client.published import stopped
from scaleout_mp.client.record_logging import RecordLogging
from scaleout_mp.client.values import checked_callback
from scaleout_mp.errors import NotConnectedError, StoppedException
from scaleout_mp.task import current_task, require_not_loading

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from scaleout_mp.client.options import ConnectToApiResult, GrpcConnectionOptions
    from scaleout_mp.client.runtime import AutonomousTask, EdgeClientRuntime
    from scaleout_mp.model import ScaleoutModel

logger = logging.getLogger(__name__)

CUSTOM_PREFIX = "Custom_"
AUTONOMOUS_PREFIX = "Autonomous_"

#: What stays behind when a client is pickled: it belongs to the process that connects.
_NOT_CARRIED = frozenset(
    {
        "_given_runtime",
        "_has_runtime",
        "_local",
        "inference_callback",
        "registered_callbacks",
        "stage_model_callback",
        "train_callback",
        "validate_callback",
    }
)


class _StateOfTask:
    """`EdgeClient.state`. Not a property, so that subclasses may have an attribute of that name."""

    def __get__(self, client: EdgeClient | None, kind: type[EdgeClient]) -> dict[Any, Any]:
        if client is None:
            return self  # type: ignore[return-value]  # as a property's own
        task = current_task()
        if task is None:
            raise RuntimeError("client.state is there while a callback runs, in its process")
        return task.state


class EdgeClient(RecordLogging, InferenceClient):
    """A client of a Scaleout Edge network.

    Register callbacks, then `connect_to_api`, `init_grpchandler` and `run`. Callbacks run in processes of
    their own; a client that they capture, or that hangs on the object they are methods of, becomes the client
    of that process there, so `log_metric` and `check_task_abort` work as they do here.

    `runtime` replaces what connects the client to the network (default: GrpcEdgeClientRuntime).
    """

    #: A dict of the running callback's own: what it puts there it finds again the next time, as long as it completes.
    #: Kept pickled between its tasks; see docs/isolation.md.
    state = _StateOfTask()

    def __init__(
        self,
        train_callback: Callable[[ScaleoutModel, dict[str, Any]], tuple[ScaleoutModel | None, dict[str, Any]]]
        | None = None,
        validate_callback: Callable[[ScaleoutModel], dict[str, Any]] | None = None,
        runtime: EdgeClientRuntime | None = None,
    ) -> None:
        super().__init__()
        self.name: str | None = None
        self.client_id: str | None = None
        #: Folder of the compute package.
        self.package_path: str = "."
        self.train_callback = checked_callback(train_callback, "train_callback")
        self.validate_callback = checked_callback(validate_callback, "validate_callback")
        self._init_inference()
        #: Custom callbacks by task type, "Custom_<name>".
        self.registered_callbacks: dict[str, Callable[[dict[str, Any]], Any]] = {}
        self._given_runtime = runtime
        self._has_runtime = True
        _introduce(runtime, self)

    # A subclass is rebuilt with its own attributes, so that callbacks which are its methods find them; a
    # plain client becomes the one client of the process that it arrives in.
    def __reduce__(self) -> tuple[Any, ...]:
        if type(self) is EdgeClient:
            return client_of_this_process, (self.name, self.client_id, self.package_path)
        return _bare_client, (type(self),), {k: v for k, v in vars(self).items() if k not in _NOT_CARRIED}

    def set_train_callback(
        self,
        callback: Callable[[ScaleoutModel, dict[str, Any]], tuple[ScaleoutModel | None, dict[str, Any]]] | None,
    ) -> None:
        """Set the callback for model updates: `train(model, client_settings) -> (model, metadata)`."""
        self.train_callback = checked_callback(callback, "the train callback")

    def set_validate_callback(self, callback: Callable[[ScaleoutModel], dict[str, Any]] | None) -> None:
        """Set the callback for validations: `validate(model) -> metrics`."""
        self.validate_callback = checked_callback(callback, "the validate callback")

    def set_custom_callback(self, callback_name: str, callback: Callable[[dict[str, Any]], Any]) -> None:
        """Set the callback for tasks of type "Custom_<callback_name>"; it gets the task's `parameters`."""
        if callback is None:
            raise TypeError(f"the custom callback {callback_name!r} is None; remove_custom_callback removes one")
        self.registered_callbacks[_custom_type(callback_name)] = checked_callback(
            callback, f"custom callback {callback_name!r}"
        )

    def remove_custom_callback(self, callback_name: str) -> None:
        """Remove a custom callback; one that is not there is said in the log."""
        if self.registered_callbacks.pop(_custom_type(callback_name), None) is None:
            logger.warning(
                "no custom callback %r is registered",
                callback_name,
                extra={"action": "custom_callback_missing"},
            )

    def set_name(self, name: str) -> None:
        """Set the name under which the network shows this client."""
        self.name = name

    def set_client_id(self, client_id: str) -> None:
        """Set the id under which the network knows this client."""
        self.client_id = client_id

    def check_task_abort(self) -> None:
        """Raise StoppedException when the running task was asked to stop; does nothing outside its thread.

        Call it now and then from a callback that works for long.
        """
        task = current_task()
        if task is not None:
            try:
                task.check_abort()
            except StoppedException as error:
                raise stopped(error) from None
        elif self._has_runtime:
            self._runtime.check_task_abort()

    def use_runtime(self, runtime: EdgeClientRuntime) -> None:
        """Have `runtime` in the place of the one from before. Called by who makes the client, before it is used."""
        self._given_runtime = runtime
        self._has_runtime = True

    @property
    def _runtime(self) -> EdgeClientRuntime:
        if self._given_runtime is None:
            require_not_loading("connects or runs a client")
            if not self._has_runtime or current_task() is not None:
                raise NotConnectedError(
                    "this client lives in a task's process: it logs and checks for an abort, no more. A program that "
                    'connects and runs it does so below `if __name__ == "__main__":`'
                )
            # By name and late: the supervisor stands above this layer and loads gRPC, which a task must never
            # do.
            supervisor = importlib.import_module("scaleout_mp.supervisor")
            self._given_runtime = cast("EdgeClientRuntime", supervisor.GrpcEdgeClientRuntime(self))
        return self._given_runtime

    @property
    def link_quality(self) -> str:
        """How good the link to the combiner is: "healthy" or "degraded"."""
        quality: str = getattr(self._runtime, "link_quality", "healthy")
        return quality

    def connect_to_api(
        self,
        url: str,
        json: dict[str, Any] | None = None,
        token: str | None = None,
        token_refresh_callback: Callable[..., None] | None = None,
    ) -> tuple[ConnectToApiResult, Any]:
        """Ask the network's REST API for a combiner.

        `json` holds name, client_id, package ("local" or "remote") and preferred_combiner. The second value
        is a GrpcConnectionOptions when the first is Assigned, else a message or the answer's body.
        `token_refresh_callback(access_token, refresh_token, expires_at)` is called after each token refresh.
        """
        return self._runtime.connect_to_api(
            url=url, json=json, token=token, token_refresh_callback=token_refresh_callback
        )

    def init_grpchandler(
        self,
        config: GrpcConnectionOptions,
        token: str | None = None,
        url: str | None = None,
        token_refresh_callback: Callable[..., None] | None = None,
    ) -> bool:
        """Make ready to talk to the combiner; False, with the reason in the log, when it will not do."""
        return self._runtime.init_grpchandler(
            config=config, token=token, url=url, token_refresh_callback=token_refresh_callback
        )

    def run(self, with_heartbeat: bool = False, with_polling: bool = True) -> None:
        """Serve tasks until SIGTERM, Ctrl-C or `stop`. Blocks, in any thread; signals are read in the main thread only.

        In a notebook or a program with a loop: `task = asyncio.create_task(asyncio.to_thread(client.run))`, and at the
        end `client.stop()` and `await task`.
        """
        self._runtime.run(with_heartbeat=with_heartbeat, with_polling=with_polling)

    def stop(self) -> None:
        """Have `run` end as SIGTERM does, from any thread; a second call ends it at once. Does not wait for the end.

        Does nothing when it does not run. Raises NotConnectedError when the runtime has no such call.
        """
        stop = getattr(self._runtime, "stop", None)
        if stop is None:
            raise NotConnectedError("this client's runtime cannot be stopped from here")
        stop()

    def start_autonomous_task(
        self, callback: Callable[[], Any], command_type: str, parameters: Mapping[str, Any] | None = None
    ) -> AutonomousTask:
        """Start a task that no server ordered; the server sees it as "Autonomous_<command_type>", and can stop it.

        `callback` runs in a process of its own, as all do; what it returns is the report's response. `parameters` are
        for the server to see. Returns at once, with what tells how the task does; before `run`, the task waits for it.
        Raises CallbackNotSendable, TypeError and ValueError for parameters that JSON cannot carry, and
        NotConnectedError before `init_grpchandler` and in a task's process.
        """
        start = getattr(self._runtime, "start_autonomous_task", None)
        if start is None:
            raise NotConnectedError("this client's runtime starts no tasks by itself")
        if not command_type.startswith(AUTONOMOUS_PREFIX):
            command_type = AUTONOMOUS_PREFIX + command_type
        started: AutonomousTask = start(checked_callback(callback, "the callback"), command_type, parameters)
        return started

    def post_signature(self, signature: Mapping[str, Any]) -> None:
        """Have the network keep what `ScaleoutModel.sign` returned; blocks.

        Raises TransportError when the server does not take it, NotConnectedError when the runtime has no such call.
        """
        post = getattr(self._runtime, "post_signature", None)
        if post is None:
            raise NotConnectedError("this client's runtime posts no signatures")
        post(signature)

    def get_access_token(self) -> str | None:
        """Return the access token that is in use, refreshed where needed; None without one."""
        return self._runtime.get_access_token()


def _custom_type(name: str) -> str:
    return name if name.startswith(CUSTOM_PREFIX) else CUSTOM_PREFIX + name


def _introduce(runtime: Any, client: EdgeClient) -> None:
    set_client = getattr(runtime, "set_client", None)
    if set_client is not None:
        set_client(client)


_own: EdgeClient | None = None


def client_of_this_process(name: str | None, client_id: str | None, package_path: str) -> EdgeClient:
    """Return the one client of this process, which has no runtime, under the identity that was sent along.

    This is what a pickled EdgeClient becomes: every callback of a process meets the same client.
    """
    global _own  # noqa: PLW0603 - one per process is the point
    if _own is None:
        _own = _bare_client(EdgeClient)
    _own.name, _own.client_id, _own.package_path = name, client_id, package_path
    return _own


def _bare_client(kind: type[EdgeClient]) -> EdgeClient:
    client = kind.__new__(kind)
    EdgeClient.__init__(client)
    client._has_runtime = False  # noqa: SLF001 - a constructor of the class, kept out of its public surface
    return client
