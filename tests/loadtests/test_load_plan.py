"""What a load test sends is a function of its seed: due times, shapes, lengths, traces scaled, prefixes kept, bodies."""

from __future__ import annotations

import itertools
import json
import statistics
from pathlib import Path

import pytest

from loadtests.load_plan import (
    SHAPES,
    SPIKE,
    SPIKE_BEGINS,
    SPIKE_ENDS,
    TEMPLATE_TOKENS,
    Plan,
    PlanOptions,
    Vocabulary,
    arrivals,
    cumulative,
    level,
)
from loadtests.stream_mix import CHAT, COMPLETIONS
from loadtests.traces import FOLDER, NAMES, NUM_BLOCK_TOKENS, read_trace, scaled, trace_path

AZURE = """TIMESTAMP,ContextTokens,GeneratedTokens
2023-11-16 18:15:46.6805900,374,44
2023-11-16 18:15:50.9951690,396,109
2023-11-16 18:15:48.6805900,7,0
2023-11-16 18:15:47.6805900,10,3
"""
MOONCAKE = """{"timestamp": 0, "input_length": 1100, "output_length": 5, "hash_ids": [0, 1, 2]}
{"timestamp": 2500, "input_length": 1300, "output_length": 9, "hash_ids": [0, 1, 9]}
{"timestamp": 5000, "input_length": 600, "output_length": 2, "hash_ids": [0, 4]}
"""
WORDS = Vocabulary(tuple(range(40, 90)), 2.0, 4096)


@pytest.fixture
def azure(tmp_path: Path) -> Path:
    path = tmp_path / "azure.csv"
    path.write_text(AZURE)
    return path


@pytest.fixture
def mooncake(tmp_path: Path) -> Path:
    path = tmp_path / "mooncake.jsonl"
    path.write_text(MOONCAKE)
    return path


# ------------------------------------------------------------------------------------------------------------ arrivals


@pytest.mark.parametrize("shape", SHAPES)
def test_the_cumulative_load_is_the_integral_of_the_level(shape: str) -> None:
    area, num = 0.0, 20_000
    for i in range(num):
        area += level(shape, (i + 0.5) / num) / num
        if i % 999 == 0:
            assert cumulative(shape, (i + 1) / num) == pytest.approx(area, abs=2e-4)
    assert cumulative(shape, 1.0) == pytest.approx(area, abs=1e-4)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("process", ["poisson", "even"])
def test_arrivals_follow_the_shape(shape: str, process: str) -> None:
    dues = list(arrivals(50.0, shape=shape, process=process, seconds=200.0, seed=3))
    assert dues == sorted(dues)
    assert dues[0] > 0
    assert dues[-1] < 200.0
    assert len(dues) == pytest.approx(50 * 200 * cumulative(shape, 1.0), rel=0.03)
    for begin, end in ((0.0, 0.2), (SPIKE_BEGINS, SPIKE_ENDS), (0.8, 1.0)):
        num = sum(begin * 200 <= due < end * 200 for due in dues)
        assert num == pytest.approx(50 * 200 * (cumulative(shape, end) - cumulative(shape, begin)), rel=0.1)


def test_poisson_gaps_vary_as_much_as_they_last_and_even_ones_do_not() -> None:
    for process, expected in (("poisson", 1.0), ("even", 0.0)):
        dues = list(arrivals(100.0, shape="steady", process=process, seconds=100.0, seed=1))
        gaps = [b - a for a, b in itertools.pairwise(dues)]
        assert statistics.pstdev(gaps) / statistics.mean(gaps) == pytest.approx(expected, abs=0.05)


def test_a_steady_load_may_go_on_for_ever_and_a_spike_may_not() -> None:
    endless = arrivals(10.0, shape="steady", process="even", seconds=None, seed=0)
    assert list(itertools.islice(endless, 3)) == pytest.approx([0.1, 0.2, 0.3])
    with pytest.raises(ValueError, match="a spike needs an end"):
        next(arrivals(10.0, shape="spike", process="even", seconds=None, seed=0))
    with pytest.raises(ValueError, match="the rate is -1"):
        next(arrivals(-1.0, shape="steady", process="even", seconds=1.0, seed=0))


# -------------------------------------------------------------------------------------------------------------- traces


def test_azure_rows_in_the_order_of_arrival_without_empty_answers(azure: Path) -> None:
    rows = read_trace(azure)
    assert [(r.num_prompt_tokens, r.num_output_tokens) for r in rows] == [(374, 44), (10, 3), (396, 109)]
    assert [r.arrival for r in rows] == pytest.approx([0.0, 1.0, 4.314579], abs=1e-5)


def test_scaling_changes_the_rate_and_the_lengths(mooncake: Path) -> None:
    rows = read_trace(mooncake)
    assert [r.arrival for r in rows] == [0.0, 2.5, 5.0]
    faster = scaled(rows, rate=6.0, length=0.1)  # it has 3 requests in 5 s
    assert [r.arrival for r in faster] == pytest.approx([0.0, 0.25, 0.5])
    assert [(r.num_prompt_tokens, r.num_output_tokens) for r in faster] == [(110, 1), (130, 1), (60, 1)]
    assert [r.arrival for r in scaled(rows, rate=None, length=1.0)] == [0.0, 2.5, 5.0]
    with pytest.raises(ValueError, match="scale of lengths is 0"):
        scaled(rows, rate=None, length=0.0)


