"""Redis: connections of our own, their errors in our words, and what kind of server it is."""

from __future__ import annotations

import logging
import ssl
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import redis

from bifrost_bootstrap.errors import NO_TLS_FILE, CertificateError, RefusedError, UnavailableError, WarmError
from bifrost_bootstrap.redaction import masked
from bifrost_bootstrap.urls import TLS_SCHEMES, parse_redis

logger = logging.getLogger(__name__)

#: Seconds for one connection attempt, and for one answer; the longest of ours is the switch of a large change.
CONNECT_TIMEOUT, ANSWER_TIMEOUT = 5.0, 30.0

#: Words by which it refuses a login, or a database that it does not have; no class of the library's tells them apart.
_REFUSALS = ("DENIED ", "DB index is out of range", "without any password")
#: Words by which it says that it will answer later: a long script of somebody else's, a replica that synchronises.
_PASSING = ("BUSY ", "MASTERDOWN ", "TRYAGAIN ")
_IS_CLUSTER = "is a Redis Cluster; the switch needs one server (or Sentinel's primary)"
#: What a Redis Cluster answers to a client of a single server.
_CLUSTER_ERRORS = (
    redis.exceptions.AskError,  # and MovedError
    redis.exceptions.ClusterCrossSlotError,
    redis.exceptions.ClusterDownError,
)


def display_name(url: str) -> str:
    """The server in words, without user and password."""
    parts = urlsplit(url)
    if parts.scheme == "unix":
        return f"Redis {parts.path}"
    return f"Redis {parts.hostname or 'localhost'}:{parts.port or 6379}/{parts.path.lstrip('/') or 0}"


@contextmanager
def connect(url: str, *, answer_timeout: float = ANSWER_TIMEOUT) -> Iterator[redis.Redis]:
    """
    A client that talks bytes. Errors inside the block are raised in our words. Closed at the end.

    answer_timeout: seconds. Nothing is retried here: the callers know what may be done twice.
    """
    url = parse_redis(url)
    # A Unix socket has neither.
    tcp = {} if url.startswith("unix:") else {"socket_connect_timeout": CONNECT_TIMEOUT, "socket_keepalive": True}
    client = redis.Redis.from_url(url, socket_timeout=answer_timeout, retry=None, **tcp)
    try:
        with translated(url):
            yield client
    finally:
        client.close()


@contextmanager
def translated(url: str) -> Iterator[None]:
    """
    Raise RefusedError for a login or a right, CertificateError, UnavailableError for a server that is away, WarmError
    for a write.
    """
    server = display_name(url)
    try:
        yield
    except (redis.AuthenticationError, redis.exceptions.NoPermissionError) as error:
        raise RefusedError(server, masked(str(error))) from error
    except _CLUSTER_ERRORS as error:
        raise WarmError(f"{server} {_IS_CLUSTER}") from error
    except (redis.exceptions.BusyLoadingError, redis.ConnectionError, redis.TimeoutError, OSError) as error:
        cause = error.__cause__ or error.__context__ or error
        if isinstance(cause, ssl.SSLCertVerificationError):
            raise CertificateError(server, masked(str(error))) from error
        if isinstance(cause, FileNotFoundError) and urlsplit(url).scheme in TLS_SCHEMES:
            raise CertificateError(server, NO_TLS_FILE) from error
        raise UnavailableError(server, masked(str(error))) from error
    except redis.ResponseError as error:
        if any(word in str(error) for word in _REFUSALS):
            raise RefusedError(server, masked(str(error))) from error
        if str(error).startswith(_PASSING):
            raise UnavailableError(server, masked(str(error))) from error
        # Redis 6.2 says what a script met in the middle of other words.
        if isinstance(error, redis.exceptions.ReadOnlyError) or "-READONLY " in str(error):
            raise WarmError(f"{server} is a read-only replica; BIFROST_REDIS_URL must name the primary") from error
        raise WarmError(f"{server} says: {masked(str(error))}") from error


@dataclass(frozen=True)
class ServerFacts:
    """
    What a server tells of itself.

    cluster: one of Redis Cluster. primary: `host:port` where it is a read-only replica, else "". used, limit: bytes,
    limit 0 where there is none. policy: what is evicted at the limit, in Redis' own word.
    """

    cluster: bool
    primary: str
    used: int
    limit: int
    policy: str

    @property
    def evicts(self) -> str:
        """What of ours may be evicted, in words; "" where nothing is."""
        if not self.limit or self.policy == "noeviction":
            return ""
        everything = self.policy.startswith("allkeys")
        return "entries and index" if everything else "staged entries and those with a time to live"


def facts(client: redis.Redis) -> ServerFacts | None:
    """What the server tells of itself; None where this user may not ask."""
    try:
        told: dict[str, Any] = dict(client.info())
    except (redis.exceptions.NoPermissionError, redis.ResponseError) as error:
        logger.debug("INFO: %s", masked(str(error)))
        return None
    return ServerFacts(
        cluster=told.get("redis_mode") == "cluster" or told.get("cluster_enabled") == 1,
        primary=f"{told.get('master_host')}:{told.get('master_port')}" if told.get("role") == "slave" else "",
        used=int(told.get("used_memory", 0)),
        limit=int(told.get("maxmemory", 0)),
        policy=str(told.get("maxmemory_policy", "noeviction")),
    )


def require_primary(client: redis.Redis, url: str) -> ServerFacts | None:
    """
    What the server tells of itself, as `facts`. Raises WarmError for a replica and a cluster.

    A primary that was demoted answers with what it held, until it has copied the new one.
    """
    server, found = display_name(url), facts(client)
    if found and found.cluster:
        raise WarmError(f"{server} {_IS_CLUSTER}")
    if found and found.primary:
        raise WarmError(f"{server} is a read-only replica of {found.primary}; BIFROST_REDIS_URL must name the primary")
    return found


def room_for_writing(client: redis.Redis, url: str) -> int | None:
    """
    Bytes left below `maxmemory`; None where there is no limit, or this user may not ask.

    Warns of a policy that may evict what we write. Raises WarmError for a replica and a cluster.
    """
    server, found = display_name(url), require_primary(client, url)
    if found is None:
        logger.info("%s does not tell its memory to this user", server)
        return None
    if found.evicts:
        logger.warning("%s may evict %s (maxmemory-policy %s); use noeviction", server, found.evicts, found.policy)
    return found.limit - found.used if found.limit else None


def celery_url(url: str) -> str:
    """The same server in the form that Celery's result backend reads."""
    url = parse_redis(url)
    if url.startswith("unix://"):
        address, _, query = url.removeprefix("unix://").partition("?")
        return f"redis+socket://{address}?{query.replace('db=', 'virtual_host=')}"
    if url.startswith("rediss://") and "ssl_cert_reqs" not in url:
        return f"{url}{'&' if '?' in url else '?'}ssl_cert_reqs=required"
    return url
