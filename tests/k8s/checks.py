"""What must hold of k8s/, as functions from rendered documents to sentences: none, if it holds. The tests of the manifests
and the tests of planted faults use the same functions. Reads no cluster.

Sources: KubeRay 1.7.0 (ray-operator/controllers/ray), Ray 2.60, Kubernetes' documentation of NetworkPolicy, Pod Security and
PodDisruptionBudget.
"""

from __future__ import annotations

import functools
import math
import re
import tempfile
import tomllib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from serve_app import check_config, serve_run
from serve_app.config import DRAIN_MARGIN_SECONDS, GRACEFUL_SHUTDOWN_SECONDS, INGRESS, ServeArgs
from serve_app.routing.ray_router import PLACE
from tests.k8s.harness import DEPLOY, NAMESPACE, REPOSITORY, Manifests, Pod, amount, findings, selects
from tests.k8s.network import Connection, Peer, misrouted

IMAGE = "ragged-serve"
GPU = "nvidia.com/gpu"
GPU_NODE = "nvidia.com/gpu.present"
"""A node's label, of NVIDIA's feature discovery."""
DRAIN = "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"
HEAD_PORTS = {"gcs-server": 6379, "dashboard": 8265, "client": 10001, "metrics": 8080, "serve": 8000}
WORKER_PORTS = {"metrics": 8080, "serve": 8000}
PROBES = ("livenessProbe", "readinessProbe", "startupProbe")

Check = Callable[[Manifests], Iterator[str]]


def constraint(package: str) -> str:
    """The version that constraints.txt pins."""
    (found,) = re.findall(rf"^{re.escape(package)}==(\S+)$", (REPOSITORY / "constraints.txt").read_text(), re.MULTILINE)
    return str(found)


def project_version() -> str:
    return str(tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]["version"])


def ray_pods(manifests: Manifests) -> list[Pod]:
    return [pod for pod in manifests.pods() if pod.is_ray]


# ---- the application -------------------------------------------------------------------------------------------------


def valid(manifests: Manifests) -> Iterator[str]:
    """By the schemas of Kubernetes and KubeRay, and by what the operator refuses. Needs the validator."""
    for document in manifests.documents:
        for finding in findings(document):
            yield f"{document['kind']}/{document['metadata']['name']}: {finding}"


def serve_config(manifests: Manifests) -> Iterator[str]:
    """It is a file of deploy/, byte for byte, and a sound one. The operator looks into nothing of it."""
    text = manifests.rayservice["spec"]["serveConfigV2"]
    if text not in [file.read_text() for file in DEPLOY.glob("config*.yaml")]:
        yield "serveConfigV2 is none of the files in deploy/"
    yield from _problems(text)


@functools.cache
def _problems(text: str) -> tuple[str, ...]:
    with tempfile.NamedTemporaryFile("w", suffix=".yaml") as file:
        file.write(text)
        file.flush()
        return tuple(problem.replace(file.name, "serveConfigV2") for problem in check_config.check(file.name))


def listens(manifests: Manifests) -> Iterator[str]:
    """Other pods reach the server where KubeRay, the Services and the policies look for it."""
    options = manifests.serve_config.get("http_options") or {}
    if options.get("host", "0.0.0.0") != "0.0.0.0":
        yield f"http_options.host is {options['host']}: other pods cannot connect"
    for pod in ray_pods(manifests):
        wanted = WORKER_PORTS if pod.is_worker else HEAD_PORTS
        if pod.ports() != wanted:
            yield f"{pod.name}: ports are {pod.ports()}, not {wanted}"
        if pod.ports().get("serve") != options.get("port", 8000):
            yield f"{pod.name}: port serve is not http_options.port ({options.get('port', 8000)})"
    for pod in manifests.pods():
        if any("hostPort" in port for one in pod.containers for port in one.get("ports", ())):
            yield f"{pod.name}: a hostPort"


