"""Logits -> tokens and log-probabilities. Knows sampling parameters and arrays; knows no model, no text, no schedule.

Shapes: S rows that sample, R rows of a group of them, V vocab, N blocks of 64 tokens, M leading tokens of a row.

The order of operations is that of vLLM's V1 sampler. Log-probabilities are those of the raw logits. Then: allowed
tokens and mask, min_tokens, logit_bias, repetition / frequency / presence penalty; greedy takes the largest (lowest id
on ties); else temperature, min_p, top_k, top_p and one uniform number through the inverse CDF in token-id order.
Two things are stricter than in vLLM: top_k keeps exactly k tokens (lowest ids on ties), and so does top_p its set.

Batching is invisible: a row's bits never depend on the other rows. Whatever is summed is summed within blocks of 64
float32 (no sum is ever split among threads, also not that of a single row) and across blocks in float64, one after
the other; what the company of a row can change is only how many candidates are looked at, never which ones are kept.

    vocabulary  [ 64 tokens | 64 tokens | ... | V % 64 )     largest of each block: argmax, and where the best are
                                                             sum of each block: the coarse CDF, then one block of it
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence as SequenceOf
from typing import NamedTuple, cast

import numpy as np
import numpy.typing as npt
import torch

from serve_app.engine.request import SamplingParams, TokenLogprobs
from serve_app.engine.sequence import Sequence
from serve_app.errors import StepFailedError
from serve_app.runner.random_numbers import uniform

FloatArray = npt.NDArray[np.float32]
DoubleArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]
WordArray = npt.NDArray[np.int32]

BLOCK = 64
"""Tokens of the vocabulary whose maximum and sum are taken together."""

MIN_TEMPERATURE = 1e-5
"""Below it a row is greedy, as in vLLM."""

NUM_LEADERS = (64, 1024, 8192)
"""About how many of a row's best tokens a truncation looks at: first 64, then more, then all, until they settle it."""

FAR = -87.0
"""exp of it is the last that is no denormal of float32. Below it a weight counts as 0: torch takes ten times as long for
exp(-inf), and ninety times for what rounds to a denormal, as for any other number."""

SMALLEST_WEIGHT = 2e-38
"""Above exp(FAR)."""

MAX_WEIGHTS = 2**23
"""Numbers in a work array [R, V], 32 MiB of float32; more rows are taken in parts."""


class SampledTokens(NamedTuple):
    """What one step sampled."""

    token_ids: list[int]
    """One per row."""

    logprobs: dict[int, TokenLogprobs]
    """Row -> log-probabilities, for the rows whose request asks for them."""


