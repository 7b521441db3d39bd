"""What a person reads of a result: a headline and labelled rows, the same on a terminal, in a pipe and in a log."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bifrost_bootstrap.dev.load import LoadResult
    from bifrost_bootstrap.init.loop import InitReport
    from bifrost_bootstrap.migrate.schema_state import SchemaState
    from bifrost_bootstrap.status.diagnostics import Diagnostics
    from bifrost_bootstrap.status.plan import Plan
    from bifrost_bootstrap.status.readiness import Readiness
    from bifrost_bootstrap.warm.diff import CacheDiff


@dataclass(frozen=True)
class Summary:
    """headline: the result in one line. rows: label and text; a row without a label goes on with the one above."""

    headline: str
    rows: list[tuple[str, str]] = field(default_factory=list)

    def __str__(self) -> str:
        width = max((len(label) for label, _ in self.rows), default=0)
        return "\n".join([self.headline, *(f"  {label:<{width}}  {text}" for label, text in self.rows)])


def of_init(report: InitReport) -> Summary:
    """The summary of an init: one line where nothing was to do."""
    readiness = report.readiness
    head = ", ".join(readiness.schema.database_heads) or "none"
    if readiness.schema.verdict == "unknown_revision":
        head += f", ahead of this image ({', '.join(readiness.schema.heads)}; BIFROST_ALLOW_AHEAD)"
    if report.nothing_to_do:
        return Summary(
            f"ready, nothing to do: schema at {head}, {readiness.modules:,} modules cached ({report.seconds:.2f}s)"
        )
    rows = [("waited", f"{item.server} {item.seconds:.1f}s") for item in report.waited]
    if report.migrate and (applied := report.migrate["applied"]):
        came_from = ", ".join(report.migrate["revision_from"]) or "an empty database"
        rows.append(("migrated", f"{len(applied)} revisions from {came_from} in {report.migrate['seconds']:.1f}s"))
        rows += [("", f"{item['revision']}  {item['title']} ({item['seconds']:.2f}s)") for item in applied]
    if warm := report.warm:
        counts = f"{warm['added']:,} added, {warm['changed']:,} changed, {warm['removed']:,} removed"
        rows.append(("warmed", f"{size(warm['bytes'])} in {warm['seconds']:.1f}s: {counts}"))
        rows += [("not cached", f"{path!r}: {reason}") for path, reason in warm["odd"]]
    return Summary(f"ready in {report.seconds:.1f}s: schema at {head}, {readiness.modules:,} modules cached", rows)


def of_check(readiness: Readiness, around: Diagnostics) -> Summary:
    """The state of schema and cache, with up to ten paths of each difference, and what stands around them."""
    missing = readiness.missing()
    rows = _schema_rows(readiness.schema)
    diff = readiness.diff.summary() if readiness.diff else "not compared"
    rows.append(("cache", f"{readiness.modules:,} modules indexed; {diff}"))
    rows += _path_rows(readiness.to_dict()["module_cache"])
    rows += _requirements_rows(readiness.diff)
    rows += [
        ("index", f"{name} is INVALID; repair it with: {repair}") for name, repair in around.invalid_indexes.items()
    ]
    rows += [("redis", around.redis)] if around.redis else []
    rows += [("worker", around.worker)] if around.worker else []
    return Summary(f"not ready: {missing}" if missing else "ready", rows)


def of_plan(plan: Plan) -> Summary:
    """What an init would do now; the SQL is not part of it."""
    rows = _schema_rows(plan.schema)
    if plan.diff is None:
        rows.append(("cache", plan.no_diff))
    else:
        rows.append(
            ("cache", f"a warm from the rows as they are now: {plan.diff.summary()}, {size(plan.bytes)} to write")
        )
        rows += _path_rows(plan.to_dict()["module_cache"])
        rows += _requirements_rows(plan.diff)
        if plan.diff.shrinks:
            rows.append(
                ("brake", "a warm would stop here (2): it removes most of the cache; --allow-shrink if it is meant")
            )
    rows += [("sql", plan.no_sql)] if plan.no_sql else []
    return Summary(plan.headline, rows)


def of_load(result: LoadResult, target: str) -> Summary:
    """What a load wrote, and which files it could not."""
    skipped = [("skipped", f"{path!r}: {reason}") for path, reason in result.skipped]
    return Summary(f"{result.written:,} of {result.files:,} files written to {target}", skipped)


def _schema_rows(schema: SchemaState) -> list[tuple[str, str]]:
    heads, database_heads = (", ".join(heads) or "none" for heads in (schema.heads, schema.database_heads))
    rows = [("schema", f"{schema.verdict.replace('_', ' ')}: database {database_heads}, tree {heads}")]
    rows += [("", f"pending {item.revision}  {item.title}") for item in schema.pending]
    if refusal := schema.refusal():
        rows.append(("", f"{refusal}; {refusal.remedy}"))
    return rows


#: How the requirements entry stands, in words.
_REQUIREMENTS = {
    "present": "present",
    "missing": "missing; a warm makes it from the row requirements.txt",
    "none": "absent, as is a row requirements.txt",
}


def _requirements_rows(diff: CacheDiff | None) -> list[tuple[str, str]]:
    return [("", f"requirements entry {_REQUIREMENTS[diff.requirements]}")] if diff else []


def _path_rows(cache: Mapping[str, Any]) -> list[tuple[str, str]]:
    rows = [
        ("", f"{kind} {path!r}")
        for kind in ("added", "changed", "removed", "expiring")
        for path in cache.get(f"{kind}_paths", ())
    ]
    return rows + [("", f"odd {item['path']!r}: {item['reason']}") for item in cache.get("odd", ())]


def size(count: float) -> str:
    """Bytes as a person says them: `140 MB`."""
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}"
        count /= 1000
    return f"{count:.1f} GB"
