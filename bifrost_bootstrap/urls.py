"""The URLs of PostgreSQL, Redis and the broker: the forms that operators write, and those that each library reads."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, field
from urllib.parse import SplitResult, parse_qsl, quote, urlencode, urlsplit

from bifrost_bootstrap.redaction import remember_secret

#: Connect arguments of asyncpg, and of SQLAlchemy's dialect for it, that libpq does not have.
ASYNCPG_ONLY = {
    "async_fallback", "command_timeout", "direct_tls", "max_cacheable_statement_size", "max_cached_statement_lifetime",
    "prepared_statement_cache_size", "prepared_statement_name_func", "server_settings", "statement_cache_size",
    "timeout",
}  # fmt: skip
#: asyncpg's `ssl=` takes booleans too.
_SSL_WORDS = dict.fromkeys(("true", "1", "on"), "require") | dict.fromkeys(("false", "0", "off"), "disable")
#: What follows the scheme of a PostgreSQL URL. Not urlsplit: a password may contain any character, escaped or not. If
#: the URL contains several "@", it is split at the first one that leaves a valid address and query.
_HOST = r"(?:\[[^\]@/?#]*\]|[^@/?#:,\[\]]*)(?::\d*)?"
_WORD = r"[\w.%-]+=[^&]*"
_URL = re.compile(
    r"(?:(?P<user>[^:/?#]*?)(?::(?P<password>.*?))?@)??"
    rf"(?P<address>{_HOST}(?:,{_HOST})*(?:/[^@?#]*)?)(?:\?(?P<query>{_WORD}(?:&{_WORD})*)?)?",
    re.DOTALL,
)
#: Schemes of Redis and broker whose connections are encrypted.
TLS_SCHEMES = frozenset({"amqps", "rediss", "valkeys"})
#: Words of an amqps:// URL that name a file, the same as those of rediss://, with their names in py-amqp.
AMQPS_FILES = {"ssl_ca_certs": "ca_certs", "ssl_certfile": "certfile", "ssl_keyfile": "keyfile"}
#: The other words of a broker's URL. `heartbeat` is dropped: the smaller of both sides' counts, and ours is small.
AMQP_WORDS = {"heartbeat": r"\d+", "login_method": r"\w+"}
#: Words of a Redis URL that redis-py and Celery read in the same way, with the pattern of their values.
REDIS_WORDS = {
    **dict.fromkeys(("username", "password", "client_name"), ".*"),
    **dict.fromkeys(("db", "max_connections", "health_check_interval"), r"\d+"),
    **dict.fromkeys(("socket_timeout", "socket_connect_timeout"), r"\d+(\.\d+)?"),
    **dict.fromkeys(("socket_keepalive", "retry_on_timeout", "ssl_check_hostname"), r"(?i)true|false|yes|no|[01]"),
    **dict.fromkeys(("ssl_ca_certs", "ssl_ca_path", "ssl_certfile", "ssl_keyfile", "ssl_password"), ".+"),
    "ssl_cert_reqs": r"(?i)(CERT_)?(none|optional|required)",
}
#: Those of them that redis-py does not accept for a Unix socket.
TCP_WORDS = frozenset({"socket_keepalive", "socket_connect_timeout"})
_SCHEME = re.compile(r"[\w+.-]+://")
_HOST_AND_PORT = re.compile(r"[^:/]+:\d+")
_STRAY_PERCENT = re.compile(r"%(?![0-9A-Fa-f]{2})")


@dataclass(frozen=True)
class PostgresUrl:
    """
    A PostgreSQL URL. Its text form and its repr never hold the password.

    as_written: for the tree's env.py, what the operator wrote. A libpq keyword string, and several hosts, are rewritten
    in the form that SQLAlchemy reads. parameters: libpq's keywords, for psycopg.
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
        """Host, port and database as written: the same for all replicas of one deployment."""
        return f"{self.parameters.get('host', '')}:{self.parameters.get('port', '5432')}/{self.database}"

    def beginning_at(self, host: str, port: str) -> PostgresUrl:
        """The URL with this one of its servers first; unchanged if it names no others, or not this one."""
        hosts = self.parameters.get("host", "").split(",")
        ports = self.parameters.get("port", "").split(",")
        servers = list(zip(hosts, ports if len(ports) > 1 else ports * len(hosts), strict=False))
        if len(servers) < 2 or (host, port) not in servers or "hostaddr" in self.parameters:
            return self
        servers.sort(key=lambda server: server != (host, port))
        names, numbers = (",".join(words) for words in zip(*servers, strict=True))
        order = {"host": names, "port": numbers}
        base, _, query = self.as_written.partition("?")
        words = dict(parse_qsl(query, keep_blank_values=True)) | order
        return PostgresUrl(f"{base}?{urlencode(words, safe=',')}", self.parameters | order)


