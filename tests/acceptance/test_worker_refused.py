"""The worker as a process: how it ends."""

from __future__ import annotations

from urllib.parse import urlsplit

import pytest

from tests.conftest import RunBootstrap


@pytest.mark.parametrize("change", ["password", "vhost"])
def test_worker_that_the_broker_refuses(change: str, run_bootstrap: RunBootstrap, bifrost_env: dict[str, str]) -> None:
    """A worker that RabbitMQ does not let in ends with 78 and the broker's words, not with 0."""
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
