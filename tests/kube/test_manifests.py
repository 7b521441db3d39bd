"""Rules for the manifests of deploy/kubernetes, and values that they repeat. No podman is needed."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

import click
import kubernetes_validate
import pytest
import yaml

from bifrost_bootstrap import __version__
from bifrost_bootstrap.cli.commands import main
from bifrost_bootstrap.errors import ExitCode
from bifrost_bootstrap.settings import Settings, duration
from bifrost_bootstrap.urls import parse_broker, parse_postgres, several
from tests.compose.stack import CHECKOUT, run
from tests.docs.documents import fence
from tests.kube.manifests import (
    EXAMPLES,
    FOLDER,
    VARIANTS,
    Manifest,
    all_variants,
    as_written,
    built,
    containers,
    kubectl,
    named,
    pod_of,
    pods,
    read,
)

#: Kubernetes versions of the schemas: the oldest with all fields that we use, the newest, and some between.
#: (From 1.25 on there is podFailurePolicy, but up to 1.28 its schema wants onPodConditions in every rule.)
KUBERNETES = ("1.29", "1.32", "1.35", "1.37")
OURS, PLATFORM = "bifrost-bootstrap", "ghcr.io/gobifrost/bifrost-api"
#: Read by the platform, not by us.
FOREIGN = {"BIFROST_ENVIRONMENT", "BIFROST_SECRET_KEY"}

WRITTEN = as_written()
MANIFESTS = all_variants()
#: In CI it is a failure: tools/test-servers installs it.
needs_kubectl = pytest.mark.skipif(bool(kubectl()) and not os.environ.get("CI"), reason=kubectl())


def ours() -> list[tuple[str, Manifest]]:
    """Our containers, by a name that tells them apart in a failure."""
    return [
        (f"{pod_name}/{container['name']}", container)
        for pod_name, pod in pods(MANIFESTS)
        for container in containers(pod)
        if container["image"].partition(":")[0] == OURS
    ]


@pytest.mark.parametrize("version", KUBERNETES)
def test_manifests_are_valid(version: str) -> None:
    """Each manifest is valid for this Kubernetes version, without unknown fields."""
    assert len(MANIFESTS) >= 10
    for manifest in MANIFESTS:
        assert kubernetes_validate.validate(manifest, version, strict=True) == version


def test_the_schemas_refuse_what_is_wrong() -> None:
    """Positive control of the test above: a misspelt field deep in a Pod is found."""
    worker = yaml.safe_load(yaml.safe_dump(named(WRITTEN, "Deployment", "bifrost-worker")))
    pod_of(worker)["containers"][0]["securityContext"]["runAsNonroot"] = True
    with pytest.raises(kubernetes_validate.ValidationError, match="runAsNonroot"):
        kubernetes_validate.validate(worker, KUBERNETES[-1], strict=True)


@needs_kubectl
@pytest.mark.parametrize("variant", VARIANTS)
def test_variants_build_and_hold_the_platform(variant: str) -> None:
    """Each variant builds without warning, and API and worker have exactly one init container, ours."""
    manifests = built(variant)
    for name in ("bifrost-api", "bifrost-worker"):
        (init,) = pod_of(named(manifests, "Deployment", name))["initContainers"]
        assert init["image"].partition(":")[0] == OURS


@needs_kubectl
@pytest.mark.parametrize("variant", VARIANTS)
def test_an_overlay_sets_both_images(variant: str, tmp_path: Path) -> None:
    """An overlay with other image names and tags changes every image of a variant."""
    tags = {OURS: "registry.example/bootstrap:2", PLATFORM: "registry.example/api:2"}
    images = [
        dict(zip(("name", "newName", "newTag"), (name, *new.split(":")), strict=True)) for name, new in tags.items()
    ]
    overlay = {"resources": [os.path.relpath(FOLDER / variant, tmp_path)], "images": images}
    (tmp_path / "kustomization.yaml").write_text(yaml.safe_dump(overlay))
    result = run("kubectl", "kustomize", tmp_path)
    manifests = list(yaml.safe_load_all(result.stdout))
    used = {container["image"] for _, pod in pods(manifests) for container in containers(pod)}
    assert used == set(tags.values())


@needs_kubectl
def test_the_overlay_of_the_page(tmp_path: Path) -> None:
    """The overlay of docs/adopting.md sets every image and the tree, and renames the ConfigMap."""
    shutil.copytree(FOLDER, tmp_path / "bifrost_bootstrap/deploy/kubernetes")
    (tmp_path / "kustomization.yaml").write_text(fence("docs/adopting.md", "kube: overlay").text)
    result = run("kubectl", "kustomize", tmp_path)
    assert result.stderr == ""
    manifests = list(yaml.safe_load_all(result.stdout))
    used = {container["image"] for _, pod in pods(manifests) for container in containers(pod)}
    assert used == {f"registry.example/bifrost-bootstrap:{__version__}-1.4.0", "registry.example/bifrost-api:1.4.0"}
    settings = named(manifests, "ConfigMap", OURS)
    assert settings["data"]["BIFROST_ALEMBIC_CONFIG"] == "/srv/api/alembic.ini"
    before = named(built("base"), "ConfigMap", OURS)
    assert settings["data"].keys() == before["data"].keys()
    (init,) = pod_of(named(manifests, "Deployment", "bifrost-api"))["initContainers"]
    assert init["envFrom"][0]["configMapRef"]["name"] == settings["metadata"]["name"] != before["metadata"]["name"]


@needs_kubectl
def test_s02_only_who_migrates_may() -> None:
    """Only containers that run migrations get the URL of the role that migrates."""
    for variant in VARIANTS:
        for name, pod in pods(built(variant)):
            for container in containers(pod):
                named_in = {one["name"] for one in container.get("env", [])}
                migrates = container.get("args", [OURS])[1:] in (["init", "--with-worker"], ["worker"])
                assert ("BIFROST_MIGRATION_DATABASE_URL" in named_in) == migrates, (variant, name, container["name"])


@needs_kubectl
def test_somebody_fills_the_cache_in_every_variant() -> None:
    """In a variant whose Pods only wait there is a Job or a standing worker; else each Pod has its own worker."""
    does = {
        variant: {
            name: containers(pod)[0]["args"][1:]
            for name, pod in pods(built(variant))
            if containers(pod)[0]["args"][0] == OURS
        }
        for variant in VARIANTS
    }
    wait, alone = ["check", "--wait", "10m"], ["init", "--with-worker"]
    assert does == {
        "base": {"bifrost-api": alone, "bifrost-worker": alone},
        "standing-worker": {
            "bifrost-api": ["init"],
            "bifrost-worker": wait,
            "bifrost-bootstrap-worker": ["worker"],
        },
        "job": {"bifrost-api": wait, "bifrost-worker": wait, "bifrost-init": alone},
    }


def test_commands_are_ones() -> None:
    """The command line accepts the arguments of our containers."""
    checked = 0
    for where, container in ours():
        program, name, *rest = container["args"]
        if program != OURS:
            continue
        assert "command" not in container, where  # it would replace the image's minimal init
        command = main.commands[name]
        assert isinstance(command, click.Command)
        command.make_context(name, list(rest))
        checked += 1
    assert checked >= 4


def test_every_setting_is_one() -> None:
    """The manifests name only settings that the package reads."""
    settings = {f"BIFROST_{name.upper()}" for name in Settings.model_fields}
    named_in = set(re.findall(r"\bBIFROST_[A-Z_]+\b", yaml.safe_dump_all(MANIFESTS + WRITTEN)))
    named_in |= set(re.findall(r"\bBIFROST_[A-Z_]+(?==)", (EXAMPLES.parent / "base/kustomization.yaml").read_text()))
    assert "BIFROST_ALEMBIC_CONFIG" in named_in
    assert {name for name in named_in - FOREIGN - settings if name.removesuffix("_FILE") not in settings} == set()


def test_every_secret_has_an_example() -> None:
    """Each Secret and key of a manifest is in the example, and each secret file is mounted by name."""
    secrets = {
        one["metadata"]["name"]: set(one["stringData"]) for one in read(EXAMPLES / "bifrost-bootstrap-secrets.yaml")
    }
    text = yaml.safe_dump_all(MANIFESTS)
    files = set(re.findall(r"/run/secrets/bifrost/([a-z-]+)", text))
    assert files <= secrets["bifrost-bootstrap-secrets"]
    assert {"database-url", "redis-url", "rabbitmq-url"} <= secrets["bifrost-bootstrap-secrets"]
    shown = fence("docs/operations.md", "kube: first deploy").text
    assert set(re.findall(r"--from-file=([a-z-]+)", shown)) == secrets["bifrost-bootstrap-secrets"]
    for _, pod in pods(MANIFESTS):
        for container in containers(pod):
            for variable in container.get("env", []):
                if reference := variable.get("valueFrom", {}).get("secretKeyRef"):
                    assert reference["key"] in secrets[reference["name"]]
            for source in container.get("envFrom", []):
                assert source.get("secretRef", {"name": "bifrost-platform"})["name"] in secrets


def test_the_example_of_several_nodes_names_them_all() -> None:
    """Its URLs have three RabbitMQ nodes and two PostgreSQL hosts, under keys of the manifests."""
    (secret,) = read(EXAMPLES / "several-nodes.yaml")
    known = {
        one["metadata"]["name"]: set(one["stringData"]) for one in read(EXAMPLES / "bifrost-bootstrap-secrets.yaml")
    }
    urls = secret["stringData"]
    assert set(urls) <= known[secret["metadata"]["name"]]
    assert len(several(parse_broker(urls["rabbitmq-url"]))) == 3
    for key in ("database-url", "migration-database-url"):
        assert len(parse_postgres(urls[key]).parameters["host"].split(",")) == 2


def test_the_job_knows_our_exit_codes() -> None:
    """The Job gives up at once after exactly the exit codes that a retry does not help (README)."""
    rows = re.findall(r"^\| ([\d, ]+) \|.*\| ?(\w*) \|$", (CHECKOUT / "README.md").read_text(), re.MULTILINE)
    retry = {ExitCode(int(code)): helps for codes, helps in rows for code in codes.split(",")}
    assert set(retry) == set(ExitCode)
    rules = named(WRITTEN, "Job", "bifrost-init")["spec"]["podFailurePolicy"]["rules"]
    codes = {rule["action"]: set(rule["onExitCodes"]["values"]) for rule in rules if "onExitCodes" in rule}
    of_init = set(ExitCode) - {ExitCode.OK, ExitCode.NOT_READY, ExitCode.SIGINT, ExitCode.SIGTERM}
    assert codes["FailJob"] == {code for code in of_init if retry[code] == "no"}
    assert codes["Count"] == {code for code in of_init if retry[code] != "no"}
    (container,) = pod_of(named(WRITTEN, "Job", "bifrost-init"))["containers"]
    assert {rule["onExitCodes"]["containerName"] for rule in rules if "onExitCodes" in rule} == {container["name"]}


@needs_kubectl
def test_a_rollout_outlives_init() -> None:
    """The rollout deadline is longer than that of init."""
    for variant in VARIANTS:
        settings = named(built(variant), "ConfigMap", "bifrost-bootstrap")["data"]
        for name in ("bifrost-api", "bifrost-worker"):
            rollout = named(built(variant), "Deployment", name)["spec"]["progressDeadlineSeconds"]
            assert rollout > duration(settings["BIFROST_INIT_TIMEOUT"]), (variant, name)


def test_pods_keep_to_the_restricted_standard() -> None:
    """Every Pod meets the restricted Pod security standard, has no token, and sets requests and limits."""
    for name, pod in pods(MANIFESTS):
        assert pod["automountServiceAccountToken"] is False, name
        assert pod["enableServiceLinks"] is False, name
        assert pod["securityContext"]["runAsNonRoot"] is True, name
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}, name
        for container in containers(pod):
            security = container["securityContext"]
            assert security["allowPrivilegeEscalation"] is False, name
            assert security["capabilities"] == {"drop": ["ALL"]}, name
            assert security["runAsUser"] > 0, name
            assert set(container["resources"]) == {"requests", "limits"}, name
            assert container["terminationMessagePolicy"] == "FallbackToLogsOnError", name
        assert not any("hostPath" in volume for volume in pod["volumes"]), name


def test_our_containers_are_closer_still() -> None:
    """Our containers run as the user of the image, with a read-only root and an emptyDir at /tmp."""
    user = re.search(r"^USER (\d+):(\d+)$", (CHECKOUT / "Dockerfile").read_text(), re.MULTILINE)
    assert user
    for where, container in ours():
        security = container["securityContext"]
        assert (security["runAsUser"], security["runAsGroup"]) == (int(user[1]), int(user[2])), where
        assert security["readOnlyRootFilesystem"] is True, where
        writable = [mount["mountPath"] for mount in container["volumeMounts"] if not mount.get("readOnly")]
        assert writable == ["/tmp"], where


def test_the_worker_lives_and_ends_as_in_compose() -> None:
    """Health check and grace period of the bootstrap worker are those of the Compose file."""
    services = yaml.safe_load((CHECKOUT / "deploy/compose/services.yml").read_text())["services"]
    compose = services["bootstrap-worker"]
    pod = pod_of(named(WRITTEN, "Deployment", "bifrost-bootstrap-worker"))
    (worker,) = pod["containers"]
    check = compose["healthcheck"]["test"][1].replace("$$", "$")
    assert worker["livenessProbe"]["exec"]["command"] == ["sh", "-c", check]
    assert worker["startupProbe"]["exec"]["command"] == ["sh", "-c", check]
    assert f"{pod['terminationGracePeriodSeconds']}s" == compose["stop_grace_period"]


def test_labels_find_their_pods() -> None:
    """Each selector of a Deployment, Service and NetworkPolicy matches a Pod of a manifest."""
    labels = [one["spec"]["template"]["metadata"]["labels"] for one in MANIFESTS if "template" in one.get("spec", {})]
    names = {label["app.kubernetes.io/name"] for label in labels}
    for one in MANIFESTS:
        where = f"{one['kind']}/{one['metadata']['name']}"
        if one["kind"] == "Deployment":
            wanted = one["spec"]["selector"]["matchLabels"]
            assert wanted.items() <= one["spec"]["template"]["metadata"]["labels"].items(), where
        if one["kind"] == "Service":
            assert any(one["spec"]["selector"].items() <= label.items() for label in labels), where
        if one["kind"] == "NetworkPolicy":
            selector = one["spec"]["podSelector"]
            policed = set(selector.get("matchLabels", {}).values())
            policed |= {value for rule in selector.get("matchExpressions", []) for value in rule["values"]}
            assert policed, where
            assert policed <= names, where
