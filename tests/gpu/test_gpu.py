"""On a card (pytest -m gpu): captured graphs, bfloat16 kernels, exact bits, memory, and nothing compiled after start-up.

What these can show that the interpreter cannot: real captures and replays, launches that wait for nothing, bfloat16.
"""

from __future__ import annotations

import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from serve_app.engine.request import GenerateRequest
from serve_app.runner.model_runner import ModelRunner
from tests.tiny_models import make_tiny_model, reference_greedy
from tests.tiny_runs import Answer, Witness, assert_same_bits, check_greedy, make_engine, make_request, make_runner, run

pytestmark = pytest.mark.gpu

VOCAB_SIZE = 2051
NUM_TOKENS = 24
SHAPE: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 256,
    "intermediate_size": 520,
    "heads": 8,
    "kv_heads": 2,
    "head_dim": 64,
    "layers": 3,
    "max_len": 2048,
}
OPTIONS: dict[str, Any] = {"num_kv_blocks": 400, "block_size": 16, "max_num_seqs": 40, "max_num_batched_tokens": 256}


def prompt_of(length: int, seed: int = 0) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(VOCAB_SIZE) for _ in range(length)]


LENGTHS = (70, 1, 300, 16, 33, 129, 5, 64, 500, 2, 17, 90)


def requests(**sampling: Any) -> list[GenerateRequest]:
    return [make_request(str(i), prompt_of(n, i), max_tokens=NUM_TOKENS, **sampling) for i, n in enumerate(LENGTHS)]


@pytest.fixture(scope="module")
def exact_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("float32"), "Qwen3ForCausalLM", seed=1, **SHAPE)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("bfloat16")
    return make_tiny_model(path, "Qwen3ForCausalLM", seed=1, dtype=torch.bfloat16, **SHAPE)


@pytest.fixture(scope="module")
def fast(directory: Path) -> ModelRunner:
    return make_runner(directory, device="cuda", dtype="auto", **OPTIONS)


@pytest.fixture(scope="module")
def deterministic(directory: Path) -> ModelRunner:
    return make_runner(directory, device="cuda", dtype="auto", deterministic=True, **OPTIONS)


@pytest.fixture(params=["fast", "deterministic"])
def runner(request: pytest.FixtureRequest) -> Iterator[ModelRunner]:
    found: ModelRunner = request.getfixturevalue(request.param)
    yield found
    assert found.device.recompilations.names == []  # type: ignore[attr-defined]


def tokens(answers: dict[Any, Answer]) -> dict[Any, list[int]]:
    assert all(answer.error is None for answer in answers.values())
    return {key: answer.token_ids for key, answer in answers.items()}


# ---- values ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", [False, True], ids=["fast", "deterministic"])
def test_float32_tokens_equal_transformers(exact_directory: Path, mode: bool) -> None:
    runner = make_runner(exact_directory, device="cuda", deterministic=mode, **OPTIONS)
    engine = make_engine(runner)
    answers = run(engine, requests(), arrivals={3: 4, 7: 11})
    compared = 0
    for i, length in enumerate(LENGTHS):
        expected = reference_greedy(exact_directory, prompt_of(length, i), NUM_TOKENS, eos=())
        compared += check_greedy(answers[str(i), 0].token_ids, *expected)
    assert compared >= 0.8 * NUM_TOKENS * len(LENGTHS)
    assert runner.device.graphs.num_replays > NUM_TOKENS / 2  # type: ignore[attr-defined]


def test_bfloat16_log_probabilities_are_near_transformers(directory: Path, runner: ModelRunner) -> None:
    """Every position of a prompt in chunks, beside others, against float32 on the same weights."""
    prompt = prompt_of(300, 5)
    engine = make_engine(runner, max_num_batched_tokens=96)
    answers = run(engine, [make_request("a", prompt, max_tokens=1, prompt_logprobs=0), *requests()[:4]])
    ours = torch.tensor([entry.logprob for entry in (answers["a", 0].prompt_logprobs or [])[1:] if entry is not None])
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, attn_implementation="eager")
    with torch.no_grad():
        logits = model(torch.tensor([prompt])).logits[0]
    theirs = logits.log_softmax(1)[:-1].gather(1, torch.tensor(prompt[1:])[:, None])[:, 0]
    assert float((ours - theirs).abs().max() / logits.std()) < 0.25
    assert float((ours - theirs).abs().mean() / logits.std()) < 0.02


