"""Where the client belongs, and as whom: what `connect_to_api` and `init_grpchandler` found, for all who call there."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from scaleout_mp.client import published
from scaleout_mp.errors import ConfigError, NotConnectedError, ScaleoutError, TransportError
from scaleout_mp.supervisor import connecting
from scaleout_mp.supervisor.blocking import run_blocking
from scaleout_mp.supervisor.given_token import GivenToken
from scaleout_mp.transport.backoff import Backoff
from scaleout_mp.transport.calls import CombinerCalls
from scaleout_mp.transport.channel import CallCredentials, GrpcTls, open_channel, proxy_of
from scaleout_mp.transport.diagnosis import tls_trouble
from scaleout_mp.transport.link import LinkWatch
from scaleout_mp.transport.rest import Assignment, AssignmentAnswer, request_assignment
from scaleout_mp.transport.signatures import SignatureApi, SignatureCheck
from scaleout_mp.transport.tokens import enrolls
from scaleout_mp.transport.transfer import ModelTransfer

if TYPE_CHECKING:
    from collections.abc import Callable

    from scaleout_mp.client import ConnectToApiResult, EdgeClient, GrpcConnectionOptions
    from scaleout_mp.config import Settings
    from scaleout_mp.model import ScaleoutModel
    from scaleout_mp.supervisor.state import KeptId
    from scaleout_mp.transport.signatures import TrustedSigners


class Connection:
    """Address, token and settings of one client's way to its network; holds no open channel itself."""

    def __init__(self, settings: Settings, *, signers: TrustedSigners | None, state_dir: str | None) -> None:
        """`state_dir`: where ids are kept; None: where they always are."""
        self._settings = settings
        #: Whose signature a model needs; None: nobody's.
        self.signers = signers
        self._state_dir = state_dir
        self._token = GivenToken(settings)
        self._api_url: str | None = None
        self._kept_id: KeptId | None = None
        #: Of an enrolled client whose id is kept nowhere else.
        self._slot: KeptId | None = None
        self._options: GrpcConnectionOptions | None = None

    @property
    def known(self) -> bool:
        """Whether there is a combiner."""
        return self._options is not None

    def require_options(self) -> GrpcConnectionOptions:
        """Return where the combiner is. Raises NotConnectedError before `ask_combiner`."""
        if self._options is None:
            raise NotConnectedError
        return self._options

    def require_network(self) -> str:
        """Return what tells this network from others: the API's address, or the combiner's when it was never asked.

        Raises NotConnectedError before `ask_combiner`.
        """
        options = self.require_options()
        return (self._api_url or f"{options.host}:{options.port}").rstrip("/")

    def access_token(self) -> str | None:
        """Return the access token that is in use, refreshed where needed; None without one."""
        return None if self._token.source is None else self._token.source.access_token()

    # Finding the combiner

    def ask_api(
        self,
        client: EdgeClient,
        url: str,
        json: dict[str, Any] | None,
        token: str | None,
        on_refresh: Callable[..., None] | None,
    ) -> tuple[ConnectToApiResult, Any]:
        """Ask the REST API for a combiner; blocks. Returns what `EdgeClient.connect_to_api` returns."""
        self._api_url = url
        payload = connecting.assignment_payload(client, json, self._settings)
        if not (client.client_id or (json or {}).get("client_id")):
            self._kept_id = connecting.propose_kept_id(self._kept_id, payload, url, root=self._state_dir)
            if token and enrolls(token) and self._kept_id is None:
                # The server gives the id, and tells clients by their tokens: no other may have those meanwhile.
                self._slot = connecting.token_slot(self._slot, payload, url, settings=self._settings)
        held = self._kept_id or self._slot
        try:
            tokens = self._token.take(
                token, url, on_refresh, client=client, given=json, slot="" if held is None else held.slot
            )
            answer = request_assignment(url, payload, settings=self._settings, tokens=tokens)
        except ConfigError as error:
            answer = AssignmentAnswer(outcome=Assignment.WRONG_URL, message=str(error))
        except ScaleoutError as error:
            answer = AssignmentAnswer(outcome=Assignment.UNAUTHORIZED, message=str(error))
        result, given = connecting.read_assignment(answer, payload, client, self._kept_id)
        return published.as_known_to(client, result), given

    def ask_combiner(
        self,
        client: EdgeClient,
        config: GrpcConnectionOptions,
        token: str | None,
        url: str | None,
        on_refresh: Callable[..., None] | None,
    ) -> None:
        """Keep where the combiner is and ask it whether it takes this client; blocks.

        Raises TransportError, which says in one line which combiner will not do and why, and ConfigError when `config`
        is none.
        """
        config = published.options_from(config)
        try:
            self._token.take(token, url, on_refresh, client=client)
            self._api_url = url or self._api_url
            self._options = config
            if self._settings.check_version:
                run_blocking(lambda: self._check_version(client))
        except ScaleoutError as error:
            self._options = None
            tls = "on" if self._secure(config) else "off"
            way = proxy_of(config.host, config.port, secure=self._secure(config))
            where = f"{config.host}:{config.port} (TLS {tls}{f', through the proxy {way}' if way else ''})"
            raise TransportError(f"cannot use the combiner at {where}: {error}") from error

    async def _check_version(self, client: EdgeClient) -> None:
        # Somebody waits at a terminal: each failed try is said.
        calls = self.open_calls(client, backoff=Backoff(), link=LinkWatch(repeat_level=logging.WARNING))
        try:
            await connecting.check_version(
                calls,
                client_id=client.client_id or "",
                version=self._settings.client_version,
                trouble=self._tls_trouble,
            )
        finally:
            await calls.aclose()

    def _tls_trouble(self) -> str | None:
        options = self.require_options()
        return tls_trouble(options.host, options.port, secure=self._secure(options), tls=GrpcTls.of(self._settings))

    def _secure(self, options: GrpcConnectionOptions) -> bool:
        if self._settings.grpc_secure is not None:
            return self._settings.grpc_secure
        return True if options.grpc_secure is None else options.grpc_secure

    # Using it

    def open_calls(
        self, client: EdgeClient, *, backoff: Backoff | None = None, link: LinkWatch | None = None
    ) -> CombinerCalls:
        """Open a channel on the running loop, for calls in the name of `client`. Raises NotConnectedError."""
        options = self.require_options()
        channel = open_channel(options.host, options.port, secure=self._secure(options), tls=GrpcTls.of(self._settings))
        credentials = CallCredentials(
            client_id=client.client_id or "",
            name=client.name or client.client_id or "",
            tokens=self._token.source,
            scheme=self._settings.auth_scheme,
        )
        return CombinerCalls(channel, credentials, backoff=backoff, link=link)

    def signature_api(self) -> SignatureApi:
        """Return where signatures are kept. Raises ConfigError before the API's address is known."""
        if not self._api_url:
            raise ConfigError("signatures need the API's URL: call connect_to_api, or give init_grpchandler the url")
        return SignatureApi(self._api_url, settings=self._settings, tokens=self._token.source)

    def make_transfer(self, calls: CombinerCalls) -> ModelTransfer:
        """Return what moves models over `calls`, and checks whose they are. Raises ConfigError."""
        check = None
        if self.signers is not None and self.signers.policy != "off":
            check = SignatureCheck(self.signers, self.signature_api(), calls)
        return ModelTransfer(calls, max_size=self._settings.max_model_size, check=check)

    async def download(self, client: EdgeClient, model_id: str) -> ScaleoutModel:
        """Download a model on a channel of its own: the loop of `run` may not exist yet, or not any more."""
        calls = self.open_calls(client)
        try:
            return await self.make_transfer(calls).download(model_id)
        finally:
            await calls.aclose()
