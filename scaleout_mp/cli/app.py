"""The group of all commands, and what becomes of their errors."""

from __future__ import annotations

import importlib
import sys
import traceback
from typing import TYPE_CHECKING, Final

import click

import scaleout_mp
from scaleout_mp.errors import MissingExtraError, ScaleoutError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

EXIT_FAILED: Final = 1
EXIT_USAGE: Final = 2
#: What shells report for a program that Ctrl-C ended.
EXIT_INTERRUPTED: Final = 130

#: What a group without a command raises, from click 8.2 on; older ones print the help themselves.
_HELP: Final = getattr(click.exceptions, "NoArgsIsHelpError", ())

#: The module of each command, whose function has the same name, and its line in the help.
_COMMANDS: Final[Mapping[str, str]] = {
    "abort": "Abort one task of a running client.",
    "client": "Start a client, or enroll one.",
    "config": "Show which options a client would start with, and where each comes from.",
    "demo": "Watch a federated session survive tasks that misbehave.",
    "doctor": "Say what this machine offers for confining tasks, and how to get more.",
    "localnet": "Start a local Scaleout Edge network.",
    "run": "Run one function in a confined process of its own.",
    "status": "Show the running clients: link, tasks, recent deaths.",
    "stop": "End a running client.",
    "top": "Watch the running clients.",
}


class LazyGroup(click.Group):
    """Imports a command when it is used, so that none pays for what another needs."""

    def list_commands(self, _ctx: click.Context) -> list[str]:
        """Return the names, in the order of the help."""
        return list(_COMMANDS)

    def get_command(self, _ctx: click.Context, name: str) -> click.Command | None:
        """Import one command; None when there is none of that name."""
        if name not in _COMMANDS:
            return None
        module = importlib.import_module(f"scaleout_mp.cli.{name}")
        command = getattr(module, name)
        assert isinstance(command, click.Command)
        return command

    def format_commands(self, _ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the list of commands without importing them."""
        with formatter.section("Commands"):
            formatter.write_dl(list(_COMMANDS.items()))


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(scaleout_mp.__version__, prog_name="scaleout-mp")
@click.option("--debug", is_flag=True, help="Show tracebacks, and log at level DEBUG.")
@click.pass_context
def app(ctx: click.Context, debug: bool) -> None:
    """Work with Scaleout Edge networks: tasks run in confined processes of their own.

    \b
    Examples:
      scaleout-mp demo
      scaleout-mp localnet --folder ./network
      scaleout-mp client start --api-url localhost --api-port 8092 --name hospital-a
      scaleout-mp run train.py:train --set epochs=3 --memory 2GiB
    """  # noqa: D301 - click reads the \b
    ctx.obj = debug


def run(arguments: Sequence[str] | None = None) -> int:
    """Run the command line (default: sys.argv) and return the exit code. Errors of ours take one line."""
    debug = "--debug" in (sys.argv[1:] if arguments is None else arguments)
    try:
        code = app.main(args=arguments, prog_name="scaleout-mp", standalone_mode=False)
    except click.ClickException as error:
        if isinstance(error, _HELP):
            error.show()
        else:
            sys.stderr.write(f"error: {_usage_line(error)}\n")
        return error.exit_code
    except (KeyboardInterrupt, click.Abort):
        sys.stderr.write("stopped\n")
        return EXIT_INTERRUPTED
    except (ScaleoutError, OSError) as error:
        if debug:
            traceback.print_exc()
        sys.stderr.write(f"error: {_one_line(error)}\n")
        return EXIT_USAGE if isinstance(error, MissingExtraError) else EXIT_FAILED
    return code if isinstance(code, int) else 0


def _usage_line(error: click.ClickException) -> str:
    said = " ".join(error.format_message().split())
    context = getattr(error, "ctx", None)
    return said if context is None else f"{said.rstrip('.')}; see {context.command_path} --help"


def _one_line(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        where = f"{error.filename}: " if error.filename else ""
        return f"{where}{error.strerror}"
    return " ".join(str(error).split())
