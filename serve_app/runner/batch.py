"""BatchBuilder: a plan -> the arrays of one ragged step. The one place where that happens; computes nothing else.

    scheduled      A: 3 tokens of a prompt     B: its next token     C: 2 tokens
    input_ids    [ a4 a5 a6                  | b9                  | c0 c1 ]           int64  [N]
    positions    [ 4  5  6                   | 9                   | 0  1  ]           int32  [N]
    cu_seqlens_q   0                           3                     4       6         int32  [B+1]
    logits_indices        2                    3                                       int64  [S], rows that sample

Rows whose logits are wanted for prompt_logprobs stand behind the rows that sample, and behind those the rows of prompts
that are pooled, of which the hidden states are wanted alone. A CPU takes the arrays as they are
(`BatchBuilder.build`); a GPU gets them in one copy (runner/packed_batch.py).
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from serve_app.engine.scheduler import Key, ScheduledSequence, SchedulerOutput
from serve_app.engine.sequence import Sequence
from serve_app.kernels.metadata import AttentionMetadata


class PromptRows(NamedTuple):
    """Rows of one chunk whose next token stands in the prompt: logits [start, start + len) score ``token_ids``."""

    key: Key
    start: int
    token_ids: list[int]
    num_top: int


class PooledRows(NamedTuple):
    """Rows [start, start + num) of a pooled prompt: the whole chunk, or its last token."""

    key: Key
    start: int
    num: int
    kind: str
    """Of PoolingParams."""


class NewBlocks(NamedTuple):
    """Entries [start, start + len) of a slot's block table that the step before did not have."""

    slot: int
    start: int
    block_ids: list[int]


class Rows(NamedTuple):
    """One ragged step as numpy arrays: N tokens, B sequences, S rows whose logits are wanted."""

    input_ids: list[int]
    """[N]. -1 - slot stands for a token that is still being sampled: the last one of the sequence in that slot."""
    positions: npt.NDArray[np.int32]
    slot_mapping: npt.NDArray[np.int32]
    cu_seqlens: npt.NDArray[np.int32]
    seq_lens: npt.NDArray[np.int32]
    slots: list[int]
    """[B]: each sequence's place, which is its row in the block tables."""
    logits_rows: list[int]
    """[S]: what samples, then what is asked for prompt_logprobs, then what is pooled."""
    sampling: list[Sequence]
    """The sequences that sample; row i of the logits belongs to sampling[i]."""
    sampled_positions: list[int]
    """Where the sampled tokens will stand."""
    prompt_rows: list[PromptRows]
    pooled_rows: list[PooledRows]
    new_blocks: list[NewBlocks]
    max_query_len: int

    @property
    def num_tokens(self) -> int:
        return len(self.input_ids)

    @property
    def num_seqs(self) -> int:
        return len(self.slots)


class Batch(NamedTuple):
    """One ragged step, on the CPU."""

    input_ids: torch.Tensor
    metadata: AttentionMetadata
    logits_indices: torch.Tensor
    sampling: list[Sequence]
    """The sequences that sample; row i of the logits belongs to sampling[i]."""
    prompt_rows: list[PromptRows]
    pooled_rows: list[PooledRows]


