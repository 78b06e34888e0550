"""What crosses process borders: SamplingParams, PoolingParams, GenerateRequest, TokenOutput. Knows ranges; knows no model,
no text."""

from __future__ import annotations

import dataclasses
import enum
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from serve_app.errors import InvalidParameterError

MAX_N = 128
MAX_LOGPROBS = 64
MAX_STOP_STRINGS = 64
MAX_SEED = 2**64 - 1

POOLINGS = ("last", "mean")
MAX_GRAMMAR_LENGTH = 2**18
"""Characters of a grammar: a JSON schema of this size is far past what compiles in time."""


class FinishReason(enum.StrEnum):
    """Why a sequence ended. ABORT: the caller asked; ERROR: TokenOutput.error says what happened."""

    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"
    ERROR = "error"


@dataclass(frozen=True)
class SamplingParams:
    """How the tokens of one request are chosen. Raises InvalidParameterError naming field, value and range.

    The fields that default to None are filled by `resolved` from the model's generation_config.json; where that is
    silent too, decoding is greedy, as in transformers' ``generate``.
    """

    n: int = 1
    """Choices generated for the prompt; each has its own random numbers."""

    max_tokens: int | None = 16
    """Most tokens of output. None: as many as the context leaves."""

    min_tokens: int = 0
    """Tokens before which neither eos nor a stop token may come."""

    temperature: float | None = None
    """0 is greedy. Logits are divided by it before everything but penalties, bias and the masks."""

    top_k: int | None = None
    """Keep the k most likely tokens. 0 or -1: all."""

    top_p: float | None = None
    """Keep the smallest set of most likely tokens whose probabilities reach p. 1: all."""

    min_p: float | None = None
    """Drop tokens less likely than min_p times the likeliest. 0: none."""

    repetition_penalty: float | None = None
    """Divides positive and multiplies negative logits of every token seen in prompt or output (CTRL). 1: off."""

    presence_penalty: float = 0.0
    """Subtracted from the logit of every token seen in the output."""

    frequency_penalty: float = 0.0
    """Subtracted from a token's logit once for each time it stands in the output."""

    logit_bias: Mapping[int, float] | None = None
    """Token id -> added to its logit, -100 to 100."""

    allowed_token_ids: tuple[int, ...] | None = None
    """If given, no other token can be sampled."""

    grammar: str | None = None
    """If given, the output is a sentence of this grammar, or the beginning of one. Canonical text, made by
    serve_app.text.grammar; an opaque string here. eos may come exactly where a sentence may end; stop ids wait for
    min_tokens where something else may come. A sentence that cannot go on ends the sequence with STOP."""

    stop: tuple[str, ...] = ()
    """Strings that end the answer. Matched where text is made (serve_app.text), not in the engine."""

    stop_token_ids: tuple[int, ...] = ()
    """Token ids that end the answer, beside the model's eos ids."""

    include_stop_str_in_output: bool = False
    """Keep the matched stop string in the text."""

    ignore_eos: bool = False
    """Go on past the model's eos ids (stop_token_ids still end)."""

    skip_special_tokens: bool = True
    """Leave special tokens out of the text."""

    logprobs: int | None = None
    """Report log-probabilities of each output token and of this many likeliest ones. 0: only the token's own."""

    prompt_logprobs: int | None = None
    """The same for the tokens of the prompt. Such a request takes no prefix hits."""

    seed: int | None = None
    """Seed of the random numbers. A request without one draws it when it is accepted."""

    def __post_init__(self) -> None:
        _check_int("n", self.n, 1, MAX_N)
        if self.max_tokens is not None:
            _check_int("max_tokens", self.max_tokens, 1, None)
        _check_int("min_tokens", self.min_tokens, 0, self.max_tokens)
        _check_float("temperature", self.temperature, 0.0, 100.0, optional=True)
        if self.top_k is not None:
            _check_int("top_k", self.top_k, -1, None)
        _check_float("top_p", self.top_p, 0.0, 1.0, optional=True, open_low=True)
        _check_float("min_p", self.min_p, 0.0, 1.0, optional=True)
        _check_float("repetition_penalty", self.repetition_penalty, 0.0, 100.0, optional=True, open_low=True)
        _check_float("presence_penalty", self.presence_penalty, -2.0, 2.0)
        _check_float("frequency_penalty", self.frequency_penalty, -2.0, 2.0)
        for name in ("logprobs", "prompt_logprobs"):
            if getattr(self, name) is not None:
                _check_int(name, getattr(self, name), 0, MAX_LOGPROBS)
        if self.seed is not None:
            _check_int("seed", self.seed, 0, MAX_SEED)
        for name in ("stop", "stop_token_ids", "allowed_token_ids"):
            value = getattr(self, name)
            if isinstance(value, str):
                value = (value,)
            if isinstance(value, list | tuple):
                object.__setattr__(self, name, tuple(value))
            elif value is not None:
                raise InvalidParameterError(name, value, "a list")
        if len(self.stop) > MAX_STOP_STRINGS:
            raise InvalidParameterError("stop", f"{len(self.stop)} strings", f"at most {MAX_STOP_STRINGS} strings")
        for string in self.stop:
            if not isinstance(string, str) or not string:
                raise InvalidParameterError("stop", string, "made of non-empty strings")
        for name in ("stop_token_ids", "allowed_token_ids"):
            for token_id in getattr(self, name) or ():
                _check_int(name, token_id, 0, None)
        if self.allowed_token_ids is not None and not self.allowed_token_ids:
            raise InvalidParameterError("allowed_token_ids", self.allowed_token_ids, "a non-empty list, or None")
        if self.grammar is not None:
            if not isinstance(self.grammar, str) or not self.grammar:
                raise InvalidParameterError("grammar", self.grammar, "a non-empty string, or None")
            if len(self.grammar) > MAX_GRAMMAR_LENGTH:
                shown = f"{len(self.grammar)} characters long"
                raise InvalidParameterError("grammar", shown, f"at most {MAX_GRAMMAR_LENGTH} characters long")
        for token_id, bias in (self.logit_bias or {}).items():
            _check_int("logit_bias", token_id, 0, None)
            _check_float("logit_bias", bias, -100.0, 100.0)

    @property
    def is_resolved(self) -> bool:
        return None not in (self.temperature, self.top_k, self.top_p, self.min_p, self.repetition_penalty)

    def resolved(self, generation_config: Mapping[str, Any] | None = None) -> SamplingParams:
        """A copy whose None fields are filled from ``generation_config`` (a parsed generation_config.json).

        Its temperature, top_k, top_p and min_p count only where its ``do_sample`` is true, as in transformers.
        """
        given = dict(generation_config or {})
        samples = bool(given.get("do_sample", False))
        neutral = {"temperature": 1.0 if samples else 0.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}
        defaults = {name: given.get(name) if samples else None for name in neutral}
        defaults = {name: neutral[name] if value is None else value for name, value in defaults.items()}
        penalty = given.get("repetition_penalty")
        defaults["repetition_penalty"] = 1.0 if penalty is None else penalty
        missing: dict[str, Any] = {name: value for name, value in defaults.items() if getattr(self, name) is None}
        return dataclasses.replace(self, **missing) if missing else self


