"""sampler: against an oracle in plain python, and bit for bit alone and in company.

The oracle (``distribution``) says which tokens are left with which probabilities, by loops over lists in float64.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
import pytest
import torch

from serve_app.engine.request import GenerateRequest, SamplingParams, TokenLogprobs
from serve_app.engine.sequence import Sequence
from serve_app.errors import StepFailedError
from serve_app.runner import sampler as sampler_module
from serve_app.runner.sampler import Sampler, token_logprobs

EDGES = (2.0**-53, 1 - 2.0**-53)
"""The least and the largest uniform number there is."""


def make_sequence(
    prompt: Iterable[int] = (1, 2),
    output: Iterable[int] = (),
    *,
    slot: int = 0,
    choice_index: int = 0,
    stop_ids: Iterable[int] = (),
    request_id: str = "r",
    **sampling: Any,
) -> Sequence:
    params = SamplingParams(**{"max_tokens": 100, "seed": 11, **sampling}).resolved()
    request = GenerateRequest(request_id, tuple(prompt), params, tuple(output), choice_index)
    return make_choice(request, slot=slot, stop_ids=stop_ids)


def make_choice(request: GenerateRequest, *, slot: int = 0, stop_ids: Iterable[int] = ()) -> Sequence:
    sequence = Sequence(request, arrival=0, max_output_tokens=100, stop_ids=frozenset(stop_ids), deadline=None)
    sequence.slot = slot
    return sequence


def packed(mask: np.ndarray) -> np.ndarray:
    """int32 words of a bool [V], and one word more, as a mask with room for an end has."""
    bits = np.zeros((len(mask) // 32 + 2) * 32, dtype=np.bool_)
    bits[: len(mask)] = mask
    return np.packbits(bits, bitorder="little").view(np.int32)


def distribution(logits: list[float], sequence: Sequence, allowed: Iterable[int] | None = None) -> dict[int, float]:
    """Token id -> probability, in the order of ids, of the tokens that are left. Greedy: one token."""
    sampling = sequence.request.sampling
    output = sequence.token_ids[sequence.num_prompt_tokens :]
    left = dict(enumerate(logits))
    for allowed_ids in (sampling.allowed_token_ids, allowed):
        if allowed_ids is not None:
            left = {token: logit for token, logit in left.items() if token in set(allowed_ids)}
    if len(output) < sampling.min_tokens:
        without = {token: logit for token, logit in left.items() if token not in sequence.stop_ids}
        left = without or left
    for token in left:
        left[token] += (sampling.logit_bias or {}).get(token, 0.0)
        if token in sequence.token_ids:
            left[token] *= sampling.repetition_penalty if left[token] <= 0 else 1 / sampling.repetition_penalty
        left[token] -= sampling.frequency_penalty * output.count(token)
        left[token] -= sampling.presence_penalty * (token in output)
    ranked = sorted(left, key=lambda token: (-left[token], token))
    if sampling.temperature == 0:
        return {ranked[0]: 1.0}
    weights = {token: math.exp((left[token] - left[ranked[0]]) / sampling.temperature) for token in ranked}
    weights = {token: weight for token, weight in weights.items() if weight >= sampling.min_p}
    if sampling.top_k > 0:
        weights = dict(itertools.islice(weights.items(), min(sampling.top_k, len(weights))))
    reached, total, kept = 0.0, sum(weights.values()), {}
    for token, weight in weights.items():
        if sampling.top_p < 1 and reached >= sampling.top_p * total:
            break
        kept[token] = weight
        reached += weight
    return {token: kept[token] / reached for token in sorted(kept)}


def draw_at(
    monkeypatch: pytest.MonkeyPatch, logits_V: torch.Tensor, sequence: Sequence, uniforms: Iterable[float], **more: Any
) -> list[int]:
    """The tokens of one row at chosen uniform numbers, in one batch."""
    values = list(uniforms)
    monkeypatch.setattr(sampler_module, "uniform", lambda seeds, choices, positions: np.array(values))
    sampler = Sampler(len(logits_V), 1)
    result = sampler.sample(logits_V.expand(len(values), -1), [sequence] * len(values), **more)
    monkeypatch.undo()
    return result.token_ids


def random_logits(*shape: int, seed: int = 0, scale: float = 3.0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale


COMBINATIONS: dict[str, dict[str, Any]] = {
    "temperature": {"temperature": 1.0},
    "cold": {"temperature": 0.3},
    "hot": {"temperature": 5.0},
    "min_p": {"temperature": 1.3, "min_p": 0.07},
    "top_k": {"temperature": 1.3, "top_k": 7},
    "top_p": {"temperature": 1.3, "top_p": 0.8},
    "top_k and top_p": {"temperature": 1.3, "top_k": 9, "top_p": 0.7},
    "all three": {"temperature": 2.0, "top_k": 20, "top_p": 0.9, "min_p": 0.05},
    "min_p and top_p": {"temperature": 2.0, "top_p": 0.9, "min_p": 0.05},
    "top_k beyond the vocabulary": {"temperature": 1.0, "top_k": 10**30},
    "flat top_p": {"temperature": 100.0, "top_p": 0.95},
    "bias and penalties": {
        "temperature": 1.0,
        "logit_bias": {3: 4.0, 60: -5.0, 5: 2.5},
        "repetition_penalty": 1.7,
        "frequency_penalty": 0.6,
        "presence_penalty": -1.1,
    },
    "allowed tokens": {"temperature": 1.0, "allowed_token_ids": (0, 5, 6, 17, 66), "top_p": 0.95},
    "min_tokens": {"temperature": 1.0, "min_tokens": 9, "top_k": 12},
}


@pytest.mark.parametrize("vocab_size", [67, 257, 16_451])
@pytest.mark.parametrize("name", COMBINATIONS)
def test_the_inverse_cdf_is_the_oracles(monkeypatch: pytest.MonkeyPatch, name: str, vocab_size: int) -> None:
    """Away from the CDF's steps (by 1e-6) the sampled token is the one that the exact distribution puts there."""
    logits_V = random_logits(vocab_size, seed=vocab_size)
    best = int(logits_V.argmax())
    sequence = make_sequence((3, 5, 9), (5, 60, 5, best), stop_ids=(best, 8), **COMBINATIONS[name])
    expected = distribution(logits_V.tolist(), sequence)
    assert len(expected) > 1
    edges = np.cumsum([0.0, *expected.values()])
    uniforms = [u for u in (np.arange(400) + 0.37) / 400 if np.abs(edges - u).min() > 1e-6]
    assert len(uniforms) > 300
    wanted = [list(expected)[np.searchsorted(edges, u, side="right") - 1] for u in uniforms]
    assert draw_at(monkeypatch, logits_V, sequence, uniforms) == wanted


