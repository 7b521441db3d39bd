"""Random faults, inits and live writers for SOAK_MINUTES (default 10)."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import threading
import time
from pathlib import Path

import psycopg
import pytest
import redis

from tests.always_ends.faults.cells import CUT
from tests.servers import Command
from tests.servers.process import wait_until
from tests.setups.stack import PREFIX, REVISIONS, SERVERS, Deployment, Stack

pytestmark = pytest.mark.soak

#: Seconds of one deployment: several faults, and not too few first migrations.
ROUND = 60.0
#: Inits that run at once, at most.
MOST_INITS = 6
#: Seconds for what still runs when the faults are over.
SETTLE = 180.0
#: Seconds that an entry of the API lives.
API_TTL = 24 * 3600


class Writer(threading.Thread):
    """The platform's API: it commits, then it sets or deletes the entry; what fails in between is not repaired."""

    def __init__(self, deployment: Deployment, seed: int) -> None:
        super().__init__(name=f"writer {seed}", daemon=True)
        self.deployment, self.random, self.number = deployment, random.Random(seed), seed
        self.ended = threading.Event()
        self.written = 0

    def run(self) -> None:
        while not self.ended.wait(self.random.uniform(0.01, 0.2)):
            with contextlib.suppress(psycopg.Error, redis.RedisError):
                self.write(f"live/{self.number}/{self.random.randrange(20)}", self.random.random() < 0.3)

    def write(self, path: str, delete: bool) -> None:
        with self.deployment.database.connect() as rows, self.deployment.stack.redis.client() as client:
            if delete:
                rows.execute("DELETE FROM workspace_files WHERE path = %s", (path,))
                client.delete(PREFIX + path)
                client.srem(f"{PREFIX}index", path)
            else:
                content = str(self.random.random())
                digest = rows.execute(
                    "INSERT INTO workspace_files (path, content, content_hash)"
                    " VALUES (%s, %s, encode(sha256(convert_to(%s, 'UTF8')), 'hex'))"
                    " ON CONFLICT (path) DO UPDATE SET content = excluded.content, content_hash = excluded.content_hash"
                    " RETURNING content_hash",
                    (path, content, content),
                ).fetchone()
                assert digest
                entry = json.dumps({"content": content, "path": path, "hash": digest[0]}, separators=(",", ":"))
                client.set(PREFIX + path, entry, ex=API_TTL)
                client.sadd(f"{PREFIX}index", path)
        self.written += 1


