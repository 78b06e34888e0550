"""KVCache: layouts and copies; and how many blocks fit."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from serve_app.engine.config import EngineConfig
from serve_app.errors import ConfigurationError
from serve_app.models.decoder_config import DecoderConfig
from serve_app.runner.kv_cache import DEFAULT_CPU_BYTES, KVCache, bytes_per_block, describe, num_blocks_that_fit

LLAMA_2_7B = DecoderConfig.from_hf(
    {
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "max_position_embeddings": 4096,
        "num_attention_heads": 32,
        "num_hidden_layers": 32,
        "num_key_value_heads": 32,
        "rms_norm_eps": 1e-5,
        "torch_dtype": "float16",
        "vocab_size": 32000,
    }
)
GQA = dataclasses.replace(LLAMA_2_7B, num_kv_heads=8, num_layers=3)


def make_cache(dtype: torch.dtype = torch.float32) -> KVCache:
    return KVCache(3, 5, 16, 2, 32, dtype)


def test_llama_2_7b_takes_16_kib_per_token_and_layer() -> None:
    assert LLAMA_2_7B.bytes_per_token_and_layer(torch.float16.itemsize) == 16 * 1024
    assert bytes_per_block(LLAMA_2_7B, 1, torch.float16) == 32 * 16 * 1024
    assert bytes_per_block(LLAMA_2_7B, 32, torch.float16) == 16 * 2**20
    config = EngineConfig(kv_cache_memory_bytes=2**30)
    assert num_blocks_that_fit(config, LLAMA_2_7B, torch.float16, 4096) == 64
    line = describe(config, LLAMA_2_7B, torch.float16, 64)
    assert line == "KV cache: 64 blocks of 32 tokens = 2048 tokens, 1024.0 MiB, 16384 bytes per token and layer"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_tensors_take_what_is_said(dtype: torch.dtype) -> None:
    cache = KVCache(GQA.num_layers, 4, 16, GQA.num_kv_heads, GQA.head_dim, dtype)
    num_bytes = sum(x.nbytes for x in (*cache.k, *cache.v))
    assert num_bytes == 4 * bytes_per_block(GQA, 16, dtype)
    assert cache.num_blocks == 4


def test_views_and_layout() -> None:
    cache = make_cache()
    for k, v in zip(cache.k, cache.v, strict=True):
        assert k.shape == v.shape == (5, 16, 2, 32)
        assert k.stride() == (16 * 2 * 32, 1, 32 * 16, 16)  # keys of a block side by side
        assert v.stride() == (16 * 2 * 32, 32, 16 * 32, 1)  # dims side by side
        assert not k.any()
        assert not v.any()
    cache.k[1][2, 3, 1, 7] = 5.0
    assert sum(int(x.any()) for x in (*cache.k, *cache.v)) == 1


def test_fill() -> None:
    cache = make_cache(torch.bfloat16)
    cache.fill(float("nan"))
    assert all(x.isnan().all() for x in (*cache.k, *cache.v))


def test_copies_run_in_order_and_touch_nothing_else() -> None:
    cache = make_cache()
    generator = torch.Generator().manual_seed(0)
    for x in (*cache.k, *cache.v):
        x.copy_(torch.randn(x.shape, generator=generator))
    before = [x.clone() for x in (*cache.k, *cache.v)]
    cache.copy_blocks([(0, 3), (3, 4), (1, 0)])
    for x, old in zip((*cache.k, *cache.v), before, strict=True):
        assert torch.equal(x, old[[1, 1, 2, 0, 0]])
    cache.copy_blocks([])


@pytest.mark.parametrize("kv_bytes", [None, 1, 2**20, 2**40])
def test_num_kv_blocks_by_hand_wins(kv_bytes: int | None) -> None:
    config = EngineConfig(num_kv_blocks=77, kv_cache_memory_bytes=kv_bytes, gpu_memory_utilization=0.1)
    assert num_blocks_that_fit(config, LLAMA_2_7B, torch.float16, 4096) == 77


def test_bytes_round_down_to_whole_blocks() -> None:
    size = bytes_per_block(GQA, 32, torch.float16)
    for num_bytes, expected in ((size, 1), (2 * size - 1, 1), (2 * size, 2), (7 * size + 5, 7)):
        config = EngineConfig(kv_cache_memory_bytes=num_bytes)
        assert num_blocks_that_fit(config, GQA, torch.float16, 4096) == expected


def test_too_few_bytes_for_a_block() -> None:
    size = bytes_per_block(GQA, 32, torch.float16)
    config = EngineConfig(kv_cache_memory_bytes=size - 1)
    with pytest.raises(
        ConfigurationError, match=f"kv_cache_memory_bytes is {size - 1}; .* 32 tokens takes {size} bytes"
    ):
        num_blocks_that_fit(config, GQA, torch.float16, 4096)


def test_a_gibibyte_by_default_and_no_more_than_can_be_filled() -> None:
    size = bytes_per_block(LLAMA_2_7B, 32, torch.float16)
    assert num_blocks_that_fit(EngineConfig(), LLAMA_2_7B, torch.float16, 4096) == DEFAULT_CPU_BYTES // size == 64
    config = EngineConfig(max_num_seqs=3)
    assert num_blocks_that_fit(config, GQA, torch.float16, 100) == 3 * 4
