"""What must hold of each folder in k8s/components, and of k8s/load, when it is rendered on top of another: functions from
rendered documents to sentences, as in checks.py.

Sources: KubeRay 1.7.0 (ray-operator/controllers/ray: rayservice_controller.go, common/pod.go, utils/constant.go), Istio's
template of a gateway's pods (files/kube-gateway.yaml), Prometheus' documentation of relabel_config.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import yaml

from deploy.monitoring import prometheusrule
from serve_app.config import API_KEYS_VARIABLE
from serve_app.metrics import TABLE, Metric
from serve_app.routing.ray_metrics import ray_name
from tests.k8s.checks import CLIENT, IMAGE, OUTSIDE, PROMETHEUS, STRANGER, ray_pods
from tests.k8s.harness import DEPLOY, NAMESPACE, REPOSITORY, Document, Manifests, Pod, selects
from tests.k8s.network import Peer, misrouted
from tests.promql import named

SERVE_SERVICE = f"{IMAGE}-serve-svc"
"""KubeRay makes it, of the RayService's name."""
INNER_GATEWAY = f"{IMAGE}-gateway"
INNER_ROUTE = f"{IMAGE}-httproute"
"""KubeRay's own, of the same name, for upgrades in steps."""
GATEWAY_LABEL = "gateway.networking.k8s.io/gateway-name"


def peers(manifests: Manifests) -> tuple[list[Peer], list[Peer]]:
    """Head and workers."""
    found = [Peer.of(pod) for pod in ray_pods(manifests)]
    return [one for one in found if one.name == "head"], [one for one in found if one.name != "head"]


def secret_of(variable: Mapping[str, Any]) -> tuple[str, str] | None:
    """(name, key) of the Secret that a variable comes from."""
    reference = (variable.get("valueFrom") or {}).get("secretKeyRef") or {}
    return (reference["name"], reference["key"]) if reference else None


def container_variables(pod: Pod) -> dict[str, Document]:
    return {variable["name"]: variable for variable in pod.main.get("env", [])}


# ---- gcs-ft ----------------------------------------------------------------------------------------------------------


def gcs_ft(manifests: Manifests) -> Iterator[str]:
    """The head's Redis is there, with the password that it is given, on a volume, and open to heads alone."""
    options = manifests.cluster.get("gcsFaultToleranceOptions") or {}
    host, _, port = str(options.get("redisAddress", "")).rpartition(":")
    service = next((one for one in manifests.of("Service") if one["metadata"]["name"] == host), None)
    if service is None:
        yield f"redisAddress is {options.get('redisAddress')}, and no Service is called {host}"
        return
    (entry,) = service["spec"]["ports"]
    selector = {"matchLabels": service["spec"]["selector"]}
    found = [pod for pod in manifests.pods() if selects(selector, pod.labels)]
    if [pod.is_ray for pod in found] != [False]:
        yield f"Service/{host} leads to {[pod.name for pod in found]}"
        return
    (redis,) = found
    if str(entry["port"]) != port or redis.ports().get(entry["targetPort"]) != int(port):
        yield f"Service/{host}: its port is {entry['port']}, and redisAddress says {port}"
    wanted = secret_of(options.get("redisPassword") or {})
    variables = container_variables(redis)
    if wanted is None or secret_of(variables.get("REDISCLI_AUTH", {})) != wanted:
        yield f"the head's password is {wanted}, and Redis has another"
    script = " ".join(redis.main.get("command", []))
    if 'requirepass \\"$REDISCLI_AUTH\\"' not in script or "--requirepass" in script:
        yield "Redis asks for no password, or has it on its command line"
    directory = re.findall(r"--dir (\S+)", script)
    claims = [one["metadata"]["name"] for one in manifests.one("StatefulSet")["spec"]["volumeClaimTemplates"]]
    mounts = {mount["mountPath"]: mount["name"] for mount in redis.main.get("volumeMounts", [])}
    if "--appendonly yes" not in script or [mounts.get(place) for place in directory] != claims:
        yield f"Redis writes no log to its volume: {script}"
    budget = manifests.one("PodDisruptionBudget", "head")["spec"]
    if budget["minAvailable"] != 0:
        yield "the head may not leave a node, though nothing is lost with it"
    heads, workers = peers(manifests)
    cleanup = Peer("KubeRay's clean-up", {**(heads[0].labels or {}), "ray.io/node-type": "redis-cleanup"})
    there = Peer.of(redis)
    strangers = [*workers, STRANGER, CLIENT, PROMETHEUS, OUTSIDE]
    yield from misrouted(
        manifests.of("NetworkPolicy"),
        [(one, there, int(port)) for one in (*heads, cleanup)],
        [*((one, there, int(port)) for one in strangers), (there, OUTSIDE, 443), (there, heads[0], 6379)],
    )


