"""Kills replicas of a running server, one every so many seconds, and says so: one JSON line each.

    python -m loadtests.kills --period 20 --kills 3

Joins the Ray of the server as a driver (RAY_ADDRESS, else the one that runs here) and kills actors of its application, by
the names that Ray Serve gives: at once, as a crash would (`ray.kill`). The first line says that it has joined. A kill waits
until as many replicas run again as in the beginning, so that one is always left. Ends after ``--kills`` of them, or when its
standard input ends.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import random
import sys
import threading
import time
from typing import Any

import ray
from ray.serve.context import _get_global_client

Json = dict[str, Any]
SERVE_NAMESPACE = "serve"
LOOK_SECONDS = 0.2


def replicas(application: str, deployment: str) -> list[Json]:
    """Those that run. Raises ValueError for an application or a deployment that is not there."""
    found = _get_global_client().get_serve_details()["applications"]
    if application not in found or deployment not in found[application]["deployments"]:
        raise ValueError(f"Ray Serve has no deployment {deployment!r} of an application {application!r}")
    rows: list[Json] = found[application]["deployments"][deployment]["replicas"]
    return [row for row in rows if row["state"] == "RUNNING"]


def kill(arguments: argparse.Namespace, is_over: threading.Event) -> None:
    """Raises ValueError where fewer than two replicas run."""
    rng = random.Random(arguments.seed)
    wanted = len(replicas(arguments.application, arguments.deployment))
    if wanted < 2:
        raise ValueError(f"{wanted} replicas run; kills need at least 2, so that one is left")
    print(json.dumps({"ready": wanted}), flush=True)
    for _ in range(arguments.kills):
        if is_over.wait(arguments.period):
            return
        # Serve learns of a death at its next health check: until then the killed one still counts as running.
        while len(up := [row for row in replicas(arguments.application, arguments.deployment) if lives(row)]) < wanted:
            if is_over.wait(LOOK_SECONDS):
                return
        victim = rng.choice(up)
        ray.kill(ray.get_actor(victim["actor_name"], namespace=SERVE_NAMESPACE))
        print(json.dumps({"time": time.time(), "replica": victim["replica_id"]}), flush=True)


def lives(row: Json) -> bool:
    try:
        ray.get_actor(row["actor_name"], namespace=SERVE_NAMESPACE)
    except ValueError:
        return False
    return True


def main() -> int:
    made = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    made.add_argument("--period", type=float, default=20.0, help="seconds before each kill")
    made.add_argument("--kills", type=int, default=1_000_000, help="how many")
    made.add_argument("--application", default="ragged-serve")
    made.add_argument("--deployment", default="Replica")
    made.add_argument("--seed", type=int, default=0, help="of the victims")
    arguments = made.parse_args()
    for name in ("ray", "ray.serve"):
        logging.getLogger(name).setLevel(logging.ERROR)
    is_over = threading.Event()

    def wait_for_the_end() -> None:
        while os.read(
            sys.stdin.fileno(), 4096
        ):  # no buffer of Python's: its lock, held at the end, would abort the process
            pass
        is_over.set()

    threading.Thread(target=wait_for_the_end, daemon=True).start()
    ray.init(address=os.environ.get("RAY_ADDRESS", "auto"), namespace=SERVE_NAMESPACE, log_to_driver=False)
    try:
        kill(arguments, is_over)
    except ValueError as error:
        print(json.dumps({"error": str(error)}), flush=True)
        return 1
    finally:
        ray.shutdown()
    return 0


if __name__ == "__main__":
    sys.exit(main())
