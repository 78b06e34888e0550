"""k8s/ as parsed documents: rendered once for each place, and with what KubeRay would add to the pods. Asserts nothing.

Two tools may be absent. kubectl renders; the validator and its schemas are looked for in `shared` beside the checkout, or
where RAGGED_SERVE_K8S_TOOLS says. k8s/base can be read without kubectl too (`read_base`).
"""

from __future__ import annotations

import functools
import importlib.util
import json
import os
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

REPOSITORY = Path(__file__).parent.parent.parent
K8S = REPOSITORY / "k8s"
DEPLOY = REPOSITORY / "deploy"
TOOLS = Path(os.environ.get("RAGGED_SERVE_K8S_TOOLS") or REPOSITORY.parent / "shared")
NAMESPACE = "ragged-serve"

Document = dict[str, Any]


# ---- tools -----------------------------------------------------------------------------------------------------------


def need_kubectl() -> str:
    """Its path. Skips the test where there is none: mark it may_skip."""
    kubectl = shutil.which("kubectl")
    if kubectl is None:
        pytest.skip("kubectl is not installed, so nothing renders k8s/")
    return kubectl


@functools.cache
def _validator() -> tuple[ModuleType, Any] | None:
    script, schemas = TOOLS / "tools" / "validate_k8s.py", TOOLS / "k8s-schemas"
    if not (script.is_file() and schemas.is_dir()):
        return None
    spec = importlib.util.spec_from_file_location("validate_k8s", script)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module, module.Schemas(schemas)


def need_validator() -> None:
    """Skips the test where it is absent: mark it may_skip."""
    if _validator() is None:
        pytest.skip(f"{TOOLS} holds no tools/validate_k8s.py with k8s-schemas (RAGGED_SERVE_K8S_TOOLS)")


def findings(document: Document) -> list[str]:
    """What the validator has against one document. Nothing, where the validator is absent."""
    found = _validator()
    if found is None:
        return []
    module, schemas = found
    return [f"{at}: {message}" for at, message in module.check(document, schemas)]


# ---- rendering -------------------------------------------------------------------------------------------------------


@functools.cache
def _as_json(text: str) -> str:
    """The documents of a YAML text. What stands behind an anchor becomes a copy at each place, as kustomize makes of it."""
    return json.dumps([document for document in yaml.safe_load_all(text) if document is not None])


def load(text: str) -> list[Document]:
    return list(json.loads(_as_json(text)))


