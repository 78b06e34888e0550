"""k8s/ rendered: base and every overlay pass every check; and what can be said of the files as they are."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from tests.k8s import checks, harness
from tests.k8s.harness import DEPLOY, K8S, Manifests, config_file, read_base, render
from tests.k8s.network import Peer, allows

FOLDERS = ["base", *sorted(f"overlays/{path.name}" for path in (K8S / "overlays").iterdir())]
NO_KUBECTL = pytest.mark.may_skip("needs kubectl")
NO_VALIDATOR = pytest.mark.may_skip("needs the validator and its schemas")


def need_tools_of(check: checks.Check) -> None:
    if check is checks.valid:
        harness.need_validator()


@NO_KUBECTL
@NO_VALIDATOR
@pytest.mark.parametrize("check", checks.CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("folder", FOLDERS)
def test_rendered(folder: str, check: checks.Check) -> None:
    need_tools_of(check)
    assert list(check(render(folder))) == []


@NO_KUBECTL
@NO_VALIDATOR
@pytest.mark.parametrize("folder", FOLDERS)
def test_the_validator_saw_every_document(folder: str) -> None:
    harness.need_validator()
    manifests = render(folder)
    assert {document["kind"] for document in manifests.documents} >= {"Namespace", "RayService", "NetworkPolicy"}
    stranger = {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "n"}, "specc": {}}
    assert any("specc" in finding for finding in harness.findings(stranger))


@NO_KUBECTL
@pytest.mark.parametrize("folder", FOLDERS)
def test_it_serves_the_file_that_its_kustomization_names(folder: str) -> None:
    place = folder if "replacements" in yaml.safe_load((K8S / folder / "kustomization.yaml").read_text()) else "base"
    assert render(folder).rayservice["spec"]["serveConfigV2"] == (DEPLOY / config_file(place)).read_text()
    assert not render(folder).of("ConfigMap"), "the files' ConfigMap is local"


@NO_VALIDATOR
@pytest.mark.parametrize("check", checks.CHECKS, ids=lambda check: check.__name__)
def test_base_as_it_is_written(check: checks.Check) -> None:
    """Without kubectl."""
    need_tools_of(check)
    assert list(check(read_base())) == []


@NO_KUBECTL
def test_base_is_rendered_as_it_is_written() -> None:
    """So that planted faults, which start from what is written, are faults of what is applied."""

    def key(document: harness.Document) -> tuple[str, str]:
        return document["kind"], document["metadata"]["name"]

    assert sorted(read_base().documents, key=key) == sorted(render("base").documents, key=key)


# ---- the files -------------------------------------------------------------------------------------------------------


def test_every_file_of_deploy_can_be_named() -> None:
    (generator,) = yaml.safe_load((DEPLOY / "kustomization.yaml").read_text())["configMapGenerator"]
    assert set(generator["files"]) == {file.name for file in DEPLOY.glob("config*.yaml")}
    assert generator["options"] == {
        "disableNameSuffixHash": True,
        "annotations": {"config.kubernetes.io/local-config": "true"},
    }


def kustomizations() -> list[Path]:
    return sorted(K8S.rglob("kustomization.yaml"))


@pytest.mark.parametrize("file", kustomizations(), ids=lambda file: str(file.relative_to(K8S)))
def test_a_rayservice_is_patched_by_json_patches_alone(file: Path) -> None:
    """A strategic-merge patch replaces its lists: every pod template would be gone, and kustomize says nothing."""
    data = yaml.safe_load(file.read_text())
    assert "patchesStrategicMerge" not in data
    for patch in data.get("patches", ()):
        text = patch.get("patch") or (file.parent / patch["path"]).read_text()
        body = yaml.safe_load(text)
        if not (isinstance(body, dict) and body.get("$patch") == "delete" and body["kind"] != "RayService"):
            assert isinstance(body, list), f"{file}: {text}"
            assert {"op", "path"} <= set.intersection(*map(set, body))


def test_the_file_for_kind_differs_in_place_only() -> None:
    plain, kind = (yaml.safe_load((DEPLOY / name).read_text()) for name in ("config.yaml", "config.kind.yaml"))
    assert kind["http_options"].pop("host") == "0.0.0.0"
    plain["http_options"].pop("host")
    (ingress,) = (one for one in kind["applications"][0]["deployments"] if one["name"] == "Ingress")
    assert ingress["ray_actor_options"].pop("label_selector") == checks.PLACE
    assert plain == kind


def test_ray_is_the_same_in_pyproject() -> None:
    (wanted,) = re.findall(r'"ray\[serve\]>=([\d.]+),<', (harness.REPOSITORY / "pyproject.toml").read_text())
    assert checks.constraint("ray").startswith(wanted + ".")


# ---- the harness -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("selector", "labels", "found"),
    [
        ({"a": "x"}, {"a": "x"}, True),
        ({"a": "x"}, {}, False),
        ({"a": "!x"}, {}, True),
        ({"a": "!x"}, {"a": "x"}, False),
        ({"a": "in(x,y)"}, {"a": "y"}, True),
        ({"a": "!in(x,y)"}, {"a": "y"}, False),
        ({"a": "!in(x,y)"}, {"a": "z"}, True),
        ({}, {"a": "x"}, True),
    ],
)
def test_ray_label_selectors(selector: dict[str, str], labels: dict[str, str], found: bool) -> None:
    assert checks.matches(selector, labels) is found


def policy(**spec: object) -> dict[str, object]:
    return {"kind": "NetworkPolicy", "spec": {"podSelector": {}, "policyTypes": ["Ingress"], **spec}}


@pytest.mark.parametrize(
    ("policies", "is_open"),
    [
        ([], True),
        ([policy()], False),
        ([policy(ingress=[{}])], True),
        ([policy(podSelector={"matchLabels": {"app": "other"}})], True),
        ([policy(ingress=[{"ports": [{"port": 80}]}])], True),
        ([policy(ingress=[{"ports": [{"port": 70, "endPort": 80}]}])], True),
        ([policy(ingress=[{"ports": [{"port": 80, "protocol": "UDP"}]}])], False),
        ([policy(ingress=[{"from": [{"podSelector": {"matchLabels": {"app": "a"}}}]}])], False),
        ([policy(ingress=[{"from": [{"namespaceSelector": {}, "podSelector": {"matchLabels": {"app": "a"}}}]}])], True),
        ([policy(ingress=[{"from": [{"namespaceSelector": {"matchLabels": {"n": "2"}}}]}])], False),
        ([policy(ingress=[{"from": [{"ipBlock": {"cidr": "10.0.0.0/8", "except": ["10.1.0.0/16"]}}]}])], True),
        ([policy(ingress=[{"from": [{"ipBlock": {"cidr": "10.0.0.0/24"}}]}])], False),
        ([policy(), policy(ingress=[{"from": []}])], True),
    ],
)
def test_network_policies(policies: list[dict[str, object]], is_open: bool) -> None:
    source = Peer("a", {"app": "a"}, {"n": "1"}, address="10.2.0.1")
    assert allows(policies, source, Peer("b", {"app": "b"}), 80) is is_open


def test_a_pods_labels_are_kuberays() -> None:
    pod = read_base().pod("ingress")
    assert pod.labels["app.kubernetes.io/name"] == "ragged-serve", "the template's wins over KubeRay's"
    assert pod.labels["ragged-serve/role"] == "ingress", "the group's are the pod's too"
    assert (pod.labels["ray.io/node-type"], pod.labels["ray.io/group"]) == ("worker", "ingress")


@pytest.mark.parametrize(("text", "number"), [("500m", 0.5), ("2", 2), (3, 3), ("1Gi", 2**30), ("512Mi", 2**29)])
def test_amounts(text: object, number: float) -> None:
    assert harness.amount(text) == number


def test_manifests_are_the_callers_own() -> None:
    one: Manifests = read_base()
    one.rayservice["spec"].clear()
    assert read_base().rayservice["spec"]
