"""One streamed answer as a load test sees it: what came when, and what became of it. Knows OpenAI's chunks of chats and
completions; no socket, no clock, no locust.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field

from loadtests.sse import DONE

COMPLETED, REFUSED, FAILED, LOST = "completed", "refused", "failed", "lost"
"""completed: all of it came. refused: 429 or 503, nothing was promised. failed: any other answer that is an error, also one
within a stream, and no connection. lost: a stream that began and ended with neither its end nor an error."""
KINDS = (COMPLETED, REFUSED, FAILED, LOST)


@dataclass
class Outcome:
    """What became of one request. Times are seconds since the run began."""

    path: str
    due: float
    """When it should have been sent. Everything is measured from here, so that a late client or a full connection pool
    shows."""
    sent: float = 0.0
    kind: str = FAILED
    reason: str = ""
    """Of all kinds but completed."""
    times: list[float] = field(default_factory=list)
    """Of each event that brought something of the answer."""
    end: float = 0.0
    num_prompt_tokens: int = 0
    num_output_tokens: int = 0

    @property
    def ttft(self) -> float:
        """Time to first token. Of a completed one."""
        return self.times[0] - self.due

    @property
    def e2el(self) -> float:
        return self.end - self.due

    @property
    def tpot(self) -> float:
        """Time per output token behind the first; 0 where there is one token, as in `vllm bench serve`."""
        num = self.num_output_tokens - 1
        return (self.end - self.times[0]) / num if num > 0 else 0.0

    @property
    def itls(self) -> list[float]:
        """Inter-token latencies: the gaps between events."""
        return [b - a for a, b in zip(self.times, self.times[1:], strict=False)]


class StreamRead:
    """Fills an outcome from the events of a stream."""

    def __init__(self, outcome: Outcome) -> None:
        self._outcome = outcome
        self._is_done = False
        self._error: str | None = None

    @property
    def has_ended(self) -> bool:
        return self._is_done or self._error is not None

    def take(self, data: bytes, now: float) -> None:
        """The data of one event. Raises ValueError for what is no JSON."""
        if data == DONE:
            self._is_done = True
            return
        event = json.loads(data)
        if "error" in event:
            error = event["error"]
            self._error = f"error event: {error.get('code') or error.get('message')}"
            return
        if usage := event.get("usage"):
            self._outcome.num_prompt_tokens = usage["prompt_tokens"]
            self._outcome.num_output_tokens = usage["completion_tokens"]
        times = self._outcome.times
        for choice in event.get("choices", ()):
            # Tokens without a text (special ones) make no event; the last one ends the choice all the same.
            if _brings(choice) or (choice.get("finish_reason") and not times):
                times.append(now)
                break

    def finish(self, now: float, broke: str = "the stream ended without [DONE]") -> None:
        """The stream has ended, or broke for this reason."""
        outcome = self._outcome
        outcome.end = now
        if self._error is not None:
            outcome.kind, outcome.reason = FAILED, self._error
        elif not self._is_done:
            outcome.kind, outcome.reason = LOST, broke
        elif not outcome.times:
            outcome.kind, outcome.reason = FAILED, "an answer without a token"
        else:
            outcome.kind = COMPLETED
            # A server that sends no usage: one token an event.
            outcome.num_output_tokens = outcome.num_output_tokens or len(outcome.times)


def _brings(choice: dict[str, object]) -> bool:
    """Whether a choice of a chunk brings some of the answer, and not only a role or an end."""
    delta = choice.get("delta")
    if not isinstance(delta, dict):
        return bool(choice.get("text"))
    return any(delta.get(name) for name in ("content", "reasoning_content", "reasoning", "tool_calls"))
