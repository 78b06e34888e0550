"""The oracle against torch and transformers, and the worked examples of its docstrings."""

from __future__ import annotations

import doctest
from typing import NamedTuple

import pytest
import torch
from transformers import LlamaConfig, Qwen3Config
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm, LlamaRotaryEmbedding, apply_rotary_pos_emb
from transformers.models.qwen3.modeling_qwen3 import Qwen3Attention

from serve_app.kernels import reference
from serve_app.kernels.metadata import AttentionMetadata
from serve_app.models.decoder_config import RopeConfig
from serve_app.models.rope import rope_table


def test_worked_examples() -> None:
    result = doctest.testmod(reference)
    assert result.failed == 0
    assert result.attempted >= 15


class Case(NamedTuple):
    q_NHD: torch.Tensor
    k_cache: torch.Tensor
    v_cache: torch.Tensor
    metadata: AttentionMetadata
    keys: list[torch.Tensor]
    """[L, K, D] of each sequence, dense."""
    values: list[torch.Tensor]


def make_case(
    query_lens: list[int],
    seq_lens: list[int],
    *,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    block_size: int,
    dtype: torch.dtype = torch.float32,
    is_permuted: bool = False,
    seed: int = 0,
) -> Case:
    """A ragged step over a cache whose unused slots are NaN, its blocks in random order."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    num_blocks_of = [-(-length // block_size) for length in seq_lens]
    num_blocks = sum(num_blocks_of) + 3
    shape = (num_blocks, block_size, num_kv_heads, head_dim)
    if is_permuted:  # stored as [num_blocks, K, block_size, D], and behind an offset
        stored = (num_blocks, num_kv_heads, block_size, head_dim)
        caches = [torch.full((2, *stored), torch.nan, dtype=dtype)[1].transpose(1, 2) for _ in range(2)]
        assert caches[0].shape == shape
        assert caches[0].is_contiguous() == (num_kv_heads == 1 or block_size == 1)
    else:
        caches = [torch.full(shape, torch.nan, dtype=dtype) for _ in range(2)]
    free = torch.randperm(num_blocks, generator=generator).tolist()
    block_tables = torch.zeros(len(seq_lens), max(num_blocks_of), dtype=torch.int32)
    keys, values, positions, slots = [], [], [], []
    for b, (query_len, seq_len) in enumerate(zip(query_lens, seq_lens, strict=True)):
        blocks = [free.pop() for _ in range(num_blocks_of[b])]
        block_tables[b, : len(blocks)] = torch.tensor(blocks)
        all_slots = torch.tensor([blocks[j // block_size] * block_size + j % block_size for j in range(seq_len)])
        dense = random(seq_len, num_kv_heads, head_dim), random(seq_len, num_kv_heads, head_dim)
        reference.write_kv(*dense, caches[0], caches[1], all_slots)
        keys.append(dense[0])
        values.append(dense[1])
        positions += range(seq_len - query_len, seq_len)
        slots += all_slots[seq_len - query_len :].tolist()
    metadata = AttentionMetadata(
        cu_seqlens_q=torch.tensor([0, *query_lens]).cumsum(0).int(),
        seq_lens=torch.tensor(seq_lens).int(),
        block_tables=block_tables,
        slot_mapping=torch.tensor(slots).int(),
        positions=torch.tensor(positions).int(),
        max_query_len=max(query_lens),
        max_seq_len=max(seq_lens),
    )
    assert caches[0].isnan().any()
    return Case(random(len(positions), num_heads, head_dim), caches[0], caches[1], metadata, keys, values)


def dense_attention(case: Case, scale: float, window: int) -> torch.Tensor:
    """torch's attention, one sequence at a time, with the mask spelled out."""
    outs = []
    starts = case.metadata.cu_seqlens_q.tolist()
    for b, (keys_LKD, values_LKD) in enumerate(zip(case.keys, case.values, strict=True)):
        rows = slice(starts[b], starts[b + 1])
        i = case.metadata.positions[rows, None]
        j = torch.arange(keys_LKD.shape[0])
        mask = (j <= i) & (j > i - window) if window else j <= i
        q_HTD, k_KLD, v_KLD = (x.transpose(0, 1) for x in (case.q_NHD[rows], keys_LKD, values_LKD))
        out_HTD = torch.nn.functional.scaled_dot_product_attention(
            q_HTD[None], k_KLD[None], v_KLD[None], attn_mask=mask, scale=scale, enable_gqa=True
        )[0]
        outs.append(out_HTD.transpose(0, 1))
    return torch.cat(outs)


