"""Faults planted into k8s/base, each noticed by the checks that are there for it, and by no other."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from typing import Any

import pytest

from tests.k8s import checks, harness
from tests.k8s.harness import Manifests

BASE = harness.read_base()


def cluster(manifests: Manifests) -> Any:
    return manifests.rayservice["spec"]["rayClusterConfig"]


def group(manifests: Manifests, name: str) -> Any:
    """Of the head, or of a group of workers."""
    if name == "head":
        return cluster(manifests)["headGroupSpec"]
    (found,) = (one for one in cluster(manifests)["workerGroupSpecs"] if one["groupName"] == name)
    return found


def pod_spec(manifests: Manifests, name: str) -> Any:
    return group(manifests, name)["template"]["spec"]


def container(manifests: Manifests, name: str) -> Any:
    return pod_spec(manifests, name)["containers"][0]


def spec_of(manifests: Manifests, kind: str, name: str) -> Any:
    return manifests.one(kind, name)["spec"]


def job(manifests: Manifests) -> Any:
    return manifests.one("Job")["spec"]["template"]["spec"]["containers"][0]


def set_env(manifests: Manifests, name: str, value: Any, *groups: str) -> None:
    """None removes the variable. Without ``groups``: everywhere."""
    for one in groups or ("head", "ingress", "replica"):
        env = container(manifests, one)["env"]
        env[:] = [variable for variable in env if variable["name"] != name]
        env += [] if value is None else [{"name": name, "value": value}]


def replace_text(manifests: Manifests, old: str, new: str) -> None:
    """In what is served; the Job's copy too."""
    spec = manifests.rayservice["spec"]
    assert old in spec["serveConfigV2"]
    spec["serveConfigV2"] = spec["serveConfigV2"].replace(old, new)
    for variable in job(manifests)["env"]:
        if variable["name"] == "SERVE_CONFIG":
            variable["value"] = spec["serveConfigV2"]


# ---- the faults ------------------------------------------------------------------------------------------------------


def misspelt(m: Manifests) -> None:
    replace_text(m, "max_ongoing_requests", "max_ongoing_request")


def default_of_five(m: Manifests) -> None:
    replace_text(m, "        max_ongoing_requests: 900\n", "")


def least_above_most(m: Manifests) -> None:
    replace_text(m, "min_replicas: 1", "min_replicas: 9")


def another_file(m: Manifests) -> None:
    replace_text(m, "max_num_seqs: 256", "max_num_seqs: 128")


def only_itself_listens(m: Manifests) -> None:
    replace_text(m, "host: 0.0.0.0", "host: 127.0.0.1")


def more_replicas_than_pods(m: Manifests) -> None:
    group(m, "replica")["maxReplicas"] = 3


def too_few_cpus(m: Manifests) -> None:
    resources = container(m, "ingress")["resources"]
    resources["limits"]["cpu"] = resources["requests"]["cpu"] = "1"
    group(m, "ingress")["maxReplicas"] = 3


def no_gpu(m: Manifests) -> None:
    resources = container(m, "replica")["resources"]
    del resources["limits"]["nvidia.com/gpu"], resources["requests"]["nvidia.com/gpu"]


def work_on_the_head(m: Manifests) -> None:
    group(m, "head")["rayStartParams"]["num-cpus"] = "2"


def requests_through_the_head(m: Manifests) -> None:
    del m.rayservice["spec"]["excludeHeadPodFromServeSvc"]


def open_dashboard(m: Manifests) -> None:
    group(m, "head")["serviceType"] = "LoadBalancer"


def another_ray(m: Manifests) -> None:
    cluster(m)["rayVersion"] = "2.59.0"


def another_image(m: Manifests) -> None:
    container(m, "replica")["image"] = "ragged-serve:0.1.0-ray2.59.0-cu130"


def latest_image(m: Manifests) -> None:
    job(m)["image"] = "ragged-serve:latest"


def killed_while_draining(m: Manifests) -> None:
    pod_spec(m, "replica")["terminationGracePeriodSeconds"] = 600


def drain_by_default(m: Manifests) -> None:
    set_env(m, checks.DRAIN, None)


def streams_cut_by_haproxy(m: Manifests) -> None:
    set_env(m, "RAY_SERVE_HAPROXY_HARD_STOP_AFTER_S", "120")


