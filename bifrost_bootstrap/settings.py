"""
The settings: the only reader of the environment.

Each field of `Settings` is one variable, `BIFROST_` + its name in capitals. `load` reads them as a whole and
reports all faults at once; nothing here connects to a server, and no setting defaults to one.
"""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, PlainSerializer, ValidationError

from bifrost_bootstrap.errors import SettingsError
from bifrost_bootstrap.redaction import remember_environment
from bifrost_bootstrap.urls import PostgresUrl, parse_broker, parse_postgres, parse_redis

PREFIX = "BIFROST_"
#: Variables that serve without the prefix where the prefixed one is absent.
UNPREFIXED = ("DATABASE_URL", "REDIS_URL", "RABBITMQ_URL")
#: Where Kubernetes reads a container's last words.
KUBERNETES_TERMINATION_LOG = Path("/dev/termination-log")
#: The settings that say how and where to tell what is wrong with the others.
OUTPUT_SETTINGS = ("log_format", "log_level", "termination_log")
#: The trees of a working folder, and what is said where none is named either.
INI, PYPROJECT = Path("alembic.ini"), Path("pyproject.toml")
NO_TREE = (
    "BIFROST_ALEMBIC_CONFIG is not set, nor ALEMBIC_CONFIG, and there is no alembic.ini in the working folder, "
    "nor a pyproject.toml with [tool.alembic]"
)
#: Seconds in the units that a duration may be written in.
_UNITS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}

#: What a command may need: the URL of a server, or a tree.
Need = Literal["database", "redis", "rabbitmq", "tree"]
#: The fields of each server.
SERVERS: dict[Need, tuple[str, ...]] = {
    "database": ("database_url", "migration_database_url"),
    "redis": ("redis_url",),
    "rabbitmq": ("rabbitmq_url",),
}


def duration(value: object) -> float:
    """Seconds from `90`, `90s`, `5m`, `1h30m`. Raises ValueError with what is legal."""
    text = str(value).strip().lower()
    if re.fullmatch(r"\d+(\.\d+)?", text):
        return float(text)
    parts = re.findall(r"(\d+(?:\.\d+)?)(ms|s|m|h|d)", text)
    if not parts or "".join(number + unit for number, unit in parts) != text:
        raise ValueError("is no duration; write for example 90s, 5m or 1h30m")
    return sum(float(number) * _UNITS[unit] for number, unit in parts)


def _postgres_url(value: object) -> object:
    return parse_postgres(value) if isinstance(value, str) else value


def _words(value: object) -> object:
    return shlex.split(value) if isinstance(value, str) else value


Duration = Annotated[float, BeforeValidator(duration), Field(ge=0)]
DatabaseUrl = Annotated[PostgresUrl, BeforeValidator(_postgres_url), PlainSerializer(str)]
RedisUrl = Annotated[str, AfterValidator(lambda url: parse_redis(url) and url)]
#: redis:// is what `--embedded` uses; RabbitMQ is what is supported.
BrokerUrl = Annotated[str, AfterValidator(lambda url: parse_broker(url) and url)]


