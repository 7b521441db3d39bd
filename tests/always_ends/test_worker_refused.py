"""How the worker process ends."""

from __future__ import annotations

import json
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from tests.conftest import RunBootstrap, StartWorker


@pytest.mark.slow  # 30 s each: the rejection timeout
@pytest.mark.parametrize("change", ["password", "vhost"])
def test_worker_rejected_by_the_broker_is_78(
    change: str, run_bootstrap: RunBootstrap, bifrost_env: dict[str, str]
) -> None:
    """A worker that RabbitMQ rejects ends with 78 and the error of RabbitMQ."""
    url = urlsplit(bifrost_env["BIFROST_RABBITMQ_URL"])
    if change == "password":
        wrong = url._replace(netloc=f"bifrost:another-word@{url.netloc.rpartition('@')[2]}")
    else:
        wrong = url._replace(path="/nowhere")
    done = run_bootstrap("worker", env=bifrost_env | {"BIFROST_RABBITMQ_URL": wrong.geturl()}, timeout=60)
    assert done.returncode == 78
    assert done.stdout == ""
    assert "RabbitMQ 127.0.0.1" in done.stderr
    assert "another-word" not in done.stderr


def test_worker_without_its_tree(run_bootstrap: RunBootstrap, bifrost_env: dict[str, str], tmp_path: Path) -> None:
    """A missing tree ends the worker like a command: 78, a verdict, a termination message."""
    words = tmp_path / "termination-log"
    env = bifrost_env | {"BIFROST_ALEMBIC_CONFIG": "/absent/alembic.ini", "BIFROST_TERMINATION_LOG": str(words)}
    done = run_bootstrap("worker", env=env)
    assert done.returncode == 78
    assert "/absent/alembic.ini" in done.stderr.splitlines()[-1]
    assert done.stderr.splitlines()[-1].endswith("(exit 78)")
    assert json.loads(words.read_text())["verdict"] == "configuration"


def test_stopped_worker_exits_0(start_worker: StartWorker, bifrost_env: dict[str, str], tmp_path: Path) -> None:
    """After SIGTERM the worker exits 0, and its verdict does not say `ready`."""
    words = tmp_path / "termination-log"
    done = start_worker(env=bifrost_env | {"BIFROST_TERMINATION_LOG": str(words)}).terminate()
    assert done.returncode == 0
    assert done.stderr.splitlines()[-1].endswith("worker: stopped by a signal (exit 0)")
    assert json.loads(words.read_text())["verdict"] == "stopped"
