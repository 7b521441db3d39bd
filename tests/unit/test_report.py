"""What the operator reads: one JSON object, short summaries, last words that Kubernetes keeps."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, strategies as st

from bifrost_bootstrap import report
from bifrost_bootstrap.cache_diff import CacheDiff
from bifrost_bootstrap.errors import BusyError, ExitCode, remember_secret
from bifrost_bootstrap.init import InitReport
from bifrost_bootstrap.load import LoadResult
from bifrost_bootstrap.readiness import Readiness
from bifrost_bootstrap.schema import SchemaState
from bifrost_bootstrap.tree import Revision
from bifrost_bootstrap.waiting import Waited

AT_HEAD = SchemaState("at_head", ("0002",), ("0002",), ready=True)
BEHIND = SchemaState("behind", ("0002",), ("0001",), (Revision("0002", "Index the modules"),))
READY = Readiness(AT_HEAD, CacheDiff(), None, 1200)


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
    words = {report.verdict(code) for code in ExitCode}
    assert len(words) == len(ExitCode)
    assert report.verdict(ExitCode.OK) == "ready"
    assert report.verdict(ExitCode.DEADLINE) == "deadline"


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
    """One JSON line; without a file nothing happens; a file that cannot be written is the caller's to judge."""
    file = tmp_path / "termination-log"
    report.write_termination_message(file, "init", ExitCode.OK, {"seconds": 1.5})
    assert file.read_text().count("\n") == 1
    assert json.loads(file.read_text())["seconds"] == 1.5
    report.write_termination_message(None, "init", ExitCode.OK, {})
    with pytest.raises(OSError, match="No such file"):
        report.write_termination_message(tmp_path / "absent" / "file", "init", ExitCode.OK, {})


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


def test_nothing_to_do_is_one_line() -> None:
    """An init that found everything done says so in one line."""
    text = report.of_init(InitReport(READY, 0.123, nothing_to_do=True))
    assert text == "ready, nothing to do: schema at 0002, 1,200 modules cached (0.12s)"


def test_summary_of_an_init() -> None:
    """What was waited for, the revisions with titles and seconds, and what the warm did."""
    applied = [
        {"revision": "0001", "title": "Create", "seconds": 0.25},
        {"revision": "0002", "title": "Index", "seconds": 2},
    ]
    migrate = {"revision_from": [], "revision_to": ["0002"], "applied": applied, "seconds": 2.5}
    warm = {
        "bytes": 2_500_000,
        "seconds": 0.5,
        "added": 1200,
        "changed": 0,
        "removed": 3,
        "odd": [["index", "collides"]],
    }
    text = report.of_init(InitReport(READY, 4.0, False, [Waited("Redis h:1/0", 1.5)], migrate, warm))
    assert text.splitlines() == [
        "ready in 4.0s: schema at 0002, 1,200 modules cached",
        "  waited    Redis h:1/0 1.5s",
        "  migrated  2 revisions from an empty database in 2.5s",
        "            0001  Create (0.25s)",
        "            0002  Index (2.00s)",
        "  warmed    2 MB in 0.5s: 1,200 added, 0 changed, 3 removed",
        "  not cached  'index': collides",
    ]


def test_check_of_a_ready_deployment() -> None:
    """Ready: both lines say so."""
    assert report.of_check(READY).splitlines() == [
        "schema  at head: database 0002, tree 0002",
        "cache   1,200 modules indexed; no difference",
    ]


def test_check_names_what_is_missing() -> None:
    """Pending revisions, differing paths (ten of each kind) and rows that cannot be cached are named."""
    diff = CacheDiff(
        added=[b"%d.py" % number for number in range(12)], removed=[b"a\nb.py"], odd=[("index", "collides")]
    )
    text = report.of_check(Readiness(AT_HEAD, diff, None, 1))
    assert "cache   1 modules indexed; 12 added, 1 removed" in text
    assert text.count("added '") == 10
    assert "removed 'a\\nb.py'" in text
    assert "odd 'index': collides" in text
    assert "pending 0002  Index the modules" in report.of_check(Readiness(BEHIND))


def test_check_of_a_schema_that_cannot_be_migrated() -> None:
    """What stands in the way of a migration is told with its remedy."""
    ahead = SchemaState("unknown_revision", ("0002",), ("9999",))
    text = report.of_check(Readiness(ahead))
    assert "9999, which this image does not have" in text
    assert "BIFROST_ALLOW_AHEAD" in text


def test_load_names_what_it_skipped() -> None:
    """Counts, target, and each file that a row cannot hold with its reason."""
    text = report.of_load(LoadResult(1003, 1002, [("a b.py", "holds a NUL byte")]), "PostgreSQL h:1/d")
    assert text.splitlines() == [
        "1,002 of 1,003 files written to PostgreSQL h:1/d",
        "  skipped 'a b.py': holds a NUL byte",
    ]
