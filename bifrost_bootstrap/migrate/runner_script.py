"""
Runs a foreign Alembic tree, unmodified, in a process of its own.

This file is started by the tree's interpreter and imports the standard library, Alembic and SQLAlchemy only
(Alembic >= 1.13, SQLAlchemy >= 2.0). It reads one JSON request line from the pipe that its argument names, and writes
one JSON event a line to what was its stdout; whatever the tree prints goes to stderr. When the pipe ends, the parent is
gone and so are we.

By SQLAlchemy's engine events, and without touching the tree's code, each transaction of the tree

* takes the shared runner lock when it begins, by which the next holder of the migration lock finds and ends it,
* proves then, and again before it commits, that the parent still holds the migration lock, so that a runner
  whose lock is gone begins and records nothing,
* waits for table locks no longer than `lock_timeout`, and has the server notice when we are gone.

Statements outside a transaction (`autocommit_block`) cannot hold a lock of ours: each is preceded by the proof
and begins with a comment (`tag`), by which the next holder finds it. With asyncpg most of them get a transaction of
their own (`run_autocommit_asyncpg`). It is tied to the lock like the others, but waits for tables without a limit.

A revision may end its transaction itself (`op.execute("COMMIT")`). SQLAlchemy does not notice, and what follows would
have no lock. The rest of such a revision gets a transaction of its own, but for statements that cannot be in one
(`choose_transaction`), its version is recorded with it, and the next revision begins in another (`begin_next`).
"""

from __future__ import annotations

import io
import json
import os
import re
import signal
import sys
import sysconfig
import threading
import time
import traceback
import uuid
from contextlib import contextmanager
from pathlib import Path

# Our folder is first on the path when this file is run, and would give env.py our modules (`celery`, `lock`).
sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != Path(__file__).resolve().parent]

from typing import TYPE_CHECKING, Any, NoReturn  # noqa: E402

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from alembic.config import Config
    from alembic.runtime.migration import MigrationContext
    from alembic.script import ScriptDirectory
    from sqlalchemy.engine import Connection

#: What a pipe holds; the parent has written the request before we start.
PIPE_BYTES = 65536
#: Characters of a statement that a report needs.
STATEMENT_LENGTH = 2000
#: Milliseconds between two looks of the server at whether its client is still there (0.5 s measured to end).
CONNECTION_CHECK = 1000
#: Seconds that a statement gets to end when its parent has gone.
CANCEL_GRACE = 3.0

GAP, NAME = r"(?:\s|--[^\n]*\n|/\*(?:[^*]|\*(?!/))*\*/)", r'(?:"(?:[^"]|"")+"|[^\W\d][\w$]*)'
CONCURRENT_INDEX = re.compile(
    rf"""\bcreate{GAP}+(?:unique{GAP}+)?index{GAP}+concurrently{GAP}+(?:if{GAP}+not{GAP}+exists{GAP}+)?
        (?P<index>{NAME}){GAP}*\bon\b{GAP}*(?:only\b{GAP}*)?(?P<table>(?:{NAME}\.)?{NAME})""",
    re.IGNORECASE | re.VERBOSE | re.DOTALL,
)
#: What cannot be run in a transaction, or may end it from within.
NO_TRANSACTION = re.compile(
    rf"{GAP}*(?:(?:vacuum|call|alter{GAP}+system|(?:create|drop){GAP}+(?:database|tablespace))\b"
    r"|(?:create|drop|reindex|refresh|alter)\b.*\bconcurrently\b|do\b.*\b(?:commit|rollback)\b)",
    re.IGNORECASE | re.DOTALL,
)
#: What makes a transaction or ends it.
CONTROL = re.compile(rf"{GAP}*(?:begin|start|commit|end|rollback|abort)\b", re.IGNORECASE)
#: What ends a transaction by hand, also among other statements.
ENDS_TRANSACTION = re.compile(r"\b(?:commit|end|rollback|abort)\b", re.IGNORECASE)
#: A statement that does nothing else than end a transaction.
END_ALONE = re.compile(
    rf"{GAP}*(?:(?P<commit>commit|end)|rollback|abort)(?:{GAP}+(?:work|transaction))?{GAP}*;?{GAP}*$", re.IGNORECASE
)
#: What changes something, as env.py may do each time before it looks.
WRITES = re.compile(
    rf"{GAP}*(?:create|alter|drop|grant|revoke|comment|insert|update|delete|truncate|do)\b", re.IGNORECASE
)
#: What the server takes before any query of a transaction only.
SETS_TRANSACTION = re.compile(
    rf"{GAP}*set{GAP}+(?:(?:local|session){GAP}+)?transaction(?:_isolation|_read_only|_deferrable)?\b", re.IGNORECASE
)
#: Keys in a connection's `info`: the tree has ended its transaction by hand in this revision; the transaction has seen
#: no statement of the tree yet; it has seen only such as `SETS_TRANSACTION`, and bears no lock yet.
ENDED, FRESH, UNBOUND = "bifrost_ended_transaction", "bifrost_fresh_transaction", "bifrost_unbound_transaction"
#: By which the server refuses a statement that must have no transaction around it, a procedure that commits too.
NEEDS_NO_TRANSACTION = ("25001", "2D000")


