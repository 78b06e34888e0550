"""What the ledger learns, against what it was fed."""

from __future__ import annotations

import random

import pytest

from serve_app.routing.estimates import (
    MIN_DRAINED,
    MIN_LENGTHS,
    MIN_SERVED,
    NUM_LENGTHS,
    DrainRate,
    OutputLengths,
    ServiceTime,
)


def test_service_time_is_a_line_over_the_length() -> None:
    rng = random.Random(0)
    service = ServiceTime()
    for i in range(200):
        assert (service.expected(10) is None) == (i < MIN_SERVED)
        length = rng.randint(1, 400)
        service.add(length, 0.3 + 0.02 * length + rng.uniform(-0.1, 0.1))
    for length in (1, 100, 400, 1000):
        assert service.expected(length) == pytest.approx(0.3 + 0.02 * length, abs=0.2)


def test_answers_of_one_length_teach_no_slope() -> None:
    service = ServiceTime()
    for _ in range(100):
        service.add(32, 1.6)
    assert service.expected(32) == pytest.approx(1.6)
    assert service.expected(3200) == pytest.approx(1.6)


def test_longer_answers_are_never_expected_to_take_less_and_none_takes_less_than_nothing() -> None:
    service = ServiceTime()
    for _ in range(20):
        service.add(10, 5.0)
        service.add(100, 1.0)
    assert service.expected(1000) == service.expected(1) == pytest.approx(3.0, abs=0.1)
    for _ in range(300):
        service.add(900, 9.0)
        service.add(1000, 30.0)
    assert service.expected(1) == 0.0


def test_service_time_follows_the_machine() -> None:
    service = ServiceTime()
    for _ in range(300):
        service.add(50, 1.0)
    for _ in range(200):
        service.add(50, 3.0)
    assert service.expected(50) == pytest.approx(3.0, rel=0.05)


def test_an_answer_without_output_books_none() -> None:
    """An embedding has a prompt and no output."""
    lengths = OutputLengths()
    assert lengths.expected(0) == 0
    for _ in range(MIN_LENGTHS):
        lengths.add(5, 10)
    assert lengths.expected(0) == 0
    assert lengths.expected(10) == 5


def test_the_drain_rate_has_no_bias_at_its_start() -> None:
    rate = DrainRate()
    assert rate.tokens_per_second is None
    for i in range(10):
        rate.elapse(0.1)
        rate.add(50)
        assert (rate.tokens_per_second is None) == (i + 1 < MIN_DRAINED)
    assert rate.tokens_per_second == pytest.approx(500, rel=0.06)


def test_expected_lengths_are_a_high_quantile_of_what_finished() -> None:
    lengths = OutputLengths()
    for i in range(MIN_LENGTHS - 1):
        lengths.add(i, 1000)
    assert lengths.expected(700) == 700
    for i in range(1000):
        lengths.add(i % 100, 200 if i % 2 else 1000)
    assert len(lengths) == NUM_LENGTHS == len(lengths._lengths) == len(lengths._shares)
    assert lengths.expected(1000) == pytest.approx(90, abs=2)
    assert lengths.expected(50) < 50
    assert lengths.expected(1) == 1
    for _ in range(600):
        lengths.add(64, 64)
    assert lengths.expected(40) == 40
    assert lengths.expected(4000) == 64
