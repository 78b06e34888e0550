"""The tiny models: varied output, equal for equal seeds, and files that our own readers take to the last tensor."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from serve_app.models.decoder_config import ARCHITECTURES, RopeConfig, load_model_config
from serve_app.models.weights import EMBEDDING, HEAD, WeightLoader, weights_fingerprint
from tests.tiny_models import IM_END, SPECIAL_TOKENS, make_tiny_model, reference_greedy


@pytest.mark.parametrize("tie", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_greedy_output_is_varied_and_clear(architecture: str, tie: bool, tmp_path: Path) -> None:
    directory = make_tiny_model(tmp_path / "model", architecture, tie=tie, seed=1)
    token_ids, margins = reference_greedy(directory, [5, 80, 299], 30, eos=())
    assert len(token_ids) == len(margins) == 30
    assert len(set(token_ids)) >= 10
    assert min(margins) >= 0.0
    assert sum(margin > 1e-3 for margin in margins) >= 28


def test_eos_ends_and_can_be_ignored(tmp_path: Path) -> None:
    free, _ = reference_greedy(make_tiny_model(tmp_path / "none", eos=()), [1, 2, 3], 12)
    assert len(free) == 12
    eos = free[4]
    expected = free[: free.index(eos) + 1]
    directory = make_tiny_model(tmp_path / "model", eos=(eos, 306))
    assert load_model_config(directory).eos_token_ids == tuple(sorted((eos, 306)))
    assert reference_greedy(directory, [1, 2, 3], 12)[0] == expected
    assert reference_greedy(directory, [1, 2, 3], 12, eos=())[0] == free
    assert reference_greedy(directory, [1, 2, 3], 12, eos=(free[0],))[0] == free[:1]


def test_equal_seeds_make_equal_weights(tmp_path: Path) -> None:
    prints = [weights_fingerprint(make_tiny_model(tmp_path / str(i), seed=seed)) for i, seed in enumerate((0, 0, 1))]
    assert prints[0] == prints[1] != prints[2]


@pytest.mark.parametrize(
    ("architecture", "options", "windows"),
    [
        ("LlamaForCausalLM", {}, (0, 0, 0)),
        ("MistralForCausalLM", {"sliding_window": 7}, (7, 7, 7)),
        ("Qwen2ForCausalLM", {"sliding_window": 7}, (0, 7, 7)),
        ("Qwen3ForCausalLM", {"sliding_window": 7}, (0, 7, 7)),
    ],
)
def test_sliding_window_is_read_and_matters(
    architecture: str, options: dict[str, Any], windows: tuple[int, ...], tmp_path: Path
) -> None:
    directory = make_tiny_model(tmp_path / "model", architecture, layers=3, **options)
    assert load_model_config(directory).sliding_window == windows
    if any(windows):
        plain = make_tiny_model(tmp_path / "plain", architecture, layers=3)
        prompt = list(range(20))
        assert reference_greedy(directory, prompt, 8)[0] != reference_greedy(plain, prompt, 8)[0]


@pytest.mark.parametrize(
    ("architecture", "options"),
    [
        ("LlamaForCausalLM", {"attention_bias": True, "mlp_bias": True, "shards": 3}),
        ("MistralForCausalLM", {"tie": True, "dtype": torch.bfloat16}),
        ("Qwen2ForCausalLM", {"vocab_size": 259, "rope": {"rope_type": "linear", "factor": 2.0}}),
        ("Qwen3ForCausalLM", {"tie": True, "head_dim": 18, "heads": 6, "kv_heads": 3, "shards": 2}),
    ],
)
def test_our_readers_take_every_tensor(architecture: str, options: dict[str, Any], tmp_path: Path) -> None:
    directory = make_tiny_model(tmp_path, architecture, **options)
    config = load_model_config(directory)
    assert config.architecture == architecture
    assert config.dtype == str(options.get("dtype", torch.float32)).removeprefix("torch.")
    assert config.rope == (RopeConfig("linear", factor=2.0) if "rope" in options else RopeConfig())
    assert (directory / "model.safetensors.index.json").exists() == ("shards" in options)

    hidden, q, kv = (
        config.hidden_size,
        config.num_heads * config.head_dim,
        config.num_kv_heads * config.head_dim,
    )
    shapes: dict[str, tuple[int, ...]] = {EMBEDDING: (config.vocab_size, hidden), "model.norm.weight": (hidden,)}
    if not config.tie_word_embeddings:
        shapes[HEAD] = (config.vocab_size, hidden)
    for i in range(config.num_layers):
        layer = f"model.layers.{i}"
        for norm in ("input_layernorm", "post_attention_layernorm"):
            shapes[f"{layer}.{norm}.weight"] = (hidden,)
        for name, rows, columns, has_bias in (
            ("self_attn.q_proj", q, hidden, config.qkv_bias),
            ("self_attn.k_proj", kv, hidden, config.qkv_bias),
            ("self_attn.v_proj", kv, hidden, config.qkv_bias),
            ("self_attn.o_proj", hidden, q, config.o_bias),
            ("mlp.gate_proj", config.intermediate_size, hidden, config.mlp_bias),
            ("mlp.up_proj", config.intermediate_size, hidden, config.mlp_bias),
            ("mlp.down_proj", hidden, config.intermediate_size, config.mlp_bias),
        ):
            shapes[f"{layer}.{name}.weight"] = (rows, columns)
            if has_bias:
                shapes[f"{layer}.{name}.bias"] = (rows,)
        if config.qk_norm:
            shapes[f"{layer}.self_attn.q_norm.weight"] = (config.head_dim,)
            shapes[f"{layer}.self_attn.k_norm.weight"] = (config.head_dim,)
    loader = WeightLoader(directory, tie_word_embeddings=config.tie_word_embeddings)
    for name, shape in shapes.items():
        assert loader.take(name, shape, torch.float32).isfinite().all()
    loader.finish()


def test_tokenizer_and_template(tmp_path: Path) -> None:
    directory = make_tiny_model(tmp_path)
    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    assert tokenizer.get_vocab_size() == 300
    text = "the quick <|im_end|> naïve 🦊\n"
    ids = tokenizer.encode(text).ids
    assert tokenizer.decode(ids, skip_special_tokens=False) == text
    assert len(ids) < len(text.encode())  # merges and special tokens were used
    assert [tokenizer.token_to_id(token) for token in SPECIAL_TOKENS] == [297, 298, 299]
    assert json.loads((directory / "generation_config.json").read_text())["eos_token_id"] == [298]

    theirs = AutoTokenizer.from_pretrained(directory)
    messages = [{"role": "user", "content": "hi"}]
    shown = theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert shown == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    assert theirs.eos_token == IM_END
    assert theirs(text)["input_ids"] == ids


def test_vocabulary_too_small_for_bytes(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="vocab_size is 258"):
        make_tiny_model(tmp_path, vocab_size=258)
