"""Decisions: why the ledger did what it did with recent lease requests, for those who ask. Knows what the ledger tells its
watch; knows no ledger, no calls, no clock of its own.

Kept only while somebody may ask (see inquiries.py). Bounded: the oldest go first.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from serve_app.routing.leases import LeaseRequest
from serve_app.routing.watch import ReplicaView

MAX_DECISIONS = 4096
MAX_VIEWS = 32
"""Replicas that are told of one decision, the chosen one first and then the freest."""


class _Decision:
    __slots__ = ("answer", "asked_at", "because", "cause", "ended_at", "replica_id", "since", "views", "waited")

    def __init__(self, now: float) -> None:
        self.asked_at = now
        self.ended_at: float | None = None
        """When it was granted or refused. None: it waits."""
        self.cause: str | None = None
        """What it waits for now."""
        self.since = now
        self.waited: dict[str, float] = {}
        """Cause -> seconds."""
        self.replica_id: str | None = None
        self.because: str | None = None
        self.views: dict[str, ReplicaView] = {}
        self.answer: str | None = None
        """granted, withdrawn, or the code of the error."""

    def charge(self, now: float) -> None:
        if self.cause is not None:
            self.waited[self.cause] = self.waited.get(self.cause, 0.0) + max(0.0, now - self.since)
        self.since = now


class Decisions:
    """The ledger's `Watch`. ``now``: seconds of the ledger's clock. ``wall_ms``: milliseconds since 1970, now."""

    def __init__(self, wall_ms: Callable[[], float]) -> None:
        self._wall_ms = wall_ms
        self._by_request: OrderedDict[str, _Decision] = OrderedDict()

    def __len__(self) -> int:
        return len(self._by_request)

    def asked(self, request_id: str, now: float) -> None:
        """A lease is asked for. The same again, while it waits, changes nothing."""
        known = self._by_request.get(request_id)
        if known is not None and known.ended_at is None:
            return
        self._by_request.pop(request_id, None)
        self._by_request[request_id] = _Decision(now)
        if len(self._by_request) > MAX_DECISIONS:
            self._by_request.popitem(last=False)

    def waits(self, request_id: str, cause: str, now: float) -> None:
        decision = self._by_request.get(request_id)
        if decision is not None and decision.cause != cause:
            decision.charge(now)
            decision.cause = cause

    def granted(self, request: LeaseRequest, replica_id: str, views: Mapping[str, ReplicaView], now: float) -> None:
        decision = self._end(request.request_id, "granted", now)
        if decision is not None:
            decision.replica_id = replica_id
            decision.because = reason_of(replica_id, views)
            freest = sorted(views, key=lambda r: (r != replica_id, -views[r].num_free_tokens))
            decision.views = {r: views[r] for r in freest[:MAX_VIEWS]}

    def ended(self, request_id: str, answer: str, now: float) -> None:
        """Without a lease. ``answer``: withdrawn, or the code of the error."""
        self._end(request_id, answer, now)

    def tell(self, request_ids: Sequence[str], now: float) -> dict[str, dict[str, Any]]:
        """What is known of these, as plain data. Times: milliseconds since 1970."""
        wall_ms = self._wall_ms()
        told = {}
        for request_id in request_ids:
            decision = self._by_request.get(request_id)
            if decision is None:
                continue
            if decision.ended_at is None:
                decision.charge(now)
            end = now if decision.ended_at is None else decision.ended_at
            told[request_id] = {
                "asked_at": round(wall_ms - (now - decision.asked_at) * 1000.0, 1),
                "waited_ms": round((end - decision.asked_at) * 1000.0, 1),
                "waited_for_ms": {cause: round(s * 1000.0, 1) for cause, s in decision.waited.items()},
                "answer": decision.answer or "waits",
                "replica": decision.replica_id,
                "because": decision.because,
                "replicas": {replica_id: view._asdict() for replica_id, view in decision.views.items()},
            }
        return told

    def _end(self, request_id: str, answer: str, now: float) -> _Decision | None:
        decision = self._by_request.get(request_id)
        if decision is None or decision.ended_at is not None:
            return None
        decision.charge(now)
        decision.ended_at, decision.answer, decision.cause = now, answer, None
        return decision


def reason_of(chosen: str, views: Mapping[str, ReplicaView]) -> str:
    """Why this one of all that fit: see `Ledger._choose`."""
    fitting = {r: view for r, view in views.items() if view.left_out is None}
    if len(fitting) <= 1:
        return "the_only_one_that_fits"
    view = fitting[chosen]
    others = [other for r, other in fitting.items() if r != chosen]
    left, most = view.num_tokens_left, max(other.num_tokens_left for other in others)
    if left > most:
        return "most_free_budget"
    if view.num_cached_tokens > max(other.num_cached_tokens for other in others):
        return "longest_cached_prefix"
    return "granted_to_least_recently"
