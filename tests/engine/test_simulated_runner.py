"""SimulatedRunner: tokens that depend on every token before them, a cache that notices damage, and a price."""

from __future__ import annotations

import pytest

from serve_app.engine.config import EngineConfig
from serve_app.engine.engine import Engine
from serve_app.engine.scheduler import SchedulerOutput
from serve_app.engine.simulated_runner import SimulatedRunner, VirtualClock
from tests.engine.harness import VOCAB_SIZE, Watched, expected_tokens, make_request, make_scheduler


def test_the_oracle_is_what_an_engine_yields_for_a_request_alone_with_a_big_pool() -> None:
    for i in range(30):
        requests = make_request(f"r{i}", 1 + 2 * i, max_tokens=20, seed=i, ignore_eos=i % 2 == 0, min_tokens=i % 5)
        watched = Watched(num_blocks=500, max_num_batched_tokens=7)
        watched.add(requests)
        watched.run()
        tokens, reason = expected_tokens(requests[0], max_model_len=100)
        assert tuple(watched.tokens[f"r{i}", 0]) == tokens
        assert watched.ends[f"r{i}", 0].finish_reason is reason


@pytest.mark.parametrize("change", ["prompt", "seed", "choice"])
def test_tokens_depend_on_prompt_seed_and_choice(change: str) -> None:
    first, second = make_request("a", (5, 6, 7), n=2, seed=1)
    other = {
        "prompt": make_request("a", (6, 5, 7), seed=1)[0],
        "seed": make_request("a", (5, 6, 7), seed=2)[0],
        "choice": second,
    }[change]
    assert expected_tokens(first, max_model_len=50) != expected_tokens(other, max_model_len=50)


def test_a_script_chooses_the_tokens_by_their_place_in_the_output() -> None:
    runner = SimulatedRunner(num_kv_blocks=20, vocab_size=100, script=lambda sequence, i: 10 * sequence.key[1] + i)
    engine = Engine(EngineConfig(), runner)
    engine.add(make_request("a", 5, n=2, max_tokens=4, outputs=[(0,), ()]))
    tokens: dict[int, list[int]] = {0: [], 1: []}
    while engine.has_work:
        for output in engine.step():
            tokens[output.choice_index] += output.token_ids
    assert tokens == {0: [1, 2, 3], 1: [10, 11, 12, 13]}


@pytest.mark.parametrize("damage", ["entry", "table", "poison"])
def test_it_notices_a_context_that_is_not_the_sequences_own(damage: str) -> None:
    runner = SimulatedRunner(num_kv_blocks=100, block_size=4, vocab_size=VOCAB_SIZE, verify=True)
    scheduler = make_scheduler()
    scheduler.add(make_request("a", 6, max_tokens=5))
    plan = scheduler.schedule()
    assert plan is not None
    scheduler.update(plan, runner.launch(plan).token_ids())
    sequence = scheduler.sequences["a", 0]
    if damage == "entry":
        runner._cache[sequence.block_ids[0], 1] ^= 4
    elif damage == "table":
        sequence.block_ids.reverse()
    else:
        runner._cache[sequence.block_ids[0], 1] = 0
    plan = scheduler.schedule()
    assert plan is not None
    with pytest.raises(AssertionError, match=r"KV entry of position [01] is not its own"):
        runner.launch(plan)


def test_a_token_that_never_left_the_device_is_the_one_sampled_there() -> None:
    runner = SimulatedRunner(num_kv_blocks=100, block_size=4, vocab_size=VOCAB_SIZE, verify=True)
    scheduler = make_scheduler()
    scheduler.add(make_request("a", 6, max_tokens=5))
    plans = [plan for plan in (scheduler.schedule(), scheduler.schedule()) if plan is not None]
    tokens = [runner.launch(plan).token_ids()[0] for plan in plans]
    assert tuple(tokens) == expected_tokens(make_request("a", 6, max_tokens=5)[0], max_model_len=100)[0][:2]
    with pytest.raises(AssertionError, match="needs token 6, the device holds token 7"):
        runner.launch(plans[1])


def test_the_cost_of_a_step_is_spent_once_when_it_is_read() -> None:
    clock = VirtualClock()
    runner = SimulatedRunner(
        num_kv_blocks=100,
        block_size=4,
        seconds_per_step=0.5,
        seconds_per_token=0.25,
        seconds_per_pair=0.125,
        sleep=clock.sleep,
    )
    scheduler = make_scheduler()
    scheduler.add(make_request("a", 3, max_tokens=5))
    plan = scheduler.schedule()
    assert isinstance(plan, SchedulerOutput)
    step = runner.launch(plan)
    cost = 0.5 + 0.25 * 3 + 0.125 * 3 * 3
    assert (clock(), runner.cost(plan), step.seconds) == (0.0, cost, {"model": cost})
    assert step.token_ids() == step.token_ids()
    assert clock() == cost


def test_logprobs_agree_with_each_other() -> None:
    runner = SimulatedRunner(vocab_size=10)
    likely = runner._logprobs(23, 3, 4)
    assert likely.top == ((3, -0.125), (4, -0.25), (5, -0.375), (6, -0.5))
    assert likely.logprob == -0.125
    assert runner._logprobs(23, 2, 0) == (2, -1.25, ())
    assert len(runner._logprobs(23, 2, 64).top) == 10
