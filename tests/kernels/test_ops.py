"""Choosing the ops of a device: what there is, and what a machine without it says."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest
import torch
import triton

from serve_app.errors import ConfigurationError
from serve_app.kernels import ops
from tests.kernels.rounding import DEVICE


@pytest.mark.parametrize("name", ["cpu", "reference", "cuda"])
def test_every_choice_has_every_op(name: str) -> None:
    chosen = ops.select(name)
    for op in (op for op in vars(ops.Ops) if not op.startswith("_")):
        assert callable(getattr(chosen, op)), op
    device = DEVICE if name == "cuda" else "cpu"
    layer = chosen.linear(torch.ones(3, 16, device=device), torch.zeros(3, device=device))
    assert (layer.out_features, layer.in_features, layer.num_padded_rows) == (3, 16, 0)
    assert layer(torch.ones(2, 16, device=device)).tolist() == [[16.0] * 3] * 2


def test_an_unknown_one() -> None:
    with pytest.raises(ConfigurationError, match="device is 'tpu'; there are kernels for cpu, reference, cuda"):
        ops.select("tpu")


def test_without_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.util.find_spec

    def find_spec(name: str, *rest: Any) -> Any:
        return None if name == "triton" else real(name, *rest)

    monkeypatch.setattr(importlib.util, "find_spec", find_spec)
    with pytest.raises(ConfigurationError, match="triton is not installed"):
        ops.select("cuda")


def test_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(triton.knobs.runtime, "interpret", False)
    with pytest.raises(ConfigurationError, match="finds no CUDA device"):
        ops.select("cuda")
