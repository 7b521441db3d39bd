"""
Imports Python modules from the module cache, by the same contract as the Bifrost workers.

The index is read once (`SMEMBERS`), an entry on each import (`GET`); the finder stands before that of the
file system. Where the platform's goes on to the next finder, this one refuses what breaks the contract: a
path in the index without an entry, or an entry that is not the module of its path.

    python tests/virtual_import.py redis://localhost:6379/0 package.module

prints the key that the module came from, or its file where it is not in the cache. Without the URL it is that
of BIFROST_REDIS_URL.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.abc import ExecutionLoader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

import redis

PREFIX = "bifrost:module:"
INDEX = "bifrost:module:index"


class CachedModule(ExecutionLoader):
    """Loader of one entry; tracebacks show its key as the file, and its source."""

    def __init__(self, path: str, content: str) -> None:
        self.path, self.content = path, content

    def get_filename(self, fullname: str) -> str:
        return PREFIX + self.path

    def get_source(self, fullname: str) -> str:
        return self.content

    def is_package(self, fullname: str) -> bool:
        return self.path.endswith("/__init__.py")

    def exec_module(self, module: ModuleType) -> None:
        module.__file__ = self.path
        super().exec_module(module)


class ModuleCacheFinder(MetaPathFinder):
    """
    Finder of modules by path: `a.b` is `a/b.py`, else `a/b/__init__.py`.

    `index` is as old as the finder. The standard library's names are left to Python. Raises ImportError where
    the cache breaks its contract.
    """

    def __init__(self, client: redis.Redis) -> None:
        self.client = client
        self.index = {path if isinstance(path, str) else path.decode() for path in client.smembers(INDEX)}

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname.partition(".")[0] in sys.stdlib_module_names:
            return None
        base = fullname.replace(".", "/")
        for candidate in (f"{base}.py", f"{base}/__init__.py"):
            if candidate in self.index:
                loader = CachedModule(candidate, self.read(candidate))
                origin = loader.get_filename(fullname)
                return ModuleSpec(fullname, loader, origin=origin, is_package=loader.is_package(fullname))
        return None

    def read(self, path: str) -> str:
        """Content of the module at this path."""
        entry = self.client.get(PREFIX + path)
        if entry is None:
            raise ImportError(f"{INDEX} names {path!r}, but there is no entry", path=path)
        fields = json.loads(entry)
        content = fields["content"]
        if list(fields) != ["content", "path", "hash"] or fields["path"] != path:
            raise ImportError(f"the entry of {path!r} is not one: {list(fields)}, {fields['path']!r}", path=path)
        if hashlib.sha256(content.encode()).hexdigest() != fields["hash"]:
            raise ImportError(f"the entry of {path!r} has the hash of another content", path=path)
        return str(content)


@contextmanager
def imports_from(client: redis.Redis) -> Iterator[ModuleCacheFinder]:
    """Import from this cache inside the context; afterwards its modules are forgotten."""
    finder = ModuleCacheFinder(client)
    sys.meta_path.insert(0, finder)
    try:
        yield finder
    finally:
        sys.meta_path.remove(finder)
        for name, module in list(sys.modules.items()):
            if isinstance(getattr(module, "__loader__", None), CachedModule):
                del sys.modules[name]


def main(redis_url: str, name: str) -> None:
    """Import the module and print where it came from."""
    with redis.Redis.from_url(redis_url) as client, imports_from(client):
        spec = importlib.import_module(name).__spec__
        print(spec.origin if spec else name)


if __name__ == "__main__":
    *url, module = sys.argv[1:]
    main(url[0] if url else os.environ["BIFROST_REDIS_URL"], module)
