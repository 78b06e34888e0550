"""The GPU's RMSNorm, interpreted, against its twin; the bits of a row alone, in company and elsewhere."""

from __future__ import annotations

import doctest

import pytest
import torch

from serve_app.kernels import norms, reference
from tests.kernels import rounding
from tests.kernels.rounding import DEVICE, DTYPES, ulps

EPS = 1e-6
ULPS = {torch.float32: 16, torch.float16: 1, torch.bfloat16: 1}
SHAPES = [(1, 1), (5, 48), (17, 96), (3, 768), (2, 1000), (2, 2560), (1, 4096)]


def make(num_rows: int, hidden: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x, a residual of much larger size, as a model's is, and a weight."""
    generator = torch.Generator().manual_seed(0)
    x, residual = (torch.randn(num_rows, hidden, generator=generator) for _ in range(2))
    weight = 1 + 0.3 * torch.randn(hidden, generator=generator)
    return x.to(DEVICE, dtype), (30 * residual).to(DEVICE, dtype), weight.to(DEVICE, dtype)


def test_worked_examples() -> None:
    assert doctest.testmod(norms) == (0, 1)
    assert doctest.testmod(rounding) == (0, 2)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("num_rows", "hidden"), SHAPES)
def test_equals_the_oracle(num_rows: int, hidden: int, dtype: torch.dtype) -> None:
    x, residual, weight = make(num_rows, hidden, dtype)
    ours = norms.rms_norm(x, weight, EPS)
    assert ours.dtype == dtype
    assert ulps(ours, reference.rms_norm(x, weight, EPS)) <= ULPS[dtype]

    kept, theirs = residual.clone(), residual.clone()
    ours = norms.add_rms_norm(x, kept, weight, EPS)
    expected = reference.add_rms_norm(x, theirs, weight, EPS)
    assert torch.equal(kept, theirs)
    assert not torch.equal(kept, residual)
    assert ulps(ours, expected) <= ULPS[dtype]


def test_the_norm_is_that_of_the_rounded_sum() -> None:
    """2048 + 1 is 2048 in float16: were the sum not rounded first, the norm of (2048 + 1, 1) would be another."""
    x, residual = torch.tensor([[[1.0, 0.0]], [[2048.0, 1.0]]], dtype=torch.float16, device=DEVICE)
    weight = torch.tensor([2048.0, 2048.0], dtype=torch.float16, device=DEVICE)
    rounded_sum = residual.clone()
    ours = norms.add_rms_norm(x, residual, weight, EPS)
    assert torch.equal(residual, rounded_sum)
    assert torch.equal(ours, reference.rms_norm(rounded_sum, weight, EPS))


@pytest.mark.parametrize("hidden", [96, 1100])
def test_a_rows_bits_do_not_depend_on_its_company(hidden: int) -> None:
    x, residual, weight = make(11, hidden, torch.float32)
    whole_residual = residual.clone()
    whole = norms.add_rms_norm(x, whole_residual, weight, EPS)
    for rows in ([7], [10, 0, 7], [3, 7, 7, 9, 1, 0, 2, 4, 5]):
        part_residual = residual[rows]
        part = norms.add_rms_norm(x[rows], part_residual, weight, EPS)
        assert torch.equal(part, whole[rows])
        assert torch.equal(part_residual, whole_residual[rows])


def test_no_rows() -> None:
    x, weight = torch.empty(0, 48, device=DEVICE), torch.ones(48, device=DEVICE)
    assert norms.rms_norm(x, weight, EPS).shape == (0, 48)
    assert norms.add_rms_norm(x, x.clone(), weight, EPS).shape == (0, 48)


def test_the_widest_row() -> None:
    assert norms.tile_of(norms.MAX_HIDDEN) == (1, 32768, 16)
    with pytest.raises(AssertionError, match="32769"):
        norms.tile_of(norms.MAX_HIDDEN + 1)
