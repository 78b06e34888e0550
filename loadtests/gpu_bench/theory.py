"""What a figure of the GPU bench cannot be better than: bytes, FLOPs and floor times. Plain arithmetic; no torch.

Two ceilings, measured in the same run or assumed: BW, bytes a second of a large copy (read and written bytes both
count), and F, FLOP a second of a large bfloat16 product.

    a kernel                 max(bytes / BW, FLOPs / F), with the bytes that must be moved at least once
    attention, decode        K and V of what each row sees: 2 K D b bytes a key
    attention, prompt        4 H D FLOPs for each pair of a query and a key it sees
    a step of T tokens,      max(W / BW, 2 (P_body T + P_head S) / F)     products; W bytes of all weights, S rows sample
    S of which sample        + decodes' context * c / BW                  c bytes of K and V of a token in all layers
                             + 4 L H D * visible pairs of chunks / F
    steady state, seconds    (isl + osl / 2) c / BW + 2 P / F             each output token
    an output token          + (2 P_body isl + 4 L H D isl^2 / 2) / F / osl

Kernels run one after another, so the terms add. The last line holds where steps have more than F / BW rows.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

from loadtests.workloads import ModelShape

DTYPE_SIZE = 2
"""Bytes of a bfloat16."""

LLAMA_8B = ModelShape("llama-3.1-8b", "LlamaForCausalLM", 4096, 32, 32, 8, 128, 14336, 128_256, False, 8192)

Span = tuple[int, int]
"""(position of the first row, rows) of one sequence in a step."""


class Ceilings(NamedTuple):
    bandwidth: float
    """Bytes a second."""
    flops: float
    """FLOP a second."""
    source: str


H200 = Ceilings(4.3e12, 780e12, "assumed, an H200: 4.3 TB/s, 780 TFLOP/s")

DECODE_TARGET = 0.80
"""Of the measured bandwidth, where a step's sequences have DECODE_TARGET_TOKENS of context or more together."""
DECODE_TARGET_TOKENS = 64 * 1024
PREFILL_TARGET = 430e12
"""FLOP a second, 2,048 tokens after 8,192."""
ENGINE_TARGET = 8500.0
"""Output tokens a second: the 8B shape in bfloat16, 1,000 tokens in and 1,000 out."""


class Floor(NamedTuple):
    num_bytes: float
    flops: float

    def seconds(self, ceilings: Ceilings) -> float:
        return max(self.num_bytes / ceilings.bandwidth, self.flops / ceilings.flops)


