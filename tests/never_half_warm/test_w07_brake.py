"""W7: a warm that would remove most of the cache stops, because it may read the wrong database."""

from __future__ import annotations

import pytest

from bifrost_bootstrap.errors import ExitCode, ShrinkError
from bifrost_bootstrap.warm.step import READING
from tests.setups.module_store import ModuleStore, at


def shrunk(store: ModuleStore, indexed: int, removed: int) -> None:
    """A cache of `indexed` entries whose rows are gone for `removed` of them, with a new row beside."""
    store.put({f"{n}.py": "x" for n in range(indexed)})
    store.warm()
    store.database.execute("DELETE FROM workspace_files WHERE path = ANY(%s)", [[f"{n}.py" for n in range(removed)]])
    store.put({"new.py": "y"})


@pytest.mark.parametrize(("indexed", "removed"), [(21, 21), (41, 21), (60, 31)])
def test_w07_stops_where_most_of_the_cache_would_go(store: ModuleStore, indexed: int, removed: int) -> None:
    """More than half and more than 20 entries: exit 2 with both numbers, and no change."""
    shrunk(store, indexed, removed)
    before = store.module_keys()
    with pytest.raises(ShrinkError, match=f"{removed} of {indexed}") as stopped:
        store.warm()
    assert stopped.value.exit_code is ExitCode.WARM
    assert "--allow-shrink" in stopped.value.remedy
    assert store.module_keys() == before
    assert store.own_keys() == []
    store.warm(allow_shrink=True)
    store.assert_exact()


def test_w07_stops_after_a_switch(store: ModuleStore) -> None:
    """A later pass stops as well. The error says what was not removed, and not that nothing was changed."""
    store.put({f"{n}.py": "x" for n in range(30)})
    store.warm()
    store.put({"new.py": "y"})
    with pytest.raises(ShrinkError, match="would remove 31 of 31 entries, and has removed none of them"):
        store.warm(at(READING, lambda: store.database.execute("DELETE FROM workspace_files"), number=2))
    assert store.content("new.py") == "y"
    assert len(store.observed()) == 31


@pytest.mark.parametrize(("indexed", "removed"), [(20, 20), (60, 30), (100, 50)])
def test_w07_lets_small_and_half_go(store: ModuleStore, indexed: int, removed: int) -> None:
    """Up to 20 entries, or up to half of them, are removed."""
    shrunk(store, indexed, removed)
    assert store.warm().removed == removed
    store.assert_exact()


def test_w07_empty_table_on_first_start(store: ModuleStore) -> None:
    """Without rows and cache there is nothing to do, and the marker says so."""
    result = store.warm()
    assert (result.modules, result.removed, result.passes) == (0, 0, 1)
    store.assert_exact()
    assert store.client.exists("bifrost:bootstrap:marker")
