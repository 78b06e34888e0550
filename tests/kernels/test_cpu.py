"""The CPU kernels against the oracle, over odd shapes; and bit for bit alone, in a batch and in chunks.

Slots that hold no key are NaN, and so are the blocks that nobody owns: reading one would show.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import pytest
import torch

from serve_app.kernels import cpu, openmp, reference
from serve_app.kernels.metadata import AttentionMetadata
from serve_app.models.decoder_config import RopeConfig
from serve_app.models.rope import rope_table
from tests.tiny_runs import bits

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
THREADS = [1, 2]


class Cache(NamedTuple):
    """K and V of a few sequences in the layout of the CPU kernels, as views [num_blocks, block_size, K, D]."""

    k: torch.Tensor
    v: torch.Tensor
    tables: list[list[int]]

    @property
    def block_size(self) -> int:
        return self.k.shape[1]


def empty_cache(num_blocks: int, block_size: int, kv_heads: int, dim: int, dtype: torch.dtype) -> tuple[Any, Any]:
    k = torch.full((num_blocks, kv_heads, dim, block_size), torch.nan, dtype=dtype).permute(0, 3, 1, 2)
    v = torch.full((num_blocks, kv_heads, block_size, dim), torch.nan, dtype=dtype).permute(0, 2, 1, 3)
    return k, v


def make_cache(
    seq_lens: Sequence[int], block_size: int, kv_heads: int, dim: int, dtype: torch.dtype, seed: int = 0
) -> Cache:
    generator = torch.Generator().manual_seed(seed)
    sizes = [-(-length // block_size) for length in seq_lens]
    num_blocks = sum(sizes) + 2
    k, v = empty_cache(num_blocks, block_size, kv_heads, dim, dtype)
    free = torch.randperm(num_blocks, generator=generator).tolist()
    tables = [[free.pop() for _ in range(size)] for size in sizes]
    for table, length in zip(tables, seq_lens, strict=True):
        for j in range(length):
            k[table[j // block_size], j % block_size] = torch.randn(kv_heads, dim, generator=generator).to(dtype)
            v[table[j // block_size], j % block_size] = torch.randn(kv_heads, dim, generator=generator).to(dtype)
    assert k.isnan().any()
    return Cache(k, v, tables)


def make_metadata(cache: Cache, spans: Sequence[tuple[int, int, int]]) -> AttentionMetadata:
    """``spans``: (sequence, start, end), the rows of one step in their order."""
    width = max(len(table) for table in cache.tables)
    lens = [end - start for _, start, end in spans]
    positions = torch.cat([torch.arange(start, end) for _, start, end in spans]).int()
    return AttentionMetadata(
        cu_seqlens_q=torch.tensor([0, *lens]).cumsum(0).int(),
        seq_lens=torch.tensor([end for _, _, end in spans]).int(),
        block_tables=torch.tensor([cache.tables[b] + [0] * (width - len(cache.tables[b])) for b, _, _ in spans]).int(),
        slot_mapping=torch.full_like(positions, -1),
        positions=positions,
        max_query_len=max(lens),
        max_seq_len=max(end for _, _, end in spans),
    )


def make_queries(num: int, heads: int, dim: int, dtype: torch.dtype, seed: int = 1) -> torch.Tensor:
    return torch.randn(num, heads, dim, generator=torch.Generator().manual_seed(seed)).to(dtype)


def dense(
    q_NHD: torch.Tensor, cache: Cache, spans: Sequence[tuple[int, int, int]], window: int, cap: float
) -> torch.Tensor:
    """float64, a sequence at a time: for sizes the oracle's loops are too slow for (it agrees with them, see below)."""
    outs = []
    row = 0
    for b, start, end in spans:
        k_LKD, v_LKD = (x[cache.tables[b]].flatten(0, 1)[:end].double() for x in (cache.k, cache.v))
        group = q_NHD.shape[1] // k_LKD.shape[1]
        q_THD = q_NHD[row : row + end - start].double()
        row += end - start
        scores = torch.einsum("thd,lhd->htl", q_THD, k_LKD.repeat_interleave(group, 1)) * q_NHD.shape[2] ** -0.5
        if cap:
            scores = cap * torch.tanh(scores / cap)
        i, j = torch.arange(start, end)[:, None], torch.arange(end)
        mask = (j > i) | (j <= i - window) if window else j > i
        probabilities = scores.masked_fill(mask, -torch.inf).softmax(-1)
        outs.append(torch.einsum("htl,lhd->thd", probabilities, v_LKD.repeat_interleave(group, 1)))
    return torch.cat(outs)