# ---- monitoring ------------------------------------------------------------------------------------------------------


def relabel(rules: Sequence[Mapping[str, Any]], labels: Mapping[str, str]) -> dict[str, str] | None:
    """Prometheus' relabelling of one target or sample; None if it is dropped. An empty label is none."""
    found = dict(labels)
    for rule in rules:
        action = rule.get("action", "replace")
        pattern = re.compile(rule.get("regex", "(.*)"), re.DOTALL)
        if action in ("labeldrop", "labelkeep"):
            kept = action == "labelkeep"
            found = {name: value for name, value in found.items() if bool(pattern.fullmatch(name)) is kept}
            continue
        text = rule.get("separator", ";").join(found.get(name, "") for name in rule.get("sourceLabels", ()))
        match = pattern.fullmatch(text)
        if action in ("keep", "drop"):
            if bool(match) is (action == "drop"):
                return None
            continue
        assert action == "replace", action
        if match is not None:
            template = re.sub(r"\$\{?(\d+)\}?", r"\\g<\1>", rule.get("replacement", "$1"))
            found[rule["targetLabel"]] = match.expand(template)
    return {name: value for name, value in found.items() if value}


def series(metric: Metric) -> list[str]:
    """Names in the text of /metrics."""
    parts = ("_bucket", "_sum", "_count") if metric.kind == "histogram" else ("",)
    return [metric.name + part for part in parts]


RAYS_OWN = ("ray_serve_autoscaling_target_replicas", "ray_node_cpu_utilization", "ray_serve_deployment_replica_healthy")


def scraped(manifests: Manifests) -> dict[str, str]:
    """Name of a series as Prometheus keeps it -> its label job, of all that a Ray agent shows of us, and a bit of Ray's."""
    (endpoint,) = manifests.one("PodMonitor")["spec"]["podMetricsEndpoints"]
    target = relabel(
        endpoint["relabelings"], {"__meta_kubernetes_pod_phase": "Running", "job": "x", "namespace": NAMESPACE}
    )
    assert target is not None
    shown = [f"ray_{ray_name(metric)}{name.removeprefix(metric.name)}" for metric in TABLE for name in series(metric)]
    found = {}
    for name in (*shown, *RAYS_OWN):
        sample = {"__name__": name, "otel_scope_name": "x", "WorkerId": "w", **target}
        kept = relabel(endpoint["metricRelabelings"], sample)
        if kept is not None:
            found[kept["__name__"]] = kept["job"]
    return found


