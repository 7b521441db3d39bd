"""S3: TLS to all three servers with a private CA. A wrong certificate is rejected at once and named."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator

import pytest

from tests.conftest import Outside, RunBootstrap, RunCommand, StartWorker
from tests.security.tls import TlsServers, tls_servers
from tests.servers import RunFolder, ServerMissing
from tests.servers.run_checks import lacks_server

VARIABLES = {
    "PostgreSQL": "BIFROST_DATABASE_URL",
    "Redis": "BIFROST_REDIS_URL",
    "RabbitMQ": "BIFROST_RABBITMQ_URL",
}


@pytest.fixture(scope="module")
def servers(run_folder: RunFolder, outside: Outside) -> Iterator[TlsServers]:
    """The three servers with TLS."""
    try:
        with tls_servers(run_folder) as servers:
            yield servers
    except ServerMissing as missing:
        lacks_server(missing, in_ci=outside.in_ci)


@pytest.mark.parametrize("host", [pytest.param("127.0.0.1", marks=pytest.mark.slow), "localhost"])
def test_s03_everything_works_over_tls(
    servers: TlsServers,
    host: str,
    clean_env: dict[str, str],
    start_worker: StartWorker,
    run_bootstrap: RunBootstrap,
    run_command: RunCommand,
) -> None:
    """With the CA in the three URLs: worker, init, check and Celery's own commands work."""
    with servers.env(clean_env, ca=servers.certificates.ca, host=host) as env:
        worker = start_worker(env=env)
        done = run_bootstrap("init", env=env)
        assert done.returncode == 0, done.stderr
        assert run_bootstrap("check", env=env).returncode == 0
        stock = [sys.executable, "-m", "celery", "-A", "bifrost_bootstrap"]
        pinged = run_command([*stock, "inspect", "ping"], env=env)
        assert pinged.returncode == 0, pinged.stderr
        worker.close()


def test_s03_the_ca_from_the_environment(
    servers: TlsServers, clean_env: dict[str, str], run_bootstrap: RunBootstrap
) -> None:
    """Without a CA in the URLs, the CAs of the system are trusted. SSL_CERT_FILE replaces them."""
    with servers.env(clean_env, ca=servers.certificates.ca) as env:
        for server in ("Redis", "RabbitMQ"):
            env[VARIABLES[server]] = env[VARIABLES[server]].partition("?")[0]
        env["BIFROST_DATABASE_URL"] = re.sub("sslrootcert=.*", "sslrootcert=system", env["BIFROST_DATABASE_URL"])
        done = run_bootstrap("init", "--with-worker", env=env | {"SSL_CERT_FILE": str(servers.certificates.ca)})
        assert done.returncode == 0, done.stderr


def refused(run_bootstrap: RunBootstrap, env: dict[str, str], server: str, trusted: dict[str, str]) -> str:
    """What init says that meets a bad certificate at this server alone; the two others are reached without TLS."""
    done = run_bootstrap(
        "init", "--with-worker", "--timeout", "5m", env=trusted | {VARIABLES[server]: env[VARIABLES[server]]}
    )
    assert done.returncode == 78, done.stderr
    found = re.search(
        rf"ERROR .*init: (TLS certificate of {server} 127.0.0.1:.* was rejected: .*); what to do: correct the CA",
        done.stderr,
    )
    assert found, done.stderr
    return found[1]


@pytest.fixture
def plain(servers: TlsServers) -> dict[str, str]:
    """The servers without TLS."""
    return {
        "BIFROST_DATABASE_URL": servers.postgres.url(),
        "BIFROST_REDIS_URL": servers.redis.url(),
        "BIFROST_RABBITMQ_URL": servers.rabbitmq.url(),
    }


@pytest.mark.parametrize("server", VARIABLES)
def test_s03_unknown_ca(
    servers: TlsServers, server: str, plain: dict[str, str], clean_env: dict[str, str], run_bootstrap: RunBootstrap
) -> None:
    """An unknown CA is rejected at once and named."""
    with servers.env(clean_env, ca=servers.certificates.other_ca) as env:
        refused(run_bootstrap, env, server, env | plain)


@pytest.mark.parametrize("server", VARIABLES)
def test_s03_a_ca_file_that_is_not_there(
    servers: TlsServers, server: str, plain: dict[str, str], clean_env: dict[str, str], run_bootstrap: RunBootstrap
) -> None:
    """A missing CA file is rejected at once and named."""
    nowhere = servers.certificates.ca.with_name("nowhere.pem")
    with servers.env(clean_env, ca=nowhere) as env:
        refused(run_bootstrap, env, server, env | plain)


@pytest.mark.parametrize("server", VARIABLES)
@pytest.mark.parametrize("fault", ["of_another_host", pytest.param("expired", marks=pytest.mark.slow)])
def test_s03_wrong_certificate(
    servers: TlsServers,
    server: str,
    fault: str,
    plain: dict[str, str],
    clean_env: dict[str, str],
    run_bootstrap: RunBootstrap,
) -> None:
    """A certificate for another host, or an expired one, is rejected at once and named."""
    certificates = servers.certificates
    servers.present(getattr(certificates, fault)())
    try:
        with servers.env(clean_env, ca=certificates.ca) as env:
            said = refused(run_bootstrap, env, server, env | plain)
    finally:
        servers.present(certificates.good())
    if server != "PostgreSQL":
        assert ("expired" if fault == "expired" else "not valid for '127.0.0.1'") in said
