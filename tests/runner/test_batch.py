"""build_batch: the ragged tensors of a plan, a worked example number by number, and tables that outlive their blocks."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

from serve_app.engine.config import EngineConfig
from serve_app.engine.request import GenerateRequest, SamplingParams
from serve_app.engine.scheduler import ScheduledSequence, Scheduler, SchedulerOutput
from serve_app.engine.sequence import Sequence
from serve_app.runner.batch import Batch, BatchBuilder, PromptRows


def make_sequence(
    name: str, prompt: list[int], *, slot: int, block_ids: list[int], output: tuple[int, ...] = (), **sampling: Any
) -> Sequence:
    request = GenerateRequest(name, tuple(prompt), SamplingParams(**sampling), output)
    sequence = Sequence(request, arrival=0, max_output_tokens=9, stop_ids=frozenset(), deadline=None)
    sequence.slot, sequence.block_ids = slot, block_ids
    return sequence


def make_plan(*items: tuple[Sequence, int, int]) -> SchedulerOutput:
    """(sequence, start, number of tokens); the last known token samples."""
    scheduled = [ScheduledSequence(s, start, num, start + num == len(s.token_ids)) for s, start, num in items]
    return SchedulerOutput(scheduled, sum(num for _, _, num in items))


def test_worked_example() -> None:
    """Blocks of 4. A: a chunk in the middle of its prompt; B: a decode that opens a block; C: its whole prompt.

    A, slot 2, blocks 7 3 . 1:  [ a0 a1 a2 a3 ][ a4 a5 a6 .. ]     computes 3..6 of 9 tokens
    B, slot 0, blocks 5 0:      [ b0 b1 b2 b3 ][ b4 ]              computes 4
    C, slot 1, block 6:         [ c0 c1 ]                          computes 0 1
    """
    a = make_sequence("a", [30, 31, 32, 33, 34, 35, 36, 37, 38], slot=2, block_ids=[7, 3, 1])
    b = make_sequence("b", [40, 41], slot=0, block_ids=[5, 0], output=(42, 43, 44))
    c = make_sequence("c", [50, 51], slot=1, block_ids=[6])
    batch = BatchBuilder(3, 16, 4).build(make_plan((a, 3, 4), (b, 4, 1), (c, 0, 2)))
    m = batch.metadata
    assert batch.input_ids.tolist() == [33, 34, 35, 36, 44, 50, 51]
    assert m.positions.tolist() == [3, 4, 5, 6, 4, 0, 1]
    assert m.cu_seqlens_q.tolist() == [0, 4, 5, 7]
    assert m.seq_lens.tolist() == [7, 5, 2]
    assert m.block_tables.tolist() == [[7, 3], [5, 0], [6, 0]]
    assert m.slot_mapping.tolist() == [7 * 4 + 3, 3 * 4, 3 * 4 + 1, 3 * 4 + 2, 0 * 4, 6 * 4, 6 * 4 + 1]
    assert (m.max_query_len, m.max_seq_len, m.num_tokens, m.num_seqs) == (4, 7, 7, 3)
    assert batch.logits_indices.tolist() == [4, 6]
    assert batch.sampling == [b, c]
    assert batch.prompt_rows == []
    for tensor in (m.positions, m.cu_seqlens_q, m.seq_lens, m.block_tables, m.slot_mapping):
        assert tensor.dtype == torch.int32
        assert tensor.is_contiguous()
    assert batch.input_ids.dtype == batch.logits_indices.dtype == torch.int64


def test_decodes_alone() -> None:
    sequences = [make_sequence(str(i), [i], slot=i, block_ids=[i, 9 - i], output=(60 + i,) * i) for i in (4, 1, 2)]
    batch = BatchBuilder(5, 8, 4).build(make_plan(*((s, len(s.token_ids) - 1, 1) for s in sequences)))
    assert batch.input_ids.tolist() == [64, 61, 62]
    assert batch.metadata.positions.tolist() == [4, 1, 2]
    assert batch.metadata.slot_mapping.tolist() == [(9 - 4) * 4, 1 * 4 + 1, 2 * 4 + 2]
    assert batch.logits_indices.tolist() == [0, 1, 2]
    assert batch.metadata.slot_mapping.dtype == batch.metadata.positions.dtype == torch.int32


def test_shared_slots_are_not_written() -> None:
    """The last token of a prompt that was found whole is computed for its logits; its K and V are there."""
    found = make_sequence("a", [1, 2, 3, 4], slot=0, block_ids=[5])
    found.num_shared_tokens = 4
    other = make_sequence("b", [1, 2, 3, 4, 5, 6], slot=1, block_ids=[5, 2])
    other.num_shared_tokens = 4
    builder = BatchBuilder(2, 8, 4)
    batch = builder.build(make_plan((found, 3, 1), (other, 4, 2)))
    assert batch.metadata.slot_mapping.tolist() == [-1, 8, 9]
    batch = builder.build(make_plan((found, 2, 2), (other, 3, 3)))
    assert batch.metadata.slot_mapping.tolist() == [-1, -1, -1, 8, 9]


def test_prompt_rows_stand_behind_the_rows_that_sample() -> None:
    a = make_sequence("a", [10, 11, 12, 13, 14], slot=0, block_ids=[0, 1], prompt_logprobs=2)
    b = make_sequence("b", [20, 21], slot=1, block_ids=[2])
    c = make_sequence("c", [30, 31, 32], slot=2, block_ids=[3], prompt_logprobs=0)
    builder = BatchBuilder(4, 8, 4)
    batch = builder.build(make_plan((a, 1, 2), (b, 0, 2), (c, 0, 3)))
    assert batch.logits_indices.tolist() == [3, 6, 0, 1, 4, 5]
    assert batch.sampling == [b, c]
    assert batch.prompt_rows == [PromptRows(("a", 0), 2, [12, 13], 2), PromptRows(("c", 0), 4, [31, 32], 0)]
    # The chunk that ends the prompt: its last row speaks of the first output token, not of the prompt.
    batch = builder.build(make_plan((a, 3, 2)))
    assert batch.logits_indices.tolist() == [1, 0]
    assert batch.prompt_rows == [PromptRows(("a", 0), 1, [14], 2)]
    # A decode has none; nor has a prompt of one token anything to score.
    a.token_ids.append(15)
    assert builder.build(make_plan((a, 5, 1))).prompt_rows == []
    one = make_sequence("one", [7], slot=3, block_ids=[9], prompt_logprobs=3)
    batch = builder.build(make_plan((one, 0, 1)))
    assert [len(rows.token_ids) for rows in batch.prompt_rows] == [0]
    assert batch.logits_indices.tolist() == [0]


def test_replayed_output_is_no_prompt() -> None:
    sequence = make_sequence("a", [10, 11], slot=0, block_ids=[0], output=(12, 13), prompt_logprobs=1)
    batch = BatchBuilder(1, 8, 4).build(make_plan((sequence, 0, 4)))
    assert batch.prompt_rows == [PromptRows(("a", 0), 1, [11], 1)]


def test_tables_follow_growth_preemption_and_a_new_owner() -> None:
    """The table of a slot is kept between steps: the same list grows, a readmitted sequence has another one."""
    builder = BatchBuilder(2, 16, 4)

    def table(sequence: Sequence, position: int) -> list[int]:
        sequence.token_ids = list(range(position + 1))
        metadata = builder.build(make_plan((sequence, position, 1))).metadata
        assert metadata.slot_mapping.tolist() == [sequence.block_ids[position // 4] * 4 + position % 4]
        row: list[int] = metadata.block_tables[0].tolist()
        return row

    a = make_sequence("a", [0], slot=1, block_ids=[4])
    assert table(a, 3) == [4]
    a.block_ids += [6]
    assert table(a, 4) == [4, 6]
    assert table(a, 5) == [4, 6]
    a.block_ids += [1, 2]
    assert table(a, 14) == [4, 6, 1, 2]
    a.block_ids = []  # preempted, and admitted again, with as many blocks as it had
    a.block_ids = [7, 8, 9, 0]
    assert table(a, 14) == [7, 8, 9, 0]
    b = make_sequence("b", [0], slot=1, block_ids=[3, 5])  # a ended, b took its slot
    assert table(b, 6) == [3, 5]
    assert table(b, 2) == [3]


@pytest.mark.parametrize("seed", range(4))
def test_random_steps_equal_a_plain_rebuild(seed: int) -> None:
    """One builder over a long run, with preemption and prefix hits, against a new one for each step, row by row."""
    rng = random.Random(seed)
    config = EngineConfig(block_size=4, max_num_seqs=5, max_num_batched_tokens=rng.choice((5, 11, 40)))
    scheduler = Scheduler(config, num_blocks=14, max_model_len=40, vocab_size=50)
    builder = BatchBuilder(5, 40, 4)
    waiting = 25
    num_shared = 0
    while waiting or scheduler.has_work:
        if waiting and rng.random() < 0.4:
            waiting -= 1
            prompt = tuple(
                rng.choice((1, 2)) if rng.random() < 0.1 else 1 for _ in range(rng.choice((1, 4, 8, 8, 12, 19)))
            )
            sampling = SamplingParams(max_tokens=rng.randint(1, 15), n=1).resolved()
            scheduler.add([GenerateRequest(str(waiting), prompt, sampling)])
        plan = scheduler.schedule()
        if plan is None:
            continue
        batch = builder.build(plan)
        check_by_hand(batch, plan)
        num_shared += int((batch.metadata.slot_mapping < 0).sum())
        scheduler.update(plan, [rng.choice((1, 2)) for item in plan.scheduled if item.samples])
    assert scheduler.num_preemptions > 0
    assert scheduler.num_prefix_hits > 0
    assert num_shared > 0


def check_by_hand(batch: Batch, plan: SchedulerOutput) -> None:
    """The definition, by loops."""
    m = batch.metadata
    row = 0
    for b, item in enumerate(plan.scheduled):
        sequence = item.sequence
        assert m.cu_seqlens_q[b] == row
        assert m.seq_lens[b] == item.start + item.num_tokens
        num_blocks = -(-(item.start + item.num_tokens) // 4)
        assert m.block_tables[b, :num_blocks].tolist() == sequence.block_ids[:num_blocks]
        for position in range(item.start, item.start + item.num_tokens):
            assert batch.input_ids[row] == sequence.token_ids[position]
            assert m.positions[row] == position
            slot = sequence.block_ids[position // 4] * 4 + position % 4
            assert m.slot_mapping[row] == (-1 if position < sequence.num_shared_tokens else slot)
            row += 1
        if item.samples:
            assert row - 1 in batch.logits_indices
    assert m.cu_seqlens_q[-1] == row == m.num_tokens
    assert m.max_query_len == max(item.num_tokens for item in plan.scheduled)
    assert m.max_seq_len == m.seq_lens.max()
    assert batch.sampling == [item.sequence for item in plan.scheduled if item.samples]
