"""Who may wait, by what the ledger has learned, with a clock by hand."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest

from serve_app.errors import (
    OverloadedError,
)
from serve_app.routing import admission as admission_module
from serve_app.routing.leases import Lease, LeaseRequest
from serve_app.routing.ledger import Ledger
from tests.routing.ledgers import ask, granted, made, report


def test_limits_on_requests_and_tokens() -> None:
    ledger = made(max_queued_requests=2, max_queued_tokens=100)
    granted(ledger, ask("full", 10))
    assert ledger.request(ask("huge", 9), 0.0) is None  # 144 tokens: alone it may
    with pytest.raises(OverloadedError, match=r"1 requests of 144 tokens .* at most 2 of 100") as refused:
        ledger.request(ask("small", 1), 0.0)
    assert refused.value.retry_after == 30  # nothing measured yet: by then the queue has turned over
    ledger.withdraw("huge")
    for name in ("x", "y"):
        assert ledger.request(ask(name), 0.0) is None
    with pytest.raises(OverloadedError, match="2 requests"):
        ledger.request(ask("z"), 0.0)
    assert ledger.request(ask("y"), 0.0) is None  # it has its place already
    ledger.check_invariants()
    assert ledger.counters["refused"] == 2


def test_retry_after_follows_the_drain_rate() -> None:
    ledger = made(
        report(num_blocks=100, max_model_len=2000),
        lease_seconds=1e6,
        submit_seconds=1e6,
        max_queue_seconds=1e6,
        replica_seconds=1e6,
    )
    ledger.request(ask("big", 100), 0.0)
    lease_ids = ["1.1"]
    for i in range(100):
        assert ledger.request(ask(f"r{i}", 10), 0.0) is None
    now = 0.0
    ledger.settle(lease_ids.pop(), 1, now)
    lease_ids += [lease.lease_id for _, lease in ledger.grants(now) if isinstance(lease, Lease)]
    for _ in range(60):  # 160 tokens each half second
        now += 0.5
        ledger.settle(lease_ids.pop(0), 1, now)
        lease_ids += [lease.lease_id for _, lease in ledger.grants(now) if isinstance(lease, Lease)]
    rate = ledger.snapshot()["drain_tokens_per_second"]
    assert rate == pytest.approx(320, rel=0.1)
    ledger.set_options(replace(ledger.options, max_queued_requests=1), 1)
    queued = ledger.snapshot()["num_queued_tokens"]
    with pytest.raises(OverloadedError) as refused:
        ledger.request(ask("more", 10), now)
    assert refused.value.retry_after == math.ceil((queued + 160) / rate)


def busy(seconds: float = 2.0, **options: Any) -> tuple[Ledger, float]:
    """Ten leases of 16 tokens each, whose answers take ``seconds``; one ends every fifth of a second, so 80 tokens a
    second are freed. Somebody always waits; in the end nobody does. The pool is full."""
    ledger = made(**({"lease_seconds": 1e6, "submit_seconds": 1e6, "replica_seconds": 1e6} | options))
    leases = [granted(ledger, ask(f"r{i}")) for i in range(10)]
    now = 0.0
    for i in range(500):
        assert ledger.request(ask(f"s{i}"), now) is None
        now += seconds / 10
        ledger.settle(leases.pop(0).lease_id, 13, now)
        ((_, lease),) = ledger.grants(now)
        assert isinstance(lease, Lease)
        leases.append(lease)
    ledger.check_invariants()
    assert ledger.snapshot()["drain_tokens_per_second"] == pytest.approx(160 / seconds, rel=0.02)
    return ledger, now


def refusal(ledger: Ledger, request: LeaseRequest, now: float) -> OverloadedError:
    try:
        answer = ledger.request(request, now)
    except OverloadedError as error:
        return error
    raise AssertionError(f"not refused: {answer}")


def test_a_request_that_would_be_late_is_refused_at_once() -> None:
    ledger, now = busy()
    assert ledger.request(ask("enough", remaining_ms=4000.0), now) is None  # 0.2 s to wait, 2 s to answer
    refused = refusal(ledger, ask("short", remaining_ms=2600.0), now)
    assert str(refused) == "1 requests wait, some 0.4 s long, and an answer takes time; this one has 2.6 s"
    assert refused.retry_after == 1
    for i in range(5):
        assert ledger.request(ask(f"e{i}", remaining_ms=6000.0), now) is None  # up to 1.2 s to wait
    refused = refusal(ledger, ask("more", remaining_ms=5000.0), now)  # a quarter of its time is 1.25 s
    assert "6 requests wait, some 1.4 s long" in str(refused)
    assert ledger.request(ask("first", remaining_ms=5000.0, priority=-1), now) is None
    assert ledger.request(ask("patient"), now) is None
    assert ledger.request(ask("begun", remaining_ms=100.0, is_continuation=True), now) is None
    assert ledger.counters["refused_as_too_late"] == 2
    ledger.check_invariants()


def test_a_request_that_would_wait_too_long_is_refused_at_once() -> None:
    ledger, now = busy(max_queue_seconds=3.0)
    for i in range(15):
        assert ledger.request(ask(f"e{i}"), now) is None
    refused = refusal(ledger, ask("more"), now)
    assert (str(refused), refused.retry_after) == ("15 requests wait, some 3 s long; the limit is 3 s", 4)


def test_without_an_open_replica_requests_wait_for_one() -> None:
    ledger, now = busy(max_queue_seconds=3.0)
    ledger.report(report("a", 2, *ledger.rows("a"), is_draining=True), now)
    for i in range(40):
        assert ledger.request(ask(f"e{i}", remaining_ms=6000.0), now) is None
    rate = ledger.snapshot()["drain_tokens_per_second"]
    assert len(ledger.grants(now + 3.0)) == 40
    assert ledger.snapshot()["drain_tokens_per_second"] == rate


def test_a_request_that_has_waited_too_long_is_not_started() -> None:
    ledger, now = busy()
    assert ledger.request(ask("waits", remaining_ms=4000.0), now) is None
    latest = now + 4.0 - admission_module.TIME_MARGIN * 2.0
    assert not ledger.grants(latest - 0.01)
    ((name, error),) = ledger.grants(latest + 0.01)
    assert isinstance(error, OverloadedError)
    assert (name, str(error)) == (
        "waits",
        "waited 1.5 s for a replica with room; an answer takes longer than the 2.5 s that are left",
    )
    assert ledger.counters["too_late_to_start"] == 1


def test_where_there_is_room_nobody_is_judged() -> None:
    ledger, now = busy()
    for row in ledger.rows("a"):
        ledger.settle(row.lease_id, 13, now)
    granted(ledger, ask("short", remaining_ms=1.0), now)


def test_a_replica_that_ends_nothing_in_time_is_found_slow() -> None:
    """Its answers took 0.5 s; now all of them are cut off after 4 s, and say nothing of how long they are."""
    ledger, now = busy(seconds=0.5)
    assert ledger.request(ask("fits", remaining_ms=2000.0), now) is None
    ledger.withdraw("fits")
    for row in ledger.rows("a"):
        ledger.settle(row.lease_id, None, now + 4.0)
    leases = [granted(ledger, ask(f"t{i}"), now + 4.0) for i in range(10)]
    for lease in leases:
        ledger.settle(lease.lease_id, None, now + 8.0)
    for i in range(10):
        granted(ledger, ask(f"u{i}"), now + 8.0)
    assert "an answer takes time" in str(refusal(ledger, ask("late", remaining_ms=1500.0), now + 8.0))
