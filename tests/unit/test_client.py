"""EdgeClient against a recording runtime: identity, callbacks, logging semantics, pickling."""

from __future__ import annotations

import pickle
import subprocess
import sys
import threading

import numpy as np
import pytest

from scaleout_mp.client import ConnectToApiResult, EdgeClient, GrpcConnectionOptions, LoggingContext
from scaleout_mp.client.logging_context import logging_of_task
from scaleout_mp.errors import ConfigError, NotConnectedError, StoppedException
from scaleout_mp.task import set_current_task


class RecordingRuntime:
    """A whole runtime that keeps what it is given."""

    def __init__(self):
        self.sent = []
        self.client = None
        self.aborted = False

    def set_client(self, client):
        self.client = client

    def send_metric(self, metrics, model_id, step, round_id, session_id):
        self.sent.append((metrics, model_id, step, round_id, session_id))
        return True

    def send_attributes(self, attributes):
        self.sent.append(attributes)
        return True

    def send_telemetry(self, telemetry):
        self.sent.append(telemetry)
        return False

    def check_task_abort(self):
        if self.aborted:
            raise StoppedException("Aborted by server")

    def get_model_from_combiner(self, model_id):
        raise NotImplementedError(model_id)

    def connect_to_api(self, url, json=None, token=None, token_refresh_callback=None):
        return ConnectToApiResult.Assigned, (url, json, token, token_refresh_callback)

    def init_grpchandler(self, config, token=None, url=None, token_refresh_callback=None):
        self.sent.append((config, token, url, token_refresh_callback))
        return True

    def run(self, with_heartbeat=False, with_polling=True):
        self.sent.append(("run", with_heartbeat, with_polling))

    def get_access_token(self):
        return "access"


class RecordingTask:
    """A task context that keeps what it is given."""

    task_id = "t"

    def __init__(self):
        self.sent = []
        self.checks = 0

    def log_metric(self, metrics, *, step=None, context=None, check_abort=False):
        self.sent.append((metrics, step, context))
        self.checks += check_abort

    def log_attributes(self, attributes):
        self.sent.append(attributes)

    def log_telemetry(self, telemetry):
        self.sent.append(telemetry)

    def check_abort(self):
        self.checks += 1


@pytest.fixture
def runtime():
    return RecordingRuntime()


@pytest.fixture
def client(runtime):
    return EdgeClient(runtime=runtime)


@pytest.fixture
def in_task():
    task = RecordingTask()
    set_current_task(task)
    yield task
    set_current_task(None)


def context(**fields):
    return LoggingContext(model_id="m", round_id="r", session_id="s", **fields)


def test_a_runtime_is_told_its_client_and_gets_every_call(client, runtime):
    assert runtime.client is client
    callback = print
    assert client.connect_to_api("http://x", {"name": "n"}, "t", callback)[1] == (
        "http://x",
        {"name": "n"},
        "t",
        callback,
    )
    assert client.init_grpchandler("options", token="t", url="u", token_refresh_callback=callback)
    client.run(with_heartbeat=True, with_polling=False)
    assert runtime.sent == [("options", "t", "u", callback), ("run", True, False)]
    assert client.get_access_token() == "access"


def test_steps_advance_with_commits_and_jump_when_given(client, runtime):
    with client.logging_context(context(step=5)) as entered:
        assert entered is None
        assert client.log_metric({"a": 1})
        client.log_metric({"b": 2}, commit=False)
        client.log_metric({"c": 3})
        client.log_metric({"d": 4}, step=20)
        client.log_metric({"e": 5})
        client.log_metric({"f": 6}, step=3, commit=False)
        client.log_metric({"g": 7})
    assert [(next(iter(sent[0])), sent[2]) for sent in runtime.sent] == [
        ("a", 5),
        ("b", 6),
        ("c", 6),
        ("d", 20),
        ("e", 21),
        ("f", 3),
        ("g", 3),
    ]
    assert all((sent[1], *sent[3:]) == ("m", "r", "s") for sent in runtime.sent)


def test_without_a_context_metrics_are_refused_and_said_so(client, runtime, caplog):
    assert client.log_metric({"a": 1}) is False
    assert runtime.sent == []
    assert "logging context" in caplog.text
    assert client.log_metric({"a": 1}, context=context()) is True


def test_contexts_nest_and_belong_to_their_thread(client):
    outer, inner = context(), context()
    seen = []
    with client.logging_context(outer):
        with client.logging_context(inner):
            assert client.current_logging_context is inner
            thread = threading.Thread(target=lambda: seen.append(client.current_logging_context))
            thread.start()
            thread.join()
        assert client.current_logging_context is outer
    assert client.current_logging_context is None
    assert seen == [None]


