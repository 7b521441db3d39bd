"""The settings: accepted values, and errors for the others."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from bifrost_bootstrap import settings as environment
from bifrost_bootstrap.errors import SettingsError
from bifrost_bootstrap.redaction import masked
from bifrost_bootstrap.settings import duration, load
from bifrost_bootstrap.urls import PostgresUrl

URLS = {
    "BIFROST_DATABASE_URL": "postgresql://u:one-word@db/platform",
    "BIFROST_REDIS_URL": "redis://:two-words@cache:6379/1",
    "BIFROST_RABBITMQ_URL": "amqp://u:three-words@broker//",
}


def fault(variables: dict[str, str], *needs: environment.Need) -> str:
    """The message with which these are refused; without `needs`, by a command that uses the servers they are about."""
    with pytest.raises(SettingsError) as refused:
        load(needs or [need for need in environment.SERVERS if need.upper() in " ".join(variables)], variables)
    return str(refused.value)


def test_nothing_is_needed_and_nothing_defaults_to_a_server() -> None:
    """Without `needs`, an empty environment is valid, and no URL has a default."""
    settings = load((), {})
    assert (settings.database_url, settings.redis_url, settings.rabbitmq_url) == (None, None, None)
    assert settings.init_timeout == 600
    assert settings.module_cache_ttl is None


def test_every_missing_variable_in_one_message() -> None:
    """One message names all missing variables."""
    message = fault({}, "database", "redis", "rabbitmq")
    for name in ("DATABASE_URL", "REDIS_URL", "RABBITMQ_URL"):
        assert f"BIFROST_{name} is not set (nor {name}, nor their _FILE)" in message


def test_a_command_needs_only_what_it_uses() -> None:
    """`needs` alone decides which variables are required."""
    assert "RABBITMQ" not in fault({}, "database", "redis")
    assert load(("redis",), URLS).redis == URLS["BIFROST_REDIS_URL"]


def test_a_faulty_url_for_rehearsals_concerns_only_rehearse() -> None:
    """Other commands start with it; `rehearse`, which may do without the variable, names it."""
    faulty = {"BIFROST_REHEARSAL_DATABASE_URL": "mysql://hidden-value"}
    assert load((), faulty).rehearsal_database_url is None
    assert load(("rehearsal",), {}).rehearsal_database_url is None
    assert fault(faulty, "rehearsal").startswith("configuration: BIFROST_REHEARSAL_DATABASE_URL")


@pytest.mark.parametrize(("server", "others"), [("database", ("redis", "rabbitmq")), ("redis", ("database",)),
                                                ("rabbitmq", ("database", "redis"))])  # fmt: skip
def test_a_url_that_a_command_does_not_use_may_be_faulty(
    server: environment.Need, others: tuple[environment.Need, ...], tmp_path: Path
) -> None:
    """Unreadable, malformed, or set twice: it counts as not set, and is told to whoever asks, by its variable."""
    name = f"BIFROST_{server.upper()}_URL"
    rest = {variable: url for variable, url in URLS.items() if variable != name}
    for faulty in (
        {f"{name}_FILE": str(tmp_path / "absent")},
        {name: "mysql://u:hidden-value@h/d"},
        {name: URLS[name], f"{name}_FILE": str(tmp_path / "both")},
    ):
        assert getattr(load(others, rest | faulty), f"{server}_url") is None
        assert environment.fault_of(server, rest | faulty).startswith(name)
        assert "hidden-value" not in environment.fault_of(server, rest | faulty)
        assert name in fault(rest | faulty, server)
    assert environment.fault_of(server, URLS) == environment.fault_of(server, rest) == ""
    assert load(others, URLS) == load((), URLS)


def test_all_faults_in_one_message(tmp_path: Path) -> None:
    """Missing, malformed, contradictory and unreadable settings are told together, each by its variable."""
    message = fault(
        {
            "BIFROST_DATABASE_URL": "mysql://u:hidden-value@h/d",
            "BIFROST_REDIS_URL": "redis://:hidden-value@h/0",
            "BIFROST_REDIS_URL_FILE": str(tmp_path / "both"),
            "BIFROST_MIGRATION_DATABASE_URL_FILE": str(tmp_path / "absent"),
            "BIFROST_INIT_TIMEOUT": "soon",
            "BIFROST_LOG_FORMAT": "xml",
            "BIFROST_ALLOW_AHEAD": "perhaps",
        },
        "database", "redis", "rabbitmq",
    )  # fmt: skip
    for expected in (
        "BIFROST_DATABASE_URL is no PostgreSQL URL (scheme 'mysql'; wanted postgresql://)",
        "BIFROST_REDIS_URL and BIFROST_REDIS_URL_FILE are both set; keep one",
        f"BIFROST_MIGRATION_DATABASE_URL_FILE names {tmp_path}/absent, which cannot be read: No such file or directory",
        "BIFROST_RABBITMQ_URL is not set",
        "BIFROST_INIT_TIMEOUT is no duration; write for example 90s, 5m or 1h30m",
        "BIFROST_LOG_FORMAT Input should be 'text' or 'json'",
        "BIFROST_ALLOW_AHEAD Input should be a valid boolean",
    ):
        assert expected in message
    assert message.count("BIFROST_REDIS_URL is not set") == 0
    assert "hidden-value" not in message


@pytest.mark.parametrize("name", ["DATABASE_URL", "REDIS_URL", "RABBITMQ_URL"])
def test_unprefixed_variable_serves_where_the_prefixed_one_is_absent(name: str, tmp_path: Path) -> None:
    """`DATABASE_URL` and friends are read, also from a file, and lose against the prefixed variable."""
    prefixed, field = f"BIFROST_{name}", name.lower()
    url, other = URLS[prefixed], URLS[prefixed].replace("@", "@other-")
    file = tmp_path / "secret"
    file.write_text(f"{url}\n")
    expected = getattr(load((), URLS), field)
    assert getattr(load((), {name: url}), field) == expected
    assert getattr(load((), {f"{name}_FILE": str(file)}), field) == expected
    assert getattr(load((), {prefixed: url, name: other}), field) == expected
    assert getattr(load((), {f"{prefixed}_FILE": str(file), name: other}), field) == expected
    assert getattr(load((), {prefixed: "", name: url}), field) == expected


def test_fault_names_the_variable_that_was_set(tmp_path: Path) -> None:
    """The error names the variable that was set: DATABASE_URL, or that of the file."""
    assert "configuration: DATABASE_URL is no PostgreSQL URL" in fault({"DATABASE_URL": "mysql://h/d"})
    file = tmp_path / "secret"
    file.write_text("mysql://h/d")
    assert "BIFROST_DATABASE_URL" in fault({"BIFROST_DATABASE_URL_FILE": str(file)})


def test_value_from_a_file(tmp_path: Path) -> None:
    """Every setting can come from a file. White space around the value is removed."""
    file = tmp_path / "secret"
    file.write_text("  redis://:file-word@cache/2\n\n", encoding="utf-8")
    assert load((), {"BIFROST_REDIS_URL_FILE": str(file)}).redis == "redis://:file-word@cache/2"
    file.write_text("json")
    assert load((), {"BIFROST_LOG_FORMAT_FILE": str(file)}).log_format == "json"


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"\xff\xfe", "which cannot be read: is not UTF-8 text"),
        (b" \n", "which is empty"),
        (None, "which cannot be read: Is a directory"),
    ],
)
def test_file_that_cannot_serve(tmp_path: Path, content: bytes | None, reason: str) -> None:
    """A file that is not UTF-8, an empty one and a folder are errors with variable and file."""
    file = tmp_path
    if content is not None:
        file = tmp_path / "secret"
        file.write_bytes(content)
    message = fault({"BIFROST_REDIS_URL_FILE": str(file)}, "redis")
    assert message == f"configuration: BIFROST_REDIS_URL_FILE names {file}, {reason}"


def test_migration_database_defaults_to_the_database() -> None:
    """The migration URL defaults to the database URL."""
    direct = "postgresql://u:one-word@direct/platform"
    assert load((), URLS).migration_database == load((), URLS).database
    settings = load((), URLS | {"BIFROST_MIGRATION_DATABASE_URL": direct})
    assert settings.migration_database.parameters["host"] == "direct"
    assert settings.database.parameters["host"] == "db"


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("90", 90), ("90s", 90), ("5m", 300), ("1h30m", 5400), ("1.5h", 5400), ("250ms", 0.25), ("1d", 86400), ("0", 0),
     (" 5M ", 300)],
)  # fmt: skip
def test_duration(text: str, seconds: float) -> None:
    """Seconds, minutes, hours, days and their sums."""
    assert duration(text) == seconds
    assert load((), {"BIFROST_INIT_TIMEOUT": text}).init_timeout == seconds


@pytest.mark.parametrize("text", ["soon", "-5s", "5 m", "5x", "m", "1h 30m", "inf", "nan", "1e3"])
def test_what_is_no_duration(text: str) -> None:
    """Other values are rejected with an example."""
    with pytest.raises(ValueError, match="90s, 5m or 1h30m"):
        duration(text)


@pytest.mark.parametrize(
    ("variable", "url"),
    [
        ("BIFROST_REDIS_URL", "redis://cache"),
        ("BIFROST_REDIS_URL", "rediss://u:two-words@cache:6380/1?ssl_ca_certs=/ca.pem"),
        ("BIFROST_REDIS_URL", "unix:///run/redis.sock?db=1"),
        ("BIFROST_REDIS_URL", "valkey://cache/0"),
        ("BIFROST_REDIS_URL", "redis://cache/0?client_name=me@home"),
        ("BIFROST_RABBITMQ_URL", "amqp://u:three-words@broker:5672/vhost"),
        ("BIFROST_RABBITMQ_URL", "amqps://broker//"),
        ("BIFROST_RABBITMQ_URL", "pyamqp://broker/%2F"),
        ("BIFROST_RABBITMQ_URL", "amqp://u:three-words@one//;amqp://u:three-words@two//"),
    ],
)
def test_server_urls(variable: str, url: str) -> None:
    """The forms of Redis and broker URLs are kept as written."""
    settings = load((), {variable: url})
    assert getattr(settings, variable.removeprefix("BIFROST_").lower()) == url


@pytest.mark.parametrize(
    ("variable", "url", "named"),
    [
        ("BIFROST_REDIS_URL", "redis://h/0?ssl_ca_certs=/ca", "ssl_ca_certs, but redis:// is not encrypted"),
        ("BIFROST_RABBITMQ_URL", "amqp://h//?ssl_ca_certs=/ca", "ssl_ca_certs, but amqp:// is not encrypted"),
        ("BIFROST_RABBITMQ_URL", "amqps://h//?ssl_cert_reqs=none", "ssl_cert_reqs; amqps:// knows ssl_ca_certs"),
    ],
)
def test_tls_that_a_url_asks_for_and_does_not_get(variable: str, url: str, named: str) -> None:
    """A CA for an unencrypted connection, or an unknown parameter, is an error."""
    message = fault({variable: url})
    assert message.startswith(f"configuration: {variable} has {named}")


@pytest.mark.parametrize("variable", ["BIFROST_REDIS_URL", "BIFROST_RABBITMQ_URL"])
@pytest.mark.parametrize(
    "text",
    [
        "postgresql://u:hidden-value@h/d",
        "hidden-value",
        "u:hidden-value@h",
        "hidden value://",
        "{scheme}://u:hidden/value@h/0",
        "{scheme}://u:hidden?value@h/0",
        "{scheme}://u:hidden#value@h/0",
        "{scheme}://u:12/hidden-value@h/0",
        "{scheme}://u:hidden-value@h:port/0",
        "{scheme}://[u:hidden-value@h/0",
    ],
)
def test_malformed_server_url_is_named_without_its_value(variable: str, text: str) -> None:
    """Another scheme, and a password that is not quoted, are errors that contain no part of the value."""
    scheme = "redis" if variable == "BIFROST_REDIS_URL" else "amqp"
    message = fault({variable: text.format(scheme=scheme)})
    assert message.startswith(f"configuration: {variable} is no ")
    assert "hidden" not in message


def test_secrets_are_remembered_and_in_no_repr() -> None:
    """Loading is enough: from then on no password of any URL passes `masked`, nor is in the repr of the settings."""
    variables = {
        "BIFROST_DATABASE_URL": "postgresql://u:planted%2Fone@h/d",
        "BIFROST_MIGRATION_DATABASE_URL": "host=h password='planted two'",
        "BIFROST_REDIS_URL": "redis://:planted%40three@h/0",
        "BIFROST_RABBITMQ_URL": "amqp://u:planted-f%C3%BCr@h//",
    }
    settings = load((), variables)
    spoken = f"{settings!r} {settings}"
    everything = masked(f"{list(variables.values())} planted/one planted two planted@three planted-für")
    assert "planted" not in everything
    assert "planted" not in spoken


@pytest.mark.parametrize("table", ["alembic_version", "other.alembic_version"])
def test_version_table(table: str) -> None:
    """A version table may have a schema."""
    assert load((), {"BIFROST_ALEMBIC_VERSION_TABLE": table}).alembic_version_table == table


@pytest.mark.parametrize("table", ['x"; DROP TABLE y', "a.b.c", "a b", "."])
def test_what_is_no_version_table(table: str) -> None:
    """What is no plain name is refused."""
    assert "BIFROST_ALEMBIC_VERSION_TABLE" in fault({"BIFROST_ALEMBIC_VERSION_TABLE": table})


def test_alembic_config_falls_back_to_alembics_own_variable() -> None:
    """ALEMBIC_CONFIG serves where ours is absent."""
    assert load((), {"ALEMBIC_CONFIG": "a.ini"}).alembic_config == "a.ini"
    assert load((), {"ALEMBIC_CONFIG": "a.ini", "BIFROST_ALEMBIC_CONFIG": "b.ini"}).alembic_config == "b.ini"


def test_termination_log_defaults_to_that_of_kubernetes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Kubernetes' file is taken where it exists, and a named one before it."""
    monkeypatch.setattr(environment, "KUBERNETES_TERMINATION_LOG", tmp_path / "termination-log")
    assert load((), {}).termination_log is None
    (tmp_path / "termination-log").touch()
    assert load((), {}).termination_log == tmp_path / "termination-log"
    assert load((), {"BIFROST_TERMINATION_LOG": "/else/where"}).termination_log == Path("/else/where")


