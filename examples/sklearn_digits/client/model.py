"""The model: a perceptron with one hidden layer.

`python model.py seed.npz` writes the one that a session starts from.
"""

import sys

import numpy as np
from sklearn.neural_network import MLPClassifier


def make_model():
    """Return a network that knows its shape and its classes, with random weights."""
    model = MLPClassifier(hidden_layer_sizes=(32,), learning_rate_init=0.01, batch_size=32, random_state=0)
    return model.partial_fit(np.zeros((32, 64)), np.arange(32) % 10, classes=np.arange(10))


def get_weights(model):
    """Return the weights as a list of arrays."""
    return [*model.coefs_, *model.intercepts_]


def set_weights(model, weights):
    """Put in weights; copied, since those of a model that came are read-only."""
    half = len(weights) // 2
    for target, array in zip([*model.coefs_, *model.intercepts_], weights[:half] + weights[half:], strict=True):
        target[...] = array


if __name__ == "__main__":
    np.savez(sys.argv[1], *get_weights(make_model()))
