"""MetricsBoard: the newest counts of every replica and ingress, as the router heard them. Knows no name of a metric.

What an ingress counted is of the deployment and not of that ingress: all are summed, and those that have left stay in the
sum, so that it only grows. What a replica counted is shown as its own, and for DEPARTED_SECONDS after it has left, so that
a scraper still finds what it did last. A new router begins with an empty board: the sums fall to what the ingresses that
live tell it, and a scraper takes that for a reset of the counters.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from serve_app.engine.totals import Counts, Value

DEPARTED_SECONDS = 600.0
"""Who was not heard of for so long has left. One that is heard of again after that counts twice."""
SETTLE_SECONDS = 2.5
"""Before a router has lived so long not every ingress may have told it its counts, and there is no sum: a gap is nothing to
a scraper, and a sum that falls and rises is an error."""


@dataclass(slots=True)
class _Entry:
    heard_at: float
    number: int = -1
    counts: Counts | None = None

    def take(self, number: int, counts: Counts) -> None:
        """Unless a newer one has come before."""
        if number > self.number:
            self.number, self.counts = number, counts


class MetricsBoard:
    """``now`` everywhere: seconds of the router's clock; the first one is when it began."""

    def __init__(self, now: float, settle_seconds: float = SETTLE_SECONDS) -> None:
        self._settled_at = now + settle_seconds
        self._replicas: dict[str, _Entry] = {}
        self._ingresses: dict[str, _Entry] = {}
        self._departed: Counts = {}
        """The sum over ingresses that have left."""

    def report(self, replica_id: str, number: int, counts: Counts, now: float) -> None:
        """``number``: of the report, ascending. ``counts``: since the replica began."""
        entry = self._replicas.setdefault(replica_id, _Entry(now))
        entry.heard_at = now
        entry.take(number, counts)

    def tell(self, ingress_id: str, numbered: tuple[int, Counts] | None, now: float) -> None:
        """A sign of life of an ingress; with an ascending number its counts since it began, if they have changed."""
        entry = self._ingresses.setdefault(ingress_id, _Entry(now))
        entry.heard_at = now
        if numbered is not None:
            entry.take(*numbered)
            self._let_go(now)

    def snapshot(self, now: float) -> dict[str, Any]:
        """``replica_counts``: by replica. ``ingress_counts``: one sum; empty while not everybody can have told."""
        self._let_go(now)
        total: Counts = {}
        if now >= self._settled_at:
            add(total, self._departed)
            for entry in self._ingresses.values():
                add(total, entry.counts or {})
        return {
            "replica_counts": {r: entry.counts for r, entry in self._replicas.items() if entry.counts is not None},
            "ingress_counts": total,
        }

    def _let_go(self, now: float) -> None:
        for replica_id in [r for r, entry in self._replicas.items() if now - entry.heard_at > DEPARTED_SECONDS]:
            del self._replicas[replica_id]
        for ingress_id in [i for i, entry in self._ingresses.items() if now - entry.heard_at > DEPARTED_SECONDS]:
            add(self._departed, self._ingresses.pop(ingress_id).counts or {})


def add(total: Counts, counts: Counts) -> None:
    """Adds ``counts`` to ``total``, which it changes. Histograms of one metric have the same bounds everywhere."""
    for key, values in counts.items():
        sums = total.setdefault(key, {})
        for labels, value in values.items():
            sums[labels] = _sum(sums.get(labels), value)


def _sum(before: Value | None, value: Value) -> Value:
    if before is None:
        return value
    if isinstance(before, list):
        assert isinstance(value, list) and len(value) == len(before), "two histograms of other bounds"
        return [a + b for a, b in zip(before, value, strict=True)]
    assert not isinstance(value, list), "a number and a histogram"
    return before + value
