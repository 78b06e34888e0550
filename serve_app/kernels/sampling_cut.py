"""The cut: which tokens of a row top_k and top_p keep, without sorting the vocabulary. Knows no draw.

    cut     every key above the cut is kept, and equals of it up to a token id     (S) programs, after `sampling.scan`

Floats order as 32-bit keys, so the least key that is kept is found by halving an interval of them, from sums over the row:
how many tokens, or how much mass, is at a key or above. Mass is exp((logit - best) / temperature) in units of 2**-40, as
an integer: a sum has no order, and all of a vocabulary (below 2**22 tokens) stays below 2**63. A histogram over the
distance from the best logit first says which tokens can matter; where they fit, they are copied together and only they
are searched.
"""

# mypy: allow-incomplete-defs, allow-untyped-defs
# (Triton reads the annotations of a kernel: only constants have one.)

from __future__ import annotations

import torch
import triton
import triton.language as tl

from serve_app.kernels.sampling_rows import (
    INFINITY,
    INVERSE_TEMPERATURE,
    MIN_P,
    ROW_WORDS,
    Field,
    Scratch,
    float_field,
    keys_of,
    load_logits,
    row_best,
    weights_of,
    without_nan,
)

_TOP_K = tl.constexpr(int(Field.TOP_K))
_TOP_P_LOW = tl.constexpr(int(Field.TOP_P_LOW))
_TOP_P_HIGH = tl.constexpr(int(Field.TOP_P_HIGH))
_NUM_BINS = tl.constexpr(512)
_BINS_PER_NAT = tl.constexpr(32.0)
_MASS_UNIT = tl.constexpr(float(2**40))


# ------------------------------------------------------------------------------------------------- parts of the kernel


@triton.jit
def _mass(b_weights):
    return (b_weights * _MASS_UNIT).to(tl.int64)


@triton.jit
def _bins(b_logits, best, inverse_temperature):
    """int32: which 1/32 of a nat below the best logit, never less for a lesser logit. The last bin holds all the rest."""
    b_distance = (best - b_logits) * inverse_temperature * _BINS_PER_NAT
    return tl.maximum(tl.minimum(b_distance, _NUM_BINS - 1.0), 0.0).to(tl.int32)


@triton.jit
def _items(start, source, BLOCK: tl.constexpr, HAS_EDITS: tl.constexpr):
    """Logits, which are tokens, and ids of the items from ``start`` on.

    ``source``: num_compact candidates at p_values and p_ids, or, where that is 0, the num_whole tokens of the row.
    """
    p_values, p_ids, num_compact, p_logits, stride, p_edited, p_row, num_whole = source
    # [BLOCK]
    o_items = start + tl.arange(0, BLOCK)
    m_compact = o_items < num_compact
    b_values = tl.load(p_values + o_items, mask=m_compact, other=-INFINITY)
    b_ids = tl.load(p_ids + o_items, mask=m_compact, other=-1)
    b_logits = without_nan(load_logits(p_logits, stride, p_edited, num_whole, p_row, o_items, HAS_EDITS))
    m_items = o_items < num_compact + num_whole
    return tl.where(m_compact, b_values, b_logits), m_items, tl.where(m_compact, b_ids, o_items)


@triton.jit
def _search(count_wanted, mass_wanted, source, num_items, shape, BLOCK: tl.constexpr, HAS_EDITS: tl.constexpr):
    """The largest key of an item at or above which there are that many items and that much mass.

    Returns it with the number of items above it, their mass, and the mass of each item at it. The interval of keys is
    halved; both ends are always keys of items, so as many rounds are needed as there are bits that tell items apart,
    which are few where the candidates are.
    """
    best, inverse_temperature, min_p = shape
    low, high = _least_and_largest(source, num_items, BLOCK, HAS_EDITS)
    count_above, mass_above = count_wanted * 0, mass_wanted * 0
    while low < high:
        middle = high - ((high - low) >> 1)
        count, mass = count_wanted * 0, mass_wanted * 0
        next_low, next_high = high, low
        for start in range(0, num_items, BLOCK):
            b_logits, m_items, _ids = _items(start, source, BLOCK, HAS_EDITS)
            b_keys = keys_of(b_logits)
            m_above = m_items & (b_keys >= middle)
            b_mass = _mass(weights_of(b_logits, best, inverse_temperature, min_p))
            count += tl.sum(m_above.to(tl.int32))
            mass += tl.sum(tl.where(m_above, b_mass, 0))
            next_low = tl.minimum(next_low, tl.min(tl.where(m_above, b_keys, high)))
            next_high = tl.maximum(next_high, tl.max(tl.where(m_items & (b_keys < middle), b_keys, low)))
        accepted = (count >= count_wanted) & (mass >= mass_wanted)
        low = tl.where(accepted, next_low, low)
        high = tl.where(accepted, high, next_high)
        count_above = tl.where(accepted, count_above, count)
        mass_above = tl.where(accepted, mass_above, mass)
    # Back from the key to its logit, for the mass that each of its items has.
    bits = tl.where((low >> 31) != 0, low & 0x7FFFFFFF, ~low)
    mass_each = _mass(weights_of(bits.to(tl.float32, bitcast=True), best, inverse_temperature, min_p))
    return low, count_above, mass_above, mass_each


