"""KVCache: the tensors behind the block pool, and how many blocks fit. Knows layouts; knows no sequences.

storage  K [L, num_blocks, K, D, block_size]   V [L, num_blocks, K, block_size, D]   (why: kernels/cpu.py)
views    k[layer], v[layer]: [num_blocks, block_size, K, D], what every kernel's signature asks for
"""

from __future__ import annotations

import math

import numpy as np
import torch

from serve_app.engine.config import EngineConfig
from serve_app.errors import ConfigurationError
from serve_app.models.decoder_config import DecoderConfig

DEFAULT_CPU_BYTES = 1 << 30


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


def _untouched_zeros(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Zeros whose pages the system hands out when they are first written; torch.zeros would write them all now."""
    num_bytes = math.prod(shape) * dtype.itemsize
    return torch.from_numpy(np.zeros(num_bytes, dtype=np.uint8)).view(dtype).view(shape)


def bytes_per_block(model: DecoderConfig, block_size: int, dtype: torch.dtype) -> int:
    """Bytes of K and V that one block takes in all layers."""
    return model.bytes_per_token_and_layer(dtype.itemsize) * model.num_layers * block_size


def num_blocks_that_fit(config: EngineConfig, model: DecoderConfig, dtype: torch.dtype, max_model_len: int) -> int:
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


def describe(config: EngineConfig, model: DecoderConfig, dtype: torch.dtype, num_blocks: int) -> str:
    """The line said at start-up."""
    per_token = model.bytes_per_token_and_layer(dtype.itemsize)
    total = num_blocks * bytes_per_block(model, config.block_size, dtype)
    return (
        f"KV cache: {num_blocks} blocks of {config.block_size} tokens = {num_blocks * config.block_size} tokens,"
        f" {total / 2**20:.1f} MiB, {per_token} bytes per token and layer"
    )
