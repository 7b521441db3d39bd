"""Every way in which init fails: exit code, message, and what stays unchanged."""

from __future__ import annotations

import json
import re
import signal
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import redis

from tests.conftest import BOOTSTRAP, RunBootstrap, StartCommand, StartWorker
from tests.servers import Command, Database
from tests.servers.leaks import LEAK_MARKS, leaks_in
from tests.servers.process import free_port, wait_until
from tests.setups.state import cached, heads, insert_modules

#: A deadline that is long enough to look at every server, seconds.
SHORT = "4s"

REVISION = '''"""{title}"""
from alembic import op
revision = "{name}"
down_revision = {down!r}


def upgrade() -> None:
    op.execute("""{statement}""")
'''


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """The alembic.ini of a tree whose first revision creates the table. `add_revision` adds revisions."""
    folder = tmp_path / "tree"
    (folder / "versions").mkdir(parents=True)
    (folder / "env.py").write_text(
        "import os\n"
        "from alembic import context\n"
        "from sqlalchemy import create_engine\n"
        "url = os.environ['BIFROST_DATABASE_URL'].replace('postgresql://', 'postgresql+psycopg://')\n"
        "with create_engine(url).connect() as connection:\n"
        "    context.configure(connection=connection, transaction_per_migration=True)\n"
        "    with context.begin_transaction():\n"
        "        context.run_migrations()\n"
    )
    columns = (
        "path varchar(1000) UNIQUE, content text, content_hash varchar(64), entity_type text,"
        " is_deleted bool NOT NULL DEFAULT false"
    )
    config = folder / "alembic.ini"
    config.write_text("[alembic]\nscript_location = %(here)s\n")
    add_revision(config, "aaa1", None, f"CREATE TABLE workspace_files ({columns})", "Create the table")
    return config


def add_revision(config: Path, name: str, down: str | None, statement: str, title: str) -> None:
    """Write one more revision into the tree."""
    text = REVISION.format(name=name, down=down, statement=statement, title=title)
    (config.parent / "versions" / f"{name}.py").write_text(text)


@pytest.fixture
def tree_env(bifrost_env: dict[str, str], tree: Path) -> dict[str, str]:
    """The environment `bifrost_env` with this tree."""
    return bifrost_env | {"BIFROST_ALEMBIC_CONFIG": str(tree)}


def with_address(url: str, port: int) -> str:
    """The URL with another port."""
    parts = urlsplit(url)
    return parts._replace(netloc=f"{parts.netloc.rpartition(':')[0]}:{port}").geturl()


def tasks(redis_url: str) -> dict[str, dict[str, Any]]:
    """The stored results of all tasks, by name."""
    with redis.Redis.from_url(redis_url) as client:
        metas = [
            json.loads(client.get(key) or "{}") for key in client.scan_iter("bifrost:bootstrap:celery-task-meta-*")
        ]
    return {meta.get("name") or "never ran": meta for meta in metas}


def test_broken_migration(
    tree: Path,
    tree_env: dict[str, str],
    start_worker: StartWorker,
    run_bootstrap: RunBootstrap,
    database: Database,
    redis_url: str,
) -> None:
    """Exit 1 with the revision and the error of PostgreSQL. Earlier revisions stay applied, and the warm does
    not run.
    """
    add_revision(tree, "bbb2", "aaa1", "ALTER TABLE nowhere ADD COLUMN x int", "Alter a table that is not there")
    add_revision(tree, "ccc3", "bbb2", "SELECT 1", "Never reached")
    worker = start_worker(env=tree_env)
    done = run_bootstrap("init", env=tree_env)
    assert (done.returncode, done.stdout) == (1, "")
    said = done.stderr[done.stderr.index("ERROR") :]
    assert "revision bbb2 (Alter a table that is not there) failed" in said
    assert 'relation "nowhere" does not exist' in said
    assert "ALTER TABLE nowhere ADD COLUMN x int" in said
    assert "applied before it: aaa1" in said
    assert "what to do: " in said
    last = said.splitlines()[-1]
    assert last.endswith("(exit 1)")
    assert "revision bbb2" in last
    assert "what to do: " in last
    assert heads(database) == ["aaa1"]
    assert cached(redis_url) == {}
    assert "bifrost.bootstrap.warm_module_cache" not in {
        name for name, meta in tasks(redis_url).items() if meta["status"] == "SUCCESS"
    }
    assert "warm_module_cache" not in worker.stderr.read_text()

    as_json = run_bootstrap("init", "--json", env=tree_env)
    found = json.loads(as_json.stdout)
    assert as_json.returncode == found["exit_code"] == 1
    assert (found["schema"], found["verdict"], found["error"]) == (1, "migration", "MigrationError")
    assert "bbb2" in found["message"]
    assert worker.running


