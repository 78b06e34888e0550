"""y = x W^T + b for a few rows, read straight from the panels in which oneDNN keeps its prepacked weights.

With one to eight rows a product is a matter of reading the weights once, and the library's kernels, made for many rows,
read them at some 60 % of the machine's bandwidth. This one walks each panel from its start to its end. It needs no copy
of the weights: it finds out how the library laid them out by looking (`Panels.of`), and says None where it does not
recognise what it sees. Knows layouts and orders of summation; does not know which rows are whose.

    float32    [O / 64][I][64]           element (o, i) of panel o // 64 at row i, column o % 64
    bfloat16   [O / 32][I / 2][32][2]    pairs of neighbouring i side by side

The order of summation is the library's own, as far as it could be seen from outside: float32 products are
chains of fused multiply-adds over ``depth`` columns, whose sums are added up; bfloat16 products on AMX are what its
instruction says (see `simd.gemm_pairs`). Where that gives the library's bits, which numerics.py proves on each
shape, a row computed here is the same row as one computed among hundreds there.

O outputs, I inputs, N rows.
"""

from __future__ import annotations

import ctypes
import functools
import threading
from dataclasses import dataclass
from typing import Any

import torch
from numba import cfunc

from serve_app.kernels import openmp
from serve_app.kernels.openmp import FIRST, OPTIONS, SIGNATURE
from serve_app.kernels.simd import atomic_next, gemm_pairs, gemm_tile, load, load_i64, store, vector_add_bias

MAX_ROWS = 8
"""Beyond it the library is faster."""
ROW_TILE = 4
"""Rows whose sums are held in registers at once."""
FLOAT_PANEL = 64
PAIR_PANEL = 32
ITEMS_PER_THREAD = 4
"""Runs of panels that each thread gets if all are equally fast."""
DEPTHS = (1024, 512)
"""Columns that the library's float32 kernels sum up in one chain, as seen in oneDNN 3.x; the first is the usual one."""
_ALIGNMENT = 64
"""The library pads shapes that are not multiples of its tiles: those are left to it."""
_AHEAD = 4096
"""Bytes between what is in use and what is being prefetched."""


