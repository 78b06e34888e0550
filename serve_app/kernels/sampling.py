"""Sampling in Triton: edits, truncation, draw and log-probabilities of rows of logits. Knows rows of numbers only.

Each row has its parameters in one row of ``params``, int32 [S, NUM_FIELDS] (`Field`; floats by their bits). A row's bits
depend on its own logits and parameters alone: blocks of the vocabulary are CHUNK wide whatever the batch is, and masses
are sums of integers. Shapes: S rows, V vocab, C chunks of CHUNK tokens.

    edit    logits -> float32 copy with masks, bias, penalties                                     (S, C) programs
    scan    largest logit of each chunk, its lowest id, NaN and +inf                               (S, C)
    cut     what top_k and top_p keep: every key above the cut, and equals of it up to a token id  (S)
    draw    argmax of weight / exponential over what is kept                                       (S, C)
    choose  over the chunks: token id and flags                                                    (S)

The draw. With independent exponentials E_i, token i has the largest w_i / E_i with probability w_i / sum(w): the race
behind the Gumbel argmax, log(w_i) - log(E_i), without its outer logarithm, so that equal weights stay exactly equal.
E_i comes from Philox-4x32-10 (see runner/random_numbers.py): key = the seed's halves, counter = (position, choice,
token // 4, 1), word token % 4.

The cut. Floats order as 32-bit keys, so the least key that is kept is found by halving an interval of them, from sums
over the row: how many tokens, or how much mass, is at a key or above. Mass is exp((logit - best) / temperature) in units
of 2**-40, as an integer: a sum has no order, and all of a vocabulary (below 2**22 tokens) stays below 2**63. A histogram
over the distance from the best logit first says which tokens can matter; where they fit, they are copied together and
only they are searched.
"""

# mypy: allow-incomplete-defs, allow-untyped-defs
# (Triton reads the annotations of a kernel: only constants have one.)

from __future__ import annotations

import enum

import torch
import triton
import triton.language as tl

CHUNK = 4096
"""Tokens of the vocabulary that one program of a wide grid takes."""

BLOCK = 1024
"""Tokens that a program takes at a time where it walks through the whole row."""

CAPACITY = 8192
"""Candidates of a row that the cut copies together; with more it searches the row itself."""


class Field(enum.IntEnum):
    """Words of a row's parameters."""

    SEED_LOW = 0
    SEED_HIGH = 1
    CHOICE = 2
    POSITION = 3
    INVERSE_TEMPERATURE = 4
    """float32; 0: greedy."""
    MIN_P = 5
    """float32."""
    TOP_K = 6
    """0: all."""
    TOP_P_LOW = 7
    TOP_P_HIGH = 8
    """The halves of a float64."""
    SOURCE = 9
    """The row of the logits to read."""
    EDITED = 10
    """The row of the edited logits to read instead, or -1."""
    SLOT = 11
    """The row of the state of edits."""
    EDITS = 12
    """Bits of `Edit`."""
    REPETITION = 13
    FREQUENCY = 14
    PRESENCE = 15
    """float32, the penalties."""


NUM_FIELDS = len(Field)


class Edit(enum.IntFlag):
    """What a row's edits consist of."""

    PENALTIES = 1
    BIAS = 2
    MIN_TOKENS = 4
    """Stop ids may not come yet."""
    MASK = 8
    """Row EDITED of the masks counts."""
    WORDS = 16
    """Row SLOT of the state counts: penalties, min_tokens or allowed ids."""


class Word(enum.IntFlag):
    """Bits of the state of edits, int32 [slots, V]: one word per token of the vocabulary."""

    COUNT = (1 << 28) - 1
    """Occurrences in the output."""
    IN_PROMPT = 1 << 28
    STOPS = 1 << 29
    FORBIDDEN = 1 << 30


