"""The stack in a fresh clone, with the commands of the README."""

from __future__ import annotations

import ast
import base64
import json
import re
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.compose.stack import RUN, OpenFolder, OpenStack, Stack, run
from tests.docs.documents import fence

pytestmark = [pytest.mark.compose, pytest.mark.timeout(900)]

OURS = ("bootstrap-worker", "init", "flower")
PLATFORM = ("api", "worker")
#: The name of the image that the README's commands build.
IMAGE = f"{RUN}:tried-out"


@pytest.fixture(scope="module")
def gated(open_folder: OpenFolder, standin: str) -> Iterator[tuple[Stack, dict[str, Any]]]:
    """A stack as in the README, with a module in the database and the platform, and the state of init when the
    platform started.
    """
    command = "python standin.py"
    variables = {
        "BIFROST_BOOTSTRAP_IMAGE": IMAGE,
        "BIFROST_API_IMAGE": standin,
        "BIFROST_API_COMMAND": command,
        "BIFROST_WORKER_COMMAND": command,
        "FLOWER_PORT": "0",  # any free one
    }
    with open_folder("stack", variables) as stack:
        stack.paste(fence("README.md", "compose: try it out"))
        code = stack.wait("init")
        assert code == 0, stack.output("init")
        stack.write_module("compose_probe.py", "GREETING = 1")
        stack.compose("--profile", "bifrost", "up", "-d")
        yield stack, stack.inspect("init")["State"]
    run("docker", "image", "rm", IMAGE)


@pytest.fixture(scope="module")
def stack(gated: tuple[Stack, dict[str, Any]]) -> Stack:
    """The stack of `gated`."""
    return gated[0]


@pytest.fixture(scope="module")
def secrets_made(stack: Stack) -> Path:
    """The folder with the secrets of the stack."""
    return stack.folder / "secrets"


def passwords(folder: Path) -> set[str]:
    """All passwords that make-secrets made up."""
    text = "\n".join(file.read_text() for file in folder.iterdir())
    return set(re.findall(r"\b[0-9a-f]{32}\b", text))


def platform(folder: Path) -> dict[str, str]:
    """What the platform reads."""
    lines = (folder / "platform.env").read_text().splitlines()
    return {name: value for name, _, value in (line.partition("=") for line in lines)}


@pytest.mark.parametrize("service", PLATFORM)
def test_dependents_start_after_init_and_import_from_the_cache(
    gated: tuple[Stack, dict[str, Any]], service: str
) -> None:
    """Services that depend on init start after its exit code 0 and find a complete cache."""
    stack, init = gated
    dependent = stack.inspect(service)["State"]
    assert (init["Status"], init["ExitCode"]) == ("exited", 0)
    assert dependent["StartedAt"] > init["FinishedAt"]  # same clock, same format: text order is time order
    stack.compose("exec", "-T", service, "true")
    run(
        "timeout",
        "60",
        "sh",
        "-c",
        f"until docker logs {stack.project}-{service}-1 | grep -q .; do sleep 0.2; done",
    )
    assert stack.output(service) == "imported compose_probe.py from the cache: 1\n"
    assert stack.inspect(service)["State"]["Running"]


def test_second_up_finds_nothing_to_do(stack: Stack) -> None:
    """A second `up` runs init again, which applies no revision and changes no entry."""
    before = stack.inspect("init")["State"]["StartedAt"]
    stack.compose("up", "-d")
    assert stack.wait("init") == 0, stack.output("init")
    assert stack.inspect("init")["State"]["StartedAt"] > before
    assert "ready, nothing to do" in stack.output("init")


def test_call_by_hand_rewarms_and_result_shows_counts(stack: Stack, secrets_made: Path) -> None:
    """`celery call` in the worker's container warms a new module, and `celery result` shows the counts."""
    stack.write_module("by_hand.py", "NUMBER = 7")
    task = stack.paste(fence("docs/operations.md", "compose: call by hand")).strip()
    shown = stack.in_worker("celery", "-A", "bifrost_bootstrap", "result", task)
    result = ast.literal_eval(shown.strip())
    assert result["added"] >= 1
    entry = stack.redis("GET", "bifrost:module:by_hand.py", url=platform(secrets_made)["BIFROST_REDIS_URL"])
    assert json.loads(entry)["content"] == "NUMBER = 7"


def test_everything_that_stays_becomes_healthy(stack: Stack) -> None:
    """`up --wait` succeeds for the long-running services: each health check passes."""
    staying = ("postgres", "pgbouncer", "redis", "rabbitmq", "bootstrap-worker", "flower")
    stack.compose("up", "-d", "--wait", "--no-deps", *staying)
    assert {name: stack.inspect(name)["State"]["Health"]["Status"] for name in staying} == dict.fromkeys(
        staying, "healthy"
    )


def test_health_of_the_worker_is_the_age_of_its_file(stack: Stack) -> None:
    """The health check of the worker fails if its health file is old or missing."""
    check = stack.inspect("bootstrap-worker")["Config"]["Healthcheck"]["Test"][1]
    script = f"BIFROST_WORKER_HEALTH_FILE=/tmp/copy; {check}"
    for prepare, code in (
        ("touch /tmp/copy", 0),
        ("touch -d '-31 seconds' /tmp/copy", 1),
        ("rm /tmp/copy", 1),
    ):
        worker = ("exec", "-T", "bootstrap-worker", "sh", "-c")
        assert stack.compose(*worker, f"{prepare}; {script}", check=False).returncode == code, prepare


