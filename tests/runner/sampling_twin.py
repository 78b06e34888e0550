"""The device sampler's oracle, in numpy and torch: which token wins a row. Written to be read; no blocks, no batch."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import numpy.typing as npt
import torch

from serve_app.engine.sequence import Sequence
from serve_app.runner.random_numbers import philox
from serve_app.runner.sampler import _Edits, _edits_logits


def exponentials(
    seed: int, choice_indices: Iterable[int], positions: Iterable[int], vocab_size: int
) -> npt.NDArray[np.float32]:
    """Standard exponential numbers [S, V], float32: word token % 4 of Philox at (position, choice, token // 4, 1)."""
    choices, places = np.array([*choice_indices]), np.array([*positions])
    num_quads = -(-vocab_size // 4)
    counter = np.ones((len(choices), num_quads, 4), dtype=np.uint32)
    counter[:, :, 0] = places[:, None]
    counter[:, :, 1] = choices[:, None]
    counter[:, :, 2] = np.arange(num_quads)
    key = np.broadcast_to(np.array([seed & 0xFFFFFFFF, seed >> 32], dtype=np.uint32), (counter.size // 4, 2))
    words = philox(counter.reshape(-1, 4), key).reshape(len(choices), -1)[:, :vocab_size]
    w = (words.astype(np.float32) + np.float32(0.5)) * np.float32(2.0**-32)
    u = ((~words).astype(np.float32) + np.float32(0.5)) * np.float32(2.0**-32)
    series = w * (1 + w * (np.float32(0.5) + w * (np.float32(1 / 3) + w * np.float32(0.25))))
    return np.where(w < np.float32(1 / 64), series, -np.log(u))


def edited_logits(
    logits_V: torch.Tensor, sequence: Sequence, mask: npt.NDArray[np.int32] | None = None
) -> torch.Tensor:
    """float32: as the CPU sampler edits them."""
    edited = logits_V.float().clone()
    if mask is not None or _edits_logits(sequence):
        _Edits(sequence, len(logits_V)).apply(logits_V.float().numpy(), mask, edited.numpy())
    return edited


def draw(
    logits_V: torch.Tensor, sequence: Sequence, kept: Iterable[int], mask: npt.NDArray[np.int32] | None = None
) -> int:
    """The ``kept`` token with the largest weight / exponential."""
    sampling = sequence.request.sampling
    assert sampling.seed is not None
    assert sampling.temperature
    edited = edited_logits(logits_V, sequence, mask)
    weights = torch.exp((edited - edited.max()) * np.float32(1 / sampling.temperature))
    position = len(sequence.token_ids)
    (numbers,) = exponentials(sampling.seed, [sequence.request.choice_index], [position], len(logits_V))
    scores = torch.zeros(len(logits_V))
    index = torch.tensor(sorted(kept))
    scores[index] = weights[index] / torch.from_numpy(numbers)[index]
    return int(scores.argmax())