class Sampler:
    """Chooses the next token of each row. Holds per-slot arrays for the sequences that edit their logits."""

    def __init__(self, vocab_size: int, max_num_seqs: int) -> None:
        self.vocab_size = vocab_size
        self._edits: list[_Edits | None] = [None] * max_num_seqs
        """One place per slot, made when a sequence first needs it, made anew when the slot's sequence is another."""

    def sample(
        self,
        logits_SV: torch.Tensor,
        sequences: SequenceOf[Sequence],
        masks: Mapping[int, WordArray] | None = None,
    ) -> SampledTokens:
        """Sample one token per row.

        ``logits_SV``: float32, bfloat16 or float16, left as it is; row i belongs to ``sequences[i]``, whose sampling
        parameters are resolved and carry a seed unless greedy. ``masks[i]``: int32 [at least V / 32], little-endian: bit
        t % 32 of word t // 32 says whether row i may take token t. The random number's position is
        ``len(sequence.token_ids)``, the place the token will take.

        Raises StepFailedError naming the request if a row has NaN or +inf, or nothing is allowed in it.

        For the logits ln 4, ln 3, ln 2, ln 1 at temperature 1, top_k=3 leaves 4/9, 3/9, 2/9; top_p=0.7 keeps the tokens
        that begin below 0.7 (they begin at 0, 0.44, 0.78), so 4/7 and 3/7 are left; the uniform number 0.6 lies
        beyond 4/7 = 0.571, and token 1 is sampled.
        """
        assert logits_SV.shape == (len(sequences), self.vocab_size), (logits_SV.shape, len(sequences), self.vocab_size)
        if not sequences:
            return SampledTokens([], {})
        masks = masks or {}
        raw = _Rows.of(logits_SV.detach().to(device="cpu", dtype=torch.float32).contiguous())
        _refuse_bad_rows(raw, sequences)
        token_ids: list[int] = raw.best_ids.tolist()

        edited = [row for row, sequence in enumerate(sequences) if row in masks or _edits_logits(sequence)]
        untouched = sorted(set(range(len(sequences))).difference(edited))
        self._draw_into(token_ids, raw, untouched, untouched, sequences)
        if edited:
            edited_RV = torch.empty(len(edited), self.vocab_size)
            for edited_V, row in zip(edited_RV.numpy(), edited, strict=True):
                self._edits_of(sequences[row]).apply(raw.logits_RV[row].numpy(), masks.get(row), edited_V)
            rows = _Rows.of(edited_RV)
            _refuse_bad_rows(rows, [sequences[row] for row in edited])
            for row, token_id in zip(edited, rows.best_ids.tolist(), strict=True):
                token_ids[row] = token_id
            self._draw_into(token_ids, rows, range(len(edited)), edited, sequences)

        asking = [row for row, sequence in enumerate(sequences) if _sampling(sequence).logprobs is not None]
        logprobs = _token_logprobs(
            raw.select(asking),
            [token_ids[row] for row in asking],
            [_sampling(sequences[row]).logprobs or 0 for row in asking],
        )
        return SampledTokens(token_ids, dict(zip(asking, logprobs, strict=True)))

    def _draw_into(
        self,
        token_ids: list[int],
        source: _Rows,
        source_rows: SequenceOf[int],
        rows: SequenceOf[int],
        sequences: SequenceOf[Sequence],
    ) -> None:
        """Overwrite the greedy token of those ``rows`` that sample; row rows[i] has its logits in source_rows[i]."""
        sampling = [
            (at, row)
            for at, row in zip(source_rows, rows, strict=True)
            if cast(float, _sampling(sequences[row]).temperature) >= MIN_TEMPERATURE
        ]
        if sampling:
            drawn = _draw(source.select([at for at, _ in sampling]), _Draws.of([sequences[row] for _, row in sampling]))
            for (_, row), token_id in zip(sampling, drawn.tolist(), strict=True):
                token_ids[row] = token_id

    def _edits_of(self, sequence: Sequence) -> _Edits:
        edits = self._edits[sequence.slot]
        if edits is None or edits.sequence is not sequence:
            edits = self._edits[sequence.slot] = _Edits(sequence, self.vocab_size)
        return edits


def token_logprobs(
    logits_RV: torch.Tensor, token_ids: SequenceOf[int], num_top: SequenceOf[int]
) -> list[TokenLogprobs]:
    """Natural-log probabilities of ``token_ids[i]`` in row i, with its ``num_top[i]`` likeliest tokens.

    ``logits_RV``: float32, bfloat16 or float16. The exponentials are float32, their sum and its logarithm float64.
    ``top`` is in the order of the logits, best first, lowest id first on ties. Raises StepFailedError naming the row if
    one has NaN or +inf or nothing finite.

    For the logits ln 1, ln 3 and token 0 with one top token: ln 1/4 = -1.3863, top ((1, ln 3/4 = -0.2877),).
    """
    assert logits_RV.ndim == 2 and len(logits_RV) == len(token_ids) == len(num_top)
    results: list[TokenLogprobs] = []
    for part in _parts(np.ones(len(token_ids), dtype=np.bool_), logits_RV.shape[1]):
        logits = logits_RV[part[0] : part[-1] + 1].detach()
        rows = _Rows.of(logits.to(device="cpu", dtype=torch.float32).contiguous())
        bad = np.flatnonzero(~np.isfinite(rows.best))
        if len(bad):
            raise StepFailedError(f"the logits of row {part[bad[0]]} have the largest value {rows.best[bad[0]]}")
        results += _token_logprobs(rows, [token_ids[row] for row in part], [num_top[row] for row in part])
    return results


# ---------------------------------------------------------------------------------------------- rows and their maxima


