"""The life of a lease, in the book of a ledger alone, with a clock by hand."""

from __future__ import annotations

from serve_app.errors import (
    EngineUnavailableError,
)
from serve_app.routing.leases import BookedLease
from tests.routing.ledgers import ask, free, granted, made, report, row


def test_a_settled_lease_does_not_come_back_from_a_late_report() -> None:
    ledger = made()
    lease = granted(ledger, ask("r", 4))
    ledger.report(report("a", 2, row(lease)), 0.1)
    ledger.settle(lease.lease_id, 9, 0.2)
    assert free(ledger) == 10
    ledger.report(report("a", 3, row(lease)), 0.3)
    assert free(ledger) == 10
    ledger.settle(lease.lease_id, 9, 0.4)
    assert ledger.counters["settled"] == 1
    assert len(ledger.admission.lengths) == 1
    # But if it is shown long after, somebody settled what still runs: the replica is right.
    ledger.report(report("a", 4, row(lease)), 9.0)
    assert free(ledger) == 6
    assert ledger.counters["drift"] == 1
    ledger.check_invariants()


def test_an_older_report_is_dropped() -> None:
    ledger = made()
    lease = granted(ledger, ask("r", 4))
    ledger.report(report("a", 3, row(lease)), 0.1)
    ledger.report(report("a", 2), 0.2)
    assert free(ledger) == 6
    assert ledger.counters["reports_out_of_order"] == 1


def test_what_the_replica_no_longer_shows_has_ended_and_is_learned_from_once() -> None:
    ledger = made()
    lease = granted(ledger, ask("r", 4))
    ledger.report(report("a", 2), 0.1)
    assert free(ledger) == 6  # not shown yet: it may be on its way
    ledger.report(report("a", 3, row(lease)), 0.2)
    ledger.report(report("a", 4), 0.3)
    assert free(ledger) == 10
    ledger.settle(lease.lease_id, 9, 0.4)
    ledger.settle(lease.lease_id, 9, 0.4)
    assert len(ledger.admission.lengths) == 1


def test_what_was_never_shown_comes_back() -> None:
    ledger = made(submit_seconds=5.0)
    granted(ledger, ask("r", 4), 1.0)
    ledger.report(report("a", 2), 5.9)
    assert free(ledger) == 6
    assert ledger.next_event_at(5.9) == 6.0
    ledger.grants(6.0)
    assert free(ledger) == 10
    assert ledger.counters["never_shown"] == 1


def test_an_unknown_lease_is_taken_over_and_counted() -> None:
    ledger = made()
    ledger.report(report("a", 2, BookedLease("own make", "x", 7)), 0.1)
    assert free(ledger) == 3
    assert ledger.counters["drift"] == 1
    ledger.settle("own make", 3, 0.2)
    assert free(ledger) == 10
    ledger.check_invariants()


def test_a_vanished_holders_leases_come_back() -> None:
    ledger = made(lease_seconds=10.0, submit_seconds=60.0, replica_seconds=3.0)
    unshown = granted(ledger, ask("r", 4))
    shown = granted(ledger, ask("q", 3))
    mine = granted(ledger, ask("p", 1, holder_id="other"))
    assert ledger.request(ask("waiting", 3), 0.0) is None
    for i in range(1, 50):
        ledger.renew("other", i * 0.2)
        ledger.report(report("a", i + 1, row(shown), row(mine, holder_id="other")), i * 0.2)
    assert free(ledger) == 2
    ((request_id, error),) = ledger.grants(10.0)
    assert request_id == "waiting"
    assert isinstance(error, EngineUnavailableError)
    # The replica still shows one of them: its blocks are taken until the replica has ended it.
    assert {lease.lease_id for lease in ledger.rows("a")} == {shown.lease_id, mine.lease_id}
    assert unshown.lease_id not in {lease.lease_id for lease in ledger.rows("a")}
    ledger.report(report("a", 60, row(mine, holder_id="other")), 10.1)
    assert free(ledger) == 9
    ledger.check_invariants()


def test_a_silent_replica_is_forgotten_and_may_come_back() -> None:
    ledger = made(lease_seconds=10.0)
    lease = granted(ledger, ask("r", 4))
    ledger.report(report("a", 2, row(lease)), 0.5)
    ledger.renew("h", 9.0)
    ledger.grants(10.5)
    assert ledger.snapshot()["replicas"] == {}
    ledger.report(report("a", 3, row(lease)), 11.0)
    assert free(ledger) == 6
    assert ledger.counters["drift"] == 0
    ledger.check_invariants()


def test_a_report_that_comes_after_its_replica_went_is_dropped() -> None:
    ledger = made(replica_seconds=3.0)
    granted(ledger, ask("r"))
    ledger.forget_replica("a", 1.0)
    ledger.report(report("a", 2), 1.1)
    assert ledger.snapshot()["replicas"] == {}
    ledger.report(report("a", 3), 4.1)
    assert free(ledger) == 10


def test_a_repeated_request_gets_the_same_lease_until_its_replica_is_avoided() -> None:
    ledger = made(report("a"), report("b"))
    first = granted(ledger, ask("r", 4))
    assert granted(ledger, ask("r", 4), 0.1) == first
    second = granted(ledger, ask("r", 4, not_on=frozenset({first.replica_id})), 0.2)
    assert second.replica_id != first.replica_id
    assert ledger.withdraw("r") == second
    assert ledger.withdraw("r") is None
    ledger.settle(first.lease_id, None, 0.3)
    assert ledger.snapshot()["num_leases"] == 0


def test_a_lease_that_is_told_again_has_all_its_time_again() -> None:
    """Its time once ran from the first answer. Where that was lost, the holder heard of the lease when it asked again,
    perhaps when next to nothing was left: the room went to another request, and the replica had a submit too many."""
    ledger = made(submit_seconds=5.0)
    first = granted(ledger, ask("r", 4), 1.0)
    granted(ledger, ask("other", 2), 2.0)
    assert granted(ledger, ask("r", 4), 5.9) == first
    ledger.report(report("a", 2), 7.0)  # on its way when the submit came; of the other there was none
    ledger.check_invariants()
    assert ledger.rows("a") == (row(first),)
    assert ledger.request(ask("next", 7), 7.0) is None, "budget: the room of a lease on its way was given away"
    ledger.report(report("a", 3, row(first)), 7.1)
    assert free(ledger) == 6
    assert ledger.counters["drift"] == 0
    assert ledger.counters["never_shown"] == 1


def test_adopted_leases_hold_their_places() -> None:
    ledger = made(report("a", 1, BookedLease("0.1", "x", 3, 4), num_blocks=1000, max_num_seqs=4))
    assert ledger.rows("a") == (BookedLease("0.1", "x", 3, 4),)
    granted(ledger, ask("standing by"))
    assert ledger.request(ask("waits"), 0.0) is None
