"""What the environment says: the variables that users of Scaleout Edge already set."""

from __future__ import annotations

import dataclasses
import os
from typing import TYPE_CHECKING, Any, Final

from scaleout_mp.config.limits import parse_size
from scaleout_mp.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Mapping

#: The client version that is presented to servers, which may refuse one that they do not know.
PROTOCOL_VERSION = "1.0.7"

#: The variable of each field of `Settings`.
VARIABLES: Final[Mapping[str, str]] = {
    "auth_scheme": "SCALEOUT_AUTH_SCHEME",
    "verify_api_certificates": "SCALEOUT_CONNECT_API_SECURE",
    "grpc_secure": "SCALEOUT_GRPC_SECURE",
    "grpc_root_cert_path": "SCALEOUT_GRPC_ROOT_CERT_PATH",
    "api_root_cert_path": "SCALEOUT_MP_API_ROOT_CERT_PATH",
    "client_cert_path": "SCALEOUT_MP_CLIENT_CERT_PATH",
    "client_key_path": "SCALEOUT_MP_CLIENT_KEY_PATH",
    "token_cache_dir": "SCALEOUT_TOKEN_CACHE_DIR",
    "persist_tokens": "SCALEOUT_PERSIST_TOKENS",
    "url_prefix": "SCALEOUT_CUSTOM_URL_PREFIX",
    "announce": "SCALEOUT_GRACEFUL_GRPC_HANDLING",
    "check_version": "SCALEOUT_CHECK_COMPATIBILITY",
    "report_status": "SCALEOUT_CLIENT_STATUS_REPORTING",
    "send_telemetry": "SCALEOUT_CLIENT_SEND_TELEMETRY",
    "polling_interval": "SCALEOUT_CLIENT_TASK_POLLING_INTERVAL",
    "model_cache_dir": "SCALEOUT_MODEL_CACHE_DIR",
    "state_dir": "SCALEOUT_MP_STATE_DIR",
    "trusted_signers_path": "SCALEOUT_MP_TRUSTED_SIGNERS",
    "signature_policy": "SCALEOUT_MP_SIGNATURES",
    "max_model_size": "SCALEOUT_MP_MAX_MODEL_SIZE",
    "client_version": "SCALEOUT_MP_CLIENT_VERSION",
}

_TRUE = frozenset({"1", "true", "yes", "on"})
_FALSE = frozenset({"0", "false", "no", "off"})


def _flag(environ: Mapping[str, str], name: str, *, default: bool) -> bool:
    value = environ.get(name)
    if value is None or value == "":
        return default
    if value.lower() in _TRUE:
        return True
    if value.lower() in _FALSE:
        return False
    raise ConfigError(f"{name} must be true or false, not {value!r}")


def _optional_flag(environ: Mapping[str, str], name: str) -> bool | None:
    return _flag(environ, name, default=True) if environ.get(name) else None


def _seconds(environ: Mapping[str, str], name: str, *, default: float) -> float:
    value = environ.get(name)
    if value is None or value == "":
        return default
    try:
        seconds = float(value)
    except ValueError:
        seconds = -1.0
    if not 0 < seconds < float("inf"):
        raise ConfigError(f"{name} must be a number of seconds above 0, not {value!r}")
    return seconds


