"""Both ends of the channel: nothing lost, nothing twice, nothing left behind, whatever the transport does."""

from __future__ import annotations

import asyncio
import contextvars
import dataclasses
import random
import threading
from collections import Counter
from concurrent.futures import Future
from typing import Any

import pytest

from serve_app.engine.async_engine import AsyncEngine
from serve_app.engine.config import EngineConfig
from serve_app.engine.engine import Engine
from serve_app.engine.request import FinishReason, GenerateRequest, TokenOutput
from serve_app.engine.simulated_runner import SimulatedRunner
from serve_app.errors import (
    ChannelLostError,
    EngineUnavailableError,
    InvalidParameterError,
    InvalidPromptError,
    LeaseRefusedError,
    ReplicaDrainedError,
    ReplicaLostError,
    ReplicaUnreachableError,
    SlowReaderError,
)
from serve_app.replica import output_hub
from serve_app.replica.channel import Channels
from serve_app.replica.lease_table import LeaseTable
from serve_app.replica.messages import ChannelOptions
from serve_app.replica.output_hub import ChannelHub
from tests.engine.harness import EOS, VOCAB_SIZE, make_request
from tests.replica.channel_harness import (
    MAX_MODEL_LEN,
    FakeTransport,
    Service,
    Trouble,
    check_tokens,
    collect,
    leased,
    read_on,
    run_virtual,
    simple_request,
)

FOREVER = 190
"""Tokens that take some seconds."""


def test_the_tokens_of_many_requests_arrive_exactly() -> None:
    async def test() -> None:
        async with Service() as service:
            ingress = service.ingress()
            requests = [simple_request(f"r{i}", n=1 + i % 3, ignore_eos=False) for i in range(20)]
            outputs = await asyncio.gather(*(ingress.submit("replica0", r, 10) for r in requests))
            for request, some in zip(requests, await asyncio.gather(*map(collect, outputs)), strict=True):
                check_tokens(request, some)
            assert all(o.has_ended and o.error is None for o in outputs)
            assert service.tables[0].num_ended == 20
            # One stream for all of them, one message per step, few acknowledgements.
            assert service.transport.counts["outputs"] == service.transport.counts["open_channel"] == 1
            assert service.hubs[0].num_messages <= service.engines[0].engine.recorder.num_steps
            assert service.transport.counts["ack"] < 10

    run_virtual(test)


def test_a_lease_for_all_tokens_never_grows() -> None:
    """Found on a live cluster: a choice at its end has no next token, though another choice of the request still runs."""

    async def test() -> None:
        async with Service() as service:
            ingress = service.ingress()
            # Of eight places these take six, so that the choices of the next one do not end together.
            other = await ingress.submit("replica0", simple_request("other", max_tokens=30, n=6), 100)
            # 5 + 11 tokens fill four blocks; the first is shared.
            request = simple_request("a", max_tokens=11, n=3)
            outputs = await ingress.submit("replica0", request, 10)
            collected: list[TokenOutput] = []
            num_ended = set()
            while some := await outputs.next():
                collected += some
                num_ended.add(sum(output.finish_reason is not None for output in collected))
                service.hubs[0].grow_leases(4)
                assert [row.num_blocks for row in service.tables[0].rows()] in ([100, 10], [100], [10], [])
            check_tokens(request, collected)
            assert {0, 1, 3} <= num_ended
            await collect(other)

    run_virtual(test)


def test_everything_in_an_output_crosses() -> None:
    async def test() -> None:
        async with Service() as service:
            ingress = service.ingress()
            first = simple_request("a", max_tokens=9, prompt_logprobs=1, logprobs=2)
            await collect(await ingress.submit("replica0", first, 5))
            prompt = first[0].prompt_token_ids + tuple(range(10, 40))
            seen: list[list[TokenOutput]] = []
            sinks = service.engines[0].submit_to

            def spy(requests: list[GenerateRequest], sink: Any) -> Future[None]:
                def both(outputs: list[TokenOutput]) -> None:
                    seen.append(outputs)
                    sink(outputs)

                return sinks(requests, both)

            service.engines[0].submit_to = spy  # type: ignore[method-assign]
            for name in ("plain", "cached"):
                for options in (
                    {},
                    {"logprobs": 0},
                    {"logprobs": 3, "prompt_logprobs": 2},
                    {"stop_token_ids": [*range(60)]},
                ):
                    seen.clear()
                    request = leased(make_request(f"{name}{len(options)}{options}", prompt, max_tokens=9, **options))
                    got = await collect(await ingress.submit("replica0", request, 20))
                    assert got == [output for outputs in seen for output in outputs]
                    check_tokens(request, got)
            assert got[-1].finish_reason is FinishReason.STOP
            assert got[-1].num_cached_tokens > 0

    run_virtual(test)


