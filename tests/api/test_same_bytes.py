"""Replicas die under streams of every kind, again and again, and each answer has the bytes of one that nothing disturbed.

The drill's requests on the real engine, in one process: what loadtests/drill.py shows with processes and SIGKILL, here with
many more deaths, at any token and in any part of a prefill.
"""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import Iterator
from pathlib import Path

import pytest

import serve_app
from loadtests.http_answer import Wire
from loadtests.stream_mix import KINDS, AnswerRead, Item, first_difference, make_items, stop_string
from serve_app.text.tokenizer import Tokenizer
from tests.api.house import House, Replica

DEMO = Path(serve_app.__file__).parent / "demo_model"
ENGINE = {
    "num_threads": 1,
    "num_kv_blocks": 512,
    "max_num_seqs": 24,
    "max_num_batched_tokens": 24,
    "deterministic": True,
}


@pytest.fixture(scope="module")
def house() -> Iterator[House]:
    with House({"model": {"model": str(DEMO)}, "engine": ENGINE}) as made:
        yield made
        made.check_rest()


async def ask(house: House, item: Item, *, stream: bool) -> AnswerRead:
    answer = AnswerRead()
    fields = {"stream": True, "stream_options": {"include_usage": True}} if stream else {}
    async with Wire("127.0.0.1", house.port) as wire:
        await wire.send("POST", item.kind.path, {}, json.dumps(item.sent(**fields, cache_salt=str(stream))).encode())
        assert await wire.status() == 200, await wire.body()
        if stream:
            async for data in wire.events():
                answer.take_event(data, 0.0)
        else:
            answer.take_body(await wire.body())
    return answer


async def ask_all(house: House, items: list[Item], *, stream: bool) -> list[AnswerRead]:
    return list(await asyncio.gather(*(ask(house, item, stream=stream) for item in items)))


async def die(house: House, victim: Replica) -> None:
    """It is gone, and another comes in its place, with the same engine: to load one takes longer than a drill."""
    house.transport.kill(victim.replica_id)
    victim.reporter.cancel()
    house.replicas.remove(victim)
    await asyncio.to_thread(victim.engine.stop, 10.0)
    fresh = Replica(f"{victim.replica_id}'", victim.engine.engine, house)
    house.replicas.append(fresh)
    house.transport.hubs[fresh.replica_id] = fresh.hub


async def die_often(house: House, rng: random.Random, where: dict[str, int]) -> None:
    """Until it is cancelled. Each lives for some steps: a machine that is slow must not see more deaths."""
    while True:
        victim = rng.choice(house.replicas)
        last_step = victim.engine.num_steps + rng.randrange(5, 40)
        while victim.engine.num_steps < last_step and victim.engine.num_unfinished:
            await asyncio.sleep(0.002)
        if not victim.engine.num_unfinished:
            await asyncio.sleep(0.01)
            continue
        for sequence in list(victim.engine.engine.scheduler.sequences.values()):
            if not sequence.num_computed_tokens:
                place = "before"
            elif sequence.num_computed_tokens < sequence.num_prompt_tokens:
                place = "in"
            else:
                place = "after"
            where[place] += 1
            where["replays"] += bool(sequence.request.output_token_ids)
        await die(house, victim)
        where["deaths"] += 1


def test_deaths_leave_no_trace_in_the_bytes(house: House) -> None:
    items = make_items(len(KINDS), long_words=(60, 120), seed=1)
    for item in items:
        item.body |= {"max_tokens": 100} | ({"min_tokens": 60} if "min_tokens" in item.body else {})
    tokenizer = Tokenizer.from_directory(DEMO)

    async def drill() -> tuple[list[AnswerRead], list[AnswerRead], dict[str, int]]:
        for item in items:
            if item.kind.stops:
                choice = (await ask(house, item, stream=False)).choices[0]
                texts = [tokenizer.decode([token]) for token in choice.token_ids]
                item.body["stop"] = [stop_string(choice.text, texts, after_tokens=50)]
        expected = await ask_all(house, items, stream=False)
        where = dict.fromkeys(("before", "in", "after", "replays", "deaths"), 0)
        killer = asyncio.create_task(die_often(house, random.Random(1), where))
        try:
            answers = await ask_all(house, items, stream=True)
        finally:
            killer.cancel()
            await asyncio.wait({killer})
        return expected, answers, where

    expected, answers, where = asyncio.run_coroutine_threadsafe(drill(), house._loop).result()
    for item, one, other in zip(items, expected, answers, strict=True):
        assert other.error is None, (item.kind.name, other.error)
        assert one.canonical() == other.canonical(), (
            item.kind.name,
            first_difference(one.canonical(), other.canonical()),
        )
        assert len(other.ids) == 1
    assert where["deaths"] >= 5, where
    assert all(where.values()), where
    counters = house.service.failover.counters
    assert counters["resumed"] >= len(items)
    assert counters["given_up"] == counters["replica_killers"] == 0, counters
