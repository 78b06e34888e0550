"""Scheduler: one scenario for each thing it promises. A plan reads ``a[0:8] b#1[3:4]*`` (see harness.show)."""

from __future__ import annotations

import dataclasses
import math

import pytest

from serve_app.engine import scheduler as scheduler_module
from serve_app.engine.request import FinishReason, GenerateRequest, SamplingParams, TokenLogprobs
from serve_app.engine.scheduler import MAX_SKIPS, Scheduler, SchedulerOutput
from serve_app.engine.sequence import Sequence
from serve_app.errors import (
    ContextLengthError,
    InvalidParameterError,
    InvalidPromptError,
    InvalidRequestError,
    RaggedServeError,
    RequestTooLargeError,
)
from tests.engine.harness import EOS, VOCAB_SIZE, make_request, make_scheduler, show, step


def steps(scheduler: Scheduler, num: int) -> list[str]:
    return [step(scheduler) for _ in range(num)]


def must_plan(scheduler: Scheduler) -> SchedulerOutput:
    plan = scheduler.schedule()
    assert plan is not None
    return plan


def read(scheduler: Scheduler, plan: SchedulerOutput, token: int = 7) -> list[tuple[str, FinishReason | None]]:
    outputs = scheduler.update(plan, [token for item in plan.scheduled if item.samples])
    scheduler.check_invariants()
    return [(output.request_id, output.finish_reason) for output in outputs]


# ---- one step ----------------------------------------------------------------------------------------------------


def test_decodes_come_first_and_chunks_of_prefill_fill_the_budget_oldest_first() -> None:
    scheduler = make_scheduler(max_num_batched_tokens=8)
    scheduler.add(make_request("a", 3))
    scheduler.add(make_request("b", 10))
    scheduler.add(make_request("c", 4))
    assert steps(scheduler, 4) == [
        "a[0:3]* b[0:5]",
        "a[3:4]* b[5:10]* c[0:2]",
        "a[4:5]* b[10:11]* c[2:4]*",
        "a[5:6]* b[11:12]* c[4:5]*",
    ]


def test_a_prompt_longer_than_the_budget_is_prefilled_in_chunks() -> None:
    scheduler = make_scheduler(max_num_batched_tokens=8)
    scheduler.add(make_request("a", 20))
    assert steps(scheduler, 4) == ["a[0:8]", "a[8:16]", "a[16:20]*", "a[20:21]*"]


def test_no_decode_waits_for_a_prefill_even_if_they_fill_the_budget() -> None:
    scheduler = make_scheduler(max_num_seqs=4, max_num_batched_tokens=4)
    for name in "abc":
        scheduler.add(make_request(name, 1))
    scheduler.add(make_request("long", 9))
    assert steps(scheduler, 4) == [
        "a[0:1]* b[0:1]* c[0:1]* long[0:1]",
        "a[1:2]* b[1:2]* c[1:2]* long[1:2]",
        "a[2:3]* b[2:3]* c[2:3]* long[2:3]",
        "a[3:4]* b[3:4]* c[3:4]* long[3:4]",
    ]


def test_a_sequence_that_ends_frees_its_place_and_blocks_in_that_step_and_a_waiting_one_takes_it_in_the_next() -> None:
    scheduler = make_scheduler(max_num_seqs=1, num_blocks=2)
    scheduler.add(make_request("a", 5, max_tokens=2))
    scheduler.add(make_request("b", 6, max_tokens=2))
    assert step(scheduler) == "a[0:5]*"
    assert (scheduler.pool.num_free_blocks, scheduler.running[0].slot) == (0, 0)
    assert step(scheduler) == "a[5:6]*"
    assert (scheduler.pool.num_free_blocks, scheduler.running) == (2, [])
    assert step(scheduler) == "b[0:6]*"
    assert scheduler.running[0].slot == 0


@pytest.mark.parametrize("by", ["eos", "stop token", "length"])
def test_a_sequence_ends_by_eos_stop_token_or_length(by: str) -> None:
    scheduler = make_scheduler()
    scheduler.add(make_request("a", 5, max_tokens=3, ignore_eos=by != "eos", stop_token_ids=(11,)))
    ends = []
    for token in {"eos": (7, EOS), "stop token": (7, 11), "length": (EOS, EOS, EOS)}[by]:
        (output,) = scheduler.update(must_plan(scheduler), [token])
        ends.append((output.finish_reason, output.stop_token_id))
    reason = {
        "eos": (FinishReason.STOP, EOS),
        "stop token": (FinishReason.STOP, 11),
        "length": (FinishReason.LENGTH, None),
    }
    assert ends[-1] == reason[by]
    assert all(end == (None, None) for end in ends[:-1])
    assert scheduler.schedule() is None
    assert not scheduler.has_work
    assert scheduler.pool.num_used_blocks == 0


def test_stop_tokens_do_not_end_it_before_min_tokens_nor_after_a_replay_counts_them() -> None:
    scheduler = make_scheduler()
    scheduler.add(make_request("a", 5, max_tokens=9, min_tokens=3, stop_token_ids=(11,), outputs=[(7,)]))
    reasons = [scheduler.update(must_plan(scheduler), [11])[0].finish_reason for _ in range(2)]
    assert reasons == [None, FinishReason.STOP]


