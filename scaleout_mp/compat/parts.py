"""What the published packages offer beside client, models and helpers."""

from __future__ import annotations

import abc
import hashlib
import json
import logging
from typing import Any, Self


class ScaleoutLogger:
    """The logger "scaleout" of the standard logging module; one object for the process."""

    _instance: Self | None = None

    def __new__(cls) -> Self:
        """Return the one object."""
        if cls._instance is None:
            cls._instance = super().__new__(cls)
        return cls._instance

    def __init__(self) -> None:
        self.logger = logging.getLogger("scaleout")

    def __getattr__(self, name: str) -> Any:
        # debug, info, warning, error, critical and whatever else a logger can do.
        return getattr(self.logger, name)

    def set_log_level_from_string(self, level_str: str) -> None:
        """Set the level by its name. Raises ValueError."""
        self.logger.setLevel(level_str.upper())

    def add_handler(self, handler: logging.Handler) -> None:
        """Add a handler of one's own."""
        self.logger.addHandler(handler)


class HelperBase(abc.ABC):
    """Base of helpers of one's own."""

    def __init__(self) -> None:
        self.name = type(self).__name__

    @abc.abstractmethod
    def increment_average(self, m1: Any, m2: Any, a: float, W: float) -> Any:  # noqa: N803 - as it is published
        """Return one increment of a weighted average."""

    @abc.abstractmethod
    def save(self, model: Any, path: Any) -> Any:
        """Write weights."""

    @abc.abstractmethod
    def load(self, fh: Any) -> Any:
        """Read weights."""


def save_metadata(metadata: dict[str, Any], filename: str) -> None:
    """Write metadata beside a file."""
    _write_json(metadata, f"{filename}-metadata")


def load_metadata(filename: str) -> Any:
    """Read metadata from beside a file."""
    with open(f"{filename}-metadata", encoding="utf-8") as file:
        return json.load(file)


def save_metrics(metrics: dict[str, Any], filename: str) -> None:
    """Write metrics."""
    _write_json(metrics, filename)


def _write_json(value: Any, path: str) -> None:
    with open(path, "w", encoding="utf-8") as file:
        json.dump(value, file)


def sha(fname: str) -> str:
    """Return the hex SHA-256 of a file."""
    with open(fname, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
