"""W2: a reader that reads index and entries atomically sees the previous cache or the new one."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from threading import Event

import pytest
import redis

from bifrost_bootstrap.progress import Progress
from bifrost_bootstrap.warm import rows, staging
from bifrost_bootstrap.warm.step import STAGING
from tests.setups.module_store import ModuleStore, at

WARMS = 100
#: Modules that are changed together, and how many come and go with the generation.
TOGETHER, PASSING = 20, 5


def generation(number: int) -> dict[str, str]:
    """The modules of one generation: every one tells which it is, and some paths belong to this one alone."""
    content = f"# generation {number}"
    return {f"together{n}": content for n in range(TOGETHER)} | {
        f"{number}/passing{n}": content for n in range(PASSING)
    }


def assert_one_generation(seen: dict[bytes, bytes | None]) -> str:
    """Every path has its entry, all of one generation; returns its content, "" for an empty cache."""
    if not seen:
        return ""
    assert None not in seen.values(), f"in the index, without entry: {[path for path in seen if not seen[path]]}"
    contents = {json.loads(value)["content"] for value in seen.values() if value}
    assert len(contents) == 1, f"a mixture of {sorted(contents)}"
    content: str = contents.pop()
    assert {path.decode() for path in seen} == set(generation(int(content.rpartition(" ")[2])))
    return content


@pytest.mark.race
@pytest.mark.parametrize("large_fill", [staging.LARGE_FILL, 0])
def test_w02_observer_never_sees_a_mixture(
    store: ModuleStore, large_fill: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """During 100 warms that change, add and remove modules, every read shows a single generation."""
    monkeypatch.setattr(staging, "LARGE_FILL", large_fill)
    ended = Event()
    seen: list[str] = []

    def observe() -> None:
        with redis.Redis.from_url(store.settings.redis) as client:
            while not ended.is_set():
                seen.append(assert_one_generation(store.observed(client)))

    def at_every_point(_progress: Progress) -> None:
        assert_one_generation(store.observed())

    with ThreadPoolExecutor(1) as pool:
        observer = pool.submit(observe)
        try:
            for number in range(WARMS):
                store.database.execute("DELETE FROM workspace_files")
                store.put(generation(number))
                store.warm(at_every_point)
        finally:
            ended.set()
        observer.result()
    assert seen[-1] == f"# generation {WARMS - 1}"
    assert len(seen) > WARMS


def test_w02_rows_are_those_of_one_moment(store: ModuleStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows that are committed together during a warm become visible together, in the next pass."""
    # One row in each query, so that the commit comes between two of them; most modules stay as they are, or else
    # one query would read them all.
    monkeypatch.setattr(rows, "PATHS_PER_QUERY", 1)
    monkeypatch.setattr(staging, "BATCH_SIZE", 1)
    together = [f"together{n}" for n in range(5)]
    store.put({f"still{n}": "" for n in range(20)} | dict.fromkeys(together, "0"))
    store.warm()
    store.put(dict.fromkeys(together, "1"))
    seen: list[str | None] = []
    commit = at(STAGING, lambda: store.put(dict.fromkeys(together, "2")))

    def observe_and_commit(progress: Progress) -> None:
        contents = {store.content(path) for path in together}
        assert len(contents) == 1, f"a mixture of {contents}"
        seen.extend(contents - set(seen[-1:]))
        commit(progress)

    assert store.warm(observe_and_commit).passes == 3
    assert seen == ["0", "1", "2"]
    store.assert_exact()
