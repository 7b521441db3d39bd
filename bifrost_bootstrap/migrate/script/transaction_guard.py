"""
Ties each transaction of the tree to the migration lock, also where a revision ends its transaction by hand.

The state of a transaction, kept for each connection of a driver:

* UNUSED: it holds the runner lock, and the tree has run no statement in it.
* RELEASED: the tree's first statement must come before any query (`SET TRANSACTION ...`). Taking the lock is a query.
  So the transaction was begun again without the lock. The tree's next statement, or the commit, takes the lock.
* IN_USE: it holds the runner lock, and the tree has run a statement in it.

Beside that, `ended_by_hand` is true if a statement of the running revision (`op.execute("COMMIT")`) has ended the
transaction, which SQLAlchemy does not notice. The rest of the revision gets a transaction of its own, except for
statements that cannot be in one. The version of the revision is recorded in it, and the next revision begins another.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import cast

from sqlalchemy.engine import Connection

from .drivers import ask, driver_session, forget_transaction, is_autocommit, is_in_transaction, wants_autocommit
from .runner_lock import RunnerLock
from .statements import may_end_transaction, needs_no_transaction, sets_transaction

Tie = Enum("Tie", "UNUSED RELEASED IN_USE")


@dataclass
class TransactionState:
    """See above."""

    tie: Tie = Tie.IN_USE
    ended_by_hand: bool = False


def state_of(connection: Connection) -> TransactionState:
    return cast("TransactionState", connection.info.setdefault("bifrost_transaction", TransactionState()))


class TransactionGuard:
    """Called at the begin and the commit of each transaction of SQLAlchemy, and before each statement."""

    def __init__(self, lock: RunnerLock) -> None:
        self._lock = lock

    def on_begin(self, connection: Connection) -> None:
        if self._lock.find_other_database(connection):
            return
        state = state_of(connection)
        if state.ended_by_hand and not wants_autocommit(connection):
            driver_session(connection).autocommit = False
        state.ended_by_hand = False
        if not is_autocommit(connection):
            self._take_runner_lock(connection)

    def on_commit(self, connection: Connection) -> None:
        if is_autocommit(connection) or self._lock.find_other_database(connection):
            return
        if state_of(connection).tie is Tie.RELEASED:
            self._take_runner_lock(connection)
        self._lock.assert_migration_lock_held(connection)

    def before_statement(self, connection: Connection, statement: str) -> None:
        """The statement will run in a transaction if it can."""
        self._follow_end_by_hand(connection, statement)
        if is_autocommit(connection):
            return
        state = state_of(connection)
        if sets_transaction(statement):
            # What the tree has written past SQLAlchemy must not be rolled back.
            if state.tie is Tie.UNUSED and ask(connection, "SELECT pg_current_xact_id_if_assigned() IS NULL")[0]:
                driver_session(connection).rollback()
                state.tie = Tie.RELEASED
        else:
            if state.tie is Tie.RELEASED:
                self._take_runner_lock(connection)
            state.tie = Tie.IN_USE
        if may_end_transaction(statement):
            # It may commit, which SQLAlchemy's event does not see.
            self._lock.assert_migration_lock_held(connection)

    def on_next_revision(self, connection: Connection, *, apart: bool = False) -> None:
        """
        If the last revision ended its transaction by hand, record that revision and begin another transaction.

        apart: do so in any case, so that each revision has a transaction of its own.
        """
        state = state_of(connection)
        if state.ended_by_hand or (apart and not is_autocommit(connection)):
            state.ended_by_hand = False
            self._commit_open(connection)
            self._begin_anew(connection)

    def _follow_end_by_hand(self, connection: Connection, statement: str) -> None:
        """After an end by hand: choose a transaction for what can be in one, and none for what cannot."""
        state = state_of(connection)
        if not is_autocommit(connection) and not is_in_transaction(connection):
            forget_transaction(connection)
            state.ended_by_hand = True
        if not state.ended_by_hand or wants_autocommit(connection):
            return
        if needs_no_transaction(statement):
            self._commit_open(connection)
            driver_session(connection).autocommit = True
        elif driver_session(connection).autocommit or not is_in_transaction(connection):
            self._begin_anew(connection)

    def _commit_open(self, connection: Connection) -> None:
        """Commit past SQLAlchemy what the driver has open, if anything, after the check."""
        if is_in_transaction(connection):
            self._lock.assert_migration_lock_held(connection)
            driver_session(connection).commit()

    def _begin_anew(self, connection: Connection) -> None:
        """Begin a transaction past SQLAlchemy."""
        driver_session(connection).autocommit = False
        self._take_runner_lock(connection)

    def _take_runner_lock(self, connection: Connection) -> None:
        """Take the runner lock in the transaction that has just begun."""
        self._lock.take(connection)
        state_of(connection).tie = Tie.UNUSED
