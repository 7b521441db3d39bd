"""W15: the requirements entry is created if it is missing, and is never changed."""

from __future__ import annotations

import json

import pytest

from bifrost_bootstrap.migrate import tree_loading
from bifrost_bootstrap.status import readiness
from bifrost_bootstrap.warm.step import STAGING
from tests.setups.module_store import ModuleStore, at, sha256

KEY = "bifrost:requirements:content"
TEXT = "httpx==0.28.1\n"


def put(store: ModuleStore, content: str | None, **columns: object) -> None:
    """Insert the row of requirements.txt."""
    values = {"entity_type": "requirements", "is_deleted": False} | columns
    store.database.execute(
        "INSERT INTO workspace_files (path, content, content_hash, entity_type, is_deleted)"
        " VALUES ('requirements.txt', %s, %s, %s, %s)",
        [content, sha256(content or ""), values["entity_type"], values["is_deleted"]],
    )


def test_w15_missing_entry_is_created(store: ModuleStore) -> None:
    """Exactly two fields and a TTL of 24 h, also if no module differs. A second warm does not change it."""
    store.warm()
    put(store, TEXT)
    assert store.warm().requirements == "made"
    value = store.client.get(KEY)
    assert list(json.loads(value).items()) == [("content", TEXT), ("hash", sha256(TEXT))]  # type: ignore[arg-type]
    assert 24 * 3600 - 60 < store.client.ttl(KEY) <= 24 * 3600
    assert store.warm().requirements == "present"


@pytest.mark.parametrize("when", ["before", "while it runs"])
def test_w15_present_is_not_touched(store: ModuleStore, when: str) -> None:
    """The platform saves a newer value without changing the row, also during a warm. The value stays."""
    put(store, TEXT)
    store.put({"a.py": "x"})
    newer = json.dumps({"content": "httpx==1.0\n", "hash": sha256("httpx==1.0\n")})

    def save() -> None:
        store.client.set(KEY, newer, ex=500)

    if when == "before":
        save()
        result = store.warm()
    else:
        result = store.warm(at(STAGING, save))
    assert result.requirements == "present"
    assert store.client.get(KEY) == newer.encode()
    assert store.client.ttl(KEY) <= 500


@pytest.mark.parametrize(
    ("content", "columns"),
    [("", {}), (" \n\t", {}), (None, {}), (TEXT, {"is_deleted": True}), (TEXT, {"entity_type": "module"})],
    ids=["empty", "blank", "null", "deleted", "of another kind"],
)
def test_w15_nothing_to_make_it_from(store: ModuleStore, content: str | None, columns: dict[str, object]) -> None:
    """With a blank row, a deleted row or no row, nothing is written."""
    put(store, content, **columns)
    assert store.warm().requirements == "none"
    assert not store.client.exists(KEY)


def test_w15_init_has_something_to_do(store: ModuleStore) -> None:
    """A missing requirements entry does not fail `check`, and an init creates it."""
    store.warm()
    put(store, TEXT)
    found = readiness.read_readiness(store.settings, tree_loading.load(store.settings), compare=30)
    assert found.ready
    assert not found.nothing_to_do
    assert found.to_dict()["module_cache"]["requirements"] == "missing"
    store.warm()
    assert readiness.read_readiness(store.settings, tree_loading.load(store.settings), compare=30).nothing_to_do
