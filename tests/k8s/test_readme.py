"""k8s/README.md against what is there: its files, names, ports, secrets, numbers and alerts; and faults planted into it."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.k8s import checks
from tests.k8s.component_checks import INNER_GATEWAY, SERVE_SERVICE, secret_of
from tests.k8s.harness import (
    DEPLOY,
    K8S,
    NAMESPACE,
    REPOSITORY,
    TOOLS,
    Manifests,
    amount,
    load,
    read_base,
    render,
    selects,
)

README = (K8S / "README.md").read_text(encoding="utf-8")
ALERTS = [
    rule["alert"]
    for group in yaml.safe_load((DEPLOY / "monitoring/alerts.yaml").read_text(encoding="utf-8"))["groups"]
    for rule in group["rules"]
]
NO_KUBECTL = pytest.mark.may_skip("needs kubectl")
MINE = "k8s/mine"
"""The reader's own overlay, which the page has him write."""


def written() -> Manifests:
    """All manifests of k8s/ as they stand in their files, without kubectl: base, components and the load test."""
    files = [
        file
        for folder in ("components", "load")
        for file in sorted((K8S / folder).rglob("*.yaml"))
        if file.name != "kustomization.yaml"
    ]
    return Manifests([*read_base().documents, *(document for file in files for document in load(file.read_text()))])


WRITTEN = written()


def shell(text: str) -> list[str]:
    """Commands of the blocks that are for a shell, one each, and those in the text; without comments and here-documents."""
    blocks = "\n".join(re.findall(r"^ *```sh\n(.*?)^ *```", text, re.M | re.S))
    blocks = re.sub(r"<<'END'\n.*?^END$", "", blocks, flags=re.M | re.S).replace("\\\n", " ")
    lines = [re.sub(r"\s+#.*", "", line).strip() for line in blocks.splitlines()]
    prose = re.sub(r"^ *```.*?^ *```", "", text, flags=re.M | re.S)
    inline = re.findall(r"`((?:kubectl|docker|helm|minikube|kind) [^`]+)`", prose.replace("\n", " "))
    return [line for line in (*lines, *inline) if line]


def overlay(text: str) -> str:
    (found,) = re.findall(rf"cat > {MINE}/kustomization.yaml <<'END'\n(.*?)^END$", text, re.M | re.S)
    return str(found)


# ---- files and names -------------------------------------------------------------------------------------------------


def files(text: str) -> Iterator[str]:
    for link in re.findall(r"\]\(([^)#]+)", text):
        if "://" not in link and not (K8S / link).exists():
            yield f"{link} does not exist"
    for path in re.findall(r"(?<![\w/.-])((?:k8s|deploy|docs|tests|components|overlays|base|load)/[\w./*-]*)", text):
        place = path.rstrip("./")
        if place.startswith(MINE):
            continue
        if not any(list(root.glob(place)) for root in (REPOSITORY, K8S)):
            yield f"{path} does not exist"
    for command in shell(text):
        for folder in re.findall(r" -k (?!\"?github)(\S+)", command):
            if folder != MINE and not (REPOSITORY / folder / "kustomization.yaml").is_file():
                yield f"{folder} is no kustomization"


def services() -> dict[str, set[int]]:
    """Services in our namespace and their ports: KubeRay's, those that are written, and a gateway's."""
    head, worker = WRITTEN.pod("head").ports(), WRITTEN.pod("ingress").ports()
    ours = {one["metadata"]["name"]: {port["port"] for port in one["spec"]["ports"]} for one in WRITTEN.of("Service")}
    return {
        **ours,
        SERVE_SERVICE: {worker["serve"]},
        "ragged-serve-head-svc": set(head.values()),
        f"{INNER_GATEWAY}-istio": {80},
    }


