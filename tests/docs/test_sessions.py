"""Run each ```console block of the documents, command by command, against private servers.
Each ```console block of the documents is run, command by command, against private servers.

Written for a reader, and read here as follows. A line with `$ ` is a command; a comment `# exits 3` behind it says
with what it ends, otherwise it ends with 0. The lines below it are lines of what it writes, in their order; others may
stand between them. In them `…` is any text, and durations are whatever they are. The comment above a block names the
situation it is run in. A command that the reader sends into a container is run here as it is.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import redis

from tests.conftest import RunBootstrap, RunCommand, StartWorker
from tests.docs.documents import DOCUMENTS, Block, Document
from tests.servers import Database
from tests.setups.state import insert_modules, sha256

#: What stands before a command that is sent into a container.
INTO_A_CONTAINER = (
    "docker compose exec bootstrap-worker ",
    "docker compose run --rm init ",
    "kubectl exec deploy/bifrost-bootstrap-worker -- ",
)
#: The modules of most situations.
MODULES = {f"modules/{name}.py": f"NAME = {name!r}\n" for name in ("one", "two", "three")}
#: Ends the output of each command of a session.
END = "-- end of the command, exit code"

WITH_SESSIONS = [one for one in DOCUMENTS if any(block.language == "console" for block in one.blocks)]


class Situations:
    """A private database, Redis and RabbitMQ, and the situations that the documents speak of."""

    def __init__(self, database: Database, redis_url: str, folder: Path, init: Callable[[], None]) -> None:
        self.database, self.redis_url, self.folder, self.init = database, redis_url, folder, init

    def prepare(self, situation: str) -> None:
        """Bring about what the comment above a block names, from an empty database and an empty Redis."""
        self.database.execute("DROP SCHEMA public CASCADE; CREATE SCHEMA public")
        self.flush()
        {
            "a new database": lambda: None,
            "a folder of six modules": self.with_files,
            "a row has changed": self.changed,
            "the cache was flushed": self.flushed,
            "a newer image was here": self.ahead,
            "a script has warmed": self.seeded,
        }[situation]()

    def flush(self) -> None:
        """Redis loses everything."""
        with redis.Redis.from_url(self.redis_url) as client:
            client.flushdb()

    def with_files(self) -> None:
        """Nothing in the database; files where the commands are run."""
        (self.folder / "modules").mkdir()
        for name in ("__init__", "accounts", "mail", "reports", "tickets", "users"):
            lines = 0 if name == "__init__" else 200
            (self.folder / "modules" / f"{name}.py").write_text(f"NAME = {name!r}  # 0\n" * lines)

    def ready(self) -> None:
        """The schema is at head, three modules are cached."""
        self.init()
        insert_modules(self.database, MODULES)
        self.init()

    def changed(self) -> None:
        """A row was changed past the API, which would have written the entry too."""
        self.ready()
        insert_modules(self.database, {"modules/two.py": "NAME = 'changed'\n"})

    def flushed(self) -> None:
        """Redis has lost everything since."""
        self.ready()
        self.flush()

    def ahead(self) -> None:
        """The database is at a revision that this image does not have."""
        self.ready()
        self.database.execute("UPDATE alembic_version SET version_num = '0003'")

    def seeded(self) -> None:
        """A script of the simple kind was here: a day for each entry, none for the empty module, an index for ever."""
        self.init()
        insert_modules(self.database, MODULES | {"modules/__init__.py": ""})
        with redis.Redis.from_url(self.redis_url) as client:
            client.delete("bifrost:bootstrap:marker")
            for path, content in MODULES.items():
                entry = {"content": content, "path": path, "hash": sha256(content)}
                client.set(f"bifrost:module:{path}", json.dumps(entry), ex=86_400)
                client.sadd("bifrost:module:index", path)


@pytest.fixture
def situations(database: Database, redis_url: str, tmp_path: Path, run_bootstrap: RunBootstrap) -> Situations:
    """The situations on the servers of this test. The test starts the worker."""

    def init() -> None:
        done = run_bootstrap("init")
        assert done.returncode == 0, done.stderr

    return Situations(database, redis_url, tmp_path, init)


@pytest.mark.timeout(300)
@pytest.mark.parametrize("document", WITH_SESSIONS, ids=lambda one: one.name)
def test_sessions(
    document: Document,
    situations: Situations,
    start_worker: StartWorker,
    run_command: RunCommand,
    bifrost_env: dict[str, str],
    tmp_path: Path,
) -> None:
    """Every command has the exit code and prints the lines that the document shows."""
    path = f"{Path(sys.executable).parent}:{bifrost_env['PATH']}"
    # The guard would fix what a session is about to show.
    start_worker(env=bifrost_env | {"BIFROST_CACHE_GUARD_INTERVAL": "0"})
    for block in document.blocks:
        if block.language != "console":
            continue
        if block.note:
            situations.prepare(block.note.removeprefix("session: "))
        session = commands_of(block)
        assert session, f"{block.where}: no line begins with the prompt"
        script = "exec 2>&1\n" + "".join(f"{inside(one)}\necho '{END}' $?\n" for one, _ in session)
        done = run_command(["sh", "-c", script], env=bifrost_env | {"PATH": path}, cwd=tmp_path, timeout=120)
        outputs = re.split(rf"^{END} ", done.stdout, flags=re.MULTILINE)
        for number, (command, shown) in enumerate(session):
            said, code = outputs[number].partition("\n")[2] if number else outputs[0], outputs[number + 1].split()[0]
            wanted = found[1] if (found := re.search(r"# exits (\d+)", command)) else "0"
            assert code == wanted, f"{block.where}: {command} exits {code}:\n{said}"
            shows(said, shown, f"{block.where}: {command}")


def commands_of(block: Block) -> list[tuple[str, list[str]]]:
    """The commands of a session, each with the lines that are shown below it."""
    session: list[tuple[str, list[str]]] = []
    for line in block.lines:
        if line.startswith("$ "):
            session.append((line[2:], []))
        elif session[-1][0].endswith("\\"):
            session[-1] = (f"{session[-1][0]}\n{line}", [])
        else:
            session[-1][1].append(line)
    return session


def inside(command: str) -> str:
    """The command without what sends it into a container."""
    for prefix in INTO_A_CONTAINER:
        command = command.replace(prefix, "")
    return command


def shows(said: str, shown: list[str], what: str) -> None:
    """Raises AssertionError where a shown line is no line of the output, or not after the one before it."""
    rest = iter(said.splitlines())
    for line in shown:
        pattern = re.escape(line.strip()).replace("…", ".*")
        # Durations differ from run to run.
        pattern = re.sub(r"\d+(\\\.\d+)?s\b", r"\\d+(\\.\\d+)?s", pattern)
        assert any(re.fullmatch(pattern, one.strip()) for one in rest), f"{what}\nshows no line {line!r} in:\n{said}"


def test_shown_lines_are_missed() -> None:
    """Positive control: times may differ, but neither order nor anything else."""
    said = "log line\nready in 12.34s: schema at 0002\n  done\n"
    shows(said, ["ready in 0.1s: schema at …", "  done"], "as it is")
    for wrong in (["ready in 1s: schema at 0003"], ["  done", "ready in 0.1s: schema at 0002"], ["ready"], [""]):
        with pytest.raises(AssertionError):
            shows(said, wrong, "otherwise")
