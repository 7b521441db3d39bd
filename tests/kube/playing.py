"""Run Pods of the manifests with podman and servers in one network. Init containers run as in Kubernetes."""

from __future__ import annotations

import copy
import json
import os
import signal
import subprocess
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from tests.compose.stack import CHECKOUT, COMMAND_TIMEOUT, RUN, kept_environment, run
from tests.kube.manifests import Manifest, built, named, pod_of

#: Container images of the servers, as the Compose files name them.
POSTGRES, REDIS, RABBITMQ = "postgres:17", "redis:8-alpine", "rabbitmq:4-management-alpine"
#: Name of the network, and the names of the servers in it.
NETWORK = RUN
SERVERS = {name: f"{RUN}-{name}" for name in ("postgres", "redis", "rabbitmq")}
PASSWORD = "bifrost"
#: podman keeps an init container that has ended, with its exit code and its log, only where this says so.
KEEP_INIT = {"io.podman.annotations.init.container.type": "always"}


@dataclass(frozen=True)
class Place:
    """
    A database and a Redis of a test's own, in a folder what a Pod is told of them, and the images to use.

    made: the values of the Secret where somebody has made one; otherwise they are the URLs.
    """

    name: str
    redis_database: int
    folder: Path
    bootstrap: str
    standin: str
    made: dict[str, str] | None = None

    @property
    def secret(self) -> dict[str, str]:
        """The values of the Secret that Pods are given."""
        return self.urls if self.made is None else self.made

    @property
    def urls(self) -> dict[str, str]:
        """What each of its keys should hold."""
        return {
            "database-url": f"postgresql://bifrost:{PASSWORD}@{SERVERS['postgres']}:5432/{self.name}",
            "redis-url": f"redis://{SERVERS['redis']}:6379/{self.redis_database}",
            "rabbitmq-url": f"amqp://bifrost:{PASSWORD}@{SERVERS['rabbitmq']}:5672/",
        }

    def sql(self, statements: str) -> str:
        """Run statements in the database; what they return, bare."""
        psql = ("psql", "-qAtX", "-v", "ON_ERROR_STOP=1", "-U", "bifrost", "-d", self.name, "-c", statements)
        return run("podman", "exec", SERVERS["postgres"], *psql).stdout.strip()


