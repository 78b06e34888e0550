"""Admission: who may wait, by what requests will take and how fast room is freed. Knows the queue's sums and what was
learned from what has ended; knows no replica, no lease, no clock.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from serve_app.routing.estimates import DrainRate, OutputLengths, ServiceTime
from serve_app.routing.leases import LeaseRequest, num_blocks_for
from serve_app.routing.ledger_options import LedgerOptions
from serve_app.routing.wait_queue import Waiting, WaitQueue

TIME_MARGIN = 1.25
"""A request is let wait if it would be done in time were the wait and the answer so much longer than expected."""

WAIT_SHARE = 0.25
"""Of the time that a request has, what waiting may take. A queue as long as the shortest answers can bear would serve them
alone, and show nobody a token before half of the time has passed."""

MAX_RETRY_AFTER = 60
"""Seconds."""


class Refusal(NamedTuple):
    """Why a request may not wait."""

    kind: str
    """As it is counted."""
    reason: str


class Admission:
    """``options`` may change while it runs."""

    def __init__(self, options: LedgerOptions) -> None:
        self.options = options
        self.is_pressed = False
        """The last request found no room, so what is freed is freed as fast as it can be."""
        self.lengths = OutputLengths()
        self.drain = DrainRate()
        self._service = ServiceTime()

    # ---- what a request will take --------------------------------------------------------------------------------

    def allowance(self, max_output_tokens: int) -> int:
        """Output tokens that the policy books for a choice that may have so many."""
        return max_output_tokens if self.options.policy == "reserve" else self.lengths.expected(max_output_tokens)

    def num_expected_tokens(self, request: LeaseRequest, block_size: int) -> int:
        """What will be booked for it, in the unit of the drain rate: whole blocks."""
        num_output = self.allowance(request.max_output_tokens)
        return block_size * num_blocks_for(request.num_prompt_tokens, num_output, request.num_choices, block_size)

    def margin_for(self, request: LeaseRequest) -> float:
        """Seconds before its deadline at which it must have been granted."""
        if request.is_continuation:
            return 0.0
        return TIME_MARGIN * (self._service.expected(self.lengths.expected(request.max_output_tokens)) or 0.0)

    def learn(self, request: LeaseRequest, seconds: float, num_output_tokens: int | None) -> None:
        """From an answer that ended ``seconds`` after its grant. ``num_output_tokens``: None: it was cut off."""
        allowed = request.max_output_tokens
        if num_output_tokens is not None:
            length = min(allowed, -(-num_output_tokens // request.num_choices))
            if allowed:  # an embedding has no output
                self.lengths.add(length, allowed)
            if not request.is_continuation:  # else a part of the answer was there before the grant
                self._service.add(length, seconds)
        elif (expected := self._service.expected(self.lengths.expected(allowed))) is not None and seconds > expected:
            # Cut off, and it had taken longer than an answer takes: without these a replica that became slow, and ends
            # nothing in time, would never be found slow.
            self._service.add(self.lengths.expected(allowed), seconds)

    def freed(self, num_tokens: int) -> None:
        """A lease of so many tokens has ended."""
        if self.is_pressed:
            self.drain.add(num_tokens)

    # ---- who may wait --------------------------------------------------------------------------------------------

    def refusal(self, entry: Waiting, queue: WaitQueue, now: float, *, has_open_replica: bool) -> Refusal | None:
        """Of a new request, which is the last to have come into the queue. None: it may wait."""
        options = self.options
        others = len(queue) - 1
        if others >= options.max_queued_requests or (others > 0 and queue.num_tokens > options.max_queued_tokens):
            return Refusal(
                "refused",
                f"{others} requests of {queue.num_tokens - entry.num_tokens} tokens are waiting; at most"
                f" {options.max_queued_requests} of {options.max_queued_tokens} may",
            )
        seconds = self._seconds_to_grant(entry, queue) if has_open_replica else None
        if seconds is not None and seconds > options.max_queue_seconds:
            return Refusal(
                "refused_as_too_late",
                f"{others} requests wait, some {seconds:.0f} s long; the limit is {options.max_queue_seconds:g} s",
            )
        seconds = seconds or 0.0
        remaining = entry.deadline - now
        if seconds > WAIT_SHARE * remaining or now + TIME_MARGIN * seconds > entry.starts_by:
            return Refusal(
                "refused_as_too_late",
                f"{others} requests wait, some {seconds:.1f} s long, and an answer takes time; this one has"
                f" {remaining:.1f} s",
            )
        return None

    def _seconds_to_grant(self, entry: Waiting, queue: WaitQueue) -> float | None:
        """How long it will wait, by what is freed now. None: that is not known."""
        rate = self.drain.tokens_per_second
        return None if rate is None else queue.num_expected_tokens_up_to(entry) / max(rate, 1e-9)

    def retry_after(self, queue: WaitQueue) -> int:
        """Whole seconds until what waits now, the last one included, will have found room."""
        rate = self.drain.tokens_per_second
        if rate is None:
            # Nothing measured: by then all that wait now have left the queue, one way or the other.
            seconds = self.options.max_queue_seconds
        else:
            seconds = queue.num_expected_tokens / max(rate, 1e-9)
        return max(1, math.ceil(min(seconds, MAX_RETRY_AFTER)))
