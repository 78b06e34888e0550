"""Deterministic mode, bit for bit: every K, V and logit of a sequence is the same however it was computed.

Compared with the sequence alone, its prompt in one chunk: in a batch of 64, in chunks of 1, 7, 16 and 512, after
preemption, behind a prefix hit, replayed from the middle. Each with one thread and with two (nothing is promised
between the two). The models are wide enough that a library would pick other kernels for other numbers of rows.
"""

from __future__ import annotations

import random
from typing import Any, NamedTuple

import pytest
import torch

from serve_app.engine.request import GenerateRequest
from serve_app.errors import DeterminismError
from serve_app.kernels import cpu
from serve_app.runner.model_runner import ModelRunner
from tests.tiny_models import make_tiny_model
from tests.tiny_runs import Witness, assert_same_bits, make_engine, make_request, make_runner, run

VOCAB_SIZE = 515
NUM_PROMPT = 100
NUM_OUTPUT = 12
PROBE = ("probe", 0)

MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama float32": ("LlamaForCausalLM", "float32", {"heads": 6, "kv_heads": 2, "head_dim": 32}),
    "qwen2 float32 window": ("Qwen2ForCausalLM", "float32", {"heads": 4, "kv_heads": 4, "sliding_window": 37}),
    "qwen3 bfloat16": ("Qwen3ForCausalLM", "bfloat16", {"heads": 4, "kv_heads": 1, "head_dim": 64}),
}

RUNS = [(model, 1) for model in MODELS] + [("llama float32", 2), ("qwen3 bfloat16", 2)]
"""(model, threads)."""


def _random_prompt(rng: random.Random, length: int) -> list[int]:
    return [rng.randrange(VOCAB_SIZE) for _ in range(length)]


PROMPT = _random_prompt(random.Random(1), NUM_PROMPT)


def probe(**options: Any) -> GenerateRequest:
    return make_request("probe", PROMPT, max_tokens=NUM_OUTPUT, temperature=0.9, seed=5, **options)


class Setup(NamedTuple):
    runner: ModelRunner
    alone: Witness
    token_ids: list[int]