def names(manifests: Manifests) -> Iterator[str]:
    """Names that README, components and clients rely on: the Service of requests is ragged-serve-serve-svc."""
    if manifests.rayservice["metadata"]["name"] != IMAGE:
        yield f"the RayService is called {manifests.rayservice['metadata']['name']}"
    for document in manifests.documents:
        if document["kind"] != "Namespace" and document["metadata"].get("namespace") != NAMESPACE:
            yield f"{document['kind']}/{document['metadata']['name']} is not in the namespace {NAMESPACE}"


# ---- room ------------------------------------------------------------------------------------------------------------


def resources(pod: Pod) -> dict[str, float]:
    """What Ray counts of it: KubeRay takes limits, then requests, and rounds CPUs up."""
    given = pod.main.get("resources") or {}
    found = {**(given.get("requests") or {}), **(given.get("limits") or {})}
    params = (pod.group or {}).get("rayStartParams") or {}
    cpus = params.get("num-cpus", found.get("cpu", 0))
    return {
        "CPU": math.ceil(amount(cpus)),
        "GPU": amount(params.get("num-gpus", found.get(GPU, 0))),
        "memory": amount(found.get("memory", 0)),
    }


def matches(selector: Mapping[str, str], labels: Mapping[str, str]) -> bool:
    """Ray's own label selectors: value, !value, in(a,b), !in(a,b)."""
    for key, value in selector.items():
        listed = re.fullmatch(r"(!?)in\((.*)\)", value)
        wanted = listed[2].split(",") if listed else [value.removeprefix("!")]
        if (labels.get(key) in wanted) == value.startswith("!"):
            return False
    return True


def demand(deployment: Mapping[str, Any]) -> dict[str, float]:
    options = deployment.get("ray_actor_options") or {}
    return {
        "CPU": options.get("num_cpus", 1),
        "GPU": options.get("num_gpus", 0),
        "memory": options.get("memory", 0),
    }


def most_replicas(deployment: Mapping[str, Any]) -> int:
    """While a new version comes, each Ingress stands twice (app.py's max_surge_percent)."""
    scaling = deployment.get("autoscaling_config")
    number = int(scaling["max_replicas"]) if scaling else int(deployment.get("num_replicas", 1))
    return 2 * number if deployment["name"] == INGRESS else number


def capacity(manifests: Manifests) -> Iterator[str]:
    """All replicas that the file allows find a place, if every group has as many pods as it may. First fit, GPUs first."""
    nodes = []
    for pod in ray_pods(manifests):
        assert pod.group is not None
        labels = pod.group.get("labels") or {}
        nodes += [(labels, resources(pod)) for _ in range(pod.group["maxReplicas"] if pod.is_worker else 1)]
    for name, deployment in sorted(manifests.deployments.items(), key=lambda item: -demand(item[1])["GPU"]):
        wanted, needs = most_replicas(deployment), demand(deployment)
        selector = (deployment.get("ray_actor_options") or {}).get("label_selector") or {}
        placed = 0
        for labels, free in nodes:
            if not matches(selector, labels):
                continue
            while placed < wanted and all(free[key] >= need for key, need in needs.items()):
                for key, need in needs.items():
                    free[key] -= need
                placed += 1
        if placed < wanted:
            yield f"{name}: room for {placed} of {wanted} replicas with {needs}"


def memory(manifests: Manifests) -> Iterator[str]:
    """Ray's object store lies in /dev/shm, is small, and leaves the pod its memory; so do KV caches in a CPU's memory."""
    for pod in ray_pods(manifests):
        assert pod.group is not None
        store = amount((pod.group.get("rayStartParams") or {}).get("object-store-memory", "inf"))
        limit = amount(((pod.main.get("resources") or {}).get("limits") or {}).get("memory", 0))
        if not limit:
            yield f"{pod.name}: no limit of memory"
        volume = volume_at(pod, "/dev/shm").get("emptyDir") or {}
        size = amount(volume.get("sizeLimit", "inf"))
        if volume.get("medium") != "Memory" or not size <= limit / 2:
            yield f"{pod.name}: /dev/shm must be memory, with a size of at most half of the pod's ({limit:g})"
        if not store <= size:
            yield f"{pod.name}: object-store-memory {store:g} does not fit /dev/shm ({size:g})"
        if not store <= 2**30:
            yield f"{pod.name}: object-store-memory {store:g}; prompts and tokens need less than 1 GiB"
    args = manifests.serve_config["applications"][0]["args"]
    kv_bytes = (args.get("engine") or {}).get("kv_cache_memory_bytes")
    replica = manifests.pod("replica")
    if kv_bytes and not resources(replica)["GPU"]:
        assert replica.group is not None
        needed = math.ceil(most_replicas(manifests.deployments["Replica"]) / replica.group["maxReplicas"]) * kv_bytes
        if needed > resources(replica)["memory"] / 2:
            yield f"replica: KV caches of {needed:g} bytes in a pod of {resources(replica)['memory']:g}"