class Refused(Exception):
    """We stop before the tree does harm. `kind` tells the parent which error it is."""

    def __init__(self, kind: str, **facts: Any) -> None:
        super().__init__(kind)
        self.kind, self.facts = kind, facts


class Events:
    """The one way out of this process: JSON lines for the parent."""

    def __init__(self) -> None:
        # A tree may print; file descriptor 1 becomes stderr, and only we know the old one.
        self._out = os.fdopen(os.dup(1), "w", encoding="utf-8")
        os.dup2(2, 1)

    def send(self, event: str, **facts: Any) -> None:
        self._out.write(json.dumps({"event": event, **facts}) + "\n")
        self._out.flush()


def exit_when_parent_exits(pipe: int) -> None:
    """
    End this process, and what it started, when the parent closes the pipe or dies.

    By SIGINT: asyncio and psycopg have the server cancel what is running, behind a pooler too. (psycopg2 does not
    listen, and leaves a statement outside a transaction to the next holder.)
    """
    signal.signal(signal.SIGINT, signal.default_int_handler)

    def wait() -> None:
        while os.read(pipe, 4096):
            pass
        # The parent has given us a process group of our own.
        os.killpg(0, signal.SIGINT)
        time.sleep(CANCEL_GRACE)
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


class LockGuard:
    """Ties every transaction of the tree to the migration lock that the parent holds."""

    def __init__(self, request: dict[str, Any], events: Events) -> None:
        self.lock = lock = request["lock"]
        self.tag, self.leftover, self.server_query = request["tag"], request["leftover"], request["server_query"]
        self.lock_timeout = int(request["lock_timeout_ms"])
        # Elsewhere PostgreSQL 14 has no other value than 0. LOCAL, since behind a pooler a session setting would stay
        # for the next client.
        check = f"CASE WHEN version() ~ 'linux' THEN '{CONNECTION_CHECK}' ELSE '0' END"
        self.join = (
            f"SELECT pg_advisory_xact_lock_shared({lock['class']}, {lock['runner']}),"
            f" set_config('client_connection_check_interval', {check}, true),"
            " set_config('idle_in_transaction_session_timeout', '0', true)"
        )
        self.proof = (
            "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND granted"
            f" AND classid::int8 = {lock['class']} AND objid::int8 = {lock['migration']} AND objsubid = 2"
            f" AND pid = {lock['pid']} AND virtualtransaction = '{lock['virtualtransaction']}'"
        )
        self.events = events

    def listen(self) -> None:
        from sqlalchemy import event
        from sqlalchemy.engine import Engine

        event.listen(Engine, "do_connect", self.on_connect)
        event.listen(Engine, "begin", self.on_begin)
        event.listen(Engine, "commit", self.on_commit)
        event.listen(Engine, "before_cursor_execute", self.on_execute, retval=True)
        event.listen(Engine, "do_execute", lambda *call: self.run_autocommit_asyncpg("_prepare_and_execute", *call))
        event.listen(Engine, "do_executemany", lambda *call: self.run_autocommit_asyncpg("_executemany", *call))
        event.listen(Engine, "after_cursor_execute", self.on_executed)

    @staticmethod
    def on_connect(dialect: Any, _record: Any, _arguments: Any, parameters: dict[str, Any]) -> None:
        # A prepared statement stays on a pooler's server connection, which somebody else gets next.
        if dialect.driver in ("psycopg", "psycopg_async"):
            parameters["prepare_threshold"] = None
        elif dialect.driver == "asyncpg":
            # Whatever the URL wants: what is dropped with the transaction is not to be met again.
            parameters.update(statement_cache_size=0, prepared_statement_cache_size=0)
            parameters["connection_class"] = leaving_nothing(parameters.get("connection_class"))
            # Its own names are counters: another process behind the same pooler has the same.
            parameters.setdefault("prepared_statement_name_func", lambda: f"bifrost_{uuid.uuid4().hex}")

    def on_begin(self, connection: Connection) -> None:
        if connection.info.pop(ENDED, False) and not wants_autocommit(connection):
            dbapi(connection).autocommit = False
        if self.foreign(connection) is not None or autocommits(connection):
            return
        self.join_lock(connection)
        connection.info[FRESH] = True

    def join_lock(self, connection: Connection) -> None:
        """Tie the transaction that has just begun to the migration lock."""
        connection.info.pop(UNBOUND, None)
        # First seen by the next holder, then proven: in the other order he could come in between.
        ask(connection, f"{self.join}, set_config('lock_timeout', '{self.lock_timeout}', true)")
        self.prove(connection)

    def on_commit(self, connection: Connection) -> None:
        if self.foreign(connection) is not None or autocommits(connection):
            return
        if connection.info.get(UNBOUND):
            self.join_lock(connection)
        self.prove(connection)

    def on_execute(
        self, connection: Connection, _cursor: Any, statement: str, parameters: Any, _context: Any, _many: bool
    ) -> tuple[str, Any]:
        if self.foreign(connection) is not None:
            return statement, parameters
        if not autocommits(connection) and not in_transaction(connection):
            forget_transaction(connection)
            connection.info[ENDED] = True
        if connection.info.get(ENDED) and not wants_autocommit(connection):
            self.choose_transaction(connection, statement)
        if not autocommits(connection):
            self.before_statement(connection, statement)
            if ENDS_TRANSACTION.search(statement):
                # It may commit, which `on_commit` does not see.
                self.prove(connection)
            return statement, parameters
        self.prove(connection)
        if found := CONCURRENT_INDEX.search(statement):
            self.drop_invalid(connection, found["index"], found["table"])
        return f"{self.tag} {statement}", parameters

    def on_executed(
        self, connection: Connection, _cursor: Any, statement: str, _parameters: Any, _context: Any, _many: bool
    ) -> None:
        """IF NOT EXISTS waits for somebody else's build, and skips ours also where that one has failed meanwhile."""
        if self.foreign(connection) is not None or not autocommits(connection):
            return
        if found := CONCURRENT_INDEX.search(statement):
            while self.drop_invalid(connection, found["index"], found["table"]):
                self.prove(connection)
                run(connection, statement)

    def before_statement(self, connection: Connection, statement: str) -> None:
        """Our join was a query: where the tree's first statement must come before any, begin again and join later."""
        fresh = connection.info.pop(FRESH, False)
        if not SETS_TRANSACTION.match(statement):
            if connection.info.get(UNBOUND):
                self.join_lock(connection)
        # What the tree does past SQLAlchemy is not seen here, and must not be taken back.
        elif fresh and ask(connection, "SELECT pg_current_xact_id_if_assigned() IS NULL")[0]:
            dbapi(connection).rollback()
            connection.info[UNBOUND] = True

    def choose_transaction(self, connection: Connection, statement: str) -> None:
        """Behind an end by hand: one transaction for what can be in one, and none for what cannot."""
        if NO_TRANSACTION.match(statement):
            self.commit_open(connection)
            dbapi(connection).autocommit = True
        elif dbapi(connection).autocommit or not in_transaction(connection):
            self.begin_anew(connection)

    def begin_next(self, connection: Connection) -> None:
        """A revision begins: where the last one ended the transaction by hand, record that one and begin another."""
        if connection.info.pop(ENDED, False):
            self.commit_open(connection)
            self.begin_anew(connection)

    def commit_open(self, connection: Connection) -> None:
        """Commit past SQLAlchemy what the driver has open, if anything, with the lock proven."""
        if in_transaction(connection):
            self.prove(connection)
            dbapi(connection).commit()

    def begin_anew(self, connection: Connection) -> None:
        """Begin a transaction past SQLAlchemy, tied to the lock."""
        dbapi(connection).autocommit = False
        self.join_lock(connection)

    def run_autocommit_asyncpg(self, method: str, cursor: Any, statement: str, parameters: Any, context: Any) -> bool:
        """
        Run the tree's statement so that it meets one session only, where that takes care; whether it was run.

        In a transaction of its own, which bears the runner lock and proves the other one as any of the tree's does; by
        the cursor's own method, so that rows and their number are where the tree looks for them. What must have no
        transaction around it has neither, and is one exchange.
        """
        connection = context.root_connection
        if end_by_asyncpg(connection, statement):
            return True
        session = autocommit_asyncpg_session(connection)
        if session is None or session._connection.is_in_transaction() or self.foreign(connection) is not None:
            return False

        async def in_one_session(driver: Any) -> None:
            async with driver.transaction():
                await driver.execute(self.join)
                await prove(driver)
                await getattr(cursor, method)(statement, parameters)
                await prove(driver)

        async def prove(driver: Any) -> None:
            if not await driver.fetchval(self.proof):
                raise Refused("lock_lost")

        if not (CONTROL.match(statement) or NO_TRANSACTION.match(statement)):
            try:
                session.run_async(in_one_session)
            except Exception as error:
                if getattr(error, "sqlstate", None) not in NEEDS_NO_TRANSACTION:
                    session._handle_exception(error)
            else:
                return True
        if parameters:
            return False
        run(connection, statement)
        return True

    def foreign(self, connection: Connection) -> str | None:
        """Which other database than the locked one this connection leads to, or None. Asked once a connection."""
        known: dict[str, str | None] = connection.info
        if "bifrost_foreign" not in known:
            if connection.dialect.name != "postgresql":
                return connection.engine.url.render_as_string()
            server, database, address, port = ask(
                connection,
                f"SELECT {self.server_query}, current_database()::text,"
                " coalesce(host(inet_server_addr()), 'local'), coalesce(inet_server_port(), 0)",
            )
            ours = (server, database) == (self.lock["server"], self.lock["database"])
            known["bifrost_foreign"] = None if ours else f"database {database} on {address}:{port}"
        return known["bifrost_foreign"]

    def prove(self, connection: Connection) -> None:
        """Raise unless the parent's transaction still holds the migration lock."""
        if not ask(connection, self.proof)[0]:
            raise Refused("lock_lost")

    def drop_invalid(self, connection: Connection, index: str, table: str) -> bool:
        """Drop an INVALID index of this name, left by an interrupted build that no session goes on with."""
        name = index[1:-1].replace('""', '"') if index.startswith('"') else index.lower()
        found = ask(
            connection,
            "SELECT i.indexrelid::regclass::text FROM pg_index i JOIN pg_class c ON c.oid = i.indexrelid"
            f" WHERE c.relname = {literal(name)} AND i.indrelid = to_regclass({literal(table)}) AND {self.leftover}",
        )
        if found:
            run(connection, f"{self.tag} DROP INDEX CONCURRENTLY {found[0]}")
            self.events.send("healed", index=found[0])
        return bool(found)


