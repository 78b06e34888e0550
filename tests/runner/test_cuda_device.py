"""CudaDevice on CPU tensors: a fake GPU, the oracle's kernels, a greedy sampler. Everything but the arithmetic is real.

What must hold: the tokens of the CPU runner, whatever runs ahead, is replayed, padded, preempted, aborted or fails.
(With the Triton kernels: test_cuda_device_interpreted.py. On a card: tests/gpu.)
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from serve_app.engine.engine import Engine
from serve_app.errors import ConfigurationError, DeviceLostError, StepFailedError
from serve_app.runner import cuda_device, model_runner
from serve_app.runner.cuda_device import CudaDevice
from serve_app.runner.kv_cache import bytes_per_block
from serve_app.runner.model_runner import ModelRunner
from tests.runner.fake_gpu import GIB, FakeGpu, GreedySampler
from tests.tiny_models import make_tiny_model
from tests.tiny_runs import Answer, make_engine, make_request, make_runner, run

OPTIONS: dict[str, Any] = {
    "num_kv_blocks": 40,
    "block_size": 16,
    "max_num_seqs": 6,
    "max_num_batched_tokens": 24,
    "max_model_len": 120,
}
VOCAB_SIZE = 307


def prompt_of(length: int, salt: int = 0) -> list[int]:
    return [(37 * i + 11 * salt + 5) % 300 for i in range(length)]


LENGTHS = (30, 5, 17, 1, 41, 3, 16)


def requests(**sampling: Any) -> list[Any]:
    return [make_request(str(i), prompt_of(n, i), **{"max_tokens": 9, **sampling}) for i, n in enumerate(LENGTHS)]


def make_gpu_runner(directory: Path, gpu: FakeGpu | None = None, **options: Any) -> ModelRunner:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model_runner, "find_gpu", lambda name: (gpu or FakeGpu()) if name == "cuda" else None)
        patch.setattr(cuda_device, "DeviceSampler", GreedySampler)
        return make_runner(directory, device="cuda", **{**OPTIONS, **options})


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(
        tmp_path_factory.mktemp("model"), "MistralForCausalLM", seed=6, layers=1, heads=3, kv_heads=1, sliding_window=21
    )


@pytest.fixture(scope="module")
def gpu_runner(directory: Path) -> ModelRunner:
    return make_gpu_runner(directory)


@pytest.fixture(scope="module")
def expected(directory: Path) -> dict[Any, Answer]:
    """What the CPU answers."""
    return run(make_engine(make_runner(directory, deterministic=False, **OPTIONS)), requests())


@pytest.fixture(autouse=True)
def _no_recompilation(gpu_runner: ModelRunner) -> Iterator[None]:
    yield
    assert device_of(gpu_runner).recompilations.num_compiled == 0


def device_of(runner: ModelRunner) -> CudaDevice:
    assert isinstance(runner.device, CudaDevice)
    return runner.device


def tokens(answers: dict[Any, Answer]) -> dict[Any, list[int]]:
    assert all(answer.error is None for answer in answers.values())
    return {key: answer.token_ids for key, answer in answers.items()}


def num_launched_ahead(engine: Engine) -> int:
    """Steps in which some input was a token that the host had not read."""
    return sum(any(s.start > 0 and s.num_tokens == 1 for s in record.sequences) for record in engine.recorder.records)


# ---- the same tokens ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps_in_flight", [1, 2])
@pytest.mark.parametrize("graphs", [True, False], ids=["graphs", "eager"])
def test_tokens_equal_the_cpus(
    gpu_runner: ModelRunner,
    expected: dict[Any, Answer],
    steps_in_flight: int,
    graphs: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    device = device_of(gpu_runner)
    monkeypatch.setattr(gpu_runner, "max_steps_in_flight", steps_in_flight)
    if not graphs:
        monkeypatch.setattr(device.graphs, "bucket_for", lambda num_rows: None)
    before = device.graphs.num_replays
    engine = make_engine(gpu_runner)
    answers = run(engine, requests(), arrivals={2: 3, 5: 9})
    assert tokens(answers) == tokens(expected)
    assert (device.graphs.num_replays > before + 3) == graphs
    assert num_launched_ahead(engine) > 5


def test_inputs_that_the_host_does_not_know(gpu_runner: ModelRunner, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two steps in flight: nearly every decode takes its input from the device."""
    seen: list[list[int]] = []
    arrange = device_of(gpu_runner).batches.arrange

    def watched(plan: Any) -> Any:
        rows = arrange(plan)
        seen.append(rows.input_ids)
        return rows

    monkeypatch.setattr(device_of(gpu_runner).batches, "arrange", watched)
    run(make_engine(gpu_runner), requests())
    decodes = [ids for ids in seen if len(ids) <= 6]
    assert sum(all(i < 0 for i in ids) for ids in decodes) > len(decodes) / 2


