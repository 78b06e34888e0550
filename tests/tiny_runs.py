"""Runs tiny models: engines of any shape over one runner, and a witness of every bit they compute. No tests.

runner = make_runner(directory, ...)                  weights, kernels, KV tensors
engine = make_engine(runner, num_kv_blocks=9, ...)    a fresh pool over them; every KV slot is NaN
answers = run(engine, [make_request("a", prompt)])    key -> Answer
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch

from serve_app.engine.config import EngineConfig
from serve_app.engine.engine import Engine
from serve_app.engine.request import (
    FinishReason,
    GenerateRequest,
    SamplingParams,
    TokenLogprobs,
    TokenOutput,
)
from serve_app.engine.scheduler import Key, Scheduler, SchedulerOutput
from serve_app.kernels.metadata import AttentionMetadata
from serve_app.runner.model_runner import ModelRunner

ARCHITECTURES = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")

NEAR_TIE = 1e-4
"""Best two logits this close may change places by rounding: what comes after says nothing."""


def make_runner(
    directory: Path,
    *,
    dtype: str = "float32",
    num_kv_blocks: int | None = 100,
    num_threads: int = 1,
    load_format: str = "auto",
    device: str = "cpu",
    **engine_options: Any,
) -> ModelRunner:
    config = EngineConfig(num_kv_blocks=num_kv_blocks, num_threads=num_threads, **engine_options)
    return ModelRunner(directory, config, dtype=dtype, device=device, load_format=load_format)


def make_engine(runner: ModelRunner, *, num_kv_blocks: int | None = None, **changes: Any) -> Engine:
    """A new pool, empty of prefixes, over the runner's tensors. ``changes``: of EngineConfig; block_size must stay.

    The pool may be smaller than the tensors, and steps smaller than the runner allows.
    """
    config = dataclasses.replace(runner.config, **changes)
    assert config.block_size == runner.config.block_size
    assert config.max_num_seqs <= runner.config.max_num_seqs
    num_blocks = num_kv_blocks or runner.num_kv_blocks
    assert num_blocks <= runner.num_kv_blocks
    runner.kv_cache.fill(float("nan"))
    scheduler = Scheduler(
        config,
        num_blocks=num_blocks,
        max_model_len=runner.max_model_len,
        vocab_size=runner.vocab_size,
        eos_token_ids=runner.eos_token_ids,
        has_position_classes=runner.has_position_classes,
    )
    return Engine(config, runner, scheduler=scheduler)


def make_request(
    request_id: str,
    prompt: Iterable[int],
    *,
    output: Iterable[int] = (),
    choice_index: int = 0,
    cache_salt: str = "",
    priority: int = 0,
    **sampling: Any,
) -> GenerateRequest:
    """Greedy, 16 tokens, past eos, where ``sampling`` says nothing else."""
    params = SamplingParams(**{"seed": 0, "max_tokens": 16, "ignore_eos": True, **sampling}).resolved()
    return GenerateRequest(
        request_id,
        tuple(prompt),
        params,
        tuple(output),
        choice_index,
        priority=priority,
        cache_salt=cache_salt,
    )


@dataclass
class Answer:
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprobs | None] | None = None
    finish_reason: FinishReason | None = None
    stop_token_id: int | None = None
    num_cached_tokens: int = 0
    error: str | None = None
    error_code: str | None = None

    def take(self, output: TokenOutput) -> None:
        assert self.finish_reason is None, "an output after the end"
        self.token_ids += output.token_ids
        self.logprobs += output.logprobs or ()
        if output.prompt_logprobs is not None:
            assert self.prompt_logprobs is None, "prompt_logprobs came twice"
            self.prompt_logprobs = list(output.prompt_logprobs)
        self.finish_reason, self.stop_token_id = output.finish_reason, output.stop_token_id
        self.num_cached_tokens = max(self.num_cached_tokens, output.num_cached_tokens)
        self.error, self.error_code = output.error, output.error_code


def run(
    engine: Engine,
    requests: Sequence[GenerateRequest | list[GenerateRequest]],
    *,
    arrivals: Mapping[int, int] | None = None,
    before_step: Callable[[int], None] | None = None,
) -> dict[Key, Answer]:
    """Runs to the end. ``arrivals[i]``: the step before which request i is added, 0 by default.

    A list is the choices of one request. ``before_step`` is called with the number of each step. The books must add up
    after every step, and be empty at the end.
    """
    groups = [request if isinstance(request, list) else [request] for request in requests]
    due = sorted(range(len(groups)), key=lambda i: (arrivals or {}).get(i, 0))
    answers = {(r.request_id, r.choice_index): Answer() for group in groups for r in group}
    assert len(answers) == sum(map(len, groups))
    step = 0
    while due or engine.has_work:
        while due and (arrivals or {}).get(due[0], 0) <= step:
            engine.add(groups[due.pop(0)])
        if before_step is not None:
            before_step(step)
        for output in engine.step():
            answers[output.request_id, output.choice_index].take(output)
        engine.scheduler.check_invariants()
        step += 1
    assert engine.scheduler.pool.num_used_blocks == 0
    assert all(answer.finish_reason is not None for answer in answers.values())
    return answers


def check_greedy(token_ids: Sequence[int], reference: Sequence[int], margins: Sequence[float]) -> int:
    """Asserts equality up to the first choice that rounding could turn. Returns how many tokens were compared."""
    for i, (ours, theirs) in enumerate(zip(token_ids, reference, strict=False)):
        if ours != theirs:
            assert margins[i] <= NEAR_TIE, f"token {i} is {ours}, transformers says {theirs} by {margins[i]:g}"
            return i
    assert len(token_ids) == len(reference), f"{len(token_ids)} tokens, transformers says {len(reference)}"
    return len(reference)


def bits(x: torch.Tensor) -> torch.Tensor:
    """The same bytes as integers, so that comparing sees NaN and the sign of zero."""
    return x.contiguous().view({4: torch.int32, 2: torch.int16, 8: torch.int64}[x.dtype.itemsize])


class Witness:
    """Keeps the bits of all K, V and logits that a runner makes, by sequence and position.

    Also asserts that what was there once has the same bits when it is computed, or found, again (only in deterministic
    mode would it). Use with ``with``.
    """

    def __init__(self, runner: ModelRunner) -> None:
        self.runner = runner
        self.kv: dict[Key, torch.Tensor] = {}
        """[2 (k, v), L, T, K, D], as of the last step of each sequence."""
        self.logits: dict[tuple[Key, int], torch.Tensor] = {}
        """[V] of each position whose logits were wanted."""
        self.chunks: dict[Key, list[int]] = {}
        """Tokens of each step."""
        self._plan: SchedulerOutput | None = None
        self._forward = runner.model.forward
        self._launch = runner.launch

    def __enter__(self) -> Self:
        self.runner.model.forward = self._watch_forward  # type: ignore[assignment,method-assign]
        self.runner.launch = self._watch_launch  # type: ignore[method-assign]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.runner.model.forward = self._forward  # type: ignore[method-assign]
        self.runner.launch = self._launch  # type: ignore[method-assign]

    def _watch_launch(self, plan: SchedulerOutput) -> Any:
        self._plan = plan
        step = self._launch(plan)
        cache = self.runner.kv_cache
        for item in plan.scheduled:
            sequence = item.sequence
            end = item.start + item.num_tokens
            self.chunks.setdefault(sequence.key, []).append(item.num_tokens)
            layers = [
                torch.stack([x[sequence.block_ids].flatten(0, 1)[:end] for x in side]) for side in (cache.k, cache.v)
            ]
            new = bits(torch.stack(layers))
            old = self.kv.get(sequence.key)
            if old is not None:
                common = min(end, old.shape[2])
                assert torch.equal(old[:, :, :common], new[:, :, :common]), f"{sequence.key}: K or V changed"
            if old is None or end >= old.shape[2]:
                self.kv[sequence.key] = new
        return step

    def _watch_forward(
        self, input_ids: torch.Tensor, metadata: AttentionMetadata, logits_indices: torch.Tensor, *rest: Any
    ) -> torch.Tensor:
        assert self._plan is not None
        logits_SV = self._forward(input_ids, metadata, logits_indices, *rest)
        owners = torch.searchsorted(metadata.cu_seqlens_q, logits_indices.int(), right=True) - 1
        for row, owner, logits_V in zip(logits_indices.tolist(), owners.tolist(), logits_SV, strict=True):
            at = (self._plan.scheduled[owner].sequence.key, int(metadata.positions[row]))
            new = bits(logits_V.clone())
            assert torch.equal(self.logits.setdefault(at, new), new), f"{at}: logits changed"
        return logits_SV

    def logits_of(self, key: Key) -> dict[int, torch.Tensor]:
        return {position: x for (owner, position), x in self.logits.items() if owner == key}


def assert_same_bits(key: Key, ours: Witness, theirs: Witness, other_key: Key | None = None) -> int:
    """K, V and logits of one sequence are equal wherever both have them. Returns how many logits rows that were."""
    other_key = other_key or key
    a, b = ours.kv[key], theirs.kv[other_key]
    common = min(a.shape[2], b.shape[2])
    assert common > 0
    for name, x, y in zip("KV", a, b, strict=True):
        for layer in range(x.shape[0]):
            differs = (x[layer, :common] != y[layer, :common]).flatten(1).any(dim=1).nonzero().flatten().tolist()
            assert not differs, f"{name} of layer {layer} differs at positions {differs}"
    logits, others = ours.logits_of(key), theirs.logits_of(other_key)
    both = sorted(logits.keys() & others.keys())
    differs = [position for position in both if not torch.equal(logits[position], others[position])]
    assert not differs, f"logits differ at positions {differs}"
    return len(both)
