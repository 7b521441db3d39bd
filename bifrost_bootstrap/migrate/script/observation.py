"""For a rehearsal: what each statement of a revision changes in the catalog, and which tables its transaction locks."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from sqlalchemy import event
from sqlalchemy.engine import Connection, Engine

from .drivers import ask, is_autocommit, run
from .events import Events, Refused
from .runner_lock import RunnerLock
from .statements import controls_transaction, needs_no_transaction

#: Characters of a statement that the report shows.
STATEMENT_LENGTH = 2000
#: The tables, columns, constraints and indexes of everybody but the server, each by its oid (columns: oid and number).
#: `scans` counts since the transaction began; `file` changes when the server rewrites the table or index.
SNAPSHOT = """
WITH relations AS (
  SELECT c.oid, c.relkind, quote_ident(n.nspname) || '.' || quote_ident(c.relname) AS name
  FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
  WHERE c.oid >= 16384 AND c.relpersistence <> 't' AND left(n.nspname, 3) <> 'pg_'
), tables AS (SELECT * FROM relations WHERE relkind IN ('r', 'p', 'm'))
SELECT json_build_object(
  'tables', (SELECT json_object_agg(oid, json_build_object('name', name, 'file', pg_relation_filenode(oid),
      'scans', pg_stat_get_xact_numscans(oid))) FROM tables),
  'columns', (SELECT json_object_agg(attrelid || '.' || attnum, json_build_object('table', attrelid::text,
      'name', quote_ident(attname), 'filled', atthasdef OR attidentity <> '' OR attgenerated <> '',
      'not_null', attnotnull AND NOT EXISTS (SELECT FROM pg_constraint c
        WHERE c.conrelid = attrelid AND c.contype = 'n' AND c.conkey[1] = attnum AND NOT c.convalidated)))
    FROM pg_attribute JOIN tables ON oid = attrelid WHERE attnum > 0 AND NOT attisdropped),
  'constraints', (SELECT json_object_agg(c.oid, json_build_object('table', conrelid::text, 'type', contype,
      'validated', convalidated, 'check', pg_get_expr(conbin, conrelid), 'other', confrelid::text,
      'columns', ARRAY(SELECT quote_ident(attname) FROM unnest(conkey) WITH ORDINALITY AS keys(number, place)
        JOIN pg_attribute ON attrelid = conrelid AND attnum = number ORDER BY place),
      'other_columns', ARRAY(SELECT quote_ident(attname) FROM unnest(confkey) WITH ORDINALITY AS keys(number, place)
        JOIN pg_attribute ON attrelid = confrelid AND attnum = number ORDER BY place)))
    FROM pg_constraint c JOIN tables t ON t.oid = conrelid WHERE contype IN ('c', 'f')),
  'indexes', (SELECT json_object_agg(indexrelid, json_build_object('table', indrelid::text, 'name', r.name,
      'file', pg_relation_filenode(indexrelid), 'unique', indisunique, 'where', pg_get_expr(indpred, indrelid),
      'nulls_equal', coalesce((to_jsonb(i) ->> 'indnullsnotdistinct')::boolean, false),
      'keys', ARRAY(SELECT pg_get_indexdef(indexrelid, place, true) FROM generate_series(1, indnkeyatts) AS place)))
    FROM pg_index i JOIN relations r ON r.oid = indexrelid JOIN tables t ON t.oid = indrelid)
)::text"""
#: Table and mode of each lock of this session.
LOCKS = """
SELECT coalesce(json_agg(json_build_array(relation::text, mode)), '[]')::text
FROM pg_locks WHERE pid = pg_backend_pid() AND locktype = 'relation' AND relation >= 16384"""


class Observation:
    """
    Reports each statement of a running revision as an event `statement`.

    A statement outside a transaction gets one of its own if the server takes it there: its locks are seen before the
    commit. Connections to other databases may only read. tag: the comment that begins a statement outside one.
    """

    def __init__(self, lock: RunnerLock, tag: str, events: Events) -> None:
        self._lock = lock
        self._tag = tag
        self._events = events
        self._revision_runs = False
        self._before: dict[str, Any] = {}
        self._wrapped = False
        self._began = 0.0

    def listen(self) -> None:
        event.listen(Engine, "begin", self.on_begin)
        event.listen(Engine, "before_cursor_execute", self.before_execute)
        event.listen(Engine, "after_cursor_execute", self.after_execute)
        event.listen(Engine, "handle_error", self.on_error)

    def send_original(self, connection: Connection, *, one_transaction: bool) -> None:
        """Report the tables that are there before the first revision."""
        tables = {oid: table["name"] for oid, table in read_catalog(connection)["tables"].items()}
        self._events.send("original", tables=tables, one_transaction=one_transaction)

    @contextmanager
    def running_revision(self) -> Iterator[None]:
        """Report the statements of the block."""
        self._revision_runs = True
        try:
            yield
        finally:
            self._revision_runs = False

    def on_begin(self, connection: Connection) -> None:
        if self._lock.find_other_database(connection):
            run(connection, "SET TRANSACTION READ ONLY")

    def before_execute(self, connection: Connection, _cursor: Any, statement: str, *_more: Any) -> None:
        if other := self._lock.find_other_database(connection):
            if is_autocommit(connection):
                raise Refused("wrong_database", migrated=other)
        elif self._revision_runs:
            bare = is_autocommit(connection) and not needs_no_transaction(statement)
            self._wrapped = bare and not controls_transaction(statement)
            if self._wrapped:
                run(connection, "BEGIN")
            self._before = read_catalog(connection)
            self._began = time.monotonic()

    def after_execute(self, connection: Connection, _cursor: Any, statement: str, *_more: Any) -> None:
        if not self._revision_runs or self._lock.find_other_database(connection):
            return
        seconds = time.monotonic() - self._began
        in_transaction = self._wrapped or not is_autocommit(connection)
        self._events.send(
            "statement",
            text=statement.removeprefix(self._tag).strip()[:STATEMENT_LENGTH],
            seconds=round(seconds, 3),
            changes=find_changes(self._before, read_catalog(connection)),
            locks=json.loads(ask(connection, LOCKS)[0]) if in_transaction else [],
            in_transaction=in_transaction,
        )
        if self._wrapped:
            self._wrapped = False
            run(connection, "COMMIT")

    def on_error(self, context: Any) -> None:
        """End the transaction that the failed statement was given."""
        if self._wrapped and context.connection is not None:
            self._wrapped = False
            run(context.connection, "ROLLBACK")


def read_catalog(connection: Connection) -> dict[str, Any]:
    """The sections of `SNAPSHOT`; an empty one has no keys."""
    sections = json.loads(ask(connection, SNAPSHOT)[0])
    return {name: section or {} for name, section in sections.items()}


def find_changes(before: dict[str, Any], after: dict[str, Any]) -> dict[str, dict[str, list[Any]]]:
    """By section and key, the values before and after that differ; None stands for an object that does not exist."""
    changes = {}
    for section, values in after.items():
        old = before[section]
        changes[section] = {
            key: [old.get(key), values.get(key)]
            for key in old.keys() | values.keys()
            if old.get(key) != values.get(key)
        }
    return changes