@pytest.mark.parametrize("is_permuted", [False, True], ids=["contiguous", "permuted"])
@pytest.mark.parametrize("window", [0, 1, 3, 100])
@pytest.mark.parametrize(
    ("num_heads", "num_kv_heads", "head_dim", "block_size"), [(1, 1, 2, 1), (6, 2, 6, 4), (5, 5, 16, 3), (7, 1, 8, 16)]
)
def test_attention_equals_torch(
    num_heads: int, num_kv_heads: int, head_dim: int, block_size: int, window: int, is_permuted: bool
) -> None:
    case = make_case(
        [1, 7, 3, 1, 5],
        [9, 7, 11, 1, 5],
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        block_size=block_size,
        dtype=torch.float64,
        is_permuted=is_permuted,
    )
    out = reference.ragged_attention(
        case.q_NHD, case.k_cache, case.v_cache, case.metadata, scale=0.3, sliding_window=window
    )
    assert out.dtype == torch.float64
    torch.testing.assert_close(out, dense_attention(case, 0.3, window), rtol=1e-12, atol=1e-12)


def test_attention_window_matters() -> None:
    case = make_case([4], [9], num_heads=2, num_kv_heads=1, head_dim=4, block_size=4)
    outs = [
        reference.ragged_attention(case.q_NHD, case.k_cache, case.v_cache, case.metadata, scale=1.0, sliding_window=w)
        for w in (0, 8, 9)
    ]
    assert not torch.equal(outs[0][3], outs[1][3])  # position 8 no longer sees position 0
    assert torch.equal(outs[0][:3], outs[1][:3])
    assert torch.equal(outs[0], outs[2])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_attention_in_narrow_types_is_float32_inside(dtype: torch.dtype) -> None:
    case = make_case([1, 5], [13, 6], num_heads=4, num_kv_heads=2, head_dim=8, block_size=4, dtype=dtype)
    out = reference.ragged_attention(case.q_NHD, case.k_cache, case.v_cache, case.metadata, scale=0.35)
    exact = reference.ragged_attention(case.q_NHD.double(), case.k_cache, case.v_cache, case.metadata, scale=0.35)
    assert out.dtype == dtype
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(out.double(), exact, rtol=4 * eps, atol=4 * eps)


def test_attention_soft_cap() -> None:
    case = make_case([3], [5], num_heads=1, num_kv_heads=1, head_dim=2, block_size=2, dtype=torch.float64)
    out = reference.ragged_attention(case.q_NHD, case.k_cache, case.v_cache, case.metadata, scale=9.0, soft_cap=1.5)
    scores = case.q_NHD[:, 0] @ case.keys[0][:, 0].T * 9.0
    scores = (1.5 * torch.tanh(scores / 1.5)).masked_fill(torch.ones(3, 5).triu(3).bool(), -torch.inf)
    torch.testing.assert_close(out[:, 0], scores.softmax(-1) @ case.values[0][:, 0], rtol=1e-12, atol=1e-12)


def test_write_kv_leaves_other_slots_alone() -> None:
    case = make_case([1], [1], num_heads=1, num_kv_heads=3, head_dim=5, block_size=4, is_permuted=True)
    before = case.k_cache.clone()
    k_NKD, v_NKD = torch.randn(3, 3, 5), torch.randn(3, 3, 5)
    reference.write_kv(k_NKD, v_NKD, case.k_cache, case.v_cache, torch.tensor([9, -1, 2], dtype=torch.int32))
    assert torch.equal(case.k_cache[2, 1], k_NKD[0])
    assert torch.equal(case.v_cache[0, 2], v_NKD[2])
    changed = (case.k_cache != before) & ~(case.k_cache.isnan() & before.isnan())
    assert changed.sum() == 2 * 3 * 5


