"""What a terminal gets in place of plain lines: a coloured summary and a progress bar. `NO_COLOR` is rich's to keep."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress as Display, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from bifrost_bootstrap.cli.summary import Summary
from bifrost_bootstrap.errors import ExitCode
from bifrost_bootstrap.progress import Progress, Report
from bifrost_bootstrap.redaction import masked


def show(summary: Summary, code: ExitCode) -> None:
    """Print a summary on stdout. Its texts are data: no markup is read in them."""
    console = Console(highlight=False)
    colour = {ExitCode.OK: "bold green", ExitCode.NOT_READY: "bold yellow"}.get(code, "bold red")
    console.print(Text(masked(summary.headline), colour), soft_wrap=True)
    table = Table.grid(padding=(0, 2))
    table.add_column(style="cyan", no_wrap=True)
    table.add_column(overflow="fold")
    for label, text in summary.rows:
        table.add_row(Text(f"  {label}"), Text(masked(text)))
    if summary.rows:
        console.print(table)


class _Rate(ProgressColumn):
    """How many of the unit a second, once that is known."""

    def render(self, task: Task) -> Text:
        unit = task.fields.get("unit")
        return Text(f"{task.speed:,.0f} {unit}/s" if task.speed and unit else "", "dim")


@contextmanager
def bar() -> Iterator[Report]:
    """A progress bar on stderr for as long as the block lasts; log lines scroll above it."""
    columns = (
        TextColumn("{task.description}", markup=False), BarColumn(),
        TextColumn("{task.fields[count]}"), _Rate(), TimeRemainingColumn(),
    )  # fmt: skip
    with Display(*columns, console=Console(stderr=True), transient=True) as display:
        task = display.add_task("waiting", total=None, count="", unit="")
        shown = ""

        def report(progress: Progress) -> None:
            nonlocal shown
            if progress.step != shown:
                # Its own rate and remaining time: one revision takes longer than a thousand modules.
                display.reset(task, total=None)
                shown = progress.step
            count = f"{progress.done:,} of {progress.total:,} {progress.unit}" if progress.total else ""
            display.update(
                task, description=masked(progress.what), total=progress.total or None, completed=progress.done,
                count=count, unit=progress.unit,
            )  # fmt: skip

        yield report
