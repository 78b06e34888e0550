"""Deterministic mode on a CPU: the proof at start-up, and what it sets. Knows bits; knows no sequences.

The kernels of kernels/cpu.py give a row the same bits in any company by construction. The products are a library's, and
whether a row's bits depend on how many rows run with it depends on the processor. So it is proved, on the model's own
shapes and element type: first for any number of rows, then for tiles of fixed sizes.

A proof over some row counts is evidence, not a theorem: it covers the counts where the library was seen to switch
kernels (powers of two, their neighbours, and odd ones between).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from serve_app.errors import DeterminismError
from serve_app.kernels import few_rows
from serve_app.kernels.linear import ANY, Linear
from serve_app.kernels.metadata import AttentionMetadata
from serve_app.kernels.ops import Ops

TILE_SIZES = (16, 32, 64, 128)
ROW_COUNTS = (2, 3, 7, 16, 17, 33, 64, 100, 128, 5, 31, 48, 65, 200, 256, 8, 127, 300, 384, 511)
"""The probed numbers of rows, most telling first."""
PROBE_FLOPS = 1e10
"""Work spent on one shape's row counts; a larger layer is probed at fewer of them, but always at the first five."""
ALWAYS_PROBED = 5


ShapeKey = tuple[int, int, bool, torch.dtype]
"""Linear.shape_key."""


@dataclass(frozen=True)
class Proof:
    """How products may run so that bits do not depend on the batch."""

    row_tiles: dict[ShapeKey, tuple[int, ...]]
    """The numbers of rows that the library may be given."""
    chain_depths: dict[ShapeKey, int]
    """How our own product for few rows sums up to the library's bits; 0 where it does not."""
    failures: tuple[str, ...]
    """What could not be proved, in words. Empty: deterministic mode holds."""

    @property
    def uses_fixed_tiles(self) -> bool:
        return any(tiles[-1] != ANY for tiles in self.row_tiles.values())


def prove(
    linears: Iterable[Linear],
    ops: Ops,
    max_rows: int,
    *,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    dtype: torch.dtype,
    block_size: int,
) -> Proof:
    """Probes one layer of each shape, and attention. Changes nothing; see `apply`."""
    row_tiles: dict[ShapeKey, tuple[int, ...]] = {}
    chain_depths: dict[ShapeKey, int] = {}
    failures = []
    for linear in linears:
        key = linear.shape_key
        if key in row_tiles:
            continue
        probe, x = linear.probe(max(max_rows, TILE_SIZES[-1]) + 32)
        tiles = provable_tiles(probe, x, max_rows)
        if tiles is None:
            failures.append(f"products of shape {key[1]} x {key[0]} in {str(key[3]).removeprefix('torch.')}")
        else:
            row_tiles[key] = tiles
            chain_depths[key] = provable_chain_depth(probe, x, tiles)
    if not _attention_is_invariant(ops, num_heads, num_kv_heads, head_dim, dtype, block_size):
        failures.append("attention")
    return Proof(row_tiles, chain_depths, tuple(failures))


def apply(proof: Proof, linears: Iterable[Linear]) -> None:
    """Restricts every layer to the row counts proved for its shape. Raises DeterminismError if something failed."""
    if proof.failures:
        raise DeterminismError(
            f"deterministic mode cannot be had on this machine: bits depend on the batch in {'; '.join(proof.failures)}."
            " Use deterministic=False, or another dtype"
        )
    for linear in linears:
        linear.row_tiles = proof.row_tiles[linear.shape_key]
        linear.chain_depth = proof.chain_depths[linear.shape_key]


