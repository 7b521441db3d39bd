"""One Compose project of its own, from the files of this checkout."""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import subprocess
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

#: One name per run, so that two runs on one engine do not meet.
RUN = f"bifrost-test-{secrets.token_hex(4)}"
CHECKOUT = Path(__file__).resolve().parents[2]
#: Seconds for one command of the engine: on a loaded machine a build, or a first start of all services.
COMMAND_TIMEOUT = 600.0
#: What Docker says of a container that was created and never started.
NEVER = "0001-01-01T00:00:00Z"


def kept_environment() -> dict[str, str]:
    """What commands know of this machine: where its engines are, and nothing else."""
    engines = ("DOCKER_", "COMPOSE_DOCKER_", "BUILDKIT_", "CONTAINERS_")
    return {name: value for name, value in os.environ.items() if name in {"PATH", "HOME"} or name.startswith(engines)}


def run(
    *command: str | Path, check: bool = True, variables: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """
    Run a command in the checkout with no setting of this machine but where its engine is.

    Raises AssertionError with the whole output where the command fails and `check` is set.
    """
    result = subprocess.run(
        [str(word) for word in command],
        cwd=CHECKOUT,
        env={**kept_environment(), **(variables or {})},
        capture_output=True,
        text=True,
        timeout=COMMAND_TIMEOUT,
        check=False,
    )
    if check:
        assert result.returncode == 0, f"{result.args} exits {result.returncode}:\n{result.stdout}{result.stderr}"
    return result


def wait_until(true: Callable[[], bool], what: str) -> None:
    """Raises AssertionError with `what` where it does not become true."""
    end = time.monotonic() + COMMAND_TIMEOUT
    while not true():
        assert time.monotonic() < end, f"not within {COMMAND_TIMEOUT:.0f} s: {what}"
        time.sleep(0.2)


@dataclass(frozen=True)
class Stack:
    """
    A project by name, its Compose files (paths in the checkout) and the variables that `.env` would hold.

    Leaves nothing behind after `down`.
    """

    project: str
    files: tuple[str, ...]
    variables: dict[str, str] = field(default_factory=dict)

    def compose(self, *arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Run `docker compose ARGUMENT...` on this project."""
        files = [word for file in self.files for word in ("-f", file)]
        # Not the .env of whoever runs the tests.
        command = ["docker", "compose", "--env-file", os.devnull, "-p", self.project, *files]
        return run(*command, *arguments, check=check, variables=self.variables)

    def inspect(self, service: str) -> dict[str, Any]:
        """What `docker inspect` says of the container of this service."""
        name = f"{self.project}-{service}-1"
        found: list[dict[str, Any]] = json.loads(run("docker", "inspect", "--type", "container", name).stdout)
        return found[0]

    def wait(self, service: str) -> int:
        """The exit code of the container of this service, once it has one."""
        return int(run("docker", "wait", f"{self.project}-{service}-1").stdout)

    def output(self, service: str) -> str:
        """What the newest run of the container of this service wrote, stdout and stderr."""
        started = self.inspect(service)["State"]["StartedAt"]
        result = run("docker", "logs", "--since", started, f"{self.project}-{service}-1")
        return result.stdout + result.stderr

    def first_line(self, service: str) -> str:
        """The first line that the container of this service writes to stdout, once it has."""
        command = ["docker", "logs", "--follow", f"{self.project}-{service}-1"]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as follow:
            assert follow.stdout is not None
            try:
                return follow.stdout.readline()
            finally:
                follow.terminate()

    def sql(self, statements: str, role: str = "bifrost_migrate") -> str:
        """Run statements in the project's database as a role of it; what they return, bare."""
        psql = ("psql", "-qAtX", "-v", "ON_ERROR_STOP=1", "-U", role, "-d", "bifrost", "-c", statements)
        return self.compose("exec", "-T", "postgres", *psql).stdout.strip()

    def redis(self, *command: str, url: str) -> str:
        """What Redis answers to a command, to whom the URL logs in."""
        return self.compose("exec", "-T", "redis", "redis-cli", "--no-auth-warning", "-u", url, *command).stdout.strip()

    def write_module(self, path: str, content: str) -> None:
        """Insert a module row, as the platform does."""
        content_hash = hashlib.sha256(content.encode()).hexdigest()
        self.sql(
            f"""INSERT INTO workspace_files (path, content, content_hash, entity_type)
            VALUES ('{path}', '{content}', '{content_hash}', 'module')"""
        )

    def in_worker(self, *command: str) -> str:
        """What a command in the bootstrap worker's container writes to stdout."""
        return self.compose("exec", "-T", "bootstrap-worker", *command).stdout

    def left_over(self) -> list[str]:
        """Containers, volumes and networks of this project."""
        label = f"label=com.docker.compose.project={self.project}"
        lists = (["ps", "-aq"], ["volume", "ls", "-q"], ["network", "ls", "-q"])
        return [name for words in lists for name in run("docker", *words, "--filter", label).stdout.split()]

    def down(self) -> None:
        """Remove everything; raises AssertionError where something stays."""
        self.compose("--profile", "bifrost", "down", "-v", "--remove-orphans", "--timeout", "5")
        assert self.left_over() == []


class OpenStack(Protocol):
    """Opens a stack of these Compose files, with these variables beside those that every stack has."""

    def __call__(self, name: str, *files: str, **variables: str) -> AbstractContextManager[Stack]: ...
