"""Deploys a configuration on a Ray that is told it has GPUs, and prints what became of it as one JSON line.

    python -m tests.gpu_cluster CONFIG NUM_GPUS

A process of its own: Ray keeps in a process what an earlier cluster left behind. Knows Ray Serve; asserts nothing.
"""

from __future__ import annotations

import json
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any

import ray
import yaml  # type: ignore[import-untyped]
from ray import serve
from ray.serve.context import _get_global_client
from ray.serve.schema import ServeDeploySchema

PATIENCE = 120.0


def main(file: Path, num_gpus: int) -> dict[str, Any]:
    config = yaml.safe_load(file.read_text())
    ray.init(num_cpus=8, num_gpus=num_gpus, include_dashboard=False, namespace="serve", log_to_driver=False)
    serve.start(http_options=config["http_options"])
    client: Any = _get_global_client()
    client.deploy_apps(ServeDeploySchema.model_validate(config), _blocking=False)
    (app,) = config["applications"]
    details = wait(lambda: (said := status(app["name"]))["status"] in ("RUNNING", "DEPLOY_FAILED") and said)
    handle = serve.get_deployment_handle("Replica", app["name"])
    states = {
        name: sorted(replica["state"] for replica in deployment["replicas"])
        for name, deployment in details["deployments"].items()
    }
    replicas = details["deployments"]["Replica"]["replicas"]
    url = f"http://{config['http_options']['host']}:{config['http_options']['port']}"
    wait(lambda: is_ready(url))
    body = json.dumps({"prompt": [1, 2, 3], "max_tokens": 5, "ignore_eos": True}).encode()
    request = urllib.request.Request(f"{url}/v1/completions", body, {"content-type": "application/json"})
    answers = [json.load(urllib.request.urlopen(request, timeout=PATIENCE)) for _ in range(4)]
    described = [
        handle.options(method_name="describe", session_id=replica["replica_id"]).remote().result(timeout_s=PATIENCE)
        for replica in replicas
    ]
    found = {
        "message": details["message"],
        "states": states,
        "gpu_ids": [said["gpu_ids"] for said in described],
        "num_steps": [said["num_steps"] for said in described],
        "usage": [answer["usage"]["completion_tokens"] for answer in answers],
        "free_gpus": ray.available_resources().get("GPU", 0.0),
    }
    serve.shutdown()
    ray.shutdown()
    return found


def status(name: str) -> dict[str, Any]:
    client: Any = _get_global_client()
    found: dict[str, Any] = client.get_serve_details()["applications"][name]
    return found


def is_ready(url: str) -> bool:
    try:
        return bool(urllib.request.urlopen(f"{url}/ready", timeout=5).status == 200)
    except OSError:
        return False


def wait(condition: Any) -> Any:
    deadline = time.monotonic() + PATIENCE
    while not (value := condition()):
        assert time.monotonic() < deadline, "it never held"
        time.sleep(0.05)
    return value


if __name__ == "__main__":
    sys.stdout.write(json.dumps(main(Path(sys.argv[1]), int(sys.argv[2]))) + "\n")
