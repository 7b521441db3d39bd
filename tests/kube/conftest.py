"""podman with the images under test, servers in one network, a database for each test. Everything is removed
afterwards.
"""

from __future__ import annotations

import itertools
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.compose.stack import CHECKOUT, COMMAND_TIMEOUT, RUN, kept_environment, run
from tests.kube.manifests import kubectl
from tests.kube.playing import NETWORK, PASSWORD, POSTGRES, RABBITMQ, REDIS, SERVERS, Place, Pods

IMAGE, STANDIN = f"{RUN}:bootstrap", f"{RUN}:standin"


@pytest.fixture(scope="session")
def podman() -> None:
    """A working podman, and kubectl. Without them the test is skipped; in CI it fails."""
    faults = [] if not kubectl() else [kubectl()]
    if not shutil.which("podman"):
        faults += ["there is no podman"]
    elif info := run("podman", "info", check=False).stderr:
        faults += [line for line in info.splitlines() if line.startswith("Error")]
    if faults and os.environ.get("CI"):
        pytest.fail("; ".join(faults))
    if faults:
        pytest.skip("; ".join(faults))


@pytest.fixture(scope="session")
def builder(podman: None) -> str:
    """The program that builds images: the container engine of the Compose tests, or podman."""
    answers = shutil.which("docker") and run("docker", "version", check=False).returncode == 0
    return "docker" if answers else "podman"


def copy_to_podman(image: str) -> None:
    """Give podman an image that the other engine has."""
    with subprocess.Popen(["docker", "save", image], stdout=subprocess.PIPE, env=kept_environment()) as save:
        subprocess.run(
            ["podman", "load", "-q"], stdin=save.stdout, check=True, env=kept_environment(), timeout=COMMAND_TIMEOUT
        )
    assert save.returncode == 0, image


@pytest.fixture(scope="session")
def images(builder: str) -> Iterator[tuple[str, str]]:
    """The names in podman of the image of this checkout, and of a stand-in for the platform's."""
    standin = ("--build-arg", f"BOOTSTRAP_IMAGE={IMAGE}", "-f", CHECKOUT / "tests/compose/standin/Dockerfile")
    run(builder, "build", "-q", "-t", IMAGE, CHECKOUT)
    run(builder, "build", "-q", "-t", STANDIN, *standin, CHECKOUT / "tests")
    if builder != "podman":
        for image in (IMAGE, STANDIN):
            copy_to_podman(image)
            run(builder, "image", "rm", "--force", image)
    yield IMAGE, STANDIN
    run("podman", "image", "rm", "--force", STANDIN, IMAGE)


@pytest.fixture(scope="session")
def servers(builder: str) -> Iterator[None]:
    """PostgreSQL, Redis and RabbitMQ in the network of this run. PostgreSQL is ready."""
    for image in (POSTGRES, REDIS, RABBITMQ):
        if builder != "podman" and run("podman", "image", "exists", image, check=False).returncode:
            copy_to_podman(image)
    start = ("podman", "run", "--detach", "--rm", "--network", NETWORK)
    postgres = {"POSTGRES_USER": "bifrost", "POSTGRES_PASSWORD": PASSWORD}
    rabbitmq = {"RABBITMQ_DEFAULT_USER": "bifrost", "RABBITMQ_DEFAULT_PASS": PASSWORD}
    try:
        run("podman", "network", "create", NETWORK)
        for name, image, variables in (
            ("postgres", POSTGRES, postgres),
            ("redis", REDIS, {}),
            ("rabbitmq", RABBITMQ, rabbitmq),
        ):
            environment = [f"--env={variable}={value}" for variable, value in variables.items()]
            run(*start, "--name", SERVERS[name], *environment, image)
        ready = "until pg_isready -q -h 127.0.0.1 -U bifrost; do sleep 0.2; done"
        run("podman", "exec", SERVERS["postgres"], "timeout", "120", "sh", "-c", ready)
        yield
    finally:
        run("podman", "rm", "--force", "--time", "2", "--volumes", *SERVERS.values(), check=False)
        run("podman", "network", "rm", "--force", NETWORK, check=False)


@pytest.fixture(scope="session")
def redis_databases() -> Iterator[int]:
    """A Redis database number for each test."""
    return itertools.count()


@pytest.fixture
def place(images: tuple[str, str], servers: None, redis_databases: Iterator[int], tmp_path: Path) -> Place:
    """An empty database and an empty Redis database."""
    number = next(redis_databases)
    place = Place(f"kube{number}", number, tmp_path, *images)
    run("podman", "exec", SERVERS["postgres"], "createdb", "-h", "127.0.0.1", "-U", "bifrost", place.name)
    return place


@pytest.fixture
def user_folder(place: Place) -> Path:
    """A clone, and the values of the Secret in files, as the documents describe."""
    folder = place.folder / "user"
    folder.mkdir()
    (folder / "deploy").symlink_to(CHECKOUT / "deploy")
    for name, value in {**place.urls, "flower-auth": "bifrost:bifrost"}.items():
        (folder / name).write_text(value)
    return folder


@pytest.fixture
def play(place: Place) -> Iterator[Pods]:
    """Start Pods. They are removed after the test."""
    with Pods(place) as pods:
        yield pods
