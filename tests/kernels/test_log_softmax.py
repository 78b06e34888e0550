"""The GPU's log-softmax, interpreted, against float64; a row's bits in any company."""

from __future__ import annotations

import math

import pytest
import torch

from serve_app.kernels.log_softmax import BLOCK, log_softmax, log_sum_exp, token_log_probs
from tests.kernels.rounding import DEVICE, DTYPES

VOCAB_SIZES = [1, 307, BLOCK, 2 * BLOCK + 1]


def make(num_rows: int, vocab_size: int, dtype: torch.dtype) -> torch.Tensor:
    """Rows of very different height, the largest logits late."""
    generator = torch.Generator().manual_seed(vocab_size)
    logits = 3 * torch.randn(num_rows, vocab_size, generator=generator) + torch.linspace(0, 5, vocab_size)
    return (logits + 40 * torch.randn(num_rows, 1, generator=generator)).to(DEVICE, dtype)


def test_worked_example() -> None:
    logits = torch.tensor([[0.0, math.log(3)]], device=DEVICE)
    assert log_sum_exp(logits).tolist() == pytest.approx([1.3863], abs=1e-4)
    assert log_softmax(logits)[0].tolist() == pytest.approx([-1.3863, -0.2877], abs=1e-4)
    assert token_log_probs(logits, torch.tensor([[1]], device=DEVICE)).tolist() == [[pytest.approx(-0.2877, abs=1e-4)]]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocab_size", VOCAB_SIZES)
def test_equals_float64(vocab_size: int, dtype: torch.dtype) -> None:
    logits = make(3, vocab_size, dtype)
    exact = torch.log_softmax(logits.double(), dim=1).float()
    ours = log_softmax(logits)
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours, exact, rtol=1e-6, atol=1e-5)
    tokens = torch.tensor([[0, vocab_size - 1], [vocab_size // 2] * 2, [vocab_size - 1, 0]], device=DEVICE)
    assert torch.equal(token_log_probs(logits, tokens), ours.gather(1, tokens))


def test_tokens_that_must_not_come() -> None:
    logits = make(2, 2 * BLOCK, torch.float32)
    logits[0, : BLOCK + 5] = -math.inf
    logits[1, BLOCK:] = -math.inf
    exact = torch.log_softmax(logits.double(), dim=1).float()
    torch.testing.assert_close(log_softmax(logits), exact, rtol=1e-6, atol=1e-5)


def test_a_row_with_nan_is_nan_and_the_others_are_not() -> None:
    logits = make(3, 2 * BLOCK, torch.float32)
    logits[1, 7] = math.nan
    ours = log_softmax(logits)
    assert ours[1].isnan().all()
    assert ours[[0, 2]].isfinite().all()


def test_a_rows_bits_do_not_depend_on_its_company() -> None:
    """Also not on the stride: rows of a wider buffer."""
    logits = make(5, BLOCK + 700, torch.float32)
    whole = log_softmax(logits)
    wide = torch.full((5, BLOCK + 900), math.nan, device=DEVICE)
    wide[:, : BLOCK + 700] = logits
    for rows in ([3], [4, 3, 0]):
        assert torch.equal(log_softmax(logits[rows]), whole[rows])
    assert torch.equal(log_softmax(wide[:, : BLOCK + 700]), whole)


def test_no_rows() -> None:
    assert log_softmax(torch.empty(0, 9, device=DEVICE)).shape == (0, 9)
    assert log_sum_exp(torch.empty(0, 9, device=DEVICE)).shape == (0,)
