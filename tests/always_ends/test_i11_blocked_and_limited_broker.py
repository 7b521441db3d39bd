"""I11: a broker that blocks publishers, or is at a limit, is named in the last line before the deadline, with 69."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

import pytest

from tests.conftest import RunBootstrap, StartServer
from tests.servers import Rabbitmq, RabbitmqServer, RunFolder
from tests.servers.rabbitmq import vhost_of

#: Seconds of the deadline, and what a look that has begun before it may take longer.
DEADLINE, GRACE = 12, 10


def assert_unavailable(
    run_bootstrap: RunBootstrap, env: dict[str, str], *words: str, options: Sequence[str] = ("--with-worker",)
) -> None:
    """Init ends with 69 and these words, soon after its deadline."""
    begun = time.monotonic()
    done = run_bootstrap("init", *options, "--json", f"--timeout={DEADLINE}s", env=env)
    seconds = time.monotonic() - begun
    message = json.loads(done.stdout)["message"]
    assert done.returncode == 69, message
    assert all(word in message for word in words), message
    assert seconds < DEADLINE + GRACE


@pytest.mark.parametrize("alarm", ["memory", pytest.param("disk", marks=pytest.mark.slow)])
def test_i11_blocked_publishers(
    run_folder: RunFolder, start_server: StartServer, run_bootstrap: RunBootstrap, bifrost_env: dict[str, str],
    alarm: str,
) -> None:  # fmt: skip
    """When the alarm ends, the broker holds no message of ours, and init succeeds."""
    server = start_server(RabbitmqServer(run_folder))
    raise_alarm, end_alarm = {
        "memory": ("vm_memory_monitor:set_vm_memory_high_watermark(0.0)",
                   "vm_memory_monitor:set_vm_memory_high_watermark(0.4)"),
        "disk": ("rabbit_disk_monitor:set_disk_free_limit({mem_relative, 100000.0})",
                 'rabbit_disk_monitor:set_disk_free_limit("1MB")'),
    }[alarm]  # fmt: skip
    env = bifrost_env | {"BIFROST_RABBITMQ_URL": server.url()}
    server.evaluate(raise_alarm)
    assert_unavailable(run_bootstrap, env, "blocks publishers", "low on memory or disk")
    server.evaluate(end_alarm)
    done = run_bootstrap("init", "--with-worker", env=env)
    assert done.returncode == 0, done.stderr
    queues = server.evaluate("[{rabbit_amqqueue:stat(Q)} || Q <- rabbit_amqqueue:list()]")
    assert set(re.findall(r"{ok, ?(\d+)", queues)) <= {"0"}, queues


@contextmanager
def limited(rabbitmq: Rabbitmq, vhost: str, name: str, value: int) -> Iterator[None]:
    """A limit of the virtual host."""
    assert isinstance(rabbitmq, RabbitmqServer)
    rabbitmq.evaluate(f'rabbit_vhost_limit:set(<<"{vhost}">>, [{{<<"{name}">>, {value}}}], <<"tests">>)')
    try:
        yield
    finally:
        rabbitmq.evaluate(f'rabbit_vhost_limit:clear(<<"{vhost}">>, <<"tests">>)')


@pytest.mark.parametrize("connections", [0, *(pytest.param(number, marks=pytest.mark.slow) for number in (1, 2, 3))])
def test_i11_limit_of_connections(
    rabbitmq: Rabbitmq, rabbitmq_url: str, run_bootstrap: RunBootstrap, bifrost_env: dict[str, str], connections: int
) -> None:
    """With any number of free connections: 69 with RabbitMQ's error, or 0 if they suffice."""
    with limited(rabbitmq, vhost_of(rabbitmq_url), "max-connections", connections):
        done = run_bootstrap("init", "--with-worker", "--json", f"--timeout={DEADLINE}s", env=bifrost_env)
    told = json.loads(done.stdout)
    assert done.returncode in ({69} if connections < 3 else {0, 69}), done.stderr
    assert done.returncode == 0 or "connection limit" in told["message"], told


def test_i11_limit_of_queues(
    rabbitmq: Rabbitmq, rabbitmq_url: str, run_bootstrap: RunBootstrap, bifrost_env: dict[str, str]
) -> None:
    """A virtual host in which no queue can be declared ends with 69."""
    with limited(rabbitmq, vhost_of(rabbitmq_url), "max-queues", 0):
        assert_unavailable(run_bootstrap, bifrost_env, "queue limit")


@pytest.mark.slow  # 25 s
def test_i11_policy_that_rejects_messages(
    rabbitmq: Rabbitmq, rabbitmq_url: str, run_bootstrap: RunBootstrap, bifrost_env: dict[str, str]
) -> None:
    """max-length 0 with reject-publish: a quorum queue accepts one message more than its length."""
    assert isinstance(rabbitmq, RabbitmqServer)
    policy = '[{<<"max-length">>, 0}, {<<"overflow">>, <<"reject-publish">>}]'
    vhost = vhost_of(rabbitmq_url)
    with ExitStack() as stack:
        rabbitmq.evaluate(
            f'rabbit_policy:set(<<"{vhost}">>, <<"no">>, <<".*">>, {policy}, 0, <<"queues">>, <<"tests">>)'
        )
        stack.callback(rabbitmq.evaluate, f'rabbit_policy:delete(<<"{vhost}">>, <<"no">>, <<"tests">>)')
        assert_unavailable(run_bootstrap, bifrost_env, "no bootstrap worker", options=())
        assert_unavailable(run_bootstrap, bifrost_env, "reject-publish", options=())
