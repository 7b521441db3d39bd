"""`--json`: one description for the objects of all commands, and each command keeps to it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from bifrost_bootstrap.cli import report
from bifrost_bootstrap.errors import ExitCode
from tests.acceptance.state import MODULES, insert_modules
from tests.conftest import RunBootstrap
from tests.servers import Command, Database

SCHEMA: dict[str, Any] = json.loads((Path(__file__).parents[2] / "docs" / "output.schema.json").read_text())
VALIDATOR = jsonschema.Draft202012Validator(SCHEMA)


def told(run_bootstrap: RunBootstrap, *arguments: str, code: int = 0, env: dict[str, str] | None = None) -> Any:
    """The object of one command, after it was held against its description."""
    done = run_bootstrap(*arguments, "--json", env=env)
    found = json.loads(done.stdout)
    VALIDATOR.validate(found)
    assert (found["command"], found["exit_code"], done.returncode) == (arguments[0], code, code), done.stderr
    return found


def test_objects_of_all_commands(
    bootstrap_worker: Command, run_bootstrap: RunBootstrap, database: Database, tmp_path: Path
) -> None:
    """From an empty database to a warm cache, and what each command says on the way."""
    empty = told(run_bootstrap, "check", code=3)
    assert (empty["schema_state"]["verdict"], empty["remedy"]) == ("empty", "run `bifrost-bootstrap init`")
    assert told(run_bootstrap, "plan", "--sql")["sql"]
    assert told(run_bootstrap, "init")["migrate"]["applied"]
    (tmp_path / "new.py").write_text("")
    assert told(run_bootstrap, "load", str(tmp_path), "--yes")["written"] == 1
    insert_modules(database, {**MODULES, "index": "collides"})
    stale = told(run_bootstrap, "check", code=3)
    assert stale["module_cache"]["added"] == len(MODULES) + 1
    assert stale["remedy"] == "run `bifrost-bootstrap init`, or `rewarm`"
    assert told(run_bootstrap, "init")["warm"]["odd"]
    assert told(run_bootstrap, "init")["nothing_to_do"] is True
    assert told(run_bootstrap, "rewarm", "--full")["warm"]["changed"] == len(MODULES) + 1
    around = told(run_bootstrap, "check")["surroundings"]
    assert around["worker"].startswith("1 bootstrap worker on bifrost.bootstrap.")
    assert around["redis"] == "no memory limit, policy noeviction"


@pytest.mark.parametrize("command", ["init", "rewarm", "check", "plan"])
def test_objects_of_failures(command: str, run_bootstrap: RunBootstrap, clean_env: dict[str, str]) -> None:
    """A failure has its class, its message and what to do."""
    told(run_bootstrap, command, code=78, env=clean_env)


def test_the_description_knows_every_code_and_no_field_by_chance() -> None:
    """Codes and verdicts of the description are those of the code; a field that nobody described is found."""
    assert SCHEMA["properties"]["exit_code"]["enum"] == [int(code) for code in ExitCode]
    verdicts = {report.verdict(command, code) for command in ("init", "plan", "load", "worker") for code in ExitCode}
    assert set(SCHEMA["properties"]["verdict"]["enum"]) == verdicts
    head = {"schema": 1, "command": "check", "verdict": "usage", "exit_code": 130}
    VALIDATOR.validate(head)
    with pytest.raises(jsonschema.ValidationError, match="nobody"):
        VALIDATOR.validate(head | {"nobody": 1})
    with pytest.raises(jsonschema.ValidationError, match="is a required property"):
        VALIDATOR.validate(head | {"exit_code": 69})