class Settings(BaseModel):
    """What one process was told. Durations are seconds. `repr` holds no secret."""

    model_config = ConfigDict(frozen=True, extra="forbid", arbitrary_types_allowed=True)

    #: The database of the platform, also through a pooler: the warm reads it, `check` looks at it.
    database_url: DatabaseUrl | None = Field(default=None, repr=False)
    #: A direct connection for migrations, where the former goes through a pooler. Default: the former.
    migration_database_url: DatabaseUrl | None = Field(default=None, repr=False)
    #: The module cache; Celery's result backend too, under a prefix of its own.
    redis_url: RedisUrl | None = Field(default=None, repr=False)
    #: Celery's broker.
    rabbitmq_url: BrokerUrl | None = Field(default=None, repr=False)

    #: The tree's `alembic.ini` or `pyproject.toml`, or `builtin`. Default: `ALEMBIC_CONFIG`, then either in `.`.
    alembic_config: str | None = None
    #: Section of that file with the tree's options, as `alembic --name` has it. Default: `alembic`.
    alembic_name: str | None = None
    #: `key=value` pairs for env.py, as `alembic -x` has them, separated by blanks, quoted as for a shell.
    alembic_x: Annotated[tuple[str, ...], BeforeValidator(_words)] = ()
    #: Interpreter that has the tree's own Alembic and SQLAlchemy. Default: ours.
    alembic_python: str | None = None
    #: Version table of the tree, `schema.table` where it is not on the search path.
    alembic_version_table: str = Field(default="alembic_version", pattern=r"^[^\s\"'.]+(\.[^\s\"'.]+)?$")
    #: Start although the database is at a revision that this image does not have (rollback, rolling deploy).
    allow_ahead: bool = False
    #: How long a statement of a transactional revision waits for a lock before it is retried.
    migration_lock_timeout: Duration = 5.0

    #: Table of the modules: `workspace_files`, `file_index`, or `none`; `auto` takes the first that is there.
    module_source: Literal["auto", "workspace_files", "file_index", "none"] = "auto"
    #: Time to live of cache entries; 0 is none. Default: none for `workspace_files`, 24 h for `file_index`.
    module_cache_ttl: Duration | None = None
    #: A lost cache is warmed again by a standing worker within this time, in which it looks twice; 0 turns that off.
    cache_guard_interval: Duration = 60.0

    #: The whole of `init`, and of a task that was called by hand.
    init_timeout: Duration = 600.0
    #: Set by `init --with-worker` for the worker it brings along: the only queue that it consumes.
    run_queue: str | None = None
    #: `text` or `json` (one object a line), on stderr.
    log_format: Literal["text", "json"] = "text"
    #: `DEBUG` shows tracebacks and what the tree prints.
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = "INFO"
    #: Gets one JSON line with the verdict. Default: Kubernetes' own file where it exists.
    termination_log: Path | None = None
    #: Touched every few seconds by a worker that is alive.
    worker_health_file: Path | None = None

    @property
    def database(self) -> PostgresUrl:
        """The database URL of a command that was loaded with `needs=("database",)`."""
        assert self.database_url is not None
        return self.database_url

    @property
    def migration_database(self) -> PostgresUrl:
        return self.migration_database_url or self.database

    @property
    def redis(self) -> str:
        """The Redis URL of a command that was loaded with `needs=("redis",)`."""
        assert self.redis_url is not None
        return self.redis_url


def load(needs: Iterable[Need] = (), environment: Mapping[str, str] | None = None) -> Settings:
    """
    Read the environment (default: the process's own).

    Raises SettingsError with every fault: one of `needs` is missing, a value cannot be read, a variable and its
    `_FILE` twin are both set, a file cannot be read. A value is never part of a message. The URL of a server that is
    not in `needs` may be faulty; it then counts as not set.
    """
    needs = set(needs)
    values, faults = _read_all(os.environ if environment is None else environment)
    faulty = {name for name, _ in faults}
    faults += _missing(needs, values.keys() | faulty)
    optional = {name for server, names in SERVERS.items() if server not in needs for name in names}
    reported = [fault for name, fault in faults if name not in optional]
    if reported:
        raise SettingsError(reported)
    return Settings.model_validate({name: value for name, value in values.items() if name not in faulty})


def _missing(needs: Collection[Need], known: Collection[str]) -> list[tuple[str, str]]:
    """(field, fault) for each of `needs` that has no value. known: the fields with a value or a fault."""
    faults = []
    if "tree" in needs and "alembic_config" not in known and not default_tree():
        faults.append(("alembic_config", NO_TREE))
    for server in SERVERS:
        if server in needs and f"{server}_url" not in known:
            fault = f"{PREFIX}{server.upper()}_URL is not set (nor {server.upper()}_URL, nor their _FILE)"
            faults.append((f"{server}_url", fault))
    return faults


def default_tree() -> Path | None:
    """The file in the working folder that Alembic takes by itself."""
    return next((file for file in (INI, PYPROJECT) if has_tree(file)), None)


def has_tree(file: Path) -> bool:
    """Whether this is an ini file, or a pyproject.toml with a table `tool.alembic`."""
    if not file.is_file():
        return False
    if file.name != PYPROJECT.name:
        return True
    # Only here: importing it takes 6 ms, and hardly any working folder of a container has such a file.
    import tomllib

    try:
        return "alembic" in tomllib.loads(file.read_text(encoding="utf-8")).get("tool", {})
    except (OSError, ValueError):
        return False


def fault_of(server: Need, environment: Mapping[str, str] | None = None) -> str:
    """What is wrong with the URL of a server that a command can do without; "" where it is right, or not set."""
    _, faults = _read_all(os.environ if environment is None else environment)
    return "; ".join(fault for name, fault in faults if name in SERVERS[server])