def first_line(text: str | None) -> str:
    """A title of several lines goes on in the next ones."""
    return next((line.strip() for line in (text or "").splitlines() if line.strip()), "")


def literal(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"


def wants_autocommit(connection: Connection) -> bool:
    """Whether the tree has said so to SQLAlchemy: an `autocommit_block`."""
    return connection.get_execution_options().get("isolation_level") == "AUTOCOMMIT"


def autocommits(connection: Connection) -> bool:
    return wants_autocommit(connection) or bool(getattr(connection.connection.dbapi_connection, "autocommit", False))


def in_transaction(connection: Connection) -> bool:
    """Whether the driver, and not only SQLAlchemy, is in a transaction. True for a driver that does not tell."""
    driver: Any = connection.connection.driver_connection
    if connection.dialect.driver == "asyncpg":
        return bool(driver.is_in_transaction())
    info = getattr(driver, "info", None)
    # 0 is libpq's PQTRANS_IDLE.
    return info is None or int(info.transaction_status) != 0


def dbapi(connection: Connection) -> Any:
    """The driver's connection, as SQLAlchemy adapts it."""
    return connection.connection.dbapi_connection


def end_by_asyncpg(connection: Connection, statement: str) -> bool:
    """Run a statement that ends a transaction by hand, with asyncpg in one exchange; False where it is none of that."""
    end = END_ALONE.match(statement)
    if not end or connection.dialect.driver != "asyncpg" or autocommits(connection):
        return False
    session = dbapi(connection)
    try:
        # Prepared as any other statement it would leave something at a pooler.
        session.run_async(lambda driver: driver.execute("COMMIT;" if end["commit"] else "ROLLBACK;"))
    except Exception as error:
        session._handle_exception(error)
    return True


def forget_transaction(connection: Connection) -> None:
    """Where the driver still believes in a transaction that was ended by hand, have it begin another."""
    session = dbapi(connection)
    if connection.dialect.driver == "asyncpg":
        # Not by its own commit: behind a pooler that would reach another session.
        session._transaction = None
        if hasattr(session, "_started"):  # SQLAlchemy 2.0
            session._started = False
        session._connection._top_xact = None
    elif connection.dialect.driver == "psycopg2":
        # The server answers with a warning, and changes nothing.
        session.commit()


def autocommit_asyncpg_session(connection: Connection) -> Any:
    """
    The driver's own connection where a statement may meet two sessions, else None.

    asyncpg prepares and runs in two exchanges; outside a transaction a pooler may give the session away in between.
    """
    if connection.dialect.driver != "asyncpg" or not autocommits(connection):
        return None
    return connection.connection.dbapi_connection


def leaving_nothing(base: Any) -> Any:
    """
    A class of asyncpg's connections whose transactions drop in their last exchange what they have prepared.

    asyncpg closes a prepared statement with the next one, when a pooler may have given the session to somebody else.
    """
    import asyncpg

    class Connection(base or asyncpg.Connection):  # type: ignore[misc]
        async def execute(self, query: str, *arguments: Any, **options: Any) -> Any:
            # asyncpg's own words. A refused COMMIT takes what follows with it; after an error only a ROLLBACK is heard.
            query = {"COMMIT;": "DEALLOCATE ALL; COMMIT", "ROLLBACK;": "ROLLBACK; DEALLOCATE ALL"}.get(query, query)
            return await super().execute(query, *arguments, **options)

    return Connection


@contextmanager
def disconnects_marked(connection: Connection) -> Iterator[None]:
    """In an event SQLAlchemy translates no error of the driver: say ourselves that the connection broke."""
    session = connection.connection.dbapi_connection
    try:
        yield
    except Exception as error:
        if isinstance(error, OSError) or connection.dialect.is_disconnect(error, session, None):  # type: ignore[arg-type]
            raise Refused("disconnected", message=str(error)) from error
        raise


def run(connection: Connection, statement: str) -> None:
    """Run a statement without a result. By the driver: SQLAlchemy would begin a transaction, and call us again."""
    with disconnects_marked(connection):
        if session := autocommit_asyncpg_session(connection):
            try:
                session.run_async(lambda driver: driver.execute(statement))
            except Exception as error:
                session._handle_exception(error)
            return
        cursor = connection.connection.cursor()
        cursor.execute(statement)
        cursor.close()


def ask(connection: Connection, query: str) -> Any:
    """First row of the query, or None."""
    with disconnects_marked(connection):
        if session := autocommit_asyncpg_session(connection):

            async def in_one_session(driver: Any) -> Any:
                async with driver.transaction():
                    return await driver.fetchrow(query)

            return session.run_async(in_one_session)
        cursor = connection.connection.cursor()
        cursor.execute(query)
        row = cursor.fetchone()
        cursor.close()
        return row


class Runner:
    """One upgrade of the tree to its heads."""

    def __init__(self, request: dict[str, Any], config: Config, script: ScriptDirectory, events: Events) -> None:
        self.script, self.config, self.events = script, config, events
        self.version_table: str = request["version_table"]
        self.guard = LockGuard(request, events)
        self.revision = self.title = ""
        self.applied = False
        self.failure: BaseException | None = None

    def upgrade(self) -> None:
        from alembic.runtime.environment import EnvironmentContext

        self.guard.listen()
        with EnvironmentContext(self.config, self.script, fn=self.steps, destination_rev="heads"):
            self.script.run_env()
        if self.failure:
            # env.py has caught it, and ended as if nothing were.
            raise self.failure

    def steps(self, heads: Any, context: MigrationContext) -> Any:
        """Alembic calls this with the live context, after env.py has configured it, before the first revision."""
        assert context.connection is not None
        if where := self.guard.foreign(context.connection):
            raise Refused("wrong_database", migrated=where)
        if self.version_table:
            self.want_version_table(context)
        steps = list(self.script._upgrade_revs("heads", heads))
        self.events.send("plan", revisions=[describe(step.revision) for step in steps])
        context.on_version_apply_callbacks += (self.on_applied,)
        for step in steps:
            step.migration_fn = self.announced(step, step.migration_fn, context.connection)
        return steps

    def want_version_table(self, context: MigrationContext) -> None:
        """Raise unless the tree keeps its version where we look."""
        schema, table = context.version_table_schema, context.version_table
        assert context.connection is not None
        read_schema, _, read_table = self.version_table.rpartition(".")
        # Where the tree leaves the schema to its search path, only the result can tell.
        read_schema = read_schema or (where_found(context.connection, read_table) if schema else "")
        if read_table != table or (schema and read_schema != schema):
            raise Refused("version_table", written=f"{schema}.{table}" if schema else table)

    def announced(self, step: Any, migrate: Callable[..., Any], connection: Connection) -> Callable[..., Any]:
        def migrate_announced(**arguments: Any) -> None:
            self.revision, self.title, self.applied = step.revision.revision, first_line(step.revision.doc), False
            self.events.send("begin", **describe(step.revision))
            self.began = time.monotonic()
            self.guard.begin_next(connection)
            try:
                migrate(**arguments)
            except Exception as error:
                self.failure = error
                raise

        return migrate_announced

    def on_applied(self, **_facts: Any) -> None:
        """It is recorded; its transaction is still to be committed, and may fail in that."""
        self.applied = True
        self.events.send("applied", revision=self.revision, seconds=round(time.monotonic() - self.began, 3))

    def report(self, error: BaseException) -> dict[str, Any]:
        told = report(error, self.revision, self.title)
        return {**told, "statement": "COMMIT"} if self.applied else told


def where_found(connection: Connection, table: str) -> str:
    """The schema in which a table without one is found, or would be made."""
    name = literal('"' + table.replace('"', '""') + '"')
    found = ask(
        connection,
        "SELECT coalesce((SELECT n.nspname FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace"
        f" WHERE c.oid = to_regclass({name})), current_schema())::text",
    )
    return found[0] or ""


def read_only() -> None:
    """From now on every transaction of env.py may only read."""
    from sqlalchemy import event
    from sqlalchemy.engine import Engine

    event.listen(Engine, "begin", lambda connection: run(connection, "SET TRANSACTION READ ONLY"))


def version_tables(config: Config, script: ScriptDirectory) -> list[str]:
    """Where env.py keeps its versions, `schema.table` each: run as by `alembic current`, and nothing is written."""
    from alembic.runtime.environment import EnvironmentContext
    from sqlalchemy import event
    from sqlalchemy.engine import Engine

    def without_writing(
        _connection: Any, _cursor: Any, statement: str, parameters: Any, *_more: Any
    ) -> tuple[str, Any]:
        # What env.py makes before it looks, in a transaction that may only read.
        return ("SELECT 1", ()) if WRITES.match(statement) else (statement, parameters)

    read_only()
    event.listen(Engine, "before_cursor_execute", without_writing, retval=True)
    found: list[str] = []

    def note(_heads: Any, context: MigrationContext) -> Any:
        assert context.connection is not None
        table = context.version_table
        # A search path may lead to a schema that is still to be made.
        schema = context.version_table_schema or where_found(context.connection, table) or "(no schema)"
        found.append(f"{schema}.{table}")
        return ()

    with EnvironmentContext(config, script, fn=note, dont_mutate=True):
        script.run_env()
    return found


def pending_sql(config: Config, script: ScriptDirectory, heads: list[str]) -> str:
    """What an upgrade from these heads would run; nothing is run, and where env.py connects, nothing can be written."""
    from alembic.runtime.environment import EnvironmentContext

    read_only()
    config.output_buffer = io.StringIO()

    def steps(found: Any, _context: MigrationContext) -> Any:
        return script._upgrade_revs("heads", found)

    options: dict[str, Any] = {"as_sql": True, "starting_rev": heads or None, "destination_rev": "heads"}
    with EnvironmentContext(config, script, fn=steps, **options):
        script.run_env()
    return config.output_buffer.getvalue()


def describe(revision: Any) -> dict[str, Any]:
    return {
        "revision": revision.revision,
        "title": first_line(revision.doc),
        "down": list(revision._versioned_down_revisions),
        "depends_on": list(revision._resolved_dependencies),
        "labels": sorted(revision._orig_branch_labels),
    }


def report(error: BaseException, revision: str, title: str) -> dict[str, Any]:
    """What the parent needs of an exception, whichever driver raised it."""
    reason: BaseException | None = error
    while reason is not None:
        if isinstance(reason, Refused):
            return {"kind": reason.kind, **reason.facts}
        reason = reason.__context__
    original = getattr(error, "orig", None) or error
    cause = original.__cause__ or original
    diag = getattr(original, "diag", None)
    message = getattr(diag, "message_primary", None) or getattr(cause, "message", None) or str(original)
    detail = getattr(diag, "message_detail", None) or getattr(cause, "detail", None)
    sqlstate = getattr(original, "sqlstate", None) or getattr(original, "pgcode", None) or ""
    place = own_place(error)
    if not sqlstate and not type(original).__module__.startswith(("alembic.", "asyncpg.", "psycopg")):
        message = own_words(original) + (f" ({place})" if place else "")
    return {
        "kind": "failed",
        # The rest is about how its revisions fit together.
        "by_tree": bool(place)
        and not type(error).__module__.startswith("alembic.")
        and not isinstance(error, SyntaxError),
        "sqlstate": sqlstate,
        "disconnected": not sqlstate and is_disconnect(error, begun=bool(revision)),
        "message": f"{message} ({detail})" if detail else message or type(error).__name__,
        "hint": getattr(diag, "message_hint", None) or getattr(cause, "hint", None) or "",
        "statement": " ".join((getattr(error, "statement", None) or "").split())[:STATEMENT_LENGTH],
        "revision": revision,
        "title": title,
    }


def own_words(error: BaseException) -> str:
    """Class and message in one line; of pydantic's errors the fields, without their values."""
    try:
        faults = error.errors()  # type: ignore[attr-defined]
        text = "; ".join(f"{'.'.join(map(str, fault['loc']))}: {fault['msg']}" for fault in faults)
    except (AttributeError, KeyError, TypeError):
        text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def own_place(error: BaseException) -> str:
    """File and line of the last frame of the tree's own code; "" where none of it was running."""
    kinds = ("stdlib", "platstdlib", "purelib", "platlib")
    libraries = ["<", str(Path(__file__).parent), *(sysconfig.get_path(kind) for kind in kinds)]
    frames = [f for f in traceback.extract_tb(error.__traceback__) if not f.filename.startswith(tuple(libraries))]
    return f"{frames[-1].filename}, line {frames[-1].lineno}" if frames else ""


def is_disconnect(error: BaseException, *, begun: bool) -> bool:
    """
    Whether the server was not to be reached, or the connection broke.

    begun: a revision has, so there was a connection, and only SQLAlchemy knows whether it broke; the revision's
    own calls of other services fail by the same classes. Before that, errors of files are told by their name.
    """
    from sqlalchemy.exc import InterfaceError, OperationalError

    if begun or getattr(error, "connection_invalidated", False):
        return bool(getattr(error, "connection_invalidated", False))
    if isinstance(error, OSError):
        return error.filename is None
    # A tuple: the tree's Python may be older than ours.
    return isinstance(error, (InterfaceError, OperationalError))


def configured(arguments: list[str]) -> Config:
    """Alembic's configuration for this command line, as its own program makes it."""
    from alembic.config import CommandLine

    class Line(CommandLine):
        def run_cmd(self, config: Config, options: Any) -> None:
            self.config = config

    sys.argv = ["alembic", *arguments]
    line = Line(prog="alembic")
    line.main(argv=arguments)
    return line.config


def want_each_once(script: ScriptDirectory) -> None:
    """Alembic takes the last of several files with the same revision id, and says so in a warning only."""
    from alembic.util import CommandError

    files: dict[str, str] = {}
    for revision in script._load_revisions():
        if (other := files.setdefault(revision.revision, revision.path)) != revision.path:
            raise CommandError(f"revision {revision.revision} is in two files: {other} and {revision.path}")


def main() -> NoReturn:
    events = Events()
    pipe = int(sys.argv[1])
    os.set_inheritable(pipe, False)
    request = json.loads(os.read(pipe, PIPE_BYTES))
    runner: Runner | None = None
    code = 1
    try:
        try:
            try:
                from alembic.script import ScriptDirectory
            except Exception as error:
                raise Refused("no_alembic", message=f"has no Alembic that can be imported: {error}") from error

            config = configured(request["arguments"] + (["--sql"] if request["mode"] == "sql" else []))
            script = ScriptDirectory.from_config(config)
            if request["mode"] == "describe":
                want_each_once(script)
                revisions = [describe(revision) for revision in script.walk_revisions()]
                events.send("tree", revisions=revisions, env=str(script.env_py_location))
            elif request["mode"] == "tables":
                events.send("tables", tables=version_tables(config, script))
            elif request["mode"] == "sql":
                events.send("sql", sql=pending_sql(config, script, request["heads"]))
            else:
                exit_when_parent_exits(pipe)
                runner = Runner(request, config, script, events)
                runner.upgrade()
                events.send("done")
            code = 0
        except BaseException as error:
            traceback.print_exc()
            events.send("error", **(runner.report(error) if runner else report(error, "", "")))
        sys.stderr.flush()
    finally:
        # The reader may be gone. Not sys.exit: threads and exit handlers of the tree must not change what
        # we reported.
        os._exit(code)


if __name__ == "__main__":
    main()
