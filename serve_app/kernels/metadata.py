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
class Work:
    """kernels/work_list.py's WorkList on the device, for the Triton kernels. All int32, contiguous.

    The arrays may be longer than the work (the fixed buffers of a CUDA graph): ``counts`` says how much of each is live.
    """

    tiles: torch.Tensor
    """[T, 4], live entries first; T programs for each kv head are started, so T = 0 in a step of decodes alone."""

    splits: torch.Tensor
    """[P, 4], live entries first."""

    decodes: torch.Tensor
    """[Q, 4], live entries first."""

    counts: torch.Tensor
    """[4]: live entries of tiles, splits and decodes, and 0."""

    workspace: torch.Tensor | None = None
    """float32, at least ragged_attention.workspace_size(P, H, D) elements: where splits wait to be merged. None: made for
    each call."""


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
    """What the CPU kernel planned for this step, by its tile size: made by the first layer, used by all."""

    work: Work | None = field(default=None, compare=False, repr=False)
    """What the Triton kernels do in this step. None: `kernels.ragged_attention` plans it itself, in fast mode."""

    @property
    def num_tokens(self) -> int:
        return self.positions.shape[0]

    @property
    def num_seqs(self) -> int:
        return self.seq_lens.shape[0]
