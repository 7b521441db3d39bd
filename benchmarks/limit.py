"""The time that the servers need: to read all modules, and to execute ready-made commands."""

from __future__ import annotations

import json
import subprocess
import time
from pathlib import Path

import psycopg

from tests.servers import Database, RedisServer

_MODULES = "FROM workspace_files WHERE entity_type = 'module' AND NOT is_deleted AND content IS NOT NULL"


def read_and_throw_away(database: Database) -> float:
    """Return the seconds to read path, content and hash of every module in PostgreSQL's binary format."""
    with psycopg.connect(database.url) as connection, connection.cursor() as cursor:
        started = time.perf_counter()
        query = f"COPY (SELECT path, content, content_hash {_MODULES}) TO STDOUT (FORMAT binary)"
        with cursor.copy(query) as copy:
            while copy.read():
                pass
        return time.perf_counter() - started


def write_commands(database: Database, file: Path) -> None:
    """Write the commands that fill an empty cache into `file`."""
    with file.open("wb") as out, psycopg.connect(database.url) as connection, connection.cursor("modules") as cursor:
        cursor.execute(f"SELECT path, content, content_hash {_MODULES}")
        for path, content, content_hash in cursor:
            entry = json.dumps({"content": content, "path": path, "hash": content_hash}, ensure_ascii=False)
            out.write(_resp("SET", f"bifrost:module:{path}", entry))
            out.write(_resp("SADD", "bifrost:module:index", path))


def send_commands(redis: RedisServer, number: int, file: Path) -> float:
    """Return the seconds that `redis-cli --pipe` needs for the commands."""
    with redis.client(number) as client:
        client.flushdb()
        password = client.connection_pool.connection_kwargs["password"]
    command = ["redis-cli", "-p", str(redis.port), "-n", str(number), "--pipe"]
    started = time.perf_counter()
    with file.open("rb") as commands:
        subprocess.run(command, stdin=commands, check=True, capture_output=True, env={"REDISCLI_AUTH": password})
    return time.perf_counter() - started


def _resp(*words: str) -> bytes:
    encoded = [word.encode() for word in words]
    parts = [b"$%d\r\n%b\r\n" % (len(word), word) for word in encoded]
    return b"*%d\r\n%b" % (len(parts), b"".join(parts))
