"""`scaleout-mp abort`."""

from __future__ import annotations

import click

from scaleout_mp.cli.options import debug_option
from scaleout_mp.control import ask, find_client


@click.command(short_help="Abort one task of a running client.")
@click.argument("task")
@click.option("-n", "--name", help="The client's name, where several run.")
@debug_option
def abort(*, task: str, name: str | None) -> int:
    """Abort one task of a client that runs on this machine; the server hears that it was interrupted.

    TASK is its id, or the beginning of it, as `scaleout-mp status` shows it.

    \b
    Examples:
      scaleout-mp abort 4bfca5f6
    """  # noqa: D301 - click reads the \b
    answer = ask(find_client(name), "abort", task=task)
    click.echo(f"task {answer['task']} is being aborted")
    return 0
