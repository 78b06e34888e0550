"""Constraints: the grammars of a step's sequences, as masks. Knows sequences, slots and threads; knows no logits.

    begin(sequences)        while the forward runs, a thread brings the matchers up to date and fills the masks
    step.masks()            waits for them: row -> words
    step.advance(tokens)    the matchers go on by what was sampled: which sentences cannot go on

A matcher lives in its sequence's slot and is a function of the sequence's output tokens: where it has seen other tokens
than those (another sequence, a step that failed, an output that another replica began), it is made anew from them. So
preemption, recomputation and failover need nothing of their own.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence as SequenceOf
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import numpy.typing as npt

from serve_app.engine.sequence import Sequence
from serve_app.errors import StepFailedError
from serve_app.text.token_masks import Grammar, MaskMaker, Matcher

Words = npt.NDArray[np.int32]


class Constraints:
    """``num_threads``: threads that fill the masks of a step, beside the one that waits for them."""

    def __init__(self, max_num_seqs: int, num_threads: int) -> None:
        self._held: list[_Held | None] = [None] * max_num_seqs
        self._maker = MaskMaker(num_threads)
        self._thread: ThreadPoolExecutor | None = None

    def begin(self, sequences: SequenceOf[Sequence]) -> ConstrainedStep | None:
        """Starts on the masks of the rows that sample; None if nobody has a grammar. Called on the engine's thread.

        A sequence that has no slot any more has ended since its step was launched, and gets no mask.
        """
        rows = [row for row, sequence in enumerate(sequences) if sequence.grammar is not None and sequence.slot >= 0]
        if not rows:
            return None
        if self._thread is None:
            self._thread = ThreadPoolExecutor(1, "masks")
        held = [self._hold(sequences[row]) for row in rows]
        return ConstrainedStep(rows, held, self._thread.submit(_fill, held, self._maker))

    def _hold(self, sequence: Sequence) -> _Held:
        held = self._held[sequence.slot]
        if held is None or held.sequence is not sequence:
            held = self._held[sequence.slot] = _Held(sequence)
        return held


class ConstrainedStep:
    """The masks of one step, on their way."""

    def __init__(self, rows: list[int], held: list[_Held], filling: Future[Words]) -> None:
        self._rows = rows
        self._held = held
        self._filling = filling
        self.seconds_waited = 0.0
        """That nothing else was done while the masks were made."""

    def masks(self) -> Mapping[int, Words]:
        """Row -> int32 [num_words], bit i: token i may come (see `Matcher.fill`).

        Raises StepFailedError naming the request whose tokens are not its grammar's, or whose grammar is too complex.
        """
        started = time.perf_counter()
        words = self._filling.result()
        self.seconds_waited += time.perf_counter() - started
        return dict(zip(self._rows, words, strict=True))

    def advance(self, token_ids: SequenceOf[int]) -> frozenset[int]:
        """Rows whose sentence cannot go on behind their token. ``token_ids``: one for each row that samples."""
        return frozenset(
            row for row, held in zip(self._rows, self._held, strict=True) if held.ends_with(token_ids[row])
        )


class _Held:
    """One sequence's matcher, and how much of the sequence it has seen."""

    def __init__(self, sequence: Sequence) -> None:
        self.sequence = sequence
        self._begin()

    def _begin(self) -> None:
        grammar = self.sequence.grammar
        assert isinstance(grammar, Grammar)
        self.matcher: Matcher = grammar.matcher(takes_eos=not self.sequence.request.sampling.ignore_eos)
        self._num_seen = 0
        """Output tokens consumed. All but the last were the sequence's own when they were."""
        self._last = -1

    def catch_up(self) -> None:
        """Brings the matcher behind the sequence's last output token."""
        sequence = self.sequence
        first = sequence.num_prompt_tokens
        end = len(sequence.token_ids)
        seen = first + self._num_seen
        if seen > end or (self._num_seen and sequence.token_ids[seen - 1] != self._last):
            self._begin()
            seen = first
        self._consume(sequence.token_ids[seen:end])

    def ends_with(self, token_id: int) -> bool:
        """Whether nothing can come behind this token, which is not the sequence's yet."""
        if not self.sequence.is_finished:
            self._consume([token_id])
        return self.matcher.has_ended

    def _consume(self, token_ids: list[int]) -> None:
        if not token_ids:
            return
        try:
            self.matcher.consume(token_ids)
        except ValueError as error:
            self._begin()
            raise _failed(self.sequence, error) from error
        self._num_seen += len(token_ids)
        self._last = token_ids[-1]


def _fill(held: list[_Held], maker: MaskMaker) -> Words:
    for each in held:
        each.catch_up()
    matchers = [each.matcher for each in held]
    words: Words = np.empty((len(held), matchers[0].grammar.num_words), dtype=np.int32)
    try:
        maker.fill(matchers, words)
    except ValueError:
        for each, row in zip(held, words, strict=True):  # whose it is
            try:
                each.matcher.fill(row)
            except ValueError as error:
                raise _failed(each.sequence, error) from error
    return words


def _failed(sequence: Sequence, error: ValueError) -> StepFailedError:
    request_id, choice_index = sequence.key
    return StepFailedError(f"request {request_id} (choice {choice_index}) cannot be sampled: {error}")
