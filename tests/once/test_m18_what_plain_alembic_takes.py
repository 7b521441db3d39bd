"""M18: a tree that `alembic upgrade heads` migrates in the same folder is migrated by the step."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.conftest import StartCommand
from tests.servers import Database
from tests.setups.migration import FIRST, RUN_MIGRATE, Outcome, applied, outcome, recorded

#: As `alembic init` writes it, shortened.
ENV = """
import os
from alembic import context
from sqlalchemy import create_engine, make_url

url = make_url(os.environ["DATABASE_URL"]).set(drivername="postgresql+psycopg")
with create_engine(url).connect() as connection:
    context.configure(connection=connection)
    with context.begin_transaction():
        context.run_migrations()
"""
INI = "[alembic]\nscript_location = {location}\nprepend_sys_path = .\n"
TOML = '[project]\nname = "x"\n\n[tool.alembic]\nscript_location = "%(here)s/alembic"\nprepend_sys_path = ["."]\n'
REVISION = """
from alembic import op
revision, down_revision = {name!r}, {down!r}
def upgrade():
    {body}
    op.execute("INSERT INTO applied VALUES ('{name}')")
"""


@dataclass
class Place:
    """A working folder, and the step and plain Alembic run in it on the same database."""

    folder: Path
    database: Database
    environment: Mapping[str, str]
    start_command: StartCommand

    def write(self, files: Mapping[str, str]) -> None:
        """Write files by their paths below the folder."""
        for name, text in files.items():
            path = self.folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)

    def tree(self, location: str = "alembic", env: str = ENV, bodies: Mapping[str, str] | None = None) -> None:
        """Write a script directory whose revisions have these bodies, one after the other."""
        self.write({f"{location}/env.py": env})
        down = None
        for name, body in (bodies or {"a1": "pass", "a2": "pass"}).items():
            whole = f"{FIRST.strip()}\n    {body}" if down is None else body
            self.write({f"{location}/versions/{name}.py": REVISION.format(name=name, down=down, body=whole)})
            down = name

    def migrate(self, **variables: str) -> Outcome:
        """The step, run in the folder."""
        env = {**self.environment, "BIFROST_DATABASE_URL": self.database.url, **variables}
        return outcome(self.start_command([*RUN_MIGRATE, "60"], env=env, cwd=self.folder))

    def plain(self, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
        """`alembic`, typed in the folder."""
        env = {**os.environ, "DATABASE_URL": self.database.url, **variables}
        return subprocess.run(
            [sys.executable, "-m", "alembic", *arguments], cwd=self.folder, env=env, text=True, capture_output=True,
            check=False, stdin=subprocess.DEVNULL,
        )  # fmt: skip

    def assert_both(self, *arguments: str, **variables: str) -> None:
        """Plain Alembic and ours end well, each on an empty database."""
        plain = self.plain(*arguments, "upgrade", "heads")
        assert plain.returncode == 0, plain.stderr
        self.database.execute("DROP SCHEMA public CASCADE")
        self.database.execute("CREATE SCHEMA public")
        done = self.migrate(**variables)
        assert done.code == 0, done.log
        assert recorded(self.database) == ["a2"]
        assert set(applied(self.database).values()) == {1}


@pytest.fixture
def place(tmp_path: Path, database: Database, clean_env: dict[str, str], start_command: StartCommand) -> Place:
    """An empty folder."""
    folder = tmp_path / "place"
    folder.mkdir()
    return Place(folder, database, clean_env, start_command)


# ---------------------------------------------------------------------------------------------------------- paths


def test_m18_ini_in_a_sub_folder(place: Place) -> None:
    """A relative script_location, and the imports of env.py, are relative to the working folder."""
    place.write({"migrations/alembic.ini": INI.format(location="migrations"), "app_settings.py": ""})
    place.tree("migrations", "import app_settings\n" + ENV)
    place.assert_both("-c", "migrations/alembic.ini", BIFROST_ALEMBIC_CONFIG="migrations/alembic.ini")


@pytest.mark.parametrize("kubernetes", [False, True], ids=["a link", "a ConfigMap"])
def test_m18_ini_that_is_a_link(place: Place, tmp_path: Path, kubernetes: bool) -> None:
    """`%(here)s` is the folder of the symbolic link, not that of its target."""
    target = tmp_path / ("..2026_01" if kubernetes else "target")
    target.mkdir()
    (target / "alembic.ini").write_text(INI.format(location="%(here)s/alembic"))
    if kubernetes:
        (place.folder / "..data").symlink_to(target)
        (place.folder / "alembic.ini").symlink_to("..data/alembic.ini")
    else:
        (place.folder / "alembic.ini").symlink_to(target / "alembic.ini")
    place.tree()
    place.assert_both(BIFROST_ALEMBIC_CONFIG="alembic.ini")


# ------------------------------------------------------------------------------------------------- pyproject.toml


@pytest.mark.parametrize(
    ("files", "arguments", "variables"),
    [
        ({"pyproject.toml": TOML}, [], {}),
        ({"pyproject.toml": TOML}, ["-c", "pyproject.toml"], {"BIFROST_ALEMBIC_CONFIG": "pyproject.toml"}),
        ({"pyproject.toml": TOML, "alembic.ini": "[alembic]\n# options are in pyproject.toml\n"}, [], {}),
        pytest.param(
            {"pyproject.toml": TOML, "alembic.ini": "[loggers]\nkeys =\n"},
            [],
            {"ALEMBIC_CONFIG": "pyproject.toml"},
            marks=pytest.mark.slow,
        ),
        ({"pyproject.toml": '[project]\nname = "x"\n', "alembic.ini": INI.format(location="alembic")}, [], {}),
    ],
    ids=["alone", "named", "beside the ini", "by Alembic's variable", "without the table"],
)
def test_m18_pyproject(place: Place, files: dict[str, str], arguments: list[str], variables: dict[str, str]) -> None:
    """Options in `[tool.alembic]`, as `alembic init -t pyproject` writes them."""
    place.write(files)
    place.tree()
    place.assert_both(*arguments, **variables)


def test_m18_no_tree_at_all(place: Place) -> None:
    """A pyproject.toml without `[tool.alembic]` is no tree: 78, with every place that was searched."""
    place.write({"pyproject.toml": '[project]\nname = "x"\n'})
    done = place.migrate()
    assert done.code == 78
    assert "alembic.ini" in done.facts["message"]
    assert "tool.alembic" in done.facts["message"]


# ------------------------------------------------------------------------------------------ options of the command


def test_m18_cmd_opts(place: Place) -> None:
    """env.py finds the options of Alembic's command line."""
    wanted = 'opts = context.config.cmd_opts\nassert opts.x == ["tenant=acme corp", "dry=no"], opts.x\n'
    wanted += 'assert opts.cmd[0].__name__ == "upgrade" and opts.revision == "heads" and not opts.sql\n'
    wanted += 'assert context.get_x_argument(as_dictionary=True) == {"tenant": "acme corp", "dry": "no"}\n'
    place.write({"alembic.ini": INI.format(location="alembic")})
    place.tree(env=ENV.replace("url =", wanted + "url ="))
    place.assert_both("-x", "tenant=acme corp", "-x", "dry=no", BIFROST_ALEMBIC_X="'tenant=acme corp' dry=no")


