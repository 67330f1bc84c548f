"""`scaleout-mp status`."""

from __future__ import annotations

import json

import click

from scaleout_mp.cli.options import debug_option
from scaleout_mp.cli.status_view import lines
from scaleout_mp.control import ask, find_client, find_clients


@click.command(short_help="Show the running clients: link, tasks, recent deaths.")
@click.option("-n", "--name", help="The client's name.  [default: all that run]")
@click.option("--json", "as_json", is_flag=True, help="Write JSON.")
@debug_option
def status(*, name: str | None, as_json: bool) -> int:
    """Show the clients that run on this machine: their link, their tasks, and how the last ones that failed ended.

    The exit code is 1 when there is none. With --json it is one client: say which with --name, where several run.

    \b
    Examples:
      scaleout-mp status
      scaleout-mp status --name hospital-a --json
    """  # noqa: D301 - click reads the \b
    if as_json:
        click.echo(json.dumps(ask(find_client(name), "status"), indent=2))
        return 0
    for path in find_clients(name):
        click.echo("\n".join(lines(ask(path, "status"))))
    return 0
