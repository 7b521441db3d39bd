"""Every form of a PostgreSQL URL, and what libpq gets."""

from __future__ import annotations

import ssl
from urllib.parse import quote

import pytest
import sqlalchemy

from bifrost_bootstrap.redaction import masked
from bifrost_bootstrap.urls import ASYNCPG_ONLY, amqp_tls, digest, parse_postgres

PARTS = {"host": "db.example", "port": "5433", "user": "bifrost", "password": "secret-word", "dbname": "platform"}


@pytest.mark.parametrize(
    "text",
    [
        "postgresql://bifrost:secret-word@db.example:5433/platform",
        "postgres://bifrost:secret-word@db.example:5433/platform",
        "postgresql+asyncpg://bifrost:secret-word@db.example:5433/platform",
        "postgresql+psycopg://bifrost:secret-word@db.example:5433/platform",
        "postgresql+psycopg2://bifrost:secret-word@db.example:5433/platform",
        "postgresql://bifrost@db.example:5433/platform?password=secret-word",
        "postgresql://?host=db.example&port=5433&user=bifrost&password=secret-word&dbname=platform",
        "host=db.example port=5433 user=bifrost password=secret-word dbname=platform",
        "host = 'db.example' port=5433 user=bifrost password='secret-word' dbname=platform",
    ],
)
def test_every_form_names_the_same_database(text: str) -> None:
    """URL with any driver suffix, parameters in the query, and libpq's keyword string come to the same."""
    url = parse_postgres(text)
    assert url.parameters == PARTS
    assert url.target == "db.example:5433/platform"


@pytest.mark.parametrize(
    "password",
    ["a#b-raw", "a?b-raw", "a/b-raw", "a%b-raw", "a%zz-raw", "a:b-raw", "a@b-raw", "a@b#/?:%-raw", "ä ö-raw", "#raw?"],
)
@pytest.mark.parametrize("query", ["", "?application_name=me@home&sslmode=disable"])
def test_odd_password(password: str, query: str) -> None:
    """A password with characters of the URL syntax is understood, escaped or not, and shown in no form."""
    raw = parse_postgres(f"postgresql://bifrost:{password}@db.example/platform{query}")
    quoted = parse_postgres(f"postgresql://bifrost:{quote(password, safe='')}@db.example/platform{query}")
    assert quoted.parameters == raw.parameters
    assert raw.parameters["password"] == password
    assert (raw.parameters["host"], raw.parameters["dbname"]) == ("db.example", "platform")
    for form in (raw.as_written, quoted.as_written, password, quote(password, safe=""), quote(password)):
        assert password not in masked(form)
        assert quote(password, safe="") not in masked(form)
        assert "raw" not in masked(form)
    assert "raw" not in f"{raw} {raw!r} {quoted} {quoted!r}"


def test_password_in_keyword_string_with_quotes_and_spaces() -> None:
    """The quoting of libpq is libpq's business: what it reads is what we connect with."""
    url = parse_postgres(r"host=db.example password='it\'s a secret' dbname=platform")
    assert url.parameters["password"] == "it's a secret"


def test_at_sign_in_the_query_alone() -> None:
    """An `@` that follows the `?` of a URL without credentials belongs to the query."""
    url = parse_postgres("postgresql://db.example/platform?application_name=me@home")
    assert url.parameters == {"host": "db.example", "dbname": "platform", "application_name": "me@home"}


@pytest.mark.parametrize(
    ("text", "host", "port"),
    [
        ("postgresql:///platform?host=/run/postgresql", "/run/postgresql", None),
        ("postgresql://%2Frun%2Fpostgresql/platform", "/run/postgresql", None),
        ("postgresql://[::1]:5433/platform", "::1", "5433"),
        ("postgresql://one:5433,two:5434/platform?target_session_attrs=read-write", "one,two", "5433,5434"),
        ("postgresql+psycopg://u:p@/platform?host=one:5433&host=two:5434", "one,two", "5433,5434"),
        ("postgresql://u:p@/platform?host=one,two&port=5433,5434", "one,two", "5433,5434"),
    ],
)
def test_hosts(text: str, host: str, port: str | None) -> None:
    """Unix sockets, IPv6 and several hosts reach libpq as it wants them."""
    parameters = parse_postgres(text).parameters
    assert (parameters.get("host"), parameters.get("port")) == (host, port)


