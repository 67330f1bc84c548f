"""A local network for a terminal: it runs until it is cancelled, or its session is over."""

from __future__ import annotations

import asyncio
import contextlib
import enum
import socket
from pathlib import Path
from typing import TYPE_CHECKING

from scaleout_mp.localnet.certificates import LOCAL_NAMES, CertificateAuthority, ServerTls
from scaleout_mp.localnet.event_log import format_line
from scaleout_mp.localnet.network import LocalNetwork
from scaleout_mp.localnet.rest import ANY_ADDRESS
from scaleout_mp.localnet.tokens import DEFAULT_LIFETIME, TokenKind

if TYPE_CHECKING:
    import os
    from collections.abc import AsyncIterator, Callable, Collection, Iterable

    from scaleout_mp.localnet.events import Event
    from scaleout_mp.localnet.fault_text import FaultOrder
    from scaleout_mp.localnet.parts import Release
    from scaleout_mp.localnet.results import SessionPlan, SessionResult
    from scaleout_mp.model import ScaleoutModel


class Tls(enum.Enum):
    """Whether a network speaks TLS."""

    OFF = "off"
    #: The network proves itself.
    ON = "on"
    #: Clients must as well.
    MUTUAL = "mutual"


async def serve(
    folder: str | os.PathLike[str],
    *,
    on_line: Callable[[str], None],
    host: str = "127.0.0.1",
    api_port: int = 0,
    combiner_port: int = 0,
    token: str | None = None,
    auth: bool = False,
    token_lifetime: float = DEFAULT_LIFETIME,
    tls: Tls = Tls.OFF,
    faults: Iterable[FaultOrder] = (),
    restart: tuple[float, float] | None = None,
    accepted_versions: Collection[str] | None = None,
    release: Release = "1.1",
    session: SessionPlan | None = None,
    seed: ScaleoutModel | None = None,
) -> SessionResult | None:
    """Run a network and say each event in a line to `on_line`, on the loop.

    With `auth` it makes tokens of each kind and says them; with TLS it makes the certificates and says where they are.
    `restart`: seconds between two outages of the combiner, and seconds that one takes.
    With a session (and its seed model): until that is over; returns its result. Without: until cancelled.
    Raises LocalNetworkError when a port is in use.
    """
    if (session is None) != (seed is None):
        raise ValueError("a session needs a seed model, and a seed model a session")

    def say(event: Event) -> None:
        if event.printed:
            on_line(format_line(event))

    network = LocalNetwork(
        folder,
        host=host,
        api_port=api_port,
        combiner_port=combiner_port,
        token=token,
        auth=auth or None,
        token_lifetime=token_lifetime,
        tls=_certificates(Path(folder) / "tls", host, tls, on_line),
        accepted_versions=accepted_versions,
        release=release,
        on_event=say,
    )
    for order in faults:
        order.place(network.faults)
    async with network, _outages(network, restart):
        on_line(f"API at {network.api_url}, combiner at {network.combiner_address}, files in {network.folder}")
        if auth:
            for kind in (TokenKind.REFRESH, TokenKind.ENROLLMENT, TokenKind.API_KEY):
                on_line(f"{kind.replace('_', ' ')} token: {network.issue_token(kind)}")
        if session is not None and seed is not None:
            return await network.run_session(session, seed)
        await asyncio.Event().wait()
    return None


def _certificates(folder: Path, host: str, tls: Tls, on_line: Callable[[str], None]) -> ServerTls | None:
    if tls is Tls.OFF:
        return None
    authority = CertificateAuthority(folder)
    names = dict.fromkeys((*LOCAL_NAMES, socket.gethostname(), *({host} - ANY_ADDRESS)))
    on_line(f"root certificate: {authority.root}, for SCALEOUT_MP_API_ROOT_CERT_PATH and SCALEOUT_GRPC_ROOT_CERT_PATH")
    if tls is Tls.MUTUAL:
        client = authority.for_client("client")
        on_line(
            f"client certificate: {client.certificate} and {client.key}, for SCALEOUT_MP_CLIENT_CERT_PATH and "
            "SCALEOUT_MP_CLIENT_KEY_PATH"
        )
    return ServerTls(own=authority.for_server(names), clients_from=authority.root if tls is Tls.MUTUAL else None)


@contextlib.asynccontextmanager
async def _outages(network: LocalNetwork, restart: tuple[float, float] | None) -> AsyncIterator[None]:
    if restart is None:
        yield
        return
    every, down = restart
    task = asyncio.create_task(network.restart_often(every=every, down=down), name="localnet-outages")
    try:
        yield
    finally:
        task.cancel()
        await asyncio.wait({task})
