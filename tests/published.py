"""Where the published packages are installed, and the marks of tests that need them."""

from __future__ import annotations

from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
#: The interpreter of the environment with scaleout 1.0.7 in it.
PYTHON = ROOT / ".venv-compat" / "bin" / "python"

NEEDS_PUBLISHED = [
    pytest.mark.compat,
    pytest.mark.skipif(
        not PYTHON.exists(),
        reason="no environment with scaleout 1.0.7: `make test` makes it, on Python 3.11 to 3.13",
    ),
]
