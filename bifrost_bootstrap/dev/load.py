"""For development: put the `.py` files of a folder into the table of modules. Never deletes."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import LiteralString

from bifrost_bootstrap.errors import SettingsError, WarmError
from bifrost_bootstrap.progress import Facts
from bifrost_bootstrap.servers import postgres
from bifrost_bootstrap.servers.postgres import Connection
from bifrost_bootstrap.settings import Settings
from bifrost_bootstrap.warm import source as module_source
from bifrost_bootstrap.warm.source import ModuleSource

_UPSERT_WORKSPACE_FILES: LiteralString = """
    INSERT INTO workspace_files (path, content, content_hash, entity_type, is_deleted, size_bytes, content_type)
    VALUES (%s, %s, %s, 'module', false, %s, 'text/x-python')
    ON CONFLICT (path) DO UPDATE SET content = excluded.content, content_hash = excluded.content_hash,
        entity_type = 'module', is_deleted = false, size_bytes = excluded.size_bytes, updated_at = now()
    WHERE (workspace_files.content_hash, workspace_files.entity_type, workspace_files.is_deleted)
        IS DISTINCT FROM (excluded.content_hash, excluded.entity_type, excluded.is_deleted)
"""
_UPSERT_FILE_INDEX: LiteralString = """
    INSERT INTO file_index (path, content, content_hash) VALUES (%s, %s, %s)
    ON CONFLICT (path) DO UPDATE
        SET content = excluded.content, content_hash = excluded.content_hash, updated_at = now()
    WHERE file_index.content_hash IS DISTINCT FROM excluded.content_hash OR file_index.content IS NULL
"""
#: What a NUL byte, another encoding or a longer path would be: PostgreSQL's text and the column do not take it.
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

    Raises SettingsError where there is no such folder, or the table is missing or another one.
    """
    import psycopg

    if not folder.is_dir():
        raise SettingsError([f"{folder} is no folder"])
    skipped: list[tuple[str, str]] = []
    rows = list(_rows(folder, skipped))
    url = settings.database
    with postgres.connect(url, "load", autocommit=False) as connection, connection.cursor() as cursor:
        source = _source(connection, settings)
        try:
            if source is module_source.FILE_INDEX:
                cursor.executemany(_UPSERT_FILE_INDEX, [row[:3] for row in rows])
            else:
                cursor.executemany(_UPSERT_WORKSPACE_FILES, rows)
        except psycopg.errors.UndefinedTable as error:
            raise SettingsError([f"{url} has no table {source.table}; run init first"]) from error
        except (psycopg.errors.UndefinedColumn, psycopg.DataError, psycopg.IntegrityError) as error:
            raise SettingsError([f"table {source.table} of {url} is another: {error.diag.message_primary}"]) from error
        written = cursor.rowcount
        connection.commit()
    return LoadResult(len(rows) + len(skipped), max(written, 0), skipped)


def _source(connection: Connection, settings: Settings) -> ModuleSource:
    try:
        source = module_source.find_source(connection, settings)
    except WarmError as error:
        raise SettingsError([f"{error.args[0]}; run init first"]) from error
    if not source.table:
        raise SettingsError(["BIFROST_MODULE_SOURCE=none names no table that could be loaded"])
    return source


def _rows(folder: Path, skipped: list[tuple[str, str]]) -> Iterator[tuple[str, str, str, int]]:
    for file in sorted(folder.rglob("*.py")):
        path = file.relative_to(folder).as_posix()
        try:
            path.encode()  # a file name may be any bytes
            data = file.read_bytes()
            content = data.decode()
            if "\0" in content or len(path) > _LONGEST_PATH:
                raise ValueError("holds a NUL byte, or its path is longer than 1,000 characters")
        except (OSError, ValueError) as error:
            skipped.append((path, str(error)))
            continue
        yield path, content, hashlib.sha256(data).hexdigest(), len(data)
