"""RouterClient alone: its end, whatever is under way."""

from __future__ import annotations

import asyncio
from typing import Any

from serve_app.routing.leases import LeaseRequest
from serve_app.routing.router import RouterState
from serve_app.routing.router_client import RouterClient

STATE = RouterState(1, False, ("a",), 16, 8, 100, ("one",), None)


class Prompt:
    """A router that answers everything in the next turn of the loop, and lets every request wait."""

    def __init__(self) -> None:
        self.num_calls = 0

    async def call(self, method: str, *args: Any) -> Any:
        self.num_calls += 1
        await asyncio.sleep(0)
        return {"tell": STATE, "ask": [None] * len(args[0]), "take_grants": []}[method]


async def turn(times: int) -> None:
    for _ in range(times):
        await asyncio.sleep(0)


def test_it_ends_at_any_moment() -> None:
    """A cancel that came in the turn after an answer was lost in asyncio.wait_for (Python 3.11): the loop went on, and
    `close` waited for its end for ever. An ingress that was to end then stood until it was killed."""

    async def test(num_turns: int) -> int:
        router = Prompt()
        client = RouterClient(router, "ingress", lambda: ["a"])
        client.start()
        asked = asyncio.create_task(client.lease(LeaseRequest("r", "ingress", 8, 8)))  # keeps all three loops busy
        await turn(num_turns)
        closing = asyncio.create_task(client.close())
        asked.cancel()
        await turn(60)
        has_ended = closing.done()
        for task in (*client._tasks, closing, asked):
            while not task.done():
                task.cancel()
                await asyncio.sleep(0)
        assert has_ended, f"not closed after {num_turns} turns"
        return router.num_calls

    assert max(asyncio.run(test(num_turns)) for num_turns in range(3, 40)) >= 5
