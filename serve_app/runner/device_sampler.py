"""Logits -> tokens on a GPU, without waiting for it. Knows sampling parameters and slots; kernels/sampling*.py compute.

Same order of operations, parameters and errors as runner/sampler.py. By design the tokens of a row that samples are
others: there one uniform number goes through the inverse CDF, here every token of the vocabulary has a number of its own
and the largest weight / exponential wins (the Gumbel argmax). Greedy rows, kept sets, edited logits and
log-probabilities are the same. Shapes: S rows, V vocab, A rows that ask for log-probabilities.

    plan = sampler.prepare(sequences, positions)     on the host: parameters into plan.rows, int32 [S, 16]
    step = sampler.sample(logits_SV, plan)           launches only; step.token_ids stay on the device for the next step
    step.start_copy()                                the copy to the host, with an event behind it
    step.read() -> SampledTokens                     waits for the event; raises StepFailedError

A plan that is plain (no edits, no log-probabilities) needs only kernels over arrays at fixed addresses. A CUDA graph
captures `launch` with them, once for each pair (draws, truncates) that is wanted, and after a replay `finish` makes the
step. Everything runs on the current stream, one step behind the other.

Sequences that edit their logits have one word per token of the vocabulary in their slot. The device itself counts the
token it has just sampled, so the next step is right before the host has read anything. The host remembers how many
tokens of which sequence a slot has counted, and where that is not what it should be (another sequence, a return after a
preemption, a step that failed), the words are made anew from token_ids.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence as SequenceOf
from dataclasses import dataclass, field
from typing import cast

import numpy as np
import numpy.typing as npt
import torch

from serve_app.engine.request import MAX_LOGPROBS, SamplingParams, TokenLogprobs
from serve_app.engine.sequence import Sequence
from serve_app.errors import StepFailedError
from serve_app.kernels import sampling, sampling_cut, sampling_edits
from serve_app.kernels.sampling_edits import Edit, Word
from serve_app.kernels.sampling_rows import NUM_FIELDS, Field, Flag, Scratch
from serve_app.runner.sampler import MIN_TEMPERATURE, SampledTokens

IntArray = npt.NDArray[np.int32]


@dataclass
class SamplingPlan:
    """What a step's rows ask for, on the host."""

    sequences: list[Sequence]
    rows: IntArray
    """[num_rows, 16], C order: the packed parameters (sampling_rows.Field), to go to the device as they are."""
    draws: bool = False
    """Some row is not greedy."""
    truncates: bool = False
    """Some row has top_k or top_p."""
    edited: list[int] = field(default_factory=list)
    """Rows with masks, min_tokens, bias or penalties."""
    masks: IntArray | None = None
    """[len(edited), ceil(V / 32)], if some row may have one; bit i: token i may come."""
    asking: list[int] = field(default_factory=list)
    """Rows that want log-probabilities."""

    def take_masks(self, masks: Mapping[int, IntArray]) -> None:
        """``masks[row]``: words as in ``masks``, or more of them. For rows that were announced to `prepare`.

        One that was announced and gets none goes anywhere.
        """
        assert self.masks is not None
        for row, words in masks.items():
            self.masks[self.edited.index(row)] = words[: self.masks.shape[1]]

    @property
    def is_plain(self) -> bool:
        """No edits and no log-probabilities: its launches may be replayed from a CUDA graph."""
        return not self.edited and not self.asking