@pytest.mark.parametrize("service", OURS)
def test_our_containers_have_no_rights(stack: Stack, service: str) -> None:
    """Our containers run as user 10001, read-only, without capabilities and without new privileges."""
    container = stack.inspect(service)
    assert container["Config"]["User"] == "10001:10001"
    assert container["HostConfig"]["ReadonlyRootfs"] is True
    assert container["HostConfig"]["CapDrop"] == ["ALL"]
    assert container["HostConfig"]["SecurityOpt"] == ["no-new-privileges:true"]


def test_no_password_in_inspect_or_logs(stack: Stack, secrets_made: Path) -> None:
    """No password is in `docker inspect` or in a log, except in the environment of the platform."""
    secret = passwords(secrets_made)
    assert len(secret) == 12
    # The positive control: this search does find them where they are.
    assert len([word for word in secret if word in json.dumps(stack.inspect("api"))]) == 4
    for service in ("postgres", "pgbouncer", "redis", "rabbitmq", *OURS):
        assert not [word for word in secret if word in json.dumps(stack.inspect(service))], service
    logs = stack.compose("--profile", "bifrost", "logs", "--no-color")
    assert "rabbitmq" in logs.stdout
    assert not [word for word in secret if word in logs.stdout + logs.stderr]


def test_s02_nobody_of_ours_is_an_administrator(stack: Stack, secrets_made: Path) -> None:
    """Our processes log in as the users of docs/security.md, the platform as others, none as superuser."""
    stack.in_worker("bifrost-bootstrap", "check")
    sessions = "SELECT DISTINCT usename FROM pg_stat_activity WHERE client_addr IS NOT NULL"
    assert set(stack.sql(sessions, "postgres").split()) == {"bifrost_migrate", "bifrost_read"}
    assert stack.sql("SELECT rolname FROM pg_roles WHERE rolsuper", "postgres") == "postgres"

    command = ("exec", "-T", "rabbitmq", "rabbitmqctl", "--quiet", "--formatter", "json")
    connected = json.loads(stack.compose(*command, "list_connections", "user", "vhost").stdout)
    assert {(one["user"], one["vhost"]) for one in connected} == {("bifrost_bootstrap", "bifrost_bootstrap")}
    users = json.loads(stack.compose(*command, "list_users").stdout)
    assert {one["user"]: one["tags"] for one in users} == {"bifrost_bootstrap": [], "bifrost": ["management"]}

    ours = (secrets_made / "redis-url").read_text().strip()
    assert "User bifrost_bootstrap has no permissions" in stack.redis("CONFIG", "GET", "*", url=ours)
    assert "No permissions" in stack.redis("GET", "sessions:1", url=ours)
    assert "User default has no permissions" in stack.redis("GET", "bifrost:module:index", url="redis://redis")


def test_s02_the_platform_writes_rows_and_entries(stack: Stack, secrets_made: Path) -> None:
    """The platform's role writes rows but no DDL. Its Redis user writes entries but no configuration."""
    stack.sql("INSERT INTO workspace_files (path, content) VALUES ('row', ''); DELETE FROM workspace_files", "bifrost")
    with pytest.raises(AssertionError, match="must be owner of table workspace_files"):
        stack.sql("DROP TABLE workspace_files", "bifrost")
    url = platform(secrets_made)["BIFROST_REDIS_URL"]
    assert stack.redis("SETEX", "bifrost:module:live.py", "60", "{}", url=url) == "OK"
    assert stack.redis("DEL", "bifrost:module:live.py", url=url) == "1"
    assert "User bifrost has no permissions" in stack.redis("CONFIG", "GET", "*", url=url)


def test_the_tree_has_the_platforms_key(stack: Stack, secrets_made: Path) -> None:
    """The worker, which runs the platform's `env.py`, has BIFROST_SECRET_KEY like API and worker of the platform."""
    key = platform(secrets_made)["BIFROST_SECRET_KEY"]
    environ = stack.in_worker("sh", "-c", "cat /proc/[0-9]*/environ 2>/dev/null | tr '\\0' '\\n' | grep SECRET_KEY")
    assert set(environ.split()) == {f"BIFROST_SECRET_KEY={key}"}


def test_flower_wants_its_password(stack: Stack, secrets_made: Path) -> None:
    """Flower listens on 127.0.0.1 only, rejects requests without password, and shows our tasks."""
    stack.compose("up", "-d", "--wait", "--no-deps", "flower")
    address = stack.compose("port", "flower", "5555").stdout.strip()
    assert address.startswith("127.0.0.1:")
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(f"http://{address}/tasks", timeout=30)
    assert refused.value.code == 401
    refused.value.close()
    account = base64.b64encode((secrets_made / "flower-auth").read_bytes().strip()).decode()
    request = urllib.request.Request(f"http://{address}/tasks", headers={"Authorization": f"Basic {account}"})
    with urllib.request.urlopen(request, timeout=30) as page:  # noqa: S310 - http, two lines above
        assert page.status == 200


def test_a_newer_postgresql_keeps_its_data_elsewhere(open_stack: OpenStack) -> None:
    """PostgreSQL 18 starts with the volume in the place that its image expects."""
    with open_stack(
        "newer", "docker-compose.yml", POSTGRES_IMAGE="postgres:18", POSTGRES_VOLUME="/var/lib/postgresql"
    ) as stack:
        stack.compose("up", "-d", "--wait", "postgres")
        (mount,) = (one for one in stack.inspect("postgres")["Mounts"] if one["Type"] == "volume")
        assert mount["Name"] == f"{stack.project}_postgres_data"
        assert stack.sql("SHOW data_directory", "postgres").startswith(f"{mount['Destination']}/")
