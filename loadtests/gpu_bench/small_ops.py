"""The fused ops, the sampler and the deterministic product, against torch and against what their bytes take."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.nn import functional

from loadtests.gpu_bench import theory
from loadtests.gpu_bench.attention import Cache, Heads
from loadtests.gpu_bench.meter import (
    THEORY_COLUMNS,
    Meter,
    Row,
    Setup,
    Timing,
    print_rows,
    release,
    row_of,
    with_theory,
)
from loadtests.gpu_bench.theory import LLAMA_8B, Floor
from serve_app.engine.request import SamplingParams
from serve_app.kernels.matmul import matmul
from serve_app.kernels.norms import add_rms_norm, rms_norm
from serve_app.kernels.qk_norm_rope_write import qk_norm_rope_write
from serve_app.kernels.silu_mul import silu_mul
from serve_app.runner.device_sampler import DeviceSampler
from serve_app.runner.rehearsal import pretend

Launches = list[Callable[[], object]]
EPS = 1e-5


def check_products(setup: Setup) -> list[Row]:
    """The deterministic product against float64, and a row's bits in any company."""
    shapes = [(40, 33)] if setup.tiny else [theory.products_of(LLAMA_8B)[name] for name in ("qkv", "gate_up", "down")]
    shapes += [] if setup.tiny else [(1024, 4096), (2560, 4104)]
    counts = (1, 3, 40) if setup.tiny else (1, 7, 64, 129, 1000)
    rows: list[Row] = []
    for out, width in shapes:
        if setup.is_time_up():
            continue
        weight = torch.randn(out, width, dtype=setup.dtype, device=setup.device) * width**-0.5
        x = torch.randn(counts[-1], width, dtype=setup.dtype, device=setup.device)
        whole = matmul(x, weight)
        truth = x.double() @ weight.double().T
        error = float(((whole.double() - truth).norm(dim=1) / truth.norm(dim=1)).max())
        rows.append({"name": f"product {out} x {width}", "rows": counts[-1], "error": error, "ok": error <= 0.01})
        differing = 0
        for num in counts[:-1]:
            for first in (0, counts[-1] - num):
                part = matmul(x[first : first + num].contiguous(), weight)
                differing += int((part != whole[first : first + num]).any(dim=1).sum())
        rows.append(
            {"name": f"product {out} x {width}, bits", "rows": sum(counts), "differing": differing, "ok": not differing}
        )
        release()
    return rows


# ---- fused ops ------------------------------------------------------------------------------------------------------

OP_COLUMNS = (
    ("us", "us", ".2f"),
    ("us_again", "again", ".2f"),
    *THEORY_COLUMNS,
    ("of_floor", "of copy", ".1%"),
    ("torch", "torch us", ".2f"),
    ("gain", "torch/ours", ".2f"),
)


