"""The compute package that a network gives its clients, over REST. Blocking."""

from __future__ import annotations

import dataclasses
import os
import re
from email.message import Message
from typing import TYPE_CHECKING, Final

import requests

from scaleout_mp.errors import TransportError
from scaleout_mp.transport.http import REQUEST_TIMEOUT, HttpTls, endpoint, get_json, one_line, shown

if TYPE_CHECKING:
    from collections.abc import Callable

    from scaleout_mp.config import Settings

_DOWNLOAD: Final = "api/v1/packages/download"
_CHECKSUM: Final = "api/v1/packages/checksum"
_CHUNK: Final = 1 << 16
_SHA256: Final = re.compile(r"[0-9a-f]{64}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class RemoteArchive:
    """The archive that a network gives out now."""

    name: str
    #: Hex SHA-256 of its bytes.
    checksum: str


class PackageApi:
    """Asks one API for its package. Every method raises TransportError, in one line, and ConfigError."""

    def __init__(self, api_url: str, *, settings: Settings, access_token: Callable[[], str | None]) -> None:
        """`access_token` gives the token of the moment."""
        self._settings = settings
        self._tls = HttpTls.of(settings)
        self._access_token = access_token
        self._download_url = endpoint(api_url, _DOWNLOAD, prefix=settings.url_prefix)
        self._checksum_url = endpoint(api_url, _CHECKSUM, prefix=settings.url_prefix)

    def _headers(self) -> dict[str, str]:
        token = self._access_token()
        return {} if token is None else {"Authorization": f"{self._settings.auth_scheme} {token}"}

    def _open(self) -> requests.Response:
        where = shown(self._download_url)
        try:
            response = requests.get(
                self._download_url,
                headers=self._headers(),
                verify=self._tls.for_requests,
                cert=self._tls.certificate,
                timeout=REQUEST_TIMEOUT,
                allow_redirects=False,
                stream=True,
            )
        except requests.RequestException as error:
            raise TransportError(f"no answer from {where}: {one_line(str(error))}") from error
        if response.status_code != requests.codes.ok:
            response.close()
            raise TransportError(f"{where} gives no package: {response.status_code} {one_line(response.reason or '')}")
        return response

    def current(self) -> RemoteArchive:
        """Return which archive there is, without its bytes."""
        with self._open() as response:
            name = _file_name(response.headers.get("Content-Disposition", ""))
        if not name:
            raise TransportError(f"{shown(self._download_url)} names no file")
        url = requests.Request("GET", self._checksum_url, params={"name": name}).prepare().url
        assert url is not None
        answer = get_json(url, headers=self._headers(), tls=self._tls)
        checksum = answer.body.get("checksum") if isinstance(answer.body, dict) else None
        if not isinstance(checksum, str) or not _SHA256.fullmatch(checksum.lower()):
            raise TransportError(f"{shown(url)} gives no checksum: a package without one is not run")
        return RemoteArchive(name=name, checksum=checksum.lower())

    def download(self, path: str, *, most: int) -> None:
        """Write the archive's bytes to `path`, at most so many. Raises OSError as well."""
        with self._open() as response, open(path, "wb") as file:
            try:
                for chunk in response.iter_content(_CHUNK):
                    file.write(chunk)
                    if file.tell() > most:
                        raise TransportError(f"the package has more than {most} bytes")
            except requests.RequestException as error:
                raise TransportError(f"the package did not arrive whole: {one_line(str(error))}") from error
            file.flush()
            os.fsync(file.fileno())


def _file_name(disposition: str) -> str:
    """Return the plain file name that a Content-Disposition gives; empty for none."""
    message = Message()
    message["Content-Disposition"] = disposition
    name = message.get_filename() or ""
    return os.path.basename(name.replace("\\", "/"))