class Flag(enum.IntEnum):
    """What is wrong with a row. A row that was edited has its raw row's flag in bits 2 and 3."""

    FINE = 0
    INFINITE = 1
    NAN = 2
    NOTHING = 3
    """No finite logit."""


# Constants that kernels may read.
_SEED_LOW = tl.constexpr(int(Field.SEED_LOW))
_SEED_HIGH = tl.constexpr(int(Field.SEED_HIGH))
_CHOICE = tl.constexpr(int(Field.CHOICE))
_POSITION = tl.constexpr(int(Field.POSITION))
_INVERSE_TEMPERATURE = tl.constexpr(int(Field.INVERSE_TEMPERATURE))
_MIN_P = tl.constexpr(int(Field.MIN_P))
_TOP_K = tl.constexpr(int(Field.TOP_K))
_TOP_P_LOW = tl.constexpr(int(Field.TOP_P_LOW))
_TOP_P_HIGH = tl.constexpr(int(Field.TOP_P_HIGH))
_SOURCE = tl.constexpr(int(Field.SOURCE))
_EDITED = tl.constexpr(int(Field.EDITED))
_SLOT = tl.constexpr(int(Field.SLOT))
_EDITS = tl.constexpr(int(Field.EDITS))
_REPETITION = tl.constexpr(int(Field.REPETITION))
_FREQUENCY = tl.constexpr(int(Field.FREQUENCY))
_PRESENCE = tl.constexpr(int(Field.PRESENCE))
_NUM_FIELDS = tl.constexpr(NUM_FIELDS)
_PENALTIES = tl.constexpr(int(Edit.PENALTIES))
_BIAS = tl.constexpr(int(Edit.BIAS))
_MIN_TOKENS = tl.constexpr(int(Edit.MIN_TOKENS))
_MASK = tl.constexpr(int(Edit.MASK))
_WORDS = tl.constexpr(int(Edit.WORDS))
_COUNT = tl.constexpr(int(Word.COUNT))
_IN_PROMPT = tl.constexpr(int(Word.IN_PROMPT))
_STOPS = tl.constexpr(int(Word.STOPS))
_FORBIDDEN = tl.constexpr(int(Word.FORBIDDEN))
_NOTHING = tl.constexpr(int(Flag.NOTHING))

_NUM_BINS = tl.constexpr(512)
_BINS_PER_NAT = tl.constexpr(32.0)
_MASS_UNIT = tl.constexpr(float(2**40))
_INFINITY = tl.constexpr(float("inf"))


# ------------------------------------------------------------------------------------------------- parts of kernels


@triton.jit
def _float_field(p_row, field: tl.constexpr):
    return tl.load(p_row + field).to(tl.float32, bitcast=True)


@triton.jit
def _if(condition, bound):
    """The bound, or 0: masks made with it are bool in the interpreter too, where block & scalar is none."""
    return tl.where(condition, bound, 0)


@triton.jit
def _load_logits(p_logits, stride, p_edited, vocab_size, p_row, o_tokens, HAS_EDITS: tl.constexpr):
    """The row's logits at o_tokens as float32; beyond the vocabulary -inf."""
    # [BLOCK]
    m_tokens = o_tokens < vocab_size
    source = tl.load(p_row + _SOURCE).to(tl.int64)
    if HAS_EDITS:
        edited = tl.load(p_row + _EDITED).to(tl.int64)
        m_raw = o_tokens < _if(edited < 0, vocab_size)
        m_new = o_tokens < _if(edited >= 0, vocab_size)
        b_raw = tl.load(p_logits + source * stride + o_tokens, mask=m_raw, other=-_INFINITY)
        b_new = tl.load(p_edited + edited * vocab_size + o_tokens, mask=m_new, other=-_INFINITY)
        b_logits = tl.where(edited >= 0, b_new, b_raw.to(tl.float32))
    else:
        b_logits = tl.load(p_logits + source * stride + o_tokens, mask=m_tokens, other=-_INFINITY).to(tl.float32)
    return b_logits


