"""The GPU's gate, interpreted, against its twin."""

from __future__ import annotations

import doctest

import pytest
import torch

from serve_app.kernels import reference, silu_mul as silu_mul_module
from serve_app.kernels.silu_mul import silu_mul
from tests.kernels.rounding import DEVICE, DTYPES, ulps

ULPS = {torch.float32: 32, torch.float16: 1, torch.bfloat16: 1}


def test_worked_examples() -> None:
    assert doctest.testmod(silu_mul_module) == (0, 1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("num_rows", "width"), [(1, 1), (19, 75), (2, 896), (3, 2500), (1, 14336)])
def test_equals_the_oracle(num_rows: int, width: int, dtype: torch.dtype) -> None:
    gate_up = 4 * torch.randn(num_rows, 2 * width, generator=torch.Generator().manual_seed(0))
    gate_up = gate_up.to(DEVICE, dtype)
    ours = silu_mul(gate_up)
    assert ours.dtype == dtype
    assert ours.shape == (num_rows, width)
    assert ulps(ours, reference.silu_mul(gate_up)) <= ULPS[dtype]


def test_gates_far_from_zero() -> None:
    gates = torch.tensor([-1000.0, -100.0, -20.0, 0.0, 20.0, 1000.0])
    ours = silu_mul(torch.cat((gates, torch.ones(6)))[None].to(DEVICE)).cpu()
    torch.testing.assert_close(ours[0], torch.tensor([0.0, 0.0, -4.1e-8, 0.0, 20.0, 1000.0]), atol=1e-8, rtol=1e-6)


def test_a_rows_bits_do_not_depend_on_its_company() -> None:
    gate_up = torch.randn(21, 150, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    whole = silu_mul(gate_up)
    for rows in ([20], [3, 20, 1]):
        assert torch.equal(silu_mul(gate_up[rows]), whole[rows])


def test_no_rows() -> None:
    assert silu_mul(torch.empty(0, 12, device=DEVICE)).shape == (0, 6)
