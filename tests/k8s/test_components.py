"""k8s/components and k8s/load, rendered on top of base and every overlay: they pass the base's checks and their own, and
change nothing else. Then faults planted into them. What needs no kubectl comes first.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import yaml

from deploy.monitoring import dashboard
from tests.k8s import checks, component_checks as own, harness
from tests.k8s.harness import K8S, Document, Manifests, load, render, render_with
from tests.promql import named

NO_KUBECTL = pytest.mark.may_skip("needs kubectl")
COMPONENTS = sorted(path.name for path in (K8S / "components").iterdir() if path.is_dir())
TOGETHER = [name for name in COMPONENTS if name != "gateway"]
"""incremental-upgrade contains it."""
PLACES = ["base", *sorted(f"overlays/{path.name}" for path in (K8S / "overlays").iterdir())]
CHECKS: dict[str, Callable[[Manifests], Iterator[str]]] = {
    "api-keys": own.api_keys,
    "gateway": own.gateway,
    "gcs-ft": own.gcs_ft,
    "incremental-upgrade": own.incremental_upgrade,
    "monitoring": own.monitoring,
}
OTHERWISE: dict[str, dict[str, str]] = {
    "api-keys": {},
    "gateway": {
        "names": "Gateway/ragged-serve is not in the namespace ragged-serve",
        "security": "Namespace/ragged-serve-gateway: pod-security",
    },
    "gcs-ft": {},
    "incremental-upgrade": {
        "names": "Gateway/ragged-serve is not in the namespace ragged-serve",
        "security": "Namespace/ragged-serve-gateway: pod-security",
        # The proxies of a Gateway are made by its implementation.
        "selectors": "NetworkPolicy/inner-gateway: .* selects no pod",
    },
    "monitoring": {},
}
"""What the checks of the base say of a component, and may."""


def expected_of(names: list[str]) -> dict[str, str]:
    return {check: sentence for name in names for check, sentence in OTHERWISE[name].items()}


# ---- without kubectl -------------------------------------------------------------------------------------------------


def test_every_component_has_a_check() -> None:
    assert set(COMPONENTS) == set(CHECKS) == set(OTHERWISE)


@pytest.mark.parametrize("name", COMPONENTS)
def test_a_component_is_one(name: str) -> None:
    """JSON patches alone: test_manifests.py looks at every kustomization."""
    data = yaml.safe_load((K8S / "components" / name / "kustomization.yaml").read_text())
    assert data["kind"] == "Component"
    assert data["apiVersion"] == "kustomize.config.k8s.io/v1alpha1"
    for patch in data.get("patches", ()):
        assert {"kind", "name"} == set(patch["target"]), "a patch that finds nothing is no error: one name, one object"


def monitor() -> Manifests:
    return Manifests(load((K8S / "components/monitoring/podmonitor.yaml").read_text()))


def test_prometheus_knows_what_panels_ask_for() -> None:
    """Under the names that Ray's agent shows, renamed; the alerts are asked in component_checks.py."""
    found = own.scraped(monitor())
    assert len(found) > 80
    asked = {
        selector.metric
        for panel in dashboard.dashboard()["panels"]
        for target in panel.get("targets", ())
        for selector in named(target["expr"]).selectors
    }
    assert len(asked) > 40
    assert asked <= set(found)
    assert found["vllm:time_to_first_token_seconds_bucket"] == "ragged-serve/ragged-serve"


@pytest.mark.parametrize(
    ("rule", "labels", "found"),
    [
        ({"targetLabel": "a", "replacement": "b"}, {"a": "x"}, {"a": "b"}),
        ({"sourceLabels": ["a"], "targetLabel": "b"}, {"a": "x"}, {"a": "x", "b": "x"}),
        ({"sourceLabels": ["a", "b"], "regex": "(.);y", "targetLabel": "b"}, {"a": "x", "b": "y"}, {"a": "x", "b": "x"}),
        ({"sourceLabels": ["a"], "regex": "y", "targetLabel": "b"}, {"a": "xy"}, {"a": "xy"}),
        ({"sourceLabels": ["a"], "regex": "x", "targetLabel": "a", "replacement": ""}, {"a": "x", "b": "y"}, {"b": "y"}),
        ({"sourceLabels": ["a"], "regex": "(.)(.)", "targetLabel": "a", "replacement": "${2}$1"}, {"a": "xy"}, {"a": "yx"}),
        ({"action": "keep", "sourceLabels": ["a"], "regex": "x"}, {"a": "y"}, None),
        ({"action": "drop", "sourceLabels": ["a"], "regex": "x"}, {"a": "y"}, {"a": "y"}),
        ({"action": "labeldrop", "regex": "a.+"}, {"a": "x", "ab": "y"}, {"a": "x"}),
    ],
)  # fmt: skip
def test_relabelling(rule: Document, labels: dict[str, str], found: dict[str, str] | None) -> None:
    assert own.relabel([rule], labels) == found


