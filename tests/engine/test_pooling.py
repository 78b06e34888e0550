"""A request with pooling ends with the vector of its prompt, whoever else runs, however the prompt was cut."""

from __future__ import annotations

import dataclasses
import random

import numpy as np
import pytest

from serve_app.engine.pooling import FRACTION_BITS, Pooled, vector_of
from serve_app.engine.request import FinishReason, GenerateRequest, PoolingParams
from serve_app.engine.scheduler import Scheduler
from serve_app.engine.simulated_runner import _ROOT, SimulatedRunner, _mix
from serve_app.errors import ContextLengthError, InvalidParameterError
from tests.engine.harness import FaultyRunner, Watched, make_request, make_scheduler


def pooled(request_id: str, prompt: int | list[int], kind: str = "last", **fields: object) -> list[GenerateRequest]:
    (request,) = make_request(request_id, prompt, **fields)  # type: ignore[arg-type]
    return [dataclasses.replace(request, pooling=PoolingParams(kind))]


def expected_vector(runner: SimulatedRunner, request: GenerateRequest) -> np.ndarray:  # type: ignore[type-arg]
    """From the definition of the simulated model alone."""
    digest, rows = _ROOT, []
    for token in request.prompt_token_ids:
        digest = _mix(digest, token)
        rows.append(runner._hidden_state(digest).astype(np.float64))
    assert request.pooling is not None
    vector = rows[-1] if request.pooling.kind == "last" else np.mean(rows, axis=0)
    return vector / np.linalg.norm(vector)  # type: ignore[no-any-return]


def read(data: bytes | None) -> np.ndarray:  # type: ignore[type-arg]
    assert data is not None
    return np.frombuffer(data, "<f4")


# ---- the vector ------------------------------------------------------------------------------------------------------


def test_a_last_hidden_state_is_scaled_to_length_1() -> None:
    state = np.array([3.0, 0.0, -4.0], dtype=np.float32)
    assert read(vector_of(state, PoolingParams(), 9)).tolist() == np.float32([0.6, 0, -0.8]).tolist()
    assert read(vector_of(state, PoolingParams(normalize=False), 9)).tolist() == [3.0, 0.0, -4.0]


def test_what_is_cut_off_does_not_count_for_the_length() -> None:
    state = np.array([3.0, 4.0, 12.0], dtype=np.float32)
    assert read(vector_of(state, PoolingParams(dimensions=2), 1)).tolist() == np.float32([0.6, 0.8]).tolist()


def test_a_mean_divides_by_the_tokens() -> None:
    sums = np.array([6, -3], dtype=np.int64) << FRACTION_BITS
    params = PoolingParams("mean", normalize=False)
    assert read(vector_of(sums, params, 3)).tolist() == [2.0, -1.0]


@pytest.mark.parametrize("kind", ["last", "mean"])
def test_zeros_have_no_direction_and_stay(kind: str) -> None:
    zeros: Pooled = np.zeros(3, dtype=np.int64 if kind == "mean" else np.float32)
    assert read(vector_of(zeros, PoolingParams(kind), 5)).tolist() == [0.0, 0.0, 0.0]


@pytest.mark.parametrize(
    ("fields", "message"),
    [({"kind": "max"}, "pooling is 'max'"), ({"dimensions": 0}, "dimensions is 0"), ({"kind": ["last"]}, "pooling is")],
)
def test_what_params_may_not_be(fields: dict[str, object], message: str) -> None:
    with pytest.raises(InvalidParameterError, match=message):
        PoolingParams(**fields)  # type: ignore[arg-type]


# ---- what the scheduler takes ----------------------------------------------------------------------------------------


def test_a_prompt_may_fill_the_whole_context() -> None:
    scheduler = make_scheduler(max_model_len=20)
    assert scheduler.num_blocks_needed(pooled("a", 20)) == 5
    scheduler.add(pooled("a", 20))
    with pytest.raises(ContextLengthError, match="has 21 tokens; with max_model_len 20 it may have at most 20"):
        scheduler.add(pooled("b", 21))
    with pytest.raises(ContextLengthError, match="at most 19"):
        scheduler.add(make_request("c", 20))


@pytest.mark.parametrize(
    ("requests", "param"),
    [
        ([*pooled("a", 3), dataclasses.replace(pooled("a", 3)[0], choice_index=1)], "n"),
        ([dataclasses.replace(pooled("a", 3)[0], output_token_ids=(5,))], "output_token_ids"),
        (pooled("a", 3, prompt_logprobs=1), "prompt_logprobs"),
    ],
    ids=["choices", "replay", "prompt_logprobs"],
)
def test_nothing_stands_beside_a_vector(requests: list[GenerateRequest], param: str) -> None:
    scheduler = make_scheduler()
    with pytest.raises(InvalidParameterError) as caught:
        scheduler.add(requests)
    assert caught.value.param == param
    assert not scheduler.has_work