def placement(manifests: Manifests) -> Iterator[str]:
    """Ingresses and the router stay off pods with GPUs, and pods without one off their nodes: else none could leave."""
    for pod in ray_pods(manifests):
        assert pod.group is not None
        labels = pod.group.get("labels") or {}
        role = labels.get("ragged-serve/role")
        if role != pod.name:
            yield f"{pod.name}: its label ragged-serve/role is {role}"
        selector = (manifests.deployments[INGRESS].get("ray_actor_options") or {}).get("label_selector") or {}
        for what, one in ((INGRESS, selector), ("the router", PLACE)):
            if matches(one, labels) != (pod.name == "ingress"):
                yield f"{what}, which asks for {one}, {'may' if matches(one, labels) else 'cannot'} be on {pod.name}"
    for name in ("head", "ingress"):
        affinity = (manifests.pod(name).spec.get("affinity") or {}).get("nodeAffinity") or {}
        rules = affinity.get("preferredDuringSchedulingIgnoredDuringExecution") or []
        wanted = {"key": GPU_NODE, "operator": "DoesNotExist"}
        if not any(wanted in rule["preference"].get("matchExpressions", ()) for rule in rules):
            yield f"{name}: it may lie on a node with GPUs, which then cannot leave"
        pod = manifests.pod(name)
        assert pod.group is not None
        if GPU in (pod.main["resources"].get("limits") or {}) or pod.group["rayStartParams"].get("num-gpus") != "0":
            yield f"{name}: it has a GPU, or takes those that it sees for its own"
    wants_gpu = demand(manifests.deployments["Replica"])["GPU"] > 0
    if (resources(manifests.pod("replica"))["GPU"] > 0) != wants_gpu:
        yield f"replica: GPUs {resources(manifests.pod('replica'))['GPU']:g}, and the file asks for {wants_gpu:d}"


def scaling(manifests: Manifests) -> Iterator[str]:
    """Serve asks, Ray's autoscaler (v2) adds pods, nodes follow."""
    cluster = manifests.cluster
    if not cluster.get("enableInTreeAutoscaling"):
        yield "enableInTreeAutoscaling is off"
    if (cluster.get("autoscalerOptions") or {}).get("version") != "v2":
        yield "autoscalerOptions.version is not v2"
    for group in cluster["workerGroupSpecs"]:
        low, now, high = (group.get(key, 0) for key in ("minReplicas", "replicas", "maxReplicas"))
        if not low <= now <= high:
            yield f"{group['groupName']}: replicas {now} outside {low} to {high}"
    if manifests.group("ingress")["minReplicas"] < 1:
        yield "ingress: minReplicas 0 leaves nobody who listens"
    for pod in ray_pods(manifests):
        if pod.spec.get("restartPolicy") != "Never":
            yield f"{pod.name}: restartPolicy must be Never: the autoscaler replaces pods"


def head(manifests: Manifests) -> Iterator[str]:
    """It works for the cluster alone: no replica, no stream, no way in from outside."""
    spec, group = manifests.rayservice["spec"], manifests.head
    if (group.get("rayStartParams") or {}).get("num-cpus") != "0":
        yield 'head: num-cpus is not "0"'
    least = 8 if resources(manifests.pod("replica"))["GPU"] else 2
    if resources(manifests.pod("head"))["memory"] < least * 2**30:
        yield f"head: less than {least} GiB of memory"
    if spec.get("excludeHeadPodFromServeSvc") is not True:
        yield "head: requests run through it (excludeHeadPodFromServeSvc)"
    if group.get("serviceType") != "ClusterIP" or group.get("enableIngress"):
        yield "head: its Service is open to the outside"
    for document in manifests.documents:
        if document["kind"] == "Service" and selects(
            {"matchLabels": {"ray.io/node-type": "head"}}, _selector(document)
        ):
            yield f"head: Service/{document['metadata']['name']} leads to it"


