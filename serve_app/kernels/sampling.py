"""From rows of logits to token ids, and to log-probabilities. Knows rows of numbers only (sampling_rows.py).

    scan     largest logit of each chunk, its lowest id, NaN and +inf                              (S, C) programs
    draw     argmax of weight / exponential over what sampling_cut.py kept                         (S, C)
    choose   over the chunks: token id and flags                                                   (S)
    logprob  log-probabilities of a token and of the likeliest, by raw logits                      (A)

A row whose logits are edited (sampling_edits.py) is scanned, cut and drawn from the edited copy.

The draw. With independent exponentials E_i, token i has the largest w_i / E_i with probability w_i / sum(w): the race
behind the Gumbel argmax, log(w_i) - log(E_i), without its outer logarithm, so that equal weights stay exactly equal.
E_i comes from Philox-4x32-10 (see runner/random_numbers.py): key = the seed's halves, counter = (position, choice,
token // 4, 1), word token % 4.
"""

# mypy: allow-incomplete-defs, allow-untyped-defs
# (Triton reads the annotations of a kernel: only constants have one.)

from __future__ import annotations

import torch
import triton
import triton.language as tl

from serve_app.kernels.sampling_cut import cut
from serve_app.kernels.sampling_rows import (
    EDITED,
    INFINITY,
    INVERSE_TEMPERATURE,
    MIN_P,
    NUM_FIELDS,
    ROW_WORDS,
    SOURCE,
    Field,
    Flag,
    Scratch,
    bound_if,
    flags_of,
    float_field,
    keys_of,
    load_logits,
    row_best,
    weights_of,
    without_nan,
)

_SEED_LOW = tl.constexpr(int(Field.SEED_LOW))
_SEED_HIGH = tl.constexpr(int(Field.SEED_HIGH))
_CHOICE = tl.constexpr(int(Field.CHOICE))
_POSITION = tl.constexpr(int(Field.POSITION))
_NOTHING = tl.constexpr(int(Flag.NOTHING))


# ---------------------------------------------------------------------------------------------------------- kernels