def test_a_slow_reader_gets_its_outputs_gathered() -> None:
    """Outputs made before a stream is open are kept, and come in one message."""

    async def test() -> None:
        async with Service() as service:
            service.transport.hold = lambda _, method: method == "outputs" and service.transport.counts["outputs"] < 2
            ingress = service.ingress()
            request = simple_request("a", n=2, logprobs=1)
            outputs = await ingress.submit("replica0", request, 10)
            some = await collect(outputs)
            check_tokens(request, some)
            assert service.hubs[0].num_messages == 1
            assert len(some) == 2  # each choice merged into one output
            assert all(len(output.logprobs or ()) == len(output.token_ids) == 12 for output in some)

    run_virtual(test)


@pytest.mark.parametrize("seed", range(12))
def test_random_trouble_changes_no_token(seed: int) -> None:
    async def test() -> None:
        rng = random.Random(seed)
        trouble = Trouble(
            lost_calls=rng.choice((0.0, 0.1, 0.3)),
            lost_replies=rng.choice((0.0, 0.1, 0.3)),
            late_repeats=rng.choice((0.0, 0.2)),
            broken_streams=rng.choice((0.02, 0.1, 0.3)),
            orphans=rng.choice((0.0, 0.5, 1.0)),
            late_streams=rng.choice((0.0, 0.2)),
            max_delay=rng.choice((0.0, 0.03, 0.2)),
        )
        options = ChannelOptions(
            stream_messages=rng.choice((3, 50, 20_000)),
            window_messages=rng.choice((4, 256)),
            ack_messages=rng.choice((1, 2)),
            heartbeat_seconds=0.5,
            silence_seconds=1.2,
            lost_seconds=3.0,
            lease_seconds=5.0,
        )
        async with Service(num_replicas=2, seed=seed, trouble=trouble, options=options) as service:
            ingresses = [service.ingress(f"ingress{i}") for i in range(2)]
            totals: Counter[str] = Counter()
            await asyncio.gather(*(client(service, rng.choice(ingresses), f"r{i}", rng, totals) for i in range(24)))
            assert totals["ended"] == 24
            assert service.transport.counts["outputs"] >= service.transport.counts["open_channel"]
            await asyncio.gather(*(ingress.close() for ingress in ingresses))
            service.transport.trouble = Trouble()
        story = service.transport.counts
        assert story["error"] + story["cancelled"] + story["silent"] > 0, story

    run_virtual(test)


async def client(service: Service, ingress: Channels, name: str, rng: random.Random, totals: Counter[str]) -> None:
    """One request to its end, over as many attempts as it takes; some are aborted halfway."""
    await asyncio.sleep(rng.uniform(0.0, 2.0))
    requests = make_request(
        name, 6, n=rng.choice((1, 1, 3)), max_tokens=rng.randint(1, 40), ignore_eos=rng.random() < 0.5
    )
    aborts_after = rng.choice((None, None, None, rng.randint(0, 20)))
    left = {request.choice_index: request for request in requests}
    got: list[TokenOutput] = []
    for attempt in range(100):
        submitted = leased(list(left.values()), attempt)
        try:
            outputs = await ingress.submit(rng.choice(service.replica_ids), submitted, 12)
            if aborts_after == 0:
                outputs.abort()
            while left:
                for output in await outputs.next():
                    got.append(output)
                    before = left[output.choice_index]
                    left[output.choice_index] = dataclasses.replace(
                        before, output_token_ids=before.output_token_ids + output.token_ids
                    )
                    if output.finish_reason is not None:
                        del left[output.choice_index]
                if aborts_after is not None and len(got) >= aborts_after:
                    outputs.abort()
            assert await outputs.next() == []
            await outputs.ended()
            break
        except ReplicaLostError:
            totals["lost"] += 1
    totals["ended"] += not left
    ends = {output.choice_index: output.finish_reason for output in got if output.finish_reason is not None}
    whole = [request for request in requests if ends[request.choice_index] is not FinishReason.ABORT]
    totals["aborted"] += len(requests) - len(whole)
    assert aborts_after is not None or len(whole) == len(requests)
    check_tokens(whole, got)


def test_streams_are_opened_again_by_number_and_by_age() -> None:
    async def test(options: ChannelOptions) -> None:
        async with Service(options=options) as service:
            request = simple_request("a", max_tokens=50)
            check_tokens(request, await collect(await service.ingress().submit("replica0", request, 20)))
            assert 8 <= service.transport.counts["outputs"] <= 14
            assert service.transport.counts["open_channel"] == 1

    run_virtual(lambda: test(ChannelOptions(stream_messages=5)))
    run_virtual(lambda: test(ChannelOptions(stream_seconds=0.1)))


