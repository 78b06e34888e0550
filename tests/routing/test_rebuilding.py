"""A router that was started again, with a clock by hand."""

from __future__ import annotations

import pytest

from serve_app.routing.leases import BookedLease, Lease
from serve_app.routing.ledger import Ledger
from serve_app.routing.ledger_options import LedgerOptions
from tests.routing.ledgers import ask, free, report


def test_a_draining_replica_may_be_the_last_one() -> None:
    """It is the replica's own word, in each report: nothing else remembers it, and a new life of the router hears it."""
    ledger = Ledger(LedgerOptions(), 2, rebuilding=True, grace_seconds=1.0)
    ledger.report(report("a", 7, is_draining=True), 0.0)
    assert ledger.request(ask("r"), 2.0) is None
    assert ledger.snapshot()["replicas"]["a"]["is_draining"]
    ledger.report(report("b"), 2.0)
    assert [(name, answer.replica_id) for name, answer in ledger.grants(2.0)] == [("r", "b")]  # type: ignore[union-attr]


@pytest.mark.parametrize("ends_by", ["grace", "reports", "forgotten"])
def test_a_restarted_router_adopts_before_it_grants(ends_by: str) -> None:
    ledger = Ledger(LedgerOptions(), 2, rebuilding=True, grace_seconds=1.5)
    if ends_by != "grace":
        ledger.expect_replicas(["a", "b"])
    assert ledger.request(ask("r", 8), 0.0) is None
    ledger.settle("1.8", 5, 0.1)  # settled before anybody reported it: then the report is older
    ledger.report(report("a", 70, BookedLease("1.9", "x", 7), BookedLease("1.8", "x", 3)), 0.2)
    assert ledger.grants(0.3) == []
    assert ledger.request(ask("too large for a", 11), 0.3) is None
    if ends_by == "reports":
        ledger.report(report("b", 3, num_blocks=9), 0.4)
    elif ends_by == "forgotten":
        ledger.forget_replica("b", 0.4)
    else:
        assert ledger.next_event_at(0.4) == 1.5
        assert ledger.grants(1.5) == []
    assert not ledger.snapshot()["is_rebuilding"]
    assert free(ledger) == 3
    answers = ledger.grants(1.6)
    assert [lease for _, lease in answers] == ([Lease("2.1", "b", 128, 2, "f")] if ends_by == "reports" else [])
    assert ledger.counters["adopted"] == 1
    assert ledger.counters["drift"] == 0
    ledger.check_invariants()
