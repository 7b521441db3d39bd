"""S7: every URL form that the settings accept connects. Another parameter is 78; it is named without its value."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from urllib.parse import urlencode

import celery
import pytest
import redis
from celery.backends.redis import RedisBackend
from hypothesis import given, settings, strategies as st

from bifrost_bootstrap.errors import SettingsError
from bifrost_bootstrap.servers.redis_server import celery_url
from bifrost_bootstrap.settings import load
from bifrost_bootstrap.urls import REDIS_WORDS, parse_redis
from tests.conftest import RunBootstrap, RunCommand, StartServer
from tests.servers import RedisServer, RunFolder
from tests.servers.leaks import PLANTED_PASSWORD_QUOTED

CELERY = (sys.executable, "-m", "celery", "-A", "bifrost_bootstrap")
ASCII = st.characters(min_codepoint=33, max_codepoint=126)
#: What each word may be, in a URL that connects.
VALUES = {
    "db": "3", "max_connections": "20", "health_check_interval": "5", "socket_timeout": "5", "client_name": "me@home",
    "socket_connect_timeout": "2.5", "socket_keepalive": "yes", "retry_on_timeout": "true",
}  # fmt: skip


def assert_works(run_bootstrap: RunBootstrap, run_command: RunCommand, env: dict[str, str]) -> None:
    """init, check, plan and a call by Celery's own command all take the URL."""
    for arguments in (["init", "--with-worker"], ["check"], ["plan"]):
        done = run_bootstrap(*arguments, "--json", env=env)
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout)["exit_code"] == 0
    called = run_command([*CELERY, "call", "bifrost.bootstrap.warm_module_cache"], env=env)
    assert called.returncode == 0, called.stderr


def test_s07_unix_socket(
    run_folder: RunFolder,
    start_server: StartServer,
    run_bootstrap: RunBootstrap,
    run_command: RunCommand,
    bifrost_env: dict[str, str],
    tmp_path: Path,
) -> None:
    """Redis over its Unix socket, with a database number and with TCP parameters, which are ignored."""
    socket = run_folder.root / "data" / f"{run_folder.name('s07')}.sock"
    start_server(RedisServer(run_folder, {"unixsocket": str(socket), "unixsocketperm": "777"}))
    url = f"unix://:{PLANTED_PASSWORD_QUOTED}@{socket}?db=2&socket_keepalive=true"
    assert_works(run_bootstrap, run_command, bifrost_env | {"BIFROST_REDIS_URL": url})


def test_s07_parameters_of_redis(
    redis_url: str, run_bootstrap: RunBootstrap, run_command: RunCommand, bifrost_env: dict[str, str]
) -> None:
    """All accepted parameters at once, in the address and in the query."""
    words = "&".join(f"{key}={value}" for key, value in VALUES.items() if key != "db")
    tls = {key for key in REDIS_WORDS if key.startswith("ssl_")}
    assert VALUES.keys() | tls | {"username", "password"} == REDIS_WORDS.keys()
    assert_works(run_bootstrap, run_command, bifrost_env | {"BIFROST_REDIS_URL": f"{redis_url}?{words}"})


def test_s07_parameters_of_rabbitmq(
    rabbitmq_url: str, run_bootstrap: RunBootstrap, run_command: RunCommand, bifrost_env: dict[str, str]
) -> None:
    """A heartbeat and a login method in the URL, as other clients use them."""
    env = bifrost_env | {"BIFROST_RABBITMQ_URL": f"{rabbitmq_url}?heartbeat=60&login_method=PLAIN"}
    assert_works(run_bootstrap, run_command, env)


@pytest.mark.parametrize(
    ("variable", "url", "words"),
    [
        ("REDIS", "redis://h/0?decode_responses=hidden", "decode_responses"),
        ("REDIS", "redis://h/0?ssl=hidden", "ssl"),
        ("REDIS", "redis://h/0?timeout=hidden", "timeout"),
        ("REDIS", "redis://h/0?protocol=3", "protocol"),
        ("REDIS", "redis://h/hidden", "database"),
        ("REDIS", "redis://h/0/1", "database"),
        ("REDIS", "redis://h?db=hidden", "db"),
        ("REDIS", "redis://h?socket_timeout=hidden", "socket_timeout"),
        ("REDIS", "rediss://h?ssl_cert_reqs=hidden", "ssl_cert_reqs"),
        ("REDIS", "unix:///run/s?ssl_ca_certs=/hidden", "ssl_ca_certs"),
        ("RABBITMQ", "amqp://h//?blocked_connection_timeout=300", "blocked_connection_timeout"),
        ("RABBITMQ", "amqp://h//?connection_attempts=3", "connection_attempts"),
        ("RABBITMQ", "amqp://h//?heartbeat=hidden", "heartbeat"),
        ("RABBITMQ", "amqp://h//;amqp://i//?frame_max=1", "frame_max"),
        ("RABBITMQ", "redis://h/hidden", "database"),
        ("DATABASE", "postgresql://h/d?colour=hidden", "colour"),
    ],
)
def test_s07_other_parameters_are_rejected(variable: str, url: str, words: str) -> None:
    """The error names variable and parameter, but not the value."""
    with pytest.raises(SettingsError) as refused:
        load({variable.lower()}, {f"BIFROST_{variable}_URL": url})  # type: ignore[arg-type]
    assert f"BIFROST_{variable}_URL" in str(refused.value)
    assert words in str(refused.value)
    assert "hidden" not in str(refused.value)


@settings(deadline=None)  # a busy machine may take longer than Hypothesis' 200 ms
@given(st.data())
def test_s07_what_is_accepted_is_read_by_both_clients(data: st.DataObject) -> None:
    """redis-py and Celery's result backend read every accepted parameter with every accepted value."""
    tls = data.draw(st.booleans())
    known = sorted(word for word in REDIS_WORDS if tls or not word.startswith("ssl_"))
    chosen = data.draw(st.lists(st.sampled_from(known), unique=True))
    # Files that are not there are another matter, and so is text that no URL can hold.
    values = {word: data.draw(st.from_regex(REDIS_WORDS[word], fullmatch=True, alphabet=ASCII)) for word in chosen}
    url = f"{'rediss' if tls else 'redis'}://h:6379/{data.draw(st.sampled_from(['', '0', '7']))}?{urlencode(values)}"
    loaded = load({"redis"}, {"BIFROST_REDIS_URL": url})
    assert loaded.redis_url == url
    read = redis.Redis.from_url(parse_redis(url)).connection_pool.connection_kwargs
    assert "ssl_cert_reqs" not in values or read["ssl_cert_reqs"] in {"none", "optional", "required"}
    backend = RedisBackend(app=celery.Celery(set_as_current=False), url=celery_url(url))
    assert int(backend.connparams["db"]) == int(read.get("db", 0))
