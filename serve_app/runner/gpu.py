"""The GPU itself, as far as the runner touches it: memory, pinned buffers, events, graphs. Knows CUDA; knows no model.

A seam: tests put one here that computes on CPU tensors, so everything above it runs without a card.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch

from serve_app.errors import ConfigurationError
from serve_app.logs import get_logger
from serve_app.runner.cuda_graphs import Graph
from serve_app.runner.packed_batch import Event

logger = get_logger(__name__)

MIN_CAPABILITY = (8, 0)
"""Ampere: bfloat16, asynchronous copies, and the tile shapes of kernels/ragged_attention.py."""


class Measured(NamedTuple):
    free: int
    """Bytes free on the device afterwards, with all buffers given back."""
    activations: int
    """Bytes that were taken and given back."""


class Gpu(Protocol):
    device: torch.device
    name: str
    capability: tuple[int, int]
    kernels: str
    """What `ops.select` is asked for."""

    def use(self) -> None:
        """Make it the calling thread's device: the engine's thread is not the one that loaded the model."""
        ...

    def memory(self) -> tuple[int, int]:
        """(free, total) bytes."""
        ...

    def measure(self, run: Callable[[], object]) -> Measured:
        """What ``run`` took for itself."""
        ...

    def host_buffer(self, num_elements: int) -> torch.Tensor:
        """A flat int32 tensor on the host, whose copies to the device need not be waited for."""
        ...

    def event(self) -> Event: ...

    def capture(self, run: Callable[[], torch.Tensor]) -> Graph:
        """Record what ``run`` launches, and the tensor it returns."""
        ...

    def check(self) -> None:
        """Wait for everything. Raises if the device is lost: after such an error, every further call fails."""
        ...


class CudaGpu:
    """The current CUDA device. Raises ConfigurationError that says what to do where there is none that serves."""

    kernels = "cuda"

    def __init__(self) -> None:
        _check_there_is_one()
        self.device = torch.device("cuda", torch.cuda.current_device())
        properties = torch.cuda.get_device_properties(self.device)
        self.name: str = properties.name
        self.capability = (properties.major, properties.minor)
        if self.capability < MIN_CAPABILITY:
            raise ConfigurationError(
                f"device is 'cuda'; {self.name} has compute capability {properties.major}.{properties.minor}, and the"
                " kernels need 8.0 (Ampere) or later. Use device='cpu'"
            )
        self._pool = torch.cuda.graph_pool_handle()

    def use(self) -> None:
        torch.cuda.set_device(self.device)

    def memory(self) -> tuple[int, int]:
        free, total = torch.cuda.mem_get_info(self.device)
        return free, total

    def measure(self, run: Callable[[], object]) -> Measured:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        run()
        torch.cuda.synchronize()
        peak = torch.cuda.max_memory_reserved()  # what the allocator had to take, fragments included
        torch.cuda.empty_cache()
        return Measured(self.memory()[0], peak - torch.cuda.memory_reserved())

    def host_buffer(self, num_elements: int) -> torch.Tensor:
        return torch.zeros(num_elements, dtype=torch.int32, pin_memory=True)

    def event(self) -> Event:
        return torch.cuda.Event()

    def capture(self, run: Callable[[], torch.Tensor]) -> Graph:
        graph = torch.cuda.CUDAGraph()
        # Other threads may go on calling CUDA (a health check), so only this one's calls are watched.
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            output = run()
        return _CapturedGraph(graph, output)

    def check(self) -> None:
        torch.cuda.synchronize()


class _CapturedGraph:
    def __init__(self, graph: torch.cuda.CUDAGraph, output: torch.Tensor) -> None:
        self._graph = graph
        self._output = output

    def replay(self) -> torch.Tensor:
        self._graph.replay()
        return self._output


def find_gpu(device: str) -> Gpu | None:
    """The GPU for a device option: "cpu" has none, "auto" has one if it serves, "cuda" raises what is wrong."""
    if device == "cpu" or (device == "auto" and not torch.cuda.is_available()):
        return None
    try:
        return CudaGpu()
    except ConfigurationError as error:
        if device == "cuda":
            raise
        logger.warning("%s. Going on with the CPU", error)
        return None


def _check_there_is_one() -> None:
    if torch.version.cuda is None:
        raise ConfigurationError(
            f"device is 'cuda'; this torch ({torch.__version__}) was built without CUDA. Install a CUDA build of torch,"
            " or use device='cpu'"
        )
    if not torch.cuda.is_available():
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        reason = "torch finds no NVIDIA GPU or driver (does nvidia-smi list one?)"
        if visible is not None:
            reason = f"CUDA_VISIBLE_DEVICES is {visible!r}, which leaves no GPU that torch can use"
            if not visible:
                reason += " (under Ray: give the replica num_gpus: 1)"
        raise ConfigurationError(f"device is 'cuda'; {reason}. Or use device='cpu'")
