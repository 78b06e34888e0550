"""What a replica remembers of requests: whose steps those are, and what is forgotten."""

from __future__ import annotations

from typing import Any

import pytest

from serve_app.engine.request import GenerateRequest, SamplingParams
from serve_app.engine.step_record import SequenceStep, StepRecord, StepRecorder
from serve_app.replica import request_history as module
from serve_app.replica.request_history import RequestHistory

Runs = tuple[SequenceStep, ...]


class World:
    def __init__(self, capacity: int = 1024) -> None:
        self.now = 100.0
        self.recorder = StepRecorder(capacity)
        self.history = RequestHistory(self.recorder, lambda: self.now, lambda: 1000.0 * self.now)

    def step(self, *runs: SequenceStep, preempted: tuple[tuple[str, int], ...] = ()) -> None:
        self.now += 1.0
        seconds = {"wait": 0.5}
        index = self.recorder.num_steps
        record = StepRecord(index, self.now, runs, 1, 8, 1, 0, 9, 1, 0, 0, preempted=preempted, seconds=seconds)
        self.recorder.append(record)

    def submit(self, name: str, attempt: int = 0, num_choices: int = 1) -> None:
        sampling = SamplingParams(seed=1).resolved()
        self.history.submitted(
            [GenerateRequest(name, (1, 2, 3), sampling, i, attempt=attempt) for i in range(num_choices)]
        )

    def choice(self, name: str, attempt: int = 0) -> dict[str, Any]:
        (found,) = (one for one in self.history.tell([name])[name] if one["attempt"] == attempt)
        choice: dict[str, Any] = found["choices"][0]
        return choice


def run(name: str, start: int, num_tokens: int = 1, recomputed: int = 0, *, samples: bool = True) -> SequenceStep:
    return SequenceStep(name, 0, start, num_tokens, recomputed, samples)


def test_kinds_times_and_preemptions() -> None:
    world = World()
    world.submit("a")
    world.now += 1.0
    world.history.accepted("a", 0)
    world.step(run("a", 0, 3), run("stranger", 0, 9))
    world.step(run("a", 3))
    world.step(preempted=(("a", 0),))
    world.step(run("a", 0, 5, 4))
    world.history.ended("a", 0, 0, "length")
    choice = world.choice("a")
    assert [(s["step"], s["kind"], s["position"], s["tokens"], s["ms"]) for s in choice["steps"]] == [
        *((0, "prefill", 0, 3, 500.0), (1, "decode", 3, 1, 500.0), (3, "recompute", 0, 5, 500.0))
    ]
    assert choice["steps"][0]["at"] == 102_000.0
    assert choice["waited_ms"] == 1000.0
    assert choice["preemptions"] == [{"before_step": 2, "at": 104_000.0, "waited_ms": 1000.0}]
    assert (choice["end"], choice["ended_at"]) == ("length", 105_000.0)
    assert world.history.tell(["stranger"]) == {}


def test_attempts_are_told_apart() -> None:
    world = World()
    world.submit("a", 0)
    world.step(run("a", 0, 3))
    world.submit("a", 2)
    world.step(run("a", 0, 2, samples=False))
    assert len(world.choice("a", 0)["steps"]) == len(world.choice("a", 2)["steps"]) == 1
    world.history.refused("a", 2, ValueError("no room"))
    assert world.choice("a", 2)["end"] == "refused"
    assert world.history.tell(["a"])["a"][1]["refusal"] == "no room"


def test_the_oldest_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_ENDED", 2)
    monkeypatch.setattr(module, "MAX_STEPS", 10)
    world = World()
    for name in "abc":
        world.submit(name)
        world.step(run(name, 0, 3))
        world.history.collect()
        world.history.ended(name, 0, 0, "stop")
    assert list(world.history.tell("abc")) == ["b", "c"]
    world.submit("long")
    for i in range(20):
        world.step(run("long", 3 + i))
    choice = world.choice("long")
    # The steps of those that have ended make room, at the next collection.
    assert list(world.history.tell("abc")) == ["c"]
    assert len(choice["steps"]) + choice["num_steps_left_out"] == 20
    assert choice["num_steps_left_out"] > 0
    world.history.ended("long", 0, 0, "stop")
    world.submit("d")
    world.history.ended("d", 0, 0, "stop")
    assert list(world.history.tell(["c", "long", "d"])) == ["long", "d"]


def test_a_forgotten_time_is_null(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_TIMES", 4)
    world = World()
    world.submit("a")
    for i in range(6):
        world.step(run("a", 3 + i))
    steps = world.choice("a")["steps"]
    assert [step["at"] is None for step in steps] == [True, True, False, False, False, False]
    assert [step["ms"] is None for step in steps] == [True, True, False, False, False, False]
