"""The ledger alone with a clock by hand, in random worlds with virtual time, and with faults planted into it."""

from __future__ import annotations

import math
from collections import Counter, OrderedDict
from dataclasses import replace
from typing import Any

import pytest

from serve_app.errors import (
    ConfigurationError,
    DeadlineExceededError,
    EngineUnavailableError,
    OverloadedError,
    RequestTooLargeError,
    ServerDrainingError,
)
from serve_app.replica.lease_table import LeaseTable
from serve_app.routing import admission as admission_module, estimates, ledger as ledger_module
from serve_app.routing.admission import Admission
from serve_app.routing.estimates import DrainRate, OutputLengths
from serve_app.routing.lease_book import LeaseBook, ReplicaBook
from serve_app.routing.leases import BookedLease, Lease, LeaseRequest, ReplicaReport, num_blocks_for
from serve_app.routing.ledger import CLOSED_SECONDS, LOSSES, Ledger
from serve_app.routing.ledger_options import LedgerOptions
from serve_app.routing.placement import Placement
from serve_app.routing.wait_queue import Waiting, WaitQueue
from tests.planted_faults import Fault, Patch, expect_noticed, scenario
from tests.routing.ledger_world import World, random_world

NUM_SEEDS = 6


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


# ---- booking and choice ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompt", "output", "choices", "block_size", "blocks"),
    [
        (70, 30, 2, 32, 6),
        (1, 1, 1, 32, 1),
        (32, 1, 3, 32, 4),
        (31, 1, 3, 32, 3),
        (33, 31, 1, 32, 2),
        (33, 32, 1, 32, 3),
    ],
)
def test_full_prompt_blocks_are_shared_and_the_rest_is_not(
    prompt: int, output: int, choices: int, block_size: int, blocks: int
) -> None:
    assert num_blocks_for(prompt, output, choices, block_size) == blocks


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


def test_a_draining_replica_may_be_the_last_one() -> None:
    """It is the replica's own word, in each report: nothing else remembers it, and a new life of the router hears it."""
    ledger = Ledger(LedgerOptions(), 2, rebuilding=True, grace_seconds=1.0)
    ledger.report(report("a", 7, is_draining=True), 0.0)
    assert ledger.request(ask("r"), 2.0) is None
    assert ledger.snapshot()["replicas"]["a"]["is_draining"]
    ledger.report(report("b"), 2.0)
    assert [(name, answer.replica_id) for name, answer in ledger.grants(2.0)] == [("r", "b")]  # type: ignore[union-attr]


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


def test_without_a_replica_requests_wait() -> None:
    ledger = Ledger(LedgerOptions(), 7)
    assert ledger.request(ask("r", 1), 0.0) is None
    assert ledger.grants(0.1) == []
    ledger.report(report(), 0.2)
    ((request_id, lease),) = ledger.grants(0.2)
    assert (request_id, lease) == ("r", Lease("7.1", "a", 16, 7, "f"))
    assert ledger.grants(0.2) == []


# ---- the life of a lease -----------------------------------------------------------------------------------------


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


def test_losses_are_counted_from_zero() -> None:
    """A counter that appears together with its first event shows no growth, and no alert sees it."""
    assert dict.fromkeys(LOSSES, 0).items() <= made().snapshot()["counters"].items()
    assert REPAIRS - {"adopted", "ended_by_replica"} < set(LOSSES)


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


# ---- the queue ---------------------------------------------------------------------------------------------------


def test_the_queue_goes_by_priority_then_age() -> None:
    ledger = made(report(num_blocks=4))
    lease = granted(ledger, ask("first", 4))
    for name, priority in (("c", 0), ("d", 0), ("a", -1), ("e", 3), ("b", -1)):
        assert ledger.request(ask(name, priority=priority), 0.1) is None
    ledger.settle(lease.lease_id, 1, 0.2)
    assert [name for name, _ in ledger.grants(0.2)] == ["a", "b", "c", "d"]
    assert ledger.withdraw("e") is None
    assert ledger.snapshot()["num_queued_requests"] == 0


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


def test_the_drain_rate_has_no_bias_at_its_start() -> None:
    rate = DrainRate()
    assert rate.tokens_per_second is None
    for i in range(10):
        rate.elapse(0.1)
        rate.add(50)
        assert (rate.tokens_per_second is None) == (i + 1 < estimates.MIN_DRAINED)
    assert rate.tokens_per_second == pytest.approx(500, rel=0.06)


# ---- places in a step, and time ----------------------------------------------------------------------------------


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


def test_adopted_leases_hold_their_places() -> None:
    ledger = made(report("a", 1, BookedLease("0.1", "x", 3, 4), num_blocks=1000, max_num_seqs=4))
    assert ledger.rows("a") == (BookedLease("0.1", "x", 3, 4),)
    granted(ledger, ask("standing by"))
    assert ledger.request(ask("waits"), 0.0) is None


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


