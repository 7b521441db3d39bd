"""W12: a warm removes a TTL of the index, and `check` reports it."""

from __future__ import annotations

from bifrost_bootstrap.migrate import tree_loading
from bifrost_bootstrap.status import readiness
from bifrost_bootstrap.warm.step import READING
from tests.setups.module_store import API_TTL, INDEX, ModuleStore, at


def test_w12_taken_off_though_nothing_else_differs(store: ModuleStore) -> None:
    """A reader of the platform has rebuilt the index with a TTL of 24 h."""
    store.put({"a.py": "x"})
    store.warm()
    store.client.expire(INDEX, API_TTL)
    store.warm()
    assert store.client.ttl(INDEX) == -1
    store.assert_exact()


def test_w12_set_while_a_warm_runs(store: ModuleStore) -> None:
    """The TTL is set between the switch and the proof."""
    store.put({"a.py": "x"})
    store.warm(at(READING, lambda: store.client.expire(INDEX, API_TTL), number=2))
    assert store.client.ttl(INDEX) == -1


def test_w12_check_reports_the_ttl(store: ModuleStore) -> None:
    """The platform may start, but there is work to do, and the text says what."""
    store.put({"a.py": "x"})
    store.warm()
    store.client.expire(INDEX, API_TTL)
    found = readiness.read_readiness(store.settings, tree_loading.load(store.settings), compare=30)
    assert found.ready
    assert not found.nothing_to_do
    assert found.diff is not None
    assert found.diff.summary() == "the index expires"
    assert found.to_dict()["module_cache"]["index_expires"] is True
