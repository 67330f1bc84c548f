"""What runs around a callback in the child: the logging context and the checks of what came back."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from scaleout_mp.client.calls import CustomCall, RequestInfo, TrainCall, ValidateCall
from scaleout_mp.client.logging_context import logging_of_task
from scaleout_mp.client.values import json_value
from scaleout_mp.model import ScaleoutModel

REQUEST = RequestInfo(type="t", correlation_id="c", model_id="m", round_id="r", session_id="s")


@pytest.fixture
def model():
    with ScaleoutModel.from_training_model([np.zeros(2)]) as made:
        yield made


def examples(count):
    return {"training_metadata": {"num_examples": count}}


def test_the_callback_runs_in_the_requests_logging_context(model):
    seen = []

    def train(given, settings):
        at = logging_of_task.get()
        seen.append((at.model_id, at.round_id, at.session_id, at.step, at.request, settings))
        return given, examples(1)

    TrainCall(train)(model, {"lr": 1}, REQUEST)
    assert seen == [("m", "r", "s", 0, REQUEST, {"lr": 1})]
    assert logging_of_task.get() is None


def test_metadata_is_made_plain(model):
    meta = {**examples(np.int64(7)), "loss": np.float32(0.5), "sizes": (np.int8(1), 2), 3: np.bool_(True)}
    _, sent = TrainCall(lambda *_: (model, meta))(model, {}, REQUEST)
    assert sent == {**examples(7), "loss": 0.5, "sizes": [1, 2], "3": True}
    assert json.loads(json.dumps(sent)) == sent


@pytest.mark.parametrize(
    ("returned", "says"),
    [
        (None, "returned None; it must return a tuple"),
        (3, "a value of type int"),
        ((1, 2, 3), r"tuple \(int, int, int\)"),
        ((None, examples(1)), "None as the model"),
        (("model", examples(1)), "type str as the model"),
    ],
)
def test_a_train_callback_that_returns_the_wrong_thing(model, returned, says):
    def train(model, settings):
        return returned

    with pytest.raises((TypeError, ValueError), match=says) as caught:
        TrainCall(train)(model, {}, REQUEST)
    assert "train callback" in str(caught.value)
    assert "<locals>.train" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("count", [0, -1, "7", None, True, math.nan, math.inf, 10**400, np.float32("inf")])
def test_a_train_callback_must_say_how_many_examples(model, count):
    with pytest.raises(ValueError, match="num_examples"):
        TrainCall(lambda *_: (model, examples(count)))(model, {}, REQUEST)


def test_metadata_that_json_cannot_carry_names_its_place(model):
    with pytest.raises(TypeError, match=r"metadata\['history'\]\[1\] is of type ndarray.*tolist"):
        TrainCall(lambda *_: (model, {**examples(1), "history": [1, np.zeros(3)]}))(model, {}, REQUEST)


def test_validation_returns_plain_metrics(model):
    assert ValidateCall(lambda _: {"acc": np.float64(0.5)})(model, REQUEST) == {"acc": 0.5}


@pytest.mark.parametrize("returned", [None, 0.5, [("acc", 1)], {"m": object()}, {(1, 2): 1}])
def test_a_validate_callback_that_returns_the_wrong_thing(model, returned):
    with pytest.raises(TypeError, match="validate callback"):
        ValidateCall(lambda _: returned)(model, REQUEST)


def test_a_custom_callback_gets_the_parameters_and_returns_json():
    assert CustomCall(lambda parameters: {"got": parameters})({"x": 1}, REQUEST) == {"got": {"x": 1}}
    assert CustomCall(lambda _: None)({}, REQUEST) is None
    with pytest.raises(TypeError, match=r"custom callback .*result is of type set"):
        CustomCall(lambda _: {1})({}, REQUEST)


def test_what_is_no_finite_number_becomes_null_with_one_warning(model, caplog):
    meta = {**examples(1), "loss": math.nan, "more": [np.float32("inf"), 1.5]}
    _, sent = TrainCall(lambda *_: (model, meta))(model, {}, REQUEST)
    assert sent == {**examples(1), "loss": None, "more": [None, 1.5]}
    (record,) = caplog.records
    assert record.getMessage() == "metadata['loss'] and 1 more: not a finite number, sent as null"
    assert ValidateCall(lambda _: {"a": -math.inf})(model, REQUEST) == {"a": None}


def test_what_is_too_long_for_a_server_is_refused_in_one_line(model):
    text = "x" * (1 << 20)
    for call in (
        lambda: TrainCall(lambda *_: (model, {**examples(1), "x": text}))(model, {}, REQUEST),
        lambda: ValidateCall(lambda _: {"x": text})(model, REQUEST),
        lambda: CustomCall(lambda _: text)({}, REQUEST),
    ):
        with pytest.raises(ValueError, match=r"callback .* of 1048[56]\d\d bytes of JSON; at most 1048576") as caught:
            call()
        assert "\n" not in str(caught.value)
    assert len(CustomCall(lambda _: text[:-2])({}, REQUEST)) == (1 << 20) - 2


def test_a_structure_that_contains_itself_is_refused():
    loop = []
    loop.append(loop)
    with pytest.raises(TypeError, match="contains itself"):
        json_value(loop, path="result")
