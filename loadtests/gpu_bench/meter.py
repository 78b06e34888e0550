"""How long a launch takes on the device: CUDA graphs, events, medians, buffers that rotate. Knows no kernel.

A figure is the median over replays of one graph that holds every launch once, divided by the launches, and is taken
twice. The launches of a graph work on different buffers, together larger than five times the L2 cache, so that none
finds there what the one before it left. Without a GPU (``tiny``) the same launches run on the CPU's clock, to test the
bench: those figures say nothing about any kernel.
"""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from loadtests.gpu_bench.theory import H200, Ceilings, Floor

Row = dict[str, Any]
"""One line of a table."""

MAX_COPIES = 128


class Timing(NamedTuple):
    """Seconds of one launch."""

    first: float
    again: float
    captured: bool = True
    """False: it could not be captured, so the host's share is in it."""

    @property
    def seconds(self) -> float:
        return (self.first + self.again) / 2

    @property
    def spread(self) -> float:
        return abs(self.first - self.again) / self.seconds


@dataclass
class Setup:
    """The device and what was found out about it so far."""

    device: torch.device
    dtype: torch.dtype
    capability: tuple[int, int]
    name: str
    num_processors: int
    l2_bytes: int
    memory: int
    """Bytes of the device."""
    tiny: bool = False
    ceilings: Ceilings = H200
    deadline: float = float("inf")
    """On time.monotonic's clock: no case of this part is begun after it."""
    num_skipped: int = 0

    def is_time_up(self) -> bool:
        """Also counts the case that is now left out."""
        if time.monotonic() < self.deadline:
            return False
        self.num_skipped += 1
        return True

    def copies(self, num_bytes: float) -> int:
        """How many sets of buffers of ``num_bytes`` exceed five times the L2 cache."""
        return max(1, min(MAX_COPIES, -(-5 * self.l2_bytes // max(1, int(num_bytes)))))


def find_setup(tiny: bool) -> Setup:
    """The current CUDA device, or for ``tiny`` the CPU, which the kernels take for an H200."""
    if tiny:
        return Setup(torch.device("cpu"), torch.float32, (9, 0), "no GPU: the interpreter", 132, 1 << 10, 1 << 30, True)
    device = torch.device("cuda", torch.cuda.current_device())
    found = torch.cuda.get_device_properties(device)
    return Setup(
        device,
        torch.bfloat16,
        (found.major, found.minor),
        found.name,
        found.multi_processor_count,
        found.L2_cache_size,
        found.total_memory,
    )


class Meter:
    """Measures launches on the setup's device. ``seconds``: what one measurement may take, of which there are two."""

    def __init__(self, setup: Setup, seconds: float = 0.1) -> None:
        self.setup = setup
        self.seconds = seconds
        self.worst_spread = 0.0

    def time(self, launches: Sequence[Callable[[], object]]) -> Timing:
        """Of one launch. All of them do the same on buffers of their own; each is run once before, to compile."""
        found = self._on_cpu(launches) if self.setup.tiny else self._on_gpu(launches)
        self.worst_spread = max(self.worst_spread, found.spread)
        return found

    def _on_gpu(self, launches: Sequence[Callable[[], object]]) -> Timing:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for launch in launches:
                launch()
        torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.synchronize()

        results: list[object] = []
        graph = torch.cuda.CUDAGraph()
        captured = True
        try:
            with torch.cuda.graph(graph):
                results += [launch() for launch in launches]  # kept: results rotate like the inputs
            run: Callable[[], object] = graph.replay
        except RuntimeError:
            captured = False
            torch.cuda.synchronize()

            def run() -> object:
                return [launch() for launch in launches]

        first, again = (self._median(run) / len(launches) for _ in range(2))
        del results, graph, run
        return Timing(first, again, captured)

    def _median(self, run: Callable[[], object]) -> float:
        run()
        torch.cuda.synchronize()
        started = time.perf_counter()
        run()
        torch.cuda.synchronize()
        one = time.perf_counter() - started
        num = max(7, min(200, int(self.seconds / max(one, 1e-6))))
        events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(num)]
        for begin, end in events:
            begin.record()
            run()
            end.record()
        torch.cuda.synchronize()
        return statistics.median(begin.elapsed_time(end) for begin, end in events) / 1e3

    def _on_cpu(self, launches: Sequence[Callable[[], object]]) -> Timing:
        """The kernels' interpreter is slow: one launch, and its time is both figures."""
        started = time.perf_counter()
        launches[0]()
        seconds = time.perf_counter() - started
        return Timing(seconds, seconds)


def release() -> None:
    """Give the memory of buffers that are gone back to the device."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def row_of(name: str, timing: Timing, floor: Floor, ceilings: Ceilings) -> Row:
    """A figure beside its theory. ``of_floor``: floor / measured."""
    floor_seconds = floor.seconds(ceilings)
    return {
        "name": name,
        "us": 1e6 * timing.seconds,
        "us_again": 1e6 * timing.again,
        "bytes": floor.num_bytes,
        "flops": floor.flops,
        "floor_us": 1e6 * floor_seconds,
        "of_floor": floor_seconds / timing.seconds,
        **({} if timing.captured else {"eager": True}),
    }


def print_rows(
    rows: Sequence[Row], columns: Sequence[tuple[str, str, str]], *, name_width: int = 0, with_head: bool = True
) -> None:
    """``columns``: (key, heading, format). A value that is missing or None is a dash."""
    name_width = max([name_width, *(len(row["name"]) for row in rows)]) + 2
    if with_head:
        print(" " * name_width + "".join(f"{heading:>{_width(heading)}}" for _, heading, _ in columns))
    for row in rows:
        cells = ""
        for key, heading, form in columns:
            value = row.get(key)
            cells += f"{'-' if value is None else format(value, form):>{_width(heading)}}"
        print(f"{row['name']:{name_width}}{cells}{'  eager' if row.get('eager') else ''}", flush=True)


def _width(heading: str) -> int:
    return max(10, len(heading) + 2)


THEORY_COLUMNS = (("mbytes", "MB", ".1f"), ("gflop", "GFLOP", ".3g"), ("floor_us", "floor us", ".1f"))
"""Beside each figure."""


def with_theory(row: Row) -> Row:
    """Bytes and FLOPs in the units of THEORY_COLUMNS."""
    return row | {"mbytes": row["bytes"] / 1e6, "gflop": row["flops"] / 1e9}


def rounded(value: Any) -> Any:
    """Five significant digits are more than a bench knows; nan and infinity, which JSON lacks, become null."""
    if isinstance(value, float):
        return float(f"{value:.5g}") if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(item) for item in value]
    return value
