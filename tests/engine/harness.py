"""What the engine's tests share: requests in one line, plans as text, a watched engine, an oracle, random traffic.

Watched          runs an Engine on a SimulatedRunner and checks every plan and every output it sees
expected_tokens  what a request must yield, from the definition of the simulated model alone: no engine, no blocks
Traffic          seeded random requests, aborts and deadlines
"""

from __future__ import annotations

import dataclasses
import itertools
import random
from collections import Counter
from collections.abc import Callable, Iterable

from serve_app.engine import scheduler as scheduler_module
from serve_app.engine.config import EngineConfig
from serve_app.engine.engine import Engine
from serve_app.engine.request import FinishReason, GenerateRequest, SamplingParams, TokenOutput
from serve_app.engine.scheduler import Key, ScheduledSequence, Scheduler, SchedulerOutput
from serve_app.engine.sequence import Sequence
from serve_app.engine.simulated_runner import _ROOT, SimulatedRunner, SimulatedStep, VirtualClock, _mix

VOCAB_SIZE = 97
EOS = 3


def make_request(
    request_id: str,
    prompt: int | Iterable[int],
    *,
    n: int = 1,
    outputs: list[tuple[int, ...]] | None = None,
    priority: int = 0,
    cache_salt: str = "",
    remaining_ms: float | None = None,
    **sampling: object,
) -> list[GenerateRequest]:
    """The n choices of one request. A prompt given as a length holds tokens that no other request has."""
    if isinstance(prompt, int):
        rng = random.Random(request_id)
        prompt = [rng.randrange(4, VOCAB_SIZE) for _ in range(prompt)]
    params = SamplingParams(n=n, **{"seed": 1, "ignore_eos": True, **sampling}).resolved()  # type: ignore[arg-type]
    return [
        GenerateRequest(
            request_id,
            tuple(prompt),
            params,
            output_token_ids=outputs[i] if outputs else (),
            choice_index=i,
            priority=priority,
            cache_salt=cache_salt,
            remaining_ms=remaining_ms,
        )
        for i in range(n)
    ]


def make_scheduler(
    *,
    num_blocks: int = 100,
    max_model_len: int = 100,
    block_size: int = 4,
    max_num_seqs: int = 4,
    max_num_batched_tokens: int = 8,
    enable_prefix_caching: bool = False,
    has_position_classes: bool = False,
) -> Scheduler:
    config = EngineConfig(
        block_size=block_size,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_batched_tokens,
        enable_prefix_caching=enable_prefix_caching,
    )
    return Scheduler(
        config,
        num_blocks=num_blocks,
        max_model_len=max_model_len,
        vocab_size=VOCAB_SIZE,
        eos_token_ids=frozenset({EOS}),
        has_position_classes=has_position_classes,
    )


def show(plan: SchedulerOutput | None) -> str:
    """``a[0:8] b#1[3:4]*``: positions 0..7 of a, and position 3 of choice 1 of b, which then samples."""
    if plan is None:
        return "nothing"
    return " ".join(_show(item) for item in plan.scheduled)


def _show(item: ScheduledSequence) -> str:
    request_id, choice = item.sequence.key
    name = request_id if choice == 0 else f"{request_id}#{choice}"
    return f"{name}[{item.start}:{item.start + item.num_tokens}]{'*' if item.samples else ''}"


def step(scheduler: Scheduler, token: int = 7) -> str:
    """One step whose every sample is ``token``; returns the plan as text."""
    plan = scheduler.schedule()
    if plan is not None:
        scheduler.update(plan, [token for item in plan.scheduled if item.samples])
    scheduler.check_invariants()
    return show(plan)


def expected_tokens(
    request: GenerateRequest, *, max_model_len: int, eos_token_ids: frozenset[int] = frozenset({EOS})
) -> tuple[tuple[int, ...], FinishReason]:
    """The output of a request (its replayed tokens left out) and why it ends, from the simulated model's definition."""
    sampling = request.sampling
    stop_ids = set(sampling.stop_token_ids) | (set() if sampling.ignore_eos else eos_token_ids)
    room = max_model_len - len(request.prompt_token_ids)
    limit = room if sampling.max_tokens is None else min(sampling.max_tokens, room)
    digest = _ROOT
    for token in (*request.prompt_token_ids, *request.output_token_ids):
        digest = _mix(digest, token)
    tokens: list[int] = []
    while True:
        token = _mix(digest, _mix(sampling.seed or 0, request.choice_index)) % VOCAB_SIZE
        while len(request.output_token_ids) + len(tokens) < sampling.min_tokens and token in stop_ids:
            token = (token + 1) % VOCAB_SIZE
        tokens.append(token)
        digest = _mix(digest, token)
        num_output = len(request.output_token_ids) + len(tokens)
        if token in stop_ids and num_output >= sampling.min_tokens:
            return tuple(tokens), FinishReason.STOP
        if num_output >= limit:
            return tuple(tokens), FinishReason.LENGTH