def _selector(service: Mapping[str, Any]) -> dict[str, str]:
    return dict(service["spec"].get("selector") or {})


# ---- versions --------------------------------------------------------------------------------------------------------


def versions(manifests: Manifests) -> Iterator[str]:
    """One Ray everywhere: constraints.txt (what the image installs), rayVersion, the image's tag."""
    ray = constraint("ray")
    if manifests.cluster.get("rayVersion") != ray:
        yield f"rayVersion is {manifests.cluster.get('rayVersion')}, constraints.txt has {ray}"
    wanted = f"{project_version()}-ray{ray}-"
    images = set()
    for pod in manifests.pods():
        for one in pod.containers:
            name, _, tag = one["image"].rpartition(":")
            if not name or tag in ("", "latest"):
                yield f"{pod.name}: image {one['image']} has no version"
            if name.rpartition("/")[2] == IMAGE:
                images.add(one["image"])
                if not tag.startswith(wanted):
                    yield f"{pod.name}: image {one['image']} is not of {wanted}..."
            elif pod.is_ray:
                yield f"{pod.name}: image {one['image']} is not {IMAGE}"
    if len(images) > 1:
        yield f"several images: {sorted(images)}"


# ---- the end of a pod ------------------------------------------------------------------------------------------------


def grace(manifests: Manifests) -> Iterator[str]:
    """Kubernetes kills after Ray's drain has ended, and that not before Serve's own; HAProxy cuts no stream before."""
    timeouts = [d.get("graceful_shutdown_timeout_s", GRACEFUL_SHUTDOWN_SECONDS) for d in manifests.deployments.values()]
    drain = ServeArgs.parse(manifests.serve_config["applications"][0]["args"]).drain
    for pod in ray_pods(manifests):
        seconds = float(pod.env().get(DRAIN, 30))
        killed = pod.spec.get("terminationGracePeriodSeconds", 30)
        if seconds < max(timeouts):
            yield f"{pod.name}: Ray drains {seconds:g} s, and a deployment has {max(timeouts):g} s"
        if killed <= seconds:
            yield f"{pod.name}: killed after {killed} s, and Ray drains {seconds:g} s"
        hard_stop = float(pod.env().get(check_config.HARD_STOP, check_config.HARD_STOP_SECONDS))
        if hard_stop < drain.ingress_seconds + DRAIN_MARGIN_SECONDS:
            yield f"{pod.name}: HAProxy cuts streams after {hard_stop:g} s; an ingress drains {drain.ingress_seconds:g} s"


def probes(manifests: Manifests) -> Iterator[str]:
    """KubeRay's own, and its own command. One of ours would replace them as a whole."""
    for pod in ray_pods(manifests):
        for key in (*PROBES, "lifecycle", "command", "args"):
            if key in pod.main:
                yield f"{pod.name}: {key} is KubeRay's to set"


def environment(manifests: Manifests) -> Iterator[str]:
    """What `make serve` sets is set on every pod, but for the places of HAProxy's files and ports: a pod has its own."""
    wanted = {
        name: value
        for name, value in serve_run.environment({}, with_haproxy=True, work="work").items()
        if "work" not in value and name not in (serve_run.STATS_PORT, serve_run.METRICS_PORT, serve_run.FALLBACK_PORT)
    }
    pods = ray_pods(manifests)
    for pod in pods:
        environ = pod.env()
        for name, value in wanted.items():
            if environ.get(name) != value:
                yield f"{pod.name}: {name} is {environ.get(name)}, and `make serve` sets {value}"
        for name in sorted(name for name in {*environ, *pods[0].env()} if name.startswith("RAY_")):
            if environ.get(name) != pods[0].env().get(name):
                yield f"{pod.name}: {name} is not as on the {pods[0].name}"


