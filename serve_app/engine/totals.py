"""EngineTotals: what one engine has done since it started, as numbers that only grow. Knows no name of a metric, no clock.

Written by the engine's thread, read by any other: `counts` may mix two neighbouring steps, and never goes back.
"""

from __future__ import annotations

from bisect import bisect_left

TOKEN_BOUNDS = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)
"""Tokens of a step."""
SEQUENCE_BOUNDS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
"""Sequences of a step."""
STEP_SECONDS_BOUNDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
QUEUE_SECONDS_BOUNDS = (0.001, 0.005, 0.01, 0.05, 0.1, 0.3, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)

Value = float | list[float]
"""A number; or of a histogram: how many values lie in each bucket, one more bucket than bounds, then their sum."""
Counts = dict[str, dict[tuple[str, ...], Value]]
"""Key of a metric -> values of its labels -> what was counted. Plain data that crosses processes."""


class Histogram:
    """``bounds``: ascending; a value that equals a bound is below it, as Prometheus has it."""

    __slots__ = ("bounds", "counts", "total")

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self.bounds = bounds
        self.counts = [0.0] * (len(bounds) + 1)
        """The last one is of those above all bounds."""
        self.total = 0.0

    def observe(self, value: float) -> None:
        self.counts[bisect_left(self.bounds, value)] += 1
        self.total += value

    def value(self) -> list[float]:
        return [*self.counts, self.total]
