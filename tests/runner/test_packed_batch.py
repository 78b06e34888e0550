"""PackedBatch: fields in one buffer, tokens and block tables that stay on the device, padding that harms nobody."""

from __future__ import annotations

import doctest
from typing import Any

import numpy as np
import pytest
import torch

from serve_app.engine.scheduler import ScheduledSequence, SchedulerOutput
from serve_app.engine.sequence import Sequence
from serve_app.kernels.work_list import plan_work
from serve_app.runner import packed_batch
from serve_app.runner.batch import BatchBuilder
from serve_app.runner.packed_batch import (
    ALIGNMENT,
    DeviceState,
    Layout,
    PackedBatch,
    Sizes,
    num_elements_of,
)
from tests.runner.fake_gpu import FakeEvent
from tests.runner.test_batch import make_sequence

CPU = torch.device("cpu")


def make_packed(num_elements: int = 4000, num_buffers: int = 3) -> tuple[PackedBatch, list[FakeEvent]]:
    state = DeviceState(
        max_num_seqs=3, max_num_blocks=5, num_elements=num_elements, num_workspace=64, vocab_size=100, device=CPU
    )
    events: list[FakeEvent] = []

    def event() -> FakeEvent:
        events.append(FakeEvent())
        return events[-1]

    def host_buffer(num: int) -> torch.Tensor:
        return torch.full((num,), -999, dtype=torch.int32)

    return PackedBatch(state, num_buffers, host_buffer, event), events


def make_plan(*items: tuple[Sequence, int, int]) -> SchedulerOutput:
    """(sequence, start, number of tokens); a token still being sampled is the one after the known ones."""
    scheduled = [ScheduledSequence(s, start, num, start + num >= len(s.token_ids)) for s, start, num in items]
    return SchedulerOutput(scheduled, sum(num for _, _, num in items))


def send(packed: PackedBatch, builder: BatchBuilder, plan: SchedulerOutput, sizes: Sizes | None = None) -> Any:
    rows = builder.arrange(plan)
    work = plan_work(rows.cu_seqlens, rows.seq_lens, None, rows_per_tile=4)
    sampling = np.arange(len(rows.sampling) * 16, dtype=np.int32).reshape(-1, 16)
    live = Sizes(
        rows.num_tokens,
        rows.num_seqs,
        len(rows.logits_rows),
        len(rows.sampling),
        len(work.tiles),
        len(work.splits),
        len(work.decodes),
    )
    layout = Layout(sizes or live)
    inputs = packed.inputs_of(layout, rows.max_query_len, int(rows.seq_lens.max()))
    packed.send(layout, rows, work, sampling)
    return inputs, work


def abc() -> tuple[Sequence, Sequence, Sequence]:
    """A computes a chunk; B decodes a token that is still being sampled; C computes its whole prompt."""
    a = make_sequence("a", [30, 31, 32, 33, 34, 35, 36, 37, 38], slot=2, block_ids=[7, 3, 1])
    b = make_sequence("b", [40, 41], slot=0, block_ids=[5, 2], output=(42, 43))
    c = make_sequence("c", [50, 51], slot=1, block_ids=[6])
    return a, b, c


def test_worked_example() -> None:
    packed, _ = make_packed()
    a, b, c = abc()
    packed.state.last_tokens[0] = 44
    inputs, work = send(packed, BatchBuilder(4, 20, 4), make_plan((a, 3, 4), (b, 4, 1), (c, 0, 2)))
    fields = inputs.fields
    assert fields["id_places"].tolist() == [4, 5, 6, 7, 0, 9, 10]  # behind three slots, aligned
    assert packed.state.input_ids(inputs).tolist() == [33, 34, 35, 36, 44, 50, 51]
    metadata = packed.state.metadata(inputs)
    assert metadata.positions.tolist() == [3, 4, 5, 6, 4, 0, 1]
    assert metadata.cu_seqlens_q.tolist() == [0, 4, 5, 7]
    assert metadata.seq_lens.tolist() == [7, 5, 2]
    assert [row[:3] for row in metadata.block_tables.tolist()] == [[7, 3, 1], [5, 2, 0], [6, 0, 0]]
    assert metadata.slot_mapping.tolist() == [7 * 4 + 3, 3 * 4, 3 * 4 + 1, 3 * 4 + 2, 2 * 4, 6 * 4, 6 * 4 + 1]
    assert (metadata.max_query_len, metadata.max_seq_len) == (4, 7)
    assert fields["logits_indices"].tolist() == [4, 6]
    assert fields["token_slots"].tolist() == [0, 1]
    assert np.array_equal(fields["sampling"].numpy(), np.arange(32).reshape(2, 16))
    for name in ("tiles", "splits", "decodes", "counts"):
        assert np.array_equal(getattr(metadata.work, name).numpy(), getattr(work, name))
    assert packed.num_copies == 1
    for field in fields.values():  # behind three slots as well
        assert (field.data_ptr() - packed.state.buffer.data_ptr()) % 16 == 0


