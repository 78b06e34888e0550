"""Requests with a grammar in AsyncEngine: the compiler is held by the test, the steps go on. Each choice ends once."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable

import pytest

from serve_app.engine import compiling
from serve_app.engine.async_engine import AsyncEngine
from serve_app.engine.config import EngineConfig
from serve_app.engine.engine import Engine
from serve_app.engine.request import FinishReason, GenerateRequest, SamplingParams, TokenOutput
from serve_app.engine.simulated_runner import SimulatedRunner
from serve_app.errors import (
    DeadlineExceededError,
    EngineUnavailableError,
    InvalidParameterError,
    UnsupportedParameterError,
)


class Held:
    """What a grammar is compiled to here."""

    def __init__(self, text: str) -> None:
        self.text = text


class Runner(SimulatedRunner):
    """Compiles when the test lets it: grammars that begin with "slow" wait for ``go_on``."""

    def __init__(self) -> None:
        super().__init__(num_kv_blocks=500, block_size=4, max_model_len=500, vocab_size=997)
        self.go_on = threading.Event()
        self.compiling = threading.Semaphore(0)
        self.threads: list[str] = []
        self.known: dict[str, Held] = {}

    def compile_grammar(self, text: str) -> object:
        if text in self.known:
            return self.known[text]
        self.threads.append(threading.current_thread().name)
        self.compiling.release()
        if text.startswith("bad"):
            raise InvalidParameterError("grammar", text, "a grammar")
        if text.startswith("slow"):
            self.go_on.wait()
        return self.known.setdefault(text, Held(text))


@pytest.fixture
def runner() -> Runner:
    return Runner()


@pytest.fixture
def engine(runner: Runner) -> object:
    config = EngineConfig(block_size=4, max_num_seqs=7, max_num_batched_tokens=29)
    async_engine = AsyncEngine(Engine(config, runner))
    async_engine.start()
    yield async_engine
    runner.go_on.set()
    assert async_engine.stop()


def make_request(
    name: str, grammar: str | None, *, n: int = 1, remaining_ms: float | None = None, max_tokens: int = 6
) -> list[GenerateRequest]:
    sampling = SamplingParams(n=n, max_tokens=max_tokens, seed=1, grammar=grammar).resolved()
    return [GenerateRequest(name, (1, 2, 3), sampling, choice_index=i, remaining_ms=remaining_ms) for i in range(n)]


class Sink:
    def __init__(self) -> None:
        self.outputs: list[TokenOutput] = []
        self.num_open = 0
        self.done = threading.Event()

    def __call__(self, outputs: list[TokenOutput]) -> None:
        self.outputs += outputs
        self.num_open -= sum(output.finish_reason is not None for output in outputs)
        if self.num_open == 0:
            self.done.set()

    def wait(self) -> list[FinishReason | None]:
        assert self.done.wait(30)
        ends = [(o.request_id, o.choice_index) for o in self.outputs if o.finish_reason is not None]
        assert len(set(ends)) == len(ends)
        return [o.finish_reason for o in self.outputs if o.finish_reason is not None]


def submit(engine: AsyncEngine, requests: list[GenerateRequest]) -> tuple[Sink, Callable[[], BaseException | None]]:
    sink = Sink()
    sink.num_open = len(requests)
    future = engine.submit_to(requests, sink)
    return sink, lambda: future.exception(30)


def check_rest(engine: AsyncEngine) -> None:
    assert engine.drain(30)
    assert engine.num_unfinished == 0
    assert not engine._compiling


def test_it_is_compiled_off_the_step_thread_while_others_run(engine: AsyncEngine, runner: Runner) -> None:
    slow, accepted = submit(engine, make_request("slow", "slow one", n=2))
    assert runner.compiling.acquire(timeout=30)
    plain, plain_accepted = submit(engine, make_request("plain", None))
    quick, quick_accepted = submit(engine, make_request("quick", "quick"))
    assert plain_accepted() is None
    assert quick_accepted() is None
    assert plain.wait() == [FinishReason.LENGTH]
    assert quick.wait() == [FinishReason.LENGTH]
    assert not slow.outputs
    runner.go_on.set()
    assert accepted() is None
    assert slow.wait() == [FinishReason.LENGTH] * 2
    assert all(name.startswith("grammar") for name in runner.threads)
    assert len(runner.threads) == 2, "both choices have one grammar, and the engine found what was compiled"
    check_rest(engine)


def test_sequences_hold_what_was_compiled(engine: AsyncEngine, runner: Runner) -> None:
    seen = []
    launch = runner.launch
    runner.launch = lambda plan: (seen.extend(s.sequence.grammar for s in plan.scheduled), launch(plan))[1]  # type: ignore[assignment,func-returns-value,method-assign]
    sink, _ = submit(engine, make_request("a", "one"))
    sink.wait()
    assert seen
    assert all(grammar is runner.known["one"] for grammar in seen)


@pytest.mark.parametrize("how", ["whole", "choice by choice"])
def test_an_abort_meanwhile_ends_it_at_once(engine: AsyncEngine, runner: Runner, how: str) -> None:
    sink, accepted = submit(engine, make_request("a", "slow", n=3))
    assert runner.compiling.acquire(timeout=30)
    for choice in (None,) if how == "whole" else (0, 1, 2):
        engine.abort("a", choice)
    assert accepted() is None
    assert sink.wait() == [FinishReason.ABORT] * 3
    again, again_accepted = submit(engine, make_request("a", "quick"))  # the same id, at once
    assert again_accepted() is None
    assert again.wait() == [FinishReason.LENGTH]
    runner.go_on.set()
    check_rest(engine)
    assert len(sink.outputs) == 3


def test_one_choice_aborted_meanwhile_leaves_the_others(engine: AsyncEngine, runner: Runner) -> None:
    sink, accepted = submit(engine, make_request("a", "slow", n=3))
    assert runner.compiling.acquire(timeout=30)
    engine.abort("a", 1)
    engine.abort("a", 9)
    engine.abort("b")
    runner.go_on.set()
    assert accepted() is None
    sink.wait()
    ends = {o.choice_index: o.finish_reason for o in sink.outputs if o.finish_reason is not None}
    assert ends == {0: FinishReason.LENGTH, 1: FinishReason.ABORT, 2: FinishReason.LENGTH}
    check_rest(engine)


def test_a_deadline_meanwhile_refuses_it(engine: AsyncEngine, runner: Runner) -> None:
    sink, accepted = submit(engine, make_request("a", "slow", remaining_ms=30.0))
    error = accepted()
    assert isinstance(error, DeadlineExceededError)
    assert "did not end within its 30 ms" in str(error)
    assert not sink.outputs
    check_rest(engine)


def test_the_time_that_compiling_took_counts(runner: Runner) -> None:
    now = [0.0]
    config = EngineConfig(block_size=4, max_num_seqs=7, max_num_batched_tokens=29)
    engine = Engine(config, runner, clock=lambda: now[0])
    now[0] = 5.0
    engine.add(make_request("a", "quick", remaining_ms=6000.0), submitted=1.0)
    assert next(iter(engine.scheduler.sequences.values())).deadline == 7.0


def test_what_compiles_too_long_is_refused_alone(
    engine: AsyncEngine, runner: Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compiling, "COMPILE_SECONDS", 0.05)
    sink, accepted = submit(engine, make_request("a", "slow", remaining_ms=60_000.0))
    error = accepted()
    assert isinstance(error, InvalidParameterError)
    assert str(error) == "grammar is 'slow'; it must be simple enough to be compiled within 0.05 s"
    assert not sink.outputs
    monkeypatch.undo()
    fine, fine_accepted = submit(engine, make_request("b", "quick"))
    assert fine_accepted() is None
    assert fine.wait() == [FinishReason.LENGTH]
    check_rest(engine)


def test_a_wrong_grammar_is_its_requests_own_error(engine: AsyncEngine, runner: Runner) -> None:
    async def main() -> None:
        with pytest.raises(InvalidParameterError, match="grammar is 'bad'"):
            await engine.submit(make_request("a", "bad"))
        stream = await engine.submit(make_request("b", "good"))
        assert [o.finish_reason async for o in stream][-1] is FinishReason.LENGTH

    asyncio.run(main())
    check_rest(engine)


def test_a_cancelled_submit_leaves_nothing(engine: AsyncEngine, runner: Runner) -> None:
    async def main() -> None:
        task = asyncio.create_task(engine.submit(make_request("a", "slow", n=2)))
        await asyncio.to_thread(runner.compiling.acquire)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert await asyncio.to_thread(engine.drain, 30)  # while the compiler still works

    asyncio.run(main())
    check_rest(engine)


def test_an_id_is_unique_also_among_those_that_compile(engine: AsyncEngine, runner: Runner) -> None:
    sink, accepted = submit(engine, make_request("a", "slow"))
    _, twice = submit(engine, make_request("a", None))
    error = twice()
    assert isinstance(error, InvalidParameterError)
    assert "unique among the requests under way" in str(error)
    runner.go_on.set()
    assert accepted() is None
    assert sink.wait() == [FinishReason.LENGTH]
    check_rest(engine)


def test_stop_answers_those_that_compile_and_drain_waits_for_them(engine: AsyncEngine, runner: Runner) -> None:
    sink, accepted = submit(engine, make_request("a", "slow"))
    assert runner.compiling.acquire(timeout=30)
    assert not engine.drain(0.02)
    assert engine.stop(30)
    assert isinstance(accepted(), EngineUnavailableError)
    assert engine.num_unfinished == 0
    assert not sink.outputs


def test_requests_refused_by_the_scheduler_end_once_too(engine: AsyncEngine, runner: Runner) -> None:
    request = make_request("a", "quick", max_tokens=6)
    wrong = [GenerateRequest("a", (5000,), request[0].sampling)]
    sink, accepted = submit(engine, wrong)
    assert accepted() is not None
    assert not sink.outputs
    check_rest(engine)


def test_a_runner_without_masks_refuses() -> None:
    plain = SimulatedRunner(num_kv_blocks=50, block_size=4)
    engine = Engine(EngineConfig(block_size=4), plain)
    with pytest.raises(UnsupportedParameterError, match="simulated runner"):
        engine.add(make_request("a", "x"))
    assert not engine.has_work