@pytest.fixture(scope="module", params=RUNS, ids=lambda p: f"{p[0]}, {p[1]} threads")
def setup(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Setup:
    model, num_threads = request.param
    architecture, dtype, options = MODELS[model]
    directory = make_tiny_model(
        tmp_path_factory.mktemp("model"),
        architecture,
        vocab_size=VOCAB_SIZE,
        hidden_size=192,
        intermediate_size=400,
        **options,
    )
    try:
        runner = make_runner(
            directory, dtype=dtype, block_size=16, num_kv_blocks=320, num_threads=num_threads, deterministic=True
        )
    except DeterminismError as error:
        if dtype == "float32":
            raise
        pytest.skip(f"this processor cannot prove {dtype}: {error}")
    assert runner.deterministic
    with Witness(runner) as alone:
        answers = run(make_engine(runner), [probe()])
    assert alone.chunks[PROBE] == [NUM_PROMPT] + [1] * (NUM_OUTPUT - 1)
    assert torch.get_num_threads() == num_threads
    return Setup(runner, alone, answers[PROBE].token_ids)


pytestmark = pytest.mark.may_skip("whether bfloat16 products can be proved independent of the batch is the processor's")


def check(setup: Setup, witness: Witness, token_ids: list[int] | None, num_logits: int = NUM_OUTPUT) -> None:
    assert assert_same_bits(PROBE, setup.alone, witness) >= num_logits
    assert witness.kv[PROBE].shape[2] == NUM_PROMPT + NUM_OUTPUT - 1
    assert token_ids is None or token_ids == setup.token_ids
    assert torch.get_num_threads() == setup.runner.config.num_threads


def company(num: int, *, length: int = 40, max_tokens: int = NUM_OUTPUT) -> list[GenerateRequest]:
    rng = random.Random(2)
    return [
        make_request(
            f"other {i}", _random_prompt(rng, rng.randint(1, length)), max_tokens=max_tokens, temperature=1.0, seed=i
        )
        for i in range(num)
    ]


def test_in_a_batch_of_64(setup: Setup) -> None:
    others = company(63)
    engine = make_engine(setup.runner)
    with Witness(setup.runner) as witness:
        answers = run(engine, [*others[:40], probe(), *others[40:]])
    assert max(len(record.sequences) for record in engine.recorder.records) == 64
    check(setup, witness, answers[PROBE].token_ids)


@pytest.mark.parametrize("budget", [1, 7, 16, 512])
def test_in_chunks(setup: Setup, budget: int) -> None:
    engine = make_engine(setup.runner, max_num_batched_tokens=budget, max_num_seqs=min(budget, 128))
    with Witness(setup.runner) as witness:
        answers = run(engine, [probe()])
    assert witness.chunks[PROBE][0] == min(budget, NUM_PROMPT)
    check(setup, witness, answers[PROBE].token_ids)


def test_in_uneven_chunks_beside_others(setup: Setup) -> None:
    engine = make_engine(setup.runner, max_num_batched_tokens=23, max_num_seqs=9)
    with Witness(setup.runner) as witness:
        answers = run(engine, [*company(12), probe()], arrivals={i: 5 * i for i in range(12)})
    assert len(set(witness.chunks[PROBE])) > 3
    check(setup, witness, answers[PROBE].token_ids)


@pytest.mark.parametrize("enable_prefix_caching", [False, True], ids=["recomputed", "partly found again"])
def test_after_preemption(setup: Setup, enable_prefix_caching: bool) -> None:
    """The others are older and grow into the pool's last blocks, so that the probe loses its own, in the middle."""
    engine = make_engine(
        setup.runner,
        num_kv_blocks=10,
        max_num_batched_tokens=64,
        max_num_seqs=8,
        enable_prefix_caching=enable_prefix_caching,
    )
    others = [make_request(f"other {i}", PROMPT[:8], max_tokens=30, cache_salt=str(i)) for i in range(3)]
    with Witness(setup.runner) as witness:
        answers = run(engine, [*others, probe(priority=1)])
    assert engine.scheduler.num_preemptions > 0
    assert max(witness.chunks[PROBE][2:]) > 1  # it had decoded, and was begun again
    assert witness.chunks[PROBE][2] == 1
    if not enable_prefix_caching:
        assert sum(witness.chunks[PROBE]) > 2 * NUM_PROMPT
    check(setup, witness, answers[PROBE].token_ids)


def test_behind_a_prefix_hit(setup: Setup) -> None:
    """Blocks that another sequence left, made by decodes and odd chunks, in company; a whole prompt found, too."""
    engine = make_engine(setup.runner, max_num_batched_tokens=33, max_num_seqs=4)
    earlier = make_request("earlier", PROMPT[:70], max_tokens=1)
    with Witness(setup.runner) as witness:
        answers = run(engine, [earlier, *company(5), probe()], arrivals={6: 8})
        check(setup, witness, answers[PROBE].token_ids)
        assert answers[PROBE].num_cached_tokens == 64
        witness.kv.clear()
        again = run(engine, [make_request("whole", PROMPT[:96], max_tokens=1), probe()], arrivals={1: 0})
    assert again[PROBE].num_cached_tokens == 96
    assert again["whole", 0].num_cached_tokens == 96
    check(setup, witness, again[PROBE].token_ids)


@pytest.mark.parametrize("num_replayed", [1, 6, NUM_OUTPUT - 1])
def test_replayed_from_the_middle(setup: Setup, num_replayed: int) -> None:
    """Another replica has emitted some tokens: they come back as output, and the rest follows bit for bit."""
    engine = make_engine(setup.runner, max_num_batched_tokens=48, max_num_seqs=9)
    with Witness(setup.runner) as witness:
        answers = run(engine, [*company(6), probe(output=setup.token_ids[:num_replayed])], arrivals={2: 3, 6: 2})
    check(setup, witness, None, NUM_OUTPUT - num_replayed)
    assert setup.token_ids[:num_replayed] + answers[PROBE].token_ids == setup.token_ids


def test_choices_of_a_shared_prompt(setup: Setup) -> None:
    """Choice 1 runs on copied blocks beside choice 0; alone, it computes the prompt itself."""
    with Witness(setup.runner) as witness:
        choices = [probe(choice_index=i) for i in range(3)]
        together = run(make_engine(setup.runner, enable_prefix_caching=False), [choices])
    check(setup, witness, together[PROBE].token_ids)
    with Witness(setup.runner) as alone:
        lone = run(make_engine(setup.runner), [probe(choice_index=1)])
    assert together["probe", 1].token_ids == lone["probe", 1].token_ids != setup.token_ids
    assert sum(witness.chunks["probe", 1]) == NUM_OUTPUT  # the prompt's last token, and the outputs but the last
    assert_same_bits(("probe", 1), witness, alone)


def test_the_witness_sees_one_bit_that_depends_on_the_batch(setup: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    attention = cpu.ragged_attention

    def wrong(
        q_NHD: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, metadata: Any, **rest: Any
    ) -> torch.Tensor:
        out_NHD = attention(q_NHD, k_cache, v_cache, metadata, **rest)
        return out_NHD if metadata.num_seqs == 1 else torch.nextafter(out_NHD, torch.full_like(out_NHD, 9.0))

    monkeypatch.setattr(cpu, "ragged_attention", wrong)
    with Witness(setup.runner) as witness:
        run(make_engine(setup.runner), [probe(), *company(2)])
    with pytest.raises(AssertionError, match="differ"):
        check(setup, witness, None)
