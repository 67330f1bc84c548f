"""`scaleout-mp demo`."""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path

import click

from scaleout_mp.cli.extras import require_extra
from scaleout_mp.cli.options import debug_option


@click.command(short_help="Watch a federated session survive tasks that misbehave.")
@click.option("--rounds", type=click.IntRange(min=1), default=8, show_default=True, help="Rounds of training.")
@click.option(
    "--folder",
    type=click.Path(file_okay=False, path_type=Path),
    help="Keep models, results and logs here.  [default: a temporary folder, removed afterwards]",
)
@click.option("--faults/--no-faults", default=True, help="Let tasks misbehave, or not.  [default: --faults]")
@click.option("--json", "as_json", is_flag=True, help="Write the summary to stdout as JSON, all else to stderr.")
@debug_option
@click.pass_context
def demo(ctx: click.Context, *, rounds: int, folder: Path | None, faults: bool, as_json: bool) -> int:
    """Watch a federated session survive tasks that misbehave.

    Starts a local network and four clients that learn handwritten digits together, with no other machine and no
    download. On the way one client's training crashes with a segmentation fault, one allocates past its memory
    limit, one hangs where no abort reaches it, one raises. A live table shows it on a terminal, plain lines
    elsewhere. Takes about 40 seconds.

    The exit code is 0 only if all came out as planned: every fault ended once and for the right reason, every
    faulty client came back, the last model is good, and no process is left.

    \b
    Examples:
      scaleout-mp demo
      scaleout-mp demo --folder ./demo --rounds 12
      scaleout-mp demo --json > summary.json
    """  # noqa: D301 - click reads the \b
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
