"""PackedBatch: the arrays of a step in one host buffer, one copy to the device, views of it there. Knows fields and
offsets; knows no kernel and no graph.

    host   int32, pinned                 [ known_ids | id_places | positions | ... | decodes | splits | new blocks )
    device int32           [ last_tokens | the same, each field at a multiple of 16 bytes                          )

What a launched step has not told the host yet, or what would be too much to copy each time, stays on the device:

    last_tokens  [slots]       the token that each slot sampled last
    tables       [slots, M]    the block table of each slot; a step brings its new entries alone

An input id may stand in either part of the device's buffer: among the known ones, which the host sent, or among the last
tokens. The host says where (``id_places``), so that one gather takes them all:

    two slots       last_tokens     known_ids    id_places        input ids
    buffer          [ 61 62 . .  |  7  .  9  . | 4  1  6  . )     7 62 9

Shape suffixes: N tokens, B sequences, S rows whose logits are wanted, R of them that sample, M blocks of the longest
sequence; tiles, splits, decodes: kernels/work_list.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import torch

from serve_app.kernels.metadata import AttentionMetadata, Work
from serve_app.kernels.work_list import WorkList
from serve_app.runner.batch import NewBlocks, Rows

Int32Array = npt.NDArray[np.int32]

ALIGNMENT = 4
"""int32 elements in 16 bytes. Triton compiles another, slower kernel for a pointer that is not so aligned."""

SAMPLING_COLUMNS = 16
"""int32 parameters of a row that samples (device_sampler.SamplingPlan.rows)."""


class Sizes(NamedTuple):
    """Numbers of entries; what they count is said above."""

    num_tokens: int
    num_seqs: int
    num_logits: int
    num_sampled: int
    num_tiles: int
    num_splits: int
    num_decodes: int


class Layout:
    """Where the fields of a step of these sizes lie: name -> (first element, shape), and the elements of all.

    Three tokens of one sequence, of which the last samples, in one tile:

    >>> layout = Layout(Sizes(3, 1, 1, 1, 1, 0, 0))
    >>> layout.fields["positions"], layout.fields["cu_seqlens_q"], layout.fields["seq_lens"]
    ((8, (3,)), (16, (2,)), (20, (1,)))
    """

    def __init__(self, sizes: Sizes) -> None:
        n, b, s, r, tiles, splits, decodes = sizes
        shapes: dict[str, tuple[int, ...]] = {
            "known_ids": (n,),
            "id_places": (n,),
            "positions": (n,),
            "slot_mapping": (n,),
            "cu_seqlens_q": (b + 1,),
            "seq_lens": (b,),
            "slots": (b,),
            "logits_indices": (s,),
            "token_slots": (r,),
            "sampling": (r, SAMPLING_COLUMNS),
            "counts": (4,),
            "tiles": (tiles, 4),
            "decodes": (decodes, 4),
            "splits": (splits, 4),
        }
        self.sizes = sizes
        self.fields: dict[str, tuple[int, tuple[int, ...]]] = {}
        self.num_elements = 0
        for name, shape in shapes.items():
            self.fields[name] = (self.num_elements, shape)
            self.num_elements += _aligned(math.prod(shape))

    def views(self, buffer: torch.Tensor) -> dict[str, torch.Tensor]:
        """The fields of a flat int32 tensor."""
        return {
            name: buffer[start : start + math.prod(shape)].view(shape) for name, (start, shape) in self.fields.items()
        }

    def arrays(self, buffer: Int32Array) -> dict[str, Int32Array]:
        """The fields of a flat int32 array."""
        return {
            name: buffer[start : start + math.prod(shape)].reshape(shape)
            for name, (start, shape) in self.fields.items()
        }


class StepInputs(NamedTuple):
    """A step on the device; for a bucket's graph, always the same tensors. All int32."""

    fields: dict[str, torch.Tensor]
    work: Work
    max_query_len: int
    max_seq_len: int


