"""Redis: connections, their errors as ours, and what kind of server it is."""

from __future__ import annotations

import logging
import ssl
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import redis
from redis import exceptions

from bifrost_bootstrap.errors import NO_TLS_FILE, CertificateError, RefusedError, UnavailableError, WarmError
from bifrost_bootstrap.redaction import masked
from bifrost_bootstrap.urls import TLS_SCHEMES, parse_redis

logger = logging.getLogger(__name__)

#: Seconds for one connection attempt.
CONNECT_TIMEOUT = 5.0
#: Seconds for one answer. The switch of a large change takes longest.
ANSWER_TIMEOUT = 30.0

#: How Redis rejects a login, or a database that it does not have. redis-py has no classes for these.
_REFUSALS = ("DENIED ", "DB index is out of range", "without any password")
#: How Redis says that it will answer later: it runs a long script of another client, or a replica synchronises.
_PASSING = ("BUSY ", "MASTERDOWN ", "TRYAGAIN ")
_IS_CLUSTER = "is a Redis Cluster; the switch needs one server (or Sentinel's primary)"
#: What a Redis Cluster answers to a client of a single server. MovedError is an AskError.
_CLUSTER_ERRORS = (exceptions.AskError, exceptions.ClusterCrossSlotError, exceptions.ClusterDownError)


def display_name(url: str) -> str:
    """The server as messages name it, without user and password."""
    parts = urlsplit(url)
    if parts.scheme == "unix":
        return f"Redis {parts.path}"
    return f"Redis {parts.hostname or 'localhost'}:{parts.port or 6379}/{parts.path.lstrip('/') or 0}"


@contextmanager
def connect(url: str, *, answer_timeout: float = ANSWER_TIMEOUT) -> Iterator[redis.Redis]:
    """
    A client that reads and writes bytes, closed at the end. Errors inside the block are raised as ours (`translated`).

    answer_timeout: seconds. Nothing is retried here: only the caller knows what may be done twice.
    """
    url = parse_redis(url)
    # redis-py does not accept these for a Unix socket.
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
    Raise errors of redis-py as ours.

    RefusedError for a login or a right, CertificateError, UnavailableError if the server does not answer, WarmError for
    any other answer.
    """
    server = display_name(url)
    try:
        yield
    except (redis.AuthenticationError, exceptions.NoPermissionError) as error:
        raise RefusedError(server, masked(str(error))) from error
    except _CLUSTER_ERRORS as error:
        raise WarmError(f"{server} {_IS_CLUSTER}") from error
    except (redis.ConnectionError, redis.TimeoutError, OSError) as error:
        cause = error.__cause__ or error.__context__ or error
        if isinstance(cause, ssl.SSLCertVerificationError):
            raise CertificateError(server, masked(str(error))) from error
        if isinstance(cause, FileNotFoundError) and urlsplit(url).scheme in TLS_SCHEMES:
            raise CertificateError(server, NO_TLS_FILE) from error
        raise UnavailableError(server, masked(str(error))) from error
    except redis.ResponseError as error:
        text = masked(str(error))
        if any(word in text for word in _REFUSALS):
            raise RefusedError(server, text) from error
        if text.startswith(_PASSING):
            raise UnavailableError(server, text) from error
        # Redis 6.2 reports the error of a script with other words around it.
        if isinstance(error, exceptions.ReadOnlyError) or "-READONLY " in text:
            raise WarmError(f"{server} is a read-only replica; BIFROST_REDIS_URL must name the primary") from error
        raise WarmError(f"{server} says: {text}") from error


@dataclass(frozen=True)
class ServerFacts:
    """
    What a server says about itself.

    cluster: whether it is part of a Redis Cluster. primary: `host:port` of its primary if it is a read-only replica,
    else "". used, limit: bytes; limit 0 means none. policy: what it evicts at the limit, in Redis' own word.
    """

    cluster: bool
    primary: str
    used: int
    limit: int
    policy: str

    @property
    def evicts(self) -> str:
        """What it may evict of ours, in words; "" for nothing."""
        if not self.limit or self.policy == "noeviction":
            return ""
        everything = self.policy.startswith("allkeys")
        return "entries and index" if everything else "staged entries and those with a time to live"


def facts(client: redis.Redis) -> ServerFacts | None:
    """What the server says about itself; None if this user has no right to ask."""
    try:
        info: dict[str, Any] = dict(client.info())
    except redis.ResponseError as error:
        logger.debug("INFO: %s", masked(str(error)))
        return None
    return ServerFacts(
        cluster=info.get("redis_mode") == "cluster" or info.get("cluster_enabled") == 1,
        primary=f"{info.get('master_host')}:{info.get('master_port')}" if info.get("role") == "slave" else "",
        used=int(info.get("used_memory", 0)),
        limit=int(info.get("maxmemory", 0)),
        policy=str(info.get("maxmemory_policy", "noeviction")),
    )


def require_primary(client: redis.Redis, url: str) -> ServerFacts | None:
    """
    The `facts` of the server. Raises WarmError for a replica and for a cluster.

    A primary that was demoted answers with its old data until it has copied the new primary.
    """
    found = facts(client)
    server = display_name(url)
    if found and found.cluster:
        raise WarmError(f"{server} {_IS_CLUSTER}")
    if found and found.primary:
        raise WarmError(f"{server} is a read-only replica of {found.primary}; BIFROST_REDIS_URL must name the primary")
    return found


def room_for_writing(client: redis.Redis, url: str) -> int | None:
    """
    Bytes left below `maxmemory`; None if there is no limit, or if this user has no right to ask.

    Logs a warning if the server may evict what we write. Raises WarmError for a replica and for a cluster.
    """
    server = display_name(url)
    found = require_primary(client, url)
    if found is None:
        logger.info("%s does not show its memory to this user", server)
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
