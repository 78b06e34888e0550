"""What the ledger tells its watch, and what is kept of it: reasons, and waits by cause, with a clock by hand."""

from __future__ import annotations

from typing import Any

import pytest

from serve_app.errors import OverloadedError
from serve_app.routing import decisions as module
from serve_app.routing.decisions import Decisions
from serve_app.routing.leases import Lease, LeaseRequest
from serve_app.routing.ledger import Ledger
from serve_app.routing.watch import ReplicaView
from tests.routing.ledgers import ask, granted, made, report


def watched(*replicas: Any, **options: Any) -> tuple[Ledger, Decisions]:
    ledger = made(*replicas, **options)
    decisions = Decisions(lambda: 1_000_000.0)
    ledger.watch = decisions
    return ledger, decisions


def request(ledger: Ledger, decisions: Decisions, asked: LeaseRequest, now: float) -> Lease | None:
    """As the router does it."""
    decisions.asked(asked.request_id, now)
    return ledger.request(asked, now)


def told(decisions: Decisions, name: str, now: float) -> dict[str, Any]:
    return decisions.tell([name], now)[name]


def views_of(ledger: Ledger, asked: LeaseRequest, held: str = "") -> dict[str, ReplicaView]:
    """``held``: a replica that is held for another request."""
    replicas = ledger.book.replicas
    return ledger._placement.views(asked, replicas, replicas, replicas.keys() - {held})


def test_reasons() -> None:
    ledger, decisions = watched(report("a", num_blocks=100), report("b", num_blocks=100, is_draining=True))
    request(ledger, decisions, ask("only"), 0.0)
    assert told(decisions, "only", 0.0)["because"] == "the_only_one_that_fits"
    assert told(decisions, "only", 0.0)["replicas"]["b"]["left_out"] == "draining"
    ledger.report(report("b", 2, num_blocks=100), 0.0)
    request(ledger, decisions, ask("free", 10), 0.0)
    free = told(decisions, "free", 0.0)
    assert (free["replica"], free["because"], free["waited_ms"]) == ("b", "most_free_budget", 0.0)
    assert free["replicas"]["a"] == {
        "num_free_tokens": 99 * 16,
        "num_needed_tokens": 160,
        "num_free_places": (1 << 30) + (1 << 27) - 1,
        "num_cached_tokens": 0,
        "fingerprint": "f",
        "left_out": None,
    }
    ledger, decisions = watched(report("a", num_blocks=1000), report("b", num_blocks=1000))
    first = request(ledger, decisions, ask("first", prefix_hashes=(1, 2)), 0.0)
    assert first is not None
    assert told(decisions, "first", 0.0)["because"] == "granted_to_least_recently"
    second = request(ledger, decisions, ask("second", prefix_hashes=(1, 2, 3)), 0.0)
    assert second is not None
    assert second.replica_id == first.replica_id
    assert told(decisions, "second", 0.0)["because"] == "longest_cached_prefix"
    assert told(decisions, "second", 0.0)["replicas"][first.replica_id]["num_cached_tokens"] == 32


def test_what_left_a_replica_out() -> None:
    replicas = [report(i, num_blocks=10, max_num_seqs=8) for i in "abc"]
    ledger, _ = watched(*replicas, report("other", num_blocks=10, max_num_seqs=8, fingerprint="g"))
    for name, count in (("x", 9), ("y", 9)):
        granted(ledger, ask(name, 1, num_choices=count, not_on=frozenset({"b", "c", "other"} if name == "x" else ())))
    asked = ask("now", 3, not_on=frozenset({"c"}), fingerprint="f")
    views = views_of(ledger, asked, held="b")
    assert views["c"].left_out == "excluded"
    assert views["a"].left_out == "budget"
    assert views["b"].left_out in ("budget", "held")
    assert views_of(ledger, ask("long", 1000))["c"].left_out == "too_small"
    views = views_of(made(*replicas[:1], report("other", fingerprint="g")), ask("f", fingerprint="f"))
    assert (views["a"].left_out, views["other"].left_out) == (None, "other_numerics")


def test_a_wait_is_charged_to_what_it_waited_for() -> None:
    ledger, decisions = watched(report("a", num_blocks=10, max_num_seqs=8), replica_seconds=9.0)
    first = granted(ledger, ask("first", 8), 0.0)
    assert request(ledger, decisions, ask("big", 5), 1.0) is None
    assert request(ledger, decisions, ask("behind", 6), 1.0) is None
    waits = told(decisions, "big", 3.0)
    assert (waits["answer"], waits["waited_for_ms"], waits["replica"]) == ("waits", {"budget": 2000.0}, None)
    ledger.settle(first.lease_id, 5, 4.0)
    ((name, lease),) = ledger.grants(4.0)
    assert name == "big"
    assert isinstance(lease, Lease)
    ledger.report(report("a", 2, num_blocks=10, is_draining=True), 5.0)
    ledger.grants(5.0)
    # Nobody is open now: what it waits for has another name.
    behind = told(decisions, "behind", 7.0)
    assert behind["waited_for_ms"] == {"budget": 4000.0, "no_replica": 2000.0}
    big = told(decisions, "big", 9.0)
    assert (big["answer"], big["waited_ms"], big["waited_for_ms"]) == ("granted", 3000.0, {"budget": 3000.0})
    assert big["asked_at"] == 1_000_000.0 - 8000.0
    ledger.withdraw("behind")
    decisions.ended("behind", "withdrawn", 8.0)
    decisions.ended("behind", "too late", 9.0)
    assert told(decisions, "behind", 9.0)["answer"] == "withdrawn"


def test_places_and_turns() -> None:
    ledger, decisions = watched(report("a", num_blocks=1000, max_num_seqs=8))
    for i in range(9):
        granted(ledger, ask(f"r{i}"), 0.0)
    assert request(ledger, decisions, ask("place"), 0.0) is None
    for i in range(40):
        assert request(ledger, decisions, ask(f"later{i}"), 0.0) is None
    assert told(decisions, "place", 1.0)["waited_for_ms"] == {"places": 1000.0}
    # Behind more requests than one look goes past: nobody asks what they would fit.
    assert told(decisions, "later39", 1.0)["waited_for_ms"] == {"fairness": 1000.0}


def test_a_refusal_and_the_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_DECISIONS", 3)
    ledger, decisions = watched(max_queued_requests=0)
    granted(ledger, ask("first", 10), 0.0)
    with pytest.raises(OverloadedError):
        request(ledger, decisions, ask("no", 10), 0.0)
    decisions.ended("no", "overloaded", 0.0)
    assert told(decisions, "no", 0.0)["answer"] == "overloaded"
    for i in range(5):
        decisions.asked(f"more{i}", 1.0)
    assert len(decisions) == 3
    assert decisions.tell(["no", "more1"], 1.0) == {}
