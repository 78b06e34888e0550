"""Rotary position embeddings: a RopeConfig -> one table of cos and sin. Knows the formulas; knows no model, no layer.

    pair i of a head (dims i and i + D/2) at position p turns by the angle p * inv_freq[i]
    row p of the table:  [ cos(p * inv_freq) ... | sin(p * inv_freq) ... ] * attention factor
                           ^ 0 .. D/2               ^ D/2 .. D

Shape suffixes: D head dim. Formulas and their order of operations are those of transformers 5.23
(modeling_rope_utils.py, LlamaRotaryEmbedding), so that the float32 values agree.
"""

from __future__ import annotations

import math

import torch

from serve_app.models.decoder_config import RopeConfig


def rope_table(rope: RopeConfig, head_dim: int, max_len: int) -> torch.Tensor:
    """float32 [max_len, head_dim] on the CPU: cos in the first half, sin in the second, attention factor folded in.

    Example: theta 10000, head_dim 4 has inv_freq (1, 0.01); row 2 is (cos 2, cos 0.02, sin 2, sin 0.02).
    """
    inv_freq, attention_factor = rope_frequencies(rope, head_dim)
    angles = torch.arange(max_len, dtype=torch.float32)[:, None] * inv_freq
    return torch.cat((angles.cos(), angles.sin()), dim=-1) * attention_factor


def rope_frequencies(rope: RopeConfig, head_dim: int) -> tuple[torch.Tensor, float]:
    """Angular frequencies in radians a token, float32 [head_dim / 2], and the factor on cos and sin."""
    powers = rope.theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
    if rope.rope_type == "default":
        return 1.0 / powers, 1.0
    if rope.rope_type == "linear":  # position interpolation, arXiv 2306.15595
        return 1.0 / powers / rope.factor, 1.0
    if rope.rope_type == "llama3":
        return _llama3(rope, 1.0 / powers), 1.0
    if rope.rope_type == "yarn":
        return _yarn(rope, powers, head_dim), _yarn_attention_factor(rope)
    raise AssertionError(f"rope type {rope.rope_type!r}: RopeConfig lets none such through")


def _llama3(rope: RopeConfig, inv_freq: torch.Tensor) -> torch.Tensor:
    """Llama 3.1: short wavelengths stay, long ones are stretched by factor, those between are blended."""
    wavelength = 2 * math.pi / inv_freq
    stretched = torch.where(wavelength > rope.original_max_len / rope.low_freq_factor, inv_freq / rope.factor, inv_freq)
    smooth = (rope.original_max_len / wavelength - rope.low_freq_factor) / (
        rope.high_freq_factor - rope.low_freq_factor
    )
    blended = (1 - smooth) * stretched / rope.factor + smooth * stretched
    is_short = wavelength < rope.original_max_len / rope.high_freq_factor
    is_long = wavelength > rope.original_max_len / rope.low_freq_factor
    return torch.where(~is_short & ~is_long, blended, stretched)


def _yarn(rope: RopeConfig, powers: torch.Tensor, head_dim: int) -> torch.Tensor:
    """YaRN, arXiv 2309.00071, section 3.2: a ramp over the dimensions between keeping and stretching."""

    def dimension_that_turns(rotations: float) -> float:
        """The (fractional) dimension that makes so many turns within the original context."""
        return head_dim * math.log(rope.original_max_len / (rotations * 2 * math.pi)) / (2 * math.log(rope.theta))

    low, high = dimension_that_turns(rope.beta_fast), dimension_that_turns(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    if low == high:
        high += 0.001  # a step, without dividing by zero
    ramp = torch.clamp((torch.arange(head_dim // 2, dtype=torch.float32) - low) / (high - low), 0, 1)
    kept = 1 - ramp
    return 1.0 / (rope.factor * powers) * (1 - kept) + 1.0 / powers * kept


def _yarn_attention_factor(rope: RopeConfig) -> float:
    """YaRN, section 3.4: temperature of the attention, folded into q and k through cos and sin."""

    def scale(mscale: float) -> float:
        return 1.0 if rope.factor <= 1 else 0.1 * mscale * math.log(rope.factor) + 1.0

    if rope.attention_factor is not None:
        return rope.attention_factor
    if rope.mscale and rope.mscale_all_dim:
        return scale(rope.mscale) / scale(rope.mscale_all_dim)
    return scale(1.0)