@triton.jit
def _flags(b_logits):
    """2 where NaN, 1 where +inf."""
    return tl.where(b_logits != b_logits, 2, tl.where(b_logits == _INFINITY, 1, 0))


@triton.jit
def _without_nan(b_logits):
    return tl.where(b_logits == b_logits, b_logits, -_INFINITY)


@triton.jit
def _best(p_maxima_row, num_chunks, CHUNKS: tl.constexpr):
    """The row's largest logit, from its chunks'. 0 where that is not finite: the row is refused anyway."""
    o_chunks = tl.arange(0, CHUNKS)
    best = tl.max(tl.load(p_maxima_row + o_chunks, mask=o_chunks < num_chunks, other=-_INFINITY))
    return tl.where(tl.abs(best) < _INFINITY, best, 0.0)


@triton.jit
def _weights(b_logits, best, inverse_temperature, min_p):
    """exp((logit - best) / temperature), 0 below min_p. At most 1."""
    b_weights = tl.exp(tl.minimum(b_logits - best, 0.0) * inverse_temperature)
    return tl.where(b_weights >= min_p, b_weights, 0.0)


@triton.jit
def _mass(b_weights):
    return (b_weights * _MASS_UNIT).to(tl.int64)


@triton.jit
def _keys(b_logits):
    """uint32 that order as the floats do; -0.0 and 0.0 are equal."""
    bits = tl.where(b_logits == 0.0, 0.0, b_logits).to(tl.uint32, bitcast=True)
    return tl.where((bits >> 31) != 0, ~bits, bits | 0x80000000)


@triton.jit
def _bins(b_logits, best, inverse_temperature):
    """int32: which 1/32 of a nat below the best logit, never less for a lesser logit. The last bin holds all the rest."""
    b_distance = (best - b_logits) * inverse_temperature * _BINS_PER_NAT
    return tl.maximum(tl.minimum(b_distance, _NUM_BINS - 1.0), 0.0).to(tl.int32)


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


# ---------------------------------------------------------------------------------------------------------- kernels


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
    p_row = p_params + i_row * _NUM_FIELDS
    b_logits = _load_logits(p_logits, stride, p_edited, vocab_size, p_row, o_tokens, HAS_EDITS)
    flag = tl.max(_flags(b_logits))
    value, place = tl.max(_without_nan(b_logits), 0, return_indices=True)
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
    p_row = p_params + i_row * _NUM_FIELDS
    inverse_temperature = _float_field(p_row, _INVERSE_TEMPERATURE)
    if inverse_temperature > 0.0:
        o_tokens = i_chunk * CHUNK + tl.arange(0, CHUNK)
        b_logits = _load_logits(p_logits, stride, p_edited, vocab_size, p_row, o_tokens, HAS_EDITS)
        b_logits = _without_nan(b_logits)
        best = _best(p_maxima + i_row * num_chunks, num_chunks, CHUNKS)
        b_weights = _weights(b_logits, best, inverse_temperature, _float_field(p_row, _MIN_P))
        if HAS_CUTS:
            cut = tl.load(p_cuts + 2 * i_row).to(tl.uint32, bitcast=True)
            last_equal = tl.load(p_cuts + 2 * i_row + 1)
            b_keys = _keys(b_logits)
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
    p_row = p_params + i_row * _NUM_FIELDS
    # [CHUNKS]
    o_chunks = tl.arange(0, CHUNKS)
    m_chunks = o_chunks < num_chunks
    o_in = i_row * num_chunks + o_chunks
    best, place = tl.max(tl.load(p_maxima + o_in, mask=m_chunks, other=-_INFINITY), 0, return_indices=True)
    token = tl.load(p_best_ids + i_row * num_chunks + place)
    flag = tl.max(tl.load(p_flags + o_in, mask=m_chunks, other=0))
    flag = tl.where((flag == 0) & (best == -_INFINITY), _NOTHING, flag)
    if HAS_EDITS:
        is_edited = tl.load(p_row + _EDITED) >= 0
        flag += 4 * tl.max(tl.load(p_raw_flags + o_in, mask=o_chunks < _if(is_edited, num_chunks), other=0))
    if DRAWS:
        draws = _float_field(p_row, _INVERSE_TEMPERATURE) > 0.0
        b_scores = tl.load(p_scores + o_in, mask=o_chunks < _if(draws, num_chunks), other=-1.0)
        _, place = tl.max(b_scores, 0, return_indices=True)
        token = tl.where(draws, tl.load(p_ids + i_row * num_chunks + place, mask=draws, other=0), token)
    tl.store(p_out + i_row, tl.where(flag == 0, token, 0))
    tl.store(p_out + num_rows + i_row, flag)


