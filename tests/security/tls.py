"""The three servers with certificates of a private CA, valid and invalid ones, created on demand."""

from __future__ import annotations

import contextlib
import secrets
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from urllib.parse import quote

import trustme

from tests.servers import PostgresServer, RabbitmqServer, RedisServer, RunFolder
from tests.servers.leaks import PLANTED_PASSWORD_QUOTED
from tests.servers.process import free_port
from tests.servers.rabbitmq import USER

HOST = "127.0.0.1"


def write(folder: Path, leaf: trustme.LeafCert) -> None:
    """What the servers' settings name."""
    key = folder / "server.key"
    key.touch(mode=0o600)
    leaf.private_key_pem.write_to_path(str(key))
    (folder / "server.crt").write_bytes(b"".join(pem.bytes() for pem in leaf.cert_chain_pems))


class Certificates:
    """A private CA, `ca`, and another one that has signed nothing here, `other_ca`: files. And what the CA issues."""

    def __init__(self, folder: Path) -> None:
        self._authority, other = trustme.CA(), trustme.CA()
        self.ca, self.other_ca = folder / "ca.pem", folder / "other-ca.pem"
        self._authority.cert_pem.write_to_path(str(self.ca))
        other.cert_pem.write_to_path(str(self.other_ca))
        folder.chmod(0o755)

    def good(self) -> trustme.LeafCert:
        """A certificate of the servers' own address."""
        return self._authority.issue_cert(HOST, "localhost")

    def of_another_host(self) -> trustme.LeafCert:
        return self._authority.issue_cert("elsewhere.example")

    def expired(self) -> trustme.LeafCert:
        now = datetime.now(UTC)
        return self._authority.issue_cert(
            HOST, "localhost", not_before=now - timedelta(days=2), not_after=now - timedelta(days=1)
        )


@dataclass
class TlsServers:
    """PostgreSQL, Redis and RabbitMQ, each with a plain port for the tests and an encrypted one for the program."""

    certificates: Certificates
    postgres: PostgresServer
    redis: RedisServer
    rabbitmq: RabbitmqServer
    redis_port: int
    rabbitmq_port: int

    def present(self, leaf: trustme.LeafCert) -> None:
        """From now on all three show this certificate."""
        for server in (self.postgres, self.redis, self.rabbitmq):
            write(server.data, leaf)
        self.postgres.hand_over(self.postgres.data / "server.key", self.postgres.data / "server.crt")
        with self.postgres.admin() as admin:
            admin.execute("SELECT pg_reload_conf()")
        self.redis.restart()
        self.rabbitmq.evaluate("ssl:clear_pem_cache()")

    @contextlib.contextmanager
    def env(self, clean_env: Mapping[str, str], *, ca: Path, host: str = HOST) -> Iterator[dict[str, str]]:
        """A new database and virtual host, and what a container is given that trusts this CA."""
        database, vhost = self.postgres.create_database(), self.rabbitmq.add_vhost()
        with self.redis.client() as client:
            client.flushall()
        file = quote(str(ca), safe="")
        postgres_url = database.url.replace(f"@{HOST}", f"@{host}")
        try:
            yield {
                **clean_env,
                "BIFROST_DATABASE_URL": f"{postgres_url}?sslmode=verify-full&sslrootcert={file}",
                "BIFROST_REDIS_URL": f"rediss://:{PLANTED_PASSWORD_QUOTED}@{host}:{self.redis_port}/0?ssl_ca_certs={file}",
                "BIFROST_RABBITMQ_URL": f"amqps://{USER}:{PLANTED_PASSWORD_QUOTED}@{host}:{self.rabbitmq_port}/{vhost}"
                f"?ssl_ca_certs={file}",
                "BIFROST_ALEMBIC_CONFIG": "builtin",
            }
        finally:
            self.postgres.drop_database(database)
            self.rabbitmq.delete_vhost(vhost)


class _Postgres(PostgresServer):
    certificates: Certificates

    def prepare(self) -> None:
        super().prepare()
        write(self.data, self.certificates.good())


@contextlib.contextmanager
def tls_servers(run: RunFolder) -> Iterator[TlsServers]:
    """Start them, with a good certificate."""
    folder = run.data(f"certificates-{secrets.token_hex(4)}")
    folder.mkdir()
    certificates = Certificates(folder)
    with contextlib.ExitStack() as started:
        postgres = _Postgres(run, {"ssl": "on"})
        postgres.certificates = certificates
        redis = RedisServer(run)
        redis_port = free_port()
        redis.config = {
            "tls-port": str(redis_port),
            "tls-cert-file": str(redis.data / "server.crt"),
            "tls-key-file": str(redis.data / "server.key"),
            "tls-ca-cert-file": str(certificates.ca),
            "tls-auth-clients": "no",
        }
        rabbitmq_port = free_port()
        rabbitmq = RabbitmqServer(run)
        rabbitmq.conf = [
            f"listeners.ssl.local = {HOST}:{rabbitmq_port}",
            f"ssl_options.cacertfile = {certificates.ca}",
            f"ssl_options.certfile = {rabbitmq.data / 'server.crt'}",
            f"ssl_options.keyfile = {rabbitmq.data / 'server.key'}",
            "ssl_options.verify = verify_none",
        ]
        for server in (postgres, redis, rabbitmq):
            started.callback(server.close)
            if server is not postgres:
                server.data.mkdir(mode=0o700)
                write(server.data, certificates.good())
            server.start()
        yield TlsServers(certificates, postgres, redis, rabbitmq, redis_port, rabbitmq_port)
