"""plan_work: which program of ragged attention computes which rows. Knows lengths and classes; no tensors, no GPU.

Every row (a token of this step) belongs to one of two classes, which are different kernels on the device:

    prompt class    tiles of up to ``rows_per_tile`` rows of one sequence; one program walks over all keys they see
    decode class    one row; its keys are cut into splits, one program each, and a second kernel merges the splits

    rows of the step     0 1 2 3 4 5 6 7 8 | 9 | 10 11 12 13        rows_per_tile = 4
    sequence                     0           1        2
    class                p p p p p p p p p   d   p  p  d  d         sequence 2: two rows of the prompt are missing, and
    tiles               [0 1 2 3|4 5 6 7|8]     [10 11]             two replayed output tokens stand behind them
    decodes                                 [9]        [12] [13]

Two rules say which class a row has. In deterministic mode the *position* decides: before ``num_prompt_tokens`` it is the
prompt class, from there on the decode class, so that the bits of a position do not depend on how many tokens a step
granted. In fast mode a sequence with one row is a decode, and any longer span is tiled.

The split rule looks at the number of keys that the row sees, and at nothing else: S(length) = max(256,
next_pow2(ceil(length / 16))) keys at most for each split, so at most 16 splits. So a row is summed in the same order in
any company, and the longest sequence of a step is still spread over the device. (SGLang's deterministic mode splits at a
fixed 256; FlashInfer's planner makes such lists on the host, arXiv 2501.01005.)

Longest first in each list: what takes long starts early. Entries past the live ones have sequence -1.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

MAX_SPLITS = 16
"""Splits of one decode; the base in which an entry of ``splits`` packs its place."""
MIN_SPLIT_KEYS = 256
_LIMITS = MIN_SPLIT_KEYS * MAX_SPLITS << np.arange(18, dtype=np.int64)
"""Up to _LIMITS[i] keys, a split has at most MIN_SPLIT_KEYS << i."""

Int32Array = npt.NDArray[np.int32]


class Capacity(NamedTuple):
    """Entries of the fixed buffers that a CUDA graph reads."""

    num_tiles: int
    num_decodes: int
    num_splits: int


class WorkList(NamedTuple):
    """All int32, C-contiguous. Rows are rows of the step; lengths count keys from position 0."""

    tiles: Int32Array
    """[T, 4]: (sequence, first row, number of rows, keys that the last of them sees)."""

    splits: Int32Array
    """[P, 4]: (sequence, row, keys that it sees, number of splits * MAX_SPLITS + which of them). The splits of a row lie
    side by side; entry i leaves its partial result in place i of the workspace."""

    decodes: Int32Array
    """[Q, 4]: (sequence, row, first entry in ``splits``, number of splits)."""

    counts: Int32Array
    """[4]: live entries of tiles, splits and decodes, and 0."""


def num_splits(lengths: npt.NDArray[np.integer]) -> npt.NDArray[np.int64]:
    """How many splits a row has that sees ``lengths`` keys (each at least 1).

    >>> num_splits(np.array([1, 256, 257, 4096, 4097, 8192, 100_000])).tolist()
    [1, 1, 2, 16, 9, 16, 13]
    """
    keys_of_a_split = MIN_SPLIT_KEYS << np.searchsorted(_LIMITS, lengths)
    return -(-lengths // keys_of_a_split)


def max_num_splits(num_decodes: int, num_keys: int) -> int:
    """The most splits that ``num_decodes`` rows can have which together see ``num_keys`` keys: for a Capacity.

    A row of n splits sees more than (n - 1) * 256 keys.

    >>> max_num_splits(4, 700), max_num_splits(4, 1_000_000)
    (6, 64)
    """
    return min(num_decodes * MAX_SPLITS, num_decodes + num_keys // MIN_SPLIT_KEYS)


def plan_work(
    cu_seqlens_q: npt.NDArray[np.integer],
    seq_lens: npt.NDArray[np.integer],
    num_prompt_tokens: npt.NDArray[np.integer] | None,
    *,
    rows_per_tile: int,
    capacity: Capacity | None = None,
) -> WorkList:
    """The work of one step.

    ``cu_seqlens_q`` [B+1], ``seq_lens`` [B]: as in AttentionMetadata. ``num_prompt_tokens`` [B]: where the decode class
    begins in each sequence; None: fast mode. ``rows_per_tile``: the tokens of a prompt tile (its rows / queries per kv
    head). ``capacity``: sizes of the arrays; None: as many as there are, so that no entry is unused.

    Raises ValueError if the work does not fit the capacity.

    The picture above, the sequences 9, 5 and 1000 keys long, 998 of the last from the prompt:

    >>> work = plan_work(np.array([0, 9, 10, 14]), np.array([9, 5, 1000]), np.array([9, 4, 998]), rows_per_tile=4)
    >>> work.tiles.tolist()
    [[2, 10, 2, 998], [0, 8, 1, 9], [0, 4, 4, 8], [0, 0, 4, 4]]
    >>> work.decodes.tolist()
    [[2, 13, 0, 4], [2, 12, 4, 4], [1, 9, 8, 1]]
    >>> work.splits[4:].tolist()
    [[2, 12, 999, 64], [2, 12, 999, 65], [2, 12, 999, 66], [2, 12, 999, 67], [1, 9, 5, 16]]
    >>> work.counts.tolist()
    [4, 9, 3, 0]
    """
    starts = np.asarray(cu_seqlens_q, dtype=np.int64)
    lens = starts[1:] - starts[:-1]
    contexts = seq_lens - lens  # the position of each sequence's first row
    if num_prompt_tokens is None:
        num_tiled = np.where(lens == 1, 0, lens)
    else:
        num_tiled = np.minimum(np.maximum(num_prompt_tokens - contexts, 0), lens)

    if num_tiled.any():
        sequence, place = _spread(-(-num_tiled // rows_per_tile))
        first = place * rows_per_tile
        rows = np.minimum(num_tiled[sequence] - first, rows_per_tile)
        lengths = contexts[sequence] + first + rows
        tiles = _longest_first(lengths, sequence, starts[sequence] + first, rows, lengths)
    else:  # most steps: decodes alone
        tiles = np.empty((0, 4), dtype=np.int32)

    sequence, place = _spread(lens - num_tiled)
    place += num_tiled[sequence]
    lengths = contexts[sequence] + place + 1
    decodes = _longest_first(lengths, sequence, starts[sequence] + place, lengths, num_splits(lengths))
    which, place = _spread(decodes[:, 3])
    splits = decodes.take(which, axis=0)  # decodes[which] takes 25 times as long
    splits[:, 3] *= MAX_SPLITS
    splits[:, 3] += place
    decodes[:, 2] = np.cumsum(decodes[:, 3]) - decodes[:, 3]

    counts = np.array([len(tiles), len(splits), len(decodes), 0], dtype=np.int32)
    if capacity is not None:
        tiles = _padded("tiles", tiles, capacity.num_tiles)
        splits = _padded("splits", splits, capacity.num_splits)
        decodes = _padded("decodes", decodes, capacity.num_decodes)
    return WorkList(tiles, splits, decodes, counts)


def _spread(counts: npt.NDArray[np.integer]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """(owner, place): owner i counts[i] times, with 0, 1, ... beside it. [2, 0, 1] -> [0, 0, 2], [0, 1, 0]."""
    owner = np.repeat(np.arange(len(counts)), counts)
    ends = np.cumsum(counts)
    return owner, np.arange(len(owner)) - (ends - counts).take(owner)


def _longest_first(lengths: npt.NDArray[np.int64], *columns: npt.NDArray[np.integer]) -> Int32Array:
    entries = np.empty((len(lengths), len(columns)), dtype=np.int32)
    order = np.argsort(-lengths, kind="stable")
    for i, column in enumerate(columns):
        entries[:, i] = column[order]
    return entries


def _padded(name: str, entries: Int32Array, capacity: int) -> Int32Array:
    if len(entries) > capacity:
        raise ValueError(f"{len(entries)} {name} of attention do not fit a capacity of {capacity}")
    padded = np.full((capacity, entries.shape[1]), -1, dtype=np.int32)
    padded[: len(entries)] = entries
    return padded