def test_the_extra_token_of_one_that_has_stopped_is_dropped(
    gpu_runner: ModelRunner, expected: dict[Any, Answer]
) -> None:
    """A stop is read one step late: the step behind it has computed a token more, which nobody sees."""
    stops = {i: expected[str(i), 0].token_ids[3 + i % 3] for i in range(len(LENGTHS))}
    group = [
        make_request(str(i), prompt_of(n, i), max_tokens=9, stop_token_ids=(stops[i],)) for i, n in enumerate(LENGTHS)
    ]
    engine = make_engine(gpu_runner)
    answers = run(engine, group)
    for i in range(len(LENGTHS)):
        full = expected[str(i), 0].token_ids
        assert answers[str(i), 0].token_ids == full[: full.index(stops[i]) + 1]
        assert answers[str(i), 0].stop_token_id == stops[i]
    num_sampled = sum(s.samples for record in engine.recorder.records for s in record.sequences)
    assert num_sampled >= sum(len(answer.token_ids) for answer in answers.values()) + 4


def test_preemption(gpu_runner: ModelRunner, expected: dict[Any, Answer]) -> None:
    for caching in (False, True):
        engine = make_engine(gpu_runner, num_kv_blocks=7, enable_prefix_caching=caching)
        assert tokens(run(engine, requests())) == tokens(expected)
        assert engine.scheduler.num_preemptions > 0


def test_prefix_hits(gpu_runner: ModelRunner, expected: dict[Any, Answer]) -> None:
    engine = make_engine(gpu_runner)
    assert tokens(run(engine, requests())) == tokens(expected)
    assert tokens(run(engine, requests())) == tokens(expected)
    assert engine.scheduler.num_prefix_hits > 60


def test_choices_copy_their_partial_block(gpu_runner: ModelRunner, directory: Path) -> None:
    group = [make_request("a", prompt_of(21), choice_index=i, max_tokens=5 + i) for i in range(3)]
    answers = run(make_engine(gpu_runner), [group])
    alone = run(make_engine(gpu_runner), [make_request("a", prompt_of(21), max_tokens=7)])["a", 0].token_ids
    assert [answers["a", i].token_ids for i in range(3)] == [alone[: 5 + i] for i in range(3)]


def test_aborts(gpu_runner: ModelRunner, expected: dict[Any, Answer]) -> None:
    engine = make_engine(gpu_runner)
    aborted = {4: "0", 8: "2"}

    def before_step(step: int) -> None:
        if step in aborted:
            assert engine.abort(aborted[step]) == 1

    answers = run(engine, requests(), before_step=before_step)
    for key, answer in answers.items():
        whole = expected[key].token_ids
        if key[0] in aborted.values():
            assert answer.finish_reason == "abort"
            assert answer.token_ids == whole[: len(answer.token_ids)] != whole
        else:
            assert answer.token_ids == whole


def test_log_probabilities(gpu_runner: ModelRunner, directory: Path) -> None:
    cpu = make_runner(directory, deterministic=False, **OPTIONS)
    group = [
        make_request("a", prompt_of(60), max_tokens=4, prompt_logprobs=2, logprobs=1),
        make_request("b", prompt_of(9, 3), max_tokens=6, logprobs=3),
        make_request("c", prompt_of(20, 4), max_tokens=2, prompt_logprobs=0),
    ]
    ours, theirs = run(make_engine(gpu_runner), group), run(make_engine(cpu), group)
    for key, answer in theirs.items():
        assert ours[key].token_ids == answer.token_ids
        for got, wanted in (
            (ours[key].logprobs, answer.logprobs),
            ((ours[key].prompt_logprobs or [None])[1:], (answer.prompt_logprobs or [None])[1:]),
        ):
            assert len(got) == len(wanted)
            for x, y in zip(got, wanted, strict=True):
                assert x is not None
                assert y is not None
                assert x.token_id == y.token_id
                assert x.logprob == pytest.approx(y.logprob, abs=1e-4)
                assert [token for token, _ in x.top] == [token for token, _ in y.top]


