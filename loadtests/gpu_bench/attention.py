"""Ragged attention on the card: is it right, are its bits its own, how fast are decodes and prompts. Knows one kernel.

Keys and values lie in pages that a random permutation picks, in the engine's layout; queries are random. Beside our
figures stands torch's own attention over the same sizes in contiguous memory, its flash and its cuDNN kernel where they
run: the best case, without pages and without ragged lengths.
"""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from loadtests.gpu_bench import theory
from loadtests.gpu_bench.meter import THEORY_COLUMNS, Meter, Row, Setup, print_rows, release, row_of, with_theory
from loadtests.gpu_bench.theory import Span
from serve_app.kernels.metadata import AttentionMetadata, Work
from serve_app.kernels.ragged_attention import ragged_attention, rows_per_tile, workspace_size
from serve_app.kernels.work_list import plan_work


class Heads(NamedTuple):
    num_heads: int
    num_kv_heads: int
    head_dim: int

    @property
    def group(self) -> int:
        return self.num_heads // self.num_kv_heads

    def __str__(self) -> str:
        return f"{self.num_heads}/{self.num_kv_heads} D{self.head_dim}"


class Cache:
    """K and V of one layer, [blocks, block_size, K, D] as seen by index, the engine's layout, random."""

    def __init__(self, setup: Setup, num_tokens: int, block_size: int, heads: Heads) -> None:
        self.block_size = block_size
        self.num_blocks = -(-num_tokens // block_size)
        shape = (self.num_blocks, heads.num_kv_heads, block_size, heads.head_dim)
        self.k, self.v = (
            torch.randn(shape, dtype=setup.dtype, device=setup.device).permute(0, 2, 1, 3) for _ in range(2)
        )


class Step(NamedTuple):
    """One launch of attention: rows of q and where their sequences lie."""

    q_NHD: torch.Tensor
    metadata: AttentionMetadata


def make_step(
    setup: Setup,
    heads: Heads,
    spans: Sequence[Span],
    tables: torch.Tensor,
    *,
    q_NHD: torch.Tensor | None = None,
    num_prompt: Sequence[int] | None = None,
) -> Step:
    """``tables``: int32 [B, blocks of the longest]. ``num_prompt``: deterministic mode's classes; None: fast mode."""
    lens = np.array([rows for _, rows in spans])
    seq_lens = np.array([start + rows for start, rows in spans])
    cu_seqlens = np.concatenate(([0], np.cumsum(lens)))
    num_rows = int(cu_seqlens[-1])
    tile_rows = rows_per_tile(heads.head_dim, heads.group, setup.dtype, setup.capability)
    classes = None if num_prompt is None else np.array(num_prompt)
    plan = plan_work(cu_seqlens, seq_lens, classes, rows_per_tile=tile_rows)

    def put(array: Any) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(array, dtype=np.int32)).to(setup.device)

    workspace = torch.empty(
        max(1, workspace_size(len(plan.splits), heads.num_heads, heads.head_dim)),
        dtype=torch.float32,
        device=setup.device,
    )
    width = -(-tables.shape[1] // 16) * 16  # as in the runner: the stride is a multiple of 16
    padded = torch.zeros((len(spans), width), dtype=torch.int32, device=setup.device)
    padded[:, : tables.shape[1]] = tables
    positions = np.concatenate([np.arange(start, start + rows) for start, rows in spans])
    metadata = AttentionMetadata(
        cu_seqlens_q=put(cu_seqlens),
        seq_lens=put(seq_lens),
        block_tables=padded,
        slot_mapping=torch.full((num_rows,), -1, dtype=torch.int32, device=setup.device),
        positions=put(positions),
        max_query_len=int(lens.max()),
        max_seq_len=int(seq_lens.max()),
        work=Work(put(plan.tiles), put(plan.splits), put(plan.decodes), put(plan.counts), workspace),
    )
    if q_NHD is None:
        q_NHD = torch.randn(num_rows, heads.num_heads, heads.head_dim, dtype=setup.dtype, device=setup.device)
    return Step(q_NHD, metadata)


def run(step: Step, cache: Cache, **options: Any) -> torch.Tensor:
    scale = step.q_NHD.shape[2] ** -0.5
    return ragged_attention(step.q_NHD, cache.k, cache.v, step.metadata, scale=scale, **options)


# ---- right, and exact -----------------------------------------------------------------------------------------------


def oracle(
    step: Step, cache: Cache, spans: Sequence[Span], tables: torch.Tensor, window: int = 0, cap: float = 0.0
) -> torch.Tensor:
    """float64 [N, H, D], sequence by sequence, on the device."""
    group = step.q_NHD.shape[1] // cache.k.shape[2]
    found, first = [], 0
    for (start, rows), table in zip(spans, tables, strict=True):
        end = start + rows
        pages = table[: -(-end // cache.block_size)].long()
        k_HLD, v_HLD = (
            x[pages].flatten(0, 1)[:end].double().transpose(0, 1).repeat_interleave(group, 0)
            for x in (cache.k, cache.v)
        )
        q_HND = step.q_NHD[first : first + rows].double().transpose(0, 1)
        scores = q_HND @ k_HLD.transpose(1, 2) * step.q_NHD.shape[2] ** -0.5
        if cap:
            scores = cap * torch.tanh(scores / cap)
        query = torch.arange(start, end, device=scores.device)[:, None]
        key = torch.arange(end, device=scores.device)[None, :]
        hidden = key > query
        if window:
            hidden |= key <= query - window
        found.append((scores.masked_fill(hidden, -torch.inf).softmax(-1) @ v_HLD).transpose(0, 1))
        first += rows
    return torch.cat(found)


def random_tables(setup: Setup, num_blocks: int, lengths: Sequence[int], block_size: int, seed: int) -> torch.Tensor:
    """int32 [B, blocks of the longest]: no block twice, in random order. Entries past a sequence's end are 0."""
    rng = np.random.default_rng(seed)
    needs = [-(-length // block_size) for length in lengths]
    ids = rng.permutation(num_blocks)[: sum(needs)]
    assert len(ids) == sum(needs), "the cache is too small"
    tables = np.zeros((len(lengths), max(needs)), dtype=np.int32)
    first = 0
    for table, num in zip(tables, needs, strict=True):
        table[:num] = ids[first : first + num]
        first += num
    return torch.from_numpy(tables).to(setup.device)


def poison(cache: Cache, tables: torch.Tensor, spans: Sequence[Span]) -> None:
    """NaN in every slot that no sequence owns."""
    owned = torch.zeros((cache.num_blocks, cache.block_size), dtype=torch.bool, device=tables.device)
    for (start, rows), table in zip(spans, tables, strict=True):
        slot = torch.arange(start + rows, device=tables.device)
        owned[table[slot // cache.block_size].long(), slot % cache.block_size] = True
    for x in (cache.k, cache.v):
        x[~owned] = torch.nan


TOLERANCE = 0.01
"""Of a row's norm. bfloat16 keeps 8 bits: 0.2 to 0.4 % is its own rounding, of the weights and of the result."""


def check_values(setup: Setup) -> list[Row]:
    """The worst row of a random mixed batch of each kind, against the oracle."""
    cases: list[tuple[Heads, int, dict[str, Any]]] = [
        (Heads(4, 2, 16), 16, {}),
        (Heads(4, 2, 16), 16, {"sliding_window": 19, "soft_cap": 5.0}),
    ]
    if not setup.tiny:
        cases = [
            (Heads(32, 8, 128), 64, {}),
            (Heads(16, 8, 128), 16, {}),
            (Heads(28, 4, 128), 32, {}),
            (Heads(32, 8, 64), 128, {}),
            (Heads(32, 32, 96), 64, {}),
            (Heads(16, 1, 256), 64, {}),
            (Heads(16, 8, 128), 64, {"sliding_window": 1000}),
            (Heads(16, 8, 128), 64, {"sliding_window": 77, "soft_cap": 30.0}),
        ]
    rng = random.Random(0)
    rows: list[Row] = []
    for heads, page, options in cases:
        if setup.is_time_up():
            continue
        spans = [(20, 1), (0, 9), (30, 3)]
        if not setup.tiny:
            spans = [(rng.randrange(5000), 1) for _ in range(9)] + [(0, 1), (255, 1), (256, 1)]
            spans += [(0, rng.randrange(2, 700)), (rng.randrange(3000), rng.randrange(2, 500)), (63, 65)]
            rng.shuffle(spans)
        lengths = [start + n for start, n in spans]
        cache = Cache(setup, sum(lengths) + (len(spans) + 7) * page, page, heads)
        tables = random_tables(setup, cache.num_blocks, lengths, page, seed=1)
        poison(cache, tables, spans)
        step = make_step(setup, heads, spans, tables)
        ours = run(step, cache, **options).double()
        truth = oracle(step, cache, spans, tables, options.get("sliding_window", 0), options.get("soft_cap", 0.0))
        error = float(((ours - truth).norm(dim=2) / truth.norm(dim=2)).max())
        what = "".join(f" {name} {value:g}" for name, value in options.items())
        rows.append({"name": f"{heads} page {page}{what}", "rows": len(ours), "error": error, "ok": error <= TOLERANCE})
        release()
    return rows


def check_bits(setup: Setup) -> list[Row]:
    """One sequence, a prompt and replayed output tokens, alone; in company; in chunks; on other pages."""
    heads, page = (Heads(4, 2, 16), 16) if setup.tiny else (Heads(32, 8, 128), 64)
    num_prompt, length = (37, 40) if setup.tiny else (1500, 1507)
    parts = (21, 38, length) if setup.tiny else (413, 1111, 1502, length)
    others: list[Span] = [(5, 1), (0, 9)] if setup.tiny else [(2000, 1), (0, 300), (77, 1), (900, 130)]
    lengths = [start + rows for start, rows in others] + [length, length]
    cache = Cache(setup, sum(lengths) + (len(lengths) + 3) * page, page, heads)
    tables = random_tables(setup, cache.num_blocks, lengths, page, seed=2)
    own, moved = tables[-2:-1], tables[-1:]
    for x in (cache.k, cache.v):
        x[moved[0, : -(-length // page)].long()] = x[own[0, : -(-length // page)].long()]
    q_NHD = torch.randn(length, heads.num_heads, heads.head_dim, dtype=setup.dtype, device=setup.device)
    alone = run(make_step(setup, heads, [(0, length)], own, q_NHD=q_NHD, num_prompt=[num_prompt]), cache)

    found: dict[str, torch.Tensor] = {}
    spans = [*others, (0, length)]
    num_others = sum(rows for _, rows in others)
    q_all = torch.cat((torch.randn_like(q_NHD).repeat(2, 1, 1)[:num_others], q_NHD))
    classes = [start + rows if rows > 1 else start for start, rows in others] + [num_prompt]
    in_company = make_step(setup, heads, spans, tables[: len(spans)], q_NHD=q_all, num_prompt=classes)
    found["in company"] = run(in_company, cache)[num_others:]
    chunks, start = [], 0
    for end in parts:
        step = make_step(
            setup, heads, [(start, end - start)], own, q_NHD=q_NHD[start:end].contiguous(), num_prompt=[num_prompt]
        )
        chunks.append(run(step, cache))
        start = end
    found["in chunks"] = torch.cat(chunks)
    on_others = make_step(setup, heads, [(0, length)], moved, q_NHD=q_NHD, num_prompt=[num_prompt])
    found["on other pages"] = run(on_others, cache)
    rows = []
    for how, out in found.items():
        differing = int((out != alone).flatten(1).any(dim=1).sum())
        rows.append({"name": f"attention's bits {how}", "rows": length, "differing": differing, "ok": differing == 0})
    release()
    return rows


# ---- speed ----------------------------------------------------------------------------------------------------------


def bench_decode(setup: Setup, meter: Meter, rows: list[Row]) -> None:
    """Into ``rows``, so that a failure keeps what was measured before it.

    Batches of one row each. GB/s counts K and V, read once.
    """
    shapes = [Heads(4, 2, 16), Heads(2, 2, 16)]
    pages: tuple[int, ...] = (16,)
    grid = [(1, 40), (2, 17)]
    if not setup.tiny:
        shapes, pages = [Heads(32, 8, 128), Heads(16, 8, 128)], (64, 16)
        grid = [(batch, context) for context in (512, 2048, 8192) for batch in (1, 8, 32, 128, 256)]
        grid += [(1, 32_768), (1, 131_072)]
    largest = max(batch * context for batch, context in grid)
    for heads in shapes:
        for page in pages:
            cache = Cache(setup, _pool_tokens(setup, heads, largest, page), page, heads)
            cases = [[(context - 1, 1)] * batch for batch, context in grid]
            names = [f"{batch} x {context}" for batch, context in grid]
            if page == pages[0]:
                cases.append(_skewed(setup))
                names.append(f"{len(cases[-1])} of 1/rank lengths")
            for name, spans in zip(names, cases, strict=True):
                if setup.is_time_up():
                    continue
                row = _decode_row(setup, meter, heads, cache, f"{heads} page {page}: {name}", spans)
                if page == pages[0] and heads == shapes[0] and len(set(spans)) == 1:
                    row |= _sdpa_decode(setup, meter, heads, len(spans), spans[0][0] + 1, cache)
                rows.append(with_theory(row))
                print_rows(rows[-1:], DECODE_COLUMNS, name_width=NAME_WIDTH, with_head=len(rows) == 1)
            del cache
            release()


NAME_WIDTH = 42
DECODE_COLUMNS = (
    ("us", "us", ".1f"),
    ("us_again", "again", ".1f"),
    *THEORY_COLUMNS,
    ("gbs", "GB/s", ".0f"),
    ("of_copy", "of copy", ".1%"),
    ("flash", "flash us", ".1f"),
    ("cudnn", "cuDNN us", ".1f"),
)


def _pool_tokens(setup: Setup, heads: Heads, largest: int, page: int) -> int:
    """Tokens of the cache: room for the largest case, and for copies of the small ones."""
    token = 2 * heads.num_kv_heads * heads.head_dim * setup.dtype.itemsize
    return max(largest, -(-5 * setup.l2_bytes // token)) + 512 * page


def _skewed(setup: Setup) -> list[Span]:
    """Lengths as traffic has them: few long, many short, 512k tokens together."""
    num, total = (2, 60) if setup.tiny else (128, 512 * 1024)
    weights = np.array([1 / (i + 1) for i in range(num)])
    return [(max(0, int(total * w / weights.sum()) - 1), 1) for w in weights]


def _decode_row(setup: Setup, meter: Meter, heads: Heads, cache: Cache, name: str, spans: Sequence[Span]) -> Row:
    lengths = [start + rows for start, rows in spans]
    num_blocks = sum(-(-length // cache.block_size) for length in lengths)
    size = setup.dtype.itemsize
    read = theory.kv_bytes(spans, heads.num_kv_heads, heads.head_dim, size)
    copies = min(setup.copies(read), cache.num_blocks // num_blocks)
    order = np.random.default_rng(0).permutation(cache.num_blocks).astype(np.int32)
    widest = -(-max(lengths) // cache.block_size)
    launches: list[Callable[[], object]] = []
    for i in range(copies):
        tables, first = np.zeros((len(spans), widest), dtype=np.int32), i * num_blocks
        for table, length in zip(tables, lengths, strict=True):
            num = -(-length // cache.block_size)
            table[:num] = order[first : first + num]
            first += num
        step = make_step(setup, heads, spans, torch.from_numpy(tables).to(setup.device))
        launches.append(lambda step=step: run(step, cache))  # type: ignore[misc]
    timing = meter.time(launches)
    row = row_of(name, timing, theory.attention(spans, *heads, size), setup.ceilings)
    row |= {"context": sum(lengths), "gbs": read / timing.seconds / 1e9}
    return row | {"of_copy": read / timing.seconds / setup.ceilings.bandwidth}


BACKENDS = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION}


def _sdpa_decode(setup: Setup, meter: Meter, heads: Heads, batch: int, context: int, cache: Cache) -> Row:
    """us by backend, over the cache's own memory seen as contiguous [B, K, context, D]."""
    elements = batch * heads.num_kv_heads * context * heads.head_dim
    flat = [x.permute(0, 2, 1, 3).reshape(-1) for x in (cache.k, cache.v)]  # views: this is the memory's order
    copies = max(1, min(setup.copies(2 * elements * setup.dtype.itemsize), flat[0].numel() // elements))
    launches = []
    for i in range(copies):
        part = slice(i * elements, (i + 1) * elements)
        k, v = (x[part].view(batch, heads.num_kv_heads, context, heads.head_dim) for x in flat)
        q = torch.randn(batch, heads.num_heads, 1, heads.head_dim, dtype=setup.dtype, device=setup.device)
        launches.append(_sdpa(q, k, v, enable_gqa=True))
    return _by_backend(setup, meter, launches)


def _sdpa(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **options: Any) -> Callable[[], object]:
    return lambda: functional.scaled_dot_product_attention(q, k, v, **options)


def _by_backend(setup: Setup, meter: Meter, launches: Sequence[Callable[[], object]]) -> Row:
    """A backend that does not take these arguments has no figure."""
    if setup.tiny:
        return {"flash": 1e6 * meter.time(launches).seconds}
    found: Row = {}
    for name, backend in BACKENDS.items():
        try:
            with warnings.catch_warnings(), sdpa_kernel(backend):
                warnings.simplefilter("ignore")  # it says why it does not run
                found[name] = 1e6 * meter.time(launches).seconds
        except RuntimeError as error:
            if "out of memory" in str(error) or "CUDA error" in str(error):
                raise
    return found


def bench_prefill(setup: Setup, meter: Meter, rows: list[Row]) -> None:
    """Into ``rows``, so that a failure keeps what was measured before it.

    Prompts, fresh and behind a context. TFLOP/s counts visible pairs alone.
    """
    ragged = [(0, rows) for rows in (448, 64, 320, 200, 256, 136, 400, 224)]  # 2,048 tokens
    shapes, page = [Heads(32, 8, 128), Heads(16, 8, 128)], 64
    cases: dict[str, list[Span]] = {
        "512": [(0, 512)],
        "2k": [(0, 2048)],
        "8k": [(0, 8192)],
        "2k after 8k": [(8192, 2048)],
        "8 x 256": [(0, 256)] * 8,
        "8 ragged, 2k in all": ragged,
    }
    if setup.tiny:
        shapes, page = [Heads(4, 2, 16)], 16
        cases = {"20": [(0, 20)], "2k after 8k": [(20, 5)], "2 ragged": [(0, 7), (0, 3)]}
    for heads in shapes:
        for name, spans in cases.items():
            if setup.is_time_up():
                continue
            floor = theory.attention(spans, *heads, setup.dtype.itemsize)
            copies = setup.copies(floor.num_bytes)
            lengths = [start + n for start, n in spans]
            num_blocks = sum(-(-length // page) for length in lengths)
            cache = Cache(setup, copies * num_blocks * page, page, heads)
            launches: list[Callable[[], object]] = []
            blocks = torch.randperm(cache.num_blocks, device=setup.device, dtype=torch.int32)
            for i in range(copies):
                tables = torch.zeros(len(spans), -(-max(lengths) // page), dtype=torch.int32, device=setup.device)
                first = i * num_blocks
                for table, length in zip(tables, lengths, strict=True):
                    num = -(-length // page)
                    table[:num] = blocks[first : first + num]
                    first += num
                step = make_step(setup, heads, spans, tables)
                launches.append(lambda step=step, cache=cache: run(step, cache))  # type: ignore[misc]
            timing = meter.time(launches)
            row = row_of(f"{heads}: {name}", timing, floor, setup.ceilings)
            row |= {"case": name, "heads": str(heads), "tflops": floor.flops / timing.seconds / 1e12}
            row["of_gemm"] = floor.flops / timing.seconds / setup.ceilings.flops
            del launches, cache
            if len(set(spans)) == 1:
                row |= _sdpa_prefill(setup, meter, heads, spans, floor.flops)
            rows.append(with_theory(row))
            print_rows(rows[-1:], PREFILL_COLUMNS, name_width=NAME_WIDTH, with_head=len(rows) == 1)
            release()


PREFILL_COLUMNS = (
    ("us", "us", ".1f"),
    ("us_again", "again", ".1f"),
    *THEORY_COLUMNS,
    ("tflops", "TFLOP/s", ".0f"),
    ("of_gemm", "of gemm", ".1%"),
    ("flash", "flash TF/s", ".0f"),
    ("cudnn", "cuDNN TF/s", ".0f"),
)


def _sdpa_prefill(setup: Setup, meter: Meter, heads: Heads, spans: Sequence[Span], flops: float) -> Row:
    """TFLOP/s by backend. Behind a context the mask is torch's lower right triangle, which flash alone takes."""
    (start, num_rows), batch = spans[0], len(spans)
    options: dict[str, Any] = {"is_causal": True}
    num_kv_heads = heads.num_kv_heads
    if start:
        from torch.nn.attention.bias import causal_lower_right

        options = {"attn_mask": causal_lower_right(num_rows, start + num_rows)}
        num_kv_heads = heads.num_heads  # repeated before: this mask does not go with groups
    floor = theory.attention(spans, *heads, setup.dtype.itemsize)
    launches = []
    for _ in range(setup.copies(floor.num_bytes)):
        q = torch.randn(batch, heads.num_heads, num_rows, heads.head_dim, dtype=setup.dtype, device=setup.device)
        k, v = (
            torch.randn(batch, num_kv_heads, start + num_rows, heads.head_dim, dtype=setup.dtype, device=setup.device)
            for _ in range(2)
        )
        launches.append(_sdpa(q, k, v, enable_gqa=not start, **options))
    found = _by_backend(setup, meter, launches)
    return {name: flops / (us / 1e6) / 1e12 for name, us in found.items() if not (start and name == "cudnn")}