class Pod:
    """One Pod of a variant: `kind` and `name` of what makes it, `number` to tell replicas apart."""

    def __init__(self, place: Place, variant: str, name: str, *, kind: str = "Deployment", tree: Path, number: int = 1):
        self.name = f"{place.name}-{name}-{number}"
        self.place = place
        manifests = built(variant)
        settings = copy.deepcopy(named(manifests, "ConfigMap", "bifrost-bootstrap"))
        settings["data"]["BIFROST_ALEMBIC_CONFIG"] = "/tree/alembic.ini"
        del settings["data"]["BIFROST_ALEMBIC_PYTHON"]
        maker = named(manifests, kind, name)
        labels = maker["spec"]["template"]["metadata"]["labels"]
        pod = {
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": {"name": self.name, "labels": labels, "annotations": KEEP_INIT},
            "spec": self._playable(copy.deepcopy(pod_of(maker)), tree),
        }
        self.file = place.folder / f"{self.name}.yaml"
        secrets = {
            "apiVersion": "v1",
            "kind": "ConfigMap",
            "metadata": {"name": f"{self.name}-secrets"},
            "data": place.secret,
        }
        self.file.write_text(yaml.safe_dump_all([settings, secrets, pod]))

    def _playable(self, spec: Manifest, tree: Path) -> Manifest:
        """The Pod with another image in place of the platform's, this tree, and without what podman 4.3 lacks."""
        # One try: podman starts an init container that failed again, but never the containers after it.
        spec["restartPolicy"] = "Never"
        for container in [*spec.get("initContainers", []), *spec["containers"]]:
            container.pop("ports", None)  # would be opened on this machine
            if container["image"].startswith("bifrost-bootstrap:"):
                container["image"] = self.place.bootstrap
                container["volumeMounts"].append({"name": "tree", "mountPath": "/tree", "readOnly": True})
                continue
            container["image"] = self.place.standin
            container["command"] = ["python", "standin.py"]
            # It reads a secretKeyRef in another form than the one in which it stores a Secret.
            for variable in container["env"]:
                variable["value"] = self.place.secret[variable.pop("valueFrom")["secretKeyRef"]["key"]]
        for volume in spec["volumes"]:
            if "secret" in volume:
                # It hands out the base64 of a Secret's values.
                assert {item["key"] for item in volume.pop("secret")["items"]} <= self.place.secret.keys()
                volume["configMap"] = {"name": f"{self.name}-secrets", "optional": False}
            else:
                # An emptyDir is a volume of that name, shared by all Pods.
                _rename_volume(spec, volume["name"], f"{self.name}-{volume['name']}")
        spec["volumes"].append({"name": "tree", "hostPath": {"path": str(tree), "type": "Directory"}})
        return spec

    def play(self) -> Playing:
        """Begin to play it; the containers start after the init containers."""
        return Playing(self, ["podman", "kube", "play", "--network", NETWORK, str(self.file)])

    def start_again(self) -> Playing:
        """Begin to start the Pod, which has ended, again, with its init containers, as the kubelet would."""
        return Playing(self, ["podman", "pod", "start", self.name])

    def state(self, container: str) -> dict[str, Any]:
        """What podman says of the state of a container; empty before it is created."""
        result = run("podman", "container", "inspect", f"{self.name}-{container}", check=False)
        found: list[dict[str, Any]] = json.loads(result.stdout or "[]")
        return found[0]["State"] if found else {}

    def runs(self, container: str) -> bool:
        """Whether it is running now."""
        return self.state(container).get("Status") == "running"

    def never_started(self, container: str) -> bool:
        """Whether it exists and has never been started."""
        return str(self.state(container)["StartedAt"]).startswith("0001-")

    def healthy(self) -> bool:
        """Whether the liveness probe of the bootstrap worker passes now."""
        return run("podman", "healthcheck", "run", f"{self.name}-bootstrap-worker", check=False).returncode == 0

    def kill(self, container: str) -> None:
        """SIGKILL to its first process, from outside, as the kernel would when memory is short."""
        os.kill(self.state(container)["Pid"], signal.SIGKILL)

    def output(self, container: str) -> str:
        """What a container has written, stdout and stderr."""
        result = run("podman", "logs", f"{self.name}-{container}")
        return result.stdout + result.stderr

    def remove(self) -> None:
        """Leave nothing of it behind."""
        run("podman", "pod", "rm", "--force", "--time", "2", self.name, check=False)
        volumes = run("podman", "volume", "ls", "-q", "--filter", f"name={self.name}").stdout.split()
        if volumes:
            run("podman", "volume", "rm", *volumes)


class Playing:
    """A podman that brings a Pod up, in the background."""

    def __init__(self, pod: Pod, command: list[str]) -> None:
        self.pod = pod
        self.process = subprocess.Popen(
            command, cwd=CHECKOUT, env=kept_environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )

    def ends_well(self) -> None:
        """Wait for it; raises AssertionError, with the log of init, where the Pod did not come up."""
        said, _ = self.process.communicate(timeout=COMMAND_TIMEOUT)
        assert self.process.returncode == 0, said + self.pod.output("init")

    def fails(self) -> None:
        """Wait for it; raises AssertionError where the Pod came up."""
        said, _ = self.process.communicate(timeout=COMMAND_TIMEOUT)
        assert self.process.returncode != 0, said


class Pods(ExitStack):
    """Makes Pods, and removes them at the end."""

    def __init__(self, place: Place) -> None:
        super().__init__()
        self.place = place

    def pod(self, variant: str, name: str, *, kind: str = "Deployment", tree: Path, number: int = 1) -> Pod:
        pod = Pod(self.place, variant, name, kind=kind, tree=tree, number=number)
        self.callback(pod.remove)
        return pod


def _rename_volume(spec: Manifest, old: str, new: str) -> None:
    places = [*spec["volumes"]]
    for container in [*spec.get("initContainers", []), *spec["containers"]]:
        places += container.get("volumeMounts", [])
    for place in places:
        if place["name"] == old:
            place["name"] = new
