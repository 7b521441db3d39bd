"""Every error survives a JSON result, and has a text, a remedy and an exit code of the contract."""

from __future__ import annotations

import json
import re
from typing import Any

import amqp.exceptions
import billiard.exceptions
import celery.exceptions
import kombu.exceptions
import psycopg
import pytest
import redis
from celery import Celery
from celery.backends.base import Backend

from bifrost_bootstrap import errors, redaction
from bifrost_bootstrap.errors import BootstrapError, ExitCode, InternalError, rebuild
from bifrost_bootstrap.redaction import masked, remember_secret

#: A value for every fact of every error. Braces and percent signs must come through as they are.
FACTS: dict[str, Any] = {
    "faults": ["BIFROST_A {is} missing", "BIFROST_B 100 %s"],
    "applied": ["0001", "0002"],
    "seconds": 12.5,
    "attempts": 3,
    "removed": 30,
    "indexed": 50,
}


def subclasses(cls: type[BootstrapError]) -> list[type[BootstrapError]]:
    """The whole tree below a class."""
    return [below for child in cls.__subclasses__() for below in (child, *subclasses(child))]


def example(cls: type[BootstrapError]) -> BootstrapError:
    """An error of this class with a value for each of its facts."""
    return cls(*(FACTS.get(fact, f"the {{{fact}}} ‘x’ 100 %s") for fact in cls.facts))


ALL = sorted(subclasses(BootstrapError), key=lambda cls: cls.__name__)
every_error = pytest.mark.parametrize("cls", ALL, ids=lambda cls: cls.__name__)


def through_celery(error: BaseException) -> tuple[str, list[Any]]:
    """Class name and arguments after the way through a JSON result: what init reads in Redis."""
    backend = Backend(app=Celery(set_as_current=False), serializer="json")
    stored = json.loads(json.dumps(json.loads(backend.encode(backend.prepare_exception(error, "json")))))
    return stored["exc_type"], stored["exc_message"]


@every_error
def test_error_survives_celerys_result(cls: type[BootstrapError]) -> None:
    """The error is equal after Celery's JSON result."""
    error = example(cls)
    again = rebuild(*through_celery(error))
    assert type(again) is cls
    assert again.args == error.args
    assert (str(again), again.remedy, again.exit_code) == (str(error), error.remedy, error.exit_code)


@every_error
def test_error_survives_celerys_own_way_back(cls: type[BootstrapError]) -> None:
    """`celery result` creates the same error."""
    backend = Backend(app=Celery(set_as_current=False), serializer="json")
    again = backend.exception_to_python(backend.prepare_exception(example(cls), "json"))
    assert type(again) is cls
    assert str(again) == str(example(cls))


@every_error
def test_error_has_text_remedy_and_code(cls: type[BootstrapError]) -> None:
    """Every fact is in the text or the remedy, no placeholder is left, and the code is one of the contract."""
    error = example(cls)
    spoken = f"{error} {error.remedy}"
    assert str(error)
    assert error.exit_code in ExitCode
    assert error.exit_code not in (ExitCode.OK, ExitCode.NOT_READY, ExitCode.SIGINT, ExitCode.SIGTERM)
    for fact in set(cls.facts) - {"verdict", "seconds"}:
        value = FACTS.get(fact, f"the {{{fact}}} ‘x’ 100 %s")
        for part in value if isinstance(value, list) else [value]:
            assert str(part) in spoken
    if cls is not errors.SettingsError:
        assert error.remedy


@every_error
def test_error_stands_in_the_drawing(cls: type[BootstrapError]) -> None:
    """The tree drawn at the top of the module has every class with its exit code, and nothing else."""
    assert re.search(rf"\b{cls.__name__} +{cls.exit_code:d} ", errors.__doc__ or "")
    assert len(re.findall(r"\w+Error +\d", errors.__doc__ or "")) == len(ALL)


@every_error
def test_wrong_number_of_facts_is_refused(cls: type[BootstrapError]) -> None:
    """An error that lacks a fact cannot be made, so none loses one on its way."""
    with pytest.raises(TypeError, match=", ".join(cls.facts)):
        cls(*example(cls).args, "one more")


def test_exit_codes_are_those_of_the_contract() -> None:
    """The exit codes have the numbers that operators use in their manifests."""
    assert {code.name: int(code) for code in ExitCode} == {
        "OK": 0,
        "MIGRATION": 1,
        "WARM": 2,
        "NOT_READY": 3,
        "USAGE": 64,
        "UNAVAILABLE": 69,
        "BUG": 70,
        "BUSY": 75,
        "CONFIGURATION": 78,
        "DEADLINE": 124,
        "SIGINT": 130,
        "SIGTERM": 143,
    }


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("WorkerLostError", ["exited with 9"]),
        ("ExitCode", [1]),
        ("rebuild", ["x", []]),
        ("BusyError", ["only one fact"]),
        ("", []),
    ],
)
def test_what_is_not_ours_becomes_an_internal_error(name: str, arguments: list[Any]) -> None:
    """A foreign class, another module and a wrong number of facts each become an InternalError with the stored text."""
    error = rebuild(name, arguments)
    assert type(error) is InternalError
    assert name in str(error)
    assert all(str(argument) in str(error) for argument in arguments)


