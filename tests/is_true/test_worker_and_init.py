"""A standing bootstrap worker beside a one-shot init: the whole job, with the commands that operators type."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import redis

from tests import virtual_import
from tests.conftest import WORKER_READY, RunBootstrap, RunCommand, StartCommand, StartWorker
from tests.servers import Command, Database
from tests.setups.state import MODULES, cached, heads, insert_modules, rows

#: The stock command, as operators type it.
CELERY = (sys.executable, "-m", "celery", "-A", "bifrost_bootstrap")
WARM = "bifrost.bootstrap.warm_module_cache"
#: The worker mends nothing by itself.
NO_GUARD = {"BIFROST_CACHE_GUARD_INTERVAL": "0"}
#: Heads of the tree that the package ships.
HEAD = ["0002"]


def one_line(text: str) -> str:
    """The text, which has to be one line."""
    assert text.count("\n") == 1, text
    return text.strip()


def test_the_main_job(
    bootstrap_worker: Command,
    run_bootstrap: RunBootstrap,
    run_command: RunCommand,
    bifrost_env: dict[str, str],
    database: Database,
    redis_url: str,
    tmp_path: Path,
) -> None:
    """Migrate, do nothing, load modules, check, warm, and import a module from the cache."""
    done = run_bootstrap("init")
    assert done.returncode == 0, done.stderr
    assert heads(database) == HEAD
    assert done.stdout.startswith("ready in ")
    assert "0001  Create workspace_files." in done.stdout
    assert re.search(r"tree \S+/alembic\.ini \(BIFROST_ALEMBIC_CONFIG=builtin\)", done.stderr.splitlines()[0])
    assert done.stderr.splitlines()[-1].endswith("(exit 0)")

    again = run_bootstrap("init")
    assert again.returncode == 0
    assert one_line(again.stdout).startswith("ready, nothing to do: schema at 0002, 0 modules cached")

    for path, content in MODULES.items():
        file = tmp_path / "modules" / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(content, encoding="utf-8")
    loaded = run_bootstrap("load", str(tmp_path / "modules"), "--yes")
    assert loaded.returncode == 0, loaded.stderr
    assert one_line(loaded.stdout).startswith(f"{len(MODULES)} of {len(MODULES)} files written to PostgreSQL ")
    assert rows(database) == MODULES

    missing = run_bootstrap("check")
    assert missing.returncode == 3
    assert f"{len(MODULES)} added" in missing.stdout
    assert "added 'acceptance_demo/answer.py'" in missing.stdout
    assert cached(redis_url) == {}

    warmed = run_bootstrap("init")
    assert warmed.returncode == 0, warmed.stderr
    assert f"{len(MODULES)} added, 0 changed, 0 removed" in warmed.stdout
    assert "migrated  " not in warmed.stdout
    assert cached(redis_url) == rows(database) == MODULES
    assert run_bootstrap("check").returncode == 0

    reader = [sys.executable, virtual_import.__file__]
    imported = run_command([*reader, "acceptance_demo.answer"], env=bifrost_env)
    assert imported.returncode == 0, imported.stderr
    assert imported.stdout == "bifrost:module:acceptance_demo/answer.py\n"

    stopped = bootstrap_worker.terminate()
    assert (stopped.returncode, stopped.stdout) == (0, "")


def test_call_by_hand(
    bootstrap_worker: Command,
    run_bootstrap: RunBootstrap,
    run_command: RunCommand,
    bifrost_env: dict[str, str],
    database: Database,
    redis_url: str,
) -> None:
    """`celery call` without arguments warms the cache. `celery result` shows the counts without a database URL."""
    assert run_bootstrap("init").returncode == 0
    insert_modules(database, MODULES, hashes=False)
    by_hand = {name: value for name, value in bifrost_env.items() if name != "BIFROST_DATABASE_URL"}
    call = run_command([*CELERY, "call", WARM], env=by_hand)
    assert call.returncode == 0, call.stderr
    task_id = one_line(call.stdout)
    result = run_command([*CELERY, "result", task_id], env=by_hand)
    assert result.returncode == 0, result.stderr
    for expected in ("'added': 4", "'changed': 0", "'removed': 0", "'modules': 4", "'heads': ['0002']", "'bytes': "):
        assert expected in result.stdout
    assert cached(redis_url) == rows(database) == MODULES

    database.execute("UPDATE workspace_files SET is_deleted = true WHERE path LIKE 'odd%%'", ())
    call = run_command([*CELERY, "call", WARM, "--kwargs", '{"full": true}'], env=by_hand)
    result = run_command([*CELERY, "result", one_line(call.stdout)], env=by_hand)
    assert "'changed': 3" in result.stdout
    assert "'removed': 1" in result.stdout
    assert cached(redis_url) == rows(database)
    assert len(rows(database)) == 3

    wrong = run_command([*CELERY, "call", WARM, "--kwargs", '{"empty": true}'], env=by_hand)
    refused = run_command([*CELERY, "result", one_line(wrong.stdout)], env=by_hand)
    assert "empty" in refused.stdout + refused.stderr
    assert cached(redis_url) == rows(database)
    assert bootstrap_worker.running


def test_stock_worker_serves_as_well(
    start_command: StartCommand,
    run_bootstrap: RunBootstrap,
    run_command: RunCommand,
    bifrost_env: dict[str, str],
    database: Database,
    redis_url: str,
) -> None:
    """`celery -A bifrost_bootstrap worker` consumes the same queues, and Celery's own commands see it."""
    worker = start_command([*CELERY, "worker"], env=bifrost_env)
    worker.wait_for(WORKER_READY)
    done = run_bootstrap("init", "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert [one["revision"] for one in found["migrate"]["applied"]] == ["0001", "0002"]
    assert heads(database) == HEAD
    insert_modules(database, MODULES)
    call = run_command([*CELERY, "call", WARM], env=bifrost_env)
    assert "'added': 4" in run_command([*CELERY, "result", one_line(call.stdout)], env=bifrost_env).stdout
    assert cached(redis_url) == MODULES
    ping = run_command([*CELERY, "inspect", "ping"], env=bifrost_env)
    assert ping.returncode == 0, ping.stderr
    assert "pong" in ping.stdout
    assert "1 node online" in ping.stdout
    queues = run_command([*CELERY, "inspect", "active_queues", "--json"], env=bifrost_env)
    names = [queue["name"] for node in json.loads(queues.stdout).values() for queue in node]
    assert "bifrost.bootstrap" in names
    assert len(names) == 2
    assert all(re.fullmatch(r"bifrost\.bootstrap(\.[0-9a-f]{12})?", name) for name in names)
    worker.terminate()


@pytest.mark.every_python
def test_init_with_a_worker_of_its_own(
    run_bootstrap: RunBootstrap,
    run_command: RunCommand,
    bifrost_env: dict[str, str],
    database: Database,
    redis_url: str,
) -> None:
    """`init --with-worker` does the whole job twice, and leaves no process and no message."""
    done = run_bootstrap("init", "--with-worker")
    assert done.returncode == 0, done.stderr
    assert heads(database) == HEAD
    insert_modules(database, MODULES)
    done = run_bootstrap("init", "--with-worker", "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert (found["schema"], found["verdict"], found["exit_code"]) == (1, "ready", 0)
    assert (found["warm"]["added"], found["warm"]["modules"]) == (4, 4)
    assert (found["ready"], found["nothing_to_do"]) == (True, False)
    assert cached(redis_url) == rows(database) == MODULES
    again = run_bootstrap("init", "--with-worker")
    assert "nothing to do" in one_line(again.stdout)
    imported = run_command([sys.executable, virtual_import.__file__, "acceptance_demo.answer"], env=bifrost_env)
    assert imported.stdout == "bifrost:module:acceptance_demo/answer.py\n"


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """An empty folder that every user may enter, because servers do not run as root."""
    with TemporaryDirectory(prefix="bifrost-acceptance-") as folder:
        Path(folder).chmod(0o711)
        yield Path(folder)


def test_init_embedded(run_bootstrap: RunBootstrap, clean_env: dict[str, str], open_folder: Path) -> None:
    """`init --embedded` needs no server, names the URLs that it ignores, and leaves nothing behind."""
    env = clean_env | {
        "TMPDIR": str(open_folder),
        "DATABASE_URL": "postgresql://u:p@127.0.0.1:1/elsewhere",
        "BIFROST_REDIS_URL": "redis://127.0.0.1:1/0",
    }
    done = run_bootstrap("init", "--embedded", "--json", env=env, timeout=100)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["verdict"] == "ready"
    assert [one["revision"] for one in found["migrate"]["applied"]] == ["0001", "0002"]
    assert "--embedded ignores " in done.stderr
    for name in ("DATABASE_URL", "BIFROST_REDIS_URL"):
        assert name in done.stderr
    assert "elsewhere" not in done.stderr
    assert list(open_folder.iterdir()) == []


def test_flushed_cache_is_repaired(
    run_bootstrap: RunBootstrap,
    start_worker: StartWorker,
    bifrost_env: dict[str, str],
    database: Database,
    redis_url: str,
) -> None:
    """After a full or partial loss of the cache, `check` is not ready and the next init repairs the cache."""
    start_worker(env=bifrost_env | NO_GUARD)
    assert run_bootstrap("init").returncode == 0
    insert_modules(database, MODULES)
    assert run_bootstrap("init").returncode == 0
    with redis.Redis.from_url(redis_url) as client:
        client.delete("bifrost:module:acceptance_demo/answer.py")
    partly = run_bootstrap("check", "--json")
    found = json.loads(partly.stdout)
    assert partly.returncode == found["exit_code"] == 3
    assert found["module_cache"]["changed_paths"] == ["acceptance_demo/answer.py"]
    assert "1 changed" in found["message"]
    with redis.Redis.from_url(redis_url) as client:
        client.flushdb()
    assert run_bootstrap("check").returncode == 3
    assert run_bootstrap("init").returncode == 0
    assert cached(redis_url) == MODULES
