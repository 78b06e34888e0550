"""Recent steps as plain data: each step once, what each sequence did, and no request id of a client."""

from __future__ import annotations

import json
import threading
from itertools import pairwise
from typing import Any

import pytest

from serve_app.engine import recent_steps as module
from serve_app.engine.config import EngineConfig
from serve_app.engine.engine import Engine
from serve_app.engine.recent_steps import Kind, recent_steps, short_id
from serve_app.engine.simulated_runner import SimulatedRunner, VirtualClock
from tests.engine.harness import make_request

WALL_MS = 1_000_000.0


def make_engine(num_blocks: int = 100, *, max_num_seqs: int = 8, budget: int = 12) -> tuple[Engine, VirtualClock]:
    clock = VirtualClock()
    runner = SimulatedRunner(num_kv_blocks=num_blocks, block_size=4, seconds_per_step=0.5, sleep=clock.sleep)
    config = EngineConfig(block_size=4, max_num_seqs=max_num_seqs, max_num_batched_tokens=budget)
    return Engine(config, runner, clock), clock


def run(engine: Engine) -> None:
    while engine.has_work:
        engine.step()


def runs_of(step: list[Any]) -> list[tuple[int, Kind, int, int]]:
    numbers = step[-1]
    assert len(numbers) % 4 == 0
    four = zip(*[iter(numbers)] * 4, strict=True)
    return [(i, Kind(kind), tokens, again) for i, kind, tokens, again in four]


def test_what_each_sequence_does_in_each_step() -> None:
    engine, clock = make_engine()
    engine.add(make_request("a", 5, max_tokens=3))
    engine.step()
    engine.add(make_request("b", 20, max_tokens=2))
    run(engine)
    clock.now += 7.0
    told = recent_steps(engine, -1, 100, WALL_MS)
    a, b = short_id("a"), short_id("b")
    assert [runs_of(step) for step in told["steps"]] == [
        [(a, Kind.LAST_CHUNK, 5, 0)],
        [(a, Kind.DECODE, 1, 0), (b, Kind.CHUNK, 11, 0)],
        [(a, Kind.DECODE, 1, 0), (b, Kind.LAST_CHUNK, 9, 0)],
        [(b, Kind.DECODE, 1, 0)],
    ]
    assert [step[:4] for step in told["steps"]] == [
        [0, WALL_MS - 9000.0, 500.0, 5],
        [1, WALL_MS - 8500.0, 500.0, 12],
        [2, WALL_MS - 8000.0, 500.0, 10],
        [3, WALL_MS - 7500.0, 500.0, 1],
    ]
    assert [step[4:9] for step in told["steps"]] == [[1, 0, 2, 0, 0], [2, 0, 7, 0, 0], [2, 0, 7, 0, 0], [1, 0, 6, 0, 0]]
    del told["steps"]
    assert told == {
        "num_steps": 4,
        "num_tokens": 28,
        "num_recomputed_tokens": 0,
        "num_preempted": 0,
        "num_running": 0,
        "num_waiting": 0,
        "num_used_blocks": 0,
        "num_blocks": 100,
        "block_size": 4,
        "token_budget": 12,
        "max_num_seqs": 8,
    }


def test_a_step_is_told_once_and_the_newest_where_there_are_more() -> None:
    engine, _ = make_engine()
    engine.add(make_request("a", 3, max_tokens=40))
    seen: list[int] = []
    while engine.has_work:
        for _ in range(3):
            engine.step()
        seen += [step[0] for step in recent_steps(engine, seen[-1] if seen else -1, 100, WALL_MS)["steps"]]
    assert seen == list(range(40))
    assert recent_steps(engine, 39, 100, WALL_MS)["steps"] == []
    assert [step[0] for step in recent_steps(engine, 10, 4, WALL_MS)["steps"]] == [36, 37, 38, 39]


def test_what_was_preempted_is_computed_again() -> None:
    engine, _ = make_engine(num_blocks=6)
    for name in ("a", "b"):
        engine.add(make_request(name, 5, max_tokens=14))
    run(engine)
    told = recent_steps(engine, -1, 100, WALL_MS)
    again = [r for step in told["steps"] for r in runs_of(step) if r[3]]
    assert again
    assert sum(r[3] for r in again) == told["num_recomputed_tokens"] > 0
    assert sum(step[7] for step in told["steps"]) == told["num_preempted"] > 0


def test_sequences_that_no_screen_shows_are_one_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_RUNS", 3)
    engine, _ = make_engine(max_num_seqs=8, budget=40)
    for i in range(5):
        engine.add(make_request(f"r{i}", 2 + i, max_tokens=1))
    run(engine)
    told = recent_steps(engine, -1, 100, WALL_MS)
    (step,) = told["steps"]
    assert [(kind, tokens) for _, kind, tokens, _ in runs_of(step)] == [
        *[(Kind.LAST_CHUNK, 2 + i) for i in range(3)],
        (Kind.OTHERS, 5 + 6),
    ]
    assert runs_of(step)[3][0] == 0


def test_no_id_of_a_client_is_told_but_the_pages_own() -> None:
    engine, _ = make_engine()
    mine, theirs = "ui-0123abcd~5f5f5f5f", "customer-4711@example.org~00aa00aa"
    for name in (mine, theirs):
        engine.add(make_request(name, 4, max_tokens=1))
    run(engine)
    told = recent_steps(engine, -1, 100, WALL_MS)
    assert [run[0] for run in runs_of(told["steps"][0])] == [0x0123ABCD, short_id(theirs)]
    assert "customer" not in json.dumps(told)
    for strange in (
        "ui-0123abcd",
        "ui-0123abcdef~1",
        "UI-0123ABCD~1",
        "ui-\ud800~1".encode("utf-8", "replace").decode(),
    ):
        assert 0 <= short_id(strange) < 1 << 32
        assert short_id(strange) != 0x0123ABCD


def test_it_may_be_asked_while_the_engine_runs() -> None:
    """The ring is read on another thread than the one that appends to it."""
    engine, _ = make_engine(8000)
    over = threading.Event()
    for i in range(8):
        engine.add(make_request(f"r{i}", 3, max_tokens=2000))

    def work() -> None:
        while engine.has_work:
            engine.step()
        over.set()

    thread = threading.Thread(target=work)
    thread.start()
    num_asked, last = 0, -1
    while not over.is_set():
        indices = [step[0] for step in recent_steps(engine, last, 1024, WALL_MS)["steps"]]
        assert all(b == a + 1 for a, b in pairwise(indices))
        num_asked += 1
        last = indices[-1] if indices else last
    thread.join()
    assert num_asked > 1
    assert recent_steps(engine, -1, 1, WALL_MS)["steps"][0][0] == engine.recorder.num_steps - 1
