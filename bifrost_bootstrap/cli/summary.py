"""The outcome of each command: what a person reads (the same on a terminal and in a pipe), and what a program reads."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from bifrost_bootstrap.cli.report import Outcome, Rows
from bifrost_bootstrap.errors import ExitCode

if TYPE_CHECKING:
    from bifrost_bootstrap.dev.load import LoadResult
    from bifrost_bootstrap.init.loop import InitReport
    from bifrost_bootstrap.migrate.schema_state import SchemaState
    from bifrost_bootstrap.status.diagnostics import Diagnostics
    from bifrost_bootstrap.status.plan import Plan
    from bifrost_bootstrap.status.readiness import Readiness
    from bifrost_bootstrap.warm.diff import CacheDiff

#: The state of the requirements entry, in words.
_REQUIREMENTS = {
    "present": "present",
    "missing": "missing; a warm makes it from the row requirements.txt",
    "none": "absent, as is a row requirements.txt",
}


def of_init(report: InitReport) -> Outcome:
    """The outcome of `init` and `rewarm` after a success: one line if there was nothing to do."""
    schema = report.readiness.schema
    head = _joined(schema.database_heads)
    if schema.verdict == "unknown_revision":
        head += f", ahead of this image ({', '.join(schema.heads)}; BIFROST_ALLOW_AHEAD)"
    state = f"schema at {head}, {report.readiness.modules:,} modules cached"
    if report.nothing_to_do:
        message = f"ready, nothing to do: {state} ({report.seconds:.2f}s)"
    else:
        message = f"ready in {report.seconds:.1f}s: {state}"
    rows = [("waited", f"{item.server} {item.seconds:.1f}s") for item in report.waited]
    rows += _migrate_rows(report.migrate) + _warm_rows(report.warm)
    return Outcome(ExitCode.OK, message, rows, report.to_dict())


def of_check(readiness: Readiness, around: Diagnostics) -> Outcome:
    """The state of schema and cache, with up to ten paths of each difference, and the diagnostics."""
    missing = readiness.missing()
    diff = readiness.diff.summary() if readiness.diff else "not compared"
    facts = {**readiness.to_dict(), "surroundings": around.to_dict(), "message": missing or "ready"}
    rows = _schema_rows(readiness.schema)
    rows.append(("cache", f"{readiness.modules:,} modules indexed; {diff}"))
    rows += _path_rows(facts["module_cache"]) + _requirements_rows(readiness.diff)
    for name, repair in around.invalid_indexes.items():
        rows.append(("index", f"{name} is INVALID; repair it with: {repair}"))
    rows += [(label, text) for label, text in (("redis", around.redis), ("worker", around.worker)) if text]
    if readiness.ready:
        return Outcome(ExitCode.OK, "ready", rows, facts)
    facts["remedy"] = readiness.remedy
    return Outcome(ExitCode.NOT_READY, f"not ready: {missing}", rows, facts, remedy=readiness.remedy)


def of_plan(plan: Plan) -> Outcome:
    """What an init would do now; the SQL follows as text."""
    facts = {**plan.to_dict(), "message": plan.headline}
    rows = _schema_rows(plan.schema)
    if plan.diff is None:
        rows.append(("cache", plan.no_diff))
    else:
        changes = f"{plan.diff.summary()}, {size(plan.bytes)} to write"
        rows.append(("cache", f"a warm from the rows as they are now: {changes}"))
        rows += _path_rows(facts["module_cache"]) + _requirements_rows(plan.diff)
        if plan.diff.shrinks:
            text = "a warm would stop here (2): it removes most of the cache; if that is correct, use --allow-shrink"
            rows.append(("shrink", text))
    if plan.no_sql:
        rows.append(("sql", plan.no_sql))
    return Outcome(ExitCode.OK, plan.headline, rows, facts, text=plan.sql)


def of_load(result: LoadResult, target: str) -> Outcome:
    """How many files were written to the database `target`, and which files a row cannot hold."""
    skipped = [("skipped", f"{path!r}: {reason}") for path, reason in result.skipped]
    message = f"{result.written:,} of {result.files:,} files written to {target}"
    return Outcome(ExitCode.OK, message, skipped, result.to_dict())


def _joined(heads: tuple[str, ...]) -> str:
    return ", ".join(heads) or "none"


def _migrate_rows(result: Mapping[str, Any]) -> Rows:
    """Rows for the result of the task `migrate`; none if it applied nothing or did not run."""
    applied = result.get("applied", [])
    if not applied:
        return []
    came_from = ", ".join(result["revision_from"]) or "an empty database"
    revisions = [("", f"{item['revision']}  {item['title']} ({item['seconds']:.2f}s)") for item in applied]
    return [("migrated", f"{len(applied)} revisions from {came_from} in {result['seconds']:.1f}s"), *revisions]


def _warm_rows(result: Mapping[str, Any]) -> Rows:
    """Rows for the result of the task `warm_module_cache`; none if it did not run."""
    if not result:
        return []
    counts = f"{result['added']:,} added, {result['changed']:,} changed, {result['removed']:,} removed"
    rejected = [("not cached", f"{path!r}: {reason}") for path, reason in result["odd"]]
    return [("warmed", f"{size(result['bytes'])} in {result['seconds']:.1f}s: {counts}"), *rejected]


def _schema_rows(schema: SchemaState) -> Rows:
    state = f"database {_joined(schema.database_heads)}, tree {_joined(schema.heads)}"
    rows = [("schema", f"{schema.verdict.replace('_', ' ')}: {state}")]
    rows += [("", f"pending {item.revision}  {item.title}") for item in schema.pending]
    if refusal := schema.refusal():
        rows.append(("", f"{refusal}; {refusal.remedy}"))
    return rows


def _requirements_rows(diff: CacheDiff | None) -> Rows:
    return [("", f"requirements entry {_REQUIREMENTS[diff.requirements]}")] if diff else []


def _path_rows(cache: Mapping[str, Any]) -> Rows:
    """Rows for the paths in `module_cache` of `--json`."""
    kinds = ("added", "changed", "removed", "expiring")
    rows = [("", f"{kind} {path!r}") for kind in kinds for path in cache.get(f"{kind}_paths", ())]
    return rows + [("", f"odd {item['path']!r}: {item['reason']}") for item in cache.get("odd", ())]


def size(count: float) -> str:
    """A number of bytes for a person: `140 MB`."""
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}"
        count /= 1000
    return f"{count:.1f} GB"