# ---- options, expect, rebuilding ---------------------------------------------------------------------------------


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


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("policy", "hope"),
        ("max_queued_requests", -1),
        ("max_queued_requests", True),
        ("max_queued_tokens", 1.5),
        ("max_queue_seconds", 0),
        ("lease_seconds", math.inf),
        ("submit_seconds", math.nan),
        ("replica_seconds", 11.0),
    ],
)
def test_wrong_options_are_named(name: str, value: Any) -> None:
    with pytest.raises(ConfigurationError, match=f"^{name} is {value!r}; it must be "):
        LedgerOptions(**{name: value})


def test_expected_lengths_are_a_high_quantile_of_what_finished() -> None:
    lengths = OutputLengths()
    for i in range(estimates.MIN_LENGTHS - 1):
        lengths.add(i, 1000)
    assert lengths.expected(700) == 700
    for i in range(1000):
        lengths.add(i % 100, 200 if i % 2 else 1000)
    assert len(lengths) == estimates.NUM_LENGTHS == len(lengths._lengths) == len(lengths._shares)
    assert lengths.expected(1000) == pytest.approx(90, abs=2)
    assert lengths.expected(50) < 50
    assert lengths.expected(1) == 1
    for _ in range(600):
        lengths.add(64, 64)
    assert lengths.expected(40) == 40
    assert lengths.expected(4000) == 64


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


# ---- random worlds -----------------------------------------------------------------------------------------------

QUIET = {"granted", "opened", "settled", "given up", "given back", "OverloadedError", "RequestTooLargeError"}
QUIET |= {"standing by", "in both tables", "in flight, granted", "in flight, ended", "in flight, given up"}
BAD = {"granted", "lost", "doubled", "restarts", "drained", "holders killed", "replicas killed", "failed over"}
BAD |= {"expired at the replica", "dropped reports"}
ENDS = {"settled", "ended_by_replica", "withdrawn", "refused", "timed_out", "repeated"}
ENDS |= {"refused_as_too_late", "too_late_to_start"}
REPAIRS = {"adopted", "never_shown", "lost_with_replica", "holders_lost", "silent_replicas", "ended_by_replica"}


@pytest.mark.parametrize("faults", [False, True], ids=["quiet", "faults"])
@pytest.mark.parametrize("policy", ["reserve", "expect"])
def test_random_worlds(policy: str, faults: bool) -> None:
    seen: Counter[str] = Counter()
    counted: Counter[str] = Counter()
    for seed in range(NUM_SEEDS):
        world = random_world(seed, policy, faults=faults)
        assert world.ledger is not None
        seen.update(world.seen)
        counted.update(world.ledger.counters)
    must = (BAD if faults else QUIET) | ({"grown", "past the pool", "booked less"} if policy == "expect" else set())
    assert not [name for name in must if not seen[name]], f"too little happened: {seen}"
    must = REPAIRS if faults else ENDS
    assert not [name for name in must if not counted[name]], f"too little was counted: {counted}"


# ---- planted faults ----------------------------------------------------------------------------------------------


def quiet(patch: Patch) -> None:
    for seed in range(6):
        random_world(seed, "reserve")


def growing(patch: Patch) -> None:
    for seed in range(6):
        random_world(seed, "expect")


def faulty(patch: Patch) -> None:
    for seed in range(8):
        random_world(seed, "reserve", faults=True)


def skip_a_settle(patch: Patch) -> None:
    patch.setattr(Ledger, "settle", lambda ledger, lease_id, num, now: None)


def count_a_booking_twice(patch: Patch) -> None:
    set_blocks = LeaseBook.set_blocks

    def twice(book: LeaseBook, lease: Any, num_blocks: int) -> None:
        set_blocks(book, lease, num_blocks)
        book.replicas[lease.replica_id].num_booked_blocks += num_blocks == 3

    patch.setattr(LeaseBook, "set_blocks", twice)


def keep_an_ended_lease_with_its_holder(patch: Patch) -> None:
    set_blocks = LeaseBook.set_blocks

    def keeping(book: LeaseBook, lease: Any, num_blocks: int) -> None:
        set_blocks(book, lease, num_blocks)
        book.holders[lease.holder_id].leases.add(lease.lease_id)

    patch.setattr(LeaseBook, "set_blocks", keeping)


def grant_past_the_pool(patch: Patch) -> None:
    patch.setattr(ReplicaBook, "num_free_blocks", property(lambda r: r.report.num_blocks - r.num_booked_blocks + 2))


def grant_past_the_places(patch: Patch) -> None:
    patch.setattr(ReplicaBook, "has_place", lambda replica, num_choices: True)


