"""From the hidden states of a prompt to its vector. Knows sums and lengths; knows no model, no step.

A runner tells of each chunk of a pooled prompt one array (`engine.Step.embeddings`):

    last    float32 [E]   the hidden state of the prompt's last token, with the chunk that has it
    mean    int64 [E]     the sum of the chunk's hidden states, each rounded to a multiple of 2 ** -FRACTION_BITS

A sum of integers is exact, so the mean of a prompt does not depend on how its chunks were cut. The resolution, 2.3e-10, is
below that of float32 where a value is above 0.004. What follows the final norm is of order 1; a value beyond MAX_VALUE
counts as that, which leaves room for nearly 2**19 tokens.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt

from serve_app.engine.request import PoolingParams

FRACTION_BITS = 32
MAX_VALUE = 4096.0

Pooled = npt.NDArray[Any]
"""[E]: see above."""


def vector_of(pooled: Pooled, params: PoolingParams, num_tokens: int) -> bytes:
    """The vector, float32 and little-endian, of a prompt of ``num_tokens``. Computed in float64, rounded once.

    >>> import numpy
    >>> numpy.frombuffer(vector_of(numpy.array([3.0, -4.0], numpy.float32), PoolingParams(), 7), "<f4").tolist()
    [0.6000000238418579, -0.800000011920929]
    """
    vector = pooled.astype(np.float64)
    if params.kind == "mean":
        vector *= 0.5**FRACTION_BITS / num_tokens
    vector = vector[: params.dimensions]
    if params.normalize:
        length = math.sqrt(math.fsum((vector * vector).tolist()))
        vector /= length or 1.0
    return vector.astype("<f4").tobytes()
