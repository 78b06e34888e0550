"""Ledger: which replica a request goes to, and who waits. Knows budgets, leases and the queue; knows no Ray, no clock.

    request -> Lease, or a place in the queue -> [the holder submits to the replica, whose table then shows the lease]
            -> settle, or the replica's report no longer shows it

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

import heapq
import math
from bisect import bisect_left, insort
from collections import Counter, OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

from serve_app.errors import (
    ConfigurationError,
    DeadlineExceededError,
    EngineUnavailableError,
    OverloadedError,
    RaggedServeError,
    RequestTooLargeError,
    ServerDrainingError,
)
from serve_app.routing.estimates import DrainRate, OutputLengths, ServiceTime

POLICIES = ("reserve", "expect")

NEAR_TIE = 0.05
"""Share of a pool. Replicas whose free budgets differ by less are equal; then the longest cached prefix wins."""

MAX_SKIPS = 32
"""Requests granted past one that does not fit, in its whole life; then one replica is held for it until it fits. Also
the most waiting requests that one look at the queue passes over."""

STANDBY_SHARE = 8
"""A replica is granted one sequence more for every so many that its steps hold, at least one: the next is there when one
ends. More than that would wait in its engine, behind a queue that nobody bounds."""

TIME_MARGIN = 1.25
"""A request is let wait if it would be done in time were the wait and the answer so much longer than expected."""

WAIT_SHARE = 0.25
"""Of the time that a request has, what waiting may take. A queue as long as the shortest answers can bear would serve them
alone, and show nobody a token before half of the time has passed."""

MAX_RETRY_AFTER = 60
"""Seconds."""

CLOSED_SECONDS = 30.0
"""A server that was to end, and has not ended so long after its time, takes requests again."""


def num_blocks_for(num_prompt_tokens: int, num_output_tokens: int, num_choices: int, block_size: int) -> int:
    """Blocks of one request: full blocks of the prompt once, the rest for each choice.

    >>> num_blocks_for(70, 30, 2, 32)  # 2 full blocks shared; (100 tokens = 4 blocks) - 2 for each choice
    6
    """
    full = num_prompt_tokens // block_size
    whole = -(-(num_prompt_tokens + num_output_tokens) // block_size)
    return full + num_choices * (whole - full)


LOSSES = ("drift", "expired", "holders_lost", "lost_with_replica", "never_shown", "silent_replicas")
"""Kinds of events of a bad day. Counted from 0 on: who looks now and then sees the first one as growth."""


# ------------------------------------------------------------------------------------------ what crosses processes


class Lease(NamedTuple):
    """Room for one request, all its choices, on one replica."""

    lease_id: str
    replica_id: str
    num_tokens: int
    """Whole blocks times the replica's block size."""
    epoch: int
    fingerprint: str = ""
    """Of the replica's numerics; empty: not known."""


@dataclass(frozen=True)
class LeaseRequest:
    """One request that wants a place."""

    request_id: str
    holder_id: str
    """Who submits, renews and settles: the id of an ingress."""

    num_prompt_tokens: int
    max_output_tokens: int
    """Of each choice. 0: the prompt is all (an embedding)."""

    num_choices: int = 1

    priority: int = 0
    """Lower is served earlier. Equal priorities are served in order of arrival."""

    prefix_hashes: tuple[int, ...] = ()
    """One hash per full block of the prompt, each over the whole prefix up to there. Lowers the work, not the booking."""

    not_on: frozenset[str] = frozenset()
    """Replicas that must not get it."""

    remaining_ms: float | None = None
    """Milliseconds until nobody wants the answer."""

    fingerprint: str | None = None
    """Of two replicas with room, one with this numerics fingerprint comes first."""

    is_continuation: bool = False
    """Its answer has begun, on a replica that is lost or has left. It waits before all others of its priority, and is let
    in where nothing new is: the queue is full, or the server ends."""


class BookedLease(NamedTuple):
    """One row of a replica's table."""

    lease_id: str
    holder_id: str
    num_blocks: int
    num_seqs: int = 1
    """Choices."""


@dataclass(frozen=True)
class ReplicaReport:
    """What a replica says of itself, a few times a second."""

    replica_id: str
    report_number: int
    """Ascending. A report that comes after one with a higher number is dropped."""

    block_size: int
    num_blocks: int
    """Of the KV pool: the budget."""

    max_model_len: int
    fingerprint: str
    leases: tuple[BookedLease, ...] = ()
    """The whole table."""

    num_ended_leases: int = 0
    """Since the replica started."""

    num_running: int = 0
    num_waiting: int = 0
    max_num_seqs: int = 1 << 30
    """Sequences that one step holds."""

    is_draining: bool = False
    """It leaves: no more grants. What was granted before it still takes."""


@dataclass(frozen=True)
class LedgerOptions:
    """What can be changed at run time. Raises ConfigurationError naming the option, its value and its limit."""

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


# --------------------------------------------------------------------------------------------------- for who looks on


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


# ----------------------------------------------------------------------------------------------------------- the books


@dataclass(slots=True, eq=False)
class _Row:
    """One live lease."""

    lease_id: str
    holder_id: str
    replica_id: str
    num_seqs: int = 1
    num_blocks: int = 0
    """Changed by Ledger._set_blocks alone."""
    granted_at: float = 0.0
    """When its holder was told, last."""
    request: LeaseRequest | None = None
    """None: adopted from a report."""
    is_shown: bool = False
    """A report showed it."""


