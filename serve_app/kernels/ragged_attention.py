"""Ragged paged attention on a GPU, in Triton. Knows tiles, pages and splits; knows no model and no batch policy.

docs/ragged_attention.md draws how it works; kernels/work_list.py says which program computes what. Three kernels:

    _prompt_kernel   one program: one tile of rows x one kv head. Rows are tokens x the G queries of that head
    _decode_kernel   one program: one split of one row's keys x one kv head; G rows, padded to 16
    _merge_kernel    one program: one decode x one query head; adds its splits up in their order

Both attention kernels walk over the keys in tiles of BLOCK_N, anchored at position 0, with the online softmax (Milakov
and Gimelshein, arXiv 1805.02867; FlashAttention-2, arXiv 2307.08691). A row's keys are summed in an order that follows
from its class, its position and the window alone, so its bits do not depend on the company, the chunk or where blocks lie.
Split keys and their merge: Flash-Decoding. Packing the queries of a group into the rows of a tile: FlashAttention-3's
PackGQA.

Inside kernels: i_ program index or loop counter, o_ offsets, m_ mask, p_ pointer, b_ loaded block, above each its shape.
Suffixes: N rows of the step, H query heads, K kv heads, D head dim, G = H / K, P splits.
"""

# mypy: allow-incomplete-defs
# (a kernel annotates its compile-time constants alone)

from __future__ import annotations

import functools
from typing import NamedTuple

import numpy as np
import torch
import triton
import triton.language as tl

from serve_app.kernels.metadata import AttentionMetadata, Work
from serve_app.kernels.work_list import MAX_SPLITS, plan_work

LOG2E = 1.4426950408889634
_MAX_SPLITS = tl.constexpr(MAX_SPLITS)


class Config(NamedTuple):
    """The shape of a kernel. Never chosen by timing: the same machine always computes the same bits."""

    block_m: int
    """Rows of a tile: tokens x G."""
    block_n: int
    """Keys of a tile."""
    num_warps: int
    num_stages: int
    """What Triton's pipeliner is told."""
    ahead: bool = False
    """Whether the scores of the next tile are begun before the softmax of this one: where products run beside it."""


