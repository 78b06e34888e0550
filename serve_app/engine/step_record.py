"""StepRecord: what one step did, as plain data, in a ring buffer. Feeds metrics, pictures, traces; knows no clock."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import NamedTuple


class SequenceStep(NamedTuple):
    """One sequence's share of one step: the half-open run of positions [start, start + num_tokens)."""

    request_id: str
    choice_index: int
    start: int
    num_tokens: int
    num_recomputed_tokens: int
    """How many of them had been computed before (preemption)."""
    samples: bool
    """True if the run reaches the last known token, so that the step samples the next one."""


@dataclass(slots=True)
class StepRecord:
    """One step. Times are seconds; ``started`` is on the engine's monotonic clock."""

    index: int
    started: float
    sequences: tuple[SequenceStep, ...]
    num_tokens: int
    token_budget: int
    num_running: int
    num_waiting: int
    num_blocks: int
    num_used_blocks: int
    num_recomputed_tokens: int
    num_preempted: int
    num_padded_tokens: int = 0
    """Rows computed and thrown away: CUDA-graph buckets, padded baselines, fixed row tiles."""
    preempted: tuple[tuple[str, int], ...] = ()
    """(request id, choice) of those that lost their place before it."""
    seconds: dict[str, float] = field(default_factory=dict)
    """By part: schedule, launch, wait, update, and what the runner adds."""

    @property
    def duration(self) -> float:
        return sum(self.seconds.get(part, 0.0) for part in ("schedule", "launch", "wait", "update"))


class StepRecorder:
    """The last ``capacity`` records, and running totals that never wrap."""

    def __init__(self, capacity: int = 1024) -> None:
        self.records: deque[StepRecord] = deque(maxlen=capacity)
        self.num_steps = 0
        self.num_tokens = 0
        self.num_recomputed_tokens = 0
        self.num_preempted = 0
        self.num_padded_tokens = 0

    def append(self, record: StepRecord) -> None:
        self.records.append(record)
        self.num_steps += 1
        self.num_tokens += record.num_tokens
        self.num_recomputed_tokens += record.num_recomputed_tokens
        self.num_preempted += record.num_preempted
        self.num_padded_tokens += record.num_padded_tokens