def test_unacknowledged_messages_come_again_and_arrive_once() -> None:
    async def test() -> None:
        # No acknowledgement by count, so that the whole stream is unacknowledged when it breaks.
        async with Service(options=ChannelOptions(ack_messages=1000)) as service:
            request = simple_request("a", max_tokens=30)
            outputs = await service.ingress().submit("replica0", request, 20)
            some = await outputs.next()
            for error in (ReplicaUnreachableError("planted"), asyncio.CancelledError()):
                some += await outputs.next()
                service.transport.break_streams("replica0", error)
            check_tokens(request, some + await collect(outputs))
            assert service.transport.counts["outputs"] == 3

    run_virtual(test)


def test_a_request_that_has_ended_was_accepted_though_no_reply_says_so() -> None:
    """Its channel ends with it here, before the reply to its submit has come."""

    async def test() -> None:
        async with Service(options=ChannelOptions(stream_messages=12)) as service:
            call = service.transport.call

            async def late(replica_id: str, method: str, *args: Any) -> Any:
                result = await call(replica_id, method, *args)
                if method == "submit_all":
                    await asyncio.Event().wait()
                return result

            service.transport.call = late  # type: ignore[method-assign]
            ingress = service.ingress()
            outputs = await ingress.submit("replica0", simple_request("a", max_tokens=12), 20)
            check_tokens(simple_request("a", max_tokens=12), await collect(outputs))

    run_virtual(test)


def test_a_hub_sends_from_the_number_it_is_asked_for() -> None:
    async def test() -> None:
        async with Service() as service:
            hub = service.hubs[0]
            channel = hub.open_channel("ingress")
            await hub.submit(channel, 0, simple_request("a", max_tokens=6), 5)
            first = [await anext(stream) for stream in [hub.outputs(channel, 0)] for _ in range(6)]
            assert [message[0] for message in first] == [1, 2, 3, 4, 5, 6]
            for after in (0, 3, 5):
                stream = hub.outputs(channel, after)
                again = [await anext(stream) for _ in range(6 - after)]
                assert again == first[after:]
                await stream.aclose()
            late = hub.outputs(channel, 1)  # older than what is acknowledged: nothing from then is sent again
            assert (await anext(late)) == first[5]
            with pytest.raises(ChannelLostError, match="message 7 was never sent"):
                await anext(hub.outputs(channel, 7))
            hub.ack(channel, 6)
            assert hub.num_unread_tokens == 0
            hub.close_channel(channel)
            with pytest.raises(StopAsyncIteration):
                await anext(late)

    run_virtual(test)


def test_an_idle_stream_beats() -> None:
    async def test() -> None:
        async with Service() as service:
            hub = service.hubs[0]
            stream = hub.outputs(hub.open_channel("ingress"), 0)
            started = service.loop.time()
            beats = [await anext(stream) for _ in range(5)]
            assert beats == [(0, (), ())] * 5
            assert service.loop.time() - started <= 6 * service.options.heartbeat_seconds

            # And an ingress with nothing to say keeps its channel, until the stream has reached its age.
            ingress = service.ingress()
            await collect(await ingress.submit("replica0", simple_request("a"), 5))
            await asyncio.sleep(service.options.stream_seconds - 50)
            await collect(await ingress.submit("replica0", simple_request("b"), 5))
            assert service.transport.counts["outputs"] == 1
            await asyncio.sleep(60)
            assert ingress.replica_ids == []
            await collect(await ingress.submit("replica0", simple_request("c"), 5))
            assert service.transport.counts["open_channel"] == 2

    run_virtual(test)


def test_a_submit_that_comes_twice_runs_once() -> None:
    async def test() -> None:
        async with Service() as service:
            hub, engine = service.hubs[0], service.engines[0]
            channel = hub.open_channel("ingress")
            request = simple_request("a", max_tokens=4)
            await asyncio.gather(*(hub.submit(channel, 7, request, 5) for _ in range(3)))
            await hub.submit(channel, 7, request, 5)
            stream = hub.outputs(channel, 0)
            messages = [await anext(stream) for _ in range(4)]
            assert [message[1][::2] for message in messages[:3]] == [(7,)] * 3
            await hub.submit(channel, 7, request, 5)  # it has ended
            assert engine.num_submits == 1
            assert hub.num_live == 0

            # A refused one is judged again each time, and leaves nothing.
            bad = [dataclasses.replace(request[0], prompt_token_ids=())]
            for _ in range(2):
                with pytest.raises(InvalidPromptError):
                    await hub.submit(channel, 8, bad, 5)
            assert engine.num_refused == 2
            assert service.tables[0].rows() == ()
            with pytest.raises(InvalidParameterError, match="lease_id"):
                await hub.submit(channel, 9, make_request("b", 3), 5)

    run_virtual(test)