def test_failed_warm(
    run_bootstrap: RunBootstrap, bootstrap_worker: Command, database: Database, redis_url: str
) -> None:
    """A warm that would remove most of the cache ends with 2 and changes nothing. --allow-shrink lets it continue."""
    assert run_bootstrap("init").returncode == 0
    many = {f"many/{number}.py": "" for number in range(30)}
    insert_modules(database, many)
    assert run_bootstrap("init").returncode == 0
    database.execute("UPDATE workspace_files SET is_deleted = true WHERE path <> 'many/7.py'")
    done = run_bootstrap("init")
    assert (done.returncode, done.stdout) == (2, "")
    assert "would remove 29 of 30 entries, and has removed none of them" in done.stderr
    assert "--allow-shrink" in done.stderr
    assert cached(redis_url) == many
    assert run_bootstrap("init", "--allow-shrink").returncode == 0
    assert cached(redis_url) == {"many/7.py": ""}
    assert bootstrap_worker.running


@pytest.mark.parametrize(
    ("variable", "words"),
    [
        ("BIFROST_DATABASE_URL", r"PostgreSQL 127\.0\.0\.1:{port}/\w+ is not available: .*Connection refused"),
        ("BIFROST_REDIS_URL", r"Redis 127\.0\.0\.1:{port}/\d+ is not available: .*refused"),
        ("BIFROST_RABBITMQ_URL", r"RabbitMQ 127\.0\.0\.1:{port}/\S+ is not available: .*refused"),
    ],
)
def test_stopped_server_is_69(
    variable: str, words: str, run_bootstrap: RunBootstrap, bifrost_env: dict[str, str]
) -> None:
    """Init names a stopped server while it waits and in its last line. It ends with 69 at the deadline."""
    port = free_port()
    env = bifrost_env | {variable: with_address(bifrost_env[variable], port)}
    done = run_bootstrap("init", "--timeout", SHORT, env=env)
    assert (done.returncode, done.stdout) == (69, "")
    expected = words.replace("{port}", str(port))
    lines = done.stderr.splitlines()
    assert any(re.search(f"INFO +waiting for a server: {expected}", line) for line in lines), done.stderr
    assert re.search(f"ERROR +init: {expected}", done.stderr)
    assert lines[-1].endswith("(exit 69)")


def test_check_does_not_wait_for_a_server(run_bootstrap: RunBootstrap, bifrost_env: dict[str, str]) -> None:
    """`check` without `--wait` names a stopped server at once and ends with 69. It does not need RabbitMQ."""
    env = bifrost_env | {"BIFROST_REDIS_URL": with_address(bifrost_env["BIFROST_REDIS_URL"], free_port())}
    del env["BIFROST_RABBITMQ_URL"]
    done = run_bootstrap("check", "--json", env=env)
    found = json.loads(done.stdout)
    assert done.returncode == found["exit_code"] == 69
    assert found["message"].startswith("Redis 127.0.0.1:")


def test_rejected_password_is_78_after_a_while(run_bootstrap: RunBootstrap, bifrost_env: dict[str, str]) -> None:
    """Init retries a rejected password, because the server may still initialise; then it ends with 78."""
    url = urlsplit(bifrost_env["BIFROST_DATABASE_URL"])
    wrong = url._replace(netloc=f"bifrost:another-word@{url.netloc.rpartition('@')[2]}").geturl()
    done = run_bootstrap("init", "--timeout", SHORT, env=bifrost_env | {"BIFROST_DATABASE_URL": wrong})
    assert done.returncode == 78
    assert "password authentication failed" in done.stderr
    assert "another-word" not in done.stderr


