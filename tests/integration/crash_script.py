"""A user's script that tests kill: `crash_script.py <api url> <folder>`."""

from __future__ import annotations

import logging
import os
import random
import sys
import time

from scaleout_mp import EdgeClient, GrpcEdgeClientRuntime, Limits, ScaleoutModel

client = EdgeClient(runtime=GrpcEdgeClientRuntime(limits=Limits(abort_grace=0.5)))


def train(model, settings):
    """Log some steps, or go on until killed; then return the model, one added to its weights."""
    # Every value is a float32 on the wire.
    run = random.getrandbits(20)
    step = 0
    while step < settings.get("steps", sys.maxsize):
        client.log_metric({"loss": 1 / (step + 1), "run": run}, step=step)
        step += 1
        time.sleep(settings.get("pause", 0))
    if settings.get("hang"):
        time.sleep(1000)
    weights = [array + 1 for array in model.get_training_model()]
    meta = {"training_metadata": {"num_examples": 7}, "run": run, "steps": step}
    return ScaleoutModel.from_training_model(weights), meta


def validate(model):
    return {"accuracy": 0.5}


def count(parameters):
    """Leave a mark for every run."""
    with open(parameters["path"], "a") as file:
        file.write("run\n")
    return {"ok": True}


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s")
    client.set_train_callback(train)
    client.set_validate_callback(validate)
    client.set_custom_callback("count", count)
    client_id = os.environ.get("ID", "script") or None
    _, options = client.connect_to_api(sys.argv[1], {"name": "script", "client_id": client_id})
    if not client.init_grpchandler(options):
        sys.exit(1)
    client.run(with_heartbeat=True)
