"""Models that the network has staged, and inference that it orders."""

from __future__ import annotations

import textwrap
import threading

import inference_callbacks as callbacks
import numpy as np
import pytest
from edge_running import POLLING, RunningClient
from observing import gone, wait_until

from scaleout_mp import Limits, ScaleoutModel, TaskKilled
from scaleout_mp.config import Settings
from scaleout_mp.errors import ExecutorClosedError, ModelError
from scaleout_mp.localnet import LocalNetworkThread
from scaleout_mp.localnet.events import (
    InferenceReceived,
    MetricReceived,
    ModelDownloaded,
    StatusReceived,
    TaskEnded,
    TaskReported,
)

STAGE, ASK = "Scaleout_StageModel", "Scaleout_Inference"


@pytest.fixture
def net(tmp_path):
    with LocalNetworkThread(tmp_path / "net") as network:
        yield network


@pytest.fixture
def model_id(net):
    with ScaleoutModel.from_training_model([np.full((4, 3), 2.0)]) as model:
        return net.add_model(model)


@pytest.fixture
def running(net, tmp_path):
    """Make a client that can be entered, with a service for its callbacks."""

    def running(*, service=True, **options):
        settings = Settings(polling_interval=POLLING, send_telemetry=False, model_cache_dir=str(tmp_path / "cache"))
        options.setdefault("limits", Limits(abort_grace=0.5))
        edge = RunningClient(net, settings=settings, echo_output=False, **options)
        if service:
            served = callbacks.Service(edge.client, str(tmp_path / "staged"))
            edge.client.set_stage_model_callback(served.stage)
            edge.client.set_inference_callback(served.infer)
        return edge

    return running


def end_of(net, task, timeout=20):
    task.done(timeout)
    return only_end(net, task)


def only_end(net, task):
    (end,) = net.events.of(TaskReported, lambda event: event.correlation_id == task.correlation_id and event.done)
    return end


def ask(edge, model_id, **parameters):
    return edge.issue(ASK, model_id=model_id, parameters=parameters)


def test_the_network_stages_a_model_and_asks_it(net, running, model_id, tmp_path):
    with running(callbacks=False) as edge:
        staged = end_of(net, edge.issue(STAGE, model_id=model_id))
        assert (staged.status, staged.response) == ("COMPLETED", {})
        assert (tmp_path / "cache" / f"{model_id}.scm").exists()
        answers = [end_of(net, ask(edge, model_id, number=number)) for number in range(3)]
        task = ask(edge, model_id, do="describe")
        described = end_of(net, task)
        assert end_of(net, edge.issue(STAGE, model_id=model_id)).status == "COMPLETED"
    assert {answer.status for answer in answers} == {"COMPLETED"}
    assert [answer.response["number"] for answer in answers] == [0, 1, 2]
    assert [answer.response["answers"] for answer in answers] == [1, 2, 3]
    assert described.response == {
        "model_id": model_id,
        "id": task.correlation_id,
        "type": ASK,
        "mean": 2.0,
        "array": [[1.0, 0.0], [0.0, 1.0]],
        "heavy": [],
    }
    (metric,) = net.events.of(MetricReceived)
    assert metric.model_id == model_id
    (result,) = net.events.of(InferenceReceived)
    assert (result.key, result.payload) == ("seen", {"digits": 3})
    assert (result.inference_id, result.model_id) == (task.correlation_id, model_id)
    assert len((tmp_path / "staged").read_text().splitlines()) == 1
    assert len(net.events.of(ModelDownloaded)) == 1


def test_a_model_that_is_not_staged_is_staged_for_the_request(net, running, model_id, tmp_path):
    with running() as edge:
        assert end_of(net, ask(edge, model_id, number=1)).response["number"] == 1
        missing = end_of(net, ask(edge, "unknown-model"))
        nameless = end_of(net, ask(edge, ""))
    assert missing.status == nameless.status == "FAILED"
    assert "does not have model unknown-model" in missing.response["error"]
    assert nameless.response["error"] == "the server sent a task without a model id"
    with running() as edge:
        assert end_of(net, ask(edge, model_id, number=2)).response["answers"] == 1
    # The second run found it in the cache.
    assert len(net.events.of(ModelDownloaded, lambda event: event.model_id == model_id)) == 1
    assert len((tmp_path / "staged").read_text().splitlines()) == 2