def monitoring(manifests: Manifests) -> Iterator[str]:
    """One copy of each count, under the names that rules and panels ask for; rules and dashboard are those of deploy/."""
    monitors = [one for kind in ("PodMonitor", "ServiceMonitor", "ScrapeConfig") for one in manifests.of(kind)]
    if len(monitors) != 1 or len(monitors[0]["spec"]["podMetricsEndpoints"]) != 1:
        yield f"{len(monitors)} monitors: what two scrape is counted twice"
        return
    spec = monitors[0]["spec"]
    (endpoint,) = spec["podMetricsEndpoints"]
    for pod in manifests.pods():
        if selects(spec["selector"], pod.labels) != pod.is_ray:
            yield f"PodMonitor: it {'misses' if pod.is_ray else 'selects'} {pod.name}"
        if pod.is_ray and pod.ports().get(endpoint["port"]) != 8080:
            yield f"PodMonitor: {pod.name} has Ray's agent at 8080, and {endpoint['port']} is another port"
    heads, workers = peers(manifests)
    yield from misrouted(manifests.of("NetworkPolicy"), [(PROMETHEUS, one, 8080) for one in (*heads, *workers)], [])

    waits = {"__meta_kubernetes_pod_phase": "Pending"}
    if relabel(endpoint["relabelings"], waits) is not None:
        yield "PodMonitor: a pod that still waits would count as one that does not answer"
    found = scraped(manifests)
    ours = {name for metric in TABLE for name in series(metric)}
    if missing := ours - set(found):
        yield f"PodMonitor: Prometheus would not know {sorted(missing)[:3]}"
    if renamed := set(found) - ours - set(RAYS_OWN):
        yield f"PodMonitor: {sorted(renamed)[:3]} are names of nothing"
    if {found.get(name) for name in ours} != {f"{NAMESPACE}/{IMAGE}"} or {found.get(n) for n in RAYS_OWN} != {"ray"}:
        yield f"PodMonitor: jobs are {sorted({str(job) for job in found.values()})}"

    if manifests.one("PrometheusRule")["spec"]["groups"] != _alerts()["groups"]:
        yield "PrometheusRule: its groups are not those of deploy/monitoring/alerts.yaml"
    for group in manifests.one("PrometheusRule")["spec"]["groups"]:
        for rule in group["rules"]:
            for selector in named(rule["expr"]).selectors:
                if selector.metric == "up":
                    if any(name == "job" and re.fullmatch(value, "ray") for name, _, value in selector.matchers):
                        yield "PodMonitor: a pod that ends would be a server that does not answer"
                elif selector.metric not in found:
                    yield f"{rule['alert']} asks for {selector.metric}, which nobody scrapes"

    dashboards = [one for one in manifests.of("ConfigMap") if one["metadata"]["labels"].get("grafana_dashboard") == "1"]
    written = (DEPLOY / "monitoring/dashboard.json").read_text(encoding="utf-8")
    if [list((one.get("data") or {}).values()) for one in dashboards] != [[written]]:
        yield "ConfigMap: the dashboard is not deploy/monitoring/dashboard.json"
    labels = [one["metadata"]["labels"].get("release") for one in (*monitors, manifests.one("PrometheusRule"))]
    if len(set(labels)) != 1 or None in labels:
        yield f"Prometheus selects by the label release, and here are {labels}"


def _alerts() -> dict[str, Any]:
    return dict(yaml.safe_load(prometheusrule.SOURCE.read_text(encoding="utf-8")))


# ---- gateway ---------------------------------------------------------------------------------------------------------


def matches(match: Mapping[str, Any], path: str) -> bool:
    """Of an HTTPRoute: whether it takes a request for ``path``."""
    kind, value = match["path"]["type"], match["path"]["value"].rstrip("/")
    return path == value or (kind == "PathPrefix" and path.startswith(f"{value}/"))


