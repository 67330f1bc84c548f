"""`scaleout-mp config`."""

from __future__ import annotations

import json
import os
from typing import Any

import click

from scaleout_mp.cli.client_options import client_options, given_options
from scaleout_mp.cli.options import debug_option
from scaleout_mp.config.settings import VARIABLES, Settings


@click.command(short_help="Show which options a client would start with, and where each comes from.")
@client_options
@click.option("--json", "as_json", is_flag=True, help="Write JSON.")
@debug_option
@click.pass_context
def config(ctx: click.Context, /, *, as_json: bool, **values: Any) -> int:
    """Show which options `scaleout-mp client start` would start with, and where each comes from.

    A flag comes before a variable, a variable before the file of --init, and that before the default. What only
    variables say stands below, by their names. Tokens, and values of --env, are not shown.

    \b
    Examples:
      scaleout-mp config --init client.yaml
      scaleout-mp config --memory 2GiB --json
    """  # noqa: D301 - click reads the \b
    given = given_options(ctx, values)
    shown = {
        name: {"value": _shown(name, value), "source": given.sources[name]} for name, value in given.values.items()
    }
    settings = Settings.from_environ()
    for field, variable in VARIABLES.items():
        if field not in given.values:
            source = "variable" if os.environ.get(variable) else "default"
            shown[variable] = {"value": _shown(field, getattr(settings, field)), "source": source}
    if as_json:
        click.echo(json.dumps(shown, indent=2))
        return 0
    width = max(map(len, shown))
    for name, entry in shown.items():
        value = _text(entry["value"])
        click.echo(f"{name:<{width}}  {value:<24}  {entry['source']}".rstrip())
    return 0


def _shown(name: str, value: Any) -> Any:
    if name == "token" and value:
        return "(set)"
    if isinstance(value, tuple):
        return [f"{one.partition('=')[0]}=(set)" if name == "env" else one for one in value]
    return value if value is None or isinstance(value, bool | int | float) else str(value)


def _text(value: Any) -> str:
    if isinstance(value, list):
        return " ".join(value)
    return "" if value is None else str(value)
