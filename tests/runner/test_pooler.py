"""Sums of hidden states are exact: the same however the rows are cut, ordered, and summed."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from serve_app.engine.pooling import FRACTION_BITS, MAX_VALUE
from serve_app.errors import StepFailedError
from serve_app.runner import pooler

KEY = ("a", 0)


def sums(rows: torch.Tensor) -> np.ndarray:  # type: ignore[type-arg]
    return pooler.read(pooler.pool(rows, "mean").numpy(), KEY)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_sum_does_not_depend_on_the_cut(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    rows = (torch.randn(71, 33) * torch.logspace(-4, 3, 33)).to(dtype)
    whole = sums(rows)
    for cut in ((71,), (1, 70), (16, 16, 16, 23), (1,) * 71):
        assert sum(sums(part) for part in rows.split(cut)).tolist() == whole.tolist()  # type: ignore[union-attr]
    assert sums(rows.flip(0)).tolist() == whole.tolist()
    exact = rows.double().sum(0).numpy()
    assert np.allclose(whole * 0.5**FRACTION_BITS, exact, rtol=1e-7, atol=71 * 0.5**FRACTION_BITS)


def test_rows_beyond_a_part_are_summed_too() -> None:
    rows = torch.ones(2 * pooler.MAX_ROWS + 3, 2)
    rows[-1, 1] = -5.0
    num = len(rows)
    assert sums(rows).tolist() == [num << FRACTION_BITS, (num - 6) << FRACTION_BITS]


def test_floats_would_depend_on_it() -> None:
    """What the integers are for."""
    torch.manual_seed(0)
    rows = torch.randn(71, 33)
    assert not torch.equal(rows.sum(0), rows[:20].sum(0) + rows[20:].sum(0))


def test_the_last_row_as_float32() -> None:
    rows = torch.tensor([[9.0, 9.0], [1.5, -2.25]], dtype=torch.bfloat16)
    part = pooler.pool(rows, "last")
    assert part.dtype == torch.float32
    assert pooler.read(part.numpy(), KEY).tolist() == [1.5, -2.25]


def test_half_a_million_of_the_largest_fit() -> None:
    rows = torch.tensor([[1e30, -1e30]])
    (most, least) = sums(rows).tolist()
    assert (most, least) == (MAX_VALUE * 2**FRACTION_BITS, -MAX_VALUE * 2**FRACTION_BITS)
    assert most * (2**19 - 1) < 2**63


@pytest.mark.parametrize("kind", ["last", "mean"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_is_one_requests_failure(kind: str, value: float) -> None:
    rows = torch.ones(3, 4)
    rows[2, 1] = value
    with pytest.raises(StepFailedError, match="request a cannot be embedded: 1 values of its hidden states"):
        pooler.read(pooler.pool(rows, kind).numpy(), KEY)
