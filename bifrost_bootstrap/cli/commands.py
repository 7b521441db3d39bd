"""The command line: what each command takes, needs and does."""

from __future__ import annotations

import inspect
import logging
import os
import signal
import sys
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from bifrost_bootstrap import __version__, logs, settings as environment
from bifrost_bootstrap.cli import summary
from bifrost_bootstrap.cli.execution import Outcome, run_command, run_command_line
from bifrost_bootstrap.deadline import Deadline
from bifrost_bootstrap.errors import ExitCode, OwnProcessError, UsageError
from bifrost_bootstrap.settings import Need, Settings, duration

if TYPE_CHECKING:
    from bifrost_bootstrap.init.loop import Request

logger = logging.getLogger("bifrost_bootstrap")


def run(arguments: list[str]) -> int:
    """Run one command and return its exit code. Nothing else leaves: usage is 64, a bug is 70."""
    telling = environment.load_output_settings()
    logs.configure(telling.log_format, telling.log_level)
    return run_command_line(main, arguments)


class DurationType(click.ParamType[float]):
    """`90s`, `5m`; seconds."""

    name = "duration"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        try:
            return duration(value)
        except ValueError as error:
            self.fail(f"{value!r} {error}", param, ctx)


#: Codes that any command may end in.
_ALWAYS = (64, 70, 78, 130, 143)


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="bifrost-bootstrap")
def main() -> None:
    """Bring a Bifrost deployment into a state in which it may start: schema at head, module cache complete."""


def _command(*codes: int, ok: str = ExitCode.OK.meaning) -> Callable[[Callable[..., int]], click.Command]:
    """A command of the group; `--help` has its examples and exit codes behind the options. ok: what 0 means here."""

    def add(function: Callable[..., int]) -> click.Command:
        text, _, examples = inspect.getdoc(function).partition("\n\nExamples:\n")  # type: ignore[union-attr]
        meanings = {0: ok} | {code: ExitCode(code).meaning for code in sorted((*codes, *_ALWAYS))}
        table = [f"  {code:<4} {meaning}" for code, meaning in meanings.items()]
        # click fills paragraphs anew, but for those that begin with this character.
        epilog = "\n".join(["\b", "Examples:", examples, "", "\b", "Exit codes:", *table])
        return main.command(help=text, epilog=epilog)(function)

    return add


_json_option = click.option("--json", "as_json", is_flag=True, help="Print exactly one JSON object on stdout.")
_timeout_option = click.option(
    "--timeout",
    type=DurationType(),
    help="Deadline of the whole, such as 90s or 5m.  [default: BIFROST_INIT_TIMEOUT, 10m]",
)
_allow_shrink_option = click.option(
    "--allow-shrink", is_flag=True, help="Warm even if it removes more than half of the cache."
)


@_command(1, 2, 69, 75, 124)
@_timeout_option
@click.option("--with-worker", is_flag=True, help="Bring a bootstrap worker along for as long as init runs.")
@click.option("--embedded", is_flag=True, help="Run on private throw-away servers; every URL is ignored.")
@_allow_shrink_option
@_json_option
def init(timeout: float | None, with_worker: bool, embedded: bool, allow_shrink: bool, as_json: bool) -> int:
    """Migrate, warm the module cache, and exit 0 only when both are true.

    Examples:
      # the init container beside a standing bootstrap worker
      bifrost-bootstrap init --timeout 5m
      # in front of a rolling Deployment: it brings its own worker
      bifrost-bootstrap init --with-worker --json
    """

    def work(stack: ExitStack) -> Outcome:
        if embedded:
            _start_embedded(stack)
        from bifrost_bootstrap.init.loop import Request

        return _init(stack, timeout, Request(allow_shrink=allow_shrink), with_worker=with_worker or embedded)

    # A worker of our own ends with us.
    begun = "is cancelled with its worker" if with_worker or embedded else "goes on"
    return run_command("init", as_json, work, on_signal=f"work that a bootstrap worker has begun {begun}")


@_command(1, 2, 69, 75, 124)
@_timeout_option
@click.option("--full", is_flag=True, help="Trust no hash: rewrite every entry.")
@_allow_shrink_option
@_json_option
def rewarm(timeout: float | None, full: bool, allow_shrink: bool, as_json: bool) -> int:
    """Warm the module cache again, through a bootstrap worker, and wait for it like init.

    Examples:
      # after rows were changed behind the platform's back
      bifrost-bootstrap rewarm
      # rewrite every entry, whatever the hashes say
      bifrost-bootstrap rewarm --full
    """

    def work(stack: ExitStack) -> Outcome:
        from bifrost_bootstrap.init.loop import Request

        return _init(stack, timeout, Request(migrate=False, full=full, allow_shrink=allow_shrink), with_worker=False)

    return run_command("rewarm", as_json, work, on_signal="a warm that a bootstrap worker has begun goes on")


