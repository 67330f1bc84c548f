"""Settings: limits of a task, and what the environment says."""

from scaleout_mp.config.limits import Limits
from scaleout_mp.config.settings import Settings

__all__ = ["Limits", "Settings"]
