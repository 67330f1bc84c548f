"""What the docs refer to exists, and what they show runs."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MANUAL = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "examples").glob("*/README.md"))]
PAGES = [*MANUAL, ROOT / "CHANGELOG.md"]


def anchors(page: Path) -> set[str]:
    headings = re.findall(r"^#+ (.+)$", page.read_text(), flags=re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def targets(page: Path) -> list[str]:
    return re.findall(r"\]\(([^)]+)\)", page.read_text())


def named_files(page: Path) -> list[str]:
    return re.findall(r"`((?:[a-z_]+/)+[a-z_0-9]+\.py)`", page.read_text())


def test_what_is_looked_for_is_found():
    assert sum(map(len, map(targets, PAGES))) > 30
    assert len(named_files(ROOT / "docs" / "design.md")) > 100


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    for target in targets(page):
        if target.startswith("http"):
            continue
        path, _, anchor = target.partition("#")
        linked = (page.parent / path).resolve() if path else page
        assert linked.exists(), f"{page.name} links to {target}"
        if anchor:
            assert anchor in anchors(linked), f"{page.name} links to {target}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_files_that_are_named_exist(page):
    for name in named_files(page):
        assert (ROOT / "scaleout_mp" / name).exists() or (ROOT / name).exists(), f"{page.name} names {name}"


def test_the_layers_in_the_docs_are_those_that_are_checked():
    config = tomllib.loads((ROOT / "pyproject.toml").read_text())
    layers = config["tool"]["importlinter"]["contracts"][0]["layers"]
    checked = " -> ".join(layer.replace("scaleout_mp.", "") for layer in layers)
    assert checked in (ROOT / "docs" / "design.md").read_text()


def test_make_targets_in_the_readme_exist():
    makefile = (ROOT / "Makefile").read_text()
    named = re.findall(r"make ([a-z-]+)", (ROOT / "README.md").read_text())
    assert {"demo", "test"} <= set(named)
    for target in named:
        assert re.search(rf"^{target}:.*## ", makefile, flags=re.MULTILINE), f"make {target}"


def test_the_readme_example_without_a_network_prints_what_it_should(tmp_path):
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)
    script = tmp_path / "example.py"
    script.write_text(next(block for block in blocks if "TaskExecutor(" in block))
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.splitlines() == ["0 {'count': 0.0}", "1 {'count': 1.0}", "2 {'count': 2.0}", "3"]
    assert done.stderr == ""


def test_examples_about_models_run(tmp_path):
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "models.md").read_text(), flags=re.DOTALL)
    assert len(blocks) == 2
    for block in blocks:
        command = [sys.executable, "-c", block]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=tmp_path, check=False)
        assert (done.returncode, done.stderr) == (0, "")
