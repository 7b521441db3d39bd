"""The image alone."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest

from tests.compose.stack import GIT, RUN, borrowed, clone, run
from tests.docs.documents import fence

pytestmark = [pytest.mark.compose, pytest.mark.timeout(900)]

#: As strict as a container can be made.
STRICT = ("--read-only", "--cap-drop", "ALL", "--security-opt", "no-new-privileges", "--network", "none")


@pytest.mark.parametrize(
    "command",
    [
        ("bifrost-bootstrap", "--version"),
        ("python", "-m", "bifrost_bootstrap", "--version"),
        ("celery", "-A", "bifrost_bootstrap", "--version"),
    ],
    ids=" ".join,
)
def test_any_command_can_follow(image: str, command: tuple[str, ...]) -> None:
    """The entry point is a minimal init process, so our command, the module and Celery work as commands."""
    assert run("docker", "run", "--rm", *STRICT, image, *command).stdout.strip()


def test_exit_codes_come_through(image: str) -> None:
    """Init without settings exits with 78, also as the child of the minimal init process."""
    result = run("docker", "run", "--rm", *STRICT, image, check=False)
    assert result.returncode == 78, result.stderr
    assert "BIFROST_DATABASE_URL" in result.stderr


def test_user_and_labels(image: str) -> None:
    """The image has a numeric user and the OCI labels."""
    config = json.loads(run("docker", "image", "inspect", image).stdout)[0]["Config"]
    assert config["User"] == "10001:10001"
    assert config["Labels"]["org.opencontainers.image.title"] == "bifrost-bootstrap"
    assert config["Labels"]["org.opencontainers.image.licenses"] == "MIT"


def test_the_release_says_what_it_is(engine: None, tmp_path: Path) -> None:
    """The release commands of CONTRIBUTING make a wheel, and an image with labels for version and commit."""
    folder = clone(tmp_path / "project")
    (folder / ".venv").symlink_to(sys.prefix)
    block = re.sub(r"\b(?<=[:=])VERSION\b", RUN, fence("CONTRIBUTING.md", "compose: release").text)
    commits = {"GIT_DIR": run(*GIT, "rev-parse", "--absolute-git-dir").stdout.strip()}
    image = f"bifrost-bootstrap:{RUN}"
    with borrowed(image):
        run("sh", "-euc", block, folder=folder, variables=commits)
        labels = json.loads(run("docker", "image", "inspect", image).stdout)[0]["Config"]["Labels"]
    assert labels["org.opencontainers.image.version"] == RUN
    assert labels["org.opencontainers.image.revision"] == run(*GIT, "rev-parse", "HEAD").stdout.strip()
    assert [file.name.partition("-")[0] for file in (folder / "dist").iterdir()] == ["bifrost_bootstrap"]


def test_everything_is_compiled_and_nothing_builds(image: str) -> None:
    """Each module that a start imports is compiled in the image, and the image has no build tool."""
    imported = (
        "import sys, alembic.command, celery.bin.celery, celery.worker, kombu, psycopg, redis, "
        "sqlalchemy, bifrost_bootstrap.__main__\n"
        "import os\n"
        "files = [m.__cached__ for m in list(sys.modules.values()) if getattr(m, '__cached__', None)]\n"
        "assert len(files) > 500\n"
        "print([f for f in files if not os.path.exists(f)])"
    )
    assert run("docker", "run", "--rm", *STRICT, image, "python", "-c", imported).stdout == "[]\n"
    tools = "! command -v gcc && ! command -v make && ! python -m pip --version && test ! -e /build"
    run("docker", "run", "--rm", *STRICT, image, "sh", "-c", tools)


def test_the_base_stays_as_it_was(image: str) -> None:
    """The Python of the base image is unchanged: its pip finds none of our packages."""
    found = run(
        "docker", "run", "--rm", *STRICT, image, "/usr/local/bin/python", "-m", "pip", "list", "--format", "json"
    )
    assert {package["name"] for package in json.loads(found.stdout)} <= {"pip", "setuptools", "wheel"}
