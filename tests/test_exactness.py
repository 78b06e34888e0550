"""Greedy tokens of ragged runs equal transformers' ``generate``, one prompt at a time; seeded draws need no company.

Every run starts with NaN in all KV slots, and asserts that what it is about (preemption, prefix hits, chunks) happened.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from transformers import AutoModelForCausalLM

from serve_app.engine import scheduler as scheduler_module
from serve_app.engine.engine import Engine
from serve_app.engine.scheduler import SchedulerOutput
from serve_app.kernels.metadata import AttentionMetadata
from serve_app.llm import LLM, SamplingParams
from serve_app.runner.batch import Batch, BatchBuilder
from serve_app.runner.model_runner import ModelRunner
from tests.tiny_models import make_tiny_model, reference_greedy
from tests.tiny_runs import ARCHITECTURES, check_greedy, make_engine, make_request, make_runner, run

NUM_TOKENS = 20
VOCAB_SIZE = 307

OPTIONS: dict[str, dict[str, Any]] = {
    "LlamaForCausalLM": {"heads": 4, "kv_heads": 2},
    "MistralForCausalLM": {"heads": 3, "kv_heads": 1, "sliding_window": 24},
    "Qwen2ForCausalLM": {"heads": 4, "kv_heads": 4, "layers": 3, "sliding_window": 19, "tie": True},
    "Qwen3ForCausalLM": {"heads": 6, "kv_heads": 2, "head_dim": 32, "intermediate_size": 75},
}
"""Odd on purpose: groups of 1, 2 and 3, windows no multiple of anything, heads wider than the hidden size."""


def _prompts() -> list[list[int]]:
    """1 to 70 tokens; some begin alike, for 33 tokens; one comes twice."""
    rng = random.Random(7)
    alike = [rng.randrange(VOCAB_SIZE) for _ in range(33)]
    prompts = [[rng.randrange(VOCAB_SIZE) for _ in range(n)] for n in (1, 70, 16, 5, 31)]
    prompts += [alike + [rng.randrange(VOCAB_SIZE) for _ in range(n)] for n in (0, 9, 30)]
    return [*prompts, prompts[1]]


PROMPTS = _prompts()


class Tiny(NamedTuple):
    directory: Path
    reference: list[tuple[list[int], list[float]]]
    """For each of PROMPTS."""
    runner: Callable[[int], ModelRunner]
    """By block size."""


@pytest.fixture(scope="module", params=ARCHITECTURES)
def tiny(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    directory = make_tiny_model(tmp_path_factory.mktemp("model"), request.param, **OPTIONS[request.param])
    runners: dict[int, ModelRunner] = {}

    def runner(block_size: int) -> ModelRunner:
        if block_size not in runners:
            runners[block_size] = make_runner(directory, block_size=block_size)
        return runners[block_size]

    known = {tuple(p): reference_greedy(directory, p, NUM_TOKENS, eos=()) for p in PROMPTS}
    return Tiny(directory, [known[tuple(p)] for p in PROMPTS], runner)


def compare(tiny: Tiny, engine: Engine, order: list[int], arrivals: dict[int, int] | None = None) -> None:
    requests = [make_request(str(i), PROMPTS[i], max_tokens=NUM_TOKENS) for i in order]
    answers = run(engine, requests, arrivals=arrivals)
    compared = sum(check_greedy(answers[str(i), 0].token_ids, *tiny.reference[i]) for i in order)
    assert compared >= 0.9 * NUM_TOKENS * len(order)


IN_ORDER = list(range(len(PROMPTS)))


@pytest.mark.parametrize(
    ("block_size", "budget", "num_seqs"),
    [(16, 512, 128), (32, 7, 7), (64, 33, 4), (128, 1, 1), (256, 16, 16)],
    ids=lambda value: str(value),
)
def test_any_budget_and_block_size(tiny: Tiny, block_size: int, budget: int, num_seqs: int) -> None:
    engine = make_engine(tiny.runner(block_size), max_num_batched_tokens=budget, max_num_seqs=num_seqs)
    order = IN_ORDER if budget > 1 else IN_ORDER[::4]
    compare(tiny, engine, order)
    sizes = [record.num_tokens for record in engine.recorder.records]
    assert max(sizes) <= budget
    assert budget == 512 or max(sizes) == budget


def test_preemption(tiny: Tiny) -> None:
    engine = make_engine(
        tiny.runner(16), num_kv_blocks=9, max_num_batched_tokens=24, max_num_seqs=6, enable_prefix_caching=False
    )
    compare(tiny, engine, IN_ORDER)
    assert engine.scheduler.num_preemptions > 0
    assert engine.scheduler.num_recomputed_tokens > 0


def test_preemption_with_prefix_hits(tiny: Tiny) -> None:
    engine = make_engine(tiny.runner(16), num_kv_blocks=10, max_num_batched_tokens=40, max_num_seqs=5)
    compare(tiny, engine, IN_ORDER[::-1])
    assert engine.scheduler.num_preemptions > 0
    assert engine.scheduler.num_prefix_hits > 0


def test_prefix_hits(tiny: Tiny) -> None:
    """What others computed, and what a request left behind: the second time nearly all is found."""
    engine = make_engine(tiny.runner(16), max_num_batched_tokens=64, max_num_seqs=3)
    compare(tiny, engine, IN_ORDER)
    first = engine.scheduler.num_prefix_hits
    assert first >= 2 * 32 + 64  # the alike ones and the one that came twice
    compare(tiny, engine, IN_ORDER)
    assert engine.scheduler.num_prefix_hits - first >= sum(len(p) // 16 * 16 for p in PROMPTS)


@pytest.mark.parametrize("seed", range(3))
def test_random_arrivals(tiny: Tiny, seed: int) -> None:
    rng = random.Random(seed)
    budget = rng.choice((6, 19, 50))
    engine = make_engine(
        tiny.runner(rng.choice((16, 32))),
        num_kv_blocks=rng.randint(8, 20),
        max_num_batched_tokens=budget,
        max_num_seqs=rng.randint(2, 6),
        enable_prefix_caching=rng.random() < 0.7,
    )
    order = rng.sample(IN_ORDER, len(IN_ORDER))
    compare(tiny, engine, order, arrivals={i: rng.randint(0, 60) for i in range(len(order))})
    assert any(len(record.sequences) > 1 for record in engine.recorder.records)


def test_through_the_offline_face(tiny: Tiny) -> None:
    """Whole engines with the options by name, two of them small: LLM, no shared runner."""
    llm = LLM(
        tiny.directory, dtype="float32", num_kv_blocks=14, block_size=16, max_num_batched_tokens=32, max_num_seqs=5
    )
    answers = llm.generate(PROMPTS, SamplingParams(max_tokens=NUM_TOKENS, ignore_eos=True))
    assert [answer.prompt_token_ids for answer in answers] == PROMPTS
    for answer, (token_ids, margins) in zip(answers, tiny.reference, strict=True):
        check_greedy(answer.token_ids, token_ids, margins)


# ---- planted faults: the comparisons above would see them -----------------------------------------------------------

FAULTS: dict[str, Callable[[AttentionMetadata], dict[str, torch.Tensor]]] = {
    "slots shifted": lambda m: {
        "slot_mapping": torch.where(m.slot_mapping % 16 < 15, m.slot_mapping + 1, m.slot_mapping)
    },
    "positions shifted in the middle": lambda m: {
        "positions": torch.where(m.positions > 9, m.positions + 1, m.positions)
    },
    "block tables swapped": lambda m: {"block_tables": m.block_tables.roll(1, 0).contiguous()},
    "newest key unseen": lambda m: {"seq_lens": torch.where(m.seq_lens > 1, m.seq_lens - 1, m.seq_lens)},
}


@pytest.mark.parametrize("fault", FAULTS)
def test_planted_faults_are_seen(
    fault: str, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = make_tiny_model(tmp_path_factory.mktemp("model"))
    tiny = Tiny(directory, [reference_greedy(directory, p, NUM_TOKENS, eos=()) for p in PROMPTS[:5]], None)  # type: ignore[arg-type]
    runner = make_runner(directory, block_size=16)
    engine = make_engine(runner, max_num_batched_tokens=24, max_num_seqs=6)
    compare(tiny, engine, IN_ORDER[:5])

    build = BatchBuilder.build

    def wrong(self: BatchBuilder, plan: SchedulerOutput) -> Batch:
        batch = build(self, plan)
        return batch._replace(metadata=dataclasses.replace(batch.metadata, **FAULTS[fault](batch.metadata)))

    monkeypatch.setattr(BatchBuilder, "build", wrong)
    with pytest.raises(AssertionError, match="transformers says"):
        compare(tiny, make_engine(runner, max_num_batched_tokens=24, max_num_seqs=6), IN_ORDER[:5])


def test_a_prefix_hit_on_another_prompt_is_seen(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    """Hashes that forget their tokens: whoever is as long finds the others' blocks."""
    monkeypatch.setattr(scheduler_module, "hash_block", lambda parent, token_ids, *tag: parent + b"x")
    engine = make_engine(tiny.runner(16), max_num_seqs=1)
    with pytest.raises(AssertionError, match="transformers says"):
        compare(tiny, engine, IN_ORDER)
    assert engine.scheduler.num_prefix_hits > 0


