"""What the parent needs to know of an exception, whichever driver raised it."""

from __future__ import annotations

import sysconfig
import traceback
from pathlib import Path
from typing import Any

from .events import Refused

#: Characters of a statement that a report needs.
STATEMENT_LENGTH = 2000


def describe_error(error: BaseException) -> dict[str, Any]:
    """The facts of the event `error`: its kind, and what the server, the driver or the tree's code said."""
    reason: BaseException | None = error
    while reason is not None:
        if isinstance(reason, Refused):
            return {"kind": reason.kind, **reason.facts}
        reason = reason.__context__
    original = getattr(error, "orig", None) or error
    cause = original.__cause__ or original
    diag = getattr(original, "diag", None)
    message = getattr(diag, "message_primary", None) or getattr(cause, "message", None) or str(original)
    detail = getattr(diag, "message_detail", None) or getattr(cause, "detail", None)
    sqlstate = getattr(original, "sqlstate", None) or getattr(original, "pgcode", None) or ""
    place = find_tree_frame(error)
    if not sqlstate and not type(original).__module__.startswith(("alembic.", "asyncpg.", "psycopg")):
        message = summarize(original) + (f" ({place})" if place else "")
    # Alembic's own errors are about how the revisions fit together.
    is_alembics = type(error).__module__.startswith("alembic.")
    return {
        "kind": "failed",
        "by_tree": bool(place) and not is_alembics and not isinstance(error, SyntaxError),
        "sqlstate": sqlstate,
        "disconnected": not sqlstate and bool(getattr(error, "connection_invalidated", False)),
        "unreachable": not sqlstate and may_be_unreachable(error),
        "message": f"{message} ({detail})" if detail else message or type(error).__name__,
        "hint": getattr(diag, "message_hint", None) or getattr(cause, "hint", None) or "",
        "statement": " ".join((getattr(error, "statement", None) or "").split())[:STATEMENT_LENGTH],
    }


def summarize(error: BaseException) -> str:
    """Class and message in one line; of pydantic's errors the fields, without their values."""
    try:
        faults = error.errors()  # type: ignore[attr-defined]
        text = "; ".join(f"{'.'.join(map(str, fault['loc']))}: {fault['msg']}" for fault in faults)
    except (AttributeError, KeyError, TypeError):
        text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def find_tree_frame(error: BaseException) -> str:
    """File and line of the last frame of the tree's own code; "" if none of it was running."""
    kinds = ("stdlib", "platstdlib", "purelib", "platlib")
    libraries = ("<", str(Path(__file__).parent), *(sysconfig.get_path(kind) for kind in kinds))
    frames = [f for f in traceback.extract_tb(error.__traceback__) if not f.filename.startswith(libraries)]
    return f"{frames[-1].filename}, line {frames[-1].lineno}" if frames else ""


def may_be_unreachable(error: BaseException) -> bool:
    """
    Whether the class of the error says that the server was not reached.

    It says so only before the first revision: a revision's calls of other services fail by the same classes. An OSError
    about a file has a file name.
    """
    from sqlalchemy.exc import InterfaceError, OperationalError

    if isinstance(error, OSError):
        return error.filename is None
    # A tuple: the tree's Python may be older than ours.
    return isinstance(error, (InterfaceError, OperationalError))