def test_max_tokens_none_runs_to_the_end_of_the_context() -> None:
    scheduler = make_scheduler(max_model_len=12)
    scheduler.add(make_request("a", 5, max_tokens=None))
    assert scheduler.sequences["a", 0].max_output_tokens == 7
    assert [show(plan) for plan in iter(lambda: _stepped(scheduler), None)][-1] == "a[10:11]*"


def _stepped(scheduler: Scheduler) -> SchedulerOutput | None:
    plan = scheduler.schedule()
    if plan is not None:
        read(scheduler, plan)
    return plan


def test_blocks_grow_with_the_first_token_of_each_and_the_last_token_takes_none() -> None:
    scheduler = make_scheduler(block_size=4)
    scheduler.add(make_request("a", 4, max_tokens=5))
    sequence = scheduler.sequences["a", 0]
    num_blocks = []
    while scheduler.has_work:
        plan = must_plan(scheduler)
        num_blocks.append(len(sequence.block_ids))
        read(scheduler, plan)
    assert num_blocks == [1, 2, 2, 2, 2]  # positions 0..3, 4, 5, 6, 7: the fifth token is at 8, and never computed
    assert scheduler.num_blocks_needed(make_request("a", 4, max_tokens=5)) == 2


# ---- order of service --------------------------------------------------------------------------------------------


def test_first_come_first_served_and_priority_before_it() -> None:
    scheduler = make_scheduler(max_num_seqs=1)
    for name, priority in (("late", 1), ("b", 0), ("a", 0), ("first", -1)):
        scheduler.add(make_request(name, 2, max_tokens=1, priority=priority))
    assert steps(scheduler, 5) == ["first[0:2]*", "b[0:2]*", "a[0:2]*", "late[0:2]*", "nothing"]


def test_a_long_prompt_that_does_not_fit_lets_a_short_one_pass() -> None:
    scheduler = make_scheduler(num_blocks=4)
    scheduler.add(make_request("a", 4, max_tokens=4))
    scheduler.add(make_request("long", 14, max_tokens=2))
    scheduler.add(make_request("short", 2, max_tokens=2))
    assert steps(scheduler, 5) == [
        "a[0:4]* short[0:2]*",
        "a[4:5]* short[2:3]*",
        "a[5:6]*",
        "a[6:7]*",
        "long[0:8]",
    ]


def test_a_long_prompt_is_not_starved_by_short_ones_for_ever() -> None:
    """The pool never drains by itself: there are always two short requests, one of them fresh."""
    scheduler = make_scheduler(num_blocks=4)
    scheduler.add(make_request("short-0", 4, max_tokens=4))
    step(scheduler)
    scheduler.add(make_request("long", 14, max_tokens=2))
    num_passed = 0
    for i in range(1, 3 * MAX_SKIPS):
        scheduler.add(make_request(f"short-{i}", 4, max_tokens=4))
        plan = step(scheduler)
        num_passed += f"short-{i}[" in plan
        step(scheduler)
        if "long" in {s.key[0] for s in scheduler.running}:
            break
    assert "long" in {s.key[0] for s in scheduler.running}
    assert scheduler.sequences["long", 0].num_skipped == MAX_SKIPS


def test_one_step_cannot_pass_it_more_often_than_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Regression: the bound was looked at once a step, so a step with many free places passed it as often."""
    monkeypatch.setattr(scheduler_module, "MAX_SKIPS", 3)
    scheduler = make_scheduler(num_blocks=12, max_num_seqs=10, max_num_batched_tokens=20)
    scheduler.add(make_request("a", 4, max_tokens=9))
    step(scheduler)
    scheduler.add(make_request("long", 45, max_tokens=1))
    for i in range(8):
        scheduler.add(make_request(f"short-{i}", 2, max_tokens=1))
    assert step(scheduler) == "a[4:5]* short-0[0:2]* short-1[0:2]* short-2[0:2]*"
    assert step(scheduler) == "a[5:6]*"


def test_skips_are_counted_over_its_whole_life(monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise one that is preempted again and again would be passed again and again."""
    monkeypatch.setattr(scheduler_module, "MAX_SKIPS", 3)
    scheduler = make_scheduler(num_blocks=6)
    scheduler.add(make_request("a", 4, max_tokens=9))
    scheduler.add(make_request("long", 21, max_tokens=2))
    scheduler.add(make_request("short", 2, max_tokens=1))
    while "long" not in {s.key[0] for s in scheduler.running}:
        step(scheduler)
    long = scheduler.sequences["long", 0]
    assert long.num_skipped == 1
    scheduler._preempt(long)
    assert long.num_skipped == 1


