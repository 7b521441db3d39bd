"""
Every error of this program, with the exit code it ends in.

    BootstrapError
    ├── UsageError                64  a command was not told what it needs
    ├── SettingsError             78  a setting is missing or malformed; all faults at once
    ├── RefusedError              78  a server rejected the connection: password, database, rights
    │   ├── DeclaredOtherwiseError 78 RabbitMQ has a queue of ours that was declared with other arguments
    │   └── CertificateError      78  we refuse a server: its certificate is not what it should be
    ├── WrongDatabaseError        78  env.py migrates another database than the one that is locked
    ├── TreeError                 78  the tree fails before its first revision: a setting of its own, an import
    ├── VersionTableError         78  the tree keeps its version in another table than we look at
    ├── PoolTooSmallError         78  a pooler gives one connection, a migration needs two
    ├── UnavailableError          69  a server was not there in time
    │   └── OwnProcessError       69  a process that we have started ended, or did not start
    ├── NoWorkerError             69  no bootstrap worker consumes the queue of this tree
    ├── BusyError                 75  another holder of the migration lock, or DDL could not get its lock
    ├── DeadlineError            124  our work was queued or running when the deadline passed
    │   └── OwnWorkerDeadlineError 124 the same, in a worker that `--with-worker` brought, which ends with its init
    ├── UnwantedError            124  a chain was not begun, since its init had gone (seen in a worker's log only)
    ├── SchemaError                1  the schema cannot be brought to this image's head
    ├── MigrationError             1  a revision failed
    ├── WarmError                  2  the cache could not be warmed
    │   ├── StagedLostError        2  what was staged was gone before the switch; init has it tried again
    │   └── UnsettledError         2  rows or entries changed faster than they could be compared
    ├── ShrinkError                2  a warm would remove most of the cache
    ├── MigrateGivenUpError        1  the migrate was lost with its worker every time
    │   └── WarmGivenUpError       2  the warm was
    ├── TimeLimitError            78  a time limit of the worker ended a task
    └── InternalError             70  a bug in this program

An error crosses Celery's JSON result as class name and `args`, so its facts are its positional arguments and
its texts are built from them; `rebuild` turns a stored failure back into the same class.
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
    Base of the tree. `str()` says what failed and where, `remedy` what to do about it.

    A class names its facts, in the order of its arguments; each is an attribute, and a word in its texts.
    """

    exit_code: ClassVar[ExitCode] = ExitCode.BUG
    facts: ClassVar[tuple[str, ...]] = ()
    text: ClassVar[str] = ""
    advice: ClassVar[str] = ""

    def __init__(self, *values: Any) -> None:
        if len(values) != len(self.facts):
            raise TypeError(f"{type(self).__name__} takes {', '.join(self.facts)}")
        super().__init__(*values)
        vars(self).update(zip(self.facts, values, strict=True))

    def __str__(self) -> str:
        return self.text.format(**vars(self))

    @property
    def remedy(self) -> str:
        """What the operator does next; empty where the message already says it."""
        return self.advice.format(**vars(self))


class UsageError(BootstrapError):
    """The command line says too little. todo: what to say."""

    exit_code = ExitCode.USAGE
    facts = ("what", "todo")
    text = "{what}"
    advice = "{todo}"


class SettingsError(BootstrapError):
    """One or more settings are missing or malformed. faults: texts, each naming its variable."""

    exit_code = ExitCode.CONFIGURATION
    facts = ("faults",)
    faults: Sequence[str]

    def __str__(self) -> str:
        return "configuration: " + "; ".join(self.faults)


class RefusedError(BootstrapError):
    """A server answers and rejects us. reason: its own words."""

    exit_code = ExitCode.CONFIGURATION
    facts = ("server", "reason")
    text = "{server} rejected the connection: {reason}"
    advice = "check user, password, database name and rights in the server's URL"


class DeclaredOtherwiseError(RefusedError):
    """RabbitMQ has something of ours under its name with other arguments, as another release declared it."""

    advice = "delete what it names (a queue: `rabbitmqctl delete_queue -p VHOST NAME`); it is declared again at once"


#: The reason of a CertificateError where the URL names a CA, certificate or key that is not there.
NO_TLS_FILE = "a file that the URL names for TLS is not there"


class CertificateError(RefusedError):
    """A server's certificate is of an unknown CA, of another host, or expired. Waiting does not help."""

    text = "TLS certificate of {server} was rejected: {reason}"
    advice = (
        "name the CA of its certificate in the server's URL (sslrootcert for PostgreSQL, ssl_ca_certs for Redis and "
        "RabbitMQ), and the host as the certificate names it"
    )


