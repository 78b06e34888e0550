"""The parts that we put into models of transformers: each gives what the part it stands for gives, row by row."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch import nn
from torch.nn import functional
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
from transformers.models.mixtral.modeling_mixtral import MixtralExperts
from transformers.models.phi3.modeling_phi3 import Phi3RMSNorm, Phi3RotaryEmbedding
from transformers.pytorch_utils import Conv1D

from serve_app.kernels import ops
from serve_app.models.transformers_parts import (
    EXPERTS,
    PIECE,
    RotaryTable,
    RowActivation,
    RowLinear,
    RowNorm,
    RowWeight,
    put_in,
    register_experts,
)
from tests.tiny_models import OTHERS

CPU = ops.select("cpu")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def test_linears_of_both_kinds_become_ours() -> None:
    conv = Conv1D(5, 32)
    nn.init.normal_(conv.bias)
    model = nn.ModuleDict({"linear": nn.Linear(32, 7), "conv": conv, "embedding": nn.Embedding(9, 32)})
    x = torch.randn(2, 3, 32)
    expected = {name: model[name](x) for name in ("linear", "conv")}
    linears = put_in(model, CPU, torch.device("cpu"), 8)
    assert [linear.out_features for linear in linears] == [7, 5]
    for name, y in expected.items():
        assert isinstance(model[name], RowLinear)
        torch.testing.assert_close(model[name](x), y)
    assert [name for name, _ in model.named_parameters()] == ["embedding.weight"]


def test_a_bare_weight_is_a_product_for_functional_linear_alone() -> None:
    weight = RowWeight.of(torch.randn(5, 32), CPU)
    calls = []
    linear = weight.linear
    weight.linear = lambda x: calls.append(x.shape) or linear(x)  # type: ignore[assignment,func-returns-value]
    x = torch.randn(2, 3, 32)
    torch.testing.assert_close(functional.linear(x, weight), x @ weight.detach().T)
    assert calls == [(6, 32)]
    torch.testing.assert_close(weight.sum(), weight.detach().sum())
    assert calls == [(6, 32)]


@pytest.mark.parametrize("norm_class", [Gemma2RMSNorm, Phi3RMSNorm])
def test_rms_norms_are_known_by_what_they_give(norm_class: Any) -> None:
    norm = norm_class(48, eps=1e-6)
    nn.init.normal_(norm.weight)
    ours = RowNorm.like(norm, CPU)
    assert ours is not None
    x = torch.randn(2, 5, 48)
    torch.testing.assert_close(ours(x), norm(x))


def test_other_norms_stay() -> None:
    narrow, plain = Phi3RMSNorm(24), nn.LayerNorm(48, bias=False)
    nn.init.normal_(plain.weight)
    assert RowNorm.like(narrow, CPU) is None  # no multiple of 16
    assert RowNorm.like(plain, CPU) is None  # it takes the mean off
    gemma = Gemma2RMSNorm(48).to(torch.bfloat16)
    nn.init.normal_(gemma.weight, std=0.01)
    assert RowNorm.like(gemma, CPU) is None  # 1 + weight has no exact value in bfloat16


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("function", [nn.SiLU(), nn.GELU("tanh"), nn.GELU(), nn.Sigmoid(), nn.Softplus()])
def test_activations_depend_on_the_value_alone(function: nn.Module, dtype: torch.dtype) -> None:
    """In any place of a batch of any size; with more than one piece, and rows that fill no vector."""
    ours = RowActivation(function)
    x = torch.randn(PIECE // 75 + 60, 75).to(dtype)
    whole = ours(x)
    assert whole.shape == x.shape
    torch.testing.assert_close(whole, function(x))
    for start, stop in ((0, 1), (3, 10), (1, 228), (5, len(x))):
        assert torch.equal(ours(x[None, start:stop])[0], whole[start:stop])
    assert torch.equal(ours(x[:, :50]), whole[:, :50])


def test_positions_are_looked_up_and_the_length_chooses_the_frequencies() -> None:
    config = transformers.Phi3Config(hidden_size=64, num_attention_heads=4, pad_token_id=0, **OTHERS["Phi3ForCausalLM"])
    x = torch.randn(1, 3, 64)
    positions = torch.tensor([[5, 99, 5]])
    short, long = (RotaryTable(Phi3RotaryEmbedding(config), length) for length in (128, 129))
    for ours, reaches in ((short, 128), (long, 300)):
        every = torch.arange(reaches)[None]
        cos, sin = Phi3RotaryEmbedding(config)(x, every)
        found = ours(x, positions)
        torch.testing.assert_close(found[0], cos[:, positions[0]])
        torch.testing.assert_close(found[1], sin[:, positions[0]])
    assert not torch.equal(short(x, positions)[0], long(x, positions)[0])


def test_experts_give_a_row_the_same_in_any_company() -> None:
    config = transformers.MixtralConfig(hidden_size=32, intermediate_size=24, num_local_experts=5)
    experts = MixtralExperts(config)
    for parameter in experts.parameters():
        nn.init.normal_(parameter, std=0.3)
    x = torch.randn(40, 32)
    chosen = torch.stack([torch.randperm(4)[:2] for _ in range(40)])  # the last expert has no row
    weights = torch.rand(40, 2)
    config._experts_implementation = "eager"
    expected = experts(x, chosen, weights)
    register_experts()
    config._experts_implementation = EXPERTS
    linears = put_in(nn.ModuleDict({"experts": experts}), CPU, torch.device("cpu"), 8)
    assert len(linears) == 10
    assert list(experts.parameters()) == []
    whole = experts(x, chosen, weights)
    torch.testing.assert_close(whole, expected)
    for linear in linears:
        linear.row_tiles = (16,)  # type: ignore[attr-defined]
    whole = experts(x, chosen, weights)
    for rows in ([7], [3, 30, 8], list(range(11, 40))):
        assert torch.equal(experts(x[rows], chosen[rows], weights[rows]), whole[rows])
