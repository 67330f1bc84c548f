"""`scaleout-mp demo`."""

from __future__ import annotations

import json
import logging
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import click

from scaleout_mp.cli.extras import missing_requirements, require_extra
from scaleout_mp.cli.options import debug_option

if TYPE_CHECKING:
    from collections.abc import Sequence


@click.command(short_help="Watch a federated session survive tasks that misbehave.")
@click.option("--rounds", type=click.IntRange(min=1), default=8, show_default=True, help="Rounds of training.")
@click.option(
    "--folder",
    type=click.Path(file_okay=False, path_type=Path),
    help="Keep models, results and logs here.  [default: a temporary folder, removed afterwards]",
)
@click.option("--faults/--no-faults", default=True, help="Let tasks misbehave, or not.  [default: --faults]")
@click.option("--json", "as_json", is_flag=True, help="Write the summary to stdout as JSON, all else to stderr.")
@click.option("--install/--no-install", default=True, help="Get what is missing, or say it.  [default: --install]")
@debug_option
@click.pass_context
def demo(ctx: click.Context, *, rounds: int, folder: Path | None, faults: bool, as_json: bool, install: bool) -> int:
    """Watch a federated session survive tasks that misbehave.

    Starts a local network and four clients that learn handwritten digits together, with no other machine and no
    data to download. On the way one client's training crashes with a segmentation fault, one allocates past its memory
    limit, one hangs where no abort reaches it, one raises. A live table shows it on a terminal, plain lines
    elsewhere. Takes about 40 seconds.

    Where scikit-learn, aiohttp or rich are not installed, an environment of its own is made once, in which it then
    runs; what is installed here stays as it is.

    The exit code is 0 only if all came out as planned: every fault ended once and for the right reason, every
    faulty client came back, the last model is good, and no process is left.

    \b
    Examples:
      scaleout-mp demo
      scaleout-mp demo --folder ./demo --rounds 12
      scaleout-mp demo --json > summary.json
    """  # noqa: D301 - click reads the \b
    missing = missing_requirements("demo")
    if missing and install:
        _run_elsewhere(missing, _arguments(rounds, folder, faults=faults, as_json=as_json, debug=bool(ctx.obj)))
    require_extra("demo")
    from scaleout_mp.demo.run import DemoOptions, run_demo
    from scaleout_mp.demo.stopping import DemoStopped
    from scaleout_mp.demo.summary import print_summary

    stream = sys.stderr if as_json else sys.stdout
    level = logging.DEBUG if ctx.obj else logging.WARNING
    options = DemoOptions(rounds=rounds, folder=folder, faults=faults, log_level=level)
    try:
        result = run_demo(options, stream=stream)
    except DemoStopped:
        click.echo("stopped", err=True)
        return 130
    print_summary(result, stream)
    if as_json:
        click.echo(json.dumps(result.to_dict(), indent=2))
    return 0 if result.passed else 1


def _arguments(rounds: int, folder: Path | None, *, faults: bool, as_json: bool, debug: bool) -> list[str]:
    """Return the command line of the same demo where nothing is missing."""
    arguments = ["demo", "--no-install", "--rounds", str(rounds), "--faults" if faults else "--no-faults"]
    if folder is not None:
        arguments += ["--folder", str(folder)]
    return [*arguments, *(["--json"] if as_json else []), *(["--debug"] if debug else [])]


def _run_elsewhere(missing: Sequence[str], arguments: Sequence[str]) -> NoReturn:
    """Go on as the same program in an environment that has what is missing here. Raises MissingExtraError."""
    from scaleout_mp.cli.demo_environment import demo_python
    from scaleout_mp.package.environment import default_cache

    def say() -> None:
        names = ", ".join(missing)
        click.echo(f"{names} are not installed here: making an environment for the demo in {default_cache()}", err=True)

    python = demo_python(missing, on_build=say)
    sys.stdout.flush()
    os.execv(python, [python, "-P", "-m", "scaleout_mp", *arguments])  # noqa: S606 - there is no shell
