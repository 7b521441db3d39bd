"""The users of docs/security.md on real servers, created with the commands of that page."""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

from psycopg import sql

from tests.docs.documents import fence
from tests.servers import PLANTED_PASSWORD
from tests.servers.leaks import PLANTED_PASSWORD_QUOTED
from tests.servers.postgres import PROGRAM_FOLDERS
from tests.servers.process import find_program
from tests.setups.stack import Deployment

USER = "bifrost_bootstrap"
MIGRATE, READ = "bifrost_migrate", "bifrost_read"
#: What the reader's password has more than the others, so that a search for those finds it too.
READ_MORE = "-read"
PASSWORDS = ("RABBITMQ_PASSWORD", "REDIS_PASSWORD", "POSTGRES_MIGRATE_PASSWORD", "POSTGRES_READ_PASSWORD")
#: Seconds for the commands of one block; rabbitmqctl takes 2 on an idle machine.
PATIENCE = 120
Change = Callable[[str], str]


def commands(name: str) -> str:
    """The shell commands below the comment `<!-- rights: {name} -->` of the page."""
    return fence("docs/security.md", f"rights: {name}").text


def without(text: str) -> Change:
    """The commands without this text, which has to be there; without all of a line that begins with it."""

    def change(block: str) -> str:
        assert text in block, f"{text!r} is not in the commands: {block}"
        lines = [line.replace(text, "") for line in block.splitlines() if not line.startswith(text)]
        return "\n".join(lines) + "\n"

    return change


@dataclass
class Rights:
    """A deployment whose users have the rights of the page, and `env`, what a container is given that uses them."""

    deployment: Deployment
    programs: Path

    @property
    def env(self) -> dict[str, str]:
        stack, database = self.deployment.stack, self.deployment.database.name
        login = f"{USER}:{PLANTED_PASSWORD_QUOTED}@127.0.0.1"
        reader = stack.postgres.url(database, user=READ).replace("@", f"{quote(READ_MORE, safe='')}@", 1)
        return self.deployment.environment(stack.init_lines) | {
            "BIFROST_DATABASE_URL": reader,
            "BIFROST_MIGRATION_DATABASE_URL": stack.postgres.url(database, user=MIGRATE),
            "BIFROST_REDIS_URL": f"redis://{login}:{stack.redis.port}/0",
            "BIFROST_RABBITMQ_URL": f"amqp://{login}:{stack.rabbitmq.port}/{self.deployment.vhost}",
        }

    def grant(self, name: str, change: Change = str) -> None:
        """Run the page's commands of this name, changed by the test."""
        block = change(commands(name))
        assert block != commands(name) or change is str
        stack = self.deployment.stack
        environment = {
            "PATH": f"{self.programs}:{os.environ['PATH']}",
            **dict.fromkeys(PASSWORDS, PLANTED_PASSWORD),
            "POSTGRES_READ_PASSWORD": PLANTED_PASSWORD + READ_MORE,
            "VHOST": self.deployment.vhost,
            "PGHOST": stack.postgres.host,
            "PGPORT": str(stack.postgres.port),
            "PGUSER": "postgres",
            "PGPASSWORD": PLANTED_PASSWORD,
            "PGDATABASE": self.deployment.database.name,
        }
        done = _run(["sh", "-euc", block], environment)
        assert done.returncode == 0, done.stdout + done.stderr
        assert not re.search("(?m)^(ERR|WRONG|NOPERM)", done.stdout), done.stdout


def _run(command: list[str], environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """Run a command; what it has started ends with it, also where it takes too long."""
    with subprocess.Popen(
        command, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        start_new_session=True,
    ) as process:  # fmt: skip
        try:
            out, err = process.communicate(timeout=PATIENCE)
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
    return subprocess.CompletedProcess(command, process.returncode, out, err)


@contextmanager
def no_rights(deployment: Deployment, folder: Path) -> Iterator[Rights]:
    """Nobody has any right yet; the users that were made are gone afterwards, as they belong to the whole server."""
    stack = deployment.stack
    folder.mkdir()
    redis_cli = find_program("redis-cli", "/usr/local/bin", "/opt/homebrew/bin")
    _program(folder / "psql", {}, find_program("psql", *PROGRAM_FOLDERS))
    _program(folder / "redis-cli", {"REDISCLI_AUTH": PLANTED_PASSWORD}, redis_cli, "-p", str(stack.redis.port))
    node = f"{stack.rabbitmq.name}@localhost"
    ctl = stack.rabbitmq.data / "rabbitmq" / "sbin" / "rabbitmqctl"
    _program(folder / "rabbitmqctl", stack.rabbitmq.environment(), str(ctl), "--quiet", "--node", node)
    try:
        yield Rights(deployment, folder)
    finally:
        deployment.commands.close()
        stack.rabbitmq.evaluate(f'catch rabbit_auth_backend_internal:delete_user(<<"{USER}">>, <<"tests">>)')
        with stack.redis.client() as client:
            client.execute_command("ACL", "DELUSER", USER)
        with stack.postgres.admin(deployment.database.name) as admin:
            for role in (MIGRATE, READ):
                if admin.execute("SELECT 1 FROM pg_roles WHERE rolname = %s", (role,)).fetchone():
                    admin.execute(sql.SQL("DROP OWNED BY {} CASCADE").format(sql.Identifier(role)))
                    admin.execute(sql.SQL("DROP ROLE {}").format(sql.Identifier(role)))


def _program(file: Path, environment: dict[str, str], *words: str) -> None:
    """A program of this name that talks to the server of the test."""
    settings = "".join(f"export {name}={shlex.quote(value)}\n" for name, value in environment.items() if name != "PATH")
    file.touch(mode=0o700)
    file.write_text(f'#!/bin/sh\n{settings}exec {shlex.join(words)} "$@"\n')
