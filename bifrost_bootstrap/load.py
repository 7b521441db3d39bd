"""For development: put the `.py` files of a folder into `workspace_files`. Never deletes."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bifrost_bootstrap import postgres
from bifrost_bootstrap.errors import SettingsError
from bifrost_bootstrap.urls import PostgresUrl

_UPSERT = """
    INSERT INTO workspace_files (path, content, content_hash, entity_type, is_deleted, size_bytes, content_type)
    VALUES (%s, %s, %s, 'module', false, %s, 'text/x-python')
    ON CONFLICT (path) DO UPDATE SET content = excluded.content, content_hash = excluded.content_hash,
        entity_type = 'module', is_deleted = false, size_bytes = excluded.size_bytes, updated_at = now()
    WHERE (workspace_files.content_hash, workspace_files.entity_type, workspace_files.is_deleted)
        IS DISTINCT FROM (excluded.content_hash, excluded.entity_type, excluded.is_deleted)
"""
#: What a NUL byte, another encoding or a longer path would be: PostgreSQL's text and the column do not take it.
_LONGEST_PATH = 1000


@dataclass(frozen=True)
class LoadResult:
    """files: found. written: rows inserted or changed. skipped: (path, reason) of files that a row cannot hold."""

    files: int
    written: int
    skipped: list[tuple[str, str]]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def load(url: PostgresUrl, folder: Path) -> LoadResult:
    """
    Insert or update every `.py` file below `folder` by its path, in one transaction.

    Raises SettingsError where there is no such folder, or the table is missing or another one.
    """
    import psycopg

    if not folder.is_dir():
        raise SettingsError([f"{folder} is no folder"])
    skipped: list[tuple[str, str]] = []
    rows = list(_rows(folder, skipped))
    with postgres.connect(url, "load", autocommit=False) as connection, connection.cursor() as cursor:
        try:
            cursor.executemany(_UPSERT, rows)
        except psycopg.errors.UndefinedTable as error:
            raise SettingsError([f"{url} has no table workspace_files; run init first"]) from error
        except (psycopg.errors.UndefinedColumn, psycopg.DataError, psycopg.IntegrityError) as error:
            raise SettingsError([f"table workspace_files of {url} is another: {error.diag.message_primary}"]) from error
        written = cursor.rowcount
        connection.commit()
    return LoadResult(len(rows) + len(skipped), max(written, 0), skipped)


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
