"""What tests give to `scaleout-mp run`. Imported by its processes, by name or as a file."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import time

import numpy as np

from scaleout_mp import ScaleoutModel, current_task

NUMBER = 5


def train(model, settings):
    print("about to train")
    weights = model.get_training_model()
    for step in range(settings.get("epochs", 1)):
        current_task().log_metric({"loss": 1 / (step + 1), "runaway": float("nan")}, step=step)
    meta = {"training_metadata": {"num_examples": 3}, "settings": settings}
    return ScaleoutModel.from_training_model([array + 1 for array in weights]), meta


def validate(model):
    return {"mean": float(model.get_training_model()[0].mean())}


def train_slowly(model, pause=0.0, epochs=1):
    for step in range(epochs):
        current_task().log_metric({"loss": 1 / (step + 1)}, step=step)
        time.sleep(pause)
    return epochs


def custom(parameters):
    return parameters


def add(a, b=2):
    return {"sum": a + b}


class Jobs:
    @staticmethod
    def arrays():
        return {"zeros": np.zeros(3), "ones": np.ones((2, 2))}


def crash():
    ctypes.string_at(0)


def raise_error():
    raise ValueError("the learning rate is negative")


def allocate():
    held = []
    while True:
        held.append(np.ones(1 << 17))


def spin():
    while True:
        pass


def wait_forever(heed=True):
    """Wait for an abort, or for SIGKILL."""
    if not heed:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    print("ready", flush=True)
    while True:
        if heed:
            current_task().check_abort()
        time.sleep(0.01)


def where():
    return {"folder": os.getcwd(), "argv": sys.argv[0], "variable": os.environ.get("JOB_VARIABLE")}


def read(path):
    with open(path) as file:
        return file.read()
