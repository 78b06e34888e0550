"""CpuDevice: a step on CPU threads, all of it at once. Knows what the CPU kernels want; knows no GPU.

launch(plan): copy blocks -> build the ragged batch -> forward -> sample
"""

from __future__ import annotations

import ctypes
import sys
import time
from collections.abc import Mapping
from functools import partial

import torch

from serve_app.engine.config import EngineConfig
from serve_app.engine.pooling import Pooled
from serve_app.engine.request import TokenLogprobs
from serve_app.engine.scheduler import Key, SchedulerOutput
from serve_app.errors import ConfigurationError, DeterminismError
from serve_app.kernels import cpu, ops
from serve_app.kernels.simd import LANES
from serve_app.logs import get_logger
from serve_app.models.model import Model, ModelConfig
from serve_app.runner import machine, numerics, pooler
from serve_app.runner.batch import Batch, BatchBuilder
from serve_app.runner.constraints import Constraints
from serve_app.runner.device import ComputedStep, MakeModel
from serve_app.runner.kv_cache import KVCache, num_blocks_that_fit
from serve_app.runner.sampler import Sampler, token_logprobs
from serve_app.runner.self_check import SelfChecked, check_rows

logger = get_logger(__name__)


class CpuDevice:
    """See `Device`."""

    torch_device = torch.device("cpu")
    max_steps_in_flight = 1
    has_position_classes = False
    """One row function serves every position."""

    def __init__(self, config: EngineConfig, model_config: ModelConfig, max_model_len: int) -> None:
        _check_shapes(config, model_config)
        self.config = config
        self.model_config = model_config
        self.max_model_len = max_model_len
        self.num_threads = config.num_threads or torch.get_num_threads()
        self._use_threads()
        _keep_freed_memory()
        self.ops = ops.select("cpu")
        self._proof: numerics.Proof | None = None
        """What deterministic mode rests on; None in fast mode."""

    @property
    def deterministic(self) -> bool:
        return self._proof is not None

    # ---- start-up ------------------------------------------------------------------------------------------------

    def load(self, make: MakeModel, dtype: torch.dtype | None) -> Model:
        chosen = dtype or self._automatic_dtype()
        model = make(chosen)
        if self.config.deterministic is False:
            self._check_rows(model)
            return model
        proof = self._prove(model, chosen)
        if proof.failures and dtype is None and chosen != torch.float32:
            logger.info("bfloat16 products depend on the batch here: loading as float32")
            model = make(torch.float32)
            proof = self._prove(model, torch.float32)
        try:
            numerics.apply(proof, model.linears)
            self._check_rows(model, to_the_bit=True)
        except DeterminismError as error:
            if self.config.deterministic:
                raise
            logger.warning("%s. Going on in fast mode: tokens may depend on the batch", error)
            self._check_rows(model)
        else:
            self._proof = proof
        return model

    def _automatic_dtype(self) -> torch.dtype:
        """The checkpoint's bfloat16 where matrix tiles make it fast; else float32, which rounds no weight."""
        if self.model_config.dtype == "bfloat16" and machine.has_amx():
            return torch.bfloat16
        return torch.float32

    def _prove(self, model: Model, dtype: torch.dtype) -> numerics.Proof:
        return numerics.prove(
            model.linears,
            self.ops,
            self.config.max_num_batched_tokens,
            num_heads=self.model_config.num_heads,
            num_kv_heads=self.model_config.num_kv_heads,
            head_dim=self.model_config.head_dim,
            dtype=dtype,
            block_size=self.config.block_size,
        )

    def _check_rows(self, model: Model, *, to_the_bit: bool = False) -> None:
        """Raises DeterminismError (``to_the_bit``) or UnsupportedModelError."""
        if not isinstance(model, SelfChecked):
            return
        shape, size = self.model_config, self.config.block_size
        make = partial(
            KVCache,
            shape.num_layers,
            block_size=size,
            num_kv_heads=shape.num_kv_heads,
            head_dim=shape.head_dim,
            dtype=model.embedding_VE.dtype,
        )
        check_rows(model, make, size, min(self.config.max_num_batched_tokens, 300), self.max_model_len, to_the_bit)

    def make_cache(self, model: Model, dtype: torch.dtype) -> KVCache:
        config, shape = self.config, self.model_config
        num_blocks = num_blocks_that_fit(config, shape, dtype, self.max_model_len)
        return KVCache(shape.num_layers, num_blocks, config.block_size, shape.num_kv_heads, shape.head_dim, dtype)

    def get_ready(self, model: Model, cache: KVCache) -> None:
        self.model = model
        self.cache = cache
        self.batches = BatchBuilder(self.config.max_num_seqs, self.max_model_len, self.config.block_size)
        self.sampler = Sampler(self.model_config.vocab_size, self.config.max_num_seqs)
        self.constraints = Constraints(self.config.max_num_seqs, num_threads=1)

    def describe(self) -> tuple[str, str]:
        mode = "deterministic" if self.deterministic else "fast"
        if self._proof is not None and self._proof.uses_fixed_tiles:
            mode += " (products in fixed tiles of rows)"
        return f"{self.num_threads} CPU threads", mode

    def fingerprint(self, parts: dict[str, object]) -> str:
        linears = self.model.linears
        tiles = sorted({(*x.shape_key[:2], x.row_tiles, x.chain_depth, x.is_packed) for x in linears})
        return machine.fingerprint({**parts, "row_tiles": tiles})

    # ---- one step ------------------------------------------------------------------------------------------------

    def launch(self, plan: SchedulerOutput) -> ComputedStep:
        self._use_threads()
        started = time.perf_counter()
        self.cache.copy_blocks(plan.block_copies)
        batch = self.batches.build(plan)
        built = time.perf_counter()
        constrained = self.constraints.begin(batch.sampling)
        products = self.model.row_linears  # a padded row is padded in each layer
        padded = [linear.num_padded_rows for linear in products]
        inputs = batch.input_ids, batch.metadata, batch.logits_indices, self.cache.k, self.cache.v
        embeddings: dict[Key, Pooled] = {}
        if batch.pooled_rows:
            hidden = self.model.hidden_states(*inputs)
            for rows in batch.pooled_rows:
                part = pooler.pool(hidden[rows.start : rows.start + rows.num], rows.kind)
                embeddings[rows.key] = pooler.read(part.numpy(), rows.key)
            logits = self.model.head(hidden[: batch.pooled_rows[0].start])
        else:
            logits = self.model.forward(*inputs)
        computed = time.perf_counter()
        masks = None if constrained is None else constrained.masks()
        num_sampled = len(batch.sampling)
        token_ids: list[int] = []
        logprobs: Mapping[int, TokenLogprobs] = {}
        if num_sampled:
            token_ids, logprobs = self.sampler.sample(logits[:num_sampled], batch.sampling, masks)
        prompt_logprobs = _prompt_logprobs(batch, logits)
        ended = frozenset[int]() if constrained is None else constrained.advance(token_ids)
        seconds = {
            "batch": built - started,
            "model": computed - built,
            "sampler": time.perf_counter() - computed,
        }
        if constrained is not None:
            seconds["masks"] = constrained.seconds_waited
            seconds["sampler"] -= constrained.seconds_waited
        more = (linear.num_padded_rows - before for linear, before in zip(products, padded, strict=True))
        num_padded = max(more, default=0)
        return ComputedStep(token_ids, logprobs, prompt_logprobs, num_padded, seconds, embeddings, ended)

    def _use_threads(self) -> None:
        """OpenMP's thread count belongs to the calling thread: others may have changed it, or the engine has moved."""
        if torch.get_num_threads() != self.num_threads:
            torch.set_num_threads(self.num_threads)


