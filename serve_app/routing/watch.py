"""Watch: who looks on while the ledger decides. Knows what is told; knows no ledger and no listener."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple, Protocol

from serve_app.routing.leases import LeaseRequest


class ReplicaView(NamedTuple):
    """One replica, as a choice saw it."""

    num_free_tokens: int
    """Of its pool, before the booking. Negative after growth past the pool."""
    num_needed_tokens: int | None
    """What would be booked. None: it can never hold the request."""
    num_free_places: int
    """Sequences that it may be granted, one more for some that its steps hold included."""
    num_cached_tokens: int
    """Length of the prompt's prefix that was granted to it and not pushed out since."""
    fingerprint: str
    """Of its numerics."""
    left_out: str | None
    """Why it could not be chosen: draining, silent, excluded (the request was lost there), too_small, budget, places, held
    (for a request that was passed over too often), other_numerics. None: it fits."""

    @property
    def num_tokens_left(self) -> int:
        """Free after the booking."""
        return self.num_free_tokens - (self.num_needed_tokens or 0)


class Watch(Protocol):
    """Hears what the ledger sees while it decides; decides nothing. ``now``: as everywhere."""

    def waits(self, request_id: str, cause: str, now: float) -> None:
        """``cause``: budget, places, fairness (others are before it, or a replica is held for one), no_replica."""

    def granted(self, request: LeaseRequest, replica_id: str, views: Mapping[str, ReplicaView], now: float) -> None: ...


def cause_of(views: Mapping[str, ReplicaView]) -> str:
    """What a request waits for that fits nowhere: the least that would do."""
    left_out = {view.left_out for view in views.values()}
    causes = {"held": "fairness", "places": "places", "budget": "budget"}
    return next((cause for why, cause in causes.items() if why in left_out), "no_replica")
