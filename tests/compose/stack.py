"""A Compose project from the files of this checkout."""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from tests.docs.documents import Block

#: One name per run, so that two runs on one engine do not meet.
RUN = f"bifrost-test-{secrets.token_hex(4)}"
CHECKOUT = Path(__file__).resolve().parents[2]
#: Seconds for one command of the engine: on a loaded machine a build, or a first start of all services.
COMMAND_TIMEOUT = 600.0
#: Works also if the checkout belongs to another user.
GIT = ("git", "-c", "safe.directory=*")
#: What Docker says of a container that was created and never started.
NEVER = "0001-01-01T00:00:00Z"


def kept_environment() -> dict[str, str]:
    """What commands know of this machine: where its engines are, and nothing else."""
    engines = ("DOCKER_", "COMPOSE_DOCKER_", "BUILDKIT_", "CONTAINERS_")
    return {name: value for name, value in os.environ.items() if name in {"PATH", "HOME"} or name.startswith(engines)}


def run(
    *command: str | Path, check: bool = True, variables: Mapping[str, str] | None = None, folder: Path = CHECKOUT
) -> subprocess.CompletedProcess[str]:
    """
    Run a command in the checkout, or another folder, with no setting of this machine but where its engine is.

    Raises AssertionError with the whole output where the command fails and `check` is set.
    """
    result = subprocess.run(
        [str(word) for word in command],
        cwd=folder,
        env={**kept_environment(), **(variables or {})},
        capture_output=True,
        text=True,
        timeout=COMMAND_TIMEOUT,
        check=False,
    )
    if check:
        assert result.returncode == 0, f"{result.args} exits {result.returncode}:\n{result.stdout}{result.stderr}"
    return result


def clone(folder: Path) -> Path:
    """Make this folder and put into it what a fresh clone would hold, and what is not committed yet; the folder."""
    listed = run(*GIT, "ls-files", "-z", "--cached", "--others", "--exclude-standard").stdout
    for name in filter(None, listed.split("\0")):
        if (CHECKOUT / name).is_file():  # not deleted
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(CHECKOUT / name, folder / name)
    return folder


def wait_until(true: Callable[[], bool], what: str) -> None:
    """Raises AssertionError with `what` where it does not become true."""
    end = time.monotonic() + COMMAND_TIMEOUT
    while not true():
        assert time.monotonic() < end, f"not within {COMMAND_TIMEOUT:.0f} s: {what}"
        time.sleep(0.2)


@dataclass(frozen=True)
class Stack:
    """
    A project by name, its Compose files (paths in its folder) and the variables that `.env` would hold.

    In the checkout no `.env` is read: it is that of whoever runs the tests. In another folder Compose reads it, and
    takes its own default where there are no files. Leaves nothing behind after `down`.
    """

    project: str
    files: tuple[str, ...] = ()
    variables: dict[str, str] = field(default_factory=dict)
    folder: Path = CHECKOUT

    def paste(self, block: Block) -> str:
        """What a document's commands write to stdout, run in the project's folder; the first that fails is the last."""
        return run("sh", "-euc", block.text, variables=self.variables, folder=self.folder).stdout

    def compose(self, *arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Run `docker compose ARGUMENT...` on this project."""
        files = [word for file in self.files for word in ("-f", file)]
        settings = ["--env-file", os.devnull] if self.folder == CHECKOUT else []
        command = ["docker", "compose", *settings, "-p", self.project, *files]
        return run(*command, *arguments, check=check, variables=self.variables, folder=self.folder)

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


@contextmanager
def borrowed(*names: str) -> Iterator[None]:
    """Names of images that documents use: they may name others meanwhile, and name afterwards what they named."""
    look = ("docker", "image", "inspect", "--format", "{{.Id}}")
    before = {name: run(*look, name, check=False).stdout.strip() for name in names}
    try:
        yield
    finally:
        for name, image in before.items():
            run(*("docker", "tag", image, name) if image else ("docker", "image", "rm", "--force", name))


class OpenStack(Protocol):
    """Opens a stack of these Compose files, with these variables beside those that every stack has."""

    def __call__(self, name: str, *files: str, **variables: str) -> AbstractContextManager[Stack]: ...


class OpenFolder(Protocol):
    """Opens a stack in a folder of its own, in which nothing has been done yet: a clone, or what `make` puts there."""

    def __call__(
        self, name: str, variables: Mapping[str, str], make: Callable[[Path], Path] = clone
    ) -> AbstractContextManager[Stack]: ...
