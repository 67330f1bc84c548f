"""What EdgeClient needs from whatever connects it to a network."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from scaleout_mp.client.options import ConnectToApiResult, GrpcConnectionOptions
    from scaleout_mp.model import ScaleoutModel


class AutonomousTask(Protocol):
    """What `EdgeClient.start_autonomous_task` returns. Every method may be called from any thread."""

    #: The id under which the server knows the task.
    correlation_id: str
    #: With "Autonomous_" before it.
    command_type: str

    @property
    def status(self) -> str:
        """PENDING, RUNNING, and how it ended: COMPLETED, FAILED or INTERRUPTED."""
        ...

    @property
    def done(self) -> bool:
        """Whether it has ended."""
        ...

    @property
    def response(self) -> Any:
        """What the callback returned, or {"error": ...} or {"msg": ...}; None before the end."""
        ...

    def wait(self, timeout: float | None = None) -> bool:
        """Wait for the end, at most `timeout` seconds; return whether it has come."""
        ...


class EdgeClientRuntime(Protocol):
    """The contract behind `EdgeClient(runtime=...)`; no base class is needed.

    A runtime that has a method `set_client` gets the client through it when the client is made.
    """

    def send_metric(
        self,
        metrics: Mapping[str, float],
        model_id: str | None,
        step: int | None,
        round_id: str | None,
        session_id: str | None,
    ) -> bool:
        """Take metrics logged outside a task; False when they cannot be taken."""
        ...

    def send_attributes(self, attributes: Mapping[str, str]) -> bool:
        """Take attributes logged outside a task; False when they cannot be taken."""
        ...

    def send_telemetry(self, telemetry: Mapping[str, float]) -> bool:
        """Take telemetry logged outside a task; False when it cannot be taken."""
        ...

    def check_task_abort(self) -> None:
        """Raise StoppedException when the calling thread runs a task that was aborted."""
        ...

    def get_model_from_combiner(self, model_id: str) -> ScaleoutModel:
        """Download a model. Raises ModelNotFoundError and ModelTransferError."""
        ...

    def connect_to_api(
        self,
        url: str,
        json: dict[str, Any] | None = None,
        token: str | None = None,
        token_refresh_callback: Callable[..., None] | None = None,
    ) -> tuple[ConnectToApiResult, Any]:
        """Ask the REST API for a combiner."""
        ...

    def init_grpchandler(
        self,
        config: GrpcConnectionOptions,
        token: str | None = None,
        url: str | None = None,
        token_refresh_callback: Callable[..., None] | None = None,
    ) -> bool:
        """Make ready to talk to the combiner; False, with the reason in the log, when it will not do."""
        ...

    def run(self, with_heartbeat: bool = False, with_polling: bool = True) -> None:
        """Serve tasks until the client is stopped."""
        ...

    def get_access_token(self) -> str | None:
        """Return the access token that is in use, refreshed where needed; None without one."""
        ...
