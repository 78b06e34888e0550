"""Scheduler: which tokens run in the next step. The only file that changes a Sequence; knows no tensors, no clock.

    add / abort -> schedule(now) -> [the runner runs the plan] -> update(plan, token_ids)

One step takes one token for every sequence that is one token behind (a decode), then fills the token budget with the
missing tokens of the others, oldest first, then admits waiting requests. ``num_computed_tokens`` advances when a plan
is made, not when its result arrives, so that the next plan may be made while the step still runs.

Admission allocates blocks for every known token of a sequence, so a prompt never stalls half-way for want of blocks;
only growing outputs can run out, and then the scheduler preempts by recomputation.
"""

from __future__ import annotations

import heapq
import math
from bisect import insort
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from operator import attrgetter

from serve_app.engine.block_pool import BlockPool, hash_block, root_hash
from serve_app.engine.config import EngineConfig
from serve_app.engine.pooling import Pooled, vector_of
from serve_app.engine.request import MAX_N, FinishReason, GenerateRequest, TokenLogprobs, TokenOutput
from serve_app.engine.sequence import Sequence, SequenceStatus
from serve_app.engine.step_record import SequenceStep
from serve_app.engine.totals import EngineTotals
from serve_app.errors import (
    ContextLengthError,
    DeadlineExceededError,
    InvalidParameterError,
    InvalidPromptError,
    RaggedServeError,
    RequestTooLargeError,
)

MAX_SKIPS = 32
"""Requests that may be admitted past one that does not fit, in its whole life; then admission waits for it."""

Key = tuple[str, int]
_order = attrgetter("order")


class ScheduledSequence:
    """``num_tokens`` tokens of ``sequence`` from position ``start``. ``samples``: the last known one is among them."""

    __slots__ = ("num_recomputed_tokens", "num_tokens", "samples", "sequence", "start")

    def __init__(
        self, sequence: Sequence, start: int, num_tokens: int, samples: bool, num_recomputed_tokens: int = 0
    ) -> None:
        self.sequence = sequence
        self.start = start
        self.num_tokens = num_tokens
        self.samples = samples
        self.num_recomputed_tokens = num_recomputed_tokens

    def __repr__(self) -> str:
        return f"{self.sequence.key}[{self.start}:{self.start + self.num_tokens}]{'*' if self.samples else ''}"


@dataclass(slots=True)
class SchedulerOutput:
    """The plan of one step. No tensors."""

    scheduled: list[ScheduledSequence]
    num_tokens: int
    block_copies: list[tuple[int, int]] = field(default_factory=list)
    """(source, destination) block ids to copy before the step runs."""
    preempted: list[Key] = field(default_factory=list)
    num_recomputed_tokens: int = 0

    def alone(self) -> list[SchedulerOutput]:
        """One plan for each sequence that still runs; together they do what is left of this plan.

        One that was preempted since has no blocks any more: it computes everything again anyway, this step included.
        """
        plans = []
        for item in self.scheduled:
            if item.sequence.status is SequenceStatus.RUNNING:
                copies = [copy for copy in self.block_copies if copy[1] in item.sequence.block_ids]
                plans.append(SchedulerOutput([item], item.num_tokens, copies))
        return plans

    def halves(self) -> list[SchedulerOutput]:
        """A plan of one sequence in two: [start, middle) and [middle, end), for the same bits in less memory."""
        (item,) = self.scheduled
        num_first = item.num_tokens // 2
        first = ScheduledSequence(item.sequence, item.start, num_first, samples=False)
        rest = ScheduledSequence(item.sequence, item.start + num_first, item.num_tokens - num_first, item.samples)
        return [
            SchedulerOutput([first], first.num_tokens, self.block_copies),
            SchedulerOutput([rest], rest.num_tokens),
        ]

    def sequence_steps(self) -> tuple[SequenceStep, ...]:
        """What each sequence does, for the step record."""
        return tuple(
            SequenceStep(*item.sequence.key, item.start, item.num_tokens, item.num_recomputed_tokens, item.samples)
            for item in self.scheduled
        )


