"""Engine: schedule, run, update. Knows the Runner only by its protocol; turns a failed step into one failed request.

Nothing here is thread-safe; AsyncEngine puts it on a thread of its own.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Collection, Mapping
from typing import Protocol

from serve_app.engine.config import EngineConfig
from serve_app.engine.pooling import Pooled
from serve_app.engine.request import GenerateRequest, TokenLogprobs, TokenOutput
from serve_app.engine.scheduler import Key, Scheduler, SchedulerOutput
from serve_app.engine.step_record import StepRecord, StepRecorder
from serve_app.engine.totals import Counts
from serve_app.errors import DeviceLostError, RaggedServeError, StepFailedError
from serve_app.logs import about_stream, get_logger

logger = get_logger(__name__)


class Step(Protocol):
    """A launched step. `token_ids` waits for it; the other attributes hold once it has returned."""

    def sample(self) -> None:
        """Called once every step before it was read, and before the next one is launched.

        Where masks depend on the tokens of the step before, a runner with two steps in flight launches the sampling
        here, behind the forward that already runs. Else nothing is left to do. `token_ids` does it where nobody did.
        """
        ...

    def token_ids(self) -> list[int]:
        """One id for each scheduled sequence that samples, in the order of the plan. Raises if the step failed."""
        ...

    @property
    def logprobs(self) -> Mapping[int, TokenLogprobs]:
        """Index into token_ids -> log-probabilities, for the sequences that asked."""
        ...

    @property
    def prompt_logprobs(self) -> Mapping[Key, list[TokenLogprobs]]:
        """Sequence key -> one entry per prompt position of its chunk whose next token is in the prompt."""
        ...

    @property
    def embeddings(self) -> Mapping[Key, Pooled]:
        """Key of a sequence with pooling -> what its chunk gave (see serve_app.engine.pooling)."""
        ...

    @property
    def ended(self) -> Collection[int]:
        """Indices into token_ids: the sequences whose grammar cannot go on."""
        ...

    @property
    def num_padded_tokens(self) -> int: ...

    @property
    def seconds(self) -> Mapping[str, float]:
        """Time by part, as far as the runner measures it."""
        ...


class Runner(Protocol):
    """What runs a plan: the model, or a simulation of it."""

    num_kv_blocks: int
    max_model_len: int
    vocab_size: int
    eos_token_ids: frozenset[int]
    max_steps_in_flight: int
    """1: a step is read before the next is planned. 2: the next one is launched first."""
    has_position_classes: bool
    """True if prompt and output positions are computed in different ways, and bits are promised: then a block is reused
    only for positions of the class it was computed for (see `hash_block`)."""

    def compile_grammar(self, text: str) -> object:
        """What `Sequence.grammar` is to hold; from any thread. It may take a second, and no time where it is known.

        Raises InvalidRequestError if the grammar is wrong, or this runner has no masks.
        """
        ...

    def launch(self, plan: SchedulerOutput) -> Step:
        """Starts a step. First copies plan.block_copies, in order; then everything else."""
        ...


class Engine:
    """``clock`` gives monotonic seconds, for deadlines and step records. ``scheduler``: another policy (baselines)."""

    def __init__(
        self,
        config: EngineConfig,
        runner: Runner,
        clock: Callable[[], float] = time.monotonic,
        scheduler: Scheduler | None = None,
    ) -> None:
        assert runner.max_steps_in_flight in (1, 2), "the scheduler keeps one pending token for each sequence"
        self.config = config
        self.runner = runner
        self.clock = clock
        self.recorder = StepRecorder()
        self.scheduler = scheduler or Scheduler(
            config,
            num_blocks=runner.num_kv_blocks,
            max_model_len=runner.max_model_len,
            vocab_size=runner.vocab_size,
            eos_token_ids=runner.eos_token_ids,
            has_position_classes=runner.has_position_classes,
        )
        self._in_flight: deque[tuple[SchedulerOutput, Step, StepRecord]] = deque()

    def add(self, requests: GenerateRequest | list[GenerateRequest], submitted: float | None = None) -> None:
        """Takes the choices of one request; raises InvalidRequestError, without a trace, if it cannot be served.

        A grammar is compiled here where nobody has done it before. ``submitted``: when deadlines began to count, if not
        now.
        """
        requests = requests if isinstance(requests, list) else [requests]
        texts = {request.sampling.grammar for request in requests}
        grammars = {text: self.runner.compile_grammar(text) for text in texts if text is not None}
        for sequence in self.scheduler.add(requests, self.clock() if submitted is None else submitted):
            if sequence.request.sampling.grammar is not None:
                sequence.grammar = grammars[sequence.request.sampling.grammar]

    def abort(self, request_id: str, choice_index: int | None = None) -> int:
        return self.scheduler.abort(request_id, choice_index)

    @property
    def has_work(self) -> bool:
        return self.scheduler.has_work or bool(self._in_flight)

    def counts(self) -> Counts:
        """What it has done since it started, and what it holds now; for metrics. From any thread."""
        scheduler, pool = self.scheduler, self.scheduler.pool
        num_used_blocks = pool.num_used_blocks
        return {
            **scheduler.totals.counts(),
            "preemptions": {(): scheduler.num_preemptions},
            "prefix_queries": {(): scheduler.num_prefix_queries},
            "prefix_hits": {(): scheduler.num_prefix_hits},
            "num_used_blocks": {(): num_used_blocks},
            "kv_cache_usage": {(): num_used_blocks / pool.num_blocks},
        }

    def step(self) -> list[TokenOutput]:
        """Launches one step if there is something to run, and reads the oldest one once enough are in flight.

        Raises DeviceLostError if no step can succeed any more; whatever else fails in a step is one request's end.
        """
        started = self.clock()
        plan = self.scheduler.schedule(started)
        outputs = self.scheduler.take_ended()
        if plan is not None:
            record = self._record(plan, started)
            if plan.preempted and logger.isEnabledFor(logging.DEBUG):
                for request_id, choice_index in plan.preempted:
                    logger.debug("preempted", extra=about_stream(request_id, choice=choice_index, step=record.index))
            scheduled = self.clock()
            step = self._launch(plan)
            record.seconds["schedule"] = scheduled - started
            record.seconds["launch"] = self.clock() - scheduled
            self._in_flight.append((plan, step, record))
        if self._in_flight and (plan is None or len(self._in_flight) >= self.runner.max_steps_in_flight):
            outputs += self._read_oldest()
        if len(self._in_flight) == 1:
            self._sample_last()
        return outputs

    def _launch(self, plan: SchedulerOutput) -> Step:
        try:
            return self.runner.launch(plan)
        except DeviceLostError:
            raise
        except Exception as error:
            return _FailedStep(error)

    def _sample_last(self) -> None:
        """Everything before it was read. A step that is already sampled does nothing."""
        plan, step, record = self._in_flight[0]
        started = self.clock()
        try:
            step.sample()
        except DeviceLostError:
            raise
        except Exception as error:
            self._in_flight[0] = (plan, _FailedStep(error), record)
        record.seconds["launch"] += self.clock() - started

    def _read_oldest(self) -> list[TokenOutput]:
        plan, step, record = self._in_flight.popleft()
        started = self.clock()
        try:
            token_ids = step.token_ids()
        except DeviceLostError:
            raise
        except Exception as error:
            outputs = self._run_alone(plan, error)
            record.seconds["wait"] = self.clock() - started
        else:
            waited = self.clock()
            outputs = self.scheduler.update(
                plan, token_ids, step.logprobs, step.prompt_logprobs, step.embeddings, step.ended
            )
            record.num_padded_tokens = step.num_padded_tokens
            record.seconds.update(step.seconds)
            record.seconds["wait"] = waited - started
            record.seconds["update"] = self.clock() - waited
        self.recorder.append(record)
        self.scheduler.totals.add_step(record)
        return outputs

    def _run_alone(self, plan: SchedulerOutput, error: Exception) -> list[TokenOutput]:
        """A step failed: each of its sequences runs by itself, and only those that fail again are refused.

        A chunk that fails alone is halved, down to one token: what the device has no memory for at once may fit in
        parts. An error of the family says that the request is at fault, and halving would not help.

        A step launched behind it took its inputs from it, so that one is run again in the same way when its turn
        comes. Writing a KV slot twice with the same value is harmless.
        """
        for i, (later_plan, later_step, record) in enumerate(self._in_flight):
            later_error = _wait_and_discard(later_step)
            self._in_flight[i] = (later_plan, _FailedStep(later_error or error), record)
        outputs: list[TokenOutput] = []
        left = deque(plan.alone())
        while left:
            alone = left.popleft()
            sequence = alone.scheduled[0].sequence
            if sequence.is_finished:
                continue
            try:
                step = self.runner.launch(alone)
                token_ids = step.token_ids()
            except DeviceLostError:
                raise
            except Exception as again:
                if alone.num_tokens > 1 and not isinstance(again, RaggedServeError):
                    left.extendleft(reversed(alone.halves()))
                else:
                    self.scheduler.fail(sequence, _as_family(again, sequence.key))
            else:
                outputs += self.scheduler.update(
                    alone, token_ids, step.logprobs, step.prompt_logprobs, step.embeddings, step.ended
                )
        return outputs + self.scheduler.take_ended()

    def _record(self, plan: SchedulerOutput, started: float) -> StepRecord:
        scheduler = self.scheduler
        return StepRecord(
            index=self.recorder.num_steps + len(self._in_flight),
            started=started,
            sequences=plan.sequence_steps(),
            num_tokens=plan.num_tokens,
            token_budget=self.config.max_num_batched_tokens,
            num_running=len(scheduler.running),
            num_waiting=len(scheduler.waiting),
            num_blocks=scheduler.pool.num_blocks,
            num_used_blocks=scheduler.pool.num_used_blocks,
            num_recomputed_tokens=plan.num_recomputed_tokens,
            num_preempted=len(plan.preempted),
            preempted=tuple(plan.preempted),
        )


class _FailedStep:
    """Stands in for a step that could not be launched; reading it raises what happened."""

    logprobs: Mapping[int, TokenLogprobs] = {}
    prompt_logprobs: Mapping[Key, list[TokenLogprobs]] = {}
    embeddings: Mapping[Key, Pooled] = {}
    ended: Collection[int] = ()
    num_padded_tokens = 0
    seconds: Mapping[str, float] = {}

    def __init__(self, error: Exception) -> None:
        self.error = error

    def sample(self) -> None:
        """Whoever reads it hears of the error."""

    def token_ids(self) -> list[int]:
        raise self.error


def _wait_and_discard(step: Step) -> Exception | None:
    """Its result is void, whatever it is; but nothing may run behind our back when the retries start."""
    try:
        step.token_ids()
    except DeviceLostError:
        raise
    except Exception as error:
        return error
    return None


def _as_family(error: Exception, key: Key) -> RaggedServeError:
    if isinstance(error, RaggedServeError):
        return error
    return StepFailedError(f"request {key[0]!r}: the step failed with {type(error).__name__}: {error}")
