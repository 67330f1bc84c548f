"""Options that every command has."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any, TypeVar

import click

if TYPE_CHECKING:
    from collections.abc import Callable

F = TypeVar("F", bound="Callable[..., Any]")


def debug_option(command: F) -> F:
    """Let `--debug` stand behind the command's name as well."""
    return click.option(
        "--debug",
        is_flag=True,
        expose_value=False,
        callback=_set_debug,
        help="Show tracebacks, and log at level DEBUG.",
    )(command)


def _set_debug(ctx: click.Context, _parameter: click.Parameter, debug: bool) -> None:
    ctx.obj = ctx.obj or debug


def configure_logging(ctx: click.Context) -> None:
    """Log to stderr: warnings, or everything with --debug."""
    level = logging.DEBUG if ctx.obj else logging.WARNING
    logging.basicConfig(level=level, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
