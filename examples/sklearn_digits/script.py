"""The same without a package: callbacks in a script, and scikit-learn on digits.

    python script.py --api-url http://127.0.0.1:8092 --name laptop

The functions go to the processes that run them by themselves, with whatever they use of this file.
"""

import argparse
import logging
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).parent / "client"))

from data import load_data
from model import get_weights, make_model, set_weights

from scaleout_mp import ConnectToApiResult, EdgeClient, GrpcEdgeClientRuntime, Limits, ScaleoutModel


def train(model, settings):
    """Train for a few epochs on this client's own images."""
    images, labels = load_data(client.name)[0]
    network = make_model()
    set_weights(network, model.get_training_model())
    for epoch in range(settings.get("epochs", 3)):
        network.partial_fit(images, labels)
        client.log_metric({"loss": network.loss_}, step=epoch)
    return ScaleoutModel.from_training_model(get_weights(network)), {"training_metadata": {"num_examples": len(labels)}}


def validate(model):
    """Measure a model on images that it was not trained on here."""
    images, labels = load_data(client.name)[1]
    network = make_model()
    set_weights(network, model.get_training_model())
    return {"accuracy": network.score(images, labels)}


client = EdgeClient(train, validate, runtime=GrpcEdgeClientRuntime(limits=Limits(memory="1GiB", wall_time=300)))


def main():
    """Join the network and serve its tasks until Ctrl-C."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--api-url", default="http://127.0.0.1:8092")
    parser.add_argument("--token")
    parser.add_argument("--name", default="laptop")
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    client.set_name(options.name)
    result, answer = client.connect_to_api(options.api_url, token=options.token)
    if result is not ConnectToApiResult.Assigned:
        sys.exit(f"not assigned: {answer}")
    if not client.init_grpchandler(answer):
        sys.exit(1)
    client.run(with_heartbeat=True)


if __name__ == "__main__":
    main()
