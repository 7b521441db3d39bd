"""What a terminal gets in place of plain lines: a coloured outcome and a progress bar. rich reads `NO_COLOR`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress as Display, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from bifrost_bootstrap.cli.report import Outcome
from bifrost_bootstrap.errors import ExitCode
from bifrost_bootstrap.progress import Progress, Report
from bifrost_bootstrap.redaction import masked


def show(outcome: Outcome) -> None:
    """Print an outcome on stdout. Its texts are data: they are not read as markup."""
    console = Console(highlight=False)
    colour = {ExitCode.OK: "bold green", ExitCode.NOT_READY: "bold yellow"}.get(outcome.code, "bold red")
    console.print(Text(masked(outcome.message), colour), soft_wrap=True)
    table = Table.grid(padding=(0, 2))
    table.add_column(style="cyan", no_wrap=True)
    table.add_column(overflow="fold")
    for label, text in outcome.rows or []:
        table.add_row(Text(f"  {label}"), Text(masked(text)))
    if outcome.rows:
        console.print(table)
    if outcome.text:
        console.out(masked(outcome.text), highlight=False)


class _Rate(ProgressColumn):
    """Units per second; empty until rich has measured it."""

    def render(self, task: Task) -> Text:
        unit = task.fields.get("unit")
        return Text(f"{task.speed:,.0f} {unit}/s" if task.speed and unit else "", "dim")


@contextmanager
def bar() -> Iterator[Report]:
    """A progress bar on stderr for the time of the block; log lines scroll above it."""
    description = TextColumn("{task.description}", markup=False)
    count = TextColumn("{task.fields[count]}")
    console = Console(stderr=True)
    with Display(
        description, BarColumn(), count, _Rate(), TimeRemainingColumn(), console=console, transient=True
    ) as shown:
        task = shown.add_task("waiting", total=None, count="", unit="")
        step = ""

        def report(progress: Progress) -> None:
            nonlocal step
            if progress.step != step:
                # Each step has its own rate: one revision takes longer than a thousand modules.
                shown.reset(task, total=None)
                step = progress.step
            shown.update(
                task,
                description=masked(progress.what),
                total=progress.total or None,
                completed=progress.done,
                count=f"{progress.done:,} of {progress.total:,} {progress.unit}" if progress.total else "",
                unit=progress.unit,
            )

        yield report
