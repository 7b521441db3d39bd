"""W1: after a warm, the cache equals the rows."""

from __future__ import annotations

import logging
import secrets

import pytest
from hypothesis import HealthCheck, given, settings, strategies as st
from psycopg import sql

from tests.servers import Database, Postgres
from tests.setups.module_store import ENTRY, INDEX, MakeStore, ModuleStore, migrate, sha256

#: What PostgreSQL's text can hold: anything but NUL (and half surrogates, which are no characters).
TEXT = st.characters(exclude_characters="\0", exclude_categories=["Cs"])
PATHS = st.one_of(
    st.text(TEXT, max_size=30),
    st.text("*?[]^\\/ \n\t\"'{}:.index", max_size=12),
    st.text(TEXT, min_size=1000, max_size=1000),
).filter(lambda path: path != "index")
MODULES = st.dictionaries(PATHS, st.text(TEXT, max_size=60), max_size=8)


@settings(max_examples=40, deadline=None, database=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(modules=MODULES, full=st.booleans())
def test_w01_cache_equals_rows_for_any_rows(store: ModuleStore, modules: dict[str, str], full: bool) -> None:
    """The cache held the rows of the last example. After a warm it equals the new rows, and a second warm
    finds no difference.
    """
    store.database.execute("DELETE FROM workspace_files")
    store.put(modules)
    store.warm(full=full, allow_shrink=True)
    store.assert_exact()
    again = store.warm()
    assert (again.added, again.changed, again.removed, again.expiring, again.passes) == (0, 0, 0, 0, 1)


def test_w01_database_of_another_encoding(postgres: Postgres, make_store: MakeStore, redis_url: str) -> None:
    """The cache is UTF-8 in any encoding of the database, also if the hash has to be computed."""
    database = Database(postgres, f"latin1_{secrets.token_hex(4)}")
    with postgres.admin() as connection:
        connection.execute(
            sql.SQL("CREATE DATABASE {} OWNER {} TEMPLATE template0 ENCODING LATIN1 LOCALE 'C'").format(
                sql.Identifier(database.name), sql.Identifier(postgres.app_role)
            )
        )
    try:
        migrate(database)
        store = make_store(redis_url, database)
        store.put({"größe.py": "maß = 'é'", "né.py": "ø", "plain.py": "x"})
        database.execute("UPDATE workspace_files SET content_hash = NULL WHERE path = 'né.py'")
        assert store.warm().added == 3
        store.assert_exact()
        assert store.warm().to_dict().items() >= {"added": 0, "changed": 0, "removed": 0, "passes": 1}.items()
    finally:
        postgres.drop_database(database)


def test_w01_large_module_and_empty_one(store: ModuleStore) -> None:
    """A module of 50 MB and an empty module are cached like any other."""
    store.put({"large.py": "# ünïcode\n" * 5_000_000, "pkg/__init__.py": ""})
    assert store.warm().modules == 2
    store.assert_exact()


def test_w01_what_is_no_module_is_not_cached(store: ModuleStore) -> None:
    """Deleted rows, rows without content and other types have no entry. An entry that they had is removed."""
    store.put(dict.fromkeys(("kept", "deleted", "emptied", "other"), "x = 1"))
    store.warm()
    store.remove("deleted")
    store.database.execute("UPDATE workspace_files SET content = NULL WHERE path = 'emptied'")
    store.database.execute("UPDATE workspace_files SET entity_type = 'form' WHERE path = 'other'")
    assert store.warm().removed == 3
    store.assert_exact()
    assert set(store.module_keys()) == {INDEX, ENTRY + b"kept"}


def test_w01_module_with_the_path_of_the_index_is_left_out(
    store: ModuleStore, caplog: pytest.LogCaptureFixture
) -> None:
    """A module with the path `index` is left out and named in log and result. The index stays a set."""
    store.put({"index": "x = 1", "a.py": "y = 2"})
    with caplog.at_level(logging.WARNING):
        result = store.warm()
    assert [path for path, _ in result.odd] == ["index"]
    assert "'index' is not cached" in caplog.text
    assert result.modules == 1
    store.assert_exact()


def test_w01_row_without_a_path_is_named(store: ModuleStore, caplog: pytest.LogCaptureFixture) -> None:
    """If the column allows NULL, a module without path is left out and named. The other modules are cached."""
    store.database.execute("ALTER TABLE workspace_files ALTER path DROP NOT NULL")
    store.put({"a.py": "x = 1"})
    store.database.execute("INSERT INTO workspace_files (content, entity_type) VALUES ('y = 2', 'module')")
    with caplog.at_level(logging.WARNING):
        result = store.warm()
    assert result.odd == [("", "a module without a path")]
    assert "a module without a path" in caplog.text
    assert result.modules == 1
    assert set(store.module_keys()) == {INDEX, ENTRY + b"a.py"}


@pytest.mark.parametrize("content_hash", [None, "", "abc", "Z" * 64, "é" * 64])
def test_w01_invalid_hash_is_computed(store: ModuleStore, content_hash: str | None) -> None:
    """If `content_hash` is not a SHA-256, the entry has the right hash, and the next warm finds no difference."""
    store.put({"a.py": "x = 1"})
    store.database.execute("UPDATE workspace_files SET content_hash = %s", [content_hash])
    store.warm()
    store.assert_exact()
    assert store.warm().changed == 0
    store.database.execute("UPDATE workspace_files SET content = 'x = 2'")
    store.warm()
    store.assert_exact()


def test_w01_hash_in_capitals_is_the_same_hash(store: ModuleStore) -> None:
    """A hash with capital letters is trusted. The entry has it in lower case."""
    store.put({"a.py": "x = 1"})
    store.database.execute("UPDATE workspace_files SET content_hash = upper(content_hash)")
    store.warm()
    store.assert_exact()
    assert store.warm().changed == 0
    # That it is trusted shows where it lies: otherwise PostgreSQL would compute it from the content.
    store.database.execute("UPDATE workspace_files SET content = 'x = 2'")
    assert store.warm().changed == 0


def test_w01_full_trusts_no_hash(store: ModuleStore) -> None:
    """A wrong hash hides a change from a warm, but not from a full warm. The next warm does not change the
    entry again.
    """
    store.put({"a.py": "x = 1"})
    store.warm()
    store.database.execute("UPDATE workspace_files SET content = 'x = 2'")
    store.warm()
    assert store.content("a.py") == "x = 1"
    store.warm(full=True)
    store.assert_exact()
    assert store.warm().changed == 0
    store.assert_exact()


def test_w01_broken_entries_are_replaced(store: ModuleStore) -> None:
    """Entries of another type, invalid entries, missing entries, and indexed paths that are not UTF-8 are corrected."""
    store.put({name: f"# {name}" for name in ("hash", "broken", "short", "none", "unindexed", "loose_old")})
    client = store.client
    client.hset((ENTRY + b"hash").decode(), "content", "x")
    client.set(ENTRY + b"broken", b"\xff" * 100)
    client.set(ENTRY + b"short", b"{}")
    client.set(ENTRY + b"loose_old", b'{"content":"","path":"loose_old","hash":"' + sha256("").encode() + b'"}')
    store.api_set("unindexed", "# unindexed")
    client.srem(INDEX, "unindexed")
    client.sadd(INDEX, "hash", "broken", "short", "none", "ghost", b"\xff\xfe", b"", b"\0")
    store.warm()
    store.assert_exact()
    assert len(store.module_keys()) == 7


@pytest.mark.parametrize("row", [True, False])
def test_w01_index_that_names_itself(store: ModuleStore, row: bool) -> None:
    """If the index contains `index`, it is removed from the set, and the index itself is not deleted."""
    store.put({"a.py": "x"} | ({"index": "y"} if row else {}))
    store.warm()
    store.client.sadd(INDEX, "index")
    result = store.warm()
    # Deleted, it would be filled again by a second and third pass.
    assert (result.removed, result.added, result.passes) == (1, 0, 2)
    store.assert_exact()
    assert store.warm().passes == 1


def test_w01_many_added_at_once(store: ModuleStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """A large fill writes its entries directly, and is as exact, also over entries that no index contains."""
    monkeypatch.setattr("bifrost_bootstrap.warm.staging.LARGE_FILL", 10)
    store.put({f"m{n}.py": f"x = {n}" for n in range(100)})
    store.api_set("m1.py", "older")
    store.api_set("m2.py", "x = 2")
    store.client.delete(INDEX)
    store.warm()
    store.assert_exact()
    assert {store.client.ttl(key) for key in store.module_keys()} == {-1}


def test_w01_many_over_entries_that_no_index_names(store: ModuleStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """The index was lost and rows changed since: a large fill replaces the old entries without more passes."""
    monkeypatch.setattr("bifrost_bootstrap.warm.staging.LARGE_FILL", 10)
    paths = [f"m{n}.py" for n in range(100)]
    store.put(dict.fromkeys(paths, "older"))
    store.warm()
    store.client.delete(INDEX)
    store.put(dict.fromkeys(paths, "newer"))
    # One finds the paths missing, one the entries under them, one nothing.
    assert store.warm().passes <= 3
    store.assert_exact()
