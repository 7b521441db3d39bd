"""The forms in which operators write a PostgreSQL URL, and what each of our readers makes of it."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from urllib.parse import parse_qsl, quote, urlencode, urlsplit

from bifrost_bootstrap.redaction import remember_secret

#: Connect arguments of asyncpg and of SQLAlchemy's asyncpg dialect that libpq has no word for.
ASYNCPG_ONLY = frozenset(
    {
        "async_fallback", "command_timeout", "direct_tls", "max_cacheable_statement_size",
        "max_cached_statement_lifetime", "prepared_statement_cache_size", "prepared_statement_name_func",
        "server_settings", "statement_cache_size", "timeout",
    }
)  # fmt: skip
#: asyncpg's `ssl=` takes booleans too.
_SSL_WORDS = dict.fromkeys(("true", "1", "on"), "require") | dict.fromkeys(("false", "0", "off"), "disable")
#: What follows the scheme. Not urlsplit: a password may hold any character, also unescaped. Of several readings
#: the first "@" counts after which address and query are well formed, so that a query may hold one too.
_HOST = r"(?:\[[^\]@/?#]*\]|[^@/?#:,\[\]]*)(?::\d*)?"
_WORD = r"[\w.%-]+=[^&]*"
_URL = re.compile(
    r"(?:(?P<user>[^:/?#]*?)(?::(?P<password>.*?))?@)??"
    rf"(?P<address>{_HOST}(?:,{_HOST})*(?:/[^@?#]*)?)(?:\?(?P<query>{_WORD}(?:&{_WORD})*)?)?",
    re.DOTALL,
)
#: Schemes of Redis and broker whose connections are encrypted.
TLS_SCHEMES = frozenset({"amqps", "rediss"})
#: Files that the query of an amqps:// URL may name, in the words of rediss://, and what py-amqp calls them.
AMQPS_FILES = {"ssl_ca_certs": "ca_certs", "ssl_certfile": "certfile", "ssl_keyfile": "keyfile"}
#: Other words of a broker's URL. Of heartbeats that client and server want the smaller counts, and ours is small.
AMQP_WORDS = {"heartbeat": r"\d+", "login_method": r"\w+"}
#: Words of a Redis URL that redis-py and Celery take in the same way, and what each may be.
REDIS_WORDS = {
    **dict.fromkeys(("username", "password", "client_name"), ".*"),
    **dict.fromkeys(("db", "max_connections", "health_check_interval"), r"\d+"),
    **dict.fromkeys(("socket_timeout", "socket_connect_timeout"), r"\d+(\.\d+)?"),
    **dict.fromkeys(("socket_keepalive", "retry_on_timeout", "ssl_check_hostname"), r"(?i)true|false|yes|no|[01]"),
    **dict.fromkeys(("ssl_ca_certs", "ssl_ca_path", "ssl_certfile", "ssl_keyfile", "ssl_password"), ".+"),
    "ssl_cert_reqs": r"(?i)(CERT_)?(none|optional|required)",
}
#: Words of these that a connection by a Unix socket has no use for, and that end its client.
TCP_WORDS = frozenset({"socket_keepalive", "socket_connect_timeout"})
_SCHEME = re.compile(r"[\w+.-]+://")
_HOST_AND_PORT = re.compile(r"[^:/]+:\d+")
_STRAY_PERCENT = re.compile(r"%(?![0-9A-Fa-f]{2})")


@dataclass(frozen=True)
class PostgresUrl:
    """
    A PostgreSQL URL. Its text form and its repr never hold the password.

    as_written: what the operator wrote, for the tree's env.py (a libpq keyword string is turned into a URL,
    since SQLAlchemy reads no other). parameters: libpq's keywords, for psycopg.
    """

    as_written: str = field(repr=False)
    parameters: dict[str, str] = field(repr=False)

    def __str__(self) -> str:
        host = self.parameters.get("host", "localhost")
        return f"PostgreSQL {host}:{self.parameters.get('port', '5432')}/{self.database}"

    @property
    def database(self) -> str:
        return self.parameters.get("dbname", self.parameters.get("user", ""))

    @property
    def target(self) -> str:
        """Host, port and database as written: what two replicas of one deployment have in common."""
        return f"{self.parameters.get('host', '')}:{self.parameters.get('port', '5432')}/{self.database}"

    def beginning_at(self, host: str, port: str) -> PostgresUrl:
        """The same servers, this one tried first; unchanged where it is none of several."""
        hosts, ports = (self.parameters.get(word, "").split(",") for word in ("host", "port"))
        servers = list(zip(hosts, ports if len(ports) > 1 else ports * len(hosts), strict=False))
        if len(servers) < 2 or (host, port) not in servers or "hostaddr" in self.parameters:
            return self
        servers.sort(key=lambda server: server != (host, port))
        names, numbers = (",".join(words) for words in zip(*servers, strict=True))
        parameters = {**self.parameters, "host": names, "port": numbers}
        return replace(self, as_written=_with_several_hosts(self.as_written, parameters), parameters=parameters)


def parse_postgres(text: str) -> PostgresUrl:
    """
    Read any SQLAlchemy or libpq form.

    A driver suffix is ignored, `ssl` is read as `sslmode`, asyncpg-only parameters are dropped.

    Raises ValueError with a text that names the fault and never the value.
    """
    from psycopg import ProgrammingError
    from psycopg.conninfo import conninfo_to_dict

    is_url = _SCHEME.match(text) is not None
    libpq = _libpq_url(text) if is_url else text
    try:
        parameters = {key: str(value) for key, value in conninfo_to_dict(libpq).items() if value is not None}
    except ProgrammingError as error:
        raise ValueError(_without_values(str(error))) from None
    remember_secret(parameters.get("password", ""))
    # SQLAlchemy knows no `postgres://`, and several hosts in its own way only.
    as_written = text.replace("postgres://", "postgresql://", 1) if is_url else _as_url(parameters)
    if "," in parameters.get("host", ""):
        # Of several servers the one that may be written to is meant, whichever that is by now.
        parameters.setdefault("target_session_attrs", "primary")
        # libpq has a default for each, asyncpg for none.
        parameters["port"] = ",".join(port or "5432" for port in parameters.get("port", "5432").split(","))
        as_written = _with_several_hosts(as_written, parameters)
    return PostgresUrl(as_written, parameters)


def _with_several_hosts(url: str, parameters: Mapping[str, str]) -> str:
    """A URL with its user, database and words, whose hosts are where SQLAlchemy looks for them."""
    scheme, rest = url.split("://", 1)
    found = _URL.fullmatch(rest)
    assert found
    user, password, query = (found[part] or "" for part in ("user", "password", "query"))
    credentials = f"{user}:{password}@" if password else f"{user}@" if user else ""
    words = dict(parse_qsl(query, keep_blank_values=True))
    words |= {word: parameters[word] for word in ("host", "port", "target_session_attrs") if word in parameters}
    return f"{scheme}://{credentials}/{quote(parameters.get('dbname', ''), safe='')}?{urlencode(words, safe=',')}"


def _libpq_url(text: str) -> str:
    scheme, rest = text.split("://", 1)
    if scheme.split("+")[0] not in {"postgresql", "postgres"}:
        raise ValueError(f"is no PostgreSQL URL (scheme {scheme!r}; wanted postgresql://)")
    found = _URL.fullmatch(rest)
    if found is None:
        raise ValueError("cannot be read as a PostgreSQL URL")
    user, password, address, query = (found[part] or "" for part in ("user", "password", "address", "query"))
    remember_secret(password)
    # libpq refuses what is not escaped; SQLAlchemy takes it as it is.
    user, password = (quote(_STRAY_PERCENT.sub("%25", part), safe="%") for part in (user, password))
    credentials = user + (f":{password}" if password else "")
    at = "@" if credentials else ""
    kept: list[tuple[str, str]] = []
    for key, value in parse_qsl(query, keep_blank_values=True):
        if key == "ssl":
            kept.append(("sslmode", _SSL_WORDS.get(value.lower(), value)))
        elif key not in ASYNCPG_ONLY:
            kept.append((key, value))
    return f"postgresql://{credentials}{at}{address}?{urlencode(_one_host(kept), quote_via=quote)}"


def _one_host(query: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """SQLAlchemy writes several hosts as `host=one:5432&host=two:5433`, libpq as `host=one,two&port=5432,5433`."""
    hosts = [value for key, value in query if key == "host"]
    if not any(_HOST_AND_PORT.fullmatch(host) for host in hosts):
        return query
    pairs = [host.partition(":") for host in hosts]
    rest = [(key, value) for key, value in query if key not in {"host", "port"}]
    return [*rest, ("host", ",".join(pair[0] for pair in pairs)), ("port", ",".join(pair[2] for pair in pairs))]


def _without_values(message: str) -> str:
    # libpq names the parameter first and may quote more of the string after it.
    if "parameter: " in message or "option " in message:
        return message.strip().splitlines()[0]
    return "cannot be read as a PostgreSQL URL"


def _as_url(parameters: dict[str, str]) -> str:
    rest = {key: value for key, value in parameters.items() if key not in {"user", "password", "dbname"}}
    user = ":".join(quote(parameters[key], safe="") for key in ("user", "password") if key in parameters)
    return f"postgresql://{user}{'@' if user else ''}/{quote(parameters.get('dbname', ''), safe='')}?{urlencode(rest)}"


def parse_redis(text: str) -> str:
    """
    A Redis URL as redis-py and Celery both read it: `valkey` is `redis`, TLS words are in redis-py's spelling.

    Raises ValueError with a text that names the fault and never the value.
    """
    parts = urlsplit(_well_formed(text, "redis", "rediss", "unix", "valkey", "valkeys"))
    scheme = parts.scheme.replace("valkey", "redis")
    words = dict(_known_words(parts.query, REDIS_WORDS, scheme))
    if "ssl_cert_reqs" in words:
        words["ssl_cert_reqs"] = words["ssl_cert_reqs"].lower().removeprefix("cert_")
    if scheme == "unix":
        words = {key: value for key, value in words.items() if key not in TCP_WORDS}
    elif not re.fullmatch(r"(/\d*)?", parts.path):
        raise ValueError("names a database after the address that is no number")
    return parts._replace(scheme=scheme, query=urlencode(words)).geturl()


def parse_broker(text: str) -> str:
    """
    One URL of RabbitMQ, or several with semicolons between them, or one of Redis, in the form that Celery reads.

    Raises ValueError with a text that names the fault and never the value.
    """
    return ";".join(_parse_broker(url) for url in several(text))


def _parse_broker(text: str) -> str:
    if text.startswith("redis"):
        return text if text.startswith("redis+socket") else parse_redis(text)
    parts = urlsplit(_well_formed(text, "amqp", "amqps", "pyamqp"))
    words = _known_words(parts.query, dict.fromkeys(AMQPS_FILES, ".+") | AMQP_WORDS, parts.scheme)
    return parts._replace(query=urlencode([pair for pair in words if pair[0] != "heartbeat"])).geturl()


def _well_formed(text: str, *schemes: str) -> str:
    """The URL. Raises ValueError where it is none, or of another scheme than these."""
    scheme = found[1] if (found := re.match(r"([\w+.-]+)://", text)) else ""
    if scheme not in schemes:
        raise ValueError(f"is no URL of this kind (scheme {scheme!r}; wanted {', '.join(schemes)})")
    try:
        parts = urlsplit(text)
        # A "/", "?" or "#" that is not escaped ends the address in the middle of the password.
        if parts.port == 0 or "@" in parts.path or parts.fragment:
            raise ValueError
    except ValueError:
        raise ValueError("is no well-formed URL; in a password write / as %2F, ? as %3F and # as %23") from None
    remember_secret(parts.password or "")
    return text


def _known_words(query: str, known: Mapping[str, str], scheme: str) -> list[tuple[str, str]]:
    """The words of a query. Raises ValueError where one is not known, or has a value that it cannot have."""
    words = parse_qsl(query, keep_blank_values=True)
    for key, value in words:
        if key in {"password", "ssl_password"}:
            remember_secret(value)
        if key.startswith("ssl_") and scheme not in TLS_SCHEMES:
            raise ValueError(f"has {key}, but {scheme}:// is not encrypted; write {scheme}s://")
        if key not in known:
            raise ValueError(f"has {key}; {scheme}:// knows {', '.join(known)}")
        if not re.fullmatch(known[key], value):
            raise ValueError(f"has a value of {key} that cannot be")
    return words


def several(url: str) -> list[str]:
    """Celery takes several brokers in turn, separated by semicolons."""
    return re.split(r";(?=\w+://)", url)


def amqp_tls(url: str) -> tuple[str, dict[str, object]]:
    """
    A broker's URL without what its query says about TLS, and that as Celery's `broker_use_ssl`.

    For amqps:// the server's certificate and its name are checked: py-amqp by itself compares no name, and no URL
    of its own can name a CA. Of several brokers the first one's files and name count for all. Empty for any other
    scheme.
    """
    import ssl

    url = parse_broker(url)
    first = urlsplit(several(url)[0])
    if first.scheme != "amqps":
        return url, {}
    files = {AMQPS_FILES[key]: value for key, value in parse_qsl(first.query) if key in AMQPS_FILES}
    plain = (urlsplit(one) for one in several(url))
    rest = (
        one._replace(query=urlencode([pair for pair in parse_qsl(one.query) if pair[0] not in AMQPS_FILES]))
        for one in plain
    )
    tls = {"cert_reqs": ssl.CERT_REQUIRED, "server_hostname": first.hostname or "localhost", **files}
    return ";".join(one.geturl() for one in rest), tls


def digest(*words: str) -> str:
    """12 hex digits that stand for these words, for names of queues."""
    return hashlib.sha256("\0".join(words).encode()).hexdigest()[:12]