def _prompt_logprobs(batch: Batch, logits: torch.Tensor) -> dict[Key, list[TokenLogprobs]]:
    found = {}
    for rows in batch.prompt_rows:
        num = len(rows.token_ids)
        found[rows.key] = token_logprobs(logits[rows.start : rows.start + num], rows.token_ids, [rows.num_top] * num)
    return found


def _check_shapes(config: EngineConfig, model: ModelConfig) -> None:
    """The vectors of kernels/cpu.py have 16 lanes."""
    for name, value in (
        ("block_size", config.block_size),
        ("head_dim", model.head_dim),
        ("hidden_size", model.hidden_size),
    ):
        if value % LANES:
            raise ConfigurationError(f"{name} is {value}; the CPU kernels need a multiple of {LANES}")
    if model.num_heads > cpu.MAX_ROWS * model.num_kv_heads:
        raise ConfigurationError(
            f"num_attention_heads is {model.num_heads}; the CPU kernels allow at most {cpu.MAX_ROWS} for each of the"
            f" {model.num_kv_heads} kv heads"
        )
    if 256 % config.block_size:
        raise ConfigurationError(f"block_size is {config.block_size}; on a CPU it must divide 256")


def _keep_freed_memory() -> None:
    """Lets glibc keep freed buffers: a step's activations are the same sizes again, and fresh pages cost more.

    By default an allocation above a threshold is a mapping of its own, given back when freed; 32 MiB is the highest
    threshold that mallopt takes (glibc, malloc.c, DEFAULT_MMAP_THRESHOLD_MAX).
    """
    if not sys.platform.startswith("linux"):
        return
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):  # another C library
        return
    m_trim_threshold, m_mmap_threshold = -1, -3
    if not (mallopt(m_mmap_threshold, 32 << 20) and mallopt(m_trim_threshold, 1 << 30)):
        logger.info("malloc keeps its defaults: buffers of a step are mapped afresh each time")
