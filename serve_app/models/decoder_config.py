"""DecoderConfig: what a Hugging Face config.json says of a decoder, checked. Knows names and numbers; no torch.

One table says how the supported architectures differ; the rest is reading fields. Whatever is not understood and would
change the numbers is refused by name here, before a byte of weights is read. How each key is read follows transformers
5.23 (configuration_utils.py, modeling_rope_utils.py, models/{llama,mistral,qwen2,qwen3}), so that the same config gives
the same model.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from serve_app.errors import ModelNotFoundError, UnsupportedModelError
from serve_app.models.model import ModelConfig
from serve_app.models.transformers_config import TransformersConfig, architecture_name


@dataclass(frozen=True)
class _Architecture:
    """What one architecture does where the others do something else."""

    qkv_bias: bool | None
    """Bias on q, k and v; None: the config's attention_bias decides, and then o has one too."""

    has_mlp_bias: bool
    """Reads the config's mlp_bias."""

    qk_norm: bool
    """RMS norm of every query and key head before rope."""

    window_rule: str
    """none; all (every layer has sliding_window); by_layer (use_sliding_window, max_window_layers, layer_types)."""

    default_eos: int | None
    """eos_token_id of a config that has no such key."""

    default_head_dim: int | None
    """head_dim of a config that has no such key; None: hidden_size / num_attention_heads."""


ARCHITECTURES: Mapping[str, _Architecture] = {
    "LlamaForCausalLM": _Architecture(None, True, False, "none", 2, None),
    "MistralForCausalLM": _Architecture(False, False, False, "all", 2, None),
    "Qwen2ForCausalLM": _Architecture(True, False, False, "by_layer", None, None),
    "Qwen3ForCausalLM": _Architecture(None, False, True, "by_layer", None, 128),
}

ROPE_TYPES = ("default", "linear", "llama3", "yarn")
DTYPES = ("float32", "bfloat16", "float16")

_ROPE_REFUSED = {
    "dynamic": "its frequencies depend on the longest sequence of the batch, so a token would change with its company",
    "longrope": "it switches between two sets of frequencies with the sequence's length, so a token that is already in "
    "the cache would change when the sequence grows",
}
_ROPE_KEYS = {
    "type", "rope_type", "rope_theta", "partial_rotary_factor", "factor", "original_max_position_embeddings",
    "low_freq_factor", "high_freq_factor", "attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim",
    "truncate", "finetuned",
}  # fmt: skip


@dataclass(frozen=True)
class RopeConfig:
    """Rotary embedding of one model. Fields that a rope_type does not read keep their defaults."""

    rope_type: str = "default"
    """One of ROPE_TYPES."""

    theta: float = 10_000.0
    """Base of the wavelengths."""

    factor: float = 1.0
    """By how much the context was stretched (linear, llama3, yarn)."""

    original_max_len: int = 0
    """Context of the pretraining, in tokens (llama3, yarn)."""

    low_freq_factor: float = 1.0
    """llama3: wavelengths above original_max_len / low_freq_factor are stretched whole."""

    high_freq_factor: float = 4.0
    """llama3: wavelengths below original_max_len / high_freq_factor stay."""

    attention_factor: float | None = None
    """yarn: cos and sin are multiplied by it. None: follows from factor, mscale and mscale_all_dim."""

    beta_fast: float = 32.0
    """yarn: dimensions that turn more often than this within original_max_len stay."""

    beta_slow: float = 1.0
    """yarn: dimensions that turn less often than this are stretched whole."""

    mscale: float | None = None
    mscale_all_dim: float | None = None

    truncate: bool = True
    """yarn: round the borders between the two kinds of dimension outwards to integers."""


