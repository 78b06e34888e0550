"""The ledger in random worlds with virtual time, and with faults planted into it."""

from __future__ import annotations

from collections import Counter, OrderedDict
from dataclasses import replace
from typing import Any

import pytest

from serve_app.replica.lease_table import LeaseTable
from serve_app.routing import admission as admission_module
from serve_app.routing.admission import Admission
from serve_app.routing.lease_book import LeaseBook, ReplicaBook
from serve_app.routing.leases import BookedLease, LeaseRequest, ReplicaReport
from serve_app.routing.ledger import LOSSES, Ledger
from serve_app.routing.placement import Placement
from serve_app.routing.wait_queue import Waiting, WaitQueue
from tests.planted_faults import Fault, Patch, expect_noticed, scenario
from tests.routing import test_admission, test_lease_book, test_ledger, test_placement, test_wait_queue
from tests.routing.ledger_world import World, random_world
from tests.routing.ledgers import made

NUM_SEEDS = 6


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


def test_losses_are_counted_from_zero() -> None:
    """A counter that appears together with its first event shows no growth, and no alert sees it."""
    assert dict.fromkeys(LOSSES, 0).items() <= made().snapshot()["counters"].items()
    assert REPAIRS - {"adopted", "ended_by_replica"} < set(LOSSES)


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
    (judge_no_waits, scenario(test_admission.test_a_request_that_would_be_late_is_refused_at_once), "not refused: "),
    (
        start_what_will_be_late,
        scenario(test_admission.test_a_request_that_has_waited_too_long_is_not_started),
        "assert ",
    ),
    (
        learn_nothing_from_what_is_cut_off,
        scenario(test_admission.test_a_replica_that_ends_nothing_in_time_is_found_slow),
        "not refused: ",
    ),
    (book_one_block_too_few, quiet, "booking: "),
    (take_reports_in_any_order, scenario(test_lease_book.test_an_older_report_is_dropped), "assert "),
    (forget_what_was_settled, quiet, "difference: "),
    (ignore_what_a_report_shows, faulty, "difference: "),
    (ignore_growth, growing, "blocks: "),
    (keep_what_a_report_no_longer_shows, faulty, "leak: "),
    (grant_anywhere, faulty, "grant: "),
    (grant_on_avoided_replicas, scenario(test_placement.test_a_closed_replica_gets_no_grant, "avoided"), "assert "),
    (grant_while_rebuilding, faulty, "grant: "),
    (wait_for_ever, quiet, "busy: |waits: "),
    (never_look_at_the_queue_again, quiet, "busy: |waits: "),
    (say_an_answer_twice, quiet, "answered twice: |a request is answered|busy: "),
    (lose_an_answer, quiet, "difference: |waits: |queue: "),
    (keep_what_was_never_shown, faulty, "busy: |leak: "),
    (
        tell_of_leases_that_are_about_to_end,
        scenario(test_lease_book.test_a_lease_that_is_told_again_has_all_its_time_again),
        "assert ",
    ),
    (keep_silent_replicas, faulty, "busy: |leak: "),
    (forget_no_leases_of_a_dead_replica, faulty, "the leases of all replicas"),
    (never_hold_a_replica, scenario(test_ledger.test_a_large_request_is_passed_over_so_often_and_no_more), "assert "),
    (
        hold_every_replica,
        scenario(test_ledger.test_while_one_replica_is_held_for_a_large_request_the_others_serve),
        "the other",
    ),
    (serve_by_age_alone, scenario(test_wait_queue.test_the_queue_goes_by_priority_then_age), "assert "),
    (open_what_does_not_fit, growing, "budget: "),
    (keep_the_blocks_of_an_ended_lease, quiet, "load: "),
    (never_expire_at_the_replica, faulty, "leak: "),
]


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault[0].__name__)
def test_a_planted_fault_makes_its_check_fail(fault: Fault, monkeypatch: Patch) -> None:
    expect_noticed(fault, monkeypatch)
