"""The bootstrap image on top of the platform's image: with our Compose files, and beside other ones."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from bifrost_bootstrap import __version__
from tests.compose.stack import CHECKOUT, RUN, OpenFolder, Stack, borrowed, run
from tests.docs.documents import fence

pytestmark = [pytest.mark.compose, pytest.mark.timeout(900)]

PLATFORM, BOOTSTRAP = f"{RUN}:platform", f"{RUN}:bootstrap-on-platform"
EXAMPLE = CHECKOUT / ".env.example"
#: What the platform's block of .env.example sets: which tree, by which interpreter; and images, here others.
IMAGES = {
    "BIFROST_BASE_IMAGE": PLATFORM,
    "BIFROST_BOOTSTRAP_IMAGE": BOOTSTRAP,
    "BIFROST_API_IMAGE": PLATFORM,
    "POSTGRES_IMAGE": "postgres:17",
}
SETTINGS = {"BIFROST_ALEMBIC_CONFIG", "BIFROST_ALEMBIC_PYTHON", "BIFROST_ENVIRONMENT"}
#: The images of docs/adopting.md.
API, INIT = "registry.example/bifrost-api:1.4.0", f"bifrost-bootstrap:{__version__}-1.4.0"
SERVER = "python -m http.server"
OWN_PACKAGES = "import alembic, sqlalchemy; print(alembic.__version__, sqlalchemy.__version__)"


@pytest.fixture(scope="module")
def platform(engine: None) -> Iterator[str]:
    """An image with its own Python, older packages and migrations."""
    dockerfile = CHECKOUT / "tests/compose/platform/Dockerfile"
    run("docker", "build", "-q", "-t", PLATFORM, "-f", dockerfile, CHECKOUT / "tests/foreign_tree")
    yield PLATFORM
    run("docker", "image", "rm", "--force", PLATFORM, BOOTSTRAP)


@pytest.fixture
def editor(tmp_path: Path) -> str:
    """A program that edits `.env` as its comments say: the block for the platform, with other images."""
    block = EXAMPLE.read_text().partition("# For the platform")[2].partition("\n\n")[0]
    assert set(re.findall("(?m)^#([A-Z_]+)=", block)) == {*IMAGES, *SETTINGS}
    edits = ["/^BIFROST_ALEMBIC_CONFIG=builtin$/d", r"/^# For the platform/,/^$/ s/^#\([A-Z]\)/\1/"]
    edits += [f"s|^{name}=.*|{name}={image}|" for name, image in IMAGES.items()]
    program = tmp_path / "editor"
    program.write_text("#!/bin/sh\nexec sed -i.before " + " ".join(f"-e '{edit}'" for edit in edits) + ' "$1"\n')
    program.chmod(0o700)
    return str(program)


def test_upon_the_platforms_image_its_own_packages_run_its_migrations(
    platform: str, editor: str, open_folder: OpenFolder
) -> None:
    """After the first deploy of docs/operations.md, the platform's tree is applied and its packages are unchanged."""
    own = run("docker", "run", "--rm", platform, "python", "-c", OWN_PACKAGES).stdout
    assert own.startswith("1.13.")
    servers = {"BIFROST_API_COMMAND": SERVER, "BIFROST_WORKER_COMMAND": SERVER}
    with open_folder("platform", {"EDITOR": editor, "FLOWER_PORT": "0", **servers}) as stack:
        stack.paste(fence("docs/operations.md", "compose: first deploy"))
        for service in ("api", "worker"):
            starts_after_init(stack, service)
        healthcheck = json.loads(run("docker", "image", "inspect", BOOTSTRAP).stdout)[0]["Config"]["Healthcheck"]
        assert healthcheck == {"Test": ["NONE"]}
        assert "at head" in stack.in_worker("bifrost-bootstrap", "check")
        assert stack.in_worker("/usr/local/bin/python", "-c", OWN_PACKAGES) == own
        assert stack.in_worker("python", "-c", OWN_PACKAGES) != own
        stack.sql("TRUNCATE alembic_version")  # as a release would find it that brings all revisions
        assert "CREATE TABLE" in stack.paste(fence("docs/operations.md", "compose: plan of a release"))


def somebodys_project(folder: Path) -> Path:
    """A project with an API of its own, and the ten lines beside it."""
    shutil.copytree(CHECKOUT / "tests/compose/adopting", folder)
    (folder / "compose.override.yaml").write_text(fence("docs/adopting.md", "compose: ten lines").text)
    return folder


def test_ten_lines_in_front_of_an_api(platform: str, open_folder: OpenFolder) -> None:
    """With the image and the ten lines of docs/adopting.md an API starts after init. Both can be removed as
    described.
    """
    with borrowed(API, INIT), open_folder("adopting", {}, somebodys_project) as stack:
        run("docker", "tag", platform, API)
        run("sh", "-euc", fence("docs/adopting.md", "compose: build").text)
        stack.compose("up", "-d")
        starts_after_init(stack, "api")
        assert "schema at" in stack.output("init")

        (stack.folder / "compose.override.yaml").unlink()
        stack.compose("up", "-d", "--remove-orphans")
        migrated = stack.compose("exec", "-T", "api", "alembic", "upgrade", "head")
        assert "Running upgrade" not in migrated.stdout + migrated.stderr
        queues = stack.compose("exec", "-T", "rabbitmq", "rabbitmqctl", "-q", "list_queues", "name", "arguments").stdout
        assert "bifrost.bootstrap." in queues
        for queue in queues.splitlines()[1:]:
            assert "x-expires" in queue, f"{queue} stays for ever"
        redis = ("exec", "-T", "redis", "redis-cli")
        stack.compose(*redis, "DEL", "bifrost:bootstrap:marker")
        for key in stack.compose(*redis, "KEYS", "bifrost:bootstrap:*").stdout.split():
            assert stack.compose(*redis, "TTL", key).stdout != "-1\n", f"{key} stays for ever"


def starts_after_init(stack: Stack, service: str) -> None:
    """Raises AssertionError where init has not ended with 0 before the service started, or that does not run."""
    init, state = stack.inspect("init")["State"], stack.inspect(service)["State"]
    assert (init["Status"], init["ExitCode"]) == ("exited", 0), stack.output("init")
    assert state["StartedAt"] > init["FinishedAt"]  # same clock, same format: text order is time order
    assert state["Running"], stack.output(service)


def the_platforms_project(folder: Path) -> Path:
    """A project with a Compose file like the platform's own, and beside it what a clone of this repository holds."""
    shutil.copytree(CHECKOUT / "tests/compose/platform_stack", folder)
    shutil.copytree(CHECKOUT / "deploy/platform", folder / "bifrost_bootstrap/deploy/platform")
    return folder


def test_the_platforms_own_file_starts_behind_our_init(platform: str, open_folder: OpenFolder) -> None:
    """With the override of docs/adopting.md, the platform's service `init` is ours, and its API starts after it."""
    passwords = dict.fromkeys(("POSTGRES_PASSWORD", "RABBITMQ_PASSWORD", "BIFROST_SECRET_KEY"), "bifrost")
    with borrowed(API, INIT), open_folder("platforms-own", passwords, the_platforms_project) as stack:
        run("docker", "tag", platform, API)
        run("sh", "-euc", fence("docs/adopting.md", "compose: build").text)
        stack.paste(fence("docs/adopting.md", "compose: the platform's file"))
        starts_after_init(stack, "api")
        assert "schema at" in stack.output("init")
