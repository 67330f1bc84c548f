"""What a service manager wants to hear, by sd_notify(3): that the client is up, that it lives, that it ends."""

from __future__ import annotations

import asyncio
import logging
import os
import socket
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

logger = logging.getLogger(__name__)


class ServiceManager:
    """The manager that started this process, if one did and wants to be told; else all of this does nothing."""

    def __init__(self, environ: Mapping[str, str] | None = None) -> None:
        """Read NOTIFY_SOCKET, WATCHDOG_USEC and WATCHDOG_PID from `environ` (default: os.environ)."""
        env = os.environ if environ is None else environ
        address = env.get("NOTIFY_SOCKET", "")
        # "@" stands for the zero byte of an abstract name; other families (vsock) are for virtual machines.
        self._address = "\0" + address[1:] if address.startswith("@") else address
        self._watched = 0.0
        usec = env.get("WATCHDOG_USEC", "")
        # Inherited by a process for which it is not meant, it bears another's id.
        if usec.isdigit() and env.get("WATCHDOG_PID", str(os.getpid())) == str(os.getpid()):
            self._watched = int(usec) / 1e6

    @property
    def watches(self) -> bool:
        """Whether the manager kills a process that does not give signs of life."""
        return bool(self._address) and self._watched > 0

    def ready(self) -> None:
        """Say that the client is up: it takes signals, and tasks as soon as the combiner answers."""
        self._say(f"READY=1\nSTATUS=connecting\nMAINPID={os.getpid()}")

    def status(self, text: str) -> None:
        """Say what the client is at, for people."""
        self._say(f"STATUS={text}")

    def stopping(self) -> None:
        """Say that the client ends."""
        self._say("STOPPING=1\nSTATUS=shutting down")

    async def give_signs_of_life(self) -> None:
        """Tell the watchdog, if there is one, that the loop that this runs on turns; for ever.

        Twice in its time, as systemd advises.
        """
        while self.watches:
            self._say("WATCHDOG=1")
            await asyncio.sleep(self._watched / 2)

    def _say(self, message: str) -> None:
        if not self._address:
            return
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sock:
                # The loop must not wait for a manager that does not read.
                sock.setblocking(False)
                sock.sendto(message.encode(), self._address)
        except OSError as error:
            logger.warning(
                "the service manager at %s cannot be told: %s", self._address, error, extra={"action": "notify_failed"}
            )