class SampledStep:
    """What a step sampled, on the device until it is read."""

    def __init__(self, plan: SamplingPlan, out: torch.Tensor, logprobs: PendingLogprobs | None) -> None:
        self._plan = plan
        self._out = PendingCopy(out)
        self._logprobs = logprobs
        self.token_ids = out[0]
        """int32 [num_rows], contiguous, on the device. 0 in a row that failed; rows of padding have some token."""

    def start_copy(self) -> None:
        """Queue the copy to the host on the current stream and return. `read` does it where nobody did."""
        self._out.start()
        if self._logprobs is not None:
            self._logprobs.start_copy()

    def read(self) -> SampledTokens:
        """Wait. Raises StepFailedError naming the first request whose row has NaN or +inf, or nothing allowed."""
        self.start_copy()
        token_ids, flags = self._out.wait()
        sequences = self._plan.sequences
        for part in (flags >> 2, flags & 3):  # what the model made comes before what edits made of it
            bad = np.flatnonzero(part[: len(sequences)])
            if len(bad):
                request_id, choice_index = sequences[bad[0]].key
                raise StepFailedError(
                    f"request {request_id} (choice {choice_index}) cannot be sampled: {_REASONS[Flag(part[bad[0]])]}"
                )
        logprobs = {}
        if self._logprobs is not None:
            chosen = token_ids[self._plan.asking].tolist()
            logprobs = dict(zip(self._plan.asking, self._logprobs.read(chosen), strict=True))
        return SampledTokens(token_ids[: len(sequences)].tolist(), logprobs)


_REASONS = {
    Flag.INFINITE: "its logits contain inf",
    Flag.NAN: "its logits contain nan",
    Flag.NOTHING: "no token that is allowed has a finite logit",
}


class PendingLogprobs:
    """Log-probabilities, on the device until they are read. One part per launch."""

    def __init__(self, rows: SequenceOf[int], token_ids: SequenceOf[int], num_top: SequenceOf[int]) -> None:
        self._rows = rows
        self._token_ids = token_ids
        self._num_top = num_top
        self.parts: list[PendingCopy] = []

    def start_copy(self) -> None:
        for part in self.parts:
            part.start()

    def read(self, chosen: SequenceOf[int] | None = None) -> list[TokenLogprobs]:
        """Wait. ``chosen``: the tokens, where they were not known at launch. Raises StepFailedError naming the row."""
        self.start_copy()
        results: list[TokenLogprobs] = []
        token_ids = self._token_ids if chosen is None else chosen
        for part in self.parts:
            words = part.wait()
            floats = words.view(np.float32)
            for row in range(len(words)):
                number = len(results)
                if words[row, 0] != Flag.FINE:
                    reason = _REASONS[Flag(words[row, 0])]
                    raise StepFailedError(f"row {self._rows[number]} has no log-probabilities: {reason}")
                best, total, own = floats[row, 1:4].tolist()
                offset = best + math.log(total)
                top: tuple[tuple[int, float], ...] = ()
                if num_top := self._num_top[number]:
                    ids, logits = words[row, 4 : 4 + num_top], floats[row, 4 + MAX_LOGPROBS :][:num_top]
                    order = np.argsort(-logits, kind="stable")  # they came in the order of ids
                    top = tuple((int(ids[i]), float(logits[i]) - offset) for i in order)
                results.append(TokenLogprobs(token_ids[number], own - offset, top))
        return results