@triton.jit
def _items(start, source, BLOCK: tl.constexpr, HAS_EDITS: tl.constexpr):
    """Logits, which are tokens, and ids of the items from ``start`` on.

    ``source``: num_compact candidates at p_values and p_ids, or, where that is 0, the num_whole tokens of the row.
    """
    p_values, p_ids, num_compact, p_logits, stride, p_edited, p_row, num_whole = source
    # [BLOCK]
    o_items = start + tl.arange(0, BLOCK)
    m_compact = o_items < num_compact
    b_values = tl.load(p_values + o_items, mask=m_compact, other=-_INFINITY)
    b_ids = tl.load(p_ids + o_items, mask=m_compact, other=-1)
    b_logits = _without_nan(_load_logits(p_logits, stride, p_edited, num_whole, p_row, o_items, HAS_EDITS))
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
            b_keys = _keys(b_logits)
            m_above = m_items & (b_keys >= middle)
            b_mass = _mass(_weights(b_logits, best, inverse_temperature, min_p))
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
    mass_each = _mass(_weights(bits.to(tl.float32, bitcast=True), best, inverse_temperature, min_p))
    return low, count_above, mass_above, mass_each


@triton.jit
def _least_and_largest(source, num_items, BLOCK: tl.constexpr, HAS_EDITS: tl.constexpr):
    """The least and the largest key of the items."""
    low = (num_items * 0).to(tl.uint32) | 0xFFFFFFFF
    high = low * 0
    for start in range(0, num_items, BLOCK):
        b_logits, m_items, _ids = _items(start, source, BLOCK, HAS_EDITS)
        b_keys = _keys(b_logits)
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
        num_here = tl.sum((m_items & (_keys(b_logits) == cut)).to(tl.int32))
        is_here = (seen < number) & (seen + num_here >= number)
        place = tl.where(is_here, start, place)
        num_before = tl.where(is_here, seen, num_before)
        seen += num_here
    b_logits, m_items, b_ids = _items(place, source, BLOCK, HAS_EDITS)
    b_equal = (m_items & (_keys(b_logits) == cut)).to(tl.int32)
    b_number = b_equal * (num_before + tl.cumsum(b_equal, 0))
    return tl.max(tl.where(b_number == number, b_ids, -1))


