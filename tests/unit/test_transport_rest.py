"""The REST side against a small HTTP server: every answer of the table, retries, tokens."""

from __future__ import annotations

import base64
import contextlib
import datetime as dt
import http.server
import json
import socket
import threading

import pytest

from scaleout_mp.config import Settings
from scaleout_mp.errors import ApiUnavailableError, AuthenticationError, ConfigError, TransportError, WrongAddressError
from scaleout_mp.transport.backoff import Backoff
from scaleout_mp.transport.http import Answer, endpoint, one_line, post_json
from scaleout_mp.transport.rest import Assignment, request_assignment
from scaleout_mp.transport.tokens import RefreshedToken, StaticToken, claims, token_source

SETTINGS = Settings()


class Server:
    """Answers each POST with the next of `answers`, the last one for ever, and keeps what it was asked."""

    def __init__(self, *answers):
        self.answers = list(answers)
        self.asked = []
        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                outer.asked.append((self.path, self.headers.get("Authorization"), body))
                status, answer = outer.answers.pop(0) if len(outer.answers) > 1 else outer.answers[0]
                data = answer.encode() if isinstance(answer, str) else json.dumps(answer).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *_):
                pass

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = False
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self):
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01})
        self._thread.start()
        return self

    def __exit__(self, *_):
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


def ask(url, *, tokens=None, settings=SETTINGS):
    waits = []
    answer = request_assignment(
        url, {"name": "n"}, settings=settings, tokens=tokens, sleep=waits.append, rand=lambda: 0.5
    )
    return answer, waits


def jwt(**said):
    body = base64.urlsafe_b64encode(json.dumps(said).encode()).rstrip(b"=").decode()
    return f"e30.{body}.c2ln"


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


def test_claims_are_read_without_verification():
    assert claims(jwt(role="client", exp=3)) == {"role": "client", "exp": 3}
    for other in ("opaque", "a.b", "a.b.c", "a.!!!.c", "e30.W10.x", f"e30.{base64.b64encode(b'3').decode()}.x"):
        assert claims(other) == {}


def test_the_kind_of_token_decides_what_is_done_with_it():
    assert isinstance(token_source(jwt(token_type="api_key"), None, settings=SETTINGS), StaticToken)
    with Server((200, {"access_token": "a"})) as server:
        for token in ("opaque", jwt(role="client"), jwt(role="client_refresh")):
            assert token_source(token, server.url, settings=SETTINGS).access_token() == "a"
    assert [path for path, *_ in server.asked] == ["/api/auth/refresh"] * 2 + ["/api/v1/clients/token"]
    assert server.asked[0][2] == {"refresh_token": "opaque", "role": "client"}
    with pytest.raises(AuthenticationError, match="enrollment"):
        token_source(jwt(role="enrollment"), "http://h", settings=SETTINGS)
    with pytest.raises(AuthenticationError, match="URL"):
        token_source("opaque", None, settings=SETTINGS)


class Clock:
    now = 1_000.0

    def __call__(self):
        return self.now


def refreshed(*answers, **options):
    """A RefreshedToken fed with bodies, its clock, and the payloads that it sends."""
    waiting = list(answers)
    sent = []

    def post(url, payload, *, headers, verify):
        sent.append(payload["refresh_token"])
        status, body = waiting.pop(0)
        return Answer(status=status, body=body, text="")

    clock = Clock()
    return RefreshedToken("r0", url="http://h/refresh", clock=clock, post=post, **options), clock, sent


def test_a_token_is_kept_until_shortly_before_its_end():
    source, clock, sent = refreshed((200, {"access": "a1", "expires_in": 100}), (200, {"access": "a2"}))
    assert source.due
    assert source.peek() is None
    assert source.access_token() == source.access_token() == "a1"
    clock.now += 69
    assert not source.due
    clock.now += 2
    assert source.due
    assert source.peek() == "a1"
    assert source.access_token() == "a2"
    # Nobody says when it ends: an hour.
    clock.now += 3569
    assert source.access_token() == "a2"
    assert sent == ["r0", "r0"]


def test_the_claim_exp_wins_over_expires_in():
    token = jwt(exp=1_200)
    source, clock, _ = refreshed((200, {"access_token": token, "expires_in": 9_999}))
    source.access_token()
    clock.now = 1_169
    assert not source.due
    clock.now = 1_200
    assert source.peek() is None


def test_a_short_lived_token_is_not_replaced_at_every_call():
    source, clock, sent = refreshed(
        (200, {"access_token": "a1", "expires_in": 10}), (200, {"access_token": "a2", "expires_in": 10})
    )
    assert {source.access_token() for _ in range(5)} == {"a1"}
    clock.now += 6
    assert source.access_token() == "a2"
    assert len(sent) == 2


def test_a_rotated_refresh_token_is_used_next_and_told():
    told = []
    source, _, sent = refreshed(
        (200, {"access_token": "a1", "refresh_token": "r1", "expires_in": 60}),
        (200, {"access_token": "a2", "expires_in": 60}),
        on_refresh=lambda *args: told.append(args),
    )
    source.access_token()
    source.refresh()
    assert sent == ["r0", "r1"]
    assert told == [
        ("a1", "r1", dt.datetime.fromtimestamp(1_060, dt.UTC)),
        ("a2", "r1", dt.datetime.fromtimestamp(1_060, dt.UTC)),
    ]


def test_a_callback_that_raises_costs_nothing_but_a_line(caplog):
    def on_refresh(*_):
        raise RuntimeError("disk full")

    source, *_ = refreshed((200, {"access_token": "a"}), on_refresh=on_refresh)
    assert source.access_token() == "a"
    assert "token_refresh_callback" in caplog.text


def test_a_refusal_is_for_good_and_an_odd_answer_is_not():
    source, *_ = refreshed((401, {"message": "revoked"}), (404, None), (200, {}))
    with pytest.raises(AuthenticationError, match="revoked"):
        source.access_token()
    with pytest.raises(WrongAddressError, match="no Scaleout API"):
        source.access_token()
    with pytest.raises(TransportError, match="no access token") as caught:
        source.access_token()
    assert not isinstance(caught.value, AuthenticationError)


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


def test_threads_that_saw_the_same_token_rejected_refresh_once():
    source, _, sent = refreshed(*[(200, {"access_token": f"a{n}"}) for n in range(3)])
    rejected = source.access_token()
    threads = [threading.Thread(target=source.refresh, kwargs={"rejected": rejected}) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(sent) == 2


def test_a_token_refused_by_the_api_is_refreshed_once():
    with Server((200, {"access_token": "a1"}), (401, {}), (200, {"access_token": "a2"}), (200, {"port": 1})) as server:
        tokens = token_source("opaque", server.url, settings=SETTINGS)
        answer, _ = ask(server.url, tokens=tokens)
    assert answer.outcome is Assignment.ASSIGNED
    assert [authorization for _, authorization, _ in server.asked] == [None, "Bearer a1", None, "Bearer a2"]


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
            post_json(f"http://127.0.0.1:{taken.getsockname()[1]}", {}, headers={}, verify=True)
