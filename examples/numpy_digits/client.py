"""Train a softmax regression on handwritten digits, as one client of a federated network.

    python client.py --api-url http://127.0.0.1:8092 --shard 1 --of 2

Every call of `train` and `validate` runs in a process of its own with at most 512 MiB of memory.
"""

import argparse
import logging
import sys

import numpy as np
from sklearn.datasets import load_digits

from scaleout_mp import ConnectToApiResult, EdgeClient, GrpcEdgeClientRuntime, Limits, ScaleoutModel


def load_shard(shard, of):
    """Return this client's own images and labels, split into those to train on and those to validate on."""
    images, labels = load_digits(return_X_y=True)
    own = np.array_split(np.arange(len(labels)), of)[shard - 1]
    kept = own % 5 == 0
    return (images[own[~kept]] / 16, labels[own[~kept]]), (images[own[kept]] / 16, labels[own[kept]])


def predict(weights, images):
    """Return the probability of each digit for each image."""
    scores = images @ weights[0] + weights[1]
    exponentials = np.exp(scores - scores.max(axis=1, keepdims=True))
    return exponentials / exponentials.sum(axis=1, keepdims=True)


def make_callbacks(client, training, validation):
    """Return the callbacks; whatever they use goes with them to the processes that run them."""

    def train(model, settings):
        images, labels = training
        weights = [array.copy() for array in model.get_training_model()]
        wanted = np.eye(10)[labels]
        for epoch in range(settings.get("epochs", 50)):
            probabilities = predict(weights, images)
            error = (probabilities - wanted) / len(labels)
            weights[0] -= 2.0 * images.T @ error
            weights[1] -= 2.0 * error.sum(axis=0)
            loss = -np.log(probabilities[np.arange(len(labels)), labels] + 1e-9).mean()
            # Reaches the server at once, and raises StoppedException when the server wants the task to end.
            client.log_metric({"loss": loss}, step=epoch)
        return ScaleoutModel.from_training_model(weights), {"training_metadata": {"num_examples": len(labels)}}

    def validate(model):
        images, labels = validation
        guesses = predict(model.get_training_model(), images).argmax(axis=1)
        return {"accuracy": (guesses == labels).mean()}

    return train, validate


def main():
    """Join the network and serve its tasks until Ctrl-C."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--api-url", default="http://127.0.0.1:8092")
    parser.add_argument("--token")
    parser.add_argument("--shard", type=int, default=1, help="which part of the images is this client's, from 1")
    parser.add_argument("--of", type=int, default=2, help="into how many parts the images are divided")
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")

    client = EdgeClient(runtime=GrpcEdgeClientRuntime(limits=Limits(memory="512MiB", wall_time=300)))
    client.set_name(f"digits-{options.shard}")
    train, validate = make_callbacks(client, *load_shard(options.shard, options.of))
    client.set_train_callback(train)
    client.set_validate_callback(validate)

    result, combiner = client.connect_to_api(options.api_url, token=options.token)
    if result is not ConnectToApiResult.Assigned or not client.init_grpchandler(combiner):
        return 1
    client.run(with_heartbeat=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
