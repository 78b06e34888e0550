"""For tests of Triton kernels: where they run, in which types, and how far two results lie apart. No tests.

With a GPU the tests of kernels/ run on it, without one in the interpreter, which computes bfloat16 wrongly.
"""

from __future__ import annotations

import pytest
import torch

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPES = [torch.float32, torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)]

_INTEGERS = {torch.float32: torch.int32, torch.float16: torch.int16, torch.bfloat16: torch.int16}


def ulps(ours: torch.Tensor, theirs: torch.Tensor) -> int:
    """The most numbers of their type that lie between two elements in the same place, plus one; 0: bits agree.

    >>> one = torch.tensor([1.0, -1.0])
    >>> ulps(one, one), ulps(one, torch.nextafter(one, torch.tensor(2.0)))
    (0, 1)
    """
    assert (ours.dtype, ours.shape) == (theirs.dtype, theirs.shape)
    assert torch.cat((ours, theirs)).isfinite().all()
    return int((_ordered(ours) - _ordered(theirs)).abs().max()) if ours.numel() else 0


def _ordered(x: torch.Tensor) -> torch.Tensor:
    """int64 that count the representable numbers from zero on."""
    integers = x.contiguous().view(_INTEGERS[x.dtype]).long()
    sign = -(1 << (8 * x.dtype.itemsize - 1))
    return torch.where(integers < 0, sign - integers, integers)
