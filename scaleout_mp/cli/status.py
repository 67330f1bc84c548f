"""`scaleout-mp status`."""

from __future__ import annotations

import json

import click

from scaleout_mp.cli.control import ask, find_client
from scaleout_mp.cli.options import debug_option
from scaleout_mp.cli.status_view import lines


@click.command(short_help="Show a running client: link, tasks, recent deaths.")
@click.option("-n", "--name", help="The client's name, where several run.")
@click.option("--json", "as_json", is_flag=True, help="Write JSON.")
@debug_option
def status(*, name: str | None, as_json: bool) -> int:
    """Show a client that runs on this machine: its link, its tasks, and how the last ones that failed ended.

    The exit code is 1 when there is no such client.

    \b
    Examples:
      scaleout-mp status
      scaleout-mp status --name hospital-a --json
    """  # noqa: D301 - click reads the \b
    seen = ask(find_client(name), "status")
    if as_json:
        click.echo(json.dumps(seen, indent=2))
    else:
        click.echo("\n".join(lines(seen)))
    return 0
