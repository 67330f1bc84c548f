"""Tokens: kinds, expiry, rotation, and what is kept of them on disk."""

from __future__ import annotations

import base64
import datetime as dt
import fcntl
import os
import stat
import subprocess
import sys
import threading

import pytest
from answering import Server, jwt

from scaleout_mp.config import Settings, state_folder
from scaleout_mp.errors import ApiUnavailableError, AuthenticationError, ConfigError, TransportError, WrongAddressError
from scaleout_mp.transport.http import Answer
from scaleout_mp.transport.token_api import TokenApi, TokenSet, claims
from scaleout_mp.transport.token_cache import TokenCache
from scaleout_mp.transport.tokens import RefreshedToken, StaticToken, token_source

SETTINGS = Settings()


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
    with pytest.raises(AuthenticationError, match="URL"):
        token_source("opaque", None, settings=SETTINGS)


class Clock:
    now = 1_000.0

    def __call__(self):
        return self.now


def refreshed(*answers, given="r0", clock=None, **options):
    """A RefreshedToken fed with bodies, its clock, and what it sends."""
    waiting = list(answers)
    sent = []

    def post(url, payload, *, headers, tls):
        sent.append(payload.get("refresh_token") or headers["Authorization"])
        status, body = waiting.pop(0)
        return Answer(status=status, body=body)

    clock = clock or Clock()
    api = TokenApi("http://h", settings=SETTINGS, clock=clock, post=post)
    return RefreshedToken(given, api, clock=clock, **options), clock, sent


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


