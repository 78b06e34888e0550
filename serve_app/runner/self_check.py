"""The start-up check of a model whose code is not ours: its rows, alone and in company. Knows no architecture.

Three questions, asked of the model as it is loaded, with some made-up tokens:

    does it attend as its authors' code does?        a short sequence, with their attention in place of ours
    does a row see other sequences' rows?            the same sequence in batches of several sizes
    are the rows' bits the same in any company?      the same again, to the bit (deterministic mode)

The first two must hold in every mode: the model is refused otherwise. This is evidence, not a theorem; that products and
attention give the same bits at every size is proved apart from it (runner/numerics.py).
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import NamedTuple, Protocol, runtime_checkable

import torch

from serve_app.errors import DeterminismError, UnsupportedModelError
from serve_app.kernels.metadata import AttentionMetadata
from serve_app.models.model import ModelConfig
from serve_app.runner.kv_cache import KVCache

LENGTH = 24
"""Tokens of the sequence that is watched."""
COMPANY = (1, 2, 5, 16, 77, 250)
"""Tokens of all others in each batch; as many as one step may have."""
TOLERANCES = {torch.float32: 1e-3, torch.float16: 3e-2, torch.bfloat16: 2e-1}
"""Of the distance between rows, relative to their length, in the median row: one near tie in a router may send a row to
another expert."""


@runtime_checkable
class SelfChecked(Protocol):
    """A `models.model.Model` that asks for this check."""

    config: ModelConfig
    embedding_VE: torch.Tensor

    def forward(
        self,
        input_ids: torch.Tensor,
        metadata: AttentionMetadata,
        logits_indices: torch.Tensor,
        k_caches: list[torch.Tensor],
        v_caches: list[torch.Tensor],
    ) -> torch.Tensor: ...

    def reference_logits(self, input_ids: torch.Tensor) -> torch.Tensor:
        """[N] ids of one sequence -> [N, V], with the attention of the model's authors."""
        ...


class _Span(NamedTuple):
    """Tokens [start, end) of a sequence; those before are in the cache."""

    token_ids: list[int]
    start: int
    end: int
    first_block: int


@torch.inference_mode()
def check_rows(
    model: SelfChecked,
    make_cache: Callable[[int], KVCache],
    block_size: int,
    max_rows: int,
    max_model_len: int,
    to_the_bit: bool,
    *,
    any_chunk: bool = True,
) -> None:
    """``make_cache``: from a number of blocks. ``any_chunk``: bits must not depend on how a sequence is cut, either.

    Raises UnsupportedModelError if the model cannot run here at all, DeterminismError if only its bits differ.
    """
    rng = random.Random(0)
    vocab_size = model.config.vocab_size
    length = max(1, min(LENGTH, max_rows, max_model_len - 1))
    tokens = [rng.randrange(vocab_size) for _ in range(length)]
    blocks_each = -(-max(length, *COMPANY) // block_size)
    cache = make_cache(3 * blocks_each)
    subject = _Span(tokens, 0, length, 0)

    def run(*spans: _Span) -> list[torch.Tensor]:
        return _run(model, cache, block_size, blocks_each, spans)

    whole = run(subject)[0]
    name = model.config.architecture
    if not torch.isfinite(whole).all():
        raise UnsupportedModelError(f"{name} gives logits that are not finite, for tokens {tokens[:8]} ...")
    _compare(name, "its own attention gives other logits than ours", model.reference_logits(_ids(model, tokens)), whole)

    differs = []
    seen = "a row of it depends on rows of other sequences"
    for num_others in COMPANY:
        num_others = min(num_others, max_model_len - 1)
        if length + num_others > max_rows:
            break
        other = [rng.randrange(vocab_size) for _ in range(num_others)]
        before = run(_Span(other, 0, num_others, blocks_each), subject)[1]
        behind = run(subject, _Span(other, 0, num_others, 2 * blocks_each))[0]
        for found in (before, behind):
            _compare(name, seen, whole, found)
            if not torch.equal(found, whole):
                differs.append(f"{length + num_others} rows")
    if any_chunk:
        for chunk in (1, 5, 16):
            cuts = [run(subject._replace(start=i, end=min(i + chunk, length)))[0] for i in range(0, length, chunk)]
            _compare(name, "a row of it depends on how a prompt is cut", whole, torch.cat(cuts))
            if not torch.equal(torch.cat(cuts), whole):
                differs.append(f"chunks of {chunk}")
    if differs and to_the_bit:
        raise DeterminismError(
            f"deterministic mode cannot be had with {name} here: bits of its rows depend on the batch"
            f" ({', '.join(dict.fromkeys(differs))}). Use deterministic=False, or another dtype"
        )


def _compare(name: str, what: str, expected: torch.Tensor, found: torch.Tensor) -> None:
    distance = (found.float() - expected.float()).norm(dim=1) / expected.float().norm(dim=1).clamp_min(1e-20)
    if float(distance.median()) > TOLERANCES[expected.dtype]:
        raise UnsupportedModelError(
            f"{name} cannot run here: {what} (a difference of {float(distance.median()):.2g} of a row's length)"
        )


def _ids(model: SelfChecked, token_ids: list[int]) -> torch.Tensor:
    return torch.tensor(token_ids, device=model.embedding_VE.device)


def _run(
    model: SelfChecked, cache: KVCache, block_size: int, blocks_each: int, spans: tuple[_Span, ...]
) -> list[torch.Tensor]:
    """The logits [tokens, V] of each span's rows."""
    device = model.embedding_VE.device

    def array(values: list[int]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int32, device=device)

    lens = [span.end - span.start for span in spans]
    starts = [sum(lens[:i]) for i in range(len(lens) + 1)]
    positions = [i for span in spans for i in range(span.start, span.end)]
    slots = [span.first_block * block_size + i for span in spans for i in range(span.start, span.end)]
    metadata = AttentionMetadata(
        cu_seqlens_q=array(starts),
        seq_lens=array([span.end for span in spans]),
        block_tables=array([span.first_block + i for span in spans for i in range(blocks_each)]).view(len(spans), -1),
        slot_mapping=array(slots),
        positions=array(positions),
        max_query_len=max(lens),
        max_seq_len=max(span.end for span in spans),
    )
    ids = _ids(model, [token for span in spans for token in span.token_ids[span.start : span.end]])
    rows = torch.arange(len(ids), device=device)
    logits = model.forward(ids, metadata, rows, cache.k, cache.v)
    return [logits[starts[i] : starts[i + 1]].clone() for i in range(len(spans))]
