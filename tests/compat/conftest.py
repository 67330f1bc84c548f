"""The environment with the published packages, and when there is none, why."""

from __future__ import annotations

from pathlib import Path

import pytest

COMPAT_PYTHON = Path(__file__).parents[2] / ".venv-compat" / "bin" / "python"


@pytest.fixture(scope="session")
def compat_python() -> str:
    """The interpreter of the environment with scaleout 1.0.7 in it."""
    if not COMPAT_PYTHON.exists():
        pytest.skip("no environment with scaleout 1.0.7: `make test` makes it, on Python 3.11 to 3.13")
    return str(COMPAT_PYTHON)
