"""`scaleout-mp run`."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click

from scaleout_mp.cli.job import Job, run_job
from scaleout_mp.cli.job_output import check_output, keep_result
from scaleout_mp.cli.job_view import JsonView, terminal_view
from scaleout_mp.cli.limit_options import LIMITS, limit_options
from scaleout_mp.cli.models import open_seed
from scaleout_mp.cli.options import configure_logging, debug_option
from scaleout_mp.cli.values import assignment, assignments, numbers, plain_number, words
from scaleout_mp.client.target import Target
from scaleout_mp.config import Limits, Resources, Sandbox, Surroundings
from scaleout_mp.config.sandbox import LEVELS
from scaleout_mp.config.surroundings import INHERIT
from scaleout_mp.errors import ConfigError, ModelError
from scaleout_mp.task import EndReason

if TYPE_CHECKING:
    from collections.abc import Mapping

    from scaleout_mp.cli.job_view import View
    from scaleout_mp.model import ScaleoutModel
    from scaleout_mp.task import ExitReport

#: The exit code of each kind of end; docs/run.md lists them.
EXIT_CODES: Final[Mapping[EndReason, int]] = {
    EndReason.COMPLETED: 0,
    EndReason.FAILED: 1,
    EndReason.CRASHED: 3,
    EndReason.MEMORY_LIMIT: 4,
    EndReason.WALL_TIME: 5,
    EndReason.CPU_TIME: 6,
    EndReason.NO_PROGRESS: 7,
    EndReason.PIDS: 8,
    EndReason.FILE_SIZE: 9,
    EndReason.OPEN_FILES: 10,
    EndReason.SCRATCH_SIZE: 11,
    EndReason.PROTOCOL: 12,
    EndReason.REFUSED: 13,
    EndReason.INTERRUPTED_BY_CLIENT: 130,
    # Nobody's server has a hand in it; for completeness.
    EndReason.INTERRUPTED_BY_SERVER: 130,
    EndReason.TIMED_OUT_BY_SERVER: 130,
}
EXIT_USAGE: Final = 2


class UsageError(click.ClickException):
    """What was asked for makes no sense; said in one line."""

    exit_code = EXIT_USAGE

    def show(self, file: Any = None) -> None:
        """Write the line to stderr."""
        click.echo(f"error: {' '.join(self.message.split())}", file=file or sys.stderr)


@click.command(short_help="Run one function in a confined process of its own.")
@click.argument("target", metavar="MODULE:FUNCTION")
@click.option("--model", type=click.Path(path_type=Path), help="Model that it gets: a model file (.scm) or .npz.")
@click.option("--set", "settings", multiple=True, metavar="NAME=VALUE", help="A setting; JSON, else a string.")
@click.option(
    "--output",
    type=click.Path(path_type=Path),
    help="Where the result goes: .scm or .npz for models and arrays, .json.",
)
@limit_options
@click.option("--sandbox", type=click.Choice(LEVELS), default="auto", show_default=True, help="How it is confined.")
@click.option("--read", multiple=True, help="With --sandbox strict: a file or folder that it may read.")
@click.option("--write", multiple=True, help="With --sandbox strict: a file or folder that it may change.")
@click.option("--network", is_flag=True, help="With --sandbox strict: let it use the network.")
@click.option("--gpus", help='GPUs that it sees, as "0,1".  [default: all]')
@click.option("--nice", type=int, default=0, help="0 to 19; the higher, the more it gives way.")
@click.option("--affinity", help='Processors on which it runs, as "0,2".  [default: all]')
@click.option(
    "--working-directory",
    help='Where it starts: "inherit" (here), "scratch" (a folder of its own) or a path.  '
    "[default: inherit; scratch with --sandbox strict]",
)
@click.option("--env", multiple=True, metavar="NAME=VALUE", help="A variable of its environment.")
@click.option("--pass-env", multiple=True, metavar="NAME", help="A variable of this environment that it gets as well.")
@click.option("--start-method", type=click.Choice(["template", "spawn"]), default="template", show_default=True)
@click.option("--json", "as_json", is_flag=True, help="Write JSON lines to stdout, all else to stderr.")
@debug_option
@click.pass_context
def run(
    ctx: click.Context, /, *, target: str, model: Path | None, output: Path | None, as_json: bool, **given: Any
) -> int:
    """Run one function in a confined process of its own, and say how it ended.

    MODULE:FUNCTION names it in a module that can be imported from here, or in a file: train.py:train. It is loaded
    in that process only. With --model it is called as callbacks are: function(model, settings). Settings that it has
    parameters for come as keyword arguments instead.

    Ctrl-C asks it to stop, a second Ctrl-C kills it. The exit code says how it ended, see docs/run.md: 0 completed,
    1 it raised, 2 wrong usage, 3 crashed, 4 memory limit, 5 wall time, 130 interrupted.

    \b
    Examples:
      scaleout-mp run train.py:train --model seed.npz --set epochs=3 --output out.scm
      scaleout-mp run mypackage.jobs:evaluate --memory 2GiB --wall-time 1h --sandbox strict --read ./data
    """  # noqa: D301 - click reads the \b
    configure_logging(ctx)
    if not ctx.obj:
        # How it ended is told below, with all that there is to tell.
        logging.getLogger("scaleout_mp.executor.execution").setLevel(logging.ERROR)
    try:
        job = _job(target, given)
        if output is not None:
            check_output(output)
        opened = None if model is None else _open_model(model)
    except (ConfigError, ModelError) as error:
        raise UsageError(str(error)) from error
    with contextlib.closing(opened) if opened is not None else contextlib.nullcontext():
        return _run(job, opened, output, as_json=as_json)


def _run(job: Job, model: ScaleoutModel | None, output: Path | None, *, as_json: bool) -> int:
    stdout = sys.stdout
    view: View = JsonView(stdout) if as_json else terminal_view()
    # What the task prints goes where it does not stand between the lines for machines.
    with contextlib.redirect_stdout(sys.stderr) if as_json else contextlib.nullcontext():
        outcome = asyncio.run(run_job(job, model, view))
    report = outcome.report
    if report.error_type == "TargetError":
        raise UsageError(report.message.removeprefix("raised TargetError: "))
    code = _exit_code(report, outcome.stopped_by_signal)
    kept = keep_result(outcome.value, output) if report.completed else None
    view.end(report, kept, exit_code=code if kept is None or kept.problem is None else 1)
    return code if kept is None or kept.problem is None else 1


def _exit_code(report: ExitReport, number: int | None) -> int:
    code = EXIT_CODES[report.reason]
    # What shells say of a program that a signal ended.
    return 128 + number if code == 130 and number is not None else code


def _job(target: str, given: Mapping[str, Any]) -> Job:
    named = parse_target(target)
    level = given["sandbox"]
    strict = level == "strict"
    start = given["working_directory"] or (None if strict else INHERIT)
    limits: dict[str, Any] = {name: plain_number(given[name]) for name in LIMITS if given[name] is not None}
    gpus = None if given["gpus"] is None else words(given["gpus"])
    affinity = None if given["affinity"] is None else numbers("affinity", given["affinity"])
    return Job(
        target=named,
        settings=dict(parse_setting(text) for text in given["settings"]),
        limits=Limits(**limits),
        resources=Resources(gpus=len(gpus or ()), nice=given["nice"], affinity=affinity),
        gpus=gpus,
        sandbox=Sandbox(
            level=level,
            # The code that is to run lies there.
            read=(named.folder, *given["read"]) if strict else given["read"],
            write=given["write"],
            network=given["network"],
        ),
        surroundings=Surroundings(
            working_directory=start,
            environment=assignments("--env", given["env"]),
            pass_environment=given["pass_env"],
        ),
        start_method=given["start_method"],
    )


def parse_target(text: str) -> Target:
    """Return the callable that MODULE:FUNCTION names, unseen. Raises ConfigError."""
    place, colon, function = text.rpartition(":")
    names = function.split(".")
    if not colon or not place or not all(name.isidentifier() for name in names):
        raise ConfigError(f"{text!r} does not name a function: say module:function or file.py:function")
    if place.endswith(".py") or "/" in place:
        path = os.path.abspath(os.path.expanduser(place))
        if not os.path.isfile(path):
            raise ConfigError(f"there is no file {place}")
        return Target(module=path, is_file=True, function=function, folder=os.path.dirname(path))
    if not all(name.isidentifier() for name in place.split(".")):
        raise ConfigError(f"{place!r} is no name of a module; a file's name ends in .py")
    return Target(module=place, is_file=False, function=function, folder=os.getcwd())


def parse_setting(text: str) -> tuple[str, Any]:
    """Return name and value of NAME=VALUE; the value is JSON, or else the string itself. Raises ConfigError."""
    name, value = assignment("--set", text)
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value


def _open_model(path: Path) -> ScaleoutModel:
    if not path.is_file():
        raise ConfigError(f"there is no file {path}")
    try:
        return open_seed(path)
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror or error}") from error
