"""Small tokenizers of each kind a model may come with, trained here: tests need no download."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from serve_app.text import tokenizer as text_tokenizer

TEXTS = [
    "the quick brown fox jumps over the lazy dog. don't they say so? I'm sure it's fine , they 're right !",
    "Straße über Öl, naïve café, 東京は日本の首都です。 emoji 😀 👍🏽 👩‍👩‍👧 and € signs",
    "  leading spaces,\ttabs\nand new lines\n\n\nfor x in range(10): print(x ** 2)",
    "hello world, hello there, other hello; ab abc abcd bc STOP END </s> stop",
]
SPECIAL = ["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"]
PLAIN_ADDED = "<tool>"
"""An added token that is not special: it stays in the text."""


def byte_level_bpe() -> Tokenizer:
    """As GPT-2, Llama 3, Qwen. A post-processor adds <s>."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=340, special_tokens=SPECIAL, initial_alphabet=sorted(alphabet), show_progress=False
    )
    return _finish(tokenizer, trainer)


def metaspace_bpe() -> Tokenizer:
    """As Llama 2 and Mistral: sentencepiece BPE with byte fallback, spaces as U+2581, one leading space dropped."""
    trained = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    trained.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    byte_tokens = [f"<0x{byte:02X}>" for byte in range(256)]
    # A small alphabet, so that most of what is not ASCII falls back to bytes.
    trainer = trainers.BpeTrainer(
        vocab_size=420, limit_alphabet=45, special_tokens=[*SPECIAL, *byte_tokens], show_progress=False
    )
    trained.train_from_iterator(TEXTS, trainer)
    # Byte tokens belong to the model, not to the added ones; training can only ask for them as special.
    data = json.loads(trained.to_str())
    data["added_tokens"] = [token for token in data["added_tokens"] if token["content"] not in byte_tokens]
    tokenizer = Tokenizer.from_str(json.dumps(data))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return _finish(tokenizer, None)


def metaspace_unigram() -> Tokenizer:
    """As T5 and XLM-R."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=200, special_tokens=SPECIAL, unk_token="<unk>", show_progress=False, shrinking_factor=0.75
    )
    return _finish(tokenizer, trainer)


def wordpiece() -> Tokenizer:
    """As BERT: "##" joins, the decoder puts the spaces and tidies them."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece(prefix="##", cleanup=True)
    return _finish(tokenizer, trainers.WordPieceTrainer(vocab_size=260, special_tokens=SPECIAL, show_progress=False))


def suffix_bpe() -> Tokenizer:
    """As the first GPT: words end in </w>, and only a following token makes a space of it."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", end_of_word_suffix="</w>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.decoder = decoders.BPEDecoder("</w>")
    trainer = trainers.BpeTrainer(
        vocab_size=220, special_tokens=SPECIAL, end_of_word_suffix="</w>", show_progress=False
    )
    return _finish(tokenizer, trainer)


MAKERS = {maker.__name__: maker for maker in (byte_level_bpe, metaspace_bpe, metaspace_unigram, wordpiece, suffix_bpe)}


@functools.cache
def tokenizer_json(kind: str) -> str:
    """The tokenizer.json of one kind, trained once."""
    text: str = MAKERS[kind]().to_str()
    return text


@functools.cache
def made(kind: str) -> text_tokenizer.Tokenizer:
    return text_tokenizer.Tokenizer(Tokenizer.from_str(tokenizer_json(kind)))


def byte_ids(tokenizer: text_tokenizer.Tokenizer, data: bytes) -> list[int]:
    """One token per byte, whatever the bytes are. For the kinds that have such tokens."""
    if tokenizer.byte_fallback_ids:
        names = [f"<0x{byte:02X}>" for byte in data]
    else:
        names = [byte_level_names()[byte] for byte in data]
    ids = [tokenizer.token_to_id(name) for name in names]
    return [token_id for token_id in ids if token_id is not None]


@functools.cache
def byte_level_names() -> dict[int, str]:
    """GPT-2's table: printable bytes stand for themselves, the others for the characters from U+0100 on."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}


@st.composite
def some_ids(draw: st.DrawFn, tokenizer: text_tokenizer.Tokenizer, max_pieces: int = 12) -> list[int]:
    """Random ids (a few past the vocabulary, as a padded model may give), real text, raw bytes and halves of characters."""
    pieces = draw(st.lists(st.sampled_from(["id", "text", "bytes", "char", "special"]), max_size=max_pieces))
    ids: list[int] = []
    for piece in pieces:
        if piece == "id":
            ids += draw(st.lists(st.integers(0, tokenizer.vocab_size + 3), max_size=6))
        elif piece == "text":
            ids += tokenizer.encode(draw(st.sampled_from(TEXTS)), add_special_tokens=False)[: draw(st.integers(1, 30))]
        elif piece == "special":
            ids += [draw(st.sampled_from(sorted(tokenizer.special_ids)))]
        elif tokenizer.byte_fallback_ids or tokenizer.token_to_id("Ġ") is not None:
            data = draw(st.binary(max_size=5)) if piece == "bytes" else draw(st.characters(codec="utf-8")).encode()
            ids += byte_ids(tokenizer, data)[: draw(st.integers(1, 5))]
    return ids


def write_directory(
    path: Path, kind: str = "byte_level_bpe", config: dict[str, Any] | None = None, **files: str | dict[str, Any]
) -> Path:
    """A model directory with tokenizer.json, tokenizer_config.json and ``files`` (name, dots as __ -> text or JSON)."""
    path.mkdir(parents=True, exist_ok=True)
    (path / "tokenizer.json").write_text(tokenizer_json(kind), encoding="utf-8")
    named = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    files = {"tokenizer_config__json": {**named, **(config or {})}, **files}
    for name, content in files.items():
        text = content if isinstance(content, str) else json.dumps(content)
        (path / name.replace("__", ".")).write_text(text, encoding="utf-8")
    return path


def _finish(tokenizer: Tokenizer, trainer: Any) -> Tokenizer:
    if trainer is not None:
        tokenizer.train_from_iterator(TEXTS, trainer)
    tokenizer.add_tokens([AddedToken(PLAIN_ADDED, normalized=False)])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
    )
    return tokenizer