@pytest.mark.parametrize("shape", [(1, 48), (7, 33), (3, 5, 6)])
def test_norms_equal_transformers(shape: tuple[int, ...]) -> None:
    norm = LlamaRMSNorm(shape[-1], eps=1e-3)
    norm.weight.data.normal_(generator=torch.Generator().manual_seed(1))
    x, residual = torch.randn(2, *shape, generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(reference.rms_norm(x, norm.weight, 1e-3), norm(x))
    total = x + residual
    normed = reference.add_rms_norm(x, residual, norm.weight, 1e-3)
    assert torch.equal(residual, total)
    torch.testing.assert_close(normed, norm(total))


def test_add_rms_norm_norms_the_rounded_sum() -> None:
    x, residual = torch.tensor([[256.0, 1.0]]).bfloat16(), torch.tensor([[1.0, 1.0]]).bfloat16()
    normed = reference.add_rms_norm(x, residual, torch.ones(2), 0.0)
    assert normed.dtype == torch.bfloat16
    assert residual.tolist() == [[256.0, 2.0]]  # 257 has no bfloat16
    assert torch.equal(normed, reference.rms_norm(residual, torch.ones(2), 0.0))


def test_rope_equals_transformers() -> None:
    config = LlamaConfig(hidden_size=54, num_attention_heads=3, num_key_value_heads=1, max_position_embeddings=64)
    positions = torch.tensor([63, 0, 7, 7, 31])
    q_NHD = torch.randn(5, 3, 18, generator=torch.Generator().manual_seed(1))
    cos, sin = LlamaRotaryEmbedding(config)(q_NHD, positions[None])
    theirs, _ = apply_rotary_pos_emb(q_NHD.transpose(0, 1)[None], q_NHD.transpose(0, 1)[None], cos, sin)
    ours = reference.rope(q_NHD, rope_table(RopeConfig(), 18, 64), positions.int())
    torch.testing.assert_close(ours, theirs[0].transpose(0, 1))


def test_silu_mul_equals_transformers() -> None:
    mlp = LlamaMLP(LlamaConfig(hidden_size=6, intermediate_size=10, num_attention_heads=3, num_key_value_heads=1))
    x = torch.randn(4, 6, generator=torch.Generator().manual_seed(1))
    fused = torch.cat((mlp.gate_proj(x), mlp.up_proj(x)), dim=-1)
    torch.testing.assert_close(mlp.down_proj(reference.silu_mul(fused)), mlp(x))


@torch.no_grad()
def test_fused_row_and_attention_equal_transformers_qwen3() -> None:
    """The whole attention of a Qwen3 layer, prompt in two chunks, from the fused projection to its output."""
    config = Qwen3Config(
        hidden_size=40, num_attention_heads=6, num_key_value_heads=2, head_dim=8, max_position_embeddings=32
    )
    config._attn_implementation = "eager"
    layer = Qwen3Attention(config, layer_idx=0)
    generator = torch.Generator().manual_seed(1)
    for parameter in layer.parameters():
        parameter.data.normal_(0.5, 0.3, generator=generator)
    x = torch.randn(9, 40, generator=generator)
    position_embeddings = LlamaRotaryEmbedding(config)(x, torch.arange(9)[None])
    mask = torch.full((9, 9), -torch.inf).triu(1)[None, None]
    theirs, _ = layer(x[None], position_embeddings, mask)

    fused = torch.cat([projection(x) for projection in (layer.q_proj, layer.k_proj, layer.v_proj)], dim=-1)
    table = rope_table(RopeConfig(), 8, 32)
    k_cache, v_cache = torch.full((2, 4, 4, 2, 8), torch.nan)
    blocks = [3, 0, 1]
    outs = []
    for start, stop in ((0, 5), (5, 9)):
        positions = torch.arange(start, stop, dtype=torch.int32)
        metadata = AttentionMetadata(
            cu_seqlens_q=torch.tensor([0, stop - start]),
            seq_lens=torch.tensor([stop]),
            block_tables=torch.tensor([blocks]),
            slot_mapping=torch.tensor([blocks[j // 4] * 4 + j % 4 for j in range(start, stop)]),
            positions=positions,
            max_query_len=stop - start,
            max_seq_len=stop,
        )
        q_NHD = reference.qk_norm_rope_write(
            fused[start:stop],
            table,
            positions,
            k_cache,
            v_cache,
            metadata.slot_mapping,
            q_norm=layer.q_norm.weight,
            k_norm=layer.k_norm.weight,
            eps=config.rms_norm_eps,
        )
        assert q_NHD.shape == (stop - start, 6, 8)
        outs.append(reference.ragged_attention(q_NHD, k_cache, v_cache, metadata, scale=8**-0.5))
    ours = layer.o_proj(torch.cat(outs).flatten(1))
    torch.testing.assert_close(ours, theirs[0], rtol=1e-4, atol=1e-4)