SPANS = [(0, 4, 5), (1, 0, 7), (2, 40, 51), (3, 0, 1), (1, 7, 8)]
"""A decode, a prompt from its start, a later chunk, the first token of all; and sequence 1 goes on, in the same step."""
SEQ_LENS = (5, 8, 51, 1)


@pytest.mark.parametrize("num_threads", THREADS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("window", "soft_cap"), [(0, 0.0), (1, 0.0), (13, 0.0), (0, 2.5), (20, 1.5), (1000, 0.0)])
def test_attention_equals_the_oracle(dtype: torch.dtype, window: int, soft_cap: float, num_threads: int) -> None:
    torch.set_num_threads(num_threads)
    cache = make_cache(SEQ_LENS, 16, 2, 16, dtype)
    metadata = make_metadata(cache, SPANS)
    q_NHD = make_queries(metadata.num_tokens, 6, 16, dtype)
    options: dict[str, Any] = {"scale": 0.25, "sliding_window": window, "soft_cap": soft_cap}
    out = cpu.ragged_attention(q_NHD, cache.k, cache.v, metadata, **options)
    expected = reference.ragged_attention(q_NHD, cache.k, cache.v, metadata, **options)
    assert out.dtype == dtype
    eps = max(torch.finfo(dtype).eps, 1e-5)
    torch.testing.assert_close(out, expected, rtol=2 * eps, atol=2 * eps)
    torch.testing.assert_close(expected.double(), dense(q_NHD, cache, SPANS, window, soft_cap), rtol=eps, atol=2 * eps)


SHAPES = [(1, 1, 16, 16), (3, 1, 32, 32), (7, 1, 80, 64), (8, 8, 48, 16), (16, 1, 64, 128), (10, 2, 128, 256)]
SHAPES += [(22, 2, 96, 32), (31, 1, 16, 64), (32, 1, 16, 16), (4, 2, 256, 128), (34, 2, 112, 16)]
"""(heads, kv heads, head dim, block size): groups of 1 to 32."""


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("window", [0, 300])
def test_attention_over_several_chunks_of_keys(shape: tuple[int, int, int, int], window: int) -> None:
    heads, kv_heads, dim, block_size = shape
    cache = make_cache((600, 257, 256, 3), block_size, kv_heads, dim, torch.float32)
    spans = [(3, 2, 3), (1, 256, 257), (0, 500, 600), (2, 250, 256)]
    metadata = make_metadata(cache, spans)
    q_NHD = make_queries(metadata.num_tokens, heads, dim, torch.float32)
    out = cpu.ragged_attention(q_NHD, cache.k, cache.v, metadata, scale=dim**-0.5, sliding_window=window)
    torch.testing.assert_close(out.double(), dense(q_NHD, cache, spans, window, 0.0), rtol=1e-5, atol=1e-5)


