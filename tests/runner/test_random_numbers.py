"""random_numbers: the published known answers, the range, and that each of the three arguments matters."""

from __future__ import annotations

import numpy as np
import pytest

from serve_app.runner.random_numbers import philox, uniform

# kat_vectors of Random123, "philox 4 32 10".
KNOWN_ANSWERS = {
    "zeros": ([0] * 4, [0] * 2, "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    "ones": ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    "pi": (
        [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
        [0xA4093822, 0x299F31D0],
        "d16cfe09 94fdcceb 5001e420 24126ea1",
    ),
}


@pytest.mark.parametrize("name", KNOWN_ANSWERS)
def test_philox_gives_the_known_answers(name: str) -> None:
    counter, key, expected = KNOWN_ANSWERS[name]
    words = philox(np.array([counter], dtype=np.uint32), np.array([key], dtype=np.uint32))
    assert words.dtype == np.uint32
    assert " ".join(f"{word:08x}" for word in words[0]) == expected


def test_rows_do_not_depend_on_each_other() -> None:
    counters = np.array([counter for counter, _, _ in KNOWN_ANSWERS.values()], dtype=np.uint32)
    keys = np.array([key for _, key, _ in KNOWN_ANSWERS.values()], dtype=np.uint32)
    for row, (_, _, expected) in enumerate(KNOWN_ANSWERS.values()):
        assert " ".join(f"{word:08x}" for word in philox(counters, keys)[row]) == expected


def test_the_docstring_example_and_its_parts() -> None:
    (value,) = uniform([0], [0], [0]).tolist()
    assert value == 0.3990464708489646
    assert value == ((0x6627E8D5E169C58D >> 12) + 0.5) / 2**52


def test_every_number_is_inside_the_open_interval(monkeypatch: pytest.MonkeyPatch) -> None:
    for word, expected in ((0, 2.0**-53), (0xFFFFFFFF, 1 - 2.0**-53)):
        monkeypatch.setattr(
            "serve_app.runner.random_numbers.philox",
            lambda counter, key, word=word: np.full((len(counter), 4), word, dtype=np.uint32),
        )
        assert uniform([1], [2], [3]).tolist() == [expected]
        assert 0.0 < expected < 1.0


def test_the_key_is_the_seed_and_the_counter_is_position_and_choice() -> None:
    seed, choice, position = 0xA4093822_299F31D0, 7, 4_000_000_000
    words = philox(
        np.array([[position, choice, 0, 0]], dtype=np.uint32), np.array([[0x299F31D0, 0xA4093822]], dtype=np.uint32)
    )[0]
    expected = ((((int(words[0]) << 32) | int(words[1])) >> 12) + 0.5) / 2**52
    assert uniform([seed], [choice], [position]).tolist() == [expected]


def test_seed_choice_and_position_all_matter() -> None:
    seeds = [0, 1, 2**32, 2**64 - 1]
    arguments = [(seed, choice, position) for seed in seeds for choice in range(5) for position in range(7)]
    values = uniform(
        np.array([seed for seed, _, _ in arguments], dtype=np.uint64),
        [choice for _, choice, _ in arguments],
        [position for _, _, position in arguments],
    )
    assert len(set(values.tolist())) == len(arguments)


def test_no_rows() -> None:
    assert uniform([], [], []).shape == (0,)


@pytest.mark.parametrize("axis", ["seed", "choice", "position"])
def test_the_numbers_are_uniform_along_each_argument(axis: str) -> None:
    steps, same = np.arange(20_000), np.full(20_000, 3)
    values = uniform(*(steps if name == axis else same for name in ("seed", "choice", "position")))
    observed = np.bincount((values * 100).astype(int), minlength=100)
    assert ((observed - 200.0) ** 2 / 200.0).sum() < 170  # 99 degrees of freedom: 5 standard deviations
    assert abs(np.corrcoef(values[:-1], values[1:])[0, 1]) < 0.03
