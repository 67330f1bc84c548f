"""Settings: limits of a task, what it finds around it, and what the environment says."""

from scaleout_mp.config.folders import state_folder
from scaleout_mp.config.limits import Limits
from scaleout_mp.config.resources import Resources
from scaleout_mp.config.sandbox import Sandbox
from scaleout_mp.config.settings import Settings
from scaleout_mp.config.surroundings import Surroundings

__all__ = ["Limits", "Resources", "Sandbox", "Settings", "Surroundings", "state_folder"]
