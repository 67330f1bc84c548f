"""Signatures of models: whose are trusted, and what the API keeps."""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import os
import urllib.parse
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal, Self

from scaleout_mp.errors import AuthenticationError, ConfigError, ModelSignatureError, TransportError
from scaleout_mp.model.signing import verify_digest
from scaleout_mp.transport.authorized import authorized
from scaleout_mp.transport.http import HttpTls, endpoint, get_json, post_json

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

    from scaleout_mp.config import Settings
    from scaleout_mp.model import ScaleoutModel
    from scaleout_mp.transport.calls import CombinerCalls
    from scaleout_mp.transport.http import Answer
    from scaleout_mp.transport.tokens import TokenSource

logger = logging.getLogger(__name__)

Policy = Literal["off", "warn", "require"]

SIGNATURES: Final = "api/v1/model-signatures/"
_POLICIES: Final = ("off", "warn", "require")
#: Signatures of one model that are looked at.
_MOST: Final = 100


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrustedSigners:
    """Whose signature a model needs before a task gets it.

    "require": without one it never reaches a task, and the task fails. "warn": the log says so. "off": nobody looks.
    """

    #: Public keys by signer id. A signature that names a signer is checked with that one's key, others with all.
    keys: Mapping[str, Ed25519PublicKey]
    policy: Policy = "require"

    def __post_init__(self) -> None:
        from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

        if self.policy not in _POLICIES:
            raise ConfigError(f"the policy of trusted_signers must be one of {_POLICIES}, not {self.policy!r}")
        if self.policy != "off" and not self.keys:
            raise ConfigError("trusted_signers has no key: no model would ever be trusted")
        for signer, key in self.keys.items():
            if not isinstance(key, Ed25519PublicKey):
                raise ConfigError(f"the key of signer {signer!r} must be an Ed25519PublicKey, not {type(key).__name__}")

    @classmethod
    def from_folder(cls, folder: str | os.PathLike[str], *, policy: Policy = "require") -> Self:
        """Read `<signer id>.pem` of a folder: public keys in PEM form. Raises ConfigError that names the file."""
        from cryptography.exceptions import UnsupportedAlgorithm
        from cryptography.hazmat.primitives.serialization import load_pem_public_key

        keys: dict[str, Any] = {}
        try:
            for path in sorted(Path(folder).glob("*.pem")):
                keys[path.stem] = load_pem_public_key(path.read_bytes())
        except (ValueError, UnsupportedAlgorithm) as error:
            raise ConfigError(f"trusted signers: {path} is no public key in PEM form") from error
        except OSError as error:
            raise ConfigError(f"trusted signers: {error.filename}: {error.strerror}") from error
        if not keys:
            raise ConfigError(f"trusted signers: {os.fspath(folder)} has no .pem file")
        return cls(keys=keys, policy=policy)

    def signer_of(self, model: ScaleoutModel, signatures: list[Mapping[str, Any]]) -> str | None:
        """Return whose signature a model has; None when there is none that verifies. Reads the whole model."""
        if not signatures:
            return None
        digest = model.signed_digest()
        for signature in signatures[:_MOST]:
            named = signature.get("signer_id")
            known = isinstance(named, str) and named in self.keys
            for signer, key in self.keys.items():
                if known and named != signer:
                    continue
                if verify_digest(digest, key, signature):
                    return signer
        return None


class SignatureApi:
    """The API's signatures. The calls block."""

    def __init__(self, api_url: str, *, settings: Settings, tokens: TokenSource | None) -> None:
        """Raises ConfigError when `api_url` is no URL."""
        self._url = endpoint(api_url, SIGNATURES, prefix=settings.url_prefix)
        self._settings = settings
        self._tokens = tokens

    def post(self, signature: Mapping[str, Any]) -> None:
        """Keep what `ScaleoutModel.sign` returned. Raises TransportError when the server does not take it."""
        answer = self._authorized(
            lambda headers: post_json(self._url, signature, headers=headers, tls=HttpTls.of(self._settings))
        )
        if not 200 <= answer.status < 300:
            raise self._refused(answer, "did not take the signature")

    def find(self, model_id: str) -> list[Mapping[str, Any]]:
        """Return the signatures of a model; none when the server has none. Raises TransportError."""
        url = f"{self._url}{urllib.parse.quote(model_id, safe='')}"
        answer = self._authorized(lambda headers: get_json(url, headers=headers, tls=HttpTls.of(self._settings)))
        if answer.status == 404:
            return []
        if answer.status != 200:
            raise self._refused(answer, "did not give the signature")
        found = answer.body if isinstance(answer.body, list) else [answer.body]
        # One that says it is another model's is not this one's; the digest decides about all others.
        return [one for one in found if isinstance(one, Mapping) and one.get("model_id") in (None, "", model_id)]

    def _authorized(self, send: Any) -> Answer:
        return authorized(send, tokens=self._tokens, scheme=self._settings.auth_scheme)

    def _refused(self, answer: Answer, what: str) -> TransportError:
        said = answer.message("no reason given")
        kind = AuthenticationError if answer.status in {401, 403} else TransportError
        return kind(f"the server {what} ({answer.status}: {said})")


class SignatureCheck:
    """Lets through to tasks what the policy lets through."""

    def __init__(self, signers: TrustedSigners, api: SignatureApi, calls: CombinerCalls) -> None:
        """Wait between tries as `calls` does."""
        self._signers = signers
        self._api = api
        self._calls = calls

    async def __call__(self, model: ScaleoutModel, model_id: str) -> None:
        """Raise ModelSignatureError when a required signature is not there; else return, at most with a warning.

        While the API does not answer, a required signature is waited for.
        """
        required = self._signers.policy == "require"
        try:
            found = await self._calls.retried(
                "the look for a signature",
                lambda: asyncio.to_thread(self._api.find, model_id),
                attempts=None if required else 1,
            )
        except TransportError as error:
            problem = f"whether model {model_id} is signed cannot be found out: {error}"
        else:
            signer = await asyncio.to_thread(self._signers.signer_of, model, found)
            if signer is not None:
                logger.info(
                    "model %s is signed by %s", model_id, signer, extra={"action": "model_signed", "model_id": model_id}
                )
                return
            trusted = ", ".join(self._signers.keys)
            what = "has no signature" if not found else "has no signature that verifies"
            problem = f"model {model_id} {what}; trusted signers: {trusted}"
        if required:
            raise ModelSignatureError(problem)
        logger.warning("%s", problem, extra={"action": "model_unsigned", "model_id": model_id})