class FaultyRunner(SimulatedRunner):
    """Fails each step with one of ``culprits`` in it (request ids): at its launch, or when it is read."""

    at_launch: frozenset[str] = frozenset()
    at_read: frozenset[str] = frozenset()
    num_faults = 0

    def launch(self, plan: SchedulerOutput) -> SimulatedStep:
        ids = {item.sequence.key[0] for item in plan.scheduled}
        if ids & self.at_launch:
            self.num_faults += 1
            raise RuntimeError(f"planted at launch: {sorted(ids & self.at_launch)}")
        step = super().launch(plan)
        if ids & self.at_read:
            self.num_faults += 1

            def token_ids() -> list[int]:
                raise RuntimeError(f"planted at read: {sorted(ids & self.at_read)}")

            step.token_ids = token_ids  # type: ignore[method-assign]
        return step


class Watched:
    """An engine on a simulated model. Each step it takes is held against what must be true of every step.

    A check that fails names itself at the beginning of its message: ``budget:``, ``decode skipped:``, ``stuck:``,
    ``idle budget:``, ``shared block:``, ``tenant:``, ``skips:``, ``ended twice:``, ``tokens:``, ...
    """

    def __init__(
        self,
        *,
        num_blocks: int = 100,
        max_model_len: int = 100,
        block_size: int = 4,
        max_num_seqs: int = 4,
        max_num_batched_tokens: int = 8,
        enable_prefix_caching: bool = False,
        steps_in_flight: int = 1,
        seconds_per_step: float = 0.0,
        runner_class: type[SimulatedRunner] = SimulatedRunner,
    ) -> None:
        self.clock = VirtualClock()
        self.config = EngineConfig(
            block_size=block_size,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_batched_tokens,
            enable_prefix_caching=enable_prefix_caching,
        )
        self.runner = runner_class(
            num_kv_blocks=num_blocks,
            block_size=block_size,
            max_model_len=max_model_len,
            vocab_size=VOCAB_SIZE,
            eos_token_ids=frozenset({EOS}),
            seconds_per_step=seconds_per_step,
            sleep=self.clock.sleep,
            max_steps_in_flight=steps_in_flight,
            verify=True,
        )
        self.engine = Engine(self.config, self.runner, self.clock)
        self.scheduler = self.engine.scheduler
        self.plans: list[str] = []
        self.num_steps = 0
        self.requests: dict[Key, GenerateRequest] = {}
        self.deadlines: dict[Key, float] = {}
        self.tokens: dict[Key, list[int]] = {}
        self.outputs: dict[Key, list[TokenOutput]] = {}
        self.ends: dict[Key, TokenOutput] = {}
        self.num_run: Counter[str] = Counter()
        """Tokens the runner was given, by request id."""
        self.num_preempted = 0
        self.num_recomputed = 0
        self.num_passed_over = 0
        self._computed: dict[Sequence, int] = {}
        self._passed: Counter[Key] = Counter()
        self._salts: dict[int, str] = {}
        """Block -> salt of the sequence that wrote it last."""
        self._schedule = self.scheduler.schedule
        self.scheduler.schedule = self._checked_schedule  # type: ignore[method-assign]

    # ---- use -----------------------------------------------------------------------------------------------------

    def add(self, requests: list[GenerateRequest]) -> None:
        self.engine.add(requests)
        for request in requests:
            key = (request.request_id, request.choice_index)
            self.requests[key] = request
            if request.remaining_ms is not None:
                self.deadlines[key] = self.clock.now + request.remaining_ms / 1000
            self.tokens[key] = []
            self.outputs[key] = []

    def abort(self, request_id: str, choice_index: int | None = None) -> None:
        before = {key for key in self.scheduler.sequences if key[0] == request_id and choice_index in (None, key[1])}
        num = self.engine.abort(request_id, choice_index)
        assert num == len(before), f"abort: {num} choices ended instead of {len(before)}"
        assert not before & self.scheduler.sequences.keys(), "abort: a choice goes on"

    def step(self) -> list[TokenOutput]:
        outputs = self.engine.step()
        self.num_steps += 1
        self.scheduler.check_invariants()
        for output in outputs:
            key = (output.request_id, output.choice_index)
            assert key not in self.ends, f"ended twice: {key}"
            assert output.token_ids or output.finish_reason is not None, f"empty output: {output}"
            assert len(output.token_ids) <= 1
            self.tokens[key] += output.token_ids
            self.outputs[key].append(output)
            if output.finish_reason is not None:
                self.ends[key] = output
        late = [key for key, at in self.deadlines.items() if key not in self.ends and at < self._now_scheduled]
        assert not late, f"deadline: {late} go on after theirs"
        return outputs

    def run(self, max_steps: int = 2000) -> Watched:
        for _ in range(max_steps):
            if not self.engine.has_work:
                self.check_end()
                return self
            self.step()
        raise AssertionError(f"stuck: work is left after {max_steps} steps")

    def check_end(self) -> None:
        assert self.ends.keys() == self.requests.keys(), "lost: a request did not end"
        pool = self.scheduler.pool
        assert pool.num_free_blocks == pool.num_blocks, "leak: blocks are in use though nothing runs"
        assert self.scheduler.num_recomputed_tokens == self.num_recomputed, "recomputed: tokens counted wrong"
        assert self.scheduler.num_preemptions == self.num_preempted, "preempted: counted wrong"

    def check_tokens(self, allowed_errors: frozenset[str] = frozenset()) -> None:
        """All that was emitted is what the oracle says; complete, and with its reason, where the request ended itself.

        ``allowed_errors``: codes with which a request may have failed.
        """
        for key, request in self.requests.items():
            tokens, reason = expected_tokens(request, max_model_len=self.runner.max_model_len)
            end = self.ends[key]
            got = tuple(self.tokens[key])
            if end.finish_reason in (FinishReason.ABORT, FinishReason.ERROR):
                code = end.error_code
                assert code is None or code in allowed_errors, f"error: {end.error_code}: {end.error}"
                assert got == tokens[: len(got)], f"tokens: {key} yielded {got}, not {tokens}"
            else:
                assert got == tokens, f"tokens: {key} yielded {got}, not {tokens}"
                assert end.finish_reason is reason, f"finish reason: {key} {end.finish_reason}, not {reason}"
                assert end.stop_token_id == (tokens[-1] if reason is FinishReason.STOP else None)
            self._check_logprobs(key)

    # ---- checks --------------------------------------------------------------------------------------------------

    _now_scheduled = 0.0

    def _checked_schedule(self, now: float = 0.0) -> SchedulerOutput | None:
        scheduler, size = self.scheduler, self.config.block_size
        self._now_scheduled = now
        decodes = [
            s for s in scheduler.running if s.leader is None and s.num_missing_tokens == 1 and not self._has_its_last(s)
        ]
        waiting = list(scheduler.waiting)
        inherited = {s: s.num_highwater_tokens for s in scheduler.sequences.values() if s not in self._computed}
        num_preemptions = scheduler.num_preemptions
        plan = self._schedule(now)
        self.plans.append(show(plan))
        self.num_preempted += scheduler.num_preemptions - num_preemptions
        self._check_skips(waiting)
        scheduler.check_invariants()
        if plan is None:
            assert not scheduler.sequences or self.engine._in_flight, f"stuck: {list(scheduler.sequences.values())}"
            return None
        run = {item.sequence for item in plan.scheduled}
        skipped = [s for s in decodes if s not in run and s in scheduler.running]
        assert not skipped, f"decode skipped: {skipped}"
        budget = self.config.max_num_batched_tokens
        assert plan.num_tokens == sum(item.num_tokens for item in plan.scheduled) <= budget, f"budget: {plan}"
        assert len(run) == len(plan.scheduled) <= self.config.max_num_seqs
        behind = [s for s in scheduler.running if s.leader is None and not s.num_pending and s.num_missing_tokens > 0]
        assert not behind or plan.num_tokens == budget, f"idle budget: {behind} could have had more of {plan}"
        assert all(a.order < b.order for a, b in itertools.pairwise(behind))
        owners = Counter(block_id for s in scheduler.sequences.values() for block_id in s.block_ids)
        copied = {destination for _, destination in plan.block_copies}
        assert len(copied) == len(plan.block_copies)
        for source, destination in plan.block_copies:
            self._salts[destination] = self._salts[source]
        for item in plan.scheduled:
            sequence, end = item.sequence, item.start + item.num_tokens
            salt = sequence.request.cache_salt
            self.num_run[sequence.key[0]] += item.num_tokens
            assert 0 <= sequence.slot < self.config.max_num_seqs
            assert item.samples == (end == len(sequence.token_ids) + sequence.num_pending - item.samples)
            last = sequence.num_prompt_tokens + sequence.max_output_tokens - 1
            assert end <= last, f"overshoot: {sequence} computes position {end - 1} of {last}"
            for i in range(-(-end // size)):
                block_id = sequence.block_ids[i]
                if (i + 1) * size <= sequence.num_shared_tokens:
                    assert self._salts[block_id] == salt, (
                        f"tenant: {sequence} reads a block of {self._salts[block_id]!r}"
                    )
                elif (i + 1) * size > item.start:
                    assert owners[block_id] == 1, f"shared block: {sequence} writes block {block_id}, others hold it"
                    self._salts[block_id] = salt
            self._count_recomputed(item, inherited)
        return plan

    def _has_its_last(self, sequence: Sequence) -> bool:
        num_output = len(sequence.token_ids) - sequence.num_prompt_tokens + sequence.num_pending
        return sequence.num_pending > 0 and num_output >= sequence.max_output_tokens

    def _check_skips(self, waiting: list[Sequence]) -> None:
        """Nobody is passed over by more than MAX_SKIPS requests of equal or lower priority that came later."""
        scheduler = self.scheduler
        still = [s for s in waiting if s in scheduler.waiting and s.leader is None]
        for admitted in (s for s in waiting if s in scheduler.running and s.leader is None):
            for s in still:
                if s.order < admitted.order:
                    self._passed[s.key] += 1
                    self.num_passed_over += 1
        limit = scheduler_module.MAX_SKIPS
        assert all(num <= limit for num in self._passed.values()), f"skips: {self._passed} of at most {limit}"

    def _count_recomputed(self, item: ScheduledSequence, inherited: dict[Sequence, int]) -> None:
        """``inherited``: what a choice that ended had computed of the prompt, for the choice that goes on for it."""
        sequence, end = item.sequence, item.start + item.num_tokens
        known = self._computed.get(sequence, inherited.get(sequence, 0))
        recomputed = max(0, min(end, known) - item.start)
        assert item.num_recomputed_tokens == recomputed, f"recomputed: {item} says {item.num_recomputed_tokens}"
        self.num_recomputed += recomputed
        self._computed[sequence] = max(known, end)

    def _check_logprobs(self, key: Key) -> None:
        request, outputs = self.requests[key], self.outputs[key]
        sampling = request.sampling
        for output in outputs:
            if sampling.logprobs is None:
                assert output.logprobs is None
            else:
                assert tuple(entry.token_id for entry in output.logprobs or ()) == output.token_ids
        with_tokens = [output for output in outputs if output.token_ids]
        assert all(output.prompt_logprobs is None for output in with_tokens[1:]), "prompt logprobs came twice"
        if with_tokens:
            expected = expected_prompt_logprobs(self.runner, request)
            assert with_tokens[0].prompt_logprobs == expected, f"prompt logprobs: {key}"


def expected_prompt_logprobs(runner: SimulatedRunner, request: GenerateRequest) -> tuple[object, ...] | None:
    if request.sampling.prompt_logprobs is None:
        return None
    digest, entries = _ROOT, [None]
    prompt = request.prompt_token_ids
    for token, following in itertools.pairwise(prompt):
        digest = _mix(digest, token)
        entries.append(runner._logprobs(digest, following, request.sampling.prompt_logprobs))  # type: ignore[arg-type]
    return tuple(entries)


@dataclasses.dataclass
class Totals:
    """What a set of random runs exercised."""

    num_steps: int = 0
    num_requests: int = 0
    num_refused: int = 0
    num_preemptions: int = 0
    num_recomputed_tokens: int = 0
    num_prefix_hits: int = 0
    num_passed_over: int = 0
    num_copies: int = 0
    num_aborted: int = 0
    num_late: int = 0
    num_failed: int = 0
    num_replayed: int = 0
    num_chunked: int = 0
    num_stopped: int = 0
    num_prompt_logprobs: int = 0


def random_run(
    seed: int,
    steps_in_flight: int,
    totals: Totals | None = None,
    *,
    num_requests: int = 30,
    faults: bool = False,
    on_step: Callable[[Watched], None] | None = None,
) -> Watched:
    """Random traffic on a random small engine, to its end, with every check of Watched and the oracle."""
    totals = totals or Totals()
    rng = random.Random(seed)
    watched = Watched(
        num_blocks=rng.randint(12, 26),
        max_model_len=60,
        block_size=rng.choice((3, 4)),
        max_num_seqs=rng.randint(2, 7),
        max_num_batched_tokens=rng.choice((7, 12, 20)),
        enable_prefix_caching=rng.random() < 0.7,
        steps_in_flight=steps_in_flight,
        seconds_per_step=0.01,
        runner_class=FaultyRunner if faults else SimulatedRunner,
    )
    pending = [_random_request(rng, f"r{i}") for i in range(num_requests)]
    if faults:
        culprits = [requests[0].request_id for requests in pending if rng.random() < 0.12]
        half = rng.randrange(len(culprits) + 1)
        watched.runner.at_launch = frozenset(culprits[:half])  # type: ignore[attr-defined]
        watched.runner.at_read = frozenset(culprits[half:])  # type: ignore[attr-defined]
    launch = watched.runner.launch

    def counting_launch(plan: SchedulerOutput) -> SimulatedStep:
        totals.num_copies += len(plan.block_copies)
        totals.num_chunked += sum(not item.samples for item in plan.scheduled)
        return launch(plan)

    watched.runner.launch = counting_launch  # type: ignore[method-assign]
    rate = rng.choice((0.2, 0.5, 0.9))
    for _ in range(4000):
        if not pending and not watched.engine.has_work:
            break
        while pending and rng.random() < rate:
            requests = pending.pop(0)
            if rng.random() < 0.2:
                requests = _replayed(rng, requests)
                totals.num_replayed += 1
            try:
                watched.add(requests)
                totals.num_requests += 1
            except scheduler_module.RequestTooLargeError:
                totals.num_refused += 1
            except scheduler_module.InvalidParameterError as error:
                if error.param != "n":
                    raise
                totals.num_refused += 1
        if watched.scheduler.sequences and rng.random() < 0.04:
            request_id, choice = rng.choice(list(watched.scheduler.sequences))
            watched.abort(request_id, rng.choice((None, choice)))
        watched.step()
        if on_step is not None:
            on_step(watched)
    watched.run()
    allowed = {"deadline_exceeded", *(("step_failed",) if faults else ())}
    watched.check_tokens(frozenset(allowed))
    for end in watched.ends.values():
        if end.error_code == "step_failed":
            assert "planted" in (end.error or ""), f"error: {end.error}"
            assert end.request_id in culprits, f"innocent: {end.request_id} was refused for what another did"
    reasons = Counter(end.finish_reason for end in watched.ends.values())
    totals.num_stopped += reasons[FinishReason.STOP]
    totals.num_aborted += reasons[FinishReason.ABORT]
    totals.num_late += sum(end.error_code == "deadline_exceeded" for end in watched.ends.values())
    totals.num_failed += sum(end.error_code == "step_failed" for end in watched.ends.values())
    totals.num_steps += watched.num_steps
    totals.num_preemptions += watched.scheduler.num_preemptions
    totals.num_recomputed_tokens += watched.scheduler.num_recomputed_tokens
    totals.num_prefix_hits += watched.scheduler.num_prefix_hits
    totals.num_passed_over += watched.num_passed_over
    totals.num_prompt_logprobs += sum(
        output.prompt_logprobs is not None for outputs in watched.outputs.values() for output in outputs
    )
    return watched


def _random_request(rng: random.Random, request_id: str) -> list[GenerateRequest]:
    long = rng.random() < 0.15
    return make_request(
        request_id,
        # Two token ids only, so that prefixes and single blocks are often equal.
        [rng.choice((5, 5, 5, 6)) for _ in range(rng.randint(20, 40) if long else rng.randint(1, 16))],
        n=rng.choice((1, 1, 1, 2, 3)),
        max_tokens=rng.randint(1, 14),
        seed=rng.randrange(100),
        ignore_eos=rng.random() < 0.5,
        stop_token_ids=tuple(range(10, 10 + rng.choice((0, 0, 8)))),
        priority=rng.choice((0, 0, 0, 1)),
        cache_salt=rng.choice(("", "", "tenant")),
        remaining_ms=rng.choice((None, None, None, 50.0, 300.0, 1000.0)),
        logprobs=rng.choice((None, None, 0, 2)),
        prompt_logprobs=rng.choice((None, None, None, None, 1)),
    )


def _replayed(rng: random.Random, requests: list[GenerateRequest]) -> list[GenerateRequest]:
    """The request as it is submitted after the loss of a replica: unfinished choices, with what they had emitted."""
    replayed = []
    for request in requests:
        tokens, _ = expected_tokens(request, max_model_len=60)
        if rng.random() < 0.8:
            emitted = tokens[: rng.randrange(len(tokens))]
            replayed.append(dataclasses.replace(request, output_token_ids=emitted, attempt=1))
    return replayed or requests