def _read_all(environment: Mapping[str, str]) -> tuple[dict[str, str], list[tuple[str, str]]]:
    """The values by field, and (field, what is wrong with it)."""
    remember_environment(environment)
    faults: list[tuple[str, str]] = []
    values: dict[str, str] = {}
    sources: dict[str, str] = {}
    for name in Settings.model_fields:
        for variable in _variables(name):
            value, fault = _read(variable, environment)
            if fault:
                faults.append((name, fault))
            if value:
                values[name], sources[name] = value, variable
                break
    if "alembic_config" not in values and environment.get("ALEMBIC_CONFIG"):
        values["alembic_config"] = environment["ALEMBIC_CONFIG"]
    values = _with_kubernetes(values)
    return values, faults + _malformed(values, sources)


def load_output_settings(environment: Mapping[str, str] | None = None) -> Settings:
    """
    How and where to tell: log format, log level, termination log; everything else is left out.

    Raises nothing: what is wrong with one of them is for `load` to say, and must be said somehow.
    """
    environment = os.environ if environment is None else environment
    remember_environment(environment)
    values = {name: _read(PREFIX + name.upper(), environment)[0] for name in OUTPUT_SETTINGS}
    legal = {name: value for name, value in values.items() if value and not _malformed({name: value}, {name: ""})}
    return Settings.model_validate(_with_kubernetes(legal))


def _with_kubernetes(values: dict[str, str]) -> dict[str, str]:
    if KUBERNETES_TERMINATION_LOG.exists():
        return {"termination_log": str(KUBERNETES_TERMINATION_LOG), **values}
    return values


def _variables(name: str) -> list[str]:
    capitals = name.upper()
    return [PREFIX + capitals, *([capitals] if capitals in UNPREFIXED else [])]


def _read(variable: str, environment: Mapping[str, str]) -> tuple[str, str]:
    """The value of a variable or of the file that `{variable}_FILE` names, and what is wrong with it."""
    value, file = environment.get(variable, ""), environment.get(f"{variable}_FILE", "")
    if value and file:
        return "", f"{variable} and {variable}_FILE are both set; keep one"
    if not file:
        return value, ""
    try:
        value = Path(file).read_text(encoding="utf-8").strip()
        return value, "" if value else f"{variable}_FILE names {file}, which is empty"
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "is not UTF-8 text"
        return "", f"{variable}_FILE names {file}, which cannot be read: {reason}"


def _malformed(values: Mapping[str, str], sources: Mapping[str, str]) -> list[tuple[str, str]]:
    """(field, what is wrong with its value)."""
    try:
        Settings.model_validate(values)
    except ValidationError as error:
        faults = [
            (str(fault["loc"][0]), fault["msg"]) for fault in error.errors(include_url=False, include_input=False)
        ]
        return [(name, f"{sources[name]} {text.removeprefix('Value error, ')}") for name, text in faults]
    return []


def child_environment(**changes: str) -> dict[str, str]:
    """The process's environment with `changes`, for a process that we start; no `_FILE` twin tells it otherwise."""
    return {name: value for name, value in os.environ.items() if name.removesuffix("_FILE") not in changes} | changes


def forget_celery_variables() -> None:
    """
    Drop `CELERY_*` variables from this process.

    Celery prefers several of them to its configuration, so a stray one would send tasks to another broker.
    """
    for variable in [name for name in os.environ if name.startswith("CELERY_")]:
        del os.environ[variable]


def use_embedded_servers(database_url: str, redis_url: str) -> list[str]:
    """
    Point this process, and what it starts, at embedded servers; the broker is that Redis too.

    Without a named tree it is the builtin one. Returns the variables of the environment that are ignored now.
    """
    ignored = []
    for url in (*UNPREFIXED, "MIGRATION_DATABASE_URL"):
        for variable in (PREFIX + url, url, f"{PREFIX}{url}_FILE", f"{url}_FILE"):
            if os.environ.pop(variable, ""):
                ignored.append(variable)
    os.environ[f"{PREFIX}DATABASE_URL"] = database_url
    os.environ[f"{PREFIX}REDIS_URL"] = os.environ[f"{PREFIX}RABBITMQ_URL"] = redis_url
    os.environ.setdefault(f"{PREFIX}ALEMBIC_CONFIG", "builtin")
    return ignored