# ---- what a config can say ------------------------------------------------------------------------------------------

VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "rope linear": ("LlamaForCausalLM", {"rope": {"rope_type": "linear", "factor": 3.0}}),
    "rope llama3": (
        "LlamaForCausalLM",
        {
            "rope": {
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 32,
            }
        },
    ),
    "rope yarn": (
        "Qwen3ForCausalLM",
        {"rope": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}},
    ),
    "biases everywhere": ("LlamaForCausalLM", {"attention_bias": True, "mlp_bias": True}),
    "tied llama": ("LlamaForCausalLM", {"tie": True}),
    "untied qwen2": ("Qwen2ForCausalLM", {"tie": False}),
    "three shards": ("LlamaForCausalLM", {"shards": 3}),
    "one layer": ("MistralForCausalLM", {"layers": 1, "sliding_window": 5}),
    "window of two": ("Qwen2ForCausalLM", {"sliding_window": 2, "layers": 3}),
    "one wide head": ("LlamaForCausalLM", {"heads": 1, "kv_heads": 1, "head_dim": 128}),
    "sixteen heads on one": ("Qwen3ForCausalLM", {"heads": 16, "kv_heads": 1}),
    "head_dim 80": ("LlamaForCausalLM", {"heads": 5, "kv_heads": 5, "head_dim": 80, "hidden_size": 80}),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_variants(variant: str, tmp_path: Path) -> None:
    architecture, options = VARIANTS[variant]
    directory = make_tiny_model(tmp_path / "model", architecture, seed=3, **options)
    assert len(list((tmp_path / "model").glob("*.safetensors"))) >= options.get("shards", 1)
    prompts = [PROMPTS[i] for i in (1, 3, 6)]
    reference = [reference_greedy(directory, p, 12, eos=()) for p in prompts]
    if "rope" in options:  # it matters for these prompts
        plain = make_tiny_model(tmp_path / "plain", architecture, seed=3)
        assert [reference_greedy(plain, p, 12, eos=())[0] for p in prompts] != [ids for ids, _ in reference]
    engine = make_engine(make_runner(directory, block_size=16, max_num_batched_tokens=29, max_num_seqs=4))
    answers = run(engine, [make_request(str(i), p, max_tokens=12) for i, p in enumerate(prompts)])
    compared = [check_greedy(answers[str(i), 0].token_ids, *reference[i]) for i in range(len(prompts))]
    assert sum(compared) >= 30


