"""DecodeGraphs: decode steps as CUDA graphs, one for each bucket of batch sizes. The only place where padding exists.

Knows buckets, capture and replay; knows no CUDA call (runner/gpu.py) and no model.

Why graphs: a decode step of L layers is about 10 L + 10 launches, and one costs the host some 5 us. Llama-3.1-8B (32
layers) needs 1.6 ms of host time for a step whose memory floor is 3.5 ms on an H200; Qwen3-0.6B (28 layers) 1.4 ms for
one of 0.3 ms. A replay is one call.

Why buckets: a graph has fixed shapes, so a step of B sequences runs in the smallest bucket of at least B rows, and the
rows behind B are padding. What a padded row costs: its share of the linear layers, 2 P / F seconds (P parameters, F
flop/s: 18 us for 8B on an H200), and this only where a step is bound by arithmetic, from about F / BW = 184 rows on; below
that the weights have to be read anyway, and it is free. It has no attention (no work item names it), writes no K and V
(its slot is -1) and samples nothing. What a graph costs: about a second of start-up, and some MB.

    1, 2, 4, 8      where latency counts: one launch more or less in the tail of a product
    16, 24 ... 128  steps of 8, free of charge by the bound above
    144 ... 256     steps of 16:  at most 15 rows of padding: 15 * 18 us = 0.27 ms of 11 ms
    288 ... 512     steps of 32:  the same share

so never more than 1/8 of the rows where rows cost something, for 27 graphs up to 256 sequences. Beyond 512 a step takes
15 ms and more, in which the host launches everything in time: no graph. Steps that hold a chunk of a prompt run eager,
for the same reason.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterable
from functools import partial
from typing import Protocol

import torch

MAX_BUCKET = 512


class Graph(Protocol):
    """A captured run."""

    def replay(self) -> torch.Tensor:
        """Launch it all again, on what the static inputs hold now. Always the same tensor, filled anew."""
        ...


def bucket_sizes(max_num_seqs: int) -> tuple[int, ...]:
    """Rows of each graph, ascending; the last is ``max_num_seqs``, or MAX_BUCKET if that is less.

    >>> bucket_sizes(20), len(bucket_sizes(256)), bucket_sizes(1000)[-4:]
    ((1, 2, 4, 8, 16, 20), 27, (416, 448, 480, 512))
    """
    largest = min(max_num_seqs, MAX_BUCKET)
    sizes = [size for size in (1, 2, 4, 8) if size < largest]
    size = 16
    while size < largest:
        sizes.append(size)
        size += max(8, 1 << (size.bit_length() - 4))  # an eighth of the octave: 8 up to 128, then 16, 32
    return (*sizes, largest)


class DecodeGraphs:
    """Buckets and, once captured, their graphs."""

    def __init__(self, buckets: Iterable[int]) -> None:
        self.buckets = tuple(sorted(buckets))
        self._graphs: dict[int, Graph] = {}
        self.num_replays = 0

    def capture(
        self,
        prepare: Callable[[int], object],
        run: Callable[[int], torch.Tensor],
        capture: Callable[[Callable[[], torch.Tensor]], Graph],
    ) -> Iterable[int]:
        """Yields each bucket once its graph is there, largest first: the others fit into the memory it took.

        ``run(bucket)`` launches a step of so many rows on static inputs, and is run once before it is captured: whatever
        compiles, allocates for good or asks the device something must not do so meanwhile. ``prepare(bucket)`` puts
        something harmless into those inputs.
        """
        for bucket in reversed(self.buckets):
            prepare(bucket)
            run(bucket)
            self._graphs[bucket] = capture(partial(run, bucket))
            yield bucket

    def bucket_for(self, num_rows: int) -> int | None:
        """The smallest captured bucket that holds them; None: run eager."""
        place = bisect_left(self.buckets, num_rows)
        if place == len(self.buckets) or self.buckets[place] not in self._graphs:
            return None
        return self.buckets[place]

    def replay(self, bucket: int) -> torch.Tensor:
        """[bucket, ...], valid until the next replay."""
        self.num_replays += 1
        return self._graphs[bucket].replay()
