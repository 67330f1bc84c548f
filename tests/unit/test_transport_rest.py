"""The REST side against a small HTTP server: every answer of the table, retries, tokens."""

from __future__ import annotations

import contextlib
import socket
import threading
from typing import ClassVar

import pytest
from answering import Server

from scaleout_mp.config import Settings
from scaleout_mp.errors import ApiUnavailableError, ConfigError
from scaleout_mp.transport.backoff import Backoff
from scaleout_mp.transport.http import _is_same_but_tls, endpoint, one_line, post_json
from scaleout_mp.transport.rest import Assignment, request_assignment
from scaleout_mp.transport.tokens import StaticToken, token_source

SETTINGS = Settings()


def ask(url, *, tokens=None, settings=SETTINGS):
    waits = []
    answer = request_assignment(
        url, {"name": "n"}, settings=settings, tokens=tokens, sleep=waits.append, rand=lambda: 0.5
    )
    return answer, waits


@pytest.mark.parametrize(
    ("status", "body", "outcome", "message"),
    [
        (200, {"client_id": "i", "port": 1}, Assignment.ASSIGNED, ""),
        (203, {"message": "wait"}, Assignment.PACKAGE_MISSING, "no compute package"),
        (400, {"message": "bad name"}, Assignment.UNMATCHED, "bad name"),
        (406, {"message": "version"}, Assignment.UNMATCHED, "version"),
        (401, {"message": "no such token"}, Assignment.UNAUTHORIZED, "no such token"),
        (403, "", Assignment.UNAUTHORIZED, "does not allow"),
        (404, "<html>", Assignment.WRONG_URL, "no Scaleout API at http"),
        (200, "<html>hello</html>", Assignment.WRONG_URL, "not as a Scaleout API"),
        # A web server, or a login page of a hotel: nothing of this is the token's fault.
        (401, "<!DOCTYPE html><p>Sign in", Assignment.WRONG_URL, "answered 401 with a web page"),
        (403, " \n<html>", Assignment.WRONG_URL, "is the API's URL right"),
        (400, "<html>The plain HTTP request was sent to HTTPS port", Assignment.WRONG_URL, "https:// or http://"),
        (405, "<html>", Assignment.WRONG_URL, "login page or proxy in between"),
        (418, "", Assignment.UNKNOWN, "418"),
    ],
)
def test_every_answer_is_read_at_once(status, body, outcome, message):
    with Server((status, body)) as server:
        answer, waits = ask(server.url)
    assert answer.outcome is outcome
    assert message in answer.message
    assert "\n" not in answer.message
    assert waits == []
    assert server.asked == [("/api/v1/clients/add", None, {"name": "n"})]
    if outcome is Assignment.ASSIGNED:
        assert answer.body == body


@pytest.mark.parametrize("status", [429, 500, 502, 503])
def test_a_server_in_trouble_is_tried_again_and_said_so(status, caplog):
    with Server((status, {"message": "busy"}), (status, ""), (200, {"port": 1})) as server:
        answer, waits = ask(server.url)
    assert answer.outcome is Assignment.ASSIGNED
    assert waits == [1.0, 2.0]
    warnings = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert len(warnings) == 2
    assert "busy" in warnings[0]
    assert "1.0 s (2 of 5)" in warnings[0]


def test_it_gives_up_after_five_tries():
    with Server((500, {"message": "on fire"})) as server:
        answer, waits = ask(server.url)
    assert answer.outcome is Assignment.UNKNOWN
    assert "gave up after 5 tries" in answer.message
    assert "on fire" in answer.message
    assert waits == [1.0, 2.0, 4.0, 8.0]
    assert len(server.asked) == 5


def test_nobody_listening_is_one_line():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        answer, waits = ask(f"http://127.0.0.1:{taken.getsockname()[1]}")
    assert answer.outcome is Assignment.UNKNOWN
    assert "Connection refused" in answer.message
    assert "HTTPConnectionPool" not in answer.message
    assert len(waits) == 4


def test_a_plain_server_behind_https_is_not_tried_again():
    with Server((200, {})) as server:
        answer, waits = ask(server.url.replace("http://", "https://"))
    assert answer.outcome is Assignment.UNKNOWN
    assert "TLS" in answer.message
    assert waits == []


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("http://host:1", "http://host:1/api/x"),
        ("https://host/", "https://host/api/x"),
        ("host:1", "http://host:1/api/x"),
        ("localhost:8092", "http://localhost:8092/api/x"),
        (" host/base/ ", "http://host/base/api/x"),
        ("http://[::1]:80", "http://[::1]:80/api/x"),
    ],
)
def test_urls_are_put_together(url, expected):
    assert endpoint(url, "api/x") == expected


def test_a_prefix_goes_between_host_and_path():
    assert endpoint("https://host/base", "api/x", prefix="/pre/") == "https://host/base/pre/api/x"


@pytest.mark.parametrize("url", ["", "  ", "ftp://host", "http://", "http://host:port", "unix:///run/x"])
def test_what_is_no_url_of_the_web_is_one_line(url):
    with pytest.raises(ConfigError) as caught:
        endpoint(url, "api/x")
    assert "\n" not in str(caught.value)
    assert ask(url)[0].outcome is Assignment.WRONG_URL