def test_a_request_that_kills_the_process_is_reported_and_the_next_is_served(net, running, model_id):
    with running(inference_limits=Limits(abort_grace=0.5, wall_time=1)) as edge:
        first = end_of(net, ask(edge, model_id)).response["pid"]
        crash, after = ask(edge, model_id, do="crash"), ask(edge, model_id)
        crashed = end_of(net, crash)
        served = end_of(net, after)
        hung = end_of(net, ask(edge, model_id, do="hang"))
        assert end_of(net, ask(edge, model_id)).response["answers"] == 1
    assert crashed.status == hung.status == "FAILED"
    assert (crashed.response["reason"], crashed.response["report"]["signal"]) == ("crashed", "SIGSEGV")
    assert crashed.response["report"]["worker"] == f"model {model_id}"
    assert (served.status, served.response["answers"]) == ("COMPLETED", 1)
    assert served.response["pid"] != first
    assert hung.response["reason"] == "wall_time"
    assert "in hang" in hung.response["report"]["stacks"]


@pytest.mark.parametrize(("do", "stays"), [("wait_for_abort", True), ("hang", False)])
def test_a_request_that_is_aborted_ends_and_the_next_is_served(net, running, model_id, do, stays):
    with running() as edge:
        first = end_of(net, ask(edge, model_id)).response["pid"]
        task, waiting = ask(edge, model_id, do=do), ask(edge, model_id)
        net.wait_for(lambda event: isinstance(event, MetricReceived), timeout=20)
        waits = ask(edge, model_id)
        held = lambda event: isinstance(event, TaskReported) and event.correlation_id == waits.correlation_id  # noqa: E731
        assert net.wait_for(held, timeout=20).status == "PENDING"
        assert waits.abort()
        assert task.abort()
        assert end_of(net, task).status == "INTERRUPTED"
        assert end_of(net, waits).status == "INTERRUPTED"
        answer = end_of(net, waiting)
    assert answer.status == "COMPLETED"
    assert (answer.response["pid"] == first) is stays
    assert gone(first)


def test_what_cannot_be_an_answer_is_said(net, running, model_id):
    with running() as edge:
        end = end_of(net, ask(edge, model_id, do="return_lambda"))
        edge.client.set_inference_callback(None)
        none = end_of(net, ask(edge, model_id))
        edge.client.set_inference_callback(int)
        raises = end_of(net, ask(edge, model_id))
    assert (end.status, end.response) == ("COMPLETED", {})
    (warning,) = net.events.of(StatusReceived, lambda event: "is not in its report" in event.status)
    assert "callback inference_callbacks.Service.infer returned what cannot be sent: the result is of" in warning.status
    assert none.status == raises.status == "FAILED"
    assert none.response["error"] == "this client has no inference callback: call set_inference_callback"
    assert raises.response["report"]["error_type"] == "TypeError"


def test_without_callbacks_a_model_is_only_kept(net, running, model_id, tmp_path):
    with running(service=False) as edge:
        assert end_of(net, edge.issue(STAGE, model_id=model_id)).status == "COMPLETED"
        assert end_of(net, edge.issue(STAGE, model_id="unknown-model")).status == "FAILED"
    assert (tmp_path / "cache" / f"{model_id}.scm").exists()


def test_staging_that_fails_is_reported(net, running, model_id, tmp_path):
    with running() as edge:
        edge.client.set_stage_model_callback(callbacks.Stubborn(str(tmp_path)).stage)
        end = end_of(net, edge.issue(STAGE, model_id=model_id))
        (tmp_path / "mended").touch()
        assert end_of(net, edge.issue(STAGE, model_id=model_id)).status == "COMPLETED"
    assert end.status == "FAILED"
    assert "the accelerator is asleep" in end.response["error"]
    assert end.response["report"]["error_type"] == "RuntimeError"


def test_the_program_asks_while_the_client_runs(net, running, model_id, tmp_path):
    edge = running()
    with ScaleoutModel.from_training_model([np.ones((4, 3))]) as model, edge:
        before = edge.client.run_inference(model_id, {"do": "describe"})
        assert before["model_id"] == model_id
        net.wait_for(lambda event: isinstance(event, MetricReceived) and event.model_id == model_id, timeout=10)
        # Both in the process that has staged it for the network.
        assert end_of(net, ask(edge, model_id)).response["answers"] == 2
        assert edge.client.run_inference(model)["answers"] == 1
    # Without a client that runs, in an executor of its own, with what is in the cache.
    assert edge.client.run_inference(model_id)["answers"] == 1
    edge.client.close()


