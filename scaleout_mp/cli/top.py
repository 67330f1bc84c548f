"""`scaleout-mp top`."""

from __future__ import annotations

import contextlib
import json
import shutil
import time
from typing import TYPE_CHECKING, Any, Final

import click

from scaleout_mp.cli.options import debug_option
from scaleout_mp.cli.status_view import can_draw, is_screen, lines, tables
from scaleout_mp.control import ask, find_clients
from scaleout_mp.errors import ControlError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    Show = Callable[[Sequence[Mapping[str, Any]]], None]

#: xterm's sequences, which all terminals of today know: the other screen, and lines that do not wrap.
_ENTER_SCREEN: Final = "\x1b[?1049h\x1b[?7l"
_LEAVE_SCREEN: Final = "\x1b[?7h\x1b[?1049l"
#: To the top; to the end of the line, and of the screen, all empty.
_HOME, _REST_OF_LINE, _REST_OF_SCREEN = "\x1b[H", "\x1b[K", "\x1b[J"


@click.command(short_help="Watch the running clients.")
@click.option("-n", "--name", help="The client's name.  [default: all that run]")
@click.option(
    "--interval", type=click.FloatRange(min=0.1), default=1.0, show_default=True, help="Seconds between two looks."
)
@click.option("--count", type=click.IntRange(min=1), help="Look so many times, then end.")
@click.option("--json", "as_json", is_flag=True, help="Write a line of JSON for each client and look.")
@debug_option
def top(*, name: str | None, interval: float, count: int | None, as_json: bool) -> int:
    """Watch the clients that run on this machine until they end: link, tasks, memory, metrics, recent deaths.

    A table on a terminal (plain text where rich is not installed), lines elsewhere. Ctrl-C leaves; the clients go on.

    \b
    Examples:
      scaleout-mp top
      scaleout-mp top --name hospital-a
      scaleout-mp top --interval 5 --json
    """  # noqa: D301 - click reads the \b
    seen = _look(name)
    looks = 0
    with contextlib.suppress(KeyboardInterrupt), _view(as_json=as_json) as show:
        while seen:
            show(seen)
            looks += 1
            if looks == count:
                break
            time.sleep(interval)
            seen = _look_again(name)
    if not seen:
        click.echo("the client ended" if name else "the clients ended", err=True)
    return 0


def _look(name: str | None) -> list[Mapping[str, Any]]:
    """Ask all. Raises ControlError when there is none to ask; who ends meanwhile is left out."""
    seen: list[Mapping[str, Any]] = []
    for path in find_clients(name):
        with contextlib.suppress(ControlError):
            seen.append(ask(path, "status"))
    return seen


def _look_again(name: str | None) -> list[Mapping[str, Any]]:
    try:
        return _look(name)
    except ControlError:
        return []


@contextlib.contextmanager
def _view(*, as_json: bool) -> Iterator[Show]:
    """Yield what shows one look."""
    if as_json:
        yield _write_json
    elif can_draw():
        from rich.live import Live

        with Live(screen=True, auto_refresh=False) as live:
            yield lambda seen: live.update(tables(seen), refresh=True)
    elif is_screen():
        click.echo(_ENTER_SCREEN, nl=False)
        try:
            yield _write_screen
        finally:
            click.echo(_LEAVE_SCREEN, nl=False)
    else:
        yield _write_lines


def _write_json(seen: Sequence[Mapping[str, Any]]) -> None:
    for one in seen:
        click.echo(json.dumps(one))


def _write_screen(seen: Sequence[Mapping[str, Any]]) -> None:
    shown = [line for one in seen for line in lines(one)][: shutil.get_terminal_size().lines]
    click.echo(_HOME + f"{_REST_OF_LINE}\n".join(shown) + _REST_OF_LINE + _REST_OF_SCREEN, nl=False)


def _write_lines(seen: Sequence[Mapping[str, Any]]) -> None:
    for one in seen:
        click.echo("\n".join(lines(one)))