# ---- graphs and padding ---------------------------------------------------------------------------------------------


def test_padded_rows_are_counted_and_never_written(gpu_runner: ModelRunner) -> None:
    """Buckets are 1, 2, 4, 6: five decodes run as six rows, three as four. Every slot nobody computed is still NaN."""
    device = device_of(gpu_runner)
    assert device.graphs.buckets == (1, 2, 4, 6)
    lengths = (20, 9, 33, 1, 16)
    engine = make_engine(gpu_runner, enable_prefix_caching=False)
    group = [make_request(str(i), prompt_of(n, i), max_tokens=4 + 3 * i) for i, n in enumerate(lengths)]
    run(engine, group)
    records = list(engine.recorder.records)
    for record in records:
        is_decode = all(s.num_tokens == 1 and s.samples for s in record.sequences)
        bucket = min(b for b in device.graphs.buckets if b >= len(record.sequences))
        assert record.num_padded_tokens == (bucket - record.num_tokens if is_decode else 0)
    assert {1} <= {record.num_padded_tokens for record in records}
    # A step more than was read wrote one K and V more, for each that ended while another step was under way.
    num_computed = sum(record.num_tokens for record in records)
    for x in (*gpu_runner.kv_cache.k, *gpu_runner.kv_cache.v):
        written = ~x.isnan().flatten(2).any(dim=2)
        assert int(written.sum()) <= num_computed
        assert int(written.sum()) >= max(lengths)
        assert bool((x.isnan().flatten(2).all(dim=2) | written).all())


def test_a_padded_row_that_writes_is_seen(gpu_runner: ModelRunner, monkeypatch: pytest.MonkeyPatch) -> None:
    """The fault that the test above is there for: padding that points at slot 0."""
    packed = device_of(gpu_runner).packed
    fill = packed._fill

    def wrong(layout: Any, fields: Any, rows: Any, work: Any, sampling: Any) -> None:
        fill(layout, fields, rows, work, sampling)
        fields["slot_mapping"][rows.num_tokens :] = 16 * 39

    monkeypatch.setattr(packed, "_fill", wrong)
    engine = make_engine(gpu_runner)
    run(engine, [make_request(str(i), prompt_of(5, i), max_tokens=4) for i in range(3)])
    assert engine.recorder.num_padded_tokens > 0
    assert not gpu_runner.kv_cache.k[0][39, 0].isnan().all()


def test_steps_with_a_chunk_run_eager(gpu_runner: ModelRunner) -> None:
    engine = make_engine(gpu_runner)
    graphs = device_of(gpu_runner).graphs
    engine.add(make_request("a", prompt_of(3), max_tokens=20))
    before = graphs.num_replays
    for _ in range(4):
        engine.step()
    assert graphs.num_replays == before + 3  # the prompt, then decodes
    engine.add(make_request("b", prompt_of(40, 1), max_tokens=20))
    before = graphs.num_replays
    engine.step()  # 1 + 23 tokens
    engine.step()  # 1 + 17
    assert graphs.num_replays == before
    engine.step()
    assert graphs.num_replays == before + 1
    engine.abort("a")
    engine.abort("b")
    while engine.has_work:
        engine.step()


def test_without_graphs(directory: Path, expected: dict[Any, Answer]) -> None:
    gpu = FakeGpu()
    runner = make_gpu_runner(directory, gpu, cuda_graphs=False)
    assert gpu.captured == []
    assert tokens(run(make_engine(runner), requests())) == tokens(expected)
    assert "no CUDA graphs" in runner.describe()[0]


