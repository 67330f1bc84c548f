"""Where the published packages are installed, and the marks of tests that need them."""

from __future__ import annotations

from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
#: The interpreter of the environment with scaleout 1.0.7 in it.
PYTHON = ROOT / ".venv-compat" / "bin" / "python"

#: The interpreter of the environment with scaleout 1.1.0, where there is a Python for it.
PYTHON_1_1 = ROOT / ".venv-compat-1.1" / "bin" / "python"

NEEDS_PUBLISHED = [
    pytest.mark.compat,
    pytest.mark.skipif(
        not PYTHON.exists(),
        reason="no environment with scaleout 1.0.7: `make test` makes it, on Python 3.11 to 3.13",
    ),
]

NEEDS_PUBLISHED_1_1 = [
    pytest.mark.compat,
    pytest.mark.skipif(
        not PYTHON_1_1.exists(),
        reason="no environment with scaleout 1.1.0: `make test` makes it, on Python 3.12",
    ),
]

#: Parameters for tests that run against each release.
RELEASES = [
    pytest.param(PYTHON, id="1.0.7", marks=NEEDS_PUBLISHED),
    pytest.param(PYTHON_1_1, id="1.1.0", marks=NEEDS_PUBLISHED_1_1),
]