class WrongDatabaseError(BootstrapError):
    """The tree's env.py migrates another database than the one we locked; both are named."""

    exit_code = ExitCode.CONFIGURATION
    facts = ("locked", "migrated")
    text = "env.py of the tree would migrate {migrated}, but we are to migrate {locked}"
    advice = "let env.py read BIFROST_DATABASE_URL or DATABASE_URL, or correct BIFROST_MIGRATION_DATABASE_URL"


class TreeError(BootstrapError):
    """The tree failed before its first revision began. reason: what it raised, and where."""

    exit_code = ExitCode.CONFIGURATION
    facts = ("reason",)
    text = "the tree failed before its first revision: {reason}"
    advice = (
        "give this container the settings and packages that env.py of the tree needs (its interpreter is "
        "BIFROST_ALEMBIC_PYTHON), then run init again"
    )


class VersionTableError(BootstrapError):
    """The version table that we read is not the one that the tree writes."""

    exit_code = ExitCode.CONFIGURATION
    facts = ("read", "written")
    text = "the tree keeps its version in table {written}, but we read {read}"
    advice = "set BIFROST_ALEMBIC_VERSION_TABLE={written}"


class PoolTooSmallError(BootstrapError):
    """The migration lock holds the pooler's only connection. seconds: waited for a second one."""

    exit_code = ExitCode.CONFIGURATION
    facts = ("server", "seconds")
    text = (
        "{server} answers on one connection but gave no second one within {seconds:.0f}s: "
        "a pooler with a pool of one connection"
    )
    advice = "raise the pool size to 2 or more, or set BIFROST_MIGRATION_DATABASE_URL to the server itself"


class UnavailableError(BootstrapError):
    """A server did not answer in time."""

    exit_code = ExitCode.UNAVAILABLE
    facts = ("server", "reason")
    text = "{server} is not available: {reason}"
    advice = "start the server or correct its URL, then run it again"


class OwnProcessError(UnavailableError):
    """A process that we have started did not do its work. server: which. reason: what became of it."""

    text = "{server}: {reason}"
    advice = "look at the log above this line and at the memory limit, then run it again"


class NoWorkerError(BootstrapError):
    """Nobody consumes the queue."""

    exit_code = ExitCode.UNAVAILABLE
    facts = ("queue",)
    text = "no bootstrap worker of this tree and database consumes the queue {queue}"
    advice = "start one from this image with `bifrost-bootstrap worker`, or run `init --with-worker`"


class BusyError(BootstrapError):
    """Somebody else was in the way until the deadline. what: we waited for. who: has it."""

    exit_code = ExitCode.BUSY
    facts = ("what", "who")
    text = "timed out waiting for {what}; held by {who}"
    advice = "let it finish or end that session, then run init again"


class DeadlineError(BootstrapError):
    """Our work was queued or running when the deadline passed. what: was going on."""

    exit_code = ExitCode.DEADLINE
    facts = ("what", "seconds")
    text = "the deadline of {seconds:.0f}s passed while: {what}; work already running goes on"
    advice = "run init again, it waits for the work that goes on; raise --timeout if migrations take longer"


class OwnWorkerDeadlineError(DeadlineError):
    """The deadline passed while a worker of our own had the work: it ends with its init, and nothing goes on."""

    text = "the deadline of {seconds:.0f}s passed while: {what}; a revision that was running is cancelled"
    advice = "raise --timeout above what the longest revision takes, or run init beside a standing bootstrap worker"


class UnwantedError(BootstrapError):
    """A chain was not begun since the init that enqueued it has gone. task: the id of its first task."""

    exit_code = ExitCode.DEADLINE
    facts = ("task",)
    text = "chain {task} is not begun: no init waits for it any more"
    advice = "nothing; an init that is started again sends its own"


class SchemaError(BootstrapError):
    """The schema cannot be brought to this image's head. todo: what the operator does."""

    exit_code = ExitCode.MIGRATION
    facts = ("verdict", "why", "todo")
    verdict: str
    text = "schema: {why}"
    advice = "{todo}"


