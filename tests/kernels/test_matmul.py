"""The deterministic product, interpreted: its values against float64, and a row's bits in any company and any place."""

from __future__ import annotations

import doctest

import pytest
import torch
from torch.nn import functional

from serve_app.kernels import matmul as matmul_module
from serve_app.kernels.cuda_linear import CudaLinear
from serve_app.kernels.matmul import matmul, matmul_config
from tests.kernels.rounding import DEVICE, DTYPES

EPS = {torch.float32: 2**-22, torch.float16: 2**-10, torch.bfloat16: 2**-7}


def make(
    num_rows: int, out: int, width: int, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    generator = torch.Generator().manual_seed(num_rows + out)
    x = torch.randn(num_rows, width, generator=generator)
    weight = torch.randn(out, width, generator=generator) / width**0.5
    return x.to(DEVICE, dtype), weight.to(DEVICE, dtype), torch.randn(out, generator=generator).to(DEVICE, dtype)


def cancelling(num_rows: int, out: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """x and a weight whose products are exactly 0, so that rounding alone is left: another order of the sum shows."""
    generator = torch.Generator().manual_seed(2)
    order = torch.randperm(width, generator=generator)
    half = width // 2
    x, weight = torch.zeros(num_rows, width), torch.zeros(out, width)
    for tensor, sign in ((x, 1.0), (weight, -1.0)):
        tensor[:, order[:half]] = torch.randn(len(tensor), half, generator=generator)
        tensor[:, order[half : 2 * half]] = sign * tensor[:, order[:half]]
    return x, weight


def test_worked_example() -> None:
    assert doctest.testmod(matmul_module) == (0, 1)


@pytest.mark.parametrize(
    ("num_rows", "out", "width", "has_bias"),
    [(1, 33, 64, False), (70, 75, 101, True)],
)
def test_float32_equals_float64(num_rows: int, out: int, width: int, has_bias: bool) -> None:
    check(num_rows, out, width, torch.float32, has_bias)


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize(
    ("num_rows", "out", "width", "has_bias"),
    [(1, 307, 129, True), (200, 96, 256, False), (17, 4100, 136, True), (3, 16400, 72, False)],
)
def test_equals_float64(dtype: torch.dtype, num_rows: int, out: int, width: int, has_bias: bool) -> None:
    check(num_rows, out, width, dtype, has_bias)


def check(num_rows: int, out: int, width: int, dtype: torch.dtype, has_bias: bool) -> None:
    x, weight, bias = make(num_rows, out, width, dtype)
    if not has_bias:
        bias = None
    y = matmul(x, weight, bias)
    assert (y.shape, y.dtype) == ((num_rows, out), dtype)
    exact = functional.linear(x.double(), weight.double(), None if bias is None else bias.double())
    torch.testing.assert_close(y.double(), exact, rtol=EPS[dtype], atol=4e-6)


@pytest.mark.parametrize(
    ("dtype", "class_of"),
    [
        (torch.float32, 70),
        (torch.float16, 70),
        (torch.float16, 4096),
        (torch.float16, 16384),
        *(pytest.param(torch.bfloat16, out, marks=pytest.mark.gpu) for out in (70, 4096, 16384)),
    ],
    ids=str,
)
def test_a_rows_bits_depend_on_neither_the_number_of_rows_nor_its_place(
    dtype: torch.dtype, class_of: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``class_of``: a weight of 70 rows runs with the tile of one of so many."""
    config = matmul_config(class_of, dtype, matmul_module._device(DEVICE)[0])
    monkeypatch.setattr(matmul_module, "matmul_config", lambda *of: config)
    width = 3 * config.block_k + 20
    x, weight = (tensor.to(DEVICE, dtype) for tensor in cancelling(200, 70, width))
    bias = torch.full((70,), 1e-7).to(DEVICE, dtype)
    whole = matmul(x, weight, bias)
    assert (whole != bias).float().mean() > 0.5, "rounding does not show"
    order = torch.randperm(200, generator=torch.Generator().manual_seed(3))
    for num_rows in (1, 2, 17, 64, 200):
        rows = order[:num_rows]
        assert torch.equal(matmul(x[rows], weight, bias), whole[rows])


def test_rows_past_the_last_are_not_written() -> None:
    x, weight, _ = make(5, 40, 64, torch.float32)
    y = torch.full((8, 40), torch.nan, device=DEVICE)
    tile = {"BLOCK_M": 32, "BLOCK_N": 32, "BLOCK_K": 32, "GROUP_M": 2}
    matmul_module.matmul_kernel[(1,)](x, weight, weight, y, 5, 40, 64, HAS_BIAS=False, EVEN_K=True, **tile)
    assert y[:5].isfinite().all()
    assert y[5:].isnan().all()


def test_no_rows() -> None:
    assert matmul(torch.empty(0, 16, device=DEVICE), torch.empty(5, 16, device=DEVICE)).shape == (0, 5)


@pytest.mark.parametrize("capability", [(8, 0), (8, 9), (9, 0), (10, 0), (12, 0)], ids=str)
@pytest.mark.parametrize("out", [1, 4095, 4096, 16383, 16384, 152064])
def test_tiles_fit_the_shared_memory(out: int, capability: tuple[int, int]) -> None:
    config = matmul_config(out, torch.bfloat16, capability)
    num_bytes = 2 * (config.block_m + config.block_n) * config.block_k * config.num_stages
    assert num_bytes < {8: 163 if capability == (8, 0) else 99, 9: 227, 10: 227, 12: 99}[capability[0]] * 1024
    assert config.num_stages >= 2
    assert config.block_m % 64 == 0


@pytest.mark.parametrize("has_bias", [True, False], ids=["bias", "no bias"])
def test_the_layer_runs_the_librarys_product_or_ours(has_bias: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight, bias = make(9, 30, 64, torch.float32)
    if not has_bias:
        bias = None
    layer = CudaLinear(weight, bias)
    assert (layer.out_features, layer.in_features, layer.num_padded_rows) == (30, 64, 0)
    assert torch.equal(layer(x), functional.linear(x, weight, bias))
    layer.deterministic = True
    monkeypatch.setattr(functional, "linear", None)
    assert torch.equal(layer(x), matmul(x, weight, bias))
