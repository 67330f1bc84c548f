"""A perceptron with one hidden layer, in numpy: what the demo's clients train together.

A model is the list of its arrays: hidden weights and biases, output weights and biases, and, last, the number of
federated rounds that went into it. Averaging counts those up by itself, and the learning rate decays with them.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any, Self

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

Array = np.ndarray[Any, np.dtype[Any]]

CLASSES = 10


@dataclasses.dataclass(frozen=True, kw_only=True)
class Schedule:
    """How one round of training goes; travels as the session's `client_settings`."""

    epochs: int = 80
    batch_size: int = 4
    learning_rate: float = 0.0015
    #: The rate of round n is divided by 1 + decay * (n - 1).
    decay: float = 0.1

    @classmethod
    def from_settings(cls, settings: Mapping[str, Any]) -> Self:
        """Read what the server sent; what is missing keeps its default."""
        return cls(**{field.name: settings[field.name] for field in dataclasses.fields(cls) if field.name in settings})


def initial(features: int, *, hidden: int = 128, seed: int = 7) -> list[Array]:
    """Return untrained weights (He initialisation), in float32."""
    rng = np.random.default_rng(seed)
    return [
        (rng.standard_normal((features, hidden)) * np.sqrt(2 / features)).astype(np.float32),
        np.zeros(hidden, np.float32),
        (rng.standard_normal((hidden, CLASSES)) * np.sqrt(2 / hidden)).astype(np.float32),
        np.zeros(CLASSES, np.float32),
        np.zeros(1, np.float32),
    ]


def rounds_trained(weights: Sequence[Array]) -> int:
    """Return how many federated rounds went into the weights."""
    return round(float(weights[-1][0]))


class Training:
    """One client's training in one round: iterate over `epochs`, then take `weights`."""

    def __init__(
        self, weights: Sequence[Array], images: Array, labels: Array, schedule: Schedule, *, seed: int = 0
    ) -> None:
        """Start from `weights`, which stay as they are; images are (n, features) in [0, 1], labels (n,) from 0 to 9."""
        rounds = rounds_trained(weights)
        self.weights: list[Array] = [array.copy() for array in weights]
        self.weights[-1] += 1
        self._images = images
        self._labels = labels
        self._schedule = schedule
        self._rate = np.float32(schedule.learning_rate / (1 + schedule.decay * rounds))
        self._rng = np.random.default_rng([seed, rounds])

    def epochs(self) -> Iterator[tuple[int, float]]:
        """Yield number and mean loss of each epoch after it was trained."""
        batches = max(1, len(self._labels) // self._schedule.batch_size)
        for epoch in range(self._schedule.epochs):
            order = self._rng.permutation(len(self._labels))
            losses = [self._step(chosen) for chosen in np.array_split(order, batches)]
            yield epoch, float(np.mean(losses))

    def _step(self, chosen: Array) -> float:
        """Take one step of gradient descent on the mean cross-entropy of a batch; return that."""
        images, labels = self._images[chosen], self._labels[chosen]
        active, probabilities = _forward(self.weights, images)
        rows = np.arange(len(chosen))
        loss = -float(np.log(probabilities[rows, labels] + 1e-9).mean())
        error = probabilities
        error[rows, labels] -= 1
        error /= len(chosen)
        hidden_error = (error @ self.weights[2].T) * (active > 0)
        gradients = (images.T @ hidden_error, hidden_error.sum(0), active.T @ error, error.sum(0))
        for index, gradient in enumerate(gradients):
            self.weights[index] -= self._rate * gradient
        return loss


def measure(weights: Sequence[Array], images: Array, labels: Array) -> dict[str, float]:
    """Return accuracy and mean cross-entropy."""
    _, probabilities = _forward(weights, images)
    right = probabilities[np.arange(len(labels)), labels]
    return {
        "accuracy": float((probabilities.argmax(axis=1) == labels).mean()),
        "loss": float(-np.log(right + 1e-9).mean()),
    }


def _forward(weights: Sequence[Array], images: Array) -> tuple[Array, Array]:
    """Return the hidden layer's activations and each class's probability."""
    active = np.maximum(images @ weights[0] + weights[1], 0)
    scores = active @ weights[2] + weights[3]
    scores -= scores.max(axis=1, keepdims=True)
    exponentials = np.exp(scores)
    return active, exponentials / exponentials.sum(axis=1, keepdims=True)
