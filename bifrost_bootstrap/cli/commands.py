"""The command line: what each command takes, needs and does."""

from __future__ import annotations

import functools
import inspect
import logging
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import click

from bifrost_bootstrap import __version__, logs, settings as environment
from bifrost_bootstrap.cli import summary
from bifrost_bootstrap.cli.execution import run_command, run_command_line, signal_note
from bifrost_bootstrap.cli.report import Outcome
from bifrost_bootstrap.deadline import Deadline
from bifrost_bootstrap.errors import ExitCode, OwnProcessError, UsageError
from bifrost_bootstrap.progress import Report
from bifrost_bootstrap.settings import Need, Settings

logger = logging.getLogger("bifrost_bootstrap")


def run(arguments: list[str]) -> int:
    """Run one command and return its exit code. Raises nothing: wrong usage is 64, a bug is 70."""
    output = environment.load_output_settings()
    logs.configure(output.log_format, output.log_level)
    return run_command_line(main, arguments)


def duration(value: str) -> float:
    """Seconds, from `90s` or `5m`. `--help` shows the name of this function in capitals."""
    try:
        return environment.duration(value)
    except ValueError as error:
        raise click.BadParameter(f"{value!r} {error}") from None


#: Exit codes that any command may end in.
_ALWAYS = (64, 70, 78, 130, 143)


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="bifrost-bootstrap")
def main() -> None:
    """Prepare a Bifrost deployment for its start: schema at head, module cache complete."""


def _command(
    *codes: int, ok: str = ExitCode.OK.meaning, not_ready: str = ExitCode.NOT_READY.meaning, has_json: bool = True
) -> Callable[[Callable[..., Outcome]], click.Command]:
    """
    Make a command of a function that takes the options and returns its Outcome.

    `--help` shows the examples of its docstring and its exit codes below the options. codes: exit codes beside those of
    any command. ok, not_ready: the meaning of 0 and 3. has_json: it has the option `--json`.
    """

    def add(function: Callable[..., Outcome]) -> click.Command:
        @functools.wraps(function)
        def command(as_json: bool = False, **options: Any) -> int:
            return run_command(function.__name__, as_json, functools.partial(function, **options))

        summary_text, _, examples = inspect.cleandoc(function.__doc__ or "").partition("\n\nExamples:\n")
        meanings = {code: ExitCode(code).meaning for code in sorted((0, *codes, *_ALWAYS))}
        meanings |= {code: text for code, text in ((0, ok), (3, not_ready)) if code in meanings}
        table = [f"  {code:<4} {meaning}" for code, meaning in meanings.items()]
        # click wraps the lines of a paragraph, unless it begins with this character.
        epilog = "\n".join(["\b", "Examples:", examples, "", "\b", "Exit codes:", *table])
        added = main.command(help=summary_text, epilog=epilog)(command)
        if has_json:
            words = "Print exactly one JSON object on stdout."
            added.params.append(click.Option(["--json", "as_json"], is_flag=True, help=words))
        return added

    return add


_SCHEMA_HELP = "Take the schema from this file (pg_dump, plain format), not from the live database."
_timeout_option = click.option(
    "--timeout",
    type=duration,
    help="Deadline of the command, such as 90s or 5m.  [default: BIFROST_INIT_TIMEOUT, 10m]",
)
_allow_shrink_option = click.option(
    "--allow-shrink", is_flag=True, help="Warm even if it removes more than half of the cache."
)