def objects(text: str) -> Iterator[str]:
    """What commands ask for in our namespace: objects, ports, labels, containers."""
    there: dict[str, dict[str, set[int]]] = {
        "svc": services(),
        "rayservice": {"ragged-serve": set()},
        "job": {
            one["metadata"]["name"]: {
                port["containerPort"]
                for container in one["spec"]["template"]["spec"]["containers"]
                for port in container.get("ports", ())
            }
            for one in WRITTEN.of("Job")
        },
    }
    pods = WRITTEN.pods()
    for command in shell(text):
        if not re.search(rf"-n {NAMESPACE}\b(?!-)", command):
            continue
        named = re.findall(r"\b(svc|rayservice|job)[/ ]([a-z][\w-]*)", command)
        for kind, name in named:
            if name not in there[kind]:
                yield f"there is no {kind}/{name}"
        for port in re.findall(r"port-forward .* \d+:(\d+)", command):
            if not any(int(port) in there[kind].get(name, ()) for kind, name in named):
                yield f"{command}: port {port}"
        for selector in re.findall(r" -l (\S+)", command):
            wanted = dict(pair.split("=") for pair in selector.split(","))
            if not any(selects({"matchLabels": wanted}, pod.labels) for pod in pods):
                yield f"{selector} selects no pod"
        for container in re.findall(r" -c (\S+)", command):
            if container not in {one["name"] for pod in pods for one in pod.containers}:
                yield f"no pod has a container {container}"
    for host, port in re.findall(r"http://([\w-]+)\.ragged-serve:(\d+)", text):
        if int(port) not in services().get(host, ()):
            yield f"{host}:{port} is no Service"
    for label in re.findall(r"ragged-serve/client[=:]\S*", text):
        if 'ragged-serve/client: "true"' not in (K8S / "base/networkpolicy.yaml").read_text():
            yield f"{label}: no policy asks for it"


def secrets(text: str) -> Iterator[str]:
    """Each Secret that a pod or a gateway asks for is made here with the key that it wants, and no other."""
    api_keys = yaml.safe_load((K8S / "components/api-keys/kustomization.yaml").read_text())["patches"][0]["patch"]
    asked = {(NAMESPACE, *secret_of(yaml.safe_load(api_keys)[-1]["value"])): True}  # type: ignore[misc]
    for pod in WRITTEN.pods():
        for container in pod.containers:
            for variable in container.get("env", ()):
                if (found := secret_of(variable)) is not None:
                    asked[NAMESPACE, *found] = True
    for gateway in WRITTEN.of("Gateway"):
        for listener in gateway["spec"]["listeners"]:
            for reference in (listener.get("tls") or {}).get("certificateRefs", ()):
                asked[gateway["metadata"]["namespace"], reference["name"], "tls"] = True
    made = set()
    for command in shell(text):
        if (found := re.search(r"-n (\S+) create secret (generic|tls) ([\w-]+) (.*)", command)) is not None:
            place, kind, name, rest = found.groups()
            keys = ["tls"] if kind == "tls" else re.findall(r"--from-literal=(\w+)=", rest)
            made |= {(place, name, key) for key in keys}
    for one in sorted(set(asked) - made):
        yield f"nobody makes the Secret {one}"
    for one in sorted(made - set(asked)):
        yield f"nobody asks for the Secret {one}"


def images(text: str) -> Iterator[str]:
    """Names, tags and arguments of what is built are those of what is run."""
    (run,) = {pod.main["image"] for pod in WRITTEN.pods() if pod.is_ray}
    (dev,) = yaml.safe_load((K8S / "overlays/dev/kustomization.yaml").read_text())["images"]
    tags = {run, f"{dev['name']}:{dev['newTag']}"}
    seen = set()
    for command in shell(text):
        for image in re.findall(r"(?:-t|docker push|docker-image) (\S+)", command):
            name = image.removeprefix("registry.example/")
            seen.add(name)
            if name not in tags:
                yield f"{image} is run by nobody"
        for argument in re.findall(r"--build-arg (\w+)=", command):
            if not re.search(rf"^ARG {argument}=", (K8S / "Dockerfile").read_text(), re.M):
                yield f"the Dockerfile has no argument {argument}"
    if seen != tags:
        yield f"built are {sorted(seen)}, run {sorted(tags)}"
    data = yaml.safe_load(overlay(text))
    if data["images"] != [{"name": "ragged-serve", "newName": "registry.example/ragged-serve"}]:
        yield "the overlay names another image than is pushed"


def versions(text: str) -> Iterator[str]:
    found = set(re.findall(r"ray-operator/config/default\?ref=v([\d.]+)", text)) | set(
        re.findall(r"helm install kuberay-operator .*--version ([\d.]+)", text)
    )
    if found != {"1.7.0"}:
        yield f"KubeRay's versions are {sorted(found)}"
    schemas = TOOLS / "k8s-schemas/README.md"
    if schemas.is_file():
        known = re.findall(r"kubernetes-sigs/gateway-api \| (v[\d.]+)", schemas.read_text())
        for version in re.findall(r"gateway-api/releases/download/(v[\d.]+)/", text):
            if version not in known:
                yield f"the Gateway API {version} is not what was checked ({sorted(set(known))})"
    ray = checks.constraint("ray")
    for version in re.findall(r"ray(?:project/ray:|)(\d+\.\d+\.\d+)", text):
        if version != ray:
            yield f"Ray is {ray}, not {version}"