def test_every_field_is_aligned_and_contiguous() -> None:
    """Also behind odd numbers of everything: Triton would compile a kernel for a pointer that is not aligned."""
    for sizes in (Sizes(7, 3, 2, 1, 5, 9, 1), Sizes(1, 1, 1, 1, 0, 16, 1), Sizes(13, 13, 13, 13, 0, 26, 13)):
        buffer = torch.zeros(num_elements_of(sizes, 3), dtype=torch.int32)
        views = Layout(sizes).views(buffer)
        used = torch.zeros_like(buffer)
        for name, view in views.items():
            assert (view.data_ptr() - buffer.data_ptr()) % (4 * ALIGNMENT) == 0, name
            assert view.is_contiguous()
            view += 1
        used += buffer
        assert used.max() == 1, "two fields share an element"
        assert views["splits"].shape == (sizes.num_splits, 4)


def test_worked_examples_of_the_docstrings() -> None:
    result = doctest.testmod(packed_batch)
    assert (result.failed, result.attempted) == (0, 2)


# ---- what stays on the device ---------------------------------------------------------------------------------------


def test_a_step_brings_only_the_new_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    packed, _ = make_packed()
    builder = BatchBuilder(4, 20, 4)
    told: list[list[int]] = []
    learn = packed.state.learn

    def watched(places: torch.Tensor, block_ids: torch.Tensor) -> None:
        told.append(places.tolist())
        learn(places, block_ids)

    monkeypatch.setattr(packed.state, "learn", watched)
    a, b, _ = abc()
    length = packed.state.row_length
    assert length % 16 == 0
    send(packed, builder, make_plan((a, 3, 4), (b, 4, 1)))
    assert told == [[2 * length, 2 * length + 1, 2 * length + 2, 0, 1]]
    inputs, _ = send(packed, builder, make_plan((b, 4, 1), (a, 7, 2)))
    assert len(told) == 1  # nothing is new
    assert [row[:3] for row in packed.state.metadata(inputs).block_tables.tolist()] == [[5, 2, 0], [7, 3, 1]]
    a.block_ids += [8, 4]
    inputs, _ = send(packed, builder, make_plan((a, 9, 1)))
    assert told[1:] == [[2 * length + 3, 2 * length + 4]]
    assert packed.state.metadata(inputs).block_tables[0, :5].tolist() == [7, 3, 1, 8, 4]
    # Another sequence in that slot, and then a device that has lost what it was told.
    d = make_sequence("d", [1], slot=2, block_ids=[9])
    inputs, _ = send(packed, builder, make_plan((d, 0, 1)))
    assert told[2:] == [[2 * length]]
    packed.state.tables.fill_(-7)
    builder.forget()
    inputs, _ = send(packed, builder, make_plan((b, 4, 1), (d, 0, 1)))
    assert told[3:] == [[0, 1, 2 * length]]
    assert [row[:1] for row in packed.state.metadata(inputs).block_tables.tolist()] == [[5], [9]]


