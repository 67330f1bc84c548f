"""The parts of a local network that need no network."""

from __future__ import annotations

import asyncio
import math

import grpc
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scaleout_mp.errors import AuthenticationError, ConfigError, ModelFormatError
from scaleout_mp.localnet.aggregation import FedAvg, num_examples
from scaleout_mp.localnet.event_log import EventLog
from scaleout_mp.localnet.events import ClientAssigned, HeartbeatReceived, TaskEnded
from scaleout_mp.localnet.fault_text import FaultOrder, read_fault
from scaleout_mp.localnet.faults import Fault, FaultPlan
from scaleout_mp.localnet.model_calls import serialize_chunk
from scaleout_mp.localnet.model_files import ModelFiles
from scaleout_mp.localnet.registry import ClientRegistry, ClientState
from scaleout_mp.localnet.results import SessionPlan, mean_metrics
from scaleout_mp.localnet.tasks import TaskBook, parse_object
from scaleout_mp.localnet.tokens import TokenKind, Tokens
from scaleout_mp.model import ScaleoutModel
from scaleout_mp.transport.token_api import claims
from scaleout_mp.wire import edge_pb2 as pb


class Clock:
    def __init__(self):
        self.now = 1000.0

    def __call__(self):
        return self.now


def test_access_tokens_expire_by_the_clock():
    clock = Clock()
    tokens = Tokens("secret", lifetime=60, clock=clock)
    header = f"Bearer {tokens.exchange('secret').access}"
    assert tokens.accepts(header)
    assert tokens.accepts(header.replace("Bearer", "Token"))
    clock.now += 60
    assert not tokens.accepts(header)
    assert not Tokens("secret", clock=clock).accepts(header)


def chain(tokens, kind=TokenKind.REFRESH, **options):
    """A refresh token and the one that came of it, whose access token was used."""
    first = tokens.issue(kind, **options)
    grant = tokens.exchange(first)
    assert tokens.accepts(f"Bearer {grant.access}")
    return first, grant


def test_a_refresh_token_is_replaced_when_it_is_used():
    tokens = Tokens(None, required=True)
    first, grant = chain(tokens, TokenKind.CLIENT_REFRESH, client_id="c")
    assert grant.client_id == "c"
    assert grant.refresh != first
    second = tokens.exchange(grant.refresh)
    assert tokens.accepts(f"Bearer {second.access}")


def test_a_spent_refresh_token_revokes_all_that_came_of_it():
    tokens = Tokens(None, required=True)
    first, grant = chain(tokens)
    other, _ = chain(tokens)
    with pytest.raises(AuthenticationError, match="used before"):
        tokens.exchange(first)
    with pytest.raises(AuthenticationError, match="revoked"):
        tokens.exchange(grant.refresh)
    assert not tokens.accepts(f"Bearer {grant.access}")
    # Who has another one is not concerned.
    assert tokens.exchange(tokens.issue(TokenKind.REFRESH)).access
    assert other


def test_an_answer_that_was_lost_locks_nobody_out():
    tokens = Tokens(None, required=True)
    first = tokens.issue(TokenKind.REFRESH)
    lost = tokens.exchange(first)
    again = tokens.exchange(first)
    assert tokens.exchange(again.refresh).access
    # Whoever has the lost one shows a spent token.
    with pytest.raises(AuthenticationError, match="used before"):
        tokens.exchange(lost.refresh)


def test_every_kind_is_good_for_its_own_purpose_alone():
    tokens = Tokens("secret")
    issued = {kind: tokens.issue(kind) for kind in TokenKind if kind is not TokenKind.ACCESS}
    accepted = {kind for kind, token in issued.items() if tokens.accepts(f"Bearer {token}")}
    assert accepted == {TokenKind.API_KEY}
    for kind in (TokenKind.API_KEY, TokenKind.ENROLLMENT):
        with pytest.raises(AuthenticationError, match="no refresh token"):
            tokens.exchange(issued[kind])
    for kind in (TokenKind.API_KEY, TokenKind.REFRESH):
        with pytest.raises(AuthenticationError, match="no enrollment token"):
            tokens.enroll(issued[kind], "c")
    grant = tokens.enroll(issued[TokenKind.ENROLLMENT], "c")
    assert (grant.client_id, claims(grant.refresh)["role"], claims(grant.access)["sub"]) == ("c", "client_refresh", "c")
    tokens.revoke(issued[TokenKind.API_KEY])
    assert not tokens.accepts(f"Bearer {issued[TokenKind.API_KEY]}")