def test_window_of_one(tmp_path: Path) -> None:
    """By whole forwards: the cache of transformers 5.23 keeps ``[-window + 1 :]`` keys, which for 1 is all of them."""
    directory = make_tiny_model(tmp_path, "MistralForCausalLM", sliding_window=1)
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, attn_implementation="eager")
    token_ids = list(PROMPTS[3])
    for _ in range(8):
        with torch.no_grad():
            token_ids.append(int(model(torch.tensor([token_ids]), use_cache=False).logits[0, -1].argmax()))
    answers = run(make_engine(make_runner(directory, block_size=16)), [make_request("a", PROMPTS[3], max_tokens=8)])
    assert PROMPTS[3] + answers["a", 0].token_ids == token_ids


def test_many_sequences_beyond_one_key_chunk(tmp_path: Path) -> None:
    """Contexts over 256 keys, so that the online softmax goes on over chunks of keys."""
    directory = make_tiny_model(tmp_path, seed=5)
    rng = random.Random(5)
    prompts = [[rng.randrange(VOCAB_SIZE) for _ in range(n)] for n in (255, 300, 17)]
    engine = make_engine(make_runner(directory, block_size=64, max_num_batched_tokens=100, max_num_seqs=4))
    answers = run(engine, [make_request(str(i), p, max_tokens=8) for i, p in enumerate(prompts)])
    for i, p in enumerate(prompts):
        check_greedy(answers[str(i), 0].token_ids, *reference_greedy(directory, p, 8, eos=()))


