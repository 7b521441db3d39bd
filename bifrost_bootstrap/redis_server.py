"""Redis: connections of our own, their errors in our words, and what kind of server it is."""

from __future__ import annotations

import logging
import ssl
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit

import redis

from bifrost_bootstrap.errors import NO_TLS_FILE, CertificateError, RefusedError, UnavailableError, WarmError, masked
from bifrost_bootstrap.urls import TLS_SCHEMES

logger = logging.getLogger(__name__)

#: Seconds for one connection attempt, and for one answer; the longest of ours is the switch of a large change.
CONNECT_TIMEOUT, ANSWER_TIMEOUT = 5.0, 30.0


def described(url: str) -> str:
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
    url = url.replace("valkey", "redis", 1) if url.startswith("valkey") else url
    client = redis.Redis.from_url(
        url, socket_connect_timeout=CONNECT_TIMEOUT, socket_timeout=answer_timeout, socket_keepalive=True,
        client_name="bifrost-bootstrap", retry=None,
    )  # fmt: skip
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
    server = described(url)
    try:
        yield
    except (redis.AuthenticationError, redis.exceptions.NoPermissionError) as error:
        raise RefusedError(server, masked(str(error))) from error
    except redis.exceptions.ReadOnlyError as error:
        raise WarmError(f"{server} is a read-only replica; BIFROST_REDIS_URL must name the primary") from error
    except (redis.exceptions.BusyLoadingError, redis.ConnectionError, redis.TimeoutError, OSError) as error:
        cause = error.__cause__ or error.__context__ or error
        if isinstance(cause, ssl.SSLCertVerificationError):
            raise CertificateError(server, masked(str(error))) from error
        if isinstance(cause, FileNotFoundError) and urlsplit(url).scheme in TLS_SCHEMES:
            raise CertificateError(server, NO_TLS_FILE) from error
        raise UnavailableError(server, masked(str(error))) from error
    except redis.ResponseError as error:
        raise WarmError(f"{server} says: {masked(str(error))}") from error


def room_for_writing(client: redis.Redis, url: str) -> int | None:
    """
    Bytes left below `maxmemory`; None where there is no limit, or this user may not ask.

    Warns of a policy that may evict what we write. Raises WarmError for a replica and a cluster.
    """
    server = described(url)
    try:
        facts: dict[str, Any] = dict(client.info())
    except (redis.exceptions.NoPermissionError, redis.ResponseError) as error:
        logger.info("%s does not tell its memory: %s", server, masked(str(error)))
        return None
    if facts.get("redis_mode") == "cluster" or facts.get("cluster_enabled") == 1:
        raise WarmError(f"{server} is a Redis Cluster; the switch needs one server (or Sentinel's primary)")
    if facts.get("role") == "slave":
        primary = f"{facts.get('master_host')}:{facts.get('master_port')}"
        raise WarmError(f"{server} is a read-only replica of {primary}; BIFROST_REDIS_URL must name the primary")
    limit = int(facts.get("maxmemory", 0))
    if not limit:
        return None
    policy = str(facts.get("maxmemory_policy", "noeviction"))
    if policy != "noeviction":
        what = "entries and index" if policy.startswith("allkeys") else "staged entries and those with a time to live"
        logger.warning("%s may evict %s (maxmemory-policy %s); use noeviction", server, what, policy)
    return limit - int(facts.get("used_memory", 0))


def celery_url(url: str) -> str:
    """The same server in the form that Celery's result backend reads."""
    url = url.replace("valkey", "redis", 1) if url.startswith("valkey") else url
    if url.startswith("unix://"):
        address, _, query = url.removeprefix("unix://").partition("?")
        return f"redis+socket://{address}?{query.replace('db=', 'virtual_host=')}"
    if url.startswith("rediss://") and "ssl_cert_reqs" not in url:
        return f"{url}{'&' if '?' in url else '?'}ssl_cert_reqs=required"
    return url
