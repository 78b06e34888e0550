"""The vectors of real tiny models: what transformers' hidden states give, and the same bits whatever the batch."""

from __future__ import annotations

import dataclasses
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from serve_app.engine.engine import Engine
from serve_app.engine.request import GenerateRequest, PoolingParams
from serve_app.llm import LLM
from serve_app.runner.model_runner import ModelRunner
from tests.tiny_models import make_tiny_model
from tests.tiny_runs import make_engine, make_request, make_runner

RNG = random.Random(5)
ALIKE = [RNG.randrange(300) for _ in range(37)]
PROMPTS = [[RNG.randrange(300) for _ in range(n)] for n in (1, 90, 16, 5)]
PROMPTS += [ALIKE + [RNG.randrange(300) for _ in range(n)] for n in (0, 11, 30)]


@pytest.fixture(scope="module", params=["LlamaForCausalLM", "Qwen3ForCausalLM"])
def directory(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("model"), request.param, sliding_window=0)


@pytest.fixture(scope="module")
def runner(directory: Path) -> ModelRunner:
    runner = make_runner(directory, block_size=16, max_num_seqs=8)
    assert runner.deterministic
    return runner


def pooled(request_id: str, prompt: list[int], kind: str) -> GenerateRequest:
    return dataclasses.replace(make_request(request_id, prompt), pooling=PoolingParams(kind))


def run(engine: Engine, requests: list[GenerateRequest]) -> dict[str, bytes | None]:
    """The vectors, by request; None of those that generate."""
    found: dict[str, bytes | None] = {}
    for request in requests:
        engine.add(request)
    while engine.has_work:
        for output in engine.step():
            assert output.error is None
            if output.finish_reason is not None:
                found[output.request_id] = output.embedding
        engine.scheduler.check_invariants()
    return found


def alone(runner: ModelRunner, kind: str) -> dict[str, bytes | None]:
    found: dict[str, bytes | None] = {}
    for i, prompt in enumerate(PROMPTS):
        found |= run(make_engine(runner, enable_prefix_caching=False), [pooled(str(i), prompt, kind)])
    return found


@pytest.mark.parametrize("kind", ["last", "mean"])
def test_they_are_what_transformers_hidden_states_give(directory: Path, runner: ModelRunner, kind: str) -> None:
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).model.eval()
    vectors = alone(runner, kind)
    for i, prompt in enumerate(PROMPTS):
        with torch.inference_mode():
            hidden = model(torch.tensor([prompt])).last_hidden_state[0].double()
        row = hidden[-1] if kind == "last" else hidden.mean(0)
        data = vectors[str(i)]
        assert data is not None
        assert np.allclose(np.frombuffer(data, "<f4"), (row / row.norm()).numpy(), atol=2e-5)


@pytest.mark.parametrize("kind", ["last", "mean"])
@pytest.mark.parametrize("budget", [9, 33, 512])
def test_the_same_bits_in_company_and_in_chunks(runner: ModelRunner, kind: str, budget: int) -> None:
    """Beside requests that generate; twice, so that the second time finds the first one's blocks."""
    engine = make_engine(runner, max_num_batched_tokens=budget, max_num_seqs=7)
    others = [make_request(f"o{i}", prompt, max_tokens=12) for i, prompt in enumerate(PROMPTS)]
    expected = alone(runner, kind)
    for attempt in range(2):
        mixed = [x for i, p in enumerate(PROMPTS) for x in (pooled(str(i), p, kind), others[i])]
        found = run(engine, mixed)
        assert {i: found[i] for i in expected} == expected, f"attempt {attempt}"
    assert engine.scheduler.num_prefix_hits > 0


@pytest.mark.parametrize("kind", ["last", "mean"])
def test_the_same_bits_after_preemption(runner: ModelRunner, kind: str) -> None:
    engine = make_engine(
        runner, num_kv_blocks=12, max_num_batched_tokens=5, max_num_seqs=5, enable_prefix_caching=False
    )
    requests = [make_request(f"o{i}", PROMPTS[3], max_tokens=60) for i in range(3)]
    requests += [dataclasses.replace(pooled(str(i), prompt, kind), priority=1) for i, prompt in enumerate(PROMPTS)]
    num_preempted = 0
    preempt = engine.scheduler._preempt

    def counted(sequence: object) -> None:
        nonlocal num_preempted
        num_preempted += sequence.request.pooling is not None and sequence.num_computed_tokens > 0  # type: ignore[attr-defined]
        preempt(sequence)  # type: ignore[arg-type]

    engine.scheduler._preempt = counted  # type: ignore[method-assign]
    found = run(engine, requests)
    assert num_preempted > 0
    expected = alone(runner, kind)
    assert {i: found[i] for i in expected} == expected


def test_a_model_of_nan_fails_the_one_request(runner: ModelRunner) -> None:
    engine = make_engine(runner)
    engine.add(dataclasses.replace(make_request("a", [5] * 20), pooling=PoolingParams("mean")))
    engine.add(make_request("b", [7] * 20, max_tokens=3))
    hidden_states = runner.model.hidden_states

    def broken(input_ids: torch.Tensor, *rest: object) -> torch.Tensor:
        rows = hidden_states(input_ids, *rest)  # type: ignore[arg-type]
        return torch.full_like(rows, torch.nan) if 5 in input_ids else rows

    runner.model.hidden_states = broken  # type: ignore[method-assign]
    try:
        ends = {}
        while engine.has_work:
            for output in engine.step():
                if output.finish_reason is not None:
                    ends[output.request_id] = output
    finally:
        del runner.model.hidden_states  # type: ignore[method-assign]
    assert ends["a"].error_code == "step_failed"
    assert "a cannot be embedded" in (ends["a"].error or "")
    assert ends["b"].finish_reason == "length"


def test_a_checkpoint_of_the_decoder_alone(directory: Path, runner: ModelRunner, tmp_path: Path) -> None:
    """Names without the "model." before them, and no head, as embedding models are published."""
    copy = shutil.copytree(directory, tmp_path / "copy")
    weights = load_file(copy / "model.safetensors")
    bare = {name.removeprefix("model."): x for name, x in weights.items() if name != "lm_head.weight"}
    assert len(bare) < len(weights)
    save_file(bare, copy / "model.safetensors", {"format": "pt"})
    found = run(make_engine(make_runner(copy, block_size=16, max_num_seqs=8)), [pooled("1", PROMPTS[1], "last")])
    assert found["1"] == alone(runner, "last")["1"]


@pytest.mark.parametrize("kind", ["last", "mean"])
def test_a_model_of_transformers_gives_the_same(directory: Path, runner: ModelRunner, kind: str) -> None:
    options = {"block_size": 16, "num_kv_blocks": 60, "num_threads": 1, "max_num_seqs": 4, "max_num_batched_tokens": 24}
    llm = LLM(directory, implementation="transformers", **options)
    expected = alone(runner, kind)
    for i, vector in enumerate(llm.embed(PROMPTS, pooling=kind)):
        data = expected[str(i)]
        assert data is not None
        assert np.allclose(vector.embedding, np.frombuffer(data, "<f4"), atol=1e-5)