class DeviceSampler:
    """Chooses the next token of each row, on a device.

    ``max_num_seqs``: slots, and the most rows of a step. ``device``: a CUDA device; "cpu" under Triton's interpreter.
    """

    def __init__(self, vocab_size: int, max_num_seqs: int, device: torch.device | str) -> None:
        self.vocab_size = vocab_size
        self.max_num_seqs = max_num_seqs
        self.device = torch.device(device)
        self._scratch = Scratch(vocab_size, max_num_seqs, self.device)
        self._owners: list[Sequence | None] = [None] * max_num_seqs
        """Whose parameters stand in each slot of the next four."""
        self._packed = np.zeros((max_num_seqs, NUM_FIELDS), dtype=np.int32)
        self._truncates = np.zeros(max_num_seqs, dtype=np.bool_)
        self._asks = np.zeros(max_num_seqs, dtype=np.bool_)
        self._may_edit = np.zeros(max_num_seqs, dtype=np.bool_)
        self._num_counted: list[int | None] = [None] * max_num_seqs
        """How many tokens the words of each slot count; None: they are not the owner's yet."""
        self._words: torch.Tensor | None = None
        """int32 [max_num_seqs, V] of `Word`; made when somebody first needs it, and the same holds for the others."""
        self._bias: torch.Tensor | None = None
        """float32 [max_num_seqs, V]."""
        self._edited: torch.Tensor | None = None
        """float32 [max_num_seqs, V]: the edited logits of a step."""

    # ---- on the host ---------------------------------------------------------------------------------------------

    def prepare(
        self,
        sequences: SequenceOf[Sequence],
        positions: SequenceOf[int] | None = None,
        masked: Collection[int] = (),
        num_rows: int | None = None,
    ) -> SamplingPlan:
        """Pack the parameters of a step; row i of its logits belongs to ``sequences[i]``.

        ``positions[i]``: the place that the token will take, start + num_tokens of the scheduled sequence; by default
        len(token_ids). ``masked``: rows that have a mask; the plan takes it before it is sampled. ``num_rows``: rows of
        the padded batch; those behind the sequences are greedy and ignored. Brings the state of new sequences to their
        slots, on the current stream, so it is called in the order of the steps and every plan is sampled (or its step is
        run again).

        Raises StepFailedError naming the request for a token id beyond the vocabulary.
        """
        num_seqs = len(sequences)
        num_rows = num_seqs if num_rows is None else num_rows
        assert num_seqs <= num_rows <= self.max_num_seqs
        if positions is None:
            positions = [len(sequence.token_ids) for sequence in sequences]
        slots = [sequence.slot for sequence in sequences]
        assert len(set(slots)) == num_seqs, "two rows have one slot"
        for slot, sequence in zip(slots, sequences, strict=True):
            if self._owners[slot] is not sequence:
                self._pack(slot, sequence)
        rows = np.zeros((num_rows, NUM_FIELDS), dtype=np.int32)
        rows[:num_seqs] = self._packed[slots]
        rows[:num_seqs, Field.POSITION] = positions
        rows[:, Field.SOURCE] = np.arange(num_rows)
        rows[:, Field.EDITED] = -1
        plan = SamplingPlan(list(sequences), rows)
        plan.draws = bool((rows.view(np.float32)[:, Field.INVERSE_TEMPERATURE] > 0).any())
        plan.truncates = bool(self._truncates[slots].any())
        plan.asking = np.flatnonzero(self._asks[slots]).tolist()
        for row in sorted({*np.flatnonzero(self._may_edit[slots]).tolist(), *masked}):
            sequence, position = sequences[row], positions[row]
            params = sequence.request.sampling
            edits = _edits_of(params, position - sequence.num_prompt_tokens) | (Edit.MASK if row in masked else Edit(0))
            if edits:
                rows[row, Field.EDITED] = len(plan.edited)
                rows[row, Field.EDITS] = int(edits)
                plan.edited.append(row)
            if edits & (Edit.WORDS | Edit.BIAS):
                self._fill_slot(sequence, position, edits)
        if masked:
            plan.masks = np.full((len(plan.edited), -(-self.vocab_size // 32)), -1, dtype=np.int32)
        return plan

    def _pack(self, slot: int, sequence: Sequence) -> None:
        """Put what no step changes into the slot's row."""
        params = sequence.request.sampling
        temperature = cast(float, params.temperature)
        top_k, top_p = cast(int, params.top_k), cast(float, params.top_p)
        samples = temperature >= MIN_TEMPERATURE
        assert params.is_resolved and (params.seed is not None or not samples)
        words = self._packed[slot]
        floats = words.view(np.float32)
        words[Field.SEED_LOW : Field.SEED_HIGH + 1] = np.array([params.seed or 0], dtype=np.uint64).view(np.int32)
        words[Field.CHOICE] = sequence.request.choice_index
        floats[Field.INVERSE_TEMPERATURE] = 1.0 / temperature if samples else 0.0
        floats[Field.MIN_P] = params.min_p
        words[Field.TOP_K] = top_k = top_k if 0 < top_k < self.vocab_size else 0
        words[Field.TOP_P_LOW : Field.TOP_P_HIGH + 1] = np.array([top_p], dtype=np.float64).view(np.int32)
        words[Field.SLOT] = slot
        floats[Field.REPETITION] = params.repetition_penalty
        floats[Field.FREQUENCY] = params.frequency_penalty
        floats[Field.PRESENCE] = params.presence_penalty
        self._truncates[slot] = samples and (top_k > 0 or top_p < 1.0)
        self._asks[slot] = params.logprobs is not None
        self._may_edit[slot] = bool(_edits_of(params, -1))
        self._owners[slot] = sequence
        self._num_counted[slot] = None

    def _fill_slot(self, sequence: Sequence, position: int, edits: Edit) -> None:
        """Make the slot's words those of the sequence with ``position`` tokens counted, unless they are."""
        slot = sequence.slot
        num_counted = self._num_counted[slot]
        if num_counted is None or (edits & Edit.PENALTIES and num_counted != position):
            self._num_counted[slot] = None
            self._check_token_ids(sequence)
            ever = _edits_of(sequence.request.sampling, -1)  # a step that is run again may want min_tokens once more
            if ever & Edit.WORDS:
                self._write_words(sequence, position)
            if ever & Edit.BIAS:
                self._write_bias(sequence)
        self._num_counted[slot] = position + 1  # with the token that this step's launches will count

    def _check_token_ids(self, sequence: Sequence) -> None:
        params = sequence.request.sampling
        for name, token_ids in (("allowed_token_ids", params.allowed_token_ids), ("logit_bias", params.logit_bias)):
            largest = max(token_ids or (), default=0)
            if largest >= self.vocab_size:
                request_id, choice_index = sequence.key
                raise StepFailedError(
                    f"request {request_id} (choice {choice_index}) cannot be sampled: {name} has the token id {largest},"
                    f" and the vocabulary has {self.vocab_size} tokens"
                )

    def _write_words(self, sequence: Sequence, position: int) -> None:
        if len(sequence.token_ids) < position:
            request_id, choice_index = sequence.key
            raise StepFailedError(
                f"request {request_id} (choice {choice_index}): the token before position {position} was counted by"
                " nobody and is not known here yet"
            )
        params = sequence.request.sampling
        allowed = params.allowed_token_ids
        words = np.full(self.vocab_size, 0 if allowed is None else int(Word.FORBIDDEN), dtype=np.int32)
        if allowed is not None:
            words[list(allowed)] = 0
        words[[i for i in sequence.stop_ids if i < self.vocab_size]] |= int(Word.STOPS)
        if _has_penalties(params):
            tokens = np.array(sequence.token_ids[:position], dtype=np.int64)
            words += np.bincount(tokens[sequence.num_prompt_tokens :], minlength=self.vocab_size).astype(np.int32)
            words[tokens[: sequence.num_prompt_tokens]] |= int(Word.IN_PROMPT)
        if self._words is None:
            self._words = self._new_state(torch.int32)
        self._words[sequence.slot].copy_(self._to_device(words), non_blocking=True)

    def _write_bias(self, sequence: Sequence) -> None:
        bias = sequence.request.sampling.logit_bias or {}
        row = np.zeros(self.vocab_size, dtype=np.float32)
        row[list(bias)] = list(bias.values())
        if self._bias is None:
            self._bias = self._new_state(torch.float32)
        self._bias[sequence.slot].copy_(self._to_device(row), non_blocking=True)

    # ---- on the device -------------------------------------------------------------------------------------------

    def sample(self, logits_SV: torch.Tensor, plan: SamplingPlan, rows: torch.Tensor | None = None) -> SampledStep:
        """Launch what the plan needs, and wait for nothing.

        ``logits_SV``: float32, bfloat16 or float16, at least plan.rows' rows, left as it is. ``rows``: plan.rows on the
        device, where the caller has copied them with its own.
        """
        assert len(logits_SV) >= len(plan.rows) and logits_SV.shape[1] == self.vocab_size
        if rows is None:
            rows = self._to_device(plan.rows)
        out = torch.empty((2, len(plan.rows)), dtype=torch.int32, device=self.device)
        if not len(plan.rows):
            return SampledStep(plan, out, None)
        edited = self._edit(logits_SV, plan, rows) if plan.edited else None
        self._launch(logits_SV, rows, out, edited, draws=plan.draws, truncates=plan.truncates)
        if plan.edited and self._words is not None:
            sampling_edits.count(rows, out, self._words)
        return self.finish(plan, out, logits_SV)

    def launch(
        self, logits_SV: torch.Tensor, rows: torch.Tensor, out: torch.Tensor, *, draws: bool, truncates: bool
    ) -> None:
        """The launches of a plain plan. ``rows``: int32 [S, 16]; ``out``: int32 [2, S], gets token ids and flags.

        A graph captured with draws and truncates serves plans without them too: rows that do not ask leave at once.
        """
        self._launch(logits_SV, rows, out, None, draws=draws, truncates=truncates)

    def _launch(
        self,
        logits_SV: torch.Tensor,
        rows: torch.Tensor,
        out: torch.Tensor,
        edited: torch.Tensor | None,
        *,
        draws: bool,
        truncates: bool,
    ) -> None:
        sampling.scan(logits_SV, rows, self._scratch, edited)
        if truncates:
            sampling_cut.cut(logits_SV, rows, self._scratch, edited)
        if draws:
            sampling.draw(logits_SV, rows, self._scratch, edited, has_cuts=truncates)
        sampling.choose(rows, self._scratch, out, has_edits=edited is not None, draws=draws)

    def finish(self, plan: SamplingPlan, out: torch.Tensor, logits_SV: torch.Tensor | None = None) -> SampledStep:
        """The step whose `launch` (or the graph that holds it) has filled ``out``; the logits if some rows ask."""
        logprobs = None
        if plan.asking:
            assert logits_SV is not None
            num_top = [plan.sequences[row].request.sampling.logprobs or 0 for row in plan.asking]
            logprobs = self._logprobs(logits_SV, plan.asking, [-1] * len(plan.asking), num_top, chosen=out)
        return SampledStep(plan, out, logprobs)

    def token_logprobs(
        self, logits_NV: torch.Tensor, rows: SequenceOf[int], token_ids: SequenceOf[int], num_top: SequenceOf[int]
    ) -> PendingLogprobs:
        """Log-probabilities of ``token_ids[i]`` in row ``rows[i]`` with its ``num_top[i]`` likeliest tokens (at most 64).

        The same as runner/sampler.py's token_logprobs. Reading it raises StepFailedError naming a row that has NaN or
        +inf or nothing finite.
        """
        return self._logprobs(logits_NV, rows, token_ids, num_top, chosen=None)

    def _logprobs(
        self,
        logits_NV: torch.Tensor,
        rows: SequenceOf[int],
        token_ids: SequenceOf[int],
        num_top: SequenceOf[int],
        chosen: torch.Tensor | None,
    ) -> PendingLogprobs:
        num_top = [min(num, self.vocab_size) for num in num_top]
        pending = PendingLogprobs(rows, token_ids, num_top)
        for start in range(0, len(rows), self.max_num_seqs):
            part = slice(start, start + self.max_num_seqs)
            params = np.zeros((len(rows[part]), NUM_FIELDS), dtype=np.int32)
            params[:, Field.SOURCE] = rows[part]
            params[:, Field.EDITED] = -1
            params[:, Field.TOP_K] = [num if num < self.vocab_size else 0 for num in num_top[part]]
            params[:, Field.TOP_P_LOW : Field.TOP_P_HIGH + 1] = np.array([1.0]).view(np.int32)
            params.view(np.float32)[:, Field.INVERSE_TEMPERATURE] = 1.0
            targets = np.stack((token_ids[part], num_top[part]), axis=1).astype(np.int32)
            words = torch.empty((len(params), 4 + 2 * MAX_LOGPROBS), dtype=torch.int32, device=self.device)
            on_device = self._to_device(targets)
            sampling.logprobs(
                logits_NV,
                self._to_device(params),
                self._scratch,
                on_device,
                on_device if chosen is None else chosen,
                words,
            )
            pending.parts.append(PendingCopy(words))
        return pending

    def _edit(self, logits_SV: torch.Tensor, plan: SamplingPlan, rows: torch.Tensor) -> torch.Tensor:
        if self._edited is None:
            self._edited = torch.empty((self.max_num_seqs, self.vocab_size), dtype=torch.float32, device=self.device)
        masks = None if plan.masks is None else self._to_device(plan.masks)
        # Where nobody has a state or a mask, no row's edits make the kernel read one, so one word will do.
        nothing = rows.view(-1)[:1]
        sampling_edits.edit(
            logits_SV,
            rows,
            self._scratch,
            self._edited,
            state=nothing if self._words is None else self._words,
            bias=nothing.view(torch.float32) if self._bias is None else self._bias,
            masks=nothing if masks is None else masks,
            some_wait=bool((plan.rows[plan.edited, Field.EDITS] & int(Edit.MIN_TOKENS)).any()),
        )
        return self._edited

    def _new_state(self, dtype: torch.dtype) -> torch.Tensor:
        return torch.zeros((self.max_num_seqs, self.vocab_size), dtype=dtype, device=self.device)

    def _to_device(self, array: npt.NDArray[np.generic]) -> torch.Tensor:
        """A copy. On a GPU through pinned memory, which torch keeps until the copy is done."""
        tensor = torch.from_numpy(array)
        if self.device.type == "cpu":
            return tensor.clone()
        return tensor.pin_memory().to(self.device, non_blocking=True)

    # ---- start-up ------------------------------------------------------------------------------------------------

    def warm_up(self, logits_SV: torch.Tensor) -> None:
        """Compile every variant for logits like these (type, strides, alignment), so that no step compiles anything.

        Waits for the device. One row is enough; its numbers are not looked at.
        """
        rows = np.zeros((1, NUM_FIELDS), dtype=np.int32)
        rows[:, Field.TOP_K] = 1
        rows.view(np.float32)[:, Field.INVERSE_TEMPERATURE] = 1.0
        on_device = self._to_device(rows)
        out = torch.empty((2, 1), dtype=torch.int32, device=self.device)
        state = torch.zeros((1, self.vocab_size), dtype=torch.int32, device=self.device)
        floats = state.view(torch.float32)
        for edited in (None, floats):
            for draws, truncates in ((False, False), (True, False), (True, True)):
                self._launch(logits_SV, on_device, out, edited, draws=draws, truncates=truncates)
        sampling_edits.edit(
            logits_SV, on_device, self._scratch, floats, state=state, bias=floats, masks=state, some_wait=True
        )
        sampling_edits.count(on_device, out, state)
        self.token_logprobs(logits_SV, [0], [0], [1])
        if self.device.type != "cpu":
            torch.cuda.synchronize(self.device)

    def state_bytes(self) -> int:
        """Device memory that is allocated when somebody first asks for edits: words, bias, edited logits."""
        return 3 * 4 * self.max_num_seqs * self.vocab_size


class PendingCopy:
    """A device tensor on its way to the host: `start` queues the copy, `wait` gives the array."""

    def __init__(self, source: torch.Tensor) -> None:
        self._source = source
        self._host: torch.Tensor | None = None
        self._event: torch.cuda.Event | None = None

    def start(self) -> None:
        if self._host is not None:
            return
        if self._source.device.type == "cpu":
            self._host = self._source.clone()
            return
        self._host = torch.empty(self._source.shape, dtype=self._source.dtype, pin_memory=True)
        self._host.copy_(self._source, non_blocking=True)
        self._event = torch.cuda.Event()
        self._event.record()

    def wait(self) -> IntArray:
        assert self._host is not None
        if self._event is not None:
            self._event.synchronize()
        return cast(IntArray, self._host.numpy())


def _has_penalties(params: SamplingParams) -> bool:
    return params.repetition_penalty != 1.0 or params.frequency_penalty != 0.0 or params.presence_penalty != 0.0


def _edits_of(params: SamplingParams, num_output_tokens: int) -> Edit:
    """What the request's own parameters ask for at this length of output."""
    edits = Edit(0)
    if _has_penalties(params):
        edits |= Edit.PENALTIES | Edit.WORDS
    if params.allowed_token_ids is not None:
        edits |= Edit.WORDS
    if num_output_tokens < params.min_tokens:
        edits |= Edit.MIN_TOKENS | Edit.WORDS
    if params.logit_bias:
        edits |= Edit.BIAS
    return edits