def test_outputs_may_come_before_the_news_that_the_request_was_accepted() -> None:
    """An engine thread is fast: all is over before submit_to has returned to the loop."""

    class Fast:
        def submit_to(self, requests: list[GenerateRequest], sink: Any) -> Future[None]:
            future: Future[None] = Future()
            future.set_result(None)
            sink([TokenOutput(request.request_id, request.choice_index, (5,)) for request in requests])
            end = FinishReason.LENGTH
            sink([TokenOutput(r.request_id, r.choice_index, (6,), finish_reason=end) for r in requests])
            return future

        def abort(self, request_id: str, choice_index: int | None = None) -> None: ...

    async def test() -> None:
        transport = FakeTransport(random.Random(0))
        table = LeaseTable(10)
        transport.hubs["x"] = ChannelHub(Fast(), table, asyncio.get_running_loop())
        ingress = Channels(transport, "ingress")
        outputs = await ingress.submit("x", simple_request("a", n=2), 5)
        some = await collect(outputs)
        assert [token for output in some if output.choice_index == 1 for token in output.token_ids] == [5, 6]
        assert table.num_ended == 1
        await ingress.close()
        await transport.close()

    run_virtual(test)


def test_an_abort_may_overtake_its_submit() -> None:
    async def test() -> None:
        async with Service() as service:
            hub = service.hubs[0]
            channel = hub.open_channel("ingress")
            hub.ack(channel, 0, [1, 3])
            await hub.submit(channel, 0, simple_request("a", n=3, max_tokens=FOREVER), 100)
            await hub.submit(channel, 3, simple_request("b", max_tokens=FOREVER), 50)
            stream = hub.outputs(channel, 0)
            ends: dict[int, str] = {}
            while len(ends) < 2:
                ends.update({entry[0]: entry[4] for entry in (await anext(stream))[2] if entry[4]})
            assert ends == {1: "abort", 3: "abort"}
            assert hub.num_live == 1  # the choices 0 and 2 of the first go on
            hub.ack(channel, 0, [0, 2, 0, 99])
            while len(ends) < 4:
                ends.update({entry[0]: entry[4] for entry in (await anext(stream))[2] if entry[4]})
            assert hub.num_live == 0

    run_virtual(test)


def test_aborts_end_a_request_and_its_lease() -> None:
    async def test() -> None:
        async with Service() as service:
            ingress, table = service.ingress(), service.tables[0]
            outputs = await ingress.submit("replica0", simple_request("a", n=3, max_tokens=FOREVER), 50)
            some = await outputs.next()
            outputs.abort(1)
            outputs.abort(1)
            while not any(output.finish_reason for output in some):
                some += await outputs.next()
            assert [o.choice_index for o in some if o.finish_reason is FinishReason.ABORT] == [1]
            assert len(table.rows()) == 1
            outputs.abort()
            outputs.abort()
            await outputs.ended()
            assert outputs.error is None
            assert table.rows() == ()
            some += await collect(outputs)
            assert Counter(output.finish_reason for output in some)[FinishReason.ABORT] == 3
            outputs.abort()
            assert service.engines[0].num_aborts == 3

    run_virtual(test)


def test_a_caller_that_is_cancelled_aborts_and_can_still_wait_for_the_end() -> None:
    async def test() -> None:
        async with Service() as service:
            ingress = service.ingress()
            service.engines[0].pause()
            await ingress.submit("replica0", simple_request("first", max_tokens=1), 5)
            waiting = asyncio.create_task(ingress.submit("replica0", simple_request("a", max_tokens=FOREVER), 50))
            await asyncio.sleep(0)
            waiting.cancel()
            with pytest.raises(asyncio.CancelledError):
                await waiting
            outputs = ingress.start("replica0", simple_request("b", max_tokens=FOREVER), 50)
            outputs.abort()
            service.engines[0].resume()
            await outputs.ended()
            assert (await collect(outputs))[-1].finish_reason is FinishReason.ABORT
            await outputs.accepted()
        assert service.tables[0].num_ended == 3

    run_virtual(test)


def test_an_abort_whose_call_is_lost_is_made_again() -> None:
    async def test() -> None:
        async with Service() as service:
            outputs = await service.ingress().submit("replica0", simple_request("a", max_tokens=FOREVER), 50)
            service.transport.trouble.lost_calls = 1.0
            outputs.abort()
            while service.transport.counts["lost_calls"] < 5:
                await outputs.next()
            service.transport.trouble.lost_calls = 0.0
            await outputs.ended()
            assert (await collect(outputs))[-1].finish_reason is FinishReason.ABORT

    run_virtual(test)


