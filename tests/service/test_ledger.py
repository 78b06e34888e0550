"""The two books on a live cluster with two ingresses, under load with clients that hang up, and at rest."""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import threading
from collections import Counter
from typing import Any

import httpx
import pytest

from tests.service.live import (
    HEADERS,
    PATIENCE,
    Look,
    Service,
    completion,
    launched,
    tokens_of,
    wait_until,
)

pytestmark = launched
CONCURRENCY = 48
WRONG = ("drift", "never_shown", "expired", "holders_lost", "lost_with_replica", "silent_replicas", "timed_out")
"""What the ledger counts when the two books disagree, or somebody is not heard of."""


class Load:
    """Requests of every kind, on an event loop of its own. Some clients go away, at any point."""

    def __init__(self, service: Service, num_requests: int, first: int) -> None:
        self.outcomes: Counter[str] = Counter()
        self.failures: list[BaseException] = []
        self._url = f"{service.url}/v1/completions"
        self._numbers = iter(range(first, first + num_requests))
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()), daemon=True)
        self._thread.start()

    @property
    def is_over(self) -> bool:
        return not self._thread.is_alive()

    async def _run(self) -> None:
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=CONCURRENCY)
        async with httpx.AsyncClient(timeout=PATIENCE, headers=HEADERS, limits=limits) as client:
            await asyncio.gather(*(self._worker(client) for _ in range(CONCURRENCY)))

    async def _worker(self, client: httpx.AsyncClient) -> None:
        for number in self._numbers:
            try:
                self.outcomes[await self._one(client, number)] += 1
            except BaseException as error:
                self.failures.append(error)

    async def _one(self, client: httpx.AsyncClient, number: int) -> str:
        rng = random.Random(number)
        max_tokens, n = rng.choice([1, 5, 20, 60, 150]), rng.choice([1, 1, 1, 2, 3])
        kind = rng.choice(["whole", "streamed", "streamed", "leaves early", "leaves in stream", "leaves in stream"])
        body = completion(number, max_tokens, n=n)
        expected = [tokens_of(number, max_tokens, i) for i in range(n)]
        if kind == "whole":
            answer = await client.post(self._url, json=body)
            assert answer.status_code == 200, answer.text
            assert [choice["token_ids"] for choice in answer.json()["choices"]] == expected
            return kind
        if kind == "leaves early":
            asked = asyncio.create_task(client.post(self._url, json=body))
            await asyncio.wait({asked}, timeout=rng.random() * 0.1)
            asked.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await asked
                return "whole"
            return kind
        body["stream"] = True
        events_until_gone = rng.randrange(10) if kind == "leaves in stream" else None
        tokens: list[list[int]] = [[] for _ in range(n)]
        async with client.stream("POST", self._url, json=body) as response:
            assert response.status_code == 200, await response.aread()
            last = ""
            async for line in response.aiter_lines():
                if not line:
                    continue
                if events_until_gone == 0:
                    return kind
                events_until_gone = None if events_until_gone is None else events_until_gone - 1
                last = line.removeprefix("data: ")
                for choice in [] if last == "[DONE]" else json.loads(last)["choices"]:
                    tokens[choice["index"]] += choice["token_ids"]
        assert last == "[DONE]"
        assert tokens == expected
        return "streamed"


def watch(service: Service, load: Load) -> tuple[int, int, Counter[str]]:
    """Looks at both books again and again until the load is over. Each difference must be gone in a later look.

    A lease in the ledger alone is a grant on its way to the replica, or has ended there and is not settled yet. With
    different blocks it has grown in the table, and the report is on its way. In a table alone, which is read first, it
    was ended and settled meanwhile. Returns the leases that were in both books
    over all looks, the number of looks, and the differences by kind.
    """
    num_shared = num_looks = 0
    kinds: Counter[str] = Counter()
    pending: set[tuple[str, Any, Any]] = set()

    def is_settled() -> bool:
        nonlocal pending
        pending &= service.look().differences()
        return not pending

    while not load.is_over:
        look: Look = service.look()
        num_looks += 1
        shared = look.ledger.keys() & look.tables.keys()
        num_shared += len(shared)
        pending = look.differences()
        for _, in_ledger, in_table in pending:
            kinds["ledger alone" if in_table is None else "table alone" if in_ledger is None else "other blocks"] += 1
        wait_until(is_settled, f"an end of the differences {pending}")
    return num_shared, num_looks, kinds


@pytest.mark.parametrize(("policy", "num_requests", "first"), [("expect", 500, 1000), ("reserve", 150, 2000)])
def test_both_books_say_the_same(service: Service, policy: str, num_requests: int, first: int) -> None:
    service.change("Ingress", user_config={"router": {"policy": policy}})
    wait_until(lambda: service.snapshot()["policy"] == policy, "the policy")
    before = Counter(service.snapshot()["counters"])
    load = Load(service, num_requests, first)
    num_shared, num_looks, kinds = watch(service, load)
    assert load.failures == []
    assert load.outcomes.total() == num_requests
    assert set(load.outcomes) == {"whole", "streamed", "leaves early", "leaves in stream"}
    service.check_rest()
    assert num_looks >= 5
    assert num_shared > num_looks, (num_shared, num_looks, kinds)
    after = Counter(service.snapshot()["counters"])
    happened = after - before
    assert happened["granted"] >= num_requests // 2
    assert {kind: happened[kind] for kind in WRONG if happened[kind]} == {}
    if policy == "reserve":
        assert kinds["other blocks"] == 0
        assert happened["grown_blocks"] == 0


def test_both_ingresses_hold_leases(service: Service) -> None:
    streams = [service.stream(i, 100) for i in range(16)]
    wait_until(lambda: len(set(service.holders().values())) == 2, "leases of two ingresses")
    assert set(service.holders().values()) <= set(service.pids("Ingress"))
    for stream in streams:
        stream.check()