@dataclass(frozen=True)
class DecoderConfig:
    """Everything that a decoder's forward needs to know beside its weights."""

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int

    head_dim: int
    """Even. num_heads * head_dim need not be hidden_size."""

    rms_norm_eps: float
    tie_word_embeddings: bool

    max_model_len: int
    """Tokens of context: the config's max_position_embeddings."""

    sliding_window: tuple[int, ...]
    """One per layer: position i sees j with i - window < j <= i; 0: all j <= i."""

    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    qk_norm: bool
    rope: RopeConfig

    dtype: str
    """What the checkpoint says of itself: float32, bfloat16 or float16; float32 where it is silent."""

    eos_token_ids: tuple[int, ...]
    """Ascending. generation_config.json wins over config.json. Empty: the model never ends by itself."""

    def bytes_per_token_and_layer(self, dtype_size: int) -> int:
        """Bytes of K and V that one token takes in one layer, for cache elements of ``dtype_size`` bytes.

        Llama-2-7B in 16 bits: 2 * 32 * 128 * 2 = 16 KiB.
        """
        return 2 * self.num_kv_heads * self.head_dim * dtype_size

    @classmethod
    def from_hf(cls, config: Mapping[str, Any], generation_config: Mapping[str, Any] | None = None) -> DecoderConfig:
        """From parsed config.json and generation_config.json. Raises UnsupportedModelError naming field and value."""
        name = _architecture_name(config)
        architecture = ARCHITECTURES[name]
        _refuse_what_changes_numbers(config, name, architecture)
        fields = _Fields(config)

        hidden_size = fields.integer("hidden_size")
        num_layers = fields.integer("num_hidden_layers")
        num_heads = fields.integer("num_attention_heads")
        # Configs older than grouped-query attention have no such key; only Llama's are that old.
        missing = num_heads if name == "LlamaForCausalLM" else None
        num_kv_heads = fields.integer("num_key_value_heads", default=missing, null=num_heads)
        if num_heads % num_kv_heads:
            raise UnsupportedModelError(
                f"num_attention_heads is {num_heads}; it must be a multiple of num_key_value_heads ({num_kv_heads})"
            )
        attention_bias = fields.boolean("attention_bias", default=False)
        return cls(
            architecture=name,
            vocab_size=fields.integer("vocab_size"),
            hidden_size=hidden_size,
            intermediate_size=fields.integer("intermediate_size"),
            num_layers=num_layers,
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=_head_dim(fields, architecture, hidden_size, num_heads),
            rms_norm_eps=fields.number("rms_norm_eps", default=1e-6),
            tie_word_embeddings=fields.boolean("tie_word_embeddings", default=False),
            max_model_len=fields.integer("max_position_embeddings"),
            sliding_window=_sliding_windows(fields, architecture, num_layers),
            qkv_bias=attention_bias if architecture.qkv_bias is None else architecture.qkv_bias,
            o_bias=attention_bias if architecture.qkv_bias is None else False,
            mlp_bias=fields.boolean("mlp_bias", default=False) if architecture.has_mlp_bias else False,
            qk_norm=architecture.qk_norm,
            rope=_rope(config),
            dtype=_dtype(config),
            eos_token_ids=_eos_token_ids(config, generation_config or {}, architecture.default_eos),
        )


IMPLEMENTATIONS = ("auto", "transformers")


def load_model_config(directory: str | Path, implementation: str = "auto") -> ModelConfig:
    """Read config.json and, where there is one, generation_config.json of a model directory.

    A DecoderConfig for ARCHITECTURES, a TransformersConfig for every other; ``implementation`` "transformers" asks for the
    latter in any case. Raises ModelNotFoundError (no directory, no config.json, not JSON) and UnsupportedModelError (see
    `from_hf` and `TransformersConfig.from_directory`).
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise ModelNotFoundError(f"model directory {str(directory)!r} does not exist")
    config = read_json(directory / "config.json")
    if config is None:
        raise ModelNotFoundError(f"{str(directory)!r} has no config.json; it must be a Hugging Face model directory")
    generation_config = read_json(directory / "generation_config.json")
    if implementation == "auto" and architecture_name(config) in ARCHITECTURES:
        return DecoderConfig.from_hf(config, generation_config)
    eos = _eos_token_ids(config, generation_config or {}, None)
    return TransformersConfig.from_directory(directory, config, dtype=_dtype(config), eos_token_ids=eos)


def read_json(path: Path) -> dict[str, Any] | None:
    """The object in a JSON file, or None if there is no such file. Raises ModelNotFoundError if it is not an object."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError) as error:
        raise ModelNotFoundError(f"{path} cannot be read: {error}") from error
    try:
        value = json.loads(text)
    except ValueError as error:
        raise ModelNotFoundError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise ModelNotFoundError(f"{path} holds a JSON {type(value).__name__}; it must hold an object")
    return value