@pytest.mark.parametrize(
    ("written", "sslmode"),
    [
        ("ssl=require", "require"),
        ("ssl=verify-full", "verify-full"),
        ("ssl=true", "require"),
        ("ssl=True", "require"),
        ("ssl=1", "require"),
        ("ssl=off", "disable"),
        ("sslmode=verify-ca", "verify-ca"),
    ],
)
def test_ssl_is_read_as_sslmode(written: str, sslmode: str) -> None:
    """What asyncpg calls `ssl` is libpq's `sslmode`."""
    assert parse_postgres(f"postgresql+asyncpg://h/d?{written}").parameters["sslmode"] == sslmode


@pytest.mark.parametrize("name", sorted(ASYNCPG_ONLY))
def test_asyncpg_only_parameter_is_dropped(name: str) -> None:
    """What only asyncpg knows is dropped for us, and kept for the tree."""
    text = f"postgresql+asyncpg://h/d?{name}=7&application_name=x"
    url = parse_postgres(text)
    assert url.parameters == {"host": "h", "dbname": "d", "application_name": "x"}
    assert url.as_written == text


@pytest.mark.parametrize(
    "text",
    [
        "postgresql://h/d?sslmodus=hidden-value",
        "postgresql+asyncpg://u:hidden-value@h/d?sslmodus=hidden-value",
        "host=h sslmodus=hidden-value",
    ],
)
def test_unknown_parameter_is_named_without_its_value(text: str) -> None:
    """A misspelt parameter is a fault that names it and shows no value."""
    with pytest.raises(ValueError, match="sslmodus") as refused:
        parse_postgres(text)
    assert "hidden-value" not in str(refused.value)


@pytest.mark.parametrize(
    "text",
    [
        "mysql://u:hidden-value@h/d",
        "redis://:hidden-value@h/0",
        "hidden-value",
        "u:hidden-value@h/d",
        "postgresql://u:hidden-value@h:port/d",
        "postgresql://u:hidden-value@h/d?sslmode",
        "host=h nothing password=hidden-value://x",
    ],
)
def test_what_is_no_postgresql_url(text: str) -> None:
    """Another scheme, and text without form, are refused without being quoted."""
    with pytest.raises(ValueError, match="PostgreSQL") as refused:
        parse_postgres(text)
    assert "hidden-value" not in str(refused.value)


def test_phrase_of_a_client_key_is_a_secret() -> None:
    """It is masked like the password, as `ssl_password` of Redis is."""
    parse_postgres("postgresql://db.example/a?sslmode=require&sslpassword=phrase-of-the-key")
    assert "phrase-of-the-key" not in masked("libpq says phrase-of-the-key")


def test_password_without_user() -> None:
    """A password may stand alone; the user is then libpq's default."""
    assert parse_postgres("postgresql://:secret-word@h/d").parameters == {
        "host": "h",
        "dbname": "d",
        "password": "secret-word",
    }


def test_keyword_string_with_the_sign_of_a_url() -> None:
    """`://` in the password of a keyword string does not make it a URL."""
    url = parse_postgres("host=h password=secret://word dbname=d")
    assert url.parameters["password"] == "secret://word"
    assert url.as_written.startswith("postgresql://")


@pytest.mark.parametrize(
    ("text", "seen"),
    [
        ("postgres://u:p@h/d", "postgresql://u:p@h/d"),
        ("postgresql+asyncpg://u:p@h/d?ssl=require", "postgresql+asyncpg://u:p@h/d?ssl=require"),
    ],
)
def test_tree_sees_what_the_operator_wrote(text: str, seen: str) -> None:
    """The tree gets driver suffix and parameters as written; only the scheme that SQLAlchemy lacks is fixed."""
    assert parse_postgres(text).as_written == seen


def test_tree_sees_a_keyword_string_as_url() -> None:
    """SQLAlchemy reads what we make of a keyword string, with the same values."""
    url = parse_postgres(r"host=/run/pg port=5433 user=b@b password='p/?#%\'' dbname='d b' sslmode=disable")
    read = sqlalchemy.make_url(url.as_written)
    assert (read.username, read.password, read.database) == ("b@b", "p/?#%'", "d b")
    assert dict(read.query) == {"host": "/run/pg", "port": "5433", "sslmode": "disable"}


def test_keyword_string_with_a_password_and_no_user() -> None:
    """The password stays one, and is not taken for the user."""
    read = sqlalchemy.make_url(parse_postgres("host=one,two password=secret-word dbname=d").as_written)
    assert (read.username or "", read.password) == ("", "secret-word")


