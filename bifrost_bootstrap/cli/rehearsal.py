"""The outcome of `rehearse`: for a person, for a program, and as Markdown for the comment of a pull request."""

from __future__ import annotations

from typing import TYPE_CHECKING

from bifrost_bootstrap.cli.report import Outcome, Rows
from bifrost_bootstrap.cli.summary import size
from bifrost_bootstrap.errors import ExitCode

if TYPE_CHECKING:
    from bifrost_bootstrap.rehearse.forecast import TableForecast
    from bifrost_bootstrap.rehearse.live import DataCheck
    from bifrost_bootstrap.rehearse.rehearsal import Rehearsal

_HEAD = "| revision | table | lock | blocks | meanwhile | rows | size |\n|---|---|---|---|---|---|---|"


def of_rehearsal(found: Rehearsal, *, strict: bool, markdown: bool) -> Outcome:
    """The outcome of a rehearsal that reached the heads. strict: a warning is no success."""
    code = ExitCode.OK
    remedy = ""
    facts = {**found.to_dict(), "message": found.headline}
    if found.violations:
        code = ExitCode.MIGRATION
        remedy = "correct these rows, or the revision, before the deploy"
        facts |= {"error": "MigrationError", "remedy": remedy}
    elif strict and found.warnings:
        code = ExitCode.NOT_READY
        remedy = "change the revisions as the warnings say"
        facts["remedy"] = remedy
    if markdown:
        return Outcome(code, found.headline, [], facts, text=_markdown(found), remedy=remedy)
    rows = [("warning", warning) for warning in found.warnings]
    rows += [(revision.revision, _table_text(table)) for revision, table in found.tables]
    rows += _check_rows(found.checks) + [("note", note) for note in found.notes]
    return Outcome(code, found.headline, rows, facts, remedy=remedy)


def _table_text(table: TableForecast) -> str:
    text = f"{table.table}: {table.lock}, blocks {table.blocks}"
    known = "" if table.size is None else f"{table.rows:,} rows, {size(table.size)}"
    return "; ".join(part for part in (text, _meanwhile(table), known) if part)


def _meanwhile(table: TableForecast) -> str:
    """What is done under the lock; "" if it is short and drops nothing."""
    columns = f"columns dropped: {', '.join(table.dropped_columns)}" if table.dropped_columns else ""
    dropped = "the table is dropped" if table.dropped else columns
    return "; ".join(part for part in (table.lasts, dropped) if part)


def _check_rows(checks: list[DataCheck]) -> Rows:
    rows = []
    for check in checks:
        reason = f" ({check.reason})" if check.reason else ""
        rows.append(("rows", f"revision {check.revision}, {check.table}: {check.demand}: {check.result}{reason}"))
    return rows


def _markdown(found: Rehearsal) -> str:
    lines = [""]
    if found.tables:
        lines.append(_HEAD)
    for revision, table in found.tables:
        rows = "" if table.rows is None else f"{table.rows:,}"
        bytes_ = "" if table.size is None else size(table.size)
        cells = [
            f"`{revision.revision}`",
            f"`{table.table}`",
            table.lock,
            table.blocks,
            _meanwhile(table),
            rows,
            bytes_,
        ]
        lines.append(f"| {' | '.join(cells)} |")
    lines.append("")
    lines += [f"- **warning** {warning}" for warning in found.warnings]
    lines += [f"- {text}" for _, text in _check_rows(found.checks)]
    lines += [f"- {note}" for note in found.notes]
    return "\n".join(lines)
