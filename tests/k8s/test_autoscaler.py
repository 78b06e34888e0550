"""What Ray's own autoscaler makes of k8s/: it reads the RayCluster as in a cluster, and is asked which pods it would add."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import pytest
from ray.autoscaler._private.kuberay import autoscaling_config
from ray.autoscaler.v2.instance_manager.config import AutoscalingConfig
from ray.autoscaler.v2.scheduler import ResourceDemandScheduler, SchedulingRequest
from ray.autoscaler.v2.utils import ResourceRequestUtil
from ray.core.generated.common_pb2 import LabelSelectorOperator

from tests.k8s import checks
from tests.k8s.harness import Manifests, read_base, render

GPU_FOLDERS = ["base", "overlays/h200"]
NO_KUBECTL = pytest.mark.may_skip("needs kubectl")


def config_of(manifests: Manifests) -> AutoscalingConfig:
    cluster = {"metadata": {"name": "ragged-serve", "namespace": "ragged-serve"}, "spec": manifests.cluster}
    derived = autoscaling_config._derive_autoscaling_config_from_ray_cr(cluster)
    return AutoscalingConfig(derived, skip_content_hash=True)


def request(needs: Mapping[str, float], selector: Mapping[str, str]) -> Any:
    """``selector``: as an actor's options have it, of the form !in(a,b)."""
    rules = []
    for key, value in selector.items():
        listed = re.fullmatch(r"!in\((.+)\)", value)
        assert listed is not None
        rules.append((key, LabelSelectorOperator.LABEL_OPERATOR_NOT_IN, listed[1].split(",")))
    resources = {name: amount for name, amount in needs.items() if amount}
    return ResourceRequestUtil.make(resources, None, [rules] if rules else None)


def of_deployment(manifests: Manifests, name: str) -> Any:
    deployment = manifests.deployments[name]
    selector = (deployment.get("ray_actor_options") or {}).get("label_selector") or {}
    return request(checks.demand(deployment), selector)


def pods_for(manifests: Manifests, requests: list[Any]) -> tuple[dict[str, int], int]:
    """(pods by group in an empty cluster, how many of the requests no pod could take)."""
    config = config_of(manifests)
    reply = ResourceDemandScheduler().schedule(
        SchedulingRequest(
            disable_launch_config_check=True,
            node_type_configs=config.get_node_type_configs(),
            max_num_nodes=config.get_max_num_nodes(),
            idle_timeout_s=config.get_idle_timeout_s(),
            resource_requests=ResourceRequestUtil.group_by_count(requests),
        )
    )
    return {one.instance_type: one.count for one in reply.to_launch}, len(reply.infeasible_resource_requests)


@NO_KUBECTL
@pytest.mark.parametrize("folder", GPU_FOLDERS)
def test_no_replica_no_gpu(folder: str) -> None:
    manifests = render(folder)
    assert pods_for(manifests, []) == ({"ingress": 2}, 0)
    beside = [of_deployment(manifests, "Ingress"), request({}, checks.PLACE)]
    assert pods_for(manifests, beside) == ({"ingress": 2}, 0), "nor for an ingress and the router"


@NO_KUBECTL
@pytest.mark.parametrize("folder", GPU_FOLDERS)
def test_a_gpu_pod_for_each_replica_that_the_file_allows(folder: str) -> None:
    manifests = render(folder)
    replica = of_deployment(manifests, "Replica")
    most = checks.most_replicas(manifests.deployments["Replica"])
    assert most > 1
    for number in range(1, most + 1):
        assert pods_for(manifests, [replica] * number) == ({"ingress": 2, "replica": number}, 0)
    assert pods_for(manifests, [replica] * (most + 1)) == ({"ingress": 2, "replica": most}, 1)


@NO_KUBECTL
@pytest.mark.parametrize("folder", GPU_FOLDERS)
def test_ingresses_find_room_among_themselves_while_they_are_replaced(folder: str) -> None:
    manifests = render(folder)
    number = checks.most_replicas(manifests.deployments["Ingress"])
    pods, left = pods_for(manifests, [of_deployment(manifests, "Ingress")] * number)
    assert left == 0
    assert set(pods) == {"ingress"}
    assert pods["ingress"] <= manifests.group("ingress")["maxReplicas"]


def test_without_its_label_a_gpu_pod_would_take_ingresses() -> None:
    """The label is what keeps them off: these are more than ingress pods hold."""
    manifests = read_base()
    ingresses = [of_deployment(manifests, "Ingress")] * 9
    pods, left = pods_for(manifests, ingresses)
    assert ("replica" in pods, left) == (False, 1)
    for group in manifests.rayservice["spec"]["rayClusterConfig"]["workerGroupSpecs"]:
        group["labels"] = {}
    pods, left = pods_for(manifests, ingresses)
    assert ("replica" in pods, left) == (True, 0)


def test_the_autoscaler_reads_what_is_written() -> None:
    manifests = read_base()
    config = config_of(manifests)
    groups = config.get_node_type_configs()
    assert groups is not None
    assert set(groups) == {"headgroup", "ingress", "replica"}
    assert groups["headgroup"].resources["CPU"] == 0
    assert groups["replica"].resources["GPU"] == 1
    assert {name: group.labels["ragged-serve/role"] for name, group in groups.items()} == {
        "headgroup": "head",
        "ingress": "ingress",
        "replica": "replica",
    }
    assert groups["replica"].idle_timeout_s == manifests.group("replica")["idleTimeoutSeconds"]
    for pod in checks.ray_pods(manifests):
        resources = groups["headgroup" if pod.name == "head" else pod.name].resources
        assert resources["CPU"] == checks.resources(pod)["CPU"]
        assert resources.get("GPU", 0) == checks.resources(pod)["GPU"]
        assert resources["memory"] == checks.resources(pod)["memory"]
