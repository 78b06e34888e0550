"""The tests are tested: each fault planted here into scheduler, pool or runner makes a named check fail.

A check is the beginning of the message with which `random_run` or a scenario fails; one that passes with a fault in
place would pass with a bug in place.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest

from serve_app.engine import scheduler as scheduler_module
from serve_app.engine.block_pool import BlockPool, hash_block
from serve_app.engine.engine import Engine
from serve_app.engine.request import FinishReason, TokenLogprobs, TokenOutput
from serve_app.engine.scheduler import ScheduledSequence, Scheduler, SchedulerOutput
from serve_app.engine.sequence import Sequence, SequenceStatus
from serve_app.engine.simulated_runner import SimulatedRunner, SimulatedStep
from tests.engine import test_engine, test_scheduler
from tests.engine.harness import random_run
from tests.planted_faults import Check, Fault, Patch, expect_noticed, scenario


def random_traffic(patch: Patch) -> None:
    patch.setattr(scheduler_module, "MAX_SKIPS", 3)
    for seed in range(60):
        random_run(seed, 1 + seed % 2)


def random_faults(patch: Patch) -> None:
    patch.setattr(scheduler_module, "MAX_SKIPS", 3)
    for seed in range(60):
        random_run(seed, 1 + seed % 2, faults=True)


# ---- block pool --------------------------------------------------------------------------------------------------


def drop_a_free(patch: Patch) -> None:
    free = BlockPool.free
    patch.setattr(BlockPool, "free", lambda pool, block_ids: free(pool, block_ids[1:]))


def count_a_block_twice(patch: Patch) -> None:
    share = BlockPool.share
    patch.setattr(BlockPool, "share", lambda pool, block_ids: [share(pool, block_ids) for _ in range(2)])


def hand_out_a_block_that_is_in_use(patch: Patch) -> None:
    allocate_one = BlockPool._allocate_one

    def one(pool: BlockPool) -> int:
        block_id = allocate_one(pool)
        if block_id == 3:
            pool._free_unknown.append(block_id)
        return block_id

    patch.setattr(BlockPool, "_allocate_one", one)


def forget_to_forget_an_evicted_block(patch: Patch) -> None:
    patch.setattr(BlockPool, "_forget", lambda pool, block_id: None)


def find_a_prefix_one_block_too_long(patch: Patch) -> None:
    find = BlockPool.find

    def longer(pool: BlockPool, hashes: Iterable[bytes]) -> list[int]:
        hashes = list(hashes)
        found = find(pool, hashes)
        other = [block_id for block_id in pool._by_hash.values() if block_id not in found]
        return [*found, other[0]] if found and other and len(found) < len(hashes) else found

    patch.setattr(BlockPool, "find", longer)


def hash_without_the_parent(patch: Patch) -> None:
    patch.setattr(scheduler_module, "hash_block", lambda parent, token_ids, *tag: hash_block(b"", token_ids, *tag))


def hash_without_the_salt(patch: Patch) -> None:
    patch.setattr(scheduler_module, "root_hash", lambda salt: b"")


def hash_without_the_last_token(patch: Patch) -> None:
    patch.setattr(
        scheduler_module, "hash_block", lambda parent, token_ids, *tag: hash_block(parent, token_ids[:-1], *tag)
    )


# ---- scheduler: places and blocks --------------------------------------------------------------------------------


def never_free_the_victim(patch: Patch) -> None:
    preempt = Scheduler._preempt

    def leaky(scheduler: Scheduler, sequence: Sequence) -> None:
        scheduler.pool.share(sequence.block_ids[:1])
        preempt(scheduler, sequence)

    patch.setattr(Scheduler, "_preempt", leaky)


def never_return_the_slot(patch: Patch) -> None:
    stop_running = Scheduler._stop_running

    def stop(scheduler: Scheduler, sequence: Sequence) -> None:
        stop_running(scheduler, sequence)
        scheduler._free_slots.pop()

    patch.setattr(Scheduler, "_stop_running", stop)


def give_a_slot_to_two(patch: Patch) -> None:
    stop_running = Scheduler._stop_running

    def stop(scheduler: Scheduler, sequence: Sequence) -> None:
        stop_running(scheduler, sequence)
        scheduler._free_slots[-1] = 0

    patch.setattr(Scheduler, "_stop_running", stop)


def keep_the_blocks_at_eos(patch: Patch) -> None:
    drop = Scheduler._drop

    def leaky(scheduler: Scheduler, sequence: Sequence, reason: FinishReason) -> None:
        if reason is FinishReason.STOP:
            sequence.block_ids = []
        drop(scheduler, sequence, reason)

    patch.setattr(Scheduler, "_drop", leaky)


def forget_to_reset_what_was_computed(patch: Patch) -> None:
    preempt = Scheduler._preempt

    def keeping(scheduler: Scheduler, sequence: Sequence) -> None:
        num_computed = sequence.num_computed_tokens
        preempt(scheduler, sequence)
        sequence.num_computed_tokens = num_computed

    patch.setattr(Scheduler, "_preempt", keeping)


def grow_one_block_too_late(patch: Patch) -> None:
    patch.setattr(scheduler_module, "_num_blocks", lambda num_tokens, size: max(1, num_tokens // size))


def book_one_block_too_few(patch: Patch) -> None:
    needed = Scheduler.num_blocks_needed
    patch.setattr(Scheduler, "num_blocks_needed", lambda scheduler, requests: needed(scheduler, requests) - 1)


# ---- scheduler: what runs ----------------------------------------------------------------------------------------


def skip_a_decode(patch: Patch) -> None:
    grant = Scheduler._grant

    def skipping(scheduler: Scheduler, plan: SchedulerOutput, sequence: Sequence, num_tokens: int) -> int:
        if len(plan.scheduled) == 2 and sequence.num_missing_tokens == 1 and sequence.num_output_tokens == 2:
            return 0
        return grant(scheduler, plan, sequence, num_tokens)

    patch.setattr(Scheduler, "_grant", skipping)


def exceed_the_budget(patch: Patch) -> None:
    admit = Scheduler._admit
    patch.setattr(Scheduler, "_admit", lambda scheduler, plan, budget: admit(scheduler, plan, budget + 1))


def waste_the_budget(patch: Patch) -> None:
    admit = Scheduler._admit
    patch.setattr(Scheduler, "_admit", lambda scheduler, plan, budget: admit(scheduler, plan, min(budget, 3)))


def pass_over_for_ever(patch: Patch) -> None:
    admit = Scheduler._admit

    def forgetting(scheduler: Scheduler, plan: SchedulerOutput, budget: int) -> None:
        for sequence in scheduler.waiting:
            sequence.num_skipped = 0
        admit(scheduler, plan, budget)

    patch.setattr(Scheduler, "_admit", forgetting)


def admit_nobody_past_the_first(patch: Patch) -> None:
    patch.setattr(scheduler_module, "MAX_SKIPS", 0)
    patch.setattr(Scheduler, "_admit", lambda *_: None)


def step_past_the_last_token(patch: Patch) -> None:
    patch.setattr(Scheduler, "_is_done_once_read", lambda scheduler, sequence: False)


def lose_a_preempted_token(patch: Patch) -> None:
    append = Scheduler._append_token

    def lossy(scheduler: Scheduler, sequence: Sequence, token: int, *more: Any) -> TokenOutput:
        waits = sequence.status is SequenceStatus.WAITING
        output = append(scheduler, sequence, token, *more)
        return output._replace(token_ids=(), logprobs=None) if waits and not output.finish_reason else output

    patch.setattr(Scheduler, "_append_token", lossy)


def say_a_preempted_token_twice(patch: Patch) -> None:
    append = Scheduler._append_token

    def doubling(scheduler: Scheduler, sequence: Sequence, token: int, *more: Any) -> TokenOutput:
        waits = sequence.status is SequenceStatus.WAITING
        output = append(scheduler, sequence, token, *more)
        if waits and not output.finish_reason:
            del sequence.token_ids[-1]
        return output

    patch.setattr(Scheduler, "_append_token", doubling)


def take_the_highest_priority_as_victim(patch: Patch) -> None:
    patch.setattr(Scheduler, "_victim", lambda scheduler, needy: next(s for s in scheduler.running if s.block_ids))


def count_no_recomputation(patch: Patch) -> None:
    preempt = Scheduler._preempt

    def forgetting(scheduler: Scheduler, sequence: Sequence) -> None:
        preempt(scheduler, sequence)
        sequence.num_highwater_tokens = 0

    patch.setattr(Scheduler, "_preempt", forgetting)


def end_one_token_late(patch: Patch) -> None:
    limit = Scheduler._max_output_tokens
    patch.setattr(Scheduler, "_max_output_tokens", lambda scheduler, request: limit(scheduler, request) + 1)


def go_on_past_eos(patch: Patch) -> None:
    add = Scheduler.add

    def deaf(scheduler: Scheduler, *args: object) -> list[Sequence]:
        added = add(scheduler, *args)  # type: ignore[arg-type]
        for sequence in added:
            sequence.stop_ids = frozenset()
        return added

    patch.setattr(Scheduler, "add", deaf)


def miss_deadlines(patch: Patch) -> None:
    patch.setattr(Scheduler, "_expire", lambda scheduler, now: None)


def abort_only_one_choice(patch: Patch) -> None:
    abort = Scheduler.abort
    patch.setattr(
        Scheduler, "abort", lambda scheduler, request_id, choice=None: abort(scheduler, request_id, choice or 0)
    )


def say_an_end_twice(patch: Patch) -> None:
    end = Scheduler._end

    def twice(scheduler: Scheduler, *args: object) -> None:
        end(scheduler, *args)  # type: ignore[arg-type]
        scheduler._ended.append(scheduler._ended[-1])

    patch.setattr(Scheduler, "_end", twice)


def lose_an_end(patch: Patch) -> None:
    take = Scheduler.take_ended
    patch.setattr(Scheduler, "take_ended", lambda scheduler: take(scheduler)[:-1])


def register_a_block_that_is_not_full(patch: Patch) -> None:
    register = Scheduler._register_full_blocks

    def early(scheduler: Scheduler, sequence: Sequence, num_computed: int) -> None:
        known = len(sequence.token_ids)
        register(scheduler, sequence, min(known, num_computed + scheduler.block_size))

    patch.setattr(Scheduler, "_register_full_blocks", early)


# ---- n choices ---------------------------------------------------------------------------------------------------


def drop_the_copy_of_the_partial_block(patch: Patch) -> None:
    launch = SimulatedRunner.launch

    def without(runner: SimulatedRunner, plan: SchedulerOutput) -> SimulatedStep:
        plan.block_copies.clear()
        return launch(runner, plan)

    patch.setattr(SimulatedRunner, "launch", without)


def copy_in_the_wrong_direction(patch: Patch) -> None:
    launch = SimulatedRunner.launch

    def backwards(runner: SimulatedRunner, plan: SchedulerOutput) -> SimulatedStep:
        plan.block_copies = [(destination, source) for source, destination in plan.block_copies]
        return launch(runner, plan)

    patch.setattr(SimulatedRunner, "launch", backwards)


def write_a_shared_block(patch: Patch) -> None:
    grant = Scheduler._grant

    def writing(scheduler: Scheduler, plan: SchedulerOutput, sequence: Sequence, num_tokens: int) -> int:
        sequence.num_shared_tokens = 0
        return grant(scheduler, plan, sequence, num_tokens)

    patch.setattr(Scheduler, "_grant", writing)


def share_the_partial_block(patch: Patch) -> None:
    fork = Scheduler._fork_followers

    def sharing(scheduler: Scheduler, leader: Sequence) -> None:
        followers = list(leader.followers)
        fork(scheduler, leader)
        for follower in followers:
            copy = scheduler._copies.pop(follower.key, None)
            if copy is not None:
                scheduler.pool.free(copy[1:])
                follower.block_ids[follower.block_ids.index(copy[1])] = copy[0]

    patch.setattr(Scheduler, "_fork_followers", sharing)


def compute_the_prompt_for_each_choice(patch: Patch) -> None:
    add = Scheduler.add

    def apart(scheduler: Scheduler, *args: object) -> list[Sequence]:
        added = add(scheduler, *args)  # type: ignore[arg-type]
        for sequence in added:
            sequence.leader, sequence.followers = None, []
        return added

    patch.setattr(Scheduler, "add", apart)


def let_the_choices_die_with_their_leader(patch: Patch) -> None:
    drop = Scheduler._drop

    def orphaning(scheduler: Scheduler, sequence: Sequence, reason: FinishReason) -> None:
        sequence.followers = []
        drop(scheduler, sequence, reason)

    patch.setattr(Scheduler, "_drop", orphaning)


def give_away_the_room_of_a_choice(patch: Patch) -> None:
    try_admit = Scheduler._try_admit
    patch.setattr(
        Scheduler, "_try_admit", lambda scheduler, sequence, group, promised: try_admit(scheduler, sequence, group, 0)
    )


def let_go_of_the_source_of_a_copy(patch: Patch) -> None:
    fork = Scheduler._fork_followers

    def careless(scheduler: Scheduler, leader: Sequence) -> None:
        fork(scheduler, leader)
        scheduler.pool.free([source for source, _ in scheduler._copies.values()])

    patch.setattr(Scheduler, "_fork_followers", careless)
    patch.setattr(Scheduler, "_release_copy", lambda scheduler, sequence: scheduler._copies.pop(sequence.key, None))
    patch.setattr(Scheduler, "check_invariants", lambda scheduler: None)


# ---- failed steps, and the runner --------------------------------------------------------------------------------


def repeat_what_was_preempted(patch: Patch) -> None:
    def alone(plan: SchedulerOutput) -> list[SchedulerOutput]:
        return [SchedulerOutput([item], item.num_tokens, plan.block_copies) for item in plan.scheduled]

    patch.setattr(SchedulerOutput, "alone", alone)


def repeat_without_the_copies(patch: Patch) -> None:
    alone = SchedulerOutput.alone

    def without(plan: SchedulerOutput) -> list[SchedulerOutput]:
        plan.block_copies = []
        return alone(plan)

    patch.setattr(SchedulerOutput, "alone", without)


def halve_and_forget_the_rest(patch: Patch) -> None:
    halves = SchedulerOutput.halves
    patch.setattr(SchedulerOutput, "halves", lambda plan: halves(plan)[:1])


def refuse_everybody_in_a_failed_step(patch: Patch) -> None:
    def run_alone(engine: Engine, plan: SchedulerOutput, error: Exception) -> list[TokenOutput]:
        for item in plan.scheduled:
            engine.scheduler.fail(item.sequence, scheduler_module.RaggedServeError(str(error)))
        return engine.scheduler.take_ended()

    patch.setattr(Engine, "_run_alone", run_alone)


def shift_a_slot_by_one(patch: Patch) -> None:
    write = SimulatedRunner._write

    def shifted(runner: SimulatedRunner, sequence: Sequence, position: int, digest: int) -> None:
        off_by_one = position == 5 and sequence.num_prompt_tokens > 6
        write(runner, sequence, position + off_by_one, digest)

    patch.setattr(SimulatedRunner, "_write", shifted)


def leave_a_token_out(patch: Patch) -> None:
    compute = SimulatedRunner._compute

    def short(runner: SimulatedRunner, item: ScheduledSequence, step: SimulatedStep) -> int:
        if item.num_tokens > 3:
            item = ScheduledSequence(item.sequence, item.start, item.num_tokens - 1, item.samples)
        return compute(runner, item, step)

    patch.setattr(SimulatedRunner, "_compute", short)


def repeat_prompt_logprobs(patch: Patch) -> None:
    """What a recomputation brings again is counted again."""

    def take(scheduler: Scheduler, sequence: Sequence, start: int, logprobs: list[TokenLogprobs]) -> None:
        if sequence.prompt_logprobs is not None:
            sequence.prompt_logprobs += logprobs
            sequence.num_prompt_logprobs = min(sequence.num_prompt_tokens, sequence.num_prompt_logprobs + len(logprobs))

    patch.setattr(Scheduler, "_take_prompt_logprobs", take)


FAULTS: list[Fault] = [
    (drop_a_free, random_traffic, "reference counts differ"),
    (count_a_block_twice, random_traffic, "reference counts differ"),
    (
        hand_out_a_block_that_is_in_use,
        random_traffic,
        "reference counts differ|a block is free twice|free list differs",
    ),
    (
        forget_to_forget_an_evicted_block,
        random_traffic,
        r"block \d+ has a hash already|a block that can be found is free",
    ),
    (find_a_prefix_one_block_too_long, random_traffic, "tokens: |.*KV entry|tenant: "),
    (hash_without_the_parent, random_traffic, "tokens: |.*KV entry|tenant: |a sequence holds a block twice"),
    (hash_without_the_salt, random_traffic, "tenant: "),
    (hash_without_the_last_token, random_traffic, "tokens: |.*KV entry"),
    (never_free_the_victim, random_traffic, "reference counts differ"),
    (never_return_the_slot, random_traffic, "a slot is lost"),
    (give_a_slot_to_two, random_traffic, "a slot is lost or taken twice"),
    (keep_the_blocks_at_eos, random_traffic, "reference counts differ"),
    (forget_to_reset_what_was_computed, random_traffic, ".*has computed more than its blocks"),
    (grow_one_block_too_late, random_traffic, ".*has computed more than its blocks"),
    (book_one_block_too_few, random_traffic, "stuck: "),
    (skip_a_decode, random_traffic, "decode skipped: "),
    (exceed_the_budget, random_traffic, "budget: "),
    (waste_the_budget, random_traffic, "idle budget: "),
    (pass_over_for_ever, random_traffic, "skips: "),
    (admit_nobody_past_the_first, random_traffic, "stuck: "),
    (step_past_the_last_token, random_traffic, "overshoot: "),
    (lose_a_preempted_token, random_traffic, "empty output: |tokens: "),
    (say_a_preempted_token_twice, random_traffic, "tokens: "),
    (
        take_the_highest_priority_as_victim,
        scenario(test_scheduler.test_the_victim, "a:0:9 b:1:30", "b"),
        "assert ",
    ),
    (count_no_recomputation, random_traffic, "recomputed: "),
    (end_one_token_late, random_traffic, "overshoot: |tokens: "),
    (go_on_past_eos, random_traffic, "tokens: "),
    (miss_deadlines, random_traffic, "deadline: "),
    (abort_only_one_choice, random_traffic, "abort: "),
    (say_an_end_twice, random_traffic, "ended twice: "),
    (lose_an_end, random_traffic, "lost: |deadline: "),
    (register_a_block_that_is_not_full, random_traffic, ".*KV entry|tokens: |shared block: |.*shares a block"),
    (drop_the_copy_of_the_partial_block, random_traffic, ".*KV entry|tokens: "),
    (copy_in_the_wrong_direction, random_traffic, ".*KV entry|tokens: "),
    (write_a_shared_block, random_traffic, "shared block: |.*shares a block"),
    (share_the_partial_block, random_traffic, "shared block: |.*shares a block"),
    (
        compute_the_prompt_for_each_choice,
        scenario(test_engine.test_the_prompt_of_n_choices_is_computed_once, 10, False, 1),
        "assert ",
    ),
    (let_the_choices_die_with_their_leader, random_traffic, ".*follows nobody"),
    (
        give_away_the_room_of_a_choice,
        scenario(test_scheduler.test_the_room_promised_to_a_choice_is_not_given_to_a_newcomer),
        "assert ",
    ),
    (
        let_go_of_the_source_of_a_copy,
        scenario(test_engine.test_a_copied_block_is_still_there_when_the_step_that_copied_it_fails),
        "error: .*KV entry|tokens: |shared block: ",
    ),
    (repeat_what_was_preempted, random_faults, "error: .*IndexError|innocent: "),
    (repeat_without_the_copies, random_faults, "error: .*KV entry|tokens: "),
    (
        halve_and_forget_the_rest,
        scenario(test_engine.test_a_step_that_does_not_fit_into_memory_is_retried_in_smaller_parts, 3, 1),
        ".*KV entry|tokens: |lost: |assert ",
    ),
    (refuse_everybody_in_a_failed_step, random_faults, "error: |innocent: "),
    (shift_a_slot_by_one, random_traffic, ".*KV entry|tokens: "),
    (leave_a_token_out, random_traffic, ".*KV entry|tokens: |prompt logprobs|.*prompt logprobs are missing"),
    (repeat_prompt_logprobs, random_traffic, "prompt logprobs"),
]


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault[0].__name__)
def test_a_planted_fault_makes_its_check_fail(fault: Fault, monkeypatch: Patch) -> None:
    expect_noticed(fault, monkeypatch)


@pytest.mark.parametrize("check", {check.__name__: check for _, check, _ in FAULTS}.values(), ids=lambda c: c.__name__)
def test_without_a_fault_every_check_passes(check: Check, monkeypatch: Patch) -> None:
    check(monkeypatch)
