"""Ledgers by hand, for tests: reports, requests, and what a ledger says. Has no tests itself."""

from __future__ import annotations

from typing import Any

from serve_app.routing.leases import BookedLease, Lease, LeaseRequest, ReplicaReport
from serve_app.routing.ledger import Ledger
from serve_app.routing.ledger_options import LedgerOptions


def report(
    replica_id: str = "a", number: int = 1, *rows: BookedLease, num_blocks: int = 10, **fields: Any
) -> ReplicaReport:
    given = {"block_size": 16, "max_model_len": 1000, "fingerprint": "f"} | fields
    return ReplicaReport(replica_id, number, num_blocks=num_blocks, leases=rows, **given)


def ask(name: str, num_blocks: int = 1, **fields: Any) -> LeaseRequest:
    """Needs ``num_blocks`` blocks of 16 tokens."""
    given = {"holder_id": "h", "num_prompt_tokens": 3, "max_output_tokens": 16 * num_blocks - 3}
    return LeaseRequest(name, **(given | fields))


def made(*replicas: ReplicaReport, **options: Any) -> Ledger:
    ledger = Ledger(LedgerOptions(**({"policy": "reserve"} | options)), 1)
    for each in replicas or (report(),):
        ledger.report(each, 0.0)
    return ledger


def granted(ledger: Ledger, request: LeaseRequest, now: float = 0.0) -> Lease:
    lease = ledger.request(request, now)
    assert lease is not None
    ledger.check_invariants()
    return lease


def row(lease: Lease, num_blocks: int | None = None, holder_id: str = "h") -> BookedLease:
    return BookedLease(lease.lease_id, holder_id, num_blocks or lease.num_tokens // 16)


def free(ledger: Ledger, replica_id: str = "a") -> int:
    return int(ledger.snapshot()["replicas"][replica_id]["num_free_blocks"])
