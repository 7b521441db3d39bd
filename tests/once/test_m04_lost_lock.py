"""M4: a runner that has lost its lock records nothing more, and the next holder does not start beside it."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Literal

import pytest

from tests.servers import Command, Database
from tests.servers.process import wait_until
from tests.setups.migration import (
    BARRIER_CLASS,
    Barrier,
    StartMigrate,
    Tree,
    applied,
    barrier,
    is_alive,
    lock_sessions,
    outcome,
    recorded,
)

#: No table lock is what the revisions of these tests wait for.
PATIENT = {"BIFROST_MIGRATION_LOCK_TIMEOUT": "10m"}


def lose_lock(database: Database) -> None:
    """End the session that holds the migration lock, as a server or a pooler may."""
    (session,) = lock_sessions(database)
    database.execute("SELECT pg_terminate_backend(%s)", (session,))
    wait_until(lambda: not is_alive(database, session), "the end of the lock's session")


def lose_lock_of_frozen(step: Command, database: Database, stop: Barrier) -> None:
    """The lock is lost while the process that holds it is frozen; its runner goes on alone, and ends."""
    runner = stop.reached()
    step.send_signal(signal.SIGSTOP)
    lose_lock(database)
    stop.release()
    wait_until(lambda: not is_alive(database, runner), "the end of the runner's session")


@pytest.mark.race
def test_m04_runner_without_lock_records_nothing(database: Database, tree: Tree, start_migrate: StartMigrate) -> None:
    """The lock is lost while its holder is frozen: the runner, which nothing stops, commits nothing of its revision."""
    tree.revision("one").revision("two", barrier())
    with Barrier(database) as stop:
        step = start_migrate(env=PATIENT)
        lose_lock_of_frozen(step, database, stop)
    assert recorded(database) == ["one"]
    assert applied(database) == {"one": 1}

    step.send_signal(signal.SIGCONT)
    done = outcome(step)
    assert (done.code, recorded(database), applied(database)) == (0, ["two"], {"one": 1, "two": 1})
    assert sorted(done.applied) == ["one", "two"]
    assert "trying again" in done.log


@pytest.mark.race
@pytest.mark.parametrize("kind", ["plain", "asynchronous"])
def test_m04_nothing_outside_a_transaction(
    database: Database, tmp_path: Path, start_migrate: StartMigrate, kind: Literal["plain", "asynchronous"]
) -> None:
    """The lock is lost during a statement in an `autocommit_block`: the next statement does not run. With
    asyncpg, whose statements get their own transaction, the running one is rolled back too.
    """
    waits = "WITH stop AS (SELECT pg_advisory_xact_lock_shared({}, 1)) INSERT INTO applied SELECT 'waits' FROM stop"
    lines = [waits.format(BARRIER_CLASS), "INSERT INTO applied (revision) VALUES ('next')"]
    block = "".join(f'\n        op.execute("{line}")' for line in lines)
    tree = Tree(tmp_path / kind, kind).revision("one")
    tree.revision("two", f"with op.get_context().autocommit_block():{block}")
    with Barrier(database) as stop:
        step = start_migrate(env=PATIENT, BIFROST_ALEMBIC_CONFIG=str(tree.config))
        lose_lock_of_frozen(step, database, stop)
    committed = kind == "plain"
    assert (recorded(database), applied(database)) == (["one"], {"one": 1} | ({"waits": 1} if committed else {}))
    step.send_signal(signal.SIGCONT)
    assert outcome(step).code == 0
    assert (recorded(database), applied(database)) == (
        ["two"],
        {"one": 1, "waits": 1 + committed, "next": 1, "two": 1},
    )


@pytest.mark.race
@pytest.mark.parametrize("waits_in", ["transaction", "autocommit"])
def test_m04_next_holder_does_not_start_beside(
    database: Database, tree: Tree, start_migrate: StartMigrate, waits_in: str
) -> None:
    """The next holder ends the open session of a runner without lock before its own runner starts."""
    line = barrier()
    body = line if waits_in == "transaction" else f"with op.get_context().autocommit_block():\n        {line}"
    tree.revision("one").revision("two", body)
    with Barrier(database) as stop:
        frozen = start_migrate(env=PATIENT)
        first = stop.reached()
        freeze(frozen)
        lose_lock(database)
        second_step = start_migrate(env=PATIENT)
        second = stop.reached(besides=[first])
        assert not is_alive(database, first)
        assert is_alive(database, second)
        stop.release()
        done = outcome(second_step)
    assert (done.code, done.applied) == (0, ["two"])
    frozen.resume()
    assert outcome(frozen).code == 0
    assert (recorded(database), applied(database)) == (["two"], {"one": 1, "two": 1})


def freeze(step: Command) -> None:
    """Stop the holder and its runner: neither notices that the lock is gone."""
    step.pause()