@pytest.mark.parametrize("name", COMBINATIONS)
def test_draws_follow_the_distribution(name: str) -> None:
    """Chi-square over 20,000 draws with real random numbers: 20 seeds, 1,000 choices each."""
    logits_V = random_logits(67, seed=1)
    sampler = Sampler(67, 1)
    observed = np.zeros(67)
    for seed in range(2**63, 2**63 + 20):
        first = make_sequence((3, 5, 9), (5, 60, 5), stop_ids=(8,), **COMBINATIONS[name] | {"seed": seed})
        choices = [
            make_choice(dataclasses.replace(first.request, choice_index=choice_index), stop_ids=(8,))
            for choice_index in range(1_000)
        ]
        tokens = sampler.sample(logits_V.expand(1_000, -1), choices).token_ids
        observed += np.bincount(tokens, minlength=67)
    assert observed.sum() == 20_000
    expected = distribution(logits_V.tolist(), first)
    due = np.array([20_000 * expected.get(token, 0.0) for token in range(67)])
    assert not observed[due == 0].any()
    common = due >= 5
    pairs = [*zip(observed[common], due[common], strict=True), (observed[~common].sum(), due[~common].sum())]
    chi_square = sum((seen - wanted) ** 2 / wanted for seen, wanted in pairs if wanted > 0)
    freedom = max(1, int(common.sum()) - 1)
    assert chi_square < freedom + 5 * math.sqrt(2 * freedom) + 5


def test_the_example_of_the_docstring(monkeypatch: pytest.MonkeyPatch) -> None:
    logits_V = torch.tensor([4.0, 3.0, 2.0, 1.0]).log()
    sequence = make_sequence(temperature=1.0, top_k=3, top_p=0.7)
    assert distribution(logits_V.tolist(), sequence) == pytest.approx({0: 4 / 7, 1: 3 / 7})
    assert draw_at(monkeypatch, logits_V, sequence, [0.6, 0.57, *EDGES]) == [1, 0, 0, 1]


