"""EngineTotals: what an engine counts of requests, tokens and steps, and what a step is expected to take."""

from __future__ import annotations

from typing import Any

import pytest

from serve_app.engine.config import EngineConfig
from serve_app.engine.engine import Engine
from serve_app.engine.request import FinishReason
from serve_app.engine.simulated_runner import SimulatedRunner, VirtualClock
from serve_app.engine.step_record import SequenceStep, StepRecord
from serve_app.engine.totals import MIN_FIT_STEPS, EngineTotals, Histogram, StepTimeFit
from tests.engine.harness import VOCAB_SIZE, Watched, make_request


def test_a_value_on_a_bound_lies_below_it() -> None:
    histogram = Histogram((1.0, 2.5))
    for value in (0.0, 1.0, 1.5, 2.5, 3.0, 99.0):
        histogram.observe(value)
    assert histogram.value() == [2, 2, 2, 107.0]


def number(engine: Engine, key: str, *labels: str) -> float:
    value = engine.counts()[key][labels]
    assert not isinstance(value, list)
    return value


def test_tokens_are_counted_by_what_they_are() -> None:
    watched = Watched(max_num_batched_tokens=16, enable_prefix_caching=True, block_size=4)
    prompt = range(10, 23)
    watched.add(make_request("a", prompt, max_tokens=5))
    watched.run()
    watched.add(make_request("b", prompt, n=3, max_tokens=2))
    watched.run()
    engine = watched.engine
    # The prompt of several choices is computed once, and so it counts once.
    assert number(engine, "prompt_tokens") == number(engine, "prefix_queries") == 26
    assert number(engine, "prefix_hits") == 12
    assert number(engine, "generation_tokens") == 5 + 3 * 2
    assert number(engine, "ended", "length") == 4
    assert number(engine, "kv_cache_usage") == number(engine, "num_used_blocks") == 0
    *_, num_tokens = engine.counts()["step_tokens"][()]  # type: ignore[misc]
    assert num_tokens == engine.recorder.num_tokens == 13 + 4 + 3 * 2


def test_preempted_work_is_counted_and_a_request_enters_once() -> None:
    watched = Watched(num_blocks=8, block_size=4, max_num_seqs=4, max_num_batched_tokens=32)
    for name in "abc":
        watched.add(make_request(name, 5, max_tokens=16))
    watched.run().check_tokens()
    engine = watched.engine
    assert number(engine, "preemptions") > 0
    assert number(engine, "recomputed_tokens") == engine.recorder.num_recomputed_tokens > 0
    assert number(engine, "prompt_tokens") == 15
    assert sum(engine.counts()["queue_seconds"][()][:-1]) == 3  # type: ignore[index]
    assert number(engine, "generation_tokens") == 48


@pytest.mark.parametrize("reason", FinishReason)
def test_every_end_has_its_reason(reason: FinishReason) -> None:
    watched = Watched()
    stops: Any = {"stop_token_ids": tuple(range(VOCAB_SIZE))} if reason is FinishReason.STOP else {}
    remaining_ms = 0.0 if reason is FinishReason.ERROR else None
    watched.add(make_request("a", 3, max_tokens=2, remaining_ms=remaining_ms, **stops))
    if reason is FinishReason.ABORT:
        watched.engine.abort("a")
    watched.run()
    assert watched.engine.counts()["ended"] == {(str(r),): int(r is reason) for r in FinishReason}


def test_the_wait_for_the_first_step_is_counted_also_by_the_heir_of_one_that_was_aborted() -> None:
    clock = VirtualClock()
    runner = SimulatedRunner(
        num_kv_blocks=64,
        block_size=4,
        max_model_len=100,
        vocab_size=VOCAB_SIZE,
        seconds_per_step=1.5,
        sleep=clock.sleep,
    )
    engine = Engine(EngineConfig(block_size=4, max_num_seqs=2, max_num_batched_tokens=8), runner, clock=clock)
    engine.add(make_request("a", 3, max_tokens=2))
    engine.add(make_request("b", 3, n=2, max_tokens=1))
    engine.abort("b", 0)
    while engine.has_work:
        engine.step()
    counts = engine.counts()
    assert counts["queue_seconds"][()][-1] == 0.0  # type: ignore[index]
    assert sum(counts["queue_seconds"][()][:-1]) == 2  # type: ignore[index]
    assert counts["step_seconds"][()][-1] == pytest.approx(3.0)  # type: ignore[index]
    assert counts["part_seconds"]["model",] == pytest.approx(3.0)
    engine.add(make_request("c", 3, n=2, max_tokens=3))
    engine.add(make_request("d", 3, max_tokens=1))
    while engine.has_work:
        engine.step()
    assert engine.counts()["queue_seconds"][()][-1] == pytest.approx(4.5)  # type: ignore[index]


# ---- the fit ---------------------------------------------------------------------------------------------------------


def record(num_tokens: int, seconds: float) -> StepRecord:
    return StepRecord(
        index=0,
        started=0.0,
        sequences=(SequenceStep("a", 0, 0, num_tokens, 0, True),),
        num_tokens=num_tokens,
        token_budget=64,
        num_running=1,
        num_waiting=0,
        num_blocks=1,
        num_used_blocks=1,
        num_recomputed_tokens=0,
        num_preempted=0,
        seconds={"schedule": seconds / 4, "wait": 3 * seconds / 4, "model": seconds / 2},
    )


def test_the_fit_finds_the_line() -> None:
    fit = StepTimeFit()
    for i in range(100):
        num_tokens = 1 + i * 37 % 64
        fit.add(num_tokens, 0.5 + 0.25 * num_tokens)
    assert fit.expected(10) == pytest.approx(3.0)
    assert fit.expected(1000) == pytest.approx(250.5)


def test_steps_of_one_size_have_a_mean_and_no_slope() -> None:
    fit = StepTimeFit()
    for seconds in (1.0, 3.0) * 20:
        fit.add(7, seconds)
    assert fit.expected(7) == fit.expected(700) == pytest.approx(2.0, rel=1e-4)


def test_a_machine_that_becomes_slower_shows() -> None:
    totals = EngineTotals()
    for i in range(200):
        totals.add_step(record(1 + i % 50, 0.001 * (1 + i % 50)))
    before = totals.counts()
    assert before["expected_step_seconds"][()] == pytest.approx(before["step_seconds"][()][-1], rel=1e-3)  # type: ignore[index]
    for i in range(50):
        totals.add_step(record(1 + i, 0.002 * (1 + i)))
    expected = totals.expected_step_seconds - before["expected_step_seconds"][()]  # type: ignore[operator]
    taken = totals.step_seconds.total - before["step_seconds"][()][-1]  # type: ignore[index]
    assert 1.5 < taken / expected < 2.0
    assert totals.part_seconds["model"] == pytest.approx(totals.step_seconds.total / 2)


def test_the_first_steps_are_as_expected() -> None:
    totals = EngineTotals()
    for i in range(MIN_FIT_STEPS):
        totals.add_step(record(1 + i, float(i)))
    assert totals.expected_step_seconds == totals.step_seconds.total