def test_tokens_that_people_hand_out_end_as_well():
    clock = Clock()
    tokens = Tokens(None, required=True, clock=clock)
    token = tokens.issue(TokenKind.ENROLLMENT, lifetime=10)
    clock.now += 10
    with pytest.raises(AuthenticationError, match="expired"):
        tokens.enroll(token, "c")


def test_standing_faults_hit_a_share_and_delays_add_up():
    faults = FaultPlan(seed=1)
    faults.always("*", Fault(delay=1))
    faults.always("Send*", Fault(delay=2))
    faults.always("SendStatus", Fault(code=grpc.StatusCode.UNAVAILABLE), share=0.25, client_id="c")
    assert faults.take("Download", "c") == Fault(delay=1)
    taken = [faults.take("SendStatus", "c") for _ in range(1000)]
    assert {fault.delay for fault in taken} == {3}
    assert 200 < sum(fault.code is not None for fault in taken) < 300
    assert faults.take("SendStatus", "other") == Fault(delay=3)
    faults.add("Download", Fault(truncate=1))
    assert faults.take("Download", "c") == Fault(truncate=1, delay=1)
    with pytest.raises(ValueError, match="from 0 to 1"):
        faults.always("*", Fault(), share=20)
    faults.clear()
    assert faults.take("Download", "c") is None


@pytest.mark.parametrize(
    ("text", "order"),
    [
        (
            "Download:truncate=1000,times=3",
            FaultOrder(methods="Download", fault=Fault(truncate=1000), times=3),
        ),
        (
            "Send*:code=unavailable,share=0.2,after",
            FaultOrder(methods="Send*", fault=Fault(code=grpc.StatusCode.UNAVAILABLE, after=True), share=0.2),
        ),
        ("Upload:hang=1000,times=1", FaultOrder(methods="Upload", fault=Fault(hang=1000), times=1)),
        ("auth/refresh:status=503, delay=0.5", FaultOrder(methods="auth/refresh", fault=Fault(status=503, delay=0.5))),
    ],
)
def test_faults_are_read_as_people_write_them(text, order):
    assert read_fault(text) == order
    plan = FaultPlan(seed=1)
    order.place(plan)
    method = order.methods.replace("*", "Status")
    assert any(plan.take(method, "c") == order.fault for _ in range(100))


@pytest.mark.parametrize(
    "text",
    [
        *("", "Download", "Download:", ":delay=1", "X:what=1"),
        *("X:delay=-1", "X:delay=nan", "X:code=BAD", "X:status=200", "X:corrupt=maybe", "X:truncate=-1"),
        *("X:share=2", "X*:times=2", "X:times=2,share=0.5", "X:times=0"),
    ],
)
def test_what_is_no_fault_is_one_line(text):
    with pytest.raises(ConfigError, match="a fault is written like") as caught:
        read_fault(text)
    assert "\n" not in str(caught.value)


@given(st.text())
def test_no_text_passes_for_a_token(text):
    tokens = Tokens("secret-of-this-network")
    assert not tokens.accepts(text)
    assert not tokens.accepts(f"Bearer {text}")
    assert not tokens.accepts(f"Bearer {text}.{text}.{text}")


def test_silence_makes_a_client_lost():
    clock, gone = Clock(), []
    registry = ClientRegistry(
        EventLog(), lost_after=10, clock=clock, on_gone=lambda client_id, state: gone.append((client_id, state))
    )
    registry.connect("a")
    clock.now += 6
    registry.connect("b")
    assert registry.expire() == 4
    clock.now += 4
    assert registry.expire() == 6
    assert gone == [("a", ClientState.LOST)]
    registry.seen("b")
    registry.forgive()
    assert registry.expire() == 10
    assert registry.polls("a")
    assert [client.state for client in registry.snapshot()] == [ClientState.CONNECTED] * 2


