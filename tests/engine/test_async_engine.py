"""AsyncEngine: nothing is lost between threads and loops. Steps are held by a gate, never by a sleep."""

from __future__ import annotations

import asyncio
import gc
import random
import threading
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from serve_app.engine.async_engine import AsyncEngine, OutputStream
from serve_app.engine.config import EngineConfig
from serve_app.engine.engine import Engine
from serve_app.engine.request import FinishReason, GenerateRequest, SamplingParams, TokenOutput
from serve_app.engine.scheduler import SchedulerOutput
from serve_app.engine.simulated_runner import SimulatedRunner, SimulatedStep
from serve_app.errors import EngineUnavailableError, InvalidParameterError, InvalidPromptError

FOREVER = 600
"""Tokens that no test waits for."""


class Gate:
    """The cost of a step: it ends when the test lets it. ``entered`` counts the steps that wait or have passed."""

    def __init__(self) -> None:
        self._permits = threading.Semaphore(0)
        self._entered = threading.Semaphore(0)
        self.is_open = False

    def sleep(self, seconds: float) -> None:
        self._entered.release()
        if not self.is_open:
            self._permits.acquire()

    def wait_until_in_step(self) -> None:
        self._entered.acquire()

    def let_pass(self) -> None:
        self._permits.release()

    def open(self) -> None:
        self.is_open = True
        self._permits.release()


