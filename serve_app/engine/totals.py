"""EngineTotals: what one engine has done since it started, as numbers that only grow. Knows no name of a metric, no clock.

Written by the engine's thread, read by any other: `counts` may mix two neighbouring steps, and never goes back.
"""

from __future__ import annotations

from bisect import bisect_left

from serve_app.engine.request import FinishReason
from serve_app.engine.step_record import StepRecord

TOKEN_BOUNDS = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)
"""Tokens of a step."""
SEQUENCE_BOUNDS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
"""Sequences of a step."""
STEP_SECONDS_BOUNDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
QUEUE_SECONDS_BOUNDS = (0.001, 0.005, 0.01, 0.05, 0.1, 0.3, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)

FIT_STEPS = 65_536
"""How many steps back `StepTimeFit` remembers, about."""
MIN_FIT_STEPS = 16

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


class StepTimeFit:
    """What a step should take: a line over its tokens, fitted to the steps before it by least squares.

    An old step weighs less, by 1 - 1 / FIT_STEPS for each that came since. So a machine that has become slower shows for
    that long, and then is what is expected. Knows nothing of the length of contexts: where they differ much so do steps.
    """

    __slots__ = ("num_steps", "sum_x", "sum_xx", "sum_xy", "sum_y")

    def __init__(self) -> None:
        self.num_steps = 0.0
        self.sum_x = 0.0
        self.sum_y = 0.0
        self.sum_xx = 0.0
        self.sum_xy = 0.0

    def expected(self, num_tokens: int) -> float | None:
        """Seconds; None before MIN_FIT_STEPS steps."""
        n = self.num_steps
        if n < MIN_FIT_STEPS:
            return None
        mean_x, mean_y = self.sum_x / n, self.sum_y / n
        variance = self.sum_xx / n - mean_x * mean_x
        if variance <= 1e-6 * mean_x * mean_x:  # all of one size, but for rounding
            return mean_y
        slope = (self.sum_xy / n - mean_x * mean_y) / variance
        return max(0.0, mean_y + slope * (num_tokens - mean_x))

    def add(self, num_tokens: int, seconds: float) -> None:
        keep = 1.0 - 1.0 / FIT_STEPS
        self.num_steps = self.num_steps * keep + 1.0
        self.sum_x = self.sum_x * keep + num_tokens
        self.sum_y = self.sum_y * keep + seconds
        self.sum_xx = self.sum_xx * keep + num_tokens * num_tokens
        self.sum_xy = self.sum_xy * keep + num_tokens * seconds


class EngineTotals:
    """The scheduler tells of requests and tokens, the engine of steps."""

    def __init__(self) -> None:
        self.num_prompt_tokens = 0
        """Of requests in their first step; of several choices once."""
        self.num_generation_tokens = 0
        self.num_recomputed_tokens = 0
        self.num_padded_tokens = 0
        self.queue_seconds = Histogram(QUEUE_SECONDS_BOUNDS)
        self.step_tokens = Histogram(TOKEN_BOUNDS)
        self.step_sequences = Histogram(SEQUENCE_BOUNDS)
        self.step_seconds = Histogram(STEP_SECONDS_BOUNDS)
        self.expected_step_seconds = 0.0
        """By `StepTimeFit`; of the first steps what they took."""
        self.part_seconds: dict[str, float] = {}
        self.num_ended = dict.fromkeys(FinishReason, 0)
        self._fit = StepTimeFit()

    def add_first_step(self, num_prompt_tokens: int, queue_seconds: float) -> None:
        """A request runs for the first time."""
        self.num_prompt_tokens += num_prompt_tokens
        self.queue_seconds.observe(queue_seconds)

    def add_step(self, record: StepRecord) -> None:
        """A step was read."""
        num_tokens = record.num_tokens
        self.step_tokens.observe(num_tokens)
        self.step_sequences.observe(len(record.sequences))
        seconds = record.duration
        self.step_seconds.observe(seconds)
        parts = self.part_seconds
        for part, part_seconds in record.seconds.items():
            parts[part] = parts.get(part, 0.0) + part_seconds
        expected = self._fit.expected(num_tokens)
        self.expected_step_seconds += seconds if expected is None else expected
        self._fit.add(num_tokens, seconds)
        self.num_recomputed_tokens += record.num_recomputed_tokens
        self.num_padded_tokens += record.num_padded_tokens

    def counts(self) -> Counts:
        return {
            "prompt_tokens": {(): self.num_prompt_tokens},
            "generation_tokens": {(): self.num_generation_tokens},
            "step_tokens": {(): self.step_tokens.value()},
            "step_sequences": {(): self.step_sequences.value()},
            "step_seconds": {(): self.step_seconds.value()},
            "expected_step_seconds": {(): self.expected_step_seconds},
            "part_seconds": {(part,): seconds for part, seconds in self.part_seconds.copy().items()},
            "recomputed_tokens": {(): self.num_recomputed_tokens},
            "padded_tokens": {(): self.num_padded_tokens},
            "queue_seconds": {(): self.queue_seconds.value()},
            "ended": {(str(reason),): number for reason, number in self.num_ended.items()},
        }
