"""Ask the REST API for a combiner."""

from __future__ import annotations

import dataclasses
import enum
import logging
import random
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from scaleout_mp.errors import ApiUnavailableError, AuthenticationError, ConfigError, TransportError, WrongAddressError
from scaleout_mp.transport.authorized import authorized
from scaleout_mp.transport.backoff import Backoff
from scaleout_mp.transport.http import HttpTls, endpoint, not_the_api, post_json

if TYPE_CHECKING:
    from scaleout_mp.config import Settings
    from scaleout_mp.transport.http import Answer
    from scaleout_mp.transport.tokens import TokenSource

logger = logging.getLogger(__name__)

ADD_CLIENT = "api/v1/clients/add"
TRIES = 5


class Assignment(enum.Enum):
    """What the API made of the request."""

    #: The body names the combiner.
    ASSIGNED = "assigned"
    PACKAGE_MISSING = "package_missing"
    UNAUTHORIZED = "unauthorized"
    UNMATCHED = "unmatched"
    WRONG_URL = "wrong_url"
    #: No usable answer, after retries where they make sense.
    UNKNOWN = "unknown"


@dataclasses.dataclass(frozen=True, kw_only=True)
class AssignmentAnswer:
    """The outcome of one assignment request."""

    outcome: Assignment
    #: The answer's body when the server assigned a combiner or misses a package.
    body: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    #: One line for people, for all other outcomes.
    message: str = ""


def request_assignment(
    api_url: str,
    payload: Mapping[str, Any],
    *,
    settings: Settings,
    tokens: TokenSource | None,
    backoff: Backoff | None = None,
    sleep: Callable[[float], None] = time.sleep,
    rand: Callable[[], float] = random.random,
) -> AssignmentAnswer:
    """Ask for a combiner, at most `TRIES` times while there is no answer. Blocks.

    Raises nothing that the network can cause: every failure is an outcome with one line that says what it
    was.
    """
    waits = backoff or Backoff()
    try:
        url = endpoint(api_url, ADD_CLIENT, prefix=settings.url_prefix)
    except ConfigError as error:
        return AssignmentAnswer(outcome=Assignment.WRONG_URL, message=str(error))
    failures = 0
    while True:
        try:
            return _read_answer(url, _post_authorized(url, payload, settings, tokens))
        except ApiUnavailableError as error:
            failures += 1
            if failures == TRIES:
                message = f"gave up after {TRIES} tries: {error}"
                return AssignmentAnswer(outcome=Assignment.UNKNOWN, message=message)
            wait = waits.delay(failures, rand)
            logger.warning(
                "connecting failed: %s; trying again in %.1f s (%d of %d)",
                error,
                wait,
                failures + 1,
                TRIES,
                extra={"action": "connect_retry"},
            )
            sleep(wait)
        except AuthenticationError as error:
            return AssignmentAnswer(outcome=Assignment.UNAUTHORIZED, message=str(error))
        except WrongAddressError as error:
            return AssignmentAnswer(outcome=Assignment.WRONG_URL, message=str(error))
        except (TransportError, ConfigError) as error:
            return AssignmentAnswer(outcome=Assignment.UNKNOWN, message=str(error))


def _post_authorized(url: str, payload: Mapping[str, Any], settings: Settings, tokens: TokenSource | None) -> Answer:
    def send(headers: Mapping[str, str]) -> Answer:
        # The server knows an enrolled client by the id that it gave it.
        own = {"client_id": tokens.client_id} if tokens is not None and tokens.client_id else {}
        return post_json(url, {**payload, **own}, headers=headers, tls=HttpTls.of(settings))

    return authorized(send, tokens=tokens, scheme=settings.auth_scheme)


def _read_answer(url: str, answer: Answer) -> AssignmentAnswer:
    body = answer.body if isinstance(answer.body, Mapping) else None
    if answer.page and answer.status not in {200, 404}:
        # Not the API's refusal: the token may be as good as any.
        return AssignmentAnswer(outcome=Assignment.WRONG_URL, message=not_the_api(url, answer.status))
    if answer.status == 200:
        if body is None:
            message = (
                not_the_api(url, 200)
                if answer.page
                else f"{url} answered 200, but not as a Scaleout API does: is the API's URL right?"
            )
            return AssignmentAnswer(outcome=Assignment.WRONG_URL, message=message)
        return AssignmentAnswer(outcome=Assignment.ASSIGNED, body=body)
    if answer.status == 203:
        return AssignmentAnswer(
            outcome=Assignment.PACKAGE_MISSING,
            body=body or {},
            message="the network has no compute package yet",
        )
    outcome, default = _REFUSALS.get(answer.status, (Assignment.UNKNOWN, "{url} answered " + str(answer.status)))
    return AssignmentAnswer(outcome=outcome, message=answer.message(default.format(url=url)))


_REFUSALS = {
    400: (Assignment.UNMATCHED, "the server does not take a client of this configuration"),
    401: (Assignment.UNAUTHORIZED, "the server refused the token; ask the network's owner for a new one"),
    403: (Assignment.UNAUTHORIZED, "the token does not allow to join this network"),
    404: (Assignment.WRONG_URL, "there is no Scaleout API at {url}"),
    406: (Assignment.UNMATCHED, "the server does not take a client of this configuration"),
}