# ---- rendered --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def rendered(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Manifests]:
    """place, names of components -> documents, the caller's own."""
    folder = tmp_path_factory.mktemp("components")

    def made(place: str, *names: str) -> Manifests:
        return render_with(place, list(names), folder / "-".join((place.replace("/", "-"), *names)))

    return made


@NO_KUBECTL
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("names", [*([name] for name in COMPONENTS), TOGETHER], ids="+".join)
def test_on_top(rendered: Callable[..., Manifests], place: str, names: list[str]) -> None:
    manifests = rendered(place, *names)
    assert list(checks.valid(manifests)) == []
    found, expected = checks.failures(manifests), expected_of(names)
    assert set(found) == set(expected), found
    for name, sentences in found.items():
        for sentence in sentences:
            assert re.match(expected[name], sentence), sentence
    for name in names:
        assert list(CHECKS[name](manifests)) == []
    if "incremental-upgrade" in names:
        assert list(own.gateway(manifests)) == []


@NO_KUBECTL
@pytest.mark.may_skip("needs the validator and its schemas")
def test_the_validator_knows_their_kinds(rendered: Callable[..., Manifests]) -> None:
    harness.need_validator()
    manifests = rendered("base", *TOGETHER)
    kinds = {"StatefulSet", "PodMonitor", "PrometheusRule", "Gateway", "HTTPRoute"}
    assert kinds <= {document["kind"] for document in manifests.documents}
    for kind in kinds:
        document = manifests.of(kind)[0]
        document["spec"]["misspelt"] = 1
        assert any("misspelt" in finding for finding in harness.findings(document)), kind


CHANGES = {
    "api-keys": ["RayService/ragged-serve.spec.rayClusterConfig.workerGroupSpecs"],
    "gateway": [],
    "gcs-ft": [
        "PodDisruptionBudget/head.spec.minAvailable",
        "RayService/ragged-serve.spec.rayClusterConfig.gcsFaultToleranceOptions",
    ],
    "incremental-upgrade": [
        "RayService/ragged-serve.spec.upgradeStrategy.clusterUpgradeOptions",
        "RayService/ragged-serve.spec.upgradeStrategy.type",
    ],
    "monitoring": [],
}


def changes(before: Any, after: Any, place: str) -> Iterator[str]:
    if isinstance(before, dict) and isinstance(after, dict):
        for key in sorted({*before, *after}):
            yield from changes(before.get(key), after.get(key), f"{place}.{key}")
    elif before != after:
        yield place


@NO_KUBECTL
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("name", COMPONENTS)
def test_it_changes_what_it_says_and_nothing_else(rendered: Callable[..., Manifests], place: str, name: str) -> None:
    def by_name(manifests: Manifests) -> dict[str, Document]:
        named = {f"{one['kind']}/{one['metadata']['name']}": one for one in manifests.documents}
        assert len(named) == len(manifests.documents)
        return named

    before, after = by_name(render(place)), by_name(rendered(place, name))
    assert set(before) <= set(after)
    found = [change for key, document in before.items() for change in changes(document, after[key], key)]
    assert sorted(found) == CHANGES[name]


# ---- the load test ---------------------------------------------------------------------------------------------------


def with_load(place: str) -> Manifests:
    return Manifests([*render(place).documents, *render("load").documents])


LOAD_CHECKS = (
    *(checks.valid, checks.names, checks.versions, checks.disruption, checks.selectors, checks.security, checks.tokens),
    *(checks.secrets, checks.network, own.load),
)


@NO_KUBECTL
@pytest.mark.parametrize("check", LOAD_CHECKS, ids=lambda check: check.__name__)
def test_the_load_test(check: checks.Check) -> None:
    assert list(check(with_load("base"))) == []


# ---- planted faults --------------------------------------------------------------------------------------------------


def spec(manifests: Manifests, kind: str, name: str | None = None) -> Document:
    found: Any = manifests.one(kind, name)["spec"]
    return found  # type: ignore[no-any-return]


