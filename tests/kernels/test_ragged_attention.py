"""The Triton attention kernels in the interpreter: against the oracle in float64, and bit for bit in any company.

Slots that hold no key are NaN, and so are the blocks that nobody owns: reading one would show. On a machine with a GPU the
same tests run there (bfloat16 has its tests under the marker gpu: the interpreter computes it wrongly).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("triton", reason="Triton comes with the CUDA builds of torch only")

from serve_app.kernels import ragged_attention as triton_attention, reference
from serve_app.kernels.metadata import AttentionMetadata, Work
from serve_app.kernels.work_list import Capacity, plan_work
from tests.kernels.test_cpu import Cache, dense, make_metadata, make_queries
from tests.tiny_runs import bits

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
Span = tuple[int, int, int]


def make_cache(
    seq_lens: Sequence[int],
    block_size: int,
    kv_heads: int,
    dim: int,
    dtype: torch.dtype,
    *,
    place: int = 0,
    heads_first: bool = True,
) -> Cache:
    """As a GPU holds it: [num_blocks, K, block_size, D], seen as [num_blocks, block_size, K, D]. ``place`` decides where
    blocks lie, not what is in them; ``heads_first`` False: [num_blocks, block_size, K, D] in memory too."""
    sizes = [-(-length // block_size) for length in seq_lens]
    free = np.random.default_rng(place).permutation(sum(sizes) + 3).tolist()
    tables = [[free.pop() for _ in range(size)] for size in sizes]
    caches = []
    for seed in (1, 2):
        shape = (sum(sizes) + 3, kv_heads, block_size, dim)
        if heads_first:
            cache = torch.full(shape, torch.nan, dtype=dtype).transpose(1, 2)
        else:
            cache = torch.full((shape[0], block_size, kv_heads, dim), torch.nan, dtype=dtype)
        for b, (table, length) in enumerate(zip(tables, seq_lens, strict=True)):
            generator = torch.Generator().manual_seed(100 * b + seed)
            content = torch.randn(length, kv_heads, dim, generator=generator).to(dtype)
            for start in range(0, length, block_size):
                rows = content[start : start + block_size]
                cache[table[start // block_size], : len(rows)] = rows
        assert cache.isnan().any()
        caches.append(cache)
    return Cache(*caches, tables)


def run(
    q_NHD: torch.Tensor,
    cache: Cache,
    metadata: AttentionMetadata,
    *,
    work: Work | None = None,
    window: int = 0,
    soft_cap: float = 0.0,
) -> torch.Tensor:
    if DEVICE != "cpu":
        tensors = {f.name: getattr(metadata, f.name) for f in dataclasses.fields(metadata)}
        moved = {name: x.to(DEVICE) for name, x in tensors.items() if isinstance(x, torch.Tensor)}
        metadata = dataclasses.replace(metadata, **moved)
    out = triton_attention.ragged_attention(
        q_NHD.to(DEVICE),
        cache.k.to(DEVICE),
        cache.v.to(DEVICE),
        dataclasses.replace(metadata, work=work),
        scale=q_NHD.shape[2] ** -0.5,
        sliding_window=window,
        soft_cap=soft_cap,
    )
    assert out.dtype == q_NHD.dtype
    return out.cpu()


def plan(
    metadata: AttentionMetadata, num_prompt_tokens: Sequence[int], rows_per_tile: int, capacity: Capacity | None = None
) -> Work:
    """Deterministic mode: the class by the position."""
    arrays = plan_work(
        metadata.cu_seqlens_q.numpy(),
        metadata.seq_lens.numpy(),
        np.array(num_prompt_tokens),
        rows_per_tile=rows_per_tile,
        capacity=capacity,
    )
    return Work(*(torch.from_numpy(array).to(DEVICE) for array in arrays))


def tile_rows(q_NHD: torch.Tensor, cache: Cache) -> int:
    group = q_NHD.shape[1] // cache.k.shape[2]
    return triton_attention.rows_per_tile(q_NHD.shape[2], group, q_NHD.dtype, (9, 0))


def attend(
    cache: Cache, spans: Sequence[Span], heads: int, num_prompt_tokens: Sequence[int], **options: Any
) -> torch.Tensor:
    """Deterministic mode. The query of a position is the same in every call; ``num_prompt_tokens``: by sequence."""
    dim = cache.k.shape[3]
    longest = max(len(table) for table in cache.tables) * cache.block_size
    q_LHD = make_queries(longest, heads, dim, cache.k.dtype)
    q_NHD = torch.cat([q_LHD[start:end] for _, start, end in spans])
    metadata = make_metadata(cache, spans)
    prompts = [num_prompt_tokens[b] for b, *_ in spans]
    return run(q_NHD, cache, metadata, work=plan(metadata, prompts, tile_rows(q_NHD, cache)), **options)


SEQ_LENS = (5, 8, 67, 1, 257, 65)
SPANS = [(0, 4, 5), (1, 0, 7), (2, 60, 67), (3, 0, 1), (4, 256, 257), (1, 7, 8), (5, 63, 65)]
"""Decodes of 5, 1, 257 (two splits) and 8 keys; a prompt from its start, and chunks that cross the edge of a tile."""

OPTIONS = [(0, 0.0), (1, 0.0), (64, 0.0), (1000, 0.0), (0, 2.5), (13, 1.5)]


@pytest.mark.parametrize(("window", "soft_cap"), OPTIONS, ids=str)
def test_equals_the_oracle(window: int, soft_cap: float) -> None:
    cache = make_cache(SEQ_LENS, 16, 2, 32, torch.float32)
    metadata = make_metadata(cache, SPANS)
    q_NHD = make_queries(metadata.num_tokens, 4, 32, torch.float32)
    out = run(q_NHD, cache, metadata, window=window, soft_cap=soft_cap)
    wide = dense(q_NHD, cache, SPANS, window, soft_cap)
    torch.testing.assert_close(out.double(), wide, rtol=2e-6, atol=2e-6)
    if window:  # the oracle's loops are slow; `dense` agrees with it
        return
    oracle = reference.ragged_attention(
        q_NHD.double(),
        cache.k.double(),
        cache.v.double(),
        metadata,
        scale=32**-0.5,
        sliding_window=window,
        soft_cap=soft_cap,
    )
    torch.testing.assert_close(oracle, wide, rtol=1e-12, atol=1e-12)


SHAPES = [
    (1, 1, 64, 32, torch.float32),
    (4, 2, 64, 16, torch.float16),
    (3, 1, 96, 64, torch.float32),
    (4, 1, 96, 128, torch.float16),
    (7, 1, 64, 16, torch.float32),
    (16, 1, 16, 16, torch.float32),
    (10, 2, 80, 8, torch.float32),
    (2, 1, 128, 64, torch.float16),
    (2, 2, 256, 32, torch.float32),
]
"""(heads, kv heads, head dim, block size, type): groups of 1, 2, 3, 4, 5, 7 and 16."""


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "-".join(map(str, shape)))
@pytest.mark.parametrize("window", [0, 50])
def test_equals_the_oracle_for_every_shape(shape: tuple[int, int, int, int, torch.dtype], window: int) -> None:
    heads, kv_heads, dim, block_size, dtype = shape
    cache = make_cache((67, 300, 129), block_size, kv_heads, dim, dtype)
    spans = [(0, 66, 67), (1, 299, 300), (2, 100, 129)]
    metadata = make_metadata(cache, spans)
    q_NHD = make_queries(metadata.num_tokens, heads, dim, dtype)
    out = run(q_NHD, cache, metadata, window=window)
    tolerance = 3e-6 if dtype == torch.float32 else 2e-3
    expected = dense(q_NHD, cache, spans, window, 0.0)
    torch.testing.assert_close(out.double(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("length", [63, 64, 65, 255, 256, 512, 513, 4096, 4097])
def test_decodes_around_the_edges_of_tiles_and_splits(length: int) -> None:
    cache = make_cache((length,), 64, 1, 16, torch.float32)
    spans = [(0, length - 1, length)]
    q_NHD = make_queries(1, 2, 16, torch.float32)
    metadata = make_metadata(cache, spans)
    for window in (0, 300) if length == 4097 else (0,):
        out = run(q_NHD, cache, metadata, window=window)
        torch.testing.assert_close(out.double(), dense(q_NHD, cache, spans, window, 0.0), rtol=2e-6, atol=2e-6)


def test_a_chunk_of_several_tiles_that_ends_inside_one() -> None:
    """16 queries a token: 4 tokens a tile, so 11 tokens are two tiles and a part."""
    cache = make_cache((150,), 16, 1, 16, torch.float32)
    spans = [(0, 126, 137)]
    q_NHD = make_queries(11, 16, 16, torch.float32)
    assert tile_rows(q_NHD, cache) == 4
    out = run(q_NHD, cache, make_metadata(cache, spans))
    torch.testing.assert_close(out.double(), dense(q_NHD, cache, spans, 0, 0.0), rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("large", [1e4, -1e4])
def test_large_scores_do_not_overflow(large: float) -> None:
    cache = make_cache((300, 40), 16, 1, 16, torch.float32)
    spans = [(0, 299, 300), (1, 30, 40)]
    q_NHD = large * make_queries(11, 2, 16, torch.float32)
    out = run(q_NHD, cache, make_metadata(cache, spans))
    torch.testing.assert_close(out.double(), dense(q_NHD, cache, spans, 0, 0.0), rtol=1e-2, atol=1e-2)
    assert out.isfinite().all()


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # numpy, of the NaN planted here
def test_a_poisoned_sequence_is_alone_with_it() -> None:
    cache = make_cache(SEQ_LENS, 16, 1, 16, torch.float32)
    metadata = make_metadata(cache, SPANS)
    q_NHD = make_queries(metadata.num_tokens, 3, 16, torch.float32)
    healthy = run(q_NHD, cache, metadata)
    assert healthy.isfinite().all()
    for sequence, row in ((1, slice(1, 8)), (4, slice(16, 17))):  # a tile, and a decode of two splits
        poisoned = Cache(cache.k.clone(), cache.v, cache.tables)
        poisoned.k[cache.tables[sequence][0], 0] = torch.nan
        out = run(q_NHD, poisoned, metadata)
        assert out[row].isnan().all()
        others = torch.ones(metadata.num_tokens, dtype=torch.bool)
        others[row] = False
        others[17] &= sequence != 1  # the last token of sequence 1
        assert torch.equal(bits(out[others]), bits(healthy[others]))


def test_pages_further_than_2_to_the_31_elements_apart() -> None:
    """Offsets in 32 bits would wrap. The pages between are zeros that the system never hands out."""
    page, dim = 16, 16
    stride = (1 << 30) + 512
    storage = torch.from_numpy(np.zeros(2 * stride + 4 * page * dim, dtype=np.float16))
    k, v = (
        storage.as_strided((3, page, 1, dim), (stride, dim, page * dim, 1), offset) for offset in (0, 2 * page * dim)
    )
    small = make_cache((20,), page, 1, dim, torch.float16)
    for large, source in ((k, small.k), (v, small.v)):
        large[2], large[0] = source[small.tables[0][0]], source[small.tables[0][1]]
    cache = Cache(k, v, [[2, 0]])
    spans = [(0, 19, 20), (0, 10, 20)]
    q_NHD = make_queries(11, 2, dim, torch.float16)
    if DEVICE != "cpu":
        pytest.skip("8 GB would be copied to the device")
    out = run(q_NHD, cache, make_metadata(cache, spans))
    torch.testing.assert_close(out.double(), dense(q_NHD, cache, spans, 0, 0.0), rtol=2e-3, atol=2e-3)


# ---- bits do not depend on the company ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("heads", "dim", "dtype", "window", "soft_cap"),
    [
        (3, 64, torch.float32, 0, 0.0),
        (16, 16, torch.float16, 0, 0.0),
        (2, 128, torch.float16, 0, 0.0),  # this and the next begin each product a turn early
        (4, 112, torch.float16, 70, 0.0),
        (7, 48, torch.float16, 90, 3.0),
    ],
    ids=str,
)
def test_a_prompt_has_the_same_bits_in_chunks_and_in_company(
    heads: int, dim: int, dtype: torch.dtype, window: int, soft_cap: float
) -> None:
    cache = make_cache((150, 70, 31), 16, 1, dim, dtype)
    prompts = (150, 60, 10)
    options = {"window": window, "soft_cap": soft_cap}
    whole = attend(cache, [(0, 0, 150)], heads, prompts, **options)
    for start, end in ((0, 66), (66, 150), (63, 65), (149, 150)):
        chunk = attend(cache, [(0, start, end)], heads, prompts, **options)
        assert torch.equal(bits(chunk), bits(whole[start:end])), (start, end)
    company = attend(cache, [(1, 55, 70), (0, 37, 141), (2, 30, 31)], heads, prompts, **options)
    assert torch.equal(bits(company[15:119]), bits(whole[37:141]))


@pytest.mark.parametrize("window", [0, 300])
def test_replayed_tokens_have_the_bits_of_decodes_one_by_one(window: int) -> None:
    """Also around 256 keys, where a decode gets its second split."""
    cache = make_cache((260, 40), 16, 1, 32, torch.float16)
    prompts = (252, 40)
    replayed = attend(cache, [(1, 3, 40), (0, 250, 260)], 4, prompts, window=window)[37:]
    for i, position in enumerate(range(250, 260)):
        alone = attend(cache, [(0, position, position + 1)], 4, prompts, window=window)
        assert torch.equal(bits(alone[0]), bits(replayed[i])), position
    # The two classes are two orders of summation: were these equal too, the classes would be for nothing.
    as_prompt = attend(cache, [(0, 252, 260)], 4, (260, 40), window=window)
    assert not torch.equal(bits(as_prompt), bits(replayed[2:]))


def test_bits_do_not_depend_on_where_blocks_lie_nor_on_their_size_nor_on_strides() -> None:
    spans = [(0, 299, 300), (1, 60, 90)]
    outs = []
    for block_size, place, heads_first in ((16, 0, True), (16, 1, True), (64, 2, False)):
        cache = make_cache((300, 90), block_size, 2, 32, torch.float16, place=place, heads_first=heads_first)
        outs.append(attend(cache, spans, 4, (200, 80)))
    for out in outs[1:]:
        assert torch.equal(bits(out), bits(outs[0]))


class Case:
    """A step with both classes and several splits, and its work."""

    spans: Sequence[Span] = [(0, 20, 60), (1, 599, 600), (2, 299, 301), (3, 63, 65)]
    prompts = (60, 5, 10, 65)

    def __init__(self) -> None:
        self.cache = make_cache((60, 600, 301, 65), 16, 1, 16, torch.float16)
        self.metadata = make_metadata(self.cache, self.spans)
        self.q_NHD = make_queries(self.metadata.num_tokens, 5, 16, torch.float16)

    def plan(self, capacity: Capacity | None = None) -> Work:
        return plan(self.metadata, self.prompts, tile_rows(self.q_NHD, self.cache), capacity)

    def run(self, work: Work) -> torch.Tensor:
        return run(self.q_NHD, self.cache, self.metadata, work=work)


def test_bits_do_not_depend_on_the_order_of_the_work_nor_on_unused_entries(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case()
    work = case.plan()
    assert work.counts.tolist() == [3, 7, 3, 0]
    expected = case.run(work)
    torch.testing.assert_close(
        expected.double(), dense(case.q_NHD, case.cache, case.spans, 0, 0.0), rtol=2e-3, atol=2e-3
    )

    first, num = work.decodes[:, 2].tolist(), work.decodes[:, 3].tolist()
    splits = torch.cat([work.splits[first[i] : first[i] + num[i]] for i in (2, 0, 1)])
    decodes = work.decodes[[2, 0, 1]].clone()
    decodes[:, 2] = decodes[:, 3].cumsum(0) - decodes[:, 3]
    reordered = dataclasses.replace(work, tiles=work.tiles.flip(0).contiguous(), splits=splits, decodes=decodes)
    assert torch.equal(bits(case.run(reordered)), bits(expected))

    padded = case.plan(Capacity(6, 6, 11))
    assert torch.equal(bits(case.run(padded)), bits(expected))

    # The work of an earlier, larger step still stands in the buffers of a graph behind the live entries.
    stale = dataclasses.replace(padded, splits=padded.splits.clone(), decodes=padded.decodes.clone())
    stale.splits[7:], stale.decodes[3:] = stale.splits[0], stale.decodes[0]
    assert torch.equal(bits(case.run(stale)), bits(expected))

    # Few programs take the splits in turn.
    monkeypatch.setattr(triton_attention, "PROGRAMS_PER_PROCESSOR", 1)
    monkeypatch.setattr(triton_attention, "_device", lambda device: ((9, 0), 2))
    assert torch.equal(bits(case.run(padded)), bits(expected))


def test_a_workspace_of_the_promised_size_is_enough() -> None:
    case = Case()
    work = case.plan(Capacity(4, 3, 8))
    size = triton_attention.workspace_size(8, 5, 16)
    memory = torch.full((size + 64,), torch.nan, device=DEVICE)
    out = case.run(dataclasses.replace(work, workspace=memory[:size]))
    assert out.isfinite().all()
    assert memory[size:].isnan().all()
    assert memory[: 7 * 5 * 16].view(7, 5 * 16).isfinite().all(dim=1).sum() == 7  # the splits that are merged
    with pytest.raises(AssertionError, match="workspace"):
        case.run(dataclasses.replace(work, workspace=memory[: size - 1]))


@pytest.mark.parametrize(
    ("heads", "kv_heads", "dim", "page", "sentence"),
    [
        (17, 1, 16, 16, "a group of 17 queries"),
        (2, 1, 40, 16, "head dim 40"),
        (1, 1, 272, 16, "head dim 272"),
        (1, 1, 16, 48, "block_size 48"),
    ],
)
def test_what_has_no_tile_is_named(heads: int, kv_heads: int, dim: int, page: int, sentence: str) -> None:
    cache = make_cache((5,), page, kv_heads, dim, torch.float32)
    with pytest.raises(AssertionError, match=sentence):
        run(make_queries(1, heads, dim, torch.float32), cache, make_metadata(cache, [(0, 4, 5)]))


@pytest.mark.gpu
@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("window", [0, 50])
def test_bfloat16_on_a_gpu(dim: int, window: int) -> None:
    cache = make_cache((67, 5000, 700), 64, 2, dim, torch.bfloat16)
    spans = [(0, 66, 67), (1, 4999, 5000), (2, 100, 700)]
    metadata = make_metadata(cache, spans)
    q_NHD = make_queries(metadata.num_tokens, 8, dim, torch.bfloat16)
    out = run(q_NHD, cache, metadata, window=window)
    torch.testing.assert_close(out.double(), dense(q_NHD, cache, spans, window, 0.0), rtol=2e-2, atol=2e-2)