def test_sampled_tokens_are_found_by_the_next_step_in_whatever_order() -> None:
    packed, _ = make_packed()
    state = packed.state
    state.keep_tokens(torch.tensor([2, 0], dtype=torch.int32), torch.tensor([61, 62], dtype=torch.int32))
    state.keep_tokens(torch.tensor([1], dtype=torch.int32), torch.tensor([63], dtype=torch.int32))
    a, b, c = abc()
    inputs, _ = send(packed, BatchBuilder(4, 20, 4), make_plan((b, 4, 1), (c, 2, 1), (a, 9, 1)))
    assert inputs.fields["id_places"].tolist() == [0, 1, 2]
    assert state.input_ids(inputs).tolist() == [62, 63, 61]
    # Known tokens in front of it, after a preemption.
    inputs, _ = send(packed, BatchBuilder(4, 20, 4), make_plan((b, 1, 4)))
    assert state.input_ids(inputs).tolist() == [41, 42, 43, 62]
    # A row that failed may have left anything.
    state.keep_tokens(torch.tensor([0], dtype=torch.int32), torch.tensor([2**31 - 1], dtype=torch.int32))
    assert 0 <= int(state.last_tokens[0]) < 100


def test_two_tokens_that_nobody_knows_are_refused() -> None:
    _, b, _ = abc()
    with pytest.raises(AssertionError, match="more than one token"):
        BatchBuilder(4, 20, 4).arrange(make_plan((b, 3, 3)))


# ---- padding, buffers -----------------------------------------------------------------------------------------------


def test_padding_is_no_sequence_writes_nothing_and_has_no_work() -> None:
    packed, _ = make_packed()
    _, b, c = abc()
    c.token_ids.append(52)
    builder = BatchBuilder(4, 20, 4)
    sizes = Sizes(4, 4, 4, 4, 0, 8, 4)
    packed.state.fields.fill_(12345)
    packed.state.last_tokens[0] = 44
    for _ in range(2):  # what a larger step left there must go
        inputs, _ = send(packed, builder, make_plan((b, 4, 1), (c, 2, 1)), sizes)
        fields = {name: field.tolist() for name, field in inputs.fields.items()}
        assert packed.state.input_ids(inputs).tolist() == [44, 52, 44, 44]
        assert fields["positions"] == [4, 2, 0, 0]
        assert fields["slot_mapping"] == [2 * 4, 6 * 4 + 2, -1, -1]
        assert fields["cu_seqlens_q"] == [0, 1, 2, 2, 2]
        assert fields["seq_lens"] == [5, 3, 0, 0]
        assert fields["logits_indices"] == [0, 1, 2, 3]
        assert fields["counts"] == [0, 2, 2, 0]
        assert [entry[0] for entry in fields["splits"]] == [0, 1] + [-1] * 6
        assert [entry[0] for entry in fields["decodes"]] == [0, 1, -1, -1]
        full = [make_sequence(str(i), [i], slot=i, block_ids=[i], output=(1,)) for i in range(3)]
        send(packed, builder, make_plan(*((s, 1, 1) for s in full)), sizes)


def test_no_host_buffer_is_filled_before_its_copy_is_done() -> None:
    packed, events = make_packed(num_buffers=3)
    _, b, _ = abc()
    builder = BatchBuilder(4, 20, 4)
    history = []
    for _ in range(7):
        send(packed, builder, make_plan((b, 4, 1)))
        history.append([(event.num_waits, event.num_records) for event in events])
    assert len(events) == 3
    assert history[2] == [(1, 1), (1, 1), (1, 1)]  # each is waited for, then filled, copied and recorded
    assert history[6] == [(3, 3), (2, 2), (2, 2)]


def test_a_step_that_exceeds_the_buffer_is_refused_whole() -> None:
    a, _, _ = abc()
    rows = BatchBuilder(4, 20, 4).arrange(make_plan((a, 0, 9)))
    work = plan_work(rows.cu_seqlens, rows.seq_lens, None, rows_per_tile=4)
    layout = Layout(Sizes(9, 1, 1, 1, 3, 0, 0))
    enough = num_elements_of(layout.sizes, 3)
    sampling = np.zeros((1, 16), dtype=np.int32)
    packed, _ = make_packed(enough)
    packed.send(layout, rows, work, sampling)
    packed, _ = make_packed(enough - 1)
    with pytest.raises(
        ValueError, match=rf"a step of \d+ elements and 3 new blocks exceeds the buffer of {enough - 1}"
    ):
        packed.send(layout, rows, work, sampling)
    assert not packed.state.tables.any()
