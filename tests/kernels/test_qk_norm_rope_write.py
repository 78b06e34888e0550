"""The GPU's way from the projection to the cache, interpreted, against its twin. Every slot not written stays NaN."""

from __future__ import annotations

import doctest
from typing import Any

import pytest
import torch

from serve_app.kernels import qk_norm_rope_write as module, reference
from serve_app.kernels.qk_norm_rope_write import qk_norm_rope_write
from serve_app.models.decoder_config import RopeConfig
from serve_app.models.rope import rope_table
from tests.kernels.rounding import DEVICE, DTYPES, ulps

POSITIONS = [5, 0, 99, 41, 41]
SLOTS = [16, -1, 0, 47, 18]
NUM_BLOCKS, BLOCK_SIZE, MAX_LEN = 3, 16, 100


def hnd_cache(kv_heads: int, dim: int, dtype: torch.dtype) -> torch.Tensor:
    """NaN, stored [num_blocks, K, block_size, D], seen as [num_blocks, block_size, K, D]."""
    return torch.full((NUM_BLOCKS, kv_heads, BLOCK_SIZE, dim), torch.nan, dtype=dtype, device=DEVICE).transpose(1, 2)


def nhd_cache(kv_heads: int, dim: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.full((NUM_BLOCKS, BLOCK_SIZE, kv_heads, dim), torch.nan, dtype=dtype, device=DEVICE)


class Case:
    """One step's arguments, and what came of them."""

    def __init__(self, heads: int, kv_heads: int, dim: int, dtype: torch.dtype, *, normed: bool) -> None:
        generator = torch.Generator().manual_seed(heads)
        self.shape = (kv_heads, dim, dtype)
        self.qkv = torch.randn(len(POSITIONS), (heads + 2 * kv_heads) * dim, generator=generator)
        self.qkv = self.qkv.to(DEVICE, dtype)
        self.table = rope_table(RopeConfig(theta=10_000.0), dim, MAX_LEN).to(DEVICE)
        self.positions = torch.tensor(POSITIONS, dtype=torch.int32, device=DEVICE)
        self.slots = torch.tensor(SLOTS, dtype=torch.int32, device=DEVICE)
        self.norms: dict[str, Any] = {}
        if normed:
            q_norm, k_norm = ((1 + 0.2 * torch.randn(dim, generator=generator)).to(DEVICE, dtype) for _ in range(2))
            self.norms = {"q_norm": q_norm, "k_norm": k_norm, "eps": 1e-6}

    def run(self, op: Any, rows: list[int] | None = None, cache: Any = hnd_cache) -> tuple[torch.Tensor, ...]:
        """q, K cache and V cache after a step of these rows."""
        rows = list(range(len(POSITIONS))) if rows is None else rows
        k, v = cache(*self.shape), cache(*self.shape)
        q = op(self.qkv[rows], self.table, self.positions[rows], k, v, self.slots[rows], **self.norms)
        return q, k, v


def test_worked_example() -> None:
    assert doctest.testmod(module) == (0, 1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("heads", "kv_heads", "dim", "normed"),
    [
        (4, 2, 64, True),
        (7, 1, 96, True),
        (3, 3, 128, False),
        (33, 3, 64, False),
        (10, 5, 256, True),
        (2, 1, 16, False),
    ],
)
def test_equals_the_oracle(heads: int, kv_heads: int, dim: int, dtype: torch.dtype, normed: bool) -> None:
    case = Case(heads, kv_heads, dim, dtype, normed=normed)
    q, k, v = case.run(qk_norm_rope_write)
    expected_q, expected_k, expected_v = case.run(reference.qk_norm_rope_write)
    assert (q.shape, q.dtype) == ((len(POSITIONS), heads, dim), dtype)
    scale = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}[dtype]
    torch.testing.assert_close(q, expected_q, rtol=scale, atol=scale)
    written = ~expected_k.isnan()
    assert int(written.sum()) == (len(SLOTS) - 1) * kv_heads * dim
    assert torch.equal(k.isnan(), ~written)
    assert torch.equal(v.isnan(), ~written)
    torch.testing.assert_close(k[written], expected_k[written], rtol=scale, atol=scale)
    assert torch.equal(v[written], expected_v[written])
    if dtype != torch.float32:  # cancellation leaves float32 more than an ulp, never the 16-bit types
        assert ulps(q, expected_q) <= 1
        assert ulps(k[written], expected_k[written]) <= 1


def test_only_one_of_the_norms() -> None:
    case = Case(4, 2, 64, torch.float32, normed=True)
    case.norms["q_norm"] = None
    for ours, theirs in zip(case.run(qk_norm_rope_write), case.run(reference.qk_norm_rope_write), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6, equal_nan=True)


def test_caches_of_other_strides_and_types() -> None:
    case = Case(4, 2, 64, torch.float32, normed=True)
    q, k, v = case.run(qk_norm_rope_write)
    q_nhd, k_nhd, v_nhd = case.run(qk_norm_rope_write, cache=nhd_cache)
    assert k.stride() != k_nhd.stride()
    assert torch.equal(q, q_nhd)
    torch.testing.assert_close((k, v), (k_nhd, v_nhd), rtol=0, atol=0, equal_nan=True)

    case.shape = (2, 64, torch.float16)
    _, narrow_k, narrow_v = case.run(qk_norm_rope_write)
    torch.testing.assert_close((narrow_k, narrow_v), (k.half(), v.half()), rtol=0, atol=0, equal_nan=True)


def test_a_rows_bits_do_not_depend_on_its_company() -> None:
    case = Case(7, 2, 64, torch.float32, normed=True)
    q, k, v = case.run(qk_norm_rope_write)
    for rows in ([3], [4, 3, 0]):
        part_q, part_k, part_v = case.run(qk_norm_rope_write, rows)
        assert torch.equal(part_q, q[rows])
        for part, whole in ((part_k, k), (part_v, v)):
            written = ~part.isnan()
            assert int(written.sum()) == len(rows) * 2 * 64
            assert torch.equal(part[written], whole[written])


def test_padded_rows_write_nothing() -> None:
    """As a CUDA graph pads: position 0, slot -1, and whatever an earlier step has left in qkv."""
    case = Case(2, 1, 64, torch.float32, normed=True)
    case.slots[:] = -1
    case.positions[:] = 0
    case.qkv[1:] = torch.nan
    q, k, v = case.run(qk_norm_rope_write)
    assert k.isnan().all()
    assert v.isnan().all()
    assert q[0].isfinite().all()


def test_no_rows() -> None:
    q, k, _ = Case(2, 1, 64, torch.float32, normed=False).run(qk_norm_rope_write, [])
    assert q.shape == (0, 2, 64)
    assert k.isnan().all()