def own_liveness(m: Manifests) -> None:
    container(m, "replica")["livenessProbe"] = {"httpGet": {"path": "/ready", "port": 8000}}


def stops_first(m: Manifests) -> None:
    container(m, "ingress")["lifecycle"] = {"preStop": {"exec": {"command": ["ray", "stop"]}}}


def no_haproxy_on_one(m: Manifests) -> None:
    set_env(m, "RAY_SERVE_ENABLE_HA_PROXY", "0", "ingress")


def sick_replicas_stay(m: Manifests) -> None:
    set_env(m, "RAY_SERVE_FORCE_STOP_UNHEALTHY_REPLICAS", None)


def old_cluster_at_once(m: Manifests) -> None:
    m.rayservice["spec"]["rayClusterDeletionDelaySeconds"] = 10


def no_upgrade(m: Manifests) -> None:
    m.rayservice["spec"]["upgradeStrategy"] = {"type": "None"}


def budget_in_percent(m: Manifests) -> None:
    spec_of(m, "PodDisruptionBudget", "ingress")["minAvailable"] = "50%"


def sick_pods_block_a_drain(m: Manifests) -> None:
    del spec_of(m, "PodDisruptionBudget", "replica")["unhealthyPodEvictionPolicy"]


def budget_of_nobody(m: Manifests) -> None:
    spec_of(m, "PodDisruptionBudget", "head")["selector"]["matchLabels"]["ray.io/node-type"] = "haed"


def label_of_one_cluster(m: Manifests) -> None:
    spec_of(m, "NetworkPolicy", "clients")["podSelector"]["matchLabels"]["ray.io/cluster"] = "ragged-serve-abcde"


def dashboard_for_clients(m: Manifests) -> None:
    (rule,) = spec_of(m, "NetworkPolicy", "clients")["ingress"]
    rule["ports"].append({"protocol": "TCP", "port": 31234})


def no_operator(m: Manifests) -> None:
    spec_of(m, "NetworkPolicy", "operator")["ingress"][0]["ports"] = [{"protocol": "TCP", "port": 8000}]


def no_dns(m: Manifests) -> None:
    egress = spec_of(m, "NetworkPolicy", "ray-pods")["egress"]
    egress[:] = [rule for rule in egress if "ports" not in rule]


def replicas_reach_the_internet(m: Manifests) -> None:
    spec_of(m, "NetworkPolicy", "ray-pods")["egress"].append({"ports": [{"protocol": "TCP", "port": 443}]})


def nobody_isolates_the_job(m: Manifests) -> None:
    m.documents.remove(m.one("NetworkPolicy", "model-cache"))


def may_run_as_root(m: Manifests) -> None:
    del pod_spec(m, "replica")["securityContext"]["runAsNonRoot"]


def keeps_capabilities(m: Manifests) -> None:
    del container(m, "head")["securityContext"]["capabilities"]


def autoscaler_unconfined(m: Manifests) -> None:
    del cluster(m)["autoscalerOptions"]["securityContext"]


def token_on_a_worker(m: Manifests) -> None:
    del pod_spec(m, "ingress")["automountServiceAccountToken"]


def no_token_on_the_head(m: Manifests) -> None:
    pod_spec(m, "head")["automountServiceAccountToken"] = False


def no_authentication(m: Manifests) -> None:
    del cluster(m)["authOptions"]


def written_secret(m: Manifests) -> None:
    set_env(m, "HF_TOKEN", "hf_abc")


def large_object_store(m: Manifests) -> None:
    group(m, "replica")["rayStartParams"]["object-store-memory"] = "2147483648"


def no_shared_memory(m: Manifests) -> None:
    pod = pod_spec(m, "replica")
    pod["volumes"] = [{"name": "shm", "emptyDir": {}}, *(one for one in pod["volumes"] if one["name"] != "shm")]


def ingress_on_a_gpu(m: Manifests) -> None:
    group(m, "replica")["labels"] = {}


def head_on_a_gpu_node(m: Manifests) -> None:
    del pod_spec(m, "head")["affinity"]


def gpu_for_the_ingress(m: Manifests) -> None:
    container(m, "ingress")["resources"]["limits"]["nvidia.com/gpu"] = "1"


