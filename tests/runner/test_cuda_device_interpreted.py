"""The whole GPU path without a card: ModelRunner, graphs, launch-ahead, and the Triton kernels in the interpreter.

A small model, a mixed batch, 8 tokens: greedy tokens equal the CPU path's. In deterministic mode a sequence has the same
K, V and log-probabilities, bit for bit, alone and in company, whole and in chunks, replayed from the middle.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

from serve_app.engine.engine import Engine
from serve_app.engine.request import FinishReason, PoolingParams
from serve_app.kernels import ragged_attention
from serve_app.runner import cuda_device, model_runner
from serve_app.runner.cuda_device import CudaDevice
from serve_app.runner.device_sampler import DeviceSampler
from serve_app.runner.model_runner import ModelRunner
from serve_app.runner.rehearsal import GREEDY
from serve_app.text import grammar
from serve_app.text.tokenizer import Tokenizer
from tests.runner.fake_gpu import FakeGpu
from tests.tiny_models import make_other_model, make_tiny_model
from tests.tiny_runs import Answer, Witness, assert_same_bits, make_engine, make_request, make_runner, run

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="these run in the interpreter; see pytest -m gpu")

NUM_TOKENS = 8
OPTIONS: dict[str, Any] = {
    "num_kv_blocks": 20,
    "block_size": 16,
    "max_num_seqs": 3,
    "max_num_batched_tokens": 24,
    "max_model_len": 64,
}


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Small, and odd: a vocabulary and a width of the MLP that no tile divides, a group of 3."""
    return make_tiny_model(
        tmp_path_factory.mktemp("model"),
        "Qwen3ForCausalLM",
        seed=6,
        layers=1,
        heads=3,
        kv_heads=1,
        vocab_size=261,
        intermediate_size=75,
    )


@pytest.fixture(scope="module")
def _on_a_fake_gpu() -> Iterator[None]:
    """Nothing has to be compiled here and no memory measured, so start-up rehearses little."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model_runner, "find_gpu", lambda name: FakeGpu("cuda") if name == "cuda" else None)
        patch.setattr(cuda_device, "variants", lambda *_: [])
        patch.setattr(cuda_device, "largest_spans", lambda *_: [(0, 2)])
        patch.setattr(cuda_device, "DRAWN", GREEDY)
        patch.setattr(DeviceSampler, "warm_up", lambda *_: None)
        yield


def prompt_of(length: int, salt: int = 0) -> list[int]:
    return [(37 * i + 11 * salt + 5) % 256 for i in range(length)]


def requests(**sampling: Any) -> list[Any]:
    """More than a step holds, so that chunks and decodes share steps."""
    return [
        make_request(str(i), prompt_of(n, i), max_tokens=NUM_TOKENS, **sampling) for i, n in enumerate((30, 5, 1, 17))
    ]


@pytest.mark.usefixtures("_on_a_fake_gpu")
def test_greedy_tokens_equal_the_cpu_paths(directory: Path) -> None:
    runner = make_runner(directory, device="cuda", **OPTIONS)
    assert isinstance(runner.device, CudaDevice)
    engine = make_engine(runner)
    answers = run(engine, requests(), arrivals={2: 3})
    expected = run(make_engine(make_runner(directory, **OPTIONS)), requests(), arrivals={2: 3})
    assert {key: answer.token_ids for key, answer in answers.items()} == {
        key: answer.token_ids for key, answer in expected.items()
    }
    assert all(len(answer.token_ids) == NUM_TOKENS for answer in answers.values())
    records = list(engine.recorder.records)
    assert any(len({s.num_tokens == 1 for s in record.sequences}) == 2 for record in records), "no mixed step"
    assert runner.device.graphs.num_replays > 2
    assert runner.max_steps_in_flight == 2


@pytest.mark.usefixtures("_on_a_fake_gpu")
def test_a_model_of_transformers_runs_without_graphs(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Gemma 2: windows in one layer of two, soft-caps, a scale of its own, in the interpreted kernels."""
    directory = make_other_model(
        tmp_path,
        "Gemma2ForCausalLM",
        head_dim=16,
        sliding_window=7,
        query_pre_attn_scalar=20,
        attn_logit_softcapping=3.0,
        final_logit_softcapping=4.0,
    )
    with caplog.at_level("INFO"):
        runner = make_runner(directory, device="cuda", **OPTIONS)
    assert isinstance(runner.device, CudaDevice)
    assert "CUDA graphs are off" in caplog.text
    both = [make_request(str(i), prompt_of(n, i), max_tokens=3) for i, n in enumerate((17, 5))]
    answers = run(make_engine(runner), both)
    expected = run(make_engine(make_runner(directory, **OPTIONS)), both)
    assert {key: answer.token_ids for key, answer in answers.items()} == {
        key: answer.token_ids for key, answer in expected.items()
    }
    assert runner.device.graphs.num_replays == 0


@pytest.mark.usefixtures("_on_a_fake_gpu")
def test_vectors_equal_the_cpu_paths(directory: Path) -> None:
    """In chunks, beside an answer; in deterministic mode with the bits of vectors that are computed alone."""

    def vectors(engine: Engine, *, alone: bool = False) -> dict[Any, bytes]:
        asked = [
            dataclasses.replace(make_request(f"{kind}{i}", prompt_of(n, i)), pooling=PoolingParams(kind))
            for kind in ("last", "mean")
            for i, n in enumerate((26, 1))
        ]
        found: dict[Any, bytes] = {}
        groups = (
            [[request] for request in asked]
            if alone
            else [[*asked, make_request("answer", prompt_of(3), max_tokens=2)]]
        )
        for group in groups:
            for request in group:
                engine.add(request)
            while engine.has_work:
                for output in engine.step():
                    assert output.error is None
                    if output.embedding is not None:
                        found[output.request_id] = output.embedding
        assert len(found) == len(asked)
        return found

    on_cpu = vectors(make_engine(make_runner(directory, **OPTIONS)))
    runner = make_runner(directory, device="cuda", **OPTIONS, deterministic=True)
    on_gpu = vectors(make_engine(runner))
    for name, data in on_cpu.items():
        assert np.allclose(np.frombuffer(on_gpu[name], "<f4"), np.frombuffer(data, "<f4"), atol=1e-5), name
    assert vectors(make_engine(runner, enable_prefix_caching=False), alone=True) == on_gpu


