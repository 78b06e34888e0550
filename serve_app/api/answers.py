"""From deltas to the bytes of an answer: events of a stream or one JSON body, of a completion or a chat. Knows OpenAI's
shapes and the fields of a request that shape its answer; knows no engine, no route and no clock.

One `Answer` is made for each HTTP request. For each output of each choice the caller pushes what TextStream made of it, and
sends the bytes that come back, if any; at the end it sends `end()`. Streamed or whole, completion or chat, it is the same:

    answer = make_answer(request, request_id=..., created=..., model=..., prompts=..., token_texts=...)
    for each output: data = answer.push(prompt_index, text_stream.push(...), output)
    last = answer.end()

Choices of prompt p are numbered p * n to p * n + n - 1. Errors are the caller's: it ends a stream with `error_event`.

A chunk, as JSON without spaces and in ASCII (a reader that takes U+2028 for the end of a line cannot break it):

    {"id", "object", "created", "model", ["system_fingerprint"], "choices": [choice], ["prompt_token_ids"], ["usage"]}
    choice: {"index", "text" or "delta", "logprobs", "finish_reason", ["stop_reason"], ["prompt_token_ids"], ["token_ids"]}

In brackets what is there only when asked for, or with the finish reason. Tokens whose text is still held back make no event,
unless logprobs or token ids were asked for.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from json.encoder import encode_basestring_ascii
from typing import Any

from serve_app.api.answer_formats import (
    ChatFormat,
    CompletionFormat,
    Format,
    TokenTexts,
    chunk_call,
    reasoning_fields,
    whole_call,
)
from serve_app.api.error_response import error_event
from serve_app.api.event_id import ChoiceShown, encode_choice, fold, join_event_id
from serve_app.api.prompts import EncodedPrompt
from serve_app.api.protocol import ChatCompletionRequest, CompletionRequest
from serve_app.api.tools import tool_call_id
from serve_app.engine.request import FinishReason, TokenLogprobs, TokenOutput
from serve_app.text.detokenizer import Detokenizer, make_detokenizer
from serve_app.text.text_stream import Parsed, TextDelta

DONE = b"data: [DONE]\n\n"
"""Last event of every stream that went well."""

# ---- answers ---------------------------------------------------------------------------------------------------------


class _Choice:
    """What an answer knows of one choice."""

    def __init__(self, index: int, prompt_index: int) -> None:
        self.index = index
        self.prompt_index = prompt_index
        self.num_tokens = 0
        self.num_reasoning_tokens = 0
        self.has_begun = False
        self.finish_reason: str | None = None
        self.stop_reason: str | int | None = None
        self.before = ""
        """JSON around a plain delta of text; empty while an event must be made in full."""
        self.behind = ""
        self.offsets: Detokenizer | None = None
        """Counts characters, where logprobs say where each token begins."""
        self.num_chars = 0
        # A whole answer collects:
        self.texts: list[str] = []
        self.reasoning: list[str] = []
        self.calls: list[tuple[str, list[str]]] = []
        """Name and pieces of arguments."""
        self.token_ids: list[int] = []
        self.logprobs: dict[str, list[Any]] | None = None


class Answer:
    """One HTTP answer in the making. Made by `make_answer`."""

    media_type: str

    def __init__(
        self,
        format: Format,
        request: CompletionRequest | ChatCompletionRequest,
        head: dict[str, Any],
        prompts: Sequence[EncodedPrompt],
        token_texts: TokenTexts,
        counts_reasoning: bool = False,
    ) -> None:
        self._format = format
        self._request = request
        self._head = head
        self._prompts = prompts
        self._token_texts = token_texts
        self._counts_reasoning = counts_reasoning
        self._n = request.n
        self._choices = [_Choice(i, i // request.n) for i in range(len(prompts) * request.n)]
        self._num_cached_tokens = [0] * len(prompts)
        self._num_prompt_tokens = sum(len(prompt.token_ids) for prompt in prompts)
        self._echo = isinstance(request, CompletionRequest) and request.echo
        self._prompt_alone = isinstance(request, CompletionRequest) and request.shows_prompt_alone
        self._stop_token_ids = frozenset(request.stop_token_ids)

    @property
    def has_ended(self) -> bool:
        """Every choice has its finish reason."""
        return all(choice.finish_reason is not None for choice in self._choices)

    @property
    def id(self) -> str:
        return str(self._head["id"])

    @property
    def finish_reasons(self) -> list[str | None]:
        """Of each choice; None: it has not ended."""
        return [choice.finish_reason for choice in self._choices]

    def push(self, prompt_index: int, delta: TextDelta, output: TokenOutput) -> bytes:
        """Takes one output of one choice, and the text that it made. Returns what to send now: events, or nothing.

        The delta decides how many of the output's tokens count and whether the choice has ended. Outputs that come after
        its end change nothing.
        """
        choice = self._choices[prompt_index * self._n + output.choice_index]
        if choice.before and delta.finish_reason is None and delta.parsed is None:
            choice.num_tokens += delta.num_tokens
            text = delta.text
            return (choice.before + encode_basestring_ascii(text) + choice.behind).encode("ascii") if text else b""
        if choice.finish_reason is not None:
            return b""
        return self._take(choice, delta, output)

    def end(self) -> bytes:
        """The last bytes: of a stream, the usage if asked for and [DONE]; else the whole body."""
        raise NotImplementedError

    def error_event(self, error: BaseException) -> bytes:
        """The last event of a stream that failed."""
        return error_event(error)

    def usage(self) -> dict[str, Any]:
        """Tokens so far. Each prompt counts once, whatever n; cached are those that the prefix cache had."""
        num_completion_tokens = sum(choice.num_tokens for choice in self._choices)
        usage: dict[str, Any] = {
            "prompt_tokens": self._num_prompt_tokens,
            "completion_tokens": num_completion_tokens,
            "total_tokens": self._num_prompt_tokens + num_completion_tokens,
            "prompt_tokens_details": {"cached_tokens": sum(self._num_cached_tokens)},
        }
        if self._counts_reasoning:
            num_reasoning_tokens = sum(choice.num_reasoning_tokens for choice in self._choices)
            usage["completion_tokens_details"] = {"reasoning_tokens": num_reasoning_tokens}
        return usage

    def _take(self, choice: _Choice, delta: TextDelta, output: TokenOutput) -> bytes:
        """An output in full: with its logprobs, its ids, its end."""
        prompt = self._prompts[choice.prompt_index]
        text, num_tokens, finish_reason = delta.text, delta.num_tokens, delta.finish_reason
        stop_reason: str | int | None = delta.stop_string
        if stop_reason is None and output.stop_token_id in self._stop_token_ids:
            stop_reason = output.stop_token_id
        if self._prompt_alone and finish_reason in (None, FinishReason.STOP, FinishReason.LENGTH):
            text, num_tokens, finish_reason, stop_reason = "", 0, FinishReason.LENGTH, None
        is_first, choice.has_begun = not choice.has_begun, True
        if is_first and output.choice_index == 0:
            self._num_cached_tokens[choice.prompt_index] = output.num_cached_tokens
        choice.num_tokens += num_tokens
        parsed = delta.parsed
        if parsed is not None:
            choice.num_reasoning_tokens = parsed.num_reasoning_tokens
        if finish_reason is not None:
            calls = finish_reason is FinishReason.STOP and parsed is not None and parsed.has_called
            choice.finish_reason = "tool_calls" if calls else str(finish_reason)
            choice.stop_reason = stop_reason if finish_reason is FinishReason.STOP else None

        token_ids = output.token_ids[:num_tokens]
        logprobs = None
        if self._request.num_logprobs is not None:
            logprobs = self._logprobs(choice, token_ids, output, is_first=is_first)
        if is_first and self._echo:
            text = self._prompt_text(prompt) + text
        return self._give(choice, text, parsed, token_ids, logprobs, is_first=is_first)

    def _logprobs(
        self, choice: _Choice, token_ids: Sequence[int], output: TokenOutput, *, is_first: bool
    ) -> dict[str, list[Any]]:
        """Of the tokens that this output shows; with the first one, and echo, also of the prompt."""
        prompt = self._prompts[choice.prompt_index]
        entries: list[TokenLogprobs | None] = list((output.logprobs or ())[: len(token_ids)])
        shown_ids, offsets = list(token_ids), []
        if isinstance(self._format, CompletionFormat):
            tokenizer, skip = self._token_texts.tokenizer, self._request.skip_special_tokens
            if is_first and self._echo:
                num_chars = len(self._prompt_text(prompt))
                shown_ids = [*prompt.token_ids, *token_ids]
                entries = [*(output.prompt_logprobs or [None] * len(prompt.token_ids)), *entries]
                reader = make_detokenizer(tokenizer, (), skip)
                for token_id in prompt.token_ids:
                    offsets.append(min(choice.num_chars, num_chars))
                    choice.num_chars += len(reader.push((token_id,)))
                choice.num_chars = num_chars
            if choice.offsets is None:
                choice.offsets = self._offsets(prompt)
            for token_id in token_ids:
                offsets.append(choice.num_chars)
                choice.num_chars += len(choice.offsets.push((token_id,)))
        return self._format.logprobs(shown_ids, entries, offsets, self._token_texts)

    def _offsets(self, prompt: EncodedPrompt) -> Detokenizer:
        goes_on = prompt.text is not None or self._echo
        return make_detokenizer(
            self._token_texts.tokenizer, prompt.token_ids if goes_on else (), self._request.skip_special_tokens
        )

    def _prompt_text(self, prompt: EncodedPrompt) -> str:
        if prompt.text is not None:
            return prompt.text
        return self._token_texts.tokenizer.decode(prompt.token_ids, self._request.skip_special_tokens)

    def _give(
        self,
        choice: _Choice,
        text: str,
        parsed: Parsed | None,
        token_ids: Sequence[int],
        logprobs: dict[str, list[Any]] | None,
        *,
        is_first: bool,
    ) -> bytes:
        raise NotImplementedError


class StreamedAnswer(Answer):
    """Server-sent events. A chat's choice begins with an event that holds the role alone."""

    media_type = "text/event-stream"
    _ends_calls_apart = True
    """The finish reason never stands in one event with a piece of a call: the openai package (2.x) would not tell its user
    that the call is done, where that piece is the call's first."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        options = self._request.stream_options
        self._include_usage = options is not None and options.include_usage
        self._continuous_usage = options is not None and options.continuous_usage_stats
        self._is_plain = not (
            self._continuous_usage or self._request.return_token_ids or self._request.num_logprobs is not None
        )

    def end(self) -> bytes:
        if not self._include_usage:
            return DONE
        return _event({**self._head, "choices": [], "usage": self.usage()}) + DONE

    def _give(
        self,
        choice: _Choice,
        text: str,
        parsed: Parsed | None,
        token_ids: Sequence[int],
        logprobs: dict[str, list[Any]] | None,
        *,
        is_first: bool,
    ) -> bytes:
        first = self._format.first_text() if is_first else None
        events = []
        prompt_ids = self._prompts[choice.prompt_index].token_ids if is_first else None
        if first is not None:
            events.append(_event(self._chunk(choice, first, None, (), prompt_ids)))
            prompt_ids = None
        has_details = not self._is_plain and (len(token_ids) > 0 or is_first)
        is_parsed = parsed is not None and bool(parsed.reasoning or parsed.tool_calls)
        if text or is_parsed or has_details or choice.finish_reason is not None:
            content = self._format.chunk_text(text)
            if parsed is not None and is_parsed:
                content["delta"] |= self._parsed_delta(choice, parsed)
            chunk = self._chunk(choice, content, logprobs, token_ids, prompt_ids)
            if choice.finish_reason is not None and self._ends_calls_apart and "tool_calls" in content.get("delta", ()):
                events.append(_event(chunk))
                chunk = self._chunk(choice, self._format.chunk_text(""), None, (), None)
            if choice.finish_reason is not None:
                chunk["choices"][0] |= {"finish_reason": choice.finish_reason, "stop_reason": choice.stop_reason}
            events.append(_event(chunk))
        if choice.finish_reason is not None:
            choice.before = ""
        elif self._is_plain and not choice.before:
            self._prepare(choice)
        return b"".join(events)

    def _parsed_delta(self, choice: _Choice, parsed: Parsed) -> dict[str, Any]:
        delta: dict[str, Any] = {}
        if parsed.reasoning:
            delta |= reasoning_fields(parsed.reasoning)
        if parsed.tool_calls:
            delta["tool_calls"] = [
                chunk_call(call, tool_call_id(self._head["id"], choice.index, call.index)) for call in parsed.tool_calls
            ]
        return delta

    def _prepare(self, choice: _Choice) -> None:
        """Splits the JSON of a plain chunk at its text. Strings inside have their quotes escaped, so that the name and
        quotes that are looked for stand there once."""
        chunk = self._chunk(choice, self._format.chunk_text("?"), None, (), None)
        before, behind = _event(chunk).decode("ascii").split(f'"{self._format.text_name}":"?"')
        choice.before, choice.behind = f'{before}"{self._format.text_name}":', behind

    def _chunk(
        self,
        choice: _Choice,
        text: dict[str, Any],
        logprobs: dict[str, list[Any]] | None,
        token_ids: Sequence[int],
        prompt_ids: Sequence[int] | None,
    ) -> dict[str, Any]:
        content: dict[str, Any] = {"index": choice.index, **text, "logprobs": logprobs, "finish_reason": None}
        chunk = {**self._head, "choices": [content]}
        if self._request.return_token_ids:
            if prompt_ids is not None:
                (content if self._format.prompt_ids_in_choice else chunk)["prompt_token_ids"] = list(prompt_ids)
            content["token_ids"] = list(token_ids)
        if self._continuous_usage:
            chunk["usage"] = self.usage()
        elif self._include_usage:
            chunk["usage"] = None
        return chunk


class ResumableAnswer(StreamedAnswer):
    """Each event has an id that says what its reader has seen. ``keep``: of the stream. See `serve_app.api.resume`."""

    _ends_calls_apart = False
    """No id says that the last token has been shown and its end has not."""

    def __init__(self, resume_id: bytes, *args: Any) -> None:
        super().__init__(*args)
        self._resume_id = resume_id
        self._shown: list[ChoiceShown | None] = [None] * len(self._choices)
        self._parts = [encode_choice(None)] * len(self._choices)
        """Of the id, one for each choice."""
        self.is_over = False
        """Only [DONE] is left."""

    def push(self, prompt_index: int, delta: TextDelta, output: TokenOutput) -> bytes:
        choice = self._choices[prompt_index * self._n + output.choice_index]
        if choice.finish_reason is not None:
            return b""
        num_before, shown = choice.num_tokens, self._shown[choice.index]
        data = super().push(prompt_index, delta, output)
        role = b""
        if shown is None:
            shown = ChoiceShown()
            if data.count(b"\n\n") == 2:  # the first one has the role alone; no JSON holds an end of line
                end = data.index(b"\n\n") + 2
                self._show(choice.index, shown)
                role, data = self._with_id(data[:end]), data[end:]
        shown_ids = output.token_ids[: choice.num_tokens - num_before]
        num_chars, checksum = shown.num_chars + delta.num_chars, fold(shown_ids, shown.checksum)
        has_ended = choice.finish_reason is not None
        self._show(
            choice.index,
            ChoiceShown(choice.num_tokens, num_chars, checksum, has_ended, choice.num_reasoning_tokens),
        )
        return role + self._with_id(data) if data else role

    def end(self) -> bytes:
        usage = b"" if self.is_over or not self._include_usage else super().end().removesuffix(DONE)
        self.is_over = True
        return (self._with_id(usage) if usage else b"") + self._with_id(DONE)

    def resume(self, prompt_index: int, choice_index: int, shown: ChoiceShown, token_ids: Sequence[int]) -> None:
        """An earlier answer has shown so much of this choice. ``token_ids``: those, if it goes on."""
        choice = self._choices[prompt_index * self._n + choice_index]
        choice.has_begun = True
        choice.num_tokens = shown.num_tokens
        choice.num_reasoning_tokens = shown.num_reasoning_tokens
        self._show(choice.index, shown)
        if shown.has_ended:
            choice.finish_reason = "shown"
        elif self._request.num_logprobs is not None and isinstance(self._format, CompletionFormat):
            prompt = self._prompts[prompt_index]
            choice.offsets = self._offsets(prompt)
            choice.num_chars = len(self._prompt_text(prompt)) if self._echo else 0
            choice.num_chars += len(choice.offsets.push(token_ids))

    def resume_prompt(self, prompt_index: int, num_cached_tokens: int) -> None:
        """Of this prompt the prefix cache had so many tokens."""
        self._num_cached_tokens[prompt_index] = num_cached_tokens

    def _show(self, index: int, shown: ChoiceShown) -> None:
        self._shown[index] = shown
        self._parts[index] = encode_choice(shown)

    def _with_id(self, event: bytes) -> bytes:
        return b"id: " + join_event_id(self._resume_id, self._parts, self.is_over) + b"\n" + event


class WholeAnswer(Answer):
    """One JSON body."""

    media_type = "application/json"

    def end(self) -> bytes:
        body: dict[str, Any] = {**self._head, "choices": [self._content(choice) for choice in self._choices]}
        if self._request.return_token_ids and not self._format.prompt_ids_in_choice:
            body["prompt_token_ids"] = list(self._prompts[0].token_ids)
        return _to_json({**body, "usage": self.usage()})

    def _give(
        self,
        choice: _Choice,
        text: str,
        parsed: Parsed | None,
        token_ids: Sequence[int],
        logprobs: dict[str, list[Any]] | None,
        *,
        is_first: bool,
    ) -> bytes:
        choice.texts.append(text)
        if parsed is not None:
            choice.reasoning.append(parsed.reasoning)
            for call in parsed.tool_calls:
                if call.index == len(choice.calls):
                    choice.calls.append((call.name or "", []))
                choice.calls[call.index][1].append(call.arguments)
        choice.token_ids += token_ids
        if choice.logprobs is None:
            choice.logprobs = logprobs
        elif logprobs is not None:
            for name, values in logprobs.items():
                choice.logprobs[name] += values
        return b""

    def _content(self, choice: _Choice) -> dict[str, Any]:
        content: dict[str, Any] = {
            "index": choice.index,
            **self._whole(choice),
            "logprobs": choice.logprobs,
            "finish_reason": choice.finish_reason,
            "stop_reason": choice.stop_reason,
        }
        if self._request.return_token_ids:
            if self._format.prompt_ids_in_choice:
                content["prompt_token_ids"] = list(self._prompts[choice.prompt_index].token_ids)
            content["token_ids"] = choice.token_ids
        return content

    def _whole(self, choice: _Choice) -> dict[str, Any]:
        """Text, reasoning and calls. Content is null where only the others came."""
        text = "".join(choice.texts)
        whole = self._format.whole_text(text)
        if reasoning := "".join(choice.reasoning):
            whole["message"] |= reasoning_fields(reasoning)
        if choice.calls:
            whole["message"]["tool_calls"] = [
                whole_call(name, "".join(arguments), tool_call_id(self._head["id"], choice.index, i))
                for i, (name, arguments) in enumerate(choice.calls)
            ]
        if not text and (reasoning or choice.calls):
            whole["message"]["content"] = None
        return whole


def make_answer(
    request: CompletionRequest | ChatCompletionRequest,
    *,
    request_id: str,
    created: int,
    model: str,
    prompts: Sequence[EncodedPrompt],
    token_texts: TokenTexts,
    system_fingerprint: str | None = None,
    resume_id: bytes | None = None,
    counts_reasoning: bool = False,
) -> Answer:
    """The answer that ``request`` asks for. ``created``: seconds since 1970; ``model``: the name that the client used;
    ``resume_id``: of a stream that its client may resume; ``counts_reasoning``: in the usage."""
    format: Format = ChatFormat() if isinstance(request, ChatCompletionRequest) else CompletionFormat()
    head = {
        "id": format.id_prefix + request_id,
        "object": format.chunk_object if request.stream else format.whole_object,
        "created": created,
        "model": model,
    }
    if system_fingerprint is not None:
        head["system_fingerprint"] = system_fingerprint
    if resume_id is not None:
        return ResumableAnswer(resume_id, format, request, head, prompts, token_texts, counts_reasoning)
    kind = StreamedAnswer if request.stream else WholeAnswer
    return kind(format, request, head, prompts, token_texts, counts_reasoning)


def tokenize_body(token_ids: Sequence[int], max_model_len: int, token_texts: TokenTexts | None = None) -> bytes:
    """Answer of /tokenize. ``token_texts``: to say also what each token reads as."""
    texts = None if token_texts is None else [token_texts.text(token_id) for token_id in token_ids]
    return _to_json(
        {"count": len(token_ids), "max_model_len": max_model_len, "tokens": list(token_ids), "token_strs": texts}
    )


def detokenize_body(text: str) -> bytes:
    """Answer of /detokenize."""
    return _to_json({"prompt": text})


def _event(content: dict[str, Any]) -> bytes:
    return b"data: " + _to_json(content) + b"\n\n"


def _to_json(content: dict[str, Any]) -> bytes:
    return json.dumps(content, separators=(",", ":")).encode("ascii")
