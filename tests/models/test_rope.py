"""rope_table against transformers' own rotary embedding, for every supported type."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from serve_app.models.decoder_config import ROPE_TYPES, DecoderConfig, RopeConfig
from serve_app.models.rope import rope_frequencies, rope_table

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}
ROPES: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default", "rope_theta": 500_000.0},
    "linear": {"rope_type": "linear", "factor": 3.0},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 128,
    },
    "yarn": YARN,
    "yarn-no-truncate": {**YARN, "truncate": False, "beta_fast": 20.0, "beta_slow": 2.0},
    "yarn-attention-factor": {**YARN, "attention_factor": 1.25},
    "yarn-mscale": {**YARN, "mscale": 1.5, "mscale_all_dim": 0.7},
    "yarn-mscale-alone": {**YARN, "mscale": 1.5},
    "yarn-null-factor": {**YARN, "factor": None, "original_max_position_embeddings": 64},
    "yarn-short": {**YARN, "original_max_position_embeddings": 3},
}


@pytest.mark.parametrize("head_dim", [2, 18, 64])
@pytest.mark.parametrize("rope", ROPES.values(), ids=ROPES)
def test_equals_transformers(rope: dict[str, Any], head_dim: int) -> None:
    theirs = LlamaConfig(
        vocab_size=300,
        hidden_size=head_dim * 3,
        intermediate_size=80,
        num_hidden_layers=1,
        num_attention_heads=3,
        num_key_value_heads=1,
        max_position_embeddings=512,
        rope_parameters={"rope_theta": 10_000.0, **rope},
        architectures=["LlamaForCausalLM"],
    )
    ours = DecoderConfig.from_hf(theirs.to_dict())
    assert ours.rope.rope_type == rope["rope_type"]

    embedding = LlamaRotaryEmbedding(theirs)
    inv_freq, factor = rope_frequencies(ours.rope, head_dim)
    assert torch.equal(inv_freq, embedding.inv_freq)
    assert factor == embedding.attention_scaling

    cos, sin = embedding(torch.zeros(1), torch.arange(333)[None])
    table = rope_table(ours.rope, head_dim, 333)
    assert table.shape == (333, head_dim)
    assert table.dtype == torch.float32
    torch.testing.assert_close(table[:, : head_dim // 2], cos[0, :, : head_dim // 2], rtol=0, atol=1e-6)
    torch.testing.assert_close(table[:, head_dim // 2 :], sin[0, :, : head_dim // 2], rtol=0, atol=1e-6)


def test_every_type_is_compared_and_differs_from_default() -> None:
    assert {rope["rope_type"] for rope in ROPES.values()} == set(ROPE_TYPES)
    assert set(ROPE_TYPES) - {"default"} <= set(ROPE_INIT_FUNCTIONS)
    plain, _ = rope_frequencies(RopeConfig(), 64)
    for rope in (
        RopeConfig("linear", factor=2.0),
        RopeConfig("llama3", factor=8.0, original_max_len=128),
        RopeConfig("yarn", factor=4.0, original_max_len=128),
    ):
        assert not torch.allclose(rope_frequencies(rope, 64)[0], plain)


def test_docstring_example() -> None:
    row = rope_table(RopeConfig(), 4, 3)[2]
    expected = torch.tensor([math.cos(2), math.cos(0.02), math.sin(2), math.sin(0.02)])
    torch.testing.assert_close(row, expected, rtol=0, atol=1e-7)
