"""The output for programs: a JSON object, and the termination message."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings, strategies as st

from bifrost_bootstrap.cli import report
from bifrost_bootstrap.dev.load import LoadResult
from bifrost_bootstrap.errors import BusyError, ExitCode
from bifrost_bootstrap.init.loop import InitReport
from bifrost_bootstrap.migrate.schema_state import SchemaState
from bifrost_bootstrap.migrate.tree import Revision
from bifrost_bootstrap.redaction import remember_secret
from bifrost_bootstrap.status.readiness import Readiness

BEHIND = SchemaState("behind", ("0002",), ("0001",), (Revision("0002", "Index the modules"),))
READY = Readiness(BEHIND, None, None, 1200)


def test_json_object_has_the_fields_of_the_contract() -> None:
    """Number of the format, command, verdict and exit code come first, then the facts."""
    line = report.json_object("check", ExitCode.NOT_READY, {"path": "Grüße/世界.py", "count": 3})
    assert list(json.loads(line).items()) == [
        ("schema", 1),
        ("command", "check"),
        ("verdict", "not_ready"),
        ("exit_code", 3),
        ("path", "Grüße/世界.py"),
        ("count", 3),
    ]
    assert "\n" not in line


def test_verdicts_are_the_codes_in_words() -> None:
    """Every exit code has one word, and no two the same."""
    words = {report.verdict("init", code) for code in ExitCode}
    assert len(words) == len(ExitCode)
    assert report.verdict("check", ExitCode.OK) == "ready"
    assert report.verdict("plan", ExitCode.OK) == "planned"
    assert report.verdict("worker", ExitCode.OK) == "stopped"
    assert report.verdict("plan", ExitCode.DEADLINE) == "deadline"


def test_no_fact_overwrites_what_the_contract_fixes() -> None:
    """The exit code of the object is that of the process, whatever a fact is called."""
    facts: dict[str, Any] = InitReport(READY, 1.0).to_dict() | Readiness(BEHIND).to_dict()
    facts |= LoadResult(1, 1, []).to_dict() | report.error_facts(BusyError("a", "b"))
    assert not facts.keys() & {"schema", "command", "verdict", "exit_code"}
    json.loads(report.json_object("init", ExitCode.OK, facts))


def test_secrets_are_masked_in_json() -> None:
    """A secret is masked at any depth, and the object stays JSON."""
    remember_secret('hidden"word\\')
    line = report.json_object("init", ExitCode.BUG, {"list": [{"reason": 'login hidden"word\\ failed'}]})
    assert json.loads(line)["list"] == [{"reason": "login *** failed"}]


def test_error_says_what_and_what_to_do() -> None:
    """Class, text and remedy of an error are facts of the object."""
    error = BusyError("the migration lock", "pid 7")
    assert report.error_facts(error) == {"error": "BusyError", "message": str(error), "remedy": error.remedy}


def test_termination_message(tmp_path: Path) -> None:
    """One JSON line; the caller handles a file that cannot be written."""
    file = tmp_path / "termination-log"
    report.write_termination_message(file, "init", ExitCode.OK, {"seconds": 1.5})
    assert file.read_text().count("\n") == 1
    assert json.loads(file.read_text())["seconds"] == 1.5
    with pytest.raises(OSError, match="No such file"):
        report.write_termination_message(tmp_path / "absent" / "file", "init", ExitCode.OK, {})


@settings(deadline=None)  # a busy machine may take longer than Hypothesis' 200 ms
@given(st.text(st.characters(categories=None), max_size=3) | st.sampled_from(["x", "世", '"', "\ud800", "\\"]))
def test_termination_message_fits(unit: str) -> None:
    """However long the texts and whatever their characters, the line is JSON, and short enough to be kept whole."""
    file = Path("/dev/shm" if Path("/dev/shm").is_dir() else "/tmp") / "bifrost-unit-termination"
    facts = {"message": unit * 5000, "remedy": unit * 5000, "paths": [unit] * 5000}
    try:
        report.write_termination_message(file, "init", ExitCode.MIGRATION, facts)
        written = file.read_bytes()
    finally:
        file.unlink(missing_ok=True)
    assert len(written) <= report.TERMINATION_BYTES
    assert json.loads(written)["exit_code"] == 1
