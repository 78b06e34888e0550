"""Streams that lose their replica: what the reader sees, what is counted, who is refused and who is not."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from serve_app.api.failover import MAX_DEATHS_ON_TRIAL, SUSPECT_AFTER, TRIAL_TOKENS, Failover, FailoverLimits, Journey
from serve_app.api.json_body import parse_json
from serve_app.api.protocol import CompletionRequest
from serve_app.api.stream import GenerationStream
from serve_app.config import ServeArgs
from serve_app.engine.engine import Engine
from serve_app.engine.request import FinishReason, GenerateRequest, SamplingParams, TokenOutput
from serve_app.engine.sequence import Sequence
from serve_app.engine.simulated_runner import SimulatedRunner
from serve_app.errors import (
    ChannelLostError,
    DeviceLostError,
    EngineUnavailableError,
    IngressStoppingError,
    OverloadedError,
    ReplicaKillerError,
    ReplicaLostError,
    ServerDrainingError,
    SlowReaderError,
)
from serve_app.replica.load import load_engine
from serve_app.routing.leases import Lease, LeaseRequest
from tests.api.house import House, Replica
from tests.tiny_models import make_tiny_model

ENGINE = {"num_kv_blocks": 96, "max_model_len": 256, "max_num_batched_tokens": 64, "max_num_seqs": 16}
POISON = "kill!"


# ---- one stream's way ------------------------------------------------------------------------------------------------


def test_an_innocent_is_carried_on_and_a_killer_is_refused() -> None:
    async def test() -> None:
        failover = Failover()
        innocent, killer = Journey(failover), Journey(failover)
        for _ in range(SUSPECT_AFTER):  # both ran there
            for journey in (innocent, killer):
                await journey.begin_attempt()
                journey.lost(ReplicaLostError("planted"), 10)
        await killer.begin_attempt()
        waits = asyncio.create_task(innocent.begin_attempt())
        await asyncio.sleep(0)
        assert not waits.done()  # one suspect at a time
        killer.progress(10 + TRIAL_TOKENS - 1)
        assert failover.trial.locked()
        killer.lost(ReplicaLostError("planted"), 10 + TRIAL_TOKENS - 1)
        await waits
        assert innocent.is_moving
        innocent.progress(10 + TRIAL_TOKENS)
        assert not innocent.is_moving
        assert not failover.trial.locked()
        for _ in range(MAX_DEATHS_ON_TRIAL - 2):
            await killer.begin_attempt()
            killer.lost(ReplicaLostError("planted"), 13)
        await killer.begin_attempt()
        with pytest.raises(ReplicaKillerError, match=f"{SUSPECT_AFTER + MAX_DEATHS_ON_TRIAL} replicas in a row died"):
            killer.lost(ReplicaLostError("planted"), 13)
        assert not failover.trial.locked()
        assert failover.counters["replica_killers"] == 1
        assert failover.counters["resumed"] == 2

    asyncio.run(test())


def test_bounds_of_losses_and_of_time() -> None:
    async def test() -> None:
        failover = Failover(FailoverLimits(max_losses=3, max_seconds=0.02))
        journey = Journey(failover)
        for _ in range(5):
            journey.lost(ChannelLostError("the replica lives"), 0)
        assert journey.num_losses == 0
        journey.progress(1)
        assert journey.seconds_left is None
        journey.check_time("never")
        for _ in range(2):
            journey.lost(ReplicaLostError("planted"), 1)
        with pytest.raises(EngineUnavailableError, match="has lost 3 replicas"):
            journey.lost(ReplicaLostError("planted"), 1)
        async with failover.trial:  # another suspect, for ever
            with pytest.raises(EngineUnavailableError, match=r"within 0\.02 s: other requests"):
                await journey.begin_attempt()
        with pytest.raises(EngineUnavailableError, match=r"within 0\.02 s: no room"):
            journey.check_time("no room")
        assert failover.counters["given_up"] == 3

    asyncio.run(test())


# ---- one stream, with everything around it scripted ------------------------------------------------------------------


class Scripted:
    """Leases and Channels of one test: each lease is answered by the next script of what the replica says."""

    holder_id = "ingress"

    def __init__(self, *scripts: Any) -> None:
        self.scripts = list(scripts)
        self.wanted: list[LeaseRequest] = []
        self.submitted: list[list[GenerateRequest]] = []
        self.settled: list[tuple[str, int | None]] = []
        self.lost: list[str] = []
        self.fingerprints = ["a"] * 9

    async def lease(self, request: LeaseRequest) -> Lease:
        self.wanted.append(request)
        if isinstance(self.scripts[0], OverloadedError):
            raise self.scripts.pop(0)
        number = len(self.submitted)
        return Lease(f"lease{number}", f"replica{number}", 64, 1, self.fingerprints[number])

    def settle(self, lease: Lease, num_output_tokens: int | None) -> None:
        self.settled.append((lease.lease_id, num_output_tokens))

    def replica_lost(self, replica_id: str) -> None:
        self.lost.append(replica_id)

    def start(self, replica_id: str, requests: list[GenerateRequest], num_blocks: int, keep: object) -> ScriptedOutputs:
        self.submitted.append(requests)
        return ScriptedOutputs(self.scripts.pop(0))


class ScriptedOutputs:
    has_ended = True

    def __init__(self, script: list[Any]) -> None:
        self._script = script

    async def next(self) -> list[TokenOutput]:
        said = self._script.pop(0)
        if isinstance(said, Exception):
            raise said
        return list(said)

    def abort(self, choice_index: int | None = None) -> None:
        raise AssertionError("nothing is left to abort")


def out(choice: int, *token_ids: int, end: bool = False) -> TokenOutput:
    return TokenOutput("r", choice, token_ids, finish_reason=FinishReason.LENGTH if end else None)


def died(choice: int) -> TokenOutput:
    return TokenOutput(
        "r", choice, (), finish_reason=FinishReason.ERROR, error="the engine died", error_code="engine_unavailable"
    )


def read(world: Scripted, n: int = 1, failover: Failover | None = None) -> dict[int, list[int]]:
    sampling = SamplingParams(n=n, max_tokens=6, seed=1).resolved()

    async def collect() -> dict[int, list[int]]:
        requests = [GenerateRequest("r", (1, 2, 3), sampling, choice_index=i) for i in range(n)]
        stream = GenerationStream(requests, world, world, block_size=4, failover=failover)  # type: ignore[arg-type]
        tokens: dict[int, list[int]] = {i: [] for i in range(n)}
        async for batch in stream.batches():
            for output in batch:
                tokens[output.choice_index] += output.token_ids
        return tokens

    return asyncio.run(collect())


def test_what_came_in_the_same_message_as_the_end_of_the_engine_is_shown() -> None:
    """One choice's tokens, and behind them the other's news that the engine has died: nothing of it may be lost."""
    world = Scripted(
        [[out(0, 10), out(1, 20)], [out(0, 11), died(1), died(0)]], [[out(0, 12, end=True), out(1, 21, end=True)]]
    )
    assert read(world, n=2) == {0: [10, 11, 12], 1: [20, 21]}
    assert [request.output_token_ids for request in world.submitted[1]] == [(10, 11), (20,)]
    assert world.settled == [("lease0", None), ("lease1", 5)]


def test_an_engine_that_takes_nothing_is_a_lost_replica() -> None:
    world = Scripted([EngineUnavailableError("the engine has stopped")], [[out(0, 10, end=True)]])
    assert read(world) == {0: [10]}
    assert world.lost == ["replica0"]


@pytest.mark.parametrize("error", [IngressStoppingError("it ends"), ServerDrainingError("it ends")])
def test_the_end_of_the_ingress_is_no_death_of_a_replica(error: Exception) -> None:
    failover = Failover()
    world = Scripted([[out(0, 10)], error])
    with pytest.raises(type(error), match="it ends"):
        read(world, failover=failover)
    assert (world.lost, failover.counters) == ([], {})


def test_a_continuation_waits_where_a_new_request_is_refused() -> None:
    failover = Failover()
    world = Scripted([[out(0, 10)], ReplicaLostError("x")], OverloadedError("full"), [[out(0, 11, end=True)]])
    assert read(world, failover=failover) == {0: [10, 11]}
    assert [(r.is_continuation, r.not_on, r.fingerprint) for r in world.wanted] == [
        (False, frozenset(), None),
        (True, frozenset({"replica0"}), "a"),
        (True, frozenset(), "a"),
    ]
    assert failover.counters == {"lost": 1, "resumed": 1}
    with pytest.raises(OverloadedError):
        read(Scripted(OverloadedError("full")))


def test_other_numerics_are_counted() -> None:
    failover = Failover()
    world = Scripted([[out(0, 10)], ReplicaLostError("x")], [[out(0, 11)], [out(0, 12, end=True)]])
    world.fingerprints[1] = "b"
    assert read(world, failover=failover) == {0: [10, 11, 12]}
    assert failover.counters == {"lost": 1, "resumed": 1, "resumed_with_other_numerics": 1}


def test_fast_mode_is_counted() -> None:
    failover = Failover()
    world = Scripted([[out(0, 10)], ReplicaLostError("x")], [[out(0, 11)], [out(0, 12)], [out(0, 13, end=True)]])
    world.fingerprints = ["fast-a"] * 2
    assert read(world, failover=failover) == {0: [10, 11, 12, 13]}
    assert failover.counters["resumed_in_fast_mode"] == 1
    assert "resumed_with_other_numerics" not in failover.counters


# ---- the whole service -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("model"), vocab_size=300, eos=())


class Replacer:
    """A replica whose engine has died is lost, and another one takes its place, as Ray Serve does it."""

    def __init__(self, house: House, make_engine: Callable[[ServeArgs], Engine]) -> None:
        self.num_deaths = 0
        self._house = house
        self._make_engine = make_engine
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch)

    def __enter__(self) -> Replacer:
        self._thread.start()
        return self

    def __exit__(self, *failure: object) -> None:
        self._over.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._over.wait(0.01):
            for replica in [one for one in self._house.replicas if not one.engine.is_alive]:
                self.num_deaths += 1
                self._house.run(self._replace(replica))

    async def _replace(self, dead: Replica) -> None:
        house = self._house
        dead.reporter.cancel()
        house.transport.kill(dead.replica_id)
        house.replicas.remove(dead)
        fresh = Replica(f"{dead.replica_id}'", self._make_engine(house.args), house)
        house.replicas.append(fresh)
        house.transport.hubs[fresh.replica_id] = fresh.hub


def make_mortal_engine(args: ServeArgs) -> Engine:
    """Dies at the sixth token of an answer to POISON."""
    engine = load_engine(args)
    runner = engine.runner
    assert isinstance(runner, SimulatedRunner)

    def script(sequence: Sequence, index: int) -> int:
        if index == 5 and len(sequence.request.prompt_token_ids) == len(POISON):
            raise DeviceLostError("planted")
        return 97 + (len(sequence.request.prompt_token_ids) + index) % 26

    runner.script = script
    return engine


@pytest.fixture
def house(directory: Path) -> Iterator[House]:
    model = {"model": str(directory), "runner": "simulated", "simulated": {"seconds_per_step": 0.01}}
    with House({"model": model, "engine": ENGINE}, make_engine=make_mortal_engine) as made:
        yield made
        made.check_rest()


def ask(house: House, prompt: Any, max_tokens: int) -> tuple[list[int], str, dict[str, Any]]:
    """Token ids, finish reason and the error event's error of one stream."""
    body = {"prompt": prompt, "max_tokens": max_tokens, "stream": True, "return_token_ids": True}
    ids: list[int] = []
    reason, error = "", {}
    with httpx.stream("POST", house.url + "/v1/completions", json=body, timeout=60) as answer:
        for line in answer.iter_lines():
            if not line.startswith("data: ") or line == "data: [DONE]":
                continue
            event = parse_json(line[6:].encode())
            error = event.get("error", error)
            for choice in event.get("choices", ()):
                ids += choice["token_ids"]
                reason = choice["finish_reason"] or reason
    return ids, reason, error