# ---- steps that fail ------------------------------------------------------------------------------------------------


def test_a_row_that_cannot_be_sampled_is_one_requests_end(
    gpu_runner: ModelRunner, expected: dict[Any, Answer], monkeypatch: pytest.MonkeyPatch
) -> None:
    """NaN in one row, read while the step behind it has already taken that row's token."""
    sampler = device_of(gpu_runner).sampler
    sample = sampler.sample
    num_bad = 0

    def poisoned(logits: torch.Tensor, plan: Any, rows: torch.Tensor) -> Any:
        nonlocal num_bad
        for row, (sequence, position) in enumerate(zip(plan.sequences, plan.positions, strict=True)):
            if sequence.key == ("2", 0) and position >= 20:
                logits = logits.clone()
                logits[row, 7] = float("nan")
                num_bad += 1
        return sample(logits, plan, rows)

    monkeypatch.setattr(sampler, "sample", poisoned)
    answers = run(make_engine(gpu_runner), requests())
    assert num_bad >= 3  # in the batch, in the step behind it, and alone
    assert answers["2", 0].error_code == StepFailedError.code
    assert answers["2", 0].token_ids == expected["2", 0].token_ids[:3]
    others = {key: answer for key, answer in answers.items() if key != ("2", 0)}
    assert tokens(others) == {key: expected[key].token_ids for key in others}


