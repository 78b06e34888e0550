"""Between the fused projection and attention, in one launch: norm q and k, rope them, write k and v to the cache.

Knows heads and slots; knows no sequence. Twin: kernels/reference.py. A program is one token and a block of its heads:

    row of qkv    [ q0 q1 ... q(H-1) | k0 ... k(K-1) | v0 ... v(K-1) ]
    programs        0    1    ...      last: k and v of a block of kv heads, written through the token's slot

Both halves of a head are loaded apart, [HEADS, D/2] each, since rope turns dimension i with dimension i + D/2. Head
dimensions that are no power of two are padded with masks. The tile follows from H, K and D alone, and no sum leaves a
head: bits depend on the token's own row and position. Block and slot offsets are 64-bit, since a cache exceeds 2^31
elements.

A token with slot -1 (already in the cache, or a padded row of a CUDA graph) gets its q and writes nothing. Padded rows
need a position inside the table, as 0.
"""

# mypy: allow-incomplete-defs
# (Triton reads the annotations of a kernel: only constants have one.)

from __future__ import annotations

import torch
import triton
import triton.language as tl

_TILE = 1024
"""Elements of a program's heads, at most, where one head is no larger."""


@triton.jit
def _normed_and_turned(b_first, b_second, norm, cos, sin, eps, o_d, m_d, D: tl.constexpr, HAS_NORM: tl.constexpr):
    """Both halves [HEADS, HALF] of some heads, float32 -> the same, normed (or not) and turned by ``cos``, ``sin``."""
    if HAS_NORM:
        # [HEADS]
        b_square = tl.sum(b_first * b_first + b_second * b_second, axis=1)
        b_inverse = tl.rsqrt(b_square / D + eps)[:, None]
        # [HALF]
        b_norm_first = tl.load(norm + o_d, mask=m_d, other=0.0).to(tl.float32)
        b_norm_second = tl.load(norm + D // 2 + o_d, mask=m_d, other=0.0).to(tl.float32)
        b_first = b_first * b_inverse * b_norm_first[None, :]
        b_second = b_second * b_inverse * b_norm_second[None, :]
    return b_first * cos - b_second * sin, b_second * cos + b_first * sin


@triton.jit(do_not_specialize_on_alignment=["positions", "slot_mapping"])
def qk_norm_rope_write_kernel(
    qkv,
    table,
    positions,
    k_cache,
    v_cache,
    slot_mapping,
    q_norm,
    k_norm,
    q_out,
    eps,
    k_stride_block,
    k_stride_slot,
    k_stride_head,
    v_stride_block,
    v_stride_slot,
    v_stride_head,
    H: tl.constexpr,
    K: tl.constexpr,
    D: tl.constexpr,
    HALF: tl.constexpr,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    HAS_Q_NORM: tl.constexpr,
    HAS_K_NORM: tl.constexpr,
):
    i_token = tl.program_id(0)
    i_block = tl.program_id(1)
    NUM_Q_BLOCKS: tl.constexpr = (H + HEADS - 1) // HEADS
    # [HALF]
    o_d = tl.arange(0, HALF)
    m_d = o_d < D // 2
    p_row = qkv + i_token.to(tl.int64) * ((H + 2 * K) * D)
    p_table = table + tl.load(positions + i_token).to(tl.int64) * D + o_d
    # [1, HALF]
    b_cos = tl.load(p_table, mask=m_d, other=0.0)[None, :]
    b_sin = tl.load(p_table + D // 2, mask=m_d, other=0.0)[None, :]
    if i_block < NUM_Q_BLOCKS:
        # [HEADS]
        o_h = i_block * HEADS + tl.arange(0, HEADS)
        # [HEADS, HALF]
        m_q = (o_h < H)[:, None] & m_d[None, :]
        o_q = o_h[:, None] * D + o_d[None, :]
        b_first = tl.load(p_row + o_q, mask=m_q, other=0.0).to(tl.float32)
        b_second = tl.load(p_row + o_q + D // 2, mask=m_q, other=0.0).to(tl.float32)
        b_first, b_second = _normed_and_turned(b_first, b_second, q_norm, b_cos, b_sin, eps, o_d, m_d, D, HAS_Q_NORM)
        p_q = q_out + i_token.to(tl.int64) * (H * D) + o_q
        tl.store(p_q, b_first, mask=m_q)
        tl.store(p_q + D // 2, b_second, mask=m_q)
    else:
        slot = tl.load(slot_mapping + i_token)
        if slot >= 0:
            # [KV_HEADS]
            o_k = (i_block - NUM_Q_BLOCKS) * KV_HEADS + tl.arange(0, KV_HEADS)
            # [KV_HEADS, HALF]
            m_k = (o_k < K)[:, None] & m_d[None, :]
            p_k = p_row + H * D + o_k[:, None] * D + o_d[None, :]
            b_first = tl.load(p_k, mask=m_k, other=0.0).to(tl.float32)
            b_second = tl.load(p_k + D // 2, mask=m_k, other=0.0).to(tl.float32)
            b_v_first = tl.load(p_k + K * D, mask=m_k, other=0.0)
            b_v_second = tl.load(p_k + K * D + D // 2, mask=m_k, other=0.0)
            b_first, b_second = _normed_and_turned(
                b_first, b_second, k_norm, b_cos, b_sin, eps, o_d, m_d, D, HAS_K_NORM
            )
            i_kv_block = (slot // BLOCK_SIZE).to(tl.int64)
            i_slot = slot % BLOCK_SIZE
            o_kv = o_d[None, :]
            p_k = k_cache + i_kv_block * k_stride_block + i_slot * k_stride_slot + o_k[:, None] * k_stride_head + o_kv
            p_v = v_cache + i_kv_block * v_stride_block + i_slot * v_stride_slot + o_k[:, None] * v_stride_head + o_kv
            tl.store(p_k, b_first, mask=m_k)
            tl.store(p_k + D // 2, b_second, mask=m_k)
            tl.store(p_v, b_v_first, mask=m_k)
            tl.store(p_v + D // 2, b_v_second, mask=m_k)


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
    """See `reference.qk_norm_rope_write`. Returns q_NHD, fresh.

    ``qkv``: contiguous. The caches: [num_blocks, block_size, K, D] of any strides but 1 along D, and of any element
    type. ``table``: float32 [max_len, D], contiguous. ``positions``, ``slot_mapping``: int32 [N].
    """
    num_tokens, width = qkv.shape
    _, block_size, num_kv_heads, head_dim = k_cache.shape
    num_heads = width // head_dim - 2 * num_kv_heads
    assert qkv.is_contiguous() and table.is_contiguous() and table.dtype == torch.float32
    assert width == (num_heads + 2 * num_kv_heads) * head_dim and table.shape[1] == head_dim and head_dim % 2 == 0
    assert k_cache.stride(3) == v_cache.stride(3) == 1, "one head of one token is not contiguous in the cache"
    q_NHD = qkv.new_empty(num_tokens, num_heads, head_dim)
    if not num_tokens:
        return q_NHD
    half, heads, kv_heads, num_warps = tile_of(num_heads, num_kv_heads, head_dim)
    grid = (num_tokens, triton.cdiv(num_heads, heads) + triton.cdiv(num_kv_heads, kv_heads))
    qk_norm_rope_write_kernel[grid](
        qkv,
        table,
        positions,
        k_cache,
        v_cache,
        slot_mapping,
        qkv if q_norm is None else q_norm,
        qkv if k_norm is None else k_norm,
        q_NHD,
        eps,
        *k_cache.stride()[:3],
        *v_cache.stride()[:3],
        H=num_heads,
        K=num_kv_heads,
        D=head_dim,
        HALF=half,
        HEADS=heads,
        KV_HEADS=kv_heads,
        BLOCK_SIZE=block_size,
        HAS_Q_NORM=q_norm is not None,
        HAS_K_NORM=k_norm is not None,
        num_warps=num_warps,
    )
    return q_NHD


def tile_of(num_heads: int, num_kv_heads: int, head_dim: int) -> tuple[int, int, int, int]:
    """(half a head, padded; q heads of a program; kv heads of a program; warps).

    8 elements of each half a thread, so 128 bits in a 16-bit type.

    >>> tile_of(32, 8, 128), tile_of(14, 2, 64), tile_of(7, 1, 96)
    ((64, 8, 8, 2), (32, 16, 2, 2), (64, 8, 1, 2))
    """
    half = triton.next_power_of_2(head_dim // 2)
    most = max(1, _TILE // (2 * half))
    heads = min(triton.next_power_of_2(num_heads), most)
    kv_heads = min(triton.next_power_of_2(num_kv_heads), most)
    return half, heads, kv_heads, max(1, max(heads, kv_heads) * half // 256)
