"""Requests of many kinds for the drill and the soak, their answers put together from streams, and how two answers differ.

Knows OpenAI's shapes and this server's extensions (`return_token_ids`, `ignore_eos`, ...). Knows no server and no clock but
the one that a reader passes in. What *bytes* means here: of each choice the text, the token ids, the logprobs and the finish
reason, and the usage without `cached_tokens`. Where one event ends and the next begins may differ.
"""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

Json = dict[str, Any]
COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"

NUM_TOKENS = 240
"""Of most answers; none has fewer than 200."""
WORDS = (
    *("the", "red", "cat", "counts", "two", "lamps", "near", "a", "river", "and", "tells", "Anna", "of", "seven"),
    *("small", "boats", "under", "old", "trees"),
)


@dataclass(frozen=True)
class Kind:
    """One kind of request: where it goes, and its fields beside the prompt. ``is_long``: with a prompt of many steps."""

    name: str
    path: str
    fields: Json
    is_long: bool = False
    num_prompts: int = 1
    stops: bool = False
    """Gets a stop string that matches late: see `stop_string`."""


_ON = {"ignore_eos": True, "max_tokens": NUM_TOKENS}
_WARM = {**_ON, "temperature": 1.6}
"""Warm enough that the toy model does not repeat itself for ever."""

_HELD = {"temperature": 1.6, "max_tokens": 500}
_LIST = {
    "name": "rows",
    "schema": {
        "type": "array",
        "minItems": 16,
        "maxItems": 16,
        "items": {
            "type": "object",
            "properties": {
                "name": {"type": "string", "maxLength": 12},
                "count": {"type": "integer", "minimum": 0, "maximum": 999},
            },
            "required": ["name", "count"],
        },
    },
}
"""A sentence that ends by itself, behind more than 200 tokens."""
_TOOL = {
    "name": "save_rows",
    "parameters": {"type": "object", "properties": {"rows": _LIST["schema"]}, "required": ["rows"]},
}
_FORCED = {
    "tools": [{"type": "function", "function": _TOOL}],
    "tool_choice": "required",
    "parallel_tool_calls": False,
}

KINDS: tuple[Kind, ...] = (
    Kind("greedy", COMPLETIONS, {**_ON, "temperature": 0.0}),
    Kind("seeded", COMPLETIONS, {**_WARM, "top_p": 0.95, "top_k": 200}),
    Kind("seeded, long prompt", COMPLETIONS, _WARM, is_long=True),
    Kind("penalties", COMPLETIONS, {**_WARM, "presence_penalty": 0.6, "frequency_penalty": 0.4}, is_long=True),
    Kind(
        "repetition penalty, bias",
        COMPLETIONS,
        {**_WARM, "repetition_penalty": 1.2, "logit_bias": {"300": 3.0}},
        is_long=True,
    ),
    Kind("stop string", COMPLETIONS, {**_WARM, "max_tokens": 400}, is_long=True, stops=True),
    Kind("stop strings, two choices", COMPLETIONS, {**_WARM, "max_tokens": 400, "n": 2, "logprobs": 1}, stops=True),
    Kind("logprobs", COMPLETIONS, {**_WARM, "logprobs": 3}, is_long=True),
    Kind("echo and logprobs", COMPLETIONS, {**_WARM, "echo": True, "logprobs": 2}),
    Kind("two prompts", COMPLETIONS, _WARM, num_prompts=2),
    Kind("min_tokens", COMPLETIONS, {"min_tokens": 220, "max_tokens": 500, "temperature": 0.7}, is_long=True),
    Kind("chat", CHAT, {**_ON, "temperature": 0.0}, is_long=True),
    Kind("chat, two choices", CHAT, {**_WARM, "n": 2}, is_long=True),
    Kind("chat, logprobs", CHAT, {**_WARM, "logprobs": True, "top_logprobs": 2}),
    Kind("chat, min_tokens and min_p", CHAT, {"min_tokens": 220, "max_tokens": 500, "temperature": 1.1, "min_p": 0.02}),
    Kind("JSON by a schema", CHAT, {**_HELD, "response_format": {"type": "json_schema", "json_schema": _LIST}}),
    Kind("regex, two choices", COMPLETIONS, {**_HELD, "n": 2, "structured_outputs": {"regex": "([a-z]{2,9} ){150}"}}),
    Kind("forced tool call", CHAT, {**_HELD, **_FORCED}),
    Kind("chat, stop string", CHAT, {**_WARM, "max_tokens": 400}, is_long=True, stops=True),
)


@dataclass
class Item:
    """One request of the mix. Its answer depends on ``body`` alone."""

    number: int
    kind: Kind
    body: Json

    def sent(self, **fields: Any) -> Json:
        """The body to send, with more fields, which may not change the answer: stream, request_id, cache_salt."""
        return {**copy.deepcopy(self.body), **fields}


def make_items(num_items: int, *, long_words: tuple[int, int] = (700, 950), seed: int = 0) -> list[Item]:
    """The kinds in turn, each with prompts and seeds of its own. ``long_words``: fewest and most words of a long prompt."""
    rng = random.Random(seed)
    items = []
    for number in range(num_items):
        kind = KINDS[number % len(KINDS)]
        prompts = []
        for _ in range(kind.num_prompts):
            num_words = rng.randint(*long_words) if kind.is_long else rng.randint(3, 40)
            prompts.append(f"{number}: " + " ".join(rng.choice(WORDS) for _ in range(num_words)))
        body: Json = {**kind.fields, "seed": rng.getrandbits(63), "return_token_ids": True}
        if kind.path == CHAT:
            body["messages"] = [{"role": "user", "content": prompts[0]}]
        else:
            body["prompt"] = prompts[0] if kind.num_prompts == 1 else prompts
        items.append(Item(number, kind, body))
    return items


