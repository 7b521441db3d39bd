"""For development: insert or update the `.py` files of a folder as modules. Never deletes."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import LiteralString

import psycopg

from bifrost_bootstrap.errors import SettingsError, WarmError
from bifrost_bootstrap.progress import Facts
from bifrost_bootstrap.servers import postgres
from bifrost_bootstrap.servers.postgres import Connection
from bifrost_bootstrap.settings import Settings
from bifrost_bootstrap.warm.source import find_source

#: By table, the statement that inserts or updates one module.
_UPSERTS: dict[str, LiteralString] = {
    "workspace_files": """
        INSERT INTO workspace_files (path, content, content_hash, entity_type, is_deleted, size_bytes, content_type)
        VALUES (%(path)s, %(content)s, %(hash)s, 'module', false, %(size)s, 'text/x-python')
        ON CONFLICT (path) DO UPDATE SET content = excluded.content, content_hash = excluded.content_hash,
            entity_type = 'module', is_deleted = false, size_bytes = excluded.size_bytes, updated_at = now()
        WHERE (workspace_files.content_hash, workspace_files.entity_type, workspace_files.is_deleted)
            IS DISTINCT FROM (excluded.content_hash, excluded.entity_type, excluded.is_deleted)
    """,
    "file_index": """
        INSERT INTO file_index (path, content, content_hash) VALUES (%(path)s, %(content)s, %(hash)s)
        ON CONFLICT (path) DO UPDATE
            SET content = excluded.content, content_hash = excluded.content_hash, updated_at = now()
        WHERE file_index.content_hash IS DISTINCT FROM excluded.content_hash OR file_index.content IS NULL
    """,
}
#: Characters that the column `path` holds.
_LONGEST_PATH = 1000


@dataclass(frozen=True)
class LoadResult(Facts):
    """files: found. written: rows inserted or changed. skipped: (path, reason) of files that a row cannot hold."""

    files: int
    written: int
    skipped: list[tuple[str, str]]


def load(settings: Settings, folder: Path) -> LoadResult:
    """
    Insert or update every `.py` file below `folder` by its path, in one transaction.

    Raises SettingsError if there is no such folder, or the table is missing or has other columns.
    """
    if not folder.is_dir():
        raise SettingsError([f"{folder} is no folder"])
    rows = []
    skipped = []
    for file in sorted(folder.rglob("*.py")):
        path = file.relative_to(folder).as_posix()
        try:
            rows.append(_row(path, file))
        except (OSError, ValueError) as error:
            skipped.append((path, str(error)))
    return LoadResult(len(rows) + len(skipped), _write(settings, rows), skipped)


def _row(path: str, file: Path) -> dict[str, object]:
    """The row of a file. Raises OSError, and ValueError if a row cannot hold it."""
    path.encode()  # a file name may be any bytes
    data = file.read_bytes()
    content = data.decode()
    if "\0" in content or len(path) > _LONGEST_PATH:
        raise ValueError("holds a NUL byte, or its path is longer than 1,000 characters")
    return {"path": path, "content": content, "hash": hashlib.sha256(data).hexdigest(), "size": len(data)}


def _write(settings: Settings, rows: list[dict[str, object]]) -> int:
    """Insert or update these rows; how many were inserted or changed."""
    url = settings.database
    with postgres.connect(url, "load", autocommit=False) as connection, connection.cursor() as cursor:
        table = _table(connection, settings)
        try:
            cursor.executemany(_UPSERTS[table], rows)
        except psycopg.errors.UndefinedTable as error:
            raise SettingsError([f"{url} has no table {table}; run init first"]) from error
        except (psycopg.errors.UndefinedColumn, psycopg.DataError, psycopg.IntegrityError) as error:
            raise SettingsError([f"table {table} of {url} is another: {error.diag.message_primary}"]) from error
        connection.commit()
        return max(cursor.rowcount, 0)


def _table(connection: Connection, settings: Settings) -> str:
    try:
        source = find_source(connection, settings)
    except WarmError as error:
        raise SettingsError([f"{error.args[0]}; run init first"]) from error
    if not source.table:
        raise SettingsError(["BIFROST_MODULE_SOURCE=none names no table that could be loaded"])
    return source.table
