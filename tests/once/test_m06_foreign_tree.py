"""M6: a foreign tree runs unmodified, with its own Alembic under its own interpreter, repeatedly."""

from __future__ import annotations

import fcntl
import json
import subprocess
import sys
import venv
from pathlib import Path

import psutil
import pytest

from tests.conftest import BOOTSTRAP, StartCommand, StartWorker
from tests.servers import Database
from tests.servers.process import wait_until
from tests.setups.migration import Barrier, StartMigrate, Tree, applied, barrier, outcome, recorded

#: The oldest that trees may bring, with the driver of the asynchronous ones.
OLD_VERSIONS = ("alembic==1.13.3", "sqlalchemy[asyncio]==2.0.36", "asyncpg==0.31.0", "psycopg[binary]==3.3.2")
VENV = Path(__file__).parents[2] / f".venv-tree-{sys.version_info[0]}.{sys.version_info[1]}"
CELERY = (sys.executable, "-m", "celery", "-A", "bifrost_bootstrap")


@pytest.fixture(scope="session")
def old_python() -> Path:
    """An interpreter with OLD_VERSIONS and without our package. It is created once per checkout."""
    made, wanted = VENV / "versions.txt", "\n".join(OLD_VERSIONS)
    with Path(__file__).open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not made.exists() or made.read_text() != wanted:
            venv.create(VENV, with_pip=True, clear=True)
            pip = [str(VENV / "bin/python"), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
            subprocess.run([*pip, *OLD_VERSIONS], check=True)
            made.write_text(wanted)
    return VENV / "bin/python"


@pytest.mark.timeout(300)
@pytest.mark.parametrize("versions", ["ours", pytest.param("its own", marks=pytest.mark.slow)])
def test_m06_run_after_run_in_one_worker(
    request: pytest.FixtureRequest,
    tmp_path: Path,
    database: Database,
    bifrost_env: dict[str, str],
    start_command: StartCommand,
    start_worker: StartWorker,
    versions: str,
) -> None:
    """An asynchronous tree with its own settings, relative paths, and a logging configuration that disables
    every logger. Init applies it, and `celery call` applies it again in the same worker, whose log
    continues. No process of the tree is left.
    """
    tree = Tree(tmp_path / "asynchronous", "asynchronous")
    version = "CREATE TABLE versions AS SELECT '{}' AS alembic, '{}' AS sqlalchemy"
    tree.revision("one", "import alembic, sqlalchemy\n"
                  f'    op.execute("{version}".format(alembic.__version__, sqlalchemy.__version__))')  # fmt: skip
    env = bifrost_env | {"BIFROST_ALEMBIC_CONFIG": str(tree.config)}
    if versions == "its own":
        env["BIFROST_ALEMBIC_PYTHON"] = str(request.getfixturevalue("old_python"))
    worker = start_worker(env=env)
    init = start_command([*BOOTSTRAP, "init", "--json"], env=env).wait(90)
    assert init.returncode == 0, init.stderr
    found = database.execute("SELECT alembic, sqlalchemy FROM versions")
    assert (found == [("1.13.3", "2.0.36")]) == (versions == "its own")

    tree.revision("two", 'print("printed by the tree")')
    start_command([*CELERY, "call", "bifrost.bootstrap.migrate"], env=env).wait()
    worker.wait_for(r"revision two begins[\s\S]*revision two applied[\s\S]*succeeded")
    assert applied(database) == {"one": 1, "two": 1}
    assert recorded(database) == ["two"]
    # A failure after all that is logged too.
    tree.revision("three", 'raise RuntimeError("not today")')
    start_command([*CELERY, "call", "bifrost.bootstrap.migrate"], env=env).wait()
    worker.wait_for(r"revision three \(Revision three\) failed: RuntimeError: not today")
    assert not [child for child in worker.descendants() if "migrate/script" in " ".join(child.cmdline())]
    assert json.loads(init.stdout)["migrate"]["applied"][0]["title"] == "Revision one"


@pytest.mark.parametrize("killed", [False, True], ids=["ends", "killed"])
def test_m06_process_that_the_tree_leaves_behind(
    database: Database, tree: Tree, start_migrate: StartMigrate, killed: bool
) -> None:
    """A process that env.py starts with our pipes, and that never ends, does not delay the step, and is killed
    with it.
    """
    tree.revision("one").revision("two", barrier())
    env, pid_file = tree.folder / "env.py", tree.folder / "pid"
    start = "import pathlib, subprocess\nleft = subprocess.Popen(['sleep', '600'])\n"
    env.write_text(f"{start}pathlib.Path({str(pid_file)!r}).write_text(str(left.pid))\n{env.read_text()}")
    with Barrier(database) as stop:
        step = start_migrate(BIFROST_MIGRATION_LOCK_TIMEOUT="10m")
        stop.reached()
        left = psutil.Process(int(pid_file.read_text()))
        if killed:
            step.process.kill()
        else:
            stop.release()
            assert outcome(step, 30).code == 0
        wait_until(lambda: not left.is_running() or left.status() == psutil.STATUS_ZOMBIE, "the end of it", 10)


def test_m06_interpreter_that_does_not_start(tree: Tree, start_migrate: StartMigrate, tmp_path: Path) -> None:
    """If BIFROST_ALEMBIC_PYTHON names no program, the step ends with 78 at once and names it."""
    tree.revision("one")
    done = outcome(start_migrate(BIFROST_ALEMBIC_PYTHON=str(tmp_path / "python")))
    assert (done.code, done.facts["error"]) == (78, "SettingsError")
    assert f"BIFROST_ALEMBIC_PYTHON names {tmp_path / 'python'}" in done.facts["message"]


@pytest.mark.parametrize("asked", [False, True], ids=["upgrade", "describe"])
def test_m06_interpreter_without_alembic(
    database: Database, tree: Tree, start_migrate: StartMigrate, tmp_path: Path, asked: bool
) -> None:
    """If BIFROST_ALEMBIC_PYTHON has no Alembic, the step ends with 78 at the first attempt and names what is
    missing, whether the tree is read from its source or by Alembic.
    """
    tree.revision("one")
    if asked:
        tree.config.write_text(f"{tree.config.read_text()}\nversion_locations = %(here)s/versions\n")
    venv.create(tmp_path / "bare", with_pip=False)
    python = tmp_path / "bare/bin/python"
    done = outcome(start_migrate(BIFROST_ALEMBIC_PYTHON=str(python)))
    assert (done.code, done.facts["error"]) == (78, "SettingsError"), done.facts
    assert f"BIFROST_ALEMBIC_PYTHON names {python}, which has no Alembic" in done.facts["message"]
    assert "No module named 'alembic'" in done.facts["message"]
    assert "trying again" not in done.log
    assert database.execute("SELECT to_regclass('alembic_version')::text") == [(None,)]


def test_m06_modules_of_the_tree_are_its_own(database: Database, tree: Tree, start_migrate: StartMigrate) -> None:
    """A module of the tree with the name of one of ours is that of the tree. Our folder is not in its import path."""
    names = ("events", "drivers", "upgrade", "lock", "celery")
    for name in names:
        (tree.folder / f"{name}.py").write_text('WHOSE = "the tree\'s"\n')
    imports = "".join(f'import {name}\nassert {name}.WHOSE == "the tree\'s"\n' for name in names)
    env = tree.folder / "env.py"
    path = (
        f"sys.path.insert(0, {str(tree.folder)!r})\nassert not [one for one in sys.path if 'migrate/script' in one]\n"
    )
    env.write_text(f"import sys\n{path}{imports}{env.read_text()}")
    tree.revision("one")
    assert outcome(start_migrate()).code == 0
    assert applied(database) == {"one": 1}
