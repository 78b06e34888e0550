"""Hidden states of a step -> what its pooled prompts need of them (serve_app.engine.pooling). Knows tensors; knows no plan.

part = pool(hidden_RE, kind)      on the device, where it waits for nothing
array = read(part, key)           on the host, once it has been copied there
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from serve_app.engine.pooling import FRACTION_BITS, MAX_VALUE, Pooled
from serve_app.engine.scheduler import Key
from serve_app.errors import StepFailedError

MAX_ROWS = 512
"""Taken at a time: four copies of them as float64 are all the memory that it needs."""


def pool(hidden_RE: torch.Tensor, kind: str) -> torch.Tensor:
    """last: float32 [E], the last row. mean: int64 [E + 1], the sums, and behind them how many values are not finite.

    No float is added to another, so the result does not depend on the order of the rows or the number of threads.
    """
    if kind == "last":
        return hidden_RE[-1].float()
    total = torch.zeros(hidden_RE.shape[1] + 1, dtype=torch.int64, device=hidden_RE.device)
    for part_RE in hidden_RE.split(MAX_ROWS):
        values_RE = part_RE.double()
        is_finite_RE = torch.isfinite(values_RE)
        values_RE = torch.where(is_finite_RE, values_RE, 0.0).clamp_(-MAX_VALUE, MAX_VALUE)
        total[:-1] += values_RE.mul_(2.0**FRACTION_BITS).round_().long().sum(0)
        total[-1] += (~is_finite_RE).sum()
    return total


def read(part: npt.NDArray[Any], key: Key) -> Pooled:
    """[E]. Raises StepFailedError naming the request if a hidden state was NaN or infinite."""
    if part.dtype == np.int64:
        part, num_bad = part[:-1], int(part[-1])
    else:
        num_bad = int(np.count_nonzero(~np.isfinite(part)))
    if num_bad:
        raise StepFailedError(
            f"request {key[0]} cannot be embedded: {num_bad} values of its hidden states are not finite"
        )
    return part