@pytest.mark.parametrize("steps_in_flight", [1, 2])
def test_it_ends_when_its_prompt_is_computed(steps_in_flight: int) -> None:
    watched = Watched(steps_in_flight=steps_in_flight)
    watched.add(pooled("a", 11))
    watched.run()
    assert [plan for plan in watched.plans if plan != "nothing"] == ["a[0:8]", "a[8:11]"]
    (output,) = watched.outputs["a", 0]
    assert output.finish_reason is FinishReason.STOP
    assert output.token_ids == ()
    assert output.stop_token_id is None


def test_only_the_last_hidden_state_can_do_with_what_the_cache_has() -> None:
    watched = Watched(enable_prefix_caching=True)
    prompt = [5, 6, 7, 8, 9, 10, 11, 12, 13]
    for name, kind in (("a", "last"), ("b", "last"), ("c", "mean"), ("d", "last")):
        watched.add(pooled(name, prompt, kind))
        watched.run()
    assert [watched.ends[name, 0].num_cached_tokens for name in "abcd"] == [0, 8, 0, 8]
    assert watched.num_run["c"] == len(prompt)
    assert watched.ends["a", 0].embedding == watched.ends["b", 0].embedding != watched.ends["c", 0].embedding


# ---- random traffic --------------------------------------------------------------------------------------------------


def run_random(seed: int, steps_in_flight: int, *, faults: bool = False) -> Watched:
    rng = random.Random(seed)
    watched = Watched(
        num_blocks=11,
        max_model_len=60,
        max_num_seqs=6,
        max_num_batched_tokens=rng.choice((7, 13)),
        enable_prefix_caching=rng.random() < 0.7,
        steps_in_flight=steps_in_flight,
        runner_class=FaultyRunner,
    )
    watched.runner.hidden_size = 3
    todo = []
    for i in range(25):
        prompt = [rng.choice((5, 5, 5, 6)) for _ in range(rng.randint(1, 36))]
        kind = rng.choice(("last", "mean", ""))
        priority = rng.choice((0, 0, 1))  # one that may be preempted
        if kind:
            todo.append(pooled(f"r{i}", prompt, kind, priority=priority))
        else:
            todo.append(make_request(f"r{i}", prompt[:8], max_tokens=20, priority=priority))
    if faults:
        ids = [request[0].request_id for request in todo]
        watched.runner.at_launch, watched.runner.at_read = frozenset(ids[::9]), frozenset(ids[4::9])  # type: ignore[attr-defined]
    while todo or watched.engine.has_work:
        while todo and rng.random() < 0.4:
            watched.add(todo.pop(0))
        watched.step()
    watched.run()
    return watched


def check_vectors(watched: Watched) -> int:
    num_checked = 0
    for key, request in watched.requests.items():
        end = watched.ends[key]
        if request.pooling is None or end.finish_reason is FinishReason.ERROR:
            continue
        expected = expected_vector(watched.runner, request)
        assert np.allclose(read(end.embedding), expected, rtol=0, atol=1e-7), f"vector: {key}"
        num_checked += 1
    return num_checked


@pytest.mark.parametrize("steps_in_flight", [1, 2])
def test_vectors_of_random_traffic(steps_in_flight: int, monkeypatch: pytest.MonkeyPatch) -> None:
    num_preempted = num_checked = num_hits = 0
    preempt = Scheduler._preempt

    def counted(scheduler: Scheduler, sequence: object) -> None:
        nonlocal num_preempted
        pooling = sequence.request.pooling  # type: ignore[attr-defined]
        num_preempted += pooling is not None and pooling.kind == "mean" and sequence.num_computed_tokens > 0  # type: ignore[attr-defined]
        preempt(scheduler, sequence)  # type: ignore[arg-type]

    monkeypatch.setattr(Scheduler, "_preempt", counted)
    for seed in range(5):
        watched = run_random(seed, steps_in_flight)
        num_checked += check_vectors(watched)
        num_hits += watched.scheduler.num_prefix_hits
    assert num_preempted > 0
    assert num_hits > 0
    assert num_checked > 60


@pytest.mark.parametrize("steps_in_flight", [1, 2])
def test_vectors_beside_requests_that_fail(steps_in_flight: int) -> None:
    num_failed = num_checked = 0
    for seed in range(4):
        watched = run_random(seed, steps_in_flight, faults=True)
        num_checked += check_vectors(watched)
        num_failed += sum(end.error_code == "step_failed" for end in watched.ends.values())
    assert num_failed > 10
    assert num_checked > 40


def test_a_wrong_sum_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A test of the tests: a scheduler that adds a recomputed chunk to what it had."""

    def adding(scheduler: Scheduler, sequence: object, item: object, part: Pooled) -> None:
        before = sequence.pooled  # type: ignore[attr-defined]
        sequence.pooled = part if before is None or sequence.request.pooling.kind == "last" else before + part  # type: ignore[attr-defined]
        sequence.num_pooled_tokens = sequence.num_prompt_tokens  # type: ignore[attr-defined]

    monkeypatch.setattr(Scheduler, "_take_pooled", adding)
    with pytest.raises(AssertionError, match="vector:"):
        _check_some()


def _check_some() -> None:
    for seed in range(5):
        check_vectors(run_random(seed, 1))
