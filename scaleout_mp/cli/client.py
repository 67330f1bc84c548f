"""`scaleout-mp client`: start and enroll."""

from __future__ import annotations

import json
import logging
import os
import time
import uuid
from typing import TYPE_CHECKING, Any, Final

import click

from scaleout_mp.cli.client_options import client_options, complete_address, given_options
from scaleout_mp.cli.client_runtime import runtime_options
from scaleout_mp.cli.options import debug_option
from scaleout_mp.control import ControlSocket
from scaleout_mp.errors import ConfigError, TransportError

if TYPE_CHECKING:
    from collections.abc import Callable

    from scaleout_mp.cli.client_options import Given
    from scaleout_mp.client import EdgeClient, GrpcConnectionOptions
    from scaleout_mp.supervisor.package_callbacks import PackageSource
    from scaleout_mp.supervisor.runtime import GrpcEdgeClientRuntime

#: Seconds between two questions for a package that the network does not have yet.
_PACKAGE_WAIT: Final = 3.0


@click.group(short_help="Start a client, or enroll one.")
def client() -> None:
    """Start a client of a Scaleout Edge network, or enroll one."""


@client.command()
@client_options
@debug_option
@click.pass_context
def start(ctx: click.Context, /, **values: Any) -> int:
    """Start a client with a compute package; its tasks run in confined processes of their own.

    The package is the folder ./client, unless --package names another one or --remote-package has the network give
    it: a folder with scaleout.yaml and a startup.py in it. A change of its files is picked up by the next task.

    Each option can be given as a variable, SCALEOUT_MP_NAME for --name, and in a file, see --init; `scaleout-mp config`
    with the same options shows what is in effect. Ctrl-C aborts the tasks, again within five seconds ends the client.

    \b
    Examples:
      scaleout-mp client start --api-url localhost --api-port 8092 --name hospital-a
      SCALEOUT_MP_TOKEN=... scaleout-mp client start -u https://example.org --remote-package --memory 4GiB
      scaleout-mp client start --init client.yaml --sandbox strict --isolation worker
    """  # noqa: D301 - click reads the \b
    given = given_options(ctx, values)
    _set_up_logging("DEBUG" if ctx.obj else given["log_level"])
    _check(given)
    known: list[GrpcEdgeClientRuntime] = []

    def access_token() -> str | None:
        # The package needs the token that the runtime has, and the runtime the package.
        return known[0].get_access_token()

    package = _package(given, access_token)
    runtime, edge = _client(given, package)
    known.append(runtime)
    options = _combiner(given, edge)
    runtime.use_combiner(options, token=given["token"], url=given.address)
    with ControlSocket(edge.name or edge.client_id or "client", runtime):
        edge.run(with_heartbeat=True)
    return 0


def _set_up_logging(level: str) -> None:
    logging.basicConfig(level=level.upper(), format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    # Why the client cannot connect is this program's last line, and not said twice.
    connecting = logging.getLogger("scaleout_mp.supervisor.connecting")
    connecting.addFilter(lambda record: getattr(record, "action", None) != "connect_failed")


def _check(given: Given) -> None:
    """Raise ConfigError when the options do not go together."""
    if not given["api_url"] and not given["combiner"]:
        raise ConfigError("where is the network? Give --api-url, or --combiner and --combiner-port")
    if given["combiner"] and not given["combiner_port"]:
        raise ConfigError("--combiner needs --combiner-port")
    if given["remote_package"] and not given["api_url"]:
        raise ConfigError("--remote-package needs --api-url: the package comes from there")


def _package(given: Given, access_token: Callable[[], str | None]) -> PackageSource:
    """Return where the package comes from."""
    from scaleout_mp.config import Settings
    from scaleout_mp.package import Environments, LocalPackage, RemotePackage
    from scaleout_mp.transport.package_api import PackageApi

    managed = (given["managed_env"] or given["remote_package"]) and not given["disable_managed_env"]
    environments = Environments() if managed else None
    if not given["remote_package"]:
        return LocalPackage(given["package"], environments=environments)
    address = given.address
    assert address is not None
    api = PackageApi(address, settings=Settings.from_environ(), access_token=access_token)
    return RemotePackage(api, environments=environments)


def _client(given: Given, package: PackageSource) -> tuple[GrpcEdgeClientRuntime, EdgeClient]:
    from scaleout_mp.client import EdgeClient
    from scaleout_mp.supervisor.runtime import GrpcEdgeClientRuntime

    runtime = GrpcEdgeClientRuntime(**runtime_options(given), package=package)
    edge = EdgeClient(runtime=runtime)
    if given["name"]:
        edge.set_name(given["name"])
    if given["client_id"]:
        edge.set_client_id(given["client_id"])
    return runtime, edge


def _combiner(given: Given, edge: EdgeClient) -> GrpcConnectionOptions:
    """Return where the combiner is. Raises TransportError with the API's answer."""
    from scaleout_mp.client import ConnectToApiResult, GrpcConnectionOptions

    if given["combiner"]:
        if not edge.client_id:
            client_id = str(uuid.uuid4())
            edge.set_client_id(client_id)
            # A restart that the server orders is the same client.
            os.environ["SCALEOUT_MP_CLIENT_ID"] = client_id
        return GrpcConnectionOptions(host=given["combiner"], port=given["combiner_port"])
    address = given.address
    assert address is not None
    wanted = {
        "preferred_combiner": given["preferred_combiner"] or None,
        "package": "remote" if given["remote_package"] else "local",
    }
    while True:
        result, answer = edge.connect_to_api(address, wanted, token=given["token"])
        if result is ConnectToApiResult.Assigned:
            assert isinstance(answer, GrpcConnectionOptions)
            return answer
        if result is not ConnectToApiResult.ComputePackageMissing:
            raise TransportError(f"cannot connect to {address}: {answer}")
        time.sleep(_PACKAGE_WAIT)


@client.command()
@click.option("-u", "--api-url", required=True, envvar="SCALEOUT_MP_API_URL", help="Address of the network's API.")
@click.option("-p", "--api-port", type=click.IntRange(1, 65535), help="Port of the API, where the address has none.")
@click.option("--token", required=True, envvar="SCALEOUT_MP_TOKEN", help="The enrollment token.")
@click.option("-n", "--name", help="Name under which the network shows this client.")
@click.option("-i", "--client-id", help="Id of this client; the server may give another.")
@click.option("--json", "as_json", is_flag=True, help="Write JSON.")
@debug_option
def enroll(
    *, api_url: str, api_port: int | None, token: str, name: str | None, client_id: str | None, as_json: bool
) -> int:
    """Enroll a client with an enrollment token, before its first start.

    The tokens that come back are kept in the token cache; start the client with the same token, name and id.

    \b
    Examples:
      SCALEOUT_MP_TOKEN=... scaleout-mp client enroll --api-url https://example.org --name hospital-a
    """  # noqa: D301 - click reads the \b
    from scaleout_mp.client import EdgeClient
    from scaleout_mp.config import Settings
    from scaleout_mp.supervisor.given_token import GivenToken

    address = complete_address(api_url, api_port)
    edge = EdgeClient()
    wanted = {key: value for key, value in (("name", name), ("client_id", client_id)) if value}
    given = GivenToken(Settings.from_environ())
    source = given.take(token, address, None, client=edge, given=wanted)
    if source is None or not source.access_token():
        raise TransportError(f"{address} gave no access token")
    given_id = getattr(source, "client_id", None) or client_id
    if as_json:
        click.echo(json.dumps({"client_id": given_id, "name": name}))
    else:
        click.echo(f"enrolled as {given_id}")
    return 0
