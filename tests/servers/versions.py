"""Prints which servers the tests of this machine run on, as a row of the README's table: `make test` ends with it."""

from __future__ import annotations

import platform
import re
import subprocess
from collections.abc import Callable
from pathlib import Path

from tests.servers import pgbouncer, postgres, rabbitmq, redis
from tests.servers.process import ServerMissing, find_program


def row() -> str:
    """The row: system, PostgreSQL, Redis or Valkey, RabbitMQ, PgBouncer, Python; "none" where a server is missing."""
    versions = [
        _version_or_none(lambda: _said_by(postgres.programs() / "postgres")),
        _version_or_none(lambda: _said_by(redis.find_redis(redis.PROGRAMS))),
        # Its folder has the version in its name; asking RabbitMQ takes a node.
        _version_or_none(lambda: rabbitmq.home().name.rpartition("-")[2]),
        _version_or_none(lambda: _said_by(find_program("pgbouncer", *pgbouncer.PROGRAM_FOLDERS))),
        platform.python_version(),
    ]
    return f"| {_system()} | {' | '.join(versions)} |"


def _version_or_none(version: Callable[[], str]) -> str:
    try:
        return version()
    except ServerMissing:
        return "none"


def _said_by(program: str | Path) -> str:
    """What `PROGRAM --version` says: the first number with points, and "Valkey" where it says so."""
    said = subprocess.run([program, "--version"], capture_output=True, text=True, check=True).stdout
    found = re.search(r"\d+(\.\d+)+", said)
    assert found, said
    return f"Valkey {found[0]}" if "valkey" in said.lower() else found[0]


def _system() -> str:
    release = Path("/etc/os-release")
    words = dict(re.findall(r'^(\w+)="?([^"\n]*)', release.read_text(), re.MULTILINE)) if release.exists() else {}
    return f"{words['ID'].title()} {words.get('VERSION_ID', '')}" if "ID" in words else platform.platform()


if __name__ == "__main__":
    print(row())
