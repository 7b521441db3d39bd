"""Private servers for the tests: real servers that a test may kill, freeze or cut off, and that are deleted afterwards.

    Server (process.py)          start, stop, kill, pause, resume, restart, close
    ├── PostgresServer           TCP with SCRAM only; a database per test
    ├── RedisServer              or Valkey; 16 databases
    ├── RabbitmqServer           a node with its own cookie and epmd; a virtual host per test
    └── PgbouncerServer          transaction pooling in front of a PostgresServer
    Proxy                        TCP proxy in front of a server: cut, refuse, heal
    Command                      any other process of a test, with its output in files

The servers listen on free ports, never on the standard ones. All of them end with the test run.
"""

from tests.servers.command import Command
from tests.servers.leaks import PLANTED_PASSWORD
from tests.servers.pgbouncer import PgbouncerServer
from tests.servers.postgres import Database, Postgres, PostgresServer
from tests.servers.process import RunFolder, Server, ServerMissing
from tests.servers.proxy import Proxy
from tests.servers.rabbitmq import Rabbitmq, RabbitmqServer
from tests.servers.redis import RedisAddress, RedisServer

__all__ = [
    "PLANTED_PASSWORD",
    "Command",
    "Database",
    "PgbouncerServer",
    "Postgres",
    "PostgresServer",
    "Proxy",
    "Rabbitmq",
    "RabbitmqServer",
    "RedisAddress",
    "RedisServer",
    "RunFolder",
    "Server",
    "ServerMissing",
]
