"""The log of commands and worker: on stderr, as text or JSON lines, with all secrets masked."""

from __future__ import annotations

import json
import logging
import sys
from datetime import UTC, datetime
from typing import Any

from bifrost_bootstrap.redaction import masked

#: Attributes that every LogRecord has. The others are what a caller passed as `extra`.
_STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "data", "color_message"}


def _facts(record: logging.LogRecord) -> dict[str, object]:
    return {key: value for key, value in vars(record).items() if key not in _STANDARD and not key.startswith("_")}


def _time(record: logging.LogRecord) -> str:
    return datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


class TextFormatter(logging.Formatter):
    """`time level message`: one line per event, or more if the message has more."""

    def format(self, record: logging.LogRecord) -> str:
        text = f"{_time(record)} {record.levelname:<7} {record.getMessage()}"
        if record.exc_info:
            text += "\n" + self.formatException(record.exc_info)
        return masked(text)


class JsonFormatter(logging.Formatter):
    """One JSON object per line: time (UTC), level, logger, message, and what was passed as `extra`."""

    def format(self, record: logging.LogRecord) -> str:
        event = {
            "time": _time(record),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **_facts(record),
        }
        if record.exc_info:
            event["traceback"] = self.formatException(record.exc_info)
        return masked(json.dumps(event, default=str, ensure_ascii=False))


class _StderrHandler(logging.StreamHandler[Any]):
    """Writes to the current `sys.stderr`: a progress bar replaces it for a while."""

    def __init__(self) -> None:
        logging.Handler.__init__(self)

    @property
    def stream(self) -> Any:
        return sys.stderr


def configure(log_format: str, level: str) -> None:
    """Send all loggers of this process to stderr. `log_format`: "text" or "json". A second call replaces the first."""
    handler = _StderrHandler()
    handler.setFormatter(JsonFormatter() if log_format == "json" else TextFormatter())
    logging.basicConfig(handlers=[handler], level=level, force=True)
    logging.captureWarnings(capture=True)
    # Their INFO lines (SQL parameters, details of reconnects) are of no use to an operator.
    for name in ("kombu", "amqp", "sqlalchemy"):
        logging.getLogger(name).setLevel(logging.DEBUG if level == "DEBUG" else logging.WARNING)