def test_how_to_tell_is_known_whatever_is_wrong(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Log format, level and termination log are read although other settings are faulty; a faulty one is left out."""
    monkeypatch.setattr(environment, "KUBERNETES_TERMINATION_LOG", tmp_path / "termination-log")
    file = tmp_path / "format"
    file.write_text("json\n")
    telling = environment.load_output_settings(
        {
            "BIFROST_DATABASE_URL": "mysql://h/d",
            "BIFROST_LOG_FORMAT_FILE": str(file),
            "BIFROST_LOG_LEVEL": "LOUD",
            "BIFROST_TERMINATION_LOG": "/last/words",
        }
    )
    assert (telling.log_format, telling.log_level, telling.termination_log) == ("json", "INFO", Path("/last/words"))
    assert environment.load_output_settings({}).termination_log is None
    (tmp_path / "termination-log").touch()
    assert environment.load_output_settings({}).termination_log == tmp_path / "termination-log"


def test_the_process_environment_is_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a mapping the environment of the process is read, at the time of the call."""
    monkeypatch.setenv("BIFROST_DATABASE_URL", URLS["BIFROST_DATABASE_URL"])
    assert isinstance(load(("database",)).database, PostgresUrl)
    monkeypatch.delenv("BIFROST_DATABASE_URL")
    with pytest.raises(SettingsError):
        load(("database",))


def test_celery_variables_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    """`CELERY_*` goes, and nothing else."""
    monkeypatch.setenv("CELERY_BROKER_URL", "amqp://stray//")
    monkeypatch.setenv("BIFROST_RUN_QUEUE", "kept")
    environment.forget_celery_variables()
    assert "CELERY_BROKER_URL" not in os.environ
    assert os.environ["BIFROST_RUN_QUEUE"] == "kept"


def test_embedded_servers_replace_every_url(monkeypatch: pytest.MonkeyPatch) -> None:
    """`--embedded` leaves no URL of the environment in force, in no spelling, and names what it ignores."""
    set_before = ["BIFROST_DATABASE_URL", "DATABASE_URL", "BIFROST_MIGRATION_DATABASE_URL_FILE", "RABBITMQ_URL",
                  "REDIS_URL_FILE"]  # fmt: skip
    for variable in set_before:
        monkeypatch.setenv(variable, "/outside")
    monkeypatch.delenv("BIFROST_ALEMBIC_CONFIG", raising=False)
    for variable in ("BIFROST_REDIS_URL", "BIFROST_RABBITMQ_URL", "BIFROST_ALEMBIC_CONFIG"):
        monkeypatch.setenv(variable, "")  # so that what the call sets is taken back afterwards
        monkeypatch.delenv(variable)
    ignored = environment.use_embedded_servers("postgresql://u:p@here/d", "redis://:p@here/0")
    assert sorted(ignored) == sorted(set_before)
    settings = load(("database", "redis", "rabbitmq"))
    assert settings.database.parameters["host"] == "here"
    assert settings.migration_database == settings.database
    assert settings.redis == settings.rabbitmq_url == "redis://:p@here/0"
    assert settings.alembic_config == "builtin"
    assert not [name for name in os.environ if name in set_before[1:]]


#: Run in a process of its own: imports every module of the package while no setting may be read.
IMPORT_ALL = """
import importlib, os, pkgutil, sys

class Refusing(dict):
    def refuse(self, name):
        if name.startswith("BIFROST_") or name.endswith(("BASE_URL", "REDIS_URL", "RABBITMQ_URL", "ALEMBIC_CONFIG")):
            raise SystemExit(f"{name} was read")
    def __getitem__(self, name):
        self.refuse(name)
        return super().__getitem__(name)
    def get(self, name, default=None):
        self.refuse(name)
        return super().get(name, default)
    def __contains__(self, name):
        self.refuse(name)
        return super().__contains__(name)

os.environ = Refusing(os.environ)
import bifrost_bootstrap
for module in pkgutil.iter_modules(bifrost_bootstrap.__path__):
    if module.name != "migrations":
        importlib.import_module(f"bifrost_bootstrap.{module.name}")
print(len(sys.modules))
try:
    bifrost_bootstrap.settings.load()
except SystemExit as refused:
    print(refused)
"""

#: The same, of the package alone: then nothing at all may be read.
IMPORT_PACKAGE = """
import os, sys

class Closed:
    def __getattribute__(self, name):
        raise SystemExit("the environment was read")

before = set(sys.modules)
os.environ = Closed()
import bifrost_bootstrap
print(sorted(set(sys.modules) - before))
"""


def run_code(code: str, env: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """Run the code in a process of its own, warnings being errors."""
    command = [sys.executable, "-W", "error", "-c", code]
    return subprocess.run(command, env=env, capture_output=True, text=True, check=False, timeout=60)


def test_importing_the_package_reads_nothing(clean_env: dict[str, str]) -> None:
    """`import bifrost_bootstrap` imports nothing else, and does not look at the environment."""
    done = run_code(IMPORT_PACKAGE, clean_env)
    assert (done.returncode, done.stdout, done.stderr) == (0, "['bifrost_bootstrap']\n", "")


def test_importing_every_module_reads_no_setting(clean_env: dict[str, str]) -> None:
    """No module reads a setting when it is imported, set or not; `load` does (the control)."""
    for env in (clean_env, clean_env | URLS):
        done = run_code(IMPORT_ALL, env)
        assert done.returncode == 0, done.stdout + done.stderr
        assert done.stdout.splitlines()[-1] == "BIFROST_DATABASE_URL was read"
