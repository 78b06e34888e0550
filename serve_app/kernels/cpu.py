"""The CPU kernels: ragged paged attention, and the small ops around the linears, each fused into one pass.

Knows memory layouts and work items; knows no model. Same results as `kernels/reference.py`, and batch-invariant by
construction: every row is computed by one function in an order that depends on its position alone, so its bits do not
depend on the chunk, the batch or the number of threads.

Shape suffixes: N tokens, B sequences, H query heads, K kv heads, D head dim, E hidden, F intermediate.
Layout of the cache (made by runner/kv_cache.py), so that both products of attention run along contiguous vectors:

    K  [num_blocks, K, D, block_size]    scores of a block   = q[rows, D] @ K[D, block_size]
    V  [num_blocks, K, block_size, D]    weighted sum        = p[rows, keys] @ V[keys, D]

Compiled by numba on first use, about 2 s per element type, and cached on disk beside this file (or where
NUMBA_CACHE_DIR says).
"""

from __future__ import annotations

import functools
import math
import threading
from typing import Any, NamedTuple

import numpy as np
import torch
from numba import cfunc, njit

from serve_app.kernels import openmp
from serve_app.kernels.linear import Linear
from serve_app.kernels.metadata import AttentionMetadata
from serve_app.kernels.openmp import FIRST, OPTIONS, SIGNATURE, float_bits
from serve_app.kernels.simd import (
    DTYPE_CODES,
    LANES,
    as_float,
    atomic_next,
    gemm_tile,
    load,
    load_i32,
    load_i64,
    store,
    vector_add,
    vector_exp_sum,
    vector_max,
    vector_norm,
    vector_rope,
    vector_scale,
    vector_silu_mul,
    vector_square_sum,
)

MAX_ROWS = 32
"""Query rows (tokens x heads of a group) of one attention work item."""
ROW_TILE = 4
TALL_TILE = 8
"""Rows of one product in registers; which of them a row runs in does not change its bits."""
KEY_CHUNK = 256
"""Keys whose scores are held at once; chunks start at multiples of it, whatever the query. A multiple of block_size."""
AHEAD = 2
"""Blocks between the one in use and the one being prefetched."""
ROPE_ROWS_PER_ITEM = 32
ROWS_PER_ITEM = 8
"""Rows of one work item of the small ops."""


class _Kernels(NamedTuple):
    attention: Any
    rms_norm: Any
    qk_norm_rope_write: Any
    silu_mul: Any


@njit(**OPTIONS)  # type: ignore[untyped-decorator]
def _find_sequence(tile_starts: int, num_seqs: int, tile: int) -> int:
    """The sequence whose tiles [tile_starts[b], tile_starts[b+1]) hold ``tile``."""
    low, high = 0, num_seqs
    while high - low > 1:
        middle = (low + high) // 2
        if load_i32(tile_starts, middle) <= tile:
            low = middle
        else:
            high = middle
    return low


@njit(**OPTIONS)  # type: ignore[untyped-decorator]
def _inverse_rms(square_sum: float, width: int, eps: float) -> float:
    return np.float32(1.0) / np.float32(math.sqrt(square_sum / np.float32(width) + eps))  # type: ignore[return-value]


@njit(cache=True, error_model="numpy")  # type: ignore[untyped-decorator]
def _tanh_in_place(scores: int, num: int, cap: float) -> None:
    for j in range(num):
        x = load(scores, j, 0)
        store(np.float32(cap * math.tanh(x / cap)), scores, j, 0)


