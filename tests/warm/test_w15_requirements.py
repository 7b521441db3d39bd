"""W15: the requirements entry is made where it is absent, and never touched where it is there."""

from __future__ import annotations

import json

import pytest

from bifrost_bootstrap.migrate import tree_loading
from bifrost_bootstrap.status import readiness
from bifrost_bootstrap.warm.step import STAGING
from tests.warm.deployment import Deployment, at, sha256

KEY = "bifrost:requirements:content"
TEXT = "httpx==0.28.1\n"


def put(deployment: Deployment, content: str | None, **columns: object) -> None:
    """Insert the row of requirements.txt."""
    values = {"entity_type": "requirements", "is_deleted": False} | columns
    deployment.database.execute(
        "INSERT INTO workspace_files (path, content, content_hash, entity_type, is_deleted)"
        " VALUES ('requirements.txt', %s, %s, %s, %s)",
        [content, sha256(content or ""), values["entity_type"], values["is_deleted"]],
    )


def test_w15_absent_is_made(deployment: Deployment) -> None:
    """Exactly two fields, 24 hours to live, also where no module differs; a second warm leaves it as it is."""
    deployment.warm()
    put(deployment, TEXT)
    assert deployment.warm().requirements == "made"
    value = deployment.client.get(KEY)
    assert list(json.loads(value).items()) == [("content", TEXT), ("hash", sha256(TEXT))]  # type: ignore[arg-type]
    assert 24 * 3600 - 60 < deployment.client.ttl(KEY) <= 24 * 3600
    assert deployment.warm().requirements == "present"


@pytest.mark.parametrize("when", ["before", "while it runs"])
def test_w15_present_is_not_touched(deployment: Deployment, when: str) -> None:
    """The platform saves a newer value there without touching the row, also while a warm runs."""
    put(deployment, TEXT)
    deployment.put({"a.py": "x"})
    newer = json.dumps({"content": "httpx==1.0\n", "hash": sha256("httpx==1.0\n")})

    def save() -> None:
        deployment.client.set(KEY, newer, ex=500)

    if when == "before":
        save()
        result = deployment.warm()
    else:
        result = deployment.warm(at(STAGING, save))
    assert result.requirements == "present"
    assert deployment.client.get(KEY) == newer.encode()
    assert deployment.client.ttl(KEY) <= 500


@pytest.mark.parametrize(
    ("content", "columns"),
    [("", {}), (" \n\t", {}), (None, {}), (TEXT, {"is_deleted": True}), (TEXT, {"entity_type": "module"})],
    ids=["empty", "blank", "null", "deleted", "of another kind"],
)
def test_w15_nothing_to_make_it_from(deployment: Deployment, content: str | None, columns: dict[str, object]) -> None:
    """Blank, deleted, or no row at all: nothing is written."""
    put(deployment, content, **columns)
    assert deployment.warm().requirements == "none"
    assert not deployment.client.exists(KEY)


def test_w15_init_has_something_to_do(deployment: Deployment) -> None:
    """A missing entry keeps nobody from starting, and an init makes it."""
    deployment.warm()
    put(deployment, TEXT)
    found = readiness.read_readiness(deployment.settings, tree_loading.load(deployment.settings), compare=30)
    assert found.ready
    assert not found.nothing_to_do
    assert found.to_dict()["module_cache"]["requirements"] == "missing"
    deployment.warm()
    assert readiness.read_readiness(
        deployment.settings, tree_loading.load(deployment.settings), compare=30
    ).nothing_to_do