def upgrade(manifests: Manifests) -> Iterator[str]:
    """A changed cluster comes beside the old one, which goes after the streams that began on it had time."""
    spec = manifests.rayservice["spec"]
    kind = (spec.get("upgradeStrategy") or {}).get("type")
    if kind not in ("NewCluster", "NewClusterWithIncrementalUpgrade"):
        yield f"upgradeStrategy is {kind}"
    least = 300 if resources(manifests.pod("replica"))["GPU"] else 60
    if spec.get("rayClusterDeletionDelaySeconds", 60) < least:
        yield f"rayClusterDeletionDelaySeconds is below {least}"


def disruption(manifests: Manifests) -> Iterator[str]:
    """Each pod of Ray has one budget: a number, and pods that are not ready may go."""
    budgets = manifests.of("PodDisruptionBudget")
    for document in budgets:
        name, spec = document["metadata"]["name"], document["spec"]
        if type(spec.get("minAvailable")) is not int or "maxUnavailable" in spec:
            yield f"PodDisruptionBudget/{name}: minAvailable must be a number, and maxUnavailable unset"
        if spec.get("unhealthyPodEvictionPolicy") != "AlwaysAllow":
            yield f"PodDisruptionBudget/{name}: unhealthyPodEvictionPolicy is not AlwaysAllow"
    for pod in ray_pods(manifests):
        found = [one for one in budgets if selects(one["spec"]["selector"], pod.labels)]
        if len(found) != 1:
            yield f"{pod.name}: {len(found)} budgets"


# ---- who sees what ---------------------------------------------------------------------------------------------------


def selectors(manifests: Manifests) -> Iterator[str]:
    """Each of our selectors finds a pod, by a label that lasts: the cluster's name is another after each upgrade."""
    pods = manifests.pods()

    def check(place: str, selector: Mapping[str, Any]) -> Iterator[str]:
        if "ray.io/cluster" in yaml.safe_dump(selector):
            yield f"{place}: ray.io/cluster changes with each upgrade"
        if not any(selects(dict(selector), pod.labels) for pod in pods):
            yield f"{place}: {selector} selects no pod"

    for document in manifests.documents:
        place, spec = f"{document['kind']}/{document['metadata']['name']}", document.get("spec") or {}
        if document["kind"] == "NetworkPolicy":
            yield from check(place, spec["podSelector"])
        elif document["kind"] in ("PodDisruptionBudget", "PodMonitor"):
            yield from check(place, spec["selector"])
        elif document["kind"] == "Service":
            yield from check(place, {"matchLabels": _selector(document)})
    for pod in pods:
        for rule in pod.spec.get("topologySpreadConstraints") or []:
            if not selects(rule["labelSelector"], pod.labels):
                yield f"{pod.name}: topologySpreadConstraints do not select the pod itself"


OPERATOR = Peer(
    "the operator", {"app.kubernetes.io/component": "kuberay-operator"}, {"kubernetes.io/metadata.name": "any"}
)
PROMETHEUS = Peer("Prometheus", {"app.kubernetes.io/name": "prometheus"}, {"kubernetes.io/metadata.name": "monitoring"})
CLIENT = Peer("a client", {"app": "any"}, {"ragged-serve/client": "true"})
STRANGER = Peer("a stranger", {"app": "any"}, {"kubernetes.io/metadata.name": "any"})
DNS = Peer("DNS", {"k8s-app": "kube-dns"}, {"kubernetes.io/metadata.name": "kube-system"})
OUTSIDE = Peer("the internet", address="203.0.113.7")
WORKER_PORT = 31234
"""One of the many that Ray and Serve listen on."""


