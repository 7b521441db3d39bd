"""
Every error of this program, with its exit code.

    BootstrapError
    ├── UsageError                64  the command line lacks an option that the command needs
    ├── SettingsError             78  a setting is missing or malformed; all faults at once
    ├── RefusedError              78  a server rejected the connection: password, database, rights
    │   ├── DeclaredOtherwiseError 78 RabbitMQ has a queue of ours with other arguments
    │   └── CertificateError      78  the certificate of a server was rejected
    ├── WrongDatabaseError        78  env.py migrates another database than the locked one
    ├── TreeError                 78  the tree failed before its first revision: a setting of its own, an import
    ├── VersionTableError         78  the tree records its version in another table than we read
    ├── PoolTooSmallError         78  a pooler has one connection, a migration needs two
    ├── RehearsalError            78  no copy of the schema can be made for a rehearsal
    ├── UnavailableError          69  a server did not answer in time
    │   └── OwnProcessError       69  a child process ended, or did not start
    ├── NoWorkerError             69  no bootstrap worker consumes the queue of this tree
    ├── BusyError                 75  another holder of the migration lock, or DDL could not get its lock
    ├── DeadlineError            124  our work was queued or running when the deadline passed
    │   └── OwnWorkerDeadlineError 124 the same, in the worker of `--with-worker`, which ends with its init
    ├── UnwantedError            124  a chain was not started, because its init had ended (in a worker's log only)
    ├── SchemaError                1  the schema cannot be brought to this image's head
    ├── MigrationError             1  a revision failed
    ├── WarmError                  2  the cache could not be warmed
    │   ├── StagedLostError        2  staged entries were gone before the switch; init retries
    │   └── UnsettledError         2  rows or entries kept changing
    ├── ShrinkError                2  a warm would remove most of the cache
    ├── MigrateGivenUpError        1  migrate was lost with its worker every time
    │   └── WarmGivenUpError       2  warm was lost every time
    ├── TimeLimitError            78  a time limit of the worker ended a task
    └── InternalError             70  a bug in this program

An error crosses Celery's JSON result as its class name and `args`. So its facts are its positional arguments, its texts
are built from them, and `rebuild` makes the same error again. Class names and the order of facts are therefore fixed.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum
from typing import Any, ClassVar


class ExitCode(IntEnum):
    """The exit codes of the contract, each with its meaning; nothing else may end the program."""

    meaning: str

    def __new__(cls, value: int, meaning: str = "") -> ExitCode:
        code = int.__new__(cls, value)
        code._value_ = value
        code.meaning = meaning
        return code

    OK = 0, "schema at head, cache complete"
    MIGRATION = 1, "a migration failed, or the schema cannot be brought to this image's head"
    WARM = 2, "warming failed"
    NOT_READY = 3, "not ready, and the output says what is missing"
    USAGE = 64, "wrong usage"
    UNAVAILABLE = 69, "a server, or a bootstrap worker, was not there in time"
    BUG = 70, "a bug in this program"
    BUSY = 75, "busy until the deadline: the migration lock, or a table lock"
    CONFIGURATION = 78, "configuration"
    DEADLINE = 124, "the deadline passed while our work was queued or running"
    SIGINT = 130, "SIGINT"
    SIGTERM = 143, "SIGTERM"


class BootstrapError(Exception):
    """
    Base of the tree. `str()` says what failed and why, `remedy` what to do about it.

    The head of a class declares its exit code and its facts, in the order of its arguments; the default is those of its
    base. Each fact is an attribute, and a placeholder in `text` and `advice`.
    """

    exit_code: ClassVar[ExitCode] = ExitCode.BUG
    facts: ClassVar[tuple[str, ...]] = ()
    text: ClassVar[str] = ""
    advice: ClassVar[str] = ""

    def __init_subclass__(cls, code: ExitCode | None = None, facts: tuple[str, ...] = ()) -> None:
        super().__init_subclass__()
        cls.exit_code = code or cls.exit_code
        cls.facts = facts or cls.facts

    def __init__(self, *values: Any) -> None:
        if len(values) != len(self.facts):
            raise TypeError(f"{type(self).__name__} takes {', '.join(self.facts)}")
        super().__init__(*values)
        vars(self).update(zip(self.facts, values, strict=True))

    def __str__(self) -> str:
        return self.text.format(**vars(self))

    @property
    def remedy(self) -> str:
        """What the operator does next; "" if the message says it."""
        return self.advice.format(**vars(self))


class UsageError(BootstrapError, code=ExitCode.USAGE, facts=("what", "todo")):
    """The command line lacks something. todo: the option to add."""

    text = "{what}"
    advice = "{todo}"


class SettingsError(BootstrapError, code=ExitCode.CONFIGURATION, facts=("faults",)):
    """One or more settings are missing or not legal. faults: texts, each of which names its variable."""

    faults: Sequence[str]

    def __str__(self) -> str:
        return "configuration: " + "; ".join(self.faults)


class RefusedError(BootstrapError, code=ExitCode.CONFIGURATION, facts=("server", "reason")):
    """A server answers and rejects us. reason: its own words."""

    text = "{server} rejected the connection: {reason}"
    advice = "check user, password, database name and rights in the server's URL"


class DeclaredOtherwiseError(RefusedError):
    """RabbitMQ has a queue or exchange of ours, declared by another release with other arguments."""

    advice = "delete what it names (a queue: `rabbitmqctl delete_queue -p VHOST NAME`); it is declared again at once"


#: The reason of a CertificateError if the URL names a CA, certificate or key file that does not exist.
NO_TLS_FILE = "a file that the URL names for TLS is not there"


class CertificateError(RefusedError):
    """A server's certificate has an unknown CA or another host name, or is expired. Waiting does not help."""

    text = "TLS certificate of {server} was rejected: {reason}"
    advice = "correct the CA (sslrootcert for PostgreSQL, else ssl_ca_certs) or the host name in the server's URL"