def bench_ops(setup: Setup, meter: Meter, rows: list[Row]) -> None:
    """Norms, rope with the cache's write, and the MLP's gate, of the 8B shape."""
    counts = (3,) if setup.tiny else (1, 256, 2048)
    hidden, wide = (64, 80) if setup.tiny else (LLAMA_8B.hidden_size, LLAMA_8B.intermediate_size)
    heads = Heads(4, 2, 16) if setup.tiny else Heads(LLAMA_8B.num_heads, LLAMA_8B.num_kv_heads, LLAMA_8B.head_dim)
    size = setup.dtype.itemsize

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, dtype=setup.dtype, device=setup.device)

    def add(name: str, floor: Floor, make: Callable[[], tuple[Callable[[], object], Callable[[], object]]]) -> None:
        if setup.is_time_up():
            return
        pairs = [make() for _ in range(setup.copies(floor.num_bytes))]
        ours, theirs = (meter.time([pair[i] for pair in pairs]) for i in range(2))
        rows.append(_against(setup, name, ours, theirs, floor))
        del pairs
        release()

    weight = randn(hidden)
    for num in counts:

        def norm(num: int = num) -> tuple[Callable[[], object], Callable[[], object]]:
            x = randn(num, hidden)
            return lambda: rms_norm(x, weight, EPS), lambda: functional.rms_norm(x, (hidden,), weight, EPS)

        def add_norm(num: int = num) -> tuple[Callable[[], object], Callable[[], object]]:
            x, residual = randn(num, hidden), randn(num, hidden)

            def by_torch() -> object:
                residual.add_(x)
                return functional.rms_norm(residual, (hidden,), weight, EPS)

            return lambda: add_rms_norm(x, residual, weight, EPS), by_torch

        def gate(num: int = num) -> tuple[Callable[[], object], Callable[[], object]]:
            x = randn(num, 2 * wide)
            return lambda: silu_mul(x), lambda: functional.silu(x[:, :wide]) * x[:, wide:]

        def rope(num: int = num) -> tuple[Callable[[], object], Callable[[], object]]:
            return _rope(setup, heads, num)

        add(f"rms_norm {hidden}, {num} rows", Floor(size * 2 * num * hidden, 4 * num * hidden), norm)
        add(f"add_rms_norm {hidden}, {num} rows", Floor(size * 4 * num * hidden, 5 * num * hidden), add_norm)
        width = (heads.num_heads + 2 * heads.num_kv_heads) * heads.head_dim
        name = f"qk norm, rope, write {heads}, {num} rows"
        add(name, Floor(2 * size * num * width, 10 * num * width), rope)
        add(f"silu_mul {wide}, {num} rows", Floor(size * 3 * num * wide, 5 * num * wide), gate)


