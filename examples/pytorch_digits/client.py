"""Train a small network in PyTorch, with DataLoader workers, as one client of a federated network.

    python client.py --api-url http://127.0.0.1:8092 --shard 1 --of 2

The task's process has DataLoader workers of its own; they count towards its limits, and end with it.
"""

import argparse
import logging
import sys

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset, random_split

from scaleout_mp import ConnectToApiResult, EdgeClient, GrpcEdgeClientRuntime, Limits, ScaleoutModel


def make_network():
    """Return a network for 8x8 images."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(16 * 64, 10))


def get_weights(network):
    """Return the weights as numpy arrays."""
    return [tensor.numpy() for tensor in network.state_dict().values()]


def with_weights(network, weights):
    """Put in weights; copied, since those of a model that came are read-only."""
    names = network.state_dict()
    network.load_state_dict({name: torch.tensor(array) for name, array in zip(names, weights, strict=True)})
    return network


def load_shard(shard, of):
    """Return this client's own images, to train on and to validate on."""
    images, labels = load_digits(return_X_y=True)
    own = slice(shard - 1, None, of)
    pictures = torch.tensor(images[own] / 16, dtype=torch.float32).reshape(-1, 1, 8, 8)
    return random_split(
        TensorDataset(pictures, torch.tensor(labels[own])), [0.8, 0.2], torch.Generator().manual_seed(0)
    )


def make_callbacks(client, shard, of, workers):
    """Return the callbacks; the data are loaded where they are used."""

    def train(model, settings):
        training, _ = load_shard(shard, of)
        network = with_weights(make_network(), model.get_training_model())
        optimiser = torch.optim.Adam(network.parameters(), lr=1e-2)
        for epoch in range(settings.get("epochs", 2)):
            total = 0.0
            for images, labels in DataLoader(training, batch_size=64, shuffle=True, num_workers=workers):
                optimiser.zero_grad()
                loss = nn.functional.cross_entropy(network(images), labels)
                loss.backward()
                optimiser.step()
                total += loss.item() * len(labels)
                client.check_task_abort()
            client.log_metric({"loss": total / len(training)}, step=epoch)
        return ScaleoutModel.from_training_model(get_weights(network)), {
            "training_metadata": {"num_examples": len(training)}
        }

    def validate(model):
        _, validation = load_shard(shard, of)
        network = with_weights(make_network(), model.get_training_model()).eval()
        with torch.no_grad():
            images, labels = next(iter(DataLoader(validation, batch_size=len(validation))))
            return {"accuracy": (network(images).argmax(1) == labels).float().mean().item()}

    return train, validate


def main():
    """Join the network and serve its tasks until Ctrl-C."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--api-url", default="http://127.0.0.1:8092")
    parser.add_argument("--token")
    parser.add_argument("--shard", type=int, default=1, help="which part of the images is this client's, from 1")
    parser.add_argument("--of", type=int, default=2, help="into how many parts the images are divided")
    parser.add_argument("--workers", type=int, default=2, help="DataLoader workers")
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")

    client = EdgeClient(runtime=GrpcEdgeClientRuntime(limits=Limits(memory="2GiB", wall_time=600)))
    client.set_name(f"torch-{options.shard}")
    train, validate = make_callbacks(client, options.shard, options.of, options.workers)
    client.set_train_callback(train)
    client.set_validate_callback(validate)
    result, answer = client.connect_to_api(options.api_url, token=options.token)
    if result is not ConnectToApiResult.Assigned:
        sys.exit(f"not assigned: {answer}")
    if not client.init_grpchandler(answer):
        sys.exit(1)
    client.run(with_heartbeat=True)


if __name__ == "__main__":
    main()
