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


OTHERS: dict[str, dict[str, Any]] = {
    # Windows in two layers of three, both soft-caps low enough to bite, a scale that is not head_dim's.
    "Gemma2ForCausalLM": {
        "num_hidden_layers": 3,
        "head_dim": 32,
        "sliding_window": 13,
        "query_pre_attn_scalar": 20,
        "attn_logit_softcapping": 3.0,
        "final_logit_softcapping": 4.0,
    },
    # Two rotary embeddings, norms on queries and keys.
    "Gemma3ForCausalLM": {
        "num_hidden_layers": 3,
        "head_dim": 16,
        "sliding_window": 19,
        "query_pre_attn_scalar": 24,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
            "full_attention": {"rope_type": "linear", "rope_theta": 100_000.0, "factor": 4.0},
        },
    },
    # longrope over three quarters of a head; a window in every layer.
    "Phi3ForCausalLM": {
        "max_position_embeddings": 512,
        "original_max_position_embeddings": 128,
        "sliding_window": 40,
        "rope_parameters": {
            "rope_type": "longrope",
            "rope_theta": 10_000.0,
            "partial_rotary_factor": 0.75,
            "short_factor": [1.0, 1.1, 1.2, 1.3, 1.5, 1.7],
            "long_factor": [1.0, 2.0, 3.0, 5.0, 9.0, 17.0],
        },
    },
    # Half of a head turns; attention and MLP side by side.
    "GPTNeoXForCausalLM": {
        "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0, "partial_rotary_factor": 0.5},
    },
    # Learned positions with an offset; embeddings narrower than the model.
    "OPTForCausalLM": {"ffn_dim": 80, "word_embed_proj_dim": 32, "do_layer_norm_before": True},
    # Experts in one layer, a plain MLP in the other.
    "Qwen3MoeForCausalLM": {
        "head_dim": 16,
        "num_experts": 5,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 24,
        "mlp_only_layers": [1],
        "norm_topk_prob": True,
    },
    # Four multipliers of its own.
    "GraniteForCausalLM": {
        "attention_multiplier": 0.2,
        "logits_scaling": 3.0,
        "embedding_multiplier": 2.0,
        "residual_multiplier": 0.5,
    },
    # Rotary pairs next to each other, norms without bias, logits scaled.
    "CohereForCausalLM": {"logit_scale": 0.3, "use_qk_norm": True},
}
"""Architectures that run through transformers, with changes of their configs that make the most of what is odd in each."""


def make_other_model(directory: Path, architecture: str, *, seed: int = 0, **changes: Any) -> Path:
    """A random model of any architecture of transformers, with the tokenizer of `make_tiny_model`; no eos.

    ``changes``: of the config; without any, those of OTHERS. Weights follow from seed.
    """
    directory.mkdir(parents=True, exist_ok=True)
    vocab_size = 307
    _write_tokenizer(directory, vocab_size)
    model_class = getattr(transformers, architecture)
    common = {
        "vocab_size": vocab_size,
        "hidden_size": 64,
        "intermediate_size": 80,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
        "tie_word_embeddings": False,
    }
    config = model_class.config_class(**{**common, **(changes or OTHERS.get(architecture, {}))})
    model = model_class(config)
    _randomize(model, seed)
    model.generation_config = GenerationConfig()
    model.save_pretrained(directory)
    return directory


@torch.no_grad()
def greedy_margins(model: Any, prompt_ids: Sequence[int], output_ids: Sequence[int]) -> list[float]:
    """By how much each output token loses against the best one (0: it is the best), by one forward without a cache.

    If all are 0, the output is the greedy one, token by token: every position is judged on the same tokens before it.
    (transformers' own caches with windows are another path through its code; this is the model itself.)
    """
    tokens = torch.tensor([[*prompt_ids, *output_ids]])
    logits = model(input_ids=tokens, use_cache=False).logits[0, len(prompt_ids) - 1 : -1]
    chosen = logits.gather(1, torch.tensor(output_ids)[:, None])[:, 0]
    return (logits.max(dim=1).values - chosen).tolist()


def load_reference(directory: Path, **changes: Any) -> Any:
    """transformers' model in float32 with its eager attention. ``changes``: of its config."""
    config = transformers.AutoConfig.from_pretrained(directory)
    for name, value in changes.items():
        setattr(config, name, value)
    load = AutoModelForCausalLM.from_pretrained
    return load(directory, config=config, dtype=torch.float32, attn_implementation="eager").eval()


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
        if name.endswith("norm.weight") or (parameter.ndim == 1 and not name.endswith("bias")):
            parameter.normal_(1.0, 0.2, generator=generator)
        elif name.endswith("bias"):
            parameter.normal_(0.0, 0.3, generator=generator)
        elif "embed" in name or name.endswith(
            "wte.weight"
        ):  # small beside what the layers add: a tied head would repeat its input
            parameter.normal_(0.0, 0.1, generator=generator)
        elif "lm_head" in name or name.startswith("embed_out"):
            parameter.normal_(0.0, 0.2, generator=generator)
        else:
            parameter.normal_(0.0, 1.5 / math.sqrt(parameter.shape[-1]), generator=generator)


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