@dataclass(frozen=True)
class Panels:
    """One layer's weights as the library holds them. The packed tensor must outlive it."""

    address: int
    out_features: int
    in_features: int
    dtype: torch.dtype

    @classmethod
    def of(cls, packed: torch.Tensor, weight: torch.Tensor) -> Panels | None:
        """The panels of ``packed``, made by the library from ``weight`` [O, I]; None if they lie in another way.

        Three panels are compared with the weights, bit by bit. Reads no byte beyond the weights' own number.
        """
        out, inputs = weight.shape
        width = {torch.float32: FLOAT_PANEL, torch.bfloat16: PAIR_PANEL}.get(weight.dtype)
        if width is None or out % FLOAT_PANEL or inputs % _ALIGNMENT:
            return None
        try:
            address: int = torch.ops.mkldnn.data_ptr(packed)
        except (RuntimeError, AttributeError):  # a build without this function
            return None
        size = out * inputs * weight.element_size()
        memory = torch.frombuffer((ctypes.c_char * size).from_address(address), dtype=weight.dtype)
        shape = (-1, inputs, width) if weight.dtype == torch.float32 else (-1, inputs // 2, width, 2)
        panels = memory.view(shape)
        for i in {0, out // width // 2, out // width - 1}:
            rows = weight[i * width : (i + 1) * width]
            expected = rows.T if weight.dtype == torch.float32 else rows.view(width, -1, 2).transpose(0, 1)
            if not torch.equal(panels[i].view(torch.uint8), expected.contiguous().view(torch.uint8)):
                return None
        return cls(address, out, inputs, weight.dtype)


def product(x: torch.Tensor, panels: Panels, bias: torch.Tensor | None, depth: int) -> torch.Tensor:
    """x [N, I], N from 1 to MAX_ROWS, contiguous -> fresh [N, O], in x's dtype.

    ``depth``: columns of one chain (float32 only). Work items are runs of neighbouring panels.
    """
    num_rows = x.shape[0]
    assert 1 <= num_rows <= MAX_ROWS and x.is_contiguous() and x.dtype == panels.dtype and depth > 0
    y = torch.empty(num_rows, panels.out_features, dtype=x.dtype)
    is_float = x.dtype == torch.float32
    num_panels = panels.out_features // (FLOAT_PANEL if is_float else PAIR_PANEL)
    num_threads = torch.get_num_threads()
    per_item = -(-num_panels // (ITEMS_PER_THREAD * num_threads))
    scratch, stride = (None, 0) if is_float else _scratch(panels.in_features, num_threads, threading.get_ident())
    openmp.run(
        _kernel(is_float),
        -(-num_panels // per_item),
        x.data_ptr(),
        panels.address,
        0 if bias is None else bias.data_ptr(),
        y.data_ptr(),
        num_rows,
        panels.in_features,
        panels.out_features,
        depth,
        num_panels,
        per_item,
        0 if scratch is None else scratch.data_ptr(),
        stride,
    )
    return y


@functools.lru_cache(maxsize=32)
def _scratch(in_features: int, num_threads: int, caller: int) -> tuple[torch.Tensor, int]:
    """Per thread: x as float32 [MAX_ROWS, I], and the sums of one panel [ROW_TILE, 32]. ``caller``: a thread's id."""
    stride = -(-4 * (MAX_ROWS * in_features + ROW_TILE * PAIR_PANEL) // 4096) * 4096
    return torch.empty(num_threads * stride, dtype=torch.uint8), stride


@functools.cache
def _kernel(is_float: bool) -> Any:
    """Tiles are literals, so each number of rows has its own call. 256: bytes of a panel's row in float32."""
    if is_float:

        @cfunc(SIGNATURE, **OPTIONS)
        def few_rows_float(arguments: int) -> None:
            num_items = load_i64(arguments, 2)
            x = load_i64(arguments, FIRST)
            weights = load_i64(arguments, FIRST + 1)
            bias = load_i64(arguments, FIRST + 2)
            y = load_i64(arguments, FIRST + 3)
            num_rows = load_i64(arguments, FIRST + 4)
            inputs = load_i64(arguments, FIRST + 5)
            outputs = load_i64(arguments, FIRST + 6)
            depth = load_i64(arguments, FIRST + 7)
            num_panels = load_i64(arguments, FIRST + 8)
            per_item = load_i64(arguments, FIRST + 9)
            while True:
                item = atomic_next(arguments)
                if item >= num_items:
                    break
                for i in range(item * per_item, min(num_panels, (item + 1) * per_item)):
                    for row in range(0, num_rows, ROW_TILE):
                        rows = num_rows - row
                        c = y + 4 * (row * outputs + i * FLOAT_PANEL)
                        for start in range(0, inputs, depth):
                            a = x + 4 * (row * inputs + start)
                            b = weights + (i * inputs + start) * 256
                            d = min(depth, inputs - start)
                            if start == 0:
                                if rows >= 4:
                                    gemm_tile(a, inputs, b, 64, c, outputs, d, _AHEAD, 4, 4, 0, 0)
                                elif rows == 3:
                                    gemm_tile(a, inputs, b, 64, c, outputs, d, _AHEAD, 3, 4, 0, 0)
                                elif rows == 2:
                                    gemm_tile(a, inputs, b, 64, c, outputs, d, _AHEAD, 2, 4, 0, 0)
                                else:
                                    gemm_tile(a, inputs, b, 64, c, outputs, d, _AHEAD, 1, 4, 0, 0)
                            elif rows >= 4:
                                gemm_tile(a, inputs, b, 64, c, outputs, d, _AHEAD, 4, 4, 0, 2)
                            elif rows == 3:
                                gemm_tile(a, inputs, b, 64, c, outputs, d, _AHEAD, 3, 4, 0, 2)
                            elif rows == 2:
                                gemm_tile(a, inputs, b, 64, c, outputs, d, _AHEAD, 2, 4, 0, 2)
                            else:
                                gemm_tile(a, inputs, b, 64, c, outputs, d, _AHEAD, 1, 4, 0, 2)
                        if bias != 0:
                            for r in range(min(rows, ROW_TILE)):
                                at = c + 4 * r * outputs
                                vector_add_bias(at, bias + i * 256, at, 4, 0)

        return few_rows_float

    @cfunc(SIGNATURE, **OPTIONS)
    def few_rows_pairs(arguments: int) -> None:
        num_items = load_i64(arguments, 2)
        thread = atomic_next(arguments + 8)
        x = load_i64(arguments, FIRST)
        weights = load_i64(arguments, FIRST + 1)
        bias = load_i64(arguments, FIRST + 2)
        y = load_i64(arguments, FIRST + 3)
        num_rows = load_i64(arguments, FIRST + 4)
        inputs = load_i64(arguments, FIRST + 5)
        outputs = load_i64(arguments, FIRST + 6)
        num_panels = load_i64(arguments, FIRST + 8)
        per_item = load_i64(arguments, FIRST + 9)
        wide = load_i64(arguments, FIRST + 10) + thread * load_i64(arguments, FIRST + 11)
        c = wide + 4 * MAX_ROWS * inputs
        tiles = inputs // 32
        for k in range(num_rows * inputs):
            store(load(x, k, 1), wide, k, 0)
        while True:
            item = atomic_next(arguments)
            if item >= num_items:
                break
            for i in range(item * per_item, min(num_panels, (item + 1) * per_item)):
                b = weights + i * inputs * 64
                for row in range(0, num_rows, ROW_TILE):
                    rows = num_rows - row
                    a = wide + 4 * row * inputs
                    if rows >= 4:
                        gemm_pairs(a, inputs, b, 32, c, 32, tiles, _AHEAD, 4, 2)
                    elif rows == 3:
                        gemm_pairs(a, inputs, b, 32, c, 32, tiles, _AHEAD, 3, 2)
                    elif rows == 2:
                        gemm_pairs(a, inputs, b, 32, c, 32, tiles, _AHEAD, 2, 2)
                    else:
                        gemm_pairs(a, inputs, b, 32, c, 32, tiles, _AHEAD, 1, 2)
                    for r in range(min(rows, ROW_TILE)):
                        target = y + 2 * ((row + r) * outputs + i * PAIR_PANEL)
                        vector_add_bias(c + 128 * r, bias + i * 64 if bias != 0 else 0, target, 2, 1)

    return few_rows_pairs
