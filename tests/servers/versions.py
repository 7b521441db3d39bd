"""Print the versions of the servers on this machine, as a row of the table in the README. `make test` ends with it."""

from __future__ import annotations

import platform
import re
import subprocess
from collections.abc import Callable
from pathlib import Path

from tests.servers import pgbouncer, postgres, rabbitmq, redis
from tests.servers.process import ServerMissing, find_program


def row() -> str:
    """Return the row: system, PostgreSQL, Redis or Valkey, RabbitMQ, PgBouncer, Python. "none": not installed."""
    versions = [
        _version_or_none(lambda: _said_by(postgres.programs() / "postgres")),
        _version_or_none(lambda: _said_by(redis.find_redis(redis.PROGRAMS))),
        # The name of its folder ends with the version. RabbitMQ prints its version only from a running node.
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
    """Return the version in the output of `PROGRAM --version`; for Valkey, "Valkey" and the version."""
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
