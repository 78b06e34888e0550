"""What a replica remembers of requests, for those who ask why one took so long. Made only where requests are explained.

    channel end     submitted -> accepted -> ended      a few calls for each request
    step records    collect: taken a few times a second from the engine's ring, which is written in any case

So a step does nothing for it. Bounded: ended requests go first, oldest first; where all the steps that may be kept belong
to running requests, later steps are counted and not kept. Knows step records and ids; knows no Ray, no channel.
"""

from __future__ import annotations

import asyncio
from array import array
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from serve_app.engine.request import GenerateRequest
from serve_app.engine.step_record import StepRecord, StepRecorder

COLLECT_SECONDS = 0.25
"""Between two collections: the ring holds a thousand steps."""
MAX_ENDED = 1024
"""Submits that are remembered behind their end."""
MAX_STEPS = 500_000
"""Of all sequences, some 20 bytes each."""
MAX_TIMES = 1 << 16
"""Steps whose time is remembered: a power of two."""
FIELDS = 5
"""Numbers of a step of a sequence: index, start, tokens, recomputed tokens, whether it samples."""


class _Choice:
    __slots__ = ("end", "ended_at", "num_left_out", "preempted", "steps")

    def __init__(self) -> None:
        self.steps = array("I")
        self.num_left_out = 0
        self.preempted: list[int] = []
        """Indices of the steps before which it lost its place."""
        self.end: str | None = None
        self.ended_at: float | None = None


class _Submit:
    """One attempt at one prompt."""

    def __init__(self, requests: Sequence[GenerateRequest], now: float) -> None:
        first = requests[0]
        self.stream_id = first.request_id
        self.attempt = first.attempt
        self.num_prompt_tokens = len(first.prompt_token_ids)
        self.has_grammar = any(request.sampling.grammar is not None for request in requests)
        self.submitted_at = now
        self.accepted_at: float | None = None
        self.refusal: str | None = None
        self.choices = {request.choice_index: _Choice() for request in requests}

    @property
    def has_ended(self) -> bool:
        return all(choice.end is not None for choice in self.choices.values())

    @property
    def num_steps(self) -> int:
        return sum(len(choice.steps) for choice in self.choices.values()) // FIELDS


