"""The program: one request in, events out, then the process ends."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
import traceback
from contextlib import suppress
from typing import Any, NoReturn

from .error_report import describe_error
from .events import Events, Refused

#: Bytes that a pipe holds; the parent has written the request before this process starts.
PIPE_BYTES = 65536
#: Seconds that a running statement gets to be cancelled when the parent has gone.
CANCEL_GRACE = 3.0


def main() -> NoReturn:
    """Answer the request, and end with 0 if that succeeded."""
    pipe = int(sys.argv[1])
    events = Events()
    code = 1
    try:
        os.set_inheritable(pipe, False)
        run_mode(json.loads(os.read(pipe, PIPE_BYTES)), pipe, events)
        code = 0
    except BaseException as error:
        traceback.print_exc()
        events.send("error", **describe_error(error))
    finally:
        with suppress(OSError, ValueError):
            sys.stderr.flush()
        # Not sys.exit: threads and exit handlers of the tree must not change what was reported.
        os._exit(code)


def run_mode(request: dict[str, Any], pipe: int, events: Events) -> None:
    """Run the mode of the request: "describe", "tables", "sql" or "upgrade"."""
    try:
        from . import tree_answers, upgrade
    except Exception as error:
        raise Refused("no_alembic", message=f"has no Alembic that can be imported: {error}") from error

    mode = request["mode"]
    config, script = tree_answers.load_tree(request["arguments"], as_sql=mode == "sql")
    if mode == "describe":
        events.send("tree", **tree_answers.describe_tree(script))
    elif mode == "tables":
        events.send("tables", tables=tree_answers.find_version_tables(config, script))
    elif mode == "sql":
        events.send("sql", sql=tree_answers.render_pending_sql(config, script, request["heads"]))
    else:
        exit_when_parent_exits(pipe)
        upgrade.Upgrade(request, script, events).run(config)
        events.send("done")


def exit_when_parent_exits(pipe: int) -> None:
    """
    End this process, and what it started, when the parent closes the pipe or dies.

    By SIGINT: asyncio and psycopg then cancel the running statement in the server, behind a pooler too. psycopg2
    ignores the signal, and leaves a statement outside a transaction to the next holder of the migration lock.
    """
    signal.signal(signal.SIGINT, signal.default_int_handler)

    def wait() -> None:
        while os.read(pipe, 4096):
            pass
        # The parent has given this process a process group of its own.
        os.killpg(0, signal.SIGINT)
        time.sleep(CANCEL_GRACE)
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()
