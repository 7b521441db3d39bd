"""
The drivers psycopg, psycopg2 and asyncpg, below SQLAlchemy's transactions and events.

The runner's own statements go through the driver: SQLAlchemy would begin a transaction for them and call the event
handlers again.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from typing import Any

from sqlalchemy.engine import Connection

from .events import Refused
from .statements import only_ends_transaction


def driver_session(connection: Connection) -> Any:
    """The driver's connection, as SQLAlchemy adapts it."""
    return connection.connection.dbapi_connection


def wants_autocommit(connection: Connection) -> bool:
    """Whether the tree has asked SQLAlchemy for it: an `autocommit_block`."""
    return connection.get_execution_options().get("isolation_level") == "AUTOCOMMIT"


def is_autocommit(connection: Connection) -> bool:
    return wants_autocommit(connection) or bool(getattr(driver_session(connection), "autocommit", False))


def is_in_transaction(connection: Connection) -> bool:
    """Whether the driver, and not only SQLAlchemy, is in a transaction. True for a driver that does not tell."""
    driver: Any = connection.connection.driver_connection
    if connection.dialect.driver == "asyncpg":
        return bool(driver.is_in_transaction())
    info = getattr(driver, "info", None)
    # 0 is libpq's PQTRANS_IDLE.
    return info is None or int(info.transaction_status) != 0


def forget_transaction(connection: Connection) -> None:
    """After a transaction was ended by hand: make the driver begin another for the next statement."""
    session = driver_session(connection)
    if connection.dialect.driver == "asyncpg":
        # Not by its own commit: behind a pooler that would reach another session.
        session._transaction = None
        if hasattr(session, "_started"):  # SQLAlchemy 2.0
            session._started = False
        session._connection._top_xact = None
    elif connection.dialect.driver == "psycopg2":
        # The server answers with a warning, and changes nothing.
        session.commit()


def run(connection: Connection, statement: str) -> None:
    """Run a statement without a result; outside a transaction if the connection is."""
    if session := asyncpg_autocommit_session(connection):
        with disconnects_marked(connection):
            run_async(session, lambda driver: driver.execute(statement))
    else:
        ask(connection, statement)


def ask(connection: Connection, query: str) -> Any:
    """First row of the query, or None."""

    async def fetch_in_transaction(driver: Any) -> Any:
        if driver.is_in_transaction():
            return await driver.fetchrow(query)
        async with driver.transaction():
            return await driver.fetchrow(query)

    with disconnects_marked(connection):
        if session := asyncpg_autocommit_session(connection):
            return run_async(session, fetch_in_transaction)
        with closing(connection.connection.cursor()) as cursor:
            cursor.execute(query)
            return cursor.fetchone() if cursor.description else None


@contextmanager
def disconnects_marked(connection: Connection) -> Iterator[None]:
    """Raise Refused("unavailable") if the connection breaks: SQLAlchemy translates no driver's error in an event."""
    session = driver_session(connection)
    try:
        yield
    except Exception as error:
        if isinstance(error, OSError) or connection.dialect.is_disconnect(error, session, None):  # type: ignore[arg-type]
            raise Refused("unavailable", message=str(error)) from error
        raise


def prepare_connecting(dialect: Any, _record: Any, _arguments: Any, parameters: dict[str, Any]) -> None:
    """Let no prepared statement stay in a server session: a pooler gives the session to somebody else next."""
    if dialect.driver in ("psycopg", "psycopg_async"):
        parameters["prepare_threshold"] = None
    elif dialect.driver == "asyncpg":
        # Whatever the URL wants: the driver must not look for statements that were dropped with their transaction.
        parameters.update(statement_cache_size=0, prepared_statement_cache_size=0)
        parameters["connection_class"] = deallocating_class(parameters.get("connection_class"))
        # The driver's own names are counters: another process behind the same pooler has the same.
        parameters.setdefault("prepared_statement_name_func", lambda: f"bifrost_{uuid.uuid4().hex}")


def deallocating_class(base: Any) -> Any:
    """
    A class of asyncpg's connections whose transactions drop in their last exchange what they have prepared.

    asyncpg closes a prepared statement with the next one. By then a pooler may have given the session to somebody else.
    """
    import asyncpg

    class Connection(base or asyncpg.Connection):  # type: ignore[misc]
        async def execute(self, query: str, *arguments: Any, **options: Any) -> Any:
            # The keys are asyncpg's own words. A refused COMMIT would undo a DEALLOCATE before it, which is right: the
            # server then rolls back. After an error the server accepts only a ROLLBACK.
            query = {"COMMIT;": "DEALLOCATE ALL; COMMIT", "ROLLBACK;": "ROLLBACK; DEALLOCATE ALL"}.get(query, query)
            return await super().execute(query, *arguments, **options)

    return Connection


def asyncpg_autocommit_session(connection: Connection) -> Any:
    """
    The session if a statement on it could meet two server sessions, else None.

    asyncpg prepares and runs in two exchanges. Outside a transaction a pooler may give the session away in between.
    """
    if connection.dialect.driver != "asyncpg" or not is_autocommit(connection):
        return None
    return driver_session(connection)


def run_async(session: Any, call: Callable[[Any], Any]) -> Any:
    """Await `call` with asyncpg's own connection; raises its errors as SQLAlchemy translates them."""
    try:
        return session.run_async(call)
    except Exception as error:
        session._handle_exception(error)


def end_asyncpg_transaction(connection: Connection, statement: str) -> bool:
    """With asyncpg: if this statement only ends the transaction, run it in one exchange and return True."""
    end = only_ends_transaction(statement)
    if not end or connection.dialect.driver != "asyncpg" or is_autocommit(connection):
        return False
    # Prepared like any other statement, it would leave something at a pooler.
    run_async(driver_session(connection), lambda driver: driver.execute("COMMIT;" if end["commit"] else "ROLLBACK;"))
    return True
