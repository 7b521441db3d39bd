"""
The names on which other people's scripts, dashboards and running containers depend.

Expected values are written out here: a rename anywhere else makes this module fail. The fields of `--json` after a
success are in tests/is_true/test_json.py, which reads them from real runs.
"""

from __future__ import annotations

import json
import os
import sys
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import click
import pytest

from bifrost_bootstrap import progress, settings
from bifrost_bootstrap.cli import commands, report
from bifrost_bootstrap.errors import ExitCode
from bifrost_bootstrap.migrate import tree_loading
from bifrost_bootstrap.warm import cache
from bifrost_bootstrap.worker import cache_monitor
from tests.conftest import RunBootstrap, RunCommand

#: Each command with its options and arguments, and what kind of value each takes.
COMMANDS = {
    "init": {
        "--timeout": "duration",
        "--with-worker": "flag",
        "--embedded": "flag",
        "--allow-shrink": "flag",
        "--json": "flag",
    },
    "rewarm": {"--timeout": "duration", "--full": "flag", "--allow-shrink": "flag", "--json": "flag"},
    "check": {"--wait": "duration", "--json": "flag"},
    "plan": {"--sql": "flag", "--json": "flag"},
    "rehearse": {
        "--schema": "path",
        "--strict": "flag",
        "--no-data-checks": "flag",
        "--markdown": "flag",
        "--json": "flag",
    },
    "worker": {},
    "load": {"folder": "required path", "--yes": "flag", "--json": "flag"},
}

#: The word of each exit code: `verdict` in the JSON object where the command did not succeed.
EXIT_CODES = {
    0: "ok",
    1: "migration",
    2: "warm",
    3: "not_ready",
    64: "usage",
    69: "unavailable",
    70: "bug",
    75: "busy",
    78: "configuration",
    124: "deadline",
    130: "sigint",
    143: "sigterm",
}
#: `verdict` where the command succeeded.
SUCCESS = {
    "init": "ready",
    "rewarm": "ready",
    "check": "ready",
    "plan": "planned",
    "rehearse": "rehearsed",
    "load": "loaded",
    "worker": "stopped",
}

#: Each variable: its default, a legal value, and that value as it is read.
SETTINGS: dict[str, tuple[object, str, object]] = {
    "BIFROST_DATABASE_URL": (None, "postgresql://db.example/a", "PostgreSQL db.example:5432/a"),
    "BIFROST_MIGRATION_DATABASE_URL": (None, "postgresql://db.example/b", "PostgreSQL db.example:5432/b"),
    "BIFROST_REHEARSAL_DATABASE_URL": (None, "postgresql://db.example/c", "PostgreSQL db.example:5432/c"),
    "BIFROST_REHEARSAL_LARGE": (100_000_000, "2GiB", 2 * 1024**3),
    "BIFROST_REDIS_URL": (None, "redis://cache.example:6380/3", "redis://cache.example:6380/3"),
    "BIFROST_RABBITMQ_URL": (None, "amqp://mq.example/v", "amqp://mq.example/v"),
    "BIFROST_ALEMBIC_CONFIG": (None, "builtin", "builtin"),
    "BIFROST_ALEMBIC_NAME": (None, "tenant", "tenant"),
    "BIFROST_ALEMBIC_X": ((), "a=b c=d", ("a=b", "c=d")),
    "BIFROST_ALEMBIC_PYTHON": (None, "/usr/bin/python3", "/usr/bin/python3"),
    "BIFROST_ALEMBIC_VERSION_TABLE": ("alembic_version", "other.versions", "other.versions"),
    "BIFROST_ALLOW_AHEAD": (False, "1", True),
    "BIFROST_MIGRATION_LOCK_TIMEOUT": (5.0, "7s", 7.0),
    "BIFROST_MODULE_SOURCE": ("auto", "file_index", "file_index"),
    "BIFROST_MODULE_CACHE_TTL": (None, "24h", 86400.0),
    "BIFROST_CACHE_GUARD_INTERVAL": (60.0, "2m", 120.0),
    "BIFROST_INIT_TIMEOUT": (600.0, "90s", 90.0),
    "BIFROST_RUN_QUEUE": (None, "bifrost.bootstrap.run", "bifrost.bootstrap.run"),
    "BIFROST_LOG_FORMAT": ("text", "json", "json"),
    "BIFROST_LOG_LEVEL": ("INFO", "DEBUG", "DEBUG"),
    "BIFROST_TERMINATION_LOG": (None, "/tmp/last-words", Path("/tmp/last-words")),
    "BIFROST_WORKER_HEALTH_FILE": (None, "/tmp/alive", Path("/tmp/alive")),
}