# ------------------------------------------------------------------------------------------------------ company


def mixed_company(vocab_size: int, num_rows: int) -> list[Sequence]:
    """Rows of every kind, with every kind of neighbour."""
    kinds: list[dict[str, Any]] = [
        {"temperature": 0.0},
        {"temperature": 1.0},
        {"temperature": 0.7, "top_k": 50, "top_p": 0.9},
        {"temperature": 1.5, "top_p": 0.9},
        {"temperature": 1.0, "top_k": 3, "logprobs": 4},
        {"temperature": 2.0, "min_p": 0.02, "logprobs": 0},
        {"temperature": 1.0, "repetition_penalty": 1.3, "frequency_penalty": 0.5, "top_k": 200},
        {"temperature": 30.0, "top_p": 0.97, "logprobs": 20},
        {"temperature": 1.0, "top_k": 300, "presence_penalty": 1.0},
        {"temperature": 1.0, "allowed_token_ids": tuple(range(5, 205, 7)), "top_p": 0.99},
        {"temperature": 0.0, "logit_bias": {7: 3.0}, "min_tokens": 30, "logprobs": 2},
        {"temperature": 1.0, "top_k": 1},
    ]
    random = np.random.default_rng(vocab_size)
    return [
        make_sequence(
            random.integers(vocab_size, size=5 + row).tolist(),
            random.integers(vocab_size, size=row % 9).tolist(),
            slot=row,
            choice_index=row % 3,
            stop_ids=(1, 2),
            request_id=f"r{row}",
            **kinds[row % len(kinds)] | {"seed": 1_000 + row},
        )
        for row in range(num_rows)
    ]