@given(
    st.lists(
        st.tuples(st.floats(-1e3, 1e3, width=32), st.integers(1, 10_000)),
        min_size=1,
        max_size=6,
    )
)
@settings(deadline=None, max_examples=30)
def test_the_average_is_the_weighted_mean(tmp_path_factory, updates):
    folder = tmp_path_factory.mktemp("models")
    with ScaleoutModel.from_training_model([np.zeros((2, 3), np.float32)]) as current:
        average = FedAvg(current)
    for index, (value, examples) in enumerate(updates):
        path = folder / f"{index}.scm"
        # One client trains in double precision.
        dtype = np.float64 if index == 1 else np.float32
        with ScaleoutModel.from_training_model([np.full((2, 3), value, dtype)]) as model:
            model.save_to_file(path)
        average.add(path, examples)
        path.unlink()
    with average.result() as result:
        (array,) = result.get_training_model()
        expected = np.average([value for value, _ in updates], weights=[examples for _, examples in updates])
        assert array.dtype == np.float32
        np.testing.assert_allclose(array, expected, rtol=1e-4, atol=1e-2)


def average_of(tmp_path, seed, *updates):
    """The mean of (array, examples); what is refused is left out and its reason returned."""
    refused = []
    with ScaleoutModel.from_training_model([seed]) as current:
        average = FedAvg(current)
    for array, examples in updates:
        with ScaleoutModel.from_training_model([array]) as model:
            model.save_to_file(tmp_path / "update.scm")
        try:
            average.add(tmp_path / "update.scm", examples)
        except ModelFormatError as error:
            refused.append(str(error))
    with average.result() as result:
        (array,) = result.get_training_model()
        return array.copy(), refused


def test_half_precision_does_not_overflow_on_the_way(tmp_path):
    updates = [(np.full(3, value, np.float16), 70_000) for value in (1.0, 2.0, 60_000.0)]
    array, refused = average_of(tmp_path, np.zeros(3, np.float16), *updates)
    assert (array.dtype, refused) == (np.float16, [])
    assert np.array_equal(array, np.full(3, 60_003 / 3, np.float16))


@pytest.mark.parametrize("dtype", [np.uint8, np.int8, np.int64, np.uint64])
def test_whole_numbers_are_rounded_and_do_not_wrap(tmp_path, dtype):
    bounds = np.iinfo(dtype)
    low, high = np.array([3, bounds.min, bounds.max], dtype), np.array([6, bounds.min, bounds.max], dtype)
    array, refused = average_of(tmp_path, np.zeros(3, dtype), (high, 1), (low, 2))
    assert (array.dtype, refused) == (dtype, [])
    assert array.tolist() == [4, bounds.min, bounds.max]


def test_complex_weights_are_averaged(tmp_path):
    updates = (np.array([1 + 2j], np.complex64), 1), (np.array([3 - 2j], np.complex64), 1)
    array, _ = average_of(tmp_path, np.zeros(1, np.complex64), *updates)
    assert (array.dtype, array.tolist()) == (np.complex64, [2 + 0j])


def test_masks_stay_as_the_seed_has_them(tmp_path):
    seed = np.array([True, False])
    array, refused = average_of(tmp_path, seed, (~seed, 1), (~seed, 1), (np.zeros(2), 1))
    assert array.tolist() == [True, False]
    assert refused == ["its weights 0 are of type float64, not bool"]


@pytest.mark.parametrize(
    ("seed", "bad", "says"),
    [
        (np.float32, np.ones(2, np.int64), "of type int64, not float32"),
        (np.int64, np.ones(2, np.uint64), "of type uint64, not int64"),
        (np.float32, np.array([1.0, 1e300]), "not all finite"),
        (np.float32, np.array([1.0, np.nan], np.float32), "not all finite"),
        (np.float64, np.full(2, -1.7e308), "too large"),
    ],
)
def test_an_update_that_does_not_fit_changes_nothing(tmp_path, seed, bad, says):
    good = np.full(2, 1.7e308 if says == "too large" else 3).astype(seed)
    array, refused = average_of(tmp_path, np.zeros(2, seed), (good, 1), (bad, 5), (good, 2))
    assert len(refused) == 1
    assert says in refused[0]
    assert np.array_equal(array, good)


def test_a_model_of_no_numbers_has_no_average():
    with (
        ScaleoutModel.from_training_model([np.array(["a"])]) as model,
        pytest.raises(ModelFormatError, match="not numbers"),
    ):
        FedAvg(model)


