"""The dry run of transformers' models: what it reads off them, and what it refuses by name before there are weights."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from serve_app.errors import ModelNotFoundError, UnsupportedModelError
from serve_app.models import transformers_config
from serve_app.models.decoder_config import load_model_config
from serve_app.models.transformers_config import TransformersConfig, window_of
from tests.tiny_models import OTHERS

COMMON: dict[str, Any] = {
    **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id")),
    "vocab_size": 307,
    "hidden_size": 64,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}


def write_config(directory: Path, architecture: str, **changes: Any) -> Path:
    """A config.json and nothing else."""
    model_class = getattr(transformers, architecture)
    config = model_class.config_class(**{**COMMON, **changes})
    config.architectures = [architecture]
    config.save_pretrained(directory)
    return directory


def read(directory: Path) -> TransformersConfig:
    config = load_model_config(directory)
    assert isinstance(config, TransformersConfig)
    return config


@pytest.mark.parametrize(
    ("architecture", "scales", "windows", "soft_caps"),
    [
        ("Gemma2ForCausalLM", 20**-0.5, (13, 0, 13), 3.0),
        ("Gemma3ForCausalLM", 24**-0.5, (19, 0, 19), 0.0),
        ("Phi3ForCausalLM", 0.25, (40, 40), 0.0),
        ("GPTNeoXForCausalLM", 0.25, (0, 0), 0.0),
        ("OPTForCausalLM", 1.0, (0, 0), 0.0),  # it scales its queries itself
        ("Qwen3MoeForCausalLM", 0.25, (0, 0), 0.0),
        ("GraniteForCausalLM", 0.2, (0, 0), 0.0),
        ("CohereForCausalLM", 0.25, (0, 0), 0.0),
    ],
)
def test_what_each_layer_does_is_seen(
    architecture: str, scales: float, windows: tuple[int, ...], soft_caps: float, tmp_path: Path
) -> None:
    config = read(write_config(tmp_path, architecture, **OTHERS[architecture]))
    assert config.architecture == architecture
    assert [layer.sliding_window for layer in config.layers] == list(windows)
    assert {layer.scale for layer in config.layers} == {scales}
    assert {layer.soft_cap for layer in config.layers} == {soft_caps}
    assert config.num_layers == len(windows)
    assert (config.num_heads, config.vocab_size, config.max_model_len) == (4, 307, 512)
    assert config.num_kv_heads == (4 if architecture in ("GPTNeoXForCausalLM", "OPTForCausalLM") else 2)
    assert config.head_dim == OTHERS[architecture].get("head_dim", 16)


REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "state-space": ("MambaForCausalLM", {}, "state-space"),
    "hybrid": ("JambaForCausalLM", {}, "state-space"),
    "latent attention": ("DeepseekV3ForCausalLM", {}, "latent attention"),
    "ALiBi by name": ("BloomForCausalLM", {}, "ALiBi"),
    "ALiBi by key": ("FalconForCausalLM", {"alibi": True}, "ALiBi"),
    "sinks": ("GptOssForCausalLM", {}, "attention sinks"),
    "no interface": ("GPTJForCausalLM", {}, "does not go through the interface"),
    "own rotary loop": ("FalconForCausalLM", {}, "does not go through the interface"),
    "shared keys": ("Gemma3nForCausalLM", {}, "share their keys and values"),
    "chunks": ("Llama4ForCausalLM", {}, "chunked"),
    "both directions": ("Gemma3ForCausalLM", {"head_dim": 16, "use_bidirectional_attention": True}, "is not causal"),
    "dynamic rope": (
        "GraniteForCausalLM",
        {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
        "'dynamic'",
    ),
    "an encoder": ("BertLMHeadModel", {}, "is not causal"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_run_is_refused_by_name(case: str, tmp_path: Path) -> None:
    """There are no weights: the message must come before one is looked for."""
    architecture, changes, words = REFUSED[case]
    directory = write_config(tmp_path, architecture, **changes)
    with pytest.raises(UnsupportedModelError) as caught:
        load_model_config(directory)
    message = str(caught.value)
    assert architecture in message
    assert words in message
    assert "What runs: decoder-only models" in message


def test_encoder_decoders_and_strangers_are_refused(tmp_path: Path) -> None:
    write_config(tmp_path, "T5ForConditionalGeneration")
    with pytest.raises(
        UnsupportedModelError, match="'T5ForConditionalGeneration' is not supported: it is an encoder-dec"
    ):
        load_model_config(tmp_path)
    config = json.loads((write_config(tmp_path, "GraniteForCausalLM") / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "architectures": ["GraniteForSomething"]}))
    with pytest.raises(UnsupportedModelError, match="none of transformers' causal language models"):
        load_model_config(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({**config, "model_type": "no_such_type"}))
    with pytest.raises(UnsupportedModelError, match="transformers cannot read its config"):
        load_model_config(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "gptq"}}))
    with pytest.raises(UnsupportedModelError, match="quantised weights"):
        load_model_config(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(ModelNotFoundError):
        load_model_config(tmp_path)


def test_without_the_package_the_message_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = write_config(tmp_path, "GraniteForCausalLM")
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(UnsupportedModelError, match=r"pip install 'ragged-serve\[transformers\]'"):
        load_model_config(directory)


@pytest.mark.parametrize("window", [0, 1, 2, 13, 4096, 5000, 131_072])
def test_windows_are_found(window: int) -> None:
    assert window_of(lambda i, j: j <= i and (not window or j > i - window)) == window


@pytest.mark.parametrize(
    "sees",
    [
        lambda i, j: True,  # both directions
        lambda i, j: j <= i and i // 8192 == j // 8192,  # chunks
        lambda i, j: j <= i and i // 8000 == j // 8000,
        lambda i, j: j <= i and (j > i - 64 or j < 4),  # a window and the first tokens
        lambda i, j: j <= i + 1,
        lambda i, j: j < i,
        lambda i, j: j <= i and (i - j) % 2 == 0,
    ],
)
def test_other_masks_are_refused(sees: Callable[[int, int], bool]) -> None:
    with pytest.raises(UnsupportedModelError, match="no sliding window"):
        window_of(sees)


def test_an_argument_that_we_would_ignore_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record = transformers_config._record

    def with_bias(*args: Any, **named: Any) -> Any:
        return record(*args, **named, position_bias=torch.ones(1))

    monkeypatch.setattr(transformers_config, "_record", with_bias)
    with pytest.raises(UnsupportedModelError, match="layer 0 gives its attention the argument 'position_bias'"):
        load_model_config(write_config(tmp_path, "GraniteForCausalLM"))


def test_layers_of_other_shapes_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record = transformers_config._record

    def with_fewer_heads(
        module: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *rest: Any, **named: Any
    ) -> Any:
        num = 1 if module.layer_idx else 2
        return record(module, q, k[:, :num], v[:, :num], *rest, **named)

    monkeypatch.setattr(transformers_config, "_record", with_fewer_heads)
    with pytest.raises(
        UnsupportedModelError, match=r"layer 1 has .* = \(4, 1, 16, 16\) where layer 0 has \(4, 2, 16, 16\)"
    ):
        load_model_config(write_config(tmp_path, "GraniteForCausalLM"))
