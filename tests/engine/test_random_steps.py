"""Thousands of random steps: every invariant after each of them, every token against the oracle, every end once."""

from __future__ import annotations

import dataclasses

import pytest

from serve_app.engine import scheduler as scheduler_module
from tests.engine.harness import Totals, random_run

NUM_SEEDS = 100
"""For each of the four kinds of run: about ten thousand steps."""


@pytest.fixture(autouse=True)
def _few_skips(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that small runs reach the bound."""
    monkeypatch.setattr(scheduler_module, "MAX_SKIPS", 3)


@pytest.mark.parametrize("faults", [False, True], ids=["no faults", "steps that fail"])
@pytest.mark.parametrize("steps_in_flight", [1, 2], ids=["one step in flight", "two steps in flight"])
def test_random_traffic_keeps_every_invariant_and_every_token(steps_in_flight: int, faults: bool) -> None:
    """add, abort, finish, preempt, expire, replay, fail: see harness.Watched for what is checked at each step."""
    totals = Totals()
    for seed in range(NUM_SEEDS):
        try:
            random_run(seed, steps_in_flight, totals, faults=faults)
        except AssertionError as error:
            error.add_note(f"random_run({seed}, {steps_in_flight}, faults={faults})")
            raise
    assert totals.num_steps > 7000
    exercised = dataclasses.asdict(totals)
    assert faults == (exercised.pop("num_failed") > 0)
    assert all(num > 0 for num in exercised.values()), f"not exercised: {totals}"
    assert totals.num_preemptions > 100
    assert totals.num_recomputed_tokens > 100
    assert totals.num_prefix_hits > 100
    assert totals.num_passed_over > 100


def test_a_run_is_a_function_of_its_seed() -> None:
    runs = [random_run(5, 2) for _ in range(2)]
    assert runs[0].plans == runs[1].plans
    assert runs[0].tokens == runs[1].tokens