def ingress_counts_its_nodes_gpus(m: Manifests) -> None:
    del group(m, "ingress")["rayStartParams"]["num-gpus"]


def old_autoscaler(m: Manifests) -> None:
    cluster(m)["autoscalerOptions"]["version"] = "v1"


def pod_restarts(m: Manifests) -> None:
    pod_spec(m, "ingress")["restartPolicy"] = "Always"


def triton_cache_is_read_only(m: Manifests) -> None:
    set_env(m, "TRITON_CACHE_DIR", "/models/triton")


def replicas_ask_the_hub(m: Manifests) -> None:
    set_env(m, "HF_HUB_OFFLINE", None)


def another_model_is_loaded(m: Manifests) -> None:
    for variable in job(m)["env"]:
        if variable["name"] == "SERVE_CONFIG":
            variable["value"] = variable["value"].replace("Qwen3-4B", "Qwen3-8B")


def cache_of_one_node(m: Manifests) -> None:
    spec_of(m, "PersistentVolumeClaim", "model-cache")["accessModes"] = ["ReadWriteOnce"]


def another_name(m: Manifests) -> None:
    m.rayservice["metadata"]["name"] = "llm"


def no_port_serve(m: Manifests) -> None:
    ports = container(m, "head")["ports"]
    ports[:] = [one for one in ports if one["name"] != "serve"]


FAULTS: list[tuple[Callable[[Manifests], None], dict[str, str]]] = [
    # what the operator hands on unread
    (misspelt, {"serve_config": "none of the files|max_ongoing_request"}),
    (default_of_five, {"serve_config": "none of the files|default is 5"}),
    (least_above_most, {"serve_config": "none of the files|max_replicas"}),
    (another_file, {"serve_config": "none of the files"}),
    (only_itself_listens, {"serve_config": "none of the files", "listens": "other pods cannot connect"}),
    # room
    (more_replicas_than_pods, {"capacity": "Replica: room for 3 of 4"}),
    (too_few_cpus, {"capacity": "Ingress: room for 3 of 4"}),
    (no_gpu, {"capacity": "Replica: room for 0 of 4", "placement": "replica: GPUs 0"}),
    (large_object_store, {"memory": "replica: object-store-memory .* (does not fit|less than 1 GiB)"}),
    (no_shared_memory, {"memory": "replica: (/dev/shm must be memory|object-store)"}),
    (ingress_on_a_gpu, {"placement": "replica: its label|Ingress.* may be on replica|the router.* may be on replica"}),
    (head_on_a_gpu_node, {"placement": "head: it may lie on a node with GPUs"}),
    (gpu_for_the_ingress, {"placement": "ingress: it has a GPU"}),
    (ingress_counts_its_nodes_gpus, {"placement": "ingress: it has a GPU, or takes"}),
    (old_autoscaler, {"scaling": "autoscalerOptions.version is not v2"}),
    (pod_restarts, {"scaling": "ingress: restartPolicy"}),
    # the head
    (work_on_the_head, {"head": "num-cpus"}),
    (requests_through_the_head, {"head": "requests run through it"}),
    (open_dashboard, {"head": "open to the outside"}),
    # versions
    (another_ray, {"versions": "rayVersion is 2.59.0"}),
    (another_image, {"versions": "is not of 0|several images"}),
    (latest_image, {"versions": "has no version|is not of|several images"}),
    # the end of a pod
    (killed_while_draining, {"grace": "replica: killed after 600 s"}),
    (drain_by_default, {"grace": "Ray drains 30 s"}),
    (streams_cut_by_haproxy, {"grace": "HAProxy cuts streams after 120 s", "environment": "HARD_STOP"}),
    (own_liveness, {"probes": "replica: livenessProbe"}),
    (stops_first, {"probes": "ingress: lifecycle"}),
    (no_haproxy_on_one, {"environment": "ingress: RAY_SERVE_ENABLE_HA_PROXY is (0|not as on the head)"}),
    (sick_replicas_stay, {"environment": "RAY_SERVE_FORCE_STOP_UNHEALTHY_REPLICAS is None"}),
    (old_cluster_at_once, {"upgrade": "rayClusterDeletionDelaySeconds"}),
    (no_upgrade, {"upgrade": "upgradeStrategy is None"}),
    (budget_in_percent, {"disruption": "PodDisruptionBudget/ingress: minAvailable"}),
    (sick_pods_block_a_drain, {"disruption": "PodDisruptionBudget/replica: unhealthy"}),
    (budget_of_nobody, {"disruption": "head: 0 budgets", "selectors": "PodDisruptionBudget/head: .* selects no pod"}),
    # who sees what
    (
        label_of_one_cluster,
        {"selectors": "NetworkPolicy/clients: (ray.io/cluster|.* selects no pod)", "network": "a client cannot reach"},
    ),
    (dashboard_for_clients, {"network": "a client can reach (ingress|replica) at 31234"}),
    (no_operator, {"network": "the operator cannot reach head at 8265"}),
    (no_dns, {"network": "(head|ingress|replica) cannot reach DNS"}),
    (replicas_reach_the_internet, {"network": "(ingress|replica) can reach the internet at 443"}),
    (nobody_isolates_the_job, {"network": "can reach Job/model-cache"}),
    (may_run_as_root, {"security": "replica: it may run as root"}),
    (keeps_capabilities, {"security": "head, ray-head: it keeps"}),
    (autoscaler_unconfined, {"security": "head, autoscaler"}),
    (token_on_a_worker, {"tokens": "ingress: it gets a token"}),
    (no_token_on_the_head, {"tokens": "head: the autoscaler needs"}),
    (no_authentication, {"tokens": "authOptions.mode"}),
    (written_secret, {"secrets": "HF_TOKEN has its value|it needs no HF_TOKEN"}),
    # the model
    (triton_cache_is_read_only, {"model_cache": "TRITON_CACHE_DIR"}),
    (replicas_ask_the_hub, {"model_cache": "ask no hub"}),
    (another_model_is_loaded, {"model_cache": "SERVE_CONFIG is not what is served"}),
    (cache_of_one_node, {"model_cache": "ReadWriteMany"}),
    # names
    (another_name, {"names": "the RayService is called llm"}),
    (no_port_serve, {"listens": "head: (ports are|port serve)"}),
]


