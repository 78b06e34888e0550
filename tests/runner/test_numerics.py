"""numerics: the proof sees planted layers whose bits depend on the number of rows, and says what may be used."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from serve_app.errors import DeterminismError
from serve_app.kernels import cpu, few_rows, reference
from serve_app.kernels.linear import ANY, Linear
from serve_app.runner import machine, numerics
from serve_app.runner.numerics import Proof, apply, provable_tiles, prove
from tests.tiny_models import make_tiny_model
from tests.tiny_runs import make_runner


class FakeLinear(Linear):
    """A library with several kernels: ``kernel_of(number of rows)`` names the one, and each rounds in its own way.

    Exact integers at heart, so that nothing but the plant can differ.
    """

    def __init__(self, kernel_of: Callable[[int], int], out: int = 3) -> None:
        super().__init__(torch.ones(out, 16), packed=False)
        self.kernel_of = kernel_of
        self.counts: list[int] = []

    def probe(self, num_rows: int) -> tuple[Linear, torch.Tensor]:
        return self, torch.randn(num_rows, 16, generator=torch.Generator().manual_seed(num_rows))

    def run(self, x: torch.Tensor) -> torch.Tensor:
        self.counts.append(x.shape[0])
        return x.sum(dim=1, dtype=torch.float64).float()[:, None].repeat(1, self.out_features) + float(
            self.kernel_of(x.shape[0])
        )


class PlaceLinear(FakeLinear):
    """The bits of a row depend on its place in the tile: no number of rows is good."""

    def run(self, x: torch.Tensor) -> torch.Tensor:
        return super().run(x) + torch.arange(x.shape[0])[:, None] % 4


def tiles_of(linear: Linear, max_rows: int = 512) -> tuple[int, ...] | None:
    return provable_tiles(*linear.probe(max(max_rows, 128) + 32), max_rows)


@pytest.mark.parametrize("max_rows", [1, 2, 17, 128, 512])
def test_any_count(max_rows: int) -> None:
    assert tiles_of(FakeLinear(lambda num: 0), max_rows) == (2, ANY)


def test_a_single_row_may_be_another_kernel() -> None:
    """Most libraries have a matrix-vector kernel: it is never used, a single row runs as two."""
    linear = FakeLinear(lambda num: int(num == 1))
    assert tiles_of(linear) == (2, ANY)
    linear.row_tiles = (2, ANY)
    x = torch.randn(5, 16)
    whole = linear(x)
    linear.counts.clear()
    assert torch.equal(linear(x[3:4]), whole[3:4])
    assert linear.counts == [2]


@pytest.mark.parametrize(
    ("kernel_of", "expected"),
    [
        (lambda num: num, (16,)),  # every count is another kernel: the smallest tile will do
        (lambda num: int(num % 32 == 0), (32, 64, 128)),
        (lambda num: 0 if num in (16, 64) else num, (16, 64)),
        (lambda num: int(num > 64), (16, 32, 64)),
        (lambda num: int(num < 17), None),
    ],
    ids=["all differ", "multiples of 32", "only two agree", "up to 64", "from 17 on"],
)
def test_only_tiles_agree(kernel_of: Callable[[int], int], expected: tuple[int, ...] | None) -> None:
    linear = FakeLinear(kernel_of)
    tiles = tiles_of(linear)
    assert tiles is not None
    assert tiles[-1] != ANY
    assert set(tiles) <= set(numerics.TILE_SIZES)
    assert len({kernel_of(tile) for tile in tiles}) == 1
    if expected is not None:
        assert tiles == expected
    linear.row_tiles = tiles
    x = torch.randn(300, 16)
    whole = linear(x)
    for start, end in ((0, 1), (5, 12), (100, 300), (17, 81)):
        assert torch.equal(linear(x[start:end]), whole[start:end])


@pytest.mark.parametrize("count", [3, 7, 17, 33, 100, 128])
def test_one_odd_count_is_found(count: int) -> None:
    """Of the counts most telling for a library's switches, none may go unseen."""
    tiles = tiles_of(FakeLinear(lambda num: int(num == count)))
    assert tiles is not None
    assert tiles[-1] != ANY
    assert count not in tiles or len(tiles) == 1


def test_nothing_agrees() -> None:
    assert tiles_of(PlaceLinear(lambda num: 0)) is None


def test_the_probe_shows_another_order_of_summation() -> None:
    """A sum in another order, then rounded to bfloat16: nearly invisible on random numbers, plain on the probe."""
    layer = Linear(torch.randn(96, 512).bfloat16(), packed=False)
    probe, x = layer.probe(40)
    assert probe.shape_key == layer.shape_key

    def differing(weight: torch.Tensor, rows: torch.Tensor) -> float:
        terms = (rows.float()[:, None, :] * weight.float()).numpy()
        straight = np.cumsum(terms, axis=2)[:, :, -1]  # in float32, one after the other
        halved = np.cumsum(terms[:, :, ::2], axis=2)[:, :, -1] + np.cumsum(terms[:, :, 1::2], axis=2)[:, :, -1]
        return float((torch.from_numpy(straight).bfloat16() != torch.from_numpy(halved).bfloat16()).float().mean())

    assert differing(probe._weight, x) > 0.9
    assert differing(layer._weight, torch.randn(40, 512).bfloat16()) < 0.01