def test_refusals_reach_the_caller_and_leave_nothing() -> None:
    async def test() -> None:
        async with Service(pool_blocks=20) as service:
            ingress = service.ingress()
            with pytest.raises(LeaseRefusedError, match="30"):
                await ingress.submit("replica0", simple_request("a"), 30)
            with pytest.raises(InvalidParameterError, match="max_num_seqs"):
                await ingress.submit("replica0", simple_request("b", n=9), 10)
            outputs = ingress.start("replica0", simple_request("c", n=9), 10)
            await outputs.ended()
            with pytest.raises(InvalidParameterError):
                await outputs.next()
            with pytest.raises(ReplicaLostError, match="no replica nobody"):
                await ingress.submit("nobody", simple_request("d"), 10)
            assert ingress.replica_ids == ["replica0"]
            request = simple_request("e")
            check_tokens(request, await collect(await ingress.submit("replica0", request, 20)))

    run_virtual(test)


def test_a_killed_replica_is_heard_of_at_once_after_what_it_sent() -> None:
    async def test() -> None:
        async with Service(num_replicas=2) as service:
            ingress = service.ingress()
            request = simple_request("a", max_tokens=40)
            outputs = await ingress.submit("replica0", request, 20)
            other = await ingress.submit("replica1", simple_request("b", max_tokens=40), 20)
            waiting = [ingress.start("replica0", simple_request(f"w{i}", max_tokens=FOREVER), 50) for i in range(3)]
            some = await outputs.next()
            while len(some) < 10:
                some += await outputs.next()
            killed_at = service.loop.time()
            service.transport.kill("replica0")
            with pytest.raises(ReplicaLostError, match="died"):
                await read_on(outputs, some)
            await asyncio.gather(*(w.ended() for w in waiting), outputs.ended())
            assert all(isinstance(w.error, ReplicaLostError) for w in waiting)
            assert service.loop.time() - killed_at < 0.1
            outputs.abort()  # nothing happens
            assert ingress.replica_ids == ["replica1"]

            tokens = tuple(token for output in some for token in output.token_ids)
            rest = leased([dataclasses.replace(request[0], output_token_ids=tokens)], attempt=1)
            check_tokens(request, some + await collect(await ingress.submit("replica1", rest, 20)))
            assert (await collect(other))[-1].finish_reason is FinishReason.LENGTH

    run_virtual(test)


def test_a_replica_that_says_nothing_is_lost_in_time() -> None:
    async def test() -> None:
        async with Service() as service:
            ingress = service.ingress()
            outputs = await ingress.submit("replica0", simple_request("a", max_tokens=FOREVER), 50)
            await outputs.next()
            service.transport.hold = lambda *_: True
            hub, service.transport.hubs = service.transport.hubs, {}
            for queue in service.transport._breaks["replica0"]:
                queue.get = asyncio.Event().wait  # type: ignore[method-assign, assignment]
            started = service.loop.time()
            with pytest.raises(ReplicaLostError, match="silent"):
                await read_on(outputs, [])
            waited = service.loop.time() - started
            assert service.options.lost_seconds <= waited <= service.options.lost_seconds + 2.0
            service.transport.hold = lambda *_: False
            service.transport.hubs = hub

    run_virtual(test)


def test_a_loop_that_stood_still_does_not_take_the_replica_for_lost() -> None:
    async def test() -> None:
        async with Service() as service:
            outputs = await service.ingress().submit("replica0", (request := simple_request("a", max_tokens=60)), 50)
            some = await outputs.next()
            service.loop.now += 60.0  # type: ignore[attr-defined]
            check_tokens(request, some + await collect(outputs))
            assert service.transport.counts["open_channel"] == 1

    run_virtual(test)


def test_an_ingress_that_died_is_given_up_and_its_leases_are_freed() -> None:
    async def test() -> None:
        async with Service() as service:
            dead, alive = service.ingress("dead"), service.ingress("alive")
            outputs = await dead.submit("replica0", simple_request("a", max_tokens=FOREVER), 60)
            request = simple_request("b", max_tokens=FOREVER)
            living = await alive.submit("replica0", request, 60)
            some = await living.next()
            service.engines[0].pause()
            assert {row.holder_id for row in service.tables[0].rows()} == {"dead", "alive"}
            # Its process is gone: nothing is called any more, and its stream is an orphan that goes on.
            for task in dead._tasks:
                task.cancel()
            dead._channels.clear()
            died_at = service.loop.time()
            while service.hubs[0].num_channels == 2:
                await asyncio.sleep(0.5)
            assert 0 <= service.loop.time() - died_at - service.options.lease_seconds < 3.0
            service.engines[0].resume()
            while service.tables[0].num_ended == 0:
                await asyncio.sleep(0.1)
            assert {row.holder_id for row in service.tables[0].rows()} == {"alive"}
            check_tokens(request, some + await collect(living))
            assert not outputs.has_ended

    run_virtual(test)