def gateway(manifests: Manifests) -> Iterator[str]:
    """TLS to the outside; routes for clients alone, which cut no stream; a way for its proxies to the pods that serve."""
    outer, route = manifests.one("Gateway", IMAGE), manifests.one("HTTPRoute")
    for document, theirs in ((outer, INNER_GATEWAY), (route, INNER_ROUTE)):
        if document["metadata"]["name"] == theirs:
            yield f"{document['kind']}/{theirs} is KubeRay's name: it would write over it"
    for listener in outer["spec"]["listeners"]:
        tls = listener.get("tls") or {}
        if (listener["protocol"], tls.get("mode")) != ("HTTPS", "Terminate") or not tls.get("certificateRefs"):
            yield f"Gateway/{IMAGE}: listener {listener['name']} speaks in the clear"
        names = listener["allowedRoutes"]["namespaces"]
        if not selects(names.get("selector"), {"kubernetes.io/metadata.name": route["metadata"]["namespace"]}):
            yield f"Gateway/{IMAGE}: listener {listener['name']} takes no routes of {route['metadata']['namespace']}"
        if route["spec"]["hostnames"] != [listener["hostname"]]:
            yield f"HTTPRoute: hostnames are {route['spec']['hostnames']}, the listener's is {listener['hostname']}"
    parents = [(p["name"], p.get("namespace"), p.get("sectionName")) for p in route["spec"]["parentRefs"]]
    place = outer["metadata"]["namespace"]
    if parents != [(IMAGE, place, listener["name"]) for listener in outer["spec"]["listeners"]]:
        yield f"HTTPRoute: its parents are {parents}"

    closed = ("/metrics", "/ui", "/ui/events", "/docs", "/openapi.json", "/-/healthz", "/-/routes")
    asked = ("/v1/chat/completions", "/v1/models", "/tokenize", "/health", "/ready")
    for rule in route["spec"]["rules"]:
        if rule.get("timeouts") != {"request": "0s", "backendRequest": "0s"}:
            yield f"HTTPRoute: timeouts {rule.get('timeouts')} cut streams"
        for path in closed:
            if any(matches(match, path) for match in rule["matches"]):
                yield f"HTTPRoute: {path} is open to the world"
        removed = [f["requestHeaderModifier"].get("remove", []) for f in rule.get("filters", ())]
        if removed != [["x-request-timeout-seconds", "x-request-disconnect-disabled"]]:
            yield f"HTTPRoute: Ray Serve's own headers come through: {removed}"
        yield from _backends(manifests, rule)
    for path in asked:
        if not any(matches(match, path) for rule in route["spec"]["rules"] for match in rule["matches"]):
            yield f"HTTPRoute: {path} leads nowhere"

    namespaces = {one["metadata"]["name"]: one["metadata"].get("labels", {}) for one in manifests.of("Namespace")}
    labels = {"kubernetes.io/metadata.name": place, **namespaces.get(place, {})}
    proxy = Peer("the gateway", {GATEWAY_LABEL: IMAGE}, None if place == NAMESPACE else labels)
    heads, workers = peers(manifests)
    yield from misrouted(
        manifests.of("NetworkPolicy"),
        [(proxy, one, 8000) for one in workers],
        [(proxy, one, port) for one in heads for port in (8000, 8265)] + [(proxy, one, 31234) for one in workers],
    )


def _backends(manifests: Manifests, rule: Mapping[str, Any]) -> Iterator[str]:
    is_in_steps = manifests.rayservice["spec"]["upgradeStrategy"]["type"] == "NewClusterWithIncrementalUpgrade"
    port = manifests.pod("ingress").ports()["serve"]
    wanted = [{"name": SERVE_SERVICE, "port": port}]
    if is_in_steps:
        inner = manifests.one("Gateway", INNER_GATEWAY)["spec"]
        # Istio's Service of a Gateway is called after it and its class.
        name = f"{INNER_GATEWAY}-{inner['gatewayClassName']}"
        wanted = [{"name": name, "port": inner["listeners"][0]["port"]}]
    if rule["backendRefs"] != wanted:
        yield f"HTTPRoute: its backends are {rule['backendRefs']}, not {wanted}"


# ---- incremental-upgrade ---------------------------------------------------------------------------------------------


def incremental_upgrade(manifests: Manifests) -> Iterator[str]:
    """KubeRay finds the gateway that it would make, open inside only; clients come through ours, which leads to it."""
    strategy = manifests.rayservice["spec"]["upgradeStrategy"]
    options = strategy.get("clusterUpgradeOptions") or {}
    inner = manifests.one("Gateway", INNER_GATEWAY)
    made = {
        "gatewayClassName": options.get("gatewayClassName"),
        "listeners": [{"name": "http", "protocol": "HTTP", "port": 80}],
    }
    if inner["spec"] != made or inner["metadata"]["namespace"] != NAMESPACE:
        yield f"Gateway/{INNER_GATEWAY}: KubeRay would write {made}"
    if (inner["metadata"].get("annotations") or {}).get("networking.istio.io/service-type") != "ClusterIP":
        yield f"Gateway/{INNER_GATEWAY}: open to the outside, without TLS"
    step, surge = options.get("stepSizePercent", 0), options.get("maxSurgePercent", 100)
    if not 0 < step <= surge < 100:
        yield f"upgradeStrategy: steps of {step} % with {surge} % more: it needs as much as a second cluster, or never ends"
    if manifests.of("HTTPRoute") != [manifests.one("HTTPRoute", IMAGE)]:
        yield f"{INNER_ROUTE} is KubeRay's to write"
    proxy = Peer("the inner gateway", {GATEWAY_LABEL: INNER_GATEWAY})
    heads, workers = peers(manifests)
    yield from misrouted(
        manifests.of("NetworkPolicy"),
        [(proxy, one, 8000) for one in workers] + [(CLIENT, proxy, 80)],
        [(proxy, heads[0], 8265), (proxy, heads[0], 8000), (STRANGER, proxy, 80), (OUTSIDE, proxy, 80)],
    )


