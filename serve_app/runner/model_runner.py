"""ModelRunner: the Runner that runs a model. Knows the order of a step's parts; each part lives in a file of its own.

launch(plan): copy blocks -> build the ragged batch -> forward -> sample          (on a CPU all of it at once)
"""

from __future__ import annotations

import ctypes
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import torch

from serve_app.engine.config import EngineConfig
from serve_app.engine.request import TokenLogprobs
from serve_app.engine.scheduler import Key, SchedulerOutput
from serve_app.errors import ConfigurationError, DeterminismError
from serve_app.hub import resolve_model
from serve_app.kernels import cpu, ops
from serve_app.kernels.simd import LANES
from serve_app.logs import get_logger
from serve_app.models.decoder import Decoder
from serve_app.models.decoder_config import DecoderConfig, load_model_config
from serve_app.models.weights import DummyWeights, WeightLoader, weights_fingerprint
from serve_app.runner import numerics
from serve_app.runner.batch import Batch, BatchBuilder
from serve_app.runner.kv_cache import KVCache, describe, num_blocks_that_fit
from serve_app.runner.sampler import Sampler, token_logprobs

logger = get_logger(__name__)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
LOAD_FORMATS = ("auto", "dummy")


class ModelRunner:
    """``model``: a directory or hub id. ``dtype``, ``device``: "auto" or a name; ``load_format``: "auto" or "dummy".

    Raises a StartupError that names what is wrong before any weight is read, where that is possible.
    """

    max_steps_in_flight = 1

    def __init__(
        self,
        model: str | Path,
        config: EngineConfig,
        *,
        dtype: str = "auto",
        device: str = "auto",
        load_format: str = "auto",
        revision: str | None = None,
    ) -> None:
        if dtype not in ("auto", *DTYPES):
            raise ConfigurationError(f"dtype is {dtype!r}; it must be one of auto, {', '.join(DTYPES)}")
        if device not in ("auto", "cpu"):
            raise ConfigurationError(f"device is {device!r}; it must be auto or cpu (the GPU path is not built yet)")
        if load_format not in LOAD_FORMATS:
            raise ConfigurationError(f"load_format is {load_format!r}; it must be one of {', '.join(LOAD_FORMATS)}")
        self.config = config
        self.directory = resolve_model(model, revision)
        self.model_config = load_model_config(self.directory)
        self.load_format = load_format
        self.max_model_len = _max_model_len(config, self.model_config)
        _check_cpu_shapes(config, self.model_config)
        self.vocab_size = self.model_config.vocab_size
        self.eos_token_ids = frozenset(self.model_config.eos_token_ids)
        self.num_threads = config.num_threads or torch.get_num_threads()
        self._use_threads()
        _keep_freed_memory()

        self.ops = ops.select("cpu")
        self.dtype = DTYPES[dtype] if dtype != "auto" else self._automatic_dtype()
        self.model = self._load()
        self._proof = self._prove_deterministic(may_reload=dtype == "auto")
        """What deterministic mode rests on; None in fast mode."""
        cache_dtype = self.dtype if config.kv_cache_dtype == "auto" else DTYPES[config.kv_cache_dtype]
        self.num_kv_blocks = num_blocks_that_fit(config, self.model_config, cache_dtype, self.max_model_len)
        self.kv_cache = KVCache(
            self.model_config.num_layers,
            self.num_kv_blocks,
            config.block_size,
            self.model_config.num_kv_heads,
            self.model_config.head_dim,
            cache_dtype,
        )
        self.fingerprint = self._fingerprint()
        self._batches = BatchBuilder(config.max_num_seqs, self.max_model_len, config.block_size)
        self._sampler = Sampler(self.vocab_size, config.max_num_seqs)
        for line in self.describe():
            logger.info(line)

    def describe(self) -> list[str]:
        """What was chosen, for the log."""
        mode = "deterministic" if self.deterministic else "fast"
        if self._proof is not None and self._proof.uses_fixed_tiles:
            mode += " (products in fixed tiles of rows)"
        dtype = str(self.dtype).removeprefix("torch.")
        model_line = (
            f"{self.model_config.architecture} from {self.directory}: {dtype}, {self.num_threads} CPU threads, {mode},"
            f" max_model_len {self.max_model_len}, numerics {self.fingerprint}"
        )
        return [
            model_line,
            describe(self.config, self.model_config, self.kv_cache.k[0].dtype, self.num_kv_blocks),
        ]

    @property
    def deterministic(self) -> bool:
        return self._proof is not None

    # ---- one step ------------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def launch(self, plan: SchedulerOutput) -> ComputedStep:
        self._use_threads()
        started = time.perf_counter()
        self.kv_cache.copy_blocks(plan.block_copies)
        batch = self._batches.build(plan)
        built = time.perf_counter()
        products = self.model.layers[0].linears  # of all the step's rows; a padded row is padded in each layer
        padded = [linear.num_padded_rows for linear in products]
        logits = self.model.forward(
            batch.input_ids, batch.metadata, batch.logits_indices, self.kv_cache.k, self.kv_cache.v
        )
        computed = time.perf_counter()
        num_sampled = len(batch.sampling)
        token_ids: list[int] = []
        logprobs: Mapping[int, TokenLogprobs] = {}
        if num_sampled:
            token_ids, logprobs = self._sampler.sample(logits[:num_sampled], batch.sampling)
        prompt_logprobs = _prompt_logprobs(batch, logits)
        seconds = {
            "batch": built - started,
            "model": computed - built,
            "sampler": time.perf_counter() - computed,
        }
        num_padded = max(linear.num_padded_rows - before for linear, before in zip(products, padded, strict=True))
        return ComputedStep(token_ids, logprobs, prompt_logprobs, num_padded, seconds)

    def _use_threads(self) -> None:
        """OpenMP's thread count belongs to the calling thread: others may have changed it, or the engine has moved."""
        if torch.get_num_threads() != self.num_threads:
            torch.set_num_threads(self.num_threads)

    # ---- start-up ------------------------------------------------------------------------------------------------

    def _automatic_dtype(self) -> torch.dtype:
        """The checkpoint's bfloat16 where matrix tiles make it fast; else float32, which rounds no weight."""
        if self.model_config.dtype == "bfloat16" and numerics.has_amx():
            return torch.bfloat16
        return torch.float32

    def _load(self) -> Decoder:
        config = self.model_config
        if self.load_format == "dummy":
            source: DummyWeights | WeightLoader = DummyWeights(self.config.seed)
        else:
            source = WeightLoader(self.directory, tie_word_embeddings=config.tie_word_embeddings)
        return Decoder(config, source, self.ops, self.dtype, self.max_model_len)

    def _prove_deterministic(self, *, may_reload: bool) -> numerics.Proof | None:
        if self.config.deterministic is False:
            return None
        model = self.model_config
        proof = numerics.prove(
            self.model.linears,
            self.ops,
            self.config.max_num_batched_tokens,
            num_heads=model.num_heads,
            num_kv_heads=model.num_kv_heads,
            head_dim=model.head_dim,
            dtype=self.dtype,
            block_size=self.config.block_size,
        )
        if proof.failures and may_reload and self.dtype != torch.float32:
            logger.info("bfloat16 products depend on the batch here: loading as float32")
            self.dtype = torch.float32
            self.model = self._load()
            return self._prove_deterministic(may_reload=False)
        try:
            numerics.apply(proof, self.model.linears)
        except DeterminismError as error:
            if self.config.deterministic:
                raise
            logger.warning("%s. Going on in fast mode: tokens may depend on the batch", error)
            return None
        return proof

    def _fingerprint(self) -> str:
        weights = weights_fingerprint(self.directory) if self.load_format != "dummy" else f"dummy {self.config.seed}"
        return numerics.fingerprint(
            {
                "weights": weights,
                "model": self.model_config,
                "dtype": self.dtype,
                "kv_cache_dtype": self.kv_cache.k[0].dtype,
                "deterministic": self.deterministic,
                "row_tiles": sorted(
                    {(*x.shape_key[:2], x.row_tiles, x.chain_depth, x.is_packed) for x in self.model.linears}
                ),
            }
        )