def visible_pairs(spans: Iterable[Span]) -> int:
    """Pairs of a query and a key it sees.

    >>> visible_pairs([(0, 3), (10, 2)])  # 1 + 2 + 3, 11 + 12
    29
    """
    return sum(rows * start + rows * (rows + 1) // 2 for start, rows in spans)


def attention(spans: Iterable[Span], heads: int, kv_heads: int, head_dim: int, size: int = DTYPE_SIZE) -> Floor:
    """Of one layer. Each sequence's K and V are read once, q is read and the result written.

    One decode of 32 heads at 1,000 keys, of 8 kv heads of 128 bfloat16 numbers: 4,096 bytes a key, 8 KiB of q and out:

    >>> attention([(999, 1)], 32, 8, 128)
    Floor(num_bytes=4112384, flops=16384000)
    """
    spans = list(spans)
    keys = sum(start + rows for start, rows in spans)
    rows = sum(rows for _, rows in spans)
    num_bytes = size * (2 * keys * kv_heads * head_dim + 2 * rows * heads * head_dim)
    return Floor(num_bytes, 4 * heads * head_dim * visible_pairs(spans))


def kv_bytes(spans: Iterable[Span], kv_heads: int, head_dim: int, size: int = DTYPE_SIZE) -> int:
    """Bytes of K and V that one layer reads: what a decode's bandwidth is counted in."""
    return 2 * size * kv_heads * head_dim * sum(start + rows for start, rows in spans)


def product(rows: int, out_features: int, in_features: int, size: int = DTYPE_SIZE) -> Floor:
    """y = x W^T: x and W read, y written."""
    num_bytes = size * (rows * in_features + out_features * in_features + rows * out_features)
    return Floor(num_bytes, 2 * rows * out_features * in_features)


def products_of(shape: ModelShape) -> dict[str, tuple[int, int]]:
    """Name -> (output features, input features) of the packed products.

    >>> products_of(LLAMA_8B)["qkv"], products_of(LLAMA_8B)["gate_up"]
    ((6144, 4096), (28672, 4096))
    """
    heads, kv = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
    return {
        "qkv": (heads + 2 * kv, shape.hidden_size),
        "o": (shape.hidden_size, heads),
        "gate_up": (2 * shape.intermediate_size, shape.hidden_size),
        "down": (shape.hidden_size, shape.intermediate_size),
        "head": (shape.vocab_size, shape.hidden_size),
    }


class StepFloor(NamedTuple):
    """Seconds of a step, by term."""

    products: float
    decodes: float
    chunks: float

    @property
    def seconds(self) -> float:
        return self.products + self.decodes + self.chunks


def step(shape: ModelShape, ceilings: Ceilings, spans: Iterable[Span], num_sampled: int) -> StepFloor:
    """A step of these spans; a span of one row is a decode.

    256 decodes at 1,000 tokens of the 8B shape on an H200: 4.9 ms of products, 7.8 ms of K and V:

    >>> floor = step(LLAMA_8B, H200, [(999, 1)] * 256, 256)
    >>> round(1e3 * floor.products, 1), round(1e3 * floor.decodes, 1)
    (4.9, 7.8)
    """
    spans = list(spans)
    rows = sum(n for _, n in spans)
    products = max(
        shape.weight_bytes_per_step(DTYPE_SIZE) / ceilings.bandwidth,
        shape.linear_flops(rows, num_sampled) / ceilings.flops,
    )
    context = sum(start + 1 for start, n in spans if n == 1)
    decodes = context * shape.kv_bytes_per_token(DTYPE_SIZE) / ceilings.bandwidth
    chunks = shape.attention_flops(visible_pairs(s for s in spans if s[1] > 1)) / ceilings.flops
    return StepFloor(products, decodes, chunks)


def steady_tokens_per_s(shape: ModelShape, ceilings: Ceilings, isl: int, osl: int) -> float:
    """Output tokens a second at the floor, prompts of ``isl`` tokens and answers of ``osl``.

    >>> round(steady_tokens_per_s(LLAMA_8B, H200, 1000, 1000), -2)
    12000.0
    """
    kv = (isl + osl / 2) * shape.kv_bytes_per_token(DTYPE_SIZE) / ceilings.bandwidth
    prompt = shape.linear_flops(isl, 0) + shape.attention_flops(isl * isl // 2)
    return 1 / (kv + (shape.linear_flops(1, 1) + prompt / osl) / ceilings.flops)


def prediction(shape: ModelShape = LLAMA_8B, ceilings: Ceilings = H200) -> str:
    """The floors and what each target means, as markdown."""
    lines = [
        f"Ceilings: {ceilings.source}. The figures below are arithmetic, not measurements.",
        "",
        "| figure | bytes | FLOPs | floor | target | that is |",
        "|---|---|---|---|---|---|",
    ]

    def add(name: str, floor: Floor, target: str = "", means: str = "") -> None:
        seconds = floor.seconds(ceilings)
        lines.append(
            f"| {name} | {_si(floor.num_bytes)}B | {_si(floor.flops)}FLOP | {_us(seconds)} | {target} | {means} |"
        )

    heads, kv_heads, dim = shape.num_heads, shape.num_kv_heads, shape.head_dim
    for batch, context in ((1, 8192), (32, 2048), (256, 512), (256, 2048), (256, 8192), (1, 131_072)):
        spans = [(context - 1, 1)] * batch
        target = means = ""
        if batch * context >= DECODE_TARGET_TOKENS:
            target = f"{DECODE_TARGET:.0%} of the bandwidth"
            read = kv_bytes(spans, kv_heads, dim)
            means = f"at most {_us(read / ceilings.bandwidth / DECODE_TARGET)}"
        add(
            f"attention, {batch} decode{'s' if batch > 1 else ''} at {context}, one layer",
            attention(spans, heads, kv_heads, dim),
            target,
            means,
        )
    for name, spans in (("512", [(0, 512)]), ("2k", [(0, 2048)]), ("8k", [(0, 8192)]), ("2k after 8k", [(8192, 2048)])):
        floor = attention(spans, heads, kv_heads, dim)
        target = means = ""
        if name == "2k after 8k":
            target = f"{PREFILL_TARGET / 1e12:.0f} TFLOP/s ({PREFILL_TARGET / ceilings.flops:.0%} of the product)"
            means = f"at most {_us(floor.flops / PREFILL_TARGET)}"
        add(f"attention, prompt of {name}, one layer", floor, target, means)
    for name, (out, width) in products_of(shape).items():
        for rows in (1, 256, 2048):
            add(f"product {name} {out} x {width}, {rows} row{'s' if rows > 1 else ''}", product(rows, out, width))

    lines += [
        "",
        "| step of the 8B shape | products | K and V | chunk | floor | tokens/s |",
        "|---|---|---|---|---|---|",
    ]
    for batch in (1, 32, 128, 256):
        found = step(shape, ceilings, [(999, 1)] * batch, batch)
        lines.append(_step_line(f"{batch} decode{'s' if batch > 1 else ''} at 1000", found, batch))
    lines.append(_step_line("a prompt of 2048", step(shape, ceilings, [(0, 2048)], 1), 2048))
    mixed = [(1499, 1)] * 255 + [(0, 1000)]
    lines.append(_step_line("255 decodes at 1500 and a prompt of 1000", step(shape, ceilings, mixed, 256), 1255))

    steady = steady_tokens_per_s(shape, ceilings, 1000, 1000)
    cache = 256 * 2000 * shape.kv_bytes_per_token(DTYPE_SIZE)
    lines += [
        "",
        (
            f"1000 in, 1000 out: at most {steady:,.0f} output tokens/s; the target of {ENGINE_TARGET:,.0f} is"
            f" {ENGINE_TARGET / steady:.0%} of it. 256 such requests at once: {256_000 / steady:.1f} s at the floor,"
            f" {256_000 / ENGINE_TARGET:.1f} s at the target, with {cache / 1e9:.0f} GB of"
            " K and V at their end."
        ),
    ]
    return "\n".join(lines)


def _step_line(name: str, found: StepFloor, tokens: int) -> str:
    parts = " | ".join(f"{1e3 * part:.2f} ms" for part in (*found, found.seconds))
    return f"| {name} | {parts} | {tokens / found.seconds:,.0f} |"


def _si(value: float) -> str:
    for unit, name in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= unit:
            return f"{value / unit:.3g} {name}"
    return f"{value:.3g} "


def _us(seconds: float) -> str:
    return f"{1e6 * seconds:.1f} us" if seconds < 1e-2 else f"{1e3 * seconds:.1f} ms"


def verdicts(figures: dict[str, Any]) -> list[dict[str, Any]]:
    """Measured figures against the targets. ``figures``: decode_of_copy (worst), prefill_tflops, tokens_per_s, and what
    else must hold; a figure that was not measured is None.

    >>> [v["met"] for v in verdicts({"decode_of_copy": 0.85, "prefill_tflops": 400.0})]
    [True, False, None]
    """
    wanted = (
        (
            "decode_of_copy",
            "decode, worst with 64k tokens or more, of the measured copy",
            DECODE_TARGET,
        ),
        ("prefill_tflops", "prefill, 2k after 8k, TFLOP/s", PREFILL_TARGET / 1e12),
        ("tokens_per_s", "8B bf16, 1000 in / 1000 out, tokens/s", ENGINE_TARGET),
    )
    return [
        {
            "name": name,
            "what": what,
            "target": target,
            "value": figures.get(name),
            "met": None if figures.get(name) is None else figures[name] >= target,
        }
        for name, what, target in wanted
    ]
