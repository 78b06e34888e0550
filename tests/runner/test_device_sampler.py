"""device_sampler, its kernels in the interpreter: against its twin, against the CPU sampler, and bit for bit in company.

Few rows and one or two blocks each: a program of the interpreter takes tens of milliseconds.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import pytest
import torch
import triton
import triton.language as tl

from serve_app.engine.sequence import Sequence
from serve_app.errors import StepFailedError
from serve_app.kernels import sampling as kernels, sampling_cut, sampling_edits, sampling_rows
from serve_app.runner import sampler as cpu
from serve_app.runner.device_sampler import DeviceSampler, SampledStep
from tests.runner import sampling_twin as twin
from tests.runner.test_sampler import COMBINATIONS, distribution, make_sequence, packed, random_logits

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
"""The interpreter's device is "cpu" (tests/conftest.py)."""


def blocks(patch: pytest.MonkeyPatch, size: int, capacity: int = 8192) -> None:
    """Blocks of ``size`` tokens, in samplers that are made from now on."""
    patch.setattr(sampling_rows, "CHUNK", size)
    patch.setattr(sampling_rows, "BLOCK", size)
    patch.setattr(sampling_rows, "CAPACITY", capacity)


@pytest.fixture(autouse=True)
def _blocks_of_512(monkeypatch: pytest.MonkeyPatch) -> None:
    blocks(monkeypatch, 512)


def sample(
    sampler: DeviceSampler,
    logits_SV: torch.Tensor,
    company: list[Sequence],
    masks: Mapping[int, np.ndarray] | None = None,
    **more: Any,
) -> SampledStep:
    plan = sampler.prepare(company, masked=masks or (), **more)
    if masks:
        plan.take_masks(masks)
    return sampler.sample(logits_SV.to(DEVICE), plan)


def kept_sets(logits_SV: torch.Tensor, company: list[Sequence]) -> list[set[int]]:
    """What the cut and min_p leave of each row."""
    num, vocab_size = logits_SV.shape
    sampler = DeviceSampler(vocab_size, num, DEVICE)
    sample(sampler, logits_SV, company)
    sets = []
    for row, sequence in enumerate(company):
        sampling = sequence.request.sampling
        cut, last_equal = sampler._scratch.cuts[row].tolist()
        logits = (logits_SV[row].float() + 0.0).numpy()
        bits = logits.view(np.uint32)
        keys = np.where(bits >> 31 != 0, ~bits, bits | np.uint32(0x80000000))
        kept = (keys > np.uint32(cut & 0xFFFFFFFF)) | (
            (keys == np.uint32(cut & 0xFFFFFFFF)) & (np.arange(vocab_size) <= last_equal)
        )
        weights = np.exp((logits - logits.max()) * np.float32(1 / sampling.temperature))
        sets.append(set(np.flatnonzero(kept & (weights >= sampling.min_p)).tolist()))
    return sets


# --------------------------------------------------------------------------------------------------- random numbers


@triton.jit
def _numbers_kernel(p_params, p_out, BLOCK: tl.constexpr):
    first = tl.program_id(0) * BLOCK
    tl.store(p_out + first + tl.arange(0, BLOCK), kernels._exponentials(p_params, first, BLOCK))


