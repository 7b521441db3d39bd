"""W4: when a warm ends, no older version stands over a newer one, whatever was written meanwhile."""

from __future__ import annotations

import contextlib
import random
import re
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from threading import Event

import pytest

from bifrost_bootstrap.deadline import Deadline
from bifrost_bootstrap.errors import UnsettledError
from bifrost_bootstrap.progress import Progress
from bifrost_bootstrap.warm.cache import MARKER
from bifrost_bootstrap.warm.step import COMPARING, READING, STAGING, SWITCHING, WarmResult, warm
from tests.servers.process import wait_until
from tests.setups.module_store import ENTRY, MakeStore, ModuleStore, at

PATH = "module.py"


class Killed(BaseException):
    """Ends a warm where a SIGKILL would."""


def watched(store: ModuleStore, point: str, action: Callable[[], object]) -> list[str | None]:
    """Warm; do this at the point of the first pass; return what a reader saw from then on, change by change."""
    seen: list[str | None] = []

    def act_and_look() -> None:
        action()
        seen.append(store.content(PATH))

    act = at(point, act_and_look)

    def report(progress: Progress) -> None:
        act(progress)
        if seen and store.content(PATH) != seen[-1]:
            seen.append(store.content(PATH))

    store.warm(report)
    if store.content(PATH) != seen[-1]:
        seen.append(store.content(PATH))
    store.assert_exact()
    return seen


@pytest.fixture
def stale(store: ModuleStore) -> ModuleStore:
    """A store with the first version in the cache, and the second in the row."""
    store.put({PATH: "version = 1"})
    store.warm()
    store.put({PATH: "version = 2"})
    return store


@pytest.mark.parametrize("point", [STAGING, SWITCHING])
def test_w04_write_between_snapshot_and_switch(stale: ModuleStore, point: str) -> None:
    """A write after the snapshot stays. No reader sees an older version afterwards."""
    seen = watched(stale, point, lambda: stale.api_write(PATH, "version = 3"))
    assert seen == ["version = 3"]


def test_w04_write_before_the_snapshot(stale: ModuleStore) -> None:
    """A write between the read of the cache and that of the rows is in both, and stays."""
    seen = watched(stale, COMPARING, lambda: stale.api_write(PATH, "version = 3"))
    assert seen == ["version = 3"]


def test_w04_delete_of_an_absent_entry(store: ModuleStore) -> None:
    """A module without entry is deleted after the snapshot: its entry exists for one pass at most."""
    store.put({PATH: "version = 1", "other.py": ""})
    seen = watched(store, SWITCHING, lambda: store.api_delete(PATH))
    assert seen in ([None, "version = 1", None], [None])


def test_w04_revert(stale: ModuleStore) -> None:
    """A writer reverts a module to the version in the cache: the entry looks unchanged, and the last version stays."""
    seen = watched(stale, SWITCHING, lambda: stale.api_write(PATH, "version = 1"))
    assert seen in (["version = 1", "version = 2", "version = 1"], ["version = 1"])