@pytest.mark.parametrize(
    ("text", "target"),
    [
        ("postgresql://u:p@one,two/d", "one,two:5432,5432/d"),
        ("postgresql://u:p@/d?host=one,two", "one,two:5432/d"),
        ("postgresql://u:p@/d?host=one,two&port=5433", "one,two:5433/d"),
        ("postgresql://one/d", "one:5432/d"),
    ],
)
def test_target_stays_the_same(text: str, target: str) -> None:
    """The target names the queue of a tree. If it changed, init and worker of two releases would not meet."""
    assert parse_postgres(text).target == target


def test_one_of_several_hosts_comes_first() -> None:
    """Host and port move together, for libpq and for the tree; a host that is not named changes nothing."""
    url = parse_postgres("postgresql+asyncpg://u:p@one:5433,two:5434/d?ssl=require")
    moved = url.beginning_at("two", "5434")
    assert (moved.parameters["host"], moved.parameters["port"]) == ("two,one", "5434,5433")
    assert dict(sqlalchemy.make_url(moved.as_written).query) == {
        "host": "two,one",
        "port": "5434,5433",
        "ssl": "require",
        "target_session_attrs": "primary",
    }
    assert url.beginning_at("three", "5434") is url


def test_text_form_names_the_server() -> None:
    """The text form says server and database, also by the defaults of libpq."""
    assert str(parse_postgres("postgresql://u:secret-word@db:1/x")) == "PostgreSQL db:1/x"
    assert str(parse_postgres("postgresql://u@/")) == "PostgreSQL localhost:5432/u"


def test_digest_separates_words() -> None:
    """Two lists of words have the same digest only where they are the same list."""
    assert digest("ab", "c") != digest("a", "bc")
    assert digest("ab", "c") == digest("ab", "c")
    assert len(digest("x")) == 12


@pytest.mark.parametrize("url", ["amqp://u:p%40@h//", "amqp://u@one//;amqp://u@two//", "redis://h/0"])
def test_a_broker_without_tls_is_left_alone(url: str) -> None:
    """Nothing is asked of a connection that is not encrypted."""
    assert amqp_tls(url) == (url, {})


@pytest.mark.parametrize(
    ("url", "plain", "files"),
    [
        ("amqps://u:p%40@h:5671/v", "amqps://u:p%40@h:5671/v", {}),
        ("amqps://h//?ssl_ca_certs=/a%20b.pem", "amqps://h//", {"ca_certs": "/a b.pem"}),
        (
            "amqps://h//?heartbeat=5&login_method=PLAIN&ssl_ca_certs=/ca",
            "amqps://h//?login_method=PLAIN",
            {"ca_certs": "/ca"},
        ),
        ("amqps://h//?ssl_certfile=/c&ssl_keyfile=/k", "amqps://h//", {"certfile": "/c", "keyfile": "/k"}),
        ("amqps://h//?ssl_ca_certs=/ca;amqps://i//?ssl_ca_certs=/ca", "amqps://h//;amqps://i//", {"ca_certs": "/ca"}),
    ],
)
def test_tls_of_a_broker(url: str, plain: str, files: dict[str, str]) -> None:
    """Certificate and host name are checked, whatever the URL says; the files it names become Celery's."""
    assert amqp_tls(url) == (plain, {"cert_reqs": ssl.CERT_REQUIRED, "server_hostname": "h", **files})


@pytest.mark.parametrize("driver", ["psycopg", "psycopg2", "asyncpg"])
@pytest.mark.parametrize("hosts", ["one:5433,two:5434", "one,two:5434", "one,two"])
def test_several_hosts_are_read_by_every_driver(driver: str, hosts: str) -> None:
    """Several hosts in one address, with and without ports; the primary is meant."""
    url = parse_postgres(f"postgresql+{driver}://u:p%40w@{hosts}/d?application_name=x")
    written = sqlalchemy.make_url(url.as_written)
    _, options = written.get_dialect()().create_connect_args(written)
    ports = [(host + ":5432").split(":")[1] for host in hosts.split(",")]
    if driver == "asyncpg":
        assert (options["host"], options["port"]) == (["one", "two"], [int(port) for port in ports])
    else:
        assert (options["host"], options["port"]) == ("one,two", ",".join(ports))
    assert (options["password"], options["target_session_attrs"]) == ("p@w", "primary")
    assert url.parameters["port"] == ",".join(ports)
