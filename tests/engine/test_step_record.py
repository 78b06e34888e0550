"""StepRecord and StepRecorder: the last steps as data, and totals that do not wrap."""

from __future__ import annotations

import pytest

from serve_app.engine.step_record import SequenceStep, StepRecord, StepRecorder


def make_record(index: int, num_tokens: int = 5) -> StepRecord:
    return StepRecord(
        index=index,
        started=0.5 * index,
        sequences=(SequenceStep("a", 0, 3, num_tokens, 2, True),),
        num_tokens=num_tokens,
        token_budget=8,
        num_running=1,
        num_waiting=0,
        num_blocks=10,
        num_used_blocks=2,
        num_recomputed_tokens=2,
        num_preempted=1,
        num_padded_tokens=3,
    )


def test_the_duration_is_the_hosts_and_what_the_runner_adds_is_not_counted_twice() -> None:
    record = make_record(0)
    assert record.duration == 0.0
    record.seconds.update(schedule=0.25, launch=0.5, wait=1.0, update=2.0, model=1.0)
    assert record.duration == 3.75


def test_the_ring_keeps_the_last_ones_and_the_totals_all() -> None:
    recorder = StepRecorder(capacity=3)
    for i in range(7):
        recorder.append(make_record(i, num_tokens=i))
    assert [record.index for record in recorder.records] == [4, 5, 6]
    assert (recorder.num_steps, recorder.num_tokens) == (7, 21)
    assert (recorder.num_recomputed_tokens, recorder.num_preempted, recorder.num_padded_tokens) == (14, 7, 21)


def test_a_record_takes_no_unknown_field() -> None:
    with pytest.raises(AttributeError):
        make_record(0).color = "red"  # type: ignore[attr-defined]