def test_an_ingress_that_was_given_up_hears_of_it_when_it_comes_back() -> None:
    async def test() -> None:
        async with Service() as service:
            ingress = service.ingress()
            service.engines[0].pause()
            outputs = await ingress.submit("replica0", simple_request("a", max_tokens=FOREVER), 60)
            service.hubs[0]._drop(next(iter(service.hubs[0]._channels.values())))
            await outputs.ended()
            with pytest.raises(ChannelLostError, match="not known"):
                await outputs.next()
            service.engines[0].resume()
            request = leased(make_request("a", 5, max_tokens=12), attempt=1)
            check_tokens(request, await collect(await ingress.submit("replica0", request, 60)))
            assert service.transport.counts["open_channel"] == 2

    run_virtual(test)


def test_a_stalled_ingress_keeps_bounded_memory_and_its_requests_end() -> None:
    async def test() -> None:
        options = ChannelOptions(window_messages=5, ack_messages=2, max_unread_tokens=40)
        async with Service(options=options) as service:
            hub, engine = service.hubs[0], service.engines[0]
            channel = hub.open_channel("stalled")
            other = service.ingress("other")
            await hub.submit(channel, 0, simple_request("a", max_tokens=FOREVER), 50)
            stream = hub.outputs(channel, 0)
            for _ in range(5):
                await anext(stream)
            request = simple_request("b", max_tokens=100)
            fine = asyncio.create_task(collect(await other.submit("replica0", request, 50)))
            largest = 0
            while hub.num_live == 2:
                await asyncio.sleep(0.01)
                largest = max(largest, next(iter(hub._channels.values())).outbox.size)
                hub.ack(channel, 0)  # it lives
            assert 40 < largest <= 45
            assert engine.num_aborts == 1
            hub.ack(channel, 5)
            number, _, rich = await anext(stream)
            assert number == 6  # all the rest came in one
            key, tokens, *_, error, code, _ = rich[0]
            assert (key, code) == (0, "ingress_stalled")
            assert "at most 40 are kept" in error
            assert 30 < len(tokens) <= 40
            check_tokens(request, await fine)

    run_virtual(test)


def test_a_later_attempt_takes_the_place_of_an_earlier_one() -> None:
    """The ingress lost sight of the replica, which goes on: the same request comes back in another channel."""

    async def test() -> None:
        async with Service() as service:
            hub, table = service.hubs[0], service.tables[0]
            old = hub.open_channel("ingress")
            await hub.submit(old, 0, simple_request("a", n=2, max_tokens=FOREVER), 50)
            await asyncio.sleep(0.5)
            ingress = service.ingress()
            second = leased(make_request("a", 5, n=2, max_tokens=30), attempt=1)
            outputs = await ingress.submit("replica0", second, 50)
            hub.ack(old, 0, [0, 1])  # aborts of the old one do not reach the new one
            hub.close_channel(old)
            check_tokens(second, await collect(outputs))
            assert table.num_ended == 2
            # Two at once under one id and attempt: the engine refuses the second.
            first = await ingress.submit("replica0", simple_request("b", max_tokens=30), 10)
            twin = [dataclasses.replace(simple_request("b", max_tokens=30)[0], lease_id="another")]
            with pytest.raises(InvalidParameterError, match="unique"):
                await ingress.submit("replica0", twin, 10)
            check_tokens(simple_request("b", max_tokens=30), await collect(first))

    run_virtual(test)


def test_an_engine_that_dies_is_an_error_for_everyone() -> None:
    async def test() -> None:
        async with Service() as service:
            ingresses = [service.ingress(f"ingress{i}") for i in range(2)]
            outputs = [await i.submit("replica0", simple_request(f"{i.ingress_id}", n=2), 10) for i in ingresses]
            queued = ingresses[0].start("replica0", simple_request("queued"), 10)
            await asyncio.sleep(0)
            service.engines[0].die()
            for some in await asyncio.gather(*map(collect, outputs)):
                ends = [output for output in some if output.finish_reason is not None]
                assert [(end.finish_reason, end.error_code) for end in ends] == [("error", "engine_unavailable")] * 2
            with pytest.raises(EngineUnavailableError, match="planted"):
                await queued.accepted()
            with pytest.raises(EngineUnavailableError):
                await ingresses[1].submit("replica0", simple_request("late"), 10)

    run_virtual(test)


