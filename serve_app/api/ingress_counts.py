"""What one ingress counts of its requests, as their clients saw them. Knows metrics and times; knows no HTTP, no stream.

    arrived ... lease ... first token . . . . last token, end          per request, by RequestTimes
       |  queue  | prefill   |        decode        |
       |  time to first token|

Times are seconds of the event loop's clock.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from serve_app.api.failover import KINDS
from serve_app.engine.request import FinishReason
from serve_app.engine.totals import Counts, Histogram
from serve_app.metrics import INGRESS


class IngressCounts:
    """Since this ingress began."""

    def __init__(self) -> None:
        self.first_token_seconds = _histogram("first_token_seconds")
        self.token_gap_seconds = _histogram("token_gap_seconds")
        self.token_seconds = _histogram("token_seconds")
        self.request_seconds = _histogram("request_seconds")
        self.prefill_seconds = _histogram("prefill_seconds")
        self.decode_seconds = _histogram("decode_seconds")
        self.inference_seconds = _histogram("inference_seconds")
        self.request_prompt_tokens = _histogram("request_prompt_tokens")
        self.request_generation_tokens = _histogram("request_generation_tokens")
        self.longest_choice_tokens = _histogram("longest_choice_tokens")
        self.params_max_tokens = _histogram("params_max_tokens")
        self.params_n = _histogram("params_n")
        self.choices_ended: Counter[str] = Counter(dict.fromkeys(map(str, FinishReason), 0))
        self.http_answers: Counter[tuple[str, str]] = Counter()
        """By route and status."""

    def embedded(self, seconds: float, num_prompt_tokens: int, num_inputs: int) -> None:
        """A request for vectors was answered."""
        self.request_seconds.observe(seconds)
        self.request_prompt_tokens.observe(num_prompt_tokens)
        self.choices_ended[FinishReason.STOP] += num_inputs

    def counts(
        self, queue_seconds: Histogram, stream_events: Mapping[str, int], client_events: Mapping[str, int]
    ) -> Counts:
        """As plain data, with what others of this ingress count. Kinds that have not happened are 0: a rate needs that."""
        histograms = {key: value for key, value in vars(self).items() if isinstance(value, Histogram)}
        histograms["queue_seconds"] = queue_seconds
        return {
            **{key: {(): histogram.value()} for key, histogram in histograms.items()},
            "choices_ended": {(reason,): number for reason, number in self.choices_ended.items()},
            "http_answers": {(route, status): number for (route, status), number in self.http_answers.items()},
            "stream_events": {(kind,): stream_events.get(kind, 0) for kind in KINDS},
            "router_client_events": {(kind,): number for kind, number in client_events.items()},
        }


class RequestTimes:
    """One request that generates. A choice is named by the prompt's index and its own."""

    def __init__(self, counts: IngressCounts, arrived_at: float, num_prompt_tokens: int, num_choices: int) -> None:
        self._counts = counts
        self._arrived_at = arrived_at
        self._num_prompt_tokens = num_prompt_tokens
        self._num_choices = num_choices
        self._ended: set[tuple[int, int]] = set()
        self._first_at: dict[tuple[int, int], float] = {}
        self._last_at: dict[tuple[int, int], float] = {}
        self._num_tokens: dict[tuple[int, int], int] = {}

    def output(self, choice: tuple[int, int], num_tokens: int, now: float) -> None:
        """So many tokens of it came."""
        last_at = self._last_at.get(choice)
        self._last_at[choice] = now
        if last_at is not None:
            if choice in self._ended:
                return
            self._counts.token_gap_seconds.observe(now - last_at)
            self._num_tokens[choice] += num_tokens
            return
        if not self._first_at:
            self._counts.first_token_seconds.observe(now - self._arrived_at)
        self._first_at[choice] = now
        self._num_tokens[choice] = num_tokens

    def ended(self, choice: tuple[int, int], reason: FinishReason) -> None:
        """It has its end. What is said of it later counts for nothing."""
        if choice not in self._ended:
            self._ended.add(choice)
            self._counts.choices_ended[str(reason)] += 1

    def broken(self, reason: FinishReason) -> None:
        """Nothing more comes of the choices that have no end yet."""
        self._counts.choices_ended[str(reason)] += self._num_choices - len(self._ended)

    def answered(self, leased_at: float | None, now: float) -> None:
        """It was answered in full. ``leased_at``: when it got room on a replica; None: it never needed any."""
        counts = self._counts
        counts.request_seconds.observe(now - self._arrived_at)
        counts.request_prompt_tokens.observe(self._num_prompt_tokens)
        counts.request_generation_tokens.observe(sum(self._num_tokens.values()))
        counts.longest_choice_tokens.observe(max(self._num_tokens.values(), default=0))
        for choice, num_tokens in self._num_tokens.items():
            if num_tokens > 1:
                seconds = self._last_at[choice] - self._first_at[choice]
                counts.token_seconds.observe(seconds / (num_tokens - 1))
        if leased_at is None or not self._first_at:
            return
        first_at, last_at = min(self._first_at.values()), max(self._last_at.values())
        counts.prefill_seconds.observe(first_at - leased_at)
        counts.decode_seconds.observe(last_at - first_at)
        counts.inference_seconds.observe(last_at - leased_at)


def _histogram(key: str) -> Histogram:
    return Histogram(INGRESS[key].bounds)