class WrongDatabaseError(BootstrapError, code=ExitCode.CONFIGURATION, facts=("locked", "migrated")):
    """The tree's env.py migrates another database than the one that is locked."""

    text = "env.py of the tree would migrate {migrated}, but the migration lock is held in {locked}"
    advice = "let env.py read BIFROST_DATABASE_URL or DATABASE_URL, or correct BIFROST_MIGRATION_DATABASE_URL"


class TreeError(BootstrapError, code=ExitCode.CONFIGURATION, facts=("reason",)):
    """The tree failed before its first revision began. reason: what it raised, and where."""

    text = "the tree failed before its first revision: {reason}"
    advice = "give BIFROST_ALEMBIC_PYTHON the packages, and this container the settings, that the tree's env.py needs"


class VersionTableError(BootstrapError, code=ExitCode.CONFIGURATION, facts=("read", "written")):
    """The tree does not write the version table that we read."""

    text = "the tree records its version in table {written}, but we read {read}"
    advice = "set BIFROST_ALEMBIC_VERSION_TABLE={written}"


class PoolTooSmallError(BootstrapError, code=ExitCode.CONFIGURATION, facts=("server", "seconds")):
    """The migration lock has the pooler's only connection. seconds: how long we waited for a second one."""

    text = "{server} gave no second connection within {seconds:.0f}s: its pooler has a pool of one connection"
    advice = "raise the pool size to 2 or more, or set BIFROST_MIGRATION_DATABASE_URL to the server itself"


class RehearsalError(BootstrapError, code=ExitCode.CONFIGURATION, facts=("why", "todo")):
    """No copy of the schema can be made for a rehearsal. todo: what the operator does."""

    text = "no rehearsal: {why}"
    advice = "{todo}"


class UnavailableError(BootstrapError, code=ExitCode.UNAVAILABLE, facts=("server", "reason")):
    """A server did not answer in time."""

    text = "{server} is not available: {reason}"
    advice = "start the server or correct its URL, then run it again"


class OwnProcessError(UnavailableError):
    """A child process did not do its work. server: its name. reason: how it ended."""

    text = "{server}: {reason}"
    advice = "look at the log above this line and at the memory limit, then run it again"


class NoWorkerError(BootstrapError, code=ExitCode.UNAVAILABLE, facts=("queue",)):
    """No worker consumes the queue."""

    text = "no bootstrap worker of this tree and database consumes the queue {queue}"
    advice = "start one from this image with `bifrost-bootstrap worker`, or run `init --with-worker`"


class BusyError(BootstrapError, code=ExitCode.BUSY, facts=("what", "who")):
    """Another session blocked us until the deadline. what: we waited for. who: holds it."""

    text = "timed out waiting for {what}; held by {who}"
    advice = "let it finish or end that session, then run init again"


class DeadlineError(BootstrapError, code=ExitCode.DEADLINE, facts=("what", "seconds")):
    """Our work was queued or running when the deadline passed. what: the work. seconds: the whole deadline."""

    text = "the deadline of {seconds:.0f}s passed while: {what}; work already running goes on"
    advice = "run init again, it waits for the work that goes on; raise --timeout if migrations take longer"


class OwnWorkerDeadlineError(DeadlineError):
    """The deadline passed while the worker of `--with-worker` had the work. It ends with its init."""

    text = "the deadline of {seconds:.0f}s passed while: {what}; a revision that was running is cancelled"
    advice = "raise --timeout above what the longest revision takes, or run init beside a standing bootstrap worker"