def count_a_place_too_few(patch: Patch) -> None:
    set_blocks = LeaseBook.set_blocks

    def fewer(book: LeaseBook, lease: Any, num_blocks: int) -> None:
        set_blocks(book, lease, num_blocks)
        book.replicas[lease.replica_id].num_booked_seqs -= num_blocks == 3

    patch.setattr(LeaseBook, "set_blocks", fewer)


def judge_no_waits(patch: Patch) -> None:
    patch.setattr(Admission, "refusal", lambda *args, **named: None)


def start_what_will_be_late(patch: Patch) -> None:
    patch.setattr(admission_module, "TIME_MARGIN", 0.0)


def learn_nothing_from_what_is_cut_off(patch: Patch) -> None:
    learn = Admission.learn
    patch.setattr(
        Admission,
        "learn",
        lambda admission, request, seconds, num: None if num is None else learn(admission, request, seconds, num),
    )


def book_one_block_too_few(patch: Patch) -> None:
    booking = Placement.booking

    def less(placement: Placement, *args: Any) -> int | None:
        need = booking(placement, *args)
        return need - 1 if need is not None and need > 1 else need

    patch.setattr(Placement, "booking", less)


def take_reports_in_any_order(patch: Patch) -> None:
    take = Ledger.report

    def any_order(ledger: Ledger, new: ReplicaReport, now: float) -> Any:
        replica = ledger.book.replicas.get(new.replica_id)
        if replica is not None:
            replica.report = replace(replica.report, report_number=-1)
        return take(ledger, new, now)

    patch.setattr(Ledger, "report", any_order)


def forget_what_was_settled(patch: Patch) -> None:
    patch.setattr(LeaseBook, "_remember", lambda book, *args: None)


def ignore_what_a_report_shows(patch: Patch) -> None:
    patch.setattr(LeaseBook, "_compare", lambda book, *args, **named: None)


def ignore_growth(patch: Patch) -> None:
    compare = LeaseBook._compare

    def deaf(book: LeaseBook, replica: Any, booked: BookedLease, now: float, *, is_adopting: bool) -> None:
        known = book.leases.get(booked.lease_id)
        told = booked._replace(num_blocks=known.num_blocks) if known else booked
        compare(book, replica, told, now, is_adopting=is_adopting)

    patch.setattr(LeaseBook, "_compare", deaf)


def keep_what_a_report_no_longer_shows(patch: Patch) -> None:
    end = LeaseBook.end
    patch.setattr(LeaseBook, "end", lambda *args: None if "ended_by_replica" in args else end(*args))


def grant_anywhere(patch: Patch) -> None:
    patch.setattr(ReplicaBook, "is_open", lambda replica, *args: True)


def grant_on_avoided_replicas(patch: Patch) -> None:
    choose = Placement.choose
    patch.setattr(
        Placement,
        "choose",
        lambda placement, request, candidates: choose(placement, replace(request, not_on=frozenset()), candidates),
    )


def grant_while_rebuilding(patch: Patch) -> None:
    scan = Ledger._scan

    def early(ledger: Ledger) -> None:
        was, ledger.rebuilding.is_on = ledger.rebuilding.is_on, False
        scan(ledger)
        ledger.rebuilding.is_on = was

    patch.setattr(Ledger, "_scan", early)


def wait_for_ever(patch: Patch) -> None:
    patch.setattr(Ledger, "_end_waits", lambda ledger: None)


def never_look_at_the_queue_again(patch: Patch) -> None:
    choose = Placement.choose
    enter = WaitQueue.enter
    queues: list[WaitQueue] = []

    def entering(queue: WaitQueue, entry: Any) -> None:
        queues[:] = [queue]
        enter(queue, entry)

    def once(placement: Placement, request: LeaseRequest, candidates: Any) -> Any:
        found = choose(placement, request, candidates)
        return None if len(queues[0]) > 1 else found

    patch.setattr(WaitQueue, "enter", entering)
    patch.setattr(Placement, "choose", once)
    patch.setattr(Ledger, "_end_waits", lambda ledger: None)


def say_an_answer_twice(patch: Patch) -> None:
    grants = Ledger.grants

    def twice(ledger: Ledger, now: float) -> Any:
        answers = grants(ledger, now)
        ledger._answers = OrderedDict(answers)
        return answers

    patch.setattr(Ledger, "grants", twice)


def lose_an_answer(patch: Patch) -> None:
    grants = Ledger.grants
    patch.setattr(Ledger, "grants", lambda ledger, now: grants(ledger, now)[1:])


def keep_what_was_never_shown(patch: Patch) -> None:
    patch.setattr(LeaseBook, "end_unshown_leases", lambda book, *args: None)
    patch.setattr(Ledger, "_lose_holder", lambda ledger, holder_id: None)


