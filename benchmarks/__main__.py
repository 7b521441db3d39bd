"""
`python -m benchmarks [--modules 10000 100000] [--runs 5]`: every required number beside the measured one.

Private servers and real modules. Each run measures all sides in turn. Writes the medians into benchmarks/results.md.
"""

from __future__ import annotations

import argparse
import compileall
import contextlib
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import psutil

import bifrost_bootstrap
from benchmarks import data, limit
from tests.servers import Command, Database, PostgresServer, RabbitmqServer, RedisServer, RunFolder

PACKAGE = Path(bifrost_bootstrap.__file__).parent
ROOT = PACKAGE.parent
SCRIPTS = Path(sys.executable).parent
RESULTS = Path(__file__).with_name("results.md")
#: Databases of the private Redis.
CACHE, THROW_AWAY = 1, 2
#: Redis records commands above this many microseconds, and keeps this many. A switch of 1,000 entries takes longer,
#: and so does each of the hundred reads after a switch of 100,000.
SLOWLOG = {"slowlog-log-slower-than": "3000", "slowlog-max-len": "1000"}
#: Number of modules in the rows with `init`, and number of inits that start at once.
FEW, AT_ONCE = 10, 20


class Table:
    """Medians by name, and the rows that compare them."""

    def __init__(self) -> None:
        self.times: dict[str, list[float]] = {}
        self.rows: list[str] = []

    def take(self, name: str, value: float) -> None:
        self.times.setdefault(name, []).append(value)
        print(f"    {name}: {value:.3f}", file=sys.stderr, flush=True)

    def median(self, name: str) -> float:
        return statistics.median(self.times[name])

    def row(self, what: str, ours: str, reached: str, asked: str, good: bool) -> None:
        self.rows.append(f"| {what} | {ours} | {reached} | {asked} | {'yes' if good else '**no**'} |")

    def at_most(self, what: str, ours: float, theirs: float, most: float, aim: float | None = None) -> None:
        """Add a row with the ratio of our time to another."""
        asked = f"≤ {most:g}" + (f" (aim {aim:g})" if aim else "")
        self.row(what, f"{ours:.3f} s / {theirs:.3f} s", f"{ours / theirs:.2f}", asked, ours <= most * theirs)


class Bench:
    """The servers, and one database for each number of modules."""

    def __init__(self, run: RunFolder, started: contextlib.ExitStack) -> None:
        self.run = run

        def start(server: PostgresServer | RedisServer | RabbitmqServer) -> None:
            started.enter_context(contextlib.closing(server))
            server.start()

        self.postgres, self.redis, self.rabbitmq = PostgresServer(run), RedisServer(run, SLOWLOG), RabbitmqServer(run)
        for server in (self.postgres, self.redis, self.rabbitmq):
            start(server)
        self.databases: dict[int, Database] = {}

    def environment(self, database: Database) -> dict[str, str]:
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("BIFROST_", "CELERY_"))}
        # Both sides write bytecode.
        kept.pop("PYTHONDONTWRITEBYTECODE", None)
        return kept | {
            "BIFROST_DATABASE_URL": database.url,
            "BIFROST_REDIS_URL": self.redis.url(CACHE),
            "BIFROST_RABBITMQ_URL": self.rabbitmq.url(),
            "BIFROST_ALEMBIC_CONFIG": "builtin",
            "BIFROST_CACHE_GUARD_INTERVAL": "0",
            "NAIVE_DATABASE_URL": database.url_for("asyncpg"),
            "ALEMBIC": str(SCRIPTS / "alembic"),
            "ALEMBIC_INI": str(PACKAGE / "migrations" / "alembic.ini"),
        }

    def filled(self, count: int) -> Database:
        if count not in self.databases:
            database = self.postgres.create_database()
            self.command([str(SCRIPTS / "alembic"), "-c", str(PACKAGE / "migrations/alembic.ini"), "upgrade", "head"],
                         self.environment(database))  # fmt: skip
            data.fill(database, count)
            self.databases[count] = database
        return self.databases[count]

    def flush(self) -> None:
        with self.redis.client() as client:
            client.flushall()

    @staticmethod
    def command(args: list[str], environment: Mapping[str, str]) -> tuple[float, str]:
        """Run a command and return its seconds and stdout. Raises RuntimeError if it fails."""
        started = time.perf_counter()
        done = subprocess.run(args, env=environment, cwd=ROOT, capture_output=True, text=True, check=False)
        seconds = time.perf_counter() - started
        if done.returncode != 0:
            raise RuntimeError(f"{args} ended with {done.returncode}\n{done.stdout}{done.stderr}")
        return seconds, done.stdout

    def at_once(self, args: list[str], environment: Mapping[str, str]) -> float:
        """Start a command `AT_ONCE` times at once; return the seconds until all have succeeded."""
        started = time.perf_counter()
        with ThreadPoolExecutor(AT_ONCE) as pool:
            for done in [pool.submit(self.command, args, environment) for _ in range(AT_ONCE)]:
                done.result()
        return time.perf_counter() - started

    def program(self, module: str, *args: str, database: Database) -> dict[str, float]:
        """Run a module of this folder and return the JSON object that it prints."""
        _, out = self.command([sys.executable, "-m", f"benchmarks.{module}", *args], self.environment(database))
        return dict(json.loads(out.splitlines()[-1]))

    @contextlib.contextmanager
    def worker(self, database: Database) -> Iterator[None]:
        """A standing bootstrap worker."""
        args = [sys.executable, "-m", "bifrost_bootstrap", "worker"]
        worker = Command(self.run, args, env=self.environment(database), cwd=self.run.root)
        try:
            worker.wait_for(r"ready\.")
            yield
        finally:
            worker.close()


