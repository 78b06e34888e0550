"""RMSNorm on a GPU, alone and fused with the residual sum. Knows rows; knows no model. Twins: kernels/reference.py.

One program holds its rows whole, in float32, and reads and writes each element once:

    hidden size up to 1024    1024 / next_pow2(hidden) rows a program       one tile [ROWS, BLOCK]
    above                     one row a program, 16 elements a thread (two loads of 128 bits in a 16-bit type)

The tile follows from the hidden size alone, and a sum runs inside one row of it. So a row's bits depend neither on the
other rows nor on its place. No argument changes from step to step: nothing is compiled again, and both are safe in a
CUDA graph.

Bytes at least: rms_norm 2 N E b, add_rms_norm 4 N E b (x, the residual twice, the result), b bytes an element.
"""

# mypy: allow-incomplete-defs
# (Triton reads the annotations of a kernel: only constants have one.)

from __future__ import annotations

import torch
import triton
import triton.language as tl

MAX_HIDDEN = 32768
"""The widest row one program holds."""
_TILE = 1024


@triton.jit(do_not_specialize=["num_rows"])
def rms_norm_kernel(
    x,
    residual,
    weight,
    out,
    eps,
    num_rows,
    E: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    ADDS: tl.constexpr,
):
    o_rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    o_e = tl.arange(0, BLOCK)
    # [ROWS, BLOCK]
    m_tile = (o_rows < num_rows)[:, None] & (o_e < E)[None, :]
    o_tile = o_rows.to(tl.int64)[:, None] * E + o_e[None, :]
    b_x = tl.load(x + o_tile, mask=m_tile, other=0.0).to(tl.float32)
    if ADDS:
        b_x += tl.load(residual + o_tile, mask=m_tile, other=0.0).to(tl.float32)
        b_sum = b_x.to(residual.dtype.element_ty)
        tl.store(residual + o_tile, b_sum, mask=m_tile)
        b_x = b_sum.to(tl.float32)  # the norm is that of the sum as the residual holds it
    b_weight = tl.load(weight + o_e, mask=o_e < E, other=0.0).to(tl.float32)
    # [ROWS]
    b_inverse = tl.rsqrt(tl.sum(b_x * b_x, axis=1) / E + eps)
    tl.store(out + o_tile, b_x * b_inverse[:, None] * b_weight[None, :], mask=m_tile)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """See `reference.rms_norm`. ``x``: contiguous [N, E], E at most `MAX_HIDDEN`; ``weight``: [E]. Returns [N, E]."""
    out = torch.empty_like(x)
    _launch(x, x, weight, out, eps, adds=False)
    return out


def add_rms_norm(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """See `reference.add_rms_norm`. ``x``, ``residual``: contiguous [N, E]; the residual is written in place."""
    assert residual.shape == x.shape and residual.is_contiguous()
    out = torch.empty_like(x)
    _launch(x, residual, weight, out, eps, adds=True)
    return out


def tile_of(hidden_size: int) -> tuple[int, int, int]:
    """(rows of a program, columns of its tile, warps) for a hidden size.

    >>> tile_of(4096), tile_of(5120), tile_of(96)
    ((1, 4096, 8), (1, 8192, 16), (8, 128, 2))
    """
    assert hidden_size <= MAX_HIDDEN, f"hidden size {hidden_size} is above {MAX_HIDDEN}"
    block = triton.next_power_of_2(hidden_size)
    rows = max(1, _TILE // block)
    return rows, block, max(1, min(rows * block // 512, 16))


def _launch(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, out: torch.Tensor, eps: float, *, adds: bool
) -> None:
    num_rows, hidden_size = x.shape
    assert x.is_contiguous() and weight.shape == (hidden_size,)
    if not num_rows:
        return
    rows, block, num_warps = tile_of(hidden_size)
    rms_norm_kernel[(triton.cdiv(num_rows, rows),)](
        x, residual, weight, out, eps, num_rows, E=hidden_size, ROWS=rows, BLOCK=block, ADDS=adds, num_warps=num_warps
    )