def _size(environ: Mapping[str, str], name: str, *, default: int) -> int:
    value = environ.get(name)
    if not value:
        return default
    size = parse_size(value, field=name)
    if size < 1:
        raise ConfigError(f"{name} must be above 0 bytes, not {value!r}")
    return size


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """Effective settings of a client. `from_environ` reads them from `VARIABLES`, which each field names as well."""

    #: SCALEOUT_AUTH_SCHEME
    auth_scheme: str = "Bearer"
    #: SCALEOUT_CONNECT_API_SECURE: verify the certificates of the REST API.
    verify_api_certificates: bool = True
    #: SCALEOUT_GRPC_SECURE: TLS to the combiner; None: what the server says, else TLS.
    grpc_secure: bool | None = None
    #: SCALEOUT_GRPC_ROOT_CERT_PATH: PEM file.
    grpc_root_cert_path: str | None = None
    #: SCALEOUT_MP_API_ROOT_CERT_PATH: PEM file for the REST API; None: what requests uses, REQUESTS_CA_BUNDLE included.
    api_root_cert_path: str | None = None
    #: SCALEOUT_MP_CLIENT_CERT_PATH and SCALEOUT_MP_CLIENT_KEY_PATH: PEM files, for servers that want to know clients.
    client_cert_path: str | None = None
    client_key_path: str | None = None
    #: SCALEOUT_TOKEN_CACHE_DIR; None: `tokens` in the user's state folder.
    token_cache_dir: str | None = None
    #: SCALEOUT_PERSIST_TOKENS: keep refresh tokens that the server replaced.
    persist_tokens: bool = True
    #: SCALEOUT_CUSTOM_URL_PREFIX: path put between host and /api.
    url_prefix: str = ""
    #: SCALEOUT_GRACEFUL_GRPC_HANDLING: announce Connect and Disconnect.
    announce: bool = True
    #: SCALEOUT_CHECK_COMPATIBILITY: ask the server whether it accepts our version.
    check_version: bool = True
    #: SCALEOUT_CLIENT_STATUS_REPORTING
    report_status: bool = True
    #: SCALEOUT_CLIENT_SEND_TELEMETRY: memory_usage and cpu_usage of the machine.
    send_telemetry: bool = True
    #: SCALEOUT_CLIENT_TASK_POLLING_INTERVAL, seconds.
    polling_interval: float = 5.0
    #: SCALEOUT_MODEL_CACHE_DIR: folder of the models that are staged, `<model_id>.scm`.
    model_cache_dir: str = ".scaleout/model_cache"
    #: SCALEOUT_MP_STATE_DIR: what waits for the server is kept below it; None: in the user's state folder;
    #: ":memory:": nowhere, and lost when the client dies.
    state_dir: str | None = None
    #: SCALEOUT_MP_TRUSTED_SIGNERS: folder of public keys, `<signer id>.pem`; None: signatures are not looked at.
    trusted_signers_path: str | None = None
    #: SCALEOUT_MP_SIGNATURES: "off", "warn" or "require"; what becomes of a model that none of them signed.
    signature_policy: str = "require"
    #: SCALEOUT_MP_MAX_MODEL_SIZE: bytes, or a size like "2GiB"; larger models are not taken from the server.
    max_model_size: int = 16 << 30
    #: SCALEOUT_MP_CLIENT_VERSION: the client version presented to the server.
    client_version: str = PROTOCOL_VERSION

    def __post_init__(self) -> None:
        if (self.client_cert_path is None) != (self.client_key_path is None):
            raise ConfigError(
                "SCALEOUT_MP_CLIENT_CERT_PATH and SCALEOUT_MP_CLIENT_KEY_PATH go together: set both or none"
            )

    @property
    def client_certificate(self) -> tuple[str, str] | None:
        """The files of the client's certificate and key, when there are any."""
        if self.client_cert_path is None or self.client_key_path is None:
            return None
        return self.client_cert_path, self.client_key_path

    @classmethod
    def from_environ(cls, environ: Mapping[str, str] | None = None, **overrides: Any) -> Settings:
        """Read the settings from `environ` (default: os.environ); keyword arguments win.

        Raises ConfigError that names the variable.
        """
        env = os.environ if environ is None else environ
        values: dict[str, Any] = {
            "auth_scheme": env.get(VARIABLES["auth_scheme"]) or "Bearer",
            "verify_api_certificates": _flag(env, VARIABLES["verify_api_certificates"], default=True),
            "grpc_secure": _optional_flag(env, VARIABLES["grpc_secure"]),
            "grpc_root_cert_path": env.get(VARIABLES["grpc_root_cert_path"]) or None,
            "api_root_cert_path": env.get(VARIABLES["api_root_cert_path"]) or None,
            "client_cert_path": env.get(VARIABLES["client_cert_path"]) or None,
            "client_key_path": env.get(VARIABLES["client_key_path"]) or None,
            "token_cache_dir": env.get(VARIABLES["token_cache_dir"]) or None,
            "persist_tokens": _flag(env, VARIABLES["persist_tokens"], default=True),
            "url_prefix": env.get(VARIABLES["url_prefix"], ""),
            "announce": _flag(env, VARIABLES["announce"], default=True),
            "check_version": _flag(env, VARIABLES["check_version"], default=True),
            "report_status": _flag(env, VARIABLES["report_status"], default=True),
            "send_telemetry": _flag(env, VARIABLES["send_telemetry"], default=True),
            "polling_interval": _seconds(env, VARIABLES["polling_interval"], default=5.0),
            "model_cache_dir": env.get(VARIABLES["model_cache_dir"]) or cls.model_cache_dir,
            "state_dir": env.get(VARIABLES["state_dir"]) or None,
            "trusted_signers_path": env.get(VARIABLES["trusted_signers_path"]) or None,
            "signature_policy": env.get(VARIABLES["signature_policy"]) or "require",
            "max_model_size": _size(env, VARIABLES["max_model_size"], default=16 << 30),
            "client_version": env.get(VARIABLES["client_version"]) or PROTOCOL_VERSION,
        }
        return cls(**{**values, **overrides})