def test_m18_name(place: Place) -> None:
    """`--name` selects another section of the ini file."""
    ini = "[alembic]\nscript_location = gone\n\n[billing]\nscript_location = money\n"
    place.write({"alembic.ini": ini})
    place.tree("money")
    place.assert_both("--name", "billing", BIFROST_ALEMBIC_NAME="billing")


def test_m18_malformed_options(place: Place) -> None:
    """A quotation mark without its partner is an error that names the setting."""
    done = place.migrate(BIFROST_ALEMBIC_X="tenant='acme")
    assert (done.code, "BIFROST_ALEMBIC_X" in done.facts["message"]) == (78, True)


# ---------------------------------------------------------------------------------------------------------- stdin


@pytest.mark.parametrize(
    "body",
    ["import sys; assert sys.stdin.read() == ''", "import subprocess; subprocess.run(['cat'], check=True)"],
    ids=["reads", "starts what reads"],
)
def test_m18_stdin_is_empty(place: Place, body: str) -> None:
    """A read from stdin, in a revision or in a process that it starts, returns at once."""
    place.write({"alembic.ini": INI.format(location="alembic")})
    place.tree(bodies={"a1": "pass", "a2": body})
    place.assert_both()


def test_m18_question_to_the_operator(place: Place) -> None:
    """input() fails at once, and the error is that of the revision."""
    place.write({"alembic.ini": INI.format(location="alembic")})
    place.tree(bodies={"a1": "pass", "a2": "input('sure?')"})
    done = place.migrate()
    assert done.code == 1
    assert "revision a2" in done.facts["message"]
    assert "EOFError" in done.facts["message"]


