"""Prints which servers the tests of this machine run on, as a row of the README's table: `make test` ends with it."""

from __future__ import annotations

import os
import platform
import re
import subprocess
from pathlib import Path

from tests.servers import pgbouncer, postgres, rabbitmq, redis
from tests.servers.process import ServerMissing, find_program


def row() -> str:
    """The row: system, PostgreSQL, Redis or Valkey, RabbitMQ, PgBouncer, Python; "none" where a server is missing."""
    redis_program = os.environ.get("BIFROST_TEST_REDIS_PROGRAM") or "redis-server"
    versions = [
        _said_by("postgres", *postgres.PROGRAM_FOLDERS),
        ("Valkey " if "valkey" in redis_program else "") + _said_by(redis_program, *redis.PROGRAM_FOLDERS),
        _rabbitmq(),
        _said_by("pgbouncer", *pgbouncer.PROGRAM_FOLDERS),
        platform.python_version(),
    ]
    return f"| {_system()} | {' | '.join(versions)} |"


def _said_by(program: str, *folders: str) -> str:
    """The first number with points that `PROGRAM --version` says."""
    try:
        command = [find_program(program, *folders), "--version"]
    except ServerMissing:
        return "none"
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.search(r"\d+(\.\d+)+", said)
    assert found, said
    return found[0]


def _rabbitmq() -> str:
    """From the name of its folder: asking it takes a node."""
    try:
        return rabbitmq.home().name.rpartition("-")[2]
    except ServerMissing:
        return "none"


def _system() -> str:
    release = Path("/etc/os-release")
    words = dict(re.findall(r'^(\w+)="?([^"\n]*)', release.read_text(), re.MULTILINE)) if release.exists() else {}
    return f"{words['ID'].title()} {words.get('VERSION_ID', '')}" if "ID" in words else platform.platform()


if __name__ == "__main__":
    print(row())
