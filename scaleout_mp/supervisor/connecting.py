"""The steps before the first poll: the combiner's address from the API, and the version check."""

from __future__ import annotations

import asyncio
import json
import logging
import socket
import uuid
from typing import TYPE_CHECKING, Any, cast

from scaleout_mp.client import ConnectToApiResult, GrpcConnectionOptions
from scaleout_mp.errors import CallError, ConfigError, TransportError
from scaleout_mp.supervisor.state import IN_MEMORY, KeptId
from scaleout_mp.transport.calls import may_pass
from scaleout_mp.transport.rest import Assignment
from scaleout_mp.transport.signatures import TrustedSigners
from scaleout_mp.transport.tokens import token_folder
from scaleout_mp.wire import methods

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from scaleout_mp.client import EdgeClient
    from scaleout_mp.config import Settings
    from scaleout_mp.transport.calls import CombinerCalls
    from scaleout_mp.transport.rest import AssignmentAnswer
    from scaleout_mp.transport.signatures import Policy
    from scaleout_mp.wire import edge_pb2 as pb

logger = logging.getLogger(__name__)

#: Tries of the version check while the combiner does not answer.
_VERSION_TRIES = 5

_RESULTS = {
    Assignment.PACKAGE_MISSING: ConnectToApiResult.ComputePackageMissing,
    Assignment.UNAUTHORIZED: ConnectToApiResult.UnAuthorized,
    Assignment.UNMATCHED: ConnectToApiResult.UnMatchedConfig,
    Assignment.WRONG_URL: ConnectToApiResult.IncorrectUrl,
    Assignment.UNKNOWN: ConnectToApiResult.UnknownError,
}


def signers_of(settings: Settings) -> TrustedSigners | None:
    """Return whom the environment trusts; None when it names nobody. Raises ConfigError."""
    if settings.trusted_signers_path is None:
        return None
    return TrustedSigners.from_folder(settings.trusted_signers_path, policy=cast("Policy", settings.signature_policy))


def assignment_payload(client: EdgeClient, given: Mapping[str, Any] | None, settings: Settings) -> dict[str, Any]:
    """Return the request's body: what the user gave, with the rest filled in."""
    payload: dict[str, Any] = {
        "name": client.name or socket.gethostname(),
        "client_id": client.client_id or str(uuid.uuid4()),
        "preferred_combiner": None,
        "package": "local",
        **{key: value for key, value in (given or {}).items() if value is not None},
    }
    if settings.check_version:
        payload.setdefault("client_version", settings.client_version)
    return payload


def propose_kept_id(kept: KeptId | None, payload: dict[str, Any], url: str, *, root: str | None) -> KeptId | None:
    """Ask, in `payload`, for the id that a client without one had before; `kept`: as an earlier try returned it.

    None when nothing is kept, or cannot be.
    """
    if root == IN_MEMORY:
        return None
    try:
        kept = kept or KeptId.take(str(payload["name"]), url.rstrip("/"), root=root)
    except OSError as error:
        logger.warning("the client has another id with each start: %s", error, extra={"action": "id_not_kept"})
        return None
    payload["client_id"] = kept.value or payload["client_id"]
    return kept


def token_slot(slot: KeptId | None, payload: Mapping[str, Any], url: str, *, settings: Settings) -> KeptId | None:
    """Return what tells an enrolled client that keeps no id from others with the same token.

    `slot`: as an earlier try returned it. None when no tokens are kept, or none can be, which the cache says.
    """
    if slot is not None or not settings.persist_tokens:
        return slot
    try:
        return KeptId.take(str(payload["name"]), url.rstrip("/"), root=str(token_folder(settings)))
    except OSError:
        return None


def read_assignment(
    answer: AssignmentAnswer, payload: Mapping[str, Any], client: EdgeClient, kept: KeptId | None = None
) -> tuple[ConnectToApiResult, Any]:
    """Return what `connect_to_api` returns; when a combiner was assigned, `client` gets its id and name.

    The id goes into `kept`, too.
    """
    if answer.outcome is Assignment.ASSIGNED:
        try:
            options = GrpcConnectionOptions.from_dict(answer.body)
        except ConfigError as error:
            return _refused(ConnectToApiResult.UnknownError, f"{error}: is the API's URL right?")
        client_id = str(answer.body.get("client_id") or payload["client_id"])
        client.set_client_id(client_id)
        if kept is not None:
            kept.keep(client_id)
        client.set_name(str(payload.get("name") or client_id))
        logger.info(
            "assigned to the combiner at %s:%d", options.host, options.port, extra={"action": "client_assigned"}
        )
        return ConnectToApiResult.Assigned, options
    result = _RESULTS[answer.outcome]
    if answer.outcome is Assignment.PACKAGE_MISSING:
        logger.info("%s", answer.message, extra={"action": "package_missing"})
        return result, dict(answer.body)
    return _refused(result, answer.message)


def _refused(result: ConnectToApiResult, message: str) -> tuple[ConnectToApiResult, str]:
    logger.error("cannot connect: %s", message, extra={"action": "connect_failed", "result": result.name})
    return result, message


async def check_version(
    calls: CombinerCalls, *, client_id: str, version: str, trouble: Callable[[], str | None] = lambda: None
) -> None:
    """Ask the combiner whether it takes a client of this version.

    When the first try fails, `trouble()` is asked on a thread for a reason why no other can succeed.
    Raises TransportError, in one line, when the combiner does not take it, or does not answer after some tries.
    """

    async def ask(attempts: int) -> pb.Response:
        return await calls.announce(
            "VersionCheck", client_id=client_id, parameters={"client-version": version}, attempts=attempts
        )

    try:
        try:
            answer = await ask(1)
        except CallError as error:
            if not error.transient:
                raise
            if reason := await asyncio.to_thread(trouble):
                raise TransportError(reason) from error
            wait = calls.delay(1)
            calls.link.failed(methods.ANNOUNCE.name, error, wait)
            await calls.sleep(wait)
            answer = await ask(_VERSION_TRIES - 1)
    except CallError as error:
        if error.code == "UNIMPLEMENTED":
            # A server that does not check takes every version.
            return
        raise
    try:
        said = json.loads(answer.parameters) if answer.parameters else {}
    except ValueError as error:
        raise TransportError(f"the combiner's answer to the version check is not JSON: {error}") from error
    if isinstance(said, dict) and not said.get("success", True):
        raise TransportError(
            f"the server (version {said.get('version', 'unknown')}) does not take clients of version {version}"
            f"{': ' + answer.response if answer.response else ''}; "
            "SCALEOUT_MP_CLIENT_VERSION sets the version that is presented"
        )


async def greeted(calls: CombinerCalls, *, client_id: str) -> bool:
    """Announce the client, however long it takes; return whether the combiner wants to be told of clients at all.

    Raises CallError and AuthenticationError when it refuses this one.
    """
    failures = 0
    while True:
        try:
            await calls.announce("Connect", client_id=client_id, attempts=None)
        except CallError as error:
            if error.code == "UNIMPLEMENTED":
                logger.info("the combiner takes no announcements", extra={"action": "announce_lacking"})
                return False
            if not may_pass(error):
                raise
            # A combiner in trouble; a client that has to be started by hand once more would be worse.
            failures += 1
            wait = calls.delay(failures)
            calls.link.failed(methods.ANNOUNCE.name, error, wait)
            await calls.sleep(wait)
        else:
            return True