@functools.cache
def _kernels(cache_dtype: int, activation_dtype: int) -> _Kernels:
    """The kernels for one pair of element types. Constants become part of the compiled code and of its cache key."""
    kv = cache_dtype
    act = activation_dtype
    act_bytes = 4 if activation_dtype == 0 else 2

    @cfunc(SIGNATURE, **OPTIONS)
    def attention(arguments: int) -> None:
        num_items = load_i64(arguments, 2)
        thread = atomic_next(arguments + 8)
        q_ = load_i64(arguments, FIRST)
        out = load_i64(arguments, FIRST + 1)
        k_cache = load_i64(arguments, FIRST + 2)
        v_cache = load_i64(arguments, FIRST + 3)
        cu_seqlens = load_i64(arguments, FIRST + 4)
        seq_lens = load_i64(arguments, FIRST + 5)
        tables = load_i64(arguments, FIRST + 6)
        table_stride = load_i64(arguments, FIRST + 7)
        tile_starts = load_i64(arguments, FIRST + 8)
        num_seqs = load_i64(arguments, FIRST + 9)
        heads = load_i64(arguments, FIRST + 10)
        kv_heads = load_i64(arguments, FIRST + 11)
        dim = load_i64(arguments, FIRST + 12)
        block_size = load_i64(arguments, FIRST + 13)
        tile_tokens = load_i64(arguments, FIRST + 14)
        scale = as_float(load_i64(arguments, FIRST + 15))
        window = load_i64(arguments, FIRST + 16)
        soft_cap = as_float(load_i64(arguments, FIRST + 17))
        scratch_stride = load_i64(arguments, FIRST + 19)
        scratch = load_i64(arguments, FIRST + 18) + thread * scratch_stride

        group = heads // kv_heads
        q = scratch
        acc = q + 4 * MAX_ROWS * dim
        scores = acc + 4 * MAX_ROWS * dim
        row_max = scores + 4 * MAX_ROWS * KEY_CHUNK
        row_sum = row_max + 4 * MAX_ROWS
        item_bytes = 4 if kv == 0 else 2
        block_bytes = block_size * dim * item_bytes

        while True:
            item = atomic_next(arguments)
            if item >= num_items:
                break
            # Last first: chunks stand behind the decodes, and the heaviest tiles at their end.
            item = num_items - 1 - item
            tile = item // kv_heads
            head = item - tile * kv_heads
            b = _find_sequence(tile_starts, num_seqs, tile)
            row_start = load_i32(cu_seqlens, b)
            num_queries = load_i32(cu_seqlens, b + 1) - row_start
            first = (tile - load_i32(tile_starts, b)) * tile_tokens
            tokens = min(tile_tokens, num_queries - first)
            position = load_i32(seq_lens, b) - num_queries + first  # of the tile's first token
            rows = tokens * group
            padded_rows = (rows + ROW_TILE - 1) // ROW_TILE * ROW_TILE

            for r in range(padded_rows):
                source = ((row_start + first + r // group) * heads + head * group + r % group) * dim
                for d in range(dim):
                    store(load(q_, source + d, act) * scale if r < rows else np.float32(0.0), q, r * dim + d, 0)
                    store(np.float32(0.0), acc, r * dim + d, 0)
                store(np.float32(-np.inf), row_max, r, 0)
                store(np.float32(0.0), row_sum, r, 0)

            num_keys = position + tokens
            first_key = max(0, position - window + 1) if window > 0 else 0
            chunk = first_key // KEY_CHUNK * KEY_CHUNK
            while chunk < num_keys:
                keys = min(KEY_CHUNK, num_keys - chunk)
                num_blocks = (keys + block_size - 1) // block_size
                for i in range(num_blocks):
                    if chunk + (i + 1) * block_size <= first_key:
                        continue
                    block = load_i32(tables, b * table_stride + chunk // block_size + i)
                    k_block = k_cache + (block * kv_heads + head) * block_bytes
                    if i + AHEAD < num_blocks:
                        later = load_i32(tables, b * table_stride + chunk // block_size + i + AHEAD)
                        ahead = k_cache + (later * kv_heads + head) * block_bytes - k_block
                    else:
                        first_v = min(i + AHEAD - num_blocks, num_blocks - 1)
                        later = load_i32(tables, b * table_stride + chunk // block_size + first_v)
                        ahead = v_cache + (later * kv_heads + head) * block_bytes - k_block
                    r = 0
                    while r < padded_rows:
                        tall = padded_rows - r >= TALL_TILE
                        q_tile = q + 4 * r * dim
                        for j in range(0, block_size, 2 * LANES):
                            k_ = k_block + j * item_bytes
                            s_ = scores + 4 * (r * KEY_CHUNK + i * block_size + j)
                            if block_size - j < 2 * LANES:
                                gemm_tile(q_tile, dim, k_, block_size, s_, KEY_CHUNK, dim, ahead, ROW_TILE, 1, kv, 0)
                            elif tall:
                                gemm_tile(q_tile, dim, k_, block_size, s_, KEY_CHUNK, dim, ahead, TALL_TILE, 2, kv, 0)
                            else:
                                gemm_tile(q_tile, dim, k_, block_size, s_, KEY_CHUNK, dim, ahead, ROW_TILE, 2, kv, 0)
                        r += TALL_TILE if tall and block_size >= 2 * LANES else ROW_TILE

                num_vectors = (keys + LANES - 1) // LANES
                for r in range(rows):
                    s = scores + 4 * r * KEY_CHUNK
                    last = position + r // group  # the row's own position
                    if soft_cap > 0:
                        _tanh_in_place(s, num_vectors * LANES, soft_cap)
                    low = min(max(0, last - window + 1 - chunk), num_vectors * LANES) if window > 0 else 0
                    for j in range(low):
                        store(np.float32(-np.inf), s, j, 0)
                    for j in range(max(0, last + 1 - chunk), num_vectors * LANES):
                        store(np.float32(-np.inf), s, j, 0)
                    old = load(row_max, r, 0)
                    new = max(old, vector_max(s, num_vectors))
                    if new == -np.inf:  # no key of this chunk is in the row's window; a NaN among them stays
                        for j in range(num_vectors * LANES):
                            x = load(s, j, 0)
                            store(np.float32(0.0) if x == -np.inf else x, s, j, 0)
                        continue
                    total = vector_exp_sum(s, num_vectors, new)
                    if new != old:
                        factor = np.float32(math.exp(old - new))
                        total += load(row_sum, r, 0) * factor
                        vector_scale(acc + 4 * r * dim, dim // LANES, factor)
                    else:
                        total += load(row_sum, r, 0)
                    store(total, row_sum, r, 0)
                    store(new, row_max, r, 0)
                for r in range(rows, padded_rows):
                    for j in range(num_vectors * LANES):
                        store(np.float32(0.0), scores, r * KEY_CHUNK + j, 0)

                for i in range(num_blocks):
                    if chunk + (i + 1) * block_size <= first_key:
                        continue
                    block = load_i32(tables, b * table_stride + chunk // block_size + i)
                    v_block = v_cache + (block * kv_heads + head) * block_bytes
                    ahead = 0
                    if i + AHEAD < num_blocks:
                        later = load_i32(tables, b * table_stride + chunk // block_size + i + AHEAD)
                        ahead = v_cache + (later * kv_heads + head) * block_bytes - v_block
                    # Slots behind the last key may hold anything: they are not read.
                    depth = min(block_size, keys - i * block_size)
                    for r in range(0, padded_rows, ROW_TILE):
                        p_tile = scores + 4 * (r * KEY_CHUNK + i * block_size)
                        o_tile = acc + 4 * r * dim
                        d = 0
                        while dim - d >= 4 * LANES:
                            v_ = v_block + d * item_bytes
                            gemm_tile(p_tile, KEY_CHUNK, v_, dim, o_tile + 4 * d, dim, depth, ahead, ROW_TILE, 4, kv, 1)
                            d += 4 * LANES
                        while dim - d >= 2 * LANES:
                            v_ = v_block + d * item_bytes
                            gemm_tile(p_tile, KEY_CHUNK, v_, dim, o_tile + 4 * d, dim, depth, ahead, ROW_TILE, 2, kv, 1)
                            d += 2 * LANES
                        while d < dim:
                            v_ = v_block + d * item_bytes
                            gemm_tile(p_tile, KEY_CHUNK, v_, dim, o_tile + 4 * d, dim, depth, ahead, ROW_TILE, 1, kv, 1)
                            d += LANES
                chunk += KEY_CHUNK

            for r in range(rows):
                target = ((row_start + first + r // group) * heads + head * group + r % group) * dim
                factor = np.float32(1.0) / load(row_sum, r, 0)
                for d in range(dim):
                    store(load(acc, r * dim + d, 0) * factor, out, target + d, act)

    @cfunc(SIGNATURE, **OPTIONS)
    def rms_norm(arguments: int) -> None:
        num_items = load_i64(arguments, 2)
        x = load_i64(arguments, FIRST)
        residual = load_i64(arguments, FIRST + 1)  # 0: none; else residual += x first, and the norm is of that
        weight = load_i64(arguments, FIRST + 2)
        out = load_i64(arguments, FIRST + 3)
        num_rows = load_i64(arguments, FIRST + 4)
        width = load_i64(arguments, FIRST + 5)
        eps = as_float(load_i64(arguments, FIRST + 6))
        while True:
            item = atomic_next(arguments)
            if item >= num_items:
                break
            for row in range(item * ROWS_PER_ITEM, min(num_rows, (item + 1) * ROWS_PER_ITEM)):
                source = x + row * width * act_bytes
                if residual != 0:
                    total = residual + row * width * act_bytes
                    vector_add(source, total, width // LANES, act)
                    source = total
                factor = _inverse_rms(vector_square_sum(source, width // LANES, act), width, eps)
                vector_norm(source, weight, out + row * width * act_bytes, width // LANES, factor, act)

    @cfunc(SIGNATURE, **OPTIONS)
    def qk_norm_rope_write(arguments: int) -> None:
        num_items = load_i64(arguments, 2)
        qkv = load_i64(arguments, FIRST)  # [N, (H + 2K) D]; q and k are normed in place
        table = load_i64(arguments, FIRST + 1)
        positions = load_i64(arguments, FIRST + 2)
        slots = load_i64(arguments, FIRST + 3)
        q_weight = load_i64(arguments, FIRST + 4)
        k_weight = load_i64(arguments, FIRST + 5)
        k_cache = load_i64(arguments, FIRST + 6)
        v_cache = load_i64(arguments, FIRST + 7)
        q_out = load_i64(arguments, FIRST + 8)
        num_rows = load_i64(arguments, FIRST + 9)
        heads = load_i64(arguments, FIRST + 10)
        kv_heads = load_i64(arguments, FIRST + 11)
        dim = load_i64(arguments, FIRST + 12)
        block_size = load_i64(arguments, FIRST + 13)
        eps = as_float(load_i64(arguments, FIRST + 14))
        half = dim // 2
        whole = half % LANES == 0
        group = heads // kv_heads
        width = (heads + 2 * kv_heads) * dim
        while True:
            item = atomic_next(arguments)
            if item >= num_items:
                break
            # By kv head, and many rows at once: neighbouring tokens share the cache lines of K, and two threads that
            # write them take them from each other.
            kv_head = item % kv_heads
            first = item // kv_heads * ROPE_ROWS_PER_ITEM
            for row in range(first, min(num_rows, first + ROPE_ROWS_PER_ITEM)):
                cos = table + 4 * load_i32(positions, row) * dim
                sin = cos + 4 * half
                slot = load_i32(slots, row)
                block, offset = slot // block_size, slot % block_size
                for i_head in range(group + 1):  # the group's queries, then its key
                    is_key = i_head == group
                    if is_key and slot < 0:
                        break
                    head = heads + kv_head if is_key else kv_head * group + i_head
                    x = qkv + (row * width + head * dim) * act_bytes
                    weight = k_weight if is_key else q_weight
                    if weight != 0:
                        factor = _inverse_rms(vector_square_sum(x, dim // LANES, act), dim, eps)
                        vector_norm(x, weight, x, dim // LANES, factor, act)
                    out = x if is_key else q_out + (row * heads + head) * dim * act_bytes
                    if whole:
                        vector_rope(x, cos, sin, out, half, act, act)
                    else:
                        for i in range(half):
                            a, b = load(x, i, act), load(x, half + i, act)
                            c, s = load(cos, i, 0), load(sin, i, 0)
                            store(a * c - b * s, out, i, act)
                            store(b * c + a * s, out, half + i, act)
                    if is_key:
                        target = (block * kv_heads + kv_head) * dim * block_size + offset
                        for i in range(dim):
                            store(load(x, i, act), k_cache, target + i * block_size, kv)
                if slot >= 0:
                    x = qkv + (row * width + (heads + kv_heads + kv_head) * dim) * act_bytes
                    target = ((block * kv_heads + kv_head) * block_size + offset) * dim
                    for i in range(dim):
                        store(load(x, i, act), v_cache, target + i, kv)

    @cfunc(SIGNATURE, **OPTIONS)
    def silu_mul(arguments: int) -> None:
        num_items = load_i64(arguments, 2)
        gate_up = load_i64(arguments, FIRST)
        out = load_i64(arguments, FIRST + 1)
        num_rows = load_i64(arguments, FIRST + 2)
        width = load_i64(arguments, FIRST + 3)
        while True:
            item = atomic_next(arguments)
            if item >= num_items:
                break
            for row in range(item * ROWS_PER_ITEM, min(num_rows, (item + 1) * ROWS_PER_ITEM)):
                start = 2 * row * width
                gate_row = gate_up + start * act_bytes
                whole = width // LANES
                if whole > 0:
                    up_row = gate_row + width * act_bytes
                    vector_silu_mul(gate_row, up_row, out + row * width * act_bytes, whole, act)
                for i in range(whole * LANES, width):
                    gate = load(gate_up, start + i, act)
                    up = load(gate_up, start + width + i, act)
                    store(gate / (np.float32(1.0) + np.float32(math.exp(-gate))) * up, out, row * width + i, act)

    return _Kernels(attention, rms_norm, qk_norm_rope_write, silu_mul)


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

    k_cache and v_cache are logical views [num_blocks, block_size, K, D] of the layout above. The softmax is the online
    one (Milakov and Gimelshein, arXiv 1805.02867) over chunks of KEY_CHUNK keys; a work item is one kv head of one
    tile of tokens, whose queries (all heads of the group) share each block while it is in the cache.
    """
    _, heads, dim = q_NHD.shape
    _, block_size, kv_heads, _ = k_cache.shape
    group = heads // kv_heads
    tile_tokens = max(1, MAX_ROWS // group)
    _check_layout(q_NHD, k_cache, v_cache)
    tile_starts = _tile_starts(metadata, tile_tokens)
    out = torch.empty_like(q_NHD)
    scratch, stride = _scratch(dim, torch.get_num_threads(), threading.get_ident())
    kernels = _kernels(_code(k_cache), _code(q_NHD))
    openmp.run(
        kernels.attention,
        int(tile_starts[-1]) * kv_heads,
        q_NHD.data_ptr(),
        out.data_ptr(),
        k_cache.data_ptr(),
        v_cache.data_ptr(),
        metadata.cu_seqlens_q.data_ptr(),
        metadata.seq_lens.data_ptr(),
        metadata.block_tables.data_ptr(),
        metadata.block_tables.stride(0),
        tile_starts.data_ptr(),
        metadata.num_seqs,
        heads,
        kv_heads,
        dim,
        block_size,
        tile_tokens,
        float_bits(scale),
        sliding_window,
        float_bits(soft_cap),
        scratch.data_ptr(),
        stride,
    )
    return out


def _tile_starts(metadata: AttentionMetadata, tile_tokens: int) -> torch.Tensor:
    """int32 [B+1]: tiles of ``tile_tokens`` rows that the sequences before b have; the last entry counts all."""
    starts = metadata.work_lists.get(tile_tokens)
    if starts is None:
        num_tiles = (metadata.cu_seqlens_q.diff() + (tile_tokens - 1)) // tile_tokens
        starts = torch.zeros(metadata.num_seqs + 1, dtype=torch.int32)
        torch.cumsum(num_tiles, 0, dtype=torch.int32, out=starts[1:])
        metadata.work_lists[tile_tokens] = starts
    return starts


def rms_norm(x_NE: torch.Tensor, weight_E: torch.Tensor, eps: float) -> torch.Tensor:
    """x / sqrt(mean(x^2) + eps) * weight, row by row (Zhang and Sennrich, arXiv 1910.07467)."""
    return _norm(x_NE, None, weight_E, eps)


def add_rms_norm(x_NE: torch.Tensor, residual_NE: torch.Tensor, weight_E: torch.Tensor, eps: float) -> torch.Tensor:
    """residual += x in place; returns the RMS norm of the new residual."""
    return _norm(x_NE, residual_NE, weight_E, eps)


def _norm(x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor, eps: float) -> torch.Tensor:
    out = torch.empty_like(x)
    num_rows, width = x.shape
    openmp.run(
        _kernels(_code(x), _code(x)).rms_norm,
        -(-num_rows // ROWS_PER_ITEM),
        x.data_ptr(),
        0 if residual is None else residual.data_ptr(),
        weight.data_ptr(),
        out.data_ptr(),
        num_rows,
        width,
        float_bits(eps),
    )
    return out


def qk_norm_rope_write(
    qkv: torch.Tensor,
    table: torch.Tensor,
    positions: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    *,
    q_norm: torch.Tensor | None = None,
    k_norm: torch.Tensor | None = None,
    eps: float = 0.0,
) -> torch.Tensor:
    """qkv [N, (H + 2K) D] -> q_NHD: optional RMS norm of q and k heads, rope, K and V into their cache slots.

    table: float32 [max_len, D], cos in the first half, sin in the second; positions, slot_mapping: int32 [N]. qkv is
    scratch afterwards.
    """
    num_tokens, width = qkv.shape
    _, block_size, kv_heads, dim = k_cache.shape
    num_heads = width // dim - 2 * kv_heads
    q_NHD = qkv.new_empty(num_tokens, num_heads, dim)
    openmp.run(
        _kernels(_code(k_cache), _code(qkv)).qk_norm_rope_write,
        -(-num_tokens // ROPE_ROWS_PER_ITEM) * kv_heads,
        qkv.data_ptr(),
        table.data_ptr(),
        positions.data_ptr(),
        slot_mapping.data_ptr(),
        0 if q_norm is None else q_norm.data_ptr(),
        0 if k_norm is None else k_norm.data_ptr(),
        k_cache.data_ptr(),
        v_cache.data_ptr(),
        q_NHD.data_ptr(),
        num_tokens,
        num_heads,
        kv_heads,
        dim,
        block_size,
        float_bits(eps),
    )
    return q_NHD


def silu_mul(gate_up: torch.Tensor) -> torch.Tensor:
    """[N, 2F], gate in the first half -> silu(gate) * up, [N, F] (SwiGLU, Shazeer, arXiv 2002.05202)."""
    num_rows, double = gate_up.shape
    out = gate_up.new_empty(num_rows, double // 2)
    openmp.run(
        _kernels(_code(gate_up), _code(gate_up)).silu_mul,
        -(-num_rows // ROWS_PER_ITEM),
        gate_up.data_ptr(),
        out.data_ptr(),
        num_rows,
        double // 2,
    )
    return out


def linear(weight: torch.Tensor, bias: torch.Tensor | None = None) -> Linear:
    """See `reference.linear`; how it runs, and with which bits, is kernels/linear.py's."""
    return Linear(weight, bias)


def _code(tensor: torch.Tensor) -> int:
    return _CODES[tensor.dtype]


_CODES = {getattr(torch, name): code for name, code in DTYPE_CODES.items()}


def _check_layout(q_NHD: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor) -> None:
    _, block_size, kv_heads, dim = k_cache.shape
    block = block_size * kv_heads * dim
    assert q_NHD.is_contiguous() and dim % LANES == 0 and block_size % LANES == 0 and KEY_CHUNK % block_size == 0
    assert q_NHD.shape[1] // kv_heads <= MAX_ROWS, "the heads of one group do not fit the scratch"
    assert k_cache.stride() == (block, 1, dim * block_size, block_size), "K cache is not [blocks, K, D, block_size]"
    assert v_cache.stride() == (block, dim, dim * block_size, 1), "V cache is not [blocks, K, block_size, D]"


@functools.lru_cache(maxsize=8)
def _scratch(dim: int, num_threads: int, caller: int) -> tuple[torch.Tensor, int]:
    """Per thread: q and the accumulator [MAX_ROWS, D], scores [MAX_ROWS, KEY_CHUNK], maximum and sum [MAX_ROWS].

    ``caller``: the calling thread's id; two engines in one process never write into each other's.
    """
    floats = MAX_ROWS * (2 * dim + KEY_CHUNK + 2)
    stride = -(-4 * floats // 4096) * 4096
    return torch.empty(num_threads * stride, dtype=torch.uint8), stride