def test_inside_a_task_every_thread_and_client_has_the_tasks_context(client):
    of_task = context()
    seen = []
    with logging_of_task.entered(of_task):
        thread = threading.Thread(target=lambda: seen.append(EdgeClient().current_logging_context))
        thread.start()
        thread.join()
        assert client.current_logging_context is of_task
    assert seen == [of_task]
    assert client.current_logging_context is None


@pytest.mark.parametrize(
    "value", [1, 1.0, True, np.float32(1), np.int64(1), np.array(1.0), np.array([1.0]), np.bool_(True)]
)
def test_whatever_is_one_number_is_a_metric(client, runtime, value):
    client.log_metric({"loss": value}, context=context())
    assert runtime.sent[0][0] == {"loss": 1.0}
    assert type(runtime.sent[0][0]["loss"]) is float


@pytest.mark.parametrize("value", ["1.0", b"1", None, [1.0], np.array([1.0, 2.0]), 1j, {}])
def test_what_is_not_one_number_names_its_key(client, runtime, value):
    at = context(step=4)
    with pytest.raises(TypeError, match="'loss'"):
        client.log_metric({"loss": value}, context=at)
    with pytest.raises(TypeError, match="'heat'"):
        client.log_telemetry({"heat": value})
    assert runtime.sent == []
    assert at.step == 4


def test_telemetry_is_taken_in_the_form_of_either_release(client, runtime):
    checks = []
    client.check_task_abort = lambda: checks.append(1)
    client.log_telemetry({"heat": 1}, False)
    client.log_telemetry({"heat": 1}, check_task_abort=False)
    client.log_telemetry("loss", {"value": 0.5, "step": 12}, False)
    assert not checks
    client.log_telemetry(key="loss", payload={"value": np.float32(0.5)}, priority="alert")
    client.log_attributes({"site": "lund"}, priority="alert")
    assert len(checks) == 2
    assert runtime.sent == [
        {"heat": 1.0},
        {"heat": 1.0},
        {"loss": 0.5, "loss.step": 12.0},
        {"loss": 0.5},
        {"site": "lund"},
    ]
    for wrong in (None, [("heat", 1)]):
        with pytest.raises(TypeError, match="must be a dict of numbers"):
            client.log_telemetry(wrong)
    with pytest.raises(TypeError, match=r"'loss\.name'"):
        client.log_telemetry("loss", {"name": "x"})


def test_a_step_must_be_a_step(client):
    with pytest.raises(TypeError, match="whole number"):
        client.log_metric({"a": 1}, step=1.5, context=context())
    with pytest.raises(ValueError, match="-1"):
        client.log_metric({"a": 1}, step=-1, context=context())
    assert client.log_metric({"a": 1}, step=np.int32(4), context=context())


def test_attributes_become_strings_and_results_come_from_the_runtime(client, runtime):
    assert client.log_attributes({"site": "lund", 1: 2.5}) is True
    assert client.log_telemetry({"heat": 3}) is False
    assert runtime.sent == [{"site": "lund", "1": "2.5"}, {"heat": 3.0}]


def test_logging_looks_for_an_abort_unless_told_not_to(client, runtime):
    runtime.aborted = True
    for log in (
        lambda **flags: client.log_metric({"a": 1}, context=context(), **flags),
        lambda **flags: client.log_attributes({"a": 1}, **flags),
        lambda **flags: client.log_telemetry({"a": 1}, **flags),
    ):
        with pytest.raises(StoppedException, match="Aborted by server"):
            log()
        log(check_task_abort=False)
    # What was logged when the abort was seen is sent all the same.
    assert len(runtime.sent) == 6


def test_custom_callbacks_get_the_prefix_once(client, caplog):
    client.set_custom_callback("clean", print)
    client.set_custom_callback("Custom_wipe", print)
    assert set(client.registered_callbacks) == {"Custom_clean", "Custom_wipe"}
    client.remove_custom_callback("wipe")
    client.remove_custom_callback("gone")
    assert set(client.registered_callbacks) == {"Custom_clean"}
    assert "gone" in caplog.text


@pytest.mark.parametrize("bad", [42, "train", {}])
def test_what_is_no_callback_is_refused_at_once(client, bad):
    for set_it in (
        client.set_train_callback,
        client.set_validate_callback,
        client.set_inference_callback,
        client.set_stage_model_callback,
        lambda callback: client.set_custom_callback("x", callback),
        EdgeClient,
    ):
        with pytest.raises(TypeError, match=f"callable, not {type(bad).__name__}"):
            set_it(bad)
    with pytest.raises(TypeError, match="remove_custom_callback"):
        client.set_custom_callback("x", None)
    client.set_train_callback(None)


