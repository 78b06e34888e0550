"""The operations a model is written in, one signature for every implementation. Chosen once, by device.

select("cpu")         kernels/cpu.py, numba on torch's threads
select("reference")   kernels/reference.py, the oracle: slow, for tests
select("cuda")        kernels/cuda.py, Triton; with TRITON_INTERPRET=1 it runs, slowly, on CPU tensors
"""

from __future__ import annotations

import importlib
import importlib.util
from typing import Protocol, cast

import torch

from serve_app.errors import ConfigurationError
from serve_app.kernels.metadata import AttentionMetadata

_MODULES = {
    "cpu": "serve_app.kernels.cpu",
    "reference": "serve_app.kernels.reference",
    "cuda": "serve_app.kernels.cuda",
}


class LinearLayer(Protocol):
    """y = x W^T + b, with the weight kept in whatever form the device likes. Called with [N, in], returns fresh [N, out]."""

    out_features: int
    in_features: int
    num_padded_rows: int
    """Rows computed and thrown away since the start."""

    def __call__(self, x: torch.Tensor) -> torch.Tensor: ...


class Ops(Protocol):
    """See kernels/reference.py for what each computes, with an example."""

    def linear(self, weight: torch.Tensor, bias: torch.Tensor | None = None) -> LinearLayer: ...

    def ragged_attention(
        self,
        q_NHD: torch.Tensor,
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
        metadata: AttentionMetadata,
        *,
        scale: float,
        sliding_window: int = 0,
        soft_cap: float = 0.0,
    ) -> torch.Tensor: ...

    def qk_norm_rope_write(
        self,
        qkv: torch.Tensor,
        table: torch.Tensor,
        positions: torch.Tensor,
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
        slot_mapping: torch.Tensor,
        *,
        q_norm: torch.Tensor | None = None,
        k_norm: torch.Tensor | None = None,
        eps: float = 0.0,
    ) -> torch.Tensor: ...

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor: ...

    def add_rms_norm(
        self, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
    ) -> torch.Tensor: ...

    def silu_mul(self, gate_up: torch.Tensor) -> torch.Tensor: ...


def select(name: str) -> Ops:
    """The implementation for a device type.

    Raises ConfigurationError: it is none of those there are; or it is "cuda", and Triton or a CUDA device is missing.
    """
    if name not in _MODULES:
        raise ConfigurationError(f"device is {name!r}; there are kernels for {', '.join(_MODULES)}")
    if name == "cuda":
        _check_cuda()
    return cast(Ops, importlib.import_module(_MODULES[name]))


def _check_cuda() -> None:
    if importlib.util.find_spec("triton") is None:
        raise ConfigurationError("device is 'cuda', but triton is not installed; torch's CUDA builds bring it along")
    import triton

    if not (torch.cuda.is_available() or triton.knobs.runtime.interpret):
        raise ConfigurationError(
            f"device is 'cuda', but torch {torch.__version__} finds no CUDA device (TRITON_INTERPRET=1 would interpret"
            " the kernels on the CPU, for tests)"
        )