def test_a_draining_replica_ends_each_stream_with_its_last_choice() -> None:
    async def test() -> None:
        async with Service() as service:
            hub, transport = service.hubs[0], service.transport
            idle, short, long = (service.ingress(name) for name in ("idle", "short", "long"))
            await collect(await idle.submit("replica0", simple_request("a"), 5))
            requests = [simple_request("short", max_tokens=10), simple_request("long", max_tokens=90)]
            outputs = [await i.submit("replica0", r, 30) for i, r in zip((short, long), requests, strict=True)]
            assert transport.num_streams("replica0") == 3
            hub.start_draining()
            assert not hub.is_drained
            check_tokens(requests[0], await collect(outputs[0]))
            await asyncio.sleep(0.1)
            assert (idle.replica_ids, short.replica_ids, long.replica_ids) == ([], [], ["replica0"])
            assert transport.num_streams("replica0") == 1
            # A lease granted before it was known still runs, in a new stream.
            late = simple_request("late", max_tokens=5)
            check_tokens(late, await collect(await idle.submit("replica0", late, 5)))
            check_tokens(requests[1], await collect(outputs[1]))
            await asyncio.sleep(0.1)
            assert transport.num_streams("replica0") == 0
            assert hub.is_drained

    run_virtual(test)


def test_what_is_left_at_the_end_of_a_drain_goes_elsewhere() -> None:
    async def test() -> None:
        async with Service() as service:
            hub = service.hubs[0]
            ingresses = [service.ingress(f"ingress{i}") for i in range(2)]
            whole = simple_request("whole", max_tokens=4)
            done = await ingresses[0].submit("replica0", whole, 5)
            left = [
                await i.submit("replica0", simple_request(i.ingress_id, max_tokens=FOREVER, n=2), 50) for i in ingresses
            ]
            check_tokens(whole, await collect(done))
            hub.start_draining()
            assert hub.end_drain() == 2
            for some in await asyncio.gather(*map(collect, left)):
                ends = [output for output in some if output.finish_reason is not None]
                assert [(end.finish_reason, end.error_code) for end in ends] == [("error", "replica_drained")] * 2
                assert sum(len(output.token_ids) for output in some) >= 2
            with pytest.raises(ReplicaDrainedError, match="takes nothing any more"):
                await ingresses[0].submit("replica0", simple_request("late"), 5)
            await asyncio.sleep(0.1)
            assert hub.is_drained
            assert service.transport.num_streams("replica0") == 0
            assert hub.end_drain() == 0

    run_virtual(test)


def test_close_ends_everything() -> None:
    async def test() -> None:
        async with Service() as service:
            ingress = service.ingress()
            outputs = await ingress.submit("replica0", simple_request("a", max_tokens=FOREVER), 50)
            await outputs.next()
            await ingress.close()
            with pytest.raises(ReplicaLostError, match="stopping"):
                await collect(outputs)
            with pytest.raises(ReplicaLostError, match="stopping"):
                ingress.start("replica0", simple_request("b"), 50)
            assert service.hubs[0].num_channels == 0
            unopened = service.ingress("unopened")
            late = unopened.start("replica0", simple_request("c"), 50)
            await unopened.close()
            assert isinstance(late.error, ReplicaLostError)

    run_virtual(test)


def test_all_calls_are_made_in_an_empty_context() -> None:
    variable: contextvars.ContextVar[str] = contextvars.ContextVar("request", default="none")

    async def test() -> None:
        async with Service() as service:
            seen: dict[str, str] = {}
            call, stream = service.transport.call, service.transport.stream

            def spy_call(replica_id: str, method: str, *args: Any) -> Any:
                seen[method] = variable.get()
                return call(replica_id, method, *args)

            def spy_stream(replica_id: str, method: str, *args: Any) -> Any:
                seen[method] = variable.get()
                return stream(replica_id, method, *args)

            service.transport.call, service.transport.stream = spy_call, spy_stream  # type: ignore[method-assign]
            variable.set("a client's request")
            ingress = service.ingress()
            outputs = await ingress.submit("replica0", simple_request("a", max_tokens=FOREVER), 50)
            outputs.abort()
            await collect(outputs)
            await ingress.close()
        assert seen == dict.fromkeys(("open_channel", "submit_all", "outputs", "ack", "close_channel"), "none")

    run_virtual(test)


