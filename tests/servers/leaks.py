"""The password of every private server, and the search for it in output and process lists."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote

from tests.servers.process import MARK_VARIABLE

#: The first and last word of the password; no other text contains them. Between them are the characters that a URL must
#: escape: code that forgets to quote, or that masks only up to the first "@", leaks one of the two words.
LEAK_MARKS = ("Qz4Zebra", "Qz4Yak")
PLANTED_PASSWORD = f"{LEAK_MARKS[0]}@:/?%{LEAK_MARKS[1]}"
PLANTED_PASSWORD_QUOTED = quote(PLANTED_PASSWORD, safe="")

#: How much of a file is searched at a time (bytes).
_CHUNK_BYTES = 1 << 20


def leaks_in(text: str) -> bool:
    """Whether the text contains the first or the last word of the planted password."""
    return any(mark in text for mark in LEAK_MARKS)


def leaks_below(folder: Path) -> Iterator[str]:
    """Yield "file (byte offset)" for every file below the folder that contains the planted password.

    The text around it is not returned: the report of a leak must not leak the password.
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
    """Yield every process of the run with the planted password in its arguments, which every user can read.

    `mark`: only processes whose MARK_VARIABLE begins with it. Another test run may leak the password on purpose (the
    tests of this function do). Linux only.
    """
    marks, own = [word.encode() for word in LEAK_MARKS], f"{MARK_VARIABLE}={mark}".encode()
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            arguments = (folder / "cmdline").read_bytes()
            variables = (folder / "environ").read_bytes().split(b"\0")
            if any(word in arguments for word in marks) and any(one.startswith(own) for one in variables):
                yield f"the arguments of process {folder.name} ({os.fsdecode(arguments.partition(bytes(1))[0])})"
        except OSError:
            continue  # the process has exited, or belongs to another user
