"""Rebuilding: the first moments of a router that was started again. Knows who is awaited; knows no book, no clock.

Nothing is granted until all that are awaited have reported, or the grace is over: what ran before the restart is on
replicas that have not said so yet.
"""

from __future__ import annotations

from collections.abc import Iterable


class Rebuilding:
    """``is_on``: of the beginning. ``grace_seconds``: from the first `advance`."""

    def __init__(self, is_on: bool, grace_seconds: float) -> None:
        self.is_on = is_on
        self.grace_seconds = grace_seconds
        self._ends_at: float | None = None
        self._awaited: set[str] = set()

    def advance(self, now: float) -> None:
        if not self.is_on:
            return
        if self._ends_at is None:
            self._ends_at = now + self.grace_seconds
        if now >= self._ends_at:
            self.is_on = False
            self._awaited.clear()

    def expect(self, replica_ids: Iterable[str]) -> None:
        """These have not reported, and there are no others."""
        if self.is_on:
            self._awaited = set(replica_ids)
            self.is_on = bool(self._awaited)

    def heard_of(self, replica_id: str) -> None:
        """It reported, or is gone."""
        if replica_id in self._awaited:
            self._awaited.discard(replica_id)
            self.is_on = bool(self._awaited)

    def ends_at(self, now: float) -> float | None:
        """At the latest. None: it is over."""
        if not self.is_on:
            return None
        return now + self.grace_seconds if self._ends_at is None else self._ends_at
