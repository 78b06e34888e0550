"""Detokenizers: the text of a growing list of token ids. Know tokens and characters; know no request.

The sum of all that is given out equals decoding everything in one go, and what was given out never changes. Neither the
``DecodeStream`` of the `tokenizers` package nor a plain prefix comparison holds that: with byte fallback a stray byte
turns the *whole* run of byte tokens around it into U+FFFD, also the characters that looked whole before. (DecodeStream
raises "Invalid prefix encountered" there, and has no end of stream that gives out a half character.)

ByteDetokenizer     where a token is its bytes and nothing around it matters (Llama 3, Qwen, GPT-2): UTF-8, byte by byte
WindowDetokenizer   all others

The idea of a short window of tokens, decoded again for each new one, is that of Hugging Face text-generation-inference
(``prefix_offset`` and ``read_offset``) and of vLLM's detokenizer.

    window     [ c c c c | t t t ]     c: tokens kept as context, so that the first t is decoded as what it is,
    text         <------->             a word in the middle of a text
    _shown       <--------->?          ?: at most one U+FFFD is held back, it may be a character not yet whole
"""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Sequence
from typing import Protocol

from serve_app.text.tokenizer import Tokenizer

NUM_CONTEXT_TOKENS = 4
"""Tokens left of what is new. A UTF-8 character has at most 4 bytes and a token at least one, so a character that has
not ended begins inside these. Decoders that treat the first token in a way of its own need one."""

MAX_WINDOW_TOKENS = 6
"""Length at which the window is cut back to its context. Bounds the cost of a token, whatever the tokens are."""

REPLACEMENT = "\ufffd"


class Detokenizer(Protocol):
    """Turns the token ids of one choice into text."""

    def push(self, token_ids: Iterable[int]) -> str:
        """Takes the next tokens and returns the text that became final: it never changes, whatever comes after."""
        ...

    def flush(self) -> str:
        """Ends the text: returns what was still held back, an unfinished character as U+FFFD."""
        ...


def make_detokenizer(
    tokenizer: Tokenizer,
    prompt_token_ids: Sequence[int] = (),
    skip_special_tokens: bool = True,
    shown_special_ids: frozenset[int] = frozenset(),
) -> Detokenizer:
    """Without a prompt the text is that of the output alone: ``tokenizer.decode(output)``. With ``prompt_token_ids`` the
    output is read as going on from the prompt: ``decode(prompt + output)`` without what it has in common with
    ``decode(prompt)``. The difference is the space before a first word, which sentencepiece drops at the start of a text:
    a completion wants it kept, a chat answer does not.

    ``skip_special_tokens`` leaves special tokens out, but for ``shown_special_ids``: those that open a tool call.
    """
    if tokenizer.is_byte_level and not _ends_inside_character(tokenizer, prompt_token_ids, skip_special_tokens):
        return ByteDetokenizer(tokenizer, skip_special_tokens, shown_special_ids)
    return WindowDetokenizer(tokenizer, prompt_token_ids, skip_special_tokens, shown_special_ids)


class ByteDetokenizer:
    """See `make_detokenizer`. Held back: a character that may become whole. Cost per token: its bytes."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        skip_special_tokens: bool = True,
        shown_special_ids: frozenset[int] = frozenset(),
    ) -> None:
        self._token_bytes = tokenizer.token_bytes
        self._skipped_ids = tokenizer.special_ids - shown_special_ids if skip_special_tokens else frozenset()
        self._decode = codecs.getincrementaldecoder("utf-8")(errors="replace").decode

    def push(self, token_ids: Iterable[int]) -> str:
        skipped, token_bytes = self._skipped_ids, self._token_bytes
        return self._decode(b"".join([token_bytes(i) for i in token_ids if i not in skipped]))

    def flush(self) -> str:
        return self._decode(b"", True)


class WindowDetokenizer:
    """See `make_detokenizer`.

    Held back: the last character while it may be incomplete, and byte-fallback tokens until the run of them has ended,
    because only the next token tells whether they were characters. Cost per token: O(1) amortised.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        prompt_token_ids: Sequence[int] = (),
        skip_special_tokens: bool = True,
        shown_special_ids: frozenset[int] = frozenset(),
    ) -> None:
        self._tokenizer = tokenizer
        self._skipped_ids = tokenizer.special_ids - shown_special_ids if skip_special_tokens else frozenset()
        self._byte_ids = tokenizer.byte_fallback_ids
        self._window = self._prompt_tail(prompt_token_ids)
        self._shown = self._decode()
        """The beginning of the window's text that has been given out, or belongs to the prompt."""

    def push(self, token_ids: Iterable[int]) -> str:
        pieces = []
        for token_id in token_ids:
            if self._makes_text(token_id):
                self._window.append(token_id)
                if token_id not in self._byte_ids:
                    pieces.append(self._advance())
        return "".join(pieces)

    def flush(self) -> str:
        return self._give_out(self._decode())

    def _advance(self) -> str:
        """Gives out what is final. The last token is none of byte fallback, so every run of those has ended."""
        text = self._decode()
        # A decoder writes one U+FFFD for the longest beginning of a character (Unicode 3.9, "maximal subpart"), so
        # one is all that can still change: U+FFFD before it stand for bytes that no further byte can complete.
        num_held = 1 if text.endswith(REPLACEMENT) else 0
        final = text[: len(text) - num_held]
        new = self._give_out(final)
        if len(self._window) > MAX_WINDOW_TOKENS and self._shown == final:
            start = len(self._window) - NUM_CONTEXT_TOKENS
            while self._window[start] in self._byte_ids:  # never cut a run in two: its parts decode to something else
                start += 1
            self._window = self._window[start:]
            context = self._decode()
            self._shown = context[: len(context) - num_held]
        return new

    def _give_out(self, final: str) -> str:
        if final.startswith(self._shown):
            new = final[len(self._shown) :]
            self._shown = final
        elif self._shown.startswith(final):
            # Only a prompt that ends inside a character: its U+FFFD counts as shown, and may become something else.
            new = ""
        else:
            # The same, and it has become something else: what is new begins where the two part.
            new = final[_num_common(final, self._shown) :]
            self._shown = final
        return new

    def _decode(self) -> str:
        return self._tokenizer.decode(self._window, skip_special_tokens=False)

    def _makes_text(self, token_id: int) -> bool:
        """Whether decode looks at this id at all. Others must not stand in the window: they are no context."""
        return token_id not in self._skipped_ids and self._tokenizer.id_to_token(token_id) is not None

    def _prompt_tail(self, prompt_token_ids: Sequence[int]) -> list[int]:
        """The context that the prompt gives: its last tokens, and a run of byte-fallback tokens whole."""
        tail: list[int] = []
        for token_id in reversed(prompt_token_ids):
            if not self._makes_text(token_id):
                continue
            inside_run = bool(tail) and tail[-1] in self._byte_ids and token_id in self._byte_ids
            if len(tail) >= NUM_CONTEXT_TOKENS and not inside_run:
                break
            tail.append(token_id)
        return tail[::-1]


def _ends_inside_character(tokenizer: Tokenizer, token_ids: Sequence[int], skip_special_tokens: bool) -> bool:
    """Whether the next bytes may still change the last character of a byte-level text."""
    tail = b""
    for token_id in reversed(token_ids):
        if not (skip_special_tokens and token_id in tokenizer.special_ids):
            tail = tokenizer.token_bytes(token_id) + tail
        if len(tail) >= 4:  # as long as a character can be
            break
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    decoder.decode(tail)
    return bool(decoder.getstate()[0])


def _num_common(a: str, b: str) -> int:
    """Length of the longest common beginning."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
