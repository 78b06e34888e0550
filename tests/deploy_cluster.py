"""The files for real use, one after the other on one Ray that is told it has GPUs; prints what became of each as JSON lines.

    python -m tests.deploy_cluster DIRECTORY

DIRECTORY holds cpu.yaml, gpu.yaml and gpu-cluster.yaml (test_deploy_files.py makes them). First there is one node, a machine
with a GPU and no label: `serve run cpu.yaml`, then gpu.yaml in its place. Then a node joins that is for replicas alone, and
gpu-cluster.yaml follows, under load until its last replica runs, and then without.

A process of its own: Ray keeps in a process what an earlier cluster left behind. Knows Ray Serve; asserts nothing.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ray
import yaml  # type: ignore[import-untyped]
from ray import serve
from ray._private import auto_init_hook
from ray._private.state import actors
from ray.cluster_utils import Cluster
from ray.serve.context import _get_global_client, _set_global_client
from ray.serve.schema import ServeDeploySchema

from serve_app.config import ServeArgs
from serve_app.routing.ray_router import actor_name

# Else a thread that Ray Serve leaves behind connects again at the end.
auto_init_hook.enable_auto_connect = False

APP = "ragged-serve"
PATIENCE = 150.0
NODE = {"object_store_memory": 80_000_000, "num_cpus": 8}
MACHINE_GPUS, NODE_GPUS = 1, 3
ROLE = {"ragged-serve/role": "replica"}
NUM_CLIENTS = 8
LONG = 1800
"""Tokens of a stream of the load: two of them fill a replica's pool."""

Json = dict[str, Any]


def main(directory: Path) -> None:
    files = {name: directory / f"{name}.yaml" for name in ("cpu", "gpu", "gpu-cluster")}
    configs: dict[str, Json] = {name: yaml.safe_load(file.read_text()) for name, file in files.items()}
    http = configs["cpu"]["http_options"]
    url = f"http://{http['host']}:{http['port']}"
    cluster = Cluster(
        initialize_head=True, head_node_args={**NODE, "num_gpus": MACHINE_GPUS, "include_dashboard": False}
    )
    command = [str(Path(sys.executable).parent / "serve"), "run", str(files["cpu"])]
    environ = os.environ | {"RAY_ADDRESS": cluster.address}
    with subprocess.Popen(
        command,
        stdout=sys.stderr,
        env=environ,
        # A shell may have switched interrupts off for all that it starts in the background, us included.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL) and None,
    ) as served:
        try:
            ray.init(address=cluster.address, namespace="serve", log_to_driver=False)
            wait("ready", lambda: is_ready(url) or served.poll() is not None)
            seen = Seen(url, configs["cpu"])
            tell("cpu", seen.whole(), ended=served.poll())

            deploy(configs["gpu"], seen)
            tell("gpu", seen.whole())

            cluster.add_node(**NODE, num_gpus=NODE_GPUS, labels=ROLE)
            config = configs["gpu-cluster"]
            deploy(config, seen)
            most = deployment_of(config, "Replica")["autoscaling_config"]["max_replicas"]
            tell("gpu-cluster", seen.whole())
            load = Load(url)
            wait(f"{most} replicas", lambda: len(seen.running("Replica")) == most and seen.is_settled())
            tell("gpu-cluster, loaded", seen.whole(), tokens=load.end())
            wait("one replica", lambda: len(seen.running("Replica")) == 1 and seen.is_settled())
            tell("gpu-cluster, idle", seen.whole())
        finally:
            served.send_signal(signal.SIGINT)
            try:
                tell("end", {}, code=served.wait(PATIENCE))
            finally:
                served.kill()
                _set_global_client(None)
                ray.shutdown()
                cluster.shutdown()


def tell(what: str, found: Json, **more: Any) -> None:
    sys.stdout.write(json.dumps({"what": what, **found, **more}) + "\n")
    sys.stdout.flush()


def deploy(config: Json, seen: Seen) -> None:
    """As `serve deploy` does. Returns when nothing is left of what was there before."""
    before = {i for name in ("Ingress", "Replica") for i in seen.running(name)}
    client: Any = _get_global_client()
    client.deploy_apps(ServeDeploySchema.model_validate(config), _blocking=False)
    seen.config = config
    wait("new parts", lambda: not before & set(seen.ids()) and seen.is_settled() and is_ready(seen.url))


