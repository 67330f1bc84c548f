"""What is said once the demo is over: for people, and as JSON."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any, Final

from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from scaleout_mp.demo.verdict import matches
from scaleout_mp.task import WHY_KILLED_PAGE

if TYPE_CHECKING:
    from collections.abc import Iterable
    from typing import TextIO

    from scaleout_mp.demo.faults import PlannedFault
    from scaleout_mp.demo.ledger import TaskEnd
    from scaleout_mp.demo.verdict import Check, Observations

_MIB: Final = 2**20


@dataclasses.dataclass(frozen=True, kw_only=True)
class DemoResult:
    """A demo that ran to its end."""

    seen: Observations
    checks: tuple[Check, ...]
    #: Metrics that the network received.
    metrics: int
    seconds: float
    #: Where models, rounds and logs are; None when they were removed.
    folder: str | None

    @property
    def passed(self) -> bool:
        """Whether all came out as planned."""
        return all(check.passed for check in self.checks)

    def to_dict(self) -> dict[str, Any]:
        """Return the result as JSON-serialisable values."""
        seen = self.seen
        return {
            "passed": self.passed,
            "seconds": round(self.seconds, 2),
            "accuracy": seen.scores[-1].accuracy if seen.scores else None,
            "rounds": [dataclasses.asdict(score) for score in seen.scores],
            "failures": [_failure(seen, end) for end in _in_order(seen.failures)],
            "metrics_received": self.metrics,
            "checks": [dataclasses.asdict(check) for check in self.checks],
            "session_id": seen.session.session_id,
            "model_id": seen.session.model_id,
            "folder": self.folder,
        }


def print_summary(result: DemoResult, stream: TextIO) -> None:
    """Write the summary for people."""
    console = Console(file=stream, highlight=False)
    if not stream.isatty():
        # Nobody's window: lines are not to be broken at 80.
        console.width = 200
    parts: list[Any] = ["", _rounds_table(result.seen)]
    if result.seen.failures:
        parts += ["", Text("What became of the tasks that did not complete", style="bold")]
        parts.append(_failures_table(result.seen))
        parts.append(Text(f"Each kind of end is explained in {WHY_KILLED_PAGE}.", style="dim"))
    parts += ["", *(_check_text(check) for check in result.checks), "", _closing(result)]
    with console.capture() as capture:
        console.print(Group(*parts))
    # Cells are padded to the width of their column, the last one too.
    stream.write("".join(f"{line.rstrip()}\n" for line in capture.get().splitlines()))


def _rounds_table(seen: Observations) -> Table:
    table = Table(title="Accuracy by round", title_justify="left", title_style="bold")
    for heading in ("round", "updates", "held-out accuracy", "seconds"):
        table.add_column(heading, justify="right")
    for score in seen.scores:
        table.add_row(str(score.number), str(score.updates), f"{score.accuracy:.3f}", f"{score.seconds:.1f}")
    return table


def _failure(seen: Observations, end: TaskEnd) -> dict[str, Any]:
    planned = _planned(seen, end)
    return {
        "client": end.client,
        "round": end.round,
        "task_type": end.task_type,
        "planned": None if planned is None else planned.kind.value,
        "status": end.status,
        "reason": end.reason,
        "explanation": end.explanation,
        "last_step": end.last_step,
        "report": dict(end.report),
    }


def _failures_table(seen: Observations) -> Table:
    table = Table.grid(padding=(0, 2))
    for end in _in_order(seen.failures):
        planned = _planned(seen, end)
        facts = _facts(end)
        table.add_row(
            f"round {end.round}",
            end.client,
            Text("not planned", style="red") if planned is None else planned.kind.value,
            Text(end.explanation) + Text(f" ({facts})" if facts else "", style="dim"),
        )
    return table


def _in_order(ends: Iterable[TaskEnd]) -> list[TaskEnd]:
    return sorted(ends, key=lambda end: end.round)


def _planned(seen: Observations, end: TaskEnd) -> PlannedFault | None:
    return next((fault for fault in seen.planned if matches(fault, end)), None)


def _facts(end: TaskEnd) -> str:
    """Return what is known beyond the sentence."""
    facts = [] if end.last_step is None else [f"last step {end.last_step}"]
    peak = end.report.get("peak_memory")
    if isinstance(peak, int) and "peak" not in end.explanation:
        facts.append(f"peak {peak / _MIB:.0f} MiB")
    return ", ".join(facts)


def _check_text(check: Check) -> Text:
    if check.passed:
        return Text("  ok    ", style="green") + Text(check.text) + Text(check.detail, style="dim")
    return Text("  FAIL  ", style="bold red") + Text(f"{check.text}: {check.problem}")


def _closing(result: DemoResult) -> Text:
    where = f"; all files are in {result.folder}" if result.folder else ""
    figures = f"{result.seconds:.0f} s, {result.metrics:,} metrics received{where}"
    if result.passed:
        return Text("All came out as planned", style="bold green") + Text(f" ({figures}).")
    failed = sum(not check.passed for check in result.checks)
    return Text(f"{failed} of {len(result.checks)} checks failed", style="bold red") + Text(f" ({figures}).")
