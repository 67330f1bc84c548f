"""Staging and inference from the program itself, without any network."""

from __future__ import annotations

import dataclasses
import functools
import os
import re
import signal
import threading
import time

import inference_callbacks as callbacks
import numpy as np
import pytest
from observing import gone, wait_until
from programs_at_work import Program

from scaleout_mp import (
    CallbackNotSendable,
    ConfigError,
    EdgeClient,
    EndReason,
    GrpcEdgeClientRuntime,
    Limits,
    ScaleoutModel,
    TaskCrashed,
    TaskFailed,
    TaskKilled,
)
from scaleout_mp.config import Settings
from scaleout_mp.errors import ModelError, ModelNotFoundError, StagingError
from scaleout_mp.supervisor.worker_trouble import WorkerTrouble
from scaleout_mp.transport.backoff import Backoff

ALL = bool(os.environ.get("SCALEOUT_MP_ALL_TESTS"))


@pytest.fixture
def start(tmp_path):
    """Make a client with a service; what it started is ended with the test."""
    clients = []

    def start(service=None, **options):
        options.setdefault("limits", Limits(abort_grace=0.5))
        settings = Settings(model_cache_dir=str(tmp_path / "cache"))
        client = EdgeClient(runtime=GrpcEdgeClientRuntime(settings=settings, echo_output=False, **options))
        clients.append(client)
        if service is None:
            service = callbacks.Service(client, str(tmp_path / "staged"))
        client.set_stage_model_callback(service.stage)
        client.set_inference_callback(service.infer)
        return client

    yield start
    for client in clients:
        client.close()


@pytest.fixture
def model():
    with ScaleoutModel.from_training_model([np.full((4, 3), 2.0), np.arange(5)]) as model:
        yield model


def stagings(tmp_path):
    return (tmp_path / "staged").read_text().splitlines()


def test_a_model_is_staged_once_and_asked_often(start, model, tmp_path):
    client = start()
    with client.stage_model(model) as staged:
        assert staged.model_id == model.model_id
        np.testing.assert_array_equal(staged.get_training_model()[0], np.full((4, 3), 2.0))
    assert (tmp_path / "cache" / f"{model.model_id}.scm").exists()
    answers = [client.run_inference(model.model_id, {"number": number}) for number in range(5)]
    answers.append(client.run_inference(model, {"number": 5}))
    assert [answer["number"] for answer in answers] == list(range(6))
    assert [answer["answers"] for answer in answers] == [1, 2, 3, 4, 5, 6]
    (staging,) = stagings(tmp_path)
    assert {f"{answer['pid']} {model.model_id}" for answer in answers} == {staging}
    assert client.run_inference(model)["number"] is None


def test_arrays_go_in_and_out_as_they_are(start, model):
    client = start()
    x = np.arange(400_000, dtype=np.float64).reshape(-1, 4)
    answer = client.run_inference(model, {"do": "multiply", "x": x})
    np.testing.assert_array_equal(answer["y"], 2 * x @ np.full((4, 3), 2.0))
    assert answer["shape"] == x.shape
    assert x[0, 1] == 1
    small = client.run_inference(model, {"do": "multiply", "x": np.asfortranarray(x[:3])})
    np.testing.assert_array_equal(small["y"], answer["y"][:3])


@pytest.mark.parametrize(
    ("do", "error", "reason"),
    [
        ("crash", TaskCrashed, EndReason.CRASHED),
        ("hang", TaskKilled, EndReason.WALL_TIME),
        ("devour", TaskKilled, EndReason.MEMORY_LIMIT),
    ],
)
def test_a_request_that_kills_the_process_costs_itself_alone(start, model, tmp_path, do, error, reason):
    limits = Limits(abort_grace=0.5, memory="200MiB")
    wall_time = 1 if do == "hang" else None
    client = start(limits=limits, inference_limits=dataclasses.replace(limits, wall_time=wall_time))
    client.run_inference(model)
    with pytest.raises(error) as ended:
        client.run_inference(model, {"do": do})
    assert ended.value.report.reason is reason
    assert ended.value.report.worker == f"model {model.model_id}"
    if do == "hang":
        assert "in hang" in ended.value.report.stacks
    # The next is served by a process that has staged the model again.
    assert client.run_inference(model)["answers"] == 1
    assert len(stagings(tmp_path)) == 2


