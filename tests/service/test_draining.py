"""Parts that leave under streams: a rolling update, a replica, an ingress; and the controller killed. Two ingresses.

A stream must be complete and equal to what an undisturbed one is, or end with an error event that says why.
"""

from __future__ import annotations

import copy
import os
import shutil
import signal
import threading
from collections import Counter
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.service.live import (
    HEADERS,
    INGRESS_DRAIN_SECONDS,
    MODES,
    Service,
    Stream,
    completion,
    launched,
    tokens_of,
    wait_until,
)

own_proxy = pytest.mark.parametrize("service", ["serve run"], indirect=True)
NUM_CLIENTS = 6
NUM_TOKENS = 250
"""Of a stream of the load: a few seconds."""
MIN_IN_A_PHASE = 6
LONG = 1900
"""Tokens of a stream that is longer than an ingress drains."""


class Load:
    """Clients that ask again and again. Each stream is kept with the phases in which it began and ended."""

    def __init__(self, service: Service) -> None:
        self.phase = "before"
        self.streams: list[tuple[str, str, Stream]] = []
        self._service = service
        self._has_ended = threading.Event()
        self._threads = [threading.Thread(target=self._ask, args=(i,), daemon=True) for i in range(NUM_CLIENTS)]
        for thread in self._threads:
            thread.start()

    def _ask(self, client: int) -> None:
        number = client
        while not self._has_ended.is_set():
            began = self.phase
            stream = self._service.stream(number, NUM_TOKENS).join()
            self.streams.append((began, self.phase, stream))
            number += NUM_CLIENTS

    def __enter__(self) -> Load:
        return self

    def __exit__(self, *failure: object) -> None:
        self._has_ended.set()
        for thread in self._threads:
            thread.join()

    def begin(self, phase: str) -> None:
        """When enough has happened in the phase before."""
        wait_until(lambda: sum(began == self.phase for began, _, _ in self.streams) >= MIN_IN_A_PHASE, self.phase)
        self.phase = phase

    def check(self) -> None:
        """Each stream was whole."""
        for _, _, stream in self.streams:
            stream.check()


def redeploy(service: Service, args: dict[str, Any]) -> Load:
    """A rolling update under load: changed arguments of the application, so that every part is replaced. Returns what was
    asked meanwhile; some of it met the update."""
    old = set(service.pids("Ingress")) | set(service.pids("Replica"))

    def is_new() -> bool:
        return not old & (set(service.states("Ingress")) | set(service.states("Replica"))) and service.is_whole()

    with Load(service) as load:
        load.begin("during")
        service.config["applications"][0]["args"] = args
        service.deploy(service.config)
        wait_until(is_new, "four new processes")
        load.begin("after")
        load.begin("end")
    seen = Counter((began, ended) for began, ended, _ in load.streams)
    assert seen["before", "during"] >= 2, f"streams met the update: {seen}"
    assert seen["during", "during"] >= MIN_IN_A_PHASE, seen
    return load


def update(service: Service) -> None:
    """By a value of the arguments that does nothing else. No stream is lost, in none of its parts."""
    args = copy.deepcopy(service.config["applications"][0]["args"])
    args["api"]["title"] = f"not {args['api'].get('title')}"
    redeploy(service, args).check()


def ask(service: Service, number: int) -> None:
    answer = httpx.post(f"{service.url}/v1/completions", json=completion(number, 4), headers=HEADERS, timeout=60)
    assert answer.status_code == 200, answer.text
    assert answer.json()["choices"][0]["token_ids"] == tokens_of(number, 4)


def running(service: Service, numbers: range, max_tokens: int) -> list[Stream]:
    """Streams of which each has shown something."""
    streams = [service.stream(i, max_tokens) for i in numbers]
    wait_until(lambda: all(len(stream.tokens) >= 3 or stream.has_ended for stream in streams), "tokens of each stream")
    assert not any(stream.has_ended for stream in streams)
    return streams


@pytest.mark.parametrize("service", MODES, indirect=True)
def test_an_update_and_an_ingress_that_leaves(service: Service) -> None:
    update(service)
    take_an_ingress_away(service)


@own_proxy
def test_a_replica_leaves(service: Service) -> None:
    """What is left on it after a second goes on elsewhere. (test_scaling.py: it ends there, where it has the time.)"""
    service.change("Replica", num_replicas=3)
    service.check_whole(3)
    streams = running(service, range(9), 600)
    first = {replica_id: len(rows) for replica_id, rows in service.books().items()}
    assert min(first.values()) >= 2, first
    service.change("Replica", num_replicas=2)
    wait_until(lambda: "STOPPING" in service.states("Replica").values(), "the end of one")
    (leaving,) = (replica_id for replica_id, state in service.states("Replica").items() if state == "STOPPING")
    wait_until(lambda: not service.books().get(leaving), "the end of its leases")
    assert not any(stream.has_ended for stream in streams), "they have moved"
    assert sum(map(len, service.books().values())) == len(streams)
    late = [service.stream(number, 20) for number in range(20, 24)]
    for stream in (*streams, *late):
        stream.check()
    wait_until(lambda: leaving not in service.states("Replica") and service.is_whole(), "two replicas")