@triton.jit
def _least_and_largest(source, num_items, BLOCK: tl.constexpr, HAS_EDITS: tl.constexpr):
    """The least and the largest key of the items."""
    low = (num_items * 0).to(tl.uint32) | 0xFFFFFFFF
    high = low * 0
    for start in range(0, num_items, BLOCK):
        b_logits, m_items, _ids = _items(start, source, BLOCK, HAS_EDITS)
        b_keys = keys_of(b_logits)
        low = tl.minimum(low, tl.min(tl.where(m_items, b_keys, 0xFFFFFFFF)))
        high = tl.maximum(high, tl.max(tl.where(m_items, b_keys, 0)))
    return low, high


@triton.jit
def _num_to_reach(mass, mass_each):
    """How many times mass_each, at most 2**40, make at least ``mass``; at most 2**23 times, so no product overflows."""
    number = mass * 0
    bit = number + 4194304
    for _ in range(23):
        number = tl.where((number + bit) * mass_each < mass, number + bit, number)
        bit = bit >> 1
    return (number + 1).to(tl.int32)


@triton.jit
def _place_of_equal(number, cut, source, num_items, BLOCK: tl.constexpr, HAS_EDITS: tl.constexpr):
    """Token id of the ``number``-th token whose key is ``cut``, counted from 1 in the order of ids; else -1."""
    seen, place, num_before = number * 0, number * 0, number * 0
    for start in range(0, num_items, BLOCK):
        b_logits, m_items, _ids = _items(start, source, BLOCK, HAS_EDITS)
        num_here = tl.sum((m_items & (keys_of(b_logits) == cut)).to(tl.int32))
        is_here = (seen < number) & (seen + num_here >= number)
        place = tl.where(is_here, start, place)
        num_before = tl.where(is_here, seen, num_before)
        seen += num_here
    b_logits, m_items, b_ids = _items(place, source, BLOCK, HAS_EDITS)
    b_equal = (m_items & (keys_of(b_logits) == cut)).to(tl.int32)
    b_number = b_equal * (num_before + tl.cumsum(b_equal, 0))
    return tl.max(tl.where(b_number == number, b_ids, -1))


@triton.jit
def _share(top_p, total):
    """The mass that top_p of ``total`` is, at least one unit: a token is kept if less than that lies before it."""
    return tl.maximum(tl.ceil(top_p * total.to(tl.float64)).to(tl.int64), 1)


# ----------------------------------------------------------------------------------------- the kernel and its host side


