"""Static batching, and dynamic batching with padding: what continuous batching is compared with, on the same Runner.

A batch is a rectangle. It starts together, and nobody joins it until the last of its rows has ended. A batch of three
prompts of 5, 2 and 3 tokens, of which R2 ends first, in steps of at most 3 columns:

    column      0 1 2   3 4   5   6   7
    R1        [ p p p ][p P ][d ][d ][d ]      p  a prompt token; P  the last one, which samples the first token
    R2        [ x x x ][p P ][d ][x ][x ]      d  a decode
    R3        [ x x p ][p P ][d ][d ][d ]      x  padding: computed, and dropped

Padding costs what it costs: it is made of *scratch sequences*, which the runner computes like any other. One stands
left of each shorter prompt, and one goes on in the place and the blocks of each row that has ended. What does not
change is a request's tokens: the scratch of a row is a sequence of its own, so no mask is needed to hide it. (It
therefore attends to itself only, a little cheaper than in a padded tensor. Its blocks stay with the batch, as there.)

Knows the Scheduler it replaces; knows no tensors and no clock.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

from serve_app.engine.config import EngineConfig
from serve_app.engine.engine import Engine, Runner, Step
from serve_app.engine.pooling import Pooled
from serve_app.engine.request import FinishReason, GenerateRequest, SamplingParams, TokenLogprobs, TokenOutput
from serve_app.engine.scheduler import Key, Scheduler, SchedulerOutput
from serve_app.engine.sequence import Sequence, SequenceStatus
from serve_app.errors import ConfigurationError, RaggedServeError

POLICIES = ("static", "dynamic", "continuous")

_PADDING = "\x00padding of "
_UNLIMITED = 2**62


def padded_request_id(request_id: str) -> str | None:
    """The request whose row this scratch sequence pads; None for a request that is no padding."""
    return request_id.removeprefix(_PADDING) if request_id.startswith(_PADDING) else None


@dataclass(slots=True)
class PaddedOutput(SchedulerOutput):
    """A plan whose ``num_tokens`` contain padding."""

    num_padded_tokens: int = 0


@dataclass(slots=True)
class _Row:
    sequence: Sequence
    """The request; once it has ended, the scratch that goes on in its place."""
    num_left: int
    """Columns of padding left of its prompt."""
    left: Sequence | None
    """The scratch that computes them."""


class PaddedScheduler(Scheduler):
    """The interface of Scheduler; one rectangle at a time. A subclass says which requests make a batch.

    A step has at most ``config.max_num_seqs`` sequences. A row may be two of them, a prompt and the padding left of it,
    so ``max_num_rows`` is at most half (and by default that). ``max_row_tokens``: most columns in one step; by default
    as many as the token budget allows. No prefix caching, no preemption: a batch starts only if it fits to its end.
    """

    def __init__(
        self,
        config: EngineConfig,
        *,
        num_blocks: int,
        max_model_len: int,
        vocab_size: int,
        eos_token_ids: frozenset[int] = frozenset(),
        max_num_rows: int | None = None,
        max_row_tokens: int | None = None,
    ) -> None:
        super().__init__(
            dataclasses.replace(config, enable_prefix_caching=False),
            num_blocks=num_blocks,
            max_model_len=max_model_len,
            vocab_size=vocab_size,
            eos_token_ids=eos_token_ids,
        )
        limit = max(1, config.max_num_seqs // 2)
        self.max_num_rows = limit if max_num_rows is None else max_num_rows
        if not 1 <= self.max_num_rows <= limit:
            raise ConfigurationError(
                f"max_num_rows is {max_num_rows}; with max_num_seqs {config.max_num_seqs} it must be from 1 to {limit}"
            )
        self.max_row_tokens = max_row_tokens or config.max_num_batched_tokens
        self._rows: list[_Row] = []
        self._num_columns = 0
        """Columns of the prompts' rectangle: the longest prompt."""
        self._column = 0
        """Columns of it that are computed."""

    # ---- the policy ----------------------------------------------------------------------------------------------

    def choose(self, waiting: list[Sequence]) -> list[Sequence]:
        """Whom of ``waiting``, oldest first and not empty, to batch. The batch is as much of the head as fits."""
        raise NotImplementedError

    # ---- the interface of Scheduler ------------------------------------------------------------------------------

    def add(self, requests: list[GenerateRequest], now: float = 0.0) -> list[Sequence]:
        """Each choice is a row of its own and computes its own prompt."""
        self.check(requests)
        return [sequence for request in requests for sequence in super(PaddedScheduler, self).add([request], now)]

    def schedule(self, now: float = 0.0) -> PaddedOutput | None:
        self._expire(now)
        if not self._rows and self.waiting:
            self._start_batch()
        if all(self._is_done_once_read(sequence) for sequence in self.running):
            return None
        plan = PaddedOutput([], 0)
        if self._column < self._num_columns:
            self._compute_prompts(plan)
        else:
            for row in self._rows:
                self._compute_row(plan, row, 1)
        return plan

    def update(
        self,
        plan: SchedulerOutput,
        token_ids: list[int],
        logprobs: Mapping[int, TokenLogprobs] | None = None,
        prompt_logprobs: Mapping[Key, list[TokenLogprobs]] | None = None,
        embeddings: Mapping[Key, Pooled] | None = None,
        ended: Collection[int] = (),
    ) -> list[TokenOutput]:
        """What padding samples is dropped here."""
        outputs = super().update(plan, token_ids, logprobs, prompt_logprobs, embeddings, ended)
        return [output for output in outputs if padded_request_id(output.request_id) is None]

    def fail(self, sequence: Sequence, error: RaggedServeError) -> None:
        """Padding that fails is left away from then on."""
        if padded_request_id(sequence.request.request_id) is None:
            return super().fail(sequence, error)
        for row in self._rows:
            if row.left is sequence:
                row.left = None
        self._rows = [row for row in self._rows if row.sequence is not sequence]
        self._release(sequence)

    # ---- the rectangle -------------------------------------------------------------------------------------------

    def _start_batch(self) -> None:
        batch: list[Sequence] = []
        for sequence in self.choose(self.waiting):
            if len(batch) == self.max_num_rows or not self._fits([*batch, sequence]):
                break
            batch.append(sequence)
        assert batch, "one request alone always fits (check)"
        taken = set(batch)
        self.waiting = [sequence for sequence in self.waiting if sequence not in taken]
        self._num_columns = max(len(sequence.token_ids) for sequence in batch)
        self._column = 0
        num_steps = max(map(_num_steps, batch))
        for sequence in batch:
            num_left = self._num_columns - len(sequence.token_ids)
            left = None
            if num_left:
                left = self._scratch(sequence, [0] * (num_left + 1))  # the last one never runs, so it never samples
                self._place(left, num_left)
            self._place(sequence, len(sequence.token_ids) + num_steps - 1)
            self.running.append(sequence)
            self._rows.append(_Row(sequence, num_left, left))

    def _fits(self, batch: list[Sequence]) -> bool:
        """Every row goes on until the longest has ended: is there room, in the pool and in the context?

        [ padding left | known tokens | outputs until the last row ends )     the last one sampled is never computed
        """
        num_columns = max(len(sequence.token_ids) for sequence in batch)
        num_steps = max(map(_num_steps, batch))
        num_blocks = 0
        for sequence in batch:
            num_known = len(sequence.token_ids)
            num_blocks += -(-(num_columns - num_known) // self.block_size)
            num_blocks += -(-(num_known + num_steps - 1) // self.block_size)
        return num_blocks <= self.pool.num_free_blocks and num_columns + num_steps - 1 <= self.max_model_len

    def _compute_prompts(self, plan: PaddedOutput) -> None:
        width = min(self.max_row_tokens, self.config.max_num_batched_tokens // len(self._rows))
        start, end = self._column, min(self._column + width, self._num_columns)
        for row in self._rows:
            num_left = max(0, min(end, row.num_left) - start)
            if num_left and row.left is not None:
                plan.num_padded_tokens += self._grant(plan, row.left, num_left)
            if num_left < end - start:
                self._compute_row(plan, row, end - start - num_left)
        self._column = end

    def _compute_row(self, plan: PaddedOutput, row: _Row, num_tokens: int) -> None:
        sequence = row.sequence
        if self._is_done_once_read(sequence) or padded_request_id(sequence.request.request_id) is not None:
            plan.num_padded_tokens += num_tokens
        self._grant(plan, sequence, num_tokens)

    # ---- places --------------------------------------------------------------------------------------------------

    def _place(self, sequence: Sequence, num_tokens: int) -> None:
        sequence.status = SequenceStatus.RUNNING
        sequence.slot = self._free_slots.pop()
        sequence.block_ids = self.pool.allocate(-(-num_tokens // self.block_size))

    def _release(self, sequence: Sequence) -> None:
        self._free_slots.append(sequence.slot)
        self.pool.free(sequence.block_ids)
        sequence.slot, sequence.block_ids = -1, []
        sequence.status, sequence.finish_reason = SequenceStatus.FINISHED, FinishReason.ABORT

    def _stop_running(self, sequence: Sequence) -> None:
        """A row ends: its place goes to a scratch, which goes on; the last row's end is the end of the batch."""
        self.running.remove(sequence)
        row = next(row for row in self._rows if row.sequence is sequence)
        row.sequence = heir = self._scratch(sequence, sequence.token_ids)
        heir.status = SequenceStatus.RUNNING
        heir.slot, heir.block_ids = sequence.slot, sequence.block_ids
        # A token that is still on its way is not the heir's: it samples its own.
        heir.num_computed_tokens = min(sequence.num_computed_tokens, len(sequence.token_ids) - 1)
        heir.num_highwater_tokens = sequence.num_computed_tokens
        sequence.slot, sequence.block_ids = -1, []
        if not self.running:
            for scratch in self._scratches():
                self._release(scratch)
            self._rows = []

    def _scratch(self, sequence: Sequence, token_ids: list[int]) -> Sequence:
        request_id, choice_index = sequence.key
        self._num_arrivals += 1
        request = GenerateRequest(
            _PADDING + request_id, tuple(token_ids), SamplingParams().resolved(), choice_index=choice_index
        )
        return Sequence(
            request,
            arrival=self._num_arrivals,
            max_output_tokens=_UNLIMITED,
            stop_ids=frozenset(),
            deadline=None,
        )

    def _scratches(self) -> list[Sequence]:
        rows = [row.sequence for row in self._rows if row.sequence not in self.running]
        return rows + [row.left for row in self._rows if row.left is not None]

    def check_invariants(self) -> None:
        held = [*self.sequences.values(), *self._scratches()]
        self.pool.check_invariants([sequence.block_ids for sequence in held])
        slots = [sequence.slot for sequence in held if sequence.status is SequenceStatus.RUNNING]
        assert sorted(slots + self._free_slots) == list(range(self.config.max_num_seqs))
        assert len(self.running) + len(self.waiting) == len(self.sequences)
        assert bool(self.running) == bool(self._rows)
        for sequence in held:
            assert sequence.num_computed_tokens <= min(sequence.num_tokens, len(sequence.block_ids) * self.block_size)


class StaticScheduler(PaddedScheduler):
    """Static batching: whoever waits, in order of arrival, as many as there are rows."""

    def choose(self, waiting: list[Sequence]) -> list[Sequence]:
        return waiting


class DynamicScheduler(PaddedScheduler):
    """Dynamic batching with padding: when a batch has ended, the oldest and who came meanwhile and is of its length.

    The longest prompt of a batch is at most twice the shortest, so no prompt is padded by more than its own length.
    """

    def choose(self, waiting: list[Sequence]) -> list[Sequence]:
        chosen: list[Sequence] = []
        shortest = longest = len(waiting[0].token_ids)
        for sequence in waiting:
            num_known = len(sequence.token_ids)
            if max(longest, num_known) <= 2 * min(shortest, num_known):
                shortest, longest = min(shortest, num_known), max(longest, num_known)
                chosen.append(sequence)
        return chosen


class PaddingCounter:
    """A Runner that adds the plan's padding to what the runner itself pads, so that step records show it."""

    def __init__(self, runner: Runner) -> None:
        self.runner = runner
        self.num_kv_blocks = runner.num_kv_blocks
        self.max_model_len = runner.max_model_len
        self.vocab_size = runner.vocab_size
        self.eos_token_ids = runner.eos_token_ids
        self.max_steps_in_flight = runner.max_steps_in_flight
        self.has_position_classes = runner.has_position_classes

    def compile_grammar(self, text: str) -> object:
        return self.runner.compile_grammar(text)

    def launch(self, plan: SchedulerOutput) -> Step:
        padded = plan.num_padded_tokens if isinstance(plan, PaddedOutput) else 0
        return _CountedStep(self.runner.launch(plan), padded)


class _CountedStep:
    def __init__(self, step: Step, num_padded_tokens: int) -> None:
        self._step = step
        self._num_padded_tokens = num_padded_tokens

    def sample(self) -> None:
        self._step.sample()

    def token_ids(self) -> list[int]:
        return self._step.token_ids()

    @property
    def ended(self) -> Collection[int]:
        return self._step.ended

    @property
    def logprobs(self) -> Mapping[int, TokenLogprobs]:
        return self._step.logprobs

    @property
    def prompt_logprobs(self) -> Mapping[Key, list[TokenLogprobs]]:
        return self._step.prompt_logprobs

    @property
    def embeddings(self) -> Mapping[Key, Pooled]:
        return self._step.embeddings

    @property
    def num_padded_tokens(self) -> int:
        return self._step.num_padded_tokens + self._num_padded_tokens

    @property
    def seconds(self) -> Mapping[str, float]:
        return self._step.seconds


def policy_engine(
    policy: str,
    config: EngineConfig,
    runner: Runner,
    clock: Callable[[], float] = time.monotonic,
    *,
    max_num_rows: int | None = None,
    max_row_tokens: int | None = None,
) -> Engine:
    """An engine with one of POLICIES and the same number of requests at a time, whichever it is.

    ``config`` is the one that the runner was made with. ``max_num_rows``: requests at a time, at most (and by default)
    half of its max_num_seqs, because a padded row may be two sequences. ``max_row_tokens`` is for the padded policies.
    """
    if policy not in POLICIES:
        raise ConfigurationError(f"policy is {policy!r}; it must be one of {', '.join(POLICIES)}")
    if policy == "continuous":
        rows = max(1, config.max_num_seqs // 2) if max_num_rows is None else max_num_rows
        return Engine(dataclasses.replace(config, max_num_seqs=rows), runner, clock)
    scheduler = {"static": StaticScheduler, "dynamic": DynamicScheduler}[policy](
        config,
        num_blocks=runner.num_kv_blocks,
        max_model_len=runner.max_model_len,
        vocab_size=runner.vocab_size,
        eos_token_ids=runner.eos_token_ids,
        max_num_rows=max_num_rows,
        max_row_tokens=max_row_tokens,
    )
    return Engine(config, PaddingCounter(runner), clock, scheduler)


def _num_steps(sequence: Sequence) -> int:
    """Tokens it may still sample."""
    return sequence.max_output_tokens - sequence.num_output_tokens
