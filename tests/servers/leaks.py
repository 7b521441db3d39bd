"""The password that every private server wants, and the search for it in everything a run puts out or shows."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote

from tests.servers.process import MARK_VARIABLE

#: Both ends are words that nothing else contains; between them stand the characters that a URL must escape, so
#: that whoever forgets to quote, or masks only up to the first "@", is found by the first test with a server.
LEAK_MARKS = ("Qz4Zebra", "Qz4Yak")
PLANTED_PASSWORD = f"{LEAK_MARKS[0]}@:/?%{LEAK_MARKS[1]}"
PLANTED_PASSWORD_QUOTED = quote(PLANTED_PASSWORD, safe="")

#: Long enough that the search reads large logs in few steps.
_CHUNK_BYTES = 1 << 20


def leaks_in(text: str) -> bool:
    """Whether the text holds the planted password, or either end of it, in whatever encoding of the rest."""
    return any(mark in text for mark in LEAK_MARKS)


def leaks_below(folder: Path) -> Iterator[str]:
    """Name every file below the folder that holds the planted password, as "file (byte offset)".

    The text around it is not given: the report of a leak must not be one.
    """
    marks = [mark.encode() for mark in LEAK_MARKS]
    overlap = max(map(len, marks)) - 1
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        with path.open("rb") as file:
            tail, start = b"", 0
            while chunk := file.read(_CHUNK_BYTES):
                window = tail + chunk
                found = [at for mark in marks if (at := window.find(mark)) >= 0]
                if found:
                    yield f"{path} (byte {start - len(tail) + min(found)})"
                    break
                start += len(chunk)
                tail = window[-overlap:]


def leaks_in_processes(mark: str) -> Iterator[str]:
    """Name every process with the planted password in its arguments, where any user of the machine may read it.

    Only those whose own mark begins with this one: a run within the run, and somebody else's, may plant leaks of its
    own. Linux only.
    """
    marks, own = [word.encode() for word in LEAK_MARKS], f"{MARK_VARIABLE}={mark}".encode()
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            arguments = (folder / "cmdline").read_bytes()
            variables = (folder / "environ").read_bytes().split(b"\0")
            if any(word in arguments for word in marks) and any(one.startswith(own) for one in variables):
                yield f"the arguments of process {folder.name} ({os.fsdecode(arguments.partition(bytes(1))[0])})"
        except OSError:
            continue  # it has ended, or is not ours
