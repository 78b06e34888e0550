"""DecodeGraphs: buckets and their arithmetic, capture from the largest on, replay."""

from __future__ import annotations

import doctest

import pytest
import torch

from serve_app.runner import cuda_graphs
from serve_app.runner.cuda_graphs import MAX_BUCKET, DecodeGraphs, bucket_sizes
from tests.runner.fake_gpu import FakeGpu


@pytest.mark.parametrize("max_num_seqs", [1, 2, 3, 7, 8, 9, 16, 17, 100, 128, 200, 256, 333, 512, 513, 4000])
def test_every_batch_has_a_bucket_and_pads_little(max_num_seqs: int) -> None:
    sizes = bucket_sizes(max_num_seqs)
    assert list(sizes) == sorted(set(sizes))
    assert sizes[-1] == min(max_num_seqs, MAX_BUCKET)
    for num_rows in range(1, sizes[-1] + 1):
        bucket = min(size for size in sizes if size >= num_rows)
        if num_rows > 128:  # where rows cost something, at most an eighth of them is padding
            assert bucket - num_rows < num_rows / 8
        elif num_rows > 8:
            assert bucket - num_rows < 8
    assert len(sizes) <= 36


def test_worked_example_of_the_docstring() -> None:
    result = doctest.testmod(cuda_graphs)
    assert (result.failed, result.attempted) == (0, 1)


def test_the_docstring_counts_right() -> None:
    assert "27 graphs up to 256" in " ".join((cuda_graphs.__doc__ or "").split())
    assert len(bucket_sizes(256)) == 27


def test_capture_and_replay() -> None:
    static = torch.zeros(8)
    events: list[str] = []
    gpu = FakeGpu()
    graphs = DecodeGraphs((4, 1, 8))
    assert graphs.buckets == (1, 4, 8)
    assert graphs.bucket_for(1) is None, "nothing is captured yet"

    def run(bucket: int) -> torch.Tensor:
        events.append(f"run {bucket}")
        return static[:bucket] * 2

    captured = list(graphs.capture(lambda bucket: events.append(f"prepare {bucket}"), run, gpu.capture))
    assert captured == [8, 4, 1]
    assert events[:3] == ["prepare 8", "run 8", "run 8"]  # once before it is captured
    assert [graphs.bucket_for(num) for num in (1, 2, 4, 5, 8, 9)] == [1, 4, 4, 8, 8, None]
    static += 3
    assert graphs.replay(4).tolist() == [6.0] * 4
    assert graphs.replay(4) is graphs.replay(4)
    assert graphs.replay(8).shape == (8,)
    assert graphs.num_replays == 4


def test_without_buckets_there_are_no_graphs() -> None:
    assert DecodeGraphs(()).bucket_for(1) is None
