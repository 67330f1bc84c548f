"""The REST side of a local network: assignment of clients and access tokens."""

from __future__ import annotations

import json
import uuid
from typing import TYPE_CHECKING, Any, Final

from scaleout_mp.errors import LocalNetworkError
from scaleout_mp.localnet.events import ClientAssigned, ClientRefused

if TYPE_CHECKING:
    from collections.abc import Collection

    from aiohttp import web

    from scaleout_mp.localnet.event_log import EventLog
    from scaleout_mp.localnet.registry import ClientRegistry
    from scaleout_mp.localnet.tokens import Tokens

#: The answer to a client that wants a compute package from a network that has none.
HTTP_PACKAGE_MISSING: Final = 203

ANY_ADDRESS: Final = frozenset({"0.0.0.0", "::", "[::]", ""})  # noqa: S104 - recognised, not bound


def import_web() -> Any:
    """Return aiohttp.web, which is an extra; LocalNetworkError says how to install it."""
    try:
        from aiohttp import web
    except ImportError:
        raise LocalNetworkError('the local network needs aiohttp: pip install "scaleout-mp[localnet]"') from None
    return web


class RestApi:
    """Serves the REST calls of PROTOCOL's table on the network's loop."""

    def __init__(
        self,
        *,
        registry: ClientRegistry,
        tokens: Tokens,
        log: EventLog,
        accepted_versions: Collection[str] | None,
    ) -> None:
        """`accepted_versions`: client versions that may join; None: all."""
        self._web = import_web()
        self._registry = registry
        self._tokens = tokens
        self._log = log
        self._accepted_versions = accepted_versions
        self._combiner_host = ""
        self._combiner_port = 0
        #: Which helper clients are told to use.
        self.helper_type = "numpyhelper"
        self._runner: web.AppRunner | None = None
        #: The port that is listened on, once started.
        self.port = 0

    async def start(self, *, host: str, port: int, combiner_host: str, combiner_port: int) -> None:
        """Listen on `port` (0: any free one) and assign clients to the combiner."""
        self._combiner_host, self._combiner_port = combiner_host, combiner_port
        app = self._web.Application()
        app.router.add_post("/api/v1/clients/add", self._add_client)
        app.router.add_post("/api/auth/refresh", self._refresh)
        app.router.add_post("/api/v1/clients/token", self._refresh)
        self._runner = self._web.AppRunner(app, access_log=None)
        await self._runner.setup()
        try:
            await self._web.TCPSite(self._runner, host, port).start()
        except OSError as error:
            await self.aclose()
            raise LocalNetworkError(f"cannot serve the API on {host}:{port}: {error.strerror}") from error
        self.port = self._runner.addresses[0][1]

    async def aclose(self) -> None:
        """Stop to listen."""
        if self._runner is not None:
            await self._runner.cleanup()
            self._runner = None

    async def _add_client(self, request: web.Request) -> web.Response:
        try:
            body = await request.json()
        except ValueError:
            body = None
        if not isinstance(body, dict):
            return self._refuse("", 400, "the request is not a JSON object")
        name = str(body.get("name") or "")
        version = str(body.get("client_version") or "")
        objection = self._objection(request, body, version)
        if objection is not None:
            return self._refuse(name, *objection)
        # Where we listen on all addresses, the one by which this client found us leads to the combiner too.
        host = self._combiner_host
        if host in ANY_ADDRESS:
            host = request.url.host or host
        client_id = str(body.get("client_id") or uuid.uuid4())
        self._registry.assign(client_id, name=name, version=version)
        self._log.emit(ClientAssigned(client_id=client_id, name=name, client_version=version))
        return self._answer(
            200,
            {
                "client_id": client_id,
                "public_hostname": host,
                "internal_hostname": host,
                "port": self._combiner_port,
                "package": body.get("package", "local"),
                "helper_type": self.helper_type,
                "grpc_secure": False,
            },
        )

    def _objection(self, request: web.Request, body: dict[str, Any], version: str) -> tuple[int, str] | None:
        """Return HTTP status and reason when the client cannot join."""
        if not self._tokens.accepts(request.headers.get("Authorization")):
            return 401, "the access token is missing, wrong or expired"
        if not isinstance(body.get("name"), str) or not body["name"]:
            return 400, "name is missing"
        if version and self._accepted_versions is not None and version not in self._accepted_versions:
            accepted = ", ".join(sorted(self._accepted_versions))
            return 406, f"client version {version} is not accepted; accepted: {accepted}"
        package = body.get("package", "local")
        if package not in {"local", "remote"}:
            return 400, f'package must be "local" or "remote", not {package!r}'
        if package == "remote":
            return HTTP_PACKAGE_MISSING, "no compute package has been set"
        return None

    async def _refresh(self, request: web.Request) -> web.Response:
        try:
            body = await request.json()
        except ValueError:
            body = None
        token = body.get("refresh_token") if isinstance(body, dict) else None
        if not isinstance(token, str) or not token:
            return self._answer(400, {"message": "refresh_token is missing"})
        if not self._tokens.accepts_refresh(token):
            return self._answer(401, {"message": "the refresh token is not valid"})
        return self._answer(200, {"access_token": self._tokens.issue(), "expires_in": self._tokens.lifetime})

    def _refuse(self, name: str, status: int, reason: str) -> web.Response:
        self._log.emit(ClientRefused(name=name, http_status=status, reason=reason))
        return self._answer(status, {"message": reason})

    def _answer(self, status: int, body: dict[str, Any]) -> web.Response:
        response: web.Response = self._web.Response(
            status=status, text=json.dumps(body), content_type="application/json"
        )
        return response