def test_backoff_doubles_up_to_its_cap_with_jitter():
    waits = Backoff()
    assert [waits.delay(n, lambda: 0.5) for n in (1, 2, 3, 6, 10_000)] == [1, 2, 4, 30, 30]
    assert waits.delay(1, lambda: 0.0) == 0.75
    assert waits.delay(1, lambda: 1.0) == 1.25


def test_a_token_call_that_finds_nothing_there_is_a_wrong_url():
    with Server((404, None)) as server:
        answer, waits = ask(server.url, tokens=token_source("opaque", server.url, settings=SETTINGS))
    assert (answer.outcome, waits) == (Assignment.WRONG_URL, [])


def test_a_peer_that_speaks_no_http_is_said_in_plain_letters():
    def serve():
        connection, _ = listener.accept()
        with connection:
            connection.recv(1 << 16)
            connection.sendall(b"\x00\x00\x12\x04\x1b[31m\x07SSH-2.0\r\n")

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=serve)
        thread.start()
        answer, waits = ask(f"http://127.0.0.1:{listener.getsockname()[1]}", tokens=StaticToken("k"))
        thread.join()
    assert (answer.outcome, waits) == (Assignment.WRONG_URL, [])
    assert "does not speak HTTP" in answer.message
    assert answer.message.isprintable()


def test_what_a_server_says_is_printed_as_one_plain_line():
    assert one_line("a\n b\x1b[31m\x00" + "c" * 1000) == "a b[31m" + "c" * 291


def test_a_token_refused_by_the_api_is_refreshed_once():
    with Server((200, {"access_token": "a1"}), (401, {}), (200, {"access_token": "a2"}), (200, {"port": 1})) as server:
        tokens = token_source("opaque", server.url, settings=SETTINGS)
        answer, _ = ask(server.url, tokens=tokens)
    assert answer.outcome is Assignment.ASSIGNED
    assert [authorization for _, authorization, _ in server.asked] == [None, "Bearer a1", None, "Bearer a2"]


def test_a_login_page_in_the_way_costs_no_token():
    for status in (200, 401, 403):
        with Server((status, "<html>Sign in")) as server:
            answer, waits = ask(server.url, tokens=token_source("opaque", server.url, settings=SETTINGS))
            assert (answer.outcome, waits) == (Assignment.WRONG_URL, []), status
            assert "with a web page" in answer.message
    with redirecting(302, "http://login.example/?next=x") as server:
        answer, _ = ask(server.url, tokens=StaticToken("k"))
    assert "is it this network's login page? Log in there first" in answer.message
    with Server(*[(511, "<html>")] * 5) as server:
        answer, _ = ask(server.url)
    assert answer.message.endswith("log in to this network first")


def test_a_spent_refresh_token_is_unauthorized():
    with Server((401, {"message": "expired"})) as server:
        answer, _ = ask(server.url, tokens=token_source("opaque", server.url, settings=SETTINGS))
    assert answer.outcome is Assignment.UNAUTHORIZED
    assert "refresh token" in answer.message


def test_scheme_prefix_and_certificates_come_from_the_settings():
    settings = Settings(auth_scheme="Token", url_prefix="base")
    with Server((200, {"port": 1})) as server, contextlib.ExitStack():
        ask(server.url, tokens=StaticToken("k"), settings=settings)
    assert server.asked == [("/base/api/v1/clients/add", "Token k", {"name": "n"})]


def test_no_answer_is_its_own_error():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        with pytest.raises(ApiUnavailableError, match="Connection refused"):
            post_json(f"http://127.0.0.1:{taken.getsockname()[1]}", {}, headers={})


def redirecting(status, location):
    """A server whose only answer is a redirect; returns the server and a place for the location."""

    class Redirects(Server):
        headers: ClassVar = {"Location": location}

    return Redirects((status, ""))


@pytest.mark.parametrize("status", [301, 302, 307, 308])
def test_a_redirect_to_somebody_else_is_not_followed(status):
    with Server((200, {"port": 1})) as other, redirecting(status, f"{other.url}/api/v1/clients/add") as server:
        answer, waits = ask(server.url, tokens=StaticToken("k"))
    assert (answer.outcome, waits, other.asked) == (Assignment.WRONG_URL, [], [])
    assert f"sends us to {other.url}" in answer.message


@pytest.mark.parametrize(
    ("url", "target", "status", "same"),
    [
        ("http://h/api/x", "https://h/api/x", 308, True),
        ("http://h:80/api/x", "https://h/api/x", 307, True),
        ("http://h/api/x", "https://h/api/x", 301, False),
        ("http://h/api/x", "https://other/api/x", 308, False),
        ("http://h/api/x", "https://h/login", 308, False),
        ("https://h/api/x", "http://h/api/x", 308, False),
    ],
)
def test_only_a_redirect_to_the_same_call_over_tls_is_followed(url, target, status, same):
    assert _is_same_but_tls(url, target, status) is same