@pytest.mark.parametrize("where", ["before the copy", "after the copy", "in the model"])
def test_a_launch_that_fails_once_harms_nobody(
    gpu_runner: ModelRunner, expected: dict[Any, Answer], monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    """The device may have heard of new blocks or not: it is told again. Steps behind it took tokens that never came."""
    device = device_of(gpu_runner)
    owner: Any = device.packed if where != "in the model" else device.model
    name = "send" if where != "in the model" else "hidden_states"
    original = getattr(owner, name)
    calls = num_failed = 0

    def faulty(*arguments: Any) -> Any:
        nonlocal calls, num_failed
        calls += 1
        num_seqs = arguments[1].num_seqs  # of the rows, or of the metadata
        if num_seqs > 1 and calls % 3 == 0:
            num_failed += 1
            if where == "after the copy":
                original(*arguments)
            raise RuntimeError("hiccup")
        return original(*arguments)

    monkeypatch.setattr(owner, name, faulty)
    if where == "in the model":
        monkeypatch.setattr(device.graphs, "bucket_for", lambda num_rows: None)
    assert tokens(run(make_engine(gpu_runner), requests())) == tokens(expected)
    assert num_failed >= 3


def test_a_lost_device(gpu_runner: ModelRunner, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = make_engine(gpu_runner)
    for request in requests():
        engine.add(request)
    engine.step()
    device = device_of(gpu_runner)
    with monkeypatch.context() as patch:
        patch.setattr(device.gpu, "lost", RuntimeError("CUDA error: an illegal memory access was encountered"))

        def broken(*_: Any) -> Any:
            raise RuntimeError("CUDA error")

        patch.setattr(device.packed, "send", broken)
        with pytest.raises(DeviceLostError, match="a fake GPU is lost: RuntimeError: CUDA error: an illegal memory"):
            engine.step()


# ---- deterministic mode ---------------------------------------------------------------------------------------------


def test_deterministic_mode_goes_by_position(
    directory: Path, expected: dict[Any, Answer], monkeypatch: pytest.MonkeyPatch
) -> None:
    runner = make_gpu_runner(directory, deterministic=True)
    device = device_of(runner)
    assert runner.deterministic
    assert runner.has_position_classes
    assert all(linear.deterministic for linear in runner.model.linears)
    assert "deterministic" in runner.describe()[0]
    works: list[tuple[Any, Any]] = []
    plan_work = device._plan_work

    def watched(plan: Any, rows: Any) -> Any:
        works.append((plan, plan_work(plan, rows)))
        return works[-1][1]

    monkeypatch.setattr(device, "_plan_work", watched)
    engine = make_engine(runner)
    assert engine.scheduler.has_position_classes
    assert tokens(run(engine, requests())) == tokens(expected)
    # Replayed from the middle: the output tokens of a chunk are decodes, each a row of its own.
    whole = expected["2", 0].token_ids
    works.clear()
    replay = make_request("2", prompt_of(17, 2), output=whole[:5], max_tokens=9)
    assert run(make_engine(runner), [replay])["2", 0].token_ids == whole[5:]
    _, first = works[0]
    assert first.counts.tolist() == [len(first.tiles), 5, 5, 0]
    assert first.decodes[:, 1].tolist() == [21, 20, 19, 18, 17]  # rows, longest first
    # A single prompt token is a tile, not a decode, so it does not run in a decode graph.
    works.clear()
    before = device.graphs.num_replays
    run(make_engine(runner), [make_request("a", [5], max_tokens=1)])
    assert works[0][1].counts.tolist() == [1, 0, 0, 0]
    assert device.graphs.num_replays == before


@pytest.mark.parametrize("mode", [False, True], ids=["fast", "deterministic"])
def test_a_block_is_reused_as_the_class_it_was_computed_in(
    directory: Path, gpu_runner: ModelRunner, mode: bool
) -> None:
    """40 prompt tokens and 30 of output fill 2 blocks of prompt, one of both and one of output. Fast mode reuses all."""
    runner = make_gpu_runner(directory, deterministic=True) if mode else gpu_runner
    engine = make_engine(runner)
    first = make_request("a", prompt_of(40), max_tokens=30)
    output = run(engine, [first])["a", 0].token_ids
    turn = make_request("b", [*prompt_of(40), *output, 7], max_tokens=1)
    assert run(engine, [turn])["b", 0].num_cached_tokens == (32 if mode else 64)
    again = make_request("a", prompt_of(40), output=output[:29], max_tokens=30)
    assert run(engine, [again])["a", 0].token_ids == output[29:]
    # From 64 on it was computed; before, found, with or without classes.
    assert engine.recorder.records[-1].sequences[0].start == 64


def test_fast_mode_is_the_default(gpu_runner: ModelRunner) -> None:
    assert not gpu_runner.deterministic
    assert not gpu_runner.has_position_classes
    assert not make_engine(gpu_runner).scheduler.has_position_classes
    assert not any(linear.deterministic for linear in gpu_runner.model.linears)
    assert gpu_runner.max_steps_in_flight == 2


# ---- start-up -------------------------------------------------------------------------------------------------------


def test_blocks_from_the_memory_that_the_profile_step_leaves(directory: Path) -> None:
    gpu = FakeGpu(total=GIB // 2)
    gpu.used, gpu.activations = 0, 2**20
    runner = make_gpu_runner(directory, gpu, num_kv_blocks=None, gpu_memory_utilization=0.75)
    # 0.75 * 512 MiB = 384 MiB; a step takes 1, the libraries 64, the graphs 1 and 8 for each of four.
    size = bytes_per_block(runner.model_config, 16, torch.float32)
    assert runner.num_kv_blocks == (384 - 1 - 64 - 1 - 4 * 8) * 2**20 // size
    assert runner.kv_cache.num_blocks == runner.num_kv_blocks
    gpu = FakeGpu(total=2**25)
    gpu.used = 0
    with pytest.raises(ConfigurationError, match=r"gpu_memory_utilization is 0.9, and nothing is left .*24 tokens"):
        make_gpu_runner(directory, gpu, num_kv_blocks=None)


def test_start_up_runs_the_largest_step_before_it_takes_the_memory(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[str] = []
    gpu = FakeGpu()
    measure, launch = gpu.measure, CudaDevice._launch

    def watched_measure(run_it: Any) -> Any:
        order.append("measure")
        return measure(run_it)

    def watched_launch(device: CudaDevice, plan: Any) -> Any:
        samples = sum(item.samples for item in plan.scheduled)
        order.append(f"{plan.num_tokens} tokens, {samples} sample, {device.cache.num_blocks} blocks")
        return launch(device, plan)

    monkeypatch.setattr(gpu, "measure", watched_measure)
    monkeypatch.setattr(CudaDevice, "_launch", watched_launch)
    make_gpu_runner(directory, gpu)
    assert order[:5] == [
        "24 tokens, 6 sample, 1 blocks",  # compiles
        "measure",
        "24 tokens, 6 sample, 1 blocks",
        "measure",
        "6 tokens, 6 sample, 1 blocks",  # what the largest graph will need
    ]
    assert {"1 tokens, 1 sample, 40 blocks", "16 tokens, 0 sample, 40 blocks"} <= set(order[5:])
    assert len(gpu.captured) == 4


def test_start_up_says_how_far_it_is(directory: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        runner = make_gpu_runner(directory)
    said = [record.getMessage() for record in caplog.records if record.levelname == "INFO"]
    assert said[0].startswith("start-up: the weights are on a fake GPU after")
    assert [line.split(", after")[0] for line in said if "CUDA graph " in line] == [
        f"start-up: CUDA graph {i} of 4, up to {num} sequences" for i, num in ((1, 6), (2, 4), (3, 2), (4, 1))
    ]
    assert said[-2] == runner.describe()[0]
    assert "float32, a fake GPU, 4 CUDA graphs, fast, max_model_len 120" in said[-2]


def test_start_up_leaves_nothing_behind(directory: Path) -> None:
    """Its pretend sequences write no K and V, and no slot remembers them."""
    runner = make_gpu_runner(directory)
    assert not any(x.any() for x in (*runner.kv_cache.k, *runner.kv_cache.v))
    assert device_of(runner).batches._known == [None] * 6


@pytest.mark.parametrize("checkpoint", ["float16", "bfloat16", "float32"])
def test_the_automatic_dtype_is_the_checkpoints(checkpoint: str, tmp_path: Path) -> None:
    path = make_tiny_model(tmp_path, layers=1, dtype=getattr(torch, checkpoint))
    runner = make_gpu_runner(path, dtype="auto", max_num_seqs=2, max_num_batched_tokens=4)
    assert runner.dtype == runner.kv_cache.k[0].dtype == getattr(torch, checkpoint)
    assert make_gpu_runner(path, dtype="float32", cuda_graphs=False).dtype == torch.float32


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        ({}, {"block_size": 48}, "block_size is 48; on a GPU it must be one of 16, 32, 64, 128"),
        ({"head_dim": 24}, {}, "head_dim is 24; the GPU kernels need a multiple of 16 up to 256"),
        ({"head_dim": 272}, {}, "head_dim is 272; "),
        (
            {"heads": 17, "kv_heads": 1, "hidden_size": 68},
            {},
            "num_attention_heads is 17; the GPU kernels allow at most 16 for each",
        ),
        (
            {},
            {"kv_cache_dtype": "float16"},
            "kv_cache_dtype is 'float16'; on a GPU it must be auto or the model's, flo",
        ),
    ],
    ids=["block size", "odd head", "wide head", "group", "cache dtype"],
)
def test_what_there_are_no_kernels_for(
    model: dict[str, Any], options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigurationError, match=message):
        make_gpu_runner(make_tiny_model(tmp_path, layers=1, **model), **options)


def test_the_fingerprint_is_the_gpus(gpu_runner: ModelRunner, directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    device = device_of(gpu_runner)
    prints = {gpu_runner.fingerprint, make_gpu_runner(directory, num_threads=2).fingerprint}
    assert len(prints) == 1, "no CPU threads in it"
    for name, value in (("name", "another GPU"), ("capability", (10, 0))):
        with monkeypatch.context() as patch:
            patch.setattr(device.gpu, name, value)
            prints.add(gpu_runner._fingerprint())
    prints.add(make_gpu_runner(directory, deterministic=True).fingerprint)
    assert len(prints) == 4


def test_host_work_per_step_is_arrays(gpu_runner: ModelRunner) -> None:
    """What a step sends is one copy, whatever is in it."""
    packed = device_of(gpu_runner).packed
    before = packed.num_copies
    engine = make_engine(gpu_runner)
    run(engine, requests())
    assert packed.num_copies - before == engine.recorder.num_steps
    gpu = device_of(gpu_runner).gpu
    assert isinstance(gpu, FakeGpu)
    assert gpu.num_uses >= engine.recorder.num_steps, "the thread that steps may have another device"
    assert isinstance(packed._hosts[0][0].numpy(), np.ndarray)