#: What Celery makes of us: tasks with their arguments, queues as they are declared, and the keys of results.
SHOW_CELERY = """
import inspect, json
from bifrost_bootstrap import celery
from bifrost_bootstrap.worker import tasks
app = celery.app
def arguments(task):
    return {name: parameter.default for name, parameter in inspect.signature(task.run).parameters.items()}
def declared(queue):
    return [queue.name, queue.exchange.name, queue.exchange.type, queue.routing_key, queue.durable,
            queue.queue_arguments, queue.expires]
print(json.dumps({
    "app": app.main,
    "tasks": {name: arguments(task) for name, task in app.tasks.items() if not name.startswith("celery.")},
    "by_hand": [declared(queue) for queue in app.conf.task_queues],
    "of_tree": declared(celery.add_queue("bifrost.bootstrap.0123456789ab")),
    "default": app.conf.task_default_queue,
    "result_key": bytes(app.backend.get_key_for_task("ID")).decode(),
    "content": [app.conf.accept_content, app.conf.result_accept_content],
}))
"""


def kind(parameter: click.Parameter) -> str:
    """What a parameter of a command takes, in words."""
    if isinstance(parameter, click.Option) and parameter.is_flag:
        return "flag"
    return f"{'required ' if parameter.required else ''}{parameter.type.name}"


def test_commands_and_their_options() -> None:
    """A script calls commands and options by these names."""
    found = {
        name: {option: kind(parameter) for parameter in command.params for option in parameter.opts}
        for name, command in commands.main.commands.items()
    }
    assert found == COMMANDS
    assert [option for parameter in commands.main.params for option in parameter.opts] == ["--version"]


def test_exit_codes_and_verdicts() -> None:
    """A supervisor reads the number, a program the word."""
    assert {int(code): code.name.lower() for code in ExitCode} == EXIT_CODES
    verdicts = {command: {int(code): report.verdict(command, code) for code in ExitCode} for command in SUCCESS}
    assert verdicts == {command: EXIT_CODES | {0: word} for command, word in SUCCESS.items()}


def test_tasks_queues_and_results(run_command: RunCommand, clean_env: dict[str, str]) -> None:
    """Operators call the tasks by name; a worker of another release declares the same queues."""
    env = clean_env | {"BIFROST_REDIS_URL": "redis://cache.example/0", "BIFROST_RABBITMQ_URL": "amqp://mq.example//"}
    done = run_command([sys.executable, "-c", SHOW_CELERY], env=env)
    assert done.returncode == 0, done.stderr
    exchange = ["bifrost.bootstrap", "direct"]
    quorum = {"x-queue-type": "quorum"}
    assert json.loads(done.stdout) == {
        "app": "bifrost_bootstrap",
        "tasks": {
            "bifrost.bootstrap.migrate": {},
            "bifrost.bootstrap.warm_module_cache": {"full": False, "allow_shrink": False},
        },
        "by_hand": [["bifrost.bootstrap", *exchange, "bifrost.bootstrap", True, quorum, None]],
        "of_tree": ["bifrost.bootstrap.0123456789ab", *exchange, "bifrost.bootstrap.0123456789ab", True, quorum, 3600],
        "default": "bifrost.bootstrap",
        "result_key": "bifrost:bootstrap:celery-task-meta-ID",
        "content": [["json"], ["json"]],
    }


def test_queue_of_a_tree() -> None:
    """Init and worker of one tree and database meet on this queue, also when one of them is of the next release."""
    found = settings.load(
        environment={
            "BIFROST_DATABASE_URL": "postgresql://user:word@db.example:5433/platform",
            "BIFROST_ALEMBIC_CONFIG": "builtin",
        }
    )
    assert tree_loading.load(found).queue(found.database.target) == "bifrost.bootstrap.af09f4a348f5"


def test_redis_keys_of_the_module_cache() -> None:
    """The platform's readers know the first three; ACL rules of the docs name all of them."""
    assert cache.ENTRY == b"bifrost:module:"
    assert cache.INDEX == b"bifrost:module:index"
    assert cache.REQUIREMENTS == b"bifrost:requirements:content"
    assert cache.MARKER == b"bifrost:bootstrap:marker"
    assert cache.stage_prefix("ID") == b"bifrost:bootstrap:stage:ID:"
    assert cache.plan_key("ID") == b"bifrost:bootstrap:plan:ID"
    assert cache_monitor.MONITOR_LEASE_KEY == b"bifrost:bootstrap:guard"