@pytest.mark.parametrize("inside", [True, False])
def test_what_is_too_much_for_a_record_is_refused_by_name(client, request, inside):
    if inside:
        request.getfixturevalue("in_task")
    for log, says in (
        (lambda: client.log_attributes({"config": "v" * 65_537}), "'config' has 65537 characters"),
        (lambda: client.log_attributes({"k" * 1_025: "v"}), "'kkk.* has 1025 characters"),
        (lambda: client.log_attributes({str(n): "" for n in range(4_097)}), "4097 attributes are too many"),
        (lambda: client.log_metric({"k" * 1_025: 1}, context=context()), "'kkk.* has 1025 characters"),
        (lambda: client.log_metric({str(n): 1 for n in range(4_097)}, context=context()), "4097 metrics"),
        (lambda: client.log_telemetry({"k" * 1_025: 1}), "telemetry value 'kkk"),
    ):
        with pytest.raises(ValueError, match=says):
            log()
    assert client.log_attributes({"k" * 1_024: "v" * 65_536})


def test_in_a_task_logs_go_to_the_task(client, runtime, in_task):
    client.log_metric({"a": 1}, context=context(step=2))
    client.log_attributes({"b": 2})
    client.log_telemetry({"c": 3}, check_task_abort=False)
    (values, step, ids), *others = in_task.sent
    assert (values, step) == ({"a": 1.0}, 2)
    assert (ids.model_id, ids.round_id, ids.session_id) == ("m", "r", "s")
    assert others == [{"b": "2"}, {"c": 3.0}]
    assert in_task.checks == 2
    assert runtime.sent == []


def test_a_pickled_client_becomes_the_one_client_of_the_process(client):
    client.set_name("n")
    client.set_client_id("i")
    client.package_path = "/package"
    client.set_train_callback(lambda model, settings: None)
    one = pickle.loads(pickle.dumps(client))
    two = pickle.loads(pickle.dumps(client))
    assert one is two
    assert one is not client
    assert (one.name, one.client_id, one.package_path, one.train_callback) == ("n", "i", "/package", None)
    one.check_task_abort()
    with pytest.raises(NotConnectedError, match="task"):
        one.run()


class OwnClient(EdgeClient):
    def __init__(self, rate, **options):
        super().__init__(**options)
        self.rate = rate
        self.set_train_callback(self.train)

    def train(self, model, settings):
        return self.rate


def test_callbacks_that_are_methods_of_a_subclass_find_their_attributes(runtime):
    client = OwnClient(0.5, runtime=runtime)
    client.set_name("n")
    train = pickle.loads(pickle.dumps(client.train_callback))
    assert train(None, {}) == 0.5
    assert train.__self__.name == "n"


def test_stopping_is_the_runtimes_to_do(runtime):
    client = EdgeClient(runtime=runtime)
    with pytest.raises(NotConnectedError, match="cannot be stopped"):
        client.stop()
    stops = []
    runtime.stop = lambda: stops.append(1)
    client.stop()
    assert stops == [1]


def test_importing_the_client_loads_nothing_of_the_network():
    heavy = ("grpc", "requests", "psutil", "google.protobuf", "cryptography")
    code = (
        "import sys, scaleout_mp.client, scaleout_mp.client.calls\n"
        f"print([name for name in {heavy!r} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == "[]"


def test_an_empty_public_hostname_means_the_internal_one():
    answer = {"public_hostname": "", "internal_hostname": "combiner", "port": "12080", "helper_type": "numpyhelper"}
    options = GrpcConnectionOptions.from_dict(answer)
    assert (options.host, options.port, options.grpc_secure) == ("combiner", 12080, None)
    assert GrpcConnectionOptions.from_dict({**answer, "grpc_secure": False}).grpc_secure is False
    assert GrpcConnectionOptions("", 1, "inside").host == "inside"


@pytest.mark.parametrize(
    "answer",
    [
        *({"port": 1}, {"public_hostname": "h"}, {"public_hostname": "h", "port": 70000}),
        *({"public_hostname": "h", "port": float("inf")}, {"public_hostname": 5, "port": 1}),
        *({"public_hostname": "https://h/", "port": 1}, {"internal_hostname": ["h"], "port": 1}),
    ],
)
def test_an_answer_without_a_combiner_is_refused(answer):
    with pytest.raises(ConfigError, match="server's answer"):
        GrpcConnectionOptions.from_dict(answer)


def test_a_context_takes_from_the_request_what_it_is_not_given():
    class Request:
        model_id, round_id, session_id = "m", "r", "s"

    got = LoggingContext(request=Request(), round_id="own", step=3)
    assert (got.model_id, got.round_id, got.session_id, got.step) == ("m", "own", "s", 3)
    assert isinstance(got.request, Request)