def device_numbers(seed: int, choice: int, position: int, num: int, block: int) -> torch.Tensor:
    sequence = make_sequence(range(position), temperature=1.0, seed=seed, choice_index=choice)
    plan = DeviceSampler(1000, 1, DEVICE).prepare([sequence])
    out = torch.empty(num, device=DEVICE)
    _numbers_kernel[(num // block,)](torch.from_numpy(plan.rows).to(DEVICE), out, BLOCK=block)
    return out.cpu()


@pytest.mark.parametrize(("seed", "choice", "position"), [(0, 0, 1), (2**64 - 1, 127, 9), (0xA4093822_299F31D0, 7, 3)])
def test_the_numbers_are_the_twins_whatever_the_block(seed: int, choice: int, position: int) -> None:
    in_blocks = [device_numbers(seed, choice, position, 4096, block) for block in (4096, 1024)]
    assert torch.equal(*in_blocks)
    np.testing.assert_allclose(in_blocks[0], twin.exponentials(seed, [choice], [position], 4096)[0], rtol=2e-5)


def test_the_numbers_are_standard_exponential_and_words_of_a_counter_independent() -> None:
    """Chi-square over 64 equally likely cells, and over 8 x 8 cells of neighbours."""
    numbers = twin.exponentials(5, range(40), [3] * 40, 4096).astype(np.float64)
    assert numbers.min() > 0
    cells = np.floor(-np.expm1(-numbers) * 64).astype(int)
    seen = np.bincount(cells.ravel(), minlength=64)
    assert chi_square(seen, np.full(64, numbers.size / 64)) < 63 + 5 * math.sqrt(2 * 63)
    for distance in (1, 2, 3, 4):
        pairs = (cells[:, :-distance] // 8) * 8 + cells[:, distance:] // 8
        seen = np.bincount(pairs.ravel(), minlength=64)
        assert chi_square(seen, np.full(64, pairs.size / 64)) < 63 + 5 * math.sqrt(2 * 63)


def test_the_least_and_the_largest_word_give_finite_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    for word, expected in ((0, 2.0**-33), (0xFFFFFFFF, 33 * math.log(2))):
        words = np.full((1, 4), word, dtype=np.uint32)
        monkeypatch.setattr(twin, "philox", lambda counter, key, words=words: words)
        assert twin.exponentials(1, [0], [0], 4)[0].tolist() == pytest.approx([expected] * 4, rel=1e-6)


@functools.cache
def numbers_of_20_000_choices() -> np.ndarray:
    return twin.exponentials(2**63 + 1, range(20_000), [6] * 20_000, 67)


def chi_square(seen: np.ndarray, due: np.ndarray) -> float:
    return float(((seen - due) ** 2 / due).sum())


@pytest.mark.parametrize("name", COMBINATIONS)
def test_the_twin_follows_the_distribution(name: str) -> None:
    """Over 20,000 choices. That the kernels draw what the twin draws is the next test's matter."""
    logits_V = random_logits(67, seed=1)
    sequence = make_sequence((3, 5, 9), (5, 60, 5), stop_ids=(8,), **COMBINATIONS[name])
    expected = distribution(logits_V.tolist(), sequence)
    edited = twin.edited_logits(logits_V, sequence)
    temperature = sequence.request.sampling.temperature
    assert temperature
    weights = torch.exp((edited - edited.max()) * (1 / temperature)).numpy()
    weights[[token not in expected for token in range(67)]] = 0
    numbers = numbers_of_20_000_choices()
    seen = np.bincount((weights / numbers).argmax(axis=1), minlength=67)
    due = np.array([20_000 * expected.get(token, 0.0) for token in range(67)])
    assert not seen[due == 0].any()
    common = due >= 5
    rest = due[~common].sum()
    value = chi_square(seen[common], due[common]) + ((seen[~common].sum() - rest) ** 2 / rest if rest > 0 else 0)
    freedom = max(1, int(common.sum()) - 1)
    assert value < freedom + 5 * math.sqrt(2 * freedom) + 5


# ------------------------------------------------------------------------------------------------- draws, kept sets


def company_of_all_kinds(vocab_size: int, names: Iterable[str]) -> list[Sequence]:
    kinds: list[dict[str, Any]] = [{"temperature": 0.0}, *(COMBINATIONS[name] for name in names)]
    return [
        make_sequence(
            (3, 5, 9),
            (5, 60, 5, row % 3)[: row % 5],
            slot=row,
            stop_ids=(8, vocab_size - 1),
            request_id=f"r{row}",
            choice_index=row % 3,
            **{"seed": 2**40 + row} | kind,
        )
        for row, kind in enumerate(kinds)
    ]


SOME = ("hot", "all three", "bias and penalties")


@pytest.mark.parametrize(
    ("vocab_size", "dtype", "names"),
    [(600, torch.float32, COMBINATIONS), (257, torch.float16, SOME)],
    ids=["float32", "float16"],
)
def test_rows_of_all_kinds_draw_what_the_twin_draws(
    monkeypatch: pytest.MonkeyPatch, vocab_size: int, dtype: torch.dtype, names: Iterable[str]
) -> None:
    blocks(monkeypatch, 1024)
    company = company_of_all_kinds(vocab_size, names)
    logits_SV = random_logits(len(company), vocab_size, seed=vocab_size).to(dtype)
    before = logits_SV.clone()
    tokens = sample(DeviceSampler(vocab_size, 20, DEVICE), logits_SV, company).read().token_ids
    assert torch.equal(logits_SV, before)
    for row, sequence in enumerate(company):
        expected = distribution(logits_SV[row].tolist(), sequence)
        if sequence.request.sampling.temperature == 0:
            assert [tokens[row]] == [*expected]
        else:
            assert tokens[row] == twin.draw(logits_SV[row], sequence, expected)
    assert len(set(tokens)) > len(company) // 2


def test_the_shipped_blocks_draw_what_the_twin_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    kinds = [COMBINATIONS[name] for name in ("hot", "top_k and top_p", "allowed tokens")]
    company = [make_sequence(slot=row, **kind) for row, kind in enumerate(kinds)]
    logits_SV = random_logits(3, 4_099, seed=20)
    logits_SV[0, 4_096:] = 9.0
    tokens = sample(DeviceSampler(4_099, 3, DEVICE), logits_SV, company).read().token_ids
    for row, sequence in enumerate(company):
        assert tokens[row] == twin.draw(logits_SV[row], sequence, distribution(logits_SV[row].tolist(), sequence))


def test_a_row_has_the_same_bits_alone_in_company_and_in_other_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """bfloat16 makes ties at every cut. Other blocks may change the last bits of a log-probability, but no token."""
    kinds = ["hot", "top_k and top_p", "min_p and top_p", "bias and penalties"]
    company = [make_sequence((3, 5), (5,), slot=row, seed=row, **COMBINATIONS[name]) for row, name in enumerate(kinds)]
    logits_SV = random_logits(4, 600, seed=2).bfloat16()
    together, backwards, alone = (DeviceSampler(600, 9, DEVICE) for _ in range(3))
    tokens = sample(together, logits_SV, company).read().token_ids
    padded = torch.cat((logits_SV.flip(0), torch.full((2, 600), math.nan).bfloat16()))
    assert sample(backwards, padded, company[::-1], num_rows=6).read().token_ids == tokens[::-1]
    assert torch.equal(backwards._scratch.cuts[:4].flip(0), together._scratch.cuts[:4])
    assert torch.equal(backwards._scratch.scores[:4].flip(0), together._scratch.scores[:4])
    assert sample(alone, logits_SV[1:2], company[1:2]).read().token_ids == tokens[1:2]
    assert torch.equal(alone._scratch.scores[0], together._scratch.scores[1])
    blocks(monkeypatch, 1024, capacity=16)
    other = DeviceSampler(600, 9, DEVICE)
    assert sample(other, logits_SV, company).read().token_ids == tokens
    assert torch.equal(other._scratch.cuts[:4], together._scratch.cuts[:4])


TRUNCATIONS: dict[str, dict[str, Any]] = {
    "k": {"top_k": 40},
    "p": {"top_p": 0.8},
    "p, flat": {"temperature": 50.0, "top_p": 0.9},
    "p, all but the tail": {"top_p": 0.9999},
    "k and p": {"top_k": 60, "top_p": 0.6},
    "k and p and min_p": {"top_k": 30, "top_p": 0.95, "min_p": 0.1},
    "min_p and p": {"top_p": 0.9, "min_p": 0.05},
    "all but one": {"top_k": 998},
}


@pytest.mark.parametrize("capacity", [8192, 4], ids=["candidates copied", "whole row"])
def test_what_is_kept_is_what_the_cpu_sampler_keeps(monkeypatch: pytest.MonkeyPatch, capacity: int) -> None:
    blocks(monkeypatch, 1024, capacity)
    kinds = [*TRUNCATIONS.values()][:: 1 if capacity == 8192 else 2]
    company = [make_sequence(slot=row, **{"temperature": 1.1} | kind) for row, kind in enumerate(kinds)]
    logits_SV = random_logits(len(company), 999, seed=3, scale=2.0)
    for row, kept in enumerate(kept_sets(logits_SV, company)):
        assert kept == set(distribution(logits_SV[row].tolist(), company[row])), kinds[row]


def test_of_equals_exactly_so_many_are_kept_by_lowest_ids() -> None:
    logits_SV = torch.zeros(5, 700)
    logits_SV[:, 400] = 1.0
    logits_SV[:, 5] = -0.0  # equal to 0.0 as a number, not as bits
    logits_SV[4] = -logits_SV[4]
    kinds: list[dict[str, Any]] = [
        {"top_k": 8},
        {"top_p": 0.25},
        {"top_k": 100, "top_p": 0.5},
        {"top_k": 600},
        {"top_k": 3},
    ]
    company = [make_sequence(slot=row, temperature=1.0, **kind) for row, kind in enumerate(kinds)]
    kept = kept_sets(logits_SV, company)
    # e + 699 in all: a quarter is e + 172.7 - e, so 173 equals; of e + 99 half is e + 48.1, so 49.
    assert [len(found) for found in kept] == [8, 174, 50, 600, 3]
    for row in range(4):
        assert kept[row] == {*range(len(kept[row]) - 1 + (len(kept[row]) > 401)), 400}
        assert kept[row] == set(distribution(logits_SV[row].tolist(), company[row]))
    assert kept[4] == {0, 1, 2}


def test_extreme_settings_leave_what_they_leave_on_the_cpu() -> None:
    """One token each, so the CPU sampler must draw the same."""
    kinds: list[dict[str, Any]] = [
        {"top_p": 1e-300},
        {"top_p": 1e-9, "top_k": 5},
        {"min_p": 1.0},
        {"top_k": 1, "temperature": 99.0},
        {"temperature": 1e-5, "top_p": 0.999},
        {"temperature": 1e-9},
    ]
    company = [make_sequence(slot=row, **{"temperature": 3.0} | kind) for row, kind in enumerate(kinds)]
    logits_SV = random_logits(len(kinds), 500, seed=7) * 100
    logits_SV[:, :3] = -math.inf
    expected = cpu.Sampler(500, 9).sample(logits_SV, company).token_ids
    assert expected == logits_SV.argmax(dim=1).tolist()
    assert sample(DeviceSampler(500, 9, DEVICE), logits_SV, company).read().token_ids == expected


def test_equals_of_the_best_share_the_draws() -> None:
    """With the logits ln 2 apart and min_p 1, both equals are drawn, and nothing else."""
    company = [make_sequence(slot=row, temperature=1.0, min_p=1.0, seed=row) for row in range(8)]
    logits_SV = torch.tensor([0.0, 0.6931472, 0.0, 0.6931472]).expand(8, -1)
    assert set(sample(DeviceSampler(4, 8, DEVICE), logits_SV, company).read().token_ids) == {1, 3}


@pytest.mark.parametrize("vocab_size", [1, 5, 512, 513, 1000])
def test_greedy_takes_the_first_of_equals(vocab_size: int) -> None:
    logits_SV = torch.full((3, vocab_size), -1.0)
    logits_SV[1, vocab_size // 2 :] = 2.0
    logits_SV[2, -1] = 2.0
    company = [make_sequence(temperature=0.0, slot=row) for row in range(3)]
    sampler = DeviceSampler(vocab_size, 3, DEVICE)
    plan = sampler.prepare(company)
    assert plan.is_plain
    assert not plan.draws
    assert sampler.sample(logits_SV, plan).read() == ([0, vocab_size // 2, vocab_size - 1], {})


def test_a_plain_plan_goes_through_fixed_arrays() -> None:
    """As a CUDA graph replays it: padded, with cuts and draws captured for all."""
    company = [make_sequence(slot=row, **kind) for row, kind in enumerate([{"temperature": 0.0}, {"temperature": 2.0}])]
    logits_SV = random_logits(4, 300, seed=12)
    sampler = DeviceSampler(300, 4, DEVICE)
    expected = sample(sampler, logits_SV, company).read()
    plan = sampler.prepare(company, num_rows=4)
    assert plan.is_plain
    assert (plan.draws, plan.truncates) == (True, False)
    rows = torch.from_numpy(plan.rows).to(DEVICE)
    out = torch.full((2, 4), -7, dtype=torch.int32, device=DEVICE)
    sampler.launch(logits_SV.to(DEVICE), rows, out, draws=True, truncates=True)
    step = sampler.finish(plan, out)
    assert step.token_ids.data_ptr() == out.data_ptr()
    assert step.read() == expected
    assert sampler.sample(torch.empty(0, 300, device=DEVICE), sampler.prepare([])).read() == ([], {})


def test_warming_up_runs_every_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    ran = set()
    files = (kernels, sampling_cut, sampling_edits)
    for file, name in [(place, name) for place in files for name in vars(place) if name.endswith("_kernel")]:
        kernel = getattr(file, name)

        class Watched:
            def __init__(self, name: str, kernel: Any) -> None:
                self.name, self.kernel = name, kernel

            def __getitem__(self, grid: Any) -> Any:
                ran.add(self.name)
                return self.kernel[grid]

        monkeypatch.setattr(file, name, Watched(name, kernel))
    sampler = DeviceSampler(70, 3, DEVICE)
    sampler.warm_up(torch.zeros(2, 70, device=DEVICE))
    assert len(ran) == 8
    assert sampler._words is None
    assert sampler.state_bytes() == 3 * 4 * 3 * 70


# ------------------------------------------------------------------------------------------------------------ edits


def test_edited_logits_have_the_cpu_samplers_bits() -> None:
    kinds: list[dict[str, Any]] = [
        {"repetition_penalty": 1.7, "frequency_penalty": 0.6, "presence_penalty": -1.1},
        {"logit_bias": {3: 4.0, 60: -5.25, 599: 2.5}},
        {"min_tokens": 9},
        {"min_tokens": 9, "allowed_token_ids": (4, 8)},
        {"allowed_token_ids": (0, 5, 60, 599), "presence_penalty": 0.3, "logit_bias": {5: -1.0}, "min_tokens": 9},
        {},
        {"min_tokens": 9},
        {"repetition_penalty": 0.3, "min_tokens": 2},
    ]
    random = np.random.default_rng(4)
    allowed = {row: random.random(600) < 0.5 for row in (0, 4, 5, 6)}
    allowed[6] = np.isin(np.arange(600), (4, 8))
    allowed[4][[0, 60]] = True
    masks = {row: packed(mask) for row, mask in allowed.items()}
    company = [
        make_sequence((3, 5, 60), (5, 60, 5, 599), slot=7 - row, stop_ids=(4, 8, 9_999), temperature=1.0, **kind)
        for row, kind in enumerate(kinds)
    ]
    logits_SV = random_logits(len(company), 600, seed=5).half()
    sampler = DeviceSampler(600, 8, DEVICE)
    plan = sampler.prepare(company, masked=masks)
    assert plan.edited == list(range(8))
    plan.take_masks(masks)
    tokens = sampler.sample(logits_SV.to(DEVICE), plan).read().token_ids
    assert sampler._edited is not None
    edited = sampler._edited.cpu().numpy()
    for row, sequence in enumerate(company):
        expected = twin.edited_logits(logits_SV[row], sequence, masks.get(row))
        np.testing.assert_array_equal(edited[row], expected.numpy())
        left = set(np.flatnonzero(np.isfinite(expected.numpy())).tolist())
        assert tokens[row] == twin.draw(logits_SV[row], sequence, left, masks.get(row))
    assert set(np.flatnonzero(np.isfinite(edited[3])).tolist()) == {4, 8}, "stop ids stay: nothing else may come"
    assert set(np.flatnonzero(np.isfinite(edited[6])).tolist()) == {4, 8}


PENALTIES: dict[str, Any] = {
    "temperature": 1.5,
    "repetition_penalty": 1.4,
    "frequency_penalty": 0.7,
    "presence_penalty": 0.4,
    "min_tokens": 3,
    "stop_ids": (2,),
}


def counted(sampler: DeviceSampler, slot: int) -> dict[int, int]:
    assert sampler._words is not None
    counts = sampler._words[slot].cpu().numpy() & int(sampling_edits.Word.COUNT)
    return {token: int(counts[token]) for token in np.flatnonzero(counts).tolist()}


def test_tokens_are_counted_before_the_host_has_read_them() -> None:
    """Two steps in flight: step i + 1 is prepared and launched while the token of step i is unknown."""
    logits_SV = random_logits(1, 40, seed=6)

    def straight() -> list[int]:
        sampler, sequence = DeviceSampler(40, 1, DEVICE), make_sequence((1, 7), **PENALTIES)
        for _ in range(6):
            sequence.token_ids += sample(sampler, logits_SV, [sequence]).read().token_ids
        return sequence.token_ids[2:]

    sampler, sequence = DeviceSampler(40, 1, DEVICE), make_sequence((1, 7), **PENALTIES)
    in_flight = None
    for i in range(6):
        step = sample(sampler, logits_SV, [sequence], positions=[2 + i])
        if in_flight is not None:
            sequence.token_ids += in_flight.read().token_ids
        in_flight = step
        assert len(sequence.token_ids) == 2 + i, "the next step is launched with a token that is not known"
    assert in_flight is not None
    output = sequence.token_ids[2:] + in_flight.read().token_ids
    assert output == straight()
    assert counted(sampler, 0) == {token: output.count(token) for token in output}
    # With output_token_ids of an earlier attempt, in another slot.
    again = make_sequence((1, 7), output[:3], slot=2, **PENALTIES)
    elsewhere = DeviceSampler(40, 3, DEVICE)
    for _ in range(3):
        again.token_ids += sample(elsewhere, logits_SV, [again]).read().token_ids
    assert again.token_ids[2:] == output
    assert counted(elsewhere, 2) == counted(sampler, 0)


def test_a_step_that_is_run_again_counts_anew() -> None:
    """Steps at positions 2 and 3 were launched and failed with somebody else: what they counted is void."""
    logits_SV = random_logits(1, 40, seed=6)
    sampler, sequence = DeviceSampler(40, 1, DEVICE), make_sequence((1, 7), **PENALTIES)
    first = sample(sampler, logits_SV, [sequence], positions=[2]).read().token_ids
    sample(sampler, logits_SV, [sequence], positions=[3])
    assert sample(sampler, logits_SV, [sequence], positions=[2]).read().token_ids == first
    assert counted(sampler, 0) == {first[0]: 1}
    with pytest.raises(StepFailedError, match=r"request r .*position 5"):
        sampler.prepare([sequence], positions=[5])


def test_min_tokens_holds_again_when_a_step_is_run_again() -> None:
    """The slot was filled when min_tokens was reached, for the bias alone."""
    logits_SV = torch.tensor([[0.0, 5.0, 4.0, 3.0]])
    sequence = make_sequence((3,), (3, 3), temperature=0.0, min_tokens=2, stop_ids=(1,), logit_bias={0: -1.0})
    sampler = DeviceSampler(4, 1, DEVICE)
    assert sample(sampler, logits_SV, [sequence]).read().token_ids == [1]
    sequence.token_ids.pop()
    assert sample(sampler, logits_SV, [sequence]).read().token_ids == [2]


def test_penalties_over_a_run_with_changing_slots() -> None:
    """Sequences come, go, are preempted into other slots; the oracle counts anew each step."""
    random = np.random.default_rng(5)
    vocab_size, num_slots, returned = 41, 3, 0
    sampler = DeviceSampler(vocab_size, num_slots, DEVICE)
    running: dict[int, Sequence] = {}
    parked: list[Sequence] = []
    for step in range(16):
        for slot in range(num_slots):
            if slot in running and random.random() < 0.3:
                parked.append(running.pop(slot))
            if slot not in running and len(parked) > 1:
                running[slot] = parked.pop(0)
                running[slot].slot = slot
                returned += 1
            if slot not in running:
                running[slot] = make_sequence(
                    random.integers(vocab_size, size=random.integers(1, 9)).tolist(),
                    random.integers(vocab_size, size=random.integers(0, 5)).tolist(),
                    slot=slot,
                    temperature=0.0,
                    repetition_penalty=float(random.choice([1.0, 0.7, 1.5])),
                    frequency_penalty=float(random.choice([0.0, 0.5, -0.2])),
                    presence_penalty=float(random.choice([0.0, 0.9])),
                )
        company = [running[slot] for slot in random.permutation(num_slots).tolist()]
        logits_SV = random_logits(num_slots, vocab_size, seed=step)
        tokens = sample(sampler, logits_SV, company).read().token_ids
        for row, sequence in enumerate(company):
            assert [tokens[row]] == [*distribution(logits_SV[row].tolist(), sequence)]
            sequence.token_ids.append(tokens[row])
    assert returned >= 3


# ----------------------------------------------------------------------------------------------------------- errors


def reason(sampler: DeviceSampler | cpu.Sampler, logits_SV: torch.Tensor, company: list[Sequence], **more: Any) -> str:
    """The words it is refused with."""
    try:
        if isinstance(sampler, DeviceSampler):
            sample(sampler, logits_SV, company, **more).read()
        else:
            sampler.sample(logits_SV, company, **more)
    except StepFailedError as error:
        return str(error)
    raise AssertionError("nothing was refused")


@pytest.mark.parametrize(("value", "place", "bad"), [(math.nan, 0, 0), (math.inf, 599, 1), (math.nan, 599, 2)])
def test_a_bad_row_is_named_as_on_the_cpu_and_flagged_alone(value: float, place: int, bad: int) -> None:
    """The others have their tokens; who reads the step learns of the bad row."""
    kinds: list[dict[str, Any]] = [{"temperature": 0.0}, {"temperature": 1.0}, {"temperature": 1.0, "top_k": 5}]
    company = [make_sequence(slot=row, request_id=f"r{row}", **kind) for row, kind in enumerate(kinds)]
    logits_SV = random_logits(3, 600, seed=10)
    fine = sample(DeviceSampler(600, 3, DEVICE), logits_SV, company).read().token_ids
    logits_SV[bad, place] = value
    step = sample(DeviceSampler(600, 3, DEVICE), logits_SV, company)
    assert step.token_ids.tolist() == [0 if row == bad else fine[row] for row in range(3)]
    expected = reason(cpu.Sampler(600, 3), logits_SV, company)
    assert f"request r{bad} " in expected
    with pytest.raises(StepFailedError) as caught:
        step.read()
    assert str(caught.value) == expected


def test_every_refusal_of_the_cpu_sampler_is_worded_the_same() -> None:
    nan, zeros = torch.zeros(1, 9), torch.zeros(1, 9)
    nan[0, 4] = math.nan
    cases: list[tuple[torch.Tensor, dict[str, Any], dict[str, Any]]] = [
        (nan, {}, {"masks": {0: packed(np.arange(9) < 3)}}),
        (nan, {"logit_bias": {1: 2.0}}, {}),
        (zeros, {}, {"masks": {0: packed(np.zeros(9, dtype=bool))}}),
        (zeros - math.inf, {}, {}),
        (zeros - math.inf, {"presence_penalty": 1.0}, {}),
        (zeros + 1, {"repetition_penalty": 1e-44}, {}),
        (zeros, {"allowed_token_ids": (3, 10**30)}, {}),
        (zeros, {"logit_bias": {9: 1.0}}, {}),
    ]
    for logits_SV, kind, more in cases:
        company = [make_sequence(temperature=0.0, **kind)]
        expected = reason(cpu.Sampler(9, 1), logits_SV, company, **more)
        with np.errstate(over="ignore"):  # the interpreter divides by 1e-44 in numpy
            assert reason(DeviceSampler(9, 1, DEVICE), logits_SV, company, **more) == expected


# --------------------------------------------------------------------------------------------------------- logprobs


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_logprobs_are_the_cpu_samplers(dtype: torch.dtype) -> None:
    """More rows than fit at once, rows in any order; bfloat16 ties at every cut. The bits do not depend on company."""
    logits_NV = random_logits(6, 700, seed=11).to(dtype)
    rows, token_ids, num_top = [4, 0, 5, 0, 2], [699, 0, 300, 5, 7], [5, 0, 64, 1, 3]
    sampler = DeviceSampler(700, 2, DEVICE)
    found = sampler.token_logprobs(logits_NV.to(DEVICE), rows, token_ids, num_top).read()
    expected = cpu.token_logprobs(logits_NV[rows], token_ids, num_top)
    assert len(found) == 5
    for got, want in zip(found, expected, strict=True):
        assert got.token_id == want.token_id
        assert got.logprob == pytest.approx(want.logprob, abs=1e-5)
        assert [token for token, _ in got.top] == [token for token, _ in want.top]
        assert [value for _, value in got.top] == pytest.approx([value for _, value in want.top], abs=1e-5)
    assert sampler.token_logprobs(logits_NV[5:].to(DEVICE), [0], [300], [64]).read() == found[2:3]


def test_logprobs_of_a_small_vocabulary_and_of_bad_rows() -> None:
    logits_NV = torch.tensor([[1.0, 3.0], [math.nan, 0.0]]).log()
    sampler = DeviceSampler(2, 4, DEVICE)
    (found,) = sampler.token_logprobs(logits_NV.to(DEVICE), [0], [0], [9]).read()
    assert found.logprob == pytest.approx(math.log(1 / 4), abs=1e-6)
    assert found.top == ((1, pytest.approx(math.log(3 / 4))), (0, pytest.approx(math.log(1 / 4))))
    with pytest.raises(StepFailedError, match=r"row 1 .*nan"):
        sampler.token_logprobs(logits_NV.to(DEVICE), [0, 1], [0, 0], [1, 1]).read()


def test_output_logprobs_are_those_of_the_raw_logits() -> None:
    logits_SV = torch.tensor([[0.0, 5.0, 4.0, 3.0]]).expand(3, -1).contiguous()
    kinds: list[dict[str, Any]] = [
        {},
        {"logprobs": 2, "logit_bias": {0: 100.0}},
        {"logprobs": 0, "top_k": 1, "temperature": 3},
    ]
    company = [make_sequence(slot=row, **{"temperature": 0.0} | kind) for row, kind in enumerate(kinds)]
    tokens, logprobs = sample(DeviceSampler(4, 3, DEVICE), logits_SV, company).read()
    expected = cpu.Sampler(4, 3).sample(logits_SV, company)
    assert tokens == expected.token_ids == [1, 0, 1]
    assert sorted(logprobs) == [1, 2]
    for row, got in logprobs.items():
        assert got.token_id == tokens[row]
        assert got.logprob == pytest.approx(expected.logprobs[row].logprob, abs=1e-5)
        assert [token for token, _ in got.top] == [token for token, _ in expected.logprobs[row].top]
