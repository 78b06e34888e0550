"""The vector primitives: exp against float64, rounding against torch, tiles against the sums they stand for."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from numba import njit

from serve_app.kernels import simd
from serve_app.kernels.simd import DTYPE_CODES, LANES

CODES = {getattr(torch, name): code for name, code in DTYPE_CODES.items()}
NARROW = [torch.bfloat16, torch.float16]


@njit
def exp_sum(address: int, num_vectors: int, shift: float) -> float:
    return simd.vector_exp_sum(address, num_vectors, np.float32(shift))


@njit
def largest(address: int, num_vectors: int) -> float:
    return simd.vector_max(address, num_vectors)


def exps(x: np.ndarray, shift: float = 0.0) -> tuple[np.ndarray, float]:
    """exp(x - shift) of any number of values, and the sum of their vectors."""
    padded = np.full(-(-len(x) // LANES) * LANES, -np.inf, dtype=np.float32)
    padded[: len(x)] = x
    total = exp_sum(padded.ctypes.data, len(padded) // LANES, shift)
    return padded[: len(x)], total


def test_exp_is_accurate() -> None:
    x = np.concatenate((np.linspace(-87, 88, 40_001), np.linspace(-1e-3, 1e-3, 1001), [0.0, -0.0])).astype(np.float32)
    y, _ = exps(x)
    exact = np.exp(x.astype(np.float64))
    assert np.max(np.abs(y - exact) / exact) < 2e-7
    assert exps(np.float32([0.0]))[0][0] == 1.0


def test_exp_at_the_edges() -> None:
    y, _ = exps(np.float32([-np.inf, -1e30, -87.001, -86.9, 88.5, 1e30, np.inf, np.nan]))
    assert y[:3].tolist() == [0.0, 0.0, 0.0]
    assert y[3] == pytest.approx(math.exp(-86.9), rel=2e-6)
    assert y[4] == y[5] == y[6] == exps(np.float32([88.0]))[0][0]
    assert np.isnan(y[7])


def test_exp_sum_shifts_and_sums() -> None:
    x = np.random.default_rng(0).normal(size=100).astype(np.float32)
    y, total = exps(x, 1.5)
    exact = np.exp(x.astype(np.float64) - 1.5)
    np.testing.assert_allclose(y, exact, rtol=3e-7)
    assert total == pytest.approx(exact.sum(), rel=1e-6)


@pytest.mark.parametrize("num", [1, 15, 16, 17, 200])
def test_appended_zeros_leave_the_bits_of_a_sum(num: int) -> None:
    x = np.random.default_rng(num).normal(size=num).astype(np.float32)
    _, total = exps(x)
    for extra in (1, 16, 240):
        _, again = exps(np.concatenate((x, np.full(extra, -np.inf, dtype=np.float32))))
        assert np.float32(again).tobytes() == np.float32(total).tobytes()


def test_max() -> None:
    x = np.random.default_rng(1).normal(size=64).astype(np.float32)
    assert largest(x.ctypes.data, 4) == x.max()
    x[[3, 40]] = np.nan
    assert largest(x.ctypes.data, 4) == np.nanmax(x)
    x[:] = -np.inf
    assert largest(x.ctypes.data, 4) == -np.inf


# ---- element types --------------------------------------------------------------------------------------------------


def copier(code: int) -> Callable[[int, int, int], None]:
    """float32 -> an element type, one by one."""

    @njit
    def copy(source: int, target: int, num: int) -> None:
        for i in range(num):
            simd.store(simd.load(source, i, 0), target, i, code)

    return copy  # type: ignore[no-any-return]


def vector_copier(code: int) -> Callable[[int, int, int], None]:
    """The same by vectors: y := y + 0 widens, and rounds again."""

    @njit
    def copy(zeros: int, values: int, num_vectors: int) -> None:
        simd.vector_add(zeros, values, num_vectors, code)

    return copy  # type: ignore[no-any-return]


def telling_floats(dtype: torch.dtype) -> torch.Tensor:
    """Every value of the narrow type, the middles between neighbours (ties) and their neighbours in float32."""
    every = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(dtype).float()
    finite = every[every.isfinite()].sort().values
    middles = ((finite[1:].double() + finite[:-1].double()) / 2).float()
    around = [torch.nextafter(middles, torch.full_like(middles, side)) for side in (-torch.inf, torch.inf)]
    special = torch.tensor(
        [torch.inf, -torch.inf, torch.nan, -torch.nan, 0.0, -0.0, 1e-45, -1e-45, 3.4e38, 65519.996, 65520.0]
    )
    payload = torch.tensor([0x7F800001, 0x7FFFFFFF, -1], dtype=torch.int32).view(torch.float32)  # NaNs
    return torch.cat((finite, middles, *around, special, payload))


@pytest.mark.parametrize("dtype", NARROW, ids=str)
def test_stores_round_to_nearest_even(dtype: torch.dtype) -> None:
    x = telling_floats(dtype)
    out = torch.zeros(len(x), dtype=dtype)
    copier(CODES[dtype])(x.data_ptr(), out.data_ptr(), len(x))
    expected = x.to(dtype)
    assert torch.equal(out.isnan(), x.isnan())
    known = ~x.isnan()
    assert torch.equal(out[known].view(torch.int16), expected[known].view(torch.int16))
    assert expected[known].isinf().sum() > 2  # also what overflows


@pytest.mark.parametrize("dtype", NARROW, ids=str)
def test_vectors_widen_and_round_like_single_elements(dtype: torch.dtype) -> None:
    """Sums of two values: most of them are not representable."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(-(2**15), 2**15, (1 << 14,), generator=generator, dtype=torch.int16).view(dtype)
    y = torch.randint(-(2**15), 2**15, (1 << 14,), generator=generator, dtype=torch.int16).view(dtype)
    expected = (x.float() + y.float()).to(dtype)
    vector_copier(CODES[dtype])(x.data_ptr(), y.data_ptr(), len(x) // LANES)
    assert torch.equal(y.isnan(), expected.isnan())
    known = ~expected.isnan()
    assert known.sum() > 10_000
    assert torch.equal(y[known].view(torch.int16), expected[known].view(torch.int16))


@pytest.mark.parametrize("dtype", list(CODES), ids=str)
def test_loads_widen_exactly(dtype: torch.dtype) -> None:
    code = CODES[dtype]

    @njit
    def widen(source: int, target: int, num: int) -> None:
        for i in range(num):
            simd.store(simd.load(source, i, code), target, i, 0)

    x = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(torch.bfloat16).to(dtype)
    if dtype != torch.float32:
        x = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(dtype)
    out = torch.zeros(len(x))
    widen(x.data_ptr(), out.data_ptr(), len(x))
    known = ~x.isnan()
    assert torch.equal(out.isnan(), ~known)
    assert torch.equal(out[known].view(torch.int32), x[known].float().view(torch.int32))


# ---- tiles ----------------------------------------------------------------------------------------------------------


def gemm(rows: int, vectors: int, code: int, accumulate: int) -> Callable[..., None]:
    @njit
    def run(a: int, lda: int, b: int, ldb: int, c: int, ldc: int, depth: int, ahead: int) -> None:
        simd.gemm_tile(a, lda, b, ldb, c, ldc, depth, ahead, rows, vectors, code, accumulate)

    return run  # type: ignore[no-any-return]


def product(kernel: Callable[..., None], a: torch.Tensor, b: torch.Tensor, c: torch.Tensor, depth: int) -> torch.Tensor:
    kernel(
        a.data_ptr(), a.stride(0), b.data_ptr(), b.stride(0), c.data_ptr(), c.stride(0), depth, 1 << 40
    )  # a prefetch may miss
    return c


@pytest.mark.parametrize(
    ("rows", "vectors", "dtype", "accumulate"),
    [(4, 4, torch.float32, 0), (4, 2, torch.bfloat16, 1), (4, 1, torch.float16, 1), (1, 1, torch.float32, 1)],
    ids=str,
)
def test_gemm_tile(rows: int, vectors: int, dtype: torch.dtype, accumulate: int) -> None:
    """Against float64; around the tile nothing is read (NaN) or written."""
    kernel = gemm(rows, vectors, CODES[dtype], accumulate)
    generator = torch.Generator().manual_seed(0)
    width = vectors * LANES
    for depth in (0, 1, 2, 17):
        a = torch.full((rows, depth + 3), torch.nan)
        a[:, :depth] = torch.randn(rows, depth, generator=generator)
        b = torch.full((depth + 2, width + 5), torch.nan, dtype=dtype)
        b[:depth, :width] = torch.randn(depth, width, generator=generator).to(dtype)
        c = torch.full((rows + 1, width + 7), 9.0)
        c[:rows, :width] = torch.randn(rows, width, generator=generator)
        expected = c.double()
        tile = a[:, :depth].double() @ b[:depth, :width].double()
        expected[:rows, :width] = expected[:rows, :width] * accumulate + tile
        torch.testing.assert_close(product(kernel, a, b, c, depth).double(), expected, rtol=1e-6, atol=1e-5)


def test_the_bits_of_a_cell_do_not_depend_on_the_tile() -> None:
    """One chain of fused multiply-adds over depth, however many rows and columns run side by side, or how it is cut."""
    generator = torch.Generator().manual_seed(3)
    a, b = torch.randn(4, 53, generator=generator), torch.randn(53, 64, generator=generator)
    outs: dict[Any, torch.Tensor] = {}
    for rows, vectors in ((4, 4), (4, 1), (1, 4), (2, 2)):
        c = torch.zeros(4, 64)
        kernel = gemm(rows, vectors, 0, 1)
        for row in range(0, 4, rows):
            for column in range(0, 64, vectors * LANES):
                for start, end in ((0, 20), (20, 53)):
                    kernel(
                        a[row:, start:].data_ptr(),
                        53,
                        b[start:, column:].data_ptr(),
                        64,
                        c[row:, column:].data_ptr(),
                        64,
                        end - start,
                        0,
                    )
        outs[rows, vectors] = c
    whole = product(gemm(4, 4, 0, 0), a, b, torch.full((4, 64), torch.nan), 53)
    for out in outs.values():
        assert torch.equal(out.view(torch.int32), whole.view(torch.int32))
    chain = 0.0
    for k in range(53):  # float64 products are exact, so rounding the sum to float32 is the fused operation
        chain = float(np.float32(float(a[2, k]) * float(b[k, 33]) + chain))
    assert chain == pytest.approx(float(whole[2, 33]), rel=1e-6)