# ---- api-keys --------------------------------------------------------------------------------------------------------


def api_keys(manifests: Manifests) -> Iterator[str]:
    """Ingresses have the keys, from a Secret without which they do not start, and nobody else has."""
    for pod in manifests.pods():
        variable = container_variables(pod).get(API_KEYS_VARIABLE)
        if (variable is not None) != (pod.name == "ingress"):
            yield f"{pod.name}: {API_KEYS_VARIABLE} {'is' if variable else 'is not'} set"
        if variable is not None and (
            secret_of(variable) is None or variable["valueFrom"]["secretKeyRef"].get("optional")
        ):
            yield f"{pod.name}: without the Secret it would start, open to all"


# ---- load ------------------------------------------------------------------------------------------------------------

LOCUSTS_OWN = {"host", "users", "spawn-rate", "run-time", "headless", "only-summary"}


def is_an_option(name: str) -> bool:
    """Of locust or of our locustfile, as it declares them; its help does not list those."""
    source = (REPOSITORY / "loadtests/locustfile.py").read_text(encoding="utf-8")
    ours = [re.sub(r"{\w+}", r"\\w+", text) for text in re.findall(r'\badd\(f?"--([^"]+)"', source)]
    assert len(ours) > 10
    return name in LOCUSTS_OWN or any(re.fullmatch(pattern, name) for pattern in ours)


def load(manifests: Manifests) -> Iterator[str]:
    """Of k8s/load together with what it is sent to: its program, options, image, target, and what it may reach."""
    pod = manifests.pod("Job/load")
    images = {one["image"] for other in ray_pods(manifests) for one in other.containers}
    if {pod.main["image"]} != images:
        yield f"Job/load: its image is {pod.main['image']}, the server's are {sorted(images)}"
    words = [*pod.main["command"], *pod.main["args"]]
    if words[:2] != ["locust", "-f"] or not (REPOSITORY / words[2]).is_file():
        yield f"Job/load: {' '.join(words[:3])}"
    for word in words:
        option = word.partition("=")[0].removeprefix("--")
        if word.startswith("--") and not is_an_option(option):
            yield f"Job/load: locust has no option --{option}"
    environ = pod.env()
    for name in re.findall(r"\$\((\w+)\)", " ".join(words)):
        if not environ.get(name):
            yield f"Job/load: ${name} is not set"
    if environ["HOST"] != f"http://{SERVE_SERVICE}:{manifests.pod('ingress').ports()['serve']}":
        yield f"Job/load: HOST is {environ['HOST']}"
    if manifests.one("Job", "load")["spec"]["backoffLimit"] != 0:
        yield "Job/load: a missed SLO is no reason to begin anew"
    heads, workers = peers(manifests)
    there, inner = Peer.of(pod), Peer("the inner gateway", {GATEWAY_LABEL: INNER_GATEWAY})
    yield from misrouted(
        manifests.of("NetworkPolicy"),
        [(there, one, 8000) for one in workers] + [(there, inner, 80)],
        [(there, heads[0], 8265), (there, heads[0], 6379), (there, OUTSIDE, 443), (there, workers[0], 31234)]
        + [(one, there, 8089) for one in (STRANGER, CLIENT, *workers)],
    )