def test_what_is_remembered_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(output_hub, "MAX_REMEMBERED", 10)

    async def test() -> None:
        async with Service() as service:
            hub = service.hubs[0]
            channel = hub.open_channel("ingress")
            for i in range(30):
                await hub.submit(channel, i, simple_request(f"r{i}", max_tokens=1), 2)
                hub.ack(channel, 0, [1000 + i])
            while hub.num_live:
                await asyncio.sleep(0.1)
            state = hub._channels[channel]
            assert list(state.ended) == list(range(20, 30))
            assert len(state.early_aborts) == 10

    run_virtual(test)


def test_with_the_engine_on_its_own_thread() -> None:
    """The real AsyncEngine and a real loop; trouble in the transport; the engine stops at the end."""

    num_threads = threading.active_count()

    async def test() -> None:
        runner = SimulatedRunner(
            num_kv_blocks=500,
            block_size=4,
            max_model_len=MAX_MODEL_LEN,
            vocab_size=VOCAB_SIZE,
            eos_token_ids=frozenset({EOS}),
            max_steps_in_flight=2,
            verify=True,
        )
        engine = AsyncEngine(Engine(EngineConfig(block_size=4, max_num_seqs=16, max_num_batched_tokens=64), runner))
        engine.start()
        try:
            table = LeaseTable(1000)
            # The orphans' streams and lost calls are found by these times.
            options = ChannelOptions(silence_seconds=0.2, heartbeat_seconds=0.05, stream_messages=10, ack_messages=3)
            hub = ChannelHub(engine, table, asyncio.get_running_loop(), options)
            trouble = Trouble(broken_streams=0.05, orphans=0.5, lost_replies=0.1, late_streams=0.1)
            transport = FakeTransport(random.Random(5), trouble)
            transport.hubs["x"] = hub
            ingress = Channels(transport, "ingress", options)

            async def one(request: list[GenerateRequest]) -> list[TokenOutput]:
                return await collect(await ingress.submit("x", request, 16))

            num_rounds = 0
            while transport.counts["outputs"] <= 3:  # how many messages a round takes is the clock's choice
                num_rounds += 1
                assert num_rounds <= 50
                requests = [simple_request(f"r{num_rounds}.{i}", n=1 + i % 2, max_tokens=25) for i in range(30)]
                for request, some in zip(requests, await asyncio.gather(*map(one, requests)), strict=True):
                    check_tokens(request, some)
            trouble.lost_replies = trouble.broken_streams = 0.0
            last = await ingress.submit("x", simple_request("last", max_tokens=FOREVER), 50)
            stopped: asyncio.Future[bool] = asyncio.get_running_loop().run_in_executor(None, engine.stop)  # type: ignore[assignment]
            end = (await collect(last))[-1]
            assert end.finish_reason in (FinishReason.ERROR, FinishReason.LENGTH)
            assert await stopped
            await ingress.close()
            await transport.close()
            assert hub.num_live == 0
            assert table.rows() == ()
        finally:
            engine.stop()
        assert threading.active_count() <= num_threads + 5

    asyncio.run(test())


def test_a_consumer_that_does_not_read_is_cut_off() -> None:
    """Its request is ended, what waited is dropped, and it hears why; one beside it that reads loses nothing."""

    async def test() -> None:
        async with Service() as service:
            ingress = service.ingress()
            ingress.max_behind = 20
            slow = await ingress.submit("replica0", simple_request("slow", max_tokens=FOREVER), 50)
            request = simple_request("quick", max_tokens=60)
            quick = await ingress.submit("replica0", request, 50)
            check_tokens(request, await collect(quick))
            await slow.ended()
            assert len(slow._arrived) <= 20
            with pytest.raises(SlowReaderError, match=r"21 tokens wait for this client.*at most 20"):
                await slow.next()

    run_virtual(test)


def test_a_hung_replica_hears_that_its_channel_is_closed_when_it_goes_on() -> None:
    async def test() -> None:
        async with Service(options=ChannelOptions(lease_seconds=60.0)) as service:
            ingress = service.ingress()
            outputs = await ingress.submit("replica0", simple_request("a", max_tokens=FOREVER), 50)
            await outputs.next()
            service.transport.hold = lambda *_: True
            for queue in service.transport._breaks["replica0"]:
                queue.get = asyncio.Event().wait  # type: ignore[method-assign, assignment]
            with pytest.raises(ReplicaLostError, match="silent"):
                await read_on(outputs, [])
            assert service.hubs[0].num_channels == 1
            await asyncio.sleep(2.5 * service.options.call_seconds)
            service.transport.hold = lambda *_: False
            started = service.loop.time()
            while service.hubs[0].num_live:
                await asyncio.sleep(0.01)
            # Told, and not by its own patience with a silent ingress.
            assert service.transport.counts["close_channel"] >= 2
            assert service.loop.time() - started < 2 * service.options.call_seconds

    run_virtual(test)
