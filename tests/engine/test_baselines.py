"""The padded baselines: the same tokens as the engine, rectangles as they were drawn, and padding that is computed."""

from __future__ import annotations

import random

import pytest

from serve_app.engine.baselines import (
    PaddedScheduler,
    PaddingCounter,
    padded_request_id,
    policy_engine,
)
from serve_app.engine.config import EngineConfig
from serve_app.engine.engine import Engine
from serve_app.engine.request import FinishReason, GenerateRequest, SamplingParams
from serve_app.engine.scheduler import Scheduler, SchedulerOutput
from serve_app.engine.simulated_runner import SimulatedRunner, SimulatedStep, VirtualClock
from serve_app.errors import ConfigurationError

Key = tuple[str, int]


class SpyRunner(SimulatedRunner):
    """Keeps what it was asked to compute, and holds every plan against the limits that a real runner's tables have."""

    def __init__(self, config: EngineConfig, **options: object) -> None:
        super().__init__(block_size=config.block_size, vocab_size=997, **options)  # type: ignore[arg-type]
        self.config = config
        self.plans: list[list[tuple[str, int, int]]] = []

    def launch(self, plan: SchedulerOutput) -> SimulatedStep:
        slots = [item.sequence.slot for item in plan.scheduled]
        assert len(set(slots)) == len(slots) <= self.config.max_num_seqs
        assert all(0 <= slot < self.config.max_num_seqs for slot in slots)
        assert plan.num_tokens == sum(item.num_tokens for item in plan.scheduled) <= self.config.max_num_batched_tokens
        for item in plan.scheduled:
            assert item.start + item.num_tokens <= self.max_model_len
        self.plans.append([(item.sequence.key[0], item.start, item.num_tokens) for item in plan.scheduled])
        return super().launch(plan)


def make_request(
    name: str, num_prompt: int, max_tokens: int, *, n: int = 1, remaining_ms: float | None = None
) -> list[GenerateRequest]:
    prompt = tuple((7 * i + len(name) + ord(name[-1])) % 997 for i in range(num_prompt))
    sampling = SamplingParams(n=n, max_tokens=max_tokens, seed=ord(name[-1])).resolved()
    return [GenerateRequest(name, prompt, sampling, choice_index=i, remaining_ms=remaining_ms) for i in range(n)]


def run(engine: Engine, *, limit: int = 9999) -> dict[Key, list[int]]:
    tokens: dict[Key, list[int]] = {}
    for _ in range(limit):
        if not engine.has_work:
            return tokens
        for output in engine.step():
            tokens.setdefault((output.request_id, output.choice_index), []).extend(output.token_ids)
        engine.scheduler.check_invariants()
    raise AssertionError("it does not end")


def test_a_batch_is_a_rectangle_that_lasts_until_its_last_row() -> None:
    """The drawing on top of baselines.py, and a fourth request that comes too late."""
    config = EngineConfig(block_size=4, max_num_seqs=6, max_num_batched_tokens=9)
    runner = SpyRunner(config, num_kv_blocks=50, verify=True)
    engine = policy_engine("static", config, runner)
    for name, num_prompt, max_tokens in (("R1", 5, 4), ("R2", 2, 2), ("R3", 3, 4), ("R4", 6, 1)):
        engine.add(make_request(name, num_prompt, max_tokens))
    tokens = run(engine)
    assert [
        [(name if (owner := padded_request_id(name)) is None else f"{owner}'s", *rest) for name, *rest in plan]
        for plan in runner.plans
    ] == [
        [("R1", 0, 3), ("R2's", 0, 3), ("R3's", 0, 2), ("R3", 0, 1)],
        [("R1", 3, 2), ("R2", 0, 2), ("R3", 1, 2)],
        [("R1", 5, 1), ("R2", 2, 1), ("R3", 3, 1)],
        [("R1", 6, 1), ("R2's", 3, 1), ("R3", 4, 1)],
        [("R1", 7, 1), ("R2's", 4, 1), ("R3", 5, 1)],
        [("R4", 0, 6)],
    ]
    assert [record.num_padded_tokens for record in engine.recorder.records] == [5, 0, 0, 1, 1, 0]
    assert {key[0]: len(ids) for key, ids in tokens.items()} == {"R1": 4, "R2": 2, "R3": 4, "R4": 1}
    assert engine.scheduler.pool.num_used_blocks == 0


