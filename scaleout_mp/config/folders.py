"""Where this user's programs keep what they must not lose."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping


def state_folder(environ: Mapping[str, str] | None = None) -> Path:
    """Return this package's folder in the user's state folder, whether it is there or not.

    XDG_STATE_HOME, else ~/.local/state, as the XDG base directory specification has it.
    """
    env = os.environ if environ is None else environ
    base = env.get("XDG_STATE_HOME", "")
    # The specification: what is not absolute is ignored.
    root = Path(base) if os.path.isabs(base) else Path.home() / ".local" / "state"
    return root / "scaleout_mp"
