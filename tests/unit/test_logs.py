"""Logs: text and JSON lines on stderr, without a secret in either."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path

import pytest

from bifrost_bootstrap import logs, redaction
from bifrost_bootstrap.logs import JsonFormatter, TextFormatter
from bifrost_bootstrap.redaction import remember_secret


@pytest.fixture(autouse=True)
def kept_logging() -> Iterator[None]:
    """The logging of the test run comes back afterwards."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    levels = {name: logging.getLogger(name).level for name in ("kombu", "amqp", "sqlalchemy")}
    yield
    root.handlers[:] = handlers
    root.setLevel(level)
    logging.captureWarnings(capture=False)
    for name, before in levels.items():
        logging.getLogger(name).setLevel(before)


@pytest.fixture(autouse=True)
def secret(monkeypatch: pytest.MonkeyPatch) -> str:
    """A remembered password."""
    monkeypatch.setattr(redaction, "_secrets", set())
    monkeypatch.setattr(redaction, "_parts", set())
    remember_secret("hidden-word")
    return "hidden-word"


def record(message: str, *arguments: object, error: Exception | None = None, **extra: object) -> logging.LogRecord:
    """A log record as a logger would make it."""
    info = (type(error), error, error.__traceback__) if error else None
    return logging.getLogger("bifrost_bootstrap.x").makeRecord(
        "bifrost_bootstrap.x", logging.WARNING, __file__, 1, message, arguments, info, extra=extra or None
    )


def raised(message: str) -> Exception:
    """An exception with a traceback."""
    try:
        raise ValueError(message)
    except ValueError as error:
        return error


def test_text_line() -> None:
    """Time in UTC, level, message."""
    time, level, rest = TextFormatter().format(record("%d of %s", 3, "ten")).split(" ", 2)
    assert datetime.fromisoformat(time).tzname() == "UTC"
    assert (level, rest) == ("WARNING", "3 of ten")


def test_json_line() -> None:
    """One object on one line with time, level, logger, message and the facts that were passed."""
    line = JsonFormatter().format(record("two\nlines, Grüße", revision="0001", path=Path("/x")))
    assert "\n" not in line
    event = json.loads(line)
    assert datetime.fromisoformat(event.pop("time")).tzname() == "UTC"
    assert event == {
        "level": "warning",
        "logger": "bifrost_bootstrap.x",
        "message": "two\nlines, Grüße",
        "revision": "0001",
        "path": "/x",
    }


@pytest.mark.parametrize("formatter", [TextFormatter(), JsonFormatter()], ids=["text", "json"])
def test_secrets_are_masked_everywhere(formatter: logging.Formatter, secret: str) -> None:
    """Neither message, argument, fact nor traceback shows a secret; the rest of the line is there."""
    error = raised(f"login with {secret} failed")
    line = formatter.format(record(f"{secret} %s", f"redis://:{secret}@h/0", error=error, fact=secret))
    assert secret not in line
    assert "login with *** failed" in line
    assert "ValueError" in line
    if isinstance(formatter, JsonFormatter):
        assert json.loads(line)["fact"] == "***"


@pytest.mark.parametrize("password", ['pass"word', "pass\\word", "pass\tword", "pässword"])
def test_secret_that_json_escapes_is_masked_too(password: str) -> None:
    """A password with characters that JSON writes otherwise is masked in JSON as well, and the line stays JSON."""
    remember_secret(password)
    line = JsonFormatter().format(record("login with %s failed", password))
    assert json.loads(line)["message"] == "login with *** failed"
    assert json.dumps(password)[1:-1] not in line


def test_configure_sends_everything_to_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    """Every logger's lines go to stderr once, stdout stays empty, and warnings are log lines."""
    logs.configure("text", "INFO")
    logs.configure("json", "INFO")
    logging.getLogger("somebody.else").info("heard")
    logging.getLogger("somebody.else").debug("not heard")
    logging.getLogger("kombu.transport").info("not heard either")
    captured = capsys.readouterr()
    assert captured.out == ""
    assert [json.loads(line)["message"] for line in captured.err.splitlines()] == ["heard"]


def test_debug_shows_the_libraries_too(capsys: pytest.CaptureFixture[str]) -> None:
    """Who asks for DEBUG gets the lines of the libraries."""
    logs.configure("text", "DEBUG")
    logging.getLogger("kombu.transport").debug("heard")
    assert "heard" in capsys.readouterr().err