def take_an_ingress_away(service: Service) -> None:
    """It ends what ends in time. The clients of the rest are told; the other ingress goes on."""
    streams = running(service, range(6), LONG)
    held = Counter(service.holders().values())
    assert len(held) == 2, "both ingresses have streams"
    short = [service.stream(number, 200) for number in range(10, 16)]
    wait_until(lambda: all(stream.tokens or stream.has_ended for stream in short), "a token of each short stream")
    service.change("Ingress", num_replicas=1)
    wait_until(lambda: "STOPPING" in service.states("Ingress").values(), "the end of one")
    (leaving,) = (ingress_id for ingress_id, state in service.states("Ingress").items() if state == "STOPPING")
    while leaving in service.states("Ingress"):
        ask(service, 100)
    for stream in short:
        stream.check()
    told = [stream for stream in streams if stream.has_ended]
    assert len(told) == held[leaving] >= 1
    for stream in told:
        assert f"this ingress leaves, and the {INGRESS_DRAIN_SECONDS:g} s for answers to end are over" in repr(
            stream.error
        )
        assert "engine_unavailable" in repr(stream.error)
        assert not stream.is_done
        assert 3 <= len(stream.tokens) < LONG
    for stream in streams:
        stream.hang_up()
    for stream in streams:
        assert stream.join().error is None or stream in told
        assert stream.tokens == tokens_of(streams.index(stream), LONG)[: len(stream.tokens)]
    service.change("Ingress", num_replicas=2)
    service.check_whole()


@launched
def test_the_model_changes_under_load(service: Service, tmp_path: Path) -> None:
    """There and back. Each model has a router of its own. Who asks an old ingress after the old replicas have gone waits in
    vain, and who asks a new one before the new model is loaded is told; nobody who was shown a token loses his answer."""
    version = service.snapshot()["options_version"]
    service.change("Ingress", user_config={"router": {"max_queue_seconds": 5}})  # an old ingress drains as long
    wait_until(lambda: service.snapshot()["options_version"] > version, "the shorter wait")
    args = copy.deepcopy(service.config["applications"][0]["args"])
    shutil.copytree(args["model"]["model"], tmp_path / "another")
    other = args | {"model": args["model"] | {"model": str(tmp_path / "another")}}
    for changed in (other, args):
        load = redeploy(service, changed)
        refused = [stream for _, _, stream in load.streams if stream.error is not None]
        for _, _, stream in load.streams:
            if stream.error is None:
                stream.check()
        for stream in refused:
            assert stream.tokens == []
            said = repr(stream.error)
            assert ("status 429" in said and "overloaded" in said) or (
                "status 503" in said and "is being loaded" in said
            )
        assert len(load.streams) - len(refused) >= 2 * MIN_IN_A_PHASE
        ask(service, 100)
        service.check_rest()
    service.change("Ingress", user_config={})


@launched
def test_the_controller_is_killed(service: Service) -> None:
    """Traffic flows, Serve brings it back, and no replica is taken for one that leaves meanwhile."""
    parts = service.pids("Ingress"), service.pids("Replica")
    before = service.controller_pid()
    streams = running(service, range(8), 900)
    os.kill(before, signal.SIGKILL)
    drained: set[str] = set()
    number = 100

    def is_back() -> bool:
        nonlocal number
        ask(service, number)
        number += 1
        drained.update(i for i, replica in service.snapshot()["replicas"].items() if replica["is_draining"])
        return number >= 110 and service.controller_pid() != before

    wait_until(is_back, "a new controller")
    service.check_whole()
    for _ in range(4):
        is_back()
    for stream in streams:
        stream.check()
    assert (service.pids("Ingress"), service.pids("Replica")) == parts, "nobody else was started anew"
    assert drained == set()
    # It still does its work.
    service.change("Ingress", user_config={"limits": {"max_n": 3}})
    refused = completion(1, 1, n=4)

    def has_arrived() -> bool:
        answers = [httpx.post(f"{service.url}/v1/completions", json=refused, headers=HEADERS) for _ in range(6)]
        return all(answer.status_code == 400 for answer in answers)

    wait_until(has_arrived, "the new limit")
    service.change("Ingress", user_config={})
    wait_until(lambda: not has_arrived(), "the old limit")
