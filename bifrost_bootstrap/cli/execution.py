"""Run a command line, and the work of its command: stdout, last line, termination message, exit code."""

from __future__ import annotations

import io
import logging
import os
import signal
import sys
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

import click

from bifrost_bootstrap import settings as environment
from bifrost_bootstrap.cli import report
from bifrost_bootstrap.cli.summary import Summary
from bifrost_bootstrap.errors import BootstrapError, ExitCode, unexpected
from bifrost_bootstrap.redaction import masked

logger = logging.getLogger("bifrost_bootstrap")

#: Seconds in which a signal must have ended a command by itself.
SIGNAL_GRACE = 5.0


@dataclass(frozen=True)
class Outcome:
    """
    How a command ended.

    summary: for people, on stdout. facts: for `--json`. text: follows the summary on stdout, as it is. message: the
    verdict in one line, default: the summary's headline. remedy: what to do, follows it.
    """

    code: ExitCode
    summary: Summary | None = None
    facts: dict[str, Any] = field(default_factory=dict)
    text: str = ""
    message: str = ""
    remedy: str = ""


class Signalled(BaseException):
    """SIGTERM or SIGINT arrived. Argument: its exit code."""

    def __init__(self, code: ExitCode) -> None:
        super().__init__(code)
        self.code = code


def run_command_line(group: click.Group, arguments: list[str]) -> int:
    """Run one command of the group and return its exit code. Nothing else leaves: usage is 64, a bug is 70."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors=report.UNPRINTABLE)
    _raise_on_signals()
    try:
        return _run_click(group, arguments)
    except Signalled as signalled:
        return int(signalled.code)
    except (click.Abort, KeyboardInterrupt):
        return int(ExitCode.SIGINT)
    except OSError as error:
        # A help text; commands see to what they print themselves.
        _cannot_print(error)
        return int(ExitCode.OK if {"-h", "--help", "--version"} & set(arguments) else ExitCode.BUG)
    except Exception:
        logger.exception("unexpected error")
        return int(ExitCode.BUG)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def _run_click(group: click.Group, arguments: list[str]) -> int:
    stdout = sys.stdout
    try:
        return int(group.main(arguments, prog_name="bifrost-bootstrap", standalone_mode=False) or 0)
    except click.exceptions.Exit as leaving:
        return leaving.exit_code
    except click.ClickException as error:
        with suppress(OSError):
            error.show(sys.stderr)
        return int(ExitCode.USAGE)
    except SystemExit as leaving:
        if sys.stdout is not stdout:
            # click's way out of a help text that nobody reads: it wraps stdout and leaves with 1.
            sys.stdout = stdout
            _print_no_more()
            return int(ExitCode.OK)
        # Only a worker that cannot begin leaves so, with a code of the contract.
        return leaving.code if isinstance(leaving.code, int) and leaving.code in set(ExitCode) else int(ExitCode.BUG)


def _raise_on_signals() -> None:
    """From now on SIGTERM and SIGINT raise Signalled, once; what does not end then within `SIGNAL_GRACE` is ended."""

    def on_signal(number: int, _frame: FrameType | None) -> None:
        # A second one must not interrupt the clean-up of the first.
        for one in (signal.SIGTERM, signal.SIGINT):
            signal.signal(one, signal.SIG_IGN)
        code = ExitCode.SIGTERM if number == signal.SIGTERM else ExitCode.SIGINT
        # Python swallows what is raised in a destructor or a callback of a library: end all the same.
        signal.signal(signal.SIGALRM, lambda *_: os._exit(code))
        signal.setitimer(signal.ITIMER_REAL, SIGNAL_GRACE)
        raise Signalled(code)

    signal.signal(signal.SIGTERM, on_signal)
    signal.signal(signal.SIGINT, on_signal)


def run_command(name: str, as_json: bool, work: Callable[[ExitStack], Outcome], on_signal: str = "") -> int:
    """
    Do the work, report its outcome, and return the exit code. Raises nothing.

    on_signal: what a reader should know if a signal ends the command.
    """
    outcome = _outcome(name, work, on_signal)
    _print(name, as_json, outcome)
    _write_termination_message(name, outcome)
    _log_verdict(name, outcome)
    return int(outcome.code)


def _outcome(name: str, work: Callable[[ExitStack], Outcome], on_signal: str) -> Outcome:
    try:
        with ExitStack() as stack:
            return work(stack)
    except BootstrapError as error:
        first, *details = str(error).splitlines()
        if details:
            logger.error("%s: %s", name, error)
        return Outcome(error.exit_code, facts=report.error_facts(error), message=first, remedy=error.remedy)
    except Signalled as signalled:
        message = f"ended by {signalled.code.name}{'; ' if on_signal else ''}{on_signal}"
        return Outcome(signalled.code, facts={"message": on_signal}, message=message)
    except Exception as error:
        logger.exception("unexpected error")
        bug = unexpected(error, masked(f"{type(error).__name__}: {error}"))
        return Outcome(bug.exit_code, facts=report.error_facts(bug), message=f"{bug}; {bug.remedy}")


def _log_verdict(name: str, outcome: Outcome) -> None:
    level = logging.INFO if outcome.code is ExitCode.OK else logging.ERROR
    headline = outcome.summary.headline if outcome.summary else ""
    if message := outcome.message or headline:
        todo = f"; what to do: {outcome.remedy}" if outcome.remedy else ""
        logger.log(level, "%s: %s%s (exit %d)", name, message, todo, outcome.code)


def _print(name: str, as_json: bool, outcome: Outcome) -> None:
    try:
        if as_json:
            click.echo(report.json_object(name, outcome.code, outcome.facts))
        elif outcome.summary and sys.stdout.isatty():
            # Only here: importing rich takes as long as reading the version table and the index.
            from bifrost_bootstrap.cli import terminal

            terminal.show(outcome.summary, outcome.code)
        elif outcome.summary:
            click.echo(masked(str(outcome.summary)))
        if outcome.text and not as_json:
            click.echo(masked(outcome.text))
    except BrokenPipeError:
        _print_no_more()
    except OSError as error:
        _cannot_print(error)


def _cannot_print(error: OSError) -> None:
    """Stdout cannot be written. The exit code stays that of the work; the log says that the output is missing."""
    logger.warning("the result cannot be written to stdout: %s", error.strerror)
    _print_no_more()


def _print_no_more() -> None:
    """Stdout is closed. Report the result through the exit code only."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _write_termination_message(name: str, outcome: Outcome) -> None:
    file = environment.load_output_settings().termination_log
    try:
        report.write_termination_message(file, name, outcome.code, outcome.facts)
    except OSError as error:
        logger.debug("no termination message: %s", error)