def test_a_long_queue_is_not_walked_to_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    scheduler = make_scheduler(num_blocks=4)
    scheduler.add(make_request("a", 4, max_tokens=9))
    step(scheduler)
    for i in range(100):
        scheduler.add(make_request(f"long-{i}", 14, max_tokens=2))
    tried: list[str] = []
    try_admit = scheduler._try_admit

    def counted(sequence: Sequence, *rest: object) -> bool:
        tried.append(sequence.key[0])
        return try_admit(sequence, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(scheduler, "_try_admit", counted)
    step(scheduler)
    assert tried == [f"long-{i}" for i in range(MAX_SKIPS)]


def test_a_group_waits_for_places_for_all_its_choices_and_a_single_one_may_pass() -> None:
    scheduler = make_scheduler(max_num_seqs=3, max_num_batched_tokens=30)
    scheduler.add(make_request("a", 3, max_tokens=3))
    scheduler.add(make_request("b", 3, max_tokens=2))
    step(scheduler)
    scheduler.add(make_request("group", 5, n=3, max_tokens=1))
    scheduler.add(make_request("single", 2, max_tokens=1))
    assert steps(scheduler, 4) == [
        "a[3:4]* b[3:4]* single[0:2]*",
        "a[4:5]*",
        "group[0:5]*",
        "group#1[4:5]* group#2[4:5]*",
    ]


def test_with_others_running_admission_keeps_blocks_for_their_growth() -> None:
    scheduler = make_scheduler(num_blocks=32, max_num_batched_tokens=200, max_model_len=200)
    scheduler.add(make_request("a", 4, max_tokens=20))
    scheduler.add(make_request("b", 119, max_tokens=2))  # 30 blocks; 1 is in use, 1 of 2 is kept for a
    scheduler.add(make_request("c", 3, max_tokens=2))
    assert step(scheduler) == "a[0:4]* b[0:119]*"
    scheduler = make_scheduler(num_blocks=32, max_num_batched_tokens=200, max_model_len=200)
    scheduler.add(make_request("a", 4, max_tokens=20))
    scheduler.add(make_request("b", 121, max_tokens=2))  # 31 blocks would leave none
    assert step(scheduler) == "a[0:4]*"


# ---- prefix cache ------------------------------------------------------------------------------------------------


def finish(scheduler: Scheduler, requests: list[GenerateRequest]) -> str:
    scheduler.add(requests)
    first = step(scheduler)
    while scheduler.has_work:
        step(scheduler)
    return first


def test_equal_prefixes_are_computed_once() -> None:
    scheduler = make_scheduler(enable_prefix_caching=True, max_num_batched_tokens=20)
    prompt = tuple(range(10, 24))
    assert finish(scheduler, make_request("a", prompt, max_tokens=1)) == "a[0:14]*"
    assert finish(scheduler, make_request("b", (*prompt[:9], 5, 5, 5), max_tokens=1)) == "b[8:12]*"
    assert finish(scheduler, make_request("c", (5, *prompt[1:]), max_tokens=1)) == "c[0:14]*"
    assert (scheduler.num_prefix_queries, scheduler.num_prefix_hits) == (40, 8)


def test_a_hit_on_the_whole_prompt_still_computes_its_last_token_and_writes_nothing() -> None:
    scheduler = make_scheduler(enable_prefix_caching=True)
    finish(scheduler, make_request("a", range(10, 18), max_tokens=1))
    scheduler.add(make_request("b", range(10, 18), max_tokens=2))
    plan = must_plan(scheduler)
    assert show(plan) == "b[7:8]*"
    sequence = plan.scheduled[0].sequence
    assert (sequence.num_shared_tokens, sequence.num_cached_tokens, len(sequence.block_ids)) == (8, 8, 2)
    read(scheduler, plan)
    assert step(scheduler) == "b[8:9]*"


def test_output_is_found_too() -> None:
    scheduler = make_scheduler(enable_prefix_caching=True)
    finish(scheduler, make_request("a", (10, 11, 12), max_tokens=7))  # tokens 3..8 are computed, 9 is not
    assert finish(scheduler, make_request("b", (10, 11, 12, 7, 7, 7, 7, 7, 5), max_tokens=1)) == "b[8:9]*"


@pytest.mark.parametrize(
    ("change", "plan"),
    [
        ({}, "b[8:10]*"),
        ({"cache_salt": "other"}, "b[0:10]*"),
        ({"prompt_logprobs": 0}, "b[0:10]*"),
    ],
    ids=["hit", "another tenant", "prompt logprobs"],
)
def test_who_may_find_a_prefix(change: dict[str, object], plan: str) -> None:
    scheduler = make_scheduler(enable_prefix_caching=True, max_num_batched_tokens=20)
    finish(scheduler, make_request("a", range(10, 20), max_tokens=1))
    assert finish(scheduler, make_request("b", range(10, 20), max_tokens=1, **change)) == plan  # type: ignore[arg-type]


@pytest.mark.parametrize("classes", [False, True], ids=["one class", "prompt and output classes"])
def test_output_is_no_prompt_where_positions_have_classes(classes: bool) -> None:
    """a  [ 10 11 12 13 ][ 14 15  7  7 ][ 7 7 7 7 ] 7      its own six, then what it sampled

    The first block is prompt to anyone. The second holds two positions of each class, the third outputs alone.
    """
    scheduler = make_scheduler(enable_prefix_caching=True, max_num_batched_tokens=20, has_position_classes=classes)
    prompt, output = tuple(range(10, 16)), (7,) * 7
    finish(scheduler, make_request("a", prompt, max_tokens=7))
    # The next turn of a chat, whose prompt repeats the answer.
    turn = finish(scheduler, make_request("b", (*prompt, *output, 5), max_tokens=1))
    assert turn == ("b[4:14]*" if classes else "b[12:14]*")
    # The same request again, from an earlier attempt: its outputs are outputs here too.
    again = make_request("c", prompt, outputs=[output], max_tokens=9)
    assert finish(scheduler, again) == "c[12:13]*"
    # The prompt ends a token earlier or later: the second block is another mix.
    for name, split in (("d", 5), ("e", 7)):
        known = (*prompt, *output)
        other = make_request(name, known[:split], outputs=[known[split:]], max_tokens=20)
        assert finish(scheduler, other) == (f"{name}[4:13]*" if classes else f"{name}[12:13]*")


def test_what_a_preempted_sequence_computed_is_its_own_with_or_without_classes() -> None:
    runs: list[tuple[list[str], int]] = []
    for caching, classes in ((False, False), (True, False), (True, True)):
        scheduler = make_scheduler(
            enable_prefix_caching=caching, max_num_batched_tokens=20, num_blocks=6, has_position_classes=classes
        )
        scheduler.add(make_request("a", 6, max_tokens=12))
        scheduler.add(make_request("b", 6, max_tokens=12))
        plans: list[str] = []
        while scheduler.has_work:
            plans.append(step(scheduler))
        assert scheduler.num_preemptions > 0
        runs.append((plans, scheduler.num_recomputed_tokens))
    (_, all_again), one_class, two_classes = runs
    assert one_class == two_classes
    assert one_class[1] < all_again


def test_without_prefix_caching_nothing_is_looked_up() -> None:
    scheduler = make_scheduler(enable_prefix_caching=False)
    finish(scheduler, make_request("a", range(10, 18), max_tokens=1))
    assert finish(scheduler, make_request("b", range(10, 18), max_tokens=1)) == "b[0:8]*"
    assert (scheduler.num_prefix_queries, scheduler.num_prefix_hits) == (0, 0)


def test_a_block_is_found_only_when_the_step_that_computed_it_was_read() -> None:
    scheduler = make_scheduler(enable_prefix_caching=True, max_num_batched_tokens=20)
    scheduler.add(make_request("a", range(10, 18), max_tokens=2))
    first = must_plan(scheduler)
    scheduler.add(make_request("b", range(10, 18), max_tokens=2))
    second = must_plan(scheduler)
    assert show(second) == "a[8:9]* b[0:8]*"
    read(scheduler, first)
    read(scheduler, second)


# ---- n choices ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("caching", [False, True], ids=["caching off", "caching on"])
def test_the_choices_of_a_request_share_its_full_blocks_and_copy_the_partial_one(caching: bool) -> None:
    scheduler = make_scheduler(enable_prefix_caching=caching, max_num_batched_tokens=20)
    scheduler.add(make_request("a", 10, n=3, max_tokens=4))
    assert step(scheduler) == "a[0:10]*"
    plan = must_plan(scheduler)
    assert show(plan) == "a[10:11]* a#1[9:10]* a#2[9:10]*"  # each makes its own logits from the last prompt token
    tables = [item.sequence.block_ids for item in plan.scheduled]
    assert tables == [[0, 1, 2], [0, 1, 3], [0, 1, 4]]
    assert plan.block_copies == [(2, 3), (2, 4)]
    assert scheduler.pool.num_used_blocks == 5 == scheduler.num_blocks_needed(make_request("a", 10, n=3, max_tokens=3))
    read(scheduler, plan)
    assert must_plan(scheduler).block_copies == []


def test_a_prompt_of_whole_blocks_needs_no_copy() -> None:
    scheduler = make_scheduler()
    scheduler.add(make_request("a", 8, n=2, max_tokens=3))
    step(scheduler)
    plan = must_plan(scheduler)
    assert show(plan) == "a[8:9]* a#1[7:8]*"
    assert plan.block_copies == []
    assert plan.scheduled[1].sequence.num_shared_tokens == 8
    read(scheduler, plan)
    assert step(scheduler) == "a[9:10]* a#1[8:9]*"


def test_a_copy_waits_for_the_first_step_of_its_choice() -> None:
    """A choice with a replayed output may get no budget for a while; its source must stay what it is until then."""
    scheduler = make_scheduler(max_num_seqs=2, max_num_batched_tokens=2)
    scheduler.add(make_request("a", 5, n=2, max_tokens=9, outputs=[(), (7, 7, 7, 7, 7)]))
    assert steps(scheduler, 3) == ["a[0:2]", "a[2:4]", "a[4:5]*"]
    leader, follower = scheduler.sequences["a", 0], scheduler.sequences["a", 1]
    source = leader.block_ids[1]
    scheduler.abort("a", 0)
    assert scheduler.pool.num_used_blocks == 4  # three of the follower, and the source
    scheduler.check_invariants()
    plan = must_plan(scheduler)
    assert show(plan) == "a#1[5:7]"
    assert plan.block_copies == [(source, follower.block_ids[1])]
    assert scheduler.pool.num_used_blocks == 4
    read(scheduler, plan)
    assert scheduler.pool.num_used_blocks == 3


@pytest.mark.parametrize("phase", ["waiting", "prefill", "last chunk in flight"])
def test_if_the_leader_ends_before_the_fork_the_next_choice_computes_the_prompt(phase: str) -> None:
    scheduler = make_scheduler(max_num_batched_tokens=8)
    scheduler.add(make_request("a", 10, n=3, max_tokens=2))
    plan = None
    if phase != "waiting":
        step(scheduler)
    if phase == "last chunk in flight":
        plan = must_plan(scheduler)
    assert scheduler.abort("a", 0) == 1
    scheduler.check_invariants()
    if plan is not None:
        assert scheduler.update(plan, [7]) == []
    assert steps(scheduler, 4) == ["a#1[0:8]", "a#1[8:10]*", "a#1[10:11]* a#2[9:10]*", "a#2[10:11]*"]
    assert scheduler.num_recomputed_tokens == {"waiting": 0, "prefill": 8, "last chunk in flight": 10}[phase]


def test_a_follower_may_end_before_the_fork() -> None:
    scheduler = make_scheduler(max_num_batched_tokens=8)
    scheduler.add(make_request("a", 10, n=3, max_tokens=2))
    step(scheduler)
    scheduler.abort("a", 1)
    assert steps(scheduler, 2) == ["a[8:10]*", "a[10:11]* a#2[9:10]*"]


def test_choices_may_come_in_any_order_and_with_gaps() -> None:
    """Regression: the first of the list led, and a later one of lower index waited ahead of it."""
    scheduler = make_scheduler(max_num_batched_tokens=8)
    requests = make_request("a", 3, n=4, max_tokens=2)
    scheduler.add([requests[3], requests[1]])
    assert steps(scheduler, 2) == ["a#1[0:3]*", "a#1[3:4]* a#3[2:3]*"]


def test_the_room_promised_to_a_choice_is_not_given_to_a_newcomer() -> None:
    scheduler = make_scheduler(num_blocks=6, max_num_batched_tokens=8)
    scheduler.add(make_request("a", 10, n=2, max_tokens=2))  # 3 blocks, and 1 at the fork
    assert step(scheduler) == "a[0:8]"
    scheduler.add(make_request("b", 9, max_tokens=2))  # 3 blocks are free, but only 2 to have
    assert steps(scheduler, 4) == ["a[8:10]*", "a[10:11]* a#1[9:10]*", "a#1[10:11]* b[0:7]", "b[7:9]*"]


def test_if_growing_outputs_took_the_room_at_the_fork_the_choice_waits_and_computes_alone() -> None:
    scheduler = make_scheduler(num_blocks=5, max_num_batched_tokens=8)
    scheduler.add(make_request("b", 3, max_tokens=4))
    step(scheduler)
    scheduler.add(make_request("a", 10, n=2, max_tokens=1))
    assert steps(scheduler, 4) == ["b[3:4]* a[0:7]", "b[4:5]* a[7:10]*", "b[5:6]* a#1[0:7]", "a#1[7:10]*"]


# ---- preemption --------------------------------------------------------------------------------------------------


def test_when_blocks_run_out_the_one_with_the_least_work_is_preempted_and_computed_again() -> None:
    scheduler = make_scheduler(num_blocks=4, max_num_batched_tokens=20)
    scheduler.add(make_request("a", 6, max_tokens=6))
    scheduler.add(make_request("b", 7, max_tokens=6))
    assert steps(scheduler, 2) == ["a[0:6]* b[0:7]*", "a[6:7]* b[7:8]*"]
    plan = must_plan(scheduler)  # b needs a third block; a has less to lose, though it is older
    assert (show(plan), plan.preempted) == ("b[8:9]*", [("a", 0)])
    read(scheduler, plan)
    assert steps(scheduler, 4) == ["b[9:10]*", "b[10:11]*", "b[11:12]*", "a[0:8]*"]
    assert (scheduler.num_preemptions, scheduler.num_recomputed_tokens) == (1, 7)


@pytest.mark.parametrize(
    ("running", "victim"),
    [
        ("a:0:9 b:1:30", "b"),
        ("a:0:9 b:0:5", "b"),
        ("a:0:5 b:0:9", "a"),
        ("a:0:5 b:0:5", "b"),
        ("a:-1:1 b:0:9 c:0:7", "c"),
    ],
    ids=["priority first", "least work", "least work, though older", "youngest", "both"],
)
def test_the_victim(running: str, victim: str) -> None:
    scheduler = make_scheduler(max_num_batched_tokens=60)
    for text in running.split():
        name, priority, num_prompt = text.split(":")
        scheduler.add(make_request(name, int(num_prompt), priority=int(priority)))
    step(scheduler)
    assert scheduler._victim([]).key[0] == victim


def test_nobody_is_preempted_whose_blocks_others_hold_too() -> None:
    """Two choices have all their blocks in common for one step: taking one's place would free nothing."""
    scheduler = make_scheduler(num_blocks=12, max_num_batched_tokens=40)
    scheduler.add(make_request("a", 8, n=2, max_tokens=3))
    scheduler.add(make_request("b", 15, max_tokens=3))
    step(scheduler)
    a, a1, b = (scheduler.sequences[key] for key in (("a", 0), ("a", 1), ("b", 0)))
    assert a.block_ids == a1.block_ids
    assert scheduler._victim([]) is b
    assert scheduler._victim([a]) is a


def test_one_whose_last_token_is_on_its_way_loses_nothing_and_goes_first() -> None:
    scheduler = make_scheduler(num_blocks=5, max_num_batched_tokens=20)
    scheduler.add(make_request("a", 12, max_tokens=1))
    scheduler.add(make_request("b", 8, max_tokens=3))
    first = must_plan(scheduler)
    second = must_plan(scheduler)
    assert (show(second), second.preempted) == ("b[8:9]*", [("a", 0)])
    assert read(scheduler, first) == [("a", FinishReason.LENGTH), ("b", None)]
    assert scheduler.num_recomputed_tokens == 0


def test_a_token_sampled_before_a_preemption_is_kept() -> None:
    """Launched ahead, the victim's step is still running when it is preempted: its token arrives while it waits."""
    scheduler = make_scheduler(num_blocks=4, max_num_batched_tokens=20)
    scheduler.add(make_request("a", 6, max_tokens=6))
    scheduler.add(make_request("b", 7, max_tokens=6))
    step(scheduler)
    first = must_plan(scheduler)
    second = must_plan(scheduler)
    assert (show(first), show(second), second.preempted) == ("a[6:7]* b[7:8]*", "b[8:9]*", [("a", 0)])
    assert read(scheduler, first, token=9) == [("a", None), ("b", None)]
    a = scheduler.sequences["a", 0]
    assert (a.token_ids[-2:], a.num_pending, a.num_computed_tokens) == ([7, 9], 0, 0)
    read(scheduler, second)


def test_a_preempted_leader_takes_its_choices_along() -> None:
    scheduler = make_scheduler(num_blocks=8, max_num_batched_tokens=12)
    scheduler.add(make_request("b", 12, max_tokens=8))
    scheduler.add(make_request("a", 16, n=2, max_tokens=2))
    assert step(scheduler) == "b[0:12]*"
    assert step(scheduler) == "b[12:13]* a[0:11]"
    scheduler._preempt(scheduler.sequences["a", 0])
    scheduler.check_invariants()
    assert [s.key for s in scheduler.waiting] == [("a", 0), ("a", 1)]
    assert step(scheduler) == "b[13:14]* a[0:11]"
    assert (scheduler.num_preemptions, scheduler.num_recomputed_tokens) == (1, 11)


def test_groups_that_preempt_each_other_all_end() -> None:
    """Several groups that barely fit alone, launched ahead: somebody always advances."""
    scheduler = make_scheduler(num_blocks=9, max_num_seqs=8, max_num_batched_tokens=9, max_model_len=30)
    for name in "abcd":
        scheduler.add(make_request(name, 7, n=3, max_tokens=6))  # 1 + 3 * 2 = 7 of 9 blocks
    ends: list[str] = []
    in_flight: list[SchedulerOutput] = []
    for _ in range(300):
        plan = scheduler.schedule()
        if plan is not None:
            in_flight.append(plan)
        if in_flight and (plan is None or len(in_flight) == 2):
            ends += [name for name, reason in read(scheduler, in_flight.pop(0)) if reason]
        if not scheduler.has_work and not in_flight:
            break
    assert sorted(ends) == sorted("abcd" * 3)
    assert scheduler.num_preemptions > 0


# ---- refused at add ----------------------------------------------------------------------------------------------


def test_a_request_that_can_never_fit_is_refused_with_both_numbers() -> None:
    scheduler = make_scheduler(num_blocks=5, block_size=4)
    with pytest.raises(RequestTooLargeError) as refusal:
        scheduler.add(make_request("a", 10, max_tokens=12))
    assert str(refusal.value) == (
        "10 prompt tokens and up to 12 output tokens need 6 KV blocks of 4 tokens; the pool has 5"
    )
    scheduler.add(make_request("a", 10, max_tokens=11))
    with pytest.raises(RequestTooLargeError, match=r"need 6 KV blocks .* has 5"):
        scheduler.add(make_request("b", 10, n=4, max_tokens=2))  # 2 shared and 4 of their own
    scheduler.add(make_request("b", 10, n=3, max_tokens=2))


PROMPT = tuple(range(10, 20))


@pytest.mark.parametrize(
    ("requests", "error", "words"),
    [
        (make_request("a", ()), InvalidPromptError, "the prompt has 0 tokens; at least 1"),
        (make_request("a", 100), ContextLengthError, "has 100 tokens; with max_model_len 100 it may have at most 99"),
        (make_request("a", (1, 2, VOCAB_SIZE)), InvalidPromptError, f"id {VOCAB_SIZE} is outside the vocabulary 0..96"),
        (make_request("a", (1, -5)), InvalidPromptError, "prompt token id -5 is outside"),
        (make_request("a", 5, outputs=[(1, 99)]), InvalidPromptError, "output token id 99 is outside"),
        (make_request("a", 5, max_tokens=3, outputs=[(1, 1, 1)]), InvalidParameterError, "is 3; it must be fewer than"),
        (make_request("a", 5, n=5), InvalidParameterError, "n is 5; it must be at most max_num_seqs (4)"),
        (make_request("a", 5, stop_token_ids=(97,)), InvalidParameterError, "stop_token_ids is 97; it must be token"),
        (make_request("a", 5, logit_bias={98: 1.0}), InvalidParameterError, "logit_bias is 98"),
        (make_request("a", 5, allowed_token_ids=(1, 97)), InvalidParameterError, "allowed_token_ids is 97"),
        (make_request("a", 5, remaining_ms=math.nan), InvalidParameterError, "remaining_ms is nan"),
        (make_request("running", 5), InvalidParameterError, "request_id is 'running'; it must be unique"),
        (make_request("a", 5) * 2, InvalidParameterError, "choice_index is 0; it must be different for each choice"),
        (make_request("a", 5) + make_request("b", 5, n=2)[1:], InvalidPromptError, "differ in request_id"),
        (make_request("a", 5) + make_request("a", 6, n=2)[1:], InvalidPromptError, "differ in prompt_token_ids"),
        (
            make_request("a", 5) + make_request("a", 5, n=2, priority=1)[1:],
            InvalidPromptError,
            "the choices of request 'a' differ in priority",
        ),
        (
            make_request("a", 5) + make_request("a", 5, n=2, cache_salt="x")[1:],
            InvalidPromptError,
            "differ in cache_salt",
        ),
        (
            make_request("a", 5) + make_request("a", 5, n=2, prompt_logprobs=1)[1:],
            InvalidPromptError,
            "differ in prompt_logprobs",
        ),
        (
            [dataclasses.replace(make_request("a", 5)[0], choice_index=128)],
            InvalidParameterError,
            "choice_index is 128; it must be from 0 to 127",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_what_is_refused_leaves_no_trace(
    requests: list[GenerateRequest], error: type[RaggedServeError], words: str
) -> None:
    scheduler = make_scheduler()
    scheduler.add(make_request("running", 5))
    with pytest.raises(error) as refusal:
        scheduler.add(requests)
    assert words in str(refusal.value)
    assert isinstance(refusal.value, InvalidRequestError)
    assert [s.key for s in scheduler.waiting] == list(scheduler.sequences) == [("running", 0)]
    scheduler.check_invariants()


# ---- deadlines and aborts ----------------------------------------------------------------------------------------


def test_a_deadline_ends_what_waits_and_what_runs() -> None:
    scheduler = make_scheduler(max_num_seqs=1)
    scheduler.add(make_request("a", 3, remaining_ms=500), now=10.0)
    scheduler.add(make_request("b", 3, remaining_ms=400), now=10.0)
    scheduler.add(make_request("c", 3, max_tokens=1), now=10.0)
    assert show(scheduler.schedule(now=10.39)) == "a[0:3]*"
    assert scheduler.take_ended() == []
    scheduler.schedule(now=10.4)
    (b,) = scheduler.take_ended()
    assert (b.request_id, b.finish_reason, b.error_code) == ("b", FinishReason.ERROR, "deadline_exceeded")
    assert b.error == "request 'b' did not end within its 400 ms"
    assert show(scheduler.schedule(now=10.5)) == "c[0:3]*"
    assert [end.request_id for end in scheduler.take_ended()] == ["a"]
    scheduler.check_invariants()


def test_deadlines_of_what_ended_long_ago_are_dropped() -> None:
    scheduler = make_scheduler()
    for i in range(500):
        finish(scheduler, make_request(f"a-{i}", 2, max_tokens=1, remaining_ms=1e9))
    assert len(scheduler._deadlines) < 100


@pytest.mark.parametrize("phase", ["waiting", "prefill", "decode", "in flight", "preempted", "forked"])
def test_an_abort_frees_everything_before_the_next_step(phase: str) -> None:
    scheduler = make_scheduler(max_num_batched_tokens=4)
    scheduler.add(make_request("a", 6, n=2, max_tokens=9))
    num_steps = {"waiting": 0, "prefill": 1, "decode": 4, "in flight": 4, "preempted": 4, "forked": 2}[phase]
    steps(scheduler, num_steps)
    plan = must_plan(scheduler) if phase == "in flight" else None
    if phase == "preempted":
        scheduler._preempt(scheduler.running[0])
    assert scheduler.abort("a") == 2
    assert scheduler.abort("a") == 0
    assert scheduler.pool.num_used_blocks == 0
    assert scheduler.running == scheduler.waiting == []
    assert scheduler.has_work  # somebody has to take their ends
    assert [end.finish_reason for end in scheduler.take_ended()] == [FinishReason.ABORT] * 2
    if plan is not None:
        assert scheduler.update(plan, [7, 7]) == []
    scheduler.check_invariants()
    assert not scheduler.has_work
    assert scheduler.schedule() is None


def test_an_aborted_id_may_come_again_while_the_old_step_is_in_flight() -> None:
    scheduler = make_scheduler()
    scheduler.add(make_request("a", 3))
    first = must_plan(scheduler)
    scheduler.abort("a")
    scheduler.add(make_request("a", 5))
    second = must_plan(scheduler)
    assert read(scheduler, first) == []
    assert (show(second), read(scheduler, second)) == ("a[0:5]*", [("a", None)])


# ---- launch ahead ------------------------------------------------------------------------------------------------


def test_a_step_is_planned_before_the_last_one_is_read() -> None:
    scheduler = make_scheduler()
    scheduler.add(make_request("a", 10, max_tokens=3))
    plans = [must_plan(scheduler) for _ in range(2)]
    assert [show(plan) for plan in plans] == ["a[0:8]", "a[8:10]*"]
    plans.append(must_plan(scheduler))
    assert show(plans[-1]) == "a[10:11]*"
    a = scheduler.sequences["a", 0]
    assert (a.num_pending, a.num_tokens, a.num_missing_tokens) == (2, 12, 1)
    for plan in plans[:2]:
        read(scheduler, plan)
    assert a.num_pending == 1
    plans.append(must_plan(scheduler))
    assert scheduler.schedule() is None  # its last token is on the way
    assert [read(scheduler, plan)[0][1] for plan in plans[2:]] == [None, FinishReason.LENGTH]


def test_the_token_after_the_end_is_dropped() -> None:
    scheduler = make_scheduler()
    scheduler.add(make_request("a", 3, ignore_eos=False, max_tokens=9))
    first, second = must_plan(scheduler), must_plan(scheduler)
    assert read(scheduler, first, token=EOS) == [("a", FinishReason.STOP)]
    assert read(scheduler, second) == []
    assert not scheduler.has_work


# ---- prompt logprobs ---------------------------------------------------------------------------------------------


def logprobs_of(plan: SchedulerOutput) -> dict[tuple[str, int], list[TokenLogprobs]]:
    """One per computed prompt position whose next token is in the prompt; token id = position + 1, to be told apart."""
    return {
        item.sequence.key: [
            TokenLogprobs(position + 1, -1.0)
            for position in range(item.start, min(item.start + item.num_tokens, item.sequence.num_prompt_tokens - 1))
        ]
        for item in plan.scheduled
    }


@pytest.mark.parametrize(
    "preempt_after",
    [None, 0, 1],
    ids=["undisturbed", "preempted after a chunk", "preempted after two"],
)
def test_prompt_logprobs_are_gathered_over_chunks_and_preemptions(preempt_after: int | None) -> None:
    scheduler = make_scheduler(max_num_batched_tokens=4)
    scheduler.add(make_request("a", 11, max_tokens=3, prompt_logprobs=0))
    outputs = []
    for i in range(20):
        plan = scheduler.schedule()
        if plan is None:
            break
        outputs += scheduler.update(plan, [7] * sum(x.samples for x in plan.scheduled), {}, logprobs_of(plan))
        if i == preempt_after:
            scheduler._preempt(scheduler.running[0])
    found = [output.prompt_logprobs for output in outputs]
    assert found[0] is not None
    assert found[0][0] is None
    assert [entry.token_id for entry in found[0][1:] if entry] == list(range(1, 11))
    assert found[1:] == [None, None]


def test_prompt_logprobs_come_once_also_if_it_is_preempted_after_its_first_token() -> None:
    scheduler = make_scheduler(max_num_batched_tokens=20)
    scheduler.add(make_request("a", 6, max_tokens=3, prompt_logprobs=0))
    found = []
    while (plan := scheduler.schedule()) is not None:
        found += [o.prompt_logprobs for o in scheduler.update(plan, [7], {}, logprobs_of(plan))]
        if len(found) == 1:
            scheduler._preempt(scheduler.running[0])
    assert [None if entries is None else len(entries) for entries in found] == [6, None, None]


@pytest.mark.parametrize("num_prompt", [1, 4, 6])
def test_every_choice_gets_the_prompt_logprobs_that_the_first_one_computed(num_prompt: int) -> None:
    """Regression: only the choice that computed the prompt had any, and nobody had for a prompt of one token."""
    scheduler = make_scheduler(max_num_batched_tokens=20)
    scheduler.add(make_request("a", num_prompt, n=3, max_tokens=1, prompt_logprobs=0))
    found = {}
    while (plan := scheduler.schedule()) is not None:
        sampled = [7] * sum(item.samples for item in plan.scheduled)
        found |= {o.choice_index: o.prompt_logprobs for o in scheduler.update(plan, sampled, {}, logprobs_of(plan))}
    assert len(found) == 3
    assert all(entries is not None and len(entries) == num_prompt for entries in found.values())


def test_sampling_defaults_are_not_the_schedulers_business() -> None:
    scheduler = make_scheduler()
    scheduler.add([GenerateRequest("a", PROMPT, SamplingParams(max_tokens=1))])
    assert steps(scheduler, 2) == ["a[0:8]", "a[8:10]*"]
