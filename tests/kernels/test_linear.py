"""Linear: packed or not it is F.linear; row tiles cover every number of rows, and only pad the last one."""

from __future__ import annotations

import doctest

import pytest
import torch
from torch.nn import functional

from serve_app.kernels import linear as linear_module
from serve_app.kernels.linear import ANY, Linear, split_rows

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 4e-3}


def make(
    out: int, in_features: int, dtype: torch.dtype, *, bias: bool, packed: bool = True
) -> tuple[Linear, torch.Tensor, torch.Tensor | None]:
    generator = torch.Generator().manual_seed(0)
    weight = (torch.randn(out, in_features, generator=generator) / in_features**0.5).to(dtype)
    offset = torch.randn(out, generator=generator).to(dtype) if bias else None
    return Linear(weight, offset, packed=packed), weight, offset


def inputs(num_rows: int, in_features: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(num_rows, in_features, generator=torch.Generator().manual_seed(1)).to(dtype)


def test_worked_example() -> None:
    assert doctest.testmod(linear_module) == (0, 1)


@pytest.mark.parametrize("packed", [True, False], ids=["packed", "plain"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize(("num_rows", "out", "in_features"), [(1, 1, 16), (2, 33, 48), (7, 307, 80), (130, 48, 75)])
def test_equals_torch(num_rows: int, out: int, in_features: int, dtype: torch.dtype, bias: bool, packed: bool) -> None:
    linear, weight, offset = make(out, in_features, dtype, bias=bias, packed=packed)
    assert packed or not linear.is_packed
    x = inputs(num_rows, in_features, dtype)
    y = linear(x)
    assert y.dtype == dtype
    expected = functional.linear(x.double(), weight.double(), None if offset is None else offset.double())
    torch.testing.assert_close(y.double(), expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
    assert linear.num_padded_rows == 0


def test_what_the_library_refuses_runs_unpacked() -> None:
    linear, weight, offset = make(5, 16, torch.float64, bias=True)
    assert not linear.is_packed
    x = inputs(3, 16, torch.float64)
    assert torch.equal(linear(x), functional.linear(x, weight, offset))


def test_where_the_library_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    linear, weight, _ = make(5, 16, torch.float32, bias=False)
    assert not linear.is_packed
    x = inputs(3, 16)
    assert torch.equal(linear(x), functional.linear(x, weight))


def test_shape_key() -> None:
    keys = {make(out, 16, dtype, bias=bias)[0].shape_key for out in (4, 5) for dtype in TOLERANCE for bias in (0, 1)}
    assert len(keys) == 12
    assert (5, 16, True, torch.float16) in keys


@pytest.mark.parametrize("tiles", [(16,), (16, 64), (2, ANY), (32, 64, 128), (1,)], ids=str)
@pytest.mark.parametrize("num_rows", [0, 1, 2, 15, 16, 17, 63, 64, 65, 150, 300])
def test_tiles_cover_every_number_of_rows(num_rows: int, tiles: tuple[int, ...]) -> None:
    linear, weight, offset = make(37, 48, torch.float32, bias=True)
    linear.row_tiles = tiles
    counts: list[int] = []
    run = linear.run

    def watched(x: torch.Tensor) -> torch.Tensor:
        counts.append(x.shape[0])
        return run(x)

    linear.run = watched  # type: ignore[method-assign]
    x = inputs(num_rows, 48)
    y = linear(x)
    torch.testing.assert_close(y, functional.linear(x, weight, offset), rtol=1e-5, atol=1e-5)
    assert y.shape == (num_rows, 37)
    if tiles[-1] == ANY:
        assert counts == [max(num_rows, tiles[0])]
    else:
        assert set(counts) <= set(tiles)
        assert sum(counts) - num_rows < tiles[0] or num_rows == 0
    assert linear.num_padded_rows == sum(counts) - num_rows


@pytest.mark.parametrize("num_rows", range(1, 200, 7))
@pytest.mark.parametrize("tiles", [(16,), (16, 64), (32, 64, 128), (3, 5, 7)], ids=str)
def test_split_rows(num_rows: int, tiles: tuple[int, ...]) -> None:
    parts = list(split_rows(num_rows, tiles))
    assert set(parts) <= set(tiles)
    assert parts == sorted(parts, reverse=True)
    assert 0 <= sum(parts) - num_rows < tiles[0]


def test_a_padded_tile_sees_zeros_only() -> None:
    linear, _, _ = make(8, 16, torch.float32, bias=False)
    linear.row_tiles = (16,)
    seen: list[torch.Tensor] = []
    run = linear.run

    def watched(x: torch.Tensor) -> torch.Tensor:
        seen.append(x)
        return run(x)

    linear.run = watched  # type: ignore[method-assign]
    x = inputs(20, 16)
    linear(x)
    assert torch.equal(torch.cat(seen)[:20], x)
    assert not torch.cat(seen)[20:].any()