def parse_postgres(text: str) -> PostgresUrl:
    """
    Read any form of SQLAlchemy or libpq.

    A driver suffix is ignored, `ssl` is read as `sslmode`, and parameters of asyncpg alone are dropped.

    Raises ValueError with a text that names the fault and never the value.
    """
    from psycopg import ProgrammingError
    from psycopg.conninfo import conninfo_to_dict

    is_url = _SCHEME.match(text) is not None
    libpq, words = _read_url(text) if is_url else (text, {})
    try:
        parameters = {key: str(value) for key, value in conninfo_to_dict(libpq).items() if value is not None}
    except ProgrammingError as error:
        raise ValueError(_without_values(str(error))) from None
    for word in ("password", "sslpassword"):
        remember_secret(parameters.get(word, ""))
    hosts = parameters.get("host", "").split(",")
    if is_url and len(hosts) == 1:
        # SQLAlchemy does not know `postgres://`.
        return PostgresUrl(text.replace("postgres://", "postgresql://", 1), parameters)
    if len(hosts) > 1:
        # The server that can be written to, whichever of them it is by now.
        parameters.setdefault("target_session_attrs", "primary")
        # libpq has a default for a missing port, asyncpg has none.
        parameters["port"] = ",".join(port or "5432" for port in parameters.get("port", "").split(","))
    scheme = text.split("://", 1)[0] if is_url else "postgresql"
    return PostgresUrl(_sqlalchemy_url(scheme, parameters, words or parameters), parameters)


def _read_url(text: str) -> tuple[str, dict[str, str]]:
    """A PostgreSQL URL in the form that libpq reads, and the words of its query. Raises ValueError if it is none."""
    scheme, rest = text.split("://", 1)
    if scheme.split("+")[0] not in {"postgresql", "postgres"}:
        raise ValueError(f"is no PostgreSQL URL (scheme {scheme!r}; wanted postgresql://)")
    found = _URL.fullmatch(rest)
    if found is None:
        raise ValueError("cannot be read as a PostgreSQL URL")
    user, password, address, query = (found[part] or "" for part in ("user", "password", "address", "query"))
    remember_secret(password)
    # libpq rejects characters that are not escaped; SQLAlchemy accepts them.
    user, password = (quote(_STRAY_PERCENT.sub("%25", part), safe="%") for part in (user, password))
    credentials = user + (f":{password}" if password else "")
    at = "@" if credentials else ""
    words = parse_qsl(query, keep_blank_values=True)
    kept: list[tuple[str, str]] = []
    for key, value in words:
        if key == "ssl":
            kept.append(("sslmode", _SSL_WORDS.get(value.lower(), value)))
        elif key not in ASYNCPG_ONLY:
            kept.append((key, value))
    return f"postgresql://{credentials}{at}{address}?{urlencode(_one_host(kept), quote_via=quote)}", dict(words)


def _sqlalchemy_url(scheme: str, parameters: Mapping[str, str], words: Mapping[str, str]) -> str:
    """A URL in the form that SQLAlchemy reads several hosts from: all in its query, with the other `words`."""
    credentials = quote(parameters.get("user", ""), safe="")
    if "password" in parameters:
        credentials += f":{quote(parameters['password'], safe='')}"
    at = "@" if credentials else ""
    query = {word: value for word, value in words.items() if word not in {"user", "password", "dbname"}}
    query |= {word: parameters[word] for word in ("host", "port", "target_session_attrs") if word in parameters}
    scheme = "postgresql" if scheme == "postgres" else scheme
    return f"{scheme}://{credentials}{at}/{quote(parameters.get('dbname', ''), safe='')}?{urlencode(query, safe=',')}"


