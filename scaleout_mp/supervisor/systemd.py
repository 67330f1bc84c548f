"""What a service manager wants to hear, by sd_notify(3): that the client is up, that it lives, that it ends."""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import time
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Mapping

logger = logging.getLogger(__name__)

#: Seconds that a program may take from its start to `ready`.
_START: Final = 600.0


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
        lines = ["READY=1", "STATUS=connecting", f"MAINPID={os.getpid()}"]
        if self.watches:
            # A restart has made it longer.
            lines.append(f"WATCHDOG_USEC={round(self._watched * 1e6)}")
        self._say("\n".join(lines))

    def status(self, text: str) -> None:
        """Say what the client is at, for people."""
        self._say(f"STATUS={text}")

    def restarting(self) -> None:
        """Say that the client begins anew in the same process, and is up again when it says so."""
        # The time is for services of the type notify-reload.
        usec = time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000
        self._say(f"RELOADING=1\nMONOTONIC_USEC={usec}\nSTATUS=restarting")

    def leave_time(self) -> None:
        """Have the watchdog wait for a program that begins anew: it imports and connects before its loop turns.

        The watchdog does not look at a first start; nor would it stop looking for this one.
        """
        if self.watches:
            self._say(f"WATCHDOG=1\nWATCHDOG_USEC={round(max(self._watched, _START) * 1e6)}")

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
