"""What travels in a channel: the encoding of one step's outputs, and the box of messages not yet acknowledged.

Knows TokenOutput and numbers. Knows no transport, no loop, no engine. A choice is named by a number that the ingress
gave it (its key), so the common output, one token and nothing else, costs two integers.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from serve_app.engine.request import FinishReason, TokenLogprobs, TokenOutput

Message = tuple[int, tuple[int, ...], tuple[tuple[Any, ...], ...]]
"""(number, plain, rich). Numbers count from 1 in each channel; 0 is a heart beat. ``plain``: key, token, key, token, ...
``rich``: one tuple for each output that is more than one token. A message names a key at most once."""

HEARTBEAT: Message = (0, (), ())


@dataclass(frozen=True)
class ChannelOptions:
    """Times in seconds. Both ends should be given the same."""

    heartbeat_seconds: float = 0.5
    """An idle stream carries an empty message this often; the first one after up to twice that."""

    silence_seconds: float = 1.5
    """The ingress opens a stream anew that has carried nothing for so long."""

    lost_seconds: float = 3.0
    """The ingress takes a replica for lost that it has not heard for so long, dead, hung or cut off. Above
    silence_seconds, so that a new stream is tried before."""

    lease_seconds: float = 10.0
    """The replica gives an ingress up that it has not heard for so long, and aborts its requests."""

    ack_seconds: float = 2.0
    """An ingress acknowledges at least this often, also when idle. Well below lease_seconds."""

    ack_messages: int = 64
    """... and after so many messages. Well below window_messages."""

    window_messages: int = 256
    """Unacknowledged messages after which outputs are gathered instead of sent."""

    max_unread_tokens: int = 131_072
    """Tokens, with their log-probabilities, kept for an ingress that does not acknowledge. Beyond: its requests end."""

    stream_messages: int = 20_000
    """A stream is opened anew after so many messages: Ray keeps a record of each until the stream ends."""

    stream_seconds: float = 300.0
    """... and after so long."""

    call_seconds: float = 5.0
    """How long a call may take before it counts as unanswered. A submit waits for the step under way."""


class Outbox:
    """What one channel has to tell: gathered outputs, and numbered messages until they are acknowledged."""

    def __init__(self, window_messages: int) -> None:
        self.window_messages = window_messages
        self.number = 0
        """Of the last message made."""
        self.acked = 0
        """All messages up to this one have arrived."""
        self.size = 0
        """Tokens kept, as `size_of` counts them."""
        self._gathered: dict[int, TokenOutput] = {}
        """Key -> what no message holds yet."""
        self._gathered_size = 0
        self._sent: deque[tuple[Message, int]] = deque()
        """Messages acked + 1 to number, each with its size."""
        self._num_cached: dict[int, int] = {}
        """Key -> num_cached_tokens the other end knows; it stands in every output and travels once."""

    @property
    def is_empty(self) -> bool:
        return not self._gathered and not self._sent

    @property
    def has_gathered(self) -> bool:
        return bool(self._gathered)

    def put(self, key: int, output: TokenOutput) -> None:
        before = self._gathered.get(key)
        self._gathered[key] = output if before is None else merge(before, output)
        size = size_of(output)
        self.size += size
        self._gathered_size += size

    def message_after(self, number: int) -> Message | None:
        """The message that follows ``number``: one made before, or a new one of all that is gathered.

        None: there is nothing, or the window is full. Raises ValueError for a number that is out of reach.
        """
        if not self.acked <= number <= self.number:
            raise ValueError(f"message {number} is out of reach; {self.acked} to {self.number} can be followed")
        if number < self.number:
            return self._sent[number - self.acked][0]
        if not self._gathered or len(self._sent) >= self.window_messages:
            return None
        return self._make()

    def ack(self, number: int) -> None:
        """Forgets the messages up to ``number``. An older number than before changes nothing."""
        while self.acked < number and self._sent:
            self.size -= self._sent.popleft()[1]
            self.acked += 1

    def clear(self) -> None:
        self._gathered.clear()
        self._sent.clear()
        self.acked, self.size, self._gathered_size = self.number, 0, 0

    def _make(self) -> Message:
        plain: list[int] = []
        rich: list[tuple[Any, ...]] = []
        known = self._num_cached
        for key, output in self._gathered.items():
            # Positions, not names: this runs once for each token.
            if (
                output[5] is None
                and output[3] is None
                and output[4] is None
                and len(output[2]) == 1
                and output[7] == known.get(key, 0)
            ):
                plain += (key, output[2][0])
                continue
            rich.append(_encode(key, output))
            if output.finish_reason is not None:
                known.pop(key, None)
            elif output.num_cached_tokens:
                known[key] = output.num_cached_tokens
        self.number += 1
        message = (self.number, tuple(plain), tuple(rich))
        self._sent.append((message, self._gathered_size))
        self._gathered, self._gathered_size = {}, 0
        return message


def size_of(output: TokenOutput) -> int:
    """Tokens of an output, each with the log-probabilities that stand beside it; at least 1. 64 bytes of an embedding
    count as one."""
    if output.embedding is not None:
        return 1 + len(output.embedding) // 64
    if output.logprobs is None and output.prompt_logprobs is None:
        return len(output.token_ids) or 1
    entries = (*(output.logprobs or ()), *(output.prompt_logprobs or ()))
    return (len(output.token_ids) or 1) + sum(1 + len(entry.top) for entry in entries if entry is not None)


def merge(first: TokenOutput, second: TokenOutput) -> TokenOutput:
    """Two outputs of one choice, one after the other, as one."""
    return second._replace(
        token_ids=first.token_ids + second.token_ids,
        logprobs=first.logprobs if second.logprobs is None else (first.logprobs or ()) + second.logprobs,
        prompt_logprobs=second.prompt_logprobs if first.prompt_logprobs is None else first.prompt_logprobs,
        num_cached_tokens=second.num_cached_tokens or first.num_cached_tokens,
    )


def decode(rich: tuple[Any, ...], request_id: str, choice_index: int) -> TokenOutput:
    """The output in one tuple of a message's ``rich`` (see Message), whose first element is the key."""
    _, token_ids, logprobs, prompt_logprobs, reason, stop_token_id, num_cached_tokens, error, error_code, embedding = (
        rich
    )
    return TokenOutput(
        request_id,
        choice_index,
        token_ids,
        None if logprobs is None else tuple(TokenLogprobs(*entry) for entry in logprobs),
        None
        if prompt_logprobs is None
        else tuple(None if entry is None else TokenLogprobs(*entry) for entry in prompt_logprobs),
        None if reason is None else FinishReason(reason),
        stop_token_id,
        num_cached_tokens,
        error,
        error_code,
        embedding,
    )


def _encode(key: int, output: TokenOutput) -> tuple[Any, ...]:
    """Plain tuples, numbers and strings: an instance of a class costs the pickler ten times as much."""
    logprobs, prompt_logprobs, reason = output.logprobs, output.prompt_logprobs, output.finish_reason
    return (
        key,
        output.token_ids,
        None if logprobs is None else tuple(_plain_tuples(logprobs)),
        None if prompt_logprobs is None else tuple(_plain_tuples(prompt_logprobs)),
        None if reason is None else str(reason),
        *output[6:],
    )


def _plain_tuples(entries: tuple[TokenLogprobs | None, ...]) -> Iterator[tuple[Any, ...] | None]:
    return (None if entry is None else tuple(entry) for entry in entries)
