"""Who waits, in which order, how long. A ledger alone, with a clock by hand."""

from __future__ import annotations

import pytest

from serve_app.errors import (
    DeadlineExceededError,
    OverloadedError,
)
from tests.routing.ledgers import ask, granted, made, report


def test_what_moves_goes_before_what_is_new_and_is_never_turned_away() -> None:
    ledger = made(max_queued_requests=1)
    whole = granted(ledger, ask("whole", 10))
    assert ledger.request(ask("new"), 0.0) is None
    with pytest.raises(OverloadedError):
        ledger.request(ask("newer"), 0.0)
    assert ledger.request(ask("moved", is_continuation=True), 0.0) is None
    ledger.settle(whole.lease_id, 10, 1.0)
    assert [name for name, _ in ledger.grants(1.0)] == ["moved", "new"]
    ledger.check_invariants()


def test_the_queue_goes_by_priority_then_age() -> None:
    ledger = made(report(num_blocks=4))
    lease = granted(ledger, ask("first", 4))
    for name, priority in (("c", 0), ("d", 0), ("a", -1), ("e", 3), ("b", -1)):
        assert ledger.request(ask(name, priority=priority), 0.1) is None
    ledger.settle(lease.lease_id, 1, 0.2)
    assert [name for name, _ in ledger.grants(0.2)] == ["a", "b", "c", "d"]
    assert ledger.withdraw("e") is None
    assert ledger.snapshot()["num_queued_requests"] == 0


def test_waits_end() -> None:
    ledger = made(max_queue_seconds=5.0, lease_seconds=100.0)
    granted(ledger, ask("full", 10))
    assert ledger.request(ask("patient"), 1.0) is None
    assert ledger.request(ask("hasty", remaining_ms=700.0), 2.0) is None
    assert ledger.next_event_at(2.0) == pytest.approx(2.7)
    ((name, error),) = ledger.grants(2.7)
    assert (name, type(error)) == ("hasty", DeadlineExceededError)
    assert ledger.request(ask("patient"), 4.0) is None  # to ask again wins no time
    ((name, error),) = ledger.grants(6.0)
    assert (name, type(error)) == ("patient", OverloadedError)
    assert isinstance(error, OverloadedError)
    assert 1 <= error.retry_after <= 60
    ledger.check_invariants()
