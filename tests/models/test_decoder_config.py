"""DecoderConfig: what is read from a config.json, and what is refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import transformers

from serve_app.errors import ModelNotFoundError, UnsupportedModelError
from serve_app.models.decoder_config import ARCHITECTURES, DecoderConfig, RopeConfig, load_model_config

LLAMA_2_7B: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "max_position_embeddings": 4096,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 32,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "tie_word_embeddings": False,
    "torch_dtype": "float16",
    "vocab_size": 32000,
}


def config(architecture: str = "LlamaForCausalLM", **changes: Any) -> dict[str, Any]:
    """A small config; ``None`` is a null, ``...`` takes the key away."""
    base = {
        "architectures": [architecture],
        "vocab_size": 300,
        "hidden_size": 48,
        "intermediate_size": 80,
        "num_hidden_layers": 3,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
    }
    return {key: value for key, value in (base | changes).items() if value is not ...}


def test_llama_2_7b() -> None:
    model = DecoderConfig.from_hf(LLAMA_2_7B)
    assert model.bytes_per_token_and_layer(2) == 16 * 1024
    assert (model.head_dim, model.num_layers, model.max_model_len, model.dtype) == (128, 32, 4096, "float16")
    assert model.rope == RopeConfig(theta=10_000.0)
    assert model.sliding_window == (0,) * 32
    assert model.eos_token_ids == (2,)
    assert not any((model.qkv_bias, model.o_bias, model.mlp_bias, model.qk_norm, model.tie_word_embeddings))


@pytest.mark.parametrize(
    ("architecture", "changes", "biases_and_norm"),
    [
        ("LlamaForCausalLM", {}, (False, False, False, False)),
        ("LlamaForCausalLM", {"attention_bias": True}, (True, True, False, False)),
        ("LlamaForCausalLM", {"mlp_bias": True}, (False, False, True, False)),
        ("MistralForCausalLM", {"attention_bias": False}, (False, False, False, False)),
        ("Qwen2ForCausalLM", {}, (True, False, False, False)),
        ("Qwen3ForCausalLM", {}, (False, False, False, True)),
        ("Qwen3ForCausalLM", {"attention_bias": True}, (True, True, False, True)),
    ],
)
def test_biases_and_qk_norm(architecture: str, changes: dict[str, Any], biases_and_norm: tuple[bool, ...]) -> None:
    model = DecoderConfig.from_hf(config(architecture, **changes))
    assert (model.qkv_bias, model.o_bias, model.mlp_bias, model.qk_norm) == biases_and_norm


@pytest.mark.parametrize(
    ("architecture", "changes", "windows"),
    [
        ("LlamaForCausalLM", {"sliding_window": 9}, (0, 0, 0)),
        ("MistralForCausalLM", {"sliding_window": 9}, (9, 9, 9)),
        ("MistralForCausalLM", {"sliding_window": None}, (0, 0, 0)),
        ("MistralForCausalLM", {}, (4096, 4096, 4096)),
        ("Qwen2ForCausalLM", {"sliding_window": 9}, (0, 0, 0)),
        ("Qwen2ForCausalLM", {"sliding_window": 9, "use_sliding_window": True}, (0, 0, 0)),
        ("Qwen2ForCausalLM", {"sliding_window": 9, "use_sliding_window": True, "max_window_layers": 1}, (0, 9, 9)),
        ("Qwen3ForCausalLM", {"sliding_window": 9, "use_sliding_window": True, "max_window_layers": 0}, (9, 9, 9)),
        (
            "Qwen3ForCausalLM",
            {
                "sliding_window": 9,
                "use_sliding_window": True,
                "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
            },
            (9, 0, 9),
        ),
    ],
)
def test_sliding_windows(architecture: str, changes: dict[str, Any], windows: tuple[int, ...]) -> None:
    assert DecoderConfig.from_hf(config(architecture, **changes)).sliding_window == windows


@pytest.mark.parametrize(
    ("architecture", "changes", "head_dim"),
    [
        ("LlamaForCausalLM", {}, 8),
        ("LlamaForCausalLM", {"head_dim": None}, 8),
        ("LlamaForCausalLM", {"head_dim": 24}, 24),
        ("Qwen2ForCausalLM", {}, 8),
        ("Qwen3ForCausalLM", {}, 128),
        ("Qwen3ForCausalLM", {"head_dim": 16}, 16),
    ],
)
def test_head_dim(architecture: str, changes: dict[str, Any], head_dim: int) -> None:
    assert DecoderConfig.from_hf(config(architecture, **changes)).head_dim == head_dim


def test_num_kv_heads_of_old_configs() -> None:
    assert DecoderConfig.from_hf(config(num_key_value_heads=...)).num_kv_heads == 6
    assert DecoderConfig.from_hf(config("Qwen2ForCausalLM", num_key_value_heads=None)).num_kv_heads == 6
    with pytest.raises(UnsupportedModelError, match=r"config\.json has no num_key_value_heads"):
        DecoderConfig.from_hf(config("MistralForCausalLM", num_key_value_heads=...))


@pytest.mark.parametrize(
    ("changes", "rope"),
    [
        ({}, RopeConfig()),
        ({"rope_theta": 500_000}, RopeConfig(theta=500_000.0)),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}, RopeConfig(theta=1e6)),
        ({"rope_scaling": {"type": "linear", "factor": 4}, "rope_theta": 5e5}, RopeConfig("linear", 5e5, 4.0)),
        (
            {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 5e5}},
            RopeConfig("linear", 5e5, 4.0),
        ),
        # rope_scaling wins over rope_parameters, rope_type over type, an inner rope_theta over an outer one.
        (
            {
                "rope_parameters": {"rope_type": "default"},
                "rope_scaling": {"rope_type": "linear", "type": "dynamic", "factor": 2, "rope_theta": 7.0},
                "rope_theta": 8.0,
            },
            RopeConfig("linear", 7.0, 2.0),
        ),
        (
            {
                "rope_scaling": {
                    "rope_type": "llama3",
                    "factor": 8.0,
                    "low_freq_factor": 1.0,
                    "high_freq_factor": 4.0,
                    "original_max_position_embeddings": 128,
                }
            },
            RopeConfig("llama3", 10_000.0, 8.0, 128, 1.0, 4.0),
        ),
        (
            {
                "rope_scaling": {
                    "type": "yarn",
                    "factor": 4.0,
                    "original_max_position_embeddings": 128,
                    "finetuned": True,
                }
            },
            RopeConfig("yarn", 10_000.0, 4.0, 128),
        ),
        (
            {"rope_parameters": {"rope_type": "yarn", "factor": None, "beta_fast": 16, "truncate": False, "mscale": 2}}
            | {"original_max_position_embeddings": 64},
            RopeConfig("yarn", 10_000.0, 8.0, 64, beta_fast=16.0, mscale=2.0, truncate=False),
        ),
        ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, RopeConfig("yarn", 10_000.0, 4.0, 512)),
    ],
)
def test_rope_spellings(changes: dict[str, Any], rope: RopeConfig) -> None:
    assert DecoderConfig.from_hf(config(**changes)).rope == rope


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, ["GPT2LMHeadModel", *ARCHITECTURES]),
        ({"architectures": ...}, ["architectures is None", *ARCHITECTURES]),
        ({"quantization_config": {"quant_method": "awq", "bits": 4}}, ["quantization_config", "awq"]),
        ({"hidden_act": "gelu"}, ["hidden_act", "gelu", "silu"]),
        ({"per_layer_config": {"0": {}}}, ["per_layer_config"]),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, ["dynamic", "longest sequence of the batch"]),
        ({"rope_scaling": {"rope_type": "longrope", "factor": 2.0}}, ["longrope", "when the sequence grows"]),
        ({"rope_parameters": {"rope_type": "spiral"}}, ["spiral", "default, linear, llama3, yarn"]),
        ({"rope_scaling": {"rope_type": "default", "mrope_section": [8]}}, ["rope_scaling", "mrope_section"]),
        ({"rope_scaling": {"type": "linear"}}, ["no rope_scaling.factor"]),
        ({"rope_scaling": {"type": "linear", "factor": "2"}}, ["rope_scaling.factor is '2'"]),
        ({"rope_scaling": [1]}, ["rope_scaling is [1]"]),
        ({"rope_theta": 0}, ["rope_theta is 0"]),
        ({"rope_theta": 1}, ["rope_theta is 1", "above 1"]),
        ({"partial_rotary_factor": 0.5}, ["partial_rotary_factor is 0.5"]),
        (
            {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.25}},
            ["partial_rotary_factor is 0.25"],
        ),
        (
            {"rope_scaling": {"type": "llama3", "factor": 8, "low_freq_factor": 4, "high_freq_factor": 4}},
            ["high_freq_factor is 4", "above low_freq_factor (4)"],
        ),
        ({"vocab_size": ...}, ["no vocab_size"]),
        ({"hidden_size": -1}, ["hidden_size is -1", "at least 1"]),
        ({"num_hidden_layers": 2.0}, ["num_hidden_layers is 2.0"]),
        ({"num_attention_heads": True}, ["num_attention_heads is True"]),
        ({"num_key_value_heads": 4}, ["num_attention_heads is 6", "num_key_value_heads (4)"]),
        ({"hidden_size": 50}, ["hidden_size is 50", "num_attention_heads (6)"]),
        ({"head_dim": 9}, ["head_dim is 9", "even"]),
        ({"rms_norm_eps": float("nan")}, ["rms_norm_eps is nan"]),
        ({"tie_word_embeddings": "yes"}, ["tie_word_embeddings is 'yes'"]),
        ({"torch_dtype": "float64"}, ["torch_dtype is 'float64'", "bfloat16"]),
        ({"eos_token_id": [2, "x"]}, ["eos_token_id", "x"]),
        ({"architectures": ["MistralForCausalLM"], "sliding_window": 0}, ["sliding_window is 0"]),
        ({"architectures": ["MistralForCausalLM"], "attention_bias": True}, ["attention_bias", "Mistral"]),
        ({"architectures": ["Qwen2ForCausalLM"], "mlp_bias": True}, ["mlp_bias", "Qwen2"]),
        ({"architectures": ["Qwen3ForCausalLM"], "layer_types": ["full_attention"]}, ["layer_types", "3 layers"]),
        (
            {"architectures": ["Qwen3ForCausalLM"], "layer_types": ["full_attention", "sliding_attention", "mamba"]},
            ["layer_types", "mamba"],
        ),
        (
            {"architectures": ["Qwen3ForCausalLM"], "layer_types": ["sliding_attention"] * 3},
            ["sliding_attention", "no sliding_window is in force"],
        ),
        (
            {"architectures": ["MistralForCausalLM"], "layer_types": ["sliding_attention"] * 2 + ["full_attention"]},
            ["layer_types mixes windows"],
        ),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else None,
)
def test_refused_by_name(changes: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(UnsupportedModelError) as caught:
        DecoderConfig.from_hf(config(**changes))
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "generation_config", "eos"),
    [
        ({}, None, (2,)),
        ({"eos_token_id": None}, {}, ()),
        ({"eos_token_id": [7, 3, 7]}, {"eos_token_id": None}, (3, 7)),
        ({"eos_token_id": 5}, {"eos_token_id": [9, 8]}, (8, 9)),
        ({"eos_token_id": 5}, {"eos_token_id": 0}, (0,)),
    ],
)
def test_eos_ids(changes: dict[str, Any], generation_config: dict[str, Any] | None, eos: tuple[int, ...]) -> None:
    assert DecoderConfig.from_hf(config(**changes), generation_config).eos_token_ids == eos


@pytest.mark.parametrize(
    ("changes", "dtype"),
    [
        ({}, "float32"),
        ({"torch_dtype": "bfloat16"}, "bfloat16"),
        ({"dtype": "float16", "torch_dtype": "bfloat16"}, "float16"),
        ({"dtype": "torch.bfloat16"}, "bfloat16"),
    ],
)
def test_dtype(changes: dict[str, Any], dtype: str) -> None:
    assert DecoderConfig.from_hf(config(**changes)).dtype == dtype


@pytest.mark.parametrize("name", ["Llama", "Mistral", "Qwen2", "Qwen3"])
def test_reads_what_transformers_writes(name: str, tmp_path: Path) -> None:
    theirs = getattr(transformers, f"{name}Config")(
        vocab_size=301,
        hidden_size=48,
        intermediate_size=80,
        num_hidden_layers=3,
        num_attention_heads=6,
        num_key_value_heads=3,
        max_position_embeddings=777,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        head_dim=16,
        architectures=[f"{name}ForCausalLM"],
        rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 123.0},
        eos_token_id=11,
    )
    theirs.save_pretrained(tmp_path)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [12, 11]}))
    ours = load_model_config(tmp_path)
    assert ours.architecture == f"{name}ForCausalLM"
    for our_name, their_name in [
        ("num_layers", "num_hidden_layers"),
        ("num_heads", "num_attention_heads"),
        ("num_kv_heads", "num_key_value_heads"),
        ("max_model_len", "max_position_embeddings"),
        *((same, same) for same in ("vocab_size", "hidden_size", "intermediate_size", "head_dim", "rms_norm_eps")),
        ("tie_word_embeddings", "tie_word_embeddings"),
    ]:
        assert getattr(ours, our_name) == getattr(theirs, their_name), our_name
    assert ours.rope == RopeConfig("linear", 123.0, 2.0)
    assert ours.eos_token_ids == (11, 12)


def test_load_errors_name_the_directory_and_the_file(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFoundError, match="nowhere"):
        load_model_config(tmp_path / "nowhere")
    with pytest.raises(ModelNotFoundError, match=r"no config\.json"):
        load_model_config(tmp_path)
    (tmp_path / "config.json").write_text('{"architectures": [')
    with pytest.raises(ModelNotFoundError, match=r"config\.json is not valid JSON"):
        load_model_config(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(ModelNotFoundError, match="must hold an object"):
        load_model_config(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config()))
    assert load_model_config(tmp_path).vocab_size == 300
    (tmp_path / "generation_config.json").write_bytes(b"\xff\xfe")
    with pytest.raises(ModelNotFoundError, match=r"generation_config\.json"):
        load_model_config(tmp_path)