# ---------------------------------------------------------------------------------------- the revision's transaction

ONE_EACH = ENV.replace("connection=connection", "connection=connection, transaction_per_migration=True")
ASYNCHRONOUS = """
import asyncio, os
from alembic import context
from sqlalchemy import make_url
from sqlalchemy.ext.asyncio import create_async_engine

def migrate(connection):
    context.configure(connection=connection, transaction_per_migration=True)
    with context.begin_transaction():
        context.run_migrations()

async def main():
    url = make_url(os.environ["DATABASE_URL"]).set(drivername="postgresql+asyncpg")
    async with create_async_engine(url).connect() as connection:
        await connection.run_sync(migrate)

asyncio.run(main())
"""


@pytest.mark.parametrize(
    "env",
    [
        pytest.param(ONE_EACH, id="psycopg"),
        pytest.param(ONE_EACH.replace("psycopg", "psycopg2"), id="psycopg2", marks=pytest.mark.slow),
        pytest.param(ASYNCHRONOUS, id="asyncpg"),
    ],
)
@pytest.mark.parametrize(
    "statements",
    [
        pytest.param(["SET TRANSACTION ISOLATION LEVEL SERIALIZABLE"], marks=pytest.mark.slow),
        ["/* all of it */ set local transaction_isolation = 'repeatable read'"],
        ["SET TRANSACTION ISOLATION LEVEL REPEATABLE READ", "SET TRANSACTION DEFERRABLE"],
    ],
    ids=["set", "setting", "two"],
)
def test_m18_isolation_of_a_revision(place: Place, env: str, statements: list[str]) -> None:
    """A revision that begins with SET TRANSACTION has this isolation level and the shared lock."""
    level = "serializable" if "SERIALIZABLE" in statements[0] else "repeatable read"
    look = "assert op.get_bind().exec_driver_sql('SHOW transaction_isolation').scalar() == " + repr(level)
    locks = "SELECT count(*) AS n FROM pg_locks WHERE pid = pg_backend_pid() AND locktype = 'advisory' AND objid = 2"
    lines = [f"op.execute({statement!r})" for statement in [*statements, f"CREATE TABLE locks AS {locks}"]]
    place.write({"alembic.ini": INI.format(location="alembic")})
    place.tree(env=env, bodies={"a1": "pass", "a2": "\n    ".join([*lines, look])})
    place.assert_both()
    assert place.database.execute("SELECT n FROM locks") == [(1,)], "the last run was ours"


def test_m18_isolation_too_late(place: Place) -> None:
    """After a query the server rejects SET TRANSACTION, as with plain Alembic, and nothing is rolled back by us."""
    late = "op.execute('SELECT 1')\n    op.execute('SET TRANSACTION ISOLATION LEVEL SERIALIZABLE')"
    place.write({"alembic.ini": INI.format(location="alembic")})
    place.tree(env=ONE_EACH, bodies={"a1": "pass", "a2": late})
    done = place.migrate()
    assert (done.code, "must be called before any query" in done.facts["message"]) == (1, True)


# ---------------------------------------------------------------------------------------------------------- bases


def test_m18_independent_bases(place: Place) -> None:
    """A base without label, and a plugin with its own base, label and dependency."""
    place.write({"alembic.ini": INI.format(location="alembic")})
    place.tree()
    plugin = REVISION.format(name="p1", down=None, body="pass")
    place.write({"alembic/versions/p1.py": plugin + "branch_labels = ('plugin',)\ndepends_on = ('a1',)\n"})
    plain = place.plain("upgrade", "heads")
    assert plain.returncode == 0, plain.stderr
    heads = recorded(place.database)
    place.database.execute("DROP SCHEMA public CASCADE")
    place.database.execute("CREATE SCHEMA public")
    done = place.migrate()
    assert done.code == 0, done.log
    assert recorded(place.database) == heads
    assert applied(place.database) == {"a1": 1, "a2": 1, "p1": 1}
    assert place.migrate().facts["verdict"] == "at_head"


def test_m18_two_heads_of_one_base(place: Place) -> None:
    """Two heads without labels are an error."""
    place.write({"alembic.ini": INI.format(location="alembic")})
    place.tree()
    place.write({"alembic/versions/a3.py": REVISION.format(name="a3", down="a1", body="pass")})
    done = place.migrate()
    assert (done.code, "alembic merge" in done.facts["remedy"]) == (1, True)