def test_no_worker(run_bootstrap: RunBootstrap, start_command: StartCommand, bifrost_env: dict[str, str]) -> None:
    """Without a bootstrap worker, init prints the command that starts one within seconds, and ends with 69 at
    the deadline.
    """
    init = start_command([*BOOTSTRAP, "init", "--timeout", "15s"], env=bifrost_env)
    warning = init.wait_for(r"WARNING no bootstrap worker .*\n", timeout=12)
    assert "bifrost-bootstrap worker" in warning[0]
    assert "init --with-worker" in warning[0]
    done = init.wait()
    assert (done.returncode, done.stdout) == (69, "")
    assert "(exit 69)" in done.stderr.splitlines()[-1]


@pytest.mark.parametrize(
    ("number", "code"),
    [
        pytest.param(signal.SIGTERM, 143, id="TERM"),
        pytest.param(signal.SIGINT, 130, id="INT", marks=pytest.mark.slow),
    ],
)
def test_signal(
    number: signal.Signals,
    code: int,
    tree: Path,
    tree_env: dict[str, str],
    start_worker: StartWorker,
    start_command: StartCommand,
    run_bootstrap: RunBootstrap,
    database: Database,
) -> None:
    """After a signal, init exits at once and says that the worker continues. The next init finds the work done."""
    add_revision(tree, "bbb2", "aaa1", "SELECT pg_sleep(6)", "Take a while")
    start_worker(env=tree_env)
    init = start_command([*BOOTSTRAP, "init", "--json"], env=tree_env)
    init.wait_for(r"bbb2 Take a while")
    init.send_signal(number)
    done = init.wait(5)
    assert done.returncode == code
    found = json.loads(done.stdout)
    assert (found["schema"], found["verdict"], found["exit_code"]) == (1, number.name.lower(), code)
    assert "work that a bootstrap worker has begun goes on" in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr
    assert heads(database) != ["bbb2"]
    again = run_bootstrap("init", env=tree_env)
    assert again.returncode == 0, again.stderr
    assert heads(database) == ["bbb2"]


def test_deadline(
    tree: Path, tree_env: dict[str, str], start_worker: StartWorker, run_bootstrap: RunBootstrap, database: Database
) -> None:
    """If the deadline passes while the chain runs, init ends with 124 and the chain continues."""
    add_revision(tree, "bbb2", "aaa1", "SELECT pg_sleep(8)", "Take a while")
    start_worker(env=tree_env)
    done = run_bootstrap("init", "--timeout", SHORT, env=tree_env)
    assert (done.returncode, done.stdout) == (124, "")
    assert re.search(r"init: the deadline of 4s passed while: .*; work already running goes on", done.stderr)
    wait_until(lambda: heads(database) == ["bbb2"], "the end of the migration")


@pytest.mark.slow  # nearly a minute: of a shorter deadline the task has only a share for its last attempt
def test_m11_init_names_the_session_that_locks_the_table(
    tree: Path,
    tree_env: dict[str, str],
    start_command: StartCommand,
    start_worker: StartWorker,
    run_bootstrap: RunBootstrap,
    database: Database,
) -> None:
    """A session locks the table and the worker starts late: init ends with 75 and the PID from the error of
    the task.
    """
    assert run_bootstrap("init", "--with-worker", env=tree_env).returncode == 0
    add_revision(tree, "bbb2", "aaa1", "ALTER TABLE workspace_files ADD COLUMN x int", "Want the table")
    with database.connect() as report:
        report.execute("BEGIN; SELECT * FROM workspace_files")
        init = start_command([*BOOTSTRAP, "init", "--timeout", "50s"], env=tree_env)
        init.wait_for("no bootstrap worker")
        start_worker(env=tree_env)
        done = init.wait(90)
        pid = report.info.backend_pid
    assert done.returncode == 75, done.stderr
    assert f"timed out waiting for a table lock for revision bbb2; held by pid {pid} " in done.stderr
    assert f"pid {pid} " in done.stderr.splitlines()[-1]


def test_rewarm_applies_no_revision(
    tree: Path, tree_env: dict[str, str], bootstrap_worker: Command, run_bootstrap: RunBootstrap
) -> None:
    """`rewarm` ends with 1 at once if revisions are pending, and publishes no task."""
    done = run_bootstrap("rewarm", env=tree_env)
    assert done.returncode == 1
    assert "1 revisions are pending" in done.stderr.splitlines()[-1]
    assert "run `bifrost-bootstrap init`" in done.stderr.splitlines()[-1]
    assert "chain enqueued" not in done.stderr


