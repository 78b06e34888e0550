"""What this card reaches at its best: a large copy, a large product, an empty kernel. Everything else is held against it."""

from __future__ import annotations

import time

import torch
import triton

from loadtests.gpu_bench.meter import Meter, Row, Setup, Timing, release
from loadtests.gpu_bench.theory import Ceilings


@triton.jit
def _empty_kernel(p):
    pass


def measure(setup: Setup, meter: Meter) -> tuple[Ceilings, Row]:
    """(ceilings, the figures). Random data: a product of zeros takes less power and runs faster."""
    num_bytes, side, num_nodes = (1 << 16, 64, 3) if setup.tiny else (8 * 10**9, 8192, 1000)
    num_bytes = min(num_bytes, setup.memory // 4)
    copy = _copy(setup, meter, num_bytes)
    bandwidth = 2 * num_bytes / copy.seconds
    release()

    a, b = (torch.randn(side, side, dtype=setup.dtype, device=setup.device) for _ in range(2))
    out = torch.empty_like(a)
    gemm = meter.time([lambda: torch.mm(a, b, out=out)])
    flops = 2 * side**3 / gemm.seconds

    def launch() -> None:
        _empty_kernel[(1,)](out)

    launch()
    node = meter.time([launch] * num_nodes)
    figures: Row = {
        "copy_gbs": bandwidth / 1e9,
        "copy_gbs_again": 2 * num_bytes / copy.again / 1e9,
        "gemm_tflops": flops / 1e12,
        "gemm_tflops_again": 2 * side**3 / gemm.again / 1e12,
        "launch_us": 1e6 * _host_seconds(setup, launch, num_nodes),
        "torch_launch_us": 1e6 * _host_seconds(setup, lambda: out.view(-1)[:1].zero_(), num_nodes),
        "graph_node_us": 1e6 * node.seconds,
    }
    return Ceilings(bandwidth, flops, f"measured on {setup.name}"), figures


def _copy(setup: Setup, meter: Meter, num_bytes: int) -> Timing:
    source = torch.empty(num_bytes, dtype=torch.uint8, device=setup.device).random_()
    target = torch.empty_like(source)
    return meter.time([lambda: target.copy_(source)])


def _host_seconds(setup: Setup, launch: object, num: int) -> float:
    """What one launch takes the host, which does not wait for it."""
    assert callable(launch)
    best = float("inf")
    for _ in range(3):
        started = time.perf_counter()
        for _ in range(num):
            launch()
        best = min(best, (time.perf_counter() - started) / num)
        if not setup.tiny:
            torch.cuda.synchronize()
    return best


def print_figures(figures: Row, ceilings: Ceilings) -> None:
    print(
        f"copy of 8 GB         {figures['copy_gbs']:8.0f} GB/s, again {figures['copy_gbs_again']:.0f}"
        " (read and written bytes)\n"
        f"gemm of 8192^3       {figures['gemm_tflops']:8.0f} TFLOP/s, again {figures['gemm_tflops_again']:.0f}\n"
        f"empty launch, host   {figures['launch_us']:8.1f} us (Triton), {figures['torch_launch_us']:.1f} us (torch)\n"
        f"node of a graph      {figures['graph_node_us']:8.2f} us\n"
        f"rows that a chunk gets for nothing beside decodes: {ceilings.flops / ceilings.bandwidth:.0f}",
        flush=True,
    )
