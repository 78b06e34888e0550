"""Ledger: which replica a request goes to, and who waits. Knows budgets, leases and the queue; knows no Ray, no clock.

    request -> Lease, or a place in the queue -> [the holder submits to the replica, whose table then shows the lease]
            -> settle, or the replica's report no longer shows it

    lease_book   which leases are live, compared with each report      wait_queue   who waits, in which order
    placement    what is booked for a request, and where               admission    who may wait
    rebuilding   the first moments after a restart                     watch        who looks on

The budget of a replica is the blocks of its KV pool. Its load is the sum of its live leases. Replicas are the book of
record: a report is compared with what is booked, and what differs is corrected and counted. So a lost message can make
the ledger wrong for a moment, never for long, and a replica still refuses a submit that does not fit.

Why every lease ends. One that the replica never showed ends submit_seconds after its holder was told of it last. One that
it once showed ends when a newer report no longer shows it, or when the replica is forgotten (told, or silent for
lease_seconds). Nothing else is live. Reports of one replica carry ascending numbers and older ones are dropped, so what has
gone does not come back.

Two policies. ``reserve`` books every token the request may have; the budget is then never negative. ``expect`` books the
output length learned from what finished; a lease that outgrows that grows in the replica's table, and the ledger takes
the replica's number, even past the pool. A replica without room for a whole booking gets no grant.

Methods that take ``now`` (seconds of one monotonic clock) first do what is due by then: expiries, timeouts. Their
answers, and those to requests that waited, are what `grants` returns.
"""

from __future__ import annotations

import math
from collections import Counter, OrderedDict
from collections.abc import Iterable
from typing import Any

from serve_app.errors import (
    DeadlineExceededError,
    EngineUnavailableError,
    OverloadedError,
    RaggedServeError,
    RequestTooLargeError,
    ServerDrainingError,
)
from serve_app.routing.admission import MAX_RETRY_AFTER, Admission
from serve_app.routing.lease_book import LeaseBook, ReplicaBook
from serve_app.routing.leases import BookedLease, Lease, LeaseRequest, ReplicaReport
from serve_app.routing.ledger_options import LedgerOptions
from serve_app.routing.placement import Placement, freest_for, whole_need
from serve_app.routing.rebuilding import Rebuilding
from serve_app.routing.wait_queue import Waiting, WaitQueue
from serve_app.routing.watch import Watch, cause_of

MAX_SKIPS = 32
"""Requests granted past one that does not fit, in its whole life; then one replica is held for it until it fits. Also
the most waiting requests that one look at the queue passes over."""

CLOSED_SECONDS = 30.0
"""A server that was to end, and has not ended so long after its time, takes requests again."""

LOSSES = ("drift", "expired", "holders_lost", "lost_with_replica", "never_shown", "silent_replicas")
"""Kinds of events of a bad day. Counted from 0 on: who looks now and then sees the first one as growth."""


