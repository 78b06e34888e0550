"""The number of replicas, from committed tokens. A pure policy for Ray Serve's controller, which pickles this file by value:
standard library only.

Ray Serve counts requests as handles see them; here a handle call submits, and what lasts is a stream per ingress, so its
own count says nothing. Each replica reports what is booked on it, the size of its pool, and what waits in the router. Where
its places in a step are fuller than its pool, they count, as tokens of the pool:

    wanted = ceil((sum of booked tokens + tokens that wait) / (target * tokens of one pool))

Ray Serve applies the delays, factors and bounds of autoscaling_config to the result.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

COMMITTED = "committed_tokens"
POOL = "pool_tokens"
QUEUED = "queued_tokens"
"""Names of the numbers that a replica reports (Replica.record_autoscaling_stats)."""


class CommittedTokensPolicy:
    """``target``: share of the pools that should be booked, above 0 and at most 1."""

    def __init__(self, target: float = 0.7) -> None:
        if not 0.0 < target <= 1.0:
            raise ValueError(f"target is {target!r}; it must be above 0 and at most 1")
        self.target = target

    def __call__(self, context: Any) -> tuple[int, dict[str, Any]]:
        """``context``: Ray Serve's AutoscalingContext. Returns (replicas, state shown in the log)."""
        numbers = context.aggregated_metrics or {}
        committed = sum(_values(numbers, COMMITTED))
        pools = [pool for pool in _values(numbers, POOL) if pool > 0]
        queued = max(_values(numbers, QUEUED), default=0.0)  # one router, and each replica repeats it
        if not pools:
            return context.target_num_replicas, {}
        wanted = wanted_replicas(committed, queued, max(pools), self.target)
        return wanted, {COMMITTED: committed, QUEUED: queued, POOL: max(pools), "wanted": wanted}


def wanted_replicas(committed_tokens: float, queued_tokens: float, pool_tokens: float, target: float) -> int:
    """At least 1.

    >>> wanted_replicas(committed_tokens=9000, queued_tokens=2000, pool_tokens=8000, target=0.7)
    2
    """
    return max(1, math.ceil((committed_tokens + queued_tokens) / (target * pool_tokens)))


def _values(numbers: Mapping[str, Any], name: str) -> list[float]:
    return [float(value) for value in (numbers.get(name) or {}).values()]
