"""S5: paths and names from database and tree are data: never a format string, a pattern, or a shell word."""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path
from typing import Any

import pytest

from bifrost_bootstrap import errors
from bifrost_bootstrap.errors import BootstrapError
from tests.servers import Command
from tests.setups.stack import PREFIX, Deployment

#: What would show if it were formatted, matched, or handed to a shell.
PATHS = [
    "%s%d%(message)s%n.py",
    "{0}{error}{reason}{self.__class__}.py",
    "*.py",
    "[a-z]?.py",
    "line\nbreak\r\x1b[31m.py",
    "; touch exploded; .py",
    "$(touch exploded)`touch exploded`.py",
    "'\"\\.py",
    "--allow-shrink.py",
    "<b onclick=x>&amp;.py",
]
FACT = "%s {0} {error} {reason!r:>9} %(message)s {"


def run(deployment: Deployment, *words: str) -> Any:
    """The JSON object that a command prints; everything on stderr is a JSON object a line."""
    command = start(deployment, *words)
    done = command.wait()
    assert done.returncode in {0, 3}, done.stderr
    log_of(command)
    return json.loads(done.stdout)


def start(deployment: Deployment, *words: str) -> Command:
    """A command of the program with JSON logs."""
    deployment.env |= {"BIFROST_LOG_FORMAT": "json", "BIFROST_LOG_LEVEL": "DEBUG"}
    environment = deployment.environment(deployment.stack.init_lines)
    command = [sys.executable, "-m", "bifrost_bootstrap", *words, "--json"]
    return deployment.commands.start(command, env=environment, cwd=deployment.folder)


def log_of(command: Command) -> list[str]:
    """The messages of its log."""
    return [json.loads(line)["message"] for line in command.stderr.read_text().splitlines()]


def test_s05_paths_are_data_from_load_to_check(deployment: Deployment, tmp_path: Path) -> None:
    """Paths pass unchanged through load, worker, init, check and rewarm, into Redis, JSON and logs."""
    modules = tmp_path / "modules"
    modules.mkdir()
    for path in PATHS:
        (modules / path).write_text(f"path = {path!r}\n")
    # The tree with the columns that load writes; its head has the name of the other's.
    deployment.env |= {"BIFROST_LOG_FORMAT": "json", "BIFROST_ALEMBIC_CONFIG": "builtin"}
    worker = deployment.start_worker()
    run(deployment, "init")
    assert run(deployment, "load", str(modules), "--yes")["written"] == len(PATHS)
    # Not warmed yet: each path is named.
    found = run(deployment, "check")
    assert sorted(found["module_cache"]["added_paths"]) == sorted(PATHS)
    assert run(deployment, "rewarm")["warm"]["added"] == len(PATHS)
    everything = {path: f"path = {path!r}\n" for path in PATHS}
    assert deployment.cache() == everything
    # No path stands for another: with its row, one entry goes.
    for pattern in ("*.py", "[a-z]?.py"):
        deployment.database.execute("DELETE FROM workspace_files WHERE path = %s", (pattern,))
        assert run(deployment, "rewarm")["warm"]["removed"] == 1
        del everything[pattern]
        assert deployment.cache() == everything
    log_of(worker)
    assert not list(deployment.folder.glob("**/exploded"))


@pytest.mark.parametrize(
    "path",
    [PATHS[0], pytest.param(PATHS[1], marks=pytest.mark.slow), PATHS[4]],
    ids=["percent", "braces", "newline"],
)
def test_s05_paths_in_a_log_line(deployment: Deployment, path: str) -> None:
    """The path of a foreign entry is in one log line, quoted as Python does."""
    deployment.env |= {"BIFROST_LOG_FORMAT": "json"}
    worker = deployment.start_worker()
    run(deployment, "init")
    deployment.database.execute("INSERT INTO workspace_files (path, content) VALUES (%s, 'one')", (path,))
    deployment.hold("warming")
    rewarm = start(deployment, "rewarm")
    deployment.wait_reached("warming")
    with deployment.stack.redis.client() as client:
        client.set(PREFIX + path, json.dumps({"content": "another", "path": path, "hash": "0" * 64}))
    deployment.release()
    done = rewarm.wait()
    assert done.returncode == 0, done.stderr
    said = [message for message in log_of(worker) if "left alone" in message]
    assert said == [f"1 entries were written by somebody else and left alone: {path!r}"]
    assert deployment.cache()[path] == "one"


def test_s05_words_of_the_tree_are_data(deployment: Deployment, tmp_path: Path) -> None:
    """Title, statement and error of a revision are printed unchanged."""
    folder = tmp_path / "tree"
    (folder / "versions").mkdir(parents=True)
    (folder / "alembic.ini").write_text("[alembic]\nscript_location = %(here)s\n")
    (folder / "env.py").write_text((Path(__file__).parents[1] / "trees" / "barriers" / "env.py").read_text())
    (folder / "versions" / "0001_odd.py").write_text(
        '"""Odd {0} %s {error} title"""\n'
        "import sqlalchemy as sa\n"
        "from alembic import op\n"
        "revision, down_revision = '0001', None\n"
        "def upgrade():\n"
        "    op.get_bind().exec_driver_sql(\"DO 'BEGIN RAISE ''{0} {reason}'' USING HINT = ''{1} %%s''; END'\")\n"
    )
    deployment.env |= {"BIFROST_ALEMBIC_CONFIG": str(folder / "alembic.ini"), "BIFROST_LOG_FORMAT": "json"}
    environment = deployment.environment(deployment.stack.init_lines)
    command = [sys.executable, "-m", "bifrost_bootstrap", "init", "--with-worker", "--json"]
    done = deployment.commands.start(command, env=environment, cwd=deployment.folder).wait()
    assert done.returncode == 1, done.stderr
    message = json.loads(done.stdout)["message"]
    assert "revision 0001 (Odd {0} %s {error} title) failed: {0} {reason}" in message
    assert "hint: {1} %s" in message


@pytest.mark.parametrize(
    "error",
    [cls for cls in vars(errors).values() if isinstance(cls, type) and issubclass(cls, BootstrapError) and cls.facts],
)
def test_s05_facts_of_errors_are_data(error: type[BootstrapError], caplog: pytest.LogCaptureFixture) -> None:
    """A fact of an error that looks like a format string is printed unchanged: in the text, after Celery's
    JSON, in a log line.
    """
    numbers = {"seconds", "removed", "indexed", "attempts"}
    facts = [1 if fact in numbers else [FACT] if fact in {"faults", "applied"} else FACT for fact in error.facts]
    shown = errors.rebuild(error.__name__, json.loads(json.dumps(facts)))
    assert type(shown) is error
    assert FACT in str(shown) + shown.remedy
    with caplog.at_level(logging.INFO):
        logging.getLogger("any").info("%s: %s", shown, shown.remedy)
    assert caplog.messages == [f"{shown}: {shown.remedy}"]
