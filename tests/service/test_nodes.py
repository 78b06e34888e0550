"""A Ray of three nodes, as pods are: `ray start --block` each. One is emptied by `ray drain-node`, one gets SIGTERM, one
SIGKILL; two replicas that run streams, on the nodes where there is a seat. The ingresses live on the head.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from serve_app.serve_run import free_port
from tests.service.live import (
    APP,
    KEY,
    PATIENCE,
    Json,
    Service,
    Stream,
    deployment_of,
    make_config,
    wait_until,
)
from tests.tiny_models import make_tiny_model

BIN = Path(sys.executable).parent
DRAIN_SECONDS = 15
"""A node that got SIGTERM has so long until it is torn down."""


@pytest.fixture(autouse=True)
def _whole_and_at_rest() -> None:
    """No service that is shared: it has its own Ray."""


class Nodes:
    """The processes of `ray start --block`, one a node."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._temp = tempfile.mkdtemp(prefix="nodes-", dir="/tmp")  # paths of sockets must be short
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        self.address = f"127.0.0.1:{free_port(0)}"
        self._environ = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")} | {
            "RAY_AUTH_MODE": "disabled",
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": str(DRAIN_SECONDS),
            "RAGGED_SERVE_API_KEYS": f"{KEY},another",
        }

    def start(self, name: str, *, is_head: bool = False, **resources: float) -> None:
        where = ["--head", f"--port={self.address.rsplit(':')[1]}", "--include-dashboard=false"]
        where += [f"--temp-dir={self._temp}"]  # else each ray.init after this test would look for this Ray
        if not is_head:
            where = [f"--address={self.address}"]
        given = ",".join(f'"{kind}": {amount}' for kind, amount in {**resources, name: 1.0}.items())
        command = [str(BIN / "ray"), "start", "--block", "--num-cpus=8", *where, f"--resources={{{given}}}"]
        command += ["--object-store-memory=80000000", "--disable-usage-stats"]
        with (self._directory / f"{name}.txt").open("wb") as output:
            self._processes[name] = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, env=self._environ
            )

    def said(self, name: str) -> str:
        return (self._directory / f"{name}.txt").read_text(errors="replace")

    def terminate(self, name: str) -> None:
        """What Kubernetes does to a pod."""
        self._processes[name].send_signal(signal.SIGTERM)

    def kill(self, name: str) -> None:
        """The whole node, at once."""
        tree = [
            psutil.Process(self._processes[name].pid),
            *psutil.Process(self._processes[name].pid).children(recursive=True),
        ]
        for process in tree:
            process.kill()

    def has_ended(self, name: str) -> bool:
        return self._processes[name].poll() is not None

    def drain(self, node_id: str) -> None:
        command = [str(BIN / "ray"), "drain-node", f"--address={self.address}", f"--node-id={node_id}"]
        command += ["--reason=DRAIN_NODE_REASON_PREEMPTION", "--reason-message=test", "--deadline-remaining-seconds=60"]
        subprocess.run(command, check=True, env=self._environ, timeout=PATIENCE, capture_output=True)

    def stop(self) -> None:
        trees = []
        for process in self._processes.values():
            if process.poll() is None:
                trees += psutil.Process(process.pid).children(recursive=True)
                process.send_signal(signal.SIGKILL)
            process.wait()
        for child in trees:
            if child.is_running():
                child.kill()
        psutil.wait_procs(trees, 10)
        shutil.rmtree(self._temp, ignore_errors=True)


