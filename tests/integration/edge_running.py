"""A client of ours that runs in a thread of the test."""

from __future__ import annotations

import threading

from scaleout_mp import ConnectToApiResult, EdgeClient, GrpcEdgeClientRuntime, Limits
from scaleout_mp.config import Settings
from scaleout_mp.localnet.events import ClientConnected

POLLING = 0.1


class RunningClient:
    """Connects and runs in a thread; at the end it stops the client and raises what `run` raised."""

    def __init__(self, net, name="edge", *, token=None, run=None, given_id="", callbacks=True, **options):
        options.setdefault("settings", Settings(polling_interval=POLLING, send_telemetry=False))
        options.setdefault("limits", Limits(abort_grace=0.5))
        self.net = net
        self.runtime = GrpcEdgeClientRuntime(**options)
        self.client = EdgeClient(runtime=self.runtime)
        result, self.options = self.client.connect_to_api(
            net.api_url, {"name": name, "client_id": f"id-{name}" if given_id == "" else given_id}, token=token
        )
        assert result is ConnectToApiResult.Assigned, self.options
        self.id = self.client.client_id
        # Tests set the callbacks that they need while the client runs; without any it would not start.
        if callbacks:
            self.client.set_custom_callback("placeholder", print)
        self._run = run or {}
        self._error = None
        self.renew()

    def renew(self):
        """Make ready for another run."""
        self._thread = threading.Thread(target=self._work, name=self.id)

    def _work(self):
        try:
            self.client.run(**self._run)
        except BaseException as error:
            self._error = error

    def __enter__(self):
        assert self.client.init_grpchandler(self.options)
        self._thread.start()
        self.net.wait_for(lambda event: isinstance(event, ClientConnected) and event.client_id == self.id, timeout=10)
        return self

    def __exit__(self, *_):
        self.runtime.stop()
        self._thread.join(30)
        assert not self._thread.is_alive(), "the client did not stop"
        if self._error is not None:
            raise self._error

    def issue(self, task_type="Scaleout_ModelUpdate", *, model_id="", settings=None, **data):
        data = {"client_settings": settings or {}, **data}
        return self.net.issue(self.id, task_type, model_id=model_id, data=data)
