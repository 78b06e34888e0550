"""deploy/config.cpu.yaml by `serve run`, then config.gpu.yaml and config.gpu-cluster.yaml, on one Ray with invented GPUs.

Changed in each are the model (a tiny one; simulated where a GPU is asked for), the port, and times that are minutes. What
the files say of replicas, resources, labels and scaling is what runs.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
import yaml  # type: ignore[import-untyped]

from serve_app.serve_run import free_port
from tests.tiny_models import make_tiny_model

REPOSITORY = Path(__file__).parent.parent
MAX_MODEL_LEN = 4096
Json = dict[str, Any]


def write(name: str, directory: Path, port: int) -> Json:
    """Writes the file as it is run, and returns what of it the test is about: its deployments by name. Each has a model of
    its own, and so a router."""
    model = make_tiny_model(directory / name, vocab_size=300, eos=())
    config: Json = yaml.safe_load((REPOSITORY / "deploy" / f"config.{name}.yaml").read_text())
    config["http_options"] = {"host": "127.0.0.1", "port": port}
    (application,) = config["applications"]
    args = application["args"]
    deployments: dict[str, Json] = {deployment["name"]: deployment for deployment in application["deployments"]}
    args["model"]["model"] = str(model)
    if name == "cpu":
        assert args["model"]["device"] == "cpu"
        args["engine"] |= {"num_threads": 1, "kv_cache_memory_bytes": 2**20}
    else:
        assert args["model"]["device"] == "cuda"
        args["model"] |= {"runner": "simulated", "simulated": {"seconds_per_step": 0.002}}
        args["engine"] |= {"block_size": 16, "num_kv_blocks": MAX_MODEL_LEN // 16, "max_model_len": MAX_MODEL_LEN}
        deployments["Ingress"]["user_config"]["router"]["policy"] = "reserve"  # a request counts as a whole at once
    if scaling := deployments["Replica"].get("autoscaling_config"):
        scaling |= {"look_back_period_s": 2, "upscale_delay_s": 0.5, "downscale_delay_s": 4}
    (directory / f"{name}.yaml").write_text(yaml.safe_dump(config))
    return deployments


@pytest.mark.slow
def test_the_files_for_real_use(tmp_path: Path) -> None:
    port = free_port(0)
    files = {name: write(name, tmp_path, port) for name in ("cpu", "gpu", "gpu-cluster")}
    environ = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    environ |= {"RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0", "RAY_SERVE_LOG_TO_STDERR": "0"}
    # Its own folder, or it would say that it is the Ray of this machine. A short one: there are sockets in it.
    with tempfile.TemporaryDirectory(prefix="deploy-", dir="/tmp", ignore_cleanup_errors=True) as directory:
        done = subprocess.run(
            [sys.executable, "-m", "tests.deploy_cluster", str(tmp_path)],
            capture_output=True,
            text=True,
            cwd=REPOSITORY,
            env=environ | {"RAY_TMPDIR": directory},
            timeout=500,
            check=False,
        )
    assert done.returncode == 0, done.stdout + done.stderr[-4000:]
    told = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"what"')]
    found = {one["what"]: one for one in told}
    assert all(one["usage"] == [5, 5, 5, 5] for one in told if "usage" in one)

    cpu = found["cpu"]
    assert cpu["ended"] is None, "`serve run` goes on"
    assert (cpu["replicas"], cpu["ingresses"], cpu["free_gpus"]) == ([["", []]], [""], 1.0)

    gpu = found["gpu"]
    assert files["gpu"]["Replica"]["ray_actor_options"]["num_gpus"] == 1
    assert (gpu["replicas"], gpu["ingresses"], gpu["free_gpus"]) == ([["", ["0"]]], [""], 0)

    # Nothing but replicas on the node that is for replicas, though it has the more room.
    scaling = files["gpu-cluster"]["Replica"]["autoscaling_config"]
    assert (scaling["min_replicas"], scaling["max_replicas"]) == (1, 4)
    before, loaded, idle = (found[f"gpu-cluster{when}"] for when in ("", ", loaded", ", idle"))
    for one in (before, loaded, idle):
        assert (one["ingresses"], one["router"]) == (["", ""], "")
    for one in (before, idle):
        assert (len(one["replicas"]), one["free_gpus"]) == (1, 3)
    assert loaded["replicas"] == [["", ["0"]], *(["replica", [str(i)]] for i in range(3))], "a GPU each"
    assert loaded["free_gpus"] == 0
    assert loaded["tokens"]
    assert set(loaded["tokens"]) == {1800}
    assert found["end"]["code"] == 0