def provable_tiles(linear: Linear, x: torch.Tensor, max_rows: int) -> tuple[int, ...] | None:
    """Row counts that give every row of ``x`` the same bits: (2, ANY) if all seem to, a set of TILE_SIZES, or None.

    x: more than max(max_rows, 128) rows, as `Linear.probe` makes them.
    """
    max_rows = max(max_rows, TILE_SIZES[0])
    if _any_count_agrees(linear, x, max_rows):
        return (2, ANY)
    groups: list[tuple[torch.Tensor, list[int]]] = []
    for tile in TILE_SIZES:
        y = _in_tiles(linear, x[: TILE_SIZES[-1]], tile)
        # The same rows at other places of the tile, in other company.
        shifted = _in_tiles(linear, x[5 : 5 + TILE_SIZES[-1]], tile)
        if not torch.equal(y[5:], shifted[:-5]):
            continue
        for result, sizes in groups:
            if torch.equal(result, y):
                sizes.append(tile)
                break
        else:
            groups.append((y, [tile]))
    if not groups:
        return None
    best = max((sizes for _, sizes in groups), key=lambda sizes: (len(sizes), -sizes[0]))
    return tuple(best)


def _any_count_agrees(linear: Linear, x: torch.Tensor, max_rows: int) -> bool:
    whole = linear.run(x[:max_rows])
    flops = 0.0
    for i, count in enumerate(ROW_COUNTS):
        offset = 17 if i % 2 else 0
        if count + offset > max_rows:
            continue
        if not torch.equal(linear.run(x[offset : offset + count]), whole[offset : offset + count]):
            return False
        flops += 2.0 * count * linear.in_features * linear.out_features
        if flops > PROBE_FLOPS and i + 1 >= ALWAYS_PROBED:
            break
    return True


def provable_chain_depth(linear: Linear, x: torch.Tensor, tiles: tuple[int, ...]) -> int:
    """The chain depth with which our own product for few rows gives the library's bits in ``tiles``, or 0."""
    if linear.panels is None:
        return 0
    count = tiles[0] if tiles[-1] != ANY else 2 * few_rows.MAX_ROWS
    whole = linear.run(x[:count])
    for depth in few_rows.DEPTHS:
        if all(torch.equal(linear.run_few(x[:n], depth), whole[:n]) for n in range(1, few_rows.MAX_ROWS + 1)):
            return depth
    return 0


def _in_tiles(linear: Linear, x: torch.Tensor, tile: int) -> torch.Tensor:
    return torch.cat([linear.run(x[start : start + tile]) for start in range(0, x.shape[0], tile)])


def _attention_is_invariant(
    ops: Ops, num_heads: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype, block_size: int
) -> bool:
    """One sequence of 300 tokens whole, in chunks of 7, and as its last row beside another sequence."""
    length = 300
    generator = torch.Generator().manual_seed(0)
    num_blocks = -(-length // block_size)
    k = torch.randn(num_blocks, num_kv_heads, head_dim, block_size, generator=generator).to(dtype).permute(0, 3, 1, 2)
    v = torch.randn(num_blocks, num_kv_heads, block_size, head_dim, generator=generator).to(dtype).permute(0, 2, 1, 3)
    q = torch.randn(length, num_heads, head_dim, generator=generator).to(dtype)

    def run(spans: list[tuple[int, int]]) -> torch.Tensor:
        lens = torch.tensor([end - start for start, end in spans], dtype=torch.int32)
        positions = torch.cat([torch.arange(start, end, dtype=torch.int32) for start, end in spans])
        metadata = AttentionMetadata(
            cu_seqlens_q=torch.cat((torch.zeros(1, dtype=torch.int32), lens.cumsum(0, dtype=torch.int32))),
            seq_lens=torch.tensor([end for _, end in spans], dtype=torch.int32),
            block_tables=torch.arange(num_blocks, dtype=torch.int32).repeat(len(spans), 1),
            slot_mapping=torch.full_like(positions, -1),
            positions=positions,
            max_query_len=int(lens.max()),
            max_seq_len=max(end for _, end in spans),
        )
        return ops.ragged_attention(q[positions.long()], k, v, metadata, scale=head_dim**-0.5)

    whole = run([(0, length)])
    chunked = torch.cat([run([(start, min(start + 7, length))]) for start in range(0, length, 7)])
    decodes = run([(length - 1, length), (99, 100), (0, 1)])
    return torch.equal(whole, chunked) and torch.equal(decodes, whole[[length - 1, 99, 0]])
