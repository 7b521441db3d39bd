"""What a revision did to the copy, statement by statement, and what that means for the live tables."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

#: Lock modes as `pg_locks` names them, the weakest first: PostgreSQL's words, and what a holder blocks. From the table
#: "Conflicting Lock Modes" of its manual: reading takes ACCESS SHARE, writing ROW EXCLUSIVE.
LOCKS = {
    "AccessShareLock": ("ACCESS SHARE", "nothing"),
    "RowShareLock": ("ROW SHARE", "nothing"),
    "RowExclusiveLock": ("ROW EXCLUSIVE", "nothing"),
    "ShareUpdateExclusiveLock": ("SHARE UPDATE EXCLUSIVE", "nothing"),
    "ShareLock": ("SHARE", "writes"),
    "ShareRowExclusiveLock": ("SHARE ROW EXCLUSIVE", "writes"),
    "ExclusiveLock": ("EXCLUSIVE", "writes"),
    "AccessExclusiveLock": ("ACCESS EXCLUSIVE", "reads and writes"),
}
_STRENGTH = {mode: strength for strength, mode in enumerate(LOCKS)}
#: Locks of statements that run outside a transaction and are gone when they end, from the manual's pages of these.
_LOCKS_BY_MANUAL = {
    re.compile(r"\bvacuum\b.*\bfull\b", re.IGNORECASE | re.DOTALL): "AccessExclusiveLock",
    re.compile(r"\brefresh\s+materialized\b", re.IGNORECASE): "ExclusiveLock",
    re.compile(r""): "ShareUpdateExclusiveLock",
}
_BLANK = r"(?:\s|--[^\n]*\n|/\*.*?\*/)*"
#: Statements that read or write rows, and define nothing.
_DATA = re.compile(
    rf"{_BLANK}(?:insert|update|delete|merge|with|select|copy|truncate|lock)\b", re.IGNORECASE | re.DOTALL
)
_READS = re.compile(rf"{_BLANK}(?:select|lock)\b", re.IGNORECASE | re.DOTALL)
#: How to avoid a lock that lasts longer the larger the table is, by its cause.
WAYS = {
    "rewrite": "for a column add another one, fill it in batches and swap the names; for a whole table use pg_repack",
    "not null": "ADD CHECK (column IS NOT NULL) NOT VALID, VALIDATE CONSTRAINT in a later revision, then SET NOT NULL",
    "constraint": "ADD CONSTRAINT NOT VALID, then VALIDATE CONSTRAINT in a later revision",
    "index": "CREATE INDEX CONCURRENTLY in an autocommit_block(); for a constraint then ADD CONSTRAINT USING INDEX",
    "rows": "write the rows in a revision of its own, before or after this one",
    "scan": "run the statement that reads the whole table in a revision of its own",
}


@dataclass(frozen=True)
class Statement:
    """
    One statement of a revision as it ran on the copy.

    changes: what it changed in the catalog, by section of `migrate/script/observation.py` and key: [before, after];
    None stands for an object that does not exist. locks: (table, mode) of each lock that its transaction holds.
    in_transaction: whether it ran in a transaction.
    """

    text: str
    changes: Mapping[str, Mapping[str, list[Any]]]
    locks: list[tuple[str, str]]
    in_transaction: bool

    @property
    def is_data(self) -> bool:
        """Whether it reads or writes rows only."""
        return bool(_DATA.match(self.text))

    @property
    def writes_rows(self) -> bool:
        return self.is_data and not _READS.match(self.text)

    def changed(self, section: str) -> Iterator[tuple[str, Any, Any]]:
        """Key, value before and value after the statement, of each change in a section."""
        for key, (before, after) in self.changes.get(section, {}).items():
            yield key, before, after

    def validated_constraints(self) -> Iterator[Any]:
        """The CHECK constraints and foreign keys that the live rows have to meet from now on."""
        for _, before, after in self.changed("constraints"):
            if after and after["validated"] and not (before and before["validated"]):
                yield after


@dataclass
class TableForecast:
    """
    What one revision does to one table that exists before it.

    mode: its strongest lock, a key of `LOCKS`. scanned: the server reads the whole table to validate something.
    held_for_rows: rows of some table are written while the lock blocks. indexes: those built under a lock that blocks
    writes. ways: keys of `WAYS`. rows (the server's estimate) and size (bytes, with indexes and TOAST) of the live
    table; None without a live database.
    """

    table: str
    mode: str = ""
    rewritten: bool = False
    scanned: bool = False
    held_for_rows: bool = False
    dropped: bool = False
    indexes: list[str] = field(default_factory=list)
    dropped_columns: list[str] = field(default_factory=list)
    ways: set[str] = field(default_factory=set)
    rows: int | None = None
    size: int | None = None

    @property
    def lock(self) -> str:
        """The lock in PostgreSQL's words; "" for none."""
        return LOCKS[self.mode][0] if self.mode else ""

    @property
    def blocks(self) -> str:
        """What the lock blocks: "reads and writes", "writes", "nothing"."""
        return LOCKS[self.mode][1] if self.mode else "nothing"

    @property
    def lasts(self) -> str:
        """What is done under a blocking lock and takes longer the larger the table is; "" for nothing."""
        if self.blocks == "nothing":
            return ""
        if self.rewritten:
            return "it is rewritten"
        work = ["it is read as a whole"] if self.scanned else []
        work += ["rows are written"] if self.held_for_rows else []
        work += [f"index {index} is built, not concurrently" for index in self.indexes]
        return ", ".join(work)

    @property
    def harm(self) -> tuple[bool, int, int]:
        """Sorts tables, the largest harm last: whether the lock lasts, its strength, the size of the table."""
        return bool(self.lasts), _STRENGTH.get(self.mode, -1), self.size or 0

    def warning(self, large: int) -> str:
        """What the lock blocks, why it lasts, how to avoid it. "" if it is short, or the table below `large` bytes."""
        if not self.lasts or (self.size is not None and self.size < large):
            return ""
        ways = "; ".join(WAYS[way] for way in WAYS if way in (self.ways or {"scan"}))
        return f"{self.table}: {self.lock} blocks {self.blocks} while {self.lasts}. To avoid it: {ways}"

    def to_dict(self) -> dict[str, Any]:
        """For `--json`."""
        facts = {key: value for key, value in vars(self).items() if key not in ("mode", "ways")}
        return facts | {"lock": self.lock or None, "blocks": self.blocks}


def forecast_tables(statements: Iterable[Statement], original: Mapping[str, str]) -> list[TableForecast]:
    """What the statements of one revision do to the tables that were there before. original: their names by oid."""
    tables = {oid: TableForecast(name) for oid, name in original.items()}
    for statement in statements:
        _take_locks(statement, tables)
        if not statement.is_data:
            _take_definitions(statement, tables)
    return [table for table in tables.values() if table.mode]


def _take_locks(statement: Statement, tables: Mapping[str, TableForecast]) -> None:
    locks = statement.locks
    if not statement.in_transaction:
        mode = next(mode for pattern, mode in _LOCKS_BY_MANUAL.items() if pattern.search(statement.text))
        touched = {value["table"] for _, *values in statement.changed("indexes") for value in values if value}
        touched |= {oid for oid, table in tables.items() if _names(statement.text, table.table)}
        locks = [(oid, mode) for oid in touched]
    for oid, mode in locks:
        table = tables.get(oid)
        if table and _STRENGTH[mode] > _STRENGTH.get(table.mode, _STRENGTH["AccessShareLock"]):
            table.mode = mode
        if table and statement.writes_rows and LOCKS[mode][1] != "nothing":
            table.held_for_rows = True
            table.ways.add("rows")


def _names(text: str, table: str) -> bool:
    """Whether a statement names this table, with its schema or without."""
    return re.search(rf'(?<![\w"]){re.escape(table.rpartition(".")[2])}(?![\w"])', text) is not None


def _take_definitions(statement: Statement, tables: Mapping[str, TableForecast]) -> None:
    built = _built_indexes(statement)
    for oid, before, after in statement.changed("tables"):
        table = tables.get(oid)
        if table is None or before is None:
            continue
        if after is None:
            table.dropped = True
        elif before["file"] != after["file"]:
            table.rewritten = True
            table.ways.add("rewrite")
        elif oid in built:
            # The scan is that of the build. A concurrent one is outside a transaction, and blocks nothing.
            if statement.in_transaction:
                table.indexes += built[oid]
                table.ways.add("index")
        elif after["scans"] > before["scans"]:
            table.scanned = True
    _take_constraints(statement, tables)
    _take_columns(statement, tables)


def _built_indexes(statement: Statement) -> dict[str, list[str]]:
    """By the oid of their table, the names of the indexes that the statement built or rebuilt."""
    built: dict[str, list[str]] = {}
    for _, before, after in statement.changed("indexes"):
        if after and (before is None or before["file"] != after["file"]):
            built.setdefault(after["table"], []).append(after["name"])
    return built


def _take_constraints(statement: Statement, tables: Mapping[str, TableForecast]) -> None:
    for constraint in statement.validated_constraints():
        if table := tables.get(constraint["table"]):
            table.scanned = True
            table.ways.add("constraint")


def _take_columns(statement: Statement, tables: Mapping[str, TableForecast]) -> None:
    for _, before, after in statement.changed("columns"):
        table = tables.get((after or before)["table"])
        if table is None or before is None:
            continue
        if after is None:
            table.dropped_columns += [] if table.dropped else [before["name"]]
        elif after["not_null"] and not before["not_null"] and table.scanned:
            table.ways.add("not null")