@triton.jit
def _exponentials(p_row, first_token, BLOCK: tl.constexpr):
    """Standard exponential numbers of tokens first_token (a multiple of 4) and on: float32 [BLOCK], all above 0.

    -log(1 - w) with w = (r + 1/2) / 2**32. Small ones win races, so they get the series, whose relative error is small
    however small w is; the others -log(u), with u = 1 - w made from the bits and not by subtraction.
    """
    low = tl.load(p_row + _SEED_LOW).to(tl.uint32, bitcast=True).to(tl.uint64)
    high = tl.load(p_row + _SEED_HIGH).to(tl.uint32, bitcast=True).to(tl.uint64)
    # [BLOCK / 4]
    o_quads = (first_token // 4 + tl.arange(0, BLOCK // 4)).to(tl.uint32)
    zero = o_quads * 0
    position = zero + tl.load(p_row + _POSITION).to(tl.uint32, bitcast=True)
    choice = zero + tl.load(p_row + _CHOICE).to(tl.uint32, bitcast=True)
    r_0, r_1, r_2, r_3 = tl.philox((high << 32) | low, position, choice, o_quads, zero + 1)
    # [BLOCK], in the order 0 1 2 3 of each quad
    b_random = tl.interleave(tl.interleave(r_0, r_2), tl.interleave(r_1, r_3))
    b_w = (b_random.to(tl.float32) + 0.5) * (1.0 / 4294967296.0)
    b_u = ((~b_random).to(tl.float32) + 0.5) * (1.0 / 4294967296.0)
    b_series = b_w * (1.0 + b_w * (0.5 + b_w * (0.33333334 + b_w * 0.25)))
    return tl.where(b_w < 0.015625, b_series, -tl.log(b_u))


@triton.jit
def scan_kernel(
    p_logits,
    stride,
    p_edited,
    p_params,
    p_maxima,
    p_best_ids,
    p_flags,
    vocab_size,
    CHUNK: tl.constexpr,
    HAS_EDITS: tl.constexpr,
):
    """Each chunk's largest logit, its lowest id, and its worst flag."""
    i_row, i_chunk, num_chunks = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    o_tokens = i_chunk * CHUNK + tl.arange(0, CHUNK)
    p_row = p_params + i_row * ROW_WORDS
    b_logits = load_logits(p_logits, stride, p_edited, vocab_size, p_row, o_tokens, HAS_EDITS)
    flag = tl.max(flags_of(b_logits))
    value, place = tl.max(without_nan(b_logits), 0, return_indices=True)
    o_out = i_row * num_chunks + i_chunk
    tl.store(p_maxima + o_out, value)
    tl.store(p_best_ids + o_out, i_chunk * CHUNK + place)
    tl.store(p_flags + o_out, flag)


@triton.jit
def draw_kernel(
    p_logits,
    stride,
    p_edited,
    p_params,
    p_maxima,
    p_cuts,
    p_scores,
    p_ids,
    vocab_size,
    CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr,
    HAS_EDITS: tl.constexpr,
    HAS_CUTS: tl.constexpr,
):
    """Each chunk's winner of weight / exponential among what is kept, lowest id on ties. Greedy rows leave at once."""
    i_row, i_chunk, num_chunks = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    p_row = p_params + i_row * ROW_WORDS
    inverse_temperature = float_field(p_row, INVERSE_TEMPERATURE)
    if inverse_temperature > 0.0:
        o_tokens = i_chunk * CHUNK + tl.arange(0, CHUNK)
        b_logits = load_logits(p_logits, stride, p_edited, vocab_size, p_row, o_tokens, HAS_EDITS)
        b_logits = without_nan(b_logits)
        best = row_best(p_maxima + i_row * num_chunks, num_chunks, CHUNKS)
        b_weights = weights_of(b_logits, best, inverse_temperature, float_field(p_row, MIN_P))
        if HAS_CUTS:
            cut = tl.load(p_cuts + 2 * i_row).to(tl.uint32, bitcast=True)
            last_equal = tl.load(p_cuts + 2 * i_row + 1)
            b_keys = keys_of(b_logits)
            b_weights = tl.where((b_keys > cut) | ((b_keys == cut) & (o_tokens <= last_equal)), b_weights, 0.0)
        b_scores = b_weights / _exponentials(p_row, i_chunk * CHUNK, CHUNK)
        score, place = tl.max(b_scores, 0, return_indices=True)
        tl.store(p_scores + i_row * num_chunks + i_chunk, score)
        tl.store(p_ids + i_row * num_chunks + i_chunk, i_chunk * CHUNK + place)


@triton.jit
def choose_kernel(
    p_params,
    p_maxima,
    p_best_ids,
    p_flags,
    p_raw_flags,
    p_scores,
    p_ids,
    p_out,
    num_chunks,
    CHUNKS: tl.constexpr,
    HAS_EDITS: tl.constexpr,
    DRAWS: tl.constexpr,
):
    """Token ids and flags: out int32 [2, S]. A row with a flag gets token 0, which every vocabulary has."""
    i_row, num_rows = tl.program_id(0), tl.num_programs(0)
    p_row = p_params + i_row * ROW_WORDS
    # [CHUNKS]
    o_chunks = tl.arange(0, CHUNKS)
    m_chunks = o_chunks < num_chunks
    o_in = i_row * num_chunks + o_chunks
    best, place = tl.max(tl.load(p_maxima + o_in, mask=m_chunks, other=-INFINITY), 0, return_indices=True)
    token = tl.load(p_best_ids + i_row * num_chunks + place)
    flag = tl.max(tl.load(p_flags + o_in, mask=m_chunks, other=0))
    flag = tl.where((flag == 0) & (best == -INFINITY), _NOTHING, flag)
    if HAS_EDITS:
        is_edited = tl.load(p_row + EDITED) >= 0
        flag += 4 * tl.max(tl.load(p_raw_flags + o_in, mask=o_chunks < bound_if(is_edited, num_chunks), other=0))
    if DRAWS:
        draws = float_field(p_row, INVERSE_TEMPERATURE) > 0.0
        b_scores = tl.load(p_scores + o_in, mask=o_chunks < bound_if(draws, num_chunks), other=-1.0)
        _, place = tl.max(b_scores, 0, return_indices=True)
        token = tl.where(draws, tl.load(p_ids + i_row * num_chunks + place, mask=draws, other=0), token)
    tl.store(p_out + i_row, tl.where(flag == 0, token, 0))
    tl.store(p_out + num_rows + i_row, flag)


@triton.jit
def logprob_kernel(
    p_logits,
    stride,
    p_params,
    p_maxima,
    p_flags,
    p_cuts,
    p_targets,
    p_chosen,
    p_out,
    vocab_size,
    num_chunks,
    BLOCK: tl.constexpr,
    CHUNKS: tl.constexpr,
    TOP: tl.constexpr,
):
    """int32 [A, 4 + 2 TOP], floats by their bits: flag, best logit, sum of exp(logit - best), the token's own logit,
    then the ids and the logits of the likeliest, in the order of ids.

    ``targets`` int32 [A, 2]: the token, or -1 for what was chosen in the row; how many of the likeliest.
    """
    i_row = tl.program_id(0)
    p_row = p_params + i_row * ROW_WORDS
    p_out += i_row * (4 + 2 * TOP)
    source = tl.load(p_row + SOURCE)
    target = tl.load(p_targets + 2 * i_row)
    target = tl.where(target >= 0, target, tl.load(p_chosen + source, mask=target < 0, other=0))
    num_top = tl.load(p_targets + 2 * i_row + 1)
    cut = tl.load(p_cuts + 2 * i_row).to(tl.uint32, bitcast=True)
    last_equal = tl.load(p_cuts + 2 * i_row + 1)
    o_chunks = tl.arange(0, CHUNKS)
    o_in = i_row * num_chunks + o_chunks
    flag = tl.max(tl.load(p_flags + o_in, mask=o_chunks < num_chunks, other=0))
    peak = tl.max(tl.load(p_maxima + o_in, mask=o_chunks < num_chunks, other=-INFINITY))
    flag = tl.where((flag == 0) & (peak == -INFINITY), _NOTHING, flag)
    best = row_best(p_maxima + i_row * num_chunks, num_chunks, CHUNKS)
    total = best.to(tl.float64) * 0.0
    num_found = num_top * 0
    for start in range(0, vocab_size, BLOCK):
        o_tokens = start + tl.arange(0, BLOCK)
        b_logits = load_logits(p_logits, stride, p_logits, vocab_size, p_row, o_tokens, False)
        b_logits = without_nan(b_logits)
        total += tl.sum(weights_of(b_logits, best, 1.0, 0.0)).to(tl.float64)
        b_keys = keys_of(b_logits)
        m_top = (b_keys > cut) | ((b_keys == cut) & (o_tokens <= last_equal))
        m_top = m_top & (o_tokens < bound_if(num_top > 0, vocab_size))
        b_top = m_top.to(tl.int32)
        o_places = num_found + tl.cumsum(b_top, 0) - 1
        m_top = m_top & (o_places < num_top)
        tl.store(p_out + 4 + o_places, o_tokens, mask=m_top)
        tl.store(p_out + 4 + TOP + o_places, b_logits.to(tl.int32, bitcast=True), mask=m_top)
        num_found += tl.sum(b_top)
    own = tl.load(p_logits + source.to(tl.int64) * stride + target).to(tl.float32)
    tl.store(p_out, flag)
    tl.store(p_out + 1, best.to(tl.int32, bitcast=True))
    tl.store(p_out + 2, total.to(tl.float32).to(tl.int32, bitcast=True))
    tl.store(p_out + 3, own.to(tl.int32, bitcast=True))


# ------------------------------------------------------------------------------------------------------ the host side


def scan(logits_SV: torch.Tensor, params: torch.Tensor, scratch: Scratch, edited: torch.Tensor | None = None) -> None:
    """Fill scratch.maxima, best_ids and flags. ``edited``: float32 [*, V], read by rows with a Field.EDITED."""
    assert logits_SV.stride(1) == 1 and params.shape[1] == NUM_FIELDS and len(params) <= scratch.max_rows
    scan_kernel[(len(params), scratch.num_chunks)](
        logits_SV,
        logits_SV.stride(0),
        logits_SV if edited is None else edited,
        params,
        scratch.maxima,
        scratch.best_ids,
        scratch.flags,
        scratch.vocab_size,
        CHUNK=scratch.chunk,
        HAS_EDITS=edited is not None,
        num_warps=8,
    )


def draw(
    logits_SV: torch.Tensor,
    params: torch.Tensor,
    scratch: Scratch,
    edited: torch.Tensor | None = None,
    *,
    has_cuts: bool,
) -> None:
    """Fill scratch.scores and ids, after `scan`, and after `cut` where some row truncates."""
    draw_kernel[(len(params), scratch.num_chunks)](
        logits_SV,
        logits_SV.stride(0),
        logits_SV if edited is None else edited,
        params,
        scratch.maxima,
        scratch.cuts,
        scratch.scores,
        scratch.ids,
        scratch.vocab_size,
        CHUNK=scratch.chunk,
        CHUNKS=triton.next_power_of_2(scratch.num_chunks),
        HAS_EDITS=edited is not None,
        HAS_CUTS=has_cuts,
        num_warps=8,
    )


def choose(params: torch.Tensor, scratch: Scratch, out: torch.Tensor, *, has_edits: bool, draws: bool) -> None:
    """Token ids and flags into ``out``, int32 [2, S], after `scan` and, where some row samples, `draw`."""
    assert out.shape == (2, len(params)) and out.is_contiguous() and out.dtype == torch.int32
    choose_kernel[(len(params),)](
        params,
        scratch.maxima,
        scratch.best_ids,
        scratch.flags,
        scratch.raw_flags,
        scratch.scores,
        scratch.ids,
        out,
        scratch.num_chunks,
        CHUNKS=triton.next_power_of_2(scratch.num_chunks),
        HAS_EDITS=has_edits,
        DRAWS=draws,
        num_warps=1,
    )


def logprobs(
    logits_NV: torch.Tensor,
    params: torch.Tensor,
    scratch: Scratch,
    targets: torch.Tensor,
    chosen: torch.Tensor,
    out: torch.Tensor,
) -> None:
    """See logprob_kernel. ``params``: one row per answer, with SOURCE, TOP_K, temperature 1. ``chosen``: token ids."""
    scan(logits_NV, params, scratch)
    cut(logits_NV, params, scratch)
    logprob_kernel[(len(params),)](
        logits_NV,
        logits_NV.stride(0),
        params,
        scratch.maxima,
        scratch.flags,
        scratch.cuts,
        targets,
        chosen,
        out,
        scratch.vocab_size,
        scratch.num_chunks,
        BLOCK=2 * scratch.block,
        CHUNKS=triton.next_power_of_2(scratch.num_chunks),
        TOP=(out.shape[1] - 4) // 2,
        num_warps=8,
    )
