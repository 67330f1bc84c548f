"""One client of the demo: a program of its own, as any user's, that trains on the digits in its own file.

`python -m scaleout_mp.demo.client --help` shows how to start one by hand.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import sys
from pathlib import Path
from typing import Any

from scaleout_mp import (
    ConnectToApiResult,
    EdgeClient,
    GrpcEdgeClientRuntime,
    Limits,
    ScaleoutError,
    ScaleoutModel,
)
from scaleout_mp.control import ControlSocket
from scaleout_mp.demo import faults, feed, perceptron
from scaleout_mp.demo.digits import Shard

#: A planned fault comes after this many epochs, so that there is progress to be lost.
FAULT_EPOCH = 20


class DigitsLearner:
    """The callbacks, with the data that they work on. It goes to the tasks' processes as it is."""

    def __init__(self, client: EdgeClient, shard: Shard, planned: list[faults.PlannedFault]) -> None:
        self.client = client
        self.shard = shard
        self.planned = planned

    def train(self, model: ScaleoutModel, settings: dict[str, Any]) -> tuple[ScaleoutModel, dict[str, Any]]:
        """Train on this client's images and return the new model."""
        images = self.shard.training
        schedule = perceptron.Schedule.from_settings(settings)
        weights = model.get_training_model()
        training = perceptron.Training(weights, images.images, images.labels, schedule)
        fault = self._fault_in(perceptron.rounds_trained(weights) + 1)
        for epoch, loss in training.epochs():
            self.client.log_metric({"train_loss": loss}, step=epoch)
            if fault is not None and epoch == FAULT_EPOCH:
                faults.commit(fault)
        metadata = {"training_metadata": {"num_examples": len(images), "epochs": schedule.epochs}}
        return ScaleoutModel.from_training_model(training.weights), metadata

    def validate(self, model: ScaleoutModel) -> dict[str, float]:
        """Measure a model on the images that this client keeps out of training."""
        images = self.shard.validation
        return perceptron.measure(model.get_training_model(), images.images, images.labels)

    def _fault_in(self, number: int) -> faults.FaultKind | None:
        return next((fault.kind for fault in self.planned if fault.round == number), None)


def main(arguments: list[str] | None = None) -> int:
    """Connect and serve tasks until SIGTERM."""
    options = _parser().parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    try:
        return _serve(options)
    except ScaleoutError as error:
        sys.stderr.write(f"error: {error}\n")
        return 1


def _serve(options: argparse.Namespace) -> int:
    token = options.token_file.read_text(encoding="utf-8").strip() if options.token_file else None
    limits = Limits(memory=options.memory, abort_grace=options.abort_grace)
    runtime = GrpcEdgeClientRuntime(limits=limits, pass_environment=options.pass_environment)
    client = EdgeClient(runtime=runtime)
    planned = [faults.PlannedFault.parse(text, client=options.name) for text in options.fault]
    learner = DigitsLearner(client, Shard.load(options.data), planned)
    client.set_train_callback(learner.train)
    client.set_validate_callback(learner.validate)

    who = {"name": options.name, "client_id": options.name}
    result, answer = client.connect_to_api(options.api_url, json=who, token=token)
    if result is not ConnectToApiResult.Assigned or not client.init_grpchandler(answer):
        return 1
    watched = feed.feeding(runtime, options.feed) if options.feed is not None else contextlib.nullcontext()
    # For `scaleout-mp top`; another demo may have clients of the same names.
    with watched, ControlSocket(options.name, runtime, sole=False):
        client.run(with_heartbeat=True)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m scaleout_mp.demo.client", description=__doc__)
    parser.add_argument("--api-url", required=True, help="the network's REST API, such as http://127.0.0.1:8092")
    parser.add_argument("--name", required=True, help="name and id of this client")
    parser.add_argument("--data", required=True, type=Path, help="the client's own images, an .npz file")
    parser.add_argument("--token-file", type=Path, help="file with the network's token")
    parser.add_argument("--memory", default="128MiB", help="memory limit of each task (default: %(default)s)")
    parser.add_argument("--abort-grace", type=float, default=2.0, help="seconds from abort to SIGKILL")
    parser.add_argument("--pass-environment", action="append", default=[], help="a variable that tasks get as well")
    parser.add_argument("--fault", action="append", default=[], help="misbehave: KIND:ROUND, such as segfault:2")
    parser.add_argument("--feed", type=int, help="descriptor of a pipe for what the runtime sees of its tasks")
    return parser


if __name__ == "__main__":
    sys.exit(main())
