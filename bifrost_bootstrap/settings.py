"""
The settings: the only reader of the environment.

Each field of `Settings` is one variable: `BIFROST_` and its name in capitals. `load` reads all of them and reports all
faults in one error. Nothing here connects to a server, and no URL has a default.
"""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ByteSize, ConfigDict, Field, ValidationError

from bifrost_bootstrap.errors import SettingsError
from bifrost_bootstrap.redaction import remember_environment
from bifrost_bootstrap.urls import PostgresUrl, parse_broker, parse_postgres, parse_redis

PREFIX = "BIFROST_"
#: Variables that are read without the prefix if the prefixed one is not set.
UNPREFIXED = ("DATABASE_URL", "REDIS_URL", "RABBITMQ_URL")
#: The file that Kubernetes reads a container's last message from.
KUBERNETES_TERMINATION_LOG = Path("/dev/termination-log")
#: The settings of the output. They are read before the others, whose faults are reported through them.
OUTPUT_SETTINGS = ("log_format", "log_level", "termination_log")
#: The files in the working folder that may configure a tree, in Alembic's order.
INI = Path("alembic.ini")
PYPROJECT = Path("pyproject.toml")
NO_TREE = (
    "BIFROST_ALEMBIC_CONFIG is not set, nor ALEMBIC_CONFIG, and there is no alembic.ini in the working folder, "
    "nor a pyproject.toml with [tool.alembic]"
)
#: Seconds in each unit of a duration.
_UNITS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
_NUMBER = r"\d+(?:\.\d+)?"

#: What a command may need: the URL of a server, a tree, or (if one is set) the URL of a database for rehearsals.
Need = Literal["database", "redis", "rabbitmq", "tree", "rehearsal"]
#: The fields of each server. The first is the one that a command needs.
SERVERS: dict[Need, tuple[str, ...]] = {
    "database": ("database_url", "migration_database_url"),
    "redis": ("redis_url",),
    "rabbitmq": ("rabbitmq_url",),
}


def duration(value: str) -> float:
    """Seconds from `90`, `90s`, `5m`, `1h30m`. Raises ValueError with examples for anything else."""
    text = value.strip().lower()
    if re.fullmatch(_NUMBER, text):
        return float(text)
    if not re.fullmatch(rf"({_NUMBER}(ms|[smhd]))+", text):
        raise ValueError("is no duration; write for example 90s, 5m or 1h30m")
    return sum(float(number) * _UNITS[unit] for number, unit in re.findall(rf"({_NUMBER})(ms|[smhd])", text))


def _redis_url(value: str) -> str:
    parse_redis(value)
    return value


def _broker_url(value: str) -> str:
    parse_broker(value)
    return value


def _kubernetes_termination_log() -> Path | None:
    return KUBERNETES_TERMINATION_LOG if KUBERNETES_TERMINATION_LOG.exists() else None


Duration = Annotated[float, BeforeValidator(duration), Field(ge=0)]
DatabaseUrl = Annotated[PostgresUrl, BeforeValidator(parse_postgres)]
RedisUrl = Annotated[str, AfterValidator(_redis_url)]
#: RabbitMQ is what is supported; `--embedded` uses its Redis.
BrokerUrl = Annotated[str, AfterValidator(_broker_url)]


