"""Seeded request sets and model shapes for the benches, as plain data. Knows no engine, no torch, no clock.

A request set is prompts of random token ids, how many tokens each answer has, and when each request arrives. It travels
to every measured system as one JSON file, so that all of them, whatever their Python, get the same integers.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

DISTRIBUTIONS = ("uniform", "lognormal")


# ------------------------------------------------------------------------------------------------------- request sets


@dataclass(frozen=True)
class Request:
    prompt_token_ids: tuple[int, ...]

    num_output_tokens: int
    """Exactly so many; end-of-sequence tokens are ignored."""

    arrival: float = 0.0
    """Seconds after the start of the run."""


@dataclass(frozen=True)
class RequestSet:
    """Requests in the order of their arrival."""

    requests: tuple[Request, ...]

    @property
    def num_prompt_tokens(self) -> int:
        return sum(len(request.prompt_token_ids) for request in self.requests)

    @property
    def num_output_tokens(self) -> int:
        return sum(request.num_output_tokens for request in self.requests)

    @property
    def num_rows(self) -> int:
        """Rows that a forward pass must compute at least: every token but the last one of each answer."""
        return self.num_prompt_tokens + self.num_output_tokens - len(self.requests)

    @property
    def num_attended(self) -> int:
        """Pairs of a query and a key it sees, over all rows: n (n + 1) / 2 for a request of n rows."""
        rows = [len(request.prompt_token_ids) + request.num_output_tokens - 1 for request in self.requests]
        return sum(n * (n + 1) // 2 for n in rows)

    def to_json(self) -> str:
        return json.dumps([[r.prompt_token_ids, r.num_output_tokens, r.arrival] for r in self.requests])

    @classmethod
    def from_json(cls, text: str) -> RequestSet:
        return cls(tuple(Request(tuple(prompt), num, arrival) for prompt, num, arrival in json.loads(text)))


def make_requests(
    num_requests: int,
    *,
    vocab_size: int,
    prompt_lens: tuple[int, int] = (32, 512),
    output_lens: tuple[int, int] = (16, 128),
    distribution: str = "uniform",
    rate: float | None = None,
    seed: int = 0,
) -> RequestSet:
    """A request set with lengths in the given ranges, both ends included.

    ``distribution``: uniform, or lognormal (median in the geometric middle of the range, two standard deviations to
    either end, clipped to it). ``rate``: requests per second of a Poisson process; None: all of them at time 0. Token
    ids are uniform over the vocabulary. Raises ValueError naming what is out of range.
    """
    if num_requests < 1 or vocab_size < 1:
        raise ValueError(f"num_requests is {num_requests} and vocab_size {vocab_size}; both must be at least 1")
    if distribution not in DISTRIBUTIONS:
        raise ValueError(f"distribution is {distribution!r}; it must be one of {', '.join(DISTRIBUTIONS)}")
    if rate is not None and not rate > 0:
        raise ValueError(f"rate is {rate!r}; it must be above 0, or None")
    rng = np.random.default_rng(seed)
    prompts = _lengths(rng, num_requests, prompt_lens, distribution)
    outputs = _lengths(rng, num_requests, output_lens, distribution)
    arrivals = np.zeros(num_requests) if rate is None else np.cumsum(rng.exponential(1 / rate, num_requests))
    return RequestSet(
        tuple(
            Request(tuple(rng.integers(0, vocab_size, prompt).tolist()), int(output), float(arrival))
            for prompt, output, arrival in zip(prompts, outputs, arrivals, strict=True)
        )
    )


def _lengths(
    rng: np.random.Generator, num: int, limits: tuple[int, int], distribution: str
) -> npt.NDArray[np.integer[Any]]:
    low, high = limits
    if not 1 <= low <= high:
        raise ValueError(f"lengths are {low} to {high}; they must be ascending and at least 1")
    if distribution == "uniform":
        return rng.integers(low, high + 1, num)
    mean, sigma = math.log(low * high) / 2, math.log(high / low) / 4
    return np.clip(np.rint(rng.lognormal(mean, sigma, num)), low, high).astype(np.int64)


def percentiles(values: Sequence[float], scale: float = 1.0) -> dict[str, float]:
    """mean, p50, p90, p99 of ``values`` times ``scale``; nan without values."""
    if not len(values):
        return dict.fromkeys(("mean", "p50", "p90", "p99"), math.nan)
    array = np.asarray(values, dtype=np.float64) * scale
    named = {f"p{p}": float(np.percentile(array, p)) for p in (50, 90, 99)}
    return {"mean": float(array.mean()), **named}


# ------------------------------------------------------------------------------------------------------- model shapes


@dataclass(frozen=True)
class ModelShape:
    """A decoder without weights."""

    name: str
    architecture: str
    """LlamaForCausalLM or Qwen3ForCausalLM."""
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    tie_word_embeddings: bool
    max_model_len: int = 2048

    @property
    def layer_linear_parameters(self) -> int:
        """Weights of one layer's products: q, k, v, o, gate, up, down."""
        heads, kv = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        return self.hidden_size * (2 * heads + 2 * kv + 3 * self.intermediate_size)

    @property
    def head_parameters(self) -> int:
        return self.hidden_size * self.vocab_size

    @property
    def num_parameters(self) -> int:
        norms = self.hidden_size * (2 * self.num_layers + 1)
        if self.architecture.startswith("Qwen3"):
            norms += 2 * self.head_dim * self.num_layers
        tables = self.head_parameters * (1 if self.tie_word_embeddings else 2)
        return tables + self.num_layers * self.layer_linear_parameters + norms

    def linear_flops(self, num_rows: int, num_sampled: int) -> float:
        """Multiplications and additions of the products, the head on sampled rows alone."""
        return 2.0 * (num_rows * self.num_layers * self.layer_linear_parameters + num_sampled * self.head_parameters)

    def attention_flops(self, num_attended: int) -> float:
        """q k^T and p v over so many pairs of query and key, in all layers and heads."""
        return 4.0 * num_attended * self.num_layers * self.num_heads * self.head_dim

    def weight_bytes_per_step(self, dtype_size: int) -> int:
        """What a step that samples reads of the products' weights, at least once."""
        return dtype_size * (self.num_layers * self.layer_linear_parameters + self.head_parameters)

    def kv_bytes_per_token(self, dtype_size: int) -> int:
        return 2 * dtype_size * self.num_layers * self.num_kv_heads * self.head_dim

    def config(self) -> dict[str, Any]:
        """config.json as transformers writes it. No end-of-sequence token: every answer has its full length."""
        return {
            "architectures": [self.architecture],
            "model_type": self.architecture.removesuffix("ForCausalLM").lower(),
            "hidden_size": self.hidden_size,
            "num_hidden_layers": self.num_layers,
            "num_attention_heads": self.num_heads,
            "num_key_value_heads": self.num_kv_heads,
            "head_dim": self.head_dim,
            "intermediate_size": self.intermediate_size,
            "vocab_size": self.vocab_size,
            "tie_word_embeddings": self.tie_word_embeddings,
            "max_position_embeddings": self.max_model_len,
            "hidden_act": "silu",
            "rms_norm_eps": 1e-6,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
            "attention_bias": False,
            "bos_token_id": None,
            "eos_token_id": None,
            "pad_token_id": None,
            "dtype": "bfloat16",
        }


MODEL_SHAPES = {
    shape.name: shape
    for shape in (
        ModelShape("qwen3-30m", "Qwen3ForCausalLM", 384, 8, 8, 4, 64, 1152, 32_000, True),
        ModelShape("llama-0.5b", "LlamaForCausalLM", 1024, 24, 16, 8, 64, 4096, 32_000, False),
        ModelShape("qwen3-tiny", "Qwen3ForCausalLM", 64, 2, 4, 2, 16, 96, 512, True),
    )
}
"""The two that are reported, and one to try a bench with."""


def write_config(shape: ModelShape, directory: Path) -> Path:
    """Writes config.json (and nothing else) into ``directory`` and returns it; enough for dummy weights."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(shape.config(), indent=1) + "\n")
    return directory
