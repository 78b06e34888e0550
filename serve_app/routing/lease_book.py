"""The book of leases: which are live, on which replica, of which holder. Knows no queue, no policy, no clock.

    grant -> shown by a report -> ended by the replica, or settled by its holder

A report is the truth: what differs from it is corrected and counted. Loads, tables and holders are changed by
`LeaseBook.set_blocks` alone. ``now``: seconds of one monotonic clock, never less than before.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from serve_app.routing.leases import BookedLease, Lease, LeaseRequest, ReplicaReport
from serve_app.routing.ledger_options import LedgerOptions

STANDBY_SHARE = 8
"""A replica is granted one sequence more for every so many that its steps hold, at least one: the next is there when one
ends. More than that would wait in its engine, behind a queue that nobody bounds."""


@dataclass(slots=True, eq=False)
class LiveLease:
    """One row of the book."""

    lease_id: str
    holder_id: str
    replica_id: str
    num_seqs: int = 1
    num_blocks: int = 0
    """Changed by `LeaseBook.set_blocks` alone."""
    granted_at: float = 0.0
    """When its holder was told, last."""
    request: LeaseRequest | None = None
    """None: adopted from a report."""
    is_shown: bool = False
    """A report showed it."""


class EndedLease(NamedTuple):
    """What is remembered of a lease that ended, for as long as a message about it may be on its way."""

    at: float
    lease: LiveLease | None
    """None: settled before it was known, or nothing more can be learned from it."""
    is_settled: bool
    """Its holder said so, hence the replica had ended it: a report that shows it is older than that."""


@dataclass(slots=True, eq=False)
class ReplicaBook:
    """What is booked on one replica, and what it said last."""

    report: ReplicaReport
    reported_at: float
    leases: dict[str, LiveLease] = field(default_factory=dict)
    num_booked_blocks: int = 0
    """The sum over ``leases``. Changed by `LeaseBook.set_blocks` alone."""
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

    def is_silent(self, now: float, options: LedgerOptions) -> bool:
        """Not heard of for replica_seconds."""
        return now - self.reported_at > options.replica_seconds

    def is_open(self, now: float, options: LedgerOptions) -> bool:
        """May get grants."""
        return not self.report.is_draining and now - self.reported_at <= options.replica_seconds

    def num_cached_tokens(self, prefix_hashes: Sequence[int]) -> int:
        """Length of the prompt's prefix that was granted to it and not pushed out since."""
        num_blocks = 0
        for prefix_hash in prefix_hashes:
            if prefix_hash not in self.prefixes:
                break
            num_blocks += 1
        return num_blocks * self.report.block_size

    def add_prefix(self, prefix_hashes: Sequence[int]) -> None:
        # Tails first, so that the beginning of a prompt is the last of it to be pushed out.
        for prefix_hash in reversed(prefix_hashes):
            self.prefixes[prefix_hash] = None
            self.prefixes.move_to_end(prefix_hash)
        self.trim_prefixes()

    def trim_prefixes(self) -> None:
        while len(self.prefixes) > self.report.num_blocks:
            self.prefixes.popitem(last=False)

    def snapshot(self) -> dict[str, Any]:
        report = self.report
        return {
            "block_size": report.block_size,
            "num_blocks": report.num_blocks,
            "num_booked_blocks": self.num_booked_blocks,
            "num_free_blocks": self.num_free_blocks,
            "max_model_len": report.max_model_len,
            "max_num_seqs": report.max_num_seqs,
            "num_booked_seqs": self.num_booked_seqs,
            "num_leases": len(self.leases),
            "num_running": report.num_running,
            "num_waiting": report.num_waiting,
            "is_draining": report.is_draining,
            "fingerprint": report.fingerprint,
        }


@dataclass(slots=True, eq=False)
class Holder:
    """Who submits: an ingress."""

    renewed_at: float
    leases: set[str] = field(default_factory=set)
    is_gone: bool = False
    """Not heard of for lease_seconds. What its replicas still show they end themselves."""