class Pace:
    """The cost of a step: the event loop goes round a few times, so that consumers act while their requests run."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop

    def sleep(self, seconds: float) -> None:
        went_round = threading.Event()

        def go_round(num_left: int) -> None:
            if num_left == 0:
                went_round.set()
            else:
                self._loop.call_soon(go_round, num_left - 1)

        self._loop.call_soon_threadsafe(go_round, 4)
        went_round.wait()


def make_engine(
    *, steps_in_flight: int = 1, gate: Gate | Pace | None = None, runner: SimulatedRunner | None = None
) -> Engine:
    config = EngineConfig(block_size=4, max_num_seqs=7, max_num_batched_tokens=29)
    runner = runner or SimulatedRunner(
        num_kv_blocks=997,
        block_size=4,
        max_model_len=1000,
        vocab_size=997,
        max_steps_in_flight=steps_in_flight,
        seconds_per_step=0.0 if gate is None else 1.0,
        sleep=(lambda seconds: None) if gate is None else gate.sleep,
        verify=not isinstance(gate, Gate),
    )
    return Engine(config, runner)


def make_request(
    name: str, *, num_prompt: int = 5, max_tokens: int = 6, n: int = 1, remaining_ms: float | None = None
) -> list[GenerateRequest]:
    sampling = SamplingParams(n=n, max_tokens=max_tokens, seed=len(name)).resolved()
    prompt = tuple((i * 7 + len(name) + ord(name[-1])) % 997 for i in range(num_prompt))
    return [
        GenerateRequest(name, prompt, sampling, choice_index=choice, remaining_ms=remaining_ms) for choice in range(n)
    ]


def tokens_alone(requests: list[GenerateRequest]) -> dict[int, list[int]]:
    """Choice -> tokens when nothing else runs."""
    engine = make_engine()
    engine.add(requests)
    tokens: dict[int, list[int]] = {request.choice_index: [] for request in requests}
    while engine.has_work:
        for output in engine.step():
            tokens[output.choice_index] += output.token_ids
    return tokens


async def collect(stream: OutputStream) -> list[TokenOutput]:
    return [output async for output in stream]


class Started:
    """Starts engines, and stops them at the end of the test with their gate open."""

    def __init__(self) -> None:
        self._all: list[tuple[AsyncEngine, Gate | None]] = []

    def __call__(self, engine: Engine, gate: Gate | None = None) -> AsyncEngine:
        async_engine = AsyncEngine(engine)
        async_engine.start()
        self._all.append((async_engine, gate))
        return async_engine

    def stop_all(self) -> None:
        for async_engine, gate in self._all:
            if gate is not None:
                gate.open()
            assert async_engine.stop()
            assert not async_engine.is_alive


@pytest.fixture
def started() -> Iterator[Started]:
    started = Started()
    yield started
    started.stop_all()


@pytest.mark.parametrize("steps_in_flight", [1, 2])
def test_200_concurrent_requests_with_random_aborts_end_exactly_once(steps_in_flight: int, started: Started) -> None:
    rng = random.Random(20 + steps_in_flight)
    requests = [
        make_request(f"r{i}", num_prompt=rng.randint(1, 40), max_tokens=rng.randint(1, 23), n=rng.choice((1, 1, 3)))
        for i in range(200)
    ]
    plans = [rng.choice(("read", "read", "abort", "abort one choice", "cancel", "drop")) for _ in requests]
    ends: Counter[tuple[str, int]] = Counter()
    reasons: Counter[FinishReason] = Counter()

    async def client(engine: AsyncEngine, request: list[GenerateRequest], plan: str) -> None:
        name = request[0].request_id
        got: dict[int, list[int]] = {choice.choice_index: [] for choice in request}
        stop_after = rng.randint(0, 8)
        stream = await engine.submit(request)
        num_seen = 0
        async for output in stream:
            got[output.choice_index] += output.token_ids
            if output.finish_reason is not None:
                ends[name, output.choice_index] += 1
                reasons[output.finish_reason] += 1
            num_seen += 1
            if num_seen == stop_after and plan.startswith("abort"):
                engine.abort(name, 0 if plan == "abort one choice" else None)
            elif num_seen == stop_after and plan == "drop":
                return
            elif num_seen == stop_after and plan == "cancel":
                raise asyncio.CancelledError
        expected = tokens_alone(request)
        for choice, tokens in got.items():
            assert tokens == expected[choice][: len(tokens)]
            assert plan.startswith("abort") or len(tokens) == len(expected[choice])
        assert all(ends[name, choice] == 1 for choice in got)

    async def main() -> AsyncEngine:
        pace = Pace(asyncio.get_running_loop())
        engine = started(make_engine(steps_in_flight=steps_in_flight, gate=pace))
        clients = [client(engine, request, plan) for request, plan in zip(requests, plans, strict=True)]
        results = await asyncio.gather(*clients, return_exceptions=True)
        assert [r for r in results if r is not None and not isinstance(r, asyncio.CancelledError)] == []
        del results  # the tracebacks of the cancelled hold their streams
        gc.collect()
        assert await asyncio.to_thread(engine.drain)
        return engine

    engine = asyncio.run(main())
    assert engine.num_unfinished == 0
    engine.engine.scheduler.check_invariants()
    assert engine.engine.scheduler.pool.num_used_blocks == 0
    assert set(ends.values()) == {1}
    assert min(reasons[FinishReason.LENGTH], reasons[FinishReason.ABORT]) > 10
    assert engine.is_alive


def test_one_wake_up_per_step_and_loop(started: Started) -> None:
    gate = Gate()
    engine = started(make_engine(gate=gate), gate)
    num_deliveries = 0

    async def main() -> list[list[TokenOutput]]:
        nonlocal num_deliveries
        loop = asyncio.get_running_loop()
        call_soon_threadsafe = loop.call_soon_threadsafe

        def counting(callback, *args, **kwargs):  # type: ignore[no-untyped-def]
            nonlocal num_deliveries
            num_deliveries += callback.__name__ == "_deliver"
            return call_soon_threadsafe(callback, *args, **kwargs)

        loop.call_soon_threadsafe = counting  # type: ignore[method-assign]
        submits = [asyncio.create_task(engine.submit(make_request(f"r{i}", n=2))) for i in range(3)]
        await asyncio.sleep(0)
        gate.open()
        streams = await asyncio.gather(*submits)
        return await asyncio.gather(*map(collect, streams))

    outputs = asyncio.run(main())
    num_outputs = sum(map(len, outputs))
    assert num_outputs == 3 * 2 * 6
    assert 6 <= num_deliveries <= engine.num_steps < num_outputs


def test_a_sink_gets_each_step_as_one_list(started: Started) -> None:
    gate = Gate()
    engine = started(make_engine(gate=gate), gate)
    steps: list[list[TokenOutput]] = []
    first = engine.submit_to(make_request("held", max_tokens=2), steps.append)
    gate.wait_until_in_step()
    others = [engine.submit_to(make_request(f"r{i}", num_prompt=3, max_tokens=4), steps.append) for i in range(4)]
    refused = engine.submit_to(make_request("empty", num_prompt=0), steps.append)
    gate.open()
    assert engine.drain()
    assert first.result() is None
    assert [future.result() for future in others] == [None] * 4
    assert isinstance(refused.exception(), InvalidPromptError)
    assert [len(step) for step in steps] == [1, 5, 4, 4, 4]
    assert len(steps) == engine.num_steps
    names = [output.request_id for step in steps for output in step if output.finish_reason is FinishReason.LENGTH]
    assert sorted(names) == ["held", "r0", "r1", "r2", "r3"]


def test_two_loops_and_a_sink_share_one_engine(started: Started) -> None:
    engine = started(make_engine())
    requests = [[make_request(f"loop{i}-{j}", max_tokens=9 + j) for j in range(5)] for i in range(2)]

    def run_loop(mine: list[list[GenerateRequest]]) -> list[dict[int, list[int]]]:
        async def read(request: list[GenerateRequest]) -> dict[int, list[int]]:
            outputs = await collect(await engine.submit(request))
            return {0: [token for output in outputs for token in output.token_ids]}

        async def main() -> list[dict[int, list[int]]]:
            return await asyncio.gather(*map(read, mine))

        return asyncio.run(main())

    with ThreadPoolExecutor(2) as pool:
        for mine, got in zip(requests, pool.map(run_loop, requests), strict=True):
            assert got == [tokens_alone(request) for request in mine]


def test_user_mistakes_are_raised_to_the_caller_and_leave_no_trace(started: Started) -> None:
    async def main() -> None:
        engine = started(make_engine(gate=Pace(asyncio.get_running_loop())))
        with pytest.raises(InvalidPromptError, match="0 tokens"):
            await engine.submit(make_request("empty", num_prompt=0))
        with pytest.raises(InvalidParameterError, match="at least 1 choice"):
            await engine.submit([])
        stream = await engine.submit(make_request("twice", max_tokens=FOREVER))
        with pytest.raises(InvalidParameterError, match="unique"):
            await engine.submit(make_request("twice"))
        assert (await anext(stream)).token_ids
        await stream.aclose()
        with pytest.raises(StopAsyncIteration):
            await anext(stream)
        assert await asyncio.to_thread(engine.drain)
        assert not engine.engine.has_work

    asyncio.run(main())


def test_a_new_attempt_under_the_same_id_never_hears_of_the_old_one(started: Started) -> None:
    """A failover back to the same replica: abort and submit come before one and the same step."""
    gate = Gate()
    engine = started(make_engine(gate=gate), gate)

    async def main() -> None:
        old = await engine.submit(make_request("r", max_tokens=FOREVER))
        gate.wait_until_in_step()
        engine.abort("r")
        submit = asyncio.create_task(engine.submit(make_request("r")))
        await asyncio.sleep(0)
        gate.open()
        new = await submit
        assert [output.finish_reason for output in await collect(old)] == [None, FinishReason.ABORT]
        outputs = await collect(new)
        assert [output.finish_reason for output in outputs] == [None] * 5 + [FinishReason.LENGTH]
        assert {0: [token for output in outputs for token in output.token_ids]} == tokens_alone(make_request("r"))

    asyncio.run(main())


@pytest.mark.parametrize("how", ["cancel", "aclose", "drop"])
def test_a_consumer_that_leaves_frees_its_blocks_within_a_step(how: str, started: Started) -> None:
    gate = Gate()
    engine = started(make_engine(gate=gate), gate)

    async def main() -> None:
        stays = await engine.submit(make_request("stays", num_prompt=9, max_tokens=FOREVER))
        gate.wait_until_in_step()
        submit = asyncio.create_task(engine.submit(make_request("leaves", num_prompt=17, max_tokens=FOREVER)))
        await asyncio.sleep(0)
        gate.let_pass()
        leaves = await submit
        gate.wait_until_in_step()  # both are in the step that waits now
        gate.let_pass()
        await anext(leaves)
        gate.wait_until_in_step()
        if how == "cancel":
            task = asyncio.create_task(anext(leaves))  # type: ignore[arg-type]
            await asyncio.sleep(0)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            del task
        elif how == "aclose":
            await leaves.aclose()
        else:
            del leaves, submit
            gc.collect()
        for _ in range(2):
            gate.let_pass()
            gate.wait_until_in_step()
        await stays.aclose()

    asyncio.run(main())
    assert [(r.num_running, r.num_used_blocks) for r in engine.engine.recorder.records] == [
        (1, 3),
        (2, 8),
        (2, 8),
        (1, 3),
    ]


def test_a_submit_cancelled_before_it_is_accepted_is_aborted(started: Started) -> None:
    gate = Gate()
    engine = started(make_engine(gate=gate), gate)
    engine.submit_to(make_request("held"), lambda outputs: None)
    gate.wait_until_in_step()

    async def main() -> None:
        submit = asyncio.create_task(engine.submit(make_request("r", max_tokens=FOREVER)))
        await asyncio.sleep(0)
        submit.cancel()
        with pytest.raises(asyncio.CancelledError):
            await submit

    asyncio.run(main())
    gate.open()
    assert engine.drain()
    assert {s.request_id for record in engine.engine.recorder.records for s in record.sequences} == {"held"}


def test_requests_of_a_closed_loop_are_dropped_and_the_others_go_on(started: Started) -> None:
    gate = Gate()
    engine = started(make_engine(gate=gate), gate)
    survivors: list[TokenOutput] = []
    engine.submit_to(make_request("survivor", max_tokens=4), survivors.extend)
    gate.wait_until_in_step()

    loop = asyncio.new_event_loop()
    submit = loop.create_task(engine.submit(make_request("orphan", max_tokens=FOREVER)))
    loop.call_soon(gate.let_pass)
    stream = loop.run_until_complete(submit)
    gate.wait_until_in_step()
    loop.close()
    gate.open()
    assert engine.drain()
    assert [output.finish_reason for output in survivors] == [None, None, None, FinishReason.LENGTH]
    assert engine.engine.scheduler.pool.num_used_blocks == 0
    assert engine.num_steps == 4, "the orphan was aborted, not run to its end"
    assert engine.is_alive
    assert stream.request_id == "orphan"  # it lived until here: nobody's __del__ did the work


def test_a_loop_that_closes_before_its_request_is_accepted_is_dropped_too(started: Started) -> None:
    gate = Gate()
    engine = started(make_engine(gate=gate), gate)
    engine.submit_to(make_request("held"), lambda outputs: None)
    gate.wait_until_in_step()
    loop = asyncio.new_event_loop()
    submit = engine.submit(make_request("orphan", max_tokens=FOREVER))
    loop.call_soon(submit.send, None)  # as a task would, up to its wait for the engine; and then nobody comes back
    loop.call_soon(loop.stop)
    loop.run_forever()
    loop.close()
    gate.open()
    assert engine.drain()
    assert {s.request_id for record in engine.engine.recorder.records for s in record.sequences} == {"held"}
    submit.close()


class Culprit(SimulatedRunner):
    """Fails every step in which the request ``bad`` takes part."""

    def launch(self, plan: SchedulerOutput) -> SimulatedStep:
        if any(item.sequence.request.request_id == "bad" for item in plan.scheduled):
            raise ValueError("a bad row")
        return super().launch(plan)


def test_a_failing_step_ends_its_culprit_only(started: Started) -> None:
    runner = Culprit(num_kv_blocks=99, block_size=4, max_model_len=100, vocab_size=997)
    engine = started(make_engine(runner=runner))

    async def main() -> None:
        names = ("good", "bad", "fine")
        streams = await asyncio.gather(*(engine.submit(make_request(name)) for name in names))
        good, bad, fine = await asyncio.gather(*map(collect, streams))
        assert [output.finish_reason for output in bad] == [FinishReason.ERROR]
        assert bad[0].error_code == "step_failed"
        assert "a bad row" in str(bad[0].error)
        for name, outputs in (("good", good), ("fine", fine)):
            assert {0: [t for output in outputs for t in output.token_ids]} == tokens_alone(make_request(name))

    asyncio.run(main())
    assert engine.is_alive


def test_when_the_loop_dies_everyone_who_waits_gets_the_error(started: Started) -> None:
    gate = Gate()
    engine = started(make_engine(gate=gate), gate)
    late: list[asyncio.Task[OutputStream]] = []

    async def main() -> None:
        stream = await engine.submit(make_request("r", n=2, max_tokens=FOREVER))
        gate.wait_until_in_step()
        late.append(asyncio.create_task(engine.submit(make_request("late"))))  # waits for the end of the step
        await asyncio.sleep(0)

        def schedule(now: float = 0.0) -> SchedulerOutput | None:
            raise RuntimeError("the books do not add up")

        engine.engine.scheduler.schedule = schedule  # type: ignore[method-assign]
        gate.open()
        outputs = await collect(stream)
        ends = [output for output in outputs if output.finish_reason is not None]
        assert sorted(output.choice_index for output in ends) == [0, 1]
        for output in ends:
            assert (output.finish_reason, output.error_code) == (FinishReason.ERROR, "engine_unavailable")
            assert "RuntimeError: the books do not add up" in str(output.error)
        stream = await late[0]
        assert [output.error_code for output in await collect(stream)] == ["engine_unavailable"]
        with pytest.raises(EngineUnavailableError, match="the books do not add up"):
            await engine.submit(make_request("after"))

    asyncio.run(main())
    assert isinstance(engine.error, RuntimeError)
    assert not engine.is_alive
    assert engine.drain()
    assert engine.stop()


def test_drain_refuses_the_new_and_ends_the_old(started: Started) -> None:
    gate = Gate()
    engine = started(make_engine(gate=gate), gate)

    async def main() -> None:
        streams = [await engine.submit(make_request("r0"))]
        gate.wait_until_in_step()
        assert not engine.drain(timeout=0)
        with pytest.raises(EngineUnavailableError, match="draining"):
            await engine.submit(make_request("new"))
        gate.open()
        assert await asyncio.to_thread(engine.drain)
        for stream in streams:
            outputs = await collect(stream)
            assert [output.finish_reason for output in outputs] == [None] * 5 + [FinishReason.LENGTH]

    asyncio.run(main())
    assert engine.is_alive


@pytest.mark.parametrize("steps_in_flight", [1, 2])
def test_stop_in_the_middle_ends_every_request_once(steps_in_flight: int) -> None:
    gate = Gate()
    engine = AsyncEngine(make_engine(gate=gate, steps_in_flight=steps_in_flight))
    with pytest.raises(EngineUnavailableError, match="not started"):
        engine.submit_to(make_request("early"), lambda outputs: None)
    engine.start()

    async def main() -> None:
        stream = await engine.submit(make_request("r", n=3, max_tokens=FOREVER))
        gate.wait_until_in_step()
        assert not engine.stop(timeout=0)
        with pytest.raises(EngineUnavailableError, match="stopped"):
            await engine.submit(make_request("new"))
        gate.open()
        assert await asyncio.to_thread(engine.stop)
        outputs = await collect(stream)
        ends = [output.choice_index for output in outputs if output.finish_reason is FinishReason.ERROR]
        assert sorted(ends) == [0, 1, 2]
        assert outputs[-1].error_code == "engine_unavailable"

    asyncio.run(main())
    assert engine.stop()
    assert engine.error is None
    assert not engine.engine.has_work
    assert engine.engine.scheduler.pool.num_used_blocks == 0


def test_a_deadline_ends_a_request_that_cannot_be_scheduled(started: Started) -> None:
    engine = make_engine()
    engine.scheduler._admit = lambda plan, budget: None  # type: ignore[method-assign]
    async_engine = started(engine)

    async def main() -> None:
        stream = await async_engine.submit(make_request("r", remaining_ms=5.0))
        assert [output.error_code for output in await collect(stream)] == ["deadline_exceeded"]

    asyncio.run(main())
    assert engine.recorder.num_steps == 0
    assert async_engine.num_steps < 10, "it slept while it waited"


def test_the_watchdog_sees_a_step_that_hangs_and_no_idle_time() -> None:
    gate = Gate()
    now = [0.0]
    engine = make_engine(gate=gate)
    engine.clock = lambda: now[0]
    async_engine = AsyncEngine(engine)
    async_engine.start()
    now[0] = 1000.0
    assert async_engine.seconds_without_progress == 0.0
    async_engine.submit_to(make_request("r", max_tokens=2), lambda outputs: None)
    gate.wait_until_in_step()
    now[0] = 1007.0
    assert async_engine.seconds_without_progress == 7.0
    assert async_engine.num_steps == 0
    gate.open()
    assert async_engine.drain()
    assert async_engine.num_steps == 2
    assert async_engine.stop()
    assert async_engine.seconds_without_progress == 0.0