class Round:
    """One deployment under random faults."""

    def __init__(self, deployment: Deployment, rng: random.Random) -> None:
        self.deployment, self.random = deployment, rng
        self.inits: list[Command] = []
        self.killed: set[int] = set()
        self.codes: list[int] = []
        self.faults: list[str] = []

    def run(self) -> None:
        """Faults and inits at random until the round is over; every init has to end well."""
        self.deployment.start_worker()
        end = time.monotonic() + ROUND
        while time.monotonic() < end:
            self.reap()
            if self.random.random() < 0.5 and len(self.inits) < MOST_INITS:
                self.inits.append(self.deployment.start_init(timeout=f"{SETTLE:.0f}s"))
            else:
                fault = self.random.choice([self.server, self.server, self.line, self.worker, self.init])
                fault()
            time.sleep(self.random.uniform(0.1, 3))
        worker = self.deployment.worker
        assert worker
        if worker.pid in self.killed:
            # Told to stop, it first ends what it is at.
            worker.wait(SETTLE)
        self.supervise()
        for init in self.inits:
            self.judge(init, init.wait(SETTLE).returncode)

    def reap(self) -> None:
        for init in [init for init in self.inits if not init.running]:
            self.inits.remove(init)
            self.judge(init, init.wait().returncode)
        self.supervise()

    def judge(self, init: Command, code: int) -> None:
        """A run that was lost with its worker three times is given up, as it should be; all others succeed."""
        text = init.stderr.read_text()
        self.codes.append(code)
        lost = "given up after 3 attempts" in text and "both tasks succeeded" not in text.splitlines()[-1]
        assert code == 0 or init.pid in self.killed or lost, text[-3000:]

    def supervise(self) -> None:
        worker = self.deployment.worker
        if worker and not worker.running:
            self.deployment.start_worker()

    def server(self) -> None:
        server = self.deployment.stack.server(self.random.choice(SERVERS))
        fault = self.random.choice(["kill", "restart", "freeze"])
        self.faults.append(f"{server.kind} {fault}")
        if fault == "restart":
            server.restart()
            return
        if fault == "kill":
            server.kill()
        else:
            server.pause()
        time.sleep(self.random.uniform(0.1, 5))
        if fault == "kill":
            server.start()
        else:
            server.resume()

    def line(self) -> None:
        lines = self.random.choice([self.deployment.stack.init_lines, self.deployment.stack.worker_lines])
        name = self.random.choice(SERVERS)
        self.faults.append(f"line to {name}")
        line = getattr(lines, name)
        line.cut()
        time.sleep(self.random.uniform(0.1, CUT))
        line.strand()

    def worker(self) -> None:
        worker = self.deployment.worker
        assert worker
        fault = self.random.choice(["kill", "SIGTERM", "freeze", "task"])
        self.faults.append(f"worker {fault}")
        if fault == "kill":
            worker.kill_alone()
        elif fault == "SIGTERM":
            self.killed.add(worker.pid)
            worker.send_signal(signal.SIGTERM)
        elif fault == "task":
            for process in worker.descendants()[:1]:
                process.kill()
        else:
            worker.pause()
            time.sleep(self.random.uniform(0.1, 5))
            worker.resume()

    def init(self) -> None:
        if not self.inits:
            return
        init = self.random.choice(self.inits)
        self.killed.add(init.pid)
        fault = self.random.choice([signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
        self.faults.append(f"init {fault.name}")
        init.send_signal(fault)


def test_soak(stack: Stack, tmp_path: Path, clean_env: dict[str, str]) -> None:
    """After all faults, the cache is complete, each revision is applied once, and nothing is left in the servers."""
    seed = int(os.environ.get("SOAK_SEED", random.SystemRandom().randrange(10**6)))
    rng = random.Random(seed)
    end = time.monotonic() + 60 * float(os.environ.get("SOAK_MINUTES", "10"))
    number = 0
    while time.monotonic() < end:
        number += 1
        with stack.deployment(tmp_path / f"round-{number}", clean_env) as deployment:
            writers = [Writer(deployment, one) for one in range(2)]
            this_round = Round(deployment, rng)
            print(f"round {number}, SOAK_SEED={seed}", flush=True)
            for writer in writers:
                writer.start()
            try:
                this_round.run()
            finally:
                for writer in writers:
                    writer.ended.set()
                for writer in writers:
                    writer.join()
                print(f"codes {this_round.codes}, faults {this_round.faults}", flush=True)
            _assert_settled(deployment)


def _assert_settled(deployment: Deployment) -> None:
    last = deployment.start_init(timeout=f"{SETTLE:.0f}s").wait(SETTLE)
    assert last.returncode == 0, last.stderr
    assert deployment.cache() == deployment.rows()
    assert deployment.applied() == REVISIONS
    deployment.assert_clean()
    assert deployment.worker
    assert deployment.worker.terminate(SETTLE).returncode == 0
    # A lock whose line was cut is given up by the server after 45 s. What only reads it keeps as long as its own
    # keepalives say, two hours: these sessions end with their lines.
    wait_until(lambda: not deployment.runners(), "no session that holds a lock", 60)
    for line in deployment.stack.init_lines.all() + deployment.stack.worker_lines.all():
        line.refuse()
    wait_until(lambda: not deployment.sessions(), "no connection of ours", 60)
