"""What connecting gives back: how the API answered, and where the combiner is."""

from __future__ import annotations

import enum
from typing import TYPE_CHECKING, Any, Self

from scaleout_mp.config.checks import shown
from scaleout_mp.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Mapping


class ConnectToApiResult(enum.Enum):
    """How the REST API answered `EdgeClient.connect_to_api`."""

    #: The second value is the GrpcConnectionOptions of the combiner.
    Assigned = 0
    #: The network has no compute package yet; try again in a few seconds.
    ComputePackageMissing = 1
    #: The token was refused.
    UnAuthorized = 2
    #: The server does not take a client of this configuration; the second value says why.
    UnMatchedConfig = 3
    #: There is no Scaleout API at this address.
    IncorrectUrl = 4
    #: No usable answer, after retries where they make sense.
    UnknownError = 5


class GrpcConnectionOptions:
    """Where the combiner is, and what the server says about itself.

    `grpc_secure` is None when the server does not say whether it speaks TLS. An empty `host` means
    `internal_hostname`.
    """

    def __init__(
        self,
        host: str,
        port: int,
        internal_hostname: str = "",
        package: str = "",
        helper_type: str = "",
        *,
        grpc_secure: bool | None = None,
    ) -> None:
        self.host = host or internal_hostname
        self.port = port
        self.internal_hostname = internal_hostname
        self.package = package
        self.helper_type = helper_type
        self.grpc_secure = grpc_secure

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> Self:
        """Read the body of a 200 answer. Raises ConfigError when host or port are missing, or are none."""
        secure = config.get("grpc_secure")
        options = cls(
            host=_host(config.get("public_hostname")),
            port=_port(config.get("port")),
            internal_hostname=_host(config.get("internal_hostname")),
            package=config.get("package") or "",
            helper_type=config.get("helper_type") or "",
            grpc_secure=secure if isinstance(secure, bool) else None,
        )
        if not options.host:
            raise ConfigError("the server's answer names no combiner: public_hostname and internal_hostname are empty")
        return options

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, GrpcConnectionOptions):
            return NotImplemented
        return vars(self) == vars(other)

    def __hash__(self) -> int:
        return hash((self.host, self.port))

    def __repr__(self) -> str:
        return f"GrpcConnectionOptions(host={self.host!r}, port={self.port!r}, grpc_secure={self.grpc_secure!r})"


def _host(value: Any) -> str:
    if not value:
        return ""
    if not isinstance(value, str) or not value.isprintable() or any(sign in value for sign in " /@"):
        raise ConfigError(f"the server's answer has no usable combiner host: {shown(value)}")
    return value


def _port(value: Any) -> int:
    try:
        port = int(value)
    except (TypeError, ValueError, OverflowError):
        port = 0
    if not 0 < port < 1 << 16:
        raise ConfigError(f"the server's answer has no usable combiner port: {shown(value)}")
    return port
