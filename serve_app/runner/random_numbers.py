"""Counter-based random numbers: a pure function of (seed, choice index, position). Knows no tokens and no torch.

There is no generator state, so a replayed or recomputed position draws the same number on any replica, whatever else
is in the batch. Philox-4x32-10 of Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as 1, 2, 3" (SC
2011); the constants are the paper's, the known answers in the tests are those of the authors' Random123 library.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

UInt32Array = npt.NDArray[np.uint32]

_MULTIPLIERS = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
_WEYL = (np.uint64(0x9E3779B9), np.uint64(0xBB67AE85))
_NUM_ROUNDS = 10
_LOW = np.uint64(0xFFFFFFFF)
_HALF = np.uint64(32)


def philox(counter: UInt32Array, key: UInt32Array) -> UInt32Array:
    """Philox-4x32-10: counter uint32 [S, 4], key uint32 [S, 2] -> uint32 [S, 4], each row by itself.

    >>> [f"{word:08x}" for word in philox(np.zeros((1, 4), np.uint32), np.zeros((1, 2), np.uint32))[0]]
    ['6627e8d5', 'e169c58d', 'bc57ac4c', '9b00dbd8']
    """
    c0, c1, c2, c3 = counter.astype(np.uint64).T
    k0, k1 = key.astype(np.uint64).T
    for _ in range(_NUM_ROUNDS):
        # Words live in the low halves of uint64, so that a product of two of them is exact.
        even = c0 * _MULTIPLIERS[0]
        odd = c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = (odd >> _HALF) ^ c1 ^ k0, odd & _LOW, (even >> _HALF) ^ c3 ^ k1, even & _LOW
        k0, k1 = (k0 + _WEYL[0]) & _LOW, (k1 + _WEYL[1]) & _LOW
    return np.stack((c0, c1, c2, c3), axis=1).astype(np.uint32)


def uniform(seeds: npt.ArrayLike, choice_indices: npt.ArrayLike, positions: npt.ArrayLike) -> npt.NDArray[np.float64]:
    """One number in the open interval (0, 1) for each (seed, choice index, position): three [S] -> float64 [S].

    Seeds are 0 to 2**64 - 1, choice indices and positions 0 to 2**32 - 1. The key is the seed's two halves, the counter
    (position, choice index, 0, 0). The result is an odd multiple of 2**-53, the middle of one of 2**52 equal cells:
    exact in float64, never 0, never 1, symmetric around a half.

    >>> uniform([0], [0], [0]).tolist()
    [0.3990464708489646]
    """
    seeds = np.asarray(seeds, dtype=np.uint64)
    counter = np.zeros((len(seeds), 4), dtype=np.uint32)
    counter[:, 0] = positions
    counter[:, 1] = choice_indices
    words = philox(counter, np.stack((seeds & _LOW, seeds >> _HALF), axis=1).astype(np.uint32)).astype(np.uint64)
    cells = ((words[:, 0] << _HALF) | words[:, 1]) >> np.uint64(12)
    return (cells.astype(np.float64) + 0.5) * 2.0**-52
