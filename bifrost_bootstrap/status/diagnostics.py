"""What `check` shows beside readiness. Nothing here decides whether the deployment may start."""

from __future__ import annotations

from dataclasses import dataclass, field

from bifrost_bootstrap import settings as environment
from bifrost_bootstrap.errors import BootstrapError
from bifrost_bootstrap.migrate.tree import Tree
from bifrost_bootstrap.progress import Facts
from bifrost_bootstrap.servers import postgres, redis_server
from bifrost_bootstrap.servers.waiting import PROBE_TIMEOUT
from bifrost_bootstrap.settings import Settings


@dataclass(frozen=True)
class Diagnostics(Facts):
    """
    redis: its eviction policy and memory, in words. invalid_indexes: each with the statement that repairs it.

    worker: how many workers consume the queue of this tree, in words.
    """

    redis: str = ""
    invalid_indexes: dict[str, str] = field(default_factory=dict)
    worker: str = ""


def collect_diagnostics(settings: Settings, tree: Tree) -> Diagnostics:
    """Ask each server once. One that does not answer is a note; nothing is raised."""
    return Diagnostics(_redis(settings), _invalid_indexes(settings), _worker(settings, tree))


def _redis(settings: Settings) -> str:
    try:
        with redis_server.connect(settings.redis, answer_timeout=PROBE_TIMEOUT) as client:
            found = redis_server.facts(client)
    except BootstrapError as error:
        return str(error)
    if found is None:
        return "it does not show its memory to this user"
    memory = f"{found.used / 1e6:,.0f} MB used of {found.limit / 1e6:,.0f} MB" if found.limit else "no memory limit"
    evicts = f": may evict {found.evicts}; use noeviction" if found.evicts else ""
    return f"{memory}, policy {found.policy}{evicts}"


def _invalid_indexes(settings: Settings) -> dict[str, str]:
    try:
        with postgres.connect(settings.database, "check", answer_timeout=postgres.ANSWER_TIMEOUT) as connection:
            return postgres.invalid_indexes(connection)
    except BootstrapError:
        # Readiness comes from the same server and reports the reason.
        return {}


def _worker(settings: Settings, tree: Tree) -> str:
    if not settings.rabbitmq_url:
        return environment.fault_of("rabbitmq")
    # Imported late: importing Celery takes longer than the rest of a check.
    from bifrost_bootstrap import broker

    queue = tree.queue(settings.database.target)
    try:
        consumers = broker.queue_state(queue, publishing=False).consumers
    except BootstrapError as error:
        return str(error)
    if consumers is None:
        return "unknown (this broker does not report consumers)"
    # After `init --with-worker`, no worker is right. Tell so to a reader who expects a standing one.
    advice = "" if consumers else "; `init --with-worker` needs none, but nobody guards the cache"
    return f"{consumers or 'no'} bootstrap worker{'s' if consumers > 1 else ''} on {queue}{advice}"
