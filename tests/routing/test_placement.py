"""What is booked for a request, and which replica gets it. A ledger alone, with a clock by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest

from serve_app.errors import (
    RequestTooLargeError,
)
from serve_app.routing import estimates
from serve_app.routing.leases import Lease
from tests.routing.ledgers import ask, free, granted, made, report, row


def test_the_most_free_budget_after_the_booking_wins() -> None:
    ledger = made(report("a", num_blocks=10), report("b", num_blocks=12), report("c", num_blocks=11))
    assert [granted(ledger, ask(f"r{i}", 2)).replica_id for i in range(6)] == ["b", "c", "a", "b", "c", "a"]


def test_free_budget_is_compared_in_tokens() -> None:
    ledger = made(report("a", num_blocks=10), report("b", num_blocks=6, block_size=32))
    assert granted(ledger, ask("r")).replica_id == "b"


def test_a_longer_cached_prefix_breaks_near_ties_only() -> None:
    ledger = made(report("a", num_blocks=100), report("b", num_blocks=100))
    prefix = (11, 12, 13)
    first = granted(ledger, ask("r0", 4, prefix_hashes=prefix))
    other = "b" if first.replica_id == "a" else "a"
    assert granted(ledger, ask("r1", 1, prefix_hashes=prefix)).replica_id == first.replica_id  # 96 free against 100
    assert granted(ledger, ask("r2", 1, prefix_hashes=(99,))).replica_id == other
    assert granted(ledger, ask("r3", 9)).replica_id == other
    assert granted(ledger, ask("r4", 9)).replica_id == first.replica_id
    ledger = made(report("a", num_blocks=100), report("b", num_blocks=100))
    first = granted(ledger, ask("r0", 6, prefix_hashes=prefix))
    assert granted(ledger, ask("r1", 1, prefix_hashes=prefix)).replica_id != first.replica_id  # 94 is no near tie
    assert ledger.counters["prefix_tokens_granted"] == 0


def test_the_memory_of_prefixes_is_as_large_as_the_pool_and_loses_tails_first() -> None:
    ledger = made(report(num_blocks=4))
    for name, hashes in (("r0", (1, 2, 3)), ("r1", (7, 8))):
        granted(ledger, ask(name, prefix_hashes=hashes))
    assert list(ledger.book.replicas["a"].prefixes) == [2, 1, 8, 7]


@pytest.mark.parametrize("why", ["draining", "silent", "avoided"])
def test_a_closed_replica_gets_no_grant(why: str) -> None:
    ledger = made(report("a", num_blocks=50), report("b", num_blocks=10), replica_seconds=3.0)
    if why == "draining":
        ledger.report(report("a", 2, num_blocks=50, is_draining=True), 4.0)
    elif why == "avoided":
        ledger.report(report("a", 2, num_blocks=50), 4.0)
    ledger.report(report("b", 2), 4.0)
    request = ask("r", not_on=frozenset({"a"}) if why == "avoided" else frozenset())
    assert granted(ledger, request, 4.0).replica_id == "b"
    assert ledger.request(replace(request, request_id="q", not_on=frozenset({"a", "b"})), 4.0) is None


def test_an_equal_fingerprint_comes_first_if_there_is_room() -> None:
    ledger = made(report("a", num_blocks=50, fingerprint="x"), report("b", num_blocks=5, fingerprint="y"))
    assert granted(ledger, ask("r0", 5, fingerprint="y")).replica_id == "b"
    assert granted(ledger, ask("r1", 5, fingerprint="y")).replica_id == "a"


@pytest.mark.parametrize("policy", ["reserve", "expect"])
def test_a_prompt_alone_may_fill_the_context_and_teaches_no_length(policy: str) -> None:
    """An embedding: what it books is its prompt, and answers are not taken to be shorter for it."""
    ledger = made(report(max_model_len=32), policy=policy)
    for i in range(40):
        lease = granted(ledger, ask(f"r{i}", num_prompt_tokens=32, max_output_tokens=0))
        assert lease.num_tokens == 32
        ledger.settle(lease.lease_id, 0, 0.0)
    assert ledger.snapshot()["num_output_lengths"] == 0
    with pytest.raises(RequestTooLargeError):
        ledger.request(ask("longer", num_prompt_tokens=33, max_output_tokens=0), 0.0)
    with pytest.raises(RequestTooLargeError):
        ledger.request(ask("with an answer", num_prompt_tokens=32, max_output_tokens=1), 0.0)


def test_what_fits_no_pool_is_refused_with_the_numbers() -> None:
    ledger = made(report("a", num_blocks=10), report("b", num_blocks=12, max_model_len=100))
    with pytest.raises(RequestTooLargeError, match=r"3 prompt tokens and 2 x 109 .* 192 tokens .* 100 of one"):
        ledger.request(ask("r", 7, num_choices=2), 0.0)
    assert ledger.request(ask("q", 5, num_choices=2), 0.0) is not None
    # More than the model's context cannot be made, so no more is booked.
    assert granted(made(report(max_model_len=40)), ask("p", 20)).num_tokens == 48


def test_a_replica_is_granted_what_its_steps_hold_and_one_more_for_every_eight() -> None:
    for most, allowed in ((1, 2), (4, 5), (8, 9), (16, 18), (20, 22)):
        ledger = made(report(num_blocks=1000, max_num_seqs=most))
        leases = [ledger.request(ask(f"r{i}"), 0.0) for i in range(allowed + 1)]
        assert leases[-1] is None
        assert None not in leases[:-1]
        ledger.settle("1.1", 1, 0.1)
        ((name, lease),) = ledger.grants(0.1)
        assert (name, type(lease)) == (f"r{allowed}", Lease)
        ledger.check_invariants()


def test_each_choice_takes_a_place() -> None:
    ledger = made(report("a", num_blocks=1000, max_num_seqs=4), report("b", num_blocks=999, max_num_seqs=16))
    assert granted(ledger, ask("r0", num_choices=3)).replica_id == "a"
    assert granted(ledger, ask("r1", num_choices=3)).replica_id == "b"  # 6 places of 5
    assert granted(ledger, ask("r2", num_choices=2)).replica_id == "a"
    assert ledger.snapshot()["replicas"]["a"]["num_booked_seqs"] == 5
    ledger = made(report(num_blocks=1000, max_num_seqs=4))
    assert granted(ledger, ask("wide", num_choices=16))  # more than a step holds: it takes turns with itself
    assert ledger.request(ask("next"), 0.0) is None


def test_expect_books_what_it_learned_and_takes_the_replicas_number() -> None:
    ledger = made(report(num_blocks=10), policy="expect", submit_seconds=1e6, lease_seconds=1e6, replica_seconds=1e6)
    for i in range(40):
        lease = granted(ledger, ask(f"r{i}", 8))
        assert lease.num_tokens == (128 if i < estimates.MIN_LENGTHS else 16)
        ledger.settle(lease.lease_id, 10, 0.0)
    leases = [granted(ledger, ask(f"q{i}", 8)) for i in range(9)]
    assert free(ledger) == 1
    ledger.report(report("a", 2, row(leases[0], 6), *map(row, leases[1:])), 0.0)
    assert free(ledger) == -4
    assert ledger.counters["grown_blocks"] == 5
    assert ledger.counters["grown_past_pool"] == 1
    assert ledger.request(ask("w"), 0.0) is None
    for lease in leases[1:5]:
        ledger.settle(lease.lease_id, 10, 0.0)
    assert (free(ledger), ledger.grants(0.0)) == (0, [])
    ledger.settle(leases[0].lease_id, 90, 0.0)
    assert [name for name, _ in ledger.grants(0.0)] == ["w"]
    ledger.check_invariants()
