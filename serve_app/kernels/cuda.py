"""The ops on a GPU: each in a file of its own, gathered under the names of `ops.Ops`. Knows nothing else."""

from __future__ import annotations

import torch

from serve_app.kernels.cuda_linear import CudaLinear
from serve_app.kernels.norms import add_rms_norm, rms_norm
from serve_app.kernels.qk_norm_rope_write import qk_norm_rope_write
from serve_app.kernels.ragged_attention import ragged_attention
from serve_app.kernels.silu_mul import silu_mul

__all__ = ["add_rms_norm", "linear", "qk_norm_rope_write", "ragged_attention", "rms_norm", "silu_mul"]


def linear(weight: torch.Tensor, bias: torch.Tensor | None = None) -> CudaLinear:
    """See `reference.linear`; its field ``deterministic`` says whose product it runs."""
    return CudaLinear(weight, bias)