class ComputedStep:
    """A step whose results are there already (see engine.Step)."""

    def __init__(
        self,
        token_ids: list[int],
        logprobs: Mapping[int, TokenLogprobs],
        prompt_logprobs: Mapping[Key, list[TokenLogprobs]],
        num_padded_tokens: int,
        seconds: Mapping[str, float],
    ) -> None:
        self._token_ids = token_ids
        self.logprobs = logprobs
        self.prompt_logprobs = prompt_logprobs
        self.num_padded_tokens = num_padded_tokens
        self.seconds = seconds

    def token_ids(self) -> list[int]:
        return self._token_ids


def _prompt_logprobs(batch: Batch, logits: torch.Tensor) -> dict[Key, list[TokenLogprobs]]:
    found = {}
    for rows in batch.prompt_rows:
        num = len(rows.token_ids)
        found[rows.key] = token_logprobs(logits[rows.start : rows.start + num], rows.token_ids, [rows.num_top] * num)
    return found


def _max_model_len(config: EngineConfig, model: DecoderConfig) -> int:
    if config.max_model_len is not None and config.max_model_len > model.max_model_len:
        raise ConfigurationError(
            f"max_model_len is {config.max_model_len}; the model's config allows at most {model.max_model_len}"
        )
    return config.max_model_len or model.max_model_len


def _check_cpu_shapes(config: EngineConfig, model: DecoderConfig) -> None:
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