class DeviceState:
    """What stays on the device from step to step. ``num_workspace``: float32 elements for attention's splits."""

    def __init__(
        self,
        max_num_seqs: int,
        max_num_blocks: int,
        num_elements: int,
        num_workspace: int,
        vocab_size: int,
        device: torch.device,
    ) -> None:
        self.vocab_size = vocab_size
        self.row_length = -(-max_num_blocks // 16) * 16
        """M. One stride for every step, and a multiple of 16: neither it nor a bucket makes Triton compile again."""
        self.tables = torch.zeros(max_num_seqs, self.row_length, dtype=torch.int32, device=device)
        self.first_field = _aligned(max_num_seqs)
        """Where in the buffer the packed fields begin."""
        self.buffer = torch.zeros(self.first_field + num_elements, dtype=torch.int32, device=device)
        self.last_tokens = self.buffer[:max_num_seqs]
        self.fields = self.buffer[self.first_field :]
        self.workspace = torch.empty(num_workspace, dtype=torch.float32, device=device)

    def input_ids(self, inputs: StepInputs) -> torch.Tensor:
        """int32 [N]: the known ids, and the tokens that were sampled last where the host does not know them yet."""
        return self.buffer.index_select(0, inputs.fields["id_places"])

    def metadata(self, inputs: StepInputs) -> AttentionMetadata:
        """With the block tables of this step's sequences, [B, M]."""
        fields = inputs.fields
        return AttentionMetadata(
            cu_seqlens_q=fields["cu_seqlens_q"],
            seq_lens=fields["seq_lens"],
            block_tables=self.tables.index_select(0, fields["slots"]),
            slot_mapping=fields["slot_mapping"],
            positions=fields["positions"],
            max_query_len=inputs.max_query_len,
            max_seq_len=inputs.max_seq_len,
            work=inputs.work,
        )

    def learn(self, places: torch.Tensor, block_ids: torch.Tensor) -> None:
        """New entries of the tables; ``places`` count through all rows."""
        self.tables.view(-1)[places.long()] = block_ids

    def keep_tokens(self, slots: torch.Tensor, token_ids: torch.Tensor) -> None:
        """[R] each: what was sampled, for the step after. Whatever a failed row left there must not make it fault."""
        self.last_tokens[slots.long()] = token_ids.clamp(0, self.vocab_size - 1)


class PackedBatch:
    """Host buffers in a ring, each copied into the state's. ``num_buffers``: steps that may be under way, and the next one.

    ``host_buffer``: makes a flat int32 CPU tensor, pinned if there is a GPU. ``event``: makes something with ``record``
    and ``synchronize``, so that no buffer is filled anew before its copy is done.
    """

    def __init__(
        self,
        state: DeviceState,
        num_buffers: int,
        host_buffer: Callable[[int], torch.Tensor],
        event: Callable[[], Event],
    ) -> None:
        self.state = state
        self._hosts = [(host_buffer(len(state.fields)), event()) for _ in range(num_buffers)]
        self._next = 0
        self.num_copies = 0

    def inputs_of(self, layout: Layout, max_query_len: int, max_seq_len: int) -> StepInputs:
        """The views of a layout; those of a bucket are made once."""
        fields = layout.views(self.state.fields)
        work = Work(fields["tiles"], fields["splits"], fields["decodes"], fields["counts"], self.state.workspace)
        return StepInputs(fields, work, max_query_len, max_seq_len)

    def send(self, layout: Layout, rows: Rows, work: WorkList, sampling: Int32Array) -> None:
        """Fills the next host buffer, and queues its one copy and the new entries of the block tables.

        The layout may be larger than the step: padded rows have slot -1 (so they write nothing), whatever token stands
        first, and belong to no sequence; padded sequences have no rows; padded work has sequence -1.
        """
        host, copied = self._hosts[self._next]
        self._next = (self._next + 1) % len(self._hosts)
        copied.synchronize()
        places, block_ids = _new_entries(rows.new_blocks, self.state.row_length)
        num_new = len(places)
        end = layout.num_elements
        if end + 2 * _aligned(num_new) > len(host):
            raise ValueError(f"a step of {end} elements and {num_new} new blocks exceeds the buffer of {len(host)}")
        array = host.numpy()
        self._fill(layout, layout.arrays(array), rows, work, sampling)
        first_id = end + _aligned(num_new)
        array[end : end + num_new] = places
        array[first_id : first_id + num_new] = block_ids
        used = first_id + num_new
        sent = self.state.fields
        sent[:used].copy_(host[:used], non_blocking=True)
        copied.record()
        self.num_copies += 1
        if num_new:
            self.state.learn(sent[end : end + num_new], sent[first_id : first_id + num_new])

    def _fill(
        self, layout: Layout, fields: dict[str, Int32Array], rows: Rows, work: WorkList, sampling: Int32Array
    ) -> None:
        sampled_slots = [sequence.slot for sequence in rows.sampling]
        end = rows.cu_seqlens[-1]
        ids = np.array(rows.input_ids)
        first_known = self.state.first_field + layout.fields["known_ids"][0]
        id_places = np.where(ids < 0, -1 - ids, np.arange(first_known, first_known + len(ids)))
        for name, values, padding in (
            ("known_ids", ids, 0),
            ("id_places", id_places, 0),
            ("positions", rows.positions, 0),
            ("slot_mapping", rows.slot_mapping, -1),
            ("cu_seqlens_q", rows.cu_seqlens, end),
            ("seq_lens", rows.seq_lens, 0),
            ("slots", rows.slots, 0),
            ("logits_indices", rows.logits_rows, None),
            ("token_slots", sampled_slots, 0),
            ("sampling", sampling, 0),
            ("counts", work.counts, 0),
            ("tiles", work.tiles, -1),
            ("decodes", work.decodes, -1),
            ("splits", work.splits, -1),
        ):
            field, num = fields[name], len(values)
            field[:num] = values
            if num < len(field):
                field[num:] = np.arange(num, len(field)) if padding is None else padding


class Event(Protocol):
    """What is used of torch.cuda.Event. One that was never recorded is not waited for."""

    def record(self) -> None: ...

    def synchronize(self) -> None: ...


def num_elements_of(sizes: Sizes, num_new_blocks: int) -> int:
    """Elements of the largest step: what the buffers must hold."""
    return Layout(sizes).num_elements + 2 * _aligned(num_new_blocks)


def _new_entries(new_blocks: list[NewBlocks], row_length: int) -> tuple[list[int], list[int]]:
    places: list[int] = []
    block_ids: list[int] = []
    for slot, start, ids in new_blocks:
        first = slot * row_length + start
        places += range(first, first + len(ids))
        block_ids += ids
    return places, block_ids


def _aligned(num: int) -> int:
    return -(-num // ALIGNMENT) * ALIGNMENT