def endpoint(manifests: Manifests) -> Document:
    found: Any = spec(manifests, "PodMonitor")["podMetricsEndpoints"][0]
    return found  # type: ignore[no-any-return]


def rule(manifests: Manifests) -> Document:
    found: Any = spec(manifests, "HTTPRoute")["rules"][0]
    return found  # type: ignore[no-any-return]


def redis(manifests: Manifests) -> Document:
    found: Any = spec(manifests, "StatefulSet")["template"]["spec"]["containers"][0]
    return found  # type: ignore[no-any-return]


def cluster(manifests: Manifests) -> Document:
    found: Any = spec(manifests, "RayService")["rayClusterConfig"]
    return found  # type: ignore[no-any-return]


def without(sequence: list[Any], predicate: Callable[[Any], bool]) -> None:
    kept = [one for one in sequence if not predicate(one)]
    assert len(kept) < len(sequence), "nothing was planted"
    sequence[:] = kept


Plant = Callable[[Manifests], object]

FAULTS: list[tuple[str, str, Plant, str]] = [
    ("gcs-ft", "another address", lambda m: cluster(m)["gcsFaultToleranceOptions"].update(redisAddress="rediss:6379"),
     "no Service is called rediss"),
    ("gcs-ft", "another port", lambda m: cluster(m)["gcsFaultToleranceOptions"].update(redisAddress="redis:6380"),
     "redisAddress says 6380|cannot reach"),
    ("gcs-ft", "another password", lambda m: redis(m)["env"][0]["valueFrom"]["secretKeyRef"].update(key="pass"),
     "Redis has another"),
    ("gcs-ft", "no password", lambda m: redis(m)["command"].__setitem__(2, "exec redis-server --dir /data --appendonly yes"),
     "asks for no password"),
    ("gcs-ft", "memory only", lambda m: redis(m)["command"].__setitem__(2, redis(m)["command"][2].replace("yes", "no")),
     "writes no log"),
    ("gcs-ft", "beside its volume", lambda m: redis(m)["volumeMounts"][0].update(mountPath="/var/data"), "writes no log"),
    ("gcs-ft", "the head must stay", lambda m: spec(m, "PodDisruptionBudget", "head").update(minAvailable=1),
     "may not leave"),
    ("gcs-ft", "no way to Redis", lambda m: m.documents.remove(m.one("NetworkPolicy", "head-to-redis")),
     "head cannot reach|clean-up cannot reach"),
    ("gcs-ft", "Redis for all", lambda m: spec(m, "NetworkPolicy", "redis")["ingress"][0].pop("from"),
     "can reach StatefulSet/redis"),
    ("gcs-ft", "nothing is cleaned", lambda m: [
        one["spec"]["podSelector"]["matchExpressions"][0].update(values=["head"])
        for one in m.of("NetworkPolicy") if one["metadata"]["name"] == "head-to-redis"], "clean-up"),
    ("monitoring", "every ingress", lambda m: spec(m, "PodMonitor")["podMetricsEndpoints"].append({"port": "serve"}),
     "counted twice"),
    ("monitoring", "misspelt port", lambda m: endpoint(m).update(port="metric"), "is another port"),
    ("monitoring", "workers only", lambda m: spec(m, "PodMonitor")["selector"]["matchLabels"].update(
        {"ray.io/node-type": "worker"}), "misses head"),
    ("monitoring", "Prometheus is shut out", lambda m: m.documents.remove(m.one("NetworkPolicy", "prometheus")),
     "Prometheus cannot reach"),
    ("monitoring", "Ray's names", lambda m: without(
        endpoint(m)["metricRelabelings"], lambda one: one.get("replacement") == "vllm:$1"), "vllm:|ray_vllm|job"),
    ("monitoring", "one job", lambda m: without(
        endpoint(m)["relabelings"], lambda one: one.get("replacement") == "ray"), "jobs are"),
    ("monitoring", "pods that wait", lambda m: without(
        endpoint(m)["relabelings"], lambda one: one.get("action") == "keep"), "still waits"),
    ("monitoring", "an old rule", lambda m: spec(m, "PrometheusRule")["groups"][0]["rules"][0].update(expr="up == 0"),
     "not those of"),
    ("monitoring", "a metric of nobody", lambda m: spec(m, "PrometheusRule")["groups"][0]["rules"][1].update(
        expr="ragged_serve_replicas == 0"), "not those of|asks for ragged_serve_replicas"),
    ("monitoring", "an old dashboard", lambda m: m.one("ConfigMap")["data"].update({"ragged-serve.json": "{}"}),
     "dashboard"),
    ("gateway", "cut streams", lambda m: rule(m).pop("timeouts"), "cut streams"),
    ("gateway", "thirty seconds", lambda m: rule(m)["timeouts"].update(backendRequest="30s"), "cut streams"),
    ("gateway", "in the clear", lambda m: spec(m, "Gateway")["listeners"][0].update(protocol="HTTP"), "in the clear"),
    ("gateway", "another host", lambda m: spec(m, "HTTPRoute").update(hostnames=["a.example"]), "hostnames are"),
    ("gateway", "all paths", lambda m: rule(m)["matches"][0]["path"].update(value="/"), "open to the world"),
    ("gateway", "no parent", lambda m: spec(m, "HTTPRoute")["parentRefs"][0].pop("namespace"), "parents are"),
    ("gateway", "KubeRay's route", lambda m: m.one("HTTPRoute")["metadata"].update(name="ragged-serve-httproute"),
     "write over it"),
    ("gateway", "the dashboard", lambda m: rule(m)["backendRefs"][0].update(name="ragged-serve-head-svc"), "backends are"),
    ("gateway", "no client", lambda m: m.one("Namespace", "ragged-serve-gateway")["metadata"]["labels"].pop(
        "ragged-serve/client"), "the gateway cannot reach"),
    ("incremental-upgrade", "another class", lambda m: spec(m, "Gateway", "ragged-serve-gateway").update(
        gatewayClassName="nginx"), "KubeRay would write"),
    ("incremental-upgrade", "TLS inside", lambda m: spec(m, "Gateway", "ragged-serve-gateway")["listeners"][0].update(
        port=443), "KubeRay would write"),
    ("incremental-upgrade", "a load balancer", lambda m: m.one("Gateway", "ragged-serve-gateway")["metadata"].pop(
        "annotations"), "open to the outside"),
    ("incremental-upgrade", "all at once", lambda m: spec(m, "RayService")["upgradeStrategy"]["clusterUpgradeOptions"]
     .update(maxSurgePercent=100), "a second cluster"),
    ("incremental-upgrade", "the inner gateway for all", lambda m: m.documents.remove(
        m.one("NetworkPolicy", "inner-gateway")), "can reach the inner gateway"),
    ("incremental-upgrade", "no way in", lambda m: m.documents.remove(
        m.one("NetworkPolicy", "inner-gateway-to-workers")), "the inner gateway cannot reach"),
    ("api-keys", "may be missing", lambda m: cluster(m)["workerGroupSpecs"][0]["template"]["spec"]["containers"][0]["env"][
        -1]["valueFrom"]["secretKeyRef"].update(optional=True), "open to all"),
    ("api-keys", "the other group", lambda m: cluster(m)["workerGroupSpecs"][0].update(groupName="other"), "is (not )?set"),
]  # fmt: skip


