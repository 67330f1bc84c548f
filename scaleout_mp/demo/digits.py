"""Real data: scikit-learn's bundled handwritten digits, divided among the clients."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any, Final, Self

import numpy as np

if TYPE_CHECKING:
    from pathlib import Path

Array = np.ndarray[Any, np.dtype[Any]]

#: Of each client's images, this part is kept for its own validation.
_VALIDATION: Final = 0.15
#: Every fifth image is held out of training altogether.
_HELD_OUT_EVERY: Final = 5
_BRIGHTEST: Final = 16


@dataclasses.dataclass(frozen=True, kw_only=True)
class Images:
    """Some images, as (n, 64) float32 in [0, 1], with their labels, (n,) from 0 to 9."""

    images: Array
    labels: Array

    def __len__(self) -> int:
        return len(self.labels)

    def pick(self, chosen: Array) -> Images:
        """Return some of the images, by index."""
        return Images(images=self.images[chosen], labels=self.labels[chosen])


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shard:
    """What one client has on its disk and no other has."""

    training: Images
    validation: Images

    def save(self, path: Path) -> None:
        """Write the shard as an .npz file."""
        np.savez(
            path,
            training_images=self.training.images,
            training_labels=self.training.labels,
            validation_images=self.validation.images,
            validation_labels=self.validation.labels,
        )

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read what `save` wrote."""
        with np.load(path, allow_pickle=False) as file:
            return cls(
                training=Images(images=file["training_images"], labels=file["training_labels"]),
                validation=Images(images=file["validation_images"], labels=file["validation_labels"]),
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Division:
    """All images, each in one place only."""

    shards: tuple[Shard, ...]
    #: Seen by no client.
    held_out: Images


def load() -> Images:
    """Return the 1,797 images. They come with scikit-learn: nothing is downloaded."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    return Images(images=(images / _BRIGHTEST).astype(np.float32), labels=labels.astype(np.int64))


def divide(images: Images, clients: int) -> Division:
    """Hold out every fifth image and give each client a contiguous run of the others.

    The images come writer after writer, so a run holds the hands of a few people, as on a real edge device.
    """
    index = np.arange(len(images))
    held_out = index % _HELD_OUT_EVERY == _HELD_OUT_EVERY - 1
    shards = [_shard(images, run) for run in np.array_split(index[~held_out], clients)]
    return Division(shards=tuple(shards), held_out=images.pick(index[held_out]))


def _shard(images: Images, run: Array) -> Shard:
    own = np.random.default_rng(len(run)).permutation(run)
    cut = int(len(own) * _VALIDATION)
    return Shard(training=images.pick(own[cut:]), validation=images.pick(own[:cut]))