@triton.jit
def _share(top_p, total):
    """The mass that top_p of ``total`` is, at least one unit: a token is kept if less than that lies before it."""
    return tl.maximum(tl.ceil(top_p * total.to(tl.float64)).to(tl.int64), 1)


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
    p_row = p_params + i_row * _NUM_FIELDS
    inverse_temperature = _float_field(p_row, _INVERSE_TEMPERATURE)
    min_p = _float_field(p_row, _MIN_P)
    top_k = tl.load(p_row + _TOP_K)
    low = tl.load(p_row + _TOP_P_LOW).to(tl.uint32, bitcast=True).to(tl.uint64)
    high = tl.load(p_row + _TOP_P_HIGH).to(tl.uint32, bitcast=True).to(tl.uint64)
    top_p = ((high << 32) | low).to(tl.float64, bitcast=True)
    has_k = top_k > 0
    has_p = top_p < 1.0
    cut = (top_k * 0).to(tl.uint32)
    last_equal = top_k * 0 + vocab_size
    if (inverse_temperature > 0.0) & (has_k | has_p):
        best = _best(p_maxima + i_row * num_chunks, num_chunks, CHUNKS)
        # How many tokens lie how far below the best one, and the mass of all.
        o_bins = tl.arange(0, _NUM_BINS)
        b_histogram = tl.zeros([_NUM_BINS], tl.int32)
        total = (top_k * 0).to(tl.int64)
        for start in range(0, vocab_size, BLOCK):
            o_tokens = start + tl.arange(0, BLOCK)
            b_logits = _load_logits(p_logits, stride, p_edited, vocab_size, p_row, o_tokens, HAS_EDITS)
            b_logits = _without_nan(b_logits)
            b_histogram += tl.histogram(_bins(b_logits, best, inverse_temperature), _NUM_BINS)
            total += tl.sum(_mass(_weights(b_logits, best, inverse_temperature, min_p)))
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
            b_logits = _load_logits(p_logits, stride, p_edited, vocab_size, p_row, o_tokens, HAS_EDITS)
            b_logits = _without_nan(b_logits)
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


@triton.jit
def open_kernel(p_logits, stride, p_params, p_state, p_masks, p_open, vocab_size, CHUNK: tl.constexpr):
    """For rows whose stop ids must wait: does each chunk have another token that may come? int32 [S, C]."""
    i_row, i_chunk, num_chunks = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    p_row = p_params + i_row * _NUM_FIELDS
    edits = tl.load(p_row + _EDITS)
    if (edits & _MIN_TOKENS) != 0:
        o_tokens = i_chunk * CHUNK + tl.arange(0, CHUNK)
        m_tokens = o_tokens < vocab_size
        b_logits = _load_logits(p_logits, stride, p_logits, vocab_size, p_row, o_tokens, False)
        p_words = p_state + tl.load(p_row + _SLOT).to(tl.int64) * vocab_size
        p_mask = p_masks + tl.load(p_row + _EDITED).to(tl.int64) * vocab_size
        b_words = tl.load(p_words + o_tokens, mask=m_tokens, other=0)
        b_mask = tl.load(p_mask + o_tokens, mask=o_tokens < _if((edits & _MASK) != 0, vocab_size), other=1)
        b_open = ((b_words & (_FORBIDDEN | _STOPS)) == 0) & (b_mask != 0) & (b_logits > -_INFINITY)
        tl.store(p_open + i_row * num_chunks + i_chunk, tl.max(b_open.to(tl.int32)))