def test_attention_mixes_the_types_of_cache_and_activations() -> None:
    cache = make_cache(SEQ_LENS, 16, 2, 16, torch.bfloat16)
    metadata = make_metadata(cache, SPANS)
    q_NHD = make_queries(metadata.num_tokens, 4, 16, torch.float32)
    out = cpu.ragged_attention(q_NHD, cache.k, cache.v, metadata, scale=0.25)
    assert out.dtype == torch.float32
    torch.testing.assert_close(out.double(), dense(q_NHD, cache, SPANS, 0, 0.0), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("large", [1e4, -1e4])
def test_attention_of_large_scores(large: float) -> None:
    """The softmax is shifted by the row's maximum, so that nothing overflows; one key takes all."""
    cache = make_cache((40,), 16, 1, 16, torch.float32)
    metadata = make_metadata(cache, [(0, 39, 40)])
    q_NHD = large * make_queries(1, 1, 16, torch.float32)
    out = cpu.ragged_attention(q_NHD, cache.k, cache.v, metadata, scale=1.0)
    expected = reference.ragged_attention(q_NHD, cache.k, cache.v, metadata, scale=1.0)
    torch.testing.assert_close(out, expected)


@pytest.mark.parametrize("num_threads", THREADS)
@pytest.mark.parametrize("poison", [torch.nan, torch.inf])
@pytest.mark.parametrize("where", ["query", "one key", "all keys"])
def test_a_poisoned_sequence_is_alone_with_it(where: str, poison: float, num_threads: int) -> None:
    """All scores NaN once divided zero by zero, which in Python's model ends the kernel: the work items of the other
    sequences stayed undone, and their outputs were whatever lay in memory. One NaN score became the weight exp(88)."""
    torch.set_num_threads(num_threads)
    cache = make_cache(SEQ_LENS, 16, 2, 16, torch.float32)
    metadata = make_metadata(cache, SPANS[:4])
    q_NHD = make_queries(metadata.num_tokens, 6, 16, torch.float32)
    healthy = cpu.ragged_attention(q_NHD, cache.k, cache.v, metadata, scale=0.25)
    rows = slice(1, 8)  # sequence 1
    if where == "query":
        q_NHD[rows] = poison
    else:
        cache.k[cache.tables[1][0], 0 if where == "one key" else slice(0, 7)] = poison
    out = cpu.ragged_attention(q_NHD, cache.k, cache.v, metadata, scale=0.25)
    assert out[rows].isnan().all(dim=-1).any(dim=-1).all()
    others = torch.tensor([i for i in range(metadata.num_tokens) if not 1 <= i < 8])
    assert torch.equal(bits(out[others]), bits(healthy[others]))


def test_a_chunk_of_keys_that_is_all_nan_does_not_vanish() -> None:
    """The largest of scores that are all NaN is "none", as if no key were in the window; the chunk was left out, and
    the answer was finite and wrong."""
    torch.set_num_threads(1)
    length = cpu.KEY_CHUNK + 40
    cache = make_cache([length], 16, 1, 16, torch.float32)
    cache.k[cache.tables[0][: cpu.KEY_CHUNK // 16]] = torch.nan
    metadata = make_metadata(cache, [(0, length - 1, length)])
    out = cpu.ragged_attention(make_queries(1, 2, 16, torch.float32), cache.k, cache.v, metadata, scale=0.25)
    assert out.isnan().all()


# ---- bits do not depend on the company ------------------------------------------------------------------------------


@pytest.mark.parametrize("num_threads", THREADS)
@pytest.mark.parametrize(
    ("shape", "dtype", "window", "soft_cap"),
    [
        ((1, 1, 16, 16), torch.float32, 0, 0.0),
        ((3, 1, 32, 32), torch.bfloat16, 0, 0.0),
        ((5, 1, 80, 64), torch.float32, 100, 0.0),
        ((16, 1, 64, 128), torch.float16, 0, 0.0),
        ((14, 2, 112, 16), torch.float32, 0, 3.0),
        ((4, 4, 256, 64), torch.float32, 37, 0.0),
        ((12, 4, 48, 128), torch.bfloat16, 270, 0.0),
        ((18, 2, 128, 256), torch.float32, 0, 0.0),
    ],
    ids=str,
)
def test_attention_bits_are_the_same_alone_in_a_batch_and_in_chunks(
    shape: tuple[int, int, int, int], dtype: torch.dtype, window: int, soft_cap: float, num_threads: int
) -> None:
    torch.set_num_threads(num_threads)
    heads, kv_heads, dim, block_size = shape
    length = 530
    cache = make_cache((length, 70, 301), block_size, kv_heads, dim, dtype)
    q_NHD = make_queries(length, heads, dim, dtype)

    def attend(spans: list[tuple[int, int, int]]) -> torch.Tensor:
        rows = torch.cat([torch.arange(start, end) for _, start, end in spans])
        return cpu.ragged_attention(
            q_NHD[rows],
            cache.k,
            cache.v,
            make_metadata(cache, spans),
            scale=dim**-0.5,
            sliding_window=window,
            soft_cap=soft_cap,
        )

    whole = attend([(0, 0, length)])
    for size in (1, 7, 16, 100, 512):
        starts = range(0, length, size) if size > 1 else (0, 15, 16, 255, 256, 257, 400, length - 1)
        for start in starts:
            end = min(start + size, length)
            assert torch.equal(bits(attend([(0, start, end)])), bits(whole[start:end])), (size, start)
    company = attend([(1, 60, 70), (2, 300, 301), (0, 3, 300), (1, 0, 60), (0, 300, length), (2, 0, 300)])
    assert torch.equal(bits(company[11:308]), bits(whole[3:300]))
    assert torch.equal(bits(company[368 : 368 + length - 300]), bits(whole[300:]))


def test_attention_bits_do_not_depend_on_the_block_size_nor_on_where_blocks_lie() -> None:
    length = 300
    source = make_cache((length,), 16, 2, 32, torch.float32)
    q_NHD = make_queries(length, 4, 32, torch.float32)
    dense_k, dense_v = (x[source.tables[0]].flatten(0, 1)[:length] for x in (source.k, source.v))
    outs = []
    for block_size, seed in ((16, 1), (16, 2), (32, 0), (64, 0), (128, 0), (256, 0)):
        other = make_cache((length,), block_size, 2, 32, torch.float32, seed)
        for j in range(length):
            slot = other.tables[0][j // block_size], j % block_size
            other.k[slot], other.v[slot] = dense_k[j], dense_v[j]
        outs.append(cpu.ragged_attention(q_NHD, other.k, other.v, make_metadata(other, [(0, 0, length)]), scale=0.2))
    for out in outs[1:]:
        assert torch.equal(bits(out), bits(outs[0]))


def test_the_kernel_has_one_plan_for_all_layers() -> None:
    cache = make_cache(SEQ_LENS, 16, 2, 16, torch.float32)
    metadata = make_metadata(cache, SPANS)
    q_NHD = make_queries(metadata.num_tokens, 6, 16, torch.float32)
    first = cpu.ragged_attention(q_NHD, cache.k, cache.v, metadata, scale=0.25)
    fresh = dataclasses.replace(metadata, work_lists={})
    for again in (metadata, fresh):
        assert torch.equal(cpu.ragged_attention(q_NHD, cache.k, cache.v, again, scale=0.25), first)
    one_head = cpu.ragged_attention(q_NHD[:, :2].contiguous(), cache.k, cache.v, metadata, scale=0.25)  # another tile
    torch.testing.assert_close(one_head.double(), dense(q_NHD[:, :2], cache, SPANS, 0, 0.0), rtol=1e-5, atol=1e-5)


# ---- rows around attention ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_threads", THREADS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("qk_norm", [False, True], ids=["plain", "qk_norm"])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "dim", "block_size"), [(1, 1, 16, 16), (5, 1, 48, 32), (4, 2, 64, 16), (3, 3, 80, 64)]
)
def test_qk_norm_rope_write_equals_the_oracle(
    heads: int, kv_heads: int, dim: int, block_size: int, qk_norm: bool, dtype: torch.dtype, num_threads: int
) -> None:
    torch.set_num_threads(num_threads)
    generator = torch.Generator().manual_seed(0)
    num = 19  # two whole work items of 8 rows and a part of a third
    qkv = torch.randn(num, (heads + 2 * kv_heads) * dim, generator=generator).to(dtype)
    positions = torch.randint(0, 500, (num,), generator=generator).int()
    slots = torch.randperm(3 * block_size, generator=generator)[:num].int()
    slots[[0, 7, 18]] = -1
    norms = (torch.rand(2, dim, generator=generator) + 0.5).to(dtype)
    options: dict[str, Any] = {"q_norm": norms[0], "k_norm": norms[1], "eps": 1e-6} if qk_norm else {}
    table = rope_table(RopeConfig(), dim, 512)
    ours, theirs = (empty_cache(3, block_size, kv_heads, dim, dtype) for _ in range(2))
    q_ours = cpu.qk_norm_rope_write(qkv.clone(), table, positions, *ours, slots, **options)
    q_theirs = reference.qk_norm_rope_write(qkv, table, positions, *theirs, slots, **options)
    # The oracle rounds once, the kernel after the norm and after the rope.
    eps = max(torch.finfo(dtype).eps, 1e-6) * (8 if qk_norm else 4)
    assert q_ours.shape == (num, heads, dim)
    torch.testing.assert_close(q_ours, q_theirs, rtol=eps, atol=eps)
    for name, x, y in zip("kv", ours, theirs, strict=True):
        assert torch.equal(x.isnan(), y.isnan()), f"{name}: other slots were written"
        assert x.isnan().flatten(2).all(dim=2).sum() == 3 * block_size - (num - 3)
        torch.testing.assert_close(x, y, rtol=eps, atol=eps, equal_nan=True)
    assert torch.equal(ours[1].isnan(), theirs[1].isnan())
    written = slots >= 0
    v_rows = qkv[written][:, (heads + kv_heads) * dim :].unflatten(1, (kv_heads, dim))
    assert torch.equal(ours[1].flatten(0, 1)[slots[written].long()], v_rows)  # V goes in as it is


@pytest.mark.parametrize("cache_dtype", [torch.float32, torch.float16], ids=str)
def test_the_cache_may_be_of_another_type(cache_dtype: torch.dtype) -> None:
    qkv = torch.randn(5, 3 * 16, generator=torch.Generator().manual_seed(0)).bfloat16()
    k, v = empty_cache(1, 16, 1, 16, cache_dtype)
    slots, positions = torch.arange(5).int(), torch.arange(5).int()
    cpu.qk_norm_rope_write(qkv.clone(), rope_table(RopeConfig(), 16, 8), positions, k, v, slots)
    assert torch.equal(v[0, :5, 0], qkv[:, 32:].to(cache_dtype))


@pytest.mark.parametrize("num_threads", THREADS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 16), (7, 48), (8, 512), (23, 80)], ids=str)
def test_norms_equal_the_oracle(shape: tuple[int, int], dtype: torch.dtype, num_threads: int) -> None:
    torch.set_num_threads(num_threads)
    generator = torch.Generator().manual_seed(0)
    x, residual = (
        (3 * torch.randn(*shape, generator=generator)).to(dtype),
        torch.randn(*shape, generator=generator).to(dtype),
    )
    weight = torch.rand(shape[1], generator=generator).to(dtype)
    eps = max(torch.finfo(dtype).eps, 1e-6)
    torch.testing.assert_close(
        cpu.rms_norm(x, weight, 1e-5), reference.rms_norm(x, weight, 1e-5), rtol=2 * eps, atol=2 * eps
    )
    ours, theirs, before = residual.clone(), residual.clone(), x.clone()
    normed = cpu.add_rms_norm(x, ours, weight, 1e-5)
    expected = reference.add_rms_norm(x, theirs, weight, 1e-5)
    assert torch.equal(ours, theirs)
    assert torch.equal(x, before)
    torch.testing.assert_close(normed, expected, rtol=2 * eps, atol=2 * eps)


@pytest.mark.parametrize("num_threads", THREADS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 3), (9, 16), (17, 75), (8, 128)], ids=str)
def test_silu_mul_equals_the_oracle(shape: tuple[int, int], dtype: torch.dtype, num_threads: int) -> None:
    """Widths that are no multiple of 16 end in single elements."""
    torch.set_num_threads(num_threads)
    gate_up = 4 * torch.randn(shape[0], 2 * shape[1], generator=torch.Generator().manual_seed(0))
    gate_up[0, 0], gate_up[-1, shape[1] - 1] = 95.0, -95.0
    gate_up = gate_up.to(dtype)
    eps = max(torch.finfo(dtype).eps, 1e-6)
    out = cpu.silu_mul(gate_up)
    assert out.shape == shape
    torch.testing.assert_close(out, reference.silu_mul(gate_up), rtol=2 * eps, atol=2 * eps)


