"""The command line: arguments in, result on stdout, everything else on stderr, an exit code of the contract."""

from __future__ import annotations

import io
import logging
import os
import signal
import sys
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

import click

from bifrost_bootstrap import __version__, logs, report, settings as environment
from bifrost_bootstrap.deadline import Deadline
from bifrost_bootstrap.errors import BootstrapError, ExitCode, InternalError, SettingsError, UnavailableError, masked
from bifrost_bootstrap.settings import Need, Settings, duration

if TYPE_CHECKING:
    from bifrost_bootstrap.init import Wanted

logger = logging.getLogger("bifrost_bootstrap")

#: Seconds in which a signal must have ended a command by itself.
SIGNAL_GRACE = 5.0

Outcome = tuple[ExitCode, str, dict[str, Any]]


class _Signalled(BaseException):
    """SIGTERM or SIGINT arrived. Argument: its exit code."""

    def __init__(self, code: ExitCode) -> None:
        super().__init__(code)
        self.code = code


def run(arguments: list[str]) -> int:
    """Run one command and return its exit code. Nothing else leaves: usage is 64, a bug is 70."""
    telling = environment.load_telling()
    logs.configure(telling.log_format, telling.log_level)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors=report.UNPRINTABLE)
    _raise_on_signals()
    stdout = sys.stdout
    try:
        return int(main.main(arguments, prog_name="bifrost-bootstrap", standalone_mode=False) or 0)
    except click.exceptions.Exit as leaving:
        return leaving.exit_code
    except click.ClickException as error:
        error.show(sys.stderr)
        return int(ExitCode.USAGE)
    except _Signalled as signalled:
        return int(signalled.code)
    except (click.Abort, KeyboardInterrupt):
        return int(ExitCode.SIGINT)
    except SystemExit as leaving:
        if sys.stdout is not stdout:
            # click's way out of a help text that nobody reads: it wraps stdout and leaves with 1.
            sys.stdout = stdout
            _print_no_more()
            return int(ExitCode.OK)
        # Only a worker that cannot begin leaves so, with a code of the contract.
        return leaving.code if isinstance(leaving.code, int) and leaving.code in set(ExitCode) else int(ExitCode.BUG)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def _raise_on_signals() -> None:
    def on_signal(number: int, _frame: FrameType | None) -> None:
        # A second one must not interrupt the clean-up of the first.
        for one in (signal.SIGTERM, signal.SIGINT):
            signal.signal(one, signal.SIG_IGN)
        code = ExitCode.SIGTERM if number == signal.SIGTERM else ExitCode.SIGINT
        # Python swallows what is raised in a destructor or a callback of a library: end all the same.
        signal.signal(signal.SIGALRM, lambda *_: os._exit(code))
        signal.setitimer(signal.ITIMER_REAL, SIGNAL_GRACE)
        raise _Signalled(code)

    signal.signal(signal.SIGTERM, on_signal)
    signal.signal(signal.SIGINT, on_signal)


class DurationType(click.ParamType[float]):
    """`90s`, `5m`; seconds."""

    name = "duration"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        try:
            return duration(value)
        except ValueError as error:
            self.fail(f"{value!r} {error}", param, ctx)


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="bifrost-bootstrap")
def main() -> None:
    """Bring a Bifrost deployment into a state in which it may start: schema at head, module cache complete."""


_json_option = click.option("--json", "as_json", is_flag=True, help="Print exactly one JSON object on stdout.")
_timeout_option = click.option(
    "--timeout",
    type=DurationType(),
    help="Deadline of the whole, such as 90s or 5m.  [default: BIFROST_INIT_TIMEOUT, 10m]",
)
_allow_shrink_option = click.option(
    "--allow-shrink", is_flag=True, help="Warm even if it removes more than half of the cache."
)


@main.command()
@_timeout_option
@click.option("--with-worker", is_flag=True, help="Bring a bootstrap worker along for as long as init runs.")
@click.option("--embedded", is_flag=True, help="Run on private throw-away servers; every URL is ignored.")
@_allow_shrink_option
@_json_option
def init(timeout: float | None, with_worker: bool, embedded: bool, allow_shrink: bool, as_json: bool) -> int:
    """Migrate, warm the module cache, and exit 0 only when both are true."""

    def work(stack: ExitStack) -> Outcome:
        if embedded:
            _start_embedded(stack)
        from bifrost_bootstrap.init import Wanted

        settings = _load("database", "redis", "rabbitmq", "tree")
        return _init(settings, timeout, Wanted(allow_shrink=allow_shrink), with_worker=with_worker or embedded)

    return _command("init", as_json, work, on_signal="work that a bootstrap worker has begun goes on")


@main.command()
@_timeout_option
@click.option("--full", is_flag=True, help="Trust no hash: rewrite every entry.")
@_allow_shrink_option
@_json_option
def rewarm(timeout: float | None, full: bool, allow_shrink: bool, as_json: bool) -> int:
    """Warm the module cache again, through a bootstrap worker, and wait for it like init."""

    def work(_stack: ExitStack) -> Outcome:
        from bifrost_bootstrap.init import Wanted

        settings = _load("database", "redis", "rabbitmq", "tree")
        wanted = Wanted(migrate=False, full=full, allow_shrink=allow_shrink)
        return _init(settings, timeout, wanted, with_worker=False)

    return _command("rewarm", as_json, work, on_signal="a warm that a bootstrap worker has begun goes on")


