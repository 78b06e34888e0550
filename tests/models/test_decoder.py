"""The decoder over the GPU's kernels, interpreted where there is no GPU, and over the oracle: one step of a ragged batch.

What transformers answers on the same weights is tests/runner/test_model_runner.py's and tests/test_exactness.py's.
"""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch

from serve_app.kernels import ops
from serve_app.kernels.metadata import AttentionMetadata
from serve_app.models.decoder import Decoder
from serve_app.models.decoder_config import DecoderConfig, RopeConfig
from serve_app.models.weights import DummyWeights
from tests.kernels.rounding import DEVICE

BLOCK_SIZE, NUM_BLOCKS, MAX_LEN = 16, 8, 64
HEADS, KV_HEADS, HEAD_DIM = 4, 2, 64


class Span(NamedTuple):
    """What one sequence computes in the step: positions [start, end). Before ``start`` lies what is in the cache."""

    blocks: list[int]
    start: int
    end: int


SPANS = [Span([3], 0, 7), Span([6, 1], 20, 21), Span([5, 2], 13, 18), Span([4], 0, 1)]
LOGITS_INDICES = torch.tensor([6, 7, 12, 13], device=DEVICE)


def make_decoder(name: str, *, qk_norm: bool, bias: bool = False) -> Decoder:
    config = DecoderConfig(
        architecture="Qwen3ForCausalLM",
        vocab_size=107,
        hidden_size=96,
        intermediate_size=75,
        num_layers=1,
        num_heads=HEADS,
        num_kv_heads=KV_HEADS,
        head_dim=HEAD_DIM,
        max_model_len=MAX_LEN,
        rms_norm_eps=1e-6,
        rope=RopeConfig(),
        sliding_window=(0,),
        qkv_bias=bias,
        o_bias=bias,
        mlp_bias=bias,
        qk_norm=qk_norm,
        tie_word_embeddings=False,
        dtype="float32",
        eos_token_ids=(),
    )
    return Decoder(config, DummyWeights(seed=3, std=0.2), ops.select(name), torch.float32, MAX_LEN, DEVICE)


def make_metadata() -> AttentionMetadata:
    places = [(span, position) for span in SPANS for position in range(span.start, span.end)]
    slots = [span.blocks[p // BLOCK_SIZE] * BLOCK_SIZE + p % BLOCK_SIZE for span, p in places]
    lens = [span.end - span.start for span in SPANS]
    return AttentionMetadata(
        cu_seqlens_q=torch.tensor([0, *lens]).cumsum(0).int().to(DEVICE),
        seq_lens=torch.tensor([span.end for span in SPANS]).int().to(DEVICE),
        block_tables=torch.tensor([span.blocks + [0] * (2 - len(span.blocks)) for span in SPANS]).int().to(DEVICE),
        slot_mapping=torch.tensor(slots).int().to(DEVICE),
        positions=torch.tensor([position for _, position in places]).int().to(DEVICE),
        max_query_len=max(lens),
        max_seq_len=max(span.end for span in SPANS),
    )


def make_cache(seed: int) -> torch.Tensor:
    """[num_blocks, block_size, K, D] over a GPU's storage: NaN but for what earlier steps have left."""
    cache = torch.full((NUM_BLOCKS, KV_HEADS, BLOCK_SIZE, HEAD_DIM), torch.nan, device=DEVICE).transpose(1, 2)
    generator = torch.Generator().manual_seed(seed)
    for span in SPANS:
        for p in range(span.start):
            row = torch.randn(KV_HEADS, HEAD_DIM, generator=generator)
            cache[span.blocks[p // BLOCK_SIZE], p % BLOCK_SIZE] = row
    return cache


def step(decoder: Decoder, logits_indices: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logits, and both caches after the step."""
    metadata = make_metadata()
    input_ids = torch.arange(metadata.num_tokens, device=DEVICE) * 37 % 107
    k, v = make_cache(1), make_cache(2)
    with torch.inference_mode():
        return decoder.forward(input_ids, metadata, logits_indices, [k], [v]), k, v


@pytest.mark.parametrize("deterministic", [True, False], ids=["own products", "library's products"])
@pytest.mark.parametrize(("qk_norm", "bias"), [(True, False), (False, True)], ids=["qk norm", "bias"])
def test_interpreted_kernels_equal_the_oracle(qk_norm: bool, bias: bool, deterministic: bool) -> None:
    decoder = make_decoder("cuda", qk_norm=qk_norm, bias=bias)
    for linear in decoder.linears:
        linear.deterministic = deterministic
    logits, k, v = step(decoder, LOGITS_INDICES)
    expected, expected_k, expected_v = step(make_decoder("reference", qk_norm=qk_norm, bias=bias), LOGITS_INDICES)
    assert logits.shape == (len(SPANS), 107)
    assert expected.std() > 0.5
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=2e-5)
    assert expected_k.isnan().any()
    torch.testing.assert_close((k, v), (expected_k, expected_v), rtol=1e-5, atol=1e-5, equal_nan=True)


def test_a_step_that_samples_nothing_fills_the_cache_all_the_same() -> None:
    logits, k, v = step(make_decoder("cuda", qk_norm=True), torch.empty(0, dtype=torch.long, device=DEVICE))
    _, expected_k, expected_v = step(make_decoder("reference", qk_norm=True), LOGITS_INDICES)
    assert logits.shape == (0, 107)
    torch.testing.assert_close((k, v), (expected_k, expected_v), rtol=1e-5, atol=1e-5, equal_nan=True)
