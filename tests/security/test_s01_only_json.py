"""S1: broker and result backend accept JSON only. Anything else is rejected, runs nothing and stops nothing."""

from __future__ import annotations

import json
import pickle
import sys
import uuid
from pathlib import Path
from typing import Any

import kombu
import pytest

from bifrost_bootstrap.celery import MIGRATE
from tests.setups.stack import COMPLETE, Deployment

RESULT = "bifrost:bootstrap:celery-task-meta-"


class Bomb:
    """Whoever unpickles it creates a file."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.file,)


@pytest.fixture
def exploded(tmp_path: Path) -> Path:
    """The file that the pickles create. The fixture first checks that they do."""
    control = tmp_path / "control"
    pickle.loads(pickle.dumps(Bomb(control)))  # noqa: S301
    assert control.exists()
    return tmp_path / "exploded"


@pytest.fixture
def bomb(exploded: Path) -> bytes:
    """A pickle that creates the file `exploded`."""
    return pickle.dumps(Bomb(exploded))


@pytest.mark.parametrize(
    ("content_type", "body", "said"),
    [
        ("application/x-python-serialize", None, "Refusing to deserialize .* content of type .*x-python-serialize"),
        ("application/x-yaml", b"!!python/object/apply:os._exit [1]", "Refusing to deserialize .* of type .*x-yaml"),
        # What is no content type of anything is not decoded at all.
        ("application/data", b"[[], {}, {}]", "invalid task message: its body is no task's"),
    ],
    ids=["pickle", "yaml", "raw"],
)
def test_s01_message_of_another_content_type(
    deployment: Deployment, content_type: str, body: bytes | None, said: str, bomb: bytes, exploded: Path
) -> None:
    """The message is rejected, the log has its content type, and the worker runs the next task."""
    worker = deployment.start_worker()
    deployment.publish(body or bomb, content_type=content_type, task=MIGRATE)
    worker.wait_for(said)
    assert deployment.start_init().wait().returncode == 0
    assert worker.running
    assert not exploded.exists()
    assert deployment.cache() == COMPLETE
    deployment.assert_clean()


def test_s01_message_that_no_worker_can_run(deployment: Deployment) -> None:
    """A message with an unknown task, wrong arguments or an invalid body is rejected, and the worker continues."""
    worker = deployment.start_worker()
    deployment.publish(b"[[], {}, {}]", task="bifrost.bootstrap.unknown")
    worker.wait_for("unregistered task of type 'bifrost.bootstrap.unknown'")
    deployment.publish(b"[[1, 2, 3], {}, {}]", task=MIGRATE)
    worker.wait_for("TypeError")
    for body in (b"no json", b"[1]"):
        deployment.publish(body, task=MIGRATE)
    assert deployment.start_init().wait().returncode == 0
    assert worker.running
    deployment.assert_clean()


def test_s01_remote_control_takes_json_only(deployment: Deployment, bomb: bytes, exploded: Path) -> None:
    """The remote control of the workers rejects pickles."""
    worker = deployment.start_worker()
    with kombu.Connection(deployment.stack.rabbitmq.url(deployment.vhost)) as connection:
        channel = connection.default_channel
        message = channel.prepare_message(
            bomb, content_type="application/x-python-serialize", content_encoding="binary"
        )
        channel.basic_publish(message, exchange="celery.pidbox", routing_key="")
    worker.wait_for("Refusing to deserialize .* content of type .*application/x-python-serialize")
    ping = [sys.executable, "-m", "celery", "-A", "bifrost_bootstrap", "inspect", "ping", "--json"]
    answer = deployment.commands.start(
        ping, env=deployment.environment(deployment.stack.init_lines), cwd=deployment.folder
    ).wait()
    assert answer.returncode == 0, answer.stderr
    assert worker.running
    assert not exploded.exists()


def _ids(log: str) -> tuple[str, str]:
    line = next(line for line in log.splitlines() if "chain enqueued on" in line)
    words = line.replace(",", "").split()
    return words[words.index("migrate") + 1], words[words.index("warm") + 1]


# That of the progress takes a minute.
@pytest.mark.parametrize("key", ["result", pytest.param("progress", marks=pytest.mark.slow)])
def test_s01_init_meets_a_result_that_is_not_json(
    deployment: Deployment, key: str, bomb: bytes, exploded: Path
) -> None:
    """A pickle is stored as a result: init names it, the work is done, and init exits 0."""
    deployment.hold("warming")
    deployment.start_worker()
    init = deployment.start_init()
    deployment.wait_reached("warming")
    init.wait_for("chain enqueued on")
    _, warm = _ids(init.stderr.read_text())
    with deployment.stack.redis.client() as client:
        if key == "result":
            client.set(RESULT + warm, bomb)
            init.wait_for("holds something for it that is not JSON; enqueueing again")
        else:
            init.wait_for("staging")
            client.set(f"bifrost:bootstrap:progress:{warm}", bomb)
            # Without a progress that can be read.
            init.wait_for("(?s)staging.*warm is about to start")
    deployment.release()
    done = init.wait()
    assert done.returncode == 0, done.stderr
    assert not exploded.exists()
    assert deployment.cache() == COMPLETE


@pytest.mark.parametrize("kind", ["pickle", pytest.param("yaml", marks=pytest.mark.slow), "class of another module"])
def test_s01_celery_result_of_something_that_is_not_ours(
    deployment: Deployment, kind: str, bomb: bytes, exploded: Path
) -> None:
    """`celery result` rejects a foreign result and executes nothing."""
    stored = {
        "pickle": bomb,
        "yaml": f"!!python/object/apply:pathlib.Path.touch [!!python/object/apply:pathlib.Path [{exploded}]]".encode(),
        # What Celery's own issue of 2021 was about: a failure that names a function as its exception's class.
        "class of another module": json.dumps(
            {
                "status": "FAILURE",
                "result": {"exc_type": "system", "exc_module": "os", "exc_message": f"touch {exploded}"},
                "traceback": None,
                "children": [],
            }
        ).encode(),
    }[kind]
    task_id = uuid.uuid4().hex
    with deployment.stack.redis.client() as client:
        client.set(RESULT + task_id, stored)
    words = [sys.executable, "-m", "celery", "-A", "bifrost_bootstrap", "result", task_id]
    environment = deployment.environment(deployment.stack.init_lines)
    shown = deployment.commands.start(words, env=environment, cwd=deployment.folder).wait()
    assert shown.returncode != 0
    assert "DecodeError" in shown.stderr or "SecurityError" in shown.stderr
    assert not exploded.exists()


def test_s01_failure_in_the_result_backend_names_a_foreign_class(deployment: Deployment, exploded: Path) -> None:
    """Init creates errors of our own classes only. Another class is reported as a bug, and is never called."""
    deployment.hold("warming")
    deployment.start_worker()
    init = deployment.start_init()
    deployment.wait_reached("warming")
    init.wait_for("chain enqueued on")
    _, warm = _ids(init.stderr.read_text())
    failure = {"exc_type": "system", "exc_module": "os", "exc_message": [f"touch {exploded}"]}
    with deployment.stack.redis.client() as client:
        client.set(RESULT + warm, json.dumps({"status": "FAILURE", "result": failure}))
    done = init.wait()
    assert done.returncode == 70
    assert f"system: touch {exploded}" in done.stderr
    assert not exploded.exists()
    deployment.release()
