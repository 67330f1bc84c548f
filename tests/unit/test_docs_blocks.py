"""What the docs have people type does what they say; what takes a network is in tests/integration/test_examples.py."""

from __future__ import annotations

import ast
import contextlib
import re
import shlex
from pathlib import Path

import click
import numpy as np
import pytest
from click.testing import CliRunner

import scaleout_mp
from scaleout_mp import EdgeClient, GrpcEdgeClientRuntime, Sandbox, ScaleoutModel, TaskExecutor
from scaleout_mp.cli.app import app
from scaleout_mp.config import Settings

ROOT = Path(__file__).parents[2]
MANUAL = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "examples").glob("*/README.md"))]


def blocks(page, language):
    return re.findall(rf"^ *```{language}\n(.*?)^ *```", (ROOT / page).read_text(), flags=re.DOTALL | re.MULTILINE)


def block(page, language, part):
    (found,) = (one for one in blocks(page, language) if part in one)
    return found


def commands():
    """Return the command lines that a page names: in blocks, and in the text those with an option or an argument."""
    found = {}
    for page in MANUAL:
        text = page.read_text()
        typed = re.findall(r"^(?:[A-Z_]+=\S+ )?scaleout-mp .*$", "\n".join(blocks(page, "[a-z]*")), flags=re.MULTILINE)
        for line in [*typed, *re.findall(r"`(scaleout-mp [^`]+)`", text)]:
            found[line] = page
    return [pytest.param(line, id=f"{page.relative_to(ROOT)}: {line[:60]}") for line, page in found.items()]


@pytest.mark.parametrize("line", commands())
def test_command_lines_are_taken(line, tmp_path, monkeypatch):
    for folder in ("client", "my-package"):
        (tmp_path / folder).mkdir()
    for file in ("seed.npz", "train.py"):
        (tmp_path / file).touch()
    monkeypatch.chdir(tmp_path)
    _, *words = shlex.split(line, comments=True)
    command, context = app, click.Context(app, info_name="scaleout-mp")
    # Parsed and not run: an option that is not there, or a value that cannot be, is a UsageError.
    while isinstance(command, click.Group) and words:
        name, command, words = command.resolve_command(context, words)
        if isinstance(command, click.Group):
            context = click.Context(command, info_name=name, parent=context)
        elif words:
            command.make_context(name, list(words), parent=context)


def test_there_are_command_lines():
    assert len(commands()) > 15


@pytest.mark.parametrize("page", MANUAL, ids=lambda page: str(page.relative_to(ROOT)))
def test_blocks_are_python_and_take_what_there_is(page):
    for text in blocks(page, "python"):
        # What a notebook awaits stands in a cell.
        tree = compile(text, str(page), "exec", flags=ast.PyCF_ONLY_AST | ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and (node.module or "") == "scaleout_mp":
                assert all(hasattr(scaleout_mp, name.name) for name in node.names)
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "client":
                assert node.attr in dir(EdgeClient()), f"client.{node.attr}"


def test_the_service_of_staged_models(tmp_path):
    runtime = GrpcEdgeClientRuntime(settings=Settings(model_cache_dir=str(tmp_path)), echo_output=False)
    client = EdgeClient(runtime=runtime)
    exec(block("docs/inference.md", "python", "class Service"), {"client": client, "__name__": "__main__"})
    with contextlib.closing(client), ScaleoutModel.from_training_model([np.eye(3)]) as model:
        answer = client.run_inference(model, {"images": np.ones((2, 3))})
    np.testing.assert_array_equal(answer["scores"], np.ones((2, 3)))


def test_the_worker_with_a_set_up(tmp_path, monkeypatch):
    text = block("docs/isolation.md", "python", "executor.worker(")
    (tmp_path / "predicting.py").write_text(
        "loaded = []\ndef load(model):\n    loaded.append(model)\ndef predict(array):\n    return array * loaded[0]\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    names = {"TaskExecutor": TaskExecutor, "Limits": scaleout_mp.Limits, "array": np.arange(3), "model": 5}
    exec("from predicting import load, predict", names)
    exec(text, names)
    np.testing.assert_array_equal(names["task"].result(20), [0, 5, 10])


def test_a_sandbox_with_declarations(tmp_path):
    (text,) = blocks("docs/security.md", "python")
    for folder in ("images", "out"):
        (tmp_path / folder).mkdir()
    here = text.replace("/data/", f"{tmp_path}/")
    assert here != text
    assert isinstance(eval(here, {"TaskExecutor": TaskExecutor, "Sandbox": Sandbox}), TaskExecutor)


def test_the_file_of_options(tmp_path):
    (tmp_path / "client.yaml").write_text(block("docs/packages.md", "yaml", "api_url"))
    done = CliRunner().invoke(app, ["config", "--init", str(tmp_path / "client.yaml")])
    assert done.exit_code == 0, done.output
    rows = dict(re.findall(r"^(\w+)  +(.+?)  +file$", done.output, flags=re.MULTILINE))
    assert rows == {
        "api_url": "https://example.org",
        "memory": "4GiB",
        "sandbox": "strict",
        "read": "/data/scans /data/labels",
        "inference_concurrency": "2",
        "inference_idle_time": "never",
    }
