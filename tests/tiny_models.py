"""Tiny random models in Hugging Face's own files, and what transformers answers for them. No tests, no network.

Their weights are large enough that greedy output wanders through the vocabulary instead of settling on one token, and
norms and biases are random too, so that a model which forgets one of them gives other tokens.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, GenerationConfig

IM_START, IM_END, END_OF_TEXT = SPECIAL_TOKENS = ("<|im_start|>", "<|im_end|>", "<|endoftext|>")
NUM_BYTES = 256
TOKENIZER_SIZE = 300
"""Ids of the tokenizer: 256 bytes, some merges, then the special tokens, which come last."""

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_CORPUS = ["the quick brown fox jumps over the lazy dog", "system user assistant", "on and on, in the end of it all"]


def make_tiny_model(
    directory: Path,
    architecture: str = "LlamaForCausalLM",
    *,
    seed: int = 0,
    vocab_size: int = 307,
    hidden_size: int = 48,
    intermediate_size: int = 80,
    layers: int = 2,
    heads: int = 4,
    kv_heads: int = 2,
    head_dim: int = 16,
    max_len: int = 512,
    rope: Mapping[str, Any] | None = None,
    tie: bool = False,
    sliding_window: int = 0,
    eos: Sequence[int] | None = None,
    dtype: torch.dtype = torch.float32,
    shards: int = 1,
    **config_changes: Any,
) -> Path:
    """Write config, weights, tokenizer and chat template of a random model into ``directory`` and return it.

    ``rope``: rope_parameters in transformers' spelling. ``sliding_window``: every layer of Mistral; in Qwen2 and Qwen3
    every layer but the first. ``eos``: None is the tokenizer's <|im_end|>, () none. ``shards``: at least so many files.
    ``config_changes``: further fields of the config, as attention_bias=True. Ids past the tokenizer's are legal outputs
    that decode to nothing. vocab_size is at least 259 (bytes and special tokens).
    """
    if vocab_size < NUM_BYTES + len(SPECIAL_TOKENS):
        raise ValueError(f"vocab_size is {vocab_size}; it must be at least {NUM_BYTES + len(SPECIAL_TOKENS)}")
    if sliding_window and not architecture.startswith(("Mistral", "Qwen")):
        raise ValueError(f"{architecture} has no sliding window")
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer = _write_tokenizer(directory, vocab_size)
    eos_ids = [tokenizer.token_to_id(IM_END)] if eos is None else list(eos)

    changes = dict(config_changes)
    if architecture.startswith("Mistral"):
        changes["sliding_window"] = sliding_window or None
    elif sliding_window:
        changes |= {"use_sliding_window": True, "sliding_window": sliding_window, "max_window_layers": 1}
    config_class = getattr(transformers, architecture.removesuffix("ForCausalLM") + "Config")
    config = config_class(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        max_position_embeddings=max_len,
        rope_parameters={"rope_theta": 10_000.0, **(rope or {"rope_type": "default"})},
        tie_word_embeddings=tie,
        bos_token_id=None,
        eos_token_id=eos_ids or None,
        pad_token_id=None,
        **changes,
    )
    model = getattr(transformers, architecture)(config)
    _randomize(model, seed)
    model.to(dtype)
    model.generation_config = GenerationConfig(eos_token_id=eos_ids or None)
    num_bytes = sum(parameter.nbytes for parameter in model.parameters())
    model.save_pretrained(directory, max_shard_size=math.ceil(num_bytes / shards) if shards > 1 else "1GB")
    assert len(list(directory.glob("*.safetensors"))) >= shards
    return directory


def reference_greedy(
    directory: Path, prompt_ids: Sequence[int], max_new_tokens: int, *, eos: Sequence[int] | None = None
) -> tuple[list[int], list[float]]:
    """Greedy tokens of transformers' ``generate``, this prompt alone, in float32, and how clear each choice was.

    Returns the new token ids (an eos that ended them included) and for each the margin between the best two logits: a
    comparison may ask for equal tokens up to the first margin that rounding could turn. ``eos``: None is the model's
    own, () none.
    """
    weights = max(path.stat().st_mtime_ns for path in directory.glob("*.safetensors"))
    model, own_eos = _load(directory, weights)
    eos_ids = own_eos if eos is None else list(eos)
    prompt = torch.tensor([list(prompt_ids)])
    # generate() fills what is None here from the model's own generation_config, so that one is emptied in _load.
    output = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        generation_config=GenerationConfig(
            max_new_tokens=max_new_tokens,
            do_sample=False,
            eos_token_id=eos_ids or None,
            pad_token_id=0,
            output_logits=True,
            return_dict_in_generate=True,
        ),
    )
    best_two = torch.cat(output.logits).topk(2).values
    return output.sequences[0, len(prompt_ids) :].tolist(), (best_two[:, 0] - best_two[:, 1]).tolist()


@functools.lru_cache(maxsize=4)
def _load(directory: Path, weights_version: int) -> tuple[Any, list[int]]:
    """The model in float32 and its eos ids. ``weights_version``: so that a rewritten directory is loaded anew."""
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, attn_implementation="eager").eval()
    own_eos = model.generation_config.eos_token_id
    model.generation_config = GenerationConfig()
    model.config.eos_token_id = None
    return model, own_eos if isinstance(own_eos, list) else [] if own_eos is None else [own_eos]


@torch.no_grad()
def _randomize(model: torch.nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if name.endswith("norm.weight"):
            parameter.normal_(1.0, 0.2, generator=generator)
        elif name.endswith("bias"):
            parameter.normal_(0.0, 0.3, generator=generator)
        elif "embed_tokens" in name:  # small beside what the layers add: a tied head would repeat its input
            parameter.normal_(0.0, 0.1, generator=generator)
        elif "lm_head" in name:
            parameter.normal_(0.0, 0.2, generator=generator)
        else:
            parameter.normal_(0.0, 1.5 / math.sqrt(parameter.shape[1]), generator=generator)


def _write_tokenizer(directory: Path, vocab_size: int) -> Tokenizer:
    """A byte-level BPE with a few merges: tokenizer.json and tokenizer_config.json."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=min(vocab_size, TOKENIZER_SIZE) - len(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_CORPUS, trainer)
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    tokenizer.save(str(directory / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": IM_END,
        "pad_token": END_OF_TEXT,
        "chat_template": CHAT_TEMPLATE,
        "clean_up_tokenization_spaces": False,
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(settings, indent=1))
    return tokenizer
