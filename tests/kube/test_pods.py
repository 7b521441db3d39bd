"""The Pods with their init containers: which containers start, and what a killed init leaves behind."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.compose.stack import CHECKOUT, wait_until
from tests.docs.documents import fence
from tests.kube.cluster import Cluster
from tests.kube.playing import Place, Pods

pytestmark = [pytest.mark.kube, pytest.mark.timeout(900)]

TREE, BROKEN = CHECKOUT / "tests/kube/tree", CHECKOUT / "tests/compose/broken_tree"
API, WORKER, BOOTSTRAP_WORKER = "bifrost-api", "bifrost-worker", "bifrost-bootstrap-worker"
IMPORTED = "imported compose_probe.py from the cache: 1"


def test_api_starts_after_init(play: Pods, user_folder: Path) -> None:
    """The API starts after its init container has exited 0, and imports from the cache."""
    cluster = Cluster(play, user_folder, TREE)
    said = cluster.paste(fence("docs/operations.md", "kube: first deploy"))
    cluster.playing[WORKER].ends_well()
    assert "init: ready" in said[-1]
    api = cluster.playing[API].pod
    init = api.state("init")
    assert (init["Status"], init["ExitCode"]) == ("exited", 0)
    assert api.state("api")["StartedAt"] > init["FinishedAt"]  # same clock, same format: text order is time order
    wait_until(lambda: IMPORTED in api.output("api"), "the API imports a module from the cache")


def test_api_does_not_start_after_a_broken_migration(play: Pods, user_folder: Path) -> None:
    """After an init container that exited with 1 the API never starts, and the Pod shows the reason."""
    cluster = Cluster(play, user_folder, BROKEN)
    cluster.paste(fence("README.md", "kube: by hand"))
    for playing in cluster.playing.values():
        playing.fails()
    api = cluster.playing[API].pod
    assert api.state("init")["ExitCode"] == 1, api.output("init")
    assert api.never_started("api")
    pods, log = cluster.paste(fence("docs/operations.md", "kube: after a failure"))
    assert api.name in pods.split()
    assert cluster.playing[WORKER].pod.name not in pods.split()
    assert "nowhere" in log


def test_two_replicas_at_once(play: Pods, place: Place) -> None:
    """Two replicas on an empty database start, and each revision has run once."""
    replicas = [play.pod("base", API, tree=TREE, number=number) for number in (1, 2)]
    for playing in [replica.play() for replica in replicas]:
        playing.ends_well()
    assert [replica.state("init")["ExitCode"] for replica in replicas] == [0, 0]
    assert place.sql("SELECT count(*) FROM runs") == "1"


def test_killed_during_init_and_started_again(play: Pods, place: Place) -> None:
    """Killed during a migration and started again: init exits 0, and the migration has run once."""
    place.sql("CREATE TABLE gate AS SELECT true AS closed")
    api = play.pod("base", API, tree=TREE)
    playing = api.play()
    at_gate = "SELECT count(*) FROM pg_stat_activity WHERE query LIKE '%gate WHERE%' AND pid <> pg_backend_pid()"
    wait_until(lambda: place.sql(at_gate) == "1", "the revision waits at the gate")
    api.kill("init")
    playing.fails()
    assert api.state("init")["ExitCode"] == 137
    assert api.never_started("api")
    place.sql("UPDATE gate SET closed = false")
    api.start_again().ends_well()
    assert api.state("init")["ExitCode"] == 0, api.output("init")
    assert place.sql("SELECT count(*) FROM runs") == "1"
    wait_until(lambda: IMPORTED in api.output("api"), "the API imports a module from the cache")


def test_standing_worker_serves_init_and_those_that_wait(play: Pods, place: Place) -> None:
    """Pods of the platform's worker wait until the init of the API is done by the standing worker."""
    worker = play.pod("standing-worker", WORKER, tree=TREE)
    waiting = worker.play()
    wait_until(lambda: worker.runs("init"), "the worker's init container runs")
    api = play.pod("standing-worker", API, tree=TREE)
    init = api.play()
    bootstrap = play.pod("standing-worker", BOOTSTRAP_WORKER, tree=TREE)
    assert worker.runs("init")
    assert worker.never_started("worker")
    bootstrap.play().ends_well()
    init.ends_well()
    waiting.ends_well()
    assert place.sql("SELECT count(*) FROM runs") == "1"
    wait_until(lambda: IMPORTED in worker.output("worker"), "the worker imports a module from the cache")
    wait_until(bootstrap.healthy, "the liveness probe of the bootstrap worker passes")


def test_the_jobs_pod_ends(play: Pods, place: Place) -> None:
    """The Pod of the Job migrates, warms, and exits 0."""
    job = play.pod("job", "bifrost-init", kind="Job", tree=TREE)
    job.play().ends_well()
    wait_until(lambda: not job.runs("init"), "init ends")
    assert job.state("init")["ExitCode"] == 0, job.output("init")
    assert place.sql("SELECT count(*) FROM runs") == "1"