def test_what_the_program_asks_while_the_client_ends_is_refused(net, running, model_id):
    edge = running(limits=Limits(abort_grace=1))

    def hang():
        with pytest.raises(TaskKilled):
            edge.client.run_inference(model_id, {"do": "hang"})

    with edge:
        thread = threading.Thread(target=hang)
        thread.start()
        net.wait_for(lambda event: isinstance(event, MetricReceived), timeout=10)
        _, service = edge.runtime._service_at_work()
        edge.runtime.stop()
        wait_until(lambda: service._core._closing, seconds=10)
        with pytest.raises(ExecutorClosedError):
            edge.client.run_inference(model_id)
        thread.join(10)
    assert not thread.is_alive()


def test_the_client_starts_an_inference_by_itself(net, running, model_id):
    x = np.ones((1, 4))
    with ScaleoutModel.from_training_model([np.ones((4, 3))]) as model, running() as edge:
        described = edge.client.start_autonomous_inference(model_id, {"do": "describe"})
        given = edge.client.start_autonomous_inference(model, {"do": "multiply", "x": x})
        assert described.wait(20)
        assert given.wait(20)
        ends = [end_of_own(net, task) for task in (described, given)]
        with pytest.raises(ModelError):
            edge.client.start_autonomous_inference(None)
    assert [end.status for end in ends] == [described.status, given.status] == ["COMPLETED", "COMPLETED"]
    assert described.response["model_id"] == model_id
    assert described.response["id"] == described.correlation_id
    assert described.response["type"] == described.command_type == "Autonomous_Scaleout_Inference"
    assert given.response == ends[1].response == {"y": [[8.0, 8.0, 8.0]], "shape": [1, 4]}
    assert given.parameters == {"do": "multiply", "x": "ndarray (1, 4)", "model_id": model.model_id}
    (result,) = net.events.of(InferenceReceived)
    assert (result.inference_id, result.model_id) == (described.correlation_id, model_id)


def end_of_own(net, task):
    ended = lambda event: isinstance(event, TaskEnded) and event.correlation_id == task.correlation_id  # noqa: E731
    net.wait_for(ended, timeout=20)
    return only_end(net, task)


PACKAGE = {
    "scaleout.yaml": "entry_points: {startup: startup.py}",
    "startup.py": """
        from scaleout import EdgeClient
        from serving import Service

        def startup(client: EdgeClient):
            Service(client)
    """,
    "serving.py": """
        import os

        class Service:
            def __init__(self, client):
                self.client = client
                client.set_stage_model_callback(self.stage)
                client.set_inference_callback(self.infer)
                client.set_custom_callback("direct", self.direct)

            def stage(self, model):
                self.weights = model.get_training_model()

            def infer(self, model, params):
                if self.weights is None:
                    self.stage(model)
                return {"sum": float(self.weights[0].sum()) * params["times"], "pid": os.getpid()}

            weights = None

            def direct(self, params):
                from scaleoututil.utils.model import ScaleoutModel
                import numpy as np
                model = ScaleoutModel.from_training_model([np.ones(2)])
                return self.client.run_inference(model, params)
    """,
}


@pytest.mark.parametrize("isolation", ["task", "worker"])
def test_a_package_stages_and_infers(net, running, model_id, tmp_path, isolation):
    pytest.importorskip("yaml", reason="PyYAML is not installed: `make install` has it")
    from scaleout_mp.package import LocalPackage

    folder = tmp_path / "package"
    folder.mkdir()
    for name, text in PACKAGE.items():
        (folder / name).write_text(textwrap.dedent(text))
    with running(service=False, callbacks=False, isolation=isolation, package=LocalPackage(folder)) as edge:
        assert end_of(net, edge.issue(STAGE, model_id=model_id)).status == "COMPLETED"
        answers = [end_of(net, ask(edge, model_id, times=times)).response for times in (1, 2)]
        assert edge.client.run_inference(model_id, {"times": 3})["sum"] == 72.0
        direct = end_of(net, edge.issue("Custom_direct", parameters={"times": 10}))
    assert [answer["sum"] for answer in answers] == [24.0, 48.0]
    assert len({answer["pid"] for answer in answers}) == 1
    assert direct.response["sum"] == 20.0


def test_requests_that_come_together_are_answered_once_each(net, running, model_id):
    with running() as edge:
        tasks = [ask(edge, model_id, number=number, do="crash" if number == 10 else None) for number in range(30)]
        ends = [end_of(net, task) for task in tasks]
    assert [end.status for end in ends] == ["FAILED" if number == 10 else "COMPLETED" for number in range(30)]
    assert [end.response["number"] for end in ends if end.status == "COMPLETED"] == [
        number for number in range(30) if number != 10
    ]
    # One process, in order; after the crash another one counts anew.
    assert [end.response["answers"] for end in ends if end.status == "COMPLETED"] == [*range(1, 11), *range(1, 20)]
