"""KVCache: the tensors behind the block pool, and how many blocks fit. Knows layouts; knows no sequences.

CPU      K [L, num_blocks, K, D, block_size]   V [L, num_blocks, K, block_size, D]   (why: kernels/cpu.py)
GPU      K [L, num_blocks, K, block_size, D]   V the same: a head's part of a block is one piece of memory
views    k[layer], v[layer]: [num_blocks, block_size, K, D], what every kernel's signature asks for
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch

from serve_app.engine.config import EngineConfig
from serve_app.errors import ConfigurationError
from serve_app.models.model import ModelConfig

DEFAULT_CPU_BYTES = 1 << 30

MAX_SLOTS = 2**31 - 1
"""Slots are int32."""


class KVCache:
    """Zeroed at the start (the pages are not touched until written). ``k[i]``, ``v[i]``: the views of layer i."""

    def __init__(
        self, num_layers: int, num_blocks: int, block_size: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype
    ) -> None:
        shape = (num_layers, num_blocks, num_kv_heads)
        self._k = _untouched_zeros((*shape, head_dim, block_size), dtype)
        self._v = _untouched_zeros((*shape, block_size, head_dim), dtype)
        self.k = [layer.permute(0, 3, 1, 2) for layer in self._k]
        self.v = [layer.permute(0, 2, 1, 3) for layer in self._v]

    @property
    def num_blocks(self) -> int:
        return self._k.shape[1]

    def copy_blocks(self, pairs: list[tuple[int, int]]) -> None:
        """(source, destination), in order: a later copy sees what an earlier one wrote."""
        for source, destination in pairs:
            self._k[:, destination] = self._k[:, source]
            self._v[:, destination] = self._v[:, source]

    def fill(self, value: float) -> None:
        """Overwrites everything (tests poison unused slots with NaN)."""
        self._k.fill_(value)
        self._v.fill_(value)


class GpuKVCache(KVCache):
    """The GPU's layout. Zeros, written at once: a kernel may load past a sequence's end, and 0 * NaN is NaN."""

    def __init__(
        self,
        num_layers: int,
        num_blocks: int,
        block_size: int,
        num_kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        shape = (num_layers, num_blocks, num_kv_heads, block_size, head_dim)
        self._k = torch.zeros(shape, dtype=dtype, device=device)
        self._v = torch.zeros(shape, dtype=dtype, device=device)
        self.k = [layer.permute(0, 2, 1, 3) for layer in self._k]
        self.v = [layer.permute(0, 2, 1, 3) for layer in self._v]


def _untouched_zeros(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Zeros whose pages the system hands out when they are first written; torch.zeros would write them all now."""
    num_bytes = math.prod(shape) * dtype.itemsize
    return torch.from_numpy(np.zeros(num_bytes, dtype=np.uint8)).view(dtype).view(shape)


def bytes_per_block(model: ModelConfig, block_size: int, dtype: torch.dtype) -> int:
    """Bytes of K and V that one block takes in all layers."""
    return model.bytes_per_token_and_layer(dtype.itemsize) * model.num_layers * block_size


def num_blocks_that_fit(config: EngineConfig, model: ModelConfig, dtype: torch.dtype, max_model_len: int) -> int:
    """num_kv_blocks if given, else what kv_cache_memory_bytes (1 GiB by default on a CPU) holds.

    Raises ConfigurationError if not even one block fits.
    """
    if config.num_kv_blocks is not None:
        return config.num_kv_blocks
    budget = config.kv_cache_memory_bytes or DEFAULT_CPU_BYTES
    size = bytes_per_block(model, config.block_size, dtype)
    # More than every place can fill is waste, even where there is memory.
    useful = config.max_num_seqs * -(-max_model_len // config.block_size)
    num_blocks = min(budget // size, useful)
    if num_blocks < 1:
        raise ConfigurationError(
            f"kv_cache_memory_bytes is {budget}; one block of {config.block_size} tokens takes {size} bytes"
        )
    return num_blocks


class GpuMemory(NamedTuple):
    """Bytes of one GPU, read at two moments: before the weights were loaded, and after the profile step."""

    total: int
    free_at_start: int
    free: int
    """After the profile step, its buffers given back: the weights are there, compiled kernels, library workspaces."""
    activations: int
    """What the profile step took for itself: the largest step there can be."""
    reserve: int
    """What is allocated later: CUDA graphs, the sampler's state."""


def kv_bytes_on_gpu(memory: GpuMemory, utilization: float) -> int:
    """Bytes left for the KV pool; may be negative. ``utilization``: share of the total that the engine may use in all.

        total        [ others | weights, code | activations | reserve | KV pool        | left free ]
        utilization           [ total * utilization                                    )

    What others hold does not count as ours, but it cannot be had either. 80 GiB of which another process has 1, with
    16 GiB of weights and code, 2 of activations and 1 of reserve:

    >>> GiB = 2**30
    >>> memory = GpuMemory(80 * GiB, free_at_start=79 * GiB, free=63 * GiB, activations=2 * GiB, reserve=GiB)
    >>> kv_bytes_on_gpu(memory, 0.9) / GiB, kv_bytes_on_gpu(memory, 1.0) / GiB  # 72 - 19, and 79 - 19
    (53.0, 60.0)
    """
    weights = memory.free_at_start - memory.free
    may_use = min(int(memory.total * utilization), memory.free_at_start)
    return may_use - weights - memory.activations - memory.reserve


def num_blocks_on_gpu(config: EngineConfig, model: ModelConfig, dtype: torch.dtype, memory: GpuMemory) -> int:
    """num_kv_blocks if given, else what kv_cache_memory_bytes holds, else what gpu_memory_utilization leaves.

    Unlike on a CPU no block is too many: nobody else wants the memory, and the prefix cache does. Raises
    ConfigurationError, with the arithmetic, if not even one block fits.
    """
    if config.num_kv_blocks is not None:
        return config.num_kv_blocks
    size = bytes_per_block(model, config.block_size, dtype)
    budget = config.kv_cache_memory_bytes
    if budget is None:
        budget = kv_bytes_on_gpu(memory, config.gpu_memory_utilization)
    num_blocks = min(budget // size, MAX_SLOTS // config.block_size)
    if num_blocks >= 1:
        return num_blocks
    block = f"one block of {config.block_size} tokens takes {size} bytes"
    if config.kv_cache_memory_bytes is not None:
        raise ConfigurationError(f"kv_cache_memory_bytes is {budget}; {block}")
    gib = [f"{num_bytes / 2**30:.2f} GiB" for num_bytes in memory]
    weights = f"{(memory.free_at_start - memory.free) / 2**30:.2f} GiB"
    raise ConfigurationError(
        f"gpu_memory_utilization is {config.gpu_memory_utilization:g}, and nothing is left for the KV cache ({block}):"
        f" the GPU has {gib[0]}, {gib[1]} were free; weights and code take {weights}, the largest step"
        f" ({config.max_num_batched_tokens} tokens) {gib[3]}, CUDA graphs and the sampler {gib[4]}."
        " Raise it, lower max_num_batched_tokens or max_num_seqs, or use a larger GPU"
    )


def describe(config: EngineConfig, model: ModelConfig, dtype: torch.dtype, num_blocks: int) -> str:
    """The line said at start-up."""
    per_token = model.bytes_per_token_and_layer(dtype.itemsize)
    total = num_blocks * bytes_per_block(model, config.block_size, dtype)
    return (
        f"KV cache: {num_blocks} blocks of {config.block_size} tokens = {num_blocks * config.block_size} tokens,"
        f" {total / 2**20:.1f} MiB, {per_token} bytes per token and layer"
    )
