"""y = x W^T + b on a GPU with bits that do not depend on the batch. Knows tiles; knows no layer and no model.

A library picks its kernel, and with it the order of the sum, by the number of rows M. Here the tile follows from the
weight's shape, the element type and the GPU alone, the sum runs over all of K in one program, in steps of BLOCK_K, and
rows past M are zeros that nobody stores. So a row's bits depend on neither M nor the row's place. (The remedy is that of
Thinking Machines' "Defeating Nondeterminism in LLM Inference" and its batch_invariant_ops; the order of the tiles, groups
of rows within which the weight's blocks take turns, is that of Triton's tutorial on matrix multiplication.) Persistent:
one program a multiprocessor, each takes every so-many-th tile.

Which tile (`matmul_config`), and what it costs. An H200 has 132 multiprocessors, 4.3 TB/s to memory and, at 1.75 GHz,
4096 FLOP a clock on each in 16-bit types; wgmma wants rows in multiples of 64. L2 gives some 6 TB/s (a guess, to be
measured). A step of a tile is BLOCK_K columns; "cap" is how fast the products let a program read its weights:

    weight             tile M N K       programs at M <= 128      bytes of W a step    MMA clocks a step    cap, TB/s
    N >= 16384         128 x 256 x  64  N / 256: 112 at 28672     32 KB                1024                 6.3
    4096 <= N < 16384  128 x  64 x 128  N /  64:  64 at  4096     16 KB                 512                 3.6
                                                  96 at  6144                                               5.4
    N < 4096            64 x  32 x 128  N /  32:  80 at  2560      8 KB                 192                 6.0
                                                  32 at  1024                                               2.4

Decode (M <= 64) is bound by memory where the cap is above 4.3 TB/s: in all layers of an 8B model but those with N = 4096,
which are held at 3.6 (83 %) by having 64 programs only. Rows past M are masked and cost no bytes. What else it costs: x
is read once for each block of N, from L2, so L2 carries (M + BLOCK_N) / BLOCK_N times the weight's bytes: 1.25 for the
widest class at M = 64, but 2 for the middle one and 3 for the smallest: some 70 % and 47 % of the memory's bandwidth
there. At M = 16 it is at most 1.5 in all classes.

Prefill: a tile does 2 M N / (2 (M + N)) FLOP for each byte from L2: 85, 43 and 21, so that L2 holds it at some 510, 256
and 128 TFLOP/s where a library reaches 770. An 8B model has 54 % of its products in the widest class: about 45 % of the
library's speed. That is the price of one tile for both. A second one for many rows would give most of it back, if a GPU
showed that its bits are the same; nothing promises that.

Before capability 9 (mma instead of wgmma) the widest tile is 128 x 128: 256 columns take more registers than there are.
float32 products are exact ones ("ieee", no TF32), on 32 x 32 x 32 tiles without tensor cores: for tests.
"""

# mypy: allow-incomplete-defs
# (Triton reads the annotations of a kernel: only constants have one.)

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl


