"""The ledger alone with a clock by hand: who is served first, and how it ends."""

from __future__ import annotations

import pytest

from serve_app.errors import (
    ServerDrainingError,
)
from serve_app.routing import ledger as ledger_module
from serve_app.routing.leases import Lease
from serve_app.routing.ledger import CLOSED_SECONDS, Ledger
from serve_app.routing.ledger_options import LedgerOptions
from tests.routing.ledgers import ask, granted, made, report


def test_a_server_that_ends_serves_what_it_has_let_in() -> None:
    ledger = made(replica_seconds=60.0, lease_seconds=60.0, submit_seconds=60.0)
    whole = granted(ledger, ask("whole", 10))
    assert ledger.request(ask("early"), 0.0) is None
    ledger.close(20.0, 1.0)
    with pytest.raises(ServerDrainingError, match="ends within 16 s and takes nothing new") as refusal:
        ledger.request(ask("late"), 5.5)
    assert refusal.value.retry_after == 16
    assert ledger.request(ask("early"), 5.5) is None
    assert ledger.request(ask("moved", is_continuation=True), 5.5) is None
    ledger.settle(whole.lease_id, 10, 6.0)
    assert [name for name, _ in ledger.grants(6.0)] == ["moved", "early"]
    assert (ledger.seconds_left(6.0), ledger.snapshot()["seconds_left"]) == (15.0, 15.0)
    with pytest.raises(ServerDrainingError):
        ledger.request(ask("later"), 22.0)
    assert ledger.seconds_left(22.0) == 0.0
    # It is still there, long after its end: whoever wanted that has gone.
    assert ledger.seconds_left(21.0 + CLOSED_SECONDS) is None
    ledger.report(report(number=2), 21.0 + CLOSED_SECONDS)
    granted(ledger, ask("next"), 21.0 + CLOSED_SECONDS)
    assert ledger.counters["refused_at_end"] == 2


def test_without_a_replica_requests_wait() -> None:
    ledger = Ledger(LedgerOptions(), 7)
    assert ledger.request(ask("r", 1), 0.0) is None
    assert ledger.grants(0.1) == []
    ledger.report(report(), 0.2)
    ((request_id, lease),) = ledger.grants(0.2)
    assert (request_id, lease) == ("r", Lease("7.1", "a", 16, 7, "f"))
    assert ledger.grants(0.2) == []


def test_a_large_request_is_passed_over_so_often_and_no_more() -> None:
    ledger = made(report(num_blocks=10), lease_seconds=1e6, submit_seconds=1e6)
    running = [granted(ledger, ask(f"r{i}")).lease_id for i in range(10)]
    assert ledger.request(ask("large", 10), 0.0) is None
    passed = 0
    for i in range(100):
        assert ledger.request(ask(f"s{i}"), 0.0) is None
        ledger.settle(running.pop(0), 1, 0.0)
        answers = ledger.grants(0.0)
        if any(name == "large" for name, _ in answers):
            break
        passed += len(answers)
        running += [lease.lease_id for _, lease in answers if isinstance(lease, Lease)]
    assert passed == ledger_module.MAX_SKIPS
    assert not running, "large was granted while others held blocks"


def test_while_one_replica_is_held_for_a_large_request_the_others_serve() -> None:
    ledger = made(report("a"), report("b"), lease_seconds=1e6, submit_seconds=1e6)
    running = {f"r{i}": granted(ledger, ask(f"r{i}")) for i in range(20)}
    assert ledger.request(ask("large", 10), 0.0) is None
    num_granted = 20
    for i in range(300):
        assert ledger.request(ask(f"s{i}"), 0.0) is None
        oldest = next(iter(running))
        ledger.settle(running.pop(oldest).lease_id, 1, 0.0)
        for name, lease in ledger.grants(0.0):
            assert isinstance(lease, Lease)
            running[name] = lease
        ledger.check_invariants()
        if "large" in running:
            break
        num_granted = len(running)
    held = running["large"].replica_id
    assert [lease.replica_id for lease in running.values()].count(held) == 1
    assert num_granted >= 10, "the other replica did not stay full"
    assert ledger.request(ask("next"), 0.0) is None


def test_an_older_version_of_the_options_never_overwrites_a_newer() -> None:
    ledger = made()
    assert ledger.set_options(LedgerOptions(policy="expect"), 5)
    assert not ledger.set_options(LedgerOptions(policy="reserve"), 4)
    assert ledger.snapshot()["policy"] == "expect"
    assert ledger.snapshot()["options_version"] == 5
    granted(ledger, ask("full", 10))
    assert ledger.request(ask("r"), 0.0) is None
    ledger.set_options(LedgerOptions(max_queue_seconds=0.5), 6)
    assert ledger.next_event_at(0.0) == 0.5