def test_given_up_by_step() -> None:
    """A lost migrate ends in 1, a lost warm in 2."""
    assert errors.MigrateGivenUpError(3, "x").exit_code is ExitCode.MIGRATION
    assert errors.WarmGivenUpError(3, "x").exit_code is ExitCode.WARM


def test_migration_error_tells_what_failed_where_and_what_stays() -> None:
    """Revision, title, the database's words, hint, statement and what was applied before are all told."""
    error = errors.MigrationError("0003", "Add it", "ALTER x", "no such x", "make x", ["0001", "0002"])
    assert str(error).splitlines() == [
        "revision 0003 (Add it) failed: no such x",
        "  hint: make x",
        "  statement: ALTER x",
        "  applied before it: 0001, 0002",
    ]
    short = errors.MigrationError("", "", "", "no such module", "", [])
    assert str(short).splitlines() == ["the tree failed: no such module", "  applied before it: none"]


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("postgresql://u:hidden@h/d", "postgresql://u:***@h/d"),
        ("redis://:hidden@h/0 and amqp://u:hidden@h//", "redis://:***@h/0 and amqp://u:***@h//"),
        ("'postgresql+asyncpg://u:hid:den/%2F@h'", "'postgresql+asyncpg://u:***@h'"),
        ("http://host:8080/path is no secret", "http://host:8080/path is no secret"),
        ("postgresql://u@h/d", "postgresql://u@h/d"),
        ("time 10:20 me@home", "time 10:20 me@home"),
    ],
)
def test_passwords_in_urls_are_masked(text: str, shown: str) -> None:
    """The password of any URL is masked, also of one that nobody remembered; nothing else is touched."""
    assert masked(text) == shown


def test_remembered_secrets_are_masked_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """A remembered secret is masked anywhere, the longer of two that overlap first, also with an @ in a URL."""
    monkeypatch.setattr(redaction, "_secrets", set())
    monkeypatch.setattr(redaction, "_parts", set())
    for secret in ("abc", "abcdef", "p@ss/wörd"):
        remember_secret(secret)
    assert masked("xabcdefx xabcx") == "x***x x***x"
    assert masked("redis://u:p@ss/wörd@h/0") == "redis://u:***@h/0"


def test_tiny_secret_does_not_blot_out_words(monkeypatch: pytest.MonkeyPatch) -> None:
    """A password of one or two characters is masked in URLs only."""
    monkeypatch.setattr(redaction, "_secrets", set())
    monkeypatch.setattr(redaction, "_parts", set())
    remember_secret("a")
    remember_secret("")
    assert masked("a banana at redis://:a@h") == "a banana at redis://:***@h"


@pytest.mark.parametrize(
    "error",
    [
        psycopg.errors.UndefinedFunction("no such function"),
        psycopg.ProgrammingError("the connection is closed"),
        redis.exceptions.InvalidResponse("what is that"),
        redis.exceptions.DataError("no"),
        amqp.exceptions.FrameSyntaxError("frame"),
        amqp.exceptions.NotAllowed("limit"),
        kombu.exceptions.DecodeError("json"),
        kombu.exceptions.OperationalError("gone"),
        celery.exceptions.BackendStoreError("result"),
        billiard.exceptions.WorkerLostError("signal 9"),
        ConnectionResetError("reset"),
        TimeoutError("timed out"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_answer_of_a_server_is_no_bug(error: Exception) -> None:
    """An exception of a client library that is not translated is 69 with its text."""
    told = errors.unexpected(error, f"{type(error).__name__}: {error}")
    assert told.exit_code is ExitCode.UNAVAILABLE
    assert str(error) in str(told)


@pytest.mark.parametrize("error", [KeyError("x"), TypeError("x"), AssertionError("x")])
def test_bug_is_a_bug(error: Exception) -> None:
    """An exception of our own code is not reported as the error of a server."""
    assert errors.unexpected(error, str(error)).exit_code is ExitCode.BUG


@pytest.mark.parametrize(
    ("name", "module", "error"),
    [
        ("NotAllowed", "amqp.exceptions", errors.UnavailableError),
        ("OperationalError", "kombu.exceptions", errors.UnavailableError),
        ("TimeLimitExceeded", "billiard.exceptions", errors.TimeLimitError),
        ("KeyError", "builtins", InternalError),
        ("NotAllowed", "", InternalError),
    ],
)
def test_stored_failure_of_a_library_is_no_bug(name: str, module: str, error: type[BootstrapError]) -> None:
    """A library's exception that a worker stored as a result is reported as the error of a server."""
    told = rebuild(name, ["the words"], module)
    assert type(told) is error
    assert "the words" in str(told) or error is errors.TimeLimitError