class Settings(BaseModel):
    """The settings of one process. Durations are in seconds. The `repr` holds no secret."""

    model_config = ConfigDict(frozen=True, extra="forbid", arbitrary_types_allowed=True)

    #: The database of the platform, through a pooler or not. The warm reads it, and so does `check`.
    database_url: DatabaseUrl | None = Field(default=None, repr=False)
    #: A direct connection for migrations if the other URL goes through a pooler. Default: `BIFROST_DATABASE_URL`.
    migration_database_url: DatabaseUrl | None = Field(default=None, repr=False)
    #: The module cache, and Celery's result backend under a prefix of its own.
    redis_url: RedisUrl | None = Field(default=None, repr=False)
    #: Celery's broker.
    rabbitmq_url: BrokerUrl | None = Field(default=None, repr=False)

    #: The tree's `alembic.ini` or `pyproject.toml`, or `builtin`. Default: `ALEMBIC_CONFIG`, else either in `.`.
    alembic_config: str | None = None
    #: Section of that file with the tree's options, as in `alembic --name`. Default: `alembic`.
    alembic_name: str | None = None
    #: `key=value` pairs for env.py, as in `alembic -x`, separated by blanks and quoted as for a shell.
    alembic_x: Annotated[tuple[str, ...], BeforeValidator(shlex.split)] = ()
    #: Interpreter with the tree's own Alembic and SQLAlchemy. Default: the one that runs this program.
    alembic_python: str | None = None
    #: Version table of the tree; `schema.table` if it is not on the search path.
    alembic_version_table: str = Field(default="alembic_version", pattern=r"^[^\s\"'.]+(\.[^\s\"'.]+)?$")
    #: Start even if the database is at a revision that this image does not have (rollback, rolling deploy).
    allow_ahead: bool = False
    #: How long a statement of a transactional revision waits for a lock before the revision is retried.
    migration_lock_timeout: Duration = 5.0

    #: An empty database for `rehearse`, on a server as new as the live one. Default: an embedded server.
    rehearsal_database_url: DatabaseUrl | None = Field(default=None, repr=False)
    #: `rehearse` warns of locks that last on tables of this size (bytes; `100MB`, `2GiB`) and above.
    rehearsal_large: ByteSize = ByteSize(100_000_000)

    #: Table of the modules: `workspace_files`, `file_index`, or `none`. `auto` takes the first that exists.
    module_source: Literal["auto", "workspace_files", "file_index", "none"] = "auto"
    #: Time to live of cache entries; 0 means none. Default: none for `workspace_files`, 24 h for `file_index`.
    module_cache_ttl: Duration | None = None
    #: A standing worker warms a lost cache again within this time. It checks the cache twice in it. 0 turns this off.
    cache_guard_interval: Duration = 60.0

    #: Deadline of `init`, and of a task that is called by hand.
    init_timeout: Duration = 600.0
    #: The only queue that the worker of `init --with-worker` consumes. `init` sets it.
    run_queue: str | None = None
    #: Format of the log on stderr: `text`, or `json` (one object per line).
    log_format: Literal["text", "json"] = "text"
    #: `DEBUG` adds tracebacks and the output of the tree.
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = "INFO"
    #: File that gets one JSON line with the verdict. Default: that of Kubernetes, if it exists.
    termination_log: Path | None = Field(default_factory=_kubernetes_termination_log)
    #: File that a living worker touches every few seconds.
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
    Read the environment (default: that of the process).

    Raises SettingsError with every fault: one of `needs` is not set, a value is not legal, a variable and its `_FILE`
    twin are both set, a file cannot be read. No fault shows a value. If the URL of a server that is not in `needs` is
    faulty, it counts as not set.
    """
    needs = set(needs)
    settings, faults = _read(environment)
    for server, fields in SERVERS.items():
        if server not in needs:
            for field in fields:
                faults.pop(field, None)
        elif getattr(settings, fields[0]) is None:
            name = fields[0].upper()
            faults.setdefault(fields[0], f"{PREFIX}{name} is not set (nor {name}, nor their _FILE)")
    if "rehearsal" not in needs:
        faults.pop("rehearsal_database_url", None)
    if "tree" in needs and settings.alembic_config is None and not default_tree():
        faults.setdefault("alembic_config", NO_TREE)
    if faults:
        raise SettingsError(list(faults.values()))
    return settings


def fault_of(server: Need, environment: Mapping[str, str] | None = None) -> str:
    """What is wrong with the URLs of a server that a command can do without; "" if nothing, or if none is set."""
    _, faults = _read(environment)
    return "; ".join(faults[field] for field in SERVERS[server] if field in faults)


def load_output_settings(environment: Mapping[str, str] | None = None) -> Settings:
    """The settings of the output; a faulty one has its default, and `load` reports it. Raises nothing."""
    settings, _ = _read(environment, OUTPUT_SETTINGS)
    return settings


def _read(
    environment: Mapping[str, str] | None, fields: Iterable[str] = Settings.model_fields
) -> tuple[Settings, dict[str, str]]:
    """The settings without the faulty ones, and the fault of each field that has one."""
    environment = os.environ if environment is None else environment
    remember_environment(environment)
    values: dict[str, str] = {}
    faults: dict[str, str] = {}
    for field in fields:
        try:
            if value := _read_field(field, environment):
                values[field] = value
        except ValueError as error:
            faults[field] = str(error)
    if "alembic_config" not in values and environment.get("ALEMBIC_CONFIG"):
        values["alembic_config"] = environment["ALEMBIC_CONFIG"]
    return Settings.model_validate(values), faults


def _read_field(field: str, environment: Mapping[str, str]) -> str:
    """The legal text of a field; "" if it is not set. Raises ValueError with a fault that begins with the variable."""
    name = field.upper()
    for variable in (PREFIX + name, name) if name in UNPREFIXED else (PREFIX + name,):
        value = _read_variable(variable, environment)
        if not value:
            continue
        try:
            Settings.model_validate({field: value})
        except ValidationError as error:
            reason = error.errors(include_url=False, include_input=False)[0]["msg"]
            raise ValueError(f"{variable} {reason.removeprefix('Value error, ')}") from None
        return value
    return ""


def _read_variable(variable: str, environment: Mapping[str, str]) -> str:
    """
    The value of a variable, or of the file that its `_FILE` twin names; "" if neither is set.

    Raises ValueError if both are set, and if the file is empty or cannot be read.
    """
    value = environment.get(variable, "")
    file = environment.get(f"{variable}_FILE", "")
    if not file:
        return value
    if value:
        raise ValueError(f"{variable} and {variable}_FILE are both set; keep one")
    try:
        value = Path(file).read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "is not UTF-8 text"
        raise ValueError(f"{variable}_FILE names {file}, which cannot be read: {reason}") from None
    if not value:
        raise ValueError(f"{variable}_FILE names {file}, which is empty")
    return value


def default_tree() -> Path | None:
    """The file in the working folder that configures a tree, or None."""
    return next((file for file in (INI, PYPROJECT) if has_tree(file)), None)


def has_tree(file: Path) -> bool:
    """Whether this file is there and, if it is a pyproject.toml, has a table `tool.alembic`."""
    if not file.is_file():
        return False
    if file.name != PYPROJECT.name:
        return True
    # Imported here: it takes 6 ms, and hardly any working folder of a container has such a file.
    import tomllib

    try:
        return "alembic" in tomllib.loads(file.read_text(encoding="utf-8")).get("tool", {})
    except (OSError, ValueError):
        return False


def child_environment(**changes: str) -> dict[str, str]:
    """The environment of this process with `changes`, for a child process. Their `_FILE` twins are left out."""
    kept = {name: value for name, value in os.environ.items() if name.removesuffix("_FILE") not in changes}
    return kept | changes


def forget_celery_variables() -> None:
    """
    Remove all `CELERY_*` variables from this process.

    Celery prefers some of them to its configuration, so a stray one would send tasks to another broker.
    """
    for name in list(os.environ):
        if name.startswith("CELERY_"):
            del os.environ[name]


def use_embedded_servers(database_url: str, redis_url: str) -> list[str]:
    """
    Set the URLs of this process and its children to embedded servers. The broker is the same Redis.

    If no tree is set, it is the builtin one. Returns the names of the variables that were set and are ignored.
    """
    ignored = []
    for name in (*UNPREFIXED, "MIGRATION_DATABASE_URL"):
        for variable in (PREFIX + name, name, f"{PREFIX}{name}_FILE", f"{name}_FILE"):
            if os.environ.pop(variable, ""):
                ignored.append(variable)
    os.environ["BIFROST_DATABASE_URL"] = database_url
    os.environ["BIFROST_REDIS_URL"] = redis_url
    os.environ["BIFROST_RABBITMQ_URL"] = redis_url
    os.environ.setdefault("BIFROST_ALEMBIC_CONFIG", "builtin")
    return ignored
