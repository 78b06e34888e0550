"""deploy/config.gpu.yaml on a Ray with two invented GPUs: one replica a GPU. Only the model is simulated."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]

from serve_app.serve_run import free_port
from tests.tiny_models import make_tiny_model

REPOSITORY = Path(__file__).parent.parent


def test_each_replica_of_the_gpu_config_has_a_gpu_of_its_own(tmp_path: Path) -> None:
    config: dict[str, Any] = yaml.safe_load((REPOSITORY / "deploy" / "config.gpu.yaml").read_text())
    config["http_options"] = {"host": "127.0.0.1", "port": free_port(0)}
    (application,) = config["applications"]
    model = application["args"]["model"]
    assert model["device"] == "cuda"
    model |= {"model": str(make_tiny_model(tmp_path / "model", vocab_size=300, eos=())), "runner": "simulated"}
    (replica,) = (d for d in application["deployments"] if d["name"] == "Replica")
    assert replica["ray_actor_options"]["num_gpus"] == 1
    replica["num_replicas"] = 2
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(config))

    environ = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    environ |= {"RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0", "RAY_SERVE_LOG_TO_STDERR": "0"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.gpu_cluster", str(file), "2"],
        capture_output=True,
        text=True,
        cwd=REPOSITORY,
        env=environ,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["states"] == {"Ingress": ["RUNNING"], "Replica": ["RUNNING", "RUNNING"]}, found
    assert sorted(found["gpu_ids"]) == [["0"], ["1"]]
    assert found["free_gpus"] == 0
    assert found["usage"] == [5, 5, 5, 5]
    assert sum(found["num_steps"]) >= 20
