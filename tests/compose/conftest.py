"""A container engine, the image under test, and a stand-in for the platform's image. Everything is removed
afterwards.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.compose.stack import CHECKOUT, RUN, OpenFolder, OpenStack, Stack, clone, run

IMAGE, STANDIN = f"{RUN}:bootstrap", f"{RUN}:standin"


@pytest.fixture(scope="session")
def engine() -> None:
    """An engine with Compose. Without one, the test is skipped; in CI with `DOCKER_HOST` set it fails."""
    try:
        run("docker", "version")
        run("docker", "compose", "version")
    except (OSError, AssertionError, subprocess.TimeoutExpired) as error:
        host = os.environ.get("DOCKER_HOST")
        said = str(error).strip().splitlines()[-1]
        reason = f"no container engine with Compose answers at DOCKER_HOST={host or '(not set)'}: {said}"
        if host and os.environ.get("CI"):
            pytest.fail(reason)
        pytest.skip(reason)


@pytest.fixture(scope="session")
def image(engine: None) -> Iterator[str]:
    """The image of this checkout, built with Compose."""
    build = Stack(RUN, ("docker-compose.dev.yml",), {"BIFROST_DEV_IMAGE": IMAGE})
    build.compose("build", "init")
    yield IMAGE
    run("docker", "image", "rm", "--force", IMAGE)


@pytest.fixture(scope="session")
def standin(image: str) -> Iterator[str]:
    """An image in place of the platform's: it imports a module from the cache or fails."""
    argument = f"BOOTSTRAP_IMAGE={image}"
    dockerfile = CHECKOUT / "tests/compose/standin/Dockerfile"
    run(
        *("docker", "build", "-q", "-t", STANDIN, "--build-arg", argument, "-f", dockerfile),
        CHECKOUT / "tests",
    )
    yield STANDIN
    run("docker", "image", "rm", "--force", STANDIN)


@pytest.fixture(scope="session")
def secrets_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The secrets that make-secrets writes."""
    folder = tmp_path_factory.mktemp("stack") / "secrets"
    run(CHECKOUT / "deploy/compose/make-secrets", folder)
    return folder


@pytest.fixture(scope="session")
def open_stack(image: str, standin: str, secrets_folder: Path) -> OpenStack:
    """Open a stack. It is removed with everything in it."""

    @contextmanager
    def opened(name: str, *files: str, **variables: str) -> Iterator[Stack]:
        stack = Stack(
            f"{RUN}-{name}",
            files,
            {
                "BIFROST_BOOTSTRAP_IMAGE": image,
                "BIFROST_DEV_IMAGE": image,
                "BIFROST_SECRETS_DIR": str(secrets_folder),
                "BIFROST_ALEMBIC_CONFIG": "builtin",
                "BIFROST_API_IMAGE": standin,
                "BIFROST_API_COMMAND": "python standin.py",
                "BIFROST_WORKER_COMMAND": "python standin.py",
                "FLOWER_PORT": "0",  # any free one
                **variables,
            },
        )
        try:
            yield stack
        finally:
            stack.down()

    return opened


@pytest.fixture(scope="session")
def open_folder(engine: None, tmp_path_factory: pytest.TempPathFactory) -> OpenFolder:
    """Open a fresh clone. Whatever its stacks created is removed."""

    @contextmanager
    def opened(name: str, variables: Mapping[str, str], make: Callable[[Path], Path] = clone) -> Iterator[Stack]:
        # Compose names a project after its folder.
        project = f"{RUN}-{name}"
        stack = Stack(project, folder=make(tmp_path_factory.mktemp(name) / project), variables=dict(variables))
        try:
            yield stack
        finally:
            stack.down()

    return opened
