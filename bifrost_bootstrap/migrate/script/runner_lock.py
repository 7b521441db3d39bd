"""The two locks as the runner sees them: it takes the shared runner lock, and checks the parent's migration lock."""

from __future__ import annotations

from typing import Any

from sqlalchemy.engine import Connection

from .drivers import ask
from .events import LockLost

#: Milliseconds between two checks of the server whether its client is still there (0.5 s measured to end).
CONNECTION_CHECK = 1000
#: Key in a connection's `info`: which other database it leads to.
OTHER_DATABASE = "bifrost_other_database"


class RunnerLock:
    """
    The locks of one upgrade.

    request: its field `lock` names the parent's transaction, its database and the keys of both locks; `server_query`
    tells one server from another; `lock_timeout_ms` counts for table locks.
    """

    def __init__(self, request: dict[str, Any]) -> None:
        lock = request["lock"]
        self._server_query = request["server_query"]
        self._database = (lock["server"], lock["database"])
        # On other systems than Linux PostgreSQL 14 accepts only 0. All settings are local: a session's would stay for
        # the pooler's next client.
        check = f"CASE WHEN version() ~ 'linux' THEN '{CONNECTION_CHECK}' ELSE '0' END"
        #: Takes the runner lock, until the transaction ends.
        self.take_query = (
            f"SELECT pg_advisory_xact_lock_shared({lock['class']}, {lock['runner']}),"
            f" set_config('client_connection_check_interval', {check}, true),"
            " set_config('idle_in_transaction_session_timeout', '0', true)"
        )
        self._lock_timeout_column = f", set_config('lock_timeout', '{int(request['lock_timeout_ms'])}', true)"
        #: 1 if the parent's transaction holds the migration lock, else 0.
        self.held_query = (
            "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND granted"
            f" AND classid::int8 = {lock['class']} AND objid::int8 = {lock['migration']} AND objsubid = 2"
            f" AND pid = {lock['pid']} AND virtualtransaction = '{lock['virtualtransaction']}'"
        )

    def take(self, connection: Connection) -> None:
        """Tie the transaction that has just begun to the migration lock. Raises LockLost."""
        # First take the runner lock, then check. In the other order a new holder could come in between.
        ask(connection, self.take_query + self._lock_timeout_column)
        self.assert_migration_lock_held(connection)

    def assert_migration_lock_held(self, connection: Connection) -> None:
        """Raise LockLost unless the parent's transaction still holds the migration lock."""
        if not ask(connection, self.held_query)[0]:
            raise LockLost

    def find_other_database(self, connection: Connection) -> str | None:
        """Which other database than the locked one this connection leads to, or None. Asked once a connection."""
        known: dict[str, str | None] = connection.info
        if OTHER_DATABASE not in known:
            known[OTHER_DATABASE] = self._ask_other_database(connection)
        return known[OTHER_DATABASE]

    def _ask_other_database(self, connection: Connection) -> str | None:
        if connection.dialect.name != "postgresql":
            return connection.engine.url.render_as_string()
        server, database, address, port = ask(
            connection,
            f"SELECT {self._server_query}, current_database()::text,"
            " coalesce(host(inet_server_addr()), 'local'), coalesce(inet_server_port(), 0)",
        )
        return None if (server, database) == self._database else f"database {database} on {address}:{port}"
