"""Options of a client: from the command line, from variables, from a file, or the default, in this order."""

from __future__ import annotations

import dataclasses
import urllib.parse
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click

from scaleout_mp.cli.limit_options import LIMITS, kind
from scaleout_mp.cli.values import plain_number
from scaleout_mp.config.sandbox import LEVELS
from scaleout_mp.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

_PORT: Final = click.IntRange(1, 65535)
_FOLDER: Final = click.Path(file_okay=False, path_type=Path)

#: Keys of `--init` files that are named otherwise than the option; the last two are of older files.
_FILE_KEYS: Final = {"refresh_token": "token", "discover_host": "api_url", "discover_port": "api_port"}
#: Keys that files of the published client have and that say nothing here.
_OF_OTHERS: Final = frozenset({"access_token", "package_checksum", "trainer", "validator"})

_SOURCES: Final = {
    "COMMANDLINE": "flag",
    "ENVIRONMENT": "variable",
    "DEFAULT_MAP": "file",
    "DEFAULT": "default",
    "PROMPT": "flag",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Option:
    """One option; its variable is SCALEOUT_MP_<NAME>."""

    flags: tuple[str, ...]
    help: str
    type: Any = str
    default: Any = None
    is_flag: bool = False
    #: Given any number of times: a list in a file, words in a variable.
    multiple: bool = False
    metavar: str | None = None

    @property
    def name(self) -> str:
        return self.flags[-1].lstrip("-").replace("-", "_")


_CONNECTION: Final = (
    _Option(flags=("-u", "--api-url"), help="Address of the network's API."),
    _Option(flags=("-p", "--api-port"), help="Port of the API, where the address has none.", type=_PORT),
    _Option(flags=("--token",), help="Refresh, enrollment or API token; better given by its variable."),
    _Option(flags=("-n", "--name"), help="Name under which the network shows this client.  [default: the host's]"),
    _Option(flags=("-i", "--client-id"), help="Id of this client.  [default: a new one, kept for the next start]"),
    _Option(flags=("-c", "--preferred-combiner"), help="Name of the combiner to prefer."),
    _Option(flags=("--combiner",), help="Host of a combiner, to connect to without the API."),
    _Option(flags=("--combiner-port",), help="Port of that combiner.", type=_PORT),
    _Option(flags=("-hp", "--helper_type"), help="Taken and not needed: each model names its helper."),
)
_PACKAGE: Final = (
    _Option(flags=("--package",), help="Folder of the compute package.", type=_FOLDER, default="client"),
    _Option(flags=("--remote-package",), help="Get the package from the network.", is_flag=True),
    _Option(flags=("--managed-env",), help="Run a local package in the environment that it asks for.", is_flag=True),
    _Option(flags=("--disable-managed-env",), help="Run a remote package in this program's environment.", is_flag=True),
)
_CHOICE_OF_STARTS: Final = click.Choice(["template", "spawn"])
#: Limits of a request to a staged model, where they are others than those of all tasks.
_OF_REQUESTS: Final = ("memory", "wall_time", "cpu_time", "no_progress")
_INFERENCE_LIMITS: Final = {f"inference_{name}": name for name in _OF_REQUESTS}
_WORK: Final = (
    *(
        _Option(flags=(f"--{name.replace('_', '-')}",), help=f"Limit of each task. {text}", type=kind(name))
        for name, text in LIMITS.items()
    ),
    _Option(flags=("--sandbox",), help="How tasks are confined.", type=click.Choice(LEVELS), default="auto"),
    _Option(flags=("--read",), help="With --sandbox strict: a file or folder that tasks may read.", multiple=True),
    _Option(flags=("--write",), help="With --sandbox strict: a file or folder that they may change.", multiple=True),
    _Option(flags=("--network",), help="With --sandbox strict: let them use the network.", is_flag=True),
    _Option(
        flags=("--isolation",),
        help='"task": a process for each; "worker": one that keeps state.',
        type=click.Choice(["task", "worker"]),
        default="task",
    ),
    _Option(flags=("--max-concurrent-tasks",), help="Tasks at once.", type=click.IntRange(min=1)),
    _Option(flags=("--memory-budget",), help='Memory for all tasks together: "16GiB", or "0.5" of the machine.'),
    _Option(flags=("--state-bytes",), help="Size of what a callback keeps in client.state.  [default: 256MiB]"),
    _Option(flags=("--start-method",), help="How processes start.", type=_CHOICE_OF_STARTS, default="template"),
)
_MACHINE: Final = (
    _Option(flags=("--gpus",), help='GPUs that tasks share, as "0,1".  [default: each sees all]'),
    _Option(flags=("--gpus-per-task",), help="How many of them a task has to itself.", type=click.IntRange(min=0)),
    _Option(flags=("--nice",), help="0 to 19; the higher, the more tasks give way.", type=int),
    _Option(flags=("--affinity",), help='Processors on which tasks run, as "0,2".  [default: all]'),
    _Option(
        flags=("--working-directory",),
        help='Where tasks start: "inherit" (here) or a path.  [default: a scratch folder]',
    ),
    _Option(flags=("--scratch-folder",), help="Where scratch folders lie.  [default: the temporary folder]"),
    _Option(flags=("--env",), help="A variable of tasks.", multiple=True, metavar="NAME=VALUE"),
    _Option(
        flags=("--pass-env",), help="A variable of this program that tasks get too.", multiple=True, metavar="NAME"
    ),
    _Option(flags=("--no-shield",), help="Let this user's debuggers look into the client.", is_flag=True),
)
_INFERENCE: Final = (
    _Option(
        flags=("--inference-concurrency",),
        help="Requests to a staged model at once, each in a process of its own.",
        type=click.IntRange(min=1),
        default=1,
    ),
    _Option(
        flags=("--inference-idle-time",),
        help='When a staged model\'s processes end without a request: "10m", or "never".',
        default="10m",
    ),
    *(
        _Option(
            flags=(f"--{name.replace('_', '-')}",),
            help=f"Limit of each request. {LIMITS[limit]}  [default: as --{limit.replace('_', '-')}]",
        )
        for name, limit in _INFERENCE_LIMITS.items()
    ),
)
_CLIENT: Final = (
    _Option(flags=("--state-dir",), help='Where what must reach the server waits; ":memory:": nowhere.'),
    _Option(flags=("--heartbeat-interval",), help="Time between two signs of life.", default="2s"),
    _Option(
        flags=("--goodbye-seconds",), help="Time at the end to tell the server what is left to tell.  [default: 5s]"
    ),
    _Option(flags=("--hide-output",), help="Do not show what tasks print.", is_flag=True),
    _Option(
        flags=("--log-level",),
        help="How much is logged.",
        type=click.Choice(["DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL"], case_sensitive=False),
        default="INFO",
    ),
)
OPTIONS: Final = (*_CONNECTION, *_PACKAGE, *_WORK, *_MACHINE, *_INFERENCE, *_CLIENT)
_BY_NAME: Final = {option.name: option for option in OPTIONS}


def client_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options of a client, and `--init`."""
    for option in reversed(OPTIONS):
        command = click.option(
            *option.flags,
            option.name,
            type=bool if option.is_flag else option.type,
            is_flag=option.is_flag,
            multiple=option.multiple,
            metavar=option.metavar,
            default=False if option.is_flag else option.default,
            show_default=option.default is not None,
            help=option.help,
            envvar=f"SCALEOUT_MP_{option.name.upper()}",
        )(command)
    return click.option(
        "-in",
        "--init",
        type=click.Path(path_type=Path),
        is_eager=True,
        expose_value=False,
        callback=_read_file,
        help="YAML file with options, by their names with underscores; flags and variables come before it.",
    )(command)


def _read_file(ctx: click.Context, _parameter: click.Parameter, path: Path | None) -> None:
    if path is not None:
        ctx.default_map = {**(ctx.default_map or {}), **_file_options(path)}


def _file_options(path: Path) -> dict[str, Any]:
    """Read a file of options. Raises ConfigError that names the key."""
    from scaleout_mp.package.manifest import read_yaml

    if not path.is_file():
        raise ConfigError(f"--init: there is no file {path}")
    found: dict[str, Any] = {}
    for key, value in read_yaml(str(path)).items():
        name = _FILE_KEYS.get(str(key), str(key).replace("-", "_"))
        if value is None or name in _OF_OTHERS:
            continue
        if name not in _BY_NAME:
            raise ConfigError(f"{path}: there is no option {key!r}")
        found[name] = _file_value(value, f"{path}: {key}", multiple=_BY_NAME[name].multiple)
    return found


def _file_value(value: Any, what: str, *, multiple: bool) -> Any:
    if multiple:
        values = value if isinstance(value, list) else [value]
        return [_file_value(one, what, multiple=False) for one in values]
    if isinstance(value, dict | list):
        raise ConfigError(f"{what} must be one value")
    return value if isinstance(value, bool) else str(value)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Given:
    """The effective options, and where each came from."""

    values: Mapping[str, Any]
    #: "flag", "variable", "file" or "default".
    sources: Mapping[str, str]

    def __getitem__(self, name: str) -> Any:
        return self.values[name]

    @property
    def address(self) -> str | None:
        """The API's address with scheme and port; None without one."""
        return complete_address(self["api_url"], self["api_port"]) if self["api_url"] else None

    def limits(self) -> dict[str, Any]:
        """Return the limits that were given, as `Limits` takes them."""
        return {name: plain_number(self[name]) for name in LIMITS if self[name] is not None}

    def inference_limits(self) -> dict[str, Any]:
        """Return the limits that were given for requests, as `Limits` takes them."""
        given = {limit: self[name] for name, limit in _INFERENCE_LIMITS.items() if self[name] is not None}
        return {limit: plain_number(value) for limit, value in given.items()}


def given_options(ctx: click.Context, values: Mapping[str, Any]) -> Given:
    """Return what was given to a command with `client_options`."""
    sources = {}
    for name in _BY_NAME:
        source = ctx.get_parameter_source(name)
        sources[name] = "default" if source is None else _SOURCES[source.name]
    return Given(values={name: values[name] for name in _BY_NAME}, sources=sources)


def complete_address(url: str, port: int | None) -> str:
    """Return an address with a scheme: http for this machine, else https; and with the port, where it has none."""
    text = url if "://" in url else f"//{url}"
    try:
        parts = urllib.parse.urlsplit(text)
        host, own_port = parts.hostname, parts.port
    except ValueError as error:
        raise ConfigError(f"--api-url {url!r} cannot be read: {error}") from error
    scheme = parts.scheme or ("http" if host in {"localhost", "127.0.0.1", "::1"} else "https")
    place = parts.netloc if own_port is not None or port is None else f"{parts.netloc}:{port}"
    return urllib.parse.urlunsplit((scheme, place, parts.path, "", ""))
