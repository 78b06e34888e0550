"""Kills by SIGKILL under load: a replica, the router, an ingress. What a client sees, and what the books say after."""

from __future__ import annotations

import contextlib
import os
import signal
from collections import Counter

import httpx

from tests.service.live import HEADERS, Service, Stream, completion, launched, tokens_of, wait_until

pytestmark = launched
NUM_STREAMS = 8
LONG = 300
"""Tokens of a stream that a kill must interrupt: at least 3 s."""


def open_streams(service: Service, num_streams: int = NUM_STREAMS, max_tokens: int = LONG) -> list[Stream]:
    """Streams of which each has shown something."""
    streams = [service.stream(i, max_tokens) for i in range(num_streams)]
    wait_until(lambda: all(len(stream.tokens) >= 3 or stream.has_ended for stream in streams), "tokens of each stream")
    assert not any(stream.has_ended for stream in streams)
    return streams


def ask(service: Service, number: int) -> None:
    answer = httpx.post(f"{service.url}/v1/completions", json=completion(number, 4), headers=HEADERS, timeout=60)
    assert answer.status_code == 200, answer.text
    assert answer.json()["choices"][0]["token_ids"] == tokens_of(number, 4)


def test_a_replica_is_killed(service: Service) -> None:
    before = service.describe()
    streams = open_streams(service)
    described = service.describe()
    victim = max(described, key=lambda replica_id: len(described[replica_id]["leases"]))
    assert len(described[victim]["leases"]) >= 2
    os.kill(described[victim]["pid"], signal.SIGKILL)
    for number in range(100, 104):
        ask(service, number)
    for stream in streams:
        stream.check()
    service.check_whole()
    after = service.pids("Replica")
    assert set(after) - set(before)
    assert victim not in after
    assert len(set(after) & set(before)) == 1
    service.check_rest()
    steps = {replica_id: said["num_steps"] for replica_id, said in service.describe().items()}
    for stream in [service.stream(number, 20) for number in range(NUM_STREAMS)]:
        stream.check()
    assert all(said["num_steps"] > steps[replica_id] for replica_id, said in service.describe().items())


def test_a_replica_hangs_and_goes_on(service: Service) -> None:
    """Stopped, it looks alive to everybody but those who listen. Its streams move; what it says later is nobody's."""
    described = service.describe()
    streams = open_streams(service)
    held = {replica_id: len(said["leases"]) for replica_id, said in service.describe().items()}
    victim = max(held, key=lambda replica_id: held[replica_id])
    assert held[victim] >= 2
    pid = described[victim]["pid"]
    os.kill(pid, signal.SIGSTOP)
    try:
        for stream in streams:
            stream.check()
        ask(service, 100)
    finally:
        with contextlib.suppress(ProcessLookupError):  # Ray Serve may have ended it: it does not answer
            os.kill(pid, signal.SIGCONT)
    service.check_whole()
    service.check_rest()
    for stream in [service.stream(number, 20) for number in range(NUM_STREAMS)]:
        stream.check()


def test_the_router_is_killed(service: Service) -> None:
    first = service.snapshot()
    streams = open_streams(service, max_tokens=900)
    leases = set(service.holders())
    assert len(leases) == NUM_STREAMS
    os.kill(first["pid"], signal.SIGKILL)
    for number in range(100, 104):
        ask(service, number)
    second = wait_until(lambda: (s := service.snapshot())["epoch"] > first["epoch"] and not s["is_rebuilding"] and s)
    assert second["pid"] != first["pid"]
    assert second["counters"]["adopted"] >= 1
    assert leases & set(service.holders()), "the new ledger knows what ran before"
    for stream in streams:
        stream.check()
    ask(service, 104)
    service.check_rest()
    counters = Counter(service.snapshot()["counters"])
    assert counters["granted"] >= 1
    assert counters["drift"] == 0


def test_an_ingress_is_killed(service: Service) -> None:
    """Its clients are cut off; what ran for them ends, and their leases come back. The other ingress goes on."""
    pids = service.pids("Ingress")
    streams = open_streams(service, 4, max_tokens=1900)  # as many as fit, and longer than a lease lives unrenewed
    held = Counter(service.holders().values())
    assert set(held) == set(pids), "both ingresses have streams"
    assert held.total() == 4
    victim = min(held, key=lambda ingress_id: held[ingress_id])
    (other,) = set(pids) - {victim}
    os.kill(pids[victim], signal.SIGKILL)
    wait_until(lambda: sum(stream.has_ended for stream in streams) == held[victim], "the end of its clients' streams")
    cut = [stream for stream in streams if stream.has_ended]
    assert all(isinstance(stream.error, httpx.HTTPError) for stream in cut), [stream.error for stream in cut]
    for number in range(100, 104):
        ask(service, number)

    def has_nothing_of_it() -> bool:
        rows = [row for said in service.describe().values() for row in said["leases"]]
        holders = {row.holder_id for row in rows} | set(service.holders().values())
        return victim not in holders

    wait_until(has_nothing_of_it, "the end of its leases")
    rest = [stream for stream in streams if stream not in cut]
    assert not any(stream.has_ended for stream in rest)
    described = service.describe().values()
    assert sum(said["num_unfinished"] for said in described) == len(rest)
    assert sum(row.holder_id == other for said in described for row in said["leases"]) == len(rest)
    seen = [len(stream.tokens) for stream in rest]
    wait_until(lambda: all(len(s.tokens) > n for s, n in zip(rest, seen, strict=True)), "more tokens of the others")
    for stream in rest:
        stream.hang_up()
    for stream in rest:
        stream.join()
        assert stream.error is None
    service.check_whole()
    assert victim not in service.pids("Ingress")
