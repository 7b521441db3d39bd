"""Private servers for the tests: real ones, thrown away afterwards, that a test may kill, freeze or cut off.

    Server (process.py)          start, stop, kill, pause, resume, restart, close, log
    ├── PostgresServer           TCP with SCRAM only; databases per test
    ├── RedisServer              or Valkey; sixteen databases
    ├── RabbitmqServer           own node, cookie and port mapper; virtual hosts per test
    └── PgbouncerServer          transaction pooling in front of a PostgresServer
    Proxy                        in front of any of them: cut, refuse, heal
    Command                      any other process of a test; its whole output is kept

Nothing here looks at the standard ports, and everything that is started dies with the test run.
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
