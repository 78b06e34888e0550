"""What the kernels of sampling share: a row's parameters and logits, and the arrays between them. Knows no step of it.

Each row has its parameters in one row of ``params``, int32 [S, NUM_FIELDS] (`Field`; floats by their bits). A row's bits
depend on its own logits and parameters alone: blocks of the vocabulary are CHUNK wide whatever the batch is. Shapes, here
and in the other files of sampling: S rows, V vocab, C chunks of CHUNK tokens.
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
    """Bits of sampling_edits.Edit."""
    REPETITION = 13
    FREQUENCY = 14
    PRESENCE = 15
    """float32, the penalties."""


NUM_FIELDS = len(Field)


class Flag(enum.IntEnum):
    """What is wrong with a row. A row that was edited has its raw row's flag in bits 2 and 3."""

    FINE = 0
    INFINITE = 1
    NAN = 2
    NOTHING = 3
    """No finite logit."""


# Constants that kernels of more than one file read.
ROW_WORDS = tl.constexpr(NUM_FIELDS)
INVERSE_TEMPERATURE = tl.constexpr(int(Field.INVERSE_TEMPERATURE))
MIN_P = tl.constexpr(int(Field.MIN_P))
SOURCE = tl.constexpr(int(Field.SOURCE))
EDITED = tl.constexpr(int(Field.EDITED))
INFINITY = tl.constexpr(float("inf"))


# ------------------------------------------------------------------------------------------------- parts of kernels


@triton.jit
def float_field(p_row, field: tl.constexpr):
    return tl.load(p_row + field).to(tl.float32, bitcast=True)


@triton.jit
def bound_if(condition, bound):
    """The bound, or 0: masks made with it are bool in the interpreter too, where block & scalar is none."""
    return tl.where(condition, bound, 0)


@triton.jit
def load_logits(p_logits, stride, p_edited, vocab_size, p_row, o_tokens, HAS_EDITS: tl.constexpr):
    """The row's logits at o_tokens as float32; beyond the vocabulary -inf."""
    # [BLOCK]
    m_tokens = o_tokens < vocab_size
    source = tl.load(p_row + SOURCE).to(tl.int64)
    if HAS_EDITS:
        edited = tl.load(p_row + EDITED).to(tl.int64)
        m_raw = o_tokens < bound_if(edited < 0, vocab_size)
        m_new = o_tokens < bound_if(edited >= 0, vocab_size)
        b_raw = tl.load(p_logits + source * stride + o_tokens, mask=m_raw, other=-INFINITY)
        b_new = tl.load(p_edited + edited * vocab_size + o_tokens, mask=m_new, other=-INFINITY)
        b_logits = tl.where(edited >= 0, b_new, b_raw.to(tl.float32))
    else:
        b_logits = tl.load(p_logits + source * stride + o_tokens, mask=m_tokens, other=-INFINITY).to(tl.float32)
    return b_logits


@triton.jit
def flags_of(b_logits):
    """2 where NaN, 1 where +inf."""
    return tl.where(b_logits != b_logits, 2, tl.where(b_logits == INFINITY, 1, 0))


@triton.jit
def without_nan(b_logits):
    return tl.where(b_logits == b_logits, b_logits, -INFINITY)


@triton.jit
def row_best(p_maxima_row, num_chunks, CHUNKS: tl.constexpr):
    """The row's largest logit, from its chunks'. 0 where that is not finite: the row is refused anyway."""
    o_chunks = tl.arange(0, CHUNKS)
    best = tl.max(tl.load(p_maxima_row + o_chunks, mask=o_chunks < num_chunks, other=-INFINITY))
    return tl.where(tl.abs(best) < INFINITY, best, 0.0)


@triton.jit
def weights_of(b_logits, best, inverse_temperature, min_p):
    """exp((logit - best) / temperature), 0 below min_p. At most 1."""
    b_weights = tl.exp(tl.minimum(b_logits - best, 0.0) * inverse_temperature)
    return tl.where(b_weights >= min_p, b_weights, 0.0)


@triton.jit
def keys_of(b_logits):
    """uint32 that order as the floats do; -0.0 and 0.0 are equal."""
    bits = tl.where(b_logits == 0.0, 0.0, b_logits).to(tl.uint32, bitcast=True)
    return tl.where((bits >> 31) != 0, ~bits, bits | 0x80000000)


# ------------------------------------------------------------------------------------------------------ the host side


class Scratch:
    """Arrays between the kernels of one stream, for up to ``max_rows`` rows; each step overwrites them.

    Has the widths of blocks too, for all kernels launched with it.
    """

    def __init__(self, vocab_size: int, max_rows: int, device: torch.device) -> None:
        self.vocab_size = vocab_size
        self.max_rows = max_rows
        self.chunk, self.block, self.capacity = CHUNK, BLOCK, CAPACITY
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
