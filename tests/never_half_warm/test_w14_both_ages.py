"""W14: modules in `workspace_files` and in `file_index`, and both ways from one table to the other."""

from __future__ import annotations

import json

import pytest

from bifrost_bootstrap.errors import WarmError
from tests.setups.module_store import API_TTL, ENTRY, INDEX, MakeStore, ModuleStore, entry, sha256

#: The table as the platform has it since 2026-02-10.
FILE_INDEX = """
    CREATE TABLE file_index (
        path varchar(1000) PRIMARY KEY, content text, content_hash varchar(64),
        updated_at timestamptz NOT NULL DEFAULT now(), updated_by varchar(255)
    )
"""


@pytest.fixture
def newer(store: ModuleStore) -> ModuleStore:
    """A store of the newer age, with `file_index` only."""
    store.database.execute("DROP TABLE workspace_files")
    store.database.execute(FILE_INDEX)
    return store


def put(store: ModuleStore, path: str, content: str | None, content_hash: str | None = "") -> None:
    """Insert or change a row of `file_index`; by default with the hash of its content."""
    digest = sha256(content or "") if content_hash == "" else content_hash
    store.database.execute(
        "INSERT INTO file_index (path, content, content_hash) VALUES (%s, %s, %s)"
        " ON CONFLICT (path) DO UPDATE SET content = excluded.content, content_hash = excluded.content_hash",
        [path, content, digest],
    )


def with_settings(store: ModuleStore, **values: object) -> ModuleStore:
    """The same store with other settings."""
    return ModuleStore(store.database, store.client, store.settings.model_copy(update=values))


def paths(store: ModuleStore) -> set[str]:
    """The paths in the index; each must have its entry."""
    observed = store.observed()
    assert None not in observed.values()
    return {path.decode() for path in observed}


def test_w14_file_index(newer: ModuleStore) -> None:
    """A module is a `.py` row with content. Its entry lives 24 h, like those of the platform."""
    for path, content in {"a.py": "x", "pkg/__init__.py": "", "readme.md": "# x", "b.PY": "x", "a%b_.py": "y"}.items():
        put(newer, path, content)
    put(newer, "binary.py", None)
    result = newer.warm()
    assert result.source == "file_index"
    assert paths(newer) == {"a.py", "pkg/__init__.py", "a%b_.py"}
    assert list(json.loads(newer.client.get(ENTRY + b"a.py")).items()) == [  # type: ignore[arg-type]
        ("content", "x"), ("path", "a.py"), ("hash", sha256("x")),
    ]  # fmt: skip
    assert API_TTL - 60 < newer.client.ttl(ENTRY + b"a.py") <= API_TTL
    assert newer.client.ttl(INDEX) == -1
    assert newer.warm().added == 0


def test_w14_ttl_by_hand(newer: ModuleStore) -> None:
    """BIFROST_MODULE_CACHE_TTL overrides the default of the age, also 0."""
    put(newer, "a.py", "x")
    newer.warm()
    with_settings(newer, module_cache_ttl=0).warm()
    assert newer.client.ttl(ENTRY + b"a.py") == -1


def test_w14_deletes_are_hard(newer: ModuleStore) -> None:
    """A deleted row loses its entry."""
    put(newer, "a.py", "x")
    put(newer, "b.py", "x")
    newer.warm()
    newer.database.execute("DELETE FROM file_index WHERE path = 'b.py'")
    assert newer.warm().removed == 1
    assert paths(newer) == {"a.py"}


@pytest.mark.parametrize("full", [False, True], ids=["", "full"])
def test_w14_hash_of_the_row_is_trusted(newer: ModuleStore, full: bool) -> None:
    """The hash is that of the bytes of the file, and the content was decoded with replacement characters. The
    entry has this hash.
    """
    put(newer, "latin.py", "# gr\ufffd\ufffde", sha256("the bytes"))
    newer.warm(full=full)
    assert json.loads(newer.client.get(ENTRY + b"latin.py"))["hash"] == sha256("the bytes")  # type: ignore[arg-type]
    again = newer.warm(full=full)
    assert again.changed == int(full)
    assert json.loads(newer.client.get(ENTRY + b"latin.py"))["hash"] == sha256("the bytes")  # type: ignore[arg-type]


