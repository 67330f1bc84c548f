"""Rows of a comparison, and how they are shown."""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import statistics
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """One figure of ours beside one of a peer's, from interleaved runs."""

    what: str
    #: Median, in `unit`.
    ours: float
    peer: str
    #: Median, in `unit`; None when the figure stands alone.
    theirs: float | None
    unit: str
    #: What the project asks of itself, for people: "at most 3.0 times".
    target: str
    holds: bool
    #: `ours / theirs`, or the other way round where more is better: as the target says it.
    ratio: float | None
    runs: int


def interleaved(runs: int, *measures: Callable[[], float], times: Sequence[int] | None = None) -> list[list[float]]:
    """Call each measure in turn, `runs` times, and return the values of each: a slow moment hits all alike.

    `times` says how often each is called in one turn: a quick one needs more values than a slow one.
    """
    values: list[list[float]] = [[] for _ in measures]
    for _ in range(runs):
        for kept, measure, count in zip(values, measures, times or [1] * len(measures), strict=True):
            kept.extend(measure() for _ in range(count))
    return values


def compare(
    what: str,
    ours: Sequence[float],
    peer: str,
    theirs: Sequence[float],
    *,
    unit: str,
    at_most: float | None = None,
    at_least: float | None = None,
) -> Row:
    """Make a row of a ratio of medians: `at_most` bounds ours/theirs, `at_least` bounds the speed-up.

    For `unit` "tasks/s" more is better, for times less is.
    """
    our_median, their_median = statistics.median(ours), statistics.median(theirs)
    if at_most is not None:
        ratio, bound, holds = (
            our_median / their_median,
            f"at most {at_most:g} times",
            our_median <= at_most * their_median,
        )
    else:
        assert at_least is not None
        more_is_better = unit.endswith("/s")
        ratio = our_median / their_median if more_is_better else their_median / our_median
        bound, holds = f"at least {at_least:g} times as fast", ratio >= at_least
    return Row(
        what=what,
        ours=our_median,
        peer=peer,
        theirs=their_median,
        unit=unit,
        target=bound,
        holds=holds,
        ratio=ratio,
        runs=len(ours),
    )


def alone(
    what: str, ours: Sequence[float], *, unit: str, at_most: float | None = None, at_least: float | None = None
) -> Row:
    """Make a row of a figure that is bounded by itself, from above or from below."""
    median = statistics.median(ours)
    assert (at_most is None) != (at_least is None)
    return Row(
        what=what,
        ours=median,
        peer="",
        theirs=None,
        unit=unit,
        target=f"at least {at_least:g} {unit}" if at_most is None else f"at most {at_most:g} {unit}",
        holds=median <= at_most if at_most is not None else median >= (at_least or 0),
        ratio=None,
        runs=len(ours),
    )


def beside(what: str, ours: Sequence[float], theirs: Sequence[float], *, peer: str, unit: str) -> Row:
    """Make a row of two times that no target binds; the ratio says how many times as fast ours is."""
    our_median, their_median = statistics.median(ours), statistics.median(theirs)
    return Row(
        what=what,
        ours=our_median,
        peer=peer,
        theirs=their_median,
        unit=unit,
        target="",
        holds=True,
        ratio=their_median / our_median,
        runs=len(ours),
    )


def above(what: str, ours: Sequence[float], floor: str, theirs: Sequence[float], *, unit: str) -> Row:
    """Make a row of a time and a floor that no target binds; the ratio says how many times the floor ours is."""
    row = beside(what, ours, theirs, peer=floor, unit=unit)
    assert row.theirs is not None
    return dataclasses.replace(row, ratio=row.ours / row.theirs)


def show(rows: Sequence[Row]) -> None:
    """Print the table; where BENCH_JSON names a file, write the rows there too, a JSON object a line."""
    print(f"\n{platform.platform()}, Python {platform.python_version()}, {os.cpu_count()} cores; medians\n")
    heads = ("what", "ours", "peer", "theirs", "ratio", "target", "holds")
    cells = [heads, *(_cells(row) for row in rows)]
    widths = [max(len(line[column]) for line in cells) for column in range(len(heads))]
    for line in cells:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())
    path = os.environ.get("BENCH_JSON")
    if path:
        with open(path, "w", encoding="utf-8") as file:
            file.writelines(json.dumps(dataclasses.asdict(row)) + "\n" for row in rows)


def _cells(row: Row) -> tuple[str, ...]:
    theirs = "" if row.theirs is None else f"{row.theirs:.4g} {row.unit}"
    ratio = "" if row.ratio is None else f"{row.ratio:.3g}"
    return (
        row.what,
        f"{row.ours:.4g} {row.unit}",
        row.peer,
        theirs,
        ratio,
        row.target,
        "yes" if row.holds else "NO",
    )