class UnwantedError(BootstrapError, code=ExitCode.DEADLINE, facts=("task",)):
    """A chain was not started, because the init that enqueued it has ended. task: the id of its first task."""

    text = "chain {task} was not started: no init waits for it any more"
    advice = "nothing; an init that starts again enqueues its own chain"


class SchemaError(BootstrapError, code=ExitCode.MIGRATION, facts=("verdict", "why", "todo")):
    """The schema cannot be brought to this image's head. todo: what the operator does."""

    verdict: str
    text = "schema: {why}"
    advice = "{todo}"


class MigrationError(
    BootstrapError,
    code=ExitCode.MIGRATION,
    facts=("revision", "title", "statement", "message", "hint", "applied"),
):
    """
    A revision failed.

    revision: "" if none had begun. message, hint: the server's own words. applied: the revisions that this run applied
    before it; they stay applied.
    """

    advice = "fix the revision and deploy again; what is applied stays and is not run twice"

    def __str__(self) -> str:
        revision, title, statement, message, hint, applied = self.args
        what = f"revision {revision} ({title}) failed" if revision else "the tree failed"
        lines = [f"{what}: {message}"]
        if hint:
            lines.append(f"hint: {hint}")
        if statement:
            lines.append(f"statement: {statement}")
        lines.append("applied before it: " + (", ".join(applied) or "none"))
        return "\n  ".join(lines)


class WarmError(BootstrapError, code=ExitCode.WARM, facts=("reason",)):
    """The cache could not be warmed. It stands as the last switch left it, which may be one of the same warm."""

    text = "warming failed, the module cache stands as it was last switched: {reason}"
    advice = "fix the cause, then run init again"


class StagedLostError(WarmError):
    """Staged entries were gone before the switch: Redis was restarted, was flushed, or evicts."""


class UnsettledError(WarmError, facts=("passes", "difference")):
    """Every pass of a warm found another difference."""

    text = "the module cache did not settle: rows or entries kept changing during {passes} passes; last: {difference}"
    advice = "run init again; if it fails again, find who writes modules without pause"


class ShrinkError(BootstrapError, code=ExitCode.WARM, facts=("removed", "indexed", "database")):
    """A warm would remove most of the cache. removed, indexed: numbers of entries."""

    text = "warming from {database} would remove {removed} of {indexed} entries, and has removed none of them"
    advice = "check BIFROST_DATABASE_URL and BIFROST_REDIS_URL; if the removal is intended, add --allow-shrink"


class MigrateGivenUpError(BootstrapError, code=ExitCode.MIGRATION, facts=("attempts", "reason")):
    """Migrate was lost at every attempt."""

    text = "migrate was given up after {attempts} attempts: {reason}"
    advice = "look at the bootstrap worker's log and its memory limit; nothing has to be cleaned up"


class WarmGivenUpError(MigrateGivenUpError, code=ExitCode.WARM):
    """Warm was lost, or its effect was gone, at every attempt."""

    text = "warm was given up after {attempts} attempts: {reason}"


class TimeLimitError(BootstrapError, code=ExitCode.CONFIGURATION, facts=("limit",)):
    """A task ran into a time limit of its worker. limit: the option and the setting."""

    text = "a time limit of the worker ended the task: {limit}"
    advice = "start the worker without a time limit: the deadline of init bounds all waiting"


class InternalError(BootstrapError, code=ExitCode.BUG, facts=("what",)):
    """A bug in this program. what: the exception."""

    text = "unexpected error: {what}"
    advice = "this is a bug in bifrost_bootstrap: report it with the log"


#: Libraries whose exceptions are an answer of a server or a broken connection. None of them is a bug of ours.
_SERVER_LIBRARIES = ("amqp", "billiard", "celery", "kombu", "psycopg", "redis")


def unexpected(error: BaseException, words: str) -> BootstrapError:
    """The error for an exception that nothing has translated. words: its class and message, without secrets."""
    if isinstance(error, ConnectionError | TimeoutError):
        return UnavailableError("a server", words)
    return _untranslated(type(error).__module__, words)


def rebuild(name: str, args: Sequence[Any], module: str = "") -> BootstrapError:
    """
    The error of class `name` with these facts.

    If the class is not one of ours: the error for an exception of that module (see `unexpected`), with name and facts.
    """
    cls = globals().get(name)
    if isinstance(cls, type) and issubclass(cls, BootstrapError) and len(args) == len(cls.facts):
        return cls(*args)
    if name == "TimeLimitExceeded":
        # The main process of a worker stores this after it has killed the process of the task.
        return TimeLimitError("--time-limit or task_time_limit")
    return _untranslated(module, f"{name}: {', '.join(map(str, args))}")


def _untranslated(module: str, words: str) -> BootstrapError:
    if module.partition(".")[0] in _SERVER_LIBRARIES:
        return UnavailableError("a server", words)
    return InternalError(words)
