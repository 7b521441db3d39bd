"""Celery uses our configuration, whatever is in the working folder or the environment."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from tests.conftest import RunCommand

REDIS_URL = "redis://:hidden-word@cache.example:6380/3"
RABBITMQ_URL = "amqp://u:hidden-word@broker.example:5673/vhost"

#: What a developer may have set for another project.
STRAY = {
    "CELERY_BROKER_URL": "amqp://stray.example//",
    "CELERY_RESULT_BACKEND": "redis://stray.example/0",
    "CELERY_CONFIG_MODULE": "celeryconfig",
    "CELERY_LOADER": "default",
    "CELERY_APP": "stray",
    "CELERY_TASK_DEFAULT_QUEUE": "stray",
    "BROKER_URL": "amqp://stray.example//",
    "RESULT_BACKEND": "redis://stray.example/0",
    "CONFIG_MODULE": "celeryconfig",
}
#: A celeryconfig.py of another project.
FOREIGN = """
broker_url = "amqp://stray.example//"
result_backend = "redis://stray.example/0"
task_default_queue = "stray"
accept_content = ["pickle"]
print("the foreign celeryconfig was read")
"""

SHOW = """
import json, sys
from bifrost_bootstrap.celery import app
names = sys.argv[1:]
found = {name: app.conf[name] for name in names}
found["task_queues"] = [queue.name for queue in app.conf.task_queues]
found["connection"] = app.connection_for_write().as_uri()
found["backend"] = app.backend.client.connection_pool.connection_kwargs["host"]
print(json.dumps(found))
"""


@pytest.fixture
def celery_env(clean_env: dict[str, str]) -> dict[str, str]:
    """An environment for Celery's own commands, without a database."""
    return clean_env | {"BIFROST_REDIS_URL": REDIS_URL, "BIFROST_RABBITMQ_URL": RABBITMQ_URL}


@pytest.fixture
def foreign_folder(tmp_path: Path) -> Path:
    """A working folder with celeryconfig.py and celery.py of another project."""
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    (folder / "celeryconfig.py").write_text(FOREIGN)
    return folder


def test_neither_folder_nor_environment_changes_the_configuration(
    run_command: RunCommand, celery_env: dict[str, str], foreign_folder: Path
) -> None:
    """A celeryconfig.py in the working folder and on PYTHONPATH, and stray CELERY_* variables, change nothing."""
    names = ["broker_url", "result_backend", "task_default_queue", "accept_content"]
    command = [sys.executable, "-c", SHOW, *names]
    env = celery_env | STRAY | {"PYTHONPATH": f"{foreign_folder}:{celery_env.get('PYTHONPATH', '')}"}
    done = run_command(command, env=env, cwd=foreign_folder)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {
        "broker_url": RABBITMQ_URL,
        "result_backend": REDIS_URL,
        "task_default_queue": "bifrost.bootstrap",
        "accept_content": ["json"],
        "task_queues": ["bifrost.bootstrap"],
        "connection": "amqp://u:**@broker.example:5673/vhost",
        "backend": "cache.example",
    }


def test_stock_report_sees_our_settings(
    run_command: RunCommand, celery_env: dict[str, str], foreign_folder: Path
) -> None:
    """`celery -A bifrost_bootstrap report` runs without a database, reads our configuration, shows no password."""
    command = [sys.executable, "-m", "celery", "-A", "bifrost_bootstrap", "report"]
    done = run_command(command, env=celery_env | STRAY, cwd=foreign_folder)
    assert done.returncode == 0, done.stderr
    assert "broker.example:5673" in done.stdout
    assert "stray" not in done.stdout
    assert "hidden-word" not in done.stdout + done.stderr


@pytest.mark.parametrize("command", [["report"], ["inspect", "ping"], ["result", "some-id"], ["worker"]], ids=str)
def test_stock_command_without_settings_is_78(
    command: list[str], run_command: RunCommand, clean_env: dict[str, str]
) -> None:
    """Celery's own command without settings names them in one message, and exits with 78 without a traceback."""
    done = run_command([sys.executable, "-m", "celery", "-A", "bifrost_bootstrap", *command], env=clean_env)
    assert done.returncode == 78
    assert "BIFROST_REDIS_URL is not set" in done.stderr
    assert "BIFROST_RABBITMQ_URL is not set" in done.stderr
    assert "Traceback" not in done.stdout + done.stderr


def test_every_name_is_one_of_celerys(run_command: RunCommand, celery_env: dict[str, str]) -> None:
    """Each setting is one that Celery knows. (Celery ignores a misspelt one silently.)"""
    code = (
        "from celery.app.defaults import NAMESPACES, flatten\n"
        "from bifrost_bootstrap.celery import app\n"
        "known = {name for name, _ in flatten(NAMESPACES)}\n"
        "read = app.loader.read_configuration()\n"
        "assert len(read) > 20, read\n"
        "print(sorted(read.keys() - known))\n"
    )
    done = run_command([sys.executable, "-c", code], env=celery_env)
    assert (done.stdout, done.stderr) == ("['amqp_tls', 'annotations', 'celery_url', 'lasting_queue', 'load']\n", "")
