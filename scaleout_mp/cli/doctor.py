"""`scaleout-mp doctor`."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Final

import click

from scaleout_mp.cli.options import configure_logging, debug_option
from scaleout_mp.doctor.advice import advise
from scaleout_mp.doctor.levels import examine_levels
from scaleout_mp.doctor.machine import survey
from scaleout_mp.doctor.trial import ATTEMPTS

if TYPE_CHECKING:
    from collections.abc import Sequence

    from scaleout_mp.doctor.advice import Advice
    from scaleout_mp.doctor.levels import Finding
    from scaleout_mp.doctor.machine import Offer

EXIT_NOT_ISOLATED: Final = 1
_COLUMN: Final = 8


@click.command(short_help="Say what this machine offers for confining tasks, and how to get more.")
@click.option("--json", "as_json", is_flag=True, help="Write JSON to stdout.")
@debug_option
@click.pass_context
def doctor(ctx: click.Context, *, as_json: bool) -> int:
    """Say what this machine offers for confining tasks, and how to get more.

    Nothing is taken from a table: each part is tried out, and at each level a task is started that tries what it
    should not be able to do.

    The exit code is 0 unless no task can be started in a process of its own.
    """
    if ctx.obj:
        configure_logging(ctx)
    # First: it forks, which wants a process of one thread.
    offers = survey()
    findings = examine_levels()
    advice = advise(offers)
    isolated = any(finding.problem is None for finding in findings)
    if as_json:
        click.echo(
            json.dumps(
                {
                    "machine": [offer.to_dict() for offer in offers],
                    "levels": [finding.to_dict() for finding in findings],
                    "advice": [each.to_dict() for each in advice],
                    "isolated": isolated,
                },
                indent=2,
            )
        )
    else:
        _show(offers, findings, advice)
    return 0 if isolated else EXIT_NOT_ISOLATED


def _show(offers: Sequence[Offer], findings: Sequence[Finding], advice: Sequence[Advice]) -> None:
    _title("This machine")
    width = max(len(offer.name) for offer in offers)
    for offer in offers:
        colour = {True: "green", False: "yellow", None: None}[offer.good]
        click.echo(f"  {offer.name:<{width}}  {click.style(offer.value, fg=colour)}")
    _title("What a task can do, at each level")
    _table(findings)
    for finding in findings:
        _title(f'In force at level "{finding.level}"')
        _finding(finding)
    _title("To get more")
    if not advice:
        click.echo("  Nothing: this machine offers all that the package makes use of.")
    for each in advice:
        click.echo(f"  {each.what}")
        for line in each.how:
            click.echo(f"    {line}")


def _title(text: str) -> None:
    click.echo()
    click.secho(text, bold=True)


def _table(findings: Sequence[Finding]) -> None:
    width = max(map(len, ATTEMPTS.values()))
    names = "".join(f"{finding.level:>{_COLUMN}}" for finding in findings)
    click.echo(f"  {'':<{width}}{names}")
    for key, what in ATTEMPTS.items():
        cells = "".join(_cell(finding.can.get(key)) for finding in findings)
        click.echo(f"  {what:<{width}}{cells}")
    times = "".join(f"{_milliseconds(finding):>{_COLUMN}}" for finding in findings)
    click.echo(f"  {'milliseconds from order to result':<{width}}{times}")


def _cell(able: bool | None) -> str:
    if able is None:
        return click.style(f"{'?':>{_COLUMN}}", fg="red")
    return click.style(f"{'yes' if able else 'no':>{_COLUMN}}", fg="yellow" if able else "green")


def _milliseconds(finding: Finding) -> str:
    return "?" if finding.problem is not None else f"{finding.seconds * 1000:.1f}"


def _finding(finding: Finding) -> None:
    if finding.problem is not None:
        click.secho(f"  no task can be started: {finding.problem}", fg="red")
        return
    click.echo(f"  {', '.join(('limits', 'mark of its tree', 'no core files', *finding.layers))}")
    own = " ".join(finding.own_namespaces) or "none"
    asked = ", ".join(f"{name} {finding.status[name]}" for name in sorted(finding.status))
    click.echo(f"  asked in a task: {asked}; own namespaces: {own}; it starts in {finding.working_directory}")
    for problem in finding.missing:
        click.secho(f"  missing: {problem}", fg="yellow")