class MatmulConfig(NamedTuple):
    """The shape of the kernel. The first three decide the bits."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int


GROUP_M = 16
"""Blocks of rows that take turns at a block of the weight while it is in L2."""
_INTERPRETED_PROGRAMS = 3


@triton.jit(do_not_specialize=["num_rows"])
def matmul_kernel(
    x,
    weight,
    bias,
    y,
    num_rows,
    N,
    K,
    HAS_BIAS: tl.constexpr,
    EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    num_blocks_m = tl.cdiv(num_rows, BLOCK_M)
    num_blocks_n = tl.cdiv(N, BLOCK_N)
    # [BLOCK_K]
    o_k = tl.arange(0, BLOCK_K)
    for i_tile in range(tl.program_id(0), num_blocks_m * num_blocks_n, tl.num_programs(0)):
        first_m = i_tile // (GROUP_M * num_blocks_n) * GROUP_M
        group_m = tl.minimum(num_blocks_m - first_m, GROUP_M)
        i_within = i_tile - first_m * num_blocks_n
        # [BLOCK_M], [BLOCK_N]
        o_m = (first_m + i_within % group_m) * BLOCK_M + tl.arange(0, BLOCK_M)
        o_n = i_within // group_m * BLOCK_N + tl.arange(0, BLOCK_N)
        m_m = (o_m < num_rows)[:, None]
        m_n = (o_n < N)[:, None]
        # [BLOCK_M, BLOCK_K], [BLOCK_N, BLOCK_K]
        p_x = x + o_m.to(tl.int64)[:, None] * K + o_k[None, :]
        p_weight = weight + o_n.to(tl.int64)[:, None] * K + o_k[None, :]
        # [BLOCK_M, BLOCK_N]
        b_y = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        for i_k in range(0, K, BLOCK_K):
            if EVEN_K:
                b_x = tl.load(p_x, mask=m_m, other=0.0)
                b_weight = tl.load(p_weight, mask=m_n, other=0.0)
            else:
                m_k = (o_k < K - i_k)[None, :]
                b_x = tl.load(p_x, mask=m_m & m_k, other=0.0)
                b_weight = tl.load(p_weight, mask=m_n & m_k, other=0.0)
            b_y = tl.dot(b_x, b_weight.T, b_y, input_precision="ieee")
            p_x += BLOCK_K
            p_weight += BLOCK_K
        if HAS_BIAS:
            b_y += tl.load(bias + o_n, mask=o_n < N, other=0.0).to(tl.float32)[None, :]
        p_y = y + o_m.to(tl.int64)[:, None] * N + o_n[None, :]
        tl.store(p_y, b_y.to(y.dtype.element_ty), mask=m_m & (o_n < N)[None, :])


def matmul(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """``x``: [M, K]; ``weight``: [N, K]; ``bias``: [N]; all contiguous and of one type. Returns x W^T + b, [M, N].

    Summed in float32 and rounded once. K needs no alignment, but what is no multiple of 8 is read element by element.
    """
    num_rows, width = x.shape
    out_features = weight.shape[0]
    assert weight.shape[1] == width and x.is_contiguous() and weight.is_contiguous()
    assert x.dtype == weight.dtype and (bias is None or bias.shape == (out_features,))
    y = x.new_empty(num_rows, out_features)
    if not num_rows:
        return y
    capability, num_processors = _device(x.device)
    config = matmul_config(out_features, x.dtype, capability)
    num_tiles = triton.cdiv(num_rows, config.block_m) * triton.cdiv(out_features, config.block_n)
    matmul_kernel[(min(num_tiles, num_processors),)](
        x,
        weight,
        weight if bias is None else bias,
        y,
        num_rows,
        out_features,
        width,
        HAS_BIAS=bias is not None,
        EVEN_K=width % config.block_k == 0,
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        BLOCK_K=config.block_k,
        GROUP_M=GROUP_M,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    return y


def matmul_config(out_features: int, dtype: torch.dtype, capability: tuple[int, int]) -> MatmulConfig:
    """The tile for a weight of ``out_features`` rows; the module's docstring has the arithmetic. M has no say.

    Stages hide latency and change no bits: as many as the GPU's shared memory holds.

    >>> matmul_config(28672, torch.bfloat16, (9, 0))
    MatmulConfig(block_m=128, block_n=256, block_k=64, num_warps=8, num_stages=4)
    """
    if dtype == torch.float32:
        return MatmulConfig(32, 32, 32, 4, 3)
    has_wgmma = capability >= (9, 0) and capability < (12, 0)
    if out_features < 4096:
        block_m, block_n, block_k, num_warps = 64, 32, 128, 4
    elif out_features < 16384:
        block_m, block_n, block_k, num_warps = 128, 64, 128, 8
    else:
        block_m, block_n, block_k, num_warps = 128, 256 if has_wgmma else 128, 64, 8
    shared = 192 if has_wgmma else 144 if capability == (8, 0) else 96
    stage = (block_m + block_n) * block_k * dtype.itemsize
    return MatmulConfig(block_m, block_n, block_k, num_warps, min(shared * 1024 // stage, 8))


@functools.cache
def _device(device: torch.device) -> tuple[tuple[int, int], int]:
    """(capability, programs at once). The interpreter takes an H200's tiles, and few programs, so that each has several."""
    if device.type != "cuda":
        return (9, 0), _INTERPRETED_PROGRAMS
    properties = torch.cuda.get_device_properties(device)
    return (properties.major, properties.minor), properties.multi_processor_count
