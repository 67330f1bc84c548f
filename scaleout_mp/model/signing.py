"""Ed25519 signatures over a model's contents."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey


def sign_digest(digest: bytes, private_key: Ed25519PrivateKey, signer_id: str | None) -> dict[str, Any]:
    """Return the signature of a content digest, as base64 beside the algorithm's name."""
    signature = base64.b64encode(private_key.sign(digest)).decode("ascii")
    signed: dict[str, Any] = {"algorithm": "ed25519", "signature": signature}
    if signer_id is not None:
        signed["signer_id"] = signer_id
    return signed


def verify_digest(digest: bytes, public_key: Ed25519PublicKey, signature: str | bytes | Mapping[str, Any]) -> bool:
    """Say whether a signature is that of the digest; anything malformed is not."""
    from cryptography.exceptions import InvalidSignature

    encoded: object = signature
    if isinstance(signature, Mapping):
        if signature.get("algorithm", "ed25519") != "ed25519":
            return False
        encoded = signature.get("signature")
    if not isinstance(encoded, str | bytes):
        return False
    try:
        text = encoded.decode("ascii") if isinstance(encoded, bytes) else encoded
        # Without line ends, as it may have in a file.
        public_key.verify(base64.b64decode("".join(text.split()), validate=True), digest)
    except (InvalidSignature, binascii.Error, ValueError):
        return False
    return True
