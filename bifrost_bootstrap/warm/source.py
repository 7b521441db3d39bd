"""The tables in which the platform has kept its modules, and the choice between them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import LiteralString

from bifrost_bootstrap.errors import WarmError
from bifrost_bootstrap.servers import postgres
from bifrost_bootstrap.servers.postgres import Connection
from bifrost_bootstrap.settings import Settings

#: Seconds that the platform's own writers let an entry live in the age of `file_index`.
PLATFORM_TTL = 24 * 3600.0


@dataclass(frozen=True)
class ModuleSource:
    """
    One table of modules.

    table: its name; "" is no table (`BIFROST_MODULE_SOURCE=none`). modules, requirements: the conditions for a row
    that is a module, and for the row that is `requirements.txt`. default_ttl: seconds that an entry lives unless
    BIFROST_MODULE_CACHE_TTL is set; 0 is for ever. trusts_hash: entries have the row's `content_hash` even if it
    is not the hash of the row's content. has_private_paths: see `is_private`.
    """

    table: LiteralString
    modules: LiteralString = "false"
    requirements: LiteralString = "false"
    default_ttl: float = 0.0
    trusts_hash: bool = False
    has_private_paths: bool = False

    def is_private(self, path: bytes) -> bool:
        """Whether the path is in a top-level folder whose name begins with `_`. The platform manages those itself."""
        return self.has_private_paths and path.startswith(b"_") and b"/" in path

    def count_private(self, paths: Iterable[bytes]) -> int:
        """How many of the paths the platform manages itself."""
        return sum(map(self.is_private, paths)) if self.has_private_paths else 0

    def ttl(self, settings: Settings) -> float:
        """Seconds that an entry lives; 0 is for ever."""
        return self.default_ttl if settings.module_cache_ttl is None else settings.module_cache_ttl

    @property
    def from_where(self) -> LiteralString:
        """`FROM … WHERE …` of the modules."""
        return f" FROM {self.table} WHERE {self.modules}"


#: The platform from 2026-01-08 to 2026-02-10, and the builtin tree.
WORKSPACE_FILES = ModuleSource(
    "workspace_files",
    modules="entity_type = 'module' AND NOT is_deleted AND content IS NOT NULL",
    requirements="path = 'requirements.txt' AND entity_type = 'requirements' AND NOT is_deleted",
)
#: The platform since 2026-02-10: every tagged release from v0.5.0 on. Its `content_hash` is that of the file's bytes,
#: and the content is decoded with replacement, so the two differ for a file that is not UTF-8.
FILE_INDEX = ModuleSource(
    "file_index",
    # Without a percent sign, which psycopg takes for a parameter.
    modules="right(path, 3) = '.py' AND content IS NOT NULL AND NOT (left(path, 1) = '_' AND strpos(path, '/') > 0)",
    requirements="path = 'requirements.txt'",
    default_ttl=PLATFORM_TTL,
    trusts_hash=True,
    has_private_paths=True,
)
NO_SOURCE = ModuleSource("")

_BY_NAME = {"workspace_files": WORKSPACE_FILES, "file_index": FILE_INDEX, "none": NO_SOURCE}


def find_source(connection: Connection, settings: Settings) -> ModuleSource:
    """
    The source that BIFROST_MODULE_SOURCE names; with `auto`, the first of the two tables that exists.

    Raises WarmError if neither exists, with the heads that the database records.
    """
    if settings.module_source != "auto":
        return _BY_NAME[settings.module_source]
    with connection.transaction():
        for source in (WORKSPACE_FILES, FILE_INDEX):
            if postgres.scalar(connection, "SELECT to_regclass(%s)", source.table) is not None:
                return source
        elsewhere = postgres.other_table(connection, "workspace_files") or postgres.other_table(
            connection, "file_index"
        )
        heads = postgres.database_heads(connection, settings.alembic_version_table)
    raise WarmError(_no_table(str(settings.database), elsewhere, heads))


def _no_table(server: str, elsewhere: str, heads: tuple[str, ...]) -> str:
    text = (
        f"{server} has neither table workspace_files nor file_index (database heads: {', '.join(heads) or 'none'}):"
        " it is not migrated, or not the platform's database"
    )
    if elsewhere:
        schema = elsewhere.rpartition(".")[0]
        return f"{text}; there is {elsewhere}, name its schema in the URL: options=-csearch_path%3D{schema}"
    return f"{text}; if the platform keeps no modules in PostgreSQL, set BIFROST_MODULE_SOURCE=none"