def test_every_kind_of_sampling(runner: ModelRunner) -> None:
    """Seeded draws do not depend on how the steps ran; nothing but the seed moves them."""
    kinds: list[dict[str, Any]] = [
        {},
        {"temperature": 0.8},
        {"temperature": 1.0, "top_k": 7},
        {"temperature": 1.0, "top_p": 0.5, "min_p": 0.01},
        {"temperature": 0.7, "repetition_penalty": 1.3, "frequency_penalty": 0.5, "logprobs": 3},
        {"logit_bias": {7: 5.0}, "min_tokens": 5, "stop_token_ids": (3, 4)},
        {"allowed_token_ids": tuple(range(0, VOCAB_SIZE, 3)), "temperature": 1.0},
    ]
    group = [
        make_request(str(i), prompt_of(20 + i, i), **{"max_tokens": 12, "seed": i, **kind})
        for i, kind in enumerate(kinds)
    ]
    answers = run(make_engine(runner), group)
    assert all(answer.error is None for answer in answers.values())
    assert all(token % 3 == 0 for token in answers["6", 0].token_ids)
    if runner.deterministic:
        assert {key: (a.token_ids, a.logprobs) for key, a in run(make_engine(runner), group[::-1]).items()} == {
            key: (a.token_ids, a.logprobs) for key, a in answers.items()
        }


# ---- graphs, launches -----------------------------------------------------------------------------------------------


def test_replays_equal_eager_steps_bit_for_bit(deterministic: ModelRunner, monkeypatch: pytest.MonkeyPatch) -> None:
    graphs = deterministic.device.graphs  # type: ignore[attr-defined]
    before = graphs.num_replays
    engine = make_engine(deterministic)
    replayed = run(engine, requests(logprobs=1))
    assert graphs.num_replays > before
    assert engine.recorder.num_padded_tokens > 0
    monkeypatch.setattr(graphs, "bucket_for", lambda num_rows: None)
    eager = run(make_engine(deterministic), requests(logprobs=1))
    assert {key: (a.token_ids, a.logprobs) for key, a in replayed.items()} == {
        key: (a.token_ids, a.logprobs) for key, a in eager.items()
    }


def test_padded_rows_are_never_written(runner: ModelRunner) -> None:
    engine = make_engine(runner, enable_prefix_caching=False)
    run(engine, requests()[:5])
    assert engine.recorder.num_padded_tokens > 0
    num_computed = sum(record.num_tokens for record in engine.recorder.records)
    for x in (*runner.kv_cache.k, *runner.kv_cache.v):
        assert int((~x.isnan().flatten(2).any(dim=2)).sum()) <= num_computed


def test_a_launch_waits_for_nothing(runner: ModelRunner, monkeypatch: pytest.MonkeyPatch) -> None:
    launch = runner.device.launch
    num_launched = 0

    def strict(plan: Any) -> Any:
        nonlocal num_launched
        num_launched += 1
        torch.cuda.set_sync_debug_mode("error")
        try:
            return launch(plan)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    monkeypatch.setattr(runner.device, "launch", strict)
    answers = run(make_engine(runner), requests(temperature=0.9, top_k=20))
    assert all(answer.error is None for answer in answers.values())
    assert num_launched > NUM_TOKENS


def test_one_step_at_a_time_gives_the_same_tokens(deterministic: ModelRunner, monkeypatch: pytest.MonkeyPatch) -> None:
    ahead = run(make_engine(deterministic), requests(temperature=0.9))
    monkeypatch.setattr(deterministic, "max_steps_in_flight", 1)
    assert tokens(run(make_engine(deterministic), requests(temperature=0.9))) == tokens(ahead)


# ---- bits -----------------------------------------------------------------------------------------------------------


def probe(**options: Any) -> GenerateRequest:
    options = {"temperature": 0.8, "seed": 3, "logprobs": 2, **options}
    return make_request("probe", prompt_of(530, 77), max_tokens=NUM_TOKENS, **options)