@functools.cache
def _kustomize(kubectl: str, folder: Path) -> str:
    done = subprocess.run([kubectl, "kustomize", str(folder)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


def render(folder: Path | str) -> Manifests:
    """Of a folder with a kustomization: a copy of its documents, rendered at the first call. Needs kubectl."""
    return Manifests(load(_kustomize(need_kubectl(), (K8S / folder).resolve())))


def render_with(folder: str, components: list[str], scratch: Path) -> Manifests:
    """A folder of k8s/ and some of k8s/components on top, as an overlay of a user's would name them."""
    scratch.mkdir(parents=True, exist_ok=True)

    def relative(place: Path) -> str:
        return os.path.relpath(place.resolve(), scratch.resolve())

    kustomization = {
        "apiVersion": "kustomize.config.k8s.io/v1beta1",
        "kind": "Kustomization",
        "resources": [relative(K8S / folder)],
        "components": [relative(K8S / "components" / name) for name in components],
    }
    (scratch / "kustomization.yaml").write_text(yaml.safe_dump(kustomization))
    return render(scratch)


def read_base() -> Manifests:
    """k8s/base without kubectl: its files as they are, and the copies that its kustomization asks for."""
    kustomization = yaml.safe_load((K8S / "base" / "kustomization.yaml").read_text())
    files = [K8S / "base" / name for name in kustomization["resources"] if name.endswith(".yaml")]
    manifests = Manifests([document for file in files for document in load(file.read_text())])
    text = (DEPLOY / config_file("base")).read_text()
    manifests.rayservice["spec"]["serveConfigV2"] = text
    for variable in manifests.one("Job", "model-cache")["spec"]["template"]["spec"]["containers"][0]["env"]:
        if variable["name"] == "SERVE_CONFIG":
            variable["value"] = text
    return manifests


def config_file(folder: str) -> str:
    """Name of the file in deploy/ that a folder of k8s/ serves."""
    (source,) = (
        replacement["source"]
        for replacement in yaml.safe_load((K8S / folder / "kustomization.yaml").read_text())["replacements"]
        if any(target["select"].get("kind") == "RayService" for target in replacement["targets"])
    )
    assert source["name"] == "serve-configs"
    return str(source["fieldPath"]).removeprefix("data.").replace("\\.", ".")


# ---- documents -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pod:
    """A pod that a document asks for."""

    name: str
    """head, the name of a worker group, or Kind/name of what makes it."""
    labels: Mapping[str, str]
    """As they are in the cluster, with KubeRay's."""
    spec: Document
    group: Document | None
    """Of the RayCluster; None for a pod without Ray."""

    @property
    def is_ray(self) -> bool:
        return self.group is not None

    @property
    def is_worker(self) -> bool:
        return self.labels.get("ray.io/node-type") == "worker"

    @property
    def containers(self) -> list[Document]:
        return [*self.spec.get("initContainers", []), *self.spec["containers"]]

    @property
    def main(self) -> Document:
        """The container that runs Ray: the first."""
        return dict(self.spec["containers"][0])

    def env(self) -> dict[str, str]:
        """Of the first container; what comes from elsewhere is empty."""
        return {variable["name"]: variable.get("value", "") for variable in self.main.get("env", [])}

    def ports(self) -> dict[str, int]:
        return {port["name"]: port["containerPort"] for port in self.main.get("ports", [])}


class Manifests:
    """Rendered documents. They may be changed: nobody else sees it."""

    def __init__(self, documents: list[Document]) -> None:
        self.documents = documents

    def of(self, kind: str) -> list[Document]:
        return [document for document in self.documents if document["kind"] == kind]

    def one(self, kind: str, name: str | None = None) -> Document:
        found = [one for one in self.of(kind) if name in (None, one["metadata"]["name"])]
        assert len(found) == 1, f"{len(found)} of {kind} {name or ''}"
        return found[0]

    @property
    def rayservice(self) -> Document:
        return self.one("RayService")

    @property
    def cluster(self) -> Document:
        return dict(self.rayservice["spec"]["rayClusterConfig"])

    @property
    def head(self) -> Document:
        return dict(self.cluster["headGroupSpec"])

    def group(self, name: str) -> Document:
        (found,) = (group for group in self.cluster["workerGroupSpecs"] if group["groupName"] == name)
        return dict(found)

    @property
    def serve_config(self) -> Document:
        """What Ray Serve gets. Raises yaml.YAMLError."""
        (config,) = load(self.rayservice["spec"]["serveConfigV2"])
        return config

    @property
    def deployments(self) -> dict[str, Document]:
        (application,) = self.serve_config["applications"]
        return {deployment["name"]: deployment for deployment in application["deployments"]}

    def pods(self) -> list[Pod]:
        return list(self._pods())

    def _pods(self) -> Iterator[Pod]:
        for document in self.documents:
            kind, name, spec = document["kind"], document["metadata"]["name"], document.get("spec") or {}
            if kind == "RayService":
                cluster = spec["rayClusterConfig"]
                yield _ray_pod("head", "headgroup", cluster["headGroupSpec"], name)
                for group in cluster["workerGroupSpecs"]:
                    yield _ray_pod("worker", group["groupName"], group, name)
            elif kind in ("Job", "Deployment", "StatefulSet", "DaemonSet"):
                template = spec["template"]
                labels = (template.get("metadata") or {}).get("labels") or {}
                yield Pod(f"{kind}/{name}", labels, template["spec"], None)

    def pod(self, name: str) -> Pod:
        (found,) = (pod for pod in self.pods() if pod.name == name)
        return found


def _ray_pod(node_type: str, group_name: str, group: Document, owner: str) -> Pod:
    """With KubeRay 1.7's labels (labelPod, mergeLabels in ray-operator/controllers/ray/common/pod.go): the group's own win
    over the template's, and both over KubeRay's, but for three."""
    template = group["template"]
    labels = {
        "ray.io/is-ray-node": "yes",
        "ray.io/identifier": f"{owner}-{node_type}",
        "app.kubernetes.io/name": "kuberay",
        "app.kubernetes.io/created-by": "kuberay-operator",
        **((template.get("metadata") or {}).get("labels") or {}),
        **(group.get("labels") or {}),
        "ray.io/node-type": node_type,
        "ray.io/group": group_name,
        "ray.io/serve": str(node_type == "worker").lower(),
    }
    name = "head" if node_type == "head" else group_name
    return Pod(name, labels, template["spec"], group)


def selects(selector: Document | None, labels: Mapping[str, str]) -> bool:
    """Whether a Kubernetes label selector takes these labels. An empty one takes all."""
    selector = selector or {}
    if any(labels.get(key) != value for key, value in (selector.get("matchLabels") or {}).items()):
        return False
    for rule in selector.get("matchExpressions") or []:
        value, among = labels.get(rule["key"]), rule.get("values") or []
        holds = {
            "In": value is not None and value in among,
            "NotIn": value is None or value not in among,
            "Exists": value is not None,
            "DoesNotExist": value is None,
        }[rule["operator"]]
        if not holds:
            return False
    return True


def amount(quantity: Any) -> float:
    """A Kubernetes quantity as a number: cores, bytes or pieces."""
    text = str(quantity)
    for suffix, factor in (("Ki", 2**10), ("Mi", 2**20), ("Gi", 2**30), ("Ti", 2**40), ("m", 1e-3)):
        if text.endswith(suffix):
            return float(text.removesuffix(suffix)) * factor
    return float(text)