class MigrationError(BootstrapError):
    """
    A revision failed.

    revision: "" when none had begun. message, hint: the server's own words. applied: the revisions that this
    run applied before it and that stay applied.
    """

    exit_code = ExitCode.MIGRATION
    facts = ("revision", "title", "statement", "message", "hint", "applied")
    advice = "fix the revision and deploy again; what is applied stays and is not run twice"
    revision: str
    title: str
    statement: str
    message: str
    hint: str
    applied: Sequence[str]

    def __str__(self) -> str:
        lines = [f"revision {self.revision} ({self.title}) failed" if self.revision else "the tree failed"]
        lines[0] += f": {self.message}"
        lines += [f"hint: {self.hint}"] if self.hint else []
        lines += [f"statement: {self.statement}"] if self.statement else []
        lines.append("applied before it: " + (", ".join(self.applied) or "none"))
        return "\n  ".join(lines)


class WarmError(BootstrapError):
    """The cache could not be warmed; what was switched before stands, also by earlier passes of the same warm."""

    exit_code = ExitCode.WARM
    facts: ClassVar[tuple[str, ...]] = ("reason",)
    text = "warming failed, the module cache stands as it was last switched: {reason}"
    advice = "fix the cause, then run init again"


class StagedLostError(WarmError):
    """Staged entries were gone before the switch: Redis was restarted or flushed meanwhile, or evicts."""


class UnsettledError(WarmError):
    """Every pass of a warm found another difference. What the passes before the last one switched stands."""

    facts = ("passes", "difference")
    text = "the module cache did not settle: rows or entries kept changing during {passes} passes; last: {difference}"
    advice = "run init again; if it ends so again, find who writes modules without pause"


class ShrinkError(BootstrapError):
    """A warm would remove most of the cache. removed, indexed: entries."""

    exit_code = ExitCode.WARM
    facts = ("removed", "indexed", "database")
    text = "warming from {database} would remove {removed} of {indexed} entries, and has removed none of them"
    advice = "check BIFROST_DATABASE_URL and BIFROST_REDIS_URL; if it is meant, say --allow-shrink"


class MigrateGivenUpError(BootstrapError):
    """The migrate was lost every time it was tried."""

    exit_code = ExitCode.MIGRATION
    facts = ("attempts", "reason")
    text = "migrate was given up after {attempts} attempts: {reason}"
    advice = "look at the bootstrap worker's log and its memory limit; nothing has to be cleaned up"


class WarmGivenUpError(MigrateGivenUpError):
    """The warm was lost every time it was tried, or its effect was gone each time."""

    exit_code = ExitCode.WARM
    text = "warm was given up after {attempts} attempts: {reason}"


class TimeLimitError(BootstrapError):
    """A worker was started with a time limit of its own, which a task ran into. limit: its option and setting."""

    exit_code = ExitCode.CONFIGURATION
    facts = ("limit",)
    text = "a time limit of the worker ended the task: {limit}"
    advice = "start the worker without one: the deadline of init bounds what waits, and a migration takes its time"


class InternalError(BootstrapError):
    """A bug in this program. what: was raised."""

    exit_code = ExitCode.BUG
    facts = ("what",)
    text = "unexpected error: {what}"
    advice = "this is a bug in bifrost_bootstrap: report it with the log"


#: Libraries whose exceptions tell what a server answered, or that a line broke; none of them is a bug of ours.
_SERVER_LIBRARIES = ("amqp", "billiard", "celery", "kombu", "psycopg", "redis")


def tells_of_server(module: str) -> bool:
    """Whether exceptions of this module are a server's answer or a broken line."""
    return module.partition(".")[0] in _SERVER_LIBRARIES


def unexpected(error: BaseException, words: str) -> BootstrapError:
    """What an exception that nobody translated ends in. words: class and message, without secrets."""
    if tells_of_server(type(error).__module__) or isinstance(error, ConnectionError | TimeoutError):
        return UnavailableError("a server", words)
    return InternalError(words)


def rebuild(name: str, args: Sequence[Any], module: str = "") -> BootstrapError:
    """
    The error of class `name` with these facts.

    Where it is not one of ours, what an exception of that module ends in (see `unexpected`), naming class and facts.
    """
    cls = globals().get(name)
    if isinstance(cls, type) and issubclass(cls, BootstrapError) and len(args) == len(cls.facts):
        return cls(*args)
    if name == "TimeLimitExceeded":
        # Stored by the worker's main process, which has killed the one of the task.
        return TimeLimitError("--time-limit or task_time_limit")
    words = f"{name}: {', '.join(map(str, args))}"
    return UnavailableError("a server", words) if tells_of_server(module) else InternalError(words)
