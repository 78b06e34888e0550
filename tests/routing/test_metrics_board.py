"""MetricsBoard: the newest counts of all, summed over ingresses, whoever comes and goes."""

from __future__ import annotations

import pytest

from serve_app.routing.metrics_board import DEPARTED_SECONDS, SETTLE_SECONDS, MetricsBoard


def board() -> MetricsBoard:
    return MetricsBoard(0.0, settle_seconds=0.0)


def test_ingresses_are_summed() -> None:
    made = board()
    made.tell("a", (1, {"answers": {("/x", "200"): 2}, "seconds": {(): [1, 0, 0.5]}}), 1.0)
    made.tell("b", (1, {"answers": {("/x", "200"): 3, ("/y", "404"): 1}, "seconds": {(): [2, 4, 9.0]}}), 1.0)
    total = made.snapshot(2.0)["ingress_counts"]
    assert total == {"answers": {("/x", "200"): 5, ("/y", "404"): 1}, "seconds": {(): [3, 4, 9.5]}}
    # The sum is a value of its own: nothing that was told has changed.
    assert made.snapshot(2.0)["ingress_counts"] == total


def test_the_newest_counts_and_old_messages_change_nothing() -> None:
    made = board()
    made.tell("a", (2, {"n": {(): 7}}), 1.0)
    made.tell("a", (1, {"n": {(): 5}}), 2.0)
    made.tell("a", None, 3.0)
    made.report("r", 9, {"n": {(): 4}}, 3.0)
    made.report("r", 8, {"n": {(): 3}}, 3.0)
    snapshot = made.snapshot(4.0)
    assert snapshot == {"replica_counts": {"r": {"n": {(): 4}}}, "ingress_counts": {"n": {(): 7}}}


def test_what_an_ingress_counted_stays_when_it_has_left() -> None:
    made = board()
    seen = []
    for i in range(5):
        now = 2 * i * DEPARTED_SECONDS
        made.tell(f"ingress{i}", (1, {"n": {(): 10.0}, "h": {(): [1.0, 2.0]}}), now)
        seen.append(made.snapshot(now + 1.0)["ingress_counts"])
    assert seen == [{"n": {(): 10.0 * i}, "h": {(): [1.0 * i, 2.0 * i]}} for i in range(1, 6)]
    assert len(made._ingresses) == 1


def test_one_that_has_nothing_new_has_not_left() -> None:
    made = board()
    made.tell("a", (1, {"n": {(): 1}}), 0.0)
    for i in range(1, 10):
        made.tell("a", None, 0.5 * i * DEPARTED_SECONDS)
        made.snapshot(0.5 * i * DEPARTED_SECONDS)
    made.tell("a", (2, {"n": {(): 2}}), 4.6 * DEPARTED_SECONDS)
    assert made.snapshot(4.7 * DEPARTED_SECONDS)["ingress_counts"] == {"n": {(): 2}}


def test_what_a_replica_did_last_is_shown_for_a_while() -> None:
    made = board()
    made.report("a", 1, {"n": {(): 1}}, 0.0)
    made.report("b", 1, {"n": {(): 2}}, 500.0)
    assert set(made.snapshot(DEPARTED_SECONDS)["replica_counts"]) == {"a", "b"}
    assert set(made.snapshot(DEPARTED_SECONDS + 1.0)["replica_counts"]) == {"b"}


def test_there_is_no_sum_before_everybody_can_have_told() -> None:
    made = MetricsBoard(100.0)
    made.tell("a", (1, {"n": {(): 1}}), 100.1)
    assert made.snapshot(100.2)["ingress_counts"] == {}
    assert made.snapshot(100.0 + SETTLE_SECONDS)["ingress_counts"] == {"n": {(): 1}}


def test_histograms_of_other_bounds_are_not_added() -> None:
    made = board()
    made.tell("a", (1, {"h": {(): [1, 2, 3]}}), 0.0)
    made.tell("b", (1, {"h": {(): [1, 2]}}), 0.0)
    with pytest.raises(AssertionError, match="other bounds"):
        made.snapshot(1.0)