def warm_rows(bench: Bench, table: Table, count: int, runs: int) -> None:
    """Measure a full warm, and re-warms with nothing and with 1 % changed."""
    database = bench.filled(count)
    commands = bench.run.root / "commands"
    commands.touch()
    limit.write_commands(database, commands)
    n = f"{count:,}"
    for _ in range(runs):
        bench.flush()
        table.take(f"naive {n}", bench.program("naive", "warm", database=database)["seconds"])
        bench.flush()
        read = limit.read_and_throw_away(database)
        write = limit.send_commands(bench.redis, THROW_AWAY, commands)
        table.take(f"read {n}", read)
        table.take(f"write {n}", write)
        table.take(f"limit {n}", max(read, write))
        bench.flush()
        table.take(f"full {n}", bench.program("ours", database=database)["seconds"])
        table.take(f"nothing {n}", bench.program("ours", database=database)["seconds"])
        data.change_one_percent(database)
        table.take(f"1 % {n}", bench.program("ours", database=database)["seconds"])
        with bench.redis.client() as client:
            client.slowlog_reset()
            table.take(f"forced {n}", bench.program("ours", "full", database=database)["seconds"])
            table.take(
                f"switch {n}",
                max(entry["duration"] for entry in client.slowlog_get(int(SLOWLOG["slowlog-max-len"]))) / 1e6,
            )
    bench.flush()
    commands.unlink()
    naive, most, full = table.median(f"naive {n}"), table.median(f"limit {n}"), table.median(f"full {n}")
    table.row(f"full warm of {n} vs the warming part of naive", f"{full:.3f} s / {naive:.3f} s",
              f"{naive / full:.1f} × as fast", "≥ 6 (aim 8)", naive >= 6 * full)  # fmt: skip
    table.at_most(f"full warm of {n} vs limit", full, most, 1.6, 1.25)
    table.at_most(f"re-warm of {n}, nothing changed, vs limit", table.median(f"nothing {n}"), most, 0.25)
    table.at_most(f"re-warm of {n}, 1 % changed, vs limit", table.median(f"1 % {n}"), most, 0.35)

    blocked = table.median(f"switch {n}")
    table.row(f"Redis blocked by a switch of {n} changed entries (its SLOWLOG)", f"{1000 * blocked:.0f} ms",
              f"{1000 * blocked * 10_000 / count:.0f} ms per 10,000", "≤ 150 ms per 10,000",
              blocked <= 0.150 * count / 10_000)  # fmt: skip


def memory_row(bench: Bench, table: Table, runs: int) -> None:
    peaks = {}
    for count in (1000, 100_000):
        database = bench.filled(count)
        for _ in range(runs):
            bench.flush()
            table.take(f"peak MB {count:,}", bench.program("ours", database=database)["peak_mb"])
        peaks[count] = table.median(f"peak MB {count:,}")
    more = peaks[100_000] - peaks[1000]
    table.row("peak memory of a full warm, 100,000 vs 1,000 modules", f"{peaks[100_000]:.0f} MB / {peaks[1000]:.0f} MB",
              f"{more:.0f} MB more", "≤ 64 MB", more <= 64)  # fmt: skip


