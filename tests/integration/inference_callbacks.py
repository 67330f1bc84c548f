"""Stage and inference callbacks of the tests. Imported in task processes by name, so it imports little itself."""

from __future__ import annotations

import ctypes
import os
import sys
import time

import numpy as np

from scaleout_mp import ScaleoutModel


class Service:
    """A service that keeps what it loads when a model is staged, as users write it."""

    def __init__(self, client, log=None):
        self.client = client
        self.log = log
        self.weights = None
        self.answers = 0

    def stage(self, model):
        if self.log is not None:
            with open(self.log, "a") as file:
                file.write(f"{os.getpid()} {model.model_id}\n")
        self.weights = model.get_training_model()
        self.model_seen = model

    def infer(self, model, parameters):
        parameters = parameters or {}
        assert model is self.model_seen
        self.answers += 1
        do = parameters.get("do")
        if do is not None:
            return getattr(self, do)(parameters)
        return {"number": parameters.get("number"), "answers": self.answers, "pid": os.getpid()}

    def crash(self, parameters):
        ctypes.string_at(0)

    def fail(self, parameters):
        raise ValueError("no such digit")

    def hang(self, parameters):
        self.client.log_metric({"ready": 1}, check_task_abort=False)
        time.sleep(1000)

    def devour(self, parameters):
        held = []
        while True:
            held.append(np.ones(1 << 20))

    def wait_for_abort(self, parameters):
        self.client.log_metric({"ready": 1}, check_task_abort=False)
        while True:
            self.client.check_task_abort()
            time.sleep(0.005)

    def multiply(self, parameters):
        parameters["x"] *= 2
        return {"y": parameters["x"] @ self.weights[0], "shape": parameters["x"].shape}

    def keep(self, parameters):
        self.held = [*getattr(self, "held", []), parameters["x"]]

    def kept(self, parameters):
        assert all((array == array[0]).all() for array in self.held)
        return [int(array[0]) for array in self.held]

    def leave_a_reader(self, parameters):
        """Fork a process that says what it sees in the parameters, once it is asked."""
        asked, self.ask = os.pipe()
        self.answer, answers = os.pipe()
        if os.fork() == 0:
            os.read(asked, 1)
            os.write(answers, str(parameters["x"].mean()).encode())
            os._exit(0)

    def ask_the_reader(self, parameters):
        os.write(self.ask, b"?")
        seen = float(os.read(self.answer, 100))
        os.wait()
        return seen

    def make_model(self, parameters):
        return {"model": ScaleoutModel.from_training_model([parameters["x"] + 1]), "x": parameters["x"]}

    def describe(self, parameters):
        context = self.client.current_logging_context
        self.client.log_metric({"asked": 1})
        self.client.log_inference_result("seen", {"digits": 3})
        return {
            "model_id": context.model_id,
            "id": context.request.correlation_id,
            "type": context.request.type,
            "mean": np.float32(self.weights[0].mean()),
            "array": np.eye(2),
            "heavy": sorted({"grpc", "google.protobuf", "psutil", "requests", "cryptography"} & set(sys.modules)),
        }

    def meet(self, parameters):
        """Return once so many requests are here at the same time."""
        folder = parameters["folder"]
        open(os.path.join(folder, str(os.getpid())), "w").close()
        while len(os.listdir(folder)) < parameters["many"]:
            time.sleep(0.005)
        return os.getpid()

    def return_object(self, parameters):
        return {"ok": object()} if parameters.get("object") else {"ok": {1, 2}}

    def return_lambda(self, parameters):
        return self.infer


class Stubborn:
    """A service whose staging fails until a file is there."""

    def __init__(self, folder):
        self.folder = folder

    def stage(self, model):
        with open(os.path.join(self.folder, "tries"), "a") as file:
            file.write("try\n")
        if not os.path.exists(os.path.join(self.folder, "mended")):
            raise RuntimeError("the accelerator is asleep")

    def infer(self, model, parameters):
        return "served"


def pid(model, parameters):
    return os.getpid()


def crash_on_every_50th(model, parameters):
    if parameters["number"] % 50 == 49:
        ctypes.string_at(0)
    return parameters["number"]