def models(text: str) -> Iterator[str]:
    """The model that a curl names is the one that its cluster serves."""
    served = set()
    for name in ("config.gpu-cluster.yaml", "config.kind.yaml"):
        (application,) = yaml.safe_load((DEPLOY / name).read_text())["applications"]
        served.add(application["args"]["model"]["model"])
    asked = set(re.findall(r'"model": "([^"]+)"', text))
    if asked != served:
        yield f"asked for are {sorted(asked)}, served {sorted(served)}"


# ---- tables and numbers ----------------------------------------------------------------------------------------------


def tables(text: str) -> Iterator[str]:
    rows = re.findall(r"^\| (\w+) \| (.+) \|$", text, re.M)
    alerts = [name for name, _ in rows if name.startswith("RaggedServe")]
    if alerts != ALERTS:
        yield f"alerts: {sorted(set(alerts) ^ set(ALERTS)) or 'in another order than in the runbook'}"
    if f"the {len(ALERTS)} alerts" not in text:
        yield f"there are {len(ALERTS)} alerts"
    components = re.findall(r"^\| `([\w-]+)` \| [^|]+ \| [^|]+ \|$", text, re.M)
    there = {path.name for path in (K8S / "components").iterdir()}
    if set(components) != there:
        yield f"components: {sorted(set(components) ^ there)}"
    policies = {one["metadata"]["name"]: yaml.safe_dump(one["spec"]) for one in WRITTEN.of("NetworkPolicy")}
    found = re.findall(r"^\| [^|]+ \| [^|]+ \| ([\d,; ]+|all) \| `([\w-]+)` \|$", text, re.M)
    if len(found) < 8:
        yield "the table of who may talk to whom is gone"
    for ports, name in found:
        policy = policies.get("redis" if name == "gcs-ft" else name, "")
        if any(f"port: {port}\n" not in policy for port in re.findall(r"\d+", ports)):
            yield f"NetworkPolicy {name} does not open {ports}"


def values(node: Any) -> Iterator[tuple[str, Any]]:
    """(key, value) of all that is below; of an environment (name, value)."""
    if isinstance(node, dict):
        if "name" in node and "value" in node:
            yield node["name"], node["value"]
        for key, value in node.items():
            yield key, value
            yield from values(value)
    elif isinstance(node, list):
        for one in node:
            yield from values(one)


def numbers(text: str) -> Iterator[str]:
    """`a_setting` (60): what it is set to."""
    known: dict[str, set[str]] = {}
    for key, value in values([WRITTEN.rayservice, WRITTEN.serve_config]):
        if isinstance(value, (int, str)):
            known.setdefault(key, set()).add(str(value))
    found = re.findall(r"`([\w.]+)` \((\d+)\)", text)
    found += [(name, number) for number, name in re.findall(r"(\d+) s\W+(?:later )?\(`([\w.]+)`\)", text)]
    if len(found) < 9:
        yield f"only {len(found)} numbers were found"
    for name, number in found:
        if number not in known.get(name.rpartition(".")[2], ()):
            yield f"{name} is {sorted(known.get(name.rpartition('.')[2], ()))}, not {number}"


def standing(text: str) -> Iterator[str]:
    """What the head, its autoscaler and the ingresses take."""
    cluster = WRITTEN.cluster
    taken = [WRITTEN.pod("head").main["resources"]["requests"], cluster["autoscalerOptions"]["resources"]["requests"]]
    ingress = WRITTEN.pod("ingress")
    assert ingress.group is not None
    taken += [ingress.main["resources"]["requests"]] * ingress.group["minReplicas"]
    cpus, gib = sum(amount(one["cpu"]) for one in taken), sum(amount(one["memory"]) for one in taken) / 2**30
    if f"{cpus:g} CPUs, {gib:g} GiB" not in text:
        yield f"the head and the ingresses take {cpus:g} CPUs, {gib:g} GiB"