def test_few_rows_only_where_they_give_the_librarys_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    """A planted difference in the last bit switches our product off for that shape."""
    layer = Linear(torch.randn(64, 128))
    if layer.panels is None:
        pytest.skip("the library's layout is not one that few_rows.py recognises on this processor")
    proof = proof_of([layer])
    assert proof.chain_depths[layer.shape_key] in (*few_rows.DEPTHS, 0)
    real = few_rows.product
    monkeypatch.setattr(few_rows, "product", lambda *given: torch.nextafter(real(*given), torch.tensor(9.0)))
    proof = proof_of([layer])
    assert proof.chain_depths[layer.shape_key] == 0
    apply(proof, [layer])
    monkeypatch.undo()
    calls: list[int] = []
    monkeypatch.setattr(few_rows, "product", lambda *given: calls.append(1))
    layer(torch.randn(2, 128))
    assert not calls


def proof_of(linears: list[Linear], ops: Any = cpu, head_dim: int = 16) -> Proof:
    return prove(linears, ops, 64, num_heads=4, num_kv_heads=2, head_dim=head_dim, dtype=torch.float32, block_size=16)


def test_one_layer_of_each_shape_is_probed() -> None:
    layers = [FakeLinear(lambda num: 0), FakeLinear(lambda num: 0), FakeLinear(lambda num: num, out=5)]
    proof = proof_of(list(layers))
    assert proof.failures == ()
    assert proof.uses_fixed_tiles
    assert [bool(layer.counts) for layer in layers] == [True, False, True]
    apply(proof, layers)
    assert [layer.row_tiles for layer in layers] == [(2, ANY), (2, ANY), (16,)]


def test_proving_changes_nothing() -> None:
    layer = FakeLinear(lambda num: num)
    proof_of([layer])
    assert layer.row_tiles == ()
    assert layer.num_padded_rows == 0


def test_failures_are_named() -> None:
    good, bad = FakeLinear(lambda num: 0), PlaceLinear(lambda num: 0, out=7)
    proof = proof_of([good, bad])
    assert proof.failures == ("products of shape 16 x 7 in float32",)
    with pytest.raises(DeterminismError, match="bits depend on the batch in products of shape 16 x 7 in float32"):
        apply(proof, [good, bad])
    assert good.row_tiles == ()  # nothing was half done


class CompanyAttention:
    """Attention that is off by a bit as soon as a second sequence runs."""

    def __init__(self, ops: Any) -> None:
        self.ops = ops

    def ragged_attention(
        self, q_NHD: torch.Tensor, k: torch.Tensor, v: torch.Tensor, metadata: Any, **rest: Any
    ) -> torch.Tensor:
        out: torch.Tensor = self.ops.ragged_attention(q_NHD, k, v, metadata, **rest)
        return out if metadata.num_seqs == 1 else torch.nextafter(out, out + 1)


def test_attention_is_probed() -> None:
    assert proof_of([], CompanyAttention(cpu)).failures == ("attention",)
    assert proof_of([], cpu).failures == ()
    assert proof_of([], cpu, head_dim=112).failures == ()


# ---- what the runner makes of it ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("model"))


def _fail(monkeypatch: pytest.MonkeyPatch, dtypes: tuple[torch.dtype, ...] = (torch.float32,)) -> None:
    real = numerics.provable_tiles

    def refuse(linear: Linear, *rest: Any) -> tuple[int, ...] | None:
        return None if linear.dtype in dtypes else real(linear, *rest)

    monkeypatch.setattr(numerics, "provable_tiles", refuse)


def test_asked_for_by_name_it_must_hold(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _fail(monkeypatch)
    with pytest.raises(
        DeterminismError, match=r"deterministic mode cannot be had on this machine: .* products of shape"
    ):
        make_runner(directory, deterministic=True)


def test_by_default_it_warns_and_goes_on(
    directory: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    _fail(monkeypatch)
    with caplog.at_level("WARNING"):
        runner = make_runner(directory)
    assert not runner.deterministic
    assert all(linear.row_tiles == () for linear in runner.model.linears)
    assert "fast mode: tokens may depend on the batch" in caplog.text
    assert ", fast," in runner.describe()[0]


def test_switched_off_nothing_is_proved(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unexpected(*arguments: Any, **options: Any) -> Proof:
        raise AssertionError("proved")

    monkeypatch.setattr(numerics, "prove", unexpected)
    assert not make_runner(directory, deterministic=False).deterministic


def test_fixed_tiles_are_told(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(numerics, "provable_tiles", lambda linear, *rest: (16,))
    runner = make_runner(directory, deterministic=True)
    assert runner.deterministic
    assert "deterministic (products in fixed tiles of rows)" in runner.describe()[0]
    assert {linear.row_tiles for linear in runner.model.linears} == {(16,)}


def test_an_automatic_dtype_gives_way(directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A bfloat16 checkpoint on a processor with fast bfloat16 whose products depend on the batch: float32 instead."""
    model = make_tiny_model(tmp_path, dtype=torch.bfloat16)
    monkeypatch.setattr(machine, "has_amx", lambda: True)
    _fail(monkeypatch, (torch.bfloat16,))
    runner = make_runner(model, dtype="auto")
    assert runner.dtype == torch.float32
    assert runner.deterministic
    with pytest.raises(DeterminismError):
        make_runner(model, dtype="bfloat16", deterministic=True)
    assert make_runner(model, dtype="auto", deterministic=False).dtype == torch.bfloat16
    monkeypatch.setattr(machine, "has_amx", lambda: False)
    assert make_runner(model, dtype="auto").dtype == torch.float32
    assert make_runner(directory, dtype="auto").dtype == torch.float32


def test_reference_ops_serve_the_same_probe() -> None:
    """The oracle computes a row by itself: it is invariant, so the probe itself must not be what differs."""
    assert numerics._attention_is_invariant(reference, 1, 1, 2, torch.float32, 64)  # type: ignore[arg-type]
