"""The override for the platform's Compose file, as Compose merges it. No container is started."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from bifrost_bootstrap import __version__
from bifrost_bootstrap.settings import Settings
from tests.compose.stack import CHECKOUT, run

PLATFORM = CHECKOUT / "tests/compose/platform_stack/docker-compose.yml"
OVERRIDE = CHECKOUT / "deploy/platform/compose.yaml"
IMAGE = f"registry.example/bifrost-bootstrap:{__version__}-1.4.0"
VARIABLES = {
    "POSTGRES_PASSWORD": "of-postgres",
    "RABBITMQ_PASSWORD": "of-rabbitmq",
    "BIFROST_SECRET_KEY": "a-key-of-32-characters-or-longer",
    "BIFROST_BOOTSTRAP_IMAGE": IMAGE,
}
#: What the override adds to the variables of `init`.
ADDED = {
    "BIFROST_RABBITMQ_URL": "amqp://bifrost:of-rabbitmq@rabbitmq:5672/",
    "BIFROST_MIGRATION_DATABASE_URL": "postgresql+asyncpg://bifrost:of-postgres@postgres:5432/bifrost",
    "BIFROST_ALEMBIC_CONFIG": "/app/alembic.ini",
    "BIFROST_ALEMBIC_PYTHON": "/usr/local/bin/python",
}


def services(*files: Path) -> dict[str, Any]:
    """The services that Compose reads from these files. Skips the test where there is no Compose."""
    if not shutil.which("docker") or run("docker", "compose", "version", check=False).returncode:
        pytest.skip("no docker compose on this machine")
    named = [word for file in files for word in ("-f", file)]
    command = ["docker", "compose", "--env-file", "/dev/null", "-p", "platform", *named]
    shown = run(*command, "config", "--format", "json", variables=VARIABLES).stdout
    found: dict[str, Any] = json.loads(shown)["services"]
    return found


def test_the_override_changes_init_and_nothing_else() -> None:
    """The override keeps variables and dependencies of the platform's `init`, adds ours, and changes no other
    service.
    """
    before, after = services(PLATFORM), services(PLATFORM, OVERRIDE)
    old, new = before.pop("init"), after.pop("init")
    assert after == before
    assert new["image"] == IMAGE
    assert new["command"] == ["bifrost-bootstrap", "init", "--with-worker"]
    assert new["environment"] == old["environment"] | ADDED
    assert {name: wait["condition"] for name, wait in new["depends_on"].items()} == dict.fromkeys(
        ("pgbouncer", "redis", "rabbitmq"), "service_healthy"
    )
    changed = {"image", "command", "environment", "depends_on"}
    assert {key: old[key] for key in old.keys() - changed} == {key: new[key] for key in new.keys() - changed}


def test_the_override_removes_the_build_of_init(tmp_path: Path) -> None:
    """If the platform builds the image of `init`, `up --build` does not tag that image with the name of ours."""
    platform = yaml.safe_load(PLATFORM.read_text())
    del platform["services"]["init"]["image"]
    platform["services"]["init"]["build"] = {"context": ".", "dockerfile": "api/Dockerfile"}
    file = tmp_path / "docker-compose.yml"
    file.write_text(yaml.safe_dump(platform))
    assert "build" in services(file)["init"]
    init = services(file, OVERRIDE)["init"]
    assert init["image"] == IMAGE
    assert "build" not in init


def test_every_variable_of_the_override_is_a_setting() -> None:
    """The override sets only variables that the package reads."""
    assert ADDED.keys() <= {f"BIFROST_{name.upper()}" for name in Settings.model_fields}
