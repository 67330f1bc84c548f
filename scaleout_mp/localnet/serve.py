"""A local network for a terminal: it runs until it is cancelled, or its session is over."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from scaleout_mp.localnet.event_log import format_line
from scaleout_mp.localnet.network import LocalNetwork

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Collection

    from scaleout_mp.localnet.events import Event
    from scaleout_mp.localnet.results import SessionPlan, SessionResult
    from scaleout_mp.model import ScaleoutModel


async def serve(
    folder: str | os.PathLike[str],
    *,
    on_line: Callable[[str], None],
    host: str = "127.0.0.1",
    api_port: int = 0,
    combiner_port: int = 0,
    token: str | None = None,
    accepted_versions: Collection[str] | None = None,
    session: SessionPlan | None = None,
    seed: ScaleoutModel | None = None,
) -> SessionResult | None:
    """Run a network and say each event in a line to `on_line`, on the loop.

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
        accepted_versions=accepted_versions,
        on_event=say,
    )
    async with network:
        on_line(f"API at {network.api_url}, combiner at {network.combiner_address}, files in {network.folder}")
        if session is not None and seed is not None:
            return await network.run_session(session, seed)
        await asyncio.Event().wait()
    return None
