"""The `scaleout-mp` command, also as `python -m scaleout_mp`."""

from __future__ import annotations

import importlib.util
import os
import sys

#: A command that cannot start: wrong usage, or a part that is not installed.
EXIT_USAGE = 2


def main() -> int:
    """Run the command line and return its exit code."""
    if importlib.util.find_spec("click") is None:
        sys.stderr.write('scaleout-mp needs the extra "cli": pip install "scaleout-mp[cli]"\n')
        return EXIT_USAGE
    if "--debug" not in sys.argv:
        # gRPC writes to stderr by itself what our errors say better. It reads this once, when it is imported.
        os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    from scaleout_mp.cli.app import run

    return run()


if __name__ == "__main__":
    sys.exit(main())
