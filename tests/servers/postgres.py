"""PostgreSQL: one server for many tests, one database for each test."""

from __future__ import annotations

import fcntl
import pwd
import re
import secrets
import shutil
import signal
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, LiteralString
from urllib.parse import quote, unquote, urlsplit, urlunsplit

import psycopg
from psycopg import sql

from tests.servers.leaks import PLANTED_PASSWORD
from tests.servers.process import RunFolder, Server, find_program, unprivileged_user

PROGRAM_FOLDERS = ("/usr/lib/postgresql/*/bin", "/usr/pgsql-*/bin", "/opt/homebrew/opt/postgresql*/bin")
#: The superuser of private servers.
ADMIN_ROLE = "postgres"
#: The role in the URLs of the tests. It owns the databases and has no other rights.
APP_ROLE = "bifrost"
#: No fsync: tests kill the server, never the machine. (Commits stay synchronous: a committed row survives a kill.)
#: 300 connections, because 20 `init` at once use several each.
THROW_AWAY = {
    "fsync": "off",
    "full_page_writes": "off",
    "listen_addresses": "127.0.0.1",
    "unix_socket_directories": "",
    "max_connections": "300",
}
#: Timeout of a connection attempt (seconds).
CONNECT_TIMEOUT = 5


class Postgres:
    """A server in which tests create databases: a private one, or that of BIFROST_TEST_DATABASE_URL.

    Attributes:
        admin_url: The URL of a role that may create databases.
        app_role: The owner of the databases of the tests.
        app_password: The password of `app_role`.
    """

    def __init__(self, admin_url: str, app_role: str, app_password: str) -> None:
        self.admin_url = admin_url
        self.app_role = app_role
        self.app_password = app_password

    @classmethod
    def at(cls, url: str) -> Postgres:
        """Return the server of this URL. The user of the URL creates and owns the databases."""
        parts = urlsplit(url)
        plain = urlunsplit(parts._replace(scheme="postgresql"))
        return cls(plain, unquote(parts.username or ""), unquote(parts.password or ""))

    def url(self, database: str = "postgres", *, driver: str | None = None, user: str | None = None) -> str:
        """Return the URL of a database. `driver`: suffix of the scheme; `user`: another role with the same password."""
        parts = urlsplit(self.admin_url)
        login = f"{quote(user or self.app_role, safe='')}:{quote(self.app_password, safe='')}"
        return urlunsplit(
            parts._replace(
                scheme=f"postgresql+{driver}" if driver else "postgresql",
                netloc=f"{login}@{parts.netloc.rpartition('@')[2]}",
                path=f"/{quote(database, safe='')}",
            )
        )

    def admin(self, database: str | None = None) -> psycopg.Connection[tuple[Any, ...]]:
        """Connect as administrator, in autocommit. `database` defaults to that of `admin_url`."""
        url = urlsplit(self.admin_url)
        if database is not None:
            url = url._replace(path=f"/{quote(database, safe='')}")
        return psycopg.connect(urlunsplit(url), autocommit=True, connect_timeout=CONNECT_TIMEOUT)

    def create_database(self, *, template: str = "template1", prefix: str = "test") -> Database:
        """Create a database with a new name, owned by `app_role`. It is a copy of the database `template`."""
        database = Database(self, f"{prefix}_{secrets.token_hex(4)}")
        with self.admin() as connection:
            connection.execute(
                sql.SQL("CREATE DATABASE {} TEMPLATE {} OWNER {}").format(
                    sql.Identifier(database.name), sql.Identifier(template), sql.Identifier(self.app_role)
                )
            )
        return database

    def drop_database(self, database: Database) -> None:
        """Drop it, and end its connections. Does nothing if it does not exist."""
        with self.admin() as connection:
            name = sql.Identifier(database.name)
            connection.execute(sql.SQL("DROP DATABASE IF EXISTS {} WITH (FORCE)").format(name))


@dataclass(frozen=True)
class Database:
    """A database of a test. Its repr contains no password."""

    server: Postgres = field(repr=False)
    name: str

    @property
    def url(self) -> str:
        """Its URL for `app_role`, without a driver suffix."""
        return self.server.url(self.name)

    def url_for(self, driver: str) -> str:
        """Its URL with a driver suffix."""
        return self.server.url(self.name, driver=driver)

    def connect(self) -> psycopg.Connection[tuple[Any, ...]]:
        """Connect as `app_role`, in autocommit."""
        return psycopg.connect(self.url, autocommit=True, connect_timeout=CONNECT_TIMEOUT)

    def execute(self, query: LiteralString, parameters: Sequence[object] | None = None) -> list[tuple[Any, ...]]:
        """Run a statement as `app_role` on a new connection. Return its rows, or [] if it returns none."""
        with self.connect() as connection:
            cursor = connection.execute(query, parameters)
            return cursor.fetchall() if cursor.description else []