@main.command()
@click.option("--wait", type=DurationType(), help="Wait up to this long until everything is ready.")
@_json_option
def check(wait: float | None, as_json: bool) -> int:
    """Say whether schema and cache are ready (0) or not (3). Changes nothing, needs no RabbitMQ."""

    def work(_stack: ExitStack) -> Outcome:
        settings = _load("database", "redis", "tree")
        from bifrost_bootstrap import readiness, tree

        found = readiness.wait_until_ready(settings, tree.load(settings), Deadline(wait or 0))
        code = ExitCode.OK if found.ready else ExitCode.NOT_READY
        return code, report.of_check(found), {**found.to_dict(), "message": found.missing() or "ready"}

    return _command("check", as_json, work)


@main.command()
def worker() -> int:
    """Run a bootstrap worker: it consumes the calls by hand and the chains of its own tree."""

    def work(_stack: ExitStack) -> Outcome:
        settings = _load("database", "redis", "rabbitmq", "tree")
        from bifrost_bootstrap import chain, waiting, worker

        # Celery itself would end with 0 where its login is refused, with 1 where a right is missing, and try a wrong
        # virtual host for ever.
        waiting.wait_for({chain.described(): chain.prove_rights}, Deadline(settings.init_timeout))
        for one in (signal.SIGTERM, signal.SIGINT):
            signal.signal(one, signal.SIG_DFL)
        # What Celery prints is no result.
        os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
        if code := worker.run(settings):
            raise UnavailableError(chain.described(), f"Celery's worker ended with {code}")
        return ExitCode.OK, "", {}

    return _command("worker", False, work)


@main.command()
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--yes", is_flag=True, help="Really write to that database.")
@_json_option
def load(folder: Path, yes: bool, as_json: bool) -> int:
    """For development: insert or update the .py files of FOLDER as modules. Never deletes."""

    def work(_stack: ExitStack) -> Outcome:
        settings = _load("database")
        from bifrost_bootstrap.load import load

        if not yes:
            raise SettingsError([f"load would write to {settings.database}; say --yes if that is meant"])
        result = load(settings.database, folder)
        return ExitCode.OK, report.of_load(result, str(settings.database)), result.to_dict()

    return _command("load", as_json, work)


def _init(settings: Settings, timeout: float | None, wanted: Wanted, *, with_worker: bool) -> Outcome:
    from bifrost_bootstrap.init import init

    deadline = Deadline(settings.init_timeout if timeout is None else timeout)
    done = init(settings, deadline, wanted, with_worker=with_worker)
    return ExitCode.OK, report.of_init(done), done.to_dict()


def _load(*needs: Need) -> Settings:
    settings = environment.load(needs)
    logs.configure(settings.log_format, settings.log_level)
    return settings


def _command(name: str, as_json: bool, work: Callable[[ExitStack], Outcome], on_signal: str = "") -> int:
    """Run the work of one command and tell its outcome: stdout, last line, termination message, exit code."""
    try:
        with ExitStack() as stack:
            code, text, facts = work(stack)
        message = facts.get("message") or text.splitlines()[0] if text else ""
    except BootstrapError as error:
        code, text, facts = error.exit_code, "", report.error_facts(error)
        message = f"{error}\n  what to do: {error.remedy}" if error.remedy else str(error)
    except _Signalled as signalled:
        code, text, facts = signalled.code, "", {"message": on_signal}
        message = f"ended by {code.name}{'; ' if on_signal else ''}{on_signal}"
    except Exception as error:
        bug = InternalError(masked(f"{type(error).__name__}: {error}"))
        code, text, facts = bug.exit_code, "", report.error_facts(bug)
        message = f"{bug}; {bug.remedy}"
        logger.exception("unexpected error")
    output = report.json_object(name, code, facts) if as_json else masked(text)
    try:
        if output:
            click.echo(output)
    except BrokenPipeError:
        _print_no_more()
    _tell_kubernetes(name, code, facts)
    level = logging.INFO if code is ExitCode.OK else logging.ERROR
    if message:
        logger.log(level, "%s: %s (exit %d)", name, message, code)
    return int(code)


def _print_no_more() -> None:
    """Whoever read our output has gone; the exit code is all that is left to say."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _tell_kubernetes(name: str, code: ExitCode, facts: dict[str, Any]) -> None:
    try:
        report.write_termination_message(environment.load_telling().termination_log, name, code, facts)
    except OSError as error:
        logger.debug("no termination message: %s", error)


def _start_embedded(stack: ExitStack) -> None:
    from bifrost_bootstrap.embedded import embedded_servers

    logger.info("starting embedded servers, gone with this command")
    servers = stack.enter_context(embedded_servers())
    ignored = environment.use_embedded_servers(servers.database_url, servers.redis_url)
    if ignored:
        logger.info("--embedded ignores %s", ", ".join(ignored))
