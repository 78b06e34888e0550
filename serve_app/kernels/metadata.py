"""AttentionMetadata: how the rows of one ragged step map to sequences and KV blocks. Knows no kernel and no model.

Shape suffixes: N tokens in the step, B sequences, M blocks of the longest sequence.

    sequence          0           1    2
    q rows        [ q q q q q ][ q ][ q q )         cu_seqlens_q = 0 5 6 8
    kv        [ c c c k k k k k ]                   seq_lens     = 8 ...   (context 3 + the 5 new ones)

Row i of sequence b stands at position seq_lens[b] - (cu_seqlens_q[b+1] - i) and sees positions 0..its own.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch


@dataclass(frozen=True)
class AttentionMetadata:
    """All int32, on the device of the cache, contiguous. A decode is a sequence with one row."""

    cu_seqlens_q: torch.Tensor
    """[B+1]: rows [cu_seqlens_q[b], cu_seqlens_q[b+1]) belong to sequence b."""

    seq_lens: torch.Tensor
    """[B]: tokens of sequence b in the cache once this step's rows are written."""

    block_tables: torch.Tensor
    """[B, M]: block ids of each sequence in order; entries past ceil(seq_len / block_size) are 0 and never read."""

    slot_mapping: torch.Tensor
    """[N]: block_id * block_size + offset where row i's K and V go; -1: they are already there, do not write."""

    positions: torch.Tensor
    """[N]: position of each row in its sequence."""

    max_query_len: int
    max_seq_len: int

    work_lists: dict[int, torch.Tensor] = field(default_factory=dict, compare=False, repr=False)
    """What a kernel planned for this step, by its tile size: made by the first layer, used by all."""

    @property
    def num_tokens(self) -> int:
        return self.positions.shape[0]

    @property
    def num_seqs(self) -> int:
        return self.seq_lens.shape[0]
