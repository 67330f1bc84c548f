"""The REST side of a local network: assignment of clients, their tokens, signatures of models."""

from __future__ import annotations

import asyncio
import hashlib
import json
import ssl
import uuid
from typing import TYPE_CHECKING, Any, Final

from scaleout_mp.errors import AuthenticationError, LocalNetworkError
from scaleout_mp.localnet.events import ClientAssigned, ClientEnrolled, ClientRefused, TokenRefreshed, TokenRefused

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Collection
    from pathlib import Path

    from aiohttp import web

    from scaleout_mp.localnet.certificates import ServerTls
    from scaleout_mp.localnet.faults import FaultPlan
    from scaleout_mp.localnet.parts import NetworkParts
    from scaleout_mp.localnet.tokens import Grant

    Behaviour = Callable[[web.Request], Awaitable[web.StreamResponse]]

#: The answer to a client that wants a compute package from a network that has none.
HTTP_PACKAGE_MISSING: Final = 203

#: Seconds that clients have to close their connections, and between two looks.
_HANG_UP_WITHIN: Final = 0.2
_LOOK_AGAIN: Final = 0.01

ANY_ADDRESS: Final = frozenset({"0.0.0.0", "::", "[::]", ""})  # noqa: S104 - recognised, not bound


def import_web() -> Any:
    """Return aiohttp.web, which is of an extra; LocalNetworkError says how to install it."""
    try:
        from aiohttp import web
    except ImportError:
        raise LocalNetworkError('the local network needs aiohttp: pip install "aiohttp>=3.11"') from None
    return web


