"""`load DIR` turns files into rows, repeatedly, and never deletes."""

from __future__ import annotations

from pathlib import Path

import pytest

from bifrost_bootstrap.dev.load import load
from bifrost_bootstrap.errors import SettingsError
from bifrost_bootstrap.settings import Settings
from tests.servers import Database


@pytest.fixture
def table(database: Database) -> Database:
    """A database with the table of the contract, as the platform creates it."""
    database.execute(
        "CREATE TABLE workspace_files (id uuid DEFAULT gen_random_uuid(), path varchar(1000) UNIQUE, content text,"
        " content_hash varchar(64), entity_type text, is_deleted bool NOT NULL DEFAULT false,"
        " size_bytes bigint DEFAULT 0, content_type text, updated_at timestamptz DEFAULT '2000-01-01')"
    )
    return database


def write(folder: Path, files: dict[str, bytes]) -> Path:
    """A folder of these files."""
    for path, content in files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(content)
    return folder


def rows(database: Database) -> list[tuple[object, ...]]:
    """What the table holds."""
    return database.execute("SELECT path, content, entity_type, is_deleted, size_bytes FROM workspace_files ORDER BY 1")


def test_files_become_modules(table: Database, tmp_path: Path) -> None:
    """Every .py file becomes a row with its path and hash. Other files, and folders named `*.py`, are ignored."""
    content = "# Grüße\r\n'''100 %s {}'''\n"
    folder = write(tmp_path, {"a/b.py": content.encode(), "a/__init__.py": b"", "a/notes.txt": b"x"})
    (folder / "folder.py").mkdir()
    result = load(Settings.model_validate({"database_url": table.url}), folder)
    assert result.written == 2
    assert rows(table) == [
        ("a/__init__.py", "", "module", False, 0),
        ("a/b.py", content, "module", False, len(content.encode())),
    ]
    wrong = "SELECT path FROM workspace_files WHERE content_hash <> encode(sha256(convert_to(content, 'UTF8')), 'hex')"
    assert table.execute(wrong) == []


def test_only_what_changed_is_written(table: Database, tmp_path: Path) -> None:
    """A second load writes nothing, a third one only the changed file. The row of a deleted file stays."""
    folder = write(tmp_path, {"a.py": b"1", "b.py": b"1"})
    settings = Settings.model_validate({"database_url": table.url})
    assert load(settings, folder).written == 2
    assert load(settings, folder).written == 0
    write(folder, {"a.py": b"2"})
    (folder / "b.py").unlink()
    assert load(settings, folder).written == 1
    assert [(row[0], row[1]) for row in rows(table)] == [("a.py", "2"), ("b.py", "1")]
    touched = table.execute("SELECT path FROM workspace_files WHERE updated_at > '2000-01-02'")
    assert touched == [("a.py",)]


def test_deleted_row_comes_back(table: Database, tmp_path: Path) -> None:
    """Loading its file makes a row a module again, if it is marked as deleted or has another type."""
    settings, folder = Settings.model_validate({"database_url": table.url}), write(tmp_path, {"a.py": b"1"})
    load(settings, folder)
    table.execute("UPDATE workspace_files SET is_deleted = true, entity_type = 'file'")
    assert load(settings, folder).written == 1
    assert rows(table) == [("a.py", "1", "module", False, 1)]


def test_files_that_a_row_cannot_hold_are_named(table: Database, tmp_path: Path) -> None:
    """Files with NUL bytes, another encoding or a longer path are skipped and named. The others are loaded."""
    long = "/".join(["d" * 200] * 5) + "/long.py"
    folder = write(tmp_path, {"good.py": b"", "nul.py": b"a\0b", "latin.py": b"\xe4 = 1", long: b""})
    result = load(Settings.model_validate({"database_url": table.url}), folder)
    assert (result.files, result.written) == (4, 1)
    assert {path for path, _ in result.skipped} == {"nul.py", "latin.py", long}
    assert all(reason for _, reason in result.skipped)


def test_name_that_is_no_text_is_named(table: Database, tmp_path: Path) -> None:
    """A file name that is not UTF-8 is skipped and named."""
    (tmp_path / "\udcff.py").write_bytes(b"")
    result = load(Settings.model_validate({"database_url": table.url}), write(tmp_path, {"good.py": b""}))
    assert result.written == 1
    assert [path for path, _ in result.skipped] == ["\udcff.py"]


def test_empty_folder(table: Database, tmp_path: Path) -> None:
    """An empty folder is a success."""
    result = load(Settings.model_validate({"database_url": table.url}), tmp_path)
    assert (result.files, result.written, result.skipped) == (0, 0, [])


def test_no_table_and_no_folder(database: Database, tmp_path: Path) -> None:
    """Without the table, the error says to run init first. Without the folder, it is a usage error."""
    with pytest.raises(SettingsError, match=r"neither table workspace_files nor file_index.*; run init first"):
        load(Settings.model_validate({"database_url": database.url}), write(tmp_path, {"a.py": b""}))
    with pytest.raises(SettingsError, match="gone is no folder"):
        load(Settings.model_validate({"database_url": database.url}), tmp_path / "gone")


def test_load_into_file_index(table: Database, tmp_path: Path) -> None:
    """In the newer table the rows are the same, and unchanged ones are not written again."""
    table.execute("DROP TABLE workspace_files")
    table.execute(
        "CREATE TABLE file_index (path varchar(1000) PRIMARY KEY, content text, content_hash varchar(64),"
        " updated_at timestamptz DEFAULT now(), updated_by varchar(255))"
    )
    settings = Settings.model_validate({"database_url": table.url})
    folder = write(tmp_path, {"a.py": b"1", "pkg/__init__.py": b""})
    assert load(settings, folder).written == 2
    assert load(settings, folder).written == 0
    assert table.execute("SELECT path, content FROM file_index ORDER BY path") == [
        ("a.py", "1"),
        ("pkg/__init__.py", ""),
    ]