def tell_of_leases_that_are_about_to_end(patch: Patch) -> None:
    patch.setattr(LeaseBook, "is_told_again", lambda book, *args: None)


def keep_silent_replicas(patch: Patch) -> None:
    patch.setattr(LeaseBook, "silent_replicas", lambda book, *args: [])


def forget_no_leases_of_a_dead_replica(patch: Patch) -> None:
    end = LeaseBook.end
    patch.setattr(LeaseBook, "end", lambda *args: None if "lost_with_replica" in args else end(*args))


def never_hold_a_replica(patch: Patch) -> None:
    patch.setattr(Ledger, "_hold", lambda ledger, entry, candidates: None)


def hold_every_replica(patch: Patch) -> None:
    patch.setattr(Ledger, "_hold", lambda ledger, entry, candidates: candidates.clear())


def serve_by_age_alone(patch: Patch) -> None:
    patch.setattr(Waiting, "order", property(lambda entry: (0, entry.number)))


def open_what_does_not_fit(patch: Patch) -> None:
    patch.setattr(LeaseTable, "num_free_blocks", property(lambda table: table.num_blocks))


def keep_the_blocks_of_an_ended_lease(patch: Patch) -> None:
    end = LeaseTable.end

    def leaky(table: LeaseTable, lease_id: str) -> bool:
        ended = end(table, lease_id)
        table.num_booked_blocks += ended
        return ended

    patch.setattr(LeaseTable, "end", leaky)


def never_expire_at_the_replica(patch: Patch) -> None:
    """Streams that nobody reads any more then run to their end, which here is far away."""
    patch.setattr(LeaseTable, "expired", lambda table, now, seconds: [])
    patch.setattr(World, "end_stream", lambda world, replica, lease_id: None)


FAULTS: list[Fault] = [
    (skip_a_settle, quiet, "settled: "),
    (count_a_booking_twice, quiet, "load: "),
    (keep_an_ended_lease_with_its_holder, quiet, "the leases of all holders"),
    (grant_past_the_pool, quiet, "budget: "),
    (grant_past_the_places, quiet, "places: "),
    (count_a_place_too_few, quiet, "load: "),
    (judge_no_waits, quiet, "queue: "),
    (judge_no_waits, scenario(test_a_request_that_would_be_late_is_refused_at_once), "not refused: "),
    (start_what_will_be_late, scenario(test_a_request_that_has_waited_too_long_is_not_started), "assert "),
    (
        learn_nothing_from_what_is_cut_off,
        scenario(test_a_replica_that_ends_nothing_in_time_is_found_slow),
        "not refused: ",
    ),
    (book_one_block_too_few, quiet, "booking: "),
    (take_reports_in_any_order, scenario(test_an_older_report_is_dropped), "assert "),
    (forget_what_was_settled, quiet, "difference: "),
    (ignore_what_a_report_shows, faulty, "difference: "),
    (ignore_growth, growing, "blocks: "),
    (keep_what_a_report_no_longer_shows, faulty, "leak: "),
    (grant_anywhere, faulty, "grant: "),
    (grant_on_avoided_replicas, scenario(test_a_closed_replica_gets_no_grant, "avoided"), "assert "),
    (grant_while_rebuilding, faulty, "grant: "),
    (wait_for_ever, quiet, "busy: |waits: "),
    (never_look_at_the_queue_again, quiet, "busy: |waits: "),
    (say_an_answer_twice, quiet, "answered twice: |a request is answered|busy: "),
    (lose_an_answer, quiet, "difference: |waits: |queue: "),
    (keep_what_was_never_shown, faulty, "busy: |leak: "),
    (
        tell_of_leases_that_are_about_to_end,
        scenario(test_a_lease_that_is_told_again_has_all_its_time_again),
        "assert ",
    ),
    (keep_silent_replicas, faulty, "busy: |leak: "),
    (forget_no_leases_of_a_dead_replica, faulty, "the leases of all replicas"),
    (never_hold_a_replica, scenario(test_a_large_request_is_passed_over_so_often_and_no_more), "assert "),
    (hold_every_replica, scenario(test_while_one_replica_is_held_for_a_large_request_the_others_serve), "the other"),
    (serve_by_age_alone, scenario(test_the_queue_goes_by_priority_then_age), "assert "),
    (open_what_does_not_fit, growing, "budget: "),
    (keep_the_blocks_of_an_ended_lease, quiet, "load: "),
    (never_expire_at_the_replica, faulty, "leak: "),
]


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault[0].__name__)
def test_a_planted_fault_makes_its_check_fail(fault: Fault, monkeypatch: Patch) -> None:
    expect_noticed(fault, monkeypatch)