class RequestHistory:
    """``clock``: the engine's. Every method on one event loop."""

    def __init__(self, recorder: StepRecorder, clock: Callable[[], float], wall_ms: Callable[[], float]) -> None:
        self._recorder = recorder
        self._clock = clock
        self._wall_ms = wall_ms
        """Milliseconds since 1970, now."""
        self._last_index = -1
        self._submits: dict[str, list[_Submit]] = {}
        """By stream, attempts in order."""
        self._ended: OrderedDict[int, _Submit] = OrderedDict()
        """By identity, those that ended first at the front."""
        self._num_steps = 0
        """Kept, of all submits."""
        self._indices = array("q", [-1]) * MAX_TIMES
        self._times = array("d", [0.0]) * (2 * MAX_TIMES)
        """Start and duration of the step in the same place of ``_indices``."""

    async def run(self) -> None:
        """Collects until it is cancelled."""
        while True:
            self.collect()
            await asyncio.sleep(COLLECT_SECONDS)

    # ---- what happens to a submit --------------------------------------------------------------------------------

    def submitted(self, requests: Sequence[GenerateRequest]) -> None:
        submit = _Submit(requests, self._clock())
        if submit.stream_id in self._submits:
            self.collect()  # what ran so far is the earlier attempt's
        self._submits.setdefault(submit.stream_id, []).append(submit)

    def accepted(self, stream_id: str, attempt: int) -> None:
        if (submit := self._find(stream_id, attempt)) is not None:
            submit.accepted_at = self._clock()

    def refused(self, stream_id: str, attempt: int, error: BaseException) -> None:
        if (submit := self._find(stream_id, attempt)) is not None:
            submit.refusal = str(error)
            for choice in submit.choices.values():
                choice.end, choice.ended_at = "refused", self._clock()
            self._remember(submit)

    def ended(self, stream_id: str, attempt: int, choice_index: int, reason: str) -> None:
        submit = self._find(stream_id, attempt)
        if submit is None:
            return
        choice = submit.choices[choice_index]
        choice.end, choice.ended_at = reason, self._clock()
        if submit.has_ended:
            self._remember(submit)

    # ---- steps ---------------------------------------------------------------------------------------------------

    def collect(self) -> None:
        """Takes the records that are new."""
        records = self._recorder.records.copy()  # one call: the engine's thread goes on appending
        for record in records:
            if record.index > self._last_index:
                self._take(record)
        if records:
            self._last_index = records[-1].index
        self._shrink()

    def _take(self, record: StepRecord) -> None:
        place = record.index % MAX_TIMES
        self._indices[place] = record.index
        self._times[2 * place] = record.started
        self._times[2 * place + 1] = record.duration
        for stream_id, choice_index in record.preempted:
            if (choice := self._choice(stream_id, choice_index)) is not None:
                choice.preempted.append(record.index)
        for stream_id, choice_index, start, num_tokens, num_recomputed, samples in record.sequences:
            choice = self._choice(stream_id, choice_index)
            if choice is None:
                continue
            if self._num_steps < MAX_STEPS:
                choice.steps.extend((record.index, start, num_tokens, num_recomputed, samples))
                self._num_steps += 1
            else:
                choice.num_left_out += 1

    def _choice(self, stream_id: str, choice_index: int) -> _Choice | None:
        submits = self._submits.get(stream_id)
        return None if submits is None else submits[-1].choices.get(choice_index)

    # ---- telling -------------------------------------------------------------------------------------------------

    def tell(self, stream_ids: Iterable[str]) -> dict[str, list[dict[str, Any]]]:
        """Each stream's attempts here, as plain data. Times named ``_at``: milliseconds since 1970."""
        self.collect()
        return {i: [self._tell(submit) for submit in self._submits[i]] for i in stream_ids if i in self._submits}

    def _tell(self, submit: _Submit) -> dict[str, Any]:
        return {
            "attempt": submit.attempt,
            "submitted_at": self._at(submit.submitted_at),
            "accepted_at": self._at(submit.accepted_at),
            "has_grammar": submit.has_grammar,
            "refusal": submit.refusal,
            "choices": [self._tell_choice(submit, i, choice) for i, choice in sorted(submit.choices.items())],
        }

    def _tell_choice(self, submit: _Submit, choice_index: int, choice: _Choice) -> dict[str, Any]:
        flat = choice.steps
        steps: list[dict[str, Any]] = []
        for i in range(0, len(flat), FIELDS):
            index, start, num_tokens, num_recomputed, samples = flat[i : i + FIELDS]
            kind = "prefill"
            if num_recomputed:
                kind = "recompute"
            elif start >= submit.num_prompt_tokens and num_tokens == 1 and samples:
                kind = "decode"
            started, duration = self._time_of(index)
            steps.append(
                {
                    "step": index,
                    "at": self._at(started),
                    "ms": None if duration is None else round(duration * 1000.0, 2),
                    "kind": kind,
                    "position": start,
                    "tokens": num_tokens,
                    "recomputed": num_recomputed,
                    "samples": bool(samples),
                }
            )
        preemptions = []
        for index in choice.preempted:
            back = next((step for step in steps if step["step"] >= index), None)
            at = self._at(self._time_of(index)[0])
            waited = None if back is None or at is None or back["at"] is None else round(back["at"] - at, 1)
            preemptions.append({"before_step": index, "at": at, "waited_ms": waited})
        first, accepted = (steps[0]["at"] if steps else None), self._at(submit.accepted_at)
        return {
            "index": choice_index,
            "waited_ms": None if first is None or accepted is None else max(0.0, round(first - accepted, 1)),
            "end": choice.end,
            "ended_at": self._at(choice.ended_at),
            "preemptions": preemptions,
            "num_steps_left_out": choice.num_left_out,
            "steps": steps,
        }

    def _time_of(self, index: int) -> tuple[float | None, float | None]:
        """Start and duration of a step; None where they are forgotten."""
        place = index % MAX_TIMES
        if self._indices[place] != index:
            return None, None
        return self._times[2 * place], self._times[2 * place + 1]

    def _at(self, seconds: float | None) -> float | None:
        return None if seconds is None else round(self._wall_ms() - (self._clock() - seconds) * 1000.0, 1)

    # ---- bounds --------------------------------------------------------------------------------------------------

    def _find(self, stream_id: str, attempt: int) -> _Submit | None:
        return next((s for s in self._submits.get(stream_id, ()) if s.attempt == attempt), None)

    def _remember(self, submit: _Submit) -> None:
        self._ended[id(submit)] = submit
        self._shrink()

    def _shrink(self) -> None:
        """Forgets the oldest. Steps of those that just ended may still be in the ring: they are not taken any more."""
        while self._ended and (len(self._ended) > MAX_ENDED or self._num_steps >= MAX_STEPS):
            _, submit = self._ended.popitem(last=False)
            self._num_steps -= submit.num_steps
            submits = self._submits[submit.stream_id]
            submits.remove(submit)
            if not submits:
                del self._submits[submit.stream_id]