class BatchBuilder:
    """Keeps every running sequence's block table in a row of one array, so that a step copies only what is new."""

    def __init__(self, max_num_seqs: int, max_model_len: int, block_size: int) -> None:
        self.block_size = block_size
        self._tables = np.zeros((max_num_seqs, -(-max_model_len // block_size)), dtype=np.int32)
        self._known: list[list[int] | None] = [None] * max_num_seqs
        """The very list whose blocks stand in each row; admission makes a new one."""
        self._num_known = [0] * max_num_seqs

    def build(self, plan: SchedulerOutput) -> Batch:
        """Raises nothing of its own: what the scheduler planned fits, and a CPU has read every token."""
        rows = self.arrange(plan)
        max_seq_len = int(rows.seq_lens.max())
        tables = self._tables[rows.slots, : -(-max_seq_len // self.block_size)]
        metadata = AttentionMetadata(
            cu_seqlens_q=torch.from_numpy(rows.cu_seqlens),
            seq_lens=torch.from_numpy(rows.seq_lens),
            block_tables=torch.from_numpy(tables),
            slot_mapping=torch.from_numpy(rows.slot_mapping),
            positions=torch.from_numpy(rows.positions),
            max_query_len=rows.max_query_len,
            max_seq_len=max_seq_len,
        )
        logits_indices = torch.tensor(rows.logits_rows, dtype=torch.int64)
        ids = torch.tensor(rows.input_ids)
        return Batch(ids, metadata, logits_indices, rows.sampling, rows.prompt_rows, rows.pooled_rows)

    def arrange(self, plan: SchedulerOutput) -> Rows:
        """What is in ``new_blocks`` is told once: see `forget`."""
        num_seqs = len(plan.scheduled)
        input_ids: list[int] = []
        slots: list[int] = []
        starts: list[int] = []
        lens: list[int] = []
        shared: list[int] = []
        sampling: list[Sequence] = []
        sampled_positions: list[int] = []
        logits_rows: list[int] = []
        prompt_rows: list[PromptRows] = []
        pooled: list[tuple[ScheduledSequence, int, str]] = []
        pooled_rows: list[PooledRows] = []
        new_blocks: list[NewBlocks] = []
        for item in plan.scheduled:
            sequence, start, num = item.sequence, item.start, item.num_tokens
            slot, token_ids = sequence.slot, sequence.token_ids
            block_ids = sequence.block_ids
            if self._known[slot] is not block_ids or self._num_known[slot] != len(block_ids):
                new_blocks.append(self._learn(slot, block_ids))
            if num > 1:
                input_ids += token_ids[start : start + num]
            elif start < len(token_ids):
                input_ids.append(token_ids[start])
            if start + num > len(token_ids):  # the last one: a launched step samples it, so its value is on the device
                input_ids.append(-1 - slot)
            slots.append(slot)
            starts.append(start)
            lens.append(num)
            shared.append(sequence.num_shared_tokens)
            if item.samples:
                sampling.append(sequence)
                sampled_positions.append(start + num)
                logits_rows.append(len(input_ids) - 1)
        for item, end in zip(plan.scheduled, np.cumsum(lens).tolist(), strict=True):
            request = item.sequence.request
            if request.pooling is not None:
                pooled.append((item, end, request.pooling.kind))
                continue
            num_top = request.sampling.prompt_logprobs
            if num_top is not None and item.start < item.sequence.num_prompt_tokens:
                first = end - item.num_tokens
                num = min(item.num_tokens, item.sequence.num_prompt_tokens - 1 - item.start)
                targets = item.sequence.token_ids[item.start + 1 : item.start + 1 + num]
                prompt_rows.append(PromptRows(item.sequence.key, len(logits_rows), targets, num_top))
                logits_rows += range(first, first + num)
        for item, end, kind in pooled:
            is_last = item.start + item.num_tokens == item.sequence.num_prompt_tokens
            num = item.num_tokens if kind == "mean" else int(is_last)
            if num:
                pooled_rows.append(PooledRows(item.sequence.key, len(logits_rows), num, kind))
                logits_rows += range(end - num, end)

        num_tokens = len(input_ids)
        cu_seqlens = np.zeros(num_seqs + 1, dtype=np.int32)
        lens_B = np.array(lens, dtype=np.int32)
        starts_B = np.array(starts, dtype=np.int32)
        slots_B = np.array(slots)
        np.cumsum(lens_B, out=cu_seqlens[1:])
        assert cu_seqlens[-1] == num_tokens, "more than one token of a sequence is not read yet"
        if num_tokens == num_seqs:
            positions, row_B = starts_B, np.arange(num_seqs)
        else:
            row_B = np.repeat(np.arange(num_seqs), lens_B)
            positions = np.arange(num_tokens, dtype=np.int32) + (starts_B - cu_seqlens[:-1])[row_B]
        block_ids_N = self._tables[slots_B[row_B], positions // self.block_size]
        slot_mapping = block_ids_N * self.block_size + positions % self.block_size
        shared_B = np.array(shared, dtype=np.int32)
        if (starts_B < shared_B).any():
            slot_mapping = np.where(positions < shared_B[row_B], np.int32(-1), slot_mapping)
        return Rows(
            input_ids,
            positions,
            slot_mapping,
            cu_seqlens,
            starts_B + lens_B,
            slots,
            logits_rows,
            sampling,
            sampled_positions,
            prompt_rows,
            pooled_rows,
            new_blocks,
            max(lens),
        )

    def forget(self) -> None:
        """The next step tells every table anew: whoever keeps a copy of them has lost what was told last."""
        self._known = [None] * len(self._known)

    def _learn(self, slot: int, block_ids: list[int]) -> NewBlocks:
        known = self._num_known[slot] if self._known[slot] is block_ids else 0
        new = block_ids[known:]
        self._tables[slot, known : len(block_ids)] = new
        self._known[slot] = block_ids
        self._num_known[slot] = len(block_ids)
        return NewBlocks(slot, known, new)
