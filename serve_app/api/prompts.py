"""Prompts as the model sees them: texts and token ids become token ids. Knows the tokenizer; knows no request model.

Encoding takes time in proportion to the text: keep long ones off an event loop.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from serve_app.errors import InvalidPromptError
from serve_app.text.tokenizer import Tokenizer


class EncodedPrompt(NamedTuple):
    """One prompt as the model sees it."""

    token_ids: tuple[int, ...]
    text: str | None
    """None if it came as token ids."""


def encode_prompts(
    prompts: Sequence[str | list[int]], tokenizer: Tokenizer, name: str, *, add_special_tokens: bool
) -> list[EncodedPrompt]:
    """Texts, or token ids, which are taken as they are. ``name``: of one, for errors. Raises InvalidPromptError."""
    encoded = []
    for i, prompt in enumerate(prompts):
        text = prompt if isinstance(prompt, str) else None
        ids = tokenizer.encode(prompt, add_special_tokens) if isinstance(prompt, str) else prompt
        if not ids:
            raise InvalidPromptError(f"{name} {i} has 0 tokens; at least 1 is needed")
        encoded.append(EncodedPrompt(tuple(ids), text))
    return encoded


def encode_chat(text: str, tokenizer: Tokenizer, *, add_special_tokens: bool) -> EncodedPrompt:
    """What a chat template made: it has written bos itself, if the model wants one. Raises InvalidPromptError."""
    ids = tokenizer.encode(text, add_special_tokens)
    if not ids:
        raise InvalidPromptError("the chat template made a prompt of 0 tokens; at least 1 is needed")
    return EncodedPrompt(tuple(ids), text)