def test_w04_added_entry_is_not_overwritten(store: ModuleStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also in a large fill, an entry that a writer sets before or after ours stays."""
    monkeypatch.setattr("bifrost_bootstrap.warm.staging.LARGE_FILL", 0)
    monkeypatch.setattr("bifrost_bootstrap.warm.staging.BATCH_SIZE", 1)
    paths = [f"{number}.py" for number in range(20)]
    store.put(dict.fromkeys(paths, "version = 1"))
    versions = iter(range(2, 100))
    written: dict[str, str] = {}
    generator = random.Random(4)

    def write(progress: Progress) -> None:
        if progress.note == STAGING:
            path = generator.choice(paths)
            written[path] = f"version = {next(versions)}"
            store.api_write(path, written[path])
        for path, content in written.items():
            assert store.content(path) == content

    store.warm(write)
    store.assert_exact()


def test_w04_lost_between_switch_and_proof(store: ModuleStore) -> None:
    """A flush after the switch is noticed, although the second comparison knows what the switch wrote."""
    store.put({PATH: "version = 1"})
    store.warm(at(READING, store.client.flushdb, number=2))
    store.assert_exact()


def test_w04_touched_between_switch_and_proof(store: ModuleStore) -> None:
    """After the switch, an entry that it did not change is evicted, and a writer dies after it has restored
    another one.
    """
    store.put({PATH: "version = 1", "evicted.py": "x", "reverted.py": "version = 1"})
    store.warm()
    store.put({PATH: "version = 2"})

    def touch() -> None:
        store.client.delete(ENTRY + b"evicted.py")
        store.api_write("reverted.py", "version = 2")
        store.put({"reverted.py": "version = 1"})

    store.warm(at(SWITCHING, touch))
    store.assert_exact()


def test_w04_switch_of_another_warm_is_not_confirmed(make_store: MakeStore, stale: ModuleStore) -> None:
    """A warm that found no difference does not confirm a cache into which another warm has switched since.

    The other warm compared before a revert, switches after it, and dies before it compares again.
    """
    other = make_store(stale.settings.redis, stale.database)
    at_its_switch, go_on = Event(), Event()

    def hold(progress: Progress) -> None:
        if progress.note == SWITCHING and not go_on.is_set():
            at_its_switch.set()
            assert go_on.wait(30)
        if progress.note == READING and go_on.is_set():
            markers.append(str(stale.client.get(MARKER)))

    with ThreadPoolExecutor(1) as pool:

        def revert_and_compare() -> None:
            other.api_write(PATH, "version = 1")
            ends.append(pool.submit(other.warm, hold))
            assert at_its_switch.wait(30)

        ends: list[Future[WarmResult]] = []
        markers: list[str] = []
        switch = at(SWITCHING, revert_and_compare)

        def die_before_the_proof(progress: Progress) -> None:
            switch(progress)
            if ends and progress.note == READING:
                raise Killed

        with pytest.raises(Killed):
            stale.warm(die_before_the_proof)
        assert stale.content(PATH) == "version = 2", "older than the row"
        go_on.set()
        assert ends[0].result(30).passes > 1
        assert '"settled": false' in markers[0]
    stale.assert_exact()


def test_w04_ttl_updates_need_no_second_comparison(store: ModuleStore) -> None:
    """TTL updates of entries of live writers do not make a warm compare again."""
    store.put({PATH: "version = 1"})
    store.warm()
    store.api_write("other.py", "x")
    result = store.warm()
    assert (result.passes, result.expiring) == (1, 1)
    assert store.client.ttl(b"bifrost:module:other.py") == -1


def test_w04_writer_without_pause(store: ModuleStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """If every pass finds another change, the warm ends and says that it did not settle."""
    monkeypatch.setattr("bifrost_bootstrap.warm.step.MAX_PASSES", 3)
    store.put({PATH: "version = 0"})
    number = 0

    def commit_only(progress: Progress) -> None:
        nonlocal number
        if progress.note == READING:
            number += 1
            store.put({PATH: f"version = {number}"})

    with pytest.raises(UnsettledError, match=r"did not settle.*3 passes.*1 changed") as unsettled:
        store.warm(commit_only)
    # Earlier passes have switched, so the error must not say that the cache is unchanged.
    assert store.content(PATH) == "version = 3"
    assert not re.search("untouched|unchanged|nothing was changed", str(unsettled.value))


def test_w04_another_warm_in_the_way_is_named(store: ModuleStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """If the last pass found no difference, but a switch of another warm, the message says that."""
    store.put({PATH: "version = 1"})
    store.warm()
    monkeypatch.setattr("bifrost_bootstrap.warm.step.MAX_PASSES", 1)
    with pytest.raises(UnsettledError, match="last: another warm has switched meanwhile"):
        store.warm(at(SWITCHING, lambda: store.client.set(MARKER, "of another")))


def test_w04_deadline_ends_the_passes(store: ModuleStore) -> None:
    """The pass that runs at the deadline is the last one."""
    store.put({PATH: "version = 0"})
    deadline = Deadline(60)
    passes = 0

    def commit_and_let_it_pass(progress: Progress) -> None:
        nonlocal passes
        if progress.note == READING:
            passes += 1
            store.put({PATH: f"version = {passes}"})
            if passes == 2:
                deadline.seconds = 0

    with pytest.raises(UnsettledError, match="2 passes"):
        warm(store.settings, deadline, commit_and_let_it_pass)
    assert passes == 2


def test_w04_deadline_does_not_end_the_first_pass(store: ModuleStore) -> None:
    """A first fill that runs at the deadline is confirmed if no writer has changed anything."""
    store.put({PATH: "version = 0"})
    assert warm(store.settings, Deadline(0), lambda _progress: None).added == 1
    store.assert_exact()


def test_w04_writer_before_the_proof_at_the_deadline(store: ModuleStore) -> None:
    """A write during the pass that runs at the deadline is read in this pass, and is no difference."""
    store.put({PATH: "version = 1"})
    write = at(READING, lambda: store.api_write(PATH, "version = 2"), number=2)
    assert warm(store.settings, Deadline(0), write).passes == 2
    store.assert_exact()


@pytest.mark.race
def test_w04_writers_under_load(make_store: MakeStore, store: ModuleStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """Six writers change, add and delete without pause, and stop during the last warm: the cache is exact."""
    writers, paths = 6, 12
    stop = Event()
    written = [0] * writers

    def write(number: int, one: ModuleStore) -> None:
        generator = random.Random(number)
        while not stop.is_set():
            # Each path has one writer: two on one path race in the platform itself.
            path = f"{number}/{generator.randrange(paths)}.py"
            if generator.random() < 0.3:
                one.api_delete(path)
            else:
                one.api_write(path, f"# {generator.random()}")
            written[number] += 1

    store.put({f"still/{number}.py": "x" for number in range(50)})
    ones = [make_store(store.settings.redis, store.database) for _ in range(writers)]
    with ThreadPoolExecutor(writers) as pool:
        ended = [pool.submit(write, number, one) for number, one in enumerate(ones)]

        def end_them() -> None:
            stop.set()
            for writer in ended:
                writer.result()

        try:
            for last in (False, False, True):
                so_far = sum(written)
                wait_until(lambda so_far=so_far: sum(written) > so_far + 20, "writers at work")  # type: ignore[misc]
                if last:
                    store.warm(at(SWITCHING, end_them))
                    continue
                with monkeypatch.context() as patched, contextlib.suppress(UnsettledError):
                    # Under such a load a warm need not settle.
                    patched.setattr("bifrost_bootstrap.warm.step.MAX_PASSES", 3)
                    store.warm()
        finally:
            stop.set()
    store.assert_exact()
