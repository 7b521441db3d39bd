"""Run a command line: signals, the output on stdout, the last log line, the termination message, the exit code."""

from __future__ import annotations

import io
import logging
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType

import click

from bifrost_bootstrap import settings as environment
from bifrost_bootstrap.cli import report
from bifrost_bootstrap.cli.report import Outcome
from bifrost_bootstrap.errors import BootstrapError, ExitCode, unexpected
from bifrost_bootstrap.redaction import masked

logger = logging.getLogger("bifrost_bootstrap")

#: Seconds after a signal in which the clean-up must have ended. Then the process ends without it.
SIGNAL_GRACE = 5.0


class Signalled(BaseException):
    """SIGTERM or SIGINT arrived. code: its exit code. note: for the last log line, see `signal_note`."""

    def __init__(self, code: ExitCode) -> None:
        super().__init__(code)
        self.code = code
        self.note = ""


@contextmanager
def signal_note(note: str) -> Iterator[None]:
    """If a signal ends the block, the last log line has this note."""
    try:
        yield
    except Signalled as signalled:
        signalled.note = note
        raise


def run_command_line(group: click.Group, arguments: list[str]) -> int:
    """Run one command of the group and return its exit code. Raises nothing: wrong usage is 64, a bug is 70."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors=report.UNPRINTABLE)
    _raise_on_signals()
    try:
        return _run_click(group, arguments)
    except Signalled as signalled:
        return int(signalled.code)
    except Exception:
        logger.exception("unexpected error")
        return int(ExitCode.BUG)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def _run_click(group: click.Group, arguments: list[str]) -> int:
    """Run the group, and give each of click's ways to end its exit code."""
    stdout = sys.stdout
    try:
        return int(group.main(arguments, prog_name="bifrost-bootstrap", standalone_mode=False))
    except click.ClickException as error:
        with suppress(OSError):
            error.show(sys.stderr)
        return int(ExitCode.USAGE)
    except OSError as error:
        # Only help and version are printed outside of `run_command`.
        _give_up_stdout(error)
        return int(ExitCode.OK)
    except SystemExit as leaving:
        if sys.stdout is not stdout:
            # The reader of a help text closed the pipe: click has wrapped stdout and leaves with 1.
            sys.stdout = stdout
            _give_up_stdout(BrokenPipeError())
            return int(ExitCode.OK)
        # A worker that cannot start leaves this way. A code outside the contract raises ValueError: a bug.
        return int(ExitCode(leaving.code))  # type: ignore[arg-type]


def _raise_on_signals() -> None:
    """Raise Signalled on the first SIGTERM or SIGINT. `SIGNAL_GRACE` seconds later the process ends in any case."""

    def on_signal(number: int, _frame: FrameType | None) -> None:
        # A second signal must not interrupt the clean-up.
        for one in (signal.SIGTERM, signal.SIGINT):
            signal.signal(one, signal.SIG_IGN)
        code = ExitCode.SIGTERM if number == signal.SIGTERM else ExitCode.SIGINT
        # Python swallows exceptions in destructors and in callbacks of libraries: the alarm ends the process even then.
        signal.signal(signal.SIGALRM, lambda *_: os._exit(code))
        signal.setitimer(signal.ITIMER_REAL, SIGNAL_GRACE)
        raise Signalled(code)

    signal.signal(signal.SIGTERM, on_signal)
    signal.signal(signal.SIGINT, on_signal)


def run_command(name: str, as_json: bool, work: Callable[[], Outcome]) -> int:
    """Do the work, report its outcome, and return the exit code. Raises only Signalled: a signal during the report."""
    outcome = _outcome(name, work)
    _print(name, as_json, outcome)
    _write_termination_message(name, outcome)
    if outcome.message:
        level = logging.INFO if outcome.code is ExitCode.OK else logging.ERROR
        todo = f"; what to do: {outcome.remedy}" if outcome.remedy else ""
        logger.log(level, "%s: %s%s (exit %d)", name, outcome.message, todo, outcome.code)
    return int(outcome.code)


def _outcome(name: str, work: Callable[[], Outcome]) -> Outcome:
    try:
        return work()
    except BootstrapError as error:
        first, *details = str(error).splitlines()
        if details:
            logger.error("%s: %s", name, error)
        return Outcome(error.exit_code, first, facts=report.error_facts(error), remedy=error.remedy)
    except Signalled as signalled:
        message = "; ".join(filter(None, (f"ended by {signalled.code.name}", signalled.note)))
        return Outcome(signalled.code, message, facts={"message": signalled.note})
    except Exception as error:
        logger.exception("unexpected error")
        bug = unexpected(error, masked(f"{type(error).__name__}: {error}"))
        return Outcome(bug.exit_code, f"{bug}; {bug.remedy}", facts=report.error_facts(bug))


def _print(name: str, as_json: bool, outcome: Outcome) -> None:
    try:
        if as_json:
            click.echo(report.json_object(name, outcome.code, outcome.facts))
        elif outcome.rows is not None and sys.stdout.isatty():
            # Only here: importing rich takes as long as reading the version table and the index.
            from bifrost_bootstrap.cli import terminal

            terminal.show(outcome)
        elif outcome.rows is not None:
            click.echo(masked(str(outcome)))
    except OSError as error:
        _give_up_stdout(error)


def _give_up_stdout(error: OSError) -> None:
    """
    Stop writing to stdout, which failed with this error. The exit code stays that of the work.

    A reader that closed the pipe wants no more output. Any other error is logged: the output is missing.
    """
    if not isinstance(error, BrokenPipeError):
        logger.warning("the result cannot be written to stdout: %s", error.strerror)
    # Python writes what is still buffered when it exits.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _write_termination_message(name: str, outcome: Outcome) -> None:
    file = environment.load_output_settings().termination_log
    if file:
        try:
            report.write_termination_message(file, name, outcome.code, outcome.facts)
        except OSError as error:
            logger.debug("no termination message: %s", error)