class Ledger:
    """The books of one application. ``epoch`` is higher in each later life of the router.

    ``rebuilding``: the router was restarted. Nothing is granted until ``grace_seconds`` after the first call, or until
    all replicas named by `expect_replicas` have reported; what they report is adopted.
    """

    def __init__(
        self, options: LedgerOptions, epoch: int, *, rebuilding: bool = False, grace_seconds: float = 2.0
    ) -> None:
        self.options = options
        self.epoch = epoch
        self.counters: Counter[str] = Counter(dict.fromkeys(LOSSES, 0))
        self.watch: Watch | None = None
        """May come and go at any time."""
        self.book = LeaseBook(epoch, self.counters)
        self.queue = WaitQueue(options.max_queue_seconds)
        self.admission = Admission(options)
        self.rebuilding = Rebuilding(rebuilding, grace_seconds)
        self._placement = Placement(self.admission)
        self._version: int | None = None
        self._now = -math.inf
        self._ends_at: float | None = None
        """When the server ends; None: it does not."""
        self._answers: OrderedDict[str, Lease | RaggedServeError] = OrderedDict()

    # -------------------------------------------------------------------------------------------------- replicas

    def report(self, report: ReplicaReport, now: float) -> None:
        """Takes the replica's table as the truth."""
        self._advance(now)
        freed = self.book.take_report(report, self._now, is_adopting=self.rebuilding.is_on)
        if freed is None:
            return
        for num_tokens in freed:
            self.admission.freed(num_tokens)
        self.rebuilding.heard_of(report.replica_id)

    def expect_replicas(self, replica_ids: Iterable[str]) -> None:
        """While rebuilding: these are all there are. When each has reported (or was forgotten) grants begin."""
        self.rebuilding.expect(set(replica_ids) - self.book.replicas.keys())

    def forget_replica(self, replica_id: str, now: float) -> None:
        """The replica is gone, and its leases with it. Reports still on their way are dropped for replica_seconds."""
        self._advance(now)
        self.book.forget_reports_of(replica_id, self._now)
        self._drop_replica(replica_id)

    def _drop_replica(self, replica_id: str) -> None:
        self.book.drop_replica(replica_id, self._now)
        self.rebuilding.heard_of(replica_id)

    @property
    def _has_open_replica(self) -> bool:
        return any(replica.is_open(self._now, self.options) for replica in self.book.replicas.values())

    # --------------------------------------------------------------------------------------------------- holders

    def request(self, request: LeaseRequest, now: float) -> Lease | None:
        """A lease, or None: it waits, and `grants` will answer. A repeated request keeps its place, or gets the same.

        Raises OverloadedError (429) if the queue is full, or so long that it would wait in vain; RequestTooLargeError
        (400) if no replica's pool could hold it; ServerDrainingError (503) after `close`.
        """
        self._advance(now)
        self.book.renew(request.holder_id, self._now)
        if (again := self._repeated(request)) is not None:
            return again
        before = self.queue.get(request.request_id)
        is_let_in = before is not None or request.is_continuation
        left = self.seconds_left(now)
        if left is not None and not is_let_in:
            self.counters["refused_at_end"] += 1
            raise ServerDrainingError(
                f"this server ends within {math.ceil(left)} s and takes nothing new",
                max(1, math.ceil(min(left, MAX_RETRY_AFTER))),
            )
        if (too_large := self._too_large(request)) is not None:
            if before is not None:
                self._leave_queue(before)
            raise too_large
        entry = self._enqueue(request, before)
        self._scan()
        answer = self._answers.pop(request.request_id, None)
        if isinstance(answer, Lease):
            return answer
        assert answer is None, "only expiries answer with an error, and they came first"
        self.admission.is_pressed = True
        if is_let_in:
            return None
        refusal = self.admission.refusal(entry, self.queue, self._now, has_open_replica=self._has_open_replica)
        if refusal is None:
            return None
        self.counters[refusal.kind] += 1
        retry_after = self.admission.retry_after(self.queue)
        self._leave_queue(entry)
        raise OverloadedError(refusal.reason, retry_after)

    def _repeated(self, request: LeaseRequest) -> Lease | None:
        """The lease that this very request got before, if its replica may not have heard of it."""
        answer = self._answers.pop(request.request_id, None)
        lease = self.book.unshown_of(request.request_id)
        if lease is None:
            return None
        if lease.replica_id in request.not_on or lease.holder_id != request.holder_id:
            if answer is not None:
                self.book.end(lease, "given_back", self._now)
            return None
        self.counters["repeated"] += 1
        self.book.is_told_again(lease, self._now)
        return self.book.told(lease)

    def _too_large(self, request: LeaseRequest) -> RequestTooLargeError | None:
        """The error, if none of the replicas that are known could hold it, even alone."""
        reports = [replica.report for replica in self.book.replicas.values()]
        if self.rebuilding.is_on or not reports or any(whole_need(request, report) for report in reports):
            return None
        largest = max(reports, key=lambda report: report.num_tokens)
        return RequestTooLargeError(
            f"{request.num_prompt_tokens} prompt tokens and {request.num_choices} x {request.max_output_tokens} output"
            f" tokens fit no replica; the largest holds {largest.num_tokens} tokens in all and"
            f" {largest.max_model_len} of one sequence"
        )

    def settle(self, lease_id: str, num_output_tokens: int | None, now: float) -> None:
        """The holder is done: the replica has ended the lease, or is lost, or never got it. A second one does nothing.

        ``num_output_tokens``: of all choices together; None: the answer was cut off, learn nothing from it.
        """
        self._advance(now)
        lease = self.book.leases.get(lease_id)
        if lease is not None:
            self.admission.freed(self.book.told(lease).num_tokens)
        if (settled := self.book.settle(lease_id, self._now)) is not None:
            self.admission.learn(*settled, num_output_tokens)

    def close(self, seconds: float, now: float) -> None:
        """The server ends in ``seconds``, and nothing new is let in. What waits and what moves is still served.

        Forgotten CLOSED_SECONDS after that time: then whoever wanted it to end has not ended it.
        """
        self._advance(now)
        self._ends_at = self._now + seconds

    def seconds_left(self, now: float) -> float | None:
        """Until the server ends, at least 0; None: it does not."""
        if self._ends_at is None or now >= self._ends_at + CLOSED_SECONDS:
            return None
        return max(0.0, self._ends_at - now)

    def renew(self, holder_id: str, now: float) -> None:
        """The holder lives, and so do all its leases."""
        self._advance(now)
        self.book.renew(holder_id, self._now)

    def withdraw(self, request_id: str) -> Lease | None:
        """Nobody wants it any more, and nobody will submit it.

        It leaves the queue. A lease that was granted for it, and that the replica has not shown, ends and is returned.
        """
        self._answers.pop(request_id, None)
        entry = self.queue.get(request_id)
        if entry is not None:
            self._leave_queue(entry)
            self.counters["withdrawn"] += 1
        lease = self.book.unshown_of(request_id)
        if lease is None:
            return None
        told = self.book.told(lease)
        self.book.end(lease, "given_back", self._now)
        return told

    # ----------------------------------------------------------------------------------------------------- queue

    def grants(self, now: float) -> list[tuple[str, Lease | RaggedServeError]]:
        """Request ids that waited, each with its lease or the error that ends its wait. Each is said once."""
        self._advance(now)
        self._scan()
        answers = list(self._answers.items())
        self._answers.clear()
        return answers

    def _enqueue(self, request: LeaseRequest, before: Waiting | None) -> Waiting:
        """``before``: the same request, asked earlier. It keeps its age and its deadline."""
        if before is None:
            number, queued_at, num_skipped = self.queue.next_number(), self._now, 0
        else:
            number, queued_at, num_skipped = before.number, before.queued_at, before.num_skipped
            self._leave_queue(before)
        deadline = self._now + (math.inf if request.remaining_ms is None else request.remaining_ms / 1000.0)
        block_size = min((replica.report.block_size for replica in self.book.replicas.values()), default=1)
        entry = Waiting(
            request,
            number,
            queued_at,
            deadline,
            deadline - self.admission.margin_for(request),
            request.num_prompt_tokens + request.num_choices * request.max_output_tokens,
            self.admission.num_expected_tokens(request, block_size),
            num_skipped,
        )
        self.queue.enter(entry)
        return entry

    def _leave_queue(self, entry: Waiting) -> None:
        self.queue.leave(entry)
        if entry.held_replica_id is not None:
            self.book.room += 1

    def _scan(self) -> None:
        """Grants to waiting requests, in order. One that fits nowhere is passed over at most MAX_SKIPS times.

        After that one replica is held for it: only requests ahead of it are granted there. The leases on that replica
        end, the request fits its whole pool, so its turn comes; the other replicas go on serving those behind it.
        """
        waiting, book = self.queue.entries, self.book
        if self.rebuilding.is_on or not waiting:
            if self.watch is not None:
                self._say_who_waits(0, "no_replica")
            return
        open_ones = {i: replica for i, replica in book.replicas.items() if replica.is_open(self._now, self.options)}
        candidates = dict(open_ones)
        passed: list[Waiting] = []
        i = 0
        while i < len(waiting) and candidates and len(passed) < MAX_SKIPS:
            entry = waiting[i]
            found = None if entry.seen_room == book.room else self._placement.choose(entry.request, candidates)
            if found is not None:
                self._leave_queue(entry)
                if self.watch is not None:
                    views = self._placement.views(entry.request, book.replicas, open_ones, candidates)
                    self.watch.granted(entry.request, found[0], views, self._now)
                self._grant(entry.request, *found)
                for other in passed:
                    other.num_skipped += 1
                    if other.num_skipped == MAX_SKIPS:
                        self._hold(other, candidates)
            else:
                if self.watch is not None and entry.seen_room != book.room:
                    cause = cause_of(self._placement.views(entry.request, book.replicas, open_ones, candidates))
                    self.watch.waits(entry.request.request_id, cause, self._now)
                entry.seen_room = book.room
                passed.append(entry)
                i += 1
                if entry.num_skipped >= MAX_SKIPS:
                    self._hold(entry, candidates)
        if self.watch is not None:
            self._say_who_waits(i, "fairness" if open_ones else "no_replica")

    def _say_who_waits(self, first: int, cause: str) -> None:
        """Of those that were not looked at."""
        assert self.watch is not None
        for entry in self.queue.entries[first:]:
            self.watch.waits(entry.request.request_id, cause, self._now)

    def _hold(self, entry: Waiting, candidates: dict[str, ReplicaBook]) -> None:
        """Takes one replica out of ``candidates``: the one held for it before, else the freest that can ever hold it."""
        if entry.held_replica_id not in candidates:
            freest = freest_for(entry.request, candidates)
            if freest is None:
                return
            entry.held_replica_id = freest
        candidates.pop(entry.held_replica_id, None)

    def _grant(self, request: LeaseRequest, replica_id: str, num_blocks: int) -> None:
        lease = self.book.grant(request, replica_id, num_blocks, self._now)
        self.admission.is_pressed = bool(self.queue)
        self._answers[request.request_id] = self.book.told(lease)

    # ------------------------------------------------------------------------------------------------------- time

    def _advance(self, now: float) -> None:
        """Does what is due. Costs a look at each replica and holder; a clock that goes back stands still."""
        now = max(now, self._now)
        book, options = self.book, self.options
        if self.admission.is_pressed and book.leases and self._now > -math.inf and self._has_open_replica:
            self.admission.drain.elapse(now - self._now)
        self._now = now
        self.rebuilding.advance(now)
        book.fade(now, options)
        for replica_id in book.silent_replicas(now, options):
            self.counters["silent_replicas"] += 1
            self._drop_replica(replica_id)
        book.end_unshown_leases(now, options)
        for holder_id in book.silent_holders(now, options):
            self._lose_holder(holder_id)
        self._end_waits()

    def _lose_holder(self, holder_id: str) -> None:
        """Ends its leases (see `LeaseBook.lose_holder`) and the waits of its requests."""
        self.book.lose_holder(holder_id, self._now, self.options)
        for entry in self.queue.of_holder(holder_id):
            self._leave_queue(entry)
            self.counters["expired_in_queue"] += 1
            self._answers[entry.request.request_id] = EngineUnavailableError(
                f"{holder_id} did not renew its leases for {self.options.lease_seconds} s"
            )

    def _end_waits(self) -> None:
        while (entry := self.queue.find_ended(self._now)) is not None:
            retry_after = self.admission.retry_after(self.queue)
            self._leave_queue(entry)
            waited = f"waited {self._now - entry.queued_at:.1f} s for a replica with room"
            error: RaggedServeError
            if entry.deadline <= self._now:
                self.counters["deadlines_exceeded"] += 1
                error = DeadlineExceededError(f"{waited}; its deadline has passed")
            elif entry.starts_by <= self._now:
                self.counters["too_late_to_start"] += 1
                left = entry.deadline - self._now
                error = OverloadedError(
                    f"{waited}; an answer takes longer than the {left:.1f} s that are left", retry_after
                )
            else:
                self.counters["timed_out"] += 1
                error = OverloadedError(f"{waited}; the limit is {self.options.max_queue_seconds} s", retry_after)
            self._answers[entry.request.request_id] = error

    def next_event_at(self, now: float) -> float | None:
        """When `grants` should be called at the latest, even if nothing happens before. None: nothing is pending."""
        if self._answers:
            return now
        times = self.book.due_times(self.options)
        times += [due for due in (self.rebuilding.ends_at(now), self.queue.next_end) if due is not None]
        return min(times, default=None)

    def set_options(self, options: LedgerOptions, version: int) -> bool:
        """Takes the options unless a later version is in force. Says whether it did. Live leases keep their bookings."""
        if self._version is not None and version < self._version:
            return False
        self.options = self.admission.options = options
        self._version = version
        self.book.room += 1
        self.queue.set_max_seconds(options.max_queue_seconds)
        return True

    # ------------------------------------------------------------------------------------------------ looking at it

    @property
    def is_rebuilding(self) -> bool:
        """Nothing is granted yet."""
        return self.rebuilding.is_on

    @property
    def num_queued_requests(self) -> int:
        return len(self.queue)

    @property
    def num_queued_tokens(self) -> int:
        """Prompt and output tokens of all waiting requests."""
        return self.queue.num_tokens

    @property
    def num_queued_budget(self) -> int:
        """Tokens of the pools that they would take up, where each choice takes at least the share of its place in a step."""
        reports = [replica.report for replica in self.book.replicas.values()]
        most = min((report.num_tokens / report.max_num_seqs for report in reports), default=0.0)
        return max(
            self.queue.num_tokens, math.ceil(most * sum(entry.request.num_choices for entry in self.queue.entries))
        )

    def rows(self, replica_id: str) -> tuple[BookedLease, ...]:
        """The live leases of one replica, as its own table should show them."""
        return self.book.rows(replica_id)

    def snapshot(self) -> dict[str, Any]:
        """Plain data, as of the last call that passed ``now``."""
        book, queue = self.book, self.queue
        return {
            "epoch": self.epoch,
            "policy": self.options.policy,
            "options_version": self._version,
            "is_rebuilding": self.is_rebuilding,
            "seconds_left": self.seconds_left(self._now),
            "num_leases": len(book.leases),
            "num_unshown_leases": len(book.unshown),
            "num_holders": len(book.holders),
            "num_queued_requests": len(queue),
            "num_queued_tokens": queue.num_tokens,
            "oldest_wait_seconds": max((self._now - entry.queued_at for entry in queue.entries), default=0.0),
            "drain_tokens_per_second": self.admission.drain.tokens_per_second,
            "num_output_lengths": len(self.admission.lengths),
            "counters": dict(self.counters),
            "replicas": {
                replica_id: {**replica.snapshot(), "is_silent": replica.is_silent(self._now, self.options)}
                for replica_id, replica in book.replicas.items()
            },
        }

    def check_invariants(self) -> None:
        """Raises AssertionError if the books do not add up. For tests and soaks; computes everything anew."""
        self.book.check_invariants()
        self.queue.check_invariants()
        assert not any(self.queue.get(request_id) for request_id in self._answers), (
            "a request is answered and still waits"
        )