def test_a_model_can_be_the_answer(start, model):
    client = start()
    x = np.ones((300_000, 1))
    answer = client.run_inference(model, {"do": "make_model", "x": x})
    with answer["model"] as made:
        np.testing.assert_array_equal(made.get_training_model()[0], x + 1)
    np.testing.assert_array_equal(answer["x"], x)


def test_a_request_that_raises_leaves_the_process_as_it_is(start, model, tmp_path):
    client = start()
    with pytest.raises(TaskFailed, match="no such digit") as failed:
        client.run_inference(model, {"do": "fail"})
    assert "in fail" in failed.value.report.traceback
    assert client.run_inference(model)["answers"] == 2
    assert len(stagings(tmp_path)) == 1


@pytest.mark.parametrize("number", [1000 if ALL else 200])
def test_every_request_has_one_answer_though_every_fiftieth_crashes(start, model, number):
    client = start()
    client.set_inference_callback(callbacks.crash_on_every_50th)
    client.set_stage_model_callback(None)
    answers, crashes = [], {}
    for each in range(number):
        try:
            answers.append(client.run_inference(model, {"number": each}))
        except TaskCrashed as crashed:
            crashes[each] = crashed.report.signal
    assert crashes == dict.fromkeys(range(49, number, 50), "SIGSEGV")
    assert answers == [each for each in range(number) if each % 50 != 49]


def test_however_many_requests_kill_the_process_the_next_one_is_served(start, model, monkeypatch):
    # As after the sixth in a row, in less time.
    patient = functools.partial(WorkerTrouble, Backoff(first=10))
    monkeypatch.setattr("scaleout_mp.supervisor.staged_model.WorkerTrouble", patient)
    client = start()
    for _ in range(2):
        with pytest.raises(TaskCrashed):
            client.run_inference(model, {"do": "crash"})
    assert client.run_inference(model)["answers"] == 1


def test_staging_that_fails_is_told_and_does_not_spin(start, model, tmp_path):
    client = start(callbacks.Stubborn(str(tmp_path)))
    with pytest.raises(TaskFailed, match=r"could not be set up: the stage callback .* the accelerator is asleep"):
        client.stage_model(model)
    raised = []
    deadline = time.monotonic() + 20
    while StagingError not in map(type, raised) and time.monotonic() < deadline:
        with pytest.raises((TaskFailed, StagingError), match="the accelerator is asleep") as error:
            client.run_inference(model.model_id)
        raised.append(error.value)
    assert re.search(r"died \d times in a row and is tried again in \d s", str(raised[-1]))
    # 0, 0.25, 0.5, 1 and 2 s, give or take the jitter: more tries are refused at once.
    tries = (tmp_path / "tries").read_text().splitlines()
    assert 4 <= len(tries) <= 7
    before = time.monotonic()
    with pytest.raises(StagingError):
        client.run_inference(model.model_id)
    assert time.monotonic() - before < 0.5
    assert len((tmp_path / "tries").read_text().splitlines()) == len(tries)


def test_a_service_that_recovers_is_asked_again(start, model, tmp_path):
    client = start(callbacks.Stubborn(str(tmp_path)))
    for _ in range(2):
        with pytest.raises(TaskFailed):
            client.run_inference(model)
    (tmp_path / "mended").touch()
    assert client.run_inference(model) == "served"


