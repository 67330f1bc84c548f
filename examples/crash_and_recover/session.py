"""A session that goes on although the training of one of its two clients crashes, takes all memory and hangs.

    python session.py

Everything runs in this one process, beside the tasks' own: a local network and two clients, each in a thread.
"""

import contextlib
import ctypes
import tempfile
import threading
import time

import numpy as np

from scaleout_mp import ConnectToApiResult, EdgeClient, GrpcEdgeClientRuntime, Limits, ScaleoutModel
from scaleout_mp.config import Settings
from scaleout_mp.localnet import LocalNetworkThread, SessionPlan
from scaleout_mp.localnet.events import RoundFinished, TaskReported

ROUNDS = 4
LIMITS = Limits(memory="256MiB", no_progress=2, abort_grace=1)


def learn(model):
    """Stand in for training: the model counts its rounds."""
    weights = [array + 1 for array in model.get_training_model()]
    return ScaleoutModel.from_training_model(weights), {"training_metadata": {"num_examples": 10}}


def validate(model):
    """Say how many rounds a model has seen."""
    return {"rounds": model.get_training_model()[0].mean()}


def steady(_client):
    """Return a train callback that works."""
    return lambda model, _settings: learn(model)


def troubled(client):
    """Return a train callback that goes wrong in another way in each round but the last."""

    def train(model, _settings):
        number = int(model.get_training_model()[0][0]) + 1
        client.log_metric({"round": number})
        if number == 1:
            ctypes.string_at(0)  # a segmentation fault, as of a broken extension
        elif number == 2:
            kept = []
            while True:
                kept.append(np.ones(1_000_000))
        elif number == 3:
            time.sleep(3600)  # a download that never comes
        return learn(model)

    return train


@contextlib.contextmanager
def running(network, name, make_callback):
    """Run a client in a thread while the block lasts."""
    settings = Settings(polling_interval=0.2)
    client = EdgeClient(runtime=GrpcEdgeClientRuntime(limits=LIMITS, settings=settings, state_dir=":memory:"))
    client.set_name(name)
    client.set_train_callback(make_callback(client))
    client.set_validate_callback(validate)
    result, answer = client.connect_to_api(network.api_url, {"name": name})
    if result is not ConnectToApiResult.Assigned or not client.init_grpchandler(answer):
        raise SystemExit(f"{name} cannot join: {answer}")
    thread = threading.Thread(target=client.run, name=name)
    thread.start()
    try:
        yield
    finally:
        client.stop()
        thread.join()


def show(event):
    """Print the ends of rounds and of trainings that did not complete."""
    if isinstance(event, RoundFinished):
        print(f"round {event.number}: {event.updates} of 2 updates, {event.seconds:.1f} s")
    elif isinstance(event, TaskReported) and event.done and event.status != "COMPLETED":
        print(f"  {event.status}: {event.response.get('error') or event.response.get('msg')}")


def main():
    """Run the session and say what became of the model."""
    with (
        tempfile.TemporaryDirectory() as folder,
        LocalNetworkThread(folder, on_event=show) as network,
        running(network, "steady", steady),
        running(network, "troubled", troubled),
    ):
        plan = SessionPlan(rounds=ROUNDS, min_clients=2, round_timeout=60)
        result = network.run_session(plan, ScaleoutModel.from_training_model([np.zeros(3)]))
        print(f"session {result.status.lower()}, {len(result.rounds)} rounds")


if __name__ == "__main__":
    main()
