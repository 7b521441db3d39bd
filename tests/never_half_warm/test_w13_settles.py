"""W13: writers without pause do not keep a warm from ending, and their writes are in the cache."""

from __future__ import annotations

import random
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from threading import Event

import pytest

from bifrost_bootstrap.warm.step import MAX_PASSES, SWITCHING
from tests.setups.module_store import MakeStore, ModuleStore, at

#: Modules that the writers choose from, and writers: as many as keep two cores busy.
MODULES, WRITERS = 300, 4


@contextmanager
def writers(make_store: MakeStore, store: ModuleStore, *, set_first: bool) -> Iterator[Event]:
    """Writers at full speed until the event is set: commit then entry, or entry then commit as the API does."""
    stop = Event()

    def write(seed: int) -> None:
        own = make_store(store.settings.redis, store.database)
        generator = random.Random(seed)
        number = 0
        with own.database.connect() as connection:
            while not stop.is_set():
                number += 1
                # Each writer has modules of its own: two requests for one module race in the platform too.
                path = f"{generator.randrange(seed, MODULES, WRITERS)}.py"
                content = f"writer = {seed}, version = {number}"
                with connection.transaction():
                    own.upsert(connection, path, content)
                    if set_first:
                        own.api_set(path, content)
                if not set_first:
                    own.api_set(path, content)

    with ThreadPoolExecutor(WRITERS) as pool:
        running = [pool.submit(write, seed) for seed in range(WRITERS)]
        try:
            yield stop
        finally:
            stop.set()
        for writer in running:
            writer.result()


@pytest.mark.parametrize("set_first", [True, False], ids=["entry then commit", "commit then entry"])
def test_w13_writers_without_pause(make_store: MakeStore, store: ModuleStore, set_first: bool) -> None:
    """The warm ends long before its last pass. After the writers, the cache equals the rows without another warm."""
    store.put({f"{number}.py": "version = 0" for number in range(MODULES)})
    with writers(make_store, store, set_first=set_first):
        result = store.warm()
    assert result.passes < MAX_PASSES
    store.assert_exact()


def test_w13_rows_changed_behind_the_cache(make_store: MakeStore, store: ModuleStore) -> None:
    """Rows that change without an entry, while writers are busy, are not treated as the work of the writers."""
    store.put({f"{number}.py": "version = 0" for number in range(MODULES)} | {"quiet.py": "version = 0"})
    with writers(make_store, store, set_first=True):
        store.warm(at(SWITCHING, lambda: store.put({"quiet.py": "version = 1"})))
    assert store.content("quiet.py") == "version = 1"


def test_w13_dead_writer(store: ModuleStore) -> None:
    """A writer commits and dies before its entry, once per pass: each of its rows is in the cache at the end."""
    store.put({f"{number}.py": "version = 0" for number in range(10)})
    numbers = iter(range(5))

    def commit(_progress: object) -> None:
        number = next(numbers, None)
        if number is not None:
            store.put({f"{number}.py": "version = 1"})

    store.warm(commit)
    store.assert_exact()