@pytest.mark.parametrize("num_threads", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("vocab_size", [257, 32_003])
def test_a_row_draws_the_same_alone_and_in_company(
    monkeypatch: pytest.MonkeyPatch, vocab_size: int, dtype: torch.dtype, num_threads: int
) -> None:
    """Also when the work arrays hold two rows only. bfloat16 makes ties at every cut."""
    torch.set_num_threads(num_threads)
    company = mixed_company(vocab_size, 65)
    logits_SV = random_logits(65, vocab_size, seed=2).to(dtype)
    together = Sampler(vocab_size, 65).sample(logits_SV, company)
    backwards = Sampler(vocab_size, 65).sample(logits_SV.flip(0), company[::-1])
    assert backwards.token_ids == together.token_ids[::-1]
    with monkeypatch.context() as patch:
        patch.setattr(sampler_module, "MAX_WEIGHTS", 2 * vocab_size)
        assert Sampler(vocab_size, 65).sample(logits_SV, company) == together
    torch.set_num_threads(1)
    sampler = Sampler(vocab_size, 65)
    for row, sequence in enumerate(company):
        alone = sampler.sample(logits_SV[row : row + 1], [sequence])
        assert alone.token_ids == [together.token_ids[row]]
        assert alone.logprobs.get(0) == together.logprobs.get(row)
    assert len(together.logprobs) > 20


@pytest.mark.parametrize("vocab_size", [257, 32_003])
def test_the_bits_behind_a_draw_do_not_depend_on_the_batch(vocab_size: int) -> None:
    """Equal tokens could hide unequal sums: compare weights, running sums and maxima themselves."""
    logits_SV = random_logits(65, vocab_size, seed=3)
    temperature, min_p = np.linspace(0.3, 2, 65), np.linspace(0, 0.1, 65)
    torch.set_num_threads(2)
    rows = sampler_module._Rows.of(logits_SV)
    weights, sums = sampler_module._weights(rows, temperature, min_p)
    for num_threads, row in itertools.product((1, 2), range(65)):
        torch.set_num_threads(num_threads)
        part = slice(row, row + 1)
        alone = sampler_module._Rows.of(logits_SV[part])
        weights_alone, sums_alone = sampler_module._weights(alone, temperature[part], min_p[part])
        np.testing.assert_array_equal(weights_alone[0], weights[row])
        np.testing.assert_array_equal(sums_alone[0], sums[row])
        np.testing.assert_array_equal(alone.maxima_RN[0], rows.maxima_RN[row])


@pytest.mark.parametrize(
    "settings", [{"top_k": 40}, {"top_p": 0.6}, {"top_k": 90, "top_p": 0.9, "min_p": 0.001}], ids=str
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_few_candidates_and_the_whole_row_give_the_same(dtype: torch.dtype, settings: dict[str, Any]) -> None:
    vocab_size = 20_011
    rows = sampler_module._Rows.of(random_logits(33, vocab_size, seed=4).to(dtype).float())
    company = [make_sequence(temperature=0.8, **settings | {"seed": seed}) for seed in range(33)]
    draws = sampler_module._Draws.of(company)
    whole = sampler_module._draw_from_leaders(rows, draws, vocab_size)
    nums_settled = []
    for num_leaders in (2, 20, 40, 64, 130, 4_096):
        few = sampler_module._draw_from_leaders(rows, draws, num_leaders)
        settled = few >= 0
        np.testing.assert_array_equal(few[settled], whole[settled])
        nums_settled.append(int(settled.sum()))
    assert nums_settled[0] < 33
    assert nums_settled[-1] == 33
    np.testing.assert_array_equal(sampler_module._draw(rows, draws), whole)


def test_choices_positions_and_seeds_draw_other_tokens() -> None:
    logits_SV = torch.zeros(100, 50_021)
    sampler = Sampler(50_021, 1)

    def tokens(make: Callable[[int], Sequence]) -> set[int]:
        return set(sampler.sample(logits_SV, [make(i) for i in range(100)]).token_ids)

    assert len(tokens(lambda i: make_sequence(temperature=1.0, choice_index=i))) > 90
    assert len(tokens(lambda i: make_sequence(temperature=1.0, output=range(i)))) > 90
    assert len(tokens(lambda i: make_sequence(temperature=1.0, seed=i))) > 90
    assert len(tokens(lambda i: make_sequence(temperature=1.0, output=[i], slot=0))) == 1


def test_a_replayed_sequence_goes_on_with_the_same_numbers() -> None:
    """Four tokens in one go, and after a failover that brings the first two as output of an earlier attempt."""
    logits_SV = random_logits(1, 257, seed=5)
    settings: dict[str, Any] = {
        "temperature": 2.0,
        "frequency_penalty": 1.0,
        "repetition_penalty": 1.2,
        "min_tokens": 3,
    }

    def go_on(sequence: Sequence, upto: int) -> list[int]:
        sampler = Sampler(257, 1)
        while sequence.num_output_tokens < upto:
            sequence.token_ids += sampler.sample(logits_SV, [sequence]).token_ids
        return sequence.token_ids[sequence.num_prompt_tokens :]

    straight = go_on(make_sequence(stop_ids=(5,), **settings), 40)
    assert go_on(make_sequence(output=straight[:2], stop_ids=(5,), **settings), 40) == straight
    assert len(set(straight)) > 5


# ----------------------------------------------------------------------------------------- greedy, ties, extremes


@pytest.mark.parametrize("vocab_size", [1, 5, 63, 64, 65, 257, 4_099])
def test_greedy_takes_the_first_of_equals(vocab_size: int) -> None:
    logits_SV = torch.full((3, vocab_size), -1.0)
    logits_SV[1, vocab_size // 2 :] = 2.0
    logits_SV[2, -1] = 2.0
    company = [make_sequence(temperature=0.0, slot=row) for row in range(3)]
    assert Sampler(vocab_size, 3).sample(logits_SV, company).token_ids == [0, vocab_size // 2, vocab_size - 1]


def test_top_k_one_is_greedy_also_among_equals(monkeypatch: pytest.MonkeyPatch) -> None:
    logits_V = random_logits(9_001, seed=6).bfloat16()
    logits_V[[700, 800, 8_999]] = logits_V.max() + 1
    for temperature in (0.9, 1.0, 99.0):
        assert draw_at(monkeypatch, logits_V, make_sequence(temperature=temperature, top_k=1), EDGES) == [700, 700]


def test_top_k_keeps_exactly_k_of_equals_and_the_lowest_ids(monkeypatch: pytest.MonkeyPatch) -> None:
    logits_V = torch.zeros(9_001)
    logits_V[4_000] = 1.0
    logits_V[5] = -0.0  # equal to 0.0 as a number, not as bits
    uniforms = (np.arange(100) + 0.5) / 100
    tokens = draw_at(monkeypatch, logits_V, make_sequence(temperature=5.0, top_k=8), uniforms)
    assert set(tokens) == {0, 1, 2, 3, 4, 5, 6, 4_000}
    assert tokens == sorted(tokens)


@pytest.mark.parametrize(
    "settings", [{"top_p": 1e-9}, {"top_p": 1e-300, "top_k": 5}, {"min_p": 1.0}, {"top_k": 1}], ids=str
)
def test_the_tightest_truncation_leaves_the_best_token(
    monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any]
) -> None:
    logits_V = random_logits(5_003, seed=7)
    best = int(logits_V.argmax())
    uniforms = (*EDGES, 0.5)
    assert draw_at(monkeypatch, logits_V, make_sequence(temperature=3.0, **settings), uniforms) == [best] * 3


def test_min_p_of_one_keeps_all_equals_of_the_best(monkeypatch: pytest.MonkeyPatch) -> None:
    logits_V = torch.tensor([0.0, 2.0, 1.0, 2.0])
    assert draw_at(monkeypatch, logits_V, make_sequence(temperature=1.0, min_p=1.0), [0.49, 0.51]) == [1, 3]


@pytest.mark.parametrize("settings", [{}, {"top_p": 0.9999999999}, {"top_k": 256}, {"min_p": 1e-12}], ids=str)
@pytest.mark.parametrize("vocab_size", [70, 3_001])
def test_extreme_numbers_never_reach_an_impossible_token(
    monkeypatch: pytest.MonkeyPatch, vocab_size: int, settings: dict[str, Any]
) -> None:
    """The first and last tokens are masked, the ones beside them have hardly any weight."""
    logits_V = torch.zeros(vocab_size)
    logits_V[[1, -2]] = -60.0
    mask = np.ones(vocab_size, dtype=bool)
    mask[[0, -1]] = False
    sequence = make_sequence(temperature=1.0, **settings)
    tokens = draw_at(monkeypatch, logits_V, sequence, EDGES, masks={0: packed(mask), 1: packed(mask)})
    least, most = tokens
    assert least in (1, 2)
    # 256 of these equals by lowest id are tokens 2 to 257.
    assert most in ((vocab_size - 3, vocab_size - 2) if settings.get("top_k", vocab_size) >= vocab_size else (257,))


@pytest.mark.parametrize("temperature", [1e-4, 1e-30, 5e-324, 100.0])
def test_extreme_temperatures(monkeypatch: pytest.MonkeyPatch, temperature: float) -> None:
    logits_V = torch.tensor([1e4, -1e4, 1e4 - 1, -3e38])
    tokens = draw_at(monkeypatch, logits_V, make_sequence(temperature=temperature), EDGES)
    assert tokens == ([0, 2] if temperature > 1 else [0, 0])


def test_the_logits_stay_as_they_were_and_no_rows_is_fine() -> None:
    logits_SV = random_logits(24, 257, seed=8)
    before = logits_SV.clone()
    Sampler(257, 24).sample(logits_SV, mixed_company(257, 24), {1: packed(np.arange(257) < 9)})
    assert torch.equal(logits_SV, before)
    assert Sampler(257, 1).sample(torch.empty(0, 257), []) == ([], {})


# ------------------------------------------------------------------------------------------- masks, stops, penalties


def test_masks_and_allowed_tokens_are_intersected() -> None:
    logits_SV = torch.arange(10.0).expand(3, -1)
    company = [
        make_sequence(temperature=0.0, slot=0),
        make_sequence(temperature=0.0, slot=1, allowed_token_ids=(2, 4, 6)),
        make_sequence(temperature=0.0, slot=2, allowed_token_ids=(2, 4, 6)),
    ]
    masks = {0: packed(np.arange(10) < 8), 2: packed(np.arange(10) < 5)}
    assert Sampler(10, 3).sample(logits_SV, company, masks).token_ids == [7, 6, 4]


def test_a_mask_row_samples_among_its_tokens_only() -> None:
    random = np.random.default_rng(1)
    logits_SV = random_logits(65, 1_003, seed=9)
    masks = {row: random.random(1_003) < 0.01 for row in range(0, 65, 2)}
    for mask in masks.values():
        mask[77] = True
    kinds: list[dict[str, Any]] = [{}, {"top_k": 40}, {"top_p": 0.95}, {"top_k": 3, "top_p": 0.5}, {"min_p": 0.1}]
    company = [
        make_sequence(slot=row, **{"temperature": 9.0, "seed": row} | kinds[row // 2 % len(kinds)]) for row in range(65)
    ]
    words = {row: packed(mask) for row, mask in masks.items()}
    tokens = Sampler(1_003, 65).sample(logits_SV, company, words).token_ids
    for row, mask in masks.items():
        assert tokens[row] in distribution(logits_SV[row].tolist(), company[row], np.flatnonzero(mask).tolist())
    without = Sampler(1_003, 65).sample(logits_SV, company).token_ids
    assert [tokens[row] for row in range(1, 65, 2)] == [without[row] for row in range(1, 65, 2)]
    assert tokens != without


def test_stop_ids_wait_for_min_tokens() -> None:
    logits_SV = torch.tensor([[0.0, 5.0, 4.0, 3.0]])
    sampler = Sampler(4, 1)
    sequence = make_sequence(temperature=0.0, min_tokens=2, stop_ids=(1, 2, 99), prompt=(0,) * 7)
    tokens = []
    for _ in range(3):
        tokens += sampler.sample(logits_SV, [sequence]).token_ids
        sequence.token_ids.append(tokens[-1])
    assert tokens == [3, 3, 1]


def test_stop_ids_stay_where_nothing_else_is_allowed() -> None:
    logits_SV = torch.tensor([[0.0, 5.0, 4.0, 3.0]])
    sequence = make_sequence(temperature=0.0, min_tokens=9, stop_ids=(1, 2))
    mask = np.array([False, True, True, False])
    assert Sampler(4, 1).sample(logits_SV, [sequence], {0: packed(mask)}).token_ids == [1]
    assert Sampler(4, 1).sample(logits_SV, [sequence], {0: packed(~mask)}).token_ids == [3]


def test_logit_bias_can_force_and_forbid() -> None:
    logits_SV = torch.tensor([[0.0, 5.0, 4.0, 3.0]]).expand(3, -1)
    biases: list[Mapping[int, float]] = [{0: 100.0}, {1: -100.0}, {1: -1.5, 3: 1.25}]
    company = [make_sequence(temperature=0.0, slot=row, logit_bias=bias) for row, bias in enumerate(biases)]
    assert Sampler(4, 3).sample(logits_SV, company).token_ids == [0, 2, 3]


@pytest.mark.parametrize("seed", range(4))
def test_penalties_over_a_long_run_with_changing_slots(seed: int) -> None:
    """Sequences come, go, are preempted into another slot and share slots over time; the oracle counts anew each step."""
    random = np.random.default_rng(seed)
    vocab_size, num_slots = 41, 4
    sampler = Sampler(vocab_size, num_slots)
    running: dict[int, Sequence] = {}
    parked: list[Sequence] = []
    returned = 0
    for step in range(150):
        for slot in range(num_slots):
            if slot in running and random.random() < 0.1:
                leaving = running.pop(slot)
                if random.random() < 0.7:
                    parked.append(leaving)
            if slot not in running and parked and random.random() < 0.5:
                running[slot] = parked.pop()
                running[slot].slot = slot
                returned += 1
            elif slot not in running:
                running[slot] = make_sequence(
                    random.integers(vocab_size, size=random.integers(1, 9)).tolist(),
                    random.integers(vocab_size, size=random.integers(0, 5)).tolist(),
                    slot=slot,
                    temperature=0.0,
                    repetition_penalty=float(random.choice([1.0, 0.7, 1.5])),
                    frequency_penalty=float(random.choice([0.0, 0.5, -0.2])),
                    presence_penalty=float(random.choice([0.0, 0.9])),
                )
        company = [running[slot] for slot in random.permutation(sorted(running)).tolist()]
        logits_SV = random_logits(len(company), vocab_size, seed=1_000 * seed + step)
        tokens = sampler.sample(logits_SV, company).token_ids
        for row, sequence in enumerate(company):
            assert {tokens[row]: 1.0} == distribution(logits_SV[row].tolist(), sequence)
            sequence.token_ids.append(tokens[row])
    assert returned > 3


def test_a_slot_that_changed_hands_forgets_the_other_sequence() -> None:
    logits_SV = torch.tensor([[2.0, 1.9, 0.0]])
    sampler = Sampler(3, 1)
    for _ in range(3):
        assert sampler.sample(logits_SV, [make_sequence((2,), (0,), temperature=0.0, presence_penalty=1.0)])[0] == [1]
        assert sampler.sample(logits_SV, [make_sequence((2,), (1,), temperature=0.0, presence_penalty=1.0)])[0] == [0]


def test_a_sequence_that_became_shorter_is_counted_anew() -> None:
    logits_SV = torch.tensor([[2.0, 1.9, 0.0]])
    sampler = Sampler(3, 1)
    sequence = make_sequence((2,), (0, 2, 2), temperature=0.0, presence_penalty=1.0)
    assert sampler.sample(logits_SV, [sequence]).token_ids == [1]
    sequence.token_ids[1:] = [1]
    assert sampler.sample(logits_SV, [sequence]).token_ids == [0]


def test_more_distinct_tokens_than_the_first_arrays_hold() -> None:
    logits_SV = torch.zeros(1, 2_000)
    sequence = make_sequence(range(700), range(1_900), temperature=0.0, presence_penalty=1.0)
    assert Sampler(2_000, 1).sample(logits_SV, [sequence]).token_ids == [1_900]


# ---------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    "settings", [{"temperature": 0.0}, {"temperature": 1.0}, {"temperature": 1.0, "top_k": 5}], ids=str
)
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("place", [0, 100, 256])
def test_a_bad_row_is_named_and_the_others_go_on_without_it(value: float, place: int, settings: dict[str, Any]) -> None:
    logits_SV = random_logits(5, 257, seed=10)
    logits_SV[3, place] = value
    company = [make_sequence(slot=row, request_id=f"r{row}", choice_index=row, **settings) for row in range(5)]
    sampler = Sampler(257, 5)
    with pytest.raises(StepFailedError, match=rf"request r3 \(choice 3\) .*contain {value}"):
        sampler.sample(logits_SV, company)
    with pytest.raises(StepFailedError, match="request r3"):
        sampler.sample(logits_SV[3:4], company[3:4])
    others = [0, 1, 2, 4]
    assert len(sampler.sample(logits_SV[others], [company[row] for row in others]).token_ids) == 4


def test_a_nan_under_a_mask_is_found_too() -> None:
    logits_SV = torch.zeros(1, 9)
    logits_SV[0, 4] = math.nan
    with pytest.raises(StepFailedError, match="contain nan"):
        Sampler(9, 1).sample(logits_SV, [make_sequence(temperature=0.0)], {0: np.arange(9) < 3})


def test_a_row_that_allows_nothing_is_refused() -> None:
    company = [make_sequence(slot=row, request_id=f"r{row}", temperature=0.0) for row in range(2)]
    with pytest.raises(StepFailedError, match=r"request r1 .*allowed"):
        Sampler(9, 2).sample(torch.zeros(2, 9), company, {1: packed(np.zeros(9, dtype=bool))})
    with pytest.raises(StepFailedError, match=r"request r0 .*allowed"):
        Sampler(9, 2).sample(torch.full((2, 9), -math.inf), company)


@pytest.mark.parametrize("name", ["allowed_token_ids", "logit_bias"])
def test_a_token_id_beyond_the_vocabulary_is_refused(name: str) -> None:
    for token_id in (9, 10**30):
        value: Any = {token_id: 1.0} if name == "logit_bias" else (3, token_id)
        with pytest.raises(StepFailedError, match=rf"request r .*{name} has the token id {token_id}, .* has 9 tokens"):
            Sampler(9, 1).sample(torch.zeros(1, 9), [make_sequence(temperature=0.0, **{name: value})])


def test_an_absurd_penalty_refuses_its_request() -> None:
    with pytest.raises(StepFailedError, match="contain inf"):
        Sampler(9, 1).sample(torch.ones(1, 9), [make_sequence(temperature=0.0, repetition_penalty=1e-44)])


# -------------------------------------------------------------------------------------------------------- logprobs


def test_the_example_of_token_logprobs() -> None:
    (found,) = token_logprobs(torch.tensor([[1.0, 3.0]]).log(), [0], [1])
    assert found.logprob == pytest.approx(-1.3863, abs=1e-4)
    assert [token for token, _ in found.top] == [1]
    assert found.top[0][1] == pytest.approx(-0.2877, abs=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("vocab_size", [3, 257, 32_003])
def test_logprobs_against_float64(monkeypatch: pytest.MonkeyPatch, vocab_size: int, dtype: torch.dtype) -> None:
    """Some rows at a time. bfloat16 ties at every cut."""
    monkeypatch.setattr(sampler_module, "MAX_WEIGHTS", 17 * vocab_size)
    logits_RV = random_logits(130, vocab_size, seed=11).to(dtype)
    exact_RV = torch.log_softmax(logits_RV.double(), -1)
    token_ids = [(row * 7_919) % vocab_size for row in range(130)]
    num_top = [(0, 1, 5, 64)[row % 4] for row in range(130)]
    found = token_logprobs(logits_RV, token_ids, num_top)
    assert len(found) == 130
    for row, (token_id, logprob, top) in enumerate(found):
        assert token_id == token_ids[row]
        assert logprob == pytest.approx(exact_RV[row, token_id].item(), abs=2e-6)
        order = np.lexsort((np.arange(vocab_size), -logits_RV[row].float().numpy()))[: num_top[row]]
        assert [token for token, _ in top] == order.tolist()
        assert [value for _, value in top] == pytest.approx(exact_RV[row, order].tolist(), abs=2e-6)
        assert all(isinstance(value, float) for _, value in top)
        assert [logprob] == [value for token, value in top if token == token_id] or token_id not in order
    assert token_logprobs(logits_RV[7:8], token_ids[7:8], num_top[7:8]) == found[7:8]


def test_equals_at_every_cut_and_impossible_tokens_in_top() -> None:
    logits_RV = torch.zeros(2, 40_000)
    logits_RV[1, 7:] = -math.inf
    equal, few = token_logprobs(logits_RV, [39_999, 3], [9, 9])
    assert [token for token, _ in equal.top] == list(range(9))
    assert equal.logprob == pytest.approx(-math.log(40_000))
    assert few.top == tuple((token, pytest.approx(-math.log(7))) for token in range(7))


def test_output_logprobs_are_those_of_the_raw_logits() -> None:
    logits_SV = torch.tensor([[0.0, 5.0, 4.0, 3.0]]).expand(3, -1)
    company = [
        make_sequence(temperature=0.0, slot=0),
        make_sequence(temperature=0.0, slot=1, logprobs=2, logit_bias={0: 100.0}),
        make_sequence(temperature=3.0, slot=2, logprobs=0, top_k=1),
    ]
    tokens, logprobs = Sampler(4, 3).sample(logits_SV, company)
    assert tokens == [1, 0, 1]
    assert sorted(logprobs) == [1, 2]
    exact = torch.log_softmax(logits_SV[0].double(), -1).tolist()
    assert isinstance(logprobs[1], TokenLogprobs)
    assert logprobs[1].token_id == 0
    assert logprobs[1].logprob == pytest.approx(exact[0], abs=1e-6)
    assert [token for token, _ in logprobs[1].top] == [1, 2]
    assert logprobs[2] == (1, pytest.approx(exact[1], abs=1e-6), ())


def test_token_logprobs_refuses_nan() -> None:
    logits_RV = torch.zeros(70, 5)
    logits_RV[66, 2] = math.nan
    with pytest.raises(StepFailedError, match=r"row 66 .*nan"):
        token_logprobs(logits_RV, [0] * 70, [0] * 70)


def test_what_a_mask_leaves_out_weighs_nothing_and_costs_its_row_no_bits() -> None:
    generator = torch.Generator().manual_seed(7)
    logits = torch.randn(3, 1000, generator=generator) * 4
    masked = torch.rand(1000, generator=generator) < 0.5
    logits[1, masked] = -torch.inf
    logits[2, 640] = -105.0
    temperature = np.array([1.0, 0.7, 1.0])
    rows = sampler_module._Rows.of(logits)
    weights, sums = sampler_module._weights(rows, temperature, None)
    flat = weights.reshape(3, -1)[:, :1000]
    assert np.array_equal(flat[1] == 0, masked.numpy())
    assert flat[2, 640] == 0
    expected = np.exp((logits.double() - logits.double().amax(1, keepdim=True)).numpy() / temperature[:, None])
    assert np.allclose(flat, expected, rtol=1e-5, atol=1e-37)
    for row in range(3):
        one = sampler_module._Rows.of(logits[row : row + 1])
        alone, alone_sums = sampler_module._weights(one, temperature[row : row + 1], None)
        assert np.array_equal(alone[0], weights[row])
        assert np.array_equal(alone_sums[0], sums[row])
