"""The `scaleout-mp` command, also as `python -m scaleout_mp`."""

from __future__ import annotations

import importlib.util
import os
import sys

#: A command that cannot start: wrong usage, or a part that is not installed.
EXIT_USAGE = 2
#: What commands need beside click.
_EXTRAS = {"demo": "demo", "localnet": "cli,localnet"}


def main() -> int:
    """Run the command line and return its exit code."""
    if sys.stdout is None or sys.stderr is None:
        from scaleout_mp.executor.standard import replace_missing

        replace_missing()
    if importlib.util.find_spec("click") is None:
        extra = _EXTRAS.get(next((argument for argument in sys.argv[1:] if not argument.startswith("-")), ""), "cli")
        sys.stderr.write(f'scaleout-mp needs the extra "{extra}": pip install "scaleout-mp[{extra}]"\n')
        return EXIT_USAGE
    if "--debug" not in sys.argv:
        # gRPC writes to stderr by itself what our errors say better. It reads this once, when it is imported.
        os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    from scaleout_mp.cli.app import run

    return run()


if __name__ == "__main__":
    sys.exit(main())
