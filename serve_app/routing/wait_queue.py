"""The queue of requests that wait for a lease: their order, their sums, when waits end. Knows no replica, no clock."""

from __future__ import annotations

import heapq
from bisect import bisect_left, insort
from dataclasses import dataclass

from serve_app.routing.leases import LeaseRequest


@dataclass(slots=True, eq=False)
class Waiting:
    """One place in the queue."""

    request: LeaseRequest
    number: int
    queued_at: float
    deadline: float
    """Of the request itself; inf: none."""
    starts_by: float
    """Granted later it would not be done by its deadline."""
    num_tokens: int
    """Prompt and output tokens that it may have."""
    num_expected_tokens: int
    """What will be booked for it."""
    num_skipped: int = 0
    held_replica_id: str | None = None
    """Nobody behind it is granted there."""
    seen_room: int = -1
    """`LeaseBook.room` when it was last found not to fit. As long as that stands it still does not."""

    @property
    def order(self) -> tuple[int, bool, int]:
        return (self.request.priority, not self.request.is_continuation, self.number)


class WaitQueue:
    """By priority, then what goes on before what is new, then by age. Nobody waits longer than ``max_seconds``."""

    def __init__(self, max_seconds: float) -> None:
        self.num_tokens = 0
        """Of all that wait."""
        self.num_expected_tokens = 0
        self._max_seconds = max_seconds
        self._num_arrivals = 0
        self.entries: list[Waiting] = []
        """In order. Changed by `enter` and `leave` alone."""
        self._by_request: dict[str, Waiting] = {}
        self._ends: list[tuple[float, int, str]] = []
        """Heap of (end of the wait, number, request id). Entries that left the queue are dropped when they come up."""

    def __len__(self) -> int:
        return len(self.entries)

    def get(self, request_id: str) -> Waiting | None:
        return self._by_request.get(request_id)

    def next_number(self) -> int:
        """For one that comes for the first time. Ascending."""
        self._num_arrivals += 1
        return self._num_arrivals

    def enter(self, entry: Waiting) -> None:
        insort(self.entries, entry, key=_order)
        self._by_request[entry.request.request_id] = entry
        self.num_tokens += entry.num_tokens
        self.num_expected_tokens += entry.num_expected_tokens
        self._push_end(entry)

    def leave(self, entry: Waiting) -> None:
        del self.entries[self._place_of(entry)]
        del self._by_request[entry.request.request_id]
        self.num_tokens -= entry.num_tokens
        self.num_expected_tokens -= entry.num_expected_tokens

    def of_holder(self, holder_id: str) -> list[Waiting]:
        return [entry for entry in self.entries if entry.request.holder_id == holder_id]

    def num_expected_tokens_up_to(self, entry: Waiting) -> int:
        """Of those before it, and its own."""
        if self.entries[-1] is entry:
            return self.num_expected_tokens
        return sum(ahead.num_expected_tokens for ahead in self.entries[: self._place_of(entry) + 1])

    # ---- the ends of waits ---------------------------------------------------------------------------------------

    @property
    def next_end(self) -> float | None:
        """When a wait may end at the earliest. None: nobody waits."""
        return self._ends[0][0] if self._ends and self.entries else None

    def find_ended(self, now: float) -> Waiting | None:
        """One whose wait is over; it is to leave. None: there is none."""
        while self._ends and self._ends[0][0] <= now:
            _, number, request_id = heapq.heappop(self._ends)
            entry = self._by_request.get(request_id)
            # Asked again, with more time: that pushed an end of its own.
            if entry is not None and entry.number == number and self._end_of(entry) <= now:
                return entry
        return None

    def set_max_seconds(self, max_seconds: float) -> None:
        """Also for those that wait already."""
        self._max_seconds = max_seconds
        self._ends.clear()
        for entry in self.entries:
            self._push_end(entry)

    # ---- parts ---------------------------------------------------------------------------------------------------

    def _place_of(self, entry: Waiting) -> int:
        return bisect_left(self.entries, entry.order, key=_order)

    def _end_of(self, entry: Waiting) -> float:
        return min(entry.starts_by, entry.queued_at + self._max_seconds)

    def _push_end(self, entry: Waiting) -> None:
        heapq.heappush(self._ends, (self._end_of(entry), entry.number, entry.request.request_id))

    def check_invariants(self) -> None:
        """Raises AssertionError if the queue does not add up. For tests and soaks; computes everything anew."""
        orders = [entry.order for entry in self.entries]
        assert orders == sorted(set(orders)), "the queue is not in order"
        assert self._by_request == {entry.request.request_id: entry for entry in self.entries}, "the queue's index"
        assert self.num_tokens == sum(entry.num_tokens for entry in self.entries), "queued tokens"
        assert self.num_expected_tokens == sum(entry.num_expected_tokens for entry in self.entries)
        due = {(number, request_id) for _, number, request_id in self._ends}
        assert due.issuperset((e.number, e.request.request_id) for e in self.entries), "a wait without an end"


def _order(entry: Waiting) -> tuple[int, bool, int]:
    return entry.order
