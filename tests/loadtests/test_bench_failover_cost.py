"""The bench of what failover costs: both ways give every token, and *without* really keeps nothing."""

from __future__ import annotations

import doctest

from loadtests import bench_failover_cost as bench
from serve_app.api.stream import GenerationStream
from serve_app.engine.request import TokenOutput
from serve_app.replica.messages import Outbox


def test_both_ways_are_measured_and_nothing_stays_changed() -> None:
    kept = GenerationStream._take, Outbox.message_after
    found = bench.measure(2, 3, 20, num_alone=2)  # asserts the number of tokens of every stream
    assert (GenerationStream._take, Outbox.message_after) == kept
    assert {keeps: len(rows) for keeps, rows in found.items()} == {True: 2, False: 2}
    assert min(min(row) for rows in found.values() for row in rows) > 0
    assert bench.table(found).count("\n") == 6
    assert doctest.testmod(bench) == (0, 1)


def test_without_keeps_no_message() -> None:
    for keeps in (True, False):
        outbox = Outbox(8)
        outbox.put(1, TokenOutput("r", 0, (5,)))
        if keeps:
            assert outbox.message_after(0) == (1, (1, 5), ())
        else:
            with bench.without():
                assert outbox.message_after(0) == (1, (1, 5), ())
        assert len(outbox._sent) == keeps