def network(manifests: Manifests) -> Iterator[str]:
    """Who must reach whom, and who must not."""
    ours = [Peer.of(pod) for pod in manifests.pods()]
    ray = [Peer.of(pod) for pod in ray_pods(manifests)]
    heads, workers = [one for one in ray if one.name == "head"], [one for one in ray if one.name != "head"]
    jobs = [peer for peer in ours if peer.name == "Job/model-cache"]
    must: list[Connection] = [(a, b, port) for a in ray for b in ray for port in (6379, 8000, WORKER_PORT)]
    must += [(OPERATOR, one, port) for one in heads for port in (8265, 8000)]
    must += [(PROMETHEUS, one, 8080) for one in ray] + [(PROMETHEUS, one, 8000) for one in workers]
    must += [(CLIENT, one, 8000) for one in workers]
    must += [(one, DNS, 53) for one in [*ray, *jobs]]
    must += [(one, OUTSIDE, port) for one in heads for port in (443, 6443)]
    must += [(one, OUTSIDE, 443) for one in jobs]
    never: list[Connection] = [(STRANGER, one, p) for one in ours for p in (8000, 8265, 8080, WORKER_PORT)]
    never += [(OUTSIDE, one, port) for one in ours for port in (8000, WORKER_PORT)]
    never += [(one, two, WORKER_PORT) for one in (CLIENT, PROMETHEUS, OPERATOR, *jobs) for two in ray]
    never += [(CLIENT, one, port) for one in heads for port in (6379, 8265, 8000)]
    never += [(one, OUTSIDE, port) for one in workers for port in (443, 6443, 80)]
    never += [(one, two, 8265) for one in jobs for two in ray]
    yield from misrouted(manifests.of("NetworkPolicy"), must, never)


def security(manifests: Manifests) -> Iterator[str]:
    """Pod Security's level restricted, and uid 1000."""
    for document in manifests.of("Namespace"):
        if (document["metadata"].get("labels") or {}).get("pod-security.kubernetes.io/enforce") != "restricted":
            yield f"Namespace/{document['metadata']['name']}: pod-security.kubernetes.io/enforce is not restricted"
    for pod in manifests.pods():
        context = pod.spec.get("securityContext") or {}
        if context.get("runAsNonRoot") is not True or not context.get("runAsUser"):
            yield f"{pod.name}: it may run as root"
        if pod.is_ray and context.get("runAsUser") != 1000:
            yield f"{pod.name}: runAsUser is {context.get('runAsUser')}, and the image has 1000"
        if (context.get("seccompProfile") or {}).get("type") != "RuntimeDefault":
            yield f"{pod.name}: seccompProfile is not RuntimeDefault"
        if any(pod.spec.get(key) for key in ("hostNetwork", "hostPID", "hostIPC")):
            yield f"{pod.name}: it shares what is the node's"
        for one in pod.containers:
            yield from _container_security(f"{pod.name}, {one['name']}", one.get("securityContext") or {})
    options = manifests.cluster.get("autoscalerOptions") or {}
    yield from _container_security("head, autoscaler", options.get("securityContext") or {})


def _container_security(place: str, context: Mapping[str, Any]) -> Iterator[str]:
    if context.get("allowPrivilegeEscalation") is not False or context.get("privileged"):
        yield f"{place}: allowPrivilegeEscalation is not false"
    capabilities = context.get("capabilities") or {}
    if capabilities.get("drop") != ["ALL"] or capabilities.get("add"):
        yield f"{place}: it keeps capabilities"


def tokens(manifests: Manifests) -> Iterator[str]:
    """The API server's token: for the head's autoscaler, and for nobody else. Ray's own is asked of everybody."""
    for pod in manifests.pods():
        mounts = pod.spec.get("automountServiceAccountToken", True)
        if pod.name == "head" and not mounts:
            yield "head: the autoscaler needs the token"
        if pod.name != "head" and mounts:
            yield f"{pod.name}: it gets a token of the API server"
    if (manifests.cluster.get("authOptions") or {}).get("mode") != "token":
        yield "authOptions.mode is not token"


def secrets(manifests: Manifests) -> Iterator[str]:
    """None is written here, and only the pod that loads models has the hub's."""
    for document in manifests.of("Secret"):
        yield f"Secret/{document['metadata']['name']}: a secret in a manifest"
    for pod in manifests.pods():
        for one in pod.containers:
            for variable in one.get("env") or []:
                name = variable["name"]
                if re.search(r"TOKEN|PASSWORD|SECRET|KEY", name) and variable.get("value"):
                    yield f"{pod.name}: {name} has its value in the manifest"
                if name.startswith("HF_TOKEN") and pod.is_ray:
                    yield f"{pod.name}: it needs no {name}; the Job model-cache has it"


