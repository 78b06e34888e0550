"""Pretend steps: legal for any configuration, and no larger than a step may be."""

from __future__ import annotations

import doctest
import itertools

import pytest

from serve_app.runner import rehearsal
from serve_app.runner.batch import BatchBuilder
from serve_app.runner.rehearsal import largest_spans, pretend, variants


@pytest.mark.parametrize(
    ("budget", "num_seqs", "max_len"), [*itertools.product((1, 7, 512), (1, 4, 128), (2, 40, 4096))], ids=str
)
def test_any_configuration_has_its_steps(budget: int, num_seqs: int, max_len: int) -> None:
    num_seqs = min(num_seqs, budget)
    shapes = [largest_spans(budget, num_seqs, max_len), *variants(budget, num_seqs, max_len)]
    assert len(shapes[0]) == num_seqs
    assert sum(num for _, num in shapes[0]) == min(budget, num_seqs * (max_len - 1))
    for spans in shapes:
        assert 1 <= len(spans) <= num_seqs
        rows = BatchBuilder(num_seqs, max_len, 16).arrange(pretend(spans, 16))
        assert rows.num_tokens == sum(num for _, num in spans) <= budget
        assert (rows.slot_mapping == -1).all()
        assert rows.seq_lens.max() < max_len
        assert len(rows.sampling) == len(spans)
        assert not pretend(spans, 16, samples=False).scheduled[0].samples


def test_worked_example_of_the_docstring() -> None:
    result = doctest.testmod(rehearsal)
    assert (result.failed, result.attempted) == (0, 1)
