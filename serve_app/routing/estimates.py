"""What the ledger learns from what has ended: how long answers are, how fast room is freed, how long an answer takes.

Plain sums over plain numbers: knows no request, no lease, no clock.
"""

from __future__ import annotations

import math
from bisect import bisect_left, insort
from collections import deque

QUANTILE = 0.9
"""Share of the finished answers that were no longer than what `OutputLengths` expects."""

NUM_LENGTHS = 512
"""Answers that `OutputLengths` remembers."""

MIN_LENGTHS = 32
"""Answers before which it expects all that is allowed."""

DRAIN_SECONDS = 10.0
"""Time constant of the drain rate."""

MIN_DRAINED = 8
"""Leases that must have ended before there is a drain rate: until the first ones end there is nothing to see."""

MIN_SERVED = 8
"""Answers before which `ServiceTime` says nothing."""

SERVED_DECAY = 1.0 - 1.0 / 64.0
"""Weight of an answer against the next one."""


class OutputLengths:
    """A high quantile of the last NUM_LENGTHS answers, as a length and as a share of what each was allowed."""

    def __init__(self) -> None:
        self._recent: deque[tuple[int, float]] = deque()
        self._lengths: list[int] = []
        self._shares: list[float] = []

    def __len__(self) -> int:
        return len(self._recent)

    def add(self, num_output_tokens: int, max_output_tokens: int) -> None:
        """One finished answer (the mean of its choices)."""
        seen = (num_output_tokens, min(1.0, num_output_tokens / max_output_tokens))
        self._recent.append(seen)
        insort(self._lengths, seen[0])
        insort(self._shares, seen[1])
        if len(self._recent) > NUM_LENGTHS:
            length, share = self._recent.popleft()
            del self._lengths[bisect_left(self._lengths, length)]
            del self._shares[bisect_left(self._shares, share)]

    def expected(self, max_output_tokens: int) -> int:
        """Tokens to book for an answer that may have ``max_output_tokens``: at least 1, at most those (of 0: 0)."""
        if len(self._recent) < MIN_LENGTHS:
            return max_output_tokens
        place = min(len(self._recent) - 1, int(QUANTILE * len(self._recent)))
        share = math.ceil(self._shares[place] * max_output_tokens)
        return min(max_output_tokens, max(1, min(self._lengths[place], share)))


class DrainRate:
    """Tokens freed per second, exponentially weighted over the seconds in which somebody waited for them."""

    def __init__(self) -> None:
        self._tokens = 0.0
        self._seconds = 0.0
        self._num_drained = 0

    def elapse(self, seconds: float) -> None:
        """Both sums decay, so early on the rate is the plain mean: there is no bias towards zero to correct."""
        decay = math.exp(-seconds / DRAIN_SECONDS)
        self._tokens *= decay
        self._seconds = self._seconds * decay + DRAIN_SECONDS * (1.0 - decay)

    def add(self, num_tokens: int) -> None:
        self._tokens += num_tokens
        self._num_drained += 1

    @property
    def tokens_per_second(self) -> float | None:
        """None: less than a tenth of a second was seen, or fewer than MIN_DRAINED leases ended in it."""
        is_known = self._seconds >= 0.1 and self._num_drained >= MIN_DRAINED
        return self._tokens / self._seconds if is_known else None


class ServiceTime:
    """Seconds from a grant to the end of the answer: a straight line over its length, by least squares whose weights decay
    with each answer. What the last answers took, so it follows the load and the machine.
    """

    def __init__(self) -> None:
        self._num = 0
        self._weight = self._x = self._y = self._xx = self._xy = 0.0
        """Weighted sums; x: tokens, y: seconds."""

    def add(self, num_output_tokens: int, seconds: float) -> None:
        """One answer (the mean of its choices)."""
        self._num += 1
        x = float(num_output_tokens)
        for name, value in (("_weight", 1.0), ("_x", x), ("_y", seconds), ("_xx", x * x), ("_xy", x * seconds)):
            setattr(self, name, getattr(self, name) * SERVED_DECAY + value)

    def expected(self, num_output_tokens: int) -> float | None:
        """For an answer of so many tokens. None: fewer than MIN_SERVED were seen."""
        if self._num < MIN_SERVED:
            return None
        mean_x, mean_y = self._x / self._weight, self._y / self._weight
        # One token squared is added to the variance: answers of one length have none, and then the slope is 0.
        slope = (self._xy / self._weight - mean_x * mean_y) / (self._xx / self._weight - mean_x * mean_x + 1.0)
        return max(0.0, mean_y + max(0.0, slope) * (num_output_tokens - mean_x))
