"""The copy: the schema of the live database, dumped by `pg_dump`, in an empty database of another server."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import NamedTemporaryFile

import psycopg
from psycopg import sql

from bifrost_bootstrap.dev import embedded
from bifrost_bootstrap.errors import BusyError, RehearsalError, SettingsError, UsageError
from bifrost_bootstrap.redaction import masked
from bifrost_bootstrap.servers import postgres
from bifrost_bootstrap.servers.postgres import Connection
from bifrost_bootstrap.settings import child_environment
from bifrost_bootstrap.urls import PostgresUrl

#: What the copy does without: owners, rights and comments change nothing that a revision locks.
_OPTIONS = (
    "--schema-only",
    "--no-owner",
    "--no-privileges",
    "--no-comments",
    "--no-publications",
    "--no-subscriptions",
    "--no-security-labels",
    "--no-tablespaces",
)
#: Where Debian keeps the programs of each major version.
_DEBIAN = Path("/usr/lib/postgresql")
#: Name of the connection in the service file that pg_dump reads.
_SERVICE = "live"
#: SQLSTATE of an object, such as a role, that does not exist.
_UNDEFINED_OBJECT = "42704"
_UNKNOWN_ROLE = re.compile(r'role "(?P<role>.+)" does not exist')
_DUMPED_FROM = re.compile(r"^-- Dumped from database version (?P<major>\d+)", re.MULTILINE)
#: What psql understands and a server does not.
_PSQL_COMMAND = re.compile(r"^\\(?:un)?restrict .*$", re.MULTILINE)
#: A setting in the first lines of a dump, which an older server may not know.
_SET = re.compile(r"^SET (?P<name>\w+) = .*;$", re.MULTILINE)
#: The options of a column. A server may keep one of its own there (seen in 17.12), which an older pg_dump writes and no
#: server accepts.
_COLUMN_OPTIONS = re.compile(r"^(ALTER TABLE ONLY .+ ALTER COLUMN .+ SET) \((.+)\);$", re.MULTILINE)
_INTERNAL_OPTION = "pg_attver="
#: Rows in a dump, between their COPY statement and the line that ends them.
_ROWS = re.compile(r"^(COPY [^;]+ FROM stdin;)\n(.*?)^\\\.$", re.MULTILINE | re.DOTALL)
#: Objects that somebody has made, and no extension. The server's own have smaller numbers (FirstNormalObjectId).
_OBJECTS = """
    SELECT format('%s %s', kind, name) FROM (
      SELECT 'table' AS kind, oid, oid::regclass::text AS name, 'pg_class'::regclass AS class
        FROM pg_class WHERE relkind IN ('r', 'p', 'v', 'm', 'f', 'S')
      UNION ALL SELECT 'function', oid, proname, 'pg_proc'::regclass FROM pg_proc
      UNION ALL SELECT 'type', oid, typname, 'pg_type'::regclass FROM pg_type WHERE typtype IN ('e', 'd', 'r')
    ) AS objects
    WHERE oid >= 16384 AND NOT EXISTS (
      SELECT FROM pg_depend WHERE classid = class AND objid = objects.oid AND deptype = 'e'
    ) LIMIT 3
"""
#: Tables that pg_dump cannot lock: it wants SELECT on each, and USAGE on its schema.
_UNREADABLE = """
    SELECT c.oid::regclass::text FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
    WHERE c.relkind IN ('r', 'p') AND c.oid >= 16384 AND n.nspname NOT LIKE 'pg\\_%'
      AND NOT (has_table_privilege(c.oid, 'SELECT') AND has_schema_privilege(n.oid, 'USAGE'))
    ORDER BY 1
