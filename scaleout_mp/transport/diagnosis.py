"""Why TLS to the combiner does not come about: gRPC says "unavailable" and leaves the rest to its log."""

from __future__ import annotations

import socket
import ssl
from typing import TYPE_CHECKING, Final

from scaleout_mp.transport.channel import proxy_options, target_of

if TYPE_CHECKING:
    from scaleout_mp.transport.channel import GrpcTls

#: Seconds for each step of a look.
_PATIENCE: Final = 5.0
#: By OpenSSL's X509_V_ERR_CERT_NOT_YET_VALID, _CERT_HAS_EXPIRED, _HOSTNAME_MISMATCH and _IP_ADDRESS_MISMATCH.
_HINTS: Final = {
    9: "is this machine's clock right?",
    10: "its owner has to renew it, unless this machine's clock is wrong",
    62: "the certificate is for another host",
    64: "the certificate is for another host",
}
_OUR_CERTIFICATE: Final = "SCALEOUT_MP_CLIENT_CERT_PATH and SCALEOUT_MP_CLIENT_KEY_PATH"


def tls_trouble(host: str, port: int, *, secure: bool, tls: GrpcTls) -> str | None:
    """Return in one line what about TLS keeps this client and the combiner apart; None when it is something else.

    Blocks: it opens a connection and shakes hands. Raises ConfigError when the certificate files are no good.
    """
    if any(name == "grpc.http_proxy" for name, _ in proxy_options(host, port, secure=secure)):
        # What is behind a proxy cannot be looked at like this.
        return None
    try:
        with socket.create_connection((host.strip("[]"), port), timeout=_PATIENCE) as connection:
            return _with_tls(connection, host, port, tls) if secure else _without_tls(connection, host, port)
    except OSError:
        # Not there at all, which gRPC says well enough.
        return None


def _with_tls(connection: socket.socket, host: str, port: int, tls: GrpcTls) -> str | None:
    address = target_of(host, port)
    shown = tls.certificate is not None
    said = ""
    try:
        with tls.context().wrap_socket(connection, server_hostname=host.strip("[]")) as secured:
            # With TLS 1.3 a server refuses a client's certificate only after the handshake; else it speaks first.
            if secured.recv(1):
                return None
    except ssl.SSLCertVerificationError as error:
        hint = _HINTS.get(
            error.verify_code, "SCALEOUT_GRPC_ROOT_CERT_PATH names the file of a root certificate of your own"
        )
        return f"the certificate of {address} is not accepted: {error.verify_message}; {hint}"
    except ssl.SSLError as error:
        if error.reason in {"WRONG_VERSION_NUMBER", "RECORD_LAYER_FAILURE"}:
            return f"the combiner at {address} does not speak TLS; SCALEOUT_GRPC_SECURE=false does without"
        if "ALERT" not in error.reason:
            return f"the TLS handshake with {address} failed: {error.reason}"
        said = " ".join(error.reason.partition("ALERT_")[2].lower().split("_"))
    except ConnectionResetError:
        pass
    if shown:
        why = f": {said}" if said else ""
        return f"the combiner at {address} does not accept the certificate of {_OUR_CERTIFICATE}{why}"
    return f"the combiner at {address} wants a client certificate; {_OUR_CERTIFICATE} name one"


def _without_tls(connection: socket.socket, host: str, port: int) -> str | None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    # Only to see whether it is TLS at all: nothing is said over this connection.
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.set_alpn_protocols(["h2"])
    try:
        with context.wrap_socket(connection, server_hostname=host.strip("[]")):
            return f"the combiner at {target_of(host, port)} speaks TLS; SCALEOUT_GRPC_SECURE=true uses it"
    except OSError:
        return None