# ---- seeded sampling ------------------------------------------------------------------------------------------------

SETTINGS: list[dict[str, Any]] = [
    {"temperature": 1.0},
    {"temperature": 0.7, "top_p": 0.9},
    {"temperature": 1.3, "top_k": 20, "min_p": 0.02},
    {"temperature": 2.0, "presence_penalty": 0.5, "repetition_penalty": 1.2},
    {"temperature": 0.0},
]


def test_seeded_draws_are_the_same_alone_and_in_company(tiny: Tiny) -> None:
    requests = [
        make_request(str(i), p, max_tokens=NUM_TOKENS, **{**SETTINGS[i % len(SETTINGS)], "seed": 100 + i})
        for i, p in enumerate(PROMPTS)
    ]
    crowd = make_engine(tiny.runner(16), num_kv_blocks=12, max_num_batched_tokens=21, max_num_seqs=6)
    together = run(crowd, requests, arrivals={0: 9, 5: 3})
    assert crowd.scheduler.num_preemptions > 0
    assert crowd.scheduler.num_prefix_hits > 0
    for request in requests:
        alone = run(make_engine(tiny.runner(16)), [request])
        assert alone[request.request_id, 0].token_ids == together[request.request_id, 0].token_ids
    drawn = [tuple(answer.token_ids) for answer in together.values()]
    assert len(set(drawn)) == len(drawn)


@pytest.mark.parametrize(
    "setting", [{"temperature": 1.0}, {"temperature": 1.5, "top_k": 8}, {"temperature": 0.8, "top_p": 0.6}], ids=str
)
def test_draws_follow_the_exact_distribution(setting: dict[str, Any], tmp_path: Path) -> None:
    """2048 first tokens against transformers' logits: 16 seeds of 128 choices, in batches of what fits.

    Chi-square over tokens expected at least 8 times, the rest as one class; the bound is 5 standard deviations up.
    """
    directory = make_tiny_model(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float64)
    with torch.no_grad():
        logits_V = model(torch.tensor([PROMPTS[3]])).logits[0, -1]
    probabilities_V = (logits_V / setting["temperature"]).softmax(-1)
    ranked = probabilities_V.argsort(descending=True)
    if "top_k" in setting:
        probabilities_V[ranked[setting["top_k"] :]] = 0.0
    if "top_p" in setting:
        before = probabilities_V[ranked].cumsum(-1) - probabilities_V[ranked]
        probabilities_V[ranked[before >= setting["top_p"]]] = 0.0
    probabilities_V /= probabilities_V.sum()

    engine = make_engine(make_runner(directory, block_size=16, num_kv_blocks=300, max_num_seqs=128))
    groups = [
        [
            make_request(str(seed), PROMPTS[3], max_tokens=1, **{**setting, "seed": seed}, choice_index=i)
            for i in range(128)
        ]
        for seed in range(16)
    ]
    for i, group in enumerate(groups):
        assert len({request.sampling.seed for request in group}) == 1, i
    answers = run(engine, groups)
    counts_V = torch.zeros(VOCAB_SIZE, dtype=torch.float64)
    for answer in answers.values():
        counts_V[answer.token_ids[0]] += 1
    num = counts_V.sum()
    assert num == 2048
    assert counts_V[probabilities_V == 0].sum() == 0
    expected_V = num * probabilities_V
    common = expected_V >= 8
    classes = torch.cat((counts_V[common], counts_V[~common].sum()[None]))
    expected = torch.cat((expected_V[common], expected_V[~common].sum()[None]))
    used = expected > 0
    degrees = int(used.sum()) - 1
    assert degrees >= 4
    chi_square = ((classes - expected)[used] ** 2 / expected[used]).sum()
    assert chi_square < degrees + 5 * (2 * degrees) ** 0.5