"""
_UNPOPULATED = "SELECT oid::regclass::text FROM pg_class WHERE relkind = 'm' AND NOT relispopulated ORDER BY oid"


def dump(live: Connection, url: PostgresUrl, lock_timeout: float) -> str:
    """
    The schema as `live` sees it, as SQL. live: in a transaction that has its snapshot, which pg_dump shares.

    lock_timeout: seconds for which pg_dump waits for a table; it takes ACCESS SHARE on each, which only DDL blocks.
    Raises RehearsalError if the schema cannot be dumped, BusyError if a table stays locked.
    """
    if live.info.backend_pid != postgres.scalar(live, "SELECT pg_backend_pid()"):
        raise RehearsalError(
            f"{url} is a pooler, where pg_dump would leave its session settings to others",
            "set BIFROST_MIGRATION_DATABASE_URL to the server itself",
        )
    if unreadable := [str(row[0]) for row in live.execute(_UNREADABLE)]:
        raise RehearsalError(
            f"role {live.info.user} may not read {', '.join(unreadable)}",
            f"GRANT pg_read_all_data TO {live.info.user}, or SELECT on these tables and USAGE on their schemas",
        )
    snapshot = postgres.scalar(live, "SELECT pg_export_snapshot()")
    command = [_pg_dump(_major(live)), *_OPTIONS, f"--snapshot={snapshot}"]
    command += [f"--lock-wait-timeout={lock_timeout:.0f}s", f"--dbname=service={_SERVICE}"]
    with _connection_environment(url) as environment:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)  # noqa: S603
    if done.returncode == 0:
        return done.stdout
    words = masked(" ".join(done.stderr.split()))
    if "lock timeout" in words:
        raise BusyError("a read lock on every table for pg_dump", "a session that changes a table's definition")
    raise RehearsalError(f"pg_dump of {url} failed: {words}", "correct what it names, then rehearse again")


@contextmanager
def _connection_environment(url: PostgresUrl) -> Iterator[dict[str, str]]:
    """The environment in which libpq finds the connection `_SERVICE`: arguments are for all to see."""
    parameters = dict(postgres.at_last_host(url).parameters)
    # Not in the file, where libpq drops a blank at the end of a line.
    password = parameters.pop("password", "")
    with NamedTemporaryFile("w", encoding="utf-8") as file:
        file.write("\n".join([f"[{_SERVICE}]", *(f"{word}={value}" for word, value in parameters.items())]) + "\n")
        file.flush()
        yield child_environment(PGPASSWORD=password, PGSERVICEFILE=file.name)


def _pg_dump(major: int) -> str:
    """The oldest pg_dump that may dump a server of this major version: the newest settings are for newer servers."""
    on_path = shutil.which("pg_dump")
    programs = [Path(on_path)] if on_path else []
    programs += _DEBIAN.glob("*/bin/pg_dump")
    with suppress(SettingsError):
        programs.append(embedded.find_postgres_program("pg_dump"))
    versions: dict[int, str] = {}
    for program in programs:
        answer = subprocess.run([program, "--version"], capture_output=True, text=True, check=False).stdout  # noqa: S603
        if found := re.search(r"\d+", answer):
            versions.setdefault(int(found[0]), str(program))
    if fit := [version for version in versions if version >= major]:
        return versions[min(fit)]
    here = ", ".join(map(str, sorted(versions))) or "none"
    raise RehearsalError(
        f"no pg_dump here may dump PostgreSQL {major} (found: {here})",
        f"install postgresql-client-{major}, or use the image's target `rehearse`",
    )


def read_file(file: Path) -> str:
    """A dump in plain text. Raises UsageError if the file cannot be read, RehearsalError if it is no such dump."""
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{file} cannot be read: {error}", "write it with pg_dump --schema-only") from error
    if text.startswith("PGDMP"):
        raise RehearsalError(f"{file} is a dump in pg_dump's own format", "write it with pg_dump --format=plain")
    return text


def restore(text: str, url: PostgresUrl, roles: frozenset[str], versions: Mapping[str, tuple[str, ...]]) -> None:
    """
    Make the copy in the empty database of this URL. It stays there: the database is empty no more.

    roles: of the live server; those that the copy's server lacks are made, without a login. versions: the rows of
    each version table. Raises RehearsalError if the database is not empty, or lacks what the dump needs.
    """
    with postgres.connect(url, "rehearsal") as copy:
        if found := [str(row[0]) for row in copy.execute(_OBJECTS)]:
            raise RehearsalError(
                f"the rehearsal database {url} is not empty: it has {', '.join(found)}",
                "name an empty one in BIFROST_REHEARSAL_DATABASE_URL: dropdb and createdb make it empty again",
            )
        dumped = _DUMPED_FROM.search(text)
        if dumped and int(dumped["major"]) > _major(copy):
            raise RehearsalError(
                f"the schema is of PostgreSQL {dumped['major']}, and the rehearsal server is PostgreSQL {_major(copy)}",
                f"name an empty database on PostgreSQL {dumped['major']} in BIFROST_REHEARSAL_DATABASE_URL",
            )
        known = {str(row[0]) for row in copy.execute("SELECT rolname FROM pg_roles")}
        for role in sorted(roles - known):
            _make_role(copy, role)
        _run(copy, list(_parts(text, copy)))
        # A dump leaves the session with an empty search path.
        copy.execute("RESET ALL")
        # Materialized views are dumped without their rows, and then refused by queries. Views build on older ones.
        for (view,) in copy.execute(_UNPOPULATED).fetchall():
            copy.execute(f"REFRESH MATERIALIZED VIEW {view}".encode())
        for table, heads in versions.items():
            name = sql.Identifier(*table.split("."))
            for head in heads:
                copy.execute(sql.SQL("INSERT INTO {} (version_num) VALUES (%s)").format(name), (head,))


@dataclass(frozen=True)
class _Part:
    """Statements, then a COPY statement with its rows; both are "" in the last part."""

    statements: str
    copy: str = ""
    rows: str = ""


def _parts(text: str, copy: Connection) -> Iterator[_Part]:
    """The dump in its order, without what only psql or a newer server understands."""
    settings = {str(row[0]) for row in copy.execute("SELECT name FROM pg_settings")}
    text = _PSQL_COMMAND.sub("", text)
    text = _SET.sub(lambda line: line[0] if line["name"] in settings else "", text)
    text = _COLUMN_OPTIONS.sub(_without_internal_options, text)
    text = text.replace("CREATE SCHEMA public;", "CREATE SCHEMA IF NOT EXISTS public;")
    start = 0
    for rows in _ROWS.finditer(text):
        yield _Part(text[start : rows.start()], rows[1], rows[2])
        start = rows.end()
    yield _Part(text[start:])


def _without_internal_options(found: re.Match[str]) -> str:
    options = [option for option in found[2].split(", ") if not option.startswith(_INTERNAL_OPTION)]
    return f"{found[1]} ({', '.join(options)});" if options else ""


def _run(copy: Connection, parts: list[_Part]) -> None:
    """Run the dump in one transaction; again for each role that it names and the server lacks."""
    while True:
        try:
            with copy.transaction(), copy.cursor() as cursor:
                for part in parts:
                    cursor.execute(part.statements.encode())
                    if part.copy:
                        with cursor.copy(part.copy.encode()) as stream:
                            stream.write(part.rows)
            return
        except psycopg.Error as error:
            missing = _UNKNOWN_ROLE.search(str(error)) if error.sqlstate == _UNDEFINED_OBJECT else None
            if missing is None:
                raise RehearsalError(
                    f"the rehearsal server cannot take the schema: {error.diag.message_primary or error}",
                    "name an empty database on a server that has it in BIFROST_REHEARSAL_DATABASE_URL",
                ) from error
        _make_role(copy, missing["role"])


def _make_role(copy: Connection, role: str) -> None:
    try:
        copy.execute(sql.SQL("CREATE ROLE {} NOLOGIN").format(sql.Identifier(role)))
    except psycopg.Error as error:
        raise RehearsalError(
            f"the rehearsal server lacks the role {role}: {error.diag.message_primary}",
            f"CREATE ROLE {role} NOLOGIN on that server",
        ) from error


def _major(connection: Connection) -> int:
    return connection.info.server_version // 10_000
