"""What the operator reads: the result on stdout, the verdict as last line, the termination message."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bifrost_bootstrap.errors import BootstrapError, ExitCode, masked

if TYPE_CHECKING:
    from bifrost_bootstrap.init import InitReport
    from bifrost_bootstrap.load import LoadResult
    from bifrost_bootstrap.readiness import Readiness

#: Version of the JSON object of `--json`; fields may be added under one number, not changed.
SCHEMA = 1
#: Bytes that Kubernetes keeps of a termination message.
TERMINATION_BYTES = 4096
#: How text is written that the output's encoding has no character for: a file name may be any bytes.
UNPRINTABLE = "backslashreplace"


def json_object(command: str, code: ExitCode, facts: dict[str, Any]) -> str:
    """The one object that `--json` prints."""
    head = {"schema": SCHEMA, "command": command, "verdict": verdict(code), "exit_code": int(code)}
    return masked(json.dumps(head | facts, ensure_ascii=False))


def verdict(code: ExitCode) -> str:
    """The exit code in a word: "ready", "not_ready", "migration", "unavailable", …"""
    return "ready" if code is ExitCode.OK else code.name.lower()


def error_facts(error: BootstrapError) -> dict[str, Any]:
    """What `--json` and the termination message say of an error."""
    return {"error": type(error).__name__, "message": masked(str(error)), "remedy": error.remedy}


def write_termination_message(file: Path | None, command: str, code: ExitCode, facts: dict[str, Any]) -> None:
    """One JSON line for `kubectl describe`. Raises OSError."""
    if file is None:
        return
    line, longest = json_object(command, code, facts), TERMINATION_BYTES
    # In characters, since a cut must not go through one; of numbers and lists only `--json` has room for all.
    while len(line.encode(errors=UNPRINTABLE)) >= TERMINATION_BYTES:
        longest //= 2
        line = json_object(command, code, {key: text[:longest] for key, text in facts.items() if isinstance(text, str)})
    file.write_text(line + "\n", encoding="utf-8", errors=UNPRINTABLE)


def of_init(report: InitReport) -> str:
    """The summary of an init: one line where nothing was to do."""
    readiness = report.readiness
    head = ", ".join(readiness.schema.database_heads) or "none"
    if readiness.schema.verdict == "unknown_revision":
        head += f", ahead of this image ({', '.join(readiness.schema.heads)}; BIFROST_ALLOW_AHEAD)"
    if report.nothing_to_do:
        return f"ready, nothing to do: schema at {head}, {readiness.modules:,} modules cached ({report.seconds:.2f}s)"
    lines = [f"ready in {report.seconds:.1f}s: schema at {head}, {readiness.modules:,} modules cached"]
    lines += [f"  waited    {item.server} {item.seconds:.1f}s" for item in report.waited]
    if report.migrate:
        came_from = ", ".join(report.migrate["revision_from"]) or "an empty database"
        applied = report.migrate["applied"]
        lines.append(f"  migrated  {len(applied)} revisions from {came_from} in {report.migrate['seconds']:.1f}s")
        lines += [f"            {item['revision']}  {item['title']} ({item['seconds']:.2f}s)" for item in applied]
    if report.warm:
        warm = report.warm
        lines.append(
            f"  warmed    {_size(warm['bytes'])} in {warm['seconds']:.1f}s: {warm['added']:,} added, "
            f"{warm['changed']:,} changed, {warm['removed']:,} removed"
        )
        lines += [f"  not cached  {path!r}: {reason}" for path, reason in warm["odd"]]
    return "\n".join(lines)


def of_check(readiness: Readiness) -> str:
    """The state of schema and cache, with up to ten paths of each difference."""
    schema, diff = readiness.schema, readiness.diff
    heads, database_heads = (", ".join(heads) or "none" for heads in (schema.heads, schema.database_heads))
    lines = [f"schema  {schema.verdict.replace('_', ' ')}: database {database_heads}, tree {heads}"]
    lines += [f"        pending {item.revision}  {item.title}" for item in schema.pending]
    if refusal := schema.refusal():
        lines.append(f"        {refusal}; {refusal.remedy}")
    lines.append(f"cache   {readiness.modules:,} modules indexed; {diff.summary() if diff else 'not compared'}")
    facts = readiness.to_dict()["module_cache"]
    for kind in ("added", "changed", "removed", "expiring"):
        lines += [f"        {kind} {path!r}" for path in facts.get(f"{kind}_paths", ())]
    lines += [f"        odd {item['path']!r}: {item['reason']}" for item in facts.get("odd", ())]
    return "\n".join(lines)


def of_load(result: LoadResult, target: str) -> str:
    """What a load wrote, and which files it could not."""
    lines = [f"{result.written:,} of {result.files:,} files written to {target}"]
    lines += [f"  skipped {path!r}: {reason}" for path, reason in result.skipped]
    return "\n".join(lines)


def _size(count: float) -> str:
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}"
        count /= 1000
    return f"{count:.1f} GB"
