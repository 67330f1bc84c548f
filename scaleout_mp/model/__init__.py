"""Models: bytes in sealed memory or in a mapped file, read in place by every process that needs them."""

from scaleout_mp.model.builder import ScaleoutModelBuilder
from scaleout_mp.model.container import ContainerLimits
from scaleout_mp.model.helpers import Helper, get_helper, register_helper
from scaleout_mp.model.memfd import MemoryWriter, SealedMemory
from scaleout_mp.model.scaleout_model import ScaleoutModel
from scaleout_mp.model.store import ModelStore

__all__ = [
    "ContainerLimits",
    "Helper",
    "MemoryWriter",
    "ModelStore",
    "ScaleoutModel",
    "ScaleoutModelBuilder",
    "SealedMemory",
    "get_helper",
    "register_helper",
]
