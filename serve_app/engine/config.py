"""EngineConfig: every option of one engine. Knows ranges and defaults; knows no model, no device memory.

``None`` means "follows from the model or the device"; the runner resolves it and says what it chose.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from serve_app.errors import ConfigurationError

FAST_MODE = "fast-"
"""How a numerics fingerprint begins where tokens may depend on the batch: not deterministic mode."""
KV_CACHE_DTYPES = ("auto", "float32", "bfloat16", "float16")


@dataclass(frozen=True)
class EngineConfig:
    """Options of one engine. Raises ConfigurationError naming the option, its value and its limit."""

    block_size: int = 32
    """Tokens per KV block. The CPU kernel wants a multiple of 16."""

    num_kv_blocks: int | None = None
    """Blocks in the KV pool. Given by hand it wins over both memory options below."""

    kv_cache_memory_bytes: int | None = None
    """Bytes for the KV pool. On a CPU 1 GiB by default."""

    gpu_memory_utilization: float = 0.9
    """Share of a GPU's memory the engine may use in all (weights, activations, KV pool). Ignored on a CPU."""

    kv_cache_dtype: str = "auto"
    """Element type of the cache: auto (the model's), float32, bfloat16 or float16."""

    max_model_len: int | None = None
    """Longest prompt + output in tokens. By default what the model's config says."""

    max_num_seqs: int = 128
    """Most sequences in one step. At most max_num_batched_tokens, so that a decode never waits for a prefill."""

    max_num_batched_tokens: int = 512
    """Token budget of one step."""

    enable_prefix_caching: bool = True
    """Reuse the KV blocks of equal prefixes between requests with the same cache_salt."""

    num_threads: int | None = None
    """CPU threads of one step. By default the cores this process may use."""

    stuck_seconds: float | None = None
    """A step that has not returned for so long never will: the replica's process ends, and its streams go on elsewhere. By
    default 20 on a GPU, 120 on a CPU."""

    cuda_graphs: bool = True
    """Capture decode steps as CUDA graphs. Ignored on a CPU."""

    deterministic: bool | None = None
    """Bits of a token independent of the batch. By default on for a CPU (if it passes the proof), off for a GPU."""

    seed: int = 0
    """Seeds dummy weights, and the seeds drawn for requests that bring none."""

    def __post_init__(self) -> None:
        def check(name: str, ok: bool, allowed: str) -> None:
            if not ok:
                raise ConfigurationError(f"{name} is {getattr(self, name)!r}; it must be {allowed}")

        def positive(value: object) -> bool:
            return isinstance(value, int) and not isinstance(value, bool) and value >= 1

        for name in ("block_size", "max_num_seqs", "max_num_batched_tokens"):
            check(name, positive(getattr(self, name)), "an integer of at least 1")
        for name in ("num_kv_blocks", "kv_cache_memory_bytes", "max_model_len", "num_threads"):
            value = getattr(self, name)
            check(name, value is None or positive(value), "an integer of at least 1, or None")
        check(
            "max_num_seqs",
            self.max_num_seqs <= self.max_num_batched_tokens,
            f"at most max_num_batched_tokens ({self.max_num_batched_tokens})",
        )
        seconds = self.stuck_seconds
        check("stuck_seconds", seconds is None or 0.0 < seconds < math.inf, "a number of seconds above 0, or None")
        check("gpu_memory_utilization", 0.0 < self.gpu_memory_utilization <= 1.0, "above 0 and at most 1")
        check("kv_cache_dtype", self.kv_cache_dtype in KV_CACHE_DTYPES, f"one of {', '.join(KV_CACHE_DTYPES)}")
        check("seed", isinstance(self.seed, int) and 0 <= self.seed < 2**64, "an integer from 0 to 2**64 - 1")
