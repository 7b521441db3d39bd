"""Values that the deployment files repeat, and errors of Compose for missing settings. No engine is needed."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import yaml

from bifrost_bootstrap.settings import Settings
from tests.compose.stack import CHECKOUT, run
from tests.security.rights import commands

SERVICES = CHECKOUT / "deploy/compose/services.yml"
COMPOSE = CHECKOUT / "docker-compose.yml"
#: Variables of the files that are no settings of the package: what the platform reads, and Compose's own.
FOREIGN = {
    "BIFROST_ENVIRONMENT",
    "BIFROST_SECRET_KEY",
    "BIFROST_SECRETS_DIR",
    "BIFROST_BASE_IMAGE",
    "BIFROST_BOOTSTRAP_IMAGE",
    "BIFROST_DEV_IMAGE",
    "BIFROST_REHEARSE_IMAGE",
    "BIFROST_API_IMAGE",
    "BIFROST_API_COMMAND",
    "BIFROST_WORKER_COMMAND",
}
MAKE_SECRETS = CHECKOUT / "deploy/compose/make-secrets"
DEV_PASSWORDS = dict.fromkeys(re.findall(r"=\$\(password (\w+)\)", MAKE_SECRETS.read_text()), "bifrost")


def test_every_setting_in_the_files_is_one() -> None:
    """The Compose files and .env.example name only settings that the package reads."""
    settings = {f"BIFROST_{name.upper()}" for name in Settings.model_fields}
    for file in (SERVICES, COMPOSE, CHECKOUT / "docker-compose.dev.yml", CHECKOUT / ".env.example"):
        named = set(re.findall(r"\bBIFROST_[A-Z_]+\b", file.read_text()))
        unknown = {name for name in named - settings - FOREIGN if name.removesuffix("_FILE") not in settings}
        assert unknown == set(), file.name


def test_every_variable_of_the_example_has_a_reader() -> None:
    """Each variable of .env.example is used in a Compose file."""
    example = re.findall(r"^#?([A-Z_]+)=", (CHECKOUT / ".env.example").read_text(), re.MULTILINE)
    assert len(example) > 10
    read = SERVICES.read_text() + COMPOSE.read_text()
    assert [name for name in example if not re.search(rf"\b{name}\b", read)] == []


def test_passwords_are_required() -> None:
    """Without settings, Compose fails and says what to do."""
    if not shutil.which("docker") or run("docker", "compose", "version", check=False).returncode:
        pytest.skip("no docker compose on this machine")
    refused = run("docker", "compose", "--env-file", "/dev/null", "-f", COMPOSE, "config", check=False)
    assert refused.returncode != 0
    assert "BIFROST_SECRETS_DIR" in refused.stderr
    assert "make-secrets" in refused.stderr


def test_development_is_a_project_of_its_own() -> None:
    """The two files are different projects: neither deletes the volumes or builds the image of the other."""
    dev, stack = (yaml.safe_load(file.read_text()) for file in (CHECKOUT / "docker-compose.dev.yml", COMPOSE))
    assert dev["name"] == "bifrost-bootstrap-dev"
    assert "name" not in stack  # the project name stays that of the folder, so that existing stacks keep theirs
    images = {dev["services"][name]["image"] for name in ("bootstrap-worker", "init", "flower")}
    assert images == {"${BIFROST_DEV_IMAGE:-bifrost-bootstrap:dev}"}


def test_development_secrets_are_what_make_secrets_writes(tmp_path: Path) -> None:
    """The committed secrets for development are those of make-secrets with the password `bifrost`."""
    run(MAKE_SECRETS, tmp_path / "made", variables=DEV_PASSWORDS)
    committed = CHECKOUT / "deploy/compose/dev-secrets"
    assert {file.name: file.read_text() for file in committed.iterdir()} == {
        file.name: file.read_text()
        for file in (tmp_path / "made").iterdir()
        if file.name not in {".gitignore", "platform.env"}
    }


def test_s02_the_rights_are_those_of_the_page(tmp_path: Path) -> None:
    """Compose gives our users exactly the rights of docs/security.md."""
    run(MAKE_SECRETS, tmp_path / "made")
    granted = commands("postgres").partition("'END'\n")[2].replace("END\n", "")
    roles = (CHECKOUT / "deploy/compose/postgres-roles.sql").read_text()
    for line in granted.splitlines():
        assert line in roles or line.startswith(("\\set", "--")), line
    rules = commands("redis").splitlines()[1].partition("$REDIS_PASSWORD ")[2]
    assert rules in (tmp_path / "made/redis-users.conf").read_text()
    (ours,) = re.findall(r"OURS='(.*)'", commands("rabbitmq"))
    patterns = re.findall(r'"\^\((\$OURS\S*)\)\\\$"', commands("rabbitmq"))
    definitions = json.loads((tmp_path / "made/rabbitmq-definitions.json").read_text())
    (permission,) = (one for one in definitions["permissions"] if one["user"] == "bifrost_bootstrap")
    expected = [f"^({pattern.replace('$OURS', ours)})$" for pattern in patterns]
    assert [permission[name] for name in ("configure", "write", "read")] == expected


def test_make_secrets_keeps_what_is_there(tmp_path: Path) -> None:
    """A second run changes nothing, other users cannot enter the folder, and each new folder has new passwords."""
    script = CHECKOUT / "deploy/compose/make-secrets"
    first, second = tmp_path / "first", tmp_path / "second"
    run(script, first)
    made = (first / "database-url").read_text()
    run(script, first)
    assert (first / "database-url").read_text() == made
    assert first.stat().st_mode & 0o777 == 0o700
    run(script, second)
    assert (second / "database-url").read_text() != made


def test_make_secrets_refuses_what_needs_quoting(tmp_path: Path) -> None:
    """make-secrets rejects a password with a character that a URL or a configuration file would need to quote."""
    script = CHECKOUT / "deploy/compose/make-secrets"
    refused = run(script, tmp_path / "made", check=False, variables={"REDIS_PASSWORD": "not@safe"})
    assert refused.returncode == 64
    assert "REDIS_PASSWORD" in refused.stderr
    assert "not@safe" not in refused.stderr
    assert not (tmp_path / "made").exists()