@dataclass(frozen=True)
class PoolingParams:
    """How a prompt becomes one vector. Raises InvalidParameterError naming field, value and range."""

    kind: str = "last"
    """last: the hidden state of the last token; mean: the mean over all tokens. Behind the model's final norm."""

    dimensions: int | None = None
    """Leading elements that are kept; what is left out does not count for the length. None: all."""

    normalize: bool = True
    """Scale the vector to length 1 (of zeros alone, it stays)."""

    def __post_init__(self) -> None:
        if self.kind not in POOLINGS:
            raise InvalidParameterError("pooling", self.kind, f"one of {', '.join(POOLINGS)}")
        if self.dimensions is not None:
            _check_int("dimensions", self.dimensions, 1, None)


@dataclass(frozen=True)
class GenerateRequest:
    """One choice of one request, as it is submitted to an engine. Frozen, cheap to pickle, crosses processes."""

    request_id: str
    """The same for all choices of a request, and across attempts."""

    prompt_token_ids: tuple[int, ...]

    sampling: SamplingParams

    output_token_ids: tuple[int, ...] = ()
    """What an earlier attempt already emitted. They count as output (penalties, min_tokens, max_tokens, usage)."""

    choice_index: int = 0

    priority: int = 0
    """Lower is served earlier. Equal priorities are served in order of arrival."""

    cache_salt: str = ""
    """Requests share prefix blocks only with an equal salt."""

    remaining_ms: float | None = None
    """Milliseconds until the request must have ended; each process turns it into its own monotonic clock."""

    lease_id: str | None = None
    attempt: int = 0

    pooling: PoolingParams | None = None
    """Given: the request has one choice and no output but TokenOutput.embedding, with which it ends."""

    @property
    def needs_every_position(self) -> bool:
        """Its prompt is computed in full: what the prefix cache has of it says nothing of hidden states and logits."""
        return self.sampling.prompt_logprobs is not None or (self.pooling is not None and self.pooling.kind == "mean")


class TokenLogprobs(NamedTuple):
    """Natural-log probabilities at one position, of the raw logits (before penalties, temperature, truncation)."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()
    """The likeliest (token id, logprob), best first."""


class TokenOutput(NamedTuple):
    """What one step made of one sequence. The last one of a sequence has a finish_reason."""

    request_id: str
    choice_index: int
    token_ids: tuple[int, ...] = ()
    """New tokens; empty if the sequence ended without one (abort, error)."""

    logprobs: tuple[TokenLogprobs, ...] | None = None
    """One per new token, if asked for."""

    prompt_logprobs: tuple[TokenLogprobs | None, ...] | None = None
    """With the first output, if asked for: one per prompt token, None for the first."""

    finish_reason: FinishReason | None = None
    stop_token_id: int | None = None
    """The eos or stop token that ended it, when finish_reason is STOP. It is the last of token_ids. None: its grammar
    could not go on."""

    num_cached_tokens: int = 0
    """Prompt tokens found in the prefix cache at first admission."""

    error: str | None = None
    error_code: str | None = None

    embedding: bytes | None = None
    """float32, little-endian: what a request with `pooling` ends with."""


def _check_int(name: str, value: object, low: int, high: int | None) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < low or (high is not None and value > high):
        raise InvalidParameterError(name, value, f"an integer {_range(low, high)}")


def _check_float(
    name: str, value: object, low: float, high: float, *, optional: bool = False, open_low: bool = False
) -> None:
    if value is None and optional:
        return
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not math.isfinite(value) or not low <= value <= high or (open_low and value == low):  # type: ignore[arg-type,operator]
        text = (
            f"a finite number above {low:g} and at most {high:g}"
            if open_low
            else f"a finite number {_range(low, high)}"
        )
        raise InvalidParameterError(name, value, text)


def _range(low: float, high: float | None) -> str:
    return f"of at least {low:g}" if high is None else f"from {low:g} to {high:g}"