def init_rows(bench: Bench, table: Table, counts: list[int], runs: int) -> None:
    """Measure `init` as a user types it, with a standing worker and nothing to do."""
    init = [str(SCRIPTS / "bifrost-bootstrap"), "init"]
    for modules in (FEW, *counts):
        database = bench.filled(modules)
        environment = bench.environment(database)
        alembic = [environment["ALEMBIC"], "-c", environment["ALEMBIC_INI"], "upgrade", "head"]
        bench.flush()
        with bench.worker(database):
            bench.command(init, environment)
            for _ in range(runs):
                table.take(f"alembic {modules}", bench.command(alembic, environment)[0])
                table.take(f"init {modules}", bench.command(init, environment)[0])
                table.take(f"re-warm {modules}", bench.program("ours", database=database)["seconds"])
            if modules == FEW:
                naive = [sys.executable, "-m", "benchmarks.naive", "all"]
                for _ in range(runs):
                    table.take("naive at once", bench.at_once(naive, environment))
                    bench.flush()
                    bench.command(init, environment)
                    table.take("init at once", bench.at_once(init, environment))
    table.at_most(f"`init`, nothing to do, {FEW} modules, vs `alembic upgrade head` with nothing to do",
                  table.median(f"init {FEW}"), table.median(f"alembic {FEW}"), 1.0)  # fmt: skip
    for count in counts:
        table.at_most(f"the same with {count:,} modules, vs that + the re-warm with nothing changed",
                      table.median(f"init {count}"),
                      table.median(f"alembic {count}") + table.median(f"re-warm {count}"), 1.0)  # fmt: skip
    table.at_most(f"{AT_ONCE} `init` at once, nothing to do, vs {AT_ONCE} naive scripts at once",
                  table.median("init at once"), table.median("naive at once"), 0.6)  # fmt: skip


def machine(bench: Bench, runs: int) -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    model = next((line.partition(":")[2].strip() for line in lines if "model name" in line), platform.processor())
    with bench.redis.client() as client, bench.postgres.admin() as connection:
        facts = client.info("server")
        redis = f"{facts.get('server_name', 'redis')} {facts.get('valkey_version', facts['redis_version'])}"
        postgres = connection.info.server_version
    packages = ", ".join(f"{name} {version(name)}" for name in ("celery", "alembic", "sqlalchemy", "psycopg", "redis"))
    load = " ".join(f"{value:.1f}" for value in psutil.getloadavg())
    memory, today = psutil.virtual_memory().total / 2**30, f"{datetime.now(UTC):%Y-%m-%d}"
    system = f"{platform.system()} {platform.release().partition('-')[0]}"
    return f"""- {today}: {model}, {os.cpu_count()} cores, {memory:.0f} GB, {system}; load {load} at the start
- Python {platform.python_version()}, PostgreSQL {postgres // 10000}.{postgres % 10000}, {redis}, {packages}
- medians of {runs} runs in which all sides take turns; seconds differ from machine to machine, ratios less"""


def main() -> None:
    parser = argparse.ArgumentParser(prog="benchmarks", description=__doc__)
    parser.add_argument("--modules", type=int, nargs="+", default=[10_000, 100_000])
    parser.add_argument("--runs", type=int, default=5)
    arguments = parser.parse_args()
    # Compiled before, as in an image, so that no measured process compiles.
    compileall.compile_dir(str(PACKAGE), quiet=2)
    table = Table()
    run = RunFolder.create()
    with contextlib.ExitStack() as started:
        started.callback(run.remove, keep_output=False)
        bench = Bench(run, started)
        head = machine(bench, arguments.runs)
        init_rows(bench, table, arguments.modules, arguments.runs)
        for count in arguments.modules:
            warm_rows(bench, table, count, arguments.runs)
        memory_row(bench, table, arguments.runs)
    text = "\n".join(
        [
            "# Results of `make bench`", "", head, "",
            "| what | ours / theirs | reached | asked | good |", "|---|---|---|---|---|", *table.rows, "",
            "All medians, in seconds (memory in MB):", "",
            "| measured | median | lowest | highest |", "|---|---|---|---|",
            *(f"| {name} | {statistics.median(times):.3f} | {min(times):.3f} | {max(times):.3f} |"
              for name, times in table.times.items()), "",
        ]
    )  # fmt: skip
    RESULTS.write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
