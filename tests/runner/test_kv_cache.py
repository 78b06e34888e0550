"""KVCache: layouts and copies; and how many blocks fit."""

from __future__ import annotations

import dataclasses
import doctest

import pytest
import torch

from serve_app.engine.config import EngineConfig
from serve_app.errors import ConfigurationError
from serve_app.models.decoder_config import DecoderConfig
from serve_app.runner import kv_cache
from serve_app.runner.kv_cache import (
    DEFAULT_CPU_BYTES,
    GpuKVCache,
    GpuMemory,
    KVCache,
    bytes_per_block,
    describe,
    kv_bytes_on_gpu,
    num_blocks_on_gpu,
    num_blocks_that_fit,
)

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


def test_the_layout_on_a_gpu() -> None:
    cache = GpuKVCache(3, 5, 16, 2, 32, torch.float16, torch.device("cpu"))
    for x in (*cache.k, *cache.v):
        assert x.shape == (5, 16, 2, 32)
        assert x.stride() == (2 * 16 * 32, 32, 16 * 32, 1)  # a head's part of a block is one piece
        assert x.dtype == torch.float16
        assert not x.any()
    cache.v[1][2, 3, 1, 7] = 5.0
    cache.copy_blocks([(2, 4), (4, 0)])
    assert [int(x.count_nonzero()) for x in (*cache.k, *cache.v)] == [0, 0, 0, 0, 3, 0]
    assert cache.v[1][0, 3, 1, 7] == 5.0
    assert cache.num_blocks == 5


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


# ---- on a GPU, with memory that is made up ---------------------------------------------------------------------------

GIB = 2**30
H200 = GpuMemory(141 * GIB, free_at_start=140 * GIB, free=124 * GIB, activations=3 * GIB, reserve=GIB // 2)


def test_what_the_utilization_leaves() -> None:
    """126.9 GiB may be used: 16 weights, 3 activations, 0.5 reserve."""
    size = bytes_per_block(GQA, 32, torch.bfloat16)
    left = int(141 * GIB * 0.9) - 16 * GIB - 3 * GIB - GIB // 2
    assert kv_bytes_on_gpu(H200, 0.9) == left
    assert num_blocks_on_gpu(EngineConfig(), GQA, torch.bfloat16, H200) == left // size
    assert num_blocks_on_gpu(EngineConfig(kv_cache_dtype="auto"), GQA, torch.float32, H200) == left // (2 * size)
    half = EngineConfig(gpu_memory_utilization=0.5)
    assert num_blocks_on_gpu(half, GQA, torch.bfloat16, H200) == (int(70.5 * GIB) - int(19.5 * GIB)) // size


def test_two_replicas_on_one_gpu_with_a_share_each() -> None:
    """The second finds 45 % taken: they are not its own, but the free memory bounds it."""
    second = H200._replace(free_at_start=77 * GIB, free=61 * GIB)
    assert kv_bytes_on_gpu(second, 0.45) == kv_bytes_on_gpu(H200, 0.45) == int(141 * GIB * 0.45) - int(19.5 * GIB)
    assert kv_bytes_on_gpu(second, 0.9) == 77 * GIB - int(19.5 * GIB)


def test_hands_win_over_the_utilization() -> None:
    size = bytes_per_block(GQA, 32, torch.bfloat16)
    for config, expected in (
        (EngineConfig(num_kv_blocks=7, kv_cache_memory_bytes=1), 7),
        (EngineConfig(kv_cache_memory_bytes=5 * size + 1), 5),
        # No more than every place can fill, on a CPU; here the prefix cache takes what there is.
        (EngineConfig(kv_cache_memory_bytes=500 * size, max_num_seqs=1, max_model_len=64), 500),
    ):
        assert num_blocks_on_gpu(config, GQA, torch.bfloat16, H200) == expected


def test_slots_stay_within_int32() -> None:
    tiny = dataclasses.replace(GQA, num_layers=1, num_kv_heads=1, head_dim=1)
    num_blocks = num_blocks_on_gpu(EngineConfig(), tiny, torch.float16, H200)
    assert num_blocks * 32 <= 2**31 - 1 < (num_blocks + 1) * 32


def test_nothing_left_on_a_gpu() -> None:
    full = H200._replace(free=20 * GIB)
    message = (
        r"gpu_memory_utilization is 0.8, .*one block of 32 tokens takes \d+ bytes\): the GPU has 141.00 GiB, 140.00 GiB"
        r" were free; weights and code take 120.00 GiB, the largest step \(512 tokens\) 3.00 GiB, CUDA graphs and the"
        r" sampler 0.50 GiB. Raise it"
    )
    with pytest.raises(ConfigurationError, match=message):
        num_blocks_on_gpu(EngineConfig(gpu_memory_utilization=0.8), GQA, torch.float16, full)
    with pytest.raises(ConfigurationError, match="kv_cache_memory_bytes is 9; one block of 32 tokens takes"):
        num_blocks_on_gpu(EngineConfig(kv_cache_memory_bytes=9), GQA, torch.float16, H200)


def test_worked_example_of_the_docstring() -> None:
    result = doctest.testmod(kv_cache)
    assert (result.failed, result.attempted) == (0, 3)