def test_two_heads(tree: Path, tree_env: dict[str, str], run_bootstrap: RunBootstrap, database: Database) -> None:
    """A tree with two unlabelled heads ends with 1 before any change. The message has the command that merges them."""
    add_revision(tree, "bbb2", "aaa1", "SELECT 1", "One")
    add_revision(tree, "bbb3", "aaa1", "SELECT 1", "Two")
    done = run_bootstrap("init", "--with-worker", env=tree_env)
    assert done.returncode == 1
    assert "alembic merge -m 'merge heads' bbb2 bbb3" in done.stderr
    assert heads(database) == []


def test_json_logs_of_init_and_worker(
    run_bootstrap: RunBootstrap, bifrost_env: dict[str, str], database: Database, tmp_path: Path
) -> None:
    """With JSON logs, every line of init and of its worker is a JSON object. The last one is the verdict."""
    words = tmp_path / "termination-log"
    env = bifrost_env | {"BIFROST_LOG_FORMAT": "json", "BIFROST_TERMINATION_LOG": str(words)}
    done = run_bootstrap("init", "--with-worker", "--json", env=env)
    assert done.returncode == 0, done.stderr
    events = [json.loads(line) for line in done.stderr.splitlines()]
    assert {"time", "level", "logger", "message"} <= set.intersection(*(set(event) for event in events))
    assert events[-1]["message"].startswith("init: ready in ")
    assert any("revision 0001 applied" in event["message"] for event in events)
    assert json.loads(done.stdout)["verdict"] == "ready"
    assert json.loads(words.read_text()) == json.loads(done.stdout)

    down = env | {"BIFROST_DATABASE_URL": with_address(env["BIFROST_DATABASE_URL"], free_port())}
    failed = run_bootstrap("init", "--timeout", "1s", "--json", env=down)
    found = json.loads(failed.stdout)
    assert failed.returncode == found["exit_code"] == 69
    assert json.loads(words.read_text()) == found
    events = [json.loads(line) for line in failed.stderr.splitlines()]
    assert events[-1]["level"] == "error"
    assert database.name in events[-1]["message"]


def test_no_password_at_any_verbosity(
    tree: Path,
    tree_env: dict[str, str],
    start_worker: StartWorker,
    run_bootstrap: RunBootstrap,
    bifrost_env: dict[str, str],
) -> None:
    """Worker, init and check, their failures and their tracebacks at DEBUG never contain the password of the URLs."""
    statement = f"SELECT '{LEAK_MARKS[0]}' FROM nowhere"
    assert leaks_in(statement)  # the control: what is searched for is found where it is
    assert all(leaks_in(bifrost_env[f"BIFROST_{name}_URL"]) for name in ("DATABASE", "REDIS", "RABBITMQ"))
    add_revision(tree, "bbb2", "aaa1", "SELECT 1 FROM nowhere", "Fail")
    env = tree_env | {"BIFROST_LOG_LEVEL": "DEBUG"}
    worker: Command = start_worker(env=env)
    outputs = [
        run_bootstrap("init", env=env),
        run_bootstrap("check", "--json", env=env),
        run_bootstrap("load", ".", env=env),
        run_bootstrap("check", env=env | {"BIFROST_REDIS_URL": env["BIFROST_REDIS_URL"].replace("redis", "mysql")}),
    ]
    codes = [done.returncode for done in outputs]
    assert codes[0] == 1
    assert codes[2:] == [64, 78]
    outputs.append(worker.terminate())
    for done in outputs:
        assert done.stderr
        assert not leaks_in(done.stdout + done.stderr), done.args
    # What the tree itself raised, with the URL in its text, went through the worker's log as well.
    assert "nowhere" in outputs[-1].stderr


def test_message_of_the_tree_with_its_url(tree: Path, tree_env: dict[str, str], run_bootstrap: RunBootstrap) -> None:
    """If the tree raises an error with its URL in it, the password is masked."""
    env_py = tree.parent / "env.py"
    env_py.write_text("import os\nurl = os.environ['BIFROST_DATABASE_URL']\nraise RuntimeError(f'cannot use {url}')\n")
    done = run_bootstrap("init", "--with-worker", env=tree_env)
    assert done.returncode == 78
    assert "RuntimeError: cannot use postgresql://bifrost:***@127.0.0.1" in done.stderr
    assert not leaks_in(done.stdout + done.stderr)