def test_threads_that_saw_the_same_token_rejected_refresh_once():
    source, _, sent = refreshed(*[(200, {"access_token": f"a{n}"}) for n in range(3)])
    rejected = source.access_token()
    threads = [threading.Thread(target=source.refresh, kwargs={"rejected": rejected}) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(sent) == 2


ENROLLMENT = jwt(role="enrollment")


def test_an_enrollment_token_enrolls_once_and_is_not_needed_again():
    told = []
    source, clock, sent = refreshed(
        (200, {"client_id": "c1", "access_token": "a1", "refresh_token": "r1", "expires_in": 60}),
        (200, {"access_token": "a2", "refresh_token": "r2"}),
        given=ENROLLMENT,
        on_refresh=lambda *args: told.append(args[:2]),
    )
    assert source.client_id == ""
    assert source.access_token() == "a1"
    assert source.client_id == "c1"
    clock.now += 31
    assert source.access_token() == "a2"
    assert source.client_id == "c1"
    assert sent == [f"Bearer {ENROLLMENT}", "r1"]
    assert told == [("a1", "r1"), ("a2", "r2")]


def test_enrolling_tells_what_the_user_gave_and_refreshes_where_enrolled_clients_do():
    with Server(
        (200, {"client_id": "c1", "access_token": "a1", "refresh_token": "opaque", "expires_in": 0.01}),
        (200, {"access_token": "a2"}),
    ) as server:
        source = token_source(ENROLLMENT, server.url, settings=SETTINGS, name="edge", client_id=None)
        source.access_token()
        source.refresh()
    assert server.asked == [
        ("/api/v1/clients/enroll", f"Bearer {ENROLLMENT}", {"name": "edge"}),
        ("/api/v1/clients/token", None, {"refresh_token": "opaque", "role": "client"}),
    ]


@pytest.mark.parametrize(
    ("answer", "error", "says"),
    [
        ((401, {"message": "expired"}), AuthenticationError, "refused the enrollment token .401: expired"),
        ((404, None), WrongAddressError, "no Scaleout API"),
        ((200, {"access_token": "a"}), TransportError, "no client id"),
        ((200, {"client_id": "c"}), TransportError, "no access token"),
    ],
)
def test_enrolling_that_fails_is_one_line(answer, error, says):
    source, *_ = refreshed(answer, given=ENROLLMENT)
    with pytest.raises(error, match=says) as caught:
        source.access_token()
    assert "\n" not in str(caught.value)
    assert ENROLLMENT not in str(caught.value)


def test_a_clock_that_is_ahead_does_not_make_every_call_a_refresh(caplog):
    token = jwt(iat=0, exp=600)
    source, clock, sent = refreshed((200, {"access_token": token}))
    assert source.access_token() == source.access_token() == token
    clock.now += 500
    assert source.access_token() == token
    assert sent == ["r0"]
    assert "is it ahead?" in caplog.text


@pytest.mark.parametrize(
    "body",
    [
        # Milliseconds, and a token that never ends.
        {"access_token": jwt(exp=1_764_000_000_000)},
        {"access_token": jwt(exp=10**400)},
        {"access_token": "a", "expires_in": float("inf")},
        {"access_token": "a", "expires_in": float("nan")},
    ],
)
def test_a_token_whose_end_is_no_date_is_used_and_told_all_the_same(body):
    told = []
    source, clock, _ = refreshed((200, body), on_refresh=lambda *said: told.append(said))
    assert source.access_token() == body["access_token"]
    assert not source.due
    (_, _, when) = told[0]
    assert clock.now < when.timestamp() < clock.now + 11 * 365 * 86400


@pytest.mark.parametrize("token", ["two words", "a\nX-Evil: 1", "caf\u00e9", "\ud800", "", 3])
def test_what_no_header_can_carry_is_no_access_token(token):
    source, *_ = refreshed((200, {"access_token": token}))
    with pytest.raises(TransportError, match="no access token"):
        source.access_token()


def test_a_token_from_a_file_may_end_in_a_line_break_and_no_other_oddity():
    assert token_source(" " + jwt(token_type="api_key") + "\n", None, settings=SETTINGS).access_token().endswith("c2ln")
    for odd in ("two words", "caf\u00e9", "a\nb"):
        with pytest.raises(AuthenticationError, match="no token") as caught:
            token_source(odd, "http://h", settings=SETTINGS)
        assert odd not in str(caught.value)


# What is kept


@pytest.fixture
def cache(tmp_path):
    return TokenCache(tmp_path / "tokens", "http://h", "r0")


def rotating(*names, lives=60):
    return [(200, {"access_token": f"a{name}", "refresh_token": f"r{name}", "expires_in": lives}) for name in names]


def test_a_rotated_token_is_on_disk_before_anybody_gets_the_access_token(cache):
    seen = []
    source, _, _ = refreshed(*rotating(1), cache=cache, on_refresh=lambda *_: seen.append(cache.load()))
    assert source.access_token() == "a1"
    assert seen[0].refresh == "r1"


def test_the_next_run_goes_on_where_the_last_one_was(cache):
    first, clock, _ = refreshed(*rotating(1, 2), cache=cache)
    first.access_token()
    clock.now += 31
    first.access_token()
    # The access token is still good: nothing is asked.
    second, _, sent = refreshed(cache=cache, clock=clock)
    assert (second.access_token(), sent) == ("a2", [])
    clock.now += 31
    third, _, sent = refreshed(*rotating(3), cache=cache, clock=clock)
    assert (third.access_token(), sent) == ("a3", ["r2"])


def test_an_enrolled_client_stays_the_same_client_after_a_restart(cache):
    answer = {"client_id": "c1", "access_token": "a1", "refresh_token": "r1", "expires_in": 60}
    first, clock, _ = refreshed((200, answer), given=ENROLLMENT, cache=cache)
    first.access_token()
    clock.now += 61
    second, _, sent = refreshed((200, {"access_token": "a2"}), given=ENROLLMENT, cache=cache, clock=clock)
    assert (second.access_token(), second.client_id, sent) == ("a2", "c1", ["r1"])


def test_files_are_for_this_user_alone_whatever_was_there(cache, tmp_path, caplog):
    before = os.umask(0)
    try:
        refreshed(*rotating(1), cache=cache)[0].access_token()
        cache.path.chmod(0o644)
        assert cache.load().refresh == "r1"
    finally:
        os.umask(before)
    assert {stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "tokens").iterdir()} == {0o600}
    assert "could be read by others" in caplog.text
    assert stat.S_IMODE((tmp_path / "tokens").stat().st_mode) == 0o700
    assert sorted(path.suffix for path in (tmp_path / "tokens").iterdir()) == [".json", ".lock"]


def test_two_processes_with_one_token_never_show_a_spent_one(cache):
    one, clock, sent_one = refreshed(*rotating(1, 3), cache=cache)
    two, _, sent_two = refreshed(*rotating(4), cache=cache, clock=clock)
    assert one.access_token() == two.access_token() == "a1"
    # The combiner refuses a1; one replaces it, two finds out on disk.
    one.refresh(rejected="a1")
    two.refresh(rejected="a1")
    assert (one.access_token(), two.access_token()) == ("a3", "a3")
    two.refresh(rejected="a3")
    assert (sent_one, sent_two) == (["r0", "r1"], ["r3"])


