"""Callbacks of the edge client's tests. Imported in task processes by name, so it imports little itself."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import time

import numpy as np

from scaleout_mp import EdgeClient, InferenceContext, LoggingContext, ScaleoutModel, StoppedException, current_task


def result(model, examples=7, **extra):
    weights = [array + 1 for array in model.get_training_model()]
    return ScaleoutModel.from_training_model(weights), {"training_metadata": {"num_examples": examples}, **extra}


class Worker:
    """Callbacks that hold the client, as users write them."""

    def __init__(self, client):
        self.client = client

    def train_until(self, model, settings):
        """Log a step every five milliseconds until a file is there; tell how long the slowest call took, in seconds."""
        slowest, step = 0.0, 0
        while not os.path.exists(settings["until"]):
            begun = time.perf_counter()
            self.client.log_metric({"loss": 1 / (step + 1)}, step=step)
            slowest = max(slowest, time.perf_counter() - begun)
            step += 1
            time.sleep(0.005)
        return result(model, steps=step, slowest_log=slowest)

    def train(self, model, settings):
        for step in range(settings.get("epochs", 2)):
            self.client.log_metric({"loss": np.float32(1 / (step + 1))})
        self.client.log_attributes({"site": "lund"})
        self.client.log_telemetry({"heat": 40})
        return result(model, np.int64(7), pid=os.getpid())

    def validate(self, model):
        self.client.log_metric({"seen": 1}, step=9)
        return {"accuracy": np.float64(0.5), "mean": np.float32(model.get_training_model()[0].mean())}

    def wait_for_abort(self, model, settings):
        try:
            # Within: the abort may come before this returns.
            self.client.log_metric({"ready": 1})
            while True:
                self.client.check_task_abort()
                time.sleep(0.005)
        except StoppedException:
            self.client.log_metric({"cleaned up": 1}, check_task_abort=False)
            raise

    def ignore_abort(self, model, settings):
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_IGN)
        self.client.log_metric({"ready": 1})
        while True:
            time.sleep(100)

    def log_then_die(self, model, settings):
        for step in range(50):
            self.client.log_metric({"loss": step}, step=step)
        os.kill(os.getpid(), signal.SIGKILL)

    def log_many_then_die(self, parameters):
        for step in range(parameters["count"]):
            self.client.log_metric({"loss": step}, step=step, check_task_abort=False)
        os.kill(os.getpid(), signal.SIGKILL)

    def log_in_own_context(self, parameters):
        with self.client.logging_context(LoggingContext(model_id="own", step=5)):
            self.client.log_metric({"a": 1})
        self.client.log_metric({"b": 1})

    def hold_gil(self, model, settings):
        self.client.log_metric({"ready": 1})
        ctypes.PyDLL(None).sleep(settings.get("seconds", 2))
        return result(model)

    def log_for(self, model, settings):
        """Log from before to after an outage: until the file `settings["until"]` is there."""
        step = 0
        while not os.path.exists(settings["until"]):
            self.client.log_metric({"tick": step}, step=step)
            step += 1
            time.sleep(0.01)
        return result(model, steps=step)

    def pulse(self, parameters):
        self.client.log_metric({"custom": 1})
        return {"got": parameters, "client": self.client.name}


class Keeper:
    """Callbacks that keep something on their object from call to call, as packages of the published client do."""

    def __init__(self, client):
        self.client = client
        self.trained = 0

    def train(self, model, settings):
        self.trained += 1
        self.client.log_metric({"trained": self.trained})
        if settings.get("crash"):
            ctypes.string_at(0)
        return result(model, trained=self.trained, pid=os.getpid())

    def validate(self, model):
        return {"trained": self.trained, "pid": os.getpid()}

    def custom(self, parameters):
        return {
            "trained": self.trained,
            "pid": os.getpid(),
            "heavy": sorted({"grpc", "google.protobuf"} & set(sys.modules)),
        }


def train(model, settings):
    return result(model)


def raises(model, settings):
    raise ValueError("the learning rate is negative")


def returns_nothing(model, settings):
    return None


def segfaults(model, settings):
    ctypes.string_at(0)


def exits(model, settings):
    os._exit(0)


def allocates(model, settings):
    held = []
    while True:
        held.append(np.ones(1 << 20))


def count_runs(parameters):
    """Leave a mark for every run."""
    with open(parameters["path"], "a") as file:
        file.write("run\n")
    return {"ok": True}


def validate(model):
    return {"accuracy": 0.5}


def returns_megabytes(parameters):
    return "x" * (5 << 20)


def validate_with_megabytes(model):
    return {"text": "x" * (5 << 20)}


def environ(parameters):
    """What a task can see of the environment, in each of the places where it is to be seen."""
    with open("/proc/self/environ", "rb") as file:
        started_with = file.read().decode(errors="replace")
    return {**os.environ, "/proc/self/environ": started_with}


def answer(parameters):
    return {"ok": True}


class Stateful:
    """Callbacks that keep something in `client.state`."""

    def __init__(self, client):
        self.client = client

    def train(self, model, settings):
        state = self.client.state
        state["momentum"] = state.get("momentum", np.zeros(3)) + 1
        if settings.get("crash"):
            ctypes.string_at(0)
        return result(model, momentum=state["momentum"].tolist(), pid=os.getpid())

    def look(self, parameters):
        self.client.state["looked"] = self.client.state.get("looked", 0) + 1
        return dict(self.client.state)


def log_all(parameters):
    """Log one record of each kind but metrics; of results of inference two."""
    client = EdgeClient()
    client.log_telemetry({"heat": 40, "load": 0.5})
    client.log_attributes({"site": "lund"})
    with client.inference_context(InferenceContext(inference_id="i-1", model_id="m-1")):
        client.log_inference_result("detection", {"box": [1, 2], "score": np.float32(0.5)})
    current_task().log_inference_result("label", '{"value": "cat"}', inference_id="i-2", model_id="m-1")
    return parameters


def look_around():
    """What a program starts by itself: log, and return a figure of numpy's."""
    EdgeClient().log_metric({"seen": 1})
    return {"seen": np.int64(1), "pid": os.getpid()}


def wait_for_abort():
    """Log once, then wait until somebody wants this to end."""
    client = EdgeClient()
    client.log_metric({"waits": 1})
    while True:
        client.check_task_abort()
        time.sleep(0.01)


def raise_it():
    raise ValueError("nothing to see")
