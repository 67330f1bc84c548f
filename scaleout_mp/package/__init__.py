"""Compute packages: a folder or an archive of one, with `scaleout.yaml` in it and a `startup(client)`."""

from scaleout_mp.package.environment import Environments
from scaleout_mp.package.local import LocalPackage
from scaleout_mp.package.manifest import Manifest, read_manifest
from scaleout_mp.package.remote import RemotePackage

__all__ = ["Environments", "LocalPackage", "Manifest", "RemotePackage", "read_manifest"]