class PostgresServer(Server, Postgres):
    """A private PostgreSQL: TCP on 127.0.0.1 with SCRAM passwords, no Unix socket, no fsync.

    From PostgreSQL 15 on, its collation is en-US, which differs from the order of Python's str. A test with mixed paths
    then finds code that expects the same order from both.

    Args:
        run: The folder for its files.
        config: Server settings, for instance `{"log_statement": "all"}`. A change takes effect at the next start.
    """

    kind: ClassVar[str] = "postgres"
    stop_signal: ClassVar[signal.Signals] = signal.SIGINT  # fast shutdown: ends open sessions
    death_signal: ClassVar[str] = "QUIT"  # immediate shutdown: the postmaster ends its backends
    not_ready: ClassVar[tuple[type[Exception], ...]] = (psycopg.OperationalError,)

    def __init__(self, run: RunFolder, config: Mapping[str, str] | None = None) -> None:
        Server.__init__(self, run)
        password = quote(PLANTED_PASSWORD, safe="")
        admin_url = f"postgresql://{ADMIN_ROLE}:{password}@{self.host}:{self.port}/postgres"
        Postgres.__init__(self, admin_url, APP_ROLE, PLANTED_PASSWORD)
        self.config = dict(config or {})
        self._fresh = True

    def user(self) -> pwd.struct_passwd | None:
        return unprivileged_user()

    def prepare(self) -> None:
        if self._fresh:
            shutil.copytree(_new_cluster(self.run, self), self.data, dirs_exist_ok=True)

    def command(self) -> Sequence[str]:
        settings = {**THROW_AWAY, **self.config}
        return [
            str(programs() / "postgres"),
            *("-D", str(self.data), "-p", str(self.port)),
            *(word for name, value in settings.items() for word in ("-c", f"{name}={value}")),
        ]

    def probe(self) -> None:
        with self.admin() as connection:
            if self._fresh:
                role, password = sql.Identifier(APP_ROLE), sql.Literal(PLANTED_PASSWORD)
                # Keep the password out of the log, whatever log_statement says.
                connection.execute("SET log_statement = 'none'; SET log_min_duration_statement = -1")
                connection.execute(sql.SQL("CREATE ROLE {} LOGIN PASSWORD {}").format(role, password))
                self._fresh = False


def _run_as(server: PostgresServer, *command: str) -> None:
    """Run a program as the user of the server. Raises RuntimeError with its output if it fails."""
    user = server.user()
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        check=False,
        cwd="/",
        env=server.environment(),
        user=None if user is None else user.pw_uid,
        group=None if user is None else user.pw_gid,
    )
    if done.returncode != 0:
        raise RuntimeError(f"{command[0]} ended with {done.returncode}:\n{done.stdout}{done.stderr}")


def programs() -> Path:
    """Return the folder with initdb, postgres and pg_basebackup of the same version."""
    return Path(find_program("initdb", *PROGRAM_FOLDERS)).resolve().parent


def _new_cluster(run: RunFolder, server: PostgresServer) -> Path:
    """Return the data folder to copy for a new server. The first caller runs initdb, once per test run."""
    cluster = run.root / "data" / "postgres-template"
    with (run.root / "data" / "postgres-template.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not cluster.exists():
            _initdb(cluster, server)
    return cluster


def _initdb(cluster: Path, server: PostgresServer) -> None:
    initdb = programs() / "initdb"
    version = subprocess.run([initdb, "--version"], capture_output=True, text=True, check=True).stdout
    major = int(re.findall(r"\d+", version)[0])
    locale = ["--locale-provider=icu", "--icu-locale=en-US"] if major >= 15 else ["--locale=C"]
    unfinished = cluster.with_suffix(".unfinished")
    unfinished.mkdir(mode=0o700)
    password_file = unfinished.with_suffix(".password")
    password_file.touch(mode=0o600)
    password_file.write_text(PLANTED_PASSWORD)
    server.hand_over(unfinished, password_file)
    options = ["-U", ADMIN_ROLE, f"--pwfile={password_file}", "-A", "scram-sha-256", "--encoding=UTF8"]
    try:
        _run_as(server, str(initdb), "-D", str(unfinished), *options, *locale, "--no-sync", "--no-instructions")
    finally:
        password_file.unlink()
    unfinished.rename(cluster)


class StandbyServer(PostgresServer):
    """A streaming standby of a private server.

    Args:
        run: The folder for its files.
        primary: The running server that it replicates, from the first `start` on.
    """

    kind: ClassVar[str] = "standby"

    def __init__(self, run: RunFolder, primary: PostgresServer) -> None:
        super().__init__(run)
        self.primary = primary

    def prepare(self) -> None:
        if not self._fresh:
            return
        self._fresh = False
        self.data.chmod(0o700)
        self.hand_over(self.data)
        options = ["-D", str(self.data), "-d", self.primary.admin_url, "-R", "-c", "fast", "-X", "stream"]
        _run_as(self, str(programs() / "pg_basebackup"), *options)

    def caught_up(self) -> bool:
        """Whether it has replayed the WAL up to the current position of its primary."""
        with self.primary.admin() as primary, self.admin() as standby:
            written = primary.execute("SELECT pg_current_wal_lsn()").fetchone()
            query = "SELECT pg_last_wal_replay_lsn() >= %s::pg_lsn"
            return bool(written and standby.execute(query, (str(written[0]),)).fetchone() == (True,))

    def promote(self) -> None:
        """Promote it to a primary."""
        with self.admin() as connection:
            connection.execute("SELECT pg_promote()")