@_command(1, 2, 69, 75, 124)
@_timeout_option
@click.option("--with-worker", is_flag=True, help="Start a bootstrap worker that ends with init.")
@click.option("--embedded", is_flag=True, help="Run on private throw-away servers; every URL is ignored.")
@_allow_shrink_option
def init(timeout: float | None, with_worker: bool, embedded: bool, allow_shrink: bool) -> Outcome:
    """Migrate, warm the module cache, and exit 0 only if schema and cache are ready.

    Examples:
      # the init container beside a standing bootstrap worker
      bifrost-bootstrap init --timeout 5m
      # in front of a rolling Deployment: it starts its own worker
      bifrost-bootstrap init --with-worker --json
    """
    own_worker = with_worker or embedded
    # Our own worker ends with us.
    then = "is cancelled with its worker" if own_worker else "goes on"
    with (
        signal_note(f"work that a bootstrap worker has begun {then}"),
        _embedded_servers() if embedded else nullcontext(),
    ):
        return _init(timeout, with_worker=own_worker, allow_shrink=allow_shrink)


@_command(1, 2, 69, 75, 124)
@_timeout_option
@click.option("--full", is_flag=True, help="Trust no hash: rewrite every entry.")
@_allow_shrink_option
def rewarm(timeout: float | None, full: bool, allow_shrink: bool) -> Outcome:
    """Warm the module cache again, through a bootstrap worker, and wait for it like init.

    Examples:
      # after rows were changed without the platform's API
      bifrost-bootstrap rewarm
      # rewrite every entry, whatever the hashes say
      bifrost-bootstrap rewarm --full
    """
    with signal_note("a warm that a bootstrap worker has begun goes on"):
        return _init(timeout, migrate=False, full=full, allow_shrink=allow_shrink)


@_command(1, 3, 69)
@click.option("--wait", type=duration, help="Wait up to this long until everything is ready.")
def check(wait: float | None) -> Outcome:
    """Report whether schema and cache are ready (0) or not (3). Changes nothing, needs no RabbitMQ.

    Examples:
      # what is ready, and what is missing
      bifrost-bootstrap check
      # the init container of a pod that only waits
      bifrost-bootstrap check --wait 10m
    """
    settings = _load("database", "redis", "tree")
    from bifrost_bootstrap.migrate import tree_loading
    from bifrost_bootstrap.status import diagnostics, readiness

    tree = tree_loading.load(settings)
    found = readiness.wait_until_ready(settings, tree, Deadline(wait or 0))
    return summary.of_check(found, diagnostics.collect_diagnostics(settings, tree))


@_command(1, 69, ok="the plan is printed, whether or not something is pending")
@click.option("--sql", "with_sql", is_flag=True, help="Print the SQL of the pending revisions too.")
def plan(with_sql: bool) -> Outcome:
    """Report what init would do: revisions to apply, modules to add, change and remove. Changes nothing.

    Examples:
      # before a deploy: what would init do?
      bifrost-bootstrap plan
      # for a reviewer of the migration
      bifrost-bootstrap plan --sql
    """
    settings = _load("database", "redis", "tree")
    from bifrost_bootstrap.migrate import tree_loading
    from bifrost_bootstrap.status import plan as plans

    return summary.of_plan(plans.plan(settings, tree_loading.load(settings), with_sql=with_sql))


@_command(1, 3, 69, 75, ok="the pending revisions apply to the schema", not_ready="--strict, and there is a warning")
@click.option("--schema", type=click.Path(path_type=Path), help=_SCHEMA_HELP)
@click.option("--strict", is_flag=True, help="End with 3 if there is a warning.")
@click.option("--no-data-checks", is_flag=True, help="Do not read whether the live rows meet new constraints.")
@click.option("--markdown", is_flag=True, help="Print Markdown, for the comment of a pull request.")
def rehearse(schema: Path | None, strict: bool, no_data_checks: bool, markdown: bool) -> Outcome:
    """Run the pending revisions on a copy of the live schema, and say what they lock, rewrite and scan.

    Nothing is written to the live database, and tables are locked in ACCESS SHARE mode only. The copy is in a private
    embedded server, or in the empty database that BIFROST_REHEARSAL_DATABASE_URL names.

    Examples:
      # before a deploy: what will the pending revisions lock?
      bifrost-bootstrap rehearse
      # in a pipeline, without the live database
      bifrost-bootstrap rehearse --schema schema.sql --strict --markdown
    """
    settings = _load("tree", "rehearsal") if schema else _load("database", "tree", "rehearsal")
    from bifrost_bootstrap.cli import rehearsal
    from bifrost_bootstrap.migrate import tree_loading
    from bifrost_bootstrap.rehearse import rehearsal as rehearsals

    tree = tree_loading.load(settings)
    found = rehearsals.rehearse(settings, tree, schema=schema, data_checks=not no_data_checks)
    return rehearsal.of_rehearsal(found, strict=strict, markdown=markdown)