# ---- the model -------------------------------------------------------------------------------------------------------


def volume_at(pod: Pod, path: str) -> dict[str, Any]:
    """What the main container has mounted there, with `readOnly`; empty if nothing."""
    for mount in pod.main.get("volumeMounts") or []:
        if mount["mountPath"] == path:
            for volume in pod.spec.get("volumes") or []:
                if volume["name"] == mount["name"]:
                    return {**volume, "readOnly": mount.get("readOnly", False)}
    return {}


def model_cache(manifests: Manifests) -> Iterator[str]:
    """The Job loads what the file names, into the volume that the others read. Kernels have a place to be written."""
    model = ServeArgs.parse(manifests.serve_config["applications"][0]["args"]).model
    for pod in ray_pods(manifests):
        environ = pod.env()
        for name in ("TRITON_CACHE_DIR", "NUMBA_CACHE_DIR"):
            volume = volume_at(pod, "/" + environ.get(name, "").strip("/").split("/")[0])
            if "emptyDir" not in volume or volume["readOnly"]:
                yield f"{pod.name}: {name} ({environ.get(name)}) is not on a volume of the pod's own"
        if Path(model.source).is_dir():
            continue
        volume = volume_at(pod, environ.get("HF_HOME", ""))
        if "persistentVolumeClaim" not in volume or not volume["readOnly"]:
            yield f"{pod.name}: HF_HOME ({environ.get('HF_HOME')}) must be on a claim, read only"
        if environ.get("HF_HUB_OFFLINE") != "1" or not environ.get("RAGGED_SERVE_MODEL_WAIT_SECONDS"):
            yield f"{pod.name}: it must wait for the cache, and ask no hub"
    jobs = manifests.of("Job")
    if Path(model.source).is_dir():
        if jobs:
            yield "Job/model-cache: there is nothing to load"
        return
    if len(jobs) != 1:
        yield f"{len(jobs)} Jobs load the model"
        return
    job = manifests.pod(f"Job/{jobs[0]['metadata']['name']}")
    environ = job.env()
    if environ.get("SERVE_CONFIG") != manifests.rayservice["spec"]["serveConfigV2"]:
        yield "Job/model-cache: its SERVE_CONFIG is not what is served"
    if job.main.get("command") != ["python", "-m", "serve_app.fetch_model"]:
        yield f"Job/model-cache: its command is {job.main.get('command')}"
    if environ.get("HF_HUB_OFFLINE"):
        yield "Job/model-cache: HF_HUB_OFFLINE is set"
    volume, reads = volume_at(job, environ.get("HF_HOME", "")), volume_at(manifests.pod("replica"), "/models")
    claims = {document["metadata"]["name"]: document for document in manifests.of("PersistentVolumeClaim")}
    name = (volume.get("persistentVolumeClaim") or {}).get("claimName")
    if volume.get("readOnly", True) or name != (reads.get("persistentVolumeClaim") or {}).get("claimName"):
        yield "Job/model-cache: it does not write where replicas read"
    if name not in claims or claims[name]["spec"]["accessModes"] != ["ReadWriteMany"]:
        yield f"PersistentVolumeClaim/{name}: many pods must be able to mount it (ReadWriteMany)"
    (variable,) = (one for one in job.main["env"] if one["name"] == "HF_TOKEN") if "HF_TOKEN" in environ else ({},)
    if "secretKeyRef" not in (variable.get("valueFrom") or {}):
        yield "Job/model-cache: HF_TOKEN must come from a Secret"


CHECKS: tuple[Check, ...] = (
    *(valid, serve_config, listens, names, capacity, memory, placement, scaling, head, versions, grace, probes),
    *(environment, upgrade, disruption, selectors, network, security, tokens, secrets, model_cache),
)


def failures(manifests: Manifests) -> dict[str, list[str]]:
    """Name of a check -> what it says, of those that say something. Without `valid`, which not every machine has."""
    found = {check.__name__: list(check(manifests)) for check in CHECKS if check is not valid}
    return {name: sentences for name, sentences in found.items() if sentences}