class _Rows(NamedTuple):
    """Some rows of logits and what is always wanted of them."""

    logits_RV: torch.Tensor
    """float32, on the CPU, contiguous."""

    maxima_RN: FloatArray
    """Largest logit of each block of the vocabulary; NaN if the block has one."""

    best_ids: IntArray
    """[R]: the largest logit's token id, lowest on ties."""

    best: FloatArray
    """[R]: the largest logit; NaN if the row has one."""

    @classmethod
    def of(cls, logits_RV: torch.Tensor) -> _Rows:
        num_rows, vocab_size = logits_RV.shape
        in_full_blocks = vocab_size - vocab_size % BLOCK
        maxima = torch.empty(num_rows, -(-vocab_size // BLOCK))
        if in_full_blocks:
            blocks = logits_RV[:, :in_full_blocks].view(num_rows, -1, BLOCK)
            torch.amax(blocks, dim=2, out=maxima[:, : blocks.shape[1]])
        if in_full_blocks < vocab_size:
            maxima[:, -1] = logits_RV[:, in_full_blocks:].amax(dim=1)
        # numpy's argmax takes the first of equals and treats NaN as the largest, here and within the block.
        best_block = maxima.numpy().argmax(axis=1)
        ids = np.minimum(best_block[:, None] * BLOCK + np.arange(BLOCK), vocab_size - 1)
        row_index = np.arange(num_rows)
        values = logits_RV.numpy()[row_index[:, None], ids]
        within = values.argmax(axis=1)
        return cls(logits_RV, maxima.numpy(), ids[row_index, within], values[row_index, within])

    def select(self, rows: SequenceOf[int] | IntArray) -> _Rows:
        """Those rows, in that order; the logits are not copied if the rows follow each other."""
        index = np.asarray(rows, dtype=np.int64)
        if len(index) and (np.diff(index) == 1).all():
            logits = self.logits_RV[index[0] : index[-1] + 1]
        else:
            logits = self.logits_RV.index_select(0, torch.from_numpy(index))
        return _Rows(logits, self.maxima_RN[index], self.best_ids[index], self.best[index])


def _refuse_bad_rows(rows: _Rows, sequences: SequenceOf[Sequence]) -> None:
    """A finite maximum proves that a row has no NaN and no +inf (both would be the maximum), and something allowed."""
    bad = np.flatnonzero(~np.isfinite(rows.best))
    if len(bad):
        request_id, choice_index = sequences[bad[0]].key
        value = rows.best[bad[0]]
        reason = "no token that is allowed has a finite logit" if value == -np.inf else f"its logits contain {value}"
        raise StepFailedError(f"request {request_id} (choice {choice_index}) cannot be sampled: {reason}")


def _sampling(sequence: Sequence) -> SamplingParams:
    return sequence.request.sampling


# ---------------------------------------------------------------------------------- masks, min_tokens, bias, penalties


def _edits_logits(sequence: Sequence) -> bool:
    sampling = _sampling(sequence)
    return (
        sampling.allowed_token_ids is not None
        or bool(sampling.logit_bias)
        or sequence.num_output_tokens < sampling.min_tokens
        or _has_penalties(sampling)
    )


def _has_penalties(sampling: SamplingParams) -> bool:
    return sampling.repetition_penalty != 1.0 or sampling.frequency_penalty != 0.0 or sampling.presence_penalty != 0.0


_CEILINGS = np.where(np.arange(256)[:, None] >> np.arange(8) & 1, np.inf, -np.inf).astype(np.float32)
"""[256, 8]: for each byte of a mask the largest its eight logits may be. A table of bytes is looked up ten times as fast as
one of bits."""


class _Edits:
    """What one sequence asks to be done to its logits, as arrays; lives in the sequence's slot."""

    def __init__(self, sequence: Sequence, vocab_size: int) -> None:
        sampling = _sampling(sequence)
        self.sequence = sequence
        self.vocab_size = vocab_size
        # A stop id beyond the vocabulary cannot come, so there is nothing to mask.
        self.stop_ids = np.array(sorted(i for i in sequence.stop_ids if i < vocab_size), dtype=np.int64)
        self.allowed_ids = None
        if sampling.allowed_token_ids is not None:
            self.allowed_ids = self._token_ids("allowed_token_ids", sampling.allowed_token_ids)
        bias = sampling.logit_bias or {}
        self.bias_ids = self._token_ids("logit_bias", bias)
        self.bias = np.array(list(bias.values()), dtype=np.float32)
        self.seen = _SeenTokens()

    def _token_ids(self, name: str, token_ids: SequenceOf[int] | Mapping[int, float]) -> IntArray:
        largest = max(token_ids, default=0)
        if largest >= self.vocab_size:
            request_id, choice_index = self.sequence.key
            raise StepFailedError(
                f"request {request_id} (choice {choice_index}) cannot be sampled: {name} has the token id {largest},"
                f" and the vocabulary has {self.vocab_size} tokens"
            )
        return np.array(list(token_ids), dtype=np.int64)

    def apply(self, raw_V: FloatArray, mask: WordArray | None, logits_V: FloatArray) -> None:
        """Write float32 ``logits_V`` [V]: the raw ones, edited. Every step is elementwise."""
        sampling = _sampling(self.sequence)
        if mask is None:
            logits_V[:] = raw_V
        else:
            assert mask.dtype == np.int32 and 32 * len(mask) >= self.vocab_size
            ceilings = np.take(_CEILINGS, mask.view(np.uint8), axis=0, mode="clip")
            np.minimum(raw_V, ceilings.reshape(-1)[: self.vocab_size], out=logits_V)
        if self.allowed_ids is not None:
            kept = logits_V[self.allowed_ids]
            logits_V.fill(-np.inf)
            logits_V[self.allowed_ids] = kept
        if self.sequence.num_output_tokens < sampling.min_tokens and len(self.stop_ids):
            kept = logits_V[self.stop_ids]
            logits_V[self.stop_ids] = -np.inf
            if logits_V.max() == -np.inf:  # only stop ids are allowed: the mask wins
                logits_V[self.stop_ids] = kept
        if len(self.bias_ids):
            logits_V[self.bias_ids] += self.bias
        if _has_penalties(sampling):
            self.seen.update(self.sequence)
            self._penalise(logits_V, sampling)

    def _penalise(self, logits_V: FloatArray, sampling: SamplingParams) -> None:
        """Repetition: Keskar et al., "CTRL" (2019), prompt and output. Frequency, presence: OpenAI's, output only."""
        ids, counts = self.seen.ids, self.seen.counts
        repetition = np.float32(cast(float, sampling.repetition_penalty))
        logits = logits_V[ids]
        # An absurd penalty may overflow; the row is then refused by its maximum.
        with np.errstate(over="ignore", divide="ignore", invalid="ignore"):
            logits = np.where(logits > 0, logits / repetition, logits * repetition)
        logits -= np.float32(sampling.frequency_penalty) * counts
        logits -= np.float32(sampling.presence_penalty) * (counts > 0)
        logits_V[ids] = logits


class _SeenTokens:
    """The distinct tokens of one sequence and how often each stands in its output, kept up token by token.

    As long as the text, not as wide as the vocabulary: applying penalties touches these tokens alone.
    """

    def __init__(self) -> None:
        self._clear()

    def _clear(self) -> None:
        self.num_counted = 0
        """Leading tokens of the sequence that are counted."""
        self._place: dict[int, int] = {}
        self._ids = np.empty(256, dtype=np.int64)
        self._counts = np.empty(256, dtype=np.float32)

    @property
    def ids(self) -> IntArray:
        return self._ids[: len(self._place)]

    @property
    def counts(self) -> FloatArray:
        """Occurrences in the output, float32 (exact up to 2**24), parallel to ids; 0: only in the prompt."""
        return self._counts[: len(self._place)]

    def update(self, sequence: Sequence) -> None:
        """Count the tokens that are new since the last call; all of them anew if the sequence became shorter."""
        if self.num_counted > len(sequence.token_ids):
            self._clear()
        for position in range(self.num_counted, len(sequence.token_ids)):
            place = self._place_of(sequence.token_ids[position])
            if position >= sequence.num_prompt_tokens:
                self._counts[place] += 1
        self.num_counted = len(sequence.token_ids)

    def _place_of(self, token_id: int) -> int:
        place = self._place.get(token_id)
        if place is None:
            place = self._place[token_id] = len(self._place)
            if place == len(self._ids):
                self._ids = np.concatenate((self._ids, np.empty_like(self._ids)))
                self._counts = np.concatenate((self._counts, np.empty_like(self._counts)))
            self._ids[place] = token_id
            self._counts[place] = 0
        return place


# ------------------------------------------------------------------------------ temperature, min_p, top_k, top_p, draw


class _Draws(NamedTuple):
    """Parameters of the rows that sample, one entry per row."""

    temperature: DoubleArray
    min_p: DoubleArray
    top_k: IntArray
    """0 and -1 mean all."""
    top_p: DoubleArray
    uniform: DoubleArray
    """In (0, 1)."""

    @classmethod
    def of(cls, sequences: SequenceOf[Sequence]) -> _Draws:
        samplings = [_sampling(sequence) for sequence in sequences]
        assert all(sampling.is_resolved and sampling.seed is not None for sampling in samplings)
        return cls(
            temperature=np.array([sampling.temperature for sampling in samplings], dtype=np.float64),
            min_p=np.array([sampling.min_p for sampling in samplings], dtype=np.float64),
            top_k=np.array([min(cast(int, sampling.top_k), 2**31) for sampling in samplings], dtype=np.int64),
            top_p=np.array([sampling.top_p for sampling in samplings], dtype=np.float64),
            uniform=uniform(
                np.array([sampling.seed for sampling in samplings], dtype=np.uint64),
                [sequence.request.choice_index for sequence in sequences],
                [len(sequence.token_ids) for sequence in sequences],
            ),
        )

    def select(self, index: IntArray) -> _Draws:
        return _Draws(
            self.temperature[index], self.min_p[index], self.top_k[index], self.top_p[index], self.uniform[index]
        )


def _draw(rows: _Rows, draws: _Draws) -> IntArray:
    """One token per row, [R]. Each row goes the cheapest way that its own parameters allow."""
    vocab_size = rows.logits_RV.shape[1]
    truncates_k = (draws.top_k > 0) & (draws.top_k < vocab_size)
    truncates = truncates_k | (draws.top_p < 1.0)
    token_ids = np.full(len(truncates), -1, dtype=np.int64)
    for index in _parts(~truncates, vocab_size):
        token_ids[index] = _draw_from_all(rows.select(index), draws.select(index))
    for num_leaders in (*NUM_LEADERS, vocab_size):
        enough = ~truncates_k | (draws.top_k < num_leaders) | (num_leaders >= vocab_size)
        for index in _parts((token_ids < 0) & enough, vocab_size):
            token_ids[index] = _draw_from_leaders(rows.select(index), draws.select(index), num_leaders)
    return token_ids


def _parts(wanted: npt.NDArray[np.bool_], vocab_size: int) -> Iterator[IntArray]:
    index = np.flatnonzero(wanted)
    size = max(1, MAX_WEIGHTS // vocab_size)
    return (index[start : start + size] for start in range(0, len(index), size))


def _weights(rows: _Rows, temperature: DoubleArray | None, min_p: DoubleArray | None) -> tuple[FloatArray, DoubleArray]:
    """exp((logit - best) / temperature), 0 where that is below min_p: float32 [R, N, 64], and the blocks' running sums.

    The largest weight is 1, so min_p is compared with the weights as they are. The vocabulary is filled up to whole
    blocks with zeros. Running sums are float64 [R, N]; the last is the row's total.
    """
    num_rows, vocab_size = rows.logits_RV.shape
    num_blocks = rows.maxima_RN.shape[1]
    weights = torch.empty(num_rows, num_blocks * BLOCK)
    weights[:, vocab_size:] = -torch.inf
    torch.sub(rows.logits_RV, torch.from_numpy(rows.best)[:, None], out=weights[:, :vocab_size])
    if temperature is not None and (temperature != 1.0).any():
        weights.div_(torch.from_numpy(temperature.astype(np.float32))[:, None])
    weights.clamp_(min=FAR).exp_()
    torch.threshold_(weights, SMALLEST_WEIGHT, 0.0)
    if min_p is not None and min_p.any():
        weights.masked_fill_(weights < torch.from_numpy(min_p.astype(np.float32))[:, None], 0.0)
    blocks = weights.view(num_rows, num_blocks, BLOCK)
    return blocks.numpy(), np.cumsum(blocks.sum(dim=2).numpy(), axis=1, dtype=np.float64)


def _draw_from_all(rows: _Rows, draws: _Draws) -> IntArray:
    """Without top_k and top_p: find the block in the coarse CDF, then the token within it."""
    weights_RNB, cdf_RN = _weights(rows, draws.temperature, draws.min_p)
    row_index = np.arange(len(draws.uniform))
    target = draws.uniform * cdf_RN[:, -1]
    # uniform <= 1 - 2**-53, so the rounded product stays below the total: block exists, and its sum is positive.
    block = (cdf_RN <= target[:, None]).sum(axis=1)
    before = np.where(block > 0, cdf_RN[row_index, block - 1], 0.0)
    within: IntArray = _first_beyond(weights_RNB[row_index, block].astype(np.float64), target - before)
    return cast(IntArray, block * BLOCK + within)


def _first_beyond(weights_RM: DoubleArray, target_R: DoubleArray) -> IntArray:
    """[R]: the first place whose running sum exceeds the target, so its weight is positive.

    Where rounding let the target reach the sum of all, the last place with a positive weight. Rows have one.
    """
    beyond = (np.cumsum(weights_RM, axis=1) <= target_R[:, None]).sum(axis=1)
    last = weights_RM.shape[1] - 1 - (weights_RM[:, ::-1] > 0).argmax(axis=1)
    return cast(IntArray, np.minimum(beyond, last))


def _draw_from_leaders(rows: _Rows, draws: _Draws, num_leaders: int) -> IntArray:
    """With top_k or top_p: a token per row, or -1 where so few leaders don't show which tokens are kept.

    With all tokens as leaders nothing is left at -1. Sums run one after the other over tokens in a fixed order and the
    dropped ones add exact zeros: the bits of a row are the same for any sufficient number of leaders.
    """
    vocab_size = rows.logits_RV.shape[1]
    values_RM, ids_RM, num_known_R = _leaders(rows, num_leaders)
    top_k = np.where(draws.top_k > 0, np.minimum(draws.top_k, vocab_size), vocab_size)

    scaled = (values_RM.astype(np.float64) - rows.best[:, None]) / draws.temperature[:, None]
    weights = np.exp(scaled)
    weights[weights < draws.min_p[:, None]] = 0.0
    weights[np.arange(weights.shape[1]) >= top_k[:, None]] = 0.0
    cdf = np.cumsum(weights, axis=1)
    total = cdf[:, -1].copy()
    whole = top_k == vocab_size
    if whole.any():
        index = np.flatnonzero(whole)
        nucleus = draws.select(index)
        total[index] = _weights(rows.select(index), nucleus.temperature, nucleus.min_p)[1][:, -1]

    # A token is kept if the mass before it is less than top_p: the first always is.
    reached = draws.top_p * total
    weights[:, 1:][cdf[:, :-1] >= reached[:, None]] = 0.0
    known_mass = cdf[np.arange(len(cdf)), np.maximum(np.minimum(num_known_R, cdf.shape[1]) - 1, 0)]
    settled = (num_known_R >= top_k) | (whole & (num_known_R > 0) & (known_mass >= reached))

    longest = max(1, np.count_nonzero(weights, axis=1).max())  # what lies beyond is zero in every row
    ids_RM, weights = ids_RM[:, :longest], weights[:, :longest]
    by_id = np.argsort(ids_RM, axis=1)
    weights = np.take_along_axis(weights, by_id, axis=1)
    place = _first_beyond(weights, draws.uniform * np.cumsum(weights, axis=1)[:, -1])
    token_ids = ids_RM[np.arange(len(place)), by_id[np.arange(len(place)), place]]
    return np.where(settled, token_ids, -1)


# ------------------------------------------------------------------------------------------------- the leading tokens


def _leaders(rows: _Rows, num_leaders: int) -> tuple[FloatArray, IntArray, IntArray]:
    """The best tokens of each row, best first, lowest id first on ties: logits [R, M], ids [R, M], num_known [R].

    The leaders are the tokens above a floor that about ``num_leaders`` reach, so M follows from the data and a row's
    leaders are all of its best tokens: num_known of them (V: it has no other finite logit), then -inf with the id V.
    There may be none, where all that reach the floor are equals. For few leaders the floor is the least maximum of as
    many best blocks: no token of another block is above it, so only those blocks are looked at, and the V % 64 tokens
    at the end.
    """
    logits_RV = rows.logits_RV
    num_rows, vocab_size = logits_RV.shape
    num_full = vocab_size // BLOCK
    row_index = np.arange(num_rows)
    floor = np.full(num_rows, -np.inf, dtype=np.float32)
    values = logits_RV.numpy()
    blocks = np.broadcast_to(np.arange(num_full + 1), (num_rows, num_full + 1))
    if 4 * num_leaders < num_full:
        maxima = rows.maxima_RN[:, :num_full]
        best = np.argpartition(maxima, num_full - num_leaders, axis=1)[:, -num_leaders:]
        floor = maxima[row_index[:, None], best].min(axis=1)
        in_blocks = logits_RV[:, : num_full * BLOCK].view(num_rows, num_full, BLOCK).numpy()
        chosen = in_blocks[row_index[:, None], best].reshape(num_rows, -1)
        values = np.concatenate((chosen, values[:, num_full * BLOCK :]), axis=1)
        blocks = np.concatenate((best, blocks[:, -1:]), axis=1)
    elif num_leaders < vocab_size:
        floor = np.partition(values, vocab_size - num_leaders, axis=1)[:, vocab_size - num_leaders]

    # The tokens above the floor, moved together at the left:  . a . . b c  ->  a b c -inf
    above = values > floor[:, None]
    num_above = np.count_nonzero(above, axis=1)
    row, place = np.divmod(np.flatnonzero(above), values.shape[1])
    column = np.arange(len(row)) - np.repeat(np.cumsum(num_above) - num_above, num_above)
    leaders = np.full((num_rows, max(1, num_above.max())), -np.inf, dtype=np.float32)
    leaders[row, column] = values[row, place]
    ids = np.full(leaders.shape, vocab_size, dtype=np.int64)
    ids[row, column] = blocks[row, place // BLOCK] * BLOCK + place % BLOCK
    return *_ranked(leaders, ids), np.where(floor == -np.inf, vocab_size, num_above)


def _ranked(values: FloatArray, ids: IntArray) -> tuple[FloatArray, IntArray]:
    """Rows sorted by (value descending, id ascending), by one sort of integers.

    The bits of floats, the sign bit aside, grow with the magnitude. So positives with all other bits flipped, and
    negatives as they are, order as unsigned integers from the largest float to the smallest. The map is its own
    inverse.
    """

    def flip(bits: npt.NDArray[np.uint32]) -> npt.NDArray[np.uint32]:
        return np.where(bits >> np.uint32(31), bits, bits ^ np.uint32(0x7FFFFFFF))

    high = flip((values + np.float32(0.0)).view(np.uint32)).astype(np.uint64)  # -0.0 + 0.0 is 0.0: equals stay equal
    keys = np.sort((high << np.uint64(32)) | ids.astype(np.uint64), axis=1)
    sorted_values = flip((keys >> np.uint64(32)).astype(np.uint32)).view(np.float32)
    return sorted_values, (keys & np.uint64(0xFFFFFFFF)).astype(np.int64)


def _token_logprobs(rows: _Rows, token_ids: SequenceOf[int], num_top: SequenceOf[int]) -> list[TokenLogprobs]:
    """token_logprobs for rows that are known to be finite at their maximum."""
    results: list[TokenLogprobs] = []
    for part in _parts(np.ones(len(token_ids), dtype=np.bool_), rows.logits_RV.shape[1]):
        chunk = rows.select(part)
        chosen, nums = [token_ids[row] for row in part], [num_top[row] for row in part]
        log_total = np.log(_weights(chunk, None, None)[1][:, -1])
        offset = chunk.best.astype(np.float64) + log_total
        own = chunk.logits_RV.numpy()[np.arange(len(part)), chosen] - offset
        tops = _top_logits(chunk, nums)
        for row, (ids, logits) in enumerate(tops):
            top = tuple(zip(ids.tolist(), (logits - offset[row]).tolist(), strict=True))
            results.append(TokenLogprobs(chosen[row], float(own[row]), top))
    return results


def _top_logits(rows: _Rows, nums: SequenceOf[int]) -> list[tuple[IntArray, FloatArray]]:
    """The nums[i] best tokens of row i with their logits, in _leaders' order."""
    wanted = np.minimum(nums, rows.logits_RV.shape[1])
    tops = [(np.empty(0, dtype=np.int64), np.empty(0, dtype=np.float32))] * len(wanted)
    missing = wanted > 0
    for num_leaders in (int(wanted.max()) + 8, *NUM_LEADERS, rows.logits_RV.shape[1]):
        index = np.flatnonzero(missing)
        if not len(index):
            break
        values, ids, num_known = _leaders(rows.select(index), num_leaders)
        for at, row in enumerate(index):
            if num_known[at] >= wanted[row]:
                tops[row] = (ids[at, : wanted[row]], values[at, : wanted[row]])
                missing[row] = False
    return tops