def test_a_request_that_kills_replicas_is_refused_alone(house: House) -> None:
    """Both replicas die of it, again and again; twelve others that ran beside it get their whole answers."""
    prompts = [[1] * (8 + i) for i in range(12)]
    expected = [[97 + (len(prompt) + index) % 26 for index in range(150)] for prompt in prompts]
    with Replacer(house, make_mortal_engine) as replacer, ThreadPoolExecutor(13) as pool:
        others = [pool.submit(ask, house, prompt, 150) for prompt in prompts]
        house.wait_until(lambda: all(one.engine.num_unfinished >= 4 for one in house.replicas))
        ids, reason, error = ask(house, [1] * len(POISON), 20)
        assert (reason, error["code"]) == ("", "replica_killer")
        # The token before the end may go with each of the replicas, if its output was still on its way.
        assert ids in ([97 + (5 + i) % 26 for i in range(num)] for num in (4, 5))
        assert [one.result() for one in others] == [(ids, "length", {}) for ids in expected]
        assert ask(house, [1, 2, 3], 4)[1] == "length"
        assert 'kind="replica_killers"} 1' in httpx.get(house.url + "/metrics").text
        assert replacer.num_deaths == SUSPECT_AFTER + MAX_DEATHS_ON_TRIAL
    counters = house.service.failover.counters
    assert counters["replica_killers"] == 1
    assert counters["given_up"] == 0
    assert counters["resumed"] >= 12
    assert counters["trials"] > MAX_DEATHS_ON_TRIAL


@pytest.mark.parametrize("prompts", [[9], [9, 10, 11]], ids=["one prompt", "three prompts"])
def test_a_reader_that_does_not_read_is_cut_off(house: House, prompts: list[int]) -> None:
    """The engine is free again at once; whoever reads gets the error when it goes on."""
    house.channels.max_behind = 20
    body = {"prompt": [[1] * length for length in prompts], "max_tokens": 200, "stream": True}

    async def read() -> None:
        generation = await house.service.start(CompletionRequest.parse(json.dumps(body).encode()), "slow")
        chunks = generation.chunks()
        assert await anext(chunks)
        while any(replica.engine.num_unfinished for replica in house.replicas):
            await asyncio.sleep(0.01)
        assert sum(replica.engine.engine.recorder.num_steps for replica in house.replicas) < 180
        with pytest.raises(SlowReaderError, match="at most 20 are kept"):
            async for _ in chunks:
                pass

    house.run(read())
