"""What notebooks show: small, escaped, and whole where it matters."""

from __future__ import annotations

import html.parser

import numpy as np
import pytest

from scaleout_mp import EndReason, ExitReport, ScaleoutModel
from scaleout_mp.display import html_table, printable

HOSTILE = "<script>alert('x')</script>&\"'"


class Reader(html.parser.HTMLParser):
    """Collects text, and refuses elements that we did not write and elements that are not closed."""

    def __init__(self):
        super().__init__()
        self.open = []
        self.text = ""

    def handle_starttag(self, tag, _attributes):
        assert tag in {"div", "strong", "table", "tr", "th", "td", "details", "summary", "pre"}, tag
        self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data + "\n"


def read(markup):
    reader = Reader()
    reader.feed(markup)
    reader.close()
    assert reader.open == []
    return reader.text


def report(**fields):
    return ExitReport(**{"task_id": "t", "name": "train", "reason": EndReason.CRASHED, "message": "crashed", **fields})


def test_a_report_shows_what_happened():
    shown = report(
        message="crashed with SIGSEGV",
        signal="SIGSEGV",
        peak_memory=200 << 20,
        memory_limit=256 << 20,
        wall_seconds=1.234,
        cpu_seconds=1.0,
        last_step=20,
        traceback="File train.py, line 3",
        stderr_tail="Fatal Python error",
        notes=("one process was left",),
    )
    text = read(shown._repr_html_())
    for wanted in (
        "task train: crashed with SIGSEGV",
        "at most 200 MiB of 256 MiB",
        "1.23 s",
        "20",
        "File train.py, line 3",
        "Fatal Python error",
        "one process was left",
    ):
        assert wanted in text


def test_a_report_leaves_out_what_is_not_known():
    text = read(report(reason=EndReason.COMPLETED, message="completed in 0.10 s")._repr_html_())
    assert "None" not in text
    for absent in ("memory", "traceback", "step", "process"):
        assert absent not in text


@pytest.mark.parametrize("field", ["name", "message", "signal", "traceback", "stacks", "stdout_tail", "stderr_tail"])
def test_what_a_task_wrote_stays_text(field):
    assert HOSTILE in read(report(**{field: HOSTILE})._repr_html_())


def test_long_output_is_shortened_to_its_end():
    markup = report(stdout_tail="a" * 1_000_000 + "the end", message="m" * 1_000_000)._repr_html_()
    assert len(markup) < 10_000
    assert "the end" in read(markup)


def test_a_model_shows_its_metadata():
    metadata = {HOSTILE: HOSTILE, **{f"key{index}": index for index in range(100)}}
    with ScaleoutModel.from_training_model([np.zeros(1000)], metadata=metadata) as model:
        text = read(model._repr_html_())
        assert f"ScaleoutModel {model.model_id}" in text
        assert "KiB" in text
        assert text.count(HOSTILE) == 2
        assert "more" in text
        assert len(text.splitlines()) < 60
    assert "closed" in read(model._repr_html_())


def test_a_model_shows_its_files():
    with ScaleoutModel.from_training_model([np.zeros(1)]) as model:
        builder = model.to_builder()
        for index in range(30):
            builder.set_file(f"notes{index}.txt", b"x")
        with builder.build() as with_files:
            text = read(with_files._repr_html_())
            assert "notes0.txt" in text
            assert "and 10 more" in text


def test_printable_text_moves_no_cursor():
    assert printable("a\x1b[2Jb\nc\u202ed") == "a [2Jb c d"
    assert read(html_table("t", [], [("empty", "")])).strip() == "t"