@pytest.mark.usefixtures("_on_a_fake_gpu")
def test_a_grammar_gives_the_cpu_paths_tokens(directory: Path) -> None:
    """Two steps in flight, masks as bits: a sentence, an eos that may come, and a free neighbour."""
    text = grammar.regex("[b-k]{2,4}=[0-9]{2}")
    bias = {40: 1.5}
    constrained = make_request("g", prompt_of(5), grammar=text, max_tokens=NUM_TOKENS, ignore_eos=False)
    company = [
        constrained,
        make_request("h", prompt_of(3), grammar=grammar.regex("[0-9]+"), max_tokens=4, logit_bias=bias),
    ]
    company.append(make_request("free", prompt_of(7), max_tokens=5))
    runner = make_runner(directory, device="cuda", **OPTIONS)
    answers = run(make_engine(runner), company)
    expected = run(make_engine(make_runner(directory, **OPTIONS)), company)
    assert {key: answer.token_ids for key, answer in answers.items()} == {
        key: answer.token_ids for key, answer in expected.items()
    }
    decoded = Tokenizer.from_directory(directory).decode(answers["g", 0].token_ids)
    assert re.fullmatch("[b-k]{2,4}=[0-9]{2}", decoded)
    assert answers["g", 0].finish_reason is expected["g", 0].finish_reason is FinishReason.STOP
    assert runner.max_steps_in_flight == 2


# ---- bits -----------------------------------------------------------------------------------------------------------

NUM_PROMPT = 34
"""More keys than one tile has."""
NUM_EXACT = 5
"""Tokens of these runs, which are slow."""


def probe(**options: Any) -> Any:
    return make_request("probe", prompt_of(NUM_PROMPT), max_tokens=NUM_EXACT, logprobs=2, **options)


class Setup(NamedTuple):
    runner: ModelRunner
    alone: Witness
    answer: Answer


@pytest.fixture(scope="module")
def _classes_differ() -> Iterator[None]:
    """Sequences as short as these would have the same bits in either class: the decodes' tiles are made smaller."""
    config_of = ragged_attention.attention_config

    def smaller(head_dim: int, group: int, dtype: torch.dtype, row_class: str, capability: tuple[int, int]) -> Any:
        config = config_of(head_dim, group, dtype, row_class, capability)
        return config._replace(block_n=16) if row_class == "decode" else config

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ragged_attention, "attention_config", smaller)
        yield


@pytest.fixture(scope="module")
def setup(directory: Path, _on_a_fake_gpu: None, _classes_differ: None) -> Setup:
    """A runner in deterministic mode, and what the probe is alone in it."""
    runner = make_runner(
        directory, device="cuda", deterministic=True, **{**OPTIONS, "max_num_seqs": 2, "max_num_batched_tokens": 40}
    )
    with Witness(runner) as alone:
        answer = run(make_engine(runner), [probe()])["probe", 0]
    assert alone.chunks["probe", 0] == [34, 1, 1, 1, 1]
    return Setup(runner, alone, answer)


def check(setup: Setup, witness: Witness, answer: Answer, num_replayed: int = 0) -> None:
    assert answer.token_ids == setup.answer.token_ids[num_replayed:]
    assert answer.logprobs == setup.answer.logprobs[num_replayed:]  # bit for bit: they are Python floats
    assert_same_bits(("probe", 0), setup.alone, witness)
    assert witness.kv["probe", 0].shape[2] == NUM_PROMPT + NUM_EXACT - 1


def test_deterministic_tokens_equal_the_cpu_paths(directory: Path, setup: Setup) -> None:
    expected = run(make_engine(make_runner(directory, **OPTIONS)), [probe()])["probe", 0]
    assert setup.answer.token_ids == expected.token_ids
    for ours, theirs in zip(setup.answer.logprobs, expected.logprobs, strict=True):
        assert ours.logprob == pytest.approx(theirs.logprob, abs=1e-4)


def test_bits_in_chunks_and_in_company(setup: Setup) -> None:
    engine = make_engine(setup.runner, max_num_batched_tokens=13)
    with Witness(setup.runner) as witness:
        answers = run(engine, [make_request("other", prompt_of(2, 1), max_tokens=6), probe()])
    assert witness.chunks["probe", 0] == [11, 12, 11, 1, 1, 1, 1]
    assert setup.runner.device.graphs.num_replays > 0  # type: ignore[attr-defined]
    check(setup, witness, answers["probe", 0])


def test_bits_of_a_replay(setup: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its output tokens come as rows of one chunk with the prompt's, and are computed as decodes."""
    replay = probe(output=setup.answer.token_ids[:3])
    with Witness(setup.runner) as witness:
        answers = run(make_engine(setup.runner), [replay])
    assert witness.chunks["probe", 0] == [37, 1]
    check(setup, witness, answers["probe", 0], num_replayed=3)
    # As one chunk of a prompt, they come out otherwise.
    monkeypatch.setattr(setup.runner.device, "has_position_classes", False)
    assert run(make_engine(setup.runner), [replay])["probe", 0].logprobs != setup.answer.logprobs[3:]