def _rope(setup: Setup, heads: Heads, num: int) -> tuple[Callable[[], object], Callable[[], object]]:
    num_heads, num_kv_heads, dim = heads
    page = 16
    cache = Cache(setup, num * page, page, heads)
    qkv = torch.randn(num, (num_heads + 2 * num_kv_heads) * dim, dtype=setup.dtype, device=setup.device)
    angles = torch.rand(1024, dim // 2, device=setup.device)
    table = torch.cat((angles.cos(), angles.sin()), dim=1).contiguous()
    positions = torch.randint(0, 1024, (num,), dtype=torch.int32, device=setup.device)
    slots = torch.randperm(num * page, dtype=torch.int32, device=setup.device)[:num].contiguous()
    norm = torch.ones(dim, dtype=setup.dtype, device=setup.device)

    def ours() -> object:
        return qk_norm_rope_write(qkv, table, positions, cache.k, cache.v, slots, q_norm=norm, k_norm=norm, eps=EPS)

    def by_torch() -> object:
        q, k, v = qkv.view(num, -1, dim).split((num_heads, num_kv_heads, num_kv_heads), dim=1)
        cos, sin = table[positions.long()][:, None].chunk(2, dim=2)

        def turned(x: torch.Tensor) -> torch.Tensor:
            first, second = functional.rms_norm(x, (dim,), norm, EPS).float().chunk(2, dim=2)
            return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=2).to(x.dtype)

        at = (slots.long() // page, slots.long() % page)
        cache.k.index_put_(at, turned(k))
        cache.v.index_put_(at, v)
        return turned(q)

    return ours, by_torch


def _against(setup: Setup, name: str, ours: Timing, theirs: Timing, floor: Floor) -> Row:
    row = with_theory(row_of(name, ours, floor, setup.ceilings))
    return row | {"torch": 1e6 * theirs.seconds, "gain": theirs.seconds / ours.seconds}


# ---- the sampler ----------------------------------------------------------------------------------------------------


def bench_sampler(setup: Setup, meter: Meter, rows: list[Row]) -> None:
    """Floor: the logits read once."""
    vocab_size = 300 if setup.tiny else LLAMA_8B.vocab_size
    counts = (2,) if setup.tiny else (1, 64, 256)
    kinds = {
        "greedy": SamplingParams(seed=0, temperature=0.0),
        "drawn": SamplingParams(seed=0, temperature=0.8),
        "top-k 50, top-p 0.9": SamplingParams(seed=0, temperature=0.8, top_k=50, top_p=0.9),
    }
    twins = {"greedy": _argmax, "drawn": _draw, "top-k 50, top-p 0.9": _truncated}
    for num in counts:
        sampler = DeviceSampler(vocab_size, num, setup.device)
        floor = Floor(num * vocab_size * setup.dtype.itemsize, 4 * num * vocab_size)
        copies = setup.copies(floor.num_bytes)
        logits = [3 * torch.randn(num, vocab_size, dtype=setup.dtype, device=setup.device) for _ in range(copies)]
        for kind, params in kinds.items():
            if setup.is_time_up():
                continue
            items = pretend([(1, 1)] * num, 16, sampling=params).scheduled
            plan = sampler.prepare([item.sequence for item in items], [2] * num)
            on_device = torch.from_numpy(plan.rows).to(setup.device)
            out = torch.empty((2, num), dtype=torch.int32, device=setup.device)
            ours = meter.time(
                [
                    lambda x=x, on_device=on_device, out=out, plan=plan, sampler=sampler: sampler.launch(  # type: ignore[misc]
                        x, on_device, out, draws=plan.draws, truncates=plan.truncates
                    )
                    for x in logits
                ]
            )
            theirs = meter.time([lambda x=x, kind=kind: twins[kind](x) for x in logits])  # type: ignore[misc]
            rows.append(_against(setup, f"sample {num} rows, {kind}", ours, theirs, floor))
        del logits, sampler
        release()


def _argmax(logits: torch.Tensor) -> torch.Tensor:
    return logits.argmax(dim=1)


def _draw(logits: torch.Tensor) -> torch.Tensor:
    weights = (logits.float() / 0.8).softmax(dim=1)
    return (weights / torch.empty_like(weights).exponential_()).argmax(dim=1)


def _truncated(logits: torch.Tensor) -> torch.Tensor:
    """By sorting the vocabulary, as transformers does."""
    scores, ids = (logits.float() / 0.8).sort(dim=1, descending=True)
    weights = scores.softmax(dim=1)
    weights = weights.masked_fill(weights.cumsum(dim=1) - weights > 0.9, 0.0)
    weights[:, 50:] = 0.0
    chosen = (weights / torch.empty_like(weights).exponential_()).argmax(dim=1, keepdim=True)
    return ids.gather(1, chosen)


# ---- the deterministic product --------------------------------------------------------------------------------------

PRODUCT_COLUMNS = (
    ("us", "us", ".1f"),
    ("us_again", "again", ".1f"),
    *THEORY_COLUMNS,
    ("of_floor", "of floor", ".1%"),
    ("torch", "cuBLAS us", ".1f"),
    ("gain", "cuBLAS/ours", ".2f"),
)


def bench_products(setup: Setup, meter: Meter, rows: list[Row]) -> None:
    """Every product of the 8B shape at several row counts; floor: bytes or FLOPs, whichever takes longer."""
    products = {"tiny": (40, 33)} if setup.tiny else theory.products_of(LLAMA_8B)
    counts = (3,) if setup.tiny else (1, 16, 64, 256, 2048)
    for name, (out, width) in products.items():
        copies = setup.copies(out * width * setup.dtype.itemsize)
        weights = [torch.randn(out, width, dtype=setup.dtype, device=setup.device) for _ in range(copies)]
        for num in counts:
            if setup.is_time_up():
                continue
            x = torch.randn(num, width, dtype=setup.dtype, device=setup.device)
            ours = meter.time([lambda x=x, w=w: matmul(x, w) for w in weights])  # type: ignore[misc]
            theirs = meter.time([lambda x=x, w=w: functional.linear(x, w) for w in weights])  # type: ignore[misc]
            floor = theory.product(num, out, width, setup.dtype.itemsize)
            rows.append(_against(setup, f"{name} {out} x {width}, {num} rows", ours, theirs, floor))
        del weights
        release()


def print_all(rows: list[Row], products: list[Row]) -> None:
    print_rows(rows, OP_COLUMNS)
    print("\ndeterministic product")
    print_rows(products, PRODUCT_COLUMNS)
