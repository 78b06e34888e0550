"""find_gpu: which device an option means on this machine, and what to do where the wanted one is not there."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from serve_app.errors import ConfigurationError
from serve_app.runner import gpu
from serve_app.runner.cpu_device import CpuDevice
from serve_app.runner.gpu import CudaGpu, find_gpu
from tests.tiny_models import make_tiny_model
from tests.tiny_runs import make_runner


def pretend_cuda(patch: pytest.MonkeyPatch, *, capability: tuple[int, int] = (9, 0), is_available: bool = True) -> None:
    patch.setattr(torch.version, "cuda", "12.8")
    patch.setattr(torch.cuda, "is_available", lambda: is_available)
    patch.setattr(torch.cuda, "current_device", lambda: 0)
    patch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, 0))
    properties = SimpleNamespace(name="NVIDIA Made-up", major=capability[0], minor=capability[1])
    patch.setattr(torch.cuda, "get_device_properties", lambda _: properties)


def test_the_cpu_looks_for_none(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_cuda(monkeypatch)
    assert find_gpu("cpu") is None


def test_auto_takes_the_gpu_if_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_cuda(monkeypatch, is_available=False)
    assert find_gpu("auto") is None
    pretend_cuda(monkeypatch)
    for name in ("auto", "cuda"):
        found = find_gpu(name)
        assert isinstance(found, CudaGpu)
        assert (found.name, found.capability, found.kernels) == ("NVIDIA Made-up", (9, 0), "cuda")


def test_a_gpu_that_is_too_old(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    pretend_cuda(monkeypatch, capability=(7, 5))
    message = (
        r"NVIDIA Made-up has compute capability 7.5, and the kernels need 8.0 \(Ampere\) or later. Use device='cpu'"
    )
    with pytest.raises(ConfigurationError, match=message):
        find_gpu("cuda")
    assert find_gpu("auto") is None
    assert "Going on with the CPU" in caplog.text


@pytest.mark.parametrize(
    ("version", "visible", "message"),
    [
        (None, None, r"this torch \(\S+\) was built without CUDA. Install a CUDA build of torch, or use device='cpu'"),
        ("12.8", None, r"torch finds no NVIDIA GPU or driver \(does nvidia-smi list one\?\). Or use device='cpu'"),
        ("12.8", "3", "CUDA_VISIBLE_DEVICES is '3', which leaves no GPU that torch can use. Or"),
        ("12.8", "", r"CUDA_VISIBLE_DEVICES is '', .* \(under Ray: give the replica num_gpus: 1\)"),
    ],
    ids=["torch for CPUs", "no driver", "wrong index", "hidden by Ray"],
)
def test_no_gpu(version: str | None, visible: str | None, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_cuda(monkeypatch, is_available=False)
    monkeypatch.setattr(torch.version, "cuda", version)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    with pytest.raises(ConfigurationError, match=f"device is 'cuda'; {message}"):
        find_gpu("cuda")


def test_a_runner_without_a_gpu(tmp_path: Path) -> None:
    """On the machines that run this there is none; where there is one, tests/gpu say more."""
    directory = make_tiny_model(tmp_path, layers=1)
    if torch.cuda.is_available():
        return
    assert isinstance(make_runner(directory, device="auto").device, CpuDevice)
    with pytest.raises(ConfigurationError, match="device is 'cuda'; "):
        make_runner(directory, device="cuda")
    with pytest.raises(ConfigurationError, match="device is 'tpu'; it must be one of auto, cpu, cuda"):
        make_runner(directory, device="tpu")


def test_what_a_measured_run_took(monkeypatch: pytest.MonkeyPatch) -> None:
    """Peak of what the allocator held, less what it holds in the end; what is free once its buffers are given back."""
    pretend_cuda(monkeypatch)
    allocator = {"held": 50, "cached": 10, "peak": 0, "elsewhere": 7}

    def empty_cache() -> None:
        allocator["cached"] = 0

    def reset_peak() -> None:
        allocator["peak"] = allocator["held"] + allocator["cached"]

    def run() -> None:
        allocator["held"] += 5  # a library's workspace, which stays
        allocator["cached"] += 40  # buffers of the step
        allocator["elsewhere"] += 3  # a kernel was loaded
        allocator["peak"] = max(allocator["peak"], allocator["held"] + allocator["cached"])

    def info(_: Any) -> tuple[int, int]:
        return 1000 - allocator["held"] - allocator["cached"] - allocator["elsewhere"], 1000

    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "empty_cache", empty_cache)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", reset_peak)
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda: allocator["peak"])
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda: allocator["held"] + allocator["cached"])
    monkeypatch.setattr(torch.cuda, "mem_get_info", info)
    found = CudaGpu()
    assert found.memory() == (933, 1000)
    assert found.measure(run) == gpu.Measured(free=1000 - 55 - 10, activations=40)
