"""CudaDevice: steps on a GPU, each launched while the one before still computes. Knows the order of a step's parts.

launch(plan)   copy blocks -> arrange rows, plan attention's work -> one copy to the device -> replay a decode graph, or
               run eager -> head
sample         sample -> keep the tokens for the next step -> copy them to the host, event. A part of launch, unless a
               row has a grammar: its mask follows from the token of the step before, which is read first. The device
               computes the forward meanwhile, so it does not wait for that
read           wait for the event

Nothing in `launch` waits for the device. So the host plans, packs and launches step n + 1 while step n computes; what
step n sampled is not known here then, but the device has it (packed_batch.py). Everything runs on one stream, so a step
sees all that the step before wrote.

Start-up, in this order: load the weights; run the largest step there can be, and see what memory it leaves; the KV cache
takes the rest; run a step of every kind, so that every kernel is compiled; capture the graphs; from then on count what
is compiled, which should be nothing.
"""

from __future__ import annotations

import os
import time
from collections.abc import Collection, Mapping
from functools import partial
from typing import NamedTuple

import numpy as np
import torch

from serve_app.engine.config import EngineConfig
from serve_app.engine.pooling import Pooled
from serve_app.engine.request import TokenLogprobs
from serve_app.engine.scheduler import Key, SchedulerOutput
from serve_app.errors import ConfigurationError, DeviceLostError, RaggedServeError
from serve_app.kernels import ops
from serve_app.kernels.ragged_attention import rows_per_tile, workspace_size
from serve_app.kernels.work_list import MAX_SPLITS, MIN_SPLIT_KEYS, WorkList, plan_work
from serve_app.logs import get_logger
from serve_app.models.model import Model, ModelConfig
from serve_app.runner import machine, pooler
from serve_app.runner.batch import BatchBuilder, Rows
from serve_app.runner.constraints import ConstrainedStep, Constraints, Words
from serve_app.runner.cuda_graphs import DecodeGraphs, bucket_sizes
from serve_app.runner.device import MakeModel
from serve_app.runner.device_sampler import DeviceSampler, PendingCopy, PendingLogprobs, SampledStep, SamplingPlan
from serve_app.runner.gpu import Gpu
from serve_app.runner.kv_cache import GpuKVCache, GpuMemory, KVCache, num_blocks_on_gpu
from serve_app.runner.packed_batch import DeviceState, Layout, PackedBatch, Sizes, StepInputs, num_elements_of
from serve_app.runner.recompilation import CompileCounter
from serve_app.runner.rehearsal import DRAWN, largest_spans, pretend, variants
from serve_app.runner.self_check import SelfChecked, check_rows

logger = get_logger(__name__)

LIBRARY_BYTES = 64 << 20
"""Kept free: the libraries' workspaces of the thread that steps, which is not the one that measured. An estimate."""

GRAPH_BYTES = 8 << 20
"""Kept free for each graph beside its activations: nodes, arguments, the driver's share. An estimate."""

