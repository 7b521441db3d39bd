"""M5: with the schema at head, init only reads, with any number of replicas."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import BOOTSTRAP, RunBootstrap, StartCommand
from tests.servers import PostgresServer, RunFolder
from tests.setups.migration import Tree

REPLICAS = 20
#: Before anything else, and again in the snapshot in which the rows are compared with the cache.
READS_OF_THE_VERSION = 2
#: One line of the server's log for each statement, whichever protocol it came by.
STATEMENT = re.compile(r"<([^>]*)> LOG:  (?:statement|execute [^:]*): (.*)")
#: What an init at head may say to the server. Everything else, locks above all, would show here.
READS = re.compile(
    r"SELECT|WITH|BEGIN|COMMIT|ROLLBACK|SET TRANSACTION|DECLARE|FETCH|CLOSE|SAVEPOINT|RELEASE|COPY \(", re.I
)


@pytest.mark.timeout(180)
def test_m05_at_head_nothing_but_reads(  # noqa: PLR0917  (fixtures)
    run_folder: RunFolder,
    start_server: Callable[[PostgresServer], PostgresServer],
    tmp_path: Path,
    tree: Tree,
    clean_env: dict[str, str],
    redis_url: str,
    rabbitmq_url: str,
    run_bootstrap: RunBootstrap,
    start_command: StartCommand,
) -> None:
    """Twenty inits at head. The log of PostgreSQL shows no lock, no DDL, no write, and two reads of the
    version per init; the interpreter of the tree is not started.
    """
    server = start_server(PostgresServer(run_folder, {"log_statement": "all", "log_line_prefix": "<%a> "}))
    database = server.create_database()
    python, started = tmp_path / "python", tmp_path / "started"
    python.write_text(f'#!/bin/sh\necho >> {started}\nexec {sys.executable} "$@"\n')
    python.chmod(0o755)
    tree.revision("one").revision("two")
    env = clean_env | {
        "BIFROST_DATABASE_URL": database.url,
        "BIFROST_REDIS_URL": redis_url,
        "BIFROST_RABBITMQ_URL": rabbitmq_url,
        "BIFROST_ALEMBIC_CONFIG": str(tree.config),
        "BIFROST_ALEMBIC_PYTHON": str(python),
    }
    first = run_bootstrap("init", "--with-worker", env=env, timeout=90)
    assert first.returncode == 0, first.stderr
    assert started.read_text() == "\n"

    begins = server.log.stat().st_size
    inits = [start_command([*BOOTSTRAP, "init"], env=env) for _ in range(REPLICAS)]
    done = [init.wait(90) for init in inits]
    assert [one.returncode for one in done] == [0] * REPLICAS, done[0].stderr
    assert all("nothing to do" in one.stdout for one in done)
    assert started.read_text() == "\n"

    log = server.log.read_bytes()[begins:].decode()
    statements = [match[2] for match in STATEMENT.finditer(log) if match[1].startswith("bifrost-bootstrap")]
    reads = [text for text in statements if "alembic_version" in text and "FROM" in text]
    assert len(reads) == READS_OF_THE_VERSION * REPLICAS, set(reads)
    assert [text for text in statements if not READS.match(text)] == []
    assert [text for text in statements if "advisory" in text or "INTO" in text.upper()] == []
    assert "migration-lock" not in log
