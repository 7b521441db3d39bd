"""
Runs the tree's statements outside a transaction with asyncpg, so that each meets one server session only.

asyncpg prepares and runs a statement in two exchanges. Outside a transaction a pooler may give the session away in
between. So a statement gets a transaction of its own, which holds the runner lock and checks the migration lock like
any other of the tree. A statement that the server refuses in a transaction is run in one exchange, with neither.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from .drivers import asyncpg_autocommit_session, end_asyncpg_transaction, run, run_async
from .events import LockLost
from .runner_lock import RunnerLock
from .statements import controls_transaction, needs_no_transaction

#: SQLSTATEs with which the server refuses a statement in a transaction, also a procedure that commits.
REFUSED_IN_TRANSACTION = ("25001", "2D000")


def run_statement(
    lock: RunnerLock, cursor_method: str, cursor: Any, statement: str, parameters: Any, context: Any
) -> bool:
    """
    Run the statement in this way if that is needed; returns whether it was run.

    cursor_method: of SQLAlchemy's cursor, so that rows and their number are where the tree looks for them.
    """
    connection = context.root_connection
    if end_asyncpg_transaction(connection, statement):
        return True
    session = asyncpg_autocommit_session(connection)
    if session is None or session._connection.is_in_transaction() or lock.find_other_database(connection):
        return False
    if not controls_transaction(statement) and not needs_no_transaction(statement):
        call = partial(getattr(cursor, cursor_method), statement, parameters)
        if run_in_transaction(lock, session, call):
            return True
    if parameters:
        return False
    run(connection, statement)
    return True


def run_in_transaction(lock: RunnerLock, session: Any, call: Callable[[], Any]) -> bool:
    """Await the call in a transaction. Returns False if the server refuses the statement in one."""

    async def assert_migration_lock_held(driver: Any) -> None:
        if not await driver.fetchval(lock.held_query):
            raise LockLost

    async def in_transaction(driver: Any) -> None:
        async with driver.transaction():
            await driver.execute(lock.take_query)
            await assert_migration_lock_held(driver)
            await call()
            await assert_migration_lock_held(driver)

    try:
        run_async(session, in_transaction)
    except Exception as error:
        if getattr(error, "sqlstate", None) in REFUSED_IN_TRANSACTION:
            return False
        raise
    return True