class _Fields:
    """Typed reading of one JSON object. ``where`` is prefixed to the names in messages."""

    def __init__(self, values: Mapping[str, Any], where: str = "") -> None:
        self.values = values
        self.where = where

    def error(self, name: str, allowed: str) -> UnsupportedModelError:
        if name not in self.values:
            return UnsupportedModelError(f"config.json has no {self.where}{name}; it must be {allowed}")
        return UnsupportedModelError(f"{self.where}{name} is {self.values[name]!r}; it must be {allowed}")

    def integer(self, name: str, default: int | None = None, null: int | None = None) -> int:
        """An integer of at least 1. A missing key takes ``default``, a null value ``null``; None refuses either."""
        value = self.values.get(name, default)
        if value is None and name in self.values:
            value = null
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise self.error(name, "an integer of at least 1")
        return value

    def number(self, name: str, default: float | None = None) -> float:
        """A finite number above 0. A missing key takes ``default``."""
        value = self.values.get(name, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value <= 0:
            raise self.error(name, "a finite number above 0")
        return float(value)

    def optional_number(self, name: str) -> float | None:
        return None if self.values.get(name) is None else self.number(name)

    def boolean(self, name: str, default: bool) -> bool:
        value = self.values.get(name, default)
        if not isinstance(value, bool):
            raise self.error(name, "true or false")
        return value


def _architecture_name(config: Mapping[str, Any]) -> str:
    names = config.get("architectures")
    supported = f"supported are {', '.join(ARCHITECTURES)}"
    if not isinstance(names, list) or len(names) != 1:
        raise UnsupportedModelError(f"architectures is {names!r}; it must name exactly one: {supported}")
    if names[0] not in ARCHITECTURES:
        raise UnsupportedModelError(f"architecture {names[0]!r} is not supported; {supported}")
    return str(names[0])


def _refuse_what_changes_numbers(config: Mapping[str, Any], name: str, architecture: _Architecture) -> None:
    for key in ("quantization_config", "compression_config"):
        if config.get(key) is not None:
            quantization = config[key]
            method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization
            raise UnsupportedModelError(
                f"{key} asks for quantization {method!r}, which is not supported; supported are {', '.join(DTYPES)}"
            )
    if config.get("hidden_act", "silu") not in ("silu", "swish"):
        raise UnsupportedModelError(f"hidden_act is {config['hidden_act']!r}; it must be 'silu'")
    if config.get("per_layer_config") is not None:
        raise UnsupportedModelError("per_layer_config is set; layers that differ in size are not supported")
    if architecture.qkv_bias is False and config.get("attention_bias"):
        raise UnsupportedModelError(f"attention_bias is {config['attention_bias']!r}; {name} has no such biases")
    if not architecture.has_mlp_bias and config.get("mlp_bias"):
        raise UnsupportedModelError(f"mlp_bias is {config['mlp_bias']!r}; {name} has no such biases")


def _head_dim(fields: _Fields, architecture: _Architecture, hidden_size: int, num_heads: int) -> int:
    default = architecture.default_head_dim
    if fields.values.get("head_dim") is None and (default is None or "head_dim" in fields.values):
        if hidden_size % num_heads:
            raise UnsupportedModelError(
                f"hidden_size is {hidden_size}; without head_dim it must be a multiple of "
                f"num_attention_heads ({num_heads})"
            )
        head_dim = hidden_size // num_heads
    else:
        head_dim = fields.integer("head_dim", default=default)
    if head_dim % 2:
        raise UnsupportedModelError(f"head_dim is {head_dim}; it must be even, for rotary embeddings")
    return head_dim


def _sliding_windows(fields: _Fields, architecture: _Architecture, num_layers: int) -> tuple[int, ...]:
    """The window of each layer; a missing key has transformers' default (4096, off for Qwen)."""
    config = fields.values
    window = 0
    if architecture.window_rule == "all" or (
        architecture.window_rule == "by_layer" and fields.boolean("use_sliding_window", default=False)
    ):
        is_off = "sliding_window" in config and config["sliding_window"] is None
        window = 0 if is_off else fields.integer("sliding_window", default=4096)

    layer_types = config.get("layer_types")
    if layer_types is None:
        if architecture.window_rule != "by_layer" or not window:
            return (window,) * num_layers
        first = config.get("max_window_layers", 28)
        if isinstance(first, bool) or not isinstance(first, int) or first < 0:
            raise fields.error("max_window_layers", "an integer of at least 0")
        return tuple(window if i >= first else 0 for i in range(num_layers))

    if not isinstance(layer_types, list) or len(layer_types) != num_layers:
        raise fields.error("layer_types", f"a list with one entry for each of the {num_layers} layers")
    for layer_type in layer_types:
        if layer_type not in ("full_attention", "sliding_attention"):
            raise UnsupportedModelError(
                f"layer_types has {layer_type!r}; it may have 'full_attention' and 'sliding_attention'"
            )
    windows = tuple(window if layer_type == "sliding_attention" else 0 for layer_type in layer_types)
    if "sliding_attention" in layer_types and not window:
        raise UnsupportedModelError("layer_types has 'sliding_attention', but no sliding_window is in force")
    if architecture.window_rule == "all" and windows != (window,) * num_layers:
        raise UnsupportedModelError("layer_types mixes windows; in this architecture all layers have the same")
    return windows


def _rope(config: Mapping[str, Any]) -> RopeConfig:
    """Both spellings: ``rope_parameters`` with all in it, or ``rope_scaling`` (which wins) and ``rope_theta``."""
    key = "rope_scaling" if config.get("rope_scaling") else "rope_parameters"
    given = config.get(key) or {}
    if not isinstance(given, dict):
        raise UnsupportedModelError(f"{key} is {given!r}; it must be an object")
    unknown = sorted(set(given) - _ROPE_KEYS)
    if unknown:
        raise UnsupportedModelError(f"{key} has {unknown[0]!r}: {given[unknown[0]]!r}, which is not supported")
    values = {name: config[name] for name in ("rope_theta", "partial_rotary_factor") if name in config} | given
    fields = _Fields(values, where=f"{key}.")

    rope_type = values.get("rope_type", values.get("type", "default"))
    if rope_type in _ROPE_REFUSED:
        raise UnsupportedModelError(f"{key}: rope type {rope_type!r} is not supported: {_ROPE_REFUSED[rope_type]}")
    if rope_type not in ROPE_TYPES:
        raise UnsupportedModelError(
            f"{key}: rope type {rope_type!r} is not supported; known are {', '.join(ROPE_TYPES)}"
        )
    partial = values.get("partial_rotary_factor")
    if partial is not None and partial != 1:
        raise UnsupportedModelError(f"partial_rotary_factor is {partial!r}; only 1 is supported")

    theta = fields.number("rope_theta", default=10_000.0)
    if theta <= 1:
        raise fields.error("rope_theta", "above 1")
    if rope_type == "default":
        return RopeConfig(theta=theta)
    if rope_type == "linear":
        return RopeConfig(rope_type, theta, fields.number("factor"))

    # An outer original_max_position_embeddings wins over the inner one; without both, it is the model's own length.
    max_len = _Fields(config).integer("max_position_embeddings")
    original = _Fields(config if "original_max_position_embeddings" in config else values).integer(
        "original_max_position_embeddings", default=max_len
    )
    if rope_type == "llama3":
        low, high = fields.number("low_freq_factor"), fields.number("high_freq_factor")
        if high <= low:
            raise fields.error("high_freq_factor", f"above low_freq_factor ({low:g})")
        return RopeConfig(rope_type, theta, fields.number("factor"), original, low, high)
    is_ratio = "factor" in values and values["factor"] is None
    return RopeConfig(
        rope_type,
        theta,
        factor=max_len / original if is_ratio else fields.number("factor"),
        original_max_len=original,
        attention_factor=fields.optional_number("attention_factor"),
        beta_fast=fields.optional_number("beta_fast") or 32.0,
        beta_slow=fields.optional_number("beta_slow") or 1.0,
        mscale=fields.optional_number("mscale"),
        mscale_all_dim=fields.optional_number("mscale_all_dim"),
        truncate=fields.boolean("truncate", default=True),
    )


def _dtype(config: Mapping[str, Any]) -> str:
    key = "dtype" if config.get("dtype") is not None else "torch_dtype"
    value = config.get(key)
    name = "float32" if value is None else str(value).removeprefix("torch.")
    if name not in DTYPES:
        raise UnsupportedModelError(f"{key} is {value!r}; it must be one of {', '.join(DTYPES)}")
    return name


def _eos_token_ids(
    config: Mapping[str, Any], generation_config: Mapping[str, Any], default: int | None
) -> tuple[int, ...]:
    value = generation_config.get("eos_token_id")
    if value is None:
        value = config.get("eos_token_id", default)
    ids = [] if value is None else value if isinstance(value, list) else [value]
    for token_id in ids:
        if isinstance(token_id, bool) or not isinstance(token_id, int) or token_id < 0:
            raise UnsupportedModelError(f"eos_token_id is {value!r}; it must be a token id, a list of them, or null")
    return tuple(sorted(set(ids)))
