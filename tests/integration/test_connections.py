"""Our connections: rejected login, unavailable server and missing right are different errors, without the password."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, LiteralString
from urllib.parse import urlsplit

import psycopg
import pytest
import redis as redis_py

from bifrost_bootstrap.errors import BootstrapError, RefusedError, UnavailableError, WarmError
from bifrost_bootstrap.servers import postgres as ours, redis_server
from bifrost_bootstrap.urls import PostgresUrl, parse_postgres
from tests.servers import Database, Postgres, RedisAddress
from tests.servers.leaks import leaks_in
from tests.servers.process import free_port


def changed(url: str, *, user: str | None = None, password: str | None = None, port: int | None = None) -> str:
    """The URL with another user, password or port."""
    parts = urlsplit(url)
    login = f"{parts.username if user is None else user}:{parts.password if password is None else password}"
    return parts._replace(netloc=f"{login}@{parts.hostname}:{port or parts.port}").geturl()


def ask(url: str, *queries: LiteralString) -> None:
    """Connect and run these on one connection."""
    with ours.connect(parse_postgres(url), "test") as connection:
        for query in queries:
            ours.scalar(connection, query)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (lambda url: changed(url, password="another"), RefusedError, "password authentication failed"),
        (lambda url: changed(url, user="nobody"), RefusedError, "password authentication failed"),
        (lambda url: url + "_gone", RefusedError, "does not exist"),
        (lambda url: changed(url, port=free_port()), UnavailableError, "Connection refused"),
        (lambda url: url + "?sslmode=require", UnavailableError, "SSL"),
    ],
    ids=["password", "user", "database", "away", "no TLS"],
)
def test_postgres_rejects_or_is_unavailable(
    change: Callable[[str], str], error: type[BootstrapError], words: str, database: Database
) -> None:
    """A rejected login, a missing database and an unavailable server are different errors with address and
    text of the server.
    """
    ask(database.url, "SELECT 1")  # the control
    with pytest.raises(error, match=words) as failed:
        ask(change(database.url), "SELECT 1")
    assert "PostgreSQL 127.0.0.1:" in str(failed.value)
    assert not leaks_in(str(failed.value))


def test_postgres_missing_right(database: Database, postgres: Postgres) -> None:
    """A missing right is a rejection that names the object."""
    with postgres.admin(database.name) as admin:
        admin.execute("CREATE TABLE closed ()")
    with pytest.raises(RefusedError, match="permission denied for table closed"):
        ask(database.url, "SELECT count(*) FROM closed")


def test_postgres_ends_the_session(database: Database) -> None:
    """If the server ends the session, the server is unavailable."""
    with pytest.raises(UnavailableError, match=r"terminating connection|closed"):
        ask(database.url, "SELECT pg_terminate_backend(pg_backend_pid())", "SELECT 1")


@pytest.mark.parametrize("query", ["", "?application_name=mine"])
def test_sessions_are_named_and_leave_nothing_behind(query: str, database: Database) -> None:
    """`pg_stat_activity` has our application name, whatever the URL says. No statement is prepared, and the
    session is closed afterwards.
    """
    with ours.connect(parse_postgres(database.url + query), "test") as connection:
        for _ in range(20):
            ours.scalar(connection, "SELECT 1")
        name = ours.scalar(connection, "SELECT application_name FROM pg_stat_activity WHERE pid = pg_backend_pid()")
        prepared = ours.scalar(connection, "SELECT count(*) FROM pg_prepared_statements")
    assert str(name).startswith("bifrost-bootstrap test ")
    assert prepared == 0
    assert connection.closed


@pytest.mark.parametrize("table", ["alembic_version", "other.alembic_version"])
def test_database_heads(table: str, database: Database) -> None:
    """None if the table is missing or empty; else every row, also in another schema."""
    url: PostgresUrl = parse_postgres(database.url)

    def heads(*, autocommit: bool) -> tuple[str, ...]:
        with ours.connect(url, "test", autocommit=autocommit) as connection:
            found = ours.database_heads(connection, table)
            assert ours.scalar(connection, "SELECT 1") == 1  # the transaction is still usable
            return found

    assert heads(autocommit=True) == heads(autocommit=False) == ()
    database.execute("CREATE SCHEMA other")
    name: Any = psycopg.sql.Identifier(*table.split("."))
    database.execute(psycopg.sql.SQL("CREATE TABLE {} (version_num varchar(32))").format(name))  # type: ignore[arg-type]
    assert heads(autocommit=True) == heads(autocommit=False) == ()
    database.execute(psycopg.sql.SQL("INSERT INTO {} VALUES ('0001'), ('0002')").format(name))  # type: ignore[arg-type]
    assert sorted(heads(autocommit=True)) == sorted(heads(autocommit=False)) == ["0001", "0002"]


def ping(url: str) -> None:
    """Connect and ask something."""
    with redis_server.connect(url) as client:
        client.ping()


def command(url: str, *words: str) -> None:
    """Connect and run one command."""
    with redis_server.connect(url) as client:
        client.execute_command(*words)  # type: ignore[no-untyped-call]


def test_redis_rejects_or_is_unavailable(redis: RedisAddress, redis_url: str) -> None:
    """A wrong password, a missing login and an unavailable server are different errors with the address."""
    ping(redis_url)  # the control
    port = urlsplit(redis_url).port
    for url, error, words in [
        (changed(redis_url, password="another"), RefusedError, "invalid username-password pair"),
        (f"redis://127.0.0.1:{port}/0", RefusedError, "authenticate"),
        (changed(redis_url, port=free_port()), UnavailableError, "Connection refused"),
    ]:
        with pytest.raises(error, match=words) as failed:
            ping(url)
        assert str(failed.value).startswith("Redis 127.0.0.1:")
        assert not leaks_in(str(failed.value))


def test_redis_missing_right(redis: RedisAddress, redis_url: str) -> None:
    """A user whose ACL lacks a command is rejected; the error names the command."""
    with redis.client() as admin:
        admin.acl_setuser(
            "reader",
            enabled=True,
            passwords=["+reader-word"],
            commands=["+ping", "+hello", "+client", "+select"],
            keys=["*"],
        )
        try:
            url = changed(redis_url, user="reader", password="reader-word")
            ping(url)
            with pytest.raises(RefusedError, match="no permissions to run the 'set' command"):
                command(url, "SET", "key", "value")
        finally:
            admin.acl_deluser("reader")


def test_redis_other_error(redis_url: str) -> None:
    """Another error of Redis is a failed warm with the error text and the address."""
    command(redis_url, "SET", "key", "value")
    with pytest.raises(WarmError, match=r"Redis 127\.0\.0\.1:.* WRONGTYPE"):
        command(redis_url, "SMEMBERS", "key")


@pytest.mark.parametrize(
    ("url", "text"),
    [
        ("redis://:hidden-word@cache:6380/3", "Redis cache:6380/3"),
        ("rediss://cache", "Redis cache:6379/0"),
        ("unix:///run/redis.sock?db=1", "Redis /run/redis.sock"),
    ],
)
def test_redis_in_words(url: str, text: str) -> None:
    """A Redis is named by its address, never by its login."""
    assert redis_server.display_name(url) == text


def test_redis_by_the_names_of_valkey(redis_url: str) -> None:
    """`valkey://` is the same as `redis://`."""
    ping(redis_url.replace("redis://", "valkey://"))
    with redis_py.Redis.from_url(redis_server.celery_url(redis_url.replace("redis://", "valkey://"))) as client:
        assert client.ping()
