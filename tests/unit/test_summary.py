"""The output for people. Paths in it are data."""

from __future__ import annotations

from bifrost_bootstrap.cli import summary
from bifrost_bootstrap.dev.load import LoadResult
from bifrost_bootstrap.init.loop import InitReport
from bifrost_bootstrap.migrate.schema_state import SchemaState
from bifrost_bootstrap.migrate.tree import Revision
from bifrost_bootstrap.servers.waiting import Waited
from bifrost_bootstrap.status.diagnostics import Diagnostics
from bifrost_bootstrap.status.plan import Plan
from bifrost_bootstrap.status.readiness import Readiness
from bifrost_bootstrap.warm.diff import CacheDiff

AT_HEAD = SchemaState("at_head", ("0002",), ("0002",), ready=True)
BEHIND = SchemaState("behind", ("0002",), ("0001",), (Revision("0002", "Index the modules"),))
READY = Readiness(AT_HEAD, CacheDiff(), None, 1200)
NOTHING = Diagnostics()


def test_nothing_to_do_is_one_line() -> None:
    """An init that found everything done says so in one line."""
    text = str(summary.of_init(InitReport(READY, 0.123, nothing_to_do=True)))
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
    text = str(summary.of_init(InitReport(READY, 4.0, False, [Waited("Redis h:1/0", 1.5)], migrate, warm)))
    assert text.splitlines() == [
        "ready in 4.0s: schema at 0002, 1,200 modules cached",
        "  waited      Redis h:1/0 1.5s",
        "  migrated    2 revisions from an empty database in 2.5s",
        "              0001  Create (0.25s)",
        "              0002  Index (2.00s)",
        "  warmed      2 MB in 0.5s: 1,200 added, 0 changed, 3 removed",
        "  not cached  'index': collides",
    ]


def test_check_of_a_ready_deployment() -> None:
    """Ready: the headline says so, and each part where it stands."""
    around = Diagnostics("no memory limit, policy noeviction", {}, "1 bootstrap worker on q")
    assert str(summary.of_check(READY, around)).splitlines() == [
        "ready",
        "  schema  at head: database 0002, tree 0002",
        "  cache   1,200 modules indexed; no difference",
        "          requirements entry absent, as is a row requirements.txt",
        "  redis   no memory limit, policy noeviction",
        "  worker  1 bootstrap worker on q",
    ]


def test_check_names_what_is_missing() -> None:
    """Pending revisions, differing paths (ten of each kind), rows that cannot be cached, invalid indexes are named."""
    diff = CacheDiff(
        added={b"%d.py" % number: b"" for number in range(12)},
        removed={b"a\nb.py": b""},
        rejected=[("index", "collides")],
    )
    text = str(summary.of_check(Readiness(AT_HEAD, diff, None, 1), Diagnostics("", {"broken": "REINDEX broken"})))
    assert text.startswith("not ready: module cache differs: 12 added, 1 removed\n")
    assert "cache   1 modules indexed; 12 added, 1 removed" in text
    assert text.count("added '") == 10
    assert "removed 'a\\nb.py'" in text
    assert "odd 'index': collides" in text
    assert "index   broken is INVALID; repair it with: REINDEX broken" in text
    assert "pending 0002  Index the modules" in str(summary.of_check(Readiness(BEHIND), NOTHING))


def test_check_of_a_schema_that_cannot_be_migrated() -> None:
    """What stands in the way of a migration is told with its remedy."""
    ahead = SchemaState("unknown_revision", ("0002",), ("9999",))
    text = str(summary.of_check(Readiness(ahead), NOTHING))
    assert text.startswith("not ready: schema is unknown revision (9999)\n")
    assert "9999, which this image does not have" in text
    assert "BIFROST_ALLOW_AHEAD" in text
    assert "BIFROST_ALLOW_AHEAD" in Readiness(ahead).remedy


def test_plan_of_what_is_pending() -> None:
    """The headline says what init would do; the rows name revisions and modules, and the shrink limit."""
    diff = CacheDiff(added={b"new.py": b""}, removed={b"%d.py" % number: b"" for number in range(21)}, indexed=30)
    text = str(summary.of_plan(Plan(BEHIND, diff, bytes=1400, no_sql="it reads")))
    assert text.startswith("init would apply 1 revisions and end with 2: it removes 21 of 30 entries\n")
    assert "pending 0002  Index the modules" in text
    assert "1 added, 21 removed, 1 kB to write" in text
    assert "added 'new.py'" in text
    assert "shrink  a warm would stop here (2)" in text
    assert "sql     it reads" in text


def test_plan_of_nothing_and_of_what_cannot_be() -> None:
    """Nothing to do says so; a schema that cannot be migrated says how an init would end."""
    assert Plan(AT_HEAD, CacheDiff()).headline == "nothing to do"
    assert Plan(AT_HEAD, CacheDiff(ttl_only={b"a": b""})).headline == "init would warm the module cache"
    assert Plan(SchemaState("empty_tree", (), ())).headline.startswith("init would end with 1: schema: ")
    assert Plan(BEHIND, no_diff="no table").headline == "init would apply 1 revisions and warm the module cache"
    assert Plan(AT_HEAD, no_diff="no table").headline == "init would end with 2: no table"


def test_load_names_what_it_skipped() -> None:
    """Counts, target, and each file that a row cannot hold with its reason."""
    text = str(summary.of_load(LoadResult(1003, 1002, [("a b.py", "holds a NUL byte")]), "PostgreSQL h:1/d"))
    assert text.splitlines() == [
        "1,002 of 1,003 files written to PostgreSQL h:1/d",
        "  skipped  'a b.py': holds a NUL byte",
    ]
