"""The gate of the MLP on a GPU: silu(gate) * up in one pass. Knows rows; knows no model. Twin: kernels/reference.py.

One program computes [ROWS, BLOCK] results, 16 a thread: a strip of one row, or several short rows whole. Bytes at least:
3 N F b, b bytes an element. Each result depends on two inputs alone; a row's bits depend on nothing else.
"""

# mypy: allow-incomplete-defs
# (Triton reads the annotations of a kernel: only constants have one.)

from __future__ import annotations

import torch
import triton
import triton.language as tl

_TILE = 2048
NUM_WARPS = 4


@triton.jit(do_not_specialize=["num_rows"])
def silu_mul_kernel(gate_up, out, num_rows, F: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    o_rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    o_f = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    # [ROWS, BLOCK]
    m_tile = (o_rows < num_rows)[:, None] & (o_f < F)[None, :]
    o_rows = o_rows.to(tl.int64)[:, None]
    p_gate = gate_up + o_rows * (2 * F) + o_f[None, :]
    b_gate = tl.load(p_gate, mask=m_tile, other=0.0).to(tl.float32)
    b_up = tl.load(p_gate + F, mask=m_tile, other=0.0).to(tl.float32)
    b_small = tl.exp(-tl.abs(b_gate))  # in (0, 1]: exp of -gate would overflow for gates below -88
    b_sigmoid = tl.where(b_gate >= 0, 1.0, b_small) / (1.0 + b_small)
    tl.store(out + o_rows * F + o_f[None, :], b_gate * b_sigmoid * b_up, mask=m_tile)


def silu_mul(gate_up_N2F: torch.Tensor) -> torch.Tensor:
    """See `reference.silu_mul`. Contiguous [N, 2 F] -> [N, F]."""
    num_rows, width = gate_up_N2F.shape
    assert width % 2 == 0 and gate_up_N2F.is_contiguous()
    out = gate_up_N2F.new_empty(num_rows, width // 2)
    if num_rows:
        rows, block = tile_of(width // 2)
        grid = (triton.cdiv(num_rows, rows), triton.cdiv(width // 2, block))
        silu_mul_kernel[grid](gate_up_N2F, out, num_rows, F=width // 2, ROWS=rows, BLOCK=block, num_warps=NUM_WARPS)
    return out


def tile_of(intermediate_size: int) -> tuple[int, int]:
    """(rows, columns) of a program's tile.

    >>> tile_of(14336), tile_of(80)
    ((1, 2048), (16, 128))
    """
    block = min(triton.next_power_of_2(intermediate_size), _TILE)
    return _TILE // block, block
