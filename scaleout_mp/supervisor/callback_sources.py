"""Where a client's callbacks come from: they are set on it, or a compute package registers them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from scaleout_mp.supervisor import messages
from scaleout_mp.supervisor.callbacks import Callbacks, CallbackTable, SharedCallbacks
from scaleout_mp.supervisor.package_callbacks import PackageCallbacks
from scaleout_mp.transport.message import MessageKind
from scaleout_mp.wire import edge_pb2 as pb

if TYPE_CHECKING:
    from scaleout_mp.client import EdgeClient
    from scaleout_mp.executor import ExecutorCore
    from scaleout_mp.supervisor.service_plan import ServicePlan
    from scaleout_mp.task import Record
    from scaleout_mp.transport.outbox import Outbox


def callbacks_for(plan: ServicePlan, client: EdgeClient, core: ExecutorCore, outbox: Outbox) -> Callbacks:
    """Return what runs the tasks of a client; what a package logs and why it fails goes through `outbox`."""
    if plan.package is not None:
        news = _PackageNews(plan, outbox)
        return PackageCallbacks(
            plan.package,
            core,
            client=(plan.name, plan.client_id),
            isolation=plan.isolation,
            limits=plan.limits,
            on_record=news.record,
            on_problem=news.problem,
        )
    table = CallbackTable if plan.isolation == "task" else SharedCallbacks
    return table(client, core.prepare)


class _PackageNews:
    """What the server hears of a package itself, outside of any task."""

    def __init__(self, plan: ServicePlan, outbox: Outbox) -> None:
        self._client_id = plan.client_id
        self._report_status = plan.settings.report_status
        self._outbox = outbox
        self._moments = messages.Moments()

    def record(self, record: Record) -> None:
        """Send what `startup` logged."""
        message = messages.record_message(self._client_id, record, self._moments)
        if message is not None:
            self._outbox.put(*message)

    def problem(self, problem: str) -> None:
        """Say why the package cannot be used."""
        if self._report_status:
            status = messages.status(self._client_id, problem, level=pb.LogLevel.ERROR, type_="PACKAGE")
            self._outbox.put(MessageKind.STATUS, status)
