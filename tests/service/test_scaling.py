"""The policy of deploy/config.autoscale.yaml: committed tokens add a third replica, and their end takes one away again."""

from __future__ import annotations

import threading
from typing import Any

import yaml  # type: ignore[import-untyped]

from serve_app.replica.autoscaling import CommittedTokensPolicy, wanted_replicas
from tests.service.live import (
    BLOCK_SIZE,
    NUM_BLOCKS,
    POLICY,
    REPOSITORY,
    Service,
    deployment_of,
    launched,
    wait_until,
)

pytestmark = launched
POOL = NUM_BLOCKS * BLOCK_SIZE
TARGET = CommittedTokensPolicy().target
LONG = 1900
"""Tokens of a stream that lasts longer than a replica needs to come, or to be taken away."""


class Trace:
    """(committed tokens, queued tokens, replicas that run) as they change, read on a thread of its own."""

    def __init__(self, service: Service) -> None:
        self.rows: list[tuple[int, int, int]] = []
        self._service = service
        self._has_ended = threading.Event()
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def _read(self) -> None:
        while not self._has_ended.wait(0.1):
            snapshot = self._service.snapshot()
            booked = sum(replica["num_booked_blocks"] for replica in snapshot["replicas"].values()) * BLOCK_SIZE
            row = (booked, snapshot["num_queued_tokens"], len(self._service.pids("Replica")))
            if not self.rows or self.rows[-1] != row:
                self.rows.append(row)

    def end(self) -> list[tuple[int, int, int]]:
        self._has_ended.set()
        self._thread.join()
        return self.rows


def test_the_policy_is_the_one_that_ships() -> None:
    shipped: Any = yaml.safe_load((REPOSITORY / "deploy" / "config.autoscale.yaml").read_text())
    assert deployment_of(shipped, "Replica")["autoscaling_config"]["policy"] == POLICY


def test_a_third_replica_comes_and_goes(service: Service) -> None:
    scaling = deployment_of(service.config, "Replica")["autoscaling_config"]
    first_two = service.pids("Replica")
    service.change("Ingress", user_config={"router": {"policy": "reserve"}})
    service.change("Replica", autoscaling_config=scaling | {"max_replicas": 3})
    wait_until(lambda: service.snapshot()["policy"] == "reserve", "the policy")
    trace = Trace(service)

    # Two fill a pool. Four run, two wait, and only a third replica has room for them.
    early = [service.stream(i, LONG) for i in range(4)]
    wait_until(lambda: all(stream.tokens for stream in early), "four streams that run")
    late = [service.stream(i, LONG) for i in range(4, 6)]
    wait_until(lambda: all(stream.tokens for stream in late), "tokens of those that waited")
    assert not any(stream.has_ended for stream in early)
    (third,) = set(service.pids("Replica")) - set(first_two)
    assert len(service.books()[third]) == 2

    # What is left is on the third replica, and two would do.
    for stream in early:
        stream.hang_up()
    wait_until(lambda: service.states("Replica").get(third) == "STOPPING", "the third replica's end")
    wait_until(lambda: service.snapshot()["replicas"].get(third, {}).get("is_draining"), "the router's knowledge")
    assert not any(stream.has_ended for stream in late), "it drains with streams on it"
    assert len(service.books()[third]) == 2
    for stream in late:
        stream.check()
    wait_until(lambda: service.pids("Replica") == first_two and service.is_whole(), "two replicas")
    rows = trace.end()

    wanted = [(wanted_replicas(booked, queued, POOL, TARGET), running) for booked, queued, running in rows]
    assert (3, 2) in [(min(w, 3), running) for w, running in wanted], rows
    came = next(i for i, (_, _, running) in enumerate(rows) if running == 3)
    assert max(w for w, _ in wanted[: came + 1]) >= 3, "it was asked for before it came"
    went = max(i for i, (_, _, running) in enumerate(rows) if running == 3)
    assert min(w for w, _ in wanted[came : went + 1]) <= 2, "it was not needed when it went"
    service.change("Ingress", user_config={})
    service.change("Replica", autoscaling_config=scaling)
    wait_until(lambda: service.snapshot()["policy"] == "expect", "the old policy")
