"""The client that a compute package's `startup(client)` gets, in the template."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, NoReturn

from scaleout_mp.client.edge_client import client_of_this_process
from scaleout_mp.errors import NotConnectedError
from scaleout_mp.task import current_task

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from scaleout_mp.client.edge_client import EdgeClient
    from scaleout_mp.task import TaskContext

#: Records that a package may log while it starts; more are refused.
_MAX_EARLY: Final = 1000


class PackageRuntime:
    """`EdgeClientRuntime` of a process that holds a package and runs no task.

    What `startup` logs is kept for the task that asks the package what it can do. Connecting is the supervisor's.
    """

    def __init__(self) -> None:
        self._early: list[Callable[[TaskContext], None]] = []

    def send_metric(
        self,
        metrics: Mapping[str, float],
        model_id: str | None,
        step: int | None,
        round_id: str | None,
        session_id: str | None,
    ) -> bool:
        """Refuse: metrics are of a task. Said by the client, which has no logging context here."""
        del metrics, model_id, step, round_id, session_id
        return False

    def send_attributes(self, attributes: Mapping[str, str]) -> bool:
        """Keep attributes; False when there are too many."""
        return self._keep(lambda task: task.log_attributes(attributes))

    def send_telemetry(self, telemetry: Mapping[str, float]) -> bool:
        """Keep telemetry; False when there is too much."""
        return self._keep(lambda task: task.log_telemetry(telemetry))

    def _keep(self, send: Callable[[TaskContext], None]) -> bool:
        if len(self._early) >= _MAX_EARLY:
            return False
        self._early.append(send)
        return True

    def send_early(self) -> None:
        """Log what was kept, as the running task."""
        task = current_task()
        assert task is not None
        for send in self._early:
            send(task)

    def check_task_abort(self) -> None:
        """Do nothing: no task runs."""

    def get_model_from_combiner(self, model_id: str) -> NoReturn:
        """Raise NotConnectedError."""
        del model_id
        _refuse()

    def connect_to_api(self, *_: Any, **__: Any) -> NoReturn:
        """Raise NotConnectedError."""
        _refuse()

    def init_grpchandler(self, *_: Any, **__: Any) -> NoReturn:
        """Raise NotConnectedError."""
        _refuse()

    def run(self, *_: Any, **__: Any) -> NoReturn:
        """Raise NotConnectedError."""
        _refuse()

    def get_access_token(self) -> None:
        """Return None: tokens stay in the supervisor."""


def _refuse() -> NoReturn:
    raise NotConnectedError(
        "a compute package does not connect: its startup(client) registers callbacks, and the client that was "
        "started with the package connects and runs them"
    )


def package_client(name: str, client_id: str, folder: str) -> tuple[EdgeClient, PackageRuntime]:
    """Return the client of this process, for the package in `folder`."""
    client = client_of_this_process(name, client_id, folder)
    runtime = PackageRuntime()
    client.use_runtime(runtime)
    return client, runtime
