"""The modules of the benchmarks: the .py files of the Python installation, repeated to reach the count."""

from __future__ import annotations

import hashlib
import sysconfig
from pathlib import Path

from psycopg import Connection

from tests.servers import Database

#: Larger files (bytes) are skipped, so that the average is about 14 kB.
LARGEST = 105_000


def real_modules() -> list[tuple[str, str]]:
    """Return path and text of every file of the standard library up to `LARGEST`, ordered by path."""
    root = Path(sysconfig.get_path("stdlib"))
    found = []
    for file in sorted(root.rglob("*.py")):
        if "site-packages" in file.parts or file.stat().st_size > LARGEST:
            continue
        try:
            text = file.read_bytes().decode()
        except UnicodeDecodeError:
            continue
        if "\0" not in text:
            found.append((file.relative_to(root).as_posix(), text))
    return found


def fill(database: Database, count: int) -> None:
    """Insert `count` modules into the migrated database: the real ones first, then copies under other names."""
    modules = real_modules()
    # Take them from the whole list, so that a small count has the same average size as a large one.
    first = modules if count >= len(modules) else modules[:: len(modules) // count][:count]
    with database.connect() as connection:
        _insert(connection, first)
        left = count - len(first)
        # The server copies them, because compressed rows stay compressed: a tenth of the time.
        connection.execute(
            """INSERT INTO workspace_files (path, content, content_hash, entity_type)
               SELECT 'copy' || n || '/' || path, content, content_hash, entity_type
                 FROM generate_series(1, %(rounds)s) n, workspace_files ORDER BY n, path LIMIT %(left)s""",
            {"rounds": left // len(first) + 1, "left": left},
        )
        connection.execute("VACUUM ANALYZE workspace_files")


def _insert(connection: Connection[tuple[object, ...]], modules: list[tuple[str, str]]) -> None:
    query = "COPY workspace_files (path, content, content_hash, entity_type) FROM STDIN"
    with connection.cursor() as cursor, cursor.copy(query) as copy:
        for path, text in modules:
            copy.write_row((path, text, hashlib.sha256(text.encode()).hexdigest(), "module"))


def change_one_percent(database: Database) -> None:
    """Change 1 % of the modules, chosen at random."""
    database.execute(
        """WITH changed AS (
               SELECT id, content || E'\\n# ' || random() AS content FROM workspace_files
                WHERE entity_type = 'module' ORDER BY random() LIMIT (SELECT count(*) / 100 FROM workspace_files))
           UPDATE workspace_files w SET content = changed.content,
                  content_hash = encode(sha256(convert_to(changed.content, 'UTF8')), 'hex')
             FROM changed WHERE w.id = changed.id"""
    )