def test_dynamic_batching_keeps_lengths_together() -> None:
    config = EngineConfig(block_size=4, max_num_seqs=16, max_num_batched_tokens=100)
    runner = SpyRunner(config, num_kv_blocks=50, verify=True)
    engine = policy_engine("dynamic", config, runner)
    for i, num_prompt in enumerate((10, 3, 20, 7, 4, 11, 21)):
        engine.add(make_request(f"r{i}", num_prompt, 1))
    run(engine)
    prompts = [[num for name, _, num in plan if padded_request_id(name) is None] for plan in runner.plans]
    assert prompts == [[10, 20, 11], [3, 4], [7], [21]]
    assert engine.recorder.num_padded_tokens == (10 + 9) + 1


@pytest.mark.parametrize("steps_in_flight", [1, 2])
@pytest.mark.parametrize("policy", ["static", "dynamic"])
def test_tokens_are_those_of_continuous_batching_and_padding_is_computed(policy: str, steps_in_flight: int) -> None:
    num_padded = num_aborted = 0
    for seed in range(10):
        rng = random.Random(seed)
        config = EngineConfig(block_size=4, max_num_seqs=rng.choice((2, 7, 10)), max_num_batched_tokens=23)
        runners = [
            SpyRunner(
                config,
                num_kv_blocks=60,
                max_model_len=64,
                eos_token_ids=frozenset(range(40)),
                max_steps_in_flight=steps_in_flight,
                verify=True,
            )
            for _ in range(2)
        ]
        engine, reference = policy_engine(policy, config, runners[0]), policy_engine("continuous", config, runners[1])
        requests = [
            make_request(f"r{i}", rng.randint(1, 30), rng.choice((1, 5, 30)), n=rng.choice((1, 1, 2)))
            for i in range(18)
        ]
        requests = [r for r in requests if len(r) <= reference.config.max_num_seqs]
        aborted: set[str] = set()
        tokens: dict[Key, list[int]] = {}
        ends: list[Key] = []
        for request in requests:
            reference.add(request)
        expected = run(reference)
        pending = list(requests)
        while pending or engine.has_work:
            if pending and rng.random() < 0.4:
                engine.add(pending.pop(0))
            if engine.scheduler.running and rng.random() < 0.03:
                aborted.add(rng.choice(engine.scheduler.running).key[0])
                for name in aborted:
                    engine.abort(name)
            for output in engine.step():
                key = (output.request_id, output.choice_index)
                tokens.setdefault(key, []).extend(output.token_ids)
                if output.finish_reason is not None:
                    ends.append(key)
            engine.scheduler.check_invariants()
        assert sorted(ends) == sorted(expected)
        for key, ids in tokens.items():
            assert ids == expected[key] if key[0] not in aborted else ids == expected[key][: len(ids)]
        assert engine.scheduler.pool.num_used_blocks == 0
        scratch = sum(n for plan in runners[0].plans for name, _, n in plan if padded_request_id(name) is not None)
        # With two steps in flight a row may also pad one step under its own name: its last token is still on its way.
        extra = engine.recorder.num_padded_tokens - scratch
        assert extra == 0 if steps_in_flight == 1 else 0 <= extra <= len(ends)
        assert engine.recorder.num_tokens == sum(n for plan in runners[0].plans for _, _, n in plan)
        num_padded += engine.recorder.num_padded_tokens
        num_aborted += len(aborted)
    assert num_padded > 100
    assert num_aborted >= 3


@pytest.mark.parametrize("policy", ["static", "dynamic"])
def test_nobody_joins_a_batch_before_its_last_row_has_ended(policy: str) -> None:
    config = EngineConfig(block_size=8, max_num_seqs=8, max_num_batched_tokens=64)
    runner = SpyRunner(config, num_kv_blocks=99, verify=True)
    engine = policy_engine(policy, config, runner)
    rng = random.Random(5)
    for i in range(13):
        engine.add(make_request(f"r{i}", rng.randint(3, 20), rng.randint(1, 9)))
    members: set[str] = set()
    num_batches = 0
    while engine.has_work:
        running = {sequence.key[0] for sequence in engine.scheduler.running}
        outputs = engine.step()
        step = {padded_request_id(name) or name for name, _, _ in runner.plans[-1]}
        if running:
            assert step == members, "the rows are the same until the last one has ended"
        else:
            members, num_batches = step, num_batches + 1
        assert len(members) <= 4
        assert {output.request_id for output in outputs} <= members
    assert num_batches >= 4


