"""ModelRunner: what it chooses and says, the order of a step, and narrow element types against the oracle's kernels."""

from __future__ import annotations

import dataclasses
import logging
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from serve_app.engine.config import EngineConfig
from serve_app.engine.engine import Engine
from serve_app.errors import ConfigurationError
from serve_app.kernels import ops
from serve_app.kernels.cpu import MAX_ROWS
from serve_app.runner.model_runner import ModelRunner
from tests.tiny_models import make_tiny_model
from tests.tiny_runs import Witness, make_engine, make_request, make_runner, run

PROMPT = [(37 * i + 11) % 300 for i in range(45)]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("model"), "Qwen3ForCausalLM", seed=6)


# ---- what it chooses ------------------------------------------------------------------------------------------------


def test_describe(directory: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        runner = make_runner(directory, block_size=64, num_kv_blocks=7, max_model_len=99)
    mode, cache = runner.describe()
    assert mode.startswith(f"Qwen3ForCausalLM from {directory}: float32, 1 CPU threads, deterministic")
    assert mode.endswith(f"max_model_len 99, numerics {runner.fingerprint}")
    # 2 (k, v) * 2 kv heads * 16 dims * 4 bytes = 256 bytes; 7 * 64 tokens in 2 layers = 224 KiB
    assert cache == "KV cache: 7 blocks of 64 tokens = 448 tokens, 0.2 MiB, 256 bytes per token and layer"
    assert [record.getMessage() for record in caplog.records if record.levelname == "INFO"][-2:] == [mode, cache]


def test_num_kv_blocks_by_hand_wins(directory: Path) -> None:
    runner = make_runner(directory, num_kv_blocks=9, kv_cache_memory_bytes=10**9)
    assert (
        runner.num_kv_blocks
        == runner.kv_cache.num_blocks
        == Engine(runner.config, runner).scheduler.pool.num_blocks
        == 9
    )


def test_memory_decides_where_no_hand_does(directory: Path) -> None:
    runner = make_runner(directory, num_kv_blocks=None, kv_cache_memory_bytes=100_000, block_size=16)
    assert runner.num_kv_blocks == 100_000 // (2 * 256 * 16)
    runner = make_runner(directory, num_kv_blocks=None, block_size=16, max_num_seqs=2, max_model_len=50)
    assert runner.num_kv_blocks == 2 * 4


@pytest.mark.parametrize("cache_dtype", list(DTYPES))
def test_cache_dtype(cache_dtype: str, directory: Path) -> None:
    runner = make_runner(directory, kv_cache_dtype=cache_dtype)
    assert {x.dtype for x in (*runner.kv_cache.k, *runner.kv_cache.v)} == {DTYPES[cache_dtype]}
    answers = run(make_engine(runner), [make_request("a", PROMPT, max_tokens=6)])
    assert len(answers["a", 0].token_ids) == 6
    automatic = make_runner(directory, dtype="bfloat16")
    assert automatic.kv_cache.k[0].dtype == torch.bfloat16


def test_more_heads_in_a_group_than_the_kernels_hold(tmp_path: Path) -> None:
    """Once they were written past the end of the scratch."""
    widest = make_tiny_model(tmp_path / "widest", "Qwen3ForCausalLM", heads=MAX_ROWS, kv_heads=1, layers=1)
    assert run(make_engine(make_runner(widest)), [make_request("a", PROMPT, max_tokens=3)])["a", 0].error is None
    wider = make_tiny_model(tmp_path / "wider", "Qwen3ForCausalLM", heads=MAX_ROWS + 1, kv_heads=1, layers=1)
    with pytest.raises(
        ConfigurationError, match=f"num_attention_heads is {MAX_ROWS + 1}; .* at most {MAX_ROWS} for each"
    ):
        make_runner(wider)


def test_shapes_that_no_vector_holds(tmp_path: Path) -> None:
    for name, options in (("head_dim", {"head_dim": 24}), ("hidden_size", {"hidden_size": 40})):
        with pytest.raises(
            ConfigurationError, match=f"{name} is {24 if name == 'head_dim' else 40}; .* multiple of 16"
        ):
            make_runner(make_tiny_model(tmp_path / name, **options))


# ---- threads --------------------------------------------------------------------------------------------------------


def test_each_runner_keeps_its_threads(directory: Path) -> None:
    """Two in one thread, and somebody else who sets torch's: each step runs on its own runner's number."""
    runners = {num: make_runner(directory, num_threads=num) for num in (1, 2)}
    for num, runner in [*runners.items()] * 2:
        torch.set_num_threads(3)
        seen: list[int] = []
        forward = runner.model.forward

        def watched(*arguments: Any, seen: list[int] = seen, forward: Any = forward) -> torch.Tensor:
            seen.append(torch.get_num_threads())
            return forward(*arguments)  # type: ignore[no-any-return]

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(runner.model, "forward", watched)
            run(make_engine(runner), [make_request("a", PROMPT[:3], max_tokens=2)])
        assert seen == [num, num]


def test_on_a_thread_of_its_own(directory: Path) -> None:
    """OpenMP's number belongs to the calling thread: a step thread must get it, too."""
    runner = make_runner(directory, num_threads=2)
    here = run(make_engine(runner), [make_request("a", PROMPT, max_tokens=5)])["a", 0].token_ids
    torch.set_num_threads(1)
    there: list[Any] = []

    def work() -> None:
        there.append(run(make_engine(runner), [make_request("a", PROMPT, max_tokens=5)])["a", 0].token_ids)
        there.append(torch.get_num_threads())

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert there == [here, 2]


def test_two_engines_on_two_threads_share_nothing(directory: Path) -> None:
    """The kernels' scratch once was one for all who asked for the same shape."""
    runners = [make_runner(directory) for _ in range(2)]
    requests = [make_request("a", prompt, max_tokens=60) for prompt in (PROMPT, PROMPT[::-1])]
    expected = [run(make_engine(runner), [request]) for runner, request in zip(runners, requests, strict=True)]
    answers: dict[int, Any] = {}

    def work(i: int) -> None:
        answers[i] = [run(make_engine(runners[i]), [requests[i]]) for _ in range(3)]

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i in range(2):
        assert answers[i] == [expected[i]] * 3


# ---- a step ---------------------------------------------------------------------------------------------------------


def test_a_step_copies_blocks_before_it_writes(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runner = make_runner(directory, block_size=16)
    order: list[str] = []
    for owner, name in ((runner.kv_cache, "copy_blocks"), (runner.device.batches, "build"), (runner.model, "forward")):
        original = getattr(owner, name)

        def watched(*arguments: Any, name: str = name, original: Any = original) -> Any:
            order.append(name)
            return original(*arguments)

        monkeypatch.setattr(owner, name, watched)
    engine = make_engine(runner)
    run(engine, [[make_request("a", PROMPT[:20], choice_index=i, max_tokens=2, temperature=1.0) for i in range(2)]])
    assert order == ["copy_blocks", "build", "forward"] * 3
    assert [len(record.sequences) for record in engine.recorder.records] == [1, 2, 1]


def test_a_step_says_what_it_did(directory: Path) -> None:
    runner = make_runner(directory, max_num_batched_tokens=32, max_num_seqs=4)
    engine = make_engine(runner)
    engine.add(make_request("a", PROMPT[:40], max_tokens=2, prompt_logprobs=1))
    engine.add(make_request("b", PROMPT[:3], max_tokens=2, logprobs=0))
    steps: list[Any] = []
    launch = runner.launch

    def watched(plan: Any) -> Any:
        steps.append(launch(plan))
        return steps[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runner, "launch", watched)
        while engine.has_work:
            engine.step()
    assert [len(step.token_ids()) for step in steps] == [0, 2, 2]
    assert [len(step.prompt_logprobs.get(("a", 0), ())) for step in steps] == [32, 7, 0]
    assert [sorted(step.logprobs) for step in steps] == [[], [1], [1]]
    for step in steps:
        assert set(step.seconds) == {"batch", "model", "sampler"}
        assert min(step.seconds.values()) >= 0
    for record in engine.recorder.records:
        assert {"schedule", "launch", "wait", "update", "batch", "model", "sampler"} <= set(record.seconds)


def test_padded_rows_are_counted(directory: Path) -> None:
    runner = make_runner(directory, max_num_batched_tokens=32, max_num_seqs=4)
    for linear in runner.model.linears:
        linear.row_tiles = (16,)
    engine = make_engine(runner)
    run(engine, [make_request("a", PROMPT[:20], max_tokens=3)])
    assert [record.num_padded_tokens for record in engine.recorder.records] == [12, 15, 15]
    assert engine.recorder.num_padded_tokens == 42


# ---- element types --------------------------------------------------------------------------------------------------


def all_logits(runner: ModelRunner) -> torch.Tensor:
    """[T, V] float32 of every position of PROMPT, computed in chunks beside another sequence."""
    engine = make_engine(runner, max_num_batched_tokens=20, max_num_seqs=4)
    requests = [
        make_request(name, PROMPT[::step], max_tokens=1, prompt_logprobs=0) for name, step in (("a", 1), ("b", -1))
    ]
    with Witness(runner) as witness:
        answers = run(engine, requests)
    assert all(answer.error is None for answer in answers.values())
    rows = witness.logits_of(("a", 0))
    assert sorted(rows) == list(range(len(PROMPT)))
    return torch.stack([rows[position].view(runner.dtype).float() for position in sorted(rows)])


def relative_error(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """Largest difference, in standard deviations of the logits."""
    return float((ours - theirs).abs().max() / theirs.std())


@pytest.mark.parametrize(
    ("architecture", "options"),
    [
        ("LlamaForCausalLM", {"heads": 6, "kv_heads": 2}),
        ("MistralForCausalLM", {"sliding_window": 9}),
        ("Qwen2ForCausalLM", {"heads": 3, "kv_heads": 3, "head_dim": 32}),
        ("Qwen3ForCausalLM", {"intermediate_size": 75}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
@pytest.mark.parametrize("dtype", list(DTYPES))
def test_logits_equal_the_oracles_kernels_and_transformers(
    dtype: str, architecture: str, options: dict[str, Any], tmp_path: Path
) -> None:
    """A run on the vector kernels, one on the oracle's in the same type, and transformers in float32 on those weights."""
    directory = make_tiny_model(tmp_path, architecture, dtype=DTYPES[dtype], seed=8, **options)
    runner = make_runner(directory, dtype=dtype, block_size=16, deterministic=False)
    ours = all_logits(runner)
    runner.model.ops = ops.select("reference")
    oracle = all_logits(runner)
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, attn_implementation="eager")
    with torch.no_grad():
        exact = model(torch.tensor([PROMPT])).logits[0]
    eps = torch.finfo(DTYPES[dtype]).eps
    limit = 25 * eps if dtype != "float32" else 300 * eps
    assert relative_error(ours, oracle) < limit
    assert relative_error(ours, exact) < limit


def test_replaced_options_are_those_of_the_engine(directory: Path) -> None:
    runner = ModelRunner(directory, EngineConfig(num_kv_blocks=10, num_threads=1), dtype="float32", device="cpu")
    assert dataclasses.replace(runner.config, num_kv_blocks=None) == EngineConfig(num_threads=1)
    assert (runner.vocab_size, runner.max_model_len) == (307, 512)
    assert runner.max_steps_in_flight == 1