MASK_THREADS = max(1, min(8, (os.cpu_count() or 1) // 2))
"""That fill the masks of a step. The host has little else to do while the device computes."""

MAX_GROUP = 16
MAX_HEAD_DIM = 256
BLOCK_SIZES = (16, 32, 64, 128)


class CudaDevice:
    """See `Device`. ``gpu``: the card, or in tests something that computes on the CPU."""

    max_steps_in_flight = 2

    def __init__(self, config: EngineConfig, model_config: ModelConfig, max_model_len: int, gpu: Gpu) -> None:
        _check_shapes(config, model_config)
        self.config = config
        self.model_config = model_config
        self.max_model_len = max_model_len
        self.gpu = gpu
        self.torch_device = gpu.device
        self.ops = ops.select(gpu.kernels)
        self.deterministic = config.deterministic is True
        self.has_position_classes = self.deterministic
        self.recompilations = CompileCounter()
        self.graphs = DecodeGraphs(bucket_sizes(config.max_num_seqs) if config.cuda_graphs else ())

    # ---- start-up ------------------------------------------------------------------------------------------------

    def load(self, make: MakeModel, dtype: torch.dtype | None) -> Model:
        """auto is the checkpoint's own type."""
        self._free_at_start, self._total = self.gpu.memory()
        started = time.perf_counter()
        model = make(dtype or getattr(torch, self.model_config.dtype or "float32"))
        for linear in model.linears:
            linear.deterministic = self.deterministic
        logger.info("start-up: the weights are on %s after %.1f s", self.gpu.name, time.perf_counter() - started)
        if self.graphs.buckets and not model.can_be_captured:
            logger.info("CUDA graphs are off: a model of transformers runs its own Python at each step")
            self.graphs = DecodeGraphs(())
        if isinstance(model, SelfChecked):
            with torch.inference_mode():
                self._check_rows(model)
        return model

    def _check_rows(self, model: SelfChecked) -> None:
        """Raises DeterminismError (in deterministic mode) or UnsupportedModelError."""
        shape, size = self.model_config, self.config.block_size
        make = partial(
            GpuKVCache,
            shape.num_layers,
            block_size=size,
            num_kv_heads=shape.num_kv_heads,
            head_dim=shape.head_dim,
            dtype=model.embedding_VE.dtype,
            device=self.torch_device,
        )
        max_rows = min(self.config.max_num_batched_tokens, 300)
        check_rows(model, make, size, max_rows, self.max_model_len, self.deterministic, any_chunk=False)

    def make_cache(self, model: Model, dtype: torch.dtype) -> KVCache:
        config, shape = self.config, self.model_config
        self.model = model
        model_dtype = model.embedding_VE.dtype
        if dtype != model_dtype:
            raise ConfigurationError(
                f"kv_cache_dtype is {_short(dtype)!r}; on a GPU it must be auto or the model's, {_short(model_dtype)}"
            )
        make = partial(
            GpuKVCache,
            block_size=config.block_size,
            num_kv_heads=shape.num_kv_heads,
            head_dim=shape.head_dim,
            dtype=dtype,
            device=self.torch_device,
        )
        self._make_buffers(model_dtype)
        self.cache: KVCache = make(shape.num_layers, 1)
        memory = self._profile()
        self.cache = make(shape.num_layers, num_blocks_on_gpu(config, shape, dtype, memory))
        return self.cache

    def _make_buffers(self, dtype: torch.dtype) -> None:
        config, shape = self.config, self.model_config
        max_rows, max_seqs = config.max_num_batched_tokens, config.max_num_seqs
        self._rows_per_tile = rows_per_tile(
            shape.head_dim, shape.num_heads // shape.num_kv_heads, dtype, self.gpu.capability
        )
        max_splits = min(MAX_SPLITS, -(-self.max_model_len // MIN_SPLIT_KEYS))
        max_decodes = max_rows if self.deterministic else max_seqs
        sizes = Sizes(
            num_tokens=max_rows,
            num_seqs=max_seqs,
            num_logits=max_rows + max_seqs,
            num_sampled=max_seqs,
            num_tiles=max_rows // self._rows_per_tile + max_seqs,
            num_splits=max_decodes * max_splits,
            num_decodes=max_decodes,
        )
        num_blocks = -(-self.max_model_len // config.block_size)
        self.state = DeviceState(
            max_seqs,
            num_blocks,
            num_elements_of(sizes, max_seqs * num_blocks),
            workspace_size(sizes.num_splits, shape.num_heads, shape.head_dim),
            shape.vocab_size,
            self.torch_device,
        )
        self.packed = PackedBatch(
            self.state,
            self.max_steps_in_flight + 1,
            self.gpu.host_buffer,
            self.gpu.event,
        )
        self._buckets: dict[int, tuple[Layout, StepInputs]] = {}
        for rows in self.graphs.buckets:
            layout = Layout(Sizes(rows, rows, rows, rows, 0, rows * max_splits, rows))
            self._buckets[rows] = layout, self.packed.inputs_of(layout, 1, self.max_model_len)
        self.batches = BatchBuilder(max_seqs, self.max_model_len, config.block_size)
        self.sampler = DeviceSampler(shape.vocab_size, max_seqs, self.torch_device)
        self.constraints = Constraints(max_seqs, MASK_THREADS)

    @torch.inference_mode()
    def _profile(self) -> GpuMemory:
        config = self.config
        spans = largest_spans(config.max_num_batched_tokens, config.max_num_seqs, self.max_model_len)
        run = partial(self._rehearse, pretend(spans, config.block_size, sampling=DRAWN))
        run()  # compiles, and loads libraries: memory that stays
        measured = self.gpu.measure(run)
        reserve = self.sampler.state_bytes() + LIBRARY_BYTES
        if self.graphs.buckets:
            largest = pretend([(1, 1)] * self.graphs.buckets[-1], config.block_size)
            reserve += self.gpu.measure(partial(self._rehearse, largest)).activations
            reserve += GRAPH_BYTES * len(self.graphs.buckets)
        return GpuMemory(self._total, self._free_at_start, measured.free, measured.activations, reserve)

    @torch.inference_mode()
    def get_ready(self, model: Model, cache: KVCache) -> None:
        started = time.perf_counter()
        config = self.config
        self.sampler.warm_up(model.head(model.embedding_VE[:1]))
        for spans in variants(config.max_num_batched_tokens, config.max_num_seqs, self.max_model_len):
            for samples in (True, False):
                self._rehearse(pretend(spans, config.block_size, samples=samples))
        logger.info("start-up: every kernel is compiled after %.1f s", time.perf_counter() - started)
        started = time.perf_counter()
        captured = self.graphs.capture(self._fill_bucket, self._run_bucket, self.gpu.capture)
        for done, bucket in enumerate(captured, start=1):
            logger.info(
                "start-up: CUDA graph %d of %d, up to %d sequences, after %.1f s",
                *(done, len(self.graphs.buckets), bucket, time.perf_counter() - started),
            )
        self.gpu.check()
        self.batches.forget()
        self.recompilations.start()

    def _rehearse(self, plan: SchedulerOutput) -> None:
        self.launch(plan).token_ids()

    def _fill_bucket(self, bucket: int) -> None:
        plan = pretend([(1, 1)] * bucket, self.config.block_size)
        rows = self.batches.arrange(plan)
        sampling = self.sampler.prepare(rows.sampling, rows.sampled_positions)
        self.packed.send(self._buckets[bucket][0], rows, self._plan_work(plan, rows), sampling.rows)

    def _run_bucket(self, bucket: int) -> torch.Tensor:
        return self._hidden_states(self._buckets[bucket][1])

    def describe(self) -> tuple[str, str]:
        graphs = f"{len(self.graphs.buckets)} CUDA graphs" if self.graphs.buckets else "no CUDA graphs"
        return f"{self.gpu.name}, {graphs}", "deterministic" if self.deterministic else "fast"

    def fingerprint(self, parts: dict[str, object]) -> str:
        return machine.fingerprint(parts, machine.gpu_machine(self.gpu.name, self.gpu.capability))

    # ---- one step ------------------------------------------------------------------------------------------------

    def launch(self, plan: SchedulerOutput) -> LaunchedStep:
        """Waits for nothing that the device computes."""
        try:
            return self._launch(plan)
        except BaseException as error:
            self.batches.forget()  # the device may not have heard of the step's new blocks
            self.raise_if_lost(error)
            raise

    def _launch(self, plan: SchedulerOutput) -> LaunchedStep:
        started = time.perf_counter()
        self.gpu.use()
        self.cache.copy_blocks(plan.block_copies)
        rows = self.batches.arrange(plan)
        work = self._plan_work(plan, rows)
        masked = [row for row, sequence in enumerate(rows.sampling) if sequence.grammar is not None]
        sampling = self.sampler.prepare(rows.sampling, rows.sampled_positions, masked)
        bucket = self._bucket_for(rows, work)
        layout, inputs = self._buckets[bucket] if bucket is not None else self._eager(rows, work)
        self.packed.send(layout, rows, work, sampling.rows)
        packed = time.perf_counter()

        hidden_SE = self.graphs.replay(bucket) if bucket is not None else self._hidden_states(inputs)
        sampled: SampledStep | _Unsampled | None = None
        num_sampled = len(rows.sampling)
        if num_sampled:
            logits_RV = self.model.head(hidden_SE[:num_sampled])
            fields = inputs.fields["sampling"][:num_sampled], inputs.fields["token_slots"][:num_sampled]
            unsampled = _Unsampled(logits_RV, sampling, *fields)
            sampled = unsampled if masked else self.sample(unsampled)
        prompt_logprobs = self._prompt_logprobs(rows, hidden_SE)
        embeddings = self._embeddings(rows, hidden_SE)
        seconds = {"batch": packed - started, "enqueue": time.perf_counter() - packed}
        num_padded = 0 if bucket is None else bucket - rows.num_tokens
        return LaunchedStep(self, sampled, prompt_logprobs, embeddings, num_padded, seconds)

    def sample(self, step: _Unsampled, masks: Mapping[int, Words] | None = None) -> SampledStep:
        """Waits for nothing that the device computes. ``masks``: see `ConstrainedStep.masks`."""
        if masks:
            step.plan.take_masks(masks)
        sampled = self.sampler.sample(step.logits_RV, step.plan, step.params)
        self.state.keep_tokens(step.slots, sampled.token_ids)
        sampled.start_copy()
        return sampled

    def _plan_work(self, plan: SchedulerOutput, rows: Rows) -> WorkList:
        num_prompt = None
        if self.has_position_classes:
            num_prompt = np.array([item.sequence.num_prompt_tokens for item in plan.scheduled])
        return plan_work(rows.cu_seqlens, rows.seq_lens, num_prompt, rows_per_tile=self._rows_per_tile)

    def _bucket_for(self, rows: Rows, work: WorkList) -> int | None:
        """A graph holds decodes alone, each of which samples."""
        if rows.max_query_len > 1 or len(work.tiles) or len(rows.logits_rows) != rows.num_tokens:
            return None
        return self.graphs.bucket_for(rows.num_tokens)

    def _eager(self, rows: Rows, work: WorkList) -> tuple[Layout, StepInputs]:
        layout = Layout(
            Sizes(
                rows.num_tokens,
                rows.num_seqs,
                len(rows.logits_rows),
                len(rows.sampling),
                len(work.tiles),
                len(work.splits),
                len(work.decodes),
            )
        )
        return layout, self.packed.inputs_of(layout, rows.max_query_len, int(rows.seq_lens.max()))

    def _hidden_states(self, inputs: StepInputs) -> torch.Tensor:
        """[S, E]: everything that a graph captures, from the packed inputs to the rows whose logits are wanted."""
        return self.model.hidden_states(
            self.state.input_ids(inputs),
            self.state.metadata(inputs),
            inputs.fields["logits_indices"],
            self.cache.k,
            self.cache.v,
        )

    def _prompt_logprobs(self, rows: Rows, hidden_SE: torch.Tensor) -> dict[Key, list[PendingLogprobs]]:
        """Launched in parts: the logits of a whole chunk of a prompt would take a gigabyte."""
        found: dict[Key, list[PendingLogprobs]] = {}
        for key, start, token_ids, num_top in rows.prompt_rows:
            parts = found[key] = []
            for i in range(0, len(token_ids), self.config.max_num_seqs):
                part = token_ids[i : i + self.config.max_num_seqs]
                logits = self.model.head(hidden_SE[start + i : start + i + len(part)])
                pending = self.sampler.token_logprobs(logits, range(len(part)), part, [num_top] * len(part))
                pending.start_copy()
                parts.append(pending)
        return found

    def _embeddings(self, rows: Rows, hidden_SE: torch.Tensor) -> dict[Key, PendingCopy]:
        found: dict[Key, PendingCopy] = {}
        for key, start, num, kind in rows.pooled_rows:
            pending = found[key] = PendingCopy(pooler.pool(hidden_SE[start : start + num], kind))
            pending.start()
        return found

    def raise_if_lost(self, error: BaseException) -> None:
        """Raises DeviceLostError if no further call to the device can succeed. A mistake of one step is left alone."""
        if isinstance(error, RaggedServeError) or not isinstance(error, Exception):
            return
        try:
            self.gpu.check()
        except Exception as lost:
            raise DeviceLostError(f"{self.gpu.name} is lost: {type(lost).__name__}: {lost}") from error


class _Unsampled(NamedTuple):
    """What sampling a step takes: views of the device's buffers, good until the next launch."""

    logits_RV: torch.Tensor
    plan: SamplingPlan
    params: torch.Tensor
    """plan.rows, on the device."""
    slots: torch.Tensor


class LaunchedStep:
    """A step on the device (see engine.Step)."""

    def __init__(
        self,
        device: CudaDevice,
        sampled: SampledStep | _Unsampled | None,
        prompt_logprobs: dict[Key, list[PendingLogprobs]],
        embeddings: dict[Key, PendingCopy],
        num_padded_tokens: int,
        seconds: dict[str, float],
    ) -> None:
        self._device = device
        self._sampled = sampled
        self._constrained: ConstrainedStep | None = None
        self.ended: Collection[int] = ()
        self._pending = prompt_logprobs
        self._pending_embeddings = embeddings
        self._token_ids: list[int] = []
        self.logprobs: Mapping[int, TokenLogprobs] = {}
        self.prompt_logprobs: Mapping[Key, list[TokenLogprobs]] = {}
        self.embeddings: Mapping[Key, Pooled] = {}
        self.num_padded_tokens = num_padded_tokens
        self.seconds = seconds

    @torch.inference_mode()
    def sample(self) -> None:
        if not isinstance(self._sampled, _Unsampled):
            return
        started = time.perf_counter()
        step, self._sampled = self._sampled, None
        try:
            masks: Mapping[int, Words] = {}
            self._constrained = self._device.constraints.begin(step.plan.sequences)
            if self._constrained is not None:
                masks = self._constrained.masks()
                self.seconds["masks"] = self._constrained.seconds_waited
            self._sampled = self._device.sample(step, masks)
        except Exception as error:
            self._device.raise_if_lost(error)
            raise
        self.seconds["enqueue"] += time.perf_counter() - started - self.seconds.get("masks", 0.0)

    def token_ids(self) -> list[int]:
        self.sample()
        try:
            if self._sampled is not None:
                assert not isinstance(self._sampled, _Unsampled)
                self._token_ids, self.logprobs = self._sampled.read()
                self._sampled = None
                if self._constrained is not None:
                    self.ended = self._constrained.advance(self._token_ids)
            if self._pending:
                self.prompt_logprobs = {
                    key: [entry for part in parts for entry in part.read()] for key, parts in self._pending.items()
                }
                self._pending = {}
            if self._pending_embeddings:
                self.embeddings = {key: pooler.read(x.wait(), key) for key, x in self._pending_embeddings.items()}
                self._pending_embeddings = {}
        except Exception as error:
            self._device.raise_if_lost(error)
            raise
        return self._token_ids


def _check_shapes(config: EngineConfig, model: ModelConfig) -> None:
    if config.block_size not in BLOCK_SIZES:
        sizes = ", ".join(map(str, BLOCK_SIZES))
        raise ConfigurationError(f"block_size is {config.block_size}; on a GPU it must be one of {sizes}")
    if model.head_dim % 16 or model.head_dim > MAX_HEAD_DIM:
        raise ConfigurationError(
            f"head_dim is {model.head_dim}; the GPU kernels need a multiple of 16 up to {MAX_HEAD_DIM}"
        )
    if model.num_heads > MAX_GROUP * model.num_kv_heads:
        raise ConfigurationError(
            f"num_attention_heads is {model.num_heads}; the GPU kernels allow at most {MAX_GROUP} for each of the"
            f" {model.num_kv_heads} kv heads"
        )


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
