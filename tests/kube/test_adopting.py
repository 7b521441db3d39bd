"""The component for the platform's manifests, as kustomize applies it. No cluster is needed."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import kubernetes_validate
import pytest
import yaml

from bifrost_bootstrap import __version__
from bifrost_bootstrap.settings import Settings, duration
from tests.compose.stack import CHECKOUT, run
from tests.docs.documents import fence
from tests.kube.manifests import Manifest, kubectl, named, pod_of, read

PLATFORM = CHECKOUT / "tests/kube/platform"
COMPONENT = CHECKOUT / "deploy/platform"
EXAMPLES = CHECKOUT / "deploy/kubernetes"
IMAGE, API = f"registry.example/bifrost-bootstrap:{__version__}-1.4.0", "ghcr.io/gobifrost/bifrost-api:1.4.0"
#: In CI it is a failure: tools/test-servers installs it.
pytestmark = pytest.mark.skipif(bool(kubectl()) and not os.environ.get("CI"), reason=kubectl())


def build(folder: Path) -> list[Manifest]:
    """The manifests of a folder as kustomize builds them. Raises AssertionError where kustomize complains."""
    result = run("kubectl", "kustomize", folder)
    assert result.stderr == "", result.stderr
    return list(yaml.safe_load_all(result.stdout))


@pytest.fixture
def patched(tmp_path: Path) -> list[Manifest]:
    """The manifests of the stand-in with the overlay of docs/adopting.md."""
    shutil.copytree(PLATFORM, tmp_path / "bifrost/k8s")
    shutil.copytree(COMPONENT, tmp_path / "bifrost_bootstrap/deploy/platform")
    (tmp_path / "kustomization.yaml").write_text(fence("docs/adopting.md", "kube: platform overlay").text)
    return build(tmp_path)


def test_the_component_changes_the_init_container_and_nothing_else(patched: list[Manifest]) -> None:
    """The component replaces the init container. Elsewhere only image tags differ."""
    text = yaml.safe_dump_all(build(PLATFORM)).replace(API.replace("1.4.0", "latest"), API)
    before = list(yaml.safe_load_all(text))
    old, new = (named(manifests, "Deployment", "bifrost-api") for manifests in (before, patched))
    (old_init,), (init,) = pod_of(old).pop("initContainers"), pod_of(new).pop("initContainers")
    (volume,) = pod_of(new).pop("volumes")
    assert volume["name"] == init["volumeMounts"][0]["name"]
    assert new["spec"].pop("progressDeadlineSeconds")
    assert patched == before
    assert "command" not in init  # it would replace the image's minimal init
    assert init["args"] == ["bifrost-bootstrap", "init", "--with-worker"]
    assert init["image"] == IMAGE
    assert init["envFrom"] == old_init["envFrom"]


def test_the_init_container_is_valid_and_restricted(patched: list[Manifest]) -> None:
    """The patched Deployment is valid, its variables are settings, and the rollout deadline is longer than
    that of init.
    """
    api = named(patched, "Deployment", "bifrost-api")
    for version in ("1.29", "1.37"):
        assert kubernetes_validate.validate(api, version, strict=True) == version
    (init,) = pod_of(api)["initContainers"]
    variables = {one["name"]: one["value"] for one in init["env"]}
    assert variables.keys() <= {f"BIFROST_{name.upper()}" for name in Settings.model_fields}
    assert api["spec"]["progressDeadlineSeconds"] > duration(variables["BIFROST_INIT_TIMEOUT"])
    security = init["securityContext"]
    assert (security["runAsUser"], security["readOnlyRootFilesystem"]) == (10001, True)


def test_our_examples_take_no_secret_of_the_platform() -> None:
    """No Secret or ConfigMap of deploy/kubernetes has the name of one of the platform."""
    platform = {one["metadata"]["name"] for one in read(PLATFORM / "manifests.yaml") if one["kind"] != "Deployment"}
    for file in EXAMPLES.glob("*/*.yaml"):
        for one in read(file):
            if one["kind"] in {"Secret", "ConfigMap"}:
                assert one["metadata"]["name"] not in platform, file