@triton.jit
def _page_ids(p_table, i_tile, num_pages, PAGE: tl.constexpr, BLOCK_N: tl.constexpr):
    """The pages under tile ``i_tile``: one id, or [BLOCK_N / PAGE]. Past the last page: the last one, read but masked."""
    if PAGE >= BLOCK_N:
        return tl.load(p_table + tl.minimum(i_tile // (PAGE // BLOCK_N), num_pages - 1))
    else:
        # [BLOCK_N / PAGE]
        o_page = i_tile * (BLOCK_N // PAGE) + tl.arange(0, BLOCK_N // PAGE)
        return tl.load(p_table + tl.minimum(o_page, num_pages - 1))


@triton.jit
def _slot_offsets(page_ids, i_tile, stride_page, stride_slot, PAGE: tl.constexpr, BLOCK_N: tl.constexpr):
    """[BLOCK_N] int64: where the keys of the tile lie in the cache, in elements. A cache may exceed 2^31 of them."""
    if PAGE >= BLOCK_N:
        o_slot = (i_tile % (PAGE // BLOCK_N)) * BLOCK_N + tl.arange(0, BLOCK_N)
        return page_ids.to(tl.int64) * stride_page + o_slot * stride_slot
    else:
        o_page = page_ids.to(tl.int64) * stride_page
        o_slot = tl.arange(0, PAGE) * stride_slot
        # Said again, since Triton 3.6 forgets it in a reshape and would load two bytes at a time.
        return tl.multiple_of(tl.reshape(o_page[:, None] + o_slot[None, :], (BLOCK_N,)), 16)


@triton.jit
def _raw_scores(
    b_q, p_k, o_slot, i_tile, end_tile, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, CHECKED: tl.constexpr
):
    """[BLOCK_M, BLOCK_N]: q times the keys at ``o_slot``. CHECKED: from end_tile on nothing is read, and it is 0."""
    # [BLOCK_D, BLOCK_N]
    o_d = tl.arange(0, BLOCK_D)
    p_key = p_k + o_slot[None, :] + o_d[:, None]
    if CHECKED:  # compared as vectors: the interpreter makes an integer of a scalar truth that is broadcast
        m_d = (o_d < HEAD_DIM) & (tl.full((BLOCK_D,), i_tile, tl.int32) < end_tile)
        b_k = tl.load(p_key, mask=m_d[:, None], other=0.0)
    elif BLOCK_D == HEAD_DIM:
        b_k = tl.load(p_key)
    else:
        b_k = tl.load(p_key, mask=(o_d < HEAD_DIM)[:, None], other=0.0)
    return tl.dot(b_q, b_k, input_precision="tf32x3")


@triton.jit
def _walk(
    b_acc,
    b_max,
    b_sum,
    b_next,
    o_slot,
    page_ids,
    b_q,
    o_position,
    p_k,
    p_v,
    p_table,
    first_tile,
    last_tile,
    end_tile,
    length,
    window,
    stride_page,
    stride_slot,
    score_factor,
    cap_factor,
    MASKED: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_CAP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PAGE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    AHEAD: tl.constexpr,
):
    """Tiles [first_tile, last_tile) of keys, of a walk up to end_tile, into the online softmax (b_acc, b_max, b_sum).

    The ids of pages are asked for a turn before they are used (page_ids on entry), so that no load of keys waits for them.
    AHEAD: so are the scores. On entry b_next are the raw scores of first_tile, o_slot its slots, and page_ids the pages of
    the tile behind it; each turn begins the next product before the softmax of this tile, so that the tensor cores have
    work meanwhile (the overlap of FlashAttention-3, arXiv 2407.08608). The first six arguments are returned.

    Not MASKED: every row sees every key of these tiles. Apart from the masks both forms are the same arithmetic in the
    same order, down to what a compiler may fuse: masks are put on the raw scores, before the factor. So a row's bits do
    not tell in which of them a tile was walked, which depends on the other rows of the tile.
    """
    # [BLOCK_D]
    o_d = tl.arange(0, BLOCK_D)
    m_d = o_d < HEAD_DIM
    num_pages = tl.cdiv(length, PAGE)
    for i_tile in tl.range(first_tile, last_tile):
        # b_score [BLOCK_M, BLOCK_N], o_value [BLOCK_N]
        if AHEAD:
            b_score = b_next
            o_value = o_slot
            o_slot = _slot_offsets(page_ids, i_tile + 1, stride_page, stride_slot, PAGE, BLOCK_N)
            page_ids = _page_ids(p_table, i_tile + 2, num_pages, PAGE, BLOCK_N)
            b_next = _raw_scores(b_q, p_k, o_slot, i_tile + 1, end_tile, HEAD_DIM, BLOCK_D, True)
        else:
            o_value = _slot_offsets(page_ids, i_tile, stride_page, stride_slot, PAGE, BLOCK_N)
            page_ids = _page_ids(p_table, i_tile + 1, num_pages, PAGE, BLOCK_N)
            b_score = _raw_scores(b_q, p_k, o_value, i_tile, end_tile, HEAD_DIM, BLOCK_D, False)
        # [BLOCK_N]
        o_key = i_tile * BLOCK_N + tl.arange(0, BLOCK_N)
        if HAS_CAP:  # tanh(x) = 2 / (1 + exp(-2x)) - 1
            b_score = 2.0 / (1.0 + tl.exp2(b_score * cap_factor)) - 1.0
        if MASKED:
            m_score = o_key[None, :] <= o_position[:, None]
            if HAS_WINDOW:
                m_score = m_score & (o_key[None, :] > o_position[:, None] - window)
            b_score = tl.where(m_score, b_score, float("-inf"))
        # [BLOCK_M]
        b_new_max = tl.maximum(b_max, tl.max(b_score, 1) * score_factor)
        if HAS_WINDOW:  # a row may see none of the keys so far
            b_shift = tl.where(b_new_max == float("-inf"), 0.0, b_new_max)
        else:
            b_shift = b_new_max
        b_decay = tl.exp2(b_max - b_shift)
        # [BLOCK_M, BLOCK_N]
        b_p = tl.exp2(b_score * score_factor - b_shift[:, None])
        b_sum = b_sum * b_decay + tl.sum(b_p, 1)
        b_max = b_new_max
        # [BLOCK_N, BLOCK_D]; slots behind the last key may hold anything, and 0 x NaN is NaN
        if MASKED:
            m_v = (o_key < length)[:, None]
            if BLOCK_D != HEAD_DIM:
                m_v = m_v & m_d[None, :]
            b_v = tl.load(p_v + o_value[:, None] + o_d[None, :], mask=m_v, other=0.0)
        elif BLOCK_D == HEAD_DIM:
            b_v = tl.load(p_v + o_value[:, None] + o_d[None, :])
        else:
            b_v = tl.load(p_v + o_value[:, None] + o_d[None, :], mask=m_d[None, :], other=0.0)
        # [BLOCK_M, BLOCK_D]
        b_acc = tl.dot(b_p.to(b_v.dtype), b_v, b_acc * b_decay[:, None], input_precision="tf32x3")
    return b_acc, b_max, b_sum, b_next, o_slot, page_ids


@triton.jit
def _attend(
    b_q,
    o_position,
    p_k,
    p_v,
    p_table,
    first_position,
    first_key,
    end_key,
    length,
    window,
    stride_page,
    stride_slot,
    score_factor,
    cap_factor,
    HAS_WINDOW: tl.constexpr,
    HAS_CAP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PAGE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    AHEAD: tl.constexpr,
):
    """Keys [first_key, end_key) for rows that stand at o_position, the first at first_position, the last at length - 1.

        tiles  |  window's edge  |    all rows see all    |   diagonal, end  |
               first           inner                    outer               end

    Returns acc [BLOCK_M, BLOCK_D], and maximum (times log2 e) and sum [BLOCK_M].
    """
    b_acc = tl.zeros((BLOCK_M, BLOCK_D), dtype=tl.float32)
    b_max = tl.full((BLOCK_M,), float("-inf"), dtype=tl.float32)
    b_sum = tl.zeros((BLOCK_M,), dtype=tl.float32)
    first_tile = first_key // BLOCK_N
    end_tile = tl.cdiv(end_key, BLOCK_N)
    outer_tile = tl.minimum(first_position + 1, end_key) // BLOCK_N
    inner_tile = first_tile
    num_pages = tl.cdiv(length, PAGE)
    page_ids = _page_ids(p_table, first_tile, num_pages, PAGE, BLOCK_N)
    if AHEAD:
        o_slot = _slot_offsets(page_ids, first_tile, stride_page, stride_slot, PAGE, BLOCK_N)
        page_ids = _page_ids(p_table, first_tile + 1, num_pages, PAGE, BLOCK_N)
        b_next = _raw_scores(b_q, p_k, o_slot, first_tile, end_tile, HEAD_DIM, BLOCK_D, True)
    else:  # not used
        o_slot = 0
        b_next = 0.0
    if HAS_WINDOW:
        outer_tile = tl.maximum(outer_tile, first_tile)
        inner_tile = tl.maximum(tl.cdiv(tl.maximum(length - window, 0), BLOCK_N), first_tile)
        inner_tile = tl.minimum(inner_tile, outer_tile)
        b_acc, b_max, b_sum, b_next, o_slot, page_ids = _walk(
            b_acc, b_max, b_sum, b_next, o_slot, page_ids, b_q, o_position, p_k, p_v, p_table,
            first_tile, inner_tile, end_tile, length, window, stride_page, stride_slot, score_factor, cap_factor,
            True, HAS_WINDOW, HAS_CAP, HEAD_DIM, BLOCK_D, PAGE, BLOCK_N, AHEAD,
        )  # fmt: skip
    b_acc, b_max, b_sum, b_next, o_slot, page_ids = _walk(
        b_acc, b_max, b_sum, b_next, o_slot, page_ids, b_q, o_position, p_k, p_v, p_table,
        inner_tile, outer_tile, end_tile, length, window, stride_page, stride_slot, score_factor, cap_factor,
        False, HAS_WINDOW, HAS_CAP, HEAD_DIM, BLOCK_D, PAGE, BLOCK_N, AHEAD,
    )  # fmt: skip
    b_acc, b_max, b_sum, _, _, _ = _walk(
        b_acc, b_max, b_sum, b_next, o_slot, page_ids, b_q, o_position, p_k, p_v, p_table,
        outer_tile, end_tile, end_tile, length, window, stride_page, stride_slot, score_factor, cap_factor,
        True, HAS_WINDOW, HAS_CAP, HEAD_DIM, BLOCK_D, PAGE, BLOCK_N, AHEAD,
    )  # fmt: skip
    return b_acc, b_max, b_sum


@triton.jit(do_not_specialize=["stride_table", "window"])
def _prompt_kernel(
    p_q,
    p_k,
    p_v,
    p_out,
    p_tables,
    p_tiles,
    score_factor,
    cap_factor,
    window,
    stride_table,
    stride_page,
    stride_slot,
    stride_head,
    HAS_WINDOW: tl.constexpr,
    HAS_CAP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    NUM_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    PAGE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    AHEAD: tl.constexpr,
):
    """Grid (K, T): the heads of a tile side by side, the longest tiles first."""
    i_head = tl.program_id(0)
    p_tile = p_tiles + tl.program_id(1) * 4
    sequence = tl.load(p_tile)
    first_row = tl.load(p_tile + 1)
    num_rows = tl.load(p_tile + 2)
    length = tl.load(p_tile + 3)
    if sequence < 0:
        return
    # [BLOCK_M]
    o_m = tl.arange(0, BLOCK_M)
    o_row = o_m // GROUP
    m_row = o_row < num_rows
    first_position = length - num_rows
    # Rows that pad the tile stand where the last one does, so that they see something.
    o_position = first_position + tl.minimum(o_row, num_rows - 1)
    # [BLOCK_M, BLOCK_D]
    o_d = tl.arange(0, BLOCK_D)
    o_q = (first_row + o_row).to(tl.int64) * (NUM_HEADS * HEAD_DIM) + (i_head * GROUP + o_m % GROUP) * HEAD_DIM
    m_q = m_row[:, None] & (o_d < HEAD_DIM)[None, :]
    b_q = tl.load(p_q + o_q[:, None] + o_d[None, :], mask=m_q, other=0.0)
    first_key = 0
    if HAS_WINDOW:
        first_key = tl.maximum(first_position - window + 1, 0)
    b_acc, _, b_sum = _attend(
        b_q, o_position, p_k + i_head * stride_head, p_v + i_head * stride_head,
        p_tables + sequence.to(tl.int64) * stride_table, first_position, first_key, length, length, window,
        stride_page, stride_slot, score_factor, cap_factor,
        HAS_WINDOW, HAS_CAP, HEAD_DIM, BLOCK_M, BLOCK_D, PAGE, BLOCK_N, AHEAD,
    )  # fmt: skip
    b_out = b_acc / b_sum[:, None]
    tl.store(p_out + o_q[:, None] + o_d[None, :], b_out.to(p_out.dtype.element_ty), mask=m_q)


@triton.jit(do_not_specialize=["stride_table", "window"])
def _decode_kernel(
    p_q,
    p_k,
    p_v,
    p_out,
    p_tables,
    p_splits,
    p_counts,
    p_partial,
    p_partial_sums,
    score_factor,
    cap_factor,
    window,
    stride_table,
    stride_page,
    stride_slot,
    stride_head,
    HAS_WINDOW: tl.constexpr,
    HAS_CAP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    NUM_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    PAGE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Grid (K, any number of programs): they take the live splits in turn. Nothing is written for entries past those."""
    i_head = tl.program_id(0)
    num_splits_in_all = tl.load(p_counts + 1)
    for i_split in range(tl.program_id(1), num_splits_in_all, tl.num_programs(1)):
        p_split = p_splits + i_split * 4
        sequence = tl.load(p_split)
        row = tl.load(p_split + 1)
        length = tl.load(p_split + 2)
        place = tl.load(p_split + 3)
        num_splits = place // _MAX_SPLITS
        # What the row sees, from the first tile of its window on, in even parts of whole tiles.
        first_seen = 0
        if HAS_WINDOW:
            first_seen = tl.maximum(length - window, 0) // BLOCK_N * BLOCK_N
        part = tl.cdiv(tl.cdiv(length - first_seen, num_splits), BLOCK_N) * BLOCK_N
        first_key = tl.minimum(first_seen + (place % _MAX_SPLITS) * part, tl.cdiv(length, BLOCK_N) * BLOCK_N)
        end_key = tl.minimum(first_key + part, length)
        # [BLOCK_M]
        o_m = tl.arange(0, BLOCK_M)
        o_position = tl.zeros((BLOCK_M,), dtype=tl.int32) + (length - 1)
        # [BLOCK_M, BLOCK_D]
        o_d = tl.arange(0, BLOCK_D)
        o_head = i_head * GROUP + o_m
        o_q = row.to(tl.int64) * (NUM_HEADS * HEAD_DIM) + o_head[:, None] * HEAD_DIM + o_d[None, :]
        m_q = (o_m < GROUP)[:, None] & (o_d < HEAD_DIM)[None, :]
        b_q = tl.load(p_q + o_q, mask=m_q, other=0.0)
        b_acc, b_max, b_sum = _attend(
            b_q, o_position, p_k + i_head * stride_head, p_v + i_head * stride_head,
            p_tables + sequence.to(tl.int64) * stride_table, length - 1, first_key, end_key, length, window,
            stride_page, stride_slot, score_factor, cap_factor,
            HAS_WINDOW, HAS_CAP, HEAD_DIM, BLOCK_M, BLOCK_D, PAGE, BLOCK_N, False,
        )  # fmt: skip
        if num_splits == 1:
            b_out = b_acc / b_sum[:, None]
            tl.store(p_out + o_q, b_out.to(p_out.dtype.element_ty), mask=m_q)
        else:
            # [BLOCK_M]
            o_partial = i_split * NUM_HEADS + o_head.to(tl.int64)
            tl.store(p_partial + o_partial[:, None] * HEAD_DIM + o_d[None, :], b_acc, mask=m_q)
            tl.store(p_partial_sums + o_partial * 2, b_max, mask=o_m < GROUP)
            tl.store(p_partial_sums + o_partial * 2 + 1, b_sum, mask=o_m < GROUP)


@triton.jit
def _merge_kernel(
    p_out,
    p_decodes,
    p_counts,
    p_partial,
    p_partial_sums,
    NUM_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Grid (H, Q). All splits of a row at once: [16, D] in one wave of loads, and a sum in a fixed order."""
    i_head = tl.program_id(0)
    i_decode = tl.program_id(1)
    if i_decode >= tl.load(p_counts + 2):
        return
    row = tl.load(p_decodes + i_decode * 4 + 1)
    first_split = tl.load(p_decodes + i_decode * 4 + 2)
    num_splits = tl.load(p_decodes + i_decode * 4 + 3)
    if num_splits == 1:
        return
    # [_MAX_SPLITS]
    o_split = tl.arange(0, _MAX_SPLITS)
    m_split = o_split < num_splits
    o_partial = (first_split + o_split).to(tl.int64) * NUM_HEADS + i_head
    b_max = tl.load(p_partial_sums + o_partial * 2, mask=m_split, other=float("-inf"))
    b_sum = tl.load(p_partial_sums + o_partial * 2 + 1, mask=m_split, other=0.0)
    # [_MAX_SPLITS, BLOCK_D]
    o_d = tl.arange(0, BLOCK_D)
    m_acc = m_split[:, None] & (o_d < HEAD_DIM)[None, :]
    b_acc = tl.load(p_partial + o_partial[:, None] * HEAD_DIM + o_d[None, :], mask=m_acc, other=0.0)
    b_weight = tl.exp2(b_max - tl.max(b_max, 0))
    # [BLOCK_D]
    b_out = tl.sum(b_acc * b_weight[:, None], 0) / tl.sum(b_sum * b_weight, 0)
    o_out = row.to(tl.int64) * (NUM_HEADS * HEAD_DIM) + i_head * HEAD_DIM + o_d
    tl.store(p_out + o_out, b_out.to(p_out.dtype.element_ty), mask=o_d < HEAD_DIM)


def attention_config(
    head_dim: int, group: int, dtype: torch.dtype, row_class: str, capability: tuple[int, int]
) -> Config:
    """The tile of ``row_class`` ("prompt" or "decode") on a device of ``capability``, e.g. (9, 0) for an H200.

    Chosen by machine code, not by timing (docs/ragged_attention.md): no spills, and as many programs on a multiprocessor
    as loadtests/machine_code/recorded.json says.
    """
    block_d = max(16, triton.next_power_of_2(head_dim))
    is_float32 = dtype == torch.float32  # three products of tf32 for each; for tests and small models
    if row_class == "decode":
        block_n = 32 if is_float32 or block_d > 128 else 64
        return Config(max(16, triton.next_power_of_2(group)), block_n, 4, 2 if is_float32 else 3)
    if is_float32:
        return Config({256: 16, 128: 32, 64: 32}.get(block_d, 64), 32, 4, 2)
    has_large_tiles = capability[0] in (9, 10)  # wgmma, tcgen05: operands in shared memory, not in registers
    if block_d > 128:
        return Config(128 if has_large_tiles else 64, 32, 8, 2)
    if block_d == 128:
        return Config(128, 64, 8, 3, ahead=True) if has_large_tiles else Config(128, 32, 8, 3)
    return Config(128, 64, 8, 2)


def rows_per_tile(head_dim: int, group: int, dtype: torch.dtype, capability: tuple[int, int]) -> int:
    """Tokens of a tile of the prompt class: what plan_work asks for."""
    return attention_config(head_dim, group, dtype, "prompt", capability).block_m // group


def workspace_size(num_splits: int, num_heads: int, head_dim: int) -> int:
    """float32 elements that ``num_splits`` partial results take: for each head a vector, a maximum and a sum."""
    return num_splits * num_heads * (head_dim + 2)


def ragged_attention(
    q_NHD: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    metadata: AttentionMetadata,
    *,
    scale: float,
    sliding_window: int = 0,
    soft_cap: float = 0.0,
) -> torch.Tensor:
    """Causal attention of N query rows over their sequences' KV blocks; see `kernels.reference.ragged_attention`.

    q_NHD: contiguous. The caches: [num_blocks, block_size, K, D] by index, both with the same
    strides, D contiguous, block_size a power of two. H / K from 1 to 16, D a multiple of 16 up to 256.

    Works from ``metadata.work``, and then waits for nothing and allocates only the result, so that it may be captured.
    Without it the work is planned here, in fast mode, which waits for the device.
    """
    _, num_heads, head_dim = q_NHD.shape
    _, page, num_kv_heads, _ = k_cache.shape
    group = num_heads // num_kv_heads
    _check(q_NHD, k_cache, v_cache, scale)
    capability, num_processors = _device(q_NHD.device)
    prompt = attention_config(head_dim, group, q_NHD.dtype, "prompt", capability)
    work = metadata.work or _plan_now(metadata, prompt.block_m // group)
    out_NHD = torch.empty_like(q_NHD)
    if soft_cap:
        score_factor, cap_factor = soft_cap * LOG2E, -2.0 * LOG2E * scale / soft_cap
    else:
        score_factor, cap_factor = scale * LOG2E, 0.0
    stride_page, stride_slot, stride_head, _ = k_cache.stride()
    table = metadata.block_tables
    block_d = max(16, triton.next_power_of_2(head_dim))
    shape = {"HAS_WINDOW": sliding_window > 0, "HAS_CAP": soft_cap > 0, "HEAD_DIM": head_dim}
    shape |= {"NUM_HEADS": num_heads, "GROUP": group, "PAGE": page, "BLOCK_D": block_d}
    if work.tiles.shape[0]:
        _prompt_kernel[(num_kv_heads, work.tiles.shape[0])](
            q_NHD, k_cache, v_cache, out_NHD, table, work.tiles, score_factor, cap_factor, sliding_window,
            table.stride(0), stride_page, stride_slot, stride_head,
            BLOCK_M=prompt.block_m, BLOCK_N=prompt.block_n, AHEAD=prompt.ahead, **shape,
            num_warps=prompt.num_warps, num_stages=prompt.num_stages,
        )  # fmt: skip
    num_splits = work.splits.shape[0]
    if num_splits:
        decode = attention_config(head_dim, group, q_NHD.dtype, "decode", capability)
        workspace = work.workspace
        if workspace is None:
            size = workspace_size(num_splits, num_heads, head_dim)
            workspace = torch.empty(size, dtype=torch.float32, device=q_NHD.device)
        assert workspace.numel() >= workspace_size(num_splits, num_heads, head_dim), "the workspace is too small"
        vectors = num_splits * num_heads * head_dim
        programs = min(num_splits, -(-num_processors * PROGRAMS_PER_PROCESSOR // num_kv_heads))
        _decode_kernel[(num_kv_heads, programs)](
            q_NHD, k_cache, v_cache, out_NHD, table, work.splits, work.counts, workspace, workspace[vectors:],
            score_factor, cap_factor, sliding_window,
            table.stride(0), stride_page, stride_slot, stride_head,
            BLOCK_M=decode.block_m, BLOCK_N=decode.block_n, **shape,
            num_warps=decode.num_warps, num_stages=decode.num_stages,
        )  # fmt: skip
        _merge_kernel[(num_heads, work.decodes.shape[0])](
            out_NHD, work.decodes, work.counts, workspace, workspace[vectors:],
            NUM_HEADS=num_heads, HEAD_DIM=head_dim, BLOCK_D=block_d, num_warps=2,
        )  # fmt: skip
    return out_NHD


PROGRAMS_PER_PROCESSOR = 32
"""Programs of the decode class are started for at most so many on each multiprocessor; the rest of the splits they take
in turn. In a captured graph the list has room for 16 splits of each row, and most of that is empty."""


@functools.cache
def _device(device: torch.device) -> tuple[tuple[int, int], int]:
    """(capability, multiprocessors). The interpreter computes as an H200 does."""
    if device.type != "cuda":
        return (9, 0), 132
    properties = torch.cuda.get_device_properties(device)
    return (properties.major, properties.minor), properties.multi_processor_count


def _plan_now(metadata: AttentionMetadata, rows_per_tile: int) -> Work:
    device = metadata.seq_lens.device
    plan = plan_work(
        metadata.cu_seqlens_q.cpu().numpy(), metadata.seq_lens.cpu().numpy(), None, rows_per_tile=rows_per_tile
    )
    return Work(*(torch.from_numpy(np.ascontiguousarray(array)).to(device) for array in plan))


def _check(q_NHD: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, scale: float) -> None:
    _, num_heads, head_dim = q_NHD.shape
    _, page, num_kv_heads, _ = k_cache.shape
    assert num_heads % num_kv_heads == 0
    assert num_heads // num_kv_heads <= 16, f"a group of {num_heads // num_kv_heads} queries has no tile"
    assert head_dim % 16 == 0, f"head dim {head_dim} is no multiple of 16"
    assert head_dim <= 256, f"head dim {head_dim} is larger than 256"
    assert page & (page - 1) == 0, f"block_size {page} is no power of two"
    assert q_NHD.is_contiguous()
    assert k_cache.stride() == v_cache.stride()
    assert k_cache.stride(3) == 1
    assert k_cache.stride(0) % 16 == k_cache.stride(1) % 16 == 0
    assert scale > 0, "masks stand before the scale"
