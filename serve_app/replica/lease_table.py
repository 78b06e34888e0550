"""LeaseTable: the replica's own book of who holds how many blocks of its KV pool. Knows no engine, no Ray, no clock.

It is the truth that the router's ledger follows. A submit whose booking does not fit is refused here, whatever the
router believed; so two routers, or one that guessed, can do no harm.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from serve_app.errors import LeaseRefusedError
from serve_app.routing.leases import BookedLease


@dataclass(slots=True, eq=False)
class _Holder:
    renewed_at: float
    leases: set[str] = field(default_factory=set)


class LeaseTable:
    """Leases on a pool of ``num_blocks`` blocks. ``now``: seconds of one monotonic clock."""

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self.num_booked_blocks = 0
        """The sum over all rows. Changed by _set_blocks alone."""
        self.num_ended = 0
        """Leases that ended, ever."""
        self.num_refused = 0
        """Leases that did not fit, ever."""
        self.num_grown_past_pool = 0
        """Growths after which more was booked than there is, ever."""
        self._rows: dict[str, BookedLease] = {}
        self._holders: dict[str, _Holder] = {}
        """Those that hold something."""

    def __len__(self) -> int:
        return len(self._rows)

    def __contains__(self, lease_id: object) -> bool:
        return lease_id in self._rows

    @property
    def num_booked_seqs(self) -> int:
        """Choices of all leases, also those that have ended."""
        return sum(row.num_seqs for row in self._rows.values())

    @property
    def num_free_blocks(self) -> int:
        """Negative after growth past the pool."""
        return self.num_blocks - self.num_booked_blocks

    def open(self, lease_id: str, holder_id: str, num_blocks: int, now: float, num_seqs: int = 1) -> None:
        """Books the lease, of ``num_seqs`` choices. Raises LeaseRefusedError if it does not fit, or is open already."""
        if lease_id in self._rows:
            raise LeaseRefusedError(f"lease {lease_id} is open already")
        if not 1 <= num_blocks <= self.num_free_blocks:
            self.num_refused += 1
            raise LeaseRefusedError(
                f"lease {lease_id} asks for {num_blocks} blocks; {self.num_free_blocks} of {self.num_blocks} are free"
            )
        self._set_blocks(BookedLease(lease_id, holder_id, 0, num_seqs), num_blocks)
        self.renew(holder_id, now)

    def grow(self, lease_id: str, num_blocks: int) -> bool:
        """The lease now holds ``num_blocks`` in all, even past the pool; it never shrinks. False: it has ended."""
        row = self._rows.get(lease_id)
        if row is None:
            return False
        if num_blocks > row.num_blocks:
            self._set_blocks(row, num_blocks)
            self.num_grown_past_pool += self.num_free_blocks < 0
        return True

    def end(self, lease_id: str) -> bool:
        """Gives its blocks back. False: it had ended before, or was never open."""
        row = self._rows.get(lease_id)
        if row is None:
            return False
        self._set_blocks(row, 0)
        self.num_ended += 1
        return True

    def renew(self, holder_id: str, now: float) -> None:
        """The holder lives, and so do all its leases. A clock that goes back stands still."""
        holder = self._holders.get(holder_id)
        if holder is not None:
            holder.renewed_at = max(holder.renewed_at, now)

    def expired(self, now: float, lease_seconds: float) -> list[str]:
        """Leases whose holder was not heard of for ``lease_seconds``, in the order they were opened. Changes nothing."""
        gone = {i for i, holder in self._holders.items() if holder.renewed_at + lease_seconds <= now}
        return [row.lease_id for row in self._rows.values() if row.holder_id in gone] if gone else []

    def rows(self) -> tuple[BookedLease, ...]:
        """The whole table, oldest first."""
        return tuple(self._rows.values())

    def _set_blocks(self, row: BookedLease, num_blocks: int) -> None:
        """Books ``num_blocks`` for the lease; 0 ends it. Nothing else changes the sum or the set of leases."""
        self.num_booked_blocks += num_blocks - row.num_blocks
        if num_blocks == 0:
            del self._rows[row.lease_id]
            holder = self._holders[row.holder_id]
            holder.leases.discard(row.lease_id)
            if not holder.leases:
                del self._holders[row.holder_id]
            return
        self._rows[row.lease_id] = row._replace(num_blocks=num_blocks)
        if row.num_blocks == 0:
            self._holders.setdefault(row.holder_id, _Holder(float("-inf"))).leases.add(row.lease_id)

    def check_invariants(self) -> None:
        """Raises AssertionError if the book does not add up. For tests and soaks; computes everything anew."""
        booked = sum(row.num_blocks for row in self._rows.values())
        assert booked == self.num_booked_blocks, f"load: {self.num_booked_blocks} booked, the leases have {booked}"
        assert all(row.num_blocks > 0 for row in self._rows.values()), "a live lease without blocks"
        assert all(lease_id == row.lease_id for lease_id, row in self._rows.items()), "a row under another's id"
        held = {(i, lease_id) for i, holder in self._holders.items() for lease_id in holder.leases}
        assert held == {(row.holder_id, row.lease_id) for row in self._rows.values()}, "holders differ from the rows"
        assert all(holder.leases for holder in self._holders.values()), "a holder that holds nothing"