class Scheduler:
    """``vocab_size``, ``max_model_len`` and ``eos_token_ids`` are the model's; ``num_blocks`` is the pool's size.

    ``has_position_classes``: the runner's (see `engine.Runner`).
    """

    def __init__(
        self,
        config: EngineConfig,
        *,
        num_blocks: int,
        max_model_len: int,
        vocab_size: int,
        eos_token_ids: frozenset[int] = frozenset(),
        has_position_classes: bool = False,
    ) -> None:
        self.config = config
        self.has_position_classes = has_position_classes
        self.block_size = config.block_size
        self.max_model_len = max_model_len
        self.vocab_size = vocab_size
        self.eos_token_ids = eos_token_ids
        self.pool = BlockPool(num_blocks, enable_prefix_caching=config.enable_prefix_caching)
        self.sequences: dict[Key, Sequence] = {}
        """Every sequence that has not ended."""
        self.waiting: list[Sequence] = []
        self.running: list[Sequence] = []
        self.num_preemptions = 0
        self.num_recomputed_tokens = 0
        self.num_prefix_queries = 0
        self.num_prefix_hits = 0
        """Prompt tokens looked up in, and found in, the prefix cache."""
        self.totals = EngineTotals()
        self._now = 0.0
        """Of the last `schedule`."""
        self._free_slots = list(range(config.max_num_seqs - 1, -1, -1))
        self._deadlines: list[tuple[float, tuple[int, int, int], Sequence]] = []
        self._num_arrivals = 0
        self._copies: dict[Key, tuple[int, int]] = {}
        """(source, destination) of the partial block that a choice copies. The source has a reference of its own until
        the step that copied it was read: its owner may end before, and a failed step copies again."""
        self._ended: list[TokenOutput] = []

    # ---- requests in and out -------------------------------------------------------------------------------------

    def check(self, requests: list[GenerateRequest]) -> None:
        """Raises the error with which `add` would refuse these choices of one request; changes nothing."""
        first = requests[0]
        prompt = first.prompt_token_ids
        if not prompt:
            raise InvalidPromptError("the prompt has 0 tokens; at least 1 is needed")
        longest = self.max_model_len - (first.pooling is None)
        if len(prompt) > longest:
            raise ContextLengthError(
                f"the prompt has {len(prompt)} tokens; with max_model_len {self.max_model_len}"
                f" it may have at most {longest}"
            )
        if len(requests) > self.config.max_num_seqs:
            raise InvalidParameterError("n", len(requests), f"at most max_num_seqs ({self.config.max_num_seqs})")
        self._check_token_ids("prompt", prompt)
        if any(request.pooling is not None for request in requests):
            self._check_pooled(requests)
        choices = [request.choice_index for request in requests]
        for request in requests:
            if not 0 <= request.choice_index < MAX_N:
                raise InvalidParameterError("choice_index", request.choice_index, f"from 0 to {MAX_N - 1}")
            if choices.count(request.choice_index) > 1:
                raise InvalidParameterError("choice_index", request.choice_index, "different for each choice")
            for name in ("request_id", "prompt_token_ids", "priority", "cache_salt"):
                if getattr(request, name) != getattr(first, name):
                    raise InvalidPromptError(f"the choices of request {first.request_id!r} differ in {name}")
            if (request.request_id, request.choice_index) in self.sequences:
                raise InvalidParameterError("request_id", request.request_id, "unique among the requests under way")
            if request.remaining_ms is not None and math.isnan(request.remaining_ms):
                raise InvalidParameterError("remaining_ms", request.remaining_ms, "a number of milliseconds, or None")
            self._check_token_ids("output", request.output_token_ids)
            sampling = request.sampling
            if sampling.prompt_logprobs != first.sampling.prompt_logprobs:  # computed once, for all
                raise InvalidPromptError(f"the choices of request {first.request_id!r} differ in prompt_logprobs")
            for name in ("stop_token_ids", "allowed_token_ids", "logit_bias"):
                for token_id in getattr(sampling, name) or ():
                    if token_id >= self.vocab_size:
                        raise InvalidParameterError(name, token_id, f"token ids below {self.vocab_size}")
            if request.output_token_ids and len(request.output_token_ids) >= self._max_output_tokens(request):
                raise InvalidParameterError(
                    "output_token_ids",
                    len(request.output_token_ids),
                    f"fewer than the {self._max_output_tokens(request)} tokens the request may have",
                )
        needed = self.num_blocks_needed(requests)
        if needed > self.pool.num_blocks:
            tokens = sum(self._max_output_tokens(request) for request in requests)
            raise RequestTooLargeError(
                f"{len(prompt)} prompt tokens and up to {tokens} output tokens need {needed} KV blocks of"
                f" {self.block_size} tokens; the pool has {self.pool.num_blocks}"
            )

    def _check_pooled(self, requests: list[GenerateRequest]) -> None:
        """A vector has no choices, and nothing stands before it or beside it."""
        first = requests[0]
        if len(requests) > 1:
            raise InvalidParameterError("n", len(requests), "1 where pooling is given")
        if first.output_token_ids:
            raise InvalidParameterError("output_token_ids", len(first.output_token_ids), "empty where pooling is given")
        if first.sampling.prompt_logprobs is not None:
            raise InvalidParameterError(
                "prompt_logprobs", first.sampling.prompt_logprobs, "left out where pooling is given"
            )

    def _check_token_ids(self, name: str, token_ids: tuple[int, ...]) -> None:
        if token_ids and not 0 <= min(token_ids) <= max(token_ids) < self.vocab_size:
            bad = next(token_id for token_id in token_ids if not 0 <= token_id < self.vocab_size)
            raise InvalidPromptError(f"{name} token id {bad} is outside the vocabulary 0..{self.vocab_size - 1}")

    def num_blocks_needed(self, requests: list[GenerateRequest]) -> int:
        """Blocks these choices of one request book: full blocks of the prompt once, the rest for each choice."""
        num_prompt = len(requests[0].prompt_token_ids)
        shared = num_prompt // self.block_size if len(requests) > 1 else 0
        total = shared
        for request in requests:
            # The last sampled token is never computed, so it needs no slot.
            num_tokens = num_prompt + self._max_output_tokens(request) - 1
            total += _num_blocks(num_tokens, self.block_size) - shared
        return total

    def add(self, requests: list[GenerateRequest], now: float = 0.0) -> list[Sequence]:
        """Takes the choices of one request. Raises without a trace if one of them cannot be served."""
        self.check(requests)
        added: list[Sequence] = []
        self._num_arrivals += 1
        for request in sorted(requests, key=attrgetter("choice_index")):
            stop_ids = frozenset(request.sampling.stop_token_ids)
            if not request.sampling.ignore_eos:
                stop_ids |= self.eos_token_ids
            sequence = Sequence(
                request,
                arrival=self._num_arrivals,
                max_output_tokens=self._max_output_tokens(request),
                stop_ids=stop_ids,
                deadline=None if request.remaining_ms is None else now + request.remaining_ms / 1000.0,
            )
            if request.sampling.prompt_logprobs is not None:
                sequence.prompt_logprobs, sequence.num_prompt_logprobs = [None], 1
            if added:
                sequence.leader = added[0]
                added[0].followers.append(sequence)
            else:
                sequence.queued_at = now
            if sequence.deadline is not None:
                heapq.heappush(self._deadlines, (sequence.deadline, sequence.order, sequence))
            self.sequences[sequence.key] = sequence
            insort(self.waiting, sequence, key=_order)
            added.append(sequence)
        return added

    def abort(self, request_id: str, choice_index: int | None = None) -> int:
        """Ends a request, or one choice of it; its blocks are free before the next step. Returns how many ended."""
        choices = range(MAX_N) if choice_index is None else (choice_index,)
        sequences = [self.sequences[request_id, i] for i in choices if (request_id, i) in self.sequences]
        for sequence in sequences:
            self._end(sequence, FinishReason.ABORT)
        return len(sequences)

    def fail(self, sequence: Sequence, error: RaggedServeError) -> None:
        """Ends one sequence with an error."""
        if not sequence.is_finished:
            self._end(sequence, FinishReason.ERROR, error)

    def take_ended(self) -> list[TokenOutput]:
        """Outputs of sequences that ended outside `update` (abort, deadline, error) since the last call."""
        ended, self._ended = self._ended, []
        return ended

    @property
    def has_work(self) -> bool:
        return bool(self.sequences) or bool(self._ended)

    # ---- one step ------------------------------------------------------------------------------------------------

    def schedule(self, now: float = 0.0) -> SchedulerOutput | None:
        """The plan of the next step, or None if nothing can run. ``now``: monotonic seconds, for deadlines."""
        self._now = now
        self._expire(now)
        plan = SchedulerOutput([], 0)
        self._make_room(plan)
        budget = self.config.max_num_batched_tokens
        size = self.block_size
        behind: list[Sequence] = []

        for sequence in self.running:
            if sequence.leader is not None:
                continue  # its prompt is being computed by another choice
            num_pending, num_computed = sequence.num_pending, sequence.num_computed_tokens
            if len(sequence.token_ids) + num_pending - num_computed > 1:
                behind.append(sequence)
            elif not (num_pending and self._is_done_once_read(sequence)):
                if num_computed % size == 0 and num_computed == len(sequence.block_ids) * size:
                    sequence.block_ids += self.pool.allocate(1)
                budget -= self._grant(plan, sequence, 1)

        for sequence in behind:
            if budget == 0:
                break
            budget -= self._grant(plan, sequence, min(sequence.num_missing_tokens, budget))

        if not plan.preempted:
            self._admit(plan, budget)
        return plan if plan.scheduled else None

    def update(
        self,
        plan: SchedulerOutput,
        token_ids: list[int],
        logprobs: Mapping[int, TokenLogprobs] | None = None,
        prompt_logprobs: Mapping[Key, list[TokenLogprobs]] | None = None,
        embeddings: Mapping[Key, Pooled] | None = None,
        ended: Collection[int] = (),
    ) -> list[TokenOutput]:
        """The one place where a sequence advances, finishes and frees its blocks.

        ``token_ids`` has one entry for each scheduled sequence that samples, in the order of the plan; ``logprobs``
        maps an index in it, ``prompt_logprobs`` a sequence's key (with one entry per computed prompt position), and so
        does ``embeddings`` (with what its chunk gave).
        ``ended``: indices of those whose grammar cannot go on.
        """
        outputs: list[TokenOutput] = []
        i_sampled = -1
        num_tokens = 0
        size, caching = self.block_size, self.config.enable_prefix_caching
        for item in plan.scheduled:
            sequence = item.sequence
            if item.samples:
                i_sampled += 1
            if sequence.finish_reason is not None:
                continue  # aborted, or ended by the step before: the extra token is dropped
            if prompt_logprobs and sequence.key in prompt_logprobs:
                self._take_prompt_logprobs(sequence, item.start, prompt_logprobs[sequence.key])
            if embeddings and sequence.key in embeddings:
                self._take_pooled(sequence, item, embeddings[sequence.key])
            if self._copies:
                self._release_copy(sequence)
            num_computed = item.start + item.num_tokens
            if caching and num_computed % size < item.num_tokens:
                self._register_full_blocks(sequence, num_computed)
            if sequence.followers and sequence.block_ids and num_computed >= sequence.num_prompt_tokens:
                self._fork_followers(sequence)
            if item.samples:
                sequence.num_pending -= 1
                num_tokens += 1
                outputs.append(
                    self._append_token(
                        sequence,
                        token_ids[i_sampled],
                        logprobs.get(i_sampled) if logprobs else None,
                        i_sampled in ended,
                    )
                )
            elif num_computed == len(sequence.token_ids) and sequence.request.pooling is not None:
                sequence.num_pending -= 1
                outputs.append(self._end_with_vector(sequence))
        self.totals.num_generation_tokens += num_tokens
        return outputs

    # ---- parts of schedule ---------------------------------------------------------------------------------------

    def _make_room(self, plan: SchedulerOutput) -> None:
        """Preempts until every decode that crosses into a new block finds one free."""
        size = self.block_size
        needy = [
            s
            for s in self.running
            if s.num_computed_tokens % size == 0
            and s.num_computed_tokens == len(s.block_ids) * size
            and s.leader is None
            and not self._is_done_once_read(s)
        ]
        while len(needy) > self.pool.num_free_blocks:
            victim = self._victim(needy)
            self._preempt(victim)
            plan.preempted.append(victim.key)
            needy = [s for s in needy if s.status is SequenceStatus.RUNNING]

    def _victim(self, needy: list[Sequence]) -> Sequence:
        """Lowest in priority, then the one whose lost work is smallest, then the youngest.

        Nobody is chosen in vain: a victim frees a block of its own, or wanted one. So nobody is stuck for ever either:
        of the highest priority the one with the most work done is spared while another such one runs; where there is
        none but others run, those have all their blocks in common with somebody, so one token is missing, and they
        sample in this step; and one alone always fits (`check`).
        """

        def lost_work(sequence: Sequence) -> int:
            return 0 if self._is_done_once_read(sequence) else sequence.num_computed_tokens

        candidates = [s for s in self.running if s in needy or self.pool.num_freed_by(s.block_ids)]
        return max(candidates, key=lambda s: (s.request.priority, -lost_work(s), s.order))

    def _preempt(self, sequence: Sequence) -> None:
        self.num_preemptions += 1
        sequence.num_preemptions += 1
        for member in (sequence, *sequence.followers):
            self._stop_running(member)
            insort(self.waiting, member, key=_order)

    def _grant(self, plan: SchedulerOutput, sequence: Sequence, num_tokens: int) -> int:
        start, highwater = sequence.num_computed_tokens, sequence.num_highwater_tokens
        end = start + num_tokens
        samples = end == len(sequence.token_ids) + sequence.num_pending
        recomputed = 0
        if start < highwater:
            recomputed = min(end, highwater) - start
            plan.num_recomputed_tokens += recomputed
            self.num_recomputed_tokens += recomputed
        elif highwater == 0 and sequence.key in self._copies:  # its first step
            plan.block_copies.append(self._copies[sequence.key])
        if end > highwater:
            sequence.num_highwater_tokens = end
        sequence.num_computed_tokens = end
        if samples:
            sequence.num_pending += 1
            if sequence.request.pooling is not None:
                samples = False  # what comes is its vector
        plan.scheduled.append(ScheduledSequence(sequence, start, num_tokens, samples, recomputed))
        plan.num_tokens += num_tokens
        return num_tokens

    def _is_done_once_read(self, sequence: Sequence) -> bool:
        """Its last token is already on the way: another step would compute what nobody may see."""
        return (
            sequence.num_pending > 0 and sequence.num_output_tokens + sequence.num_pending >= sequence.max_output_tokens
        )

    def _stop_running(self, sequence: Sequence) -> None:
        """Takes its place and its blocks; what it computed is lost but for the prefix cache.

        A token that a launched step samples is not lost: it arrives while the sequence waits.
        """
        self.running.remove(sequence)
        self._free_slots.append(sequence.slot)
        sequence.slot = -1
        sequence.status = SequenceStatus.WAITING
        self._release_blocks(sequence)
        sequence.num_computed_tokens = 0
        sequence.num_shared_tokens = 0

    def _release_blocks(self, sequence: Sequence) -> None:
        self._release_copy(sequence)
        self.pool.free(sequence.block_ids)
        sequence.block_ids = []
        sequence.num_registered_blocks = 0

    def _release_copy(self, sequence: Sequence) -> None:
        copy = self._copies.pop(sequence.key, None)
        if copy is not None:
            self.pool.free(copy[:1])

    def _admit(self, plan: SchedulerOutput, budget: int) -> None:
        """Admits waiting requests, oldest first. One that does not fit is passed over at most MAX_SKIPS times.

        No more than MAX_SKIPS of them are looked past in one step, so that a long queue costs no more than a short one.
        """
        passed: list[Sequence] = []
        skips_left = MAX_SKIPS
        promised = sum(self._num_fork_blocks(s) for s in self.running if s.leader is not None) if self.waiting else 0
        i = 0
        while i < len(self.waiting) and budget > 0 and self._free_slots and skips_left > 0 and len(passed) < MAX_SKIPS:
            sequence = self.waiting[i]
            assert sequence.leader is None, "a choice waits ahead of the one that computes its prompt"
            group = [sequence, *sequence.followers]
            if self._try_admit(sequence, group, promised):
                promised += sum(self._num_fork_blocks(follower) for follower in sequence.followers)
                del self.waiting[i : i + len(group)]
                if sequence.queued_at is not None:
                    self.totals.add_first_step(sequence.num_prompt_tokens, self._now - sequence.queued_at)
                    sequence.queued_at = None
                budget -= self._grant(plan, sequence, min(sequence.num_missing_tokens, budget))
                for other in passed:
                    other.num_skipped += 1
                skips_left -= bool(passed)
            else:
                passed.append(sequence)
                skips_left = min(skips_left, MAX_SKIPS - sequence.num_skipped)
                i += len(group)

    def _try_admit(self, sequence: Sequence, group: list[Sequence], promised: int) -> bool:
        """Starts the group if there are places, room for its leader's known tokens, and for what the others will take.

        ``promised``: blocks that choices admitted before will take when their prompt is computed.
        """
        if len(group) > len(self._free_slots):
            return False
        found = self._find_prefix(sequence)
        fresh = _num_blocks(len(sequence.token_ids), self.block_size) - len(found)
        needed = fresh + self.pool.num_free_among(found) + promised
        needed += sum(self._num_fork_blocks(follower) for follower in sequence.followers)
        # With others running, keep a block for each that may soon want one: admitting is cheap, preempting is not.
        reserve = min(len(self.running), self.pool.num_blocks // 16)
        if needed + reserve > self.pool.num_free_blocks:
            return False
        self._take_prefix(sequence, found)
        sequence.block_ids += self.pool.allocate(fresh)
        sequence.num_pending = 0  # if the step that should have brought a token failed after a preemption
        for member in group:
            member.status = SequenceStatus.RUNNING
            member.slot = self._free_slots.pop()
            insort(self.running, member, key=_order)
        return True

    def _find_prefix(self, sequence: Sequence) -> list[int]:
        if not self.config.enable_prefix_caching or sequence.request.needs_every_position:
            return []
        self._extend_hashes(sequence, len(sequence.token_ids) // self.block_size)
        return self.pool.find(sequence.block_hashes)

    def _take_prefix(self, sequence: Sequence, found: list[int]) -> None:
        """Starts behind the cached prefix. The last known token is always computed: somebody must make its logits."""
        num_found = len(found) * self.block_size
        looked = self.config.enable_prefix_caching and not sequence.request.needs_every_position
        if looked and sequence.num_preemptions == 0:
            sequence.num_cached_tokens = min(num_found, sequence.num_prompt_tokens)
            self.num_prefix_queries += sequence.num_prompt_tokens
            self.num_prefix_hits += sequence.num_cached_tokens
        self.pool.share(found)
        sequence.block_ids = found
        sequence.num_registered_blocks = len(found)
        sequence.num_shared_tokens = num_found
        sequence.num_computed_tokens = min(num_found, len(sequence.token_ids) - 1)

    def _expire(self, now: float) -> None:
        while self._deadlines and self._deadlines[0][0] <= now:
            _, _, sequence = heapq.heappop(self._deadlines)
            if not sequence.is_finished:
                late = f"request {sequence.key[0]!r} did not end within its {sequence.request.remaining_ms:g} ms"
                self._end(sequence, FinishReason.ERROR, DeadlineExceededError(late))
        if len(self._deadlines) > 2 * len(self.sequences) + 64:  # most of them ended long before their deadline
            self._deadlines = [entry for entry in self._deadlines if not entry[2].is_finished]
            heapq.heapify(self._deadlines)

    # ---- parts of update -----------------------------------------------------------------------------------------

    def _append_token(
        self, sequence: Sequence, token_id: int, logprobs: TokenLogprobs | None, has_ended: bool
    ) -> TokenOutput:
        sequence.token_ids.append(token_id)
        num_output = len(sequence.token_ids) - sequence.num_prompt_tokens
        reason: FinishReason | None = None
        is_stop = token_id in sequence.stop_ids
        if has_ended or (is_stop and num_output >= sequence.request.sampling.min_tokens):
            reason = FinishReason.STOP
        elif num_output >= sequence.max_output_tokens:
            reason = FinishReason.LENGTH
        prompt_logprobs = None
        if sequence.prompt_logprobs is not None and sequence.num_prompt_logprobs == sequence.num_prompt_tokens:
            prompt_logprobs, sequence.prompt_logprobs = tuple(sequence.prompt_logprobs), None
        if reason is not None:
            self._drop(sequence, reason)
        request_id, choice_index = sequence.key
        stop_token_id = token_id if is_stop and reason is FinishReason.STOP else None
        new_logprobs = None if logprobs is None else (logprobs,)
        # A step makes one for each sequence, and tuple's constructor takes half the time of the NamedTuple's own.
        return tuple.__new__(
            TokenOutput,
            (
                request_id,
                choice_index,
                (token_id,),
                new_logprobs,
                prompt_logprobs,
                reason,
                stop_token_id,
                sequence.num_cached_tokens,
                None,
                None,
                None,
            ),
        )

    def _take_pooled(self, sequence: Sequence, item: ScheduledSequence, part: Pooled) -> None:
        """A computation from the beginning replaces an earlier one, of which a part may still come behind a preemption."""
        assert sequence.request.pooling is not None
        if sequence.request.pooling.kind == "last":
            sequence.pooled, sequence.num_pooled_tokens = part, sequence.num_prompt_tokens
            return
        if item.start == 0:
            sequence.pooled, sequence.num_pooled_tokens = part, item.num_tokens
        elif item.start == sequence.num_pooled_tokens:
            assert sequence.pooled is not None
            sequence.pooled = sequence.pooled + part
            sequence.num_pooled_tokens += item.num_tokens

    def _end_with_vector(self, sequence: Sequence) -> TokenOutput:
        pooled, params, num_tokens = sequence.pooled, sequence.request.pooling, sequence.num_prompt_tokens
        assert pooled is not None and params is not None and sequence.num_pooled_tokens == num_tokens, sequence
        self._drop(sequence, FinishReason.STOP)
        return TokenOutput(
            *sequence.key,
            finish_reason=FinishReason.STOP,
            num_cached_tokens=sequence.num_cached_tokens,
            embedding=vector_of(pooled, params, num_tokens),
        )

    def _take_prompt_logprobs(self, sequence: Sequence, start: int, logprobs: list[TokenLogprobs]) -> None:
        """Position p's logits speak of token p + 1; what a recomputation brings again is left out.

        The other choices, which compute no prompt, get the list when it is complete.
        """
        if sequence.prompt_logprobs is None or sequence.num_prompt_logprobs == sequence.num_prompt_tokens:
            return
        num_known = sequence.num_prompt_logprobs - 1 - start
        assert num_known >= 0, f"{sequence}: prompt logprobs are missing before position {start}"
        fresh = logprobs[num_known:]
        sequence.prompt_logprobs += fresh
        sequence.num_prompt_logprobs += len(fresh)
        if sequence.num_prompt_logprobs == sequence.num_prompt_tokens:
            for follower in sequence.followers:
                follower.prompt_logprobs = sequence.prompt_logprobs
                follower.num_prompt_logprobs = sequence.num_prompt_logprobs

    def _extend_hashes(self, sequence: Sequence, num_blocks: int) -> None:
        hashes, size = sequence.block_hashes, self.block_size
        while len(hashes) < num_blocks:
            parent = hashes[-1] if hashes else root_hash(sequence.request.cache_salt)
            start = len(hashes) * size
            num_prompt = None
            if self.has_position_classes and start + size > sequence.num_prompt_tokens:
                num_prompt = max(0, sequence.num_prompt_tokens - start)
            hashes.append(hash_block(parent, sequence.token_ids[start : start + size], num_prompt))

    def _register_full_blocks(self, sequence: Sequence, num_computed: int) -> None:
        num_full = min(num_computed, len(sequence.token_ids)) // self.block_size
        if not sequence.block_ids or num_full > len(sequence.block_ids):
            return  # preempted since the plan was made
        self._extend_hashes(sequence, num_full)
        for i in range(sequence.num_registered_blocks, num_full):
            self.pool.register(sequence.block_ids[i], sequence.block_hashes[i])
        sequence.num_registered_blocks = max(sequence.num_registered_blocks, num_full)

    def _fork_followers(self, leader: Sequence) -> None:
        """The prompt is computed: the other choices take its full blocks and copy the partial one.

        prompt of 10, block size 4   [ 0 1 2 3 ][ 4 5 6 7 ][ 8 9 . . ]
        a follower                     shared     shared     its own copy
        """
        followers, leader.followers = leader.followers, []
        num_prompt = leader.num_prompt_tokens
        num_full = num_prompt // self.block_size
        for follower in followers:
            follower.leader = None
            fresh = self._num_fork_blocks(follower)
            if fresh > self.pool.num_free_blocks:
                # The room that was there at admission went to growing outputs: wait like anyone else, compute alone.
                self._stop_running(follower)
                insort(self.waiting, follower, key=_order)
                continue
            shared = leader.block_ids[:num_full]
            self.pool.share(shared)
            follower.block_ids = shared + self.pool.allocate(fresh)
            follower.block_hashes = leader.block_hashes[:num_full]
            follower.num_registered_blocks = num_full
            follower.num_shared_tokens = num_full * self.block_size
            follower.num_computed_tokens = min(num_prompt, len(follower.token_ids) - 1)
            follower.num_cached_tokens = leader.num_cached_tokens
            if num_prompt % self.block_size:
                source = leader.block_ids[num_full]
                self.pool.share([source])
                self._copies[follower.key] = (source, follower.block_ids[num_full])

    def _num_fork_blocks(self, follower: Sequence) -> int:
        """Blocks of its own that a choice takes at the fork: a copy of the partial one, and room for a replayed output."""
        return _num_blocks(len(follower.token_ids), self.block_size) - follower.num_prompt_tokens // self.block_size

    def _end(self, sequence: Sequence, reason: FinishReason, error: RaggedServeError | None = None) -> None:
        self._drop(sequence, reason)
        request_id, choice_index = sequence.key
        output = TokenOutput(request_id, choice_index, finish_reason=reason)
        if error is not None:
            output = output._replace(error=str(error), error_code=error.code)
        self._ended.append(output)

    def _drop(self, sequence: Sequence, reason: FinishReason) -> None:
        if sequence.status is SequenceStatus.RUNNING:
            self._stop_running(sequence)
        else:
            self.waiting.remove(sequence)
        sequence.status = SequenceStatus.FINISHED
        sequence.finish_reason = reason
        self.totals.num_ended[reason] += 1
        del self.sequences[sequence.key]
        if sequence.leader is not None:
            sequence.leader.followers.remove(sequence)
        elif sequence.followers:  # it ended before its prompt was computed: the next choice computes it
            heir, *rest = sequence.followers
            heir.leader, heir.followers = None, rest
            heir.queued_at = sequence.queued_at
            heir.num_highwater_tokens = min(sequence.num_highwater_tokens, sequence.num_prompt_tokens)
            for follower in rest:
                follower.leader = heir
            if heir.status is SequenceStatus.RUNNING:  # admitted without blocks of its own
                for member in (heir, *rest):
                    self._stop_running(member)
                    insort(self.waiting, member, key=_order)

    # ---- queries -------------------------------------------------------------------------------------------------

    def _max_output_tokens(self, request: GenerateRequest) -> int:
        if request.pooling is not None:
            return 1  # the vector, which like a last token takes no slot
        room = self.max_model_len - len(request.prompt_token_ids)
        wanted = request.sampling.max_tokens
        return room if wanted is None else min(wanted, room)

    def check_invariants(self) -> None:
        """Raises AssertionError if the books do not add up. For tests and soaks; costs a walk over everything."""
        held = [[source] for source, _ in self._copies.values()]
        self.pool.check_invariants([*(s.block_ids for s in self.sequences.values()), *held])
        assert len(self.running) + len(self.waiting) == len(self.sequences)
        for queue, status in ((self.running, SequenceStatus.RUNNING), (self.waiting, SequenceStatus.WAITING)):
            assert [s.order for s in queue] == sorted(s.order for s in queue)
            assert all(s.status is status and s.key in self.sequences for s in queue)
        slots = [s.slot for s in self.running]
        assert sorted(slots + self._free_slots) == list(range(self.config.max_num_seqs)), (
            "a slot is lost or taken twice"
        )
        num_owners = Counter(block_id for s in self.sequences.values() for block_id in s.block_ids)
        for s in self.sequences.values():
            assert not s.is_finished and s.num_pending >= 0, f"{s} has ended, or was read twice"
            num_final = max(s.num_computed_tokens, s.num_shared_tokens) // self.block_size
            assert all(num_owners[i] == 1 for i in s.block_ids[num_final:]), f"{s} shares a block that it still writes"
            assert 0 <= s.num_computed_tokens <= s.num_tokens, f"{s} has computed more than is known"
            assert s.num_computed_tokens <= len(s.block_ids) * self.block_size, f"{s} has computed more than its blocks"
            if s.leader is not None:
                assert s in s.leader.followers and not s.block_ids, f"{s} follows nobody, or computes by itself"
            assert all(f.leader is s and f.status is s.status for f in s.followers), f"{s} has lost a follower"
            if s.status is SequenceStatus.WAITING:
                assert not s.block_ids and s.slot == -1, f"{s} waits with a place or blocks"


def _num_blocks(num_tokens: int, block_size: int) -> int:
    return -(-num_tokens // block_size)
