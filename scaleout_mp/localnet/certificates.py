"""Certificates for a local network, made on the spot: an authority of its own, and what it vouches for."""

from __future__ import annotations

import dataclasses
import datetime as dt
import ipaddress
import os
from pathlib import Path
from typing import TYPE_CHECKING, Final

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

if TYPE_CHECKING:
    from collections.abc import Iterable

#: What a network on this machine is called by those on it.
LOCAL_NAMES: Final = ("localhost", "127.0.0.1", "::1")
#: Clocks differ; a certificate is good from a while before it was made.
_EARLIER: Final = dt.timedelta(hours=1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class CertificateFiles:
    """A certificate and its key, as PEM files."""

    certificate: Path
    key: Path


@dataclasses.dataclass(frozen=True, kw_only=True)
class ServerTls:
    """How a local network proves itself, and what it wants of its clients."""

    own: CertificateFiles
    #: PEM file: clients must show a certificate from this authority; None: they need none.
    clients_from: Path | None = None


class CertificateAuthority:
    """Vouches for servers and clients; its own certificate is what the other side must trust."""

    def __init__(self, folder: str | os.PathLike[str], *, name: str = "scaleout-mp local network") -> None:
        """Make an authority; its files go to `folder`, the keys readable for this user alone."""
        self._folder = Path(folder)
        self._folder.mkdir(parents=True, exist_ok=True)
        self._name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        self._key = ec.generate_private_key(ec.SECP256R1())
        usage = x509.KeyUsage(
            digital_signature=True, key_cert_sign=True, crl_sign=True, content_commitment=False,
            key_encipherment=False, data_encipherment=False, key_agreement=False,
            encipher_only=False, decipher_only=False,
        )  # fmt: skip
        own = (
            _builder(self._name, self._name, self._key.public_key(), days=365)
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .add_extension(usage, critical=True)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(self._key.public_key()), critical=False)
            .sign(self._key, hashes.SHA256())
        )
        #: The authority's certificate, for those who must trust it.
        self.root = self._folder / "ca.pem"
        _write(self.root, own.public_bytes(serialization.Encoding.PEM), mode=0o644)

    def for_server(self, names: Iterable[str] = LOCAL_NAMES, *, days: float = 90) -> CertificateFiles:
        """Return a certificate for a server that is reached by these host names and addresses."""
        return self._issue("server", list(names), ExtendedKeyUsageOID.SERVER_AUTH, days)

    def for_client(self, name: str, *, days: float = 90) -> CertificateFiles:
        """Return a certificate by which a client of this name proves itself."""
        return self._issue(f"client-{name}", [name], ExtendedKeyUsageOID.CLIENT_AUTH, days)

    def _issue(self, file_name: str, names: list[str], usage: x509.ObjectIdentifier, days: float) -> CertificateFiles:
        key = ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, names[0])])
        certificate = (
            _builder(subject, self._name, key.public_key(), days=days)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(x509.SubjectAlternativeName([_general_name(name) for name in names]), critical=False)
            .add_extension(x509.ExtendedKeyUsage([usage]), critical=False)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(self._key.public_key()), critical=False)
            .sign(self._key, hashes.SHA256())
        )
        files = CertificateFiles(certificate=self._folder / f"{file_name}.pem", key=self._folder / f"{file_name}.key")
        _write(files.certificate, certificate.public_bytes(serialization.Encoding.PEM), mode=0o644)
        plain = key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
        _write(files.key, plain, mode=0o600)
        return files


def _builder(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey, *, days: float
) -> x509.CertificateBuilder:
    now = dt.datetime.now(tz=dt.UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _EARLIER)
        .not_valid_after(now + dt.timedelta(days=days))
    )


def _general_name(name: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        return x509.DNSName(name)


def _write(path: Path, data: bytes, *, mode: int) -> None:
    path.unlink(missing_ok=True)
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
    with open(fd, "wb") as file:
        file.write(data)
