"""Edits of logits: masks, bias, penalties and stop ids that must wait, and the state that remembers what a row has said.

    open    does each chunk have a token that may come, other than a stop id?                      (S, C) programs
    edit    logits -> float32 copy with masks, bias, penalties                                     (S, C)
    count   one more of the chosen token in the state, after `sampling.choose`                     (S)

Knows neither truncation nor draw: the kernels that come after read the copy where a row has one.
"""

# mypy: allow-incomplete-defs, allow-untyped-defs
# (Triton reads the annotations of a kernel: only constants have one.)

from __future__ import annotations

import enum

import torch
import triton
import triton.language as tl

from serve_app.kernels.sampling_rows import (
    EDITED,
    INFINITY,
    ROW_WORDS,
    Field,
    Scratch,
    bound_if,
    flags_of,
    float_field,
    load_logits,
)


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


_SLOT = tl.constexpr(int(Field.SLOT))
_EDITS = tl.constexpr(int(Field.EDITS))
_REPETITION = tl.constexpr(int(Field.REPETITION))
_FREQUENCY = tl.constexpr(int(Field.FREQUENCY))
_PRESENCE = tl.constexpr(int(Field.PRESENCE))
_PENALTIES = tl.constexpr(int(Edit.PENALTIES))
_BIAS = tl.constexpr(int(Edit.BIAS))
_MIN_TOKENS = tl.constexpr(int(Edit.MIN_TOKENS))
_MASK = tl.constexpr(int(Edit.MASK))
_WORDS = tl.constexpr(int(Edit.WORDS))
_COUNT = tl.constexpr(int(Word.COUNT))
_IN_PROMPT = tl.constexpr(int(Word.IN_PROMPT))
_STOPS = tl.constexpr(int(Word.STOPS))
_FORBIDDEN = tl.constexpr(int(Word.FORBIDDEN))


# ---------------------------------------------------------------------------------------------------------- kernels


@triton.jit
def may_come(p_mask, o_tokens, bound):
    """The tokens' bits in a mask's words; those at and beyond the bound may all come."""
    b_words = tl.load(p_mask + o_tokens // 32, mask=o_tokens < bound, other=-1)
    return ((b_words >> (o_tokens % 32)) & 1) != 0


@triton.jit
def open_kernel(p_logits, stride, p_params, p_state, p_masks, p_open, vocab_size, CHUNK: tl.constexpr):
    """For rows whose stop ids must wait: does each chunk have another token that may come? int32 [S, C]."""
    i_row, i_chunk, num_chunks = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    p_row = p_params + i_row * ROW_WORDS
    edits = tl.load(p_row + _EDITS)
    if (edits & _MIN_TOKENS) != 0:
        o_tokens = i_chunk * CHUNK + tl.arange(0, CHUNK)
        m_tokens = o_tokens < vocab_size
        b_logits = load_logits(p_logits, stride, p_logits, vocab_size, p_row, o_tokens, False)
        p_words = p_state + tl.load(p_row + _SLOT).to(tl.int64) * vocab_size
        p_mask = p_masks + tl.load(p_row + EDITED).to(tl.int64) * tl.cdiv(vocab_size, 32)
        b_words = tl.load(p_words + o_tokens, mask=m_tokens, other=0)
        b_may = may_come(p_mask, o_tokens, bound_if((edits & _MASK) != 0, vocab_size))
        b_open = ((b_words & (_FORBIDDEN | _STOPS)) == 0) & b_may & (b_logits > -INFINITY)
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
    p_row = p_params + i_row * ROW_WORDS
    edited = tl.load(p_row + EDITED).to(tl.int64)
    if edited >= 0:
        edits = tl.load(p_row + _EDITS)
        slot = tl.load(p_row + _SLOT).to(tl.int64)
        o_tokens = i_chunk * CHUNK + tl.arange(0, CHUNK)
        m_tokens = o_tokens < vocab_size
        b_logits = load_logits(p_logits, stride, p_logits, vocab_size, p_row, o_tokens, False)
        tl.store(p_raw_flags + i_row * num_chunks + i_chunk, tl.max(flags_of(b_logits)))

        m_words = o_tokens < bound_if((edits & _WORDS) != 0, vocab_size)
        b_words = tl.load(p_state + slot * vocab_size + o_tokens, mask=m_words, other=0)
        b_logits = tl.where((b_words & _FORBIDDEN) != 0, -INFINITY, b_logits)
        p_mask = p_masks + edited * tl.cdiv(vocab_size, 32)
        b_may = may_come(p_mask, o_tokens, bound_if((edits & _MASK) != 0, vocab_size))
        b_logits = tl.where(b_may, b_logits, -INFINITY)
        if (edits & _MIN_TOKENS) != 0:
            o_chunks = tl.arange(0, CHUNKS)
            is_open = tl.max(tl.load(p_open + i_row * num_chunks + o_chunks, mask=o_chunks < num_chunks, other=0))
            b_logits = tl.where((b_words & bound_if(is_open != 0, _STOPS)) != 0, -INFINITY, b_logits)
        m_biased = o_tokens < bound_if((edits & _BIAS) != 0, vocab_size)
        b_logits += tl.load(p_bias + slot * vocab_size + o_tokens, mask=m_biased, other=0.0)
        if (edits & _PENALTIES) != 0:
            b_counts = (b_words & _COUNT).to(tl.float32)
            b_repetition = tl.zeros([CHUNK], tl.float32) + float_field(p_row, _REPETITION)
            b_new = tl.where(b_logits > 0.0, tl.div_rn(b_logits, b_repetition), b_logits * b_repetition)
            b_new -= float_field(p_row, _FREQUENCY) * b_counts
            b_new -= float_field(p_row, _PRESENCE) * (b_counts > 0.0).to(tl.float32)
            b_logits = tl.where((b_words & (_COUNT | _IN_PROMPT)) != 0, b_new, b_logits)
        tl.store(p_edited + edited * vocab_size + o_tokens, b_logits, mask=m_tokens)


@triton.jit
def count_kernel(p_params, p_out, p_state, vocab_size):
    """One more of the chosen token in the state of each row with penalties, unless the row has a flag."""
    i_row, num_rows = tl.program_id(0), tl.num_programs(0)
    p_row = p_params + i_row * ROW_WORDS
    if (tl.load(p_row + _EDITS) & _PENALTIES) != 0:
        m_counts = tl.load(p_out + num_rows + i_row) == 0
        p_word = p_state + tl.load(p_row + _SLOT).to(tl.int64) * vocab_size + tl.load(p_out + i_row)
        tl.store(p_word, tl.load(p_word, mask=m_counts, other=0) + 1, mask=m_counts)


# ------------------------------------------------------------------------------------------------------ the host side


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

    ``state``: int32 [slots, V] of `Word`. ``bias``: float32 [slots, V]. ``masks``: int32 [*, ceil(V / 32)], bit i of a
    row: token i may come. Anything may stand for one that no row uses. ``some_wait``: some row has Edit.MIN_TOKENS.
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
            CHUNK=scratch.chunk,
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
        CHUNK=scratch.chunk,
        CHUNKS=triton.next_power_of_2(scratch.num_chunks),
        num_warps=8,
        # A product and a sum rounded as one would not be the CPU sampler's.
        enable_fp_fusion=False,
    )


def count(params: torch.Tensor, out: torch.Tensor, state: torch.Tensor) -> None:
    """Add the tokens in ``out`` (see `choose`) to the state of rows with penalties."""
    count_kernel[(len(params),)](params, out, state, state.shape[1], num_warps=1)