def test_values_in_redis() -> None:
    """Readers of entry and marker know these fields."""
    assert list(json.loads(cache.entry("a.py", "A = 1\n", "0" * 64))) == ["content", "path", "hash"]
    marker = json.loads(cache.Marker("ID", 1).to_json())
    assert marker == {"warm_id": "ID", "modules": 1, "heads": [], "settled": False}


def test_redis_keys_of_tasks() -> None:
    """An init and a worker of two releases meet over these keys, and over the header of the message."""
    assert progress.heartbeat_key("ID") == b"bifrost:bootstrap:held:ID"
    assert progress.progress_key("ID") == b"bifrost:bootstrap:progress:ID"
    assert progress.waiting_init_key("ID") == b"bifrost:bootstrap:wanted:ID"
    assert progress.CHAIN_HEADER == "bifrost_wanted"
    fields = {"step": "warm", "done": 0, "total": 0, "unit": "", "note": ""}
    assert progress.Progress("warm").to_dict() == fields


def test_settings_and_their_defaults() -> None:
    """Every variable is described here, and without it its default holds."""
    found = settings.load(environment={})
    assert {f"BIFROST_{name.upper()}" for name in type(found).model_fields} == SETTINGS.keys()
    defaults = {name: getattr(found, name.removeprefix("BIFROST_").lower()) for name in SETTINGS}
    assert defaults == {name: default for name, (default, _, _) in SETTINGS.items()}


@pytest.mark.parametrize("variable", SETTINGS)
def test_setting_is_read(variable: str, tmp_path: Path) -> None:
    """From its variable, and from the file that its `_FILE` twin names."""
    _, written, read = SETTINGS[variable]
    file = tmp_path / "value"
    file.write_text(written)
    for environment in ({variable: written}, {f"{variable}_FILE": str(file)}):
        found: Any = getattr(settings.load(environment=environment), variable.removeprefix("BIFROST_").lower())
        assert (str(found) if variable.endswith("DATABASE_URL") else found) == read


@pytest.mark.parametrize("variable", ["DATABASE_URL", "REDIS_URL", "RABBITMQ_URL"])
def test_setting_without_prefix(variable: str) -> None:
    """The platform's own names serve too."""
    _, written, _ = SETTINGS[f"BIFROST_{variable}"]
    found = settings.load(environment={variable: written})
    assert found == settings.load(environment={f"BIFROST_{variable}": written})


def test_alembics_own_variable() -> None:
    """Where BIFROST_ALEMBIC_CONFIG is not set, Alembic's own variable names the tree."""
    assert settings.load(environment={"ALEMBIC_CONFIG": "some.ini"}).alembic_config == "some.ini"


def test_fields_of_a_failure(run_bootstrap: RunBootstrap, clean_env: dict[str, str], tmp_path: Path) -> None:
    """`--json` and the termination message have the same fields, in this order."""
    termination_log = tmp_path / "termination-log"
    done = run_bootstrap("init", "--json", env=clean_env | {"BIFROST_TERMINATION_LOG": str(termination_log)})
    fields = ["schema", "command", "verdict", "exit_code", "error", "message", "remedy"]
    for written in (done.stdout, termination_log.read_text()):
        found = json.loads(written)
        assert list(found) == fields
        assert list(found.values())[:5] == [1, "init", "configuration", 78, "SettingsError"]


def test_installed_command_is_the_package() -> None:
    """The name that an image starts."""
    (command,) = entry_points(group="console_scripts", name="bifrost-bootstrap")
    assert command.value == "bifrost_bootstrap.__main__:main"


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ([str(Path(sys.executable).with_name("bifrost-bootstrap")), "--version"], "bifrost-bootstrap, version "),
        ([sys.executable, "-m", "bifrost_bootstrap", "--version"], "bifrost-bootstrap, version "),
        ([str(Path(sys.executable).with_name("celery")), "-A", "bifrost_bootstrap", "report"], "mq.example"),
    ],
    ids=["bifrost-bootstrap", "python -m bifrost_bootstrap", "celery -A bifrost_bootstrap"],
)
def test_ways_in(command: list[str], words: str, run_command: RunCommand, clean_env: dict[str, str]) -> None:
    """Each of the three starts from any working folder."""
    env = clean_env | {"BIFROST_REDIS_URL": "redis://cache.example/0", "BIFROST_RABBITMQ_URL": "amqp://mq.example//"}
    done = run_command(command, env=env, cwd=Path(os.sep))
    assert done.returncode == 0, done.stderr
    assert words in done.stdout