@_command(1, 3, 69)
@click.option("--wait", type=DurationType(), help="Wait up to this long until everything is ready.")
@_json_option
def check(wait: float | None, as_json: bool) -> int:
    """Say whether schema and cache are ready (0) or not (3). Changes nothing, needs no RabbitMQ.

    Examples:
      # what is ready, and what is missing
      bifrost-bootstrap check
      # the init container of a pod that only waits
      bifrost-bootstrap check --wait 10m
    """

    def work(_stack: ExitStack) -> Outcome:
        settings = _load("database", "redis", "tree")
        from bifrost_bootstrap.migrate import tree_loading
        from bifrost_bootstrap.status import diagnostics, readiness

        tree = tree_loading.load(settings)
        found = readiness.wait_until_ready(settings, tree, Deadline(wait or 0))
        around = diagnostics.collect_diagnostics(settings, tree)
        shown = summary.of_check(found, around)
        facts = {**found.to_dict(), "surroundings": around.to_dict(), "message": found.missing() or "ready"}
        if found.ready:
            return Outcome(ExitCode.OK, shown, facts)
        return Outcome(ExitCode.NOT_READY, shown, facts | {"remedy": found.remedy}, remedy=found.remedy)

    return run_command("check", as_json, work)


@_command(1, 69, ok="it is told, whether or not something is pending")
@click.option("--sql", "with_sql", is_flag=True, help="Print the SQL of the pending revisions too.")
@_json_option
def plan(with_sql: bool, as_json: bool) -> int:
    """Say what init would do: revisions to apply, modules to add, change and remove. Changes nothing.

    Examples:
      # before a deploy: what would init do?
      bifrost-bootstrap plan
      # for a reviewer of the migration
      bifrost-bootstrap plan --sql
    """

    def work(_stack: ExitStack) -> Outcome:
        settings = _load("database", "redis", "tree")
        from bifrost_bootstrap.migrate import tree_loading
        from bifrost_bootstrap.status import plan as plans

        found = plans.plan(settings, tree_loading.load(settings), with_sql=with_sql)
        facts = {**found.to_dict(), "message": found.headline}
        return Outcome(ExitCode.OK, summary.of_plan(found), facts, text=found.sql)

    return run_command("plan", as_json, work)


@_command(1, 69, ok="it was told to stop")
def worker() -> int:
    """Run a bootstrap worker: it consumes the calls by hand and the chains of its own tree.

    Examples:
      # a standing bootstrap worker
      bifrost-bootstrap worker
      # with a file for a health check
      BIFROST_WORKER_HEALTH_FILE=/tmp/alive bifrost-bootstrap worker
    """

    def work(_stack: ExitStack) -> Outcome:
        settings = _load("database", "redis", "rabbitmq", "tree")
        from bifrost_bootstrap import broker
        from bifrost_bootstrap.migrate import tree_loading
        from bifrost_bootstrap.servers import waiting
        from bifrost_bootstrap.worker import program as worker_program

        # Celery would leave without a verdict.
        tree = tree_loading.load(settings)
        worker_program.start_health_file(settings.worker_health_file)
        # Celery itself would end with 0 where its login is refused, with 1 where a right is missing, and try a wrong
        # virtual host for ever.
        queues = worker_program.queues(settings, tree)
        waiting.wait_for(
            {broker.display_name(): lambda: broker.check_permissions(*queues)}, Deadline(settings.init_timeout)
        )
        for one in (signal.SIGTERM, signal.SIGINT):
            signal.signal(one, signal.SIG_DFL)
        # What Celery prints is no result.
        os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
        if code := worker_program.run(settings):
            raise OwnProcessError("Celery's worker", f"it ended with {code}")
        stopped = "it was told to stop"
        return Outcome(ExitCode.OK, facts={"message": stopped}, message=stopped)

    return run_command("worker", False, work)


@_command(69, ok="the files are rows")
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--yes", is_flag=True, help="Really write to that database.")
@_json_option
def load(folder: Path, yes: bool, as_json: bool) -> int:
    """For development: insert or update the .py files of FOLDER as modules. Never deletes.

    Examples:
      # name the target, write nothing
      bifrost-bootstrap load ./modules
      # write
      bifrost-bootstrap load ./modules --yes
    """

    def work(_stack: ExitStack) -> Outcome:
        settings = _load("database")
        from bifrost_bootstrap.dev.load import load

        if not yes:
            raise UsageError(f"load would write to {settings.database}", "say --yes if that is meant")
        result = load(settings, folder)
        return Outcome(ExitCode.OK, summary.of_load(result, str(settings.database)), result.to_dict())

    return run_command("load", as_json, work)


def _init(stack: ExitStack, timeout: float | None, request: Request, *, with_worker: bool) -> Outcome:
    from bifrost_bootstrap.init.loop import init

    settings = _load("database", "redis", "rabbitmq", "tree")
    deadline = Deadline(settings.init_timeout if timeout is None else timeout)
    options: dict[str, Any] = {}
    # A worker of our own writes to the same terminal, past the bar.
    if sys.stderr.isatty() and settings.log_format == "text" and not with_worker:
        from bifrost_bootstrap.cli import terminal

        options["report"] = stack.enter_context(terminal.bar())
    done = init(settings, deadline, request, with_worker=with_worker, **options)
    return Outcome(ExitCode.OK, summary.of_init(done), done.to_dict())


def _load(*needs: Need) -> Settings:
    settings = environment.load(needs)
    logs.configure(settings.log_format, settings.log_level)
    return settings


def _start_embedded(stack: ExitStack) -> None:
    from bifrost_bootstrap.dev.embedded import embedded_servers

    logger.info("starting embedded servers, gone with this command")
    servers = stack.enter_context(embedded_servers())
    ignored = environment.use_embedded_servers(servers.database_url, servers.redis_url)
    if ignored:
        logger.info("--embedded ignores %s", ", ".join(ignored))