class RestApi:
    """Serves the REST calls of PROTOCOL's table on the network's loop."""

    def __init__(
        self,
        parts: NetworkParts,
        *,
        faults: FaultPlan,
        accepted_versions: Collection[str] | None,
        tls: ServerTls | None = None,
    ) -> None:
        """`accepted_versions`: client versions that may join; None: all. `tls`: serve https."""
        self._web = import_web()
        self._faults = faults
        self._tls = tls
        #: Model signatures as they were posted, by model id.
        self._signatures: dict[str, dict[str, Any]] = {}
        self._registry = parts.registry
        self._tokens = parts.tokens
        self._log = parts.log
        self._accepted_versions = accepted_versions
        self._combiner_host = ""
        self._combiner_port = 0
        #: Archive of the compute package that clients may get; None: there is none.
        self.package: Path | None = None
        #: Which helper clients are told to use.
        self.helper_type = "numpyhelper"
        self._runner: web.AppRunner | None = None
        #: The port that is listened on, once started.
        self.port = 0

    async def start(self, *, host: str, port: int, combiner_host: str, combiner_port: int) -> None:
        """Listen on `port` (0: any free one) and assign clients to the combiner."""
        self._combiner_host, self._combiner_port = combiner_host, combiner_port
        app = self._web.Application()
        for path, behaviour in (
            ("/api/v1/clients/add", self._add_client),
            ("/api/v1/clients/enroll", self._enroll),
            ("/api/auth/refresh", self._refresh),
            ("/api/v1/clients/token", self._refresh),
            ("/api/v1/model-signatures/", self._post_signature),
        ):
            name = path.strip("/").removeprefix("api/").removeprefix("v1/")
            app.router.add_post(path, self._faulty(name, behaviour))
        app.router.add_get("/api/v1/model-signatures/{model_id}", self._faulty("model-signatures", self._get_signature))
        app.router.add_get("/api/v1/packages/download", self._faulty("packages/download", self._give_package))
        app.router.add_get("/api/v1/packages/checksum", self._faulty("packages/checksum", self._give_checksum))
        self._runner = self._web.AppRunner(app, access_log=None)
        await self._runner.setup()
        try:
            context = None if self._tls is None else server_context(self._tls)
            await self._web.TCPSite(self._runner, host, port, ssl_context=context).start()
        except OSError as error:
            await self.aclose()
            raise LocalNetworkError(f"cannot serve the API on {host}:{port}: {error.strerror}") from error
        self.port = self._runner.addresses[0][1]

    async def aclose(self) -> None:
        """Stop to listen."""
        runner, self._runner = self._runner, None
        if runner is None:
            return
        if self._tls is not None and runner.server is not None:
            await _hang_up(runner.server)
        await runner.cleanup()

    async def _add_client(self, request: web.Request) -> web.Response:
        body = await _object_of(request)
        if not body:
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
                "grpc_secure": self._tls is not None,
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
        if package == "remote" and self.package is None:
            return HTTP_PACKAGE_MISSING, "no compute package has been set"
        return None

    async def _give_package(self, request: web.Request) -> web.StreamResponse:
        if not self._tokens.accepts(request.headers.get("Authorization")):
            return self._answer(401, {"message": "the access token is missing, wrong or expired"})
        if self.package is None:
            return self._answer(404, {"message": "no compute package has been set"})
        headers = {"Content-Disposition": f'attachment; filename="{self.package.name}"'}
        return self._web.FileResponse(self.package, headers=headers)  # type: ignore[no-any-return]

    async def _give_checksum(self, request: web.Request) -> web.Response:
        if not self._tokens.accepts(request.headers.get("Authorization")):
            return self._answer(401, {"message": "the access token is missing, wrong or expired"})
        if self.package is None or request.query.get("name") != self.package.name:
            return self._answer(404, {"message": "there is no package of that name"})
        return self._answer(200, {"checksum": hashlib.sha256(self.package.read_bytes()).hexdigest()})

    async def _refresh(self, request: web.Request) -> web.Response:
        body = await _object_of(request)
        token = body.get("refresh_token")
        if not isinstance(token, str) or not token:
            return self._answer(400, {"message": "refresh_token is missing"})
        try:
            grant = self._tokens.exchange(token)
        except AuthenticationError as error:
            return self._refuse_token(error)
        self._log.emit(TokenRefreshed(client_id=grant.client_id, rotated=grant.refresh is not None))
        return self._answer(200, self._granted(grant))

    async def _enroll(self, request: web.Request) -> web.Response:
        body = await _object_of(request)
        client_id = str(body.get("client_id") or uuid.uuid4())
        name = str(body.get("name") or client_id)
        try:
            grant = self._tokens.enroll(request.headers.get("Authorization", "").partition(" ")[2], client_id)
        except AuthenticationError as error:
            return self._refuse_token(error)
        self._log.emit(ClientEnrolled(client_id=client_id, name=name))
        return self._answer(200, {"client_id": client_id, **self._granted(grant)})

    def _granted(self, grant: Grant) -> dict[str, Any]:
        rotated = {} if grant.refresh is None else {"refresh_token": grant.refresh}
        return {"access_token": grant.access, "expires_in": self._tokens.lifetime, **rotated}

    def _refuse_token(self, error: AuthenticationError) -> web.Response:
        self._log.emit(TokenRefused(reason=str(error)))
        return self._answer(401, {"message": str(error)})

    async def _post_signature(self, request: web.Request) -> web.Response:
        if not self._tokens.accepts(request.headers.get("Authorization")):
            return self._answer(401, {"message": "the access token is missing, wrong or expired"})
        body = await _object_of(request)
        fields = {name: body.get(name) for name in ("model_id", "algorithm", "signature")}
        missing = [name for name, value in fields.items() if not isinstance(value, str) or not value]
        if missing:
            return self._answer(400, {"message": f"{', '.join(missing)} missing"})
        self._signatures[str(fields["model_id"])] = body
        return self._answer(201, body)

    async def _get_signature(self, request: web.Request) -> web.Response:
        if not self._tokens.accepts(request.headers.get("Authorization")):
            return self._answer(401, {"message": "the access token is missing, wrong or expired"})
        found = self._signatures.get(request.match_info["model_id"])
        return self._answer(404, {"message": "no signature"}) if found is None else self._answer(200, found)

    def _faulty(self, name: str, behaviour: Behaviour) -> Behaviour:
        """Return a behaviour with the faults that are planned for calls of this name."""

        async def call(request: web.Request) -> web.StreamResponse:
            fault = self._faults.take(name, "")
            if fault is None:
                return await behaviour(request)
            await asyncio.sleep(fault.delay)
            status = 503 if fault.status is None and fault.code is not None else fault.status
            if not fault.after:
                return await behaviour(request) if status is None else self._answer(status, {"message": fault.details})
            await behaviour(request)
            # As a proxy answers that lost touch with the server.
            return self._answer(status or 504, {"message": fault.details})

        return call

    def _refuse(self, name: str, status: int, reason: str) -> web.Response:
        self._log.emit(ClientRefused(name=name, http_status=status, reason=reason))
        return self._answer(status, {"message": reason})

    def _answer(self, status: int, body: dict[str, Any]) -> web.Response:
        response: web.Response = self._web.Response(
            status=status, text=json.dumps(body), content_type="application/json"
        )
        return response


async def _hang_up(server: web.Server) -> None:
    """End the connections that clients leave open.

    With TLS that takes several turns of the loop, and a loop that ends in between leaks them.
    """
    loop = asyncio.get_running_loop()
    deadline = loop.time() + _HANG_UP_WITHIN
    while server.connections and loop.time() < deadline:  # noqa: ASYNC110 - aiohttp tells nobody
        await asyncio.sleep(_LOOK_AGAIN)
    for connection in server.connections:
        if connection.transport is not None:
            connection.transport.abort()
    # One turn for the connection, one for what is below it.
    await asyncio.sleep(_LOOK_AGAIN)


async def _object_of(request: web.Request) -> dict[str, Any]:
    """Return the JSON object that was sent; empty when it was none."""
    try:
        body = await request.json()
    except ValueError:
        return {}
    return body if isinstance(body, dict) else {}


def server_context(tls: ServerTls) -> ssl.SSLContext:
    """Return what serves TLS with these files; LocalNetworkError when they are no good."""
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    try:
        context.load_cert_chain(tls.own.certificate, tls.own.key)
        if tls.clients_from is not None:
            context.load_verify_locations(tls.clients_from)
            context.verify_mode = ssl.CERT_REQUIRED
    except OSError as error:
        raise LocalNetworkError(f"cannot use the certificates at {tls.own.certificate}: {error}") from error
    return context