def stop_string(text: str, token_texts: list[str], after_tokens: int = 205) -> str:
    """A few characters of ``text`` that occur in it first behind ``after_tokens`` tokens, and lie across two tokens, so
    that their beginning is held back for a while. Raises ValueError if there are none."""
    begin = len("".join(token_texts[:after_tokens]))
    for length in range(3, 60):
        for at in range(begin, len(text) - length):
            found = text[at : at + length]
            if "\ufffd" not in found and text.find(found) == at:
                return found
    raise ValueError(f"no string of the last {len(text) - begin} characters is new")


# ------------------------------------------------------------------------------------------------------------- answers


@dataclass
class ChoiceRead:
    """One choice, as far as it has come."""

    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: dict[str, list[Any]] = field(default_factory=dict)
    finish_reason: str | None = None
    stop_reason: str | int | None = None
    prompt_token_ids: list[int] | None = None
    calls: list[Json] = field(default_factory=list)
    """Of tools: id, name, arguments."""


@dataclass
class AnswerRead:
    """One answer, put together from the events of a stream, or from one body."""

    choices: dict[int, ChoiceRead] = field(default_factory=dict)
    usage: Json | None = None
    ids: set[str] = field(default_factory=set)
    prompt_token_ids: list[int] | None = None
    fingerprint: str | None = None
    is_done: bool = False
    error: str | None = None
    """What broke it: the server's error, or the connection's."""
    times: list[float] = field(default_factory=list)
    """When tokens came, by the reader's clock."""

    @property
    def num_tokens(self) -> int:
        return sum(len(choice.token_ids) for choice in self.choices.values())

    @property
    def has_ended(self) -> bool:
        return self.is_done or self.error is not None

    def take_event(self, data: bytes, now: float) -> None:
        """One event of a stream, without ``data: ``. An event behind the end is an error."""
        if self.is_done:
            self.error = f"an event behind the end: {data[:100]!r}"
            return
        if data == b"[DONE]":
            self.is_done = True
            return
        event = json.loads(data)
        if "error" in event:
            self.error = f"error event: {event['error']}"
            return
        before = self.num_tokens
        self._take(event, "delta")
        if self.num_tokens > before:
            self.times.append(now)

    def take_body(self, body: bytes) -> None:
        """A whole answer."""
        self._take(json.loads(body), "message")
        self.is_done = True

    def _take(self, content: Json, chat_text: str) -> None:
        self.ids.add(content["id"])
        self.fingerprint = content.get("system_fingerprint")
        self.usage = content.get("usage") or self.usage
        self.prompt_token_ids = content.get("prompt_token_ids") or self.prompt_token_ids
        for said in content["choices"]:
            choice = self.choices.setdefault(said["index"], ChoiceRead())
            if choice.finish_reason is not None:
                self.error = f"choice {said['index']} goes on behind its end"
            choice.text += said["text"] if "text" in said else said[chat_text].get("content") or ""
            self._take_calls(choice, said.get(chat_text, {}).get("tool_calls") or ())
            choice.token_ids += said.get("token_ids") or ()
            for name, values in (said["logprobs"] or {}).items():
                choice.logprobs.setdefault(name, []).extend(values)
            choice.finish_reason = said["finish_reason"] or choice.finish_reason
            choice.stop_reason = said.get("stop_reason") or choice.stop_reason
            choice.prompt_token_ids = said.get("prompt_token_ids") or choice.prompt_token_ids

    def _take_calls(self, choice: ChoiceRead, calls: Sequence[Json]) -> None:
        for call in calls:
            function = call["function"]
            if call.get("index", len(choice.calls)) == len(choice.calls):
                choice.calls.append({"id": call["id"], "name": function["name"], "arguments": function["arguments"]})
            else:
                choice.calls[call["index"]]["arguments"] += function["arguments"]

    def canonical(self) -> bytes:
        """What must be equal, as bytes. Floats stand there as the server wrote them: shortest form, every bit."""
        usage = {name: value for name, value in (self.usage or {}).items() if name != "prompt_tokens_details"}
        choices = [
            {
                "index": index,
                "text": choice.text,
                "calls": [[call["name"], call["arguments"]] for call in choice.calls],
                "token_ids": choice.token_ids,
                "logprobs": choice.logprobs,
                "finish_reason": choice.finish_reason,
                "stop_reason": choice.stop_reason,
                "prompt_token_ids": choice.prompt_token_ids,
            }
            for index, choice in sorted(self.choices.items())
        ]
        found = {"choices": choices, "usage": usage, "prompt_token_ids": self.prompt_token_ids}
        return json.dumps(found, sort_keys=True, separators=(",", ":")).encode()

    @property
    def longest_gap(self) -> float:
        """Seconds between two events with tokens."""
        return max((b - a for a, b in zip(self.times, self.times[1:], strict=False)), default=0.0)


def num_differing_bytes(one: bytes, other: bytes) -> int:
    """Places where they differ; what one has more counts too."""
    return sum(a != b for a, b in zip(one, other, strict=False)) + abs(len(one) - len(other))


def first_difference(one: bytes, other: bytes, num_around: int = 60) -> str:
    """Where two canonical answers part, with what stands around it."""
    at = next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
    begin = max(0, at - num_around)
    return f"at byte {at}: {one[begin : at + num_around]!r} and {other[begin : at + num_around]!r}"
