"""The work list: every row once, in the class that its position says, split by its own length alone."""

from __future__ import annotations

import doctest

import numpy as np
import pytest
from hypothesis import example, given, strategies as st

from serve_app.kernels import work_list
from serve_app.kernels.work_list import MAX_SPLITS, Capacity, WorkList, max_num_splits, num_splits, plan_work

Step = list[tuple[int, int, int]]
"""For each sequence: rows in this step, tokens before them, tokens of its prompt."""

steps = st.lists(
    st.tuples(st.integers(1, 40) | st.just(1), st.integers(0, 20_000), st.integers(1, 20_000)), min_size=1, max_size=12
)


def plan(step: Step, *, deterministic: bool, rows_per_tile: int = 16, capacity: Capacity | None = None) -> WorkList:
    rows, context, prompt = np.array(step, dtype=np.int32).T
    return plan_work(
        np.concatenate([[0], np.cumsum(rows)]).astype(np.int32),
        context + rows,
        prompt if deterministic else None,
        rows_per_tile=rows_per_tile,
        capacity=capacity,
    )


def test_the_examples_in_the_docstrings() -> None:
    assert doctest.testmod(work_list).attempted >= 6
    assert doctest.testmod(work_list).failed == 0


@given(steps, st.booleans(), st.integers(1, 17))
@example([(1, 0, 1)], True, 1)  # a prompt of one token is no decode
@example([(40, 5, 25), (1, 300, 9), (3, 4095, 4096)], True, 16)
def test_every_row_is_computed_once_in_its_class(step: Step, deterministic: bool, rows_per_tile: int) -> None:
    work = plan(step, deterministic=deterministic, rows_per_tile=rows_per_tile)
    classes = {}
    for sequence, first, rows, length in work.tiles.tolist():
        assert 1 <= rows <= rows_per_tile
        for i in range(rows):
            assert (first + i) not in classes
            classes[first + i] = ("prompt", sequence, length - rows + i)
    by_split = [entry[:2] for entry in work.splits.tolist()]
    for sequence, row, first_split, num in work.decodes.tolist():
        assert row not in classes
        assert by_split[first_split : first_split + num] == [[sequence, row]] * num
        classes[row] = ("decode", sequence, int(work.splits[first_split, 2]) - 1)
    row = 0
    for sequence, (rows, context, prompt) in enumerate(step):
        for position in range(context, context + rows):
            is_prompt = position < prompt if deterministic else rows > 1
            assert classes.pop(row) == ("prompt" if is_prompt else "decode", sequence, position)
            row += 1
    assert not classes
    assert work.counts.tolist() == [len(work.tiles), len(work.splits), len(work.decodes), 0]
    assert sum(num for *_, num in work.decodes.tolist()) == len(work.splits)
    assert len(work.splits) <= max_num_splits(len(work.decodes), int(sum(r + c for r, c, _ in step)) * 40)


@given(steps, st.booleans())
def test_longest_first_and_a_tile_never_spans_more_than_it_must(step: Step, deterministic: bool) -> None:
    work = plan(step, deterministic=deterministic)
    assert (np.diff(work.tiles[:, 3]) <= 0).all()
    assert (np.diff(work.splits[:, 2]) <= 0).all()
    num_tiled = [
        min(max(prompt - context, 0), rows) if deterministic else rows * (rows > 1) for rows, context, prompt in step
    ]
    assert len(work.tiles) == sum(-(-rows // 16) for rows in num_tiled)


@given(steps, st.tuples(st.integers(1, 40), st.integers(0, 20_000), st.integers(1, 20_000)), st.integers(0, 12))
def test_the_work_of_a_sequence_does_not_depend_on_its_company(step: Step, mine: tuple[int, int, int], at: int) -> None:
    """Up to where its rows and its entries stand."""
    at = min(at, len(step))
    alone = plan([mine], deterministic=True)
    company = plan([*step[:at], mine, *step[at:]], deterministic=True)
    offset = sum(rows for rows, *_ in step[:at])
    for mine_alone, everyone in ((alone.tiles, company.tiles), (alone.splits, company.splits)):
        entries = everyone[everyone[:, 0] == at] - np.array([at, offset, 0, 0])
        assert entries.tolist() == mine_alone.tolist()


def test_the_split_rule_on_every_edge() -> None:
    lengths = np.arange(1, 40_000)
    splits = num_splits(lengths)
    assert splits.max() == MAX_SPLITS
    for length, splits_of_it in zip(lengths.tolist(), splits.tolist(), strict=True):
        size = max(256, 1 << (-(-length // 16) - 1).bit_length())
        assert splits_of_it == -(-length // size)
    assert num_splits(np.array([131_072, 131_073, 2**30])).tolist() == [16, 9, 16]


@pytest.mark.parametrize("deterministic", [True, False])
def test_unused_entries_have_no_sequence(deterministic: bool) -> None:
    step = [(3, 700, 701), (1, 900, 5), (33, 0, 33)]
    exact = plan(step, deterministic=deterministic)
    assert (exact.tiles >= 0).all()
    assert (exact.splits >= 0).all()
    padded = plan(step, deterministic=deterministic, capacity=Capacity(9, 7, 31))
    assert padded.counts.tolist() == exact.counts.tolist()
    for name, size in (("tiles", 9), ("decodes", 7), ("splits", 31)):
        live, all_of_it = getattr(exact, name), getattr(padded, name)
        assert len(live) < len(all_of_it) == size
        assert (all_of_it[: len(live)] == live).all()
        assert (all_of_it[len(live) :] == -1).all()
        assert all_of_it.dtype == np.int32
        assert all_of_it.flags.c_contiguous


def test_work_that_does_not_fit_is_named() -> None:
    with pytest.raises(ValueError, match="4 splits of attention do not fit a capacity of 3"):
        plan([(1, 1023, 5)], deterministic=True, capacity=Capacity(1, 1, 3))
    with pytest.raises(ValueError, match="2 tiles of attention do not fit a capacity of 1"):
        plan([(17, 0, 17)], deterministic=True, capacity=Capacity(1, 1, 3))


def test_a_step_may_lack_one_class() -> None:
    assert [len(entries) for entries in plan([(1, 9, 5)], deterministic=False)[:3]] == [0, 1, 1]
    assert [len(entries) for entries in plan([(5, 9, 14)], deterministic=False)[:3]] == [1, 0, 0]