@triton.jit
def cut_kernel(
    p_logits,
    stride,
    p_edited,
    p_params,
    p_maxima,
    p_values,
    p_ids,
    p_cuts,
    vocab_size,
    num_chunks,
    BLOCK: tl.constexpr,
    CHUNKS: tl.constexpr,
    CAPACITY: tl.constexpr,
    HAS_EDITS: tl.constexpr,
):
    """cuts int32 [S, 2]: the cut's key, and the last id that is kept of those with that key. (0, V) keeps all."""
    i_row = tl.program_id(0)
    p_row = p_params + i_row * ROW_WORDS
    inverse_temperature = float_field(p_row, INVERSE_TEMPERATURE)
    min_p = float_field(p_row, MIN_P)
    top_k = tl.load(p_row + _TOP_K)
    low = tl.load(p_row + _TOP_P_LOW).to(tl.uint32, bitcast=True).to(tl.uint64)
    high = tl.load(p_row + _TOP_P_HIGH).to(tl.uint32, bitcast=True).to(tl.uint64)
    top_p = ((high << 32) | low).to(tl.float64, bitcast=True)
    has_k = top_k > 0
    has_p = top_p < 1.0
    cut = (top_k * 0).to(tl.uint32)
    last_equal = top_k * 0 + vocab_size
    if (inverse_temperature > 0.0) & (has_k | has_p):
        best = row_best(p_maxima + i_row * num_chunks, num_chunks, CHUNKS)
        # How many tokens lie how far below the best one, and the mass of all.
        o_bins = tl.arange(0, _NUM_BINS)
        b_histogram = tl.zeros([_NUM_BINS], tl.int32)
        total = (top_k * 0).to(tl.int64)
        for start in range(0, vocab_size, BLOCK):
            o_tokens = start + tl.arange(0, BLOCK)
            b_logits = load_logits(p_logits, stride, p_edited, vocab_size, p_row, o_tokens, HAS_EDITS)
            b_logits = without_nan(b_logits)
            b_histogram += tl.histogram(_bins(b_logits, best, inverse_temperature), _NUM_BINS)
            total += tl.sum(_mass(weights_of(b_logits, best, inverse_temperature, min_p)))
        # The bins that hold whatever may be kept; of a bin's weights, its far end is the least.
        b_least = tl.exp((o_bins + 1).to(tl.float32) * (-1.0 / _BINS_PER_NAT))
        b_least = tl.where(b_least >= min_p, b_least, 0.0) * b_histogram.to(tl.float32)
        share = _share(top_p, total)
        wanted = share.to(tl.float32) * (1.0001 / _MASS_UNIT)
        last_bin_k = tl.sum((tl.cumsum(b_histogram, 0) < top_k).to(tl.int32))
        last_bin_p = tl.sum((tl.cumsum(b_least, 0) < wanted).to(tl.int32))
        last_bin = tl.where(has_k, last_bin_k, last_bin_p)
        num_candidates = tl.sum(tl.where(o_bins <= last_bin, b_histogram, 0))
        fits = (last_bin < _NUM_BINS - 1) & (num_candidates <= CAPACITY)
        # Copy them together, in the order of ids.
        num_compact = top_k * 0
        p_values += i_row.to(tl.int64) * CAPACITY
        p_ids += i_row.to(tl.int64) * CAPACITY
        for start in range(0, tl.where(fits, vocab_size, 0), BLOCK):
            o_tokens = start + tl.arange(0, BLOCK)
            b_logits = load_logits(p_logits, stride, p_edited, vocab_size, p_row, o_tokens, HAS_EDITS)
            b_logits = without_nan(b_logits)
            b_kept = (_bins(b_logits, best, inverse_temperature) <= last_bin).to(tl.int32)
            o_places = num_compact + tl.cumsum(b_kept, 0) - 1
            m_places = (b_kept != 0) & (o_places < CAPACITY)
            tl.store(p_values + o_places, b_logits, mask=m_places)
            tl.store(p_ids + o_places, o_tokens, mask=m_places)
            num_compact += tl.sum(b_kept)
        tl.debug_barrier()
        num_whole = tl.where(fits, 0, vocab_size)
        num_items = num_compact + num_whole
        source = (p_values, p_ids, num_compact, p_logits, stride, p_edited, p_row, num_whole)
        shape = (best, inverse_temperature, min_p)
        num_equals = top_k * 0
        if has_k:
            cut, count_above, mass_above, mass_each = _search(
                top_k, total * 0, source, num_items, shape, BLOCK, HAS_EDITS
            )
            num_equals = top_k - count_above
            total = mass_above + num_equals.to(tl.int64) * mass_each
        if has_p:
            share = _share(top_p, total)
            cut, count_above, mass_above, mass_each = _search(
                top_k * 0, share, source, num_items, shape, BLOCK, HAS_EDITS
            )
            # The j-th of equals is kept if mass_above + (j - 1) * mass_each is less than the share.
            num_equals = _num_to_reach(share - mass_above, tl.maximum(mass_each, 1))
        last_equal = _place_of_equal(num_equals, cut, source, num_items, BLOCK, HAS_EDITS)
    tl.store(p_cuts + 2 * i_row, cut.to(tl.int32, bitcast=True))
    tl.store(p_cuts + 2 * i_row + 1, last_equal)


def cut(logits_SV: torch.Tensor, params: torch.Tensor, scratch: Scratch, edited: torch.Tensor | None = None) -> None:
    """Fill scratch.cuts, after `scan` of the same rows."""
    cut_kernel[(len(params),)](
        logits_SV,
        logits_SV.stride(0),
        logits_SV if edited is None else edited,
        params,
        scratch.maxima,
        scratch.values,
        scratch.value_ids,
        scratch.cuts,
        scratch.vocab_size,
        scratch.num_chunks,
        BLOCK=scratch.block,
        CHUNKS=triton.next_power_of_2(scratch.num_chunks),
        CAPACITY=scratch.capacity,
        HAS_EDITS=edited is not None,
        num_warps=4,
    )
