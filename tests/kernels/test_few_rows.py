"""few_rows: the same numbers as a plain product, in the documented order of summation, from the library's own memory."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from serve_app.kernels import few_rows
from serve_app.kernels.few_rows import DEPTHS, MAX_ROWS, Panels
from serve_app.kernels.linear import Linear

SHAPES = [(64, 64), (192, 128), (64, 1088), (320, 2112)]
"""Outputs and inputs; the last two are deeper than one chain."""


def layer_of(out: int, inputs: int, dtype: torch.dtype, bias: bool = False) -> tuple[Linear, torch.Tensor]:
    generator = torch.Generator().manual_seed(out + inputs)
    weight = torch.randn(out, inputs, generator=generator).to(dtype)
    layer = Linear(weight, torch.randn(out, generator=generator).to(dtype) if bias else None)
    if layer.panels is None:
        pytest.skip("the library lays these weights out in a way that few_rows.py does not read on this processor")
    return layer, weight


def chain(x: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """[N, I], [O, I] float32 -> [N, O]: for each element one chain of fused multiply-adds from 0.

    A product of two float32 is exact in float64; the sum with a float32 is rounded to 53 bits and then to 24, which
    differs from one rounding only if the first one lands on a tie of the second: so rarely that the seeds avoid it.
    """
    total = np.zeros((len(x), len(weight)), np.float32)
    for i in range(x.shape[1]):
        product = x[:, i, None].astype(np.float64) * weight[None, :, i].astype(np.float64)
        total = (total.astype(np.float64) + product).astype(np.float32)
    return total


def in_documented_order(x: torch.Tensor, weight: torch.Tensor, depth: int) -> torch.Tensor:
    a, b = x.float().numpy(), weight.float().numpy()
    total = np.zeros((len(a), len(b)), np.float32)
    if x.dtype == torch.float32:
        for start in range(0, a.shape[1], depth):
            total += chain(a[:, start : start + depth], b[:, start : start + depth])
    else:
        for start in range(0, a.shape[1], 32):
            part = slice(start, start + 32)
            total += chain(a[:, part][:, ::2], b[:, part][:, ::2]) + chain(a[:, part][:, 1::2], b[:, part][:, 1::2])
    return torch.from_numpy(total)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("out", "inputs"), SHAPES)
def test_order_of_summation(out: int, inputs: int, dtype: torch.dtype) -> None:
    layer, weight = layer_of(out, inputs, dtype)
    x = torch.randn(MAX_ROWS, inputs, generator=torch.Generator().manual_seed(1)).to(dtype)
    for num_rows in range(1, MAX_ROWS + 1):
        for depth in DEPTHS:
            got = layer.run_few(x[:num_rows], depth)
            assert got.dtype == dtype
            assert torch.equal(got, in_documented_order(x[:num_rows], weight, depth).to(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("num_threads", [1, 2])
def test_bias_threads_and_neighbours(dtype: torch.dtype, num_threads: int) -> None:
    layer, weight = layer_of(320, 192, dtype, bias=True)
    assert layer.bias is not None
    x = torch.randn(MAX_ROWS, 192).to(dtype)
    expected = (in_documented_order(x, weight, DEPTHS[0]) + layer.bias.float()).to(dtype)
    torch.set_num_threads(num_threads)
    try:
        for start, end in ((0, 1), (0, 8), (3, 8), (2, 5), (7, 8)):
            assert torch.equal(layer(x[start:end].contiguous()), expected[start:end])
    finally:
        torch.set_num_threads(1)


def test_more_rows_go_to_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, _ = layer_of(64, 64, torch.float32)
    seen: list[int] = []
    real = few_rows.product
    monkeypatch.setattr(few_rows, "product", lambda x, *rest: (seen.append(len(x)), real(x, *rest))[1])
    for num_rows in (0, 1, MAX_ROWS, MAX_ROWS + 1):
        assert layer(torch.randn(num_rows, 64)).shape == (num_rows, 64)
    assert seen == [1, MAX_ROWS]


@pytest.mark.parametrize(("out", "inputs"), [(48, 64), (64, 48), (100, 96)])
def test_padded_layouts_are_left_alone(out: int, inputs: int) -> None:
    assert Linear(torch.randn(out, inputs)).panels is None


def test_another_layout_is_not_taken_for_ours() -> None:
    """The packed memory of other weights, and of weights that differ in one place of the last panel."""
    layer, weight = layer_of(192, 64, torch.float32)
    assert Panels.of(layer._weight, weight) is not None
    assert Panels.of(layer._weight, torch.randn(192, 64)) is None
    touched = weight.clone()
    touched[-1, -1] += 1
    assert Panels.of(layer._weight, touched) is None
    assert Panels.of(layer._weight, weight.half()) is None
