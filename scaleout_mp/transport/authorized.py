"""Calls of the REST API that need an access token."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from scaleout_mp.transport.http import Answer
    from scaleout_mp.transport.tokens import TokenSource


def authorized(send: Callable[[Mapping[str, str]], Answer], *, tokens: TokenSource | None, scheme: str) -> Answer:
    """Call `send(headers)` with the token; on 401 refresh it once and send again: it may have been revoked early.

    Blocks. Without `tokens` there is no authorization header at all. Raises what refreshing raises.
    """
    if tokens is None:
        return send({})
    token = tokens.access_token()
    answer = send({"Authorization": f"{scheme} {token}"})
    # A page is not the API's word.
    if answer.status == 401 and not answer.page and tokens.can_refresh:
        tokens.refresh(rejected=token)
        answer = send({"Authorization": f"{scheme} {tokens.access_token()}"})
    return answer