def _one_host(query: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """SQLAlchemy writes several hosts as `host=one:5432&host=two:5433`, libpq as `host=one,two&port=5432,5433`."""
    hosts = [value for key, value in query if key == "host"]
    if not any(_HOST_AND_PORT.fullmatch(host) for host in hosts):
        return query
    pairs = [host.partition(":") for host in hosts]
    rest = [(key, value) for key, value in query if key not in {"host", "port"}]
    return [*rest, ("host", ",".join(pair[0] for pair in pairs)), ("port", ",".join(pair[2] for pair in pairs))]


def _without_values(message: str) -> str:
    # The first line names the parameter; the others may quote more of the string.
    if "parameter: " in message or "option " in message:
        return message.strip().splitlines()[0]
    return "cannot be read as a PostgreSQL URL"


def parse_redis(text: str) -> str:
    """
    A Redis URL in the form that redis-py and Celery both read: with `redis` for `valkey`, and redis-py's words for TLS.

    Raises ValueError with a text that names the fault and never the value.
    """
    parts = _split(text, ("redis", "rediss", "unix", "valkey", "valkeys"), REDIS_WORDS)
    scheme = parts.scheme.replace("valkey", "redis")
    words = dict(parse_qsl(parts.query, keep_blank_values=True))
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
    parts = _split(text, ("amqp", "amqps", "pyamqp"), dict.fromkeys(AMQPS_FILES, ".+") | AMQP_WORDS)
    return _without_words(parts, {"heartbeat"})


def _split(text: str, schemes: Sequence[str], known: Mapping[str, str]) -> SplitResult:
    """
    A URL that has one of these schemes, and only known words with legal values in its query.

    Raises ValueError for any other.
    """
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
    for key, value in parse_qsl(parts.query, keep_blank_values=True):
        if key in {"password", "ssl_password"}:
            remember_secret(value)
        if key.startswith("ssl_") and scheme not in TLS_SCHEMES:
            raise ValueError(f"has {key}, but {scheme}:// is not encrypted; write {scheme}s://")
        if key not in known:
            raise ValueError(f"has {key}; {scheme}:// knows {', '.join(known)}")
        if not re.fullmatch(known[key], value):
            raise ValueError(f"has a value of {key} that cannot be")
    return parts


def _without_words(parts: SplitResult, names: Container[str]) -> str:
    """The URL without the words of these names in its query."""
    kept = [pair for pair in parse_qsl(parts.query, keep_blank_values=True) if pair[0] not in names]
    return parts._replace(query=urlencode(kept)).geturl()


def several(url: str) -> list[str]:
    """The brokers of a URL: Celery takes several, separated by semicolons."""
    return re.split(r";(?=\w+://)", url)


def amqp_tls(url: str) -> tuple[str, dict[str, object]]:
    """
    A broker's URL without its words for TLS, and Celery's `broker_use_ssl` made of them; the latter empty without TLS.

    For amqps:// the server's certificate and its name are checked. py-amqp by itself checks no name, and its URL cannot
    name a CA. If there are several brokers, the files and the host name of the first one count for all.
    """
    import ssl

    url = parse_broker(url)
    brokers = [urlsplit(one) for one in several(url)]
    first = brokers[0]
    if first.scheme != "amqps":
        return url, {}
    files = {AMQPS_FILES[word]: file for word, file in parse_qsl(first.query) if word in AMQPS_FILES}
    tls = {"cert_reqs": ssl.CERT_REQUIRED, "server_hostname": first.hostname or "localhost", **files}
    return ";".join(_without_words(one, AMQPS_FILES) for one in brokers), tls


def digest(*words: str) -> str:
    """12 hex digits of a hash of these words, for names of queues."""
    return hashlib.sha256("\0".join(words).encode()).hexdigest()[:12]
