"""The importer from the module cache, used by the demo and the tests."""

from __future__ import annotations

import hashlib
import importlib
import json
import subprocess
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path

import pytest
import redis

from bifrost_bootstrap.dev.embedded import EmbeddedServers, embedded_servers
from tests import virtual_import
from tests.virtual_import import INDEX, PREFIX, imports_from


@pytest.fixture(scope="module")
def servers() -> Iterator[EmbeddedServers]:
    """A private Redis."""
    with embedded_servers() as servers:
        yield servers


@pytest.fixture
def cache(servers: EmbeddedServers) -> Iterator[redis.Redis]:
    """An empty cache."""
    with redis.Redis.from_url(servers.redis_url) as client:
        client.flushdb()
        yield client


def put(cache: redis.Redis, path: str, content: str, changed: dict[str, str] | None = None) -> None:
    """Write an entry of the contract, or one with these fields changed, and index it."""
    entry = {"content": content, "path": path, "hash": hashlib.sha256(content.encode()).hexdigest()}
    entry |= changed or {}
    cache.set(PREFIX + path, json.dumps(entry))
    cache.sadd(INDEX, path)


def test_module_package_and_relative_import(cache: redis.Redis) -> None:
    """A package, modules in it and a module beside it are imported by path, with their keys as origins."""
    put(cache, "bifrost_demo/__init__.py", "")
    source = "from bifrost_demo_word import WORD\nfrom . import other\nSAID = WORD + other.ENDING\n"
    put(cache, "bifrost_demo/inner.py", source)
    put(cache, "bifrost_demo/other.py", "ENDING = '!'\nPLACE = __file__\n")
    put(cache, "bifrost_demo_word.py", "WORD = 'Grüße, 世界'\n")
    with imports_from(cache):
        inner = importlib.import_module("bifrost_demo.inner")
        assert inner.SAID == "Grüße, 世界!"
        assert inner.__spec__ is not None
        assert inner.__spec__.origin == "bifrost:module:bifrost_demo/inner.py"
        assert inner.other.PLACE == "bifrost_demo/other.py"
    assert not [name for name in sys.modules if name.startswith("bifrost_demo")]
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("bifrost_demo_word")


def test_cache_stands_before_the_file_system_but_not_before_the_standard_library(
    cache: redis.Redis, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A cached module wins over a file of its name; a cached `colorsys.py` does not replace Python's own."""
    (tmp_path / "bifrost_twice.py").write_text("PLACE = 'file'\n")
    monkeypatch.syspath_prepend(tmp_path)
    put(cache, "bifrost_twice.py", "PLACE = 'cache'\n")
    put(cache, "colorsys.py", "raise RuntimeError('not Python’s own')\n")
    monkeypatch.delitem(sys.modules, "colorsys", raising=False)
    with imports_from(cache):
        assert importlib.import_module("bifrost_twice").PLACE == "cache"
        importlib.import_module("colorsys")


def test_index_is_read_once_and_entries_on_import(cache: redis.Redis) -> None:
    """An entry changed after the index was read is seen, a path added after it is not."""
    put(cache, "bifrost_old.py", "AGE = 1\n")
    with imports_from(cache):
        put(cache, "bifrost_old.py", "AGE = 2\n")
        put(cache, "bifrost_new.py", "")
        assert importlib.import_module("bifrost_old").AGE == 2
        with pytest.raises(ModuleNotFoundError):
            importlib.import_module("bifrost_new")


def test_path_without_entry_is_refused(cache: redis.Redis) -> None:
    """The trap of a half-warm cache, a path in the index without its entry, is refused by name."""
    cache.sadd(INDEX, "bifrost_gone.py")
    with imports_from(cache), pytest.raises(ImportError, match=r"bifrost_gone\.py.*no entry"):
        importlib.import_module("bifrost_gone")


@pytest.mark.parametrize("changed", [{"hash": "0" * 64}, {"path": "other.py"}, {"ttl": "1"}])
def test_entry_that_breaks_the_contract_is_refused(cache: redis.Redis, changed: dict[str, str]) -> None:
    """A wrong hash, a wrong path and a field too many are each an ImportError."""
    put(cache, "bifrost_wrong.py", "", changed)
    with imports_from(cache), pytest.raises(ImportError, match=r"entry of 'bifrost_wrong\.py'"):
        importlib.import_module("bifrost_wrong")


def test_traceback_shows_the_source_line(cache: redis.Redis) -> None:
    """An error in a cached module is reported with its key and its source line."""
    put(cache, "bifrost_broken.py", "def fail():\n    raise RuntimeError('on purpose')  # the line\n")
    with imports_from(cache):
        module = importlib.import_module("bifrost_broken")
        with pytest.raises(RuntimeError) as caught:
            module.fail()
        shown = "".join(traceback.format_exception(caught.value))
    assert 'File "bifrost:module:bifrost_broken.py", line 2' in shown
    assert "# the line" in shown


def test_command_line_prints_the_origin(servers: EmbeddedServers, cache: redis.Redis) -> None:
    """`python tests/virtual_import.py URL MODULE` prints the key that the module came from."""
    put(cache, "bifrost_demo/__init__.py", "")
    command = [sys.executable, virtual_import.__file__, servers.redis_url, "bifrost_demo"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout == "bifrost:module:bifrost_demo/__init__.py\n"