@triton.jit
def edit_kernel(
    p_logits,
    stride,
    p_params,
    p_state,
    p_bias,
    p_masks,
    p_open,
    p_edited,
    p_raw_flags,
    vocab_size,
    CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr,
):
    """Edited rows: allowed ids and mask, min_tokens, bias, penalties, as runner/sampler.py does it; and the raw flags."""
    i_row, i_chunk, num_chunks = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    p_row = p_params + i_row * _NUM_FIELDS
    edited = tl.load(p_row + _EDITED).to(tl.int64)
    if edited >= 0:
        edits = tl.load(p_row + _EDITS)
        slot = tl.load(p_row + _SLOT).to(tl.int64)
        o_tokens = i_chunk * CHUNK + tl.arange(0, CHUNK)
        m_tokens = o_tokens < vocab_size
        b_logits = _load_logits(p_logits, stride, p_logits, vocab_size, p_row, o_tokens, False)
        tl.store(p_raw_flags + i_row * num_chunks + i_chunk, tl.max(_flags(b_logits)))

        m_words = o_tokens < _if((edits & _WORDS) != 0, vocab_size)
        b_words = tl.load(p_state + slot * vocab_size + o_tokens, mask=m_words, other=0)
        b_logits = tl.where((b_words & _FORBIDDEN) != 0, -_INFINITY, b_logits)
        m_masked = o_tokens < _if((edits & _MASK) != 0, vocab_size)
        b_mask = tl.load(p_masks + edited * vocab_size + o_tokens, mask=m_masked, other=1)
        b_logits = tl.where(b_mask == 0, -_INFINITY, b_logits)
        if (edits & _MIN_TOKENS) != 0:
            o_chunks = tl.arange(0, CHUNKS)
            is_open = tl.max(tl.load(p_open + i_row * num_chunks + o_chunks, mask=o_chunks < num_chunks, other=0))
            b_logits = tl.where((b_words & _if(is_open != 0, _STOPS)) != 0, -_INFINITY, b_logits)
        m_biased = o_tokens < _if((edits & _BIAS) != 0, vocab_size)
        b_logits += tl.load(p_bias + slot * vocab_size + o_tokens, mask=m_biased, other=0.0)
        if (edits & _PENALTIES) != 0:
            b_counts = (b_words & _COUNT).to(tl.float32)
            b_repetition = tl.zeros([CHUNK], tl.float32) + _float_field(p_row, _REPETITION)
            b_new = tl.where(b_logits > 0.0, tl.div_rn(b_logits, b_repetition), b_logits * b_repetition)
            b_new -= _float_field(p_row, _FREQUENCY) * b_counts
            b_new -= _float_field(p_row, _PRESENCE) * (b_counts > 0.0).to(tl.float32)
            b_logits = tl.where((b_words & (_COUNT | _IN_PROMPT)) != 0, b_new, b_logits)
        tl.store(p_edited + edited * vocab_size + o_tokens, b_logits, mask=m_tokens)


@triton.jit
def count_kernel(p_params, p_out, p_state, vocab_size):
    """One more of the chosen token in the state of each row with penalties, unless the row has a flag."""
    i_row, num_rows = tl.program_id(0), tl.num_programs(0)
    p_row = p_params + i_row * _NUM_FIELDS
    if (tl.load(p_row + _EDITS) & _PENALTIES) != 0:
        m_counts = tl.load(p_out + num_rows + i_row) == 0
        p_word = p_state + tl.load(p_row + _SLOT).to(tl.int64) * vocab_size + tl.load(p_out + i_row)
        tl.store(p_word, tl.load(p_word, mask=m_counts, other=0) + 1, mask=m_counts)


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
    p_row = p_params + i_row * _NUM_FIELDS
    p_out += i_row * (4 + 2 * TOP)
    source = tl.load(p_row + _SOURCE)
    target = tl.load(p_targets + 2 * i_row)
    target = tl.where(target >= 0, target, tl.load(p_chosen + source, mask=target < 0, other=0))
    num_top = tl.load(p_targets + 2 * i_row + 1)
    cut = tl.load(p_cuts + 2 * i_row).to(tl.uint32, bitcast=True)
    last_equal = tl.load(p_cuts + 2 * i_row + 1)
    o_chunks = tl.arange(0, CHUNKS)
    o_in = i_row * num_chunks + o_chunks
    flag = tl.max(tl.load(p_flags + o_in, mask=o_chunks < num_chunks, other=0))
    peak = tl.max(tl.load(p_maxima + o_in, mask=o_chunks < num_chunks, other=-_INFINITY))
    flag = tl.where((flag == 0) & (peak == -_INFINITY), _NOTHING, flag)
    best = _best(p_maxima + i_row * num_chunks, num_chunks, CHUNKS)
    total = best.to(tl.float64) * 0.0
    num_found = num_top * 0
    for start in range(0, vocab_size, BLOCK):
        o_tokens = start + tl.arange(0, BLOCK)
        b_logits = _load_logits(p_logits, stride, p_logits, vocab_size, p_row, o_tokens, False)
        b_logits = _without_nan(b_logits)
        total += tl.sum(_weights(b_logits, best, 1.0, 0.0)).to(tl.float64)
        b_keys = _keys(b_logits)
        m_top = (b_keys > cut) | ((b_keys == cut) & (o_tokens <= last_equal))
        m_top = m_top & (o_tokens < _if(num_top > 0, vocab_size))
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


