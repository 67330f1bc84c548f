"""`scaleout-mp stop`."""

from __future__ import annotations

import os
import select

import click

from scaleout_mp.cli.options import debug_option
from scaleout_mp.control import ask, find_client
from scaleout_mp.errors import ControlError


@click.command(short_help="End a running client.")
@click.option("-n", "--name", help="The client's name, where several run.")
@click.option("--timeout", type=click.FloatRange(min=0), default=30.0, show_default=True, help="Seconds to wait.")
@debug_option
def stop(*, name: str | None, timeout: float) -> int:
    """End a client that runs on this machine, as SIGTERM does, and wait until it is gone.

    Its tasks are aborted and reported as interrupted. The exit code is 1 when it is still there after --timeout.

    \b
    Examples:
      scaleout-mp stop
      scaleout-mp stop --name hospital-a --timeout 60
    """  # noqa: D301 - click reads the \b
    path = find_client(name)
    descriptor = os.pidfd_open(ask(path, "status")["pid"])
    try:
        ask(path, "stop")
        poll = select.poll()
        poll.register(descriptor, select.POLLIN)
        if not poll.poll(timeout * 1000):
            raise ControlError(f"the client is still there after {timeout:g} s")
    finally:
        os.close(descriptor)
    click.echo("the client ended")
    return 0
