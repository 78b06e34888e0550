"""What a load test sends, and when: arrivals, shapes of load over time, lengths, and the bodies of the requests.

A plan is a function of its options and its seed: any number of workers compute the same one, and each takes its share.
Arrivals are due times, made without looking at what became of earlier requests (open loop). Knows no socket, no clock and
no locust. Lengths come from `workloads.make_requests` or a trace (`traces`).
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from loadtests.stream_mix import CHAT, COMPLETIONS, WORDS
from loadtests.traces import TracedRequest, block_tokens, read_trace, scaled, trace_path
from loadtests.workloads import make_requests

SHAPES = ("steady", "ramp", "spike")
ARRIVALS = ("poisson", "even")
ENDPOINTS = {"chat": (CHAT,), "completions": (COMPLETIONS,), "mixed": (CHAT, COMPLETIONS)}
SYNTHETIC = "synthetic"

RAMP_FROM = 0.1
SPIKE, SPIKE_BEGINS, SPIKE_ENDS = 3.0, 0.4, 0.6
"""So many times the load, between these shares of the run."""
NUM_MIXED = 4096
"""Different pairs of lengths in the synthetic mix, which then begins anew."""
TEMPLATE_TOKENS = 64
"""Room for what a chat template adds to a message."""


def level(shape: str, share: float) -> float:
    """The load at this share (0 to 1) of the run, as a factor of the one asked for."""
    if shape == "ramp":
        return RAMP_FROM + (1 - RAMP_FROM) * share
    return SPIKE if shape == "spike" and SPIKE_BEGINS <= share < SPIKE_ENDS else 1.0


def cumulative(shape: str, share: float) -> float:
    """The integral of `level` from 0 to ``share``."""
    if shape == "ramp":
        return RAMP_FROM * share + (1 - RAMP_FROM) * share * share / 2
    if shape == "spike":
        return share + (SPIKE - 1) * min(max(0.0, share - SPIKE_BEGINS), SPIKE_ENDS - SPIKE_BEGINS)
    return share


def arrivals(rate: float, *, shape: str, process: str, seconds: float | None, seed: int) -> Iterator[float]:
    """Due times in seconds, ascending, before ``seconds`` (None: for ever, which only a steady load can be).

    ``process``: poisson (gaps are exponential) or even. Another shape changes the time scale: an arrival of the process of
    rate 1 at x comes when the integral of the rate reaches x (Lewis and Shedler's inversion), so a Poisson process stays
    one. Raises ValueError naming what is out of range.
    """
    if not rate > 0:
        raise ValueError(f"the rate is {rate:g}; it must be above 0")
    if shape not in SHAPES or process not in ARRIVALS:
        raise ValueError(f"shape {shape!r} of {process!r} arrivals; there are {SHAPES} and {ARRIVALS}")
    if seconds is None and shape != "steady":
        raise ValueError(f"a {shape} needs an end: say --run-time")
    rng = random.Random(f"{seed}/arrivals")
    at = 0.0
    while True:
        at += rng.expovariate(1.0) if process == "poisson" else 1.0
        due = at / rate if seconds is None else _inverse(shape, at / (rate * seconds)) * seconds
        if seconds is not None and due >= seconds:
            return
        yield due


def _inverse(shape: str, area: float) -> float:
    """The share of the run at which `cumulative` is ``area``; 1 behind its end."""
    if shape == "steady":
        return min(area, 1.0)
    if area >= cumulative(shape, 1.0):
        return 1.0
    low, high = 0.0, 1.0
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if cumulative(shape, middle) < area else (low, middle)
    return low


# ------------------------------------------------------------------------------------------------------------ requests


@dataclass(frozen=True)
class Vocabulary:
    """How lengths in tokens become prompts that a server understands."""

    token_ids: tuple[int, ...] = ()
    """Ids that it knows, of ordinary words. Empty: prompts are text, and lengths are about right."""
    tokens_per_word: float = 1.3
    max_model_len: int | None = None
    """Prompt and answer together; longer requests are cut. None: unknown, nothing is cut."""


@dataclass(frozen=True)
class Planned:
    """One request."""

    number: int
    due: float | None
    """Seconds after the start; None: when a user is free."""
    path: str
    num_prompt_tokens: int
    num_output_tokens: int
    block_ids: tuple[int, ...] = ()
    is_cut: bool = False


@dataclass(frozen=True)
class PlanOptions:
    """What the command line says."""

    workload: str = SYNTHETIC
    rate: float | None = None
    """Requests a second; None: users in a closed loop, or a trace as it was recorded."""
    shape: str = "steady"
    process: str = "poisson"
    seconds: float | None = None
    endpoint: str = "mixed"
    prompt_lens: tuple[int, int] = (32, 256)
    output_lens: tuple[int, int] = (16, 64)
    distribution: str = "lognormal"
    length_scale: float = 1.0
    seed: int = 0


class Plan:
    """All requests of a run. Raises ValueError naming what cannot be."""

    def __init__(self, options: PlanOptions, vocabulary: Vocabulary) -> None:
        if options.endpoint not in ENDPOINTS:
            raise ValueError(f"endpoint is {options.endpoint!r}; it must be one of {', '.join(ENDPOINTS)}")
        self.options, self._vocabulary = options, vocabulary
        self._block_tokens = 0
        self._traced: list[TracedRequest] = []
        if options.workload == SYNTHETIC:
            mix = make_requests(
                NUM_MIXED,
                vocab_size=1,
                prompt_lens=options.prompt_lens,
                output_lens=options.output_lens,
                distribution=options.distribution,
                seed=options.seed,
            )
            self._lengths = [(len(r.prompt_token_ids), r.num_output_tokens) for r in mix.requests]
        else:
            if options.shape != "steady":
                raise ValueError(f"shape is {options.shape!r}, but a trace has arrivals of its own")
            trace = read_trace(trace_path(options.workload))
            self._traced = scaled(trace, rate=options.rate, length=options.length_scale)
            self._lengths = [(r.num_prompt_tokens, r.num_output_tokens) for r in self._traced]
            self._block_tokens = block_tokens(options.length_scale)

    @property
    def is_open(self) -> bool:
        """Requests are sent when they are due, whatever became of those before."""
        return bool(self._traced) or self.options.rate is not None

    def scheduled(self) -> Iterator[Planned]:
        """The requests of an open loop, in the order of their arrival."""
        options = self.options
        if self._traced:
            dues: Iterator[float] = (r.arrival for r in self._traced)
        else:
            assert options.rate is not None
            dues = arrivals(
                options.rate, shape=options.shape, process=options.process, seconds=options.seconds, seed=options.seed
            )
        for number, due in enumerate(dues):
            if options.seconds is not None and due >= options.seconds:
                return
            yield self.request(number, due)

    def request(self, number: int, due: float | None = None) -> Planned:
        """The request of this number; its lengths and its text depend on nothing else."""
        num_prompt, num_output = self._lengths[number % len(self._lengths)]
        paths = ENDPOINTS[self.options.endpoint]
        path = paths[number % len(paths)]
        is_cut = False
        if (limit := self._vocabulary.max_model_len) is not None:
            room = max(2, limit - (TEMPLATE_TOKENS if path == CHAT else 0))
            is_cut = num_prompt + num_output > room
            num_output = min(num_output, max(1, room // 2)) if is_cut else num_output
            num_prompt = min(num_prompt, room - num_output)
        block_ids = self._traced[number].block_ids if self._traced else ()
        return Planned(number, due, path, num_prompt, num_output, block_ids, is_cut)

    def body(self, request: Planned, model: str) -> bytes:
        """The JSON to send: greedy, of exactly so many tokens, streamed, with its usage."""
        fields: dict[str, Any] = {
            "model": model,
            "max_tokens": request.num_output_tokens,
            "temperature": 0.0,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        if request.path == CHAT:
            fields["messages"] = [{"role": "user", "content": self._text(request)}]
        elif self._vocabulary.token_ids:
            fields["prompt"] = self._drawn(request, self._vocabulary.token_ids, request.num_prompt_tokens, 1.0)
        else:
            fields["prompt"] = self._text(request)
        return json.dumps(fields).encode()

    def _text(self, request: Planned) -> str:
        per_word = self._vocabulary.tokens_per_word
        num_words = max(1, math.floor(request.num_prompt_tokens / per_word))
        return " ".join(self._drawn(request, WORDS, num_words, per_word))

    def _drawn(self, request: Planned, symbols: Sequence[Any], num: int, per_symbol: float) -> list[Any]:
        """``num`` symbols: those of the prompt's blocks, the same for the same id, and then some of its own."""
        drawn: list[Any] = []
        num_in_block = max(1, round(self._block_tokens / per_symbol))
        for block_id in request.block_ids:
            if len(drawn) >= num:
                break
            drawn += random.Random(f"{self.options.seed}/block/{block_id}").choices(symbols, k=num_in_block)
        if len(drawn) < num:
            rng = random.Random(f"{self.options.seed}/request/{request.number}")
            drawn += rng.choices(symbols, k=num - len(drawn))
        return drawn[:num]
