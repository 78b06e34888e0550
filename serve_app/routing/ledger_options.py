"""What of the ledger can be changed while it runs. Knows ranges; knows nothing of what they do."""

from __future__ import annotations

import math
from dataclasses import dataclass

from serve_app.errors import ConfigurationError

POLICIES = ("reserve", "expect")


@dataclass(frozen=True)
class LedgerOptions:
    """Raises ConfigurationError naming the option, its value and its limit."""

    policy: str = "expect"
    """reserve: book all tokens a request may have. expect: book the output length learned from what finished. Where
    clients allow far more than they use, reserve keeps them waiting for room that stays empty
    (loadtests/bench_router.py)."""

    max_queued_requests: int = 512
    """Requests that may wait. One more is refused with 429."""

    max_queued_tokens: int = 4_000_000
    """Prompt and output tokens of all waiting requests. A single one may be larger, if it is alone."""

    max_queue_seconds: float = 30.0
    """Longest wait, then 429; at once, where it would be longer by the rate at which room is freed."""

    lease_seconds: float = 10.0
    """A holder not heard of for so long is gone, and so is a replica."""

    replica_seconds: float = 3.0
    """A replica that did not report for so long gets no grants."""

    submit_seconds: float = 5.0
    """A lease that its replica did not show for so long was never submitted."""

    def __post_init__(self) -> None:
        def check(name: str, ok: bool, allowed: str) -> None:
            if not ok:
                raise ConfigurationError(f"{name} is {getattr(self, name)!r}; it must be {allowed}")

        check("policy", self.policy in POLICIES, f"one of {', '.join(POLICIES)}")
        for name in ("max_queued_requests", "max_queued_tokens"):
            value = getattr(self, name)
            check(name, type(value) is int and value >= 0, "an integer of at least 0")
        for name in ("max_queue_seconds", "lease_seconds", "replica_seconds", "submit_seconds"):
            value = getattr(self, name)
            check(name, type(value) in (int, float) and 0 < value < math.inf, "a number of seconds above 0")
        check(
            "replica_seconds",
            self.replica_seconds <= self.lease_seconds,
            f"at most lease_seconds ({self.lease_seconds})",
        )
