"""Parts of `scaleout-mp run`: what it understands, how it calls, what becomes of results."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path

import job_programs
import numpy as np
import pytest

from scaleout_mp import ConfigError, EndReason, ScaleoutModel
from scaleout_mp.cli.job_output import check_output, keep_result
from scaleout_mp.cli.job_view import JsonView, PlainView
from scaleout_mp.cli.run import EXIT_CODES, EXIT_USAGE, parse_setting, parse_target
from scaleout_mp.client.target import Target
from scaleout_mp.errors import TargetError
from scaleout_mp.task import MetricRecord, TaskState

TESTS = str(Path(__file__).parents[1])


def target(function, module="job_programs", *, is_file=False):
    return Target(module=module, is_file=is_file, function=function, folder=TESTS)


@pytest.fixture(autouse=True)
def same_search_path(monkeypatch):
    import sys

    monkeypatch.setattr(sys, "path", list(sys.path))


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("epochs=3", 3),
        ("rate=0.1", 0.1),
        ("flag=true", True),
        ("none=null", None),
        ('names=["a", "b"]', ["a", "b"]),
        ("name=plain text", "plain text"),
        ('text="3"', "3"),
        ("empty=", ""),
        ("formula=a=b", "a=b"),
    ],
)
def test_settings_are_json_or_else_strings(text, value):
    assert parse_setting(text) == (text.partition("=")[0], value)


@pytest.mark.parametrize("text", ["epochs", "=3", " =3"])
def test_a_setting_without_a_name_or_a_value_is_refused(text):
    with pytest.raises(ConfigError, match="say NAME=VALUE"):
        parse_setting(text)


def test_what_names_a_function():
    file = Path(job_programs.__file__)
    assert parse_target("package.module:function").module == "package.module"
    assert parse_target("module:Class.method").function == "Class.method"
    named = parse_target(f"{file}:train")
    assert (named.module, named.is_file, named.folder) == (str(file), True, str(file.parent))


@pytest.mark.parametrize(
    "text",
    ["module", "module:", ":function", "a b:f", "module:1f", "module:f()", "nowhere.py:f", "./nowhere:f", "a-b:f"],
)
def test_what_does_not(text):
    with pytest.raises(ConfigError):
        parse_target(text)


@pytest.mark.parametrize(
    ("function", "model", "settings", "result"),
    [
        ("custom", None, {"a": 1}, {"a": 1}),
        ("custom", None, {}, {}),
        ("add", None, {"a": 1}, {"sum": 3}),
        ("add", None, {"a": 1, "b": 5}, {"sum": 6}),
        ("validate", [np.full(3, 2.0)], {}, {"mean": 2.0}),
    ],
)
def test_how_functions_are_called(function, model, settings, result):
    given = None if model is None else ScaleoutModel.from_training_model(model)
    assert target(function)(given, settings) == result


def test_a_method_of_a_class_is_called_without_an_instance():
    returned = target("Jobs.arrays")(None, {})
    assert {name: array.tolist() for name, array in returned.items()} == {
        "zeros": [0.0] * 3,
        "ones": [[1.0] * 2] * 2,
    }


def test_a_model_and_settings_go_to_a_train_callback(monkeypatch):
    logged = []

    class Task:
        def log_metric(self, metrics, step):
            logged.append(step)

    monkeypatch.setattr(job_programs, "current_task", Task)
    model = ScaleoutModel.from_training_model([np.zeros(2)])
    trained, meta = target("train")(model, {"epochs": 3})
    assert meta["settings"] == {"epochs": 3}
    assert logged == [0, 1, 2]
    assert trained.get_training_model()[0].sum() == 2
    logged.clear()
    assert target("train_slowly")(model, {"epochs": 2}) == 2
    assert logged == [0, 1]


@pytest.mark.parametrize(
    ("function", "module", "settings", "says"),
    [
        ("train", "no_such_module", {}, "there is no module no_such_module"),
        ("train", "job_programs.inside", {}, "there is no module job_programs.inside"),
        ("nothing", "job_programs", {}, "job_programs has no nothing"),
        ("Jobs.nothing", "job_programs", {}, "job_programs:Jobs has no nothing"),
        ("NUMBER", "job_programs", {}, "job_programs:NUMBER is not callable but of type int"),
        ("add", "job_programs", {}, r"add\(a, b=2\) cannot be called with no settings"),
        ("add", "job_programs", {"c": 1}, r"add\(a, b=2\) cannot be called with the settings c"),
        ("validate", "job_programs", {}, r"validate\(model\) cannot be called with no settings"),
    ],
)
def test_what_cannot_be_called_says_so(function, module, settings, says):
    with pytest.raises(TargetError, match=says):
        target(function, module)(None, settings)


def test_a_module_that_lacks_another_is_not_called_missing(tmp_path):
    (tmp_path / "lacking.py").write_text("import no_such_library\n")
    for named in (
        Target(module="lacking", is_file=False, function="f", folder=str(tmp_path)),
        Target(module=str(tmp_path / "lacking.py"), is_file=True, function="f", folder=str(tmp_path)),
    ):
        with pytest.raises(ModuleNotFoundError, match="no_such_library"):
            named(None, {})


# --- Results ---------------------------------------------------------------------------------------------------------


def model():
    return ScaleoutModel.from_training_model([np.arange(3), np.ones((2, 2))])


ARRAYS = {"a": np.arange(3), "b": np.ones((2, 2))}


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        ((model(), {"num": 1}), {"num": 1}),
        (model(), None),
        (dict(ARRAYS), None),
        (list(ARRAYS.values()), None),
        (np.arange(3), None),
    ],
    ids=["model and metadata", "model", "dict", "list", "array"],
)
@pytest.mark.parametrize("suffix", [".scm", ".npz"])
def test_models_and_arrays_go_to_files(tmp_path, value, shown, suffix):
    if isinstance(value, ScaleoutModel):
        value = model()
    elif isinstance(value, tuple):
        value = (model(), value[1])
    path = tmp_path / f"out{suffix}"
    kept = keep_result(value, path)
    assert (kept.shown, kept.path, kept.problem) == (shown, str(path), None)
    if suffix == ".scm":
        with ScaleoutModel.from_file(path) as back:
            first = back.get_training_model()[0]
            np.testing.assert_array_equal(first, np.arange(3))
    else:
        with np.load(path) as back:
            np.testing.assert_array_equal(back[back.files[0]], np.arange(3))
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]


def test_the_rest_goes_to_json_with_what_json_lacks_said(tmp_path):
    value = {"a": (1, float("nan")), "few": np.arange(2), "many": np.zeros((50, 2)), 3: b"xyz", "o": object()}
    kept = keep_result(value, tmp_path / "out.json")
    # What is shown is short; the file has all of it.
    assert json.loads((tmp_path / "out.json").read_text()) == {**kept.shown, "many": [[0, 0]] * 50}
    assert kept.shown == {
        "a": [1, None],
        "few": [0, 1],
        "many": "<array float64 (50, 2)>",
        "3": "<3 bytes>",
        "o": "<object>",
    }


def test_arrays_are_lists_in_json_and_a_model_is_refused_there(tmp_path):
    kept = keep_result(np.arange(40.0), tmp_path / "out.json")
    assert json.loads((tmp_path / "out.json").read_text()) == list(range(40))
    assert kept.path == str(tmp_path / "out.json")
    kept = keep_result(ScaleoutModel.from_training_model([np.ones(2)]), tmp_path / "model.json")
    assert (kept.path, kept.shown) == (None, None)
    assert "takes what JSON has; the function returned a model" in kept.problem
    kept = keep_result((ScaleoutModel.from_training_model([np.ones(2)]), {"loss": 1}), tmp_path / "rest.json")
    assert json.loads((tmp_path / "rest.json").read_text()) == {"loss": 1}
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["out.json", "rest.json"]


@pytest.mark.parametrize("suffix", [".scm", ".npz"])
def test_a_result_that_is_no_model_is_shown_all_the_same(tmp_path, suffix):
    kept = keep_result({"sum": 3}, tmp_path / f"out{suffix}")
    assert kept.shown == {"sum": 3}
    assert "takes a model or arrays; the function returned a dict" in kept.problem
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_is_there_is_replaced_whole_and_links_are_followed(tmp_path):
    (tmp_path / "real.npz").write_bytes(b"before")
    (tmp_path / "link.npz").symlink_to("real.npz")
    keep_result(np.ones(2), tmp_path / "link.npz")
    assert (tmp_path / "link.npz").is_symlink()
    with np.load(tmp_path / "real.npz") as back:
        assert back["arr_0"].sum() == 2


@pytest.mark.parametrize("name", ["out.txt", "out", "nowhere/out.scm", "folder.scm"])
def test_an_output_that_cannot_be_is_refused_before_the_work(tmp_path, name):
    (tmp_path / "folder.scm").mkdir()
    with pytest.raises(ConfigError, match="--output"):
        check_output(tmp_path / name)


def test_every_end_has_an_exit_code_and_the_docs_say_which():
    assert set(EXIT_CODES) == set(EndReason)
    page = (Path(__file__).parents[2] / "docs" / "run.md").read_text()
    listed = {int(code): reason for code, reason in re.findall(r"^\| (\d+) \| ([a-z ]+)", page, flags=re.MULTILINE)}
    assert listed.pop(EXIT_USAGE).strip() == "wrong usage"
    assert listed.pop(143).strip() == "interrupted"
    by_code = {}
    for reason, code in EXIT_CODES.items():
        by_code.setdefault(code, reason)
    assert {code: reason.strip() for code, reason in listed.items()} == {
        code: "interrupted" if code == 130 else reason.value.replace("_", " ") for code, reason in by_code.items()
    }


def test_what_cannot_be_written_as_json_ends_the_job_once():
    with open("/dev/full", "w", encoding="utf-8") as full:
        view = JsonView(full)
        # Called by the job's own events, which must go on.
        view.state(TaskState.RUNNING)
        view.say("again")
        with pytest.raises(OSError, match="No space left"):
            view.tick()
        # What its buffer has cannot be written when it is closed either.
        with pytest.raises(OSError, match="No space left"):
            full.close()


def test_names_of_metrics_stay_in_their_line():
    view = PlainView(io.StringIO())
    view.record(MetricRecord(metrics={"\x1b[2Jloss\r\n": 1.0}, step=3, timestamp=0.0))
    assert view.metrics() == "step 3   [2Jloss   1"