@NO_KUBECTL
@pytest.mark.parametrize(("name", "fault", "plant", "says"), FAULTS, ids=[f"{c}: {f}" for c, f, _, _ in FAULTS])
def test_a_fault_is_noticed(rendered: Callable[..., Manifests], name: str, fault: str, plant: Plant, says: str) -> None:
    manifests = rendered("base", name)
    plant(manifests)
    found = list(CHECKS[name](manifests))
    assert found, "nobody noticed"
    for sentence in found:
        assert re.search(says, sentence), sentence


LOAD_FAULTS: list[tuple[str, Callable[[Document], object], str]] = [
    ("misspelt option", lambda c: c["args"].append("--slo-ttft=1"), "no option --slo-ttft"),
    ("an unset variable", lambda c: c["args"].append("--seed=$(SEED)"), r"\$SEED is not set"),
    ("another image", lambda c: c.update(image="locustio/locust:2.47"), "its image is"),
    ("another server", lambda c: c["env"][0].update(value="http://ragged-serve-head-svc:8000"), "HOST is"),
    ("another file", lambda c: c["command"].__setitem__(2, "locustfile.py"), "locust -f locustfile.py"),
]


@NO_KUBECTL
@pytest.mark.parametrize(("fault", "plant", "says"), LOAD_FAULTS, ids=[fault for fault, _, _ in LOAD_FAULTS])
def test_a_fault_of_the_load_test_is_noticed(fault: str, plant: Callable[[Document], object], says: str) -> None:
    manifests = with_load("base")
    plant(manifests.pod("Job/load").spec["containers"][0])
    (sentence,) = own.load(manifests)
    assert re.search(says, sentence)