class Scratch:
    """Arrays between the kernels of one stream, for up to ``max_rows`` rows; each step overwrites them."""

    def __init__(self, vocab_size: int, max_rows: int, device: torch.device) -> None:
        self.vocab_size = vocab_size
        self.max_rows = max_rows
        self.num_chunks = triton.cdiv(vocab_size, CHUNK)
        shape = (max_rows, self.num_chunks)
        self.maxima = torch.empty(shape, dtype=torch.float32, device=device)
        self.best_ids = torch.empty(shape, dtype=torch.int32, device=device)
        self.flags = torch.empty(shape, dtype=torch.int32, device=device)
        self.raw_flags = torch.empty(shape, dtype=torch.int32, device=device)
        self.is_open = torch.empty(shape, dtype=torch.int32, device=device)
        self.scores = torch.empty(shape, dtype=torch.float32, device=device)
        self.ids = torch.empty(shape, dtype=torch.int32, device=device)
        self.cuts = torch.empty((max_rows, 2), dtype=torch.int32, device=device)
        self.values = torch.empty((max_rows, CAPACITY), dtype=torch.float32, device=device)
        self.value_ids = torch.empty((max_rows, CAPACITY), dtype=torch.int32, device=device)


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
        CHUNK=CHUNK,
        HAS_EDITS=edited is not None,
        num_warps=8,
    )


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
        BLOCK=BLOCK,
        CHUNKS=triton.next_power_of_2(scratch.num_chunks),
        CAPACITY=CAPACITY,
        HAS_EDITS=edited is not None,
        num_warps=4,
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
        CHUNK=CHUNK,
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


def edit(
    logits_SV: torch.Tensor,
    params: torch.Tensor,
    scratch: Scratch,
    edited: torch.Tensor,
    *,
    state: torch.Tensor,
    bias: torch.Tensor,
    masks: torch.Tensor,
    some_wait: bool,
) -> None:
    """Fill ``edited`` float32 [*, V], and the raw rows' flags.

    ``state``: int32 [slots, V] of `Word`. ``bias``: float32 [slots, V]. ``masks``: uint8 [*, V], 0 where a row may not
    go. Anything may stand for one that no row uses. ``some_wait``: some row has Edit.MIN_TOKENS.
    """
    grid = (len(params), scratch.num_chunks)
    if some_wait:
        open_kernel[grid](
            logits_SV,
            logits_SV.stride(0),
            params,
            state,
            masks,
            scratch.is_open,
            scratch.vocab_size,
            CHUNK=CHUNK,
            num_warps=8,
        )
    edit_kernel[grid](
        logits_SV,
        logits_SV.stride(0),
        params,
        state,
        bias,
        masks,
        scratch.is_open,
        edited,
        scratch.raw_flags,
        scratch.vocab_size,
        CHUNK=CHUNK,
        CHUNKS=triton.next_power_of_2(scratch.num_chunks),
        num_warps=8,
        # A product and a sum rounded as one would not be the CPU sampler's.
        enable_fp_fusion=False,
    )


def count(params: torch.Tensor, out: torch.Tensor, state: torch.Tensor) -> None:
    """Add the tokens in ``out`` (see `choose`) to the state of rows with penalties."""
    count_kernel[(len(params),)](params, out, state, state.shape[1], num_warps=1)


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
        BLOCK=2 * BLOCK,
        CHUNKS=triton.next_power_of_2(scratch.num_chunks),
        TOP=(out.shape[1] - 4) // 2,
        num_warps=8,
    )
