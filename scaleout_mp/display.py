"""Text for people: sizes, and what notebooks show of our objects."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Iterable

#: Characters of one value: what a task printed, or a server wrote into a model, may be of any length.
_MAX_VALUE: Final = 2000


def readable_size(size: float) -> str:
    """Return bytes for people, in binary units."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024 or unit == "GiB":
            return f"{size:.0f} {unit}" if unit == "B" or size >= 100 else f"{size:.1f} {unit}"
        size /= 1024
    raise AssertionError


def printable(text: str) -> str:
    """Return text in one line that moves no cursor: what is not printable becomes a space."""
    return "".join(character if character.isprintable() else " " for character in text)


def html_table(title: str, rows: Iterable[tuple[str, str]], folded: Iterable[tuple[str, str]] = ()) -> str:
    """Return a small table as HTML; all text is escaped, and shortened where it is long.

    `folded` are texts of several lines below it, shut until somebody opens them; of those the end is kept.
    """
    from html import escape

    cells = "".join(
        f'<tr><th style="text-align:left">{escape(name)}</th>'
        f'<td style="text-align:left">{escape(_start_of(value))}</td></tr>'
        for name, value in rows
    )
    below = "".join(
        f"<details><summary>{escape(name)}</summary><pre>{escape(_end_of(text))}</pre></details>"
        for name, text in folded
        if text
    )
    return f"<div><strong>{escape(_start_of(title))}</strong><table>{cells}</table>{below}</div>"


def _start_of(text: str) -> str:
    return text if len(text) <= _MAX_VALUE else f"{text[:_MAX_VALUE]}…"


def _end_of(text: str) -> str:
    return text if len(text) <= _MAX_VALUE else f"…{text[-_MAX_VALUE:]}"