class _Ended(NamedTuple):
    """What is remembered of a lease that ended, for as long as a message about it may be on its way."""

    at: float
    row: _Row | None
    """None: settled before it was known, or nothing more can be learned from it."""
    is_settled: bool
    """Its holder said so, hence the replica had ended it: a report that shows it is older than that."""


@dataclass(slots=True, eq=False)
class _Replica:
    report: ReplicaReport
    reported_at: float
    leases: dict[str, _Row] = field(default_factory=dict)
    num_booked_blocks: int = 0
    """The sum over ``leases``. Changed by Ledger._set_blocks alone."""
    num_booked_seqs: int = 0
    """The same for sequences."""
    prefixes: OrderedDict[int, None] = field(default_factory=OrderedDict)
    """Hashes of the prompts granted to it, as many as its pool has blocks, least recently granted first."""
    last_grant: int = 0

    @property
    def num_free_blocks(self) -> int:
        return self.report.num_blocks - self.num_booked_blocks

    @property
    def num_free_places(self) -> int:
        """Sequences that it may still be granted."""
        most = self.report.max_num_seqs
        return most + max(1, most // STANDBY_SHARE) - self.num_booked_seqs

    def has_place(self, num_choices: int) -> bool:
        """For so many sequences more. For a request of more than a step holds: if there is nothing else."""
        return min(num_choices, self.report.max_num_seqs) <= self.num_free_places


@dataclass(slots=True, eq=False)
class _Holder:
    renewed_at: float
    leases: set[str] = field(default_factory=set)
    is_gone: bool = False
    """Not heard of for lease_seconds. What its replicas still show they end themselves."""


@dataclass(slots=True, eq=False)
class _Waiting:
    """One place in the queue."""

    request: LeaseRequest
    number: int
    queued_at: float
    deadline: float
    """Of the request itself; inf: none."""
    starts_by: float
    """Granted later it would not be done by its deadline."""
    num_tokens: int
    num_expected_tokens: int
    num_skipped: int = 0
    held_replica_id: str | None = None
    """Nobody behind it is granted there."""
    seen_room: int = -1
    """Ledger._room when it was last found not to fit. As long as that stands it still does not."""

    @property
    def order(self) -> tuple[int, bool, int]:
        return (self.request.priority, not self.request.is_continuation, self.number)


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
        self.is_rebuilding = rebuilding
        self.counters: Counter[str] = Counter(dict.fromkeys(LOSSES, 0))
        self.watch: Watch | None = None
        """May come and go at any time."""
        self._grace_seconds = grace_seconds
        self._rebuilt_at: float | None = None
        self._awaited: set[str] = set()
        self._version: int | None = None
        self._now = -math.inf
        self._num_leases = 0
        self._num_arrivals = 0
        self._room = 0
        """Rises whenever somebody who did not fit might now."""
        self._replicas: dict[str, _Replica] = {}
        self._holders: dict[str, _Holder] = {}
        self._rows: dict[str, _Row] = {}
        self._unshown: OrderedDict[str, _Row] = OrderedDict()
        """Granted, and no report showed it yet. By ``granted_at``."""
        self._by_request: dict[str, str] = {}
        """Request id -> its lease in ``_unshown``."""
        self._ended: OrderedDict[str, _Ended] = OrderedDict()
        self._ends_at: float | None = None
        """When the server ends; None: it does not."""
        self._forgotten: dict[str, float] = {}
        self._queue: list[_Waiting] = []
        self._waiting: dict[str, _Waiting] = {}
        self._deadlines: list[tuple[float, int, str]] = []
        """Heap of (deadline, number, request id). Entries that left the queue are dropped when they come up."""
        self._num_queued_tokens = 0
        self._num_queued_expected_tokens = 0
        self._answers: OrderedDict[str, Lease | RaggedServeError] = OrderedDict()
        self._lengths = OutputLengths()
        self._drain = DrainRate()
        self._service = ServiceTime()
        self._is_pressed = False
        """The last request found no room, so what is freed is freed as fast as it can be."""

    # -------------------------------------------------------------------------------------------------- replicas

    def report(self, report: ReplicaReport, now: float) -> None:
        """Takes the replica's table as the truth."""
        self._advance(now)
        replica_id = report.replica_id
        if replica_id in self._forgotten:
            # On its way when the replica went. One that did not go is taken again when the memory of it has faded.
            self.counters["reports_after_end"] += 1
            return
        replica = self._replicas.get(replica_id)
        is_first = replica is None
        if replica is None:
            replica = self._replicas[replica_id] = _Replica(report, self._now)
        elif report.report_number <= replica.report.report_number:
            self.counters["reports_out_of_order"] += 1
            return
        replica.report = report
        replica.reported_at = self._now
        shown = set()
        for booked in report.leases:
            shown.add(booked.lease_id)
            self._compare(replica, booked, is_first)
        for row in [row for row in replica.leases.values() if row.is_shown and row.lease_id not in shown]:
            self._end(row, "ended_by_replica")
        while len(replica.prefixes) > report.num_blocks:
            replica.prefixes.popitem(last=False)
        self._room += 1
        if replica_id in self._awaited:
            self._awaited.discard(replica_id)
            if not self._awaited:
                self.is_rebuilding = False

    def _compare(self, replica: _Replica, booked: BookedLease, is_first: bool) -> None:
        """One row of a report with what is booked."""
        row = self._rows.get(booked.lease_id)
        if row is not None and row.replica_id != replica.report.replica_id:
            self._end(row, "drift")
            row = None
        if row is None:
            ended = self._ended.get(booked.lease_id)
            if ended is not None and ended.is_settled:
                return
            self.counters["adopted" if is_first or self.is_rebuilding else "drift"] += 1
            self._ended.pop(booked.lease_id, None)
            row = _Row(
                booked.lease_id,
                booked.holder_id,
                replica.report.replica_id,
                num_seqs=booked.num_seqs,
                granted_at=self._now,
            )
        elif row.num_blocks < booked.num_blocks:
            self.counters["grown_blocks"] += booked.num_blocks - row.num_blocks
        elif row.num_blocks > booked.num_blocks:
            self.counters["drift"] += 1
        if row.num_blocks != booked.num_blocks:
            grows = 0 < row.num_blocks < booked.num_blocks
            self._set_blocks(row, booked.num_blocks)
            self.counters["grown_past_pool"] += grows and replica.num_free_blocks < 0
        if not row.is_shown:
            row.is_shown = True
            self._no_longer_unshown(row)

    def expect_replicas(self, replica_ids: Iterable[str]) -> None:
        """While rebuilding: these are all there are. When each has reported (or was forgotten) grants begin."""
        if self.is_rebuilding:
            self._awaited = set(replica_ids) - self._replicas.keys()
            self.is_rebuilding = bool(self._awaited)

    def forget_replica(self, replica_id: str, now: float) -> None:
        """The replica is gone, and its leases with it. Reports still on their way are dropped for replica_seconds."""
        self._advance(now)
        self._forgotten[replica_id] = self._now
        self._forget(replica_id)

    def _forget(self, replica_id: str) -> None:
        replica = self._replicas.get(replica_id)
        if replica is not None:
            for row in list(replica.leases.values()):
                self._end(row, "lost_with_replica")
            del self._replicas[replica_id]
            self._room += 1
        if replica_id in self._awaited:
            self._awaited.discard(replica_id)
            self.is_rebuilding = bool(self._awaited)

    def _is_open(self, replica: _Replica) -> bool:
        """May get grants."""
        return not replica.report.is_draining and self._now - replica.reported_at <= self.options.replica_seconds

    @property
    def _has_open_replica(self) -> bool:
        return any(self._is_open(replica) for replica in self._replicas.values())

    # --------------------------------------------------------------------------------------------------- holders

    def request(self, request: LeaseRequest, now: float) -> Lease | None:
        """A lease, or None: it waits, and `grants` will answer. A repeated request keeps its place, or gets the same.

        Raises OverloadedError (429) if the queue is full, or so long that it would wait in vain; RequestTooLargeError
        (400) if no replica's pool could hold it; ServerDrainingError (503) after `close`.
        """
        self._advance(now)
        self._renew(request.holder_id)
        if (again := self._repeated(request)) is not None:
            return again
        before = self._waiting.get(request.request_id)
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
        self._is_pressed = True
        if not is_let_in and (reason := self._why_not_wait(entry)) is not None:
            retry_after = self._retry_after()
            self._leave_queue(entry)
            raise OverloadedError(reason, retry_after)
        return None

    def _why_not_wait(self, entry: _Waiting) -> str | None:
        """Why a new request may not wait, in words; None: it may. Counts it."""
        options = self.options
        others = len(self._queue) - 1
        if others >= options.max_queued_requests or (
            others > 0 and self._num_queued_tokens > options.max_queued_tokens
        ):
            self.counters["refused"] += 1
            return (
                f"{others} requests of {self._num_queued_tokens - entry.num_tokens} tokens are waiting; at most"
                f" {options.max_queued_requests} of {options.max_queued_tokens} may"
            )
        seconds = self._seconds_to_grant(entry)
        if seconds is not None and seconds > options.max_queue_seconds:
            self.counters["refused_as_too_late"] += 1
            return f"{others} requests wait, some {seconds:.0f} s long; the limit is {options.max_queue_seconds:g} s"
        seconds = seconds or 0.0
        remaining = entry.deadline - self._now
        if seconds > WAIT_SHARE * remaining or self._now + TIME_MARGIN * seconds > entry.starts_by:
            self.counters["refused_as_too_late"] += 1
            return (
                f"{others} requests wait, some {seconds:.1f} s long, and an answer takes time; this one has"
                f" {remaining:.1f} s"
            )
        return None

    def _repeated(self, request: LeaseRequest) -> Lease | None:
        """The lease that this very request got before, if its replica may not have heard of it."""
        answer = self._answers.pop(request.request_id, None)
        lease_id = self._by_request.get(request.request_id)
        if lease_id is None:
            return None
        row = self._rows[lease_id]
        if row.replica_id in request.not_on or row.holder_id != request.holder_id:
            if answer is not None:
                self._end(row, "given_back")
            return None
        self.counters["repeated"] += 1
        row.granted_at = self._now  # the holder hears of it only now, and may take as long as the first time
        self._unshown.move_to_end(lease_id)
        return self._lease_of(row)

    def _too_large(self, request: LeaseRequest) -> RequestTooLargeError | None:
        """The error, if none of the replicas that are known could hold it, even alone."""
        reports = [replica.report for replica in self._replicas.values()]
        if self.is_rebuilding or not reports or any(self._whole_need(request, report) for report in reports):
            return None
        largest = max(reports, key=_pool_tokens)
        return RequestTooLargeError(
            f"{request.num_prompt_tokens} prompt tokens and {request.num_choices} x {request.max_output_tokens} output"
            f" tokens fit no replica; the largest holds {_pool_tokens(largest)} tokens in all and"
            f" {largest.max_model_len} of one sequence"
        )

    def settle(self, lease_id: str, num_output_tokens: int | None, now: float) -> None:
        """The holder is done: the replica has ended the lease, or is lost, or never got it. A second one does nothing.

        ``num_output_tokens``: of all choices together; None: the answer was cut off, learn nothing from it.
        """
        self._advance(now)
        row = self._rows.get(lease_id)
        if row is None:
            ended = self._ended.get(lease_id)
            row = None if ended is None or ended.is_settled else ended.row
            ended_at = self._now if ended is None else ended.at
            if ended is None or not ended.is_settled:
                self._remember(lease_id, None, is_settled=True)
        else:
            ended_at = self._now
            self._end(row, "settled")
        if row is not None and row.request is not None:
            self._learn(row.request, ended_at - row.granted_at, num_output_tokens)

    def _learn(self, request: LeaseRequest, seconds: float, num_output_tokens: int | None) -> None:
        """From an answer that ended ``seconds`` after its grant."""
        allowed = request.max_output_tokens
        if num_output_tokens is not None:
            length = min(allowed, -(-num_output_tokens // request.num_choices))
            if allowed:  # an embedding has no output
                self._lengths.add(length, allowed)
            if not request.is_continuation:  # else a part of the answer was there before the grant
                self._service.add(length, seconds)
        elif (expected := self._service.expected(self._lengths.expected(allowed))) is not None and seconds > expected:
            # Cut off, and it had taken longer than an answer takes: without these a replica that became slow, and ends
            # nothing in time, would never be found slow.
            self._service.add(self._lengths.expected(allowed), seconds)

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
        self._renew(holder_id)

    def _renew(self, holder_id: str) -> None:
        holder = self._holders.get(holder_id)
        if holder is None:
            self._holders[holder_id] = _Holder(self._now)
        else:
            holder.renewed_at, holder.is_gone = self._now, False

    def withdraw(self, request_id: str) -> Lease | None:
        """Nobody wants it any more, and nobody will submit it.

        It leaves the queue. A lease that was granted for it, and that the replica has not shown, ends and is returned.
        """
        self._answers.pop(request_id, None)
        entry = self._waiting.get(request_id)
        if entry is not None:
            self._leave_queue(entry)
            self.counters["withdrawn"] += 1
        lease_id = self._by_request.get(request_id)
        if lease_id is None:
            return None
        row = self._rows[lease_id]
        lease = self._lease_of(row)
        self._end(row, "given_back")
        return lease

    # ----------------------------------------------------------------------------------------------------- queue

    def grants(self, now: float) -> list[tuple[str, Lease | RaggedServeError]]:
        """Request ids that waited, each with its lease or the error that ends its wait. Each is said once."""
        self._advance(now)
        self._scan()
        answers = list(self._answers.items())
        self._answers.clear()
        return answers

    def _enqueue(self, request: LeaseRequest, before: _Waiting | None) -> _Waiting:
        """``before``: the same request, asked earlier. It keeps its age and its deadline."""
        if before is None:
            self._num_arrivals += 1
            number, queued_at, num_skipped = self._num_arrivals, self._now, 0
        else:
            number, queued_at, num_skipped = before.number, before.queued_at, before.num_skipped
            self._leave_queue(before)
        remaining = math.inf if request.remaining_ms is None else request.remaining_ms / 1000.0
        service = (
            None
            if request.is_continuation
            else self._service.expected(self._lengths.expected(request.max_output_tokens))
        )
        entry = _Waiting(
            request,
            number,
            queued_at,
            self._now + remaining,
            self._now + remaining - TIME_MARGIN * (service or 0.0),
            request.num_prompt_tokens + request.num_choices * request.max_output_tokens,
            self._num_expected_tokens(request),
            num_skipped,
        )
        insort(self._queue, entry, key=_order)
        self._waiting[request.request_id] = entry
        self._num_queued_tokens += entry.num_tokens
        self._num_queued_expected_tokens += entry.num_expected_tokens
        self._push_deadline(entry)
        return entry

    def _leave_queue(self, entry: _Waiting) -> None:
        del self._queue[bisect_left(self._queue, entry.order, key=_order)]
        del self._waiting[entry.request.request_id]
        self._num_queued_tokens -= entry.num_tokens
        self._num_queued_expected_tokens -= entry.num_expected_tokens
        if entry.held_replica_id is not None:
            self._room += 1

    def _push_deadline(self, entry: _Waiting) -> None:
        deadline = min(entry.starts_by, entry.queued_at + self.options.max_queue_seconds)
        heapq.heappush(self._deadlines, (deadline, entry.number, entry.request.request_id))

    def _retry_after(self) -> int:
        """Whole seconds until what waits now, the last one included, will have found room."""
        rate = self._drain.tokens_per_second
        if rate is None:
            # Nothing measured: by then all that wait now have left the queue, one way or the other.
            seconds = self.options.max_queue_seconds
        else:
            seconds = self._num_queued_expected_tokens / max(rate, 1e-9)
        return max(1, math.ceil(min(seconds, MAX_RETRY_AFTER)))

    def _seconds_to_grant(self, entry: _Waiting) -> float | None:
        """How long a request that has just come will wait, by what is freed now. None: that is not known, or no replica is
        open, and it waits for one."""
        rate = self._drain.tokens_per_second
        if rate is None or not self._has_open_replica:
            return None
        if self._queue[-1] is entry:
            num_tokens = self._num_queued_expected_tokens
        else:
            place = bisect_left(self._queue, entry.order, key=_order)
            num_tokens = sum(ahead.num_expected_tokens for ahead in self._queue[: place + 1])
        return num_tokens / max(rate, 1e-9)

    def _num_expected_tokens(self, request: LeaseRequest) -> int:
        """What will be booked for it, in the unit of the drain rate: whole blocks."""
        block_size = min((replica.report.block_size for replica in self._replicas.values()), default=1)
        num_output = self._allowance(request.max_output_tokens)
        return block_size * num_blocks_for(request.num_prompt_tokens, num_output, request.num_choices, block_size)

    def _scan(self) -> None:
        """Grants to waiting requests, in order. One that fits nowhere is passed over at most MAX_SKIPS times.

        After that one replica is held for it: only requests ahead of it are granted there. The leases on that replica
        end, the request fits its whole pool, so its turn comes; the other replicas go on serving those behind it.
        """
        if self.is_rebuilding or not self._queue:
            if self.watch is not None:
                self._say_who_waits(0, "no_replica")
            return
        candidates = {i: replica for i, replica in self._replicas.items() if self._is_open(replica)}
        passed: list[_Waiting] = []
        i = 0
        while i < len(self._queue) and candidates and len(passed) < MAX_SKIPS:
            entry = self._queue[i]
            found = None if entry.seen_room == self._room else self._choose(entry.request, candidates)
            if found is not None:
                self._leave_queue(entry)
                if self.watch is not None:
                    self.watch.granted(entry.request, found[0], self._views(entry.request, candidates), self._now)
                self._grant(entry.request, *found)
                for other in passed:
                    other.num_skipped += 1
                    if other.num_skipped == MAX_SKIPS:
                        self._hold(other, candidates)
            else:
                if self.watch is not None and entry.seen_room != self._room:
                    cause = _cause_of(self._views(entry.request, candidates))
                    self.watch.waits(entry.request.request_id, cause, self._now)
                entry.seen_room = self._room
                passed.append(entry)
                i += 1
                if entry.num_skipped >= MAX_SKIPS:
                    self._hold(entry, candidates)
        if self.watch is not None:
            self._say_who_waits(i, "fairness" if self._has_open_replica else "no_replica")

    def _say_who_waits(self, first: int, cause: str) -> None:
        """Of those that were not looked at."""
        assert self.watch is not None
        for entry in self._queue[first:]:
            self.watch.waits(entry.request.request_id, cause, self._now)

    def _views(self, request: LeaseRequest, candidates: Mapping[str, _Replica]) -> dict[str, ReplicaView]:
        """What `_choose` sees, for the watch."""
        views = {}
        for replica_id, replica in self._replicas.items():
            report = replica.report
            need = self._booking(request, report)
            left_out = None
            if report.is_draining:
                left_out = "draining"
            elif not self._is_open(replica):
                left_out = "silent"
            elif replica_id in request.not_on:
                left_out = "excluded"
            elif need is None:
                left_out = "too_small"
            elif need > replica.num_free_blocks:
                left_out = "budget"
            elif not replica.has_place(request.num_choices):
                left_out = "places"
            elif replica_id not in candidates:
                left_out = "held"
            views[replica_id] = ReplicaView(
                replica.num_free_blocks * report.block_size,
                None if need is None else need * report.block_size,
                replica.num_free_places,
                self._num_cached_tokens(request, replica),
                report.fingerprint,
                left_out,
            )
        wanted = request.fingerprint
        if wanted is not None and any(v.left_out is None and v.fingerprint == wanted for v in views.values()):
            for replica_id, view in views.items():
                if view.left_out is None and view.fingerprint != wanted:
                    views[replica_id] = view._replace(left_out="other_numerics")
        return views

    def _hold(self, entry: _Waiting, candidates: dict[str, _Replica]) -> None:
        """Takes one replica out of ``candidates``: the one held for it before, else the freest that can ever hold it."""
        if entry.held_replica_id not in candidates:
            able = [
                (replica.num_free_blocks * replica.report.block_size, replica_id)
                for replica_id, replica in candidates.items()
                if replica_id not in entry.request.not_on
                and self._whole_need(entry.request, replica.report) is not None
            ]
            if not able:
                return
            entry.held_replica_id = max(able)[1]
        candidates.pop(entry.held_replica_id, None)

    # --------------------------------------------------------------------------------------------- choice and grant

    def _whole_need(self, request: LeaseRequest, report: ReplicaReport) -> int | None:
        """Blocks for all that the request may have. None: this replica can never hold it."""
        room = report.max_model_len - request.num_prompt_tokens
        if room < min(1, request.max_output_tokens):
            return None
        num_output = min(request.max_output_tokens, room)
        need = num_blocks_for(request.num_prompt_tokens, num_output, request.num_choices, report.block_size)
        return need if need <= report.num_blocks else None

    def _allowance(self, max_output_tokens: int) -> int:
        """Output tokens that the policy books for a choice that may have so many."""
        return max_output_tokens if self.options.policy == "reserve" else self._lengths.expected(max_output_tokens)

    def _booking(self, request: LeaseRequest, report: ReplicaReport) -> int | None:
        whole = self._whole_need(request, report)
        if whole is None or self.options.policy == "reserve":
            return whole
        room = report.max_model_len - request.num_prompt_tokens
        num_output = self._allowance(min(request.max_output_tokens, room))
        return num_blocks_for(request.num_prompt_tokens, num_output, request.num_choices, report.block_size)

    def _choose(self, request: LeaseRequest, candidates: dict[str, _Replica]) -> tuple[str, int] | None:
        """The replica, and the blocks to book. Most free budget after the booking; the longest prefix among near ties."""
        fitting: list[tuple[int, int, str, int]] = []
        for replica_id, replica in candidates.items():
            if replica_id in request.not_on:
                continue
            need = self._booking(request, replica.report)
            if need is not None and need <= replica.num_free_blocks and replica.has_place(request.num_choices):
                free = (replica.num_free_blocks - need) * replica.report.block_size
                fitting.append((free, -replica.last_grant, replica_id, need))
        if request.fingerprint is not None:
            fitting = [
                fit for fit in fitting if candidates[fit[2]].report.fingerprint == request.fingerprint
            ] or fitting
        if not fitting:
            return None
        best = max(fitting)
        if len(fitting) > 1 and request.prefix_hashes:
            near = best[0] - NEAR_TIE * _pool_tokens(candidates[best[2]].report)
            best = max(
                (self._num_cached_tokens(request, candidates[fit[2]]), fit) for fit in fitting if fit[0] >= near
            )[1]
        return best[2], best[3]

    def _num_cached_tokens(self, request: LeaseRequest, replica: _Replica) -> int:
        """Length of the prompt's prefix that was granted to this replica and not pushed out since."""
        num_blocks = 0
        for prefix_hash in request.prefix_hashes:
            if prefix_hash not in replica.prefixes:
                break
            num_blocks += 1
        return num_blocks * replica.report.block_size

    def _grant(self, request: LeaseRequest, replica_id: str, num_blocks: int) -> None:
        replica = self._replicas[replica_id]
        if request.prefix_hashes:
            self.counters["prefix_tokens_granted"] += self._num_cached_tokens(request, replica)
            # Tails first, so that the beginning of a prompt is the last of it to be pushed out.
            for prefix_hash in reversed(request.prefix_hashes):
                replica.prefixes[prefix_hash] = None
                replica.prefixes.move_to_end(prefix_hash)
            while len(replica.prefixes) > replica.report.num_blocks:
                replica.prefixes.popitem(last=False)
        self._num_leases += 1
        replica.last_grant = self._num_leases
        row = _Row(
            f"{self.epoch}.{self._num_leases}",
            request.holder_id,
            replica_id,
            num_seqs=request.num_choices,
            granted_at=self._now,
            request=request,
        )
        self._set_blocks(row, num_blocks)
        self._unshown[row.lease_id] = row
        self._by_request[request.request_id] = row.lease_id
        self._is_pressed = bool(self._queue)
        self.counters["granted"] += 1
        self._answers[request.request_id] = self._lease_of(row)

    def _lease_of(self, row: _Row) -> Lease:
        report = self._replicas[row.replica_id].report
        num_tokens = row.num_blocks * report.block_size
        return Lease(row.lease_id, row.replica_id, num_tokens, self.epoch, report.fingerprint)

    # ------------------------------------------------------------------------------------------------- the one book

    def _set_blocks(self, row: _Row, num_blocks: int) -> None:
        """Books ``num_blocks`` for the lease; 0 ends it. Nothing else changes a load or the set of live leases."""
        replica = self._replicas[row.replica_id]
        if row.num_blocks == 0:
            self._rows[row.lease_id] = replica.leases[row.lease_id] = row
            self._holders.setdefault(row.holder_id, _Holder(self._now)).leases.add(row.lease_id)
            replica.num_booked_seqs += row.num_seqs
        replica.num_booked_blocks += num_blocks - row.num_blocks
        self._room += num_blocks < row.num_blocks
        row.num_blocks = num_blocks
        if num_blocks == 0:
            del self._rows[row.lease_id], replica.leases[row.lease_id]
            replica.num_booked_seqs -= row.num_seqs
            holder = self._holders[row.holder_id]
            holder.leases.discard(row.lease_id)
            if holder.is_gone and not holder.leases:
                del self._holders[row.holder_id]

    def _end(self, row: _Row, why: str) -> None:
        """The lease is no longer live, and counted under ``why``."""
        if why in ("settled", "ended_by_replica") and self._is_pressed:
            self._drain.add(row.num_blocks * self._replicas[row.replica_id].report.block_size)
        self._no_longer_unshown(row)
        self._set_blocks(row, 0)
        self.counters[why] += 1
        self._remember(row.lease_id, row if why == "ended_by_replica" else None, is_settled=why == "settled")

    def _no_longer_unshown(self, row: _Row) -> None:
        self._unshown.pop(row.lease_id, None)
        if row.request is not None and self._by_request.get(row.request.request_id) == row.lease_id:
            del self._by_request[row.request.request_id]

    def _remember(self, lease_id: str, row: _Row | None, *, is_settled: bool) -> None:
        self._ended.pop(lease_id, None)
        self._ended[lease_id] = _Ended(self._now, row, is_settled)

    # ------------------------------------------------------------------------------------------------------- time

    def _advance(self, now: float) -> None:
        """Does what is due. Costs a look at each replica and holder; a clock that goes back stands still."""
        now = max(now, self._now)
        if self._is_pressed and self._rows and self._now > -math.inf and self._has_open_replica:
            self._drain.elapse(now - self._now)
        self._now = now
        options = self.options
        if self.is_rebuilding:
            if self._rebuilt_at is None:
                self._rebuilt_at = now + self._grace_seconds
            if now >= self._rebuilt_at:
                self.is_rebuilding = False
                self._awaited.clear()
        while self._ended and now - next(iter(self._ended.values())).at >= options.submit_seconds:
            self._ended.popitem(last=False)
        for replica_id in [i for i, at in self._forgotten.items() if now - at >= options.replica_seconds]:
            del self._forgotten[replica_id]
        self._forget_silent_replicas()
        self._end_unshown_leases()
        for holder_id in [
            i for i, h in self._holders.items() if not h.is_gone and h.renewed_at + options.lease_seconds <= now
        ]:
            self._lose_holder(holder_id)
        self._end_waits()

    def _forget_silent_replicas(self) -> None:
        silent = [i for i, r in self._replicas.items() if r.reported_at + self.options.lease_seconds <= self._now]
        for replica_id in silent:
            self.counters["silent_replicas"] += 1
            self._forget(replica_id)

    def _end_unshown_leases(self) -> None:
        while self._unshown:
            row = next(iter(self._unshown.values()))
            if row.granted_at + self.options.submit_seconds > self._now:
                return
            self._end(row, "never_shown")

    def _lose_holder(self, holder_id: str) -> None:
        """Ends its leases, but those that a replica which reports still shows: there the blocks are really taken, and
        the replica ends them by the same rule. Ends the waits of its requests."""
        holder = self._holders[holder_id]
        holder.is_gone = True
        self.counters["holders_lost"] += bool(holder.leases)
        for row in [self._rows[lease_id] for lease_id in sorted(holder.leases)]:
            replica = self._replicas[row.replica_id]
            if not row.is_shown or self._now - replica.reported_at > self.options.replica_seconds:
                self._end(row, "expired")
        if not holder.leases:
            self._holders.pop(holder_id, None)
        for entry in [entry for entry in self._queue if entry.request.holder_id == holder_id]:
            self._leave_queue(entry)
            self.counters["expired_in_queue"] += 1
            self._answers[entry.request.request_id] = EngineUnavailableError(
                f"{holder_id} did not renew its leases for {self.options.lease_seconds} s"
            )

    def _end_waits(self) -> None:
        while self._deadlines and self._deadlines[0][0] <= self._now:
            _, number, request_id = heapq.heappop(self._deadlines)
            entry = self._waiting.get(request_id)
            if entry is None or entry.number != number:
                continue
            due = min(entry.starts_by, entry.queued_at + self.options.max_queue_seconds)
            if due > self._now:
                continue  # asked again with more time; that pushed a deadline of its own
            retry_after = self._retry_after()
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
            self._answers[request_id] = error

    def next_event_at(self, now: float) -> float | None:
        """When `grants` should be called at the latest, even if nothing happens before. None: nothing is pending."""
        if self._answers:
            return now
        options = self.options
        times = [replica.reported_at + options.lease_seconds for replica in self._replicas.values()]
        times += [h.renewed_at + options.lease_seconds for h in self._holders.values() if not h.is_gone]
        if self.is_rebuilding:
            times.append(now + self._grace_seconds if self._rebuilt_at is None else self._rebuilt_at)
        if self._unshown:
            times.append(next(iter(self._unshown.values())).granted_at + options.submit_seconds)
        if self._deadlines and self._queue:
            times.append(self._deadlines[0][0])
        return min(times, default=None)

    def set_options(self, options: LedgerOptions, version: int) -> bool:
        """Takes the options unless a later version is in force. Says whether it did. Live leases keep their bookings."""
        if self._version is not None and version < self._version:
            return False
        self.options = options
        self._version = version
        self._room += 1
        self._deadlines.clear()
        for entry in self._queue:
            self._push_deadline(entry)
        return True

    # ------------------------------------------------------------------------------------------------ looking at it

    @property
    def num_queued_requests(self) -> int:
        return len(self._queue)

    @property
    def num_queued_tokens(self) -> int:
        """Prompt and output tokens of all waiting requests."""
        return self._num_queued_tokens

    @property
    def num_queued_budget(self) -> int:
        """Tokens of the pools that they would take up, where each choice takes at least the share of its place in a step."""
        most = min((_pool_tokens(r.report) / r.report.max_num_seqs for r in self._replicas.values()), default=0.0)
        return max(self._num_queued_tokens, math.ceil(most * sum(entry.request.num_choices for entry in self._queue)))

    def rows(self, replica_id: str) -> tuple[BookedLease, ...]:
        """The live leases of one replica, as its own table should show them."""
        replica = self._replicas.get(replica_id)
        rows: Sequence[_Row] = () if replica is None else tuple(replica.leases.values())
        return tuple(BookedLease(row.lease_id, row.holder_id, row.num_blocks, row.num_seqs) for row in rows)

    def snapshot(self) -> dict[str, Any]:
        """Plain data, as of the last call that passed ``now``."""
        return {
            "epoch": self.epoch,
            "policy": self.options.policy,
            "options_version": self._version,
            "is_rebuilding": self.is_rebuilding,
            "seconds_left": self.seconds_left(self._now),
            "num_leases": len(self._rows),
            "num_unshown_leases": len(self._unshown),
            "num_holders": len(self._holders),
            "num_queued_requests": len(self._queue),
            "num_queued_tokens": self._num_queued_tokens,
            "oldest_wait_seconds": max((self._now - entry.queued_at for entry in self._queue), default=0.0),
            "drain_tokens_per_second": self._drain.tokens_per_second,
            "num_output_lengths": len(self._lengths),
            "counters": dict(self.counters),
            "replicas": {
                replica_id: {
                    "block_size": replica.report.block_size,
                    "num_blocks": replica.report.num_blocks,
                    "num_booked_blocks": replica.num_booked_blocks,
                    "num_free_blocks": replica.num_free_blocks,
                    "max_model_len": replica.report.max_model_len,
                    "max_num_seqs": replica.report.max_num_seqs,
                    "num_booked_seqs": replica.num_booked_seqs,
                    "num_leases": len(replica.leases),
                    "num_running": replica.report.num_running,
                    "num_waiting": replica.report.num_waiting,
                    "is_draining": replica.report.is_draining,
                    "is_silent": self._now - replica.reported_at > self.options.replica_seconds,
                    "fingerprint": replica.report.fingerprint,
                }
                for replica_id, replica in self._replicas.items()
            },
        }

    def check_invariants(self) -> None:
        """Raises AssertionError if the books do not add up. For tests and soaks; computes everything anew."""
        union: dict[str, _Row] = {}
        for replica_id, replica in self._replicas.items():
            load = sum(row.num_blocks for row in replica.leases.values())
            assert load == replica.num_booked_blocks, (
                f"load: {replica_id} has {replica.num_booked_blocks} blocks booked, its leases have {load}"
            )
            seqs = sum(row.num_seqs for row in replica.leases.values())
            assert seqs == replica.num_booked_seqs, (
                f"load: {replica_id} has {replica.num_booked_seqs} sequences booked, its leases have {seqs}"
            )
            assert all(row.replica_id == replica_id for row in replica.leases.values()), "a lease stands in two tables"
            assert len(replica.prefixes) <= replica.report.num_blocks, "more prefixes than blocks"
            union |= replica.leases
        assert union == self._rows, "the leases of all replicas are not the live leases"
        assert all(row.num_blocks > 0 for row in self._rows.values()), "a live lease without blocks"
        held = {lease_id for holder in self._holders.values() for lease_id in holder.leases}
        assert held == self._rows.keys(), "the leases of all holders are not the live leases"
        assert sum(len(holder.leases) for holder in self._holders.values()) == len(held), "a lease has two holders"
        assert {i for i, row in self._rows.items() if not row.is_shown} == self._unshown.keys(), "unshown leases"
        granted = [row.granted_at for row in self._unshown.values()]
        assert granted == sorted(granted), "unshown leases are not in the order of their grants"
        for request_id, lease_id in self._by_request.items():
            request = self._unshown[lease_id].request
            assert request is not None, "an adopted lease is said to be unshown"
            assert request.request_id == request_id, "a request has another's lease"
        orders = [entry.order for entry in self._queue]
        assert orders == sorted(set(orders)), "the queue is not in order"
        assert self._waiting == {entry.request.request_id: entry for entry in self._queue}, "the queue's index"
        assert self._num_queued_tokens == sum(entry.num_tokens for entry in self._queue), "queued tokens"
        assert self._num_queued_expected_tokens == sum(entry.num_expected_tokens for entry in self._queue)
        due = {(number, request_id) for _, number, request_id in self._deadlines}
        assert due.issuperset((e.number, e.request.request_id) for e in self._queue), "a wait without an end"
        assert self._waiting.keys().isdisjoint(self._answers), "a request is answered and still waits"
        assert self._rows.keys().isdisjoint(self._ended), "a lease has ended and is live"


def _order(entry: _Waiting) -> tuple[int, bool, int]:
    return entry.order


def _cause_of(views: Mapping[str, ReplicaView]) -> str:
    """What a request waits for that fits nowhere: the least that would do."""
    left_out = {view.left_out for view in views.values()}
    causes = {"held": "fairness", "places": "places", "budget": "budget"}
    return next((cause for why, cause in causes.items() if why in left_out), "no_replica")


def _pool_tokens(report: ReplicaReport) -> int:
    return report.num_blocks * report.block_size