CHECKS: tuple[Callable[[str], Iterator[str]], ...] = (
    *(files, objects, secrets, images, versions, models, tables, numbers, standing),
)


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_the_page_is_right(check: Callable[[str], Iterator[str]]) -> None:
    assert list(check(README)) == []


def test_commands_are_found() -> None:
    found = shell(README)
    assert len(found) > 40
    assert "kubectl apply -k k8s/overlays/dev" in found
    assert not any("```" in command or "kustomize.config" in command for command in found)


def test_it_says_what_was_never_run() -> None:
    assert "**Never run on a real cluster.**" in README


@NO_KUBECTL
@pytest.mark.parametrize("is_whole", [False, True], ids=["as written", "with every component"])
def test_the_overlay_of_the_page_is_sound(is_whole: bool, tmp_path: Path) -> None:
    text = overlay(README)
    if is_whole:
        text = re.sub(r"# (- \.\./components/)", r"\1", text)
    data = yaml.safe_load(text)
    assert len(data["components"]) == (4 if is_whole else 1)
    for key in ("resources", "components"):
        data[key] = [os.path.relpath((K8S / "mine" / place).resolve(), tmp_path.resolve()) for place in data[key]]
    (tmp_path / "kustomization.yaml").write_text(yaml.safe_dump(data))
    manifests = render(tmp_path)
    assert {pod.main["image"].rpartition(":")[0] for pod in manifests.pods() if pod.is_ray} == {
        "registry.example/ragged-serve"
    }
    assert manifests.one("PersistentVolumeClaim", "model-cache")["spec"]["storageClassName"] == "nfs"
    assert list(checks.valid(manifests)) == []
    assert set(checks.failures(manifests)) == ({"names", "security"} if is_whole else set()), "the gateway's namespace"


FAULTS = [
    ("kubectl apply -k k8s/overlays/dev", "kubectl apply -k k8s/overlays/kind", "is no kustomization|does not exist"),
    ("../docs/runbook.md", "../docs/alerts.md", "alerts.md does not exist"),
    ("svc/ragged-serve-serve-svc 8000:8000", "svc/ragged-serve-svc 8000:8000", "no svc/ragged-serve-svc|port 8000"),
    ("svc/ragged-serve-serve-svc 8000:8000", "svc/ragged-serve-serve-svc 8000:8080", "port 8080"),
    ("-l ray.io/node-type=head,", "-l ray.io/node-type=master,", "selects no pod"),
    ("-c ray-head", "-c head", "container head"),
    ("wait job/model-cache", "wait job/hydrate", "no job/hydrate"),
    ("--from-literal=keys=", "--from-literal=key=", "Secret"),
    ("generic hf-token", "generic hf", "Secret"),
    ("ragged-serve:0.1.0-ray2.60.0-cu130 .", "ragged-serve:0.2.0-ray2.60.0-cu130 .", "run by nobody|built are"),
    ("--build-arg TORCH_INDEX", "--build-arg TORCH", "no argument TORCH"),
    ("default?ref=v1.7.0", "default?ref=v1.6.0", "KubeRay's versions"),
    ("rayproject/ray:2.60.0", "rayproject/ray:2.59.0", "Ray is 2.60.0"),
    ("Qwen/Qwen3-4B", "Qwen/Qwen3-8B", "served"),
    ("| RaggedServeNoIngress |", "| RaggedServeIngressGone |", "alerts: "),
    ("| `gcs-ft` | Redis", "| `gcs` | Redis", "components: "),
    ("| 8265, 8000 | `operator` |", "| 8265, 10001 | `operator` |", "operator does not open"),
    ("`terminationGracePeriodSeconds` (660)", "`terminationGracePeriodSeconds` (600)", "not 600"),
    ("300 s later (`rayClusterDeletionDelaySeconds`)", "60 s later (`rayClusterDeletionDelaySeconds`)", "not 60"),
    ("6.5 CPUs", "5 CPUs", "take 6.5 CPUs"),
]


@pytest.mark.parametrize(("old", "new", "says"), FAULTS, ids=[new for _, new, _ in FAULTS])
def test_a_fault_is_noticed(old: str, new: str, says: str) -> None:
    assert old in README, "nothing can be planted here"
    found = [sentence for check in CHECKS for sentence in check(README.replace(old, new))]
    assert found, "nobody noticed"
    assert all(re.search(says, sentence) for sentence in found), found