@pytest.mark.parametrize("count", [0, -1, True, None, "7", math.nan, math.inf, 10**400])
def test_a_weight_that_does_not_count_is_refused(count):
    with pytest.raises(ValueError, match="above 0"):
        num_examples({"training_metadata": {"num_examples": count}})


def test_what_is_not_a_model_leaves_the_average_as_it_was(tmp_path):
    with ScaleoutModel.from_training_model([np.zeros(2, np.float32)]) as current:
        average = FedAvg(current)
    (tmp_path / "x.scm").write_bytes(b"no model")
    with pytest.raises(ModelFormatError):
        average.add(tmp_path / "x.scm", 1)
    assert average.total_examples == 0
    with pytest.raises(ValueError, match="nothing to average"):
        average.result()


@given(st.binary(max_size=300))
def test_chunks_are_serialised_as_protobuf_does(data):
    assert pb.FileChunk.FromString(serialize_chunk(data)).data == data


def test_large_chunks_are_serialised_as_protobuf_does():
    data = bytes(1 << 20)
    assert serialize_chunk(data) == pb.FileChunk(data=data).SerializeToString()


@pytest.mark.parametrize("model_id", ["", ".", "..", "a/b", "a\0b", "-x", "x" * 129, "é", "a\n"])
def test_model_ids_are_plain_names(tmp_path, model_id):
    files = ModelFiles(tmp_path)
    assert not files.has(model_id)
    with pytest.raises(ModelFormatError):
        files.path(model_id)


def test_reports_that_are_not_objects():
    assert parse_object("") == {}
    assert parse_object("[1]") == {"value": [1]}
    assert parse_object("oops") == {"text": "oops"}


def test_means_leave_out_what_is_no_number():
    assert mean_metrics([{"a": 1, "b": "x", "c": True}, {"a": 2.0, "d": 4}]) == {"a": 1.5, "d": 4.0}


def test_settings_must_be_json():
    with pytest.raises(ConfigError, match="client_settings"):
        SessionPlan(rounds=1, client_settings={"x": object()})


def test_the_log_forgets_the_oldest_and_leaves_out_what_is_quiet():
    log = EventLog(keep=2)
    log.emit(ClientAssigned(client_id="a", name="a", client_version=""))
    log.emit(ClientAssigned(client_id="b", name="b", client_version="1"))
    log.emit(HeartbeatReceived(client_id="b"))
    assert len(log) == 2
    (line,) = log.lines()
    assert line.endswith("client b assigned (version 1)")


# One step: (action, which task, which status).
_STEPS = st.lists(
    st.tuples(
        st.sampled_from(["issue", "poll", "mention", "finish", "interrupt", "time_out", "gone"]),
        st.integers(0, 3),
        st.sampled_from(["", "RUNNING", "COMPLETED", "FAILED", "INTERRUPTED"]),
    ),
    max_size=40,
)


@given(_STEPS)
@settings(deadline=None)
def test_every_task_ends_at_most_once_and_never_comes_back(steps):
    async def main():
        log = EventLog()
        book = TaskBook(log)
        tasks = []
        for action, index, status in steps:
            task = tasks[index] if index < len(tasks) else None
            if action == "issue":
                tasks.append(book.issue("c", "Custom_x"))
            elif action == "poll":
                book.poll("c", [], deliver=True)
            elif action == "gone":
                book.client_gone("c", "gone")
            elif task is None:
                continue
            elif action in {"interrupt", "time_out"}:
                book.interrupt(task, "INTERRUPTED" if action == "interrupt" else "TIMEOUT")
            else:
                done = action == "finish"
                report = pb.ActivityReport(correlation_id=task.correlation_id, status=status, done=done)
                over = task.ended.done()
                answer = book.poll("c", [report], deliver=True)
                mine = [request for request in answer if request.correlation_id == task.correlation_id]
                # After a done report its id is never named: a published client would start it as a new task.
                assert not (done and mine)
                assert not (over and any(request.status not in {"INTERRUPTED", "TIMEOUT"} for request in mine))
        ended = [event.correlation_id for event in log.of(TaskEnded)]
        assert len(ended) == len(set(ended))
        assert set(ended) == {task.correlation_id for task in tasks if task.ended.done()}
        assert {task.correlation_id for task in book.open_tasks()} == {
            task.correlation_id for task in tasks if not task.ended.done()
        }

    asyncio.run(main())
