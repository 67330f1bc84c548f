"""The `scaleout-mp` command, also as `python -m scaleout_mp`."""

from __future__ import annotations

import os
import sys


def main() -> int:
    """Run the command line and return its exit code."""
    if sys.stdout is None or sys.stderr is None:
        from scaleout_mp.executor.standard import replace_missing

        replace_missing()
    if "--debug" not in sys.argv:
        # gRPC writes to stderr by itself what our errors say better. It reads this once, when it is imported.
        os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    from scaleout_mp.cli.app import run

    return run()


if __name__ == "__main__":
    sys.exit(main())