class LeaseBook:
    """``epoch``: of the leases that it grants. ``counters``: takes what happens, by kind."""

    def __init__(self, epoch: int, counters: Counter[str]) -> None:
        self.room = 0
        """Rises whenever somebody who did not fit might now."""
        self.replicas: dict[str, ReplicaBook] = {}
        self.holders: dict[str, Holder] = {}
        self.leases: dict[str, LiveLease] = {}
        """All that are live."""
        self.unshown: OrderedDict[str, LiveLease] = OrderedDict()
        """Granted, and no report showed it yet. By ``granted_at``."""
        self._epoch = epoch
        self._counters = counters
        self._num_granted = 0
        self._unshown_of_request: dict[str, str] = {}
        """Request id -> its lease in ``unshown``."""
        self._ended: OrderedDict[str, EndedLease] = OrderedDict()
        self._forgotten: dict[str, float] = {}
        """Replica that was said to be gone -> when."""

    # ---- replicas ------------------------------------------------------------------------------------------------

    def take_report(self, report: ReplicaReport, now: float, *, is_adopting: bool) -> list[int] | None:
        """Takes the replica's table as the truth. Returns the tokens of each lease that it has ended; None: it is dropped.

        ``is_adopting``: what is not known here is no difference.
        """
        if report.replica_id in self._forgotten:
            # On its way when the replica went. One that did not go is taken again when the memory of it has faded.
            self._counters["reports_after_end"] += 1
            return None
        replica = self.replicas.get(report.replica_id)
        if replica is None:
            replica = self.replicas[report.replica_id] = ReplicaBook(report, now)
            is_adopting = True
        elif report.report_number <= replica.report.report_number:
            self._counters["reports_out_of_order"] += 1
            return None
        replica.report = report
        replica.reported_at = now
        shown = set()
        for booked in report.leases:
            shown.add(booked.lease_id)
            self._compare(replica, booked, now, is_adopting=is_adopting)
        freed = []
        for lease in [one for one in replica.leases.values() if one.is_shown and one.lease_id not in shown]:
            freed.append(lease.num_blocks * report.block_size)
            self.end(lease, "ended_by_replica", now)
        replica.trim_prefixes()
        self.room += 1
        return freed

    def _compare(self, replica: ReplicaBook, booked: BookedLease, now: float, *, is_adopting: bool) -> None:
        """One row of a report with what is booked."""
        lease = self.leases.get(booked.lease_id)
        if lease is not None and lease.replica_id != replica.report.replica_id:
            self.end(lease, "drift", now)
            lease = None
        if lease is None:
            ended = self._ended.get(booked.lease_id)
            if ended is not None and ended.is_settled:
                return
            self._counters["adopted" if is_adopting else "drift"] += 1
            self._ended.pop(booked.lease_id, None)
            lease = LiveLease(
                booked.lease_id, booked.holder_id, replica.report.replica_id, num_seqs=booked.num_seqs, granted_at=now
            )
        elif lease.num_blocks < booked.num_blocks:
            self._counters["grown_blocks"] += booked.num_blocks - lease.num_blocks
        elif lease.num_blocks > booked.num_blocks:
            self._counters["drift"] += 1
        if lease.num_blocks != booked.num_blocks:
            grows = 0 < lease.num_blocks < booked.num_blocks
            self.set_blocks(lease, booked.num_blocks)
            self._counters["grown_past_pool"] += grows and replica.num_free_blocks < 0
        if not lease.is_shown:
            lease.is_shown = True
            self._no_longer_unshown(lease)

    def drop_replica(self, replica_id: str, now: float) -> None:
        """It is gone, and its leases with it."""
        replica = self.replicas.get(replica_id)
        if replica is None:
            return
        for lease in list(replica.leases.values()):
            self.end(lease, "lost_with_replica", now)
        del self.replicas[replica_id]
        self.room += 1

    def forget_reports_of(self, replica_id: str, now: float) -> None:
        """Those on their way: they are dropped for replica_seconds."""
        self._forgotten[replica_id] = now

    # ---- leases --------------------------------------------------------------------------------------------------

    def grant(self, request: LeaseRequest, replica_id: str, num_blocks: int, now: float) -> LiveLease:
        replica = self.replicas[replica_id]
        if request.prefix_hashes:
            self._counters["prefix_tokens_granted"] += replica.num_cached_tokens(request.prefix_hashes)
            replica.add_prefix(request.prefix_hashes)
        self._num_granted += 1
        replica.last_grant = self._num_granted
        lease = LiveLease(
            f"{self._epoch}.{self._num_granted}",
            request.holder_id,
            replica_id,
            num_seqs=request.num_choices,
            granted_at=now,
            request=request,
        )
        self.set_blocks(lease, num_blocks)
        self.unshown[lease.lease_id] = lease
        self._unshown_of_request[request.request_id] = lease.lease_id
        self._counters["granted"] += 1
        return lease

    def told(self, lease: LiveLease) -> Lease:
        """As its holder hears of it."""
        report = self.replicas[lease.replica_id].report
        num_tokens = lease.num_blocks * report.block_size
        return Lease(lease.lease_id, lease.replica_id, num_tokens, self._epoch, report.fingerprint)

    def unshown_of(self, request_id: str) -> LiveLease | None:
        """The lease that was granted for a request, if its replica may not have heard of it."""
        lease_id = self._unshown_of_request.get(request_id)
        return None if lease_id is None else self.leases[lease_id]

    def is_told_again(self, lease: LiveLease, now: float) -> None:
        """Its holder hears of it only now, and may take as long as the first time."""
        lease.granted_at = now
        self.unshown.move_to_end(lease.lease_id)

    def settle(self, lease_id: str, now: float) -> tuple[LeaseRequest, float] | None:
        """Its holder is done. Returns the request, and the seconds from grant to end; None: nothing is to be learned."""
        lease = self.leases.get(lease_id)
        ended_at = now
        if lease is not None:
            self.end(lease, "settled", now)
        else:
            ended = self._ended.get(lease_id)
            if ended is not None and ended.is_settled:
                return None
            self._remember(lease_id, EndedLease(now, None, True))
            if ended is not None:
                lease, ended_at = ended.lease, ended.at
        if lease is None or lease.request is None:
            return None
        return lease.request, ended_at - lease.granted_at

    def end(self, lease: LiveLease, why: str, now: float) -> None:
        """It is no longer live, and counted under ``why``."""
        self._no_longer_unshown(lease)
        self.set_blocks(lease, 0)
        self._counters[why] += 1
        may_settle = lease if why == "ended_by_replica" else None
        self._remember(lease.lease_id, EndedLease(now, may_settle, why == "settled"))

    def set_blocks(self, lease: LiveLease, num_blocks: int) -> None:
        """Books ``num_blocks`` for the lease; 0 ends it. Nothing else changes a load or the set of live leases."""
        replica = self.replicas[lease.replica_id]
        if lease.num_blocks == 0:
            self.leases[lease.lease_id] = replica.leases[lease.lease_id] = lease
            self.holders.setdefault(lease.holder_id, Holder(lease.granted_at)).leases.add(lease.lease_id)
            replica.num_booked_seqs += lease.num_seqs
        replica.num_booked_blocks += num_blocks - lease.num_blocks
        self.room += num_blocks < lease.num_blocks
        lease.num_blocks = num_blocks
        if num_blocks == 0:
            del self.leases[lease.lease_id], replica.leases[lease.lease_id]
            replica.num_booked_seqs -= lease.num_seqs
            holder = self.holders[lease.holder_id]
            holder.leases.discard(lease.lease_id)
            if holder.is_gone and not holder.leases:
                del self.holders[lease.holder_id]

    def _no_longer_unshown(self, lease: LiveLease) -> None:
        self.unshown.pop(lease.lease_id, None)
        if lease.request is not None and self._unshown_of_request.get(lease.request.request_id) == lease.lease_id:
            del self._unshown_of_request[lease.request.request_id]

    def _remember(self, lease_id: str, ended: EndedLease) -> None:
        self._ended.pop(lease_id, None)
        self._ended[lease_id] = ended

    # ---- holders -------------------------------------------------------------------------------------------------

    def renew(self, holder_id: str, now: float) -> None:
        """The holder lives, and so do all its leases."""
        holder = self.holders.get(holder_id)
        if holder is None:
            self.holders[holder_id] = Holder(now)
        else:
            holder.renewed_at, holder.is_gone = now, False

    def lose_holder(self, holder_id: str, now: float, options: LedgerOptions) -> None:
        """Ends its leases, but those that a replica which reports still shows: there the blocks are really taken, and the
        replica ends them by the same rule."""
        holder = self.holders[holder_id]
        holder.is_gone = True
        self._counters["holders_lost"] += bool(holder.leases)
        for lease in [self.leases[lease_id] for lease_id in sorted(holder.leases)]:
            if not lease.is_shown or self.replicas[lease.replica_id].is_silent(now, options):
                self.end(lease, "expired", now)
        if not holder.leases:
            self.holders.pop(holder_id, None)

    # ---- time ----------------------------------------------------------------------------------------------------

    def fade(self, now: float, options: LedgerOptions) -> None:
        """Drops what is remembered of leases and replicas that have long gone."""
        while self._ended and now - next(iter(self._ended.values())).at >= options.submit_seconds:
            self._ended.popitem(last=False)
        for replica_id in [i for i, at in self._forgotten.items() if now - at >= options.replica_seconds]:
            del self._forgotten[replica_id]

    def silent_replicas(self, now: float, options: LedgerOptions) -> list[str]:
        """Not heard of for lease_seconds."""
        return [i for i, replica in self.replicas.items() if replica.reported_at + options.lease_seconds <= now]

    def silent_holders(self, now: float, options: LedgerOptions) -> list[str]:
        """The same of those that are not known to be gone."""
        return [i for i, h in self.holders.items() if not h.is_gone and h.renewed_at + options.lease_seconds <= now]

    def end_unshown_leases(self, now: float, options: LedgerOptions) -> None:
        """Those that were never submitted."""
        while self.unshown:
            lease = next(iter(self.unshown.values()))
            if lease.granted_at + options.submit_seconds > now:
                return
            self.end(lease, "never_shown", now)

    def due_times(self, options: LedgerOptions) -> list[float]:
        """When something may be due; the earliest is among them."""
        times = [replica.reported_at + options.lease_seconds for replica in self.replicas.values()]
        times += [h.renewed_at + options.lease_seconds for h in self.holders.values() if not h.is_gone]
        if self.unshown:
            times.append(next(iter(self.unshown.values())).granted_at + options.submit_seconds)
        return times

    # ---- looking at it -------------------------------------------------------------------------------------------

    def rows(self, replica_id: str) -> tuple[BookedLease, ...]:
        """The live leases of one replica, as its own table should show them."""
        replica = self.replicas.get(replica_id)
        leases: Sequence[LiveLease] = () if replica is None else tuple(replica.leases.values())
        return tuple(BookedLease(one.lease_id, one.holder_id, one.num_blocks, one.num_seqs) for one in leases)

    def check_invariants(self) -> None:
        """Raises AssertionError if the book does not add up. For tests and soaks; computes everything anew."""
        union: dict[str, LiveLease] = {}
        for replica_id, replica in self.replicas.items():
            load = sum(lease.num_blocks for lease in replica.leases.values())
            assert load == replica.num_booked_blocks, (
                f"load: {replica_id} has {replica.num_booked_blocks} blocks booked, its leases have {load}"
            )
            seqs = sum(lease.num_seqs for lease in replica.leases.values())
            assert seqs == replica.num_booked_seqs, (
                f"load: {replica_id} has {replica.num_booked_seqs} sequences booked, its leases have {seqs}"
            )
            assert all(one.replica_id == replica_id for one in replica.leases.values()), "a lease stands in two tables"
            assert len(replica.prefixes) <= replica.report.num_blocks, "more prefixes than blocks"
            union |= replica.leases
        assert union == self.leases, "the leases of all replicas are not the live leases"
        assert all(lease.num_blocks > 0 for lease in self.leases.values()), "a live lease without blocks"
        held = {lease_id for holder in self.holders.values() for lease_id in holder.leases}
        assert held == self.leases.keys(), "the leases of all holders are not the live leases"
        assert sum(len(holder.leases) for holder in self.holders.values()) == len(held), "a lease has two holders"
        assert {i for i, lease in self.leases.items() if not lease.is_shown} == self.unshown.keys(), "unshown leases"
        granted = [lease.granted_at for lease in self.unshown.values()]
        assert granted == sorted(granted), "unshown leases are not in the order of their grants"
        for request_id, lease_id in self._unshown_of_request.items():
            request = self.unshown[lease_id].request
            assert request is not None, "an adopted lease is said to be unshown"
            assert request.request_id == request_id, "a request has another's lease"
        assert self.leases.keys().isdisjoint(self._ended), "a lease has ended and is live"
