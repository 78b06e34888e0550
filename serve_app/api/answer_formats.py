"""Where answers to completions and to chats differ: names, the place of the text, the shape of logprobs. And what single
tokens read as. Knows OpenAI's shapes; knows no request, no event and no state of a choice.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from serve_app.engine.request import TokenLogprobs
from serve_app.text.output_parser import ToolCallDelta
from serve_app.text.tokenizer import Tokenizer

MIN_LOGPROB = -9999.0
"""Stands for minus infinity, which JSON cannot spell (as in vLLM)."""


class TokenTexts:
    """What single tokens read as, for logprobs. Remembers every token it was asked for: one for each tokenizer, please."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self._anchor = tokenizer.encode("a", add_special_tokens=False)[-1:]
        self._anchor_text = tokenizer.decode(self._anchor, skip_special_tokens=False)
        self._texts: dict[int, str] = {}
        self._utf8: dict[int, list[int]] = {}

    def text(self, token_id: int) -> str:
        """The token in the middle of a text (sentencepiece drops the space of a first word). A part of a character
        reads as U+FFFD; an id without a token as nothing."""
        text = self._texts.get(token_id)
        if text is None:
            text = self._texts[token_id] = self._read(token_id)
        return text

    def utf8(self, token_id: int) -> list[int]:
        """The token's own bytes, in UTF-8; also of one that is only a part of a character."""
        found = self._utf8.get(token_id)
        if found is None:
            found = self._utf8[token_id] = list(self._read_utf8(token_id))
        return found

    def _read(self, token_id: int) -> str:
        if self.tokenizer.id_to_token(token_id) is None:
            return ""
        both = self.tokenizer.decode([*self._anchor, token_id], skip_special_tokens=False)
        if both.startswith(self._anchor_text):
            return both[len(self._anchor_text) :]
        return self.tokenizer.decode([token_id], skip_special_tokens=False)

    def _read_utf8(self, token_id: int) -> bytes:
        if self.tokenizer.is_byte_level:
            return self.tokenizer.token_bytes(token_id)
        if token_id in self.tokenizer.byte_fallback_ids:
            return bytes([int((self.tokenizer.id_to_token(token_id) or "")[3:5], 16)])  # "<0xE6>"
        return self.text(token_id).encode("utf-8")


class Format:
    """Where completions and chat differ."""

    id_prefix: str
    chunk_object: str
    whole_object: str
    text_name: str
    """The name that stands before the text of a chunk."""
    prompt_ids_in_choice: bool
    """Whether prompt_token_ids stand in the choice, or beside the choices (as in vLLM)."""

    def chunk_text(self, text: str) -> dict[str, Any]:
        raise NotImplementedError

    def first_text(self) -> dict[str, Any] | None:
        """What an event before all others says of a choice; None: there is none."""
        return None

    def whole_text(self, text: str) -> dict[str, Any]:
        raise NotImplementedError

    def logprobs(
        self,
        token_ids: Sequence[int],
        entries: Sequence[TokenLogprobs | None],
        offsets: Sequence[int],
        token_texts: TokenTexts,
    ) -> dict[str, list[Any]]:
        """Lists with one entry for each token. ``offsets``: characters of the answer before each; empty for chats."""
        raise NotImplementedError


class CompletionFormat(Format):
    id_prefix = "cmpl-"
    chunk_object = whole_object = "text_completion"
    text_name = "text"
    prompt_ids_in_choice = True

    def chunk_text(self, text: str) -> dict[str, Any]:
        return {"text": text}

    def whole_text(self, text: str) -> dict[str, Any]:
        return {"text": text}

    def logprobs(
        self,
        token_ids: Sequence[int],
        entries: Sequence[TokenLogprobs | None],
        offsets: Sequence[int],
        token_texts: TokenTexts,
    ) -> dict[str, list[Any]]:
        """The first token of a prompt has no entry. top_logprobs has the token itself beside the likeliest; of tokens
        that read the same, the likelier one."""
        read = token_texts.text
        tops: list[dict[str, float] | None] = []
        for entry in entries:
            top = None if entry is None else {read(entry.token_id): _finite(entry.logprob)}
            for token_id, logprob in () if entry is None else entry.top:
                assert top is not None
                top.setdefault(read(token_id), _finite(logprob))
            tops.append(top)
        return {
            "text_offset": list(offsets),
            "token_logprobs": [None if entry is None else _finite(entry.logprob) for entry in entries],
            "tokens": [read(token_id) for token_id in token_ids],
            "top_logprobs": tops,
        }


class ChatFormat(Format):
    id_prefix = "chatcmpl-"
    chunk_object = "chat.completion.chunk"
    whole_object = "chat.completion"
    text_name = "content"
    prompt_ids_in_choice = False

    def chunk_text(self, text: str) -> dict[str, Any]:
        return {"delta": {"content": text} if text else {}}

    def first_text(self) -> dict[str, Any] | None:
        return {"delta": {"role": "assistant", "content": ""}}

    def whole_text(self, text: str) -> dict[str, Any]:
        return {"message": {"role": "assistant", "content": text, "refusal": None}}

    def logprobs(
        self,
        token_ids: Sequence[int],
        entries: Sequence[TokenLogprobs | None],
        offsets: Sequence[int],
        token_texts: TokenTexts,
    ) -> dict[str, list[Any]]:
        def describe(token_id: int, logprob: float) -> dict[str, Any]:
            text, raw = token_texts.text(token_id), token_texts.utf8(token_id)
            return {"token": text, "logprob": _finite(logprob), "bytes": raw}

        return {
            "content": [
                {**describe(entry.token_id, entry.logprob), "top_logprobs": [describe(*top) for top in entry.top]}
                for entry in entries
                if entry is not None
            ]
        }


def reasoning_fields(reasoning: str) -> dict[str, str]:
    """Under both names: DeepSeek's, which most clients read, and the one that newer ones of vLLM and OpenRouter read."""
    return {"reasoning_content": reasoning, "reasoning": reasoning}


def chunk_call(call: ToolCallDelta, call_id: str) -> dict[str, Any]:
    """A piece of a call in a stream. The first one has id and name."""
    if call.name is None:
        return {"index": call.index, "function": {"arguments": call.arguments}}
    return {"index": call.index, **whole_call(call.name, call.arguments, call_id)}


def whole_call(name: str, arguments: str, call_id: str) -> dict[str, Any]:
    return {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}


def _finite(logprob: float) -> float:
    return max(logprob, MIN_LOGPROB)
