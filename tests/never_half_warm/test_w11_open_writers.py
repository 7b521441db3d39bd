"""W11: a writer that has set its entry and not committed does not find the old row in its entry."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from threading import Thread, Timer

import psycopg
import pytest

from bifrost_bootstrap.migrate import tree_loading
from bifrost_bootstrap.status import readiness
from bifrost_bootstrap.warm.rows import OpenWriters, row_reader
from bifrost_bootstrap.warm.step import COMPARING, SWITCHING
from tests.setups.module_store import ENTRY, UPSERT, ModuleStore, at, sha256

PATH = "module.py"
#: Seconds that a writer's request stays open after it has set the entry: longer than two passes of a warm.
REQUEST = 1.5


@pytest.fixture
def stale(store: ModuleStore) -> ModuleStore:
    """A store with the first version in row and entry, and another module that is missing in the cache."""
    store.put({PATH: "version = 1"})
    store.warm()
    store.put({"other.py": "x"})
    return store


@contextmanager
def request(store: ModuleStore, path: str, content: str) -> Iterator[psycopg.Connection]:
    """A request of the platform's API, open: the row is flushed, the entry is set, the commit is still to come."""
    with store.database.connect() as connection:
        connection.autocommit = False
        connection.execute(UPSERT, (path, content, sha256(content)))
        store.api_set(path, content)
        yield connection


def commit_later(connection: psycopg.Connection) -> Timer:
    """Commit when the request has lasted as long as it lasts."""
    timer = Timer(REQUEST, connection.commit)
    timer.start()
    return timer


def test_w11_warm_beside_an_open_request(stale: ModuleStore) -> None:
    """The cache ends with what the request has committed."""
    with request(stale, PATH, "version = 2") as connection:
        timer = commit_later(connection)
        stale.warm()
        timer.join()
    assert stale.content(PATH) == "version = 2"
    stale.assert_exact()


def test_w11_open_delete(stale: ModuleStore) -> None:
    """A request deletes a module and has not committed: its entry does not come back for good."""
    with stale.database.connect() as connection:
        connection.autocommit = False
        connection.execute("UPDATE workspace_files SET is_deleted = true WHERE path = %s", (PATH,))
        stale.client.delete(ENTRY + PATH.encode())
        stale.client.srem(b"bifrost:module:index", PATH)
        timer = commit_later(connection)
        stale.warm()
        timer.join()
    assert stale.content(PATH) is None
    stale.assert_exact()


def test_w11_request_that_rolls_back(stale: ModuleStore) -> None:
    """The entry of a request that rolls back is gone when the warm ends."""
    with request(stale, PATH, "version = 2") as connection:
        timer = Timer(REQUEST, connection.rollback)
        timer.start()
        stale.warm()
        timer.join()
    assert stale.content(PATH) == "version = 1"
    stale.assert_exact()


@pytest.mark.parametrize("point", [COMPARING, SWITCHING])
def test_w11_request_that_begins_in_the_first_pass(stale: ModuleStore, point: str) -> None:
    """A request sets its entry between the read of the cache and the snapshot, or before the switch."""
    with ExitStack() as stack:
        timers: list[Timer] = []

        def begin() -> None:
            timers.append(commit_later(stack.enter_context(request(stale, PATH, "version = 2"))))

        stale.warm(at(point, begin))
        timers[0].join()
    assert stale.content(PATH) == "version = 2"
    stale.assert_exact()


def test_w11_init_is_not_ready_beside_an_open_request(stale: ModuleStore) -> None:
    """An earlier warm put the old row into the entry. While the request is open, nothing reports success."""
    stale.warm()
    settings = stale.settings
    with stale.database.connect() as connection:
        connection.autocommit = False
        connection.execute(UPSERT, (PATH, "version = 2", sha256("version = 2")))
        timer = commit_later(connection)
        found = readiness.read_readiness(settings, tree_loading.load(settings), compare=30, await_open=True)
        timer.join()
    assert found.diff is not None
    assert list(found.diff.changed) == [PATH.encode()]


def test_w11_bounded_and_named(
    stale: ModuleStore, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A forgotten session does not keep a warm from ending, and the log names the session."""
    monkeypatch.setattr("bifrost_bootstrap.warm.step.WRITER_WAIT", 1.5)
    with request(stale, PATH, "version = 2") as connection, caplog.at_level(logging.INFO):
        connection.execute("SET application_name = 'forgotten'")
        stale.warm()
    said = [record.getMessage() for record in caplog.records]
    assert any("waiting for transactions that have written modules" in line and "forgotten" in line for line in said)
    assert any("still open, not waiting any longer" in line and "forgotten" in line for line in said)


def test_w11_others_are_not_waited_for(stale: ModuleStore, caplog: pytest.LogCaptureFixture) -> None:
    """A warm does not wait for readers, row locks, and writers of another table."""
    stale.database.execute("CREATE TABLE notes (id int)")
    with stale.database.connect() as connection, caplog.at_level(logging.INFO):
        connection.autocommit = False
        connection.execute("SELECT * FROM workspace_files FOR UPDATE")
        connection.execute("INSERT INTO notes VALUES (1)")
        assert not writers_of(stale)
        stale.warm()
    assert "waiting for transactions" not in caplog.text


def writers_of(store: ModuleStore) -> OpenWriters:
    """The open writers that a warm would see now."""
    with row_reader(store.settings, answer_timeout=10) as reader:
        return reader.open_writers()


def test_w11_many_requests(stale: ModuleStore) -> None:
    """Requests that set first and commit later, one after another during a warm: the last version stays."""

    def write() -> None:
        for number in range(2, 30):
            with request(stale, PATH, f"version = {number}") as connection:
                connection.commit()

    writer = Thread(target=write)
    writer.start()
    stale.warm()
    writer.join()
    stale.warm()
    stale.assert_exact()
