"""The bootstrap image built upon the platform's own."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator

import pytest

from tests.compose.stack import CHECKOUT, RUN, OpenStack, run

pytestmark = [pytest.mark.compose, pytest.mark.timeout(900)]

PLATFORM, BOOTSTRAP = f"{RUN}:platform", f"{RUN}:bootstrap-on-platform"
EXAMPLE = CHECKOUT / ".env.example"
#: What the platform's block of .env.example sets: which tree, by which interpreter; and images, here others.
SETTINGS = {"BIFROST_ALEMBIC_CONFIG", "BIFROST_ALEMBIC_PYTHON"}
IMAGES = {"BIFROST_BASE_IMAGE", "BIFROST_BOOTSTRAP_IMAGE", "BIFROST_API_IMAGE", "POSTGRES_IMAGE"}
OWN_PACKAGES = "import alembic, sqlalchemy; print(alembic.__version__, sqlalchemy.__version__)"


@pytest.fixture
def platform(engine: None) -> Iterator[str]:
    """An image with its own Python, its own older packages and migrations."""
    dockerfile = CHECKOUT / "tests/compose/platform/Dockerfile"
    run("docker", "build", "-q", "-t", PLATFORM, "-f", dockerfile, CHECKOUT / "tests/foreign_tree")
    yield PLATFORM
    run("docker", "image", "rm", "--force", PLATFORM, BOOTSTRAP)


def test_upon_the_platforms_image_its_own_packages_run_its_migrations(platform: str, open_stack: OpenStack) -> None:
    """Built upon the platform's image, init applies its tree with its own packages, which stay as they are."""
    text = EXAMPLE.read_text().partition("# For the platform")[2].partition("\n\n")[0]
    block = dict(re.findall("(?m)^#([A-Z_]+)=(.*)$", text))
    assert set(block) == {*SETTINGS, *IMAGES, "BIFROST_ENVIRONMENT"}
    own = run("docker", "run", "--rm", platform, "python", "-c", OWN_PACKAGES).stdout
    assert own.startswith("1.13.")
    with open_stack(
        "platform",
        "docker-compose.yml",
        BIFROST_BASE_IMAGE=platform,
        BIFROST_BOOTSTRAP_IMAGE=BOOTSTRAP,
        **{name: value for name, value in block.items() if name in SETTINGS},
    ) as stack:
        stack.compose("build", "init")
        assert json.loads(run("docker", "image", "inspect", BOOTSTRAP).stdout)[0]["Config"]["Healthcheck"] == {
            "Test": ["NONE"]
        }
        stack.compose("up", "-d", "init")
        assert stack.wait("init") == 0, stack.output("init")
        assert "at head" in stack.in_worker("bifrost-bootstrap", "check")
        assert stack.in_worker("/usr/local/bin/python", "-c", OWN_PACKAGES) == own
        assert stack.in_worker("python", "-c", OWN_PACKAGES) != own