@pytest.fixture(scope="module")
def alone(deterministic: ModelRunner) -> tuple[Witness, Answer]:
    with Witness(deterministic) as witness:
        answer = run(make_engine(deterministic), [probe()])["probe", 0]
    return witness, answer


@pytest.mark.parametrize("how", ["in company", "in chunks", "preempted", "behind a prefix hit", "replayed"])
def test_bits(deterministic: ModelRunner, alone: tuple[Witness, Answer], how: str) -> None:
    witness_alone, expected = alone
    others = requests(temperature=1.0)
    engine = make_engine(deterministic)
    group = [*others, probe()]
    skipped = 0
    if how == "in chunks":
        engine = make_engine(deterministic, max_num_batched_tokens=41)
        group = [probe()]
    elif how == "preempted":
        engine = make_engine(deterministic, num_kv_blocks=60, enable_prefix_caching=False)
        group = [make_request("first", prompt_of(380), max_tokens=60, priority=-1), probe()]
    elif how == "behind a prefix hit":
        run(engine, [make_request("before", prompt_of(530, 77)[:500], max_tokens=2)])
    elif how == "replayed":
        skipped = 15
        group = [*others[:4], probe(output=expected.token_ids[:skipped])]
    with Witness(deterministic) as witness:
        answer = run(engine, group)["probe", 0]
    assert how != "preempted" or engine.scheduler.num_preemptions > 0
    assert how != "behind a prefix hit" or answer.num_cached_tokens >= 496
    assert answer.token_ids == expected.token_ids[skipped:]
    assert answer.logprobs == expected.logprobs[skipped:]
    assert_same_bits(("probe", 0), witness_alone, witness)


# ---- start-up -------------------------------------------------------------------------------------------------------


def test_nothing_is_compiled_after_start_up(runner: ModelRunner) -> None:
    """Steps of every size, alone and mixed, with all that a request may ask for. The fixture looks at the count."""
    rng = random.Random(3)
    for budget in (1, 7, 16, 33, 256):
        engine = make_engine(runner, max_num_batched_tokens=budget, max_num_seqs=min(budget, 40))
        group = [
            make_request(
                str(i),
                prompt_of(rng.choice((1, 2, 15, 16, 17, 64, 100)), i),
                max_tokens=rng.randint(1, 9),
                temperature=rng.choice((0.0, 1.0)),
                top_k=rng.choice((0, 5)),
                top_p=rng.choice((1.0, 0.8)),
                logprobs=rng.choice((None, 0, 5)),
                prompt_logprobs=rng.choice((None, None, 2)),
                presence_penalty=rng.choice((0.0, 0.5)),
            )
            for i in range(40)
        ]
        answers = run(engine, group, arrivals={i: rng.randrange(30) for i in range(40)})
        assert all(answer.error is None for answer in answers.values())


def test_the_memory_asked_for_is_taken_and_the_largest_step_still_fits(directory: Path) -> None:
    free, total = torch.cuda.mem_get_info()
    share = 0.5 * free / total
    options = {**OPTIONS, "num_kv_blocks": None, "gpu_memory_utilization": share, "max_num_batched_tokens": 2048}
    runner = make_runner(directory, device="cuda", dtype="auto", **options)
    used = free - torch.cuda.mem_get_info()[0]
    assert used <= share * total
    assert used >= 0.9 * share * total
    group = [make_request(str(i), prompt_of(1500, i), max_tokens=4, prompt_logprobs=0) for i in range(8)]
    assert all(answer.error is None for answer in run(make_engine(runner), group).values())
    assert free - torch.cuda.mem_get_info()[0] <= share * total


def test_runs_without_ray_pydantic_and_numba(directory: Path) -> None:
    script = f"""
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("ray", "pydantic", "fastapi", "numba", "llvmlite"):
            raise ImportError("absent: " + name)
sys.meta_path.insert(0, Absent())
from serve_app.llm import LLM, SamplingParams
llm = LLM(model={str(directory)!r}, device="cuda", num_kv_blocks=50, max_num_seqs=2, max_num_batched_tokens=16)
print(len(llm.generate([[5, 6, 7]], SamplingParams(max_tokens=4, ignore_eos=True))[0].token_ids))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[-1] == "4"