def test_w14_no_hash(newer: ModuleStore) -> None:
    """A row without a valid hash gets the hash of its content."""
    put(newer, "none.py", "x", None)
    put(newer, "odd.py", "y", "not a hash")
    newer.warm()
    for path, content in (("none.py", "x"), ("odd.py", "y")):
        assert json.loads(newer.client.get(ENTRY + path.encode()))["hash"] == sha256(content)  # type: ignore[arg-type]
    assert newer.warm().changed == 0


def test_w14_private_paths_are_not_changed(newer: ModuleStore) -> None:
    """Entries below a top folder with `_` belong to the platform: none is added, removed, or given another TTL."""
    put(newer, "_solutions/ours/a.py", "x")
    put(newer, "_top.py", "x")
    put(newer, "pkg/_inner/b.py", "x")
    newer.client.set(ENTRY + b"_solutions/theirs.py", entry("_solutions/theirs.py", "y"), ex=500)
    newer.client.sadd(INDEX, "_solutions/theirs.py")
    newer.warm()
    assert paths(newer) == {"_top.py", "pkg/_inner/b.py", "_solutions/theirs.py"}
    newer.warm(full=True)
    assert paths(newer) == {"_top.py", "pkg/_inner/b.py", "_solutions/theirs.py"}
    assert newer.client.ttl(ENTRY + b"_solutions/theirs.py") <= 500


def test_w14_upgrade_and_rollback(store: ModuleStore, make_store: MakeStore) -> None:
    """The older table, the newer one, and back: after each warm the cache equals the table that exists."""
    store.put({"old.py": "x", "both.py": "y"})
    assert store.warm().source == "workspace_files"
    store.database.execute(FILE_INDEX)
    put(store, "both.py", "y")
    put(store, "new.py", "z")
    assert store.warm().source == "workspace_files", "both tables: the first"
    assert paths(store) == {"old.py", "both.py"}

    store.database.execute("ALTER TABLE workspace_files RENAME TO dropped")
    assert store.warm().source == "file_index"
    assert paths(store) == {"both.py", "new.py"}
    for path in (b"both.py", b"new.py"):
        assert 0 < store.client.ttl(ENTRY + path) <= API_TTL, "entries of the old age follow the policy of the new"

    store.database.execute("ALTER TABLE dropped RENAME TO workspace_files")
    store.warm()
    assert paths(store) == {"old.py", "both.py"}
    assert store.client.ttl(ENTRY + b"both.py") == -1


def test_w14_named_source(store: ModuleStore) -> None:
    """BIFROST_MODULE_SOURCE selects a table. If this table is missing, the error says so."""
    store.put({"old.py": "x"})
    named = with_settings(store, module_source="file_index")
    with pytest.raises(WarmError, match="file_index"):
        named.warm()
    store.database.execute(FILE_INDEX)
    put(store, "new.py", "x")
    named.warm()
    assert paths(store) == {"new.py"}


def test_w14_no_source(store: ModuleStore) -> None:
    """With `none` a warm does nothing, whatever is in the cache. Without the setting it is an error with both
    tables.
    """
    store.put({"a.py": "x"})
    store.warm()
    store.database.execute("DROP TABLE workspace_files")
    result = with_settings(store, module_source="none").warm()
    assert (result.source, result.added, result.removed) == ("none", 0, 0)
    assert paths(store) == {"a.py"}
    with pytest.raises(WarmError, match=r"workspace_files nor file_index .*0002.*BIFROST_MODULE_SOURCE=none"):
        store.warm()


def test_w14_table_in_another_schema(store: ModuleStore) -> None:
    """A table outside the search path is named, with the setting that reaches it."""
    store.database.execute("CREATE SCHEMA platform; ALTER TABLE workspace_files SET SCHEMA platform")
    with pytest.raises(WarmError, match=r"there is platform\.workspace_files, .*options=-csearch_path"):
        store.warm()


def test_w15_requirements_of_the_newer_age(newer: ModuleStore) -> None:
    """In `file_index` the requirements row is found by its path alone."""
    put(newer, "requirements.txt", "httpx==0.28.1\n")
    assert newer.warm().requirements == "made"
    value = json.loads(newer.client.get("bifrost:requirements:content"))  # type: ignore[arg-type]
    assert value == {"content": "httpx==0.28.1\n", "hash": sha256("httpx==0.28.1\n")}