def test_a_trace_that_cannot_be_read_says_where(tmp_path: Path) -> None:
    bad = tmp_path / "bad.jsonl"
    bad.write_text(MOONCAKE + '{"timestamp": 1}\n')
    with pytest.raises(ValueError, match=r"bad\.jsonl: request 4 cannot be read"):
        read_trace(bad)
    with pytest.raises(
        ValueError, match=r"there is no trace at nowhere\.csv; a workload is synthetic, azure, mooncake"
    ):
        trace_path("nowhere.csv")
    other = tmp_path / "trace.txt"
    other.write_text("")
    with pytest.raises(ValueError, match=r"ends with '\.txt'; a trace ends with \.csv or \.jsonl"):
        read_trace(other)


@pytest.mark.parametrize("name", NAMES)
def test_the_published_traces_where_they_are(name: str) -> None:
    if not (FOLDER / NAMES[name]).is_file():
        return  # they are no part of the repository
    rows = read_trace(trace_path(name))
    assert len(rows) > 12_000
    assert 3500 < rows[-1].arrival < 3700
    assert all(len(r.block_ids) == -(-r.num_prompt_tokens // NUM_BLOCK_TOKENS) for r in rows if r.block_ids)


# ------------------------------------------------------------------------------------------------------------ requests


def test_prompts_that_share_blocks_begin_alike_also_when_scaled(mooncake: Path) -> None:
    for length in (1.0, 0.1):
        plan = Plan(PlanOptions(workload=str(mooncake), length_scale=length, endpoint="completions"), WORDS)
        requests = list(plan.scheduled())
        assert [r.path for r in requests] == [COMPLETIONS] * 3
        one, two, three = (json.loads(plan.body(r, "m"))["prompt"] for r in requests)
        block = round(NUM_BLOCK_TOKENS * length)
        assert [len(one), len(two), len(three)] == [round(n * length) for n in (1100, 1300, 600)]
        assert one[: 2 * block] == two[: 2 * block]
        assert one[2 * block :] != two[2 * block : len(one)]
        assert one[:block] == three[:block]
        assert one[block : block + 20] != three[block : block + 20]


def test_a_body_asks_for_exactly_so_many_tokens() -> None:
    plan = Plan(PlanOptions(rate=5.0, seconds=10.0, prompt_lens=(20, 30), output_lens=(4, 9)), WORDS)
    requests = list(plan.scheduled())
    assert {r.path for r in requests} == {CHAT, COMPLETIONS}
    for request in requests:
        body = json.loads(plan.body(request, "the-model"))
        assert (body["model"], body["max_tokens"], body["ignore_eos"]) == ("the-model", request.num_output_tokens, True)
        assert body["stream_options"] == {"include_usage": True}
        assert 20 <= request.num_prompt_tokens <= 30
        assert 4 <= request.num_output_tokens <= 9
        if request.path == CHAT:
            (message,) = body["messages"]
            assert len(message["content"].split()) == request.num_prompt_tokens // 2  # two tokens a word
        else:
            assert len(body["prompt"]) == request.num_prompt_tokens
            assert set(body["prompt"]) <= set(WORDS.token_ids)
    assert len({plan.body(r, "m") for r in requests}) == len(requests)


def test_workers_compute_the_same_plan_and_another_seed_another_one() -> None:
    def bodies(seed: int) -> list[tuple[float | None, bytes]]:
        plan = Plan(PlanOptions(rate=20.0, seconds=2.0, seed=seed), WORDS)
        return [(r.due, plan.body(r, "m")) for r in plan.scheduled()]

    assert bodies(1) == bodies(1)
    assert bodies(1) != bodies(2)


def test_requests_beyond_the_model_are_cut_and_say_so() -> None:
    small = Vocabulary(tuple(range(9)), 1.0, 200)
    plan = Plan(PlanOptions(prompt_lens=(50, 400), output_lens=(10, 150), distribution="uniform"), small)
    assert not plan.is_open
    requests = [plan.request(number) for number in range(200)]
    assert 0 < sum(r.is_cut for r in requests) < 200
    for request in requests:
        room = 200 - (TEMPLATE_TOKENS if request.path == CHAT else 0)
        assert request.num_prompt_tokens >= 1
        assert request.num_output_tokens >= 1
        assert request.num_prompt_tokens + request.num_output_tokens <= room


def test_a_server_without_tokenize_gets_text() -> None:
    plan = Plan(PlanOptions(endpoint="completions"), Vocabulary())
    assert isinstance(json.loads(plan.body(plan.request(0), "m"))["prompt"], str)


def test_options_that_cannot_be(azure: Path) -> None:
    with pytest.raises(ValueError, match="a trace has arrivals of its own"):
        Plan(PlanOptions(workload=str(azure), shape="spike"), WORDS)
    with pytest.raises(ValueError, match="endpoint is 'x'"):
        Plan(PlanOptions(endpoint="x"), WORDS)
    assert SPIKE > 1
