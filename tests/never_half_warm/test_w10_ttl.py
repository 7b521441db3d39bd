"""W10: after a warm every indexed entry has the TTL of BIFROST_MODULE_CACHE_TTL, also entries that were equal."""

from __future__ import annotations

from bifrost_bootstrap.warm.step import SWITCHING
from tests.setups.module_store import API_TTL, ENTRY, INDEX, MakeStore, ModuleStore, at

#: Seconds.
TTL = 3600


def lives(store: ModuleStore) -> dict[str, int]:
    """Seconds that each entry has to live; -1 for ever."""
    return {
        key.removeprefix(ENTRY).decode(): int(store.client.ttl(key))
        for key in store.client.scan_iter(ENTRY + b"*")
        if key != INDEX
    }


def test_w10_entry_of_the_api_is_made_persistent(store: ModuleStore) -> None:
    """An equal entry of the API loses its TTL of 24 h, and its content is not written again."""
    store.put({"ours.py": "x"})
    store.warm()
    store.api_write("theirs.py", "y")
    assert lives(store) == {"ours.py": -1, "theirs.py": API_TTL}
    result = store.warm()
    assert (result.expiring, result.bytes) == (1, 0)
    assert lives(store) == {"ours.py": -1, "theirs.py": -1}
    store.assert_exact()


def test_w10_entry_of_the_api_after_the_first_reading(store: ModuleStore) -> None:
    """An entry that the API writes again during a warm of another module loses its TTL too."""
    store.put({"ours.py": "x", "theirs.py": "y"})
    store.warm()
    store.put({"ours.py": "changed"})
    store.warm(at(SWITCHING, lambda: store.api_write("theirs.py", "y")))
    assert lives(store) == {"ours.py": -1, "theirs.py": -1}
    store.assert_exact()


def test_w10_policy_reaches_every_entry(make_store: MakeStore, store: ModuleStore) -> None:
    """With a TTL, new, changed, equal and persistent entries all have it. Without it they lose it again."""
    store.put({f"{n}.py": "x" for n in range(4)})
    store.warm()
    limited = make_store(store.settings.redis, store.database, module_cache_ttl=TTL)
    limited.put({"0.py": "changed", "new.py": "x"})
    limited.api_write("theirs.py", "y")
    limited.warm()
    assert all(TTL - 60 < seconds <= TTL for seconds in lives(limited).values())
    assert limited.client.ttl(INDEX) == -1
    store.warm()
    assert set(lives(store).values()) == {-1}


def test_w10_renewed_in_the_second_half_of_its_life(make_store: MakeStore, redis_url: str) -> None:
    """An entry in the first half of its TTL is not changed, one in the second half is renewed, one of 24 h is
    shortened.
    """
    store = make_store(redis_url, module_cache_ttl=TTL)
    store.put({f"{n}.py": "x" for n in range(3)})
    store.warm()
    for number, seconds in enumerate((TTL // 2 + 60, TTL // 2 - 60, API_TTL)):
        store.client.expire(ENTRY + b"%d.py" % number, seconds)
    assert store.warm().expiring == 2
    left = lives(store)
    assert left["0.py"] <= TTL // 2 + 60
    assert all(TTL - 60 < left[path] <= TTL for path in ("1.py", "2.py"))


def test_w10_large_fill_follows_it_too(store: ModuleStore, make_store: MakeStore) -> None:
    """Entries of a large fill do not keep the TTL of staged entries."""
    store.put({f"{n}.py": "x" for n in range(6000)})
    store.warm()
    assert set(lives(store).values()) == {-1}
    limited = make_store(store.settings.redis, store.database, module_cache_ttl=TTL)
    limited.client.flushdb()
    limited.warm()
    assert all(TTL - 60 < seconds <= TTL for seconds in lives(limited).values())
