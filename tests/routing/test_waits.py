"""The ingress's side of the router, against a router that is a script. tests/api has the rest, over the whole service."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from serve_app.errors import DeadlineExceededError
from serve_app.routing.leases import Lease, LeaseRequest
from serve_app.routing.router import RouterState
from serve_app.routing.router_client import RouterClient, RouterUnavailableError

STATE = RouterState(1, False, ("a", "b"), 16, 100, 1000, ("f",), None)


class Script:
    """A router that lets everybody wait."""

    def __init__(self) -> None:
        self.is_away = False
        self.asked: list[LeaseRequest] = []
        self.withdrawn: list[str] = []
        self.grants: asyncio.Queue[list[tuple[str, Lease]]] = asyncio.Queue()

    async def call(self, method: str, *args: Any) -> Any:
        if self.is_away:
            raise RouterUnavailableError("planted: it is away")
        if method == "ask":
            self.asked += args[0]
            return [None] * len(args[0])
        if method == "take_grants":
            return await self.grants.get()
        self.withdrawn += args[2]
        return STATE


def wanted(name: str, remaining_ms: float | None = None) -> LeaseRequest:
    return LeaseRequest(name, "i", 3, 13, remaining_ms=remaining_ms)


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while not condition():
            await asyncio.sleep(0.001)


@pytest.mark.parametrize("num_waiting", [1, 400])
def test_requests_that_wait_cost_nothing(num_waiting: int) -> None:
    """Each once looked four times in away_seconds whether the router was away: thousands of wake-ups a second."""

    async def main() -> None:
        script = Script()
        client = RouterClient(script, "i", lambda: ["a", "b"])
        client.start()
        waits = [asyncio.create_task(client.lease(wanted(f"r{i}"))) for i in range(num_waiting)]
        await until(lambda: len(client._queued) == num_waiting)
        assert len(asyncio.get_running_loop()._scheduled) < 10  # type: ignore[attr-defined]
        script.grants.put_nowait([(f"r{i}", Lease(f"1.{i}", "a", 16, 1)) for i in range(num_waiting)])
        assert [lease.lease_id for lease in await asyncio.gather(*waits)] == [f"1.{i}" for i in range(num_waiting)]
        assert client.num_waiting == 0
        await client.close()

    asyncio.run(main())


def test_while_the_router_is_away_leases_of_its_own_are_spread() -> None:
    async def main() -> None:
        script = Script()
        client = RouterClient(script, "i", lambda: ["a", "b"], away_seconds=0.05, seed=0)
        client.start()
        await client.has_answered()
        script.is_away = True
        leases = await asyncio.gather(*(client.lease(wanted(f"r{i}")) for i in range(10)))
        assert sorted(lease.replica_id for lease in leases) == ["a"] * 5 + ["b"] * 5
        assert client.counters["own_leases"] == 10
        script.is_away = False
        await until(lambda: not client.is_away)
        waits = asyncio.create_task(client.lease(wanted("later")))
        await until(lambda: "later" in client._queued)
        script.is_away = True  # again: the time counts anew
        assert (await waits).lease_id == "i.11"
        await client.close()

    asyncio.run(main())


def test_a_deadline_ends_a_wait_that_the_router_forgot() -> None:
    async def main() -> None:
        script = Script()
        client = RouterClient(script, "i", lambda: ["a"])
        client.start()
        with pytest.raises(DeadlineExceededError):
            await client.lease(wanted("r", 20.0))
        assert 0 < (script.asked[0].remaining_ms or 0.0) <= 20.0
        await until(lambda: script.withdrawn == ["r"])
        assert client.num_waiting == 0
        await client.close()

    asyncio.run(main())
