"""Listens to SQLAlchemy's engine events, and keeps everything that the tree runs under the migration lock."""

from __future__ import annotations

from functools import partial
from typing import Any

from sqlalchemy import event
from sqlalchemy.engine import Connection, Engine

from . import asyncpg_autocommit
from .drivers import ask, is_autocommit, prepare_connecting, run
from .events import Events
from .runner_lock import RunnerLock
from .statements import find_concurrent_index, quote_literal
from .transaction_guard import TransactionGuard


class LockGuard:
    """
    `TransactionGuard` ties each transaction to the lock. Each statement outside one gets a check and a comment.

    Nothing is done on connections to other databases.

    request: beside the fields for `RunnerLock`, `tag` is the comment, and `leftover` the condition on `pg_index i` for
    an INVALID index that no session is building.
    """

    def __init__(self, request: dict[str, Any], events: Events) -> None:
        self.lock = RunnerLock(request)
        self.transactions = TransactionGuard(self.lock)
        self._tag = request["tag"]
        self._leftover = request["leftover"]
        self._events = events

    def listen(self) -> None:
        event.listen(Engine, "do_connect", prepare_connecting)
        event.listen(Engine, "begin", self.transactions.on_begin)
        event.listen(Engine, "commit", self.transactions.on_commit)
        event.listen(Engine, "before_cursor_execute", self.before_execute, retval=True)
        for name, method in (("do_execute", "_prepare_and_execute"), ("do_executemany", "_executemany")):
            event.listen(Engine, name, partial(asyncpg_autocommit.run_statement, self.lock, method))
        event.listen(Engine, "after_cursor_execute", self.after_execute)

    def before_execute(
        self, connection: Connection, _cursor: Any, statement: str, parameters: Any, *_more: Any
    ) -> tuple[str, Any]:
        if not self.lock.find_other_database(connection):
            self.transactions.before_statement(connection, statement)
            if is_autocommit(connection):
                self.lock.assert_migration_lock_held(connection)
                self.drop_invalid_index(connection, statement)
                statement = f"{self._tag} {statement}"
        return statement, parameters

    def after_execute(self, connection: Connection, _cursor: Any, statement: str, *_more: Any) -> None:
        """
        Build the index again if it is INVALID.

        Another session's build may fail while ours waits for it. IF NOT EXISTS then skips our build.
        """
        if self.lock.find_other_database(connection) or not is_autocommit(connection):
            return
        while self.drop_invalid_index(connection, statement):
            self.lock.assert_migration_lock_held(connection)
            run(connection, statement)

    def drop_invalid_index(self, connection: Connection, statement: str) -> bool:
        """
        Drop the INVALID index that an interrupted build of this statement has left, and that no session is building.

        Returns whether there was one. False for a statement that builds no index concurrently.
        """
        build = find_concurrent_index(statement)
        if not build:
            return False
        name = build["index"]
        name = name[1:-1].replace('""', '"') if name.startswith('"') else name.lower()
        found = ask(
            connection,
            "SELECT i.indexrelid::regclass::text FROM pg_index i JOIN pg_class c ON c.oid = i.indexrelid"
            f" WHERE c.relname = {quote_literal(name)} AND i.indrelid = to_regclass({quote_literal(build['table'])})"
            f" AND {self._leftover}",
        )
        if found:
            run(connection, f"{self._tag} DROP INDEX CONCURRENTLY {found[0]}")
            self._events.send("healed", index=found[0])
        return bool(found)
