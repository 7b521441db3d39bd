"""`--json`: one JSON schema for the objects of all commands."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from bifrost_bootstrap.cli import report
from bifrost_bootstrap.errors import ExitCode
from tests.conftest import RunBootstrap
from tests.servers import Command, Database
from tests.setups.state import MODULES, insert_modules

SCHEMA: dict[str, Any] = json.loads((Path(__file__).parents[2] / "docs" / "output.schema.json").read_text())
VALIDATOR = jsonschema.Draft202012Validator(SCHEMA)

_HEAD = {"schema", "command", "verdict", "exit_code"}
_READINESS = {"ready", "schema_state", "module_cache"}
_INIT = {"seconds", "nothing_to_do", "waited", "migrate", "warm"}
_KINDS = {"added", "changed", "removed", "expiring"}
_PATHS = {"added_paths", "changed_paths", "removed_paths", "expiring_paths"}
#: Fields of the objects that a success or `check` prints, written out: a program reads them by these names.
FIELDS = {
    "init": _HEAD | _READINESS | _INIT,
    "rewarm": _HEAD | _READINESS | _INIT,
    "check": _HEAD | _READINESS | {"surroundings", "message", "remedy"},
    "plan": _HEAD | {"schema_state", "module_cache", "sql", "sql_unknown", "message"},
    "load": _HEAD | {"files", "written", "skipped"},
    ".migrate": {"verdict", "revision_from", "revision_to", "applied", "seconds"},
    ".migrate.applied": {"revision", "title", "seconds"},
    ".warm": _KINDS | {"warm_id", "modules", "heads", "bytes", "passes", "seconds", "odd", "source", "requirements"},
    ".schema_state": {"verdict", "heads", "database_heads", "pending"},
    ".schema_state.pending": {"revision", "title"},
    ".module_cache": _KINDS
    | _PATHS
    | {"modules", "index_expires", "requirements", "odd", "bytes", "unknown", "would_shrink"},
    ".module_cache.odd": {"path", "reason"},
    ".surroundings": {"redis", "invalid_indexes", "worker"},
}


def fields(value: Any, path: str = "") -> dict[str, set[str]]:
    """The fields of each object in a JSON value, by the path of the object; that of the value itself is `path`."""
    found: dict[str, set[str]] = defaultdict(set)
    if isinstance(value, dict) and value:
        found[path] |= value.keys()
    parts = value.items() if isinstance(value, dict) else [("", item) for item in value]
    for name, part in parts:
        if isinstance(part, dict | list):
            for place, names in fields(part, f"{path}.{name}" if name else path).items():
                found[place] |= names
    return found


def object_of(run_bootstrap: RunBootstrap, *arguments: str, code: int = 0, env: dict[str, str] | None = None) -> Any:
    """The object of one command, after it was held against its description."""
    done = run_bootstrap(*arguments, "--json", env=env)
    found = json.loads(done.stdout)
    VALIDATOR.validate(found)
    assert (found["command"], found["exit_code"], done.returncode) == (arguments[0], code, code), done.stderr
    return found


def test_objects_of_all_commands(
    bootstrap_worker: Command, run_bootstrap: RunBootstrap, database: Database, tmp_path: Path
) -> None:
    """From an empty database to a warm cache: the object of each command is valid."""
    seen: dict[str, set[str]] = defaultdict(set)

    def told(*arguments: str, code: int = 0) -> Any:
        found = object_of(run_bootstrap, *arguments, code=code)
        for path, names in fields(found).items():
            seen[path or arguments[0]] |= names
        return found

    empty = told("check", code=3)
    assert (empty["schema_state"]["verdict"], empty["remedy"]) == ("empty", "run `bifrost-bootstrap init`")
    assert told("plan", "--sql")["sql"]
    assert told("init")["migrate"]["applied"]
    (tmp_path / "new.py").write_text("")
    assert told("load", str(tmp_path), "--yes")["written"] == 1
    insert_modules(database, {**MODULES, "index": "collides"})
    assert told("plan")["module_cache"]["would_shrink"] is False
    stale = told("check", code=3)
    assert stale["module_cache"]["added"] == len(MODULES) + 1
    assert stale["remedy"] == "run `bifrost-bootstrap init`, or `rewarm`"
    assert told("init")["warm"]["odd"]
    assert told("init")["nothing_to_do"] is True
    assert told("rewarm", "--full")["warm"]["changed"] == len(MODULES) + 1
    around = told("check")["surroundings"]
    assert around["worker"].startswith("1 bootstrap worker on bifrost.bootstrap.")
    assert around["redis"] == "no memory limit, policy noeviction"
    assert seen == FIELDS


@pytest.mark.parametrize("command", ["init", "rewarm", "check", "plan", "rehearse"])
def test_objects_of_failures(command: str, run_bootstrap: RunBootstrap, clean_env: dict[str, str]) -> None:
    """The object of a failure has class, message and what to do."""
    object_of(run_bootstrap, command, code=78, env=clean_env)


def test_schema_has_every_exit_code_and_no_unknown_field() -> None:
    """The schema has the exit codes and verdicts of the code, and rejects an unknown field."""
    assert SCHEMA["properties"]["exit_code"]["enum"] == [int(code) for code in ExitCode]
    verdicts = {
        report.verdict(command, code) for command in ("init", "plan", "rehearse", "load", "worker") for code in ExitCode
    }
    assert set(SCHEMA["properties"]["verdict"]["enum"]) == verdicts
    head = {"schema": 1, "command": "check", "verdict": "usage", "exit_code": 130}
    VALIDATOR.validate(head)
    with pytest.raises(jsonschema.ValidationError, match="nobody"):
        VALIDATOR.validate(head | {"nobody": 1})
    with pytest.raises(jsonschema.ValidationError, match="is a required property"):
        VALIDATOR.validate(head | {"exit_code": 69})