class OnNodes(Service):
    """A service on nodes that are there: deployed into them, with Ray's own proxy on the head."""

    def __init__(self, nodes: Nodes, model: Path, directory: Path) -> None:
        port = free_port(0)
        config = make_config(model, port, "nodes")
        config["proxy_location"] = "HeadOnly"
        for name, kind in (("Ingress", "front"), ("Replica", "seat")):
            options = deployment_of(config, name).setdefault("ray_actor_options", {})
            options |= {"num_cpus": 0.1, "resources": {kind: 1}}
        super().__init__("nodes", model, directory, config)
        self._nodes = nodes

    def start(self) -> OnNodes:
        import ray
        from ray import serve

        ray.init(address=self._nodes.address, namespace="serve", log_to_driver=False)
        self._ray = ray
        http: Json = self.config["http_options"]
        serve.start(proxy_location="HeadOnly", http_options=http)
        self.deploy(self.config)
        wait_until(self._is_deployed, "the application")
        self._replicas = serve.get_deployment_handle("Replica", APP)
        with httpx.Client(timeout=5) as client:
            wait_until(lambda: self._is_up(client), "readiness")
        self.check_whole()
        return self

    def _is_deployed(self) -> bool:
        from ray.serve.context import _get_global_client

        applications: Json = _get_global_client().get_serve_details()["applications"]
        assert applications[APP]["status"] != "DEPLOY_FAILED", applications[APP]["message"]
        return bool(applications[APP]["status"] == "RUNNING")

    def stop(self) -> list[psutil.Process]:
        from ray import serve

        serve.shutdown()
        self._ray.shutdown()
        return []

    def nodes_of_replicas(self) -> dict[str, str]:
        """Id of a replica that runs -> of its node."""
        return {
            replica["replica_id"]: replica["node_id"]
            for replica in self._replicas_of("Replica")
            if replica["state"] == "RUNNING"
        }

    def node_names(self) -> dict[str, str]:
        """Id of a node that lives -> its name."""
        return {
            node["NodeID"]: next(name for name in node["Resources"] if re.fullmatch(r"head|n\d", name))
            for node in self._ray.nodes()
            if node["Alive"]
        }


@pytest.fixture
def nodes(tmp_path: Path) -> Iterator[Nodes]:
    made = Nodes(tmp_path)
    made.start("head", is_head=True, front=2.0)
    try:
        yield made
    finally:
        made.stop()


def streams_on_both(service: OnNodes, first: int) -> list[Stream]:
    streams = [service.stream(number, 700) for number in range(first, first + 8)]
    wait_until(lambda: all(len(stream.tokens) >= 3 or stream.has_ended for stream in streams), "tokens of each stream")
    assert not any(stream.has_ended for stream in streams)
    assert all(map(len, service.books().values())), "both replicas have streams"
    return streams


def test_nodes_leave_under_streams(nodes: Nodes, tmp_path: Path) -> None:
    """Each time one of two replicas stands on the node that goes, and there is a seat on another one."""
    model = make_tiny_model(tmp_path / "model", vocab_size=300, eos=())
    service: Any = OnNodes(nodes, model, tmp_path)
    wait_until(lambda: "ray start" in nodes.said("head") or nodes.has_ended("head"), "the head")
    for name in ("n1", "n2"):
        nodes.start(name, seat=1.0)
        wait_until(lambda name=name: "Ray runtime started" in nodes.said(name) or nodes.has_ended(name), name)
        assert not nodes.has_ended(name), nodes.said(name)
    try:
        service.start()
        for number, (way, fresh) in enumerate((("drain-node", "n3"), ("SIGTERM", "n4"), ("SIGKILL", "n5"))):
            nodes.start(fresh, seat=1.0)
            wait_until(lambda fresh=fresh: fresh in service.node_names().values(), "the new node")
            streams = streams_on_both(service, 20 * number)
            names, seats = service.node_names(), service.nodes_of_replicas()
            leaving_replica, leaving_node = min(seats.items(), key=lambda item: names[item[1]])
            gone = names[leaving_node]
            if way == "drain-node":
                nodes.drain(leaving_node)
            elif way == "SIGTERM":
                nodes.terminate(gone)
            else:
                nodes.kill(gone)
            wait_until(
                lambda seats=seats, leaving=leaving_replica: (
                    leaving not in service.nodes_of_replicas() and len(service.nodes_of_replicas()) == len(seats)
                ),
                f"{way}: the replica is elsewhere",
            )
            for stream in streams:
                stream.check()
            service.check_whole()
            assert gone not in {service.node_names().get(node) for node in service.nodes_of_replicas().values()}
            if way != "drain-node":
                wait_until(lambda gone=gone: nodes.has_ended(gone), f"{way}: the end of the node")
            service.check_rest()
    finally:
        service.stop()
