"""`scaleout-mp top`."""

from __future__ import annotations

import json
import sys
import time

import click

from scaleout_mp.cli.control import ask, find_client
from scaleout_mp.cli.options import debug_option
from scaleout_mp.cli.status_view import lines
from scaleout_mp.errors import ControlError


@click.command(short_help="Watch a running client.")
@click.option("-n", "--name", help="The client's name, where several run.")
@click.option(
    "--interval", type=click.FloatRange(min=0.1), default=1.0, show_default=True, help="Seconds between two looks."
)
@click.option("--count", type=click.IntRange(min=1), help="Look so many times, then end.")
@click.option("--json", "as_json", is_flag=True, help="Write a line of JSON for each look.")
@debug_option
def top(*, name: str | None, interval: float, count: int | None, as_json: bool) -> int:
    """Watch a client that runs on this machine until it ends: what `status` shows, again and again. Ctrl-C leaves.

    \b
    Examples:
      scaleout-mp top
      scaleout-mp top --interval 5 --json
    """  # noqa: D301 - click reads the \b
    path = find_client(name)
    live = sys.stdout.isatty() and not as_json
    looks = 0
    while True:
        try:
            seen = ask(path, "status")
        except ControlError:
            if looks == 0:
                raise
            click.echo("the client ended", err=True)
            return 0
        looks += 1
        if as_json:
            click.echo(json.dumps(seen))
        else:
            if live:
                click.clear()
            click.echo("\n".join(lines(seen)))
        if looks == count:
            return 0
        try:
            time.sleep(interval)
        except KeyboardInterrupt:
            return 0