@pytest.mark.parametrize("num_threads", THREADS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_small_ops_give_a_row_the_same_bits_in_any_company(dtype: torch.dtype, num_threads: int) -> None:
    torch.set_num_threads(num_threads)
    generator = torch.Generator().manual_seed(0)
    x, residual = torch.randn(2, 37, 96, generator=generator).to(dtype)
    weight = torch.rand(96, generator=generator).to(dtype)
    table = rope_table(RopeConfig(), 16, 64)
    positions = torch.arange(37).int()
    norms = {"q_norm": weight[:16], "k_norm": weight[16:32], "eps": 1e-6}

    def rows(index: torch.Tensor) -> list[torch.Tensor]:
        k, v = empty_cache(3, 16, 2, 16, dtype)
        added = residual[index].clone()
        normed = cpu.add_rms_norm(x[index], added, weight, 1e-6)
        q_NHD = cpu.qk_norm_rope_write(x[index].clone(), table, positions[index], k, v, positions[index], **norms)
        stored = [side.flatten(0, 1)[index] for side in (k, v)]
        return [
            cpu.rms_norm(x[index], weight, 1e-6),
            normed,
            added,
            q_NHD,
            *stored,
            cpu.silu_mul(x[index, :94].contiguous()),
        ]

    whole = rows(torch.arange(37))
    for index in (torch.tensor([5]), torch.arange(30, 37), torch.arange(37).flip(0)[:20].contiguous()):
        for ours, all_rows in zip(rows(index), whole, strict=True):
            assert torch.equal(bits(ours), bits(all_rows[index]))


def test_two_threads_are_two() -> None:
    """What the tests above mean by two threads, on a machine that has them."""
    assert openmp.HAS_THREADS
    torch.set_num_threads(2)
    assert torch.get_num_threads() == 2
