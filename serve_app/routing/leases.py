"""What ingress, router and replica tell each other of leases. Plain data that crosses processes; knows no book, no queue."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple


def num_blocks_for(num_prompt_tokens: int, num_output_tokens: int, num_choices: int, block_size: int) -> int:
    """Blocks of one request: full blocks of the prompt once, the rest for each choice.

    >>> num_blocks_for(70, 30, 2, 32)  # 2 full blocks shared; (100 tokens = 4 blocks) - 2 for each choice
    6
    """
    full = num_prompt_tokens // block_size
    whole = -(-(num_prompt_tokens + num_output_tokens) // block_size)
    return full + num_choices * (whole - full)


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

    @property
    def num_tokens(self) -> int:
        """That the pool holds."""
        return self.num_blocks * self.block_size