def test_kept_tokens_that_the_server_no_longer_takes_give_way_to_the_one_given(cache, caplog):
    first, clock, _ = refreshed(*rotating(1), cache=cache)
    first.access_token()
    clock.now += 61
    second, _, sent = refreshed((401, {"message": "unknown"}), *rotating(5), cache=cache, clock=clock)
    assert second.access_token() == "a5"
    assert sent == ["r1", "r0"]
    assert "kept from an earlier run" in caplog.text
    # Within a run it is not tried: a server that sees a spent token again may revoke all that came of it.
    clock.now += 61
    third, _, sent = refreshed(*rotating(6), (401, {}), cache=cache, clock=clock)
    third.access_token()
    with pytest.raises(AuthenticationError):
        third.refresh()
    assert sent == ["r5", "r6"]


@pytest.mark.parametrize(
    "content",
    [
        *(
            b"",
            b"{",
            b"[]",
            b"null",
            b'{"version": 2}',
            b'{"version": 1, "access_token": 3}',
            b"\xff" * 10,
            b"[" * 100_000,
        ),
        *(
            b"%b%b}"
            % (b'{"version":1,"access_token":"a","refresh_token":"r","client_id":"","obtained_at":0,"expires_at":', end)
            for end in (b"NaN", b"1e999", b"1" + b"0" * 400)
        ),
    ],
)
def test_a_broken_file_is_ignored_and_replaced(cache, content, caplog):
    cache.path.parent.mkdir()
    cache.path.write_bytes(content)
    source, _, sent = refreshed(*rotating(1), cache=cache)
    assert (source.access_token(), sent) == ("a1", ["r0"])
    assert "is ignored" in caplog.text
    assert cache.load().refresh == "r1"


def test_a_folder_in_the_files_place_costs_a_line(cache, caplog):
    cache.path.mkdir(parents=True)
    assert refreshed(*rotating(1), cache=cache)[0].access_token() == "a1"
    assert "is ignored" in caplog.text


def test_a_link_in_the_files_place_is_not_followed(cache, tmp_path):
    cache.path.parent.mkdir()
    target = tmp_path / "target"
    target.write_text("mine")
    cache.path.symlink_to(target)
    refreshed(*rotating(1), cache=cache)[0].access_token()
    assert target.read_text() == "mine"
    assert not cache.path.is_symlink()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can make files of another user")
def test_a_file_of_another_user_is_not_believed(cache, caplog):
    refreshed(*rotating(1), cache=cache)[0].access_token()
    os.chown(cache.path, 12345, 12345)
    assert cache.load() is None
    assert "another user" in caplog.text


def test_a_folder_that_cannot_be_made_costs_one_warning(tmp_path, caplog):
    (tmp_path / "file").write_text("")
    cache = TokenCache(tmp_path / "file" / "tokens", "r0")
    source, clock, sent = refreshed(*rotating(1, 2), cache=cache)
    source.access_token()
    clock.now += 31
    assert source.access_token() == "a2"
    assert sent == ["r0", "r1"]
    warnings = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert len(warnings) == 1
    assert "SCALEOUT_TOKEN_CACHE_DIR" in warnings[0]


def test_a_full_disk_costs_a_warning_and_keeps_what_was_there(cache, monkeypatch, caplog):
    source, clock, _ = refreshed(*rotating(1, 2), cache=cache)
    source.access_token()

    def full(fd):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    clock.now += 31
    assert source.access_token() == "a2"
    assert cache.load().refresh == "r1"
    assert "No space left" in caplog.text
    assert not list(cache.path.parent.glob("*.part"))


def test_a_process_that_holds_on_to_the_lock_is_not_waited_for_for_ever(tmp_path):
    now = [0.0]

    def sleep(seconds):
        now[0] += seconds

    cache = TokenCache(tmp_path, "r0", sleep=sleep, clock=lambda: now[0])
    source, _, sent = refreshed(*rotating(1), cache=cache)
    with open(cache.path.with_suffix(".lock"), "w") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(ApiUnavailableError, match="another process"):
            source.access_token()
        assert sent == []
    assert source.access_token() == "a1"


