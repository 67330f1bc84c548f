"""Run all comparisons and print them; exit code 1 when one misses its target."""

from __future__ import annotations

import sys

from benchmarks import handover, inference, kills, models, records, tasks, transfer
from benchmarks.harness import show


def main() -> int:
    rows = [
        *tasks.starts(),
        tasks.rate(),
        *kills.kills(),
        *handover.handover(),
        *handover.supervisor_peak(),
        *inference.inference(),
        *records.records(),
        *models.models(),
        *transfer.transfer(),
    ]
    show(rows)
    return 0 if all(row.holds for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
