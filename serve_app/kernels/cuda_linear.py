"""CudaLinear: y = x W^T + b on a GPU: the library's product, or in deterministic mode ours. Knows no model."""

from __future__ import annotations

import torch
from torch.nn import functional

from serve_app.kernels.matmul import matmul


class CudaLinear:
    """One layer. ``weight``: [out, in]; ``bias``: [out] or None. Called with [N, in], returns fresh [N, out]."""

    num_padded_rows = 0

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None = None) -> None:
        self.out_features, self.in_features = weight.shape
        self.weight = weight.contiguous()
        self.bias = bias
        self.deterministic = False
        """A row's bits do not depend on the other rows (kernels/matmul.py). Whoever builds the model sets it."""

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        if self.deterministic:
            return matmul(x, self.weight, self.bias)
        return functional.linear(x, self.weight, self.bias)