@_command(1, 69, ok="stopped by a signal", has_json=False)
def worker() -> Outcome:
    """Run a bootstrap worker: it consumes the calls by hand and the chains of its own tree.

    Examples:
      # a standing bootstrap worker
      bifrost-bootstrap worker
      # with a file for a health check
      BIFROST_WORKER_HEALTH_FILE=/tmp/alive bifrost-bootstrap worker
    """
    settings = _load("database", "redis", "rabbitmq", "tree")
    from bifrost_bootstrap.migrate import tree_loading
    from bifrost_bootstrap.worker import program

    # Loaded here first: if the tree cannot be loaded, Celery would leave without a verdict.
    program.wait_for_broker(settings, tree_loading.load(settings))
    for one in (signal.SIGTERM, signal.SIGINT):
        signal.signal(one, signal.SIG_DFL)
    # What Celery prints is not our result.
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    if code := program.run(settings):
        raise OwnProcessError("Celery's worker", f"it ended with {code}")
    stopped = "stopped by a signal"
    return Outcome(ExitCode.OK, stopped, facts={"message": stopped})


@_command(69, ok="the files are in the database")
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--yes", is_flag=True, help="Really write to that database.")
def load(folder: Path, yes: bool) -> Outcome:
    """For development: insert or update the .py files of FOLDER as modules. Never deletes.

    Examples:
      # name the target, write nothing
      bifrost-bootstrap load ./modules
      # write
      bifrost-bootstrap load ./modules --yes
    """
    settings = _load("database")
    from bifrost_bootstrap.dev import load as loading

    if not yes:
        raise UsageError(f"load would write to {settings.database}", "say --yes if that is meant")
    return summary.of_load(loading.load(settings, folder), str(settings.database))


def _init(timeout: float | None, *, with_worker: bool = False, **work: bool) -> Outcome:
    """Run init until it succeeds. work: the fields of its `Request`."""
    from bifrost_bootstrap.init.loop import init
    from bifrost_bootstrap.init.run import Request

    settings = _load("database", "redis", "rabbitmq", "tree")
    deadline = Deadline(settings.init_timeout if timeout is None else timeout)
    with _progress_display(settings, with_worker) as report:
        return summary.of_init(init(settings, deadline, Request(**work), report, with_worker=with_worker))


def _progress_display(settings: Settings, with_worker: bool) -> AbstractContextManager[Report]:
    """The progress bar if stderr is a terminal. A worker of our own would write log lines into the bar."""
    if not sys.stderr.isatty() or settings.log_format != "text" or with_worker:
        return nullcontext(lambda _progress: None)
    from bifrost_bootstrap.cli import terminal

    return terminal.bar()


def _load(*needs: Need) -> Settings:
    settings = environment.load(needs)
    logs.configure(settings.log_format, settings.log_level)
    return settings


@contextmanager
def _embedded_servers() -> Iterator[None]:
    """Embedded servers for the time of the block, in place of those that the environment names."""
    from bifrost_bootstrap.dev.embedded import embedded_servers

    logger.info("starting embedded servers, gone with this command")
    with embedded_servers() as servers:
        ignored = environment.use_embedded_servers(servers.database_url, servers.redis_url)
        if ignored:
            logger.info("--embedded ignores %s", ", ".join(ignored))
        yield