KILLED = """
import os, sys
from pathlib import Path
from scaleout_mp.transport import token_cache
from scaleout_mp.transport.token_api import TokenSet
cache = token_cache.TokenCache(Path(sys.argv[1]), "http://h", "r0")
real, left = os.fsync, [int(sys.argv[2])]
def fsync(fd):
    left[0] -= 1
    if left[0] < 0:
        os.kill(os.getpid(), 9)
    real(fd)
os.fsync = fsync
for n in (1, 2):
    cache.store(TokenSet(access=f"a{n}", refresh=f"r{n}", obtained_at=0, expires_at=1))
"""


@pytest.mark.parametrize(("syncs", "expected"), [(0, None), (1, "r1"), (2, "r1"), (3, "r2")])
def test_a_kill_at_any_moment_of_writing_leaves_one_whole_set(cache, syncs, expected):
    cache.path.parent.mkdir()
    done = subprocess.run([sys.executable, "-c", KILLED, cache.path.parent, str(syncs)], check=False)
    assert done.returncode == -9
    kept = cache.load()
    assert (kept and kept.refresh) == expected
    # What it left beside is in nobody's way.
    cache.store(TokenSet(access="a", refresh="r9", obtained_at=0, expires_at=1))
    assert cache.load().refresh == "r9"


def test_what_is_kept_goes_by_address_token_and_enrolling_client(tmp_path):
    settings = Settings(token_cache_dir=str(tmp_path))
    enrolled = {"client_id": "c", "access_token": "a", "refresh_token": "r"}
    with Server((200, enrolled)) as server:
        for token, name in (("t1", "n"), ("t2", "n"), (ENROLLMENT, "n"), (ENROLLMENT, "m"), ("t1", "other")):
            token_source(token, server.url, settings=settings, name=name).access_token()
        token_source("t1", server.url + "/", settings=settings).access_token()
    assert len(list(tmp_path.glob("*.json"))) == 4
    assert len(server.asked) == 4


def test_nothing_is_kept_when_the_user_does_not_want_it(tmp_path):
    with Server((200, {"access_token": "a"})) as server:
        settings = Settings(token_cache_dir=str(tmp_path), persist_tokens=False)
        token_source("t1", server.url, settings=settings).access_token()
    assert list(tmp_path.iterdir()) == []


def test_tokens_go_to_the_users_state_folder(monkeypatch, tmp_path):
    assert state_folder({"XDG_STATE_HOME": "/s"}).as_posix() == "/s/scaleout_mp"
    monkeypatch.setenv("HOME", str(tmp_path))
    for env in ({}, {"XDG_STATE_HOME": ""}, {"XDG_STATE_HOME": "relative"}):
        assert state_folder(env) == tmp_path / ".local/state/scaleout_mp"
    with Server((200, {"access_token": "a"})) as server:
        token_source("t1", server.url, settings=SETTINGS).access_token()
    assert len(list((state_folder() / "tokens").glob("*.json"))) == 1


def test_no_repr_shows_a_token():
    tokens = TokenSet(access="secret1", refresh="secret2", obtained_at=0, expires_at=1)
    answer = Answer(status=200, body={"access_token": "secret1"}, secrets=("secret2",))
    source, *_ = refreshed(given="secret2")
    assert "secret" not in f"{tokens} {answer} {source} {StaticToken('secret')} {TokenCache(state_folder(), 'secret')}"


def test_settings_say_what_goes_together():
    with pytest.raises(ConfigError, match="both or none"):
        Settings(client_cert_path="c.pem")
    env = {"SCALEOUT_TOKEN_CACHE_DIR": "/t", "SCALEOUT_PERSIST_TOKENS": "no"}
    assert (Settings.from_environ(env).token_cache_dir, Settings.from_environ(env).persist_tokens) == ("/t", False)


def test_an_enrollment_made_ahead_is_the_first_clients_that_starts(tmp_path):
    ahead = TokenCache(tmp_path, "given")
    clients = [TokenCache(tmp_path, "given", slot, spare=ahead.path) for slot in ("0", "1")]
    assert [client.load() for client in clients] == [None, None]
    with ahead.locked():
        ahead.store(TokenSet(access="a", refresh="r", obtained_at=1, expires_at=2, client_id="c"))
    assert [client.load() is not None for client in (clients[1], clients[0], clients[1])] == [True, False, True]