def test_a_rectangle_must_fit_the_pool_and_the_context() -> None:
    config = EngineConfig(block_size=4, max_num_seqs=20, max_num_batched_tokens=90)
    runner = SpyRunner(config, num_kv_blocks=14, max_model_len=24, verify=True)
    engine = policy_engine("static", config, runner)
    # Each alone fits, but 20 columns and 20 steps are longer than the context.
    engine.add(make_request("long prompt", 20, 4))
    engine.add(make_request("long answer", 3, 20))
    # 3 rows of 8 + 12 - 1 tokens are 15 blocks, and the pool has 14.
    for i in range(3):
        engine.add(make_request(f"r{i}", 8, 12))
    tokens = run(engine)
    assert sorted(map(len, tokens.values())) == [4, 12, 12, 12, 20]
    batches = [{name for name, _, _ in plan} for plan in runner.plans]
    assert {"long prompt", "long answer"} not in batches
    assert {"r0", "r1"} in batches
    assert {"r0", "r1", "r2"} not in batches


class Culprit(SpyRunner):
    def launch(self, plan: SchedulerOutput) -> SimulatedStep:
        if any(self.is_bad(item.sequence.key[0], item.start) for item in plan.scheduled):
            raise ValueError("a bad row")
        return super().launch(plan)

    def is_bad(self, name: str, start: int) -> bool:
        return name == "bad" and start > 6


class PaddingCulprit(Culprit):
    def is_bad(self, name: str, start: int) -> bool:
        return padded_request_id(name) is not None


@pytest.mark.parametrize(("runner_class", "num_bad_tokens"), [(Culprit, 3), (PaddingCulprit, 6)])
def test_a_row_that_fails_takes_nobody_with_it(runner_class: type[Culprit], num_bad_tokens: int) -> None:
    config = EngineConfig(block_size=4, max_num_seqs=8, max_num_batched_tokens=50)
    runner = runner_class(config, num_kv_blocks=50)
    engine = policy_engine("static", config, runner)
    for name, num_prompt, max_tokens in (("good", 9, 7), ("bad", 5, 6), ("fine", 2, 3)):
        engine.add(make_request(name, num_prompt, max_tokens))
    tokens = run(engine)
    assert {key[0]: len(ids) for key, ids in tokens.items()} == {"good": 7, "bad": num_bad_tokens, "fine": 3}
    assert engine.scheduler.pool.num_used_blocks == 0


def test_a_deadline_ends_a_row_and_its_place_pads_on() -> None:
    clock = VirtualClock()
    config = EngineConfig(block_size=4, max_num_seqs=4, max_num_batched_tokens=50)
    runner = SpyRunner(config, num_kv_blocks=50, seconds_per_step=1.0, sleep=clock.sleep, verify=True)
    engine = policy_engine("static", config, runner, clock)
    engine.add(make_request("late", 5, 9, remaining_ms=2500.0))
    engine.add(make_request("r", 5, 5))
    reasons = {}
    while engine.has_work:
        reasons.update({o.request_id: o.finish_reason for o in engine.step() if o.finish_reason is not None})
        engine.scheduler.check_invariants()
    assert reasons == {"late": FinishReason.ERROR, "r": FinishReason.LENGTH}
    assert [len(plan) for plan in runner.plans] == [2] * 5
    assert engine.recorder.num_padded_tokens == 2


def test_policies_take_the_same_number_of_requests_at_a_time() -> None:
    config = EngineConfig(block_size=4, max_num_seqs=6, max_num_batched_tokens=50)
    widest = {}
    for policy in ("static", "dynamic", "continuous"):
        runner = SpyRunner(config, num_kv_blocks=50)
        engine = policy_engine(policy, config, runner)
        for i in range(7):
            engine.add(make_request(f"r{i}", 3, 3))
        run(engine)
        widest[policy] = max(map(len, runner.plans))
        assert isinstance(engine.runner, PaddingCounter) is isinstance(engine.scheduler, PaddedScheduler)
    assert widest == {"static": 3, "dynamic": 3, "continuous": 3}
    assert type(engine.scheduler) is Scheduler


def test_what_cannot_be_is_refused() -> None:
    config = EngineConfig(block_size=4, max_num_seqs=6)
    runner = SpyRunner(config)
    with pytest.raises(ConfigurationError, match=r"policy is 'clever'; it must be one of static, dynamic, continuous"):
        policy_engine("clever", config, runner)
    with pytest.raises(ConfigurationError, match=r"max_num_rows is 4; with max_num_seqs 6 it must be from 1 to 3"):
        policy_engine("static", config, runner, max_num_rows=4)
    with pytest.raises(NotImplementedError):
        PaddedScheduler(config, num_blocks=9, max_model_len=9, vocab_size=9).choose([])