class Seen:
    """What Ray and Ray Serve say of the application, now. ``config``: what was deployed last."""

    def __init__(self, url: str, config: Json) -> None:
        self.url = url
        self.config = config

    def details(self) -> Json:
        client: Any = _get_global_client()
        found: Json = client.get_serve_details()["applications"][APP]
        if found["status"] == "DEPLOY_FAILED":
            raise RuntimeError(found["message"])
        return found

    def replicas(self, name: str) -> list[Json]:
        found: list[Json] = self.details()["deployments"].get(name, {"replicas": []})["replicas"]
        return found

    def ids(self) -> list[str]:
        """Of all parts that are there, also of those that start or end."""
        return [replica["replica_id"] for name in ("Ingress", "Replica") for replica in self.replicas(name)]

    def running(self, name: str) -> dict[str, Json]:
        return {replica["replica_id"]: replica for replica in self.replicas(name) if replica["state"] == "RUNNING"}

    def is_settled(self) -> bool:
        """Nobody starts or ends, and as many ingresses run as were asked for."""
        running = len(self.running("Ingress"))
        return (
            self.details()["status"] == "RUNNING"
            and running == deployment_of(self.config, "Ingress")["num_replicas"]
            and running + len(self.running("Replica")) == len(self.ids())
        )

    def whole(self) -> Json:
        """Who runs where, and what four requests get."""
        labels = {node["NodeID"]: node["Labels"].get("ragged-serve/role", "") for node in ray.nodes() if node["Alive"]}
        usage = [complete(self.url, 5)["usage"]["completion_tokens"] for _ in range(4)]
        handle = serve.get_deployment_handle("Replica", APP)
        gpus = []
        for replica_id, replica in self.running("Replica").items():
            said = handle.options(method_name="describe", session_id=replica_id).remote().result(timeout_s=PATIENCE)
            gpus.append([labels[replica["node_id"]], said["gpu_ids"]])
        router = actor_name(APP, ServeArgs.parse(self.config["applications"][0]["args"]).model.key)
        (place,) = (
            actor["Address"]["NodeID"]
            for actor in actors().values()
            if actor["Name"] == router and actor["State"] == "ALIVE"
        )
        handle.shutdown()
        return {
            "usage": usage,
            "replicas": sorted(gpus),
            "ingresses": [labels[replica["node_id"]] for replica in self.running("Ingress").values()],
            "router": labels[place],
            "free_gpus": free_gpus(sum(len(held) for _, held in gpus)),
        }


class Load:
    """Clients that ask again and again until `end`."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._is_over = False
        self._tokens: list[int] = []
        self._failures: list[Exception] = []
        self._threads = [threading.Thread(target=self._ask, daemon=True) for _ in range(NUM_CLIENTS)]
        for thread in self._threads:
            thread.start()

    def _ask(self) -> None:
        while not self._is_over:
            try:
                self._tokens.append(complete(self._url, LONG)["usage"]["completion_tokens"])
            except urllib.error.HTTPError as error:
                if error.code != 429:  # that one waited too long for a place
                    self._failures.append(error)
            except Exception as error:
                self._failures.append(error)

    def end(self) -> list[int]:
        """Of each answer. Returns when the last has come; raises what a client met."""
        self._is_over = True
        for thread in self._threads:
            thread.join()
        for failure in self._failures:
            raise failure
        return self._tokens


def free_gpus(num_held: int) -> float:
    """What Ray says, which comes a moment after what happened: it may take some seconds to be what replicas leave."""
    deadline = time.monotonic() + 30.0
    while True:
        found: float = ray.available_resources().get("GPU", 0.0)
        if found == ray.cluster_resources()["GPU"] - num_held or time.monotonic() > deadline:
            return found
        time.sleep(0.1)


def deployment_of(config: Json, name: str) -> Json:
    found: Json = next(d for d in config["applications"][0]["deployments"] if d["name"] == name)
    return found


def complete(url: str, max_tokens: int) -> Json:
    body = json.dumps({"prompt": [1, 2, 3], "max_tokens": max_tokens, "ignore_eos": True}).encode()
    request = urllib.request.Request(f"{url}/v1/completions", body, {"content-type": "application/json"})
    with urllib.request.urlopen(request, timeout=PATIENCE) as answer:
        found: Json = json.load(answer)
    return found


def is_ready(url: str) -> bool:
    try:
        return bool(urllib.request.urlopen(f"{url}/ready", timeout=5).status == 200)
    except OSError:
        return False


def wait(what: str, condition: Callable[[], Any]) -> Any:
    deadline = time.monotonic() + PATIENCE
    while not (value := condition()):
        if time.monotonic() > deadline:
            raise TimeoutError(f"{what}: it never held")
        time.sleep(0.05)
    return value


if __name__ == "__main__":
    main(Path(sys.argv[1]))