def test_requests_to_one_process_run_in_order_and_to_several_at_once(start, model, tmp_path):
    client = start(inference_concurrency=2)
    meeting = tmp_path / "meeting"
    meeting.mkdir()
    pids = []

    def ask():
        pids.append(client.run_inference(model, {"do": "meet", "folder": str(meeting), "many": 2}))

    threads = [threading.Thread(target=ask) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert len(set(pids)) == 2
    assert len(stagings(tmp_path)) == 2


def test_requests_of_many_threads_are_all_answered(start, model):
    client = start()
    seen = []

    def ask(offset):
        for each in range(offset, offset + 25):
            answer = client.run_inference(model, {"number": each})
            seen.append((answer["answers"], answer["number"]))

    threads = [threading.Thread(target=ask, args=(offset,)) for offset in (0, 25, 50, 75)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert sorted(number for _, number in seen) == list(range(100))
    assert sorted(turn for turn, _ in seen) == list(range(1, 101))


def test_a_process_that_is_not_asked_ends_and_the_next_request_starts_another(start, model, tmp_path):
    client = start(inference_idle_time=0.2)
    own = client.run_inference(model)["pid"]
    wait_until(lambda: gone(own), seconds=10)
    assert client.run_inference(model)["pid"] != own
    assert len(stagings(tmp_path)) == 2


def test_under_the_memory_budget_the_model_that_was_not_asked_for_longest_makes_room(start, tmp_path):
    client = start(limits=Limits(memory="100MiB"), memory_budget="250MiB")
    models = [ScaleoutModel.from_training_model([np.ones((4, 3))]) for _ in range(3)]
    pids = [client.run_inference(model)["pid"] for model in models[:2]]
    client.run_inference(models[0])
    client.run_inference(models[2])
    wait_until(lambda: gone(pids[1]), seconds=10)
    assert client.run_inference(models[0])["pid"] == pids[0]
    assert client.run_inference(models[1])["answers"] == 1


def test_what_is_staged_survives_the_client(start, model, tmp_path):
    first = start()
    first.stage_model(model).close()
    first.close()
    second = start()
    assert second.run_inference(model.model_id, {"number": 3})["number"] == 3
    with pytest.raises(ModelNotFoundError, match="not connected"):
        second.run_inference("no-such-model")
    with pytest.raises(ModelError, match="file name"):
        second.run_inference("../../etc/passwd")


def test_another_model_under_the_same_id_is_staged_anew(start, model, tmp_path):
    client = start()
    client.stage_model(model).close()
    first = client.run_inference(model.model_id)["pid"]
    with model.to_builder().build() as same:
        client.stage_model(same).close()
        assert client.run_inference(same)["pid"] == first
    builder = ScaleoutModel.from_training_model([np.ones((4, 3))]).to_builder()
    with builder.set_model_id(model.model_id).build() as other:
        with client.stage_model(other) as staged:
            np.testing.assert_array_equal(staged.get_training_model()[0], np.ones((4, 3)))
        x = np.ones((1, 4))
        assert client.run_inference(model.model_id, {"do": "multiply", "x": x})["y"][0, 0] == 8


def test_callbacks_that_are_replaced_take_over(start, model):
    client = start()
    first = client.run_inference(model)["pid"]
    client.set_stage_model_callback(None)
    client.set_inference_callback(callbacks.pid)
    assert client.run_inference(model) != first


def test_a_cache_that_cannot_be_written_costs_only_the_copy(start, model, tmp_path, caplog):
    (tmp_path / "cache").write_text("a file where the folder should be")
    client = start()
    client.stage_model(model).close()
    assert client.run_inference(model.model_id, {"number": 1})["number"] == 1
    assert "cannot be kept in the model cache" in caplog.text
    # Nor when it is there already, in memory.
    client.stage_model(model).close()
    assert client.run_inference(model.model_id, {"number": 2})["number"] == 2


def test_a_damaged_file_in_the_cache_is_not_served(start, model, tmp_path):
    client = start()
    client.stage_model(model).close()
    client.close()
    path = tmp_path / "cache" / f"{model.model_id}.scm"
    data = bytearray(path.read_bytes())
    data[len(data) // 3] ^= 0xFF
    path.write_bytes(data)
    with pytest.raises(ModelNotFoundError):
        start().run_inference(model.model_id)


def test_mistakes_are_told_in_a_line(start, model):
    client = start()
    with pytest.raises(TaskFailed, match="cannot be returned from a task"):
        client.run_inference(model, {"do": "return_object", "object": True})
    with pytest.raises(ModelError, match="not None"):
        client.run_inference(None)
    client.set_stage_model_callback(None)
    client.set_inference_callback(None)
    with pytest.raises(ConfigError, match="set_inference_callback"):
        client.run_inference(model)
    lock = threading.Lock()
    client.set_inference_callback(lambda model, parameters: lock)
    with pytest.raises(CallbackNotSendable, match="lock"):
        client.run_inference(model)
    with pytest.raises(TypeError, match="the inference callback"):
        client.set_inference_callback(3)
    for options in ({"inference_concurrency": 0}, {"inference_idle_time": -1}, {"inference_idle_time": "soon"}):
        with pytest.raises(ConfigError, match=next(iter(options))):
            GrpcEdgeClientRuntime(settings=Settings(), **options)


def test_models_without_any_callback_are_put_into_the_cache(start, model, tmp_path):
    client = start()
    client.set_stage_model_callback(None)
    client.set_inference_callback(None)
    client.stage_model(model).close()
    assert (tmp_path / "cache" / f"{model.model_id}.scm").exists()


@pytest.mark.parametrize(("start_method", "sandbox"), [("spawn", "auto"), ("template", "strict"), ("template", "none")])
def test_at_every_level_and_with_either_start_method(start, model, start_method, sandbox):
    client = start(start_method=start_method, sandbox=sandbox)
    # At strict, processes reach no file: not that of the test's log either.
    service = callbacks.Service(client)
    client.set_stage_model_callback(service.stage)
    client.set_inference_callback(service.infer)
    client.stage_model(model).close()
    x = np.ones((50_000, 4))
    assert client.run_inference(model.model_id, {"do": "multiply", "x": x})["y"][0, 0] == 16
    with pytest.raises(TaskCrashed):
        client.run_inference(model.model_id, {"do": "crash"})
    assert client.run_inference(model.model_id)["answers"] == 1


def test_a_request_that_does_not_get_on_is_ended(start, model):
    limits = Limits(abort_grace=0.5)
    client = start(limits=limits, inference_limits=dataclasses.replace(limits, no_progress=1))
    with pytest.raises(TaskKilled) as ended:
        client.run_inference(model, {"do": "hang"})
    assert ended.value.report.reason is EndReason.NO_PROGRESS
    assert client.run_inference(model)["answers"] == 1


def test_what_an_earlier_request_kept_is_not_overwritten_by_a_later_one(start, model):
    client = start()
    arrays = [np.full(500_000, number, dtype=np.int64) for number in range(4)]
    for array in arrays:
        client.run_inference(model, {"do": "keep", "x": array})
    assert client.run_inference(model, {"do": "kept"}) == [0, 1, 2, 3]


def test_memory_of_large_parameters_is_used_again_unless_somebody_still_refers_to_it(start, model):
    client = start()

    def kept():
        return [memory for memories in client._runtime._inference._lender._kept.values() for memory in memories]

    x = np.ones((100_000, 4))
    assert client.run_inference(model, {"do": "multiply", "x": x})["y"][0, 0] == 16
    (memory,) = kept()
    assert client.run_inference(model, {"do": "multiply", "x": 3 * x})["y"][0, 0] == 48
    assert kept() == [memory]
    # A process that the callback left behind looks at it still.
    client.run_inference(model, {"do": "leave_a_reader", "x": x})
    assert kept() == []
    client.run_inference(model, {"do": "multiply", "x": 5 * x})
    assert client.run_inference(model, {"do": "ask_the_reader"}) == 1.0
    with pytest.raises(TaskFailed):
        client.run_inference(model, {"do": "fail", "x": x})
    assert kept() == []


SCRIPT = """
import os, signal, sys, threading, time
import numpy as np
from scaleout_mp import EdgeClient, ScaleoutModel

def infer(model, parameters):
    if parameters == "hang":
        print("hangs", flush=True)
        time.sleep(1000)
    return os.getpid()

if __name__ == "__main__":
    client = EdgeClient()
    client.set_inference_callback(infer)
    model = ScaleoutModel.from_training_model([np.zeros(3)])
    print(f"worker {client.run_inference(model)}", flush=True)
    if sys.argv[1:]:
        try:
            client.run_inference(model, "hang")
        except KeyboardInterrupt:
            print("interrupted", flush=True)
            assert client.run_inference(model) != 0
            print("asked again", flush=True)
    else:
        # A fork of the program has no part in its processes, and its end does not touch them.
        fork = os.fork()
        if not fork:
            sys.exit(client.run_inference(model) == os.getpid())
        print("fork ended with", os.waitpid(fork, 0)[1], flush=True)

        def go_on():
            threading.main_thread().join()
            with ScaleoutModel.from_training_model([np.zeros(4)]) as other:
                client.stage_model(other).close()
            print("staged after the main thread's end", flush=True)

        threading.Thread(target=go_on).start()
"""


@pytest.mark.parametrize("how", ["end", "interrupt"])
def test_a_script_leaves_nothing(tmp_path, how):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    arguments = [script] if how == "end" else [script, "hang"]
    with Program(*arguments, env={"SCALEOUT_MODEL_CACHE_DIR": str(tmp_path / "cache")}) as program:
        worker = int(program.wait_for_line("worker", seconds=20).split()[1])
        if how == "end":
            program.wait_for_line("fork ended with 0", seconds=20)
            program.wait_for_line("staged after the main thread's end", seconds=20)
        if how == "interrupt":
            program.wait_for_line("hangs", seconds=20)
            program.send(signal.SIGINT)
            program.wait_for_line("asked again", seconds=40)
        assert program.end(seconds=20) == 0
        assert "Traceback" not in "\n".join(program.lines)
        wait_until(lambda: gone(worker), seconds=5)
        program.require_nothing_left(seconds=2)
