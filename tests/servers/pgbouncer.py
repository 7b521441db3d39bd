"""PgBouncer in transaction pooling mode, as the platform uses it."""

from __future__ import annotations

import pwd
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from threading import Event, Thread
from typing import Any, ClassVar, Protocol

import psycopg
from psycopg.rows import dict_row

from tests.servers.leaks import PLANTED_PASSWORD, PLANTED_PASSWORD_QUOTED
from tests.servers.postgres import ADMIN_ROLE, APP_ROLE, CONNECT_TIMEOUT
from tests.servers.process import RunFolder, Server, find_program, settings_lines, unprivileged_user

PROGRAM_FOLDERS = ("/usr/sbin", "/usr/local/sbin", "/usr/local/bin", "/opt/homebrew/bin")
#: The user of the admin console. The roles of PostgreSQL have no rights there.
CONSOLE_USER = "console"


class Address(Protocol):
    """The address of a PostgreSQL with the roles APP_ROLE and ADMIN_ROLE and the planted password."""

    @property
    def host(self) -> str:
        """Name or address."""

    @property
    def port(self) -> int:
        """TCP port."""


class PgbouncerServer(Server):
    """A private PgBouncer in front of all databases of a PostgresServer.

    Args:
        run: The folder for its files.
        behind: The PostgreSQL server.
        pool_size: Server connections for each pair of user and database.
        settings: More settings of section [pgbouncer], for instance `{"idle_transaction_timeout": "2"}`.
        behind_port: The port of a Proxy in front of `behind`. Default: the port of `behind`.
    """

    kind: ClassVar[str] = "pgbouncer"
    not_ready: ClassVar[tuple[type[Exception], ...]] = (psycopg.OperationalError,)

    def __init__(
        self,
        run: RunFolder,
        behind: Address,
        *,
        pool_size: int = 20,
        settings: Mapping[str, str] | None = None,
        behind_port: int | None = None,
    ) -> None:
        super().__init__(run)
        self.behind = behind
        self.pool_size = pool_size
        self.settings = dict(settings or {})
        self.behind_port = behind_port or behind.port

    def user(self) -> pwd.struct_passwd | None:
        return unprivileged_user()  # PgBouncer does not run as root

    def url(self, database: str = "postgres", *, driver: str | None = None, user: str = APP_ROLE) -> str:
        """Return the URL of a database, through this PgBouncer."""
        scheme = f"postgresql+{driver}" if driver else "postgresql"
        return f"{scheme}://{user}:{PLANTED_PASSWORD_QUOTED}@{self.host}:{self.port}/{database}"

    def show(self, what: str) -> list[dict[str, Any]]:
        """Return the rows of a SHOW command of the console, for instance "SERVERS" or "POOLS"."""
        with self._console() as connection, connection.cursor(row_factory=dict_row) as cursor:
            return cursor.execute(f"SHOW {what}".encode()).fetchall()

    def prepare(self) -> None:
        users = (APP_ROLE, ADMIN_ROLE, CONSOLE_USER)
        passwords = self.data / "userlist.txt"
        passwords.touch(mode=0o600)
        passwords.write_text("".join(f'"{user}" "{PLANTED_PASSWORD}"\n' for user in users))
        settings = {
            "listen_addr": self.host,
            "listen_port": self.port,
            "unix_socket_dir": "",
            "auth_type": "scram-sha-256",
            "auth_file": passwords,
            "admin_users": CONSOLE_USER,
            "pool_mode": "transaction",
            "default_pool_size": self.pool_size,
            "max_client_conn": 500,
            **self.settings,
        }
        (self.data / "pgbouncer.ini").write_text(
            f"[databases]\n* = host={self.behind.host} port={self.behind_port}\n\n[pgbouncer]\n"
            + "".join(settings_lines(settings, " = "))
        )

    def command(self) -> Sequence[str]:
        return [find_program("pgbouncer", *PROGRAM_FOLDERS), str(self.data / "pgbouncer.ini")]

    def probe(self) -> None:
        self.show("VERSION")

    def _console(self) -> psycopg.Connection[tuple[Any, ...]]:
        url = self.url("pgbouncer", user=CONSOLE_USER)
        return psycopg.connect(url, autocommit=True, connect_timeout=CONNECT_TIMEOUT)


@contextmanager
def busy_clients(url: str, number: int = 3) -> Iterator[None]:
    """Run `number` clients that execute one transaction after another until the block ends."""
    stop = Event()

    def work() -> None:
        with psycopg.connect(url, prepare_threshold=None) as connection:
            while not stop.is_set():
                with connection.transaction():
                    connection.execute("SELECT count(*) FROM pg_class")

    clients = [Thread(target=work) for _ in range(number)]
    for client in clients:
        client.start()
    try:
        yield
    finally:
        stop.set()
        for client in clients:
            client.join()