def planted(plant: Callable[[Manifests], None]) -> Manifests:
    manifests = Manifests(copy.deepcopy(BASE.documents))
    plant(manifests)
    assert manifests.documents != BASE.documents, "nothing was planted"
    return manifests


@pytest.mark.parametrize(("plant", "expected"), FAULTS, ids=[plant.__name__ for plant, _ in FAULTS])
def test_a_fault_is_noticed(plant: Callable[[Manifests], None], expected: dict[str, str]) -> None:
    found = checks.failures(planted(plant))
    assert set(found) == set(expected), found
    for name, sentences in found.items():
        for sentence in sentences:
            assert re.search(expected[name], sentence), sentence


def test_every_check_notices_something() -> None:
    noticed = {name for _, expected in FAULTS for name in expected}
    assert noticed == {check.__name__ for check in checks.CHECKS} - {"valid"}


# ---- what only the schemas know --------------------------------------------------------------------------------------


def misspelt_field(m: Manifests) -> None:
    m.rayservice["spec"]["rayClusterDeletionDelaySecond"] = 300


def text_for_a_number(m: Manifests) -> None:
    group(m, "replica")["maxReplicas"] = "4"


def gpu_without_its_name(m: Manifests) -> None:
    container(m, "replica")["resources"]["limits"]["gpu"] = 1


def mount_of_nothing(m: Manifests) -> None:
    pod_spec(m, "replica")["volumes"] = pod_spec(m, "replica")["volumes"][:1]


def number_for_a_variable(m: Manifests) -> None:
    set_env(m, "A_NUMBER", 1)


@pytest.mark.may_skip("needs the validator and its schemas")
@pytest.mark.parametrize(
    ("plant", "says"),
    [
        (misspelt_field, "rayClusterDeletionDelaySecond"),
        (text_for_a_number, "maxReplicas"),
        (gpu_without_its_name, "nvidia.com/gpu"),
        (mount_of_nothing, "which the pod does not define"),
        (number_for_a_variable, "env"),
    ],
)
def test_a_fault_of_form_is_noticed(plant: Callable[[Manifests], None], says: str) -> None:
    harness.need_validator()
    found = list(checks.valid(planted(plant)))
    assert any(says in sentence for sentence in found), found
