"""The `scaleout-mp` command, also as `python -m scaleout_mp`."""

from __future__ import annotations

import os
import sys

#: What shells report for a program that Ctrl-C ended.
EXIT_INTERRUPTED = 130


def main() -> int:
    """Run the command line and return its exit code."""
    if sys.stdout is None or sys.stderr is None:
        from scaleout_mp.executor.standard import replace_missing

        replace_missing()
    if "--debug" not in sys.argv:
        # gRPC writes to stderr by itself what our errors say better. It reads this once, when it is imported.
        os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    try:
        from scaleout_mp.cli.app import run

        return run()
    except KeyboardInterrupt:
        # While modules are imported, or after the command's end.
        return EXIT_INTERRUPTED


if __name__ == "__main__":
    sys.exit(main())
