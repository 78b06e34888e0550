"""The figures of a load test: vLLM's names, percentiles near the exact ones, an SLO's verdict, and sums over workers."""

from __future__ import annotations

import random
import statistics
import xml.etree.ElementTree as ElementTree
from typing import Any

import msgpack
import numpy as np
import pytest

from loadtests.load_report import Line, chart, report
from loadtests.load_stats import METRICS, WIDTH, Histogram, Slo, Tally, table
from loadtests.load_stream import COMPLETED, FAILED, LOST, REFUSED, Outcome, StreamRead
from loadtests.sse import EventReader


def completed(due: float = 0.0, *, ttft: float = 0.1, gaps: tuple[float, ...] = (0.02, 0.02), num: int = 3) -> Outcome:
    times = [due + ttft]
    for gap in gaps:
        times.append(times[-1] + gap)
    return Outcome("/v1/completions", due, due, COMPLETED, "", times, times[-1], 7, num)


def other(kind: str, due: float = 0.0, reason: str = "because") -> Outcome:
    return Outcome("/v1/completions", due, due, kind, reason, [], due + 0.5)


def tally_of(*outcomes: Outcome, **slo: Any) -> Tally:
    tally = Tally(Slo(**slo))
    for outcome in outcomes:
        tally.add(outcome)
    return tally


# ------------------------------------------------------------------------------------------------------------- figures


def test_figures_have_the_names_of_vllm_bench_serve() -> None:
    results = tally_of(completed(), completed(1.0), ttft_ms=500.0).results()
    # vllm/benchmarks/serve.py, what it saves and what it prints.
    saved = (
        "duration completed failed total_input_tokens total_output_tokens request_throughput request_goodput "
        "output_throughput total_token_throughput max_output_tokens_per_s max_concurrent_requests"
    )
    for name in (*saved.split(), *(f"{s}_{m}_ms" for s in ("mean", "median", "std", "p99") for m, _, _ in METRICS)):
        assert isinstance(results[name], int | float), name
    printed = [line.partition(":")[0] for line in table(results)]
    for name in (
        "Successful requests",
        "Failed requests",
        "Benchmark duration (s)",
        "Total input tokens",
        "Total generated tokens",
        "Request throughput (req/s)",
        "Request goodput (req/s)",
        "Output token throughput (tok/s)",
        "Peak output token throughput (tok/s)",
        "Peak concurrent requests",
        "Total token throughput (tok/s)",
        *(f"{word} {m} (ms)" for word in ("Mean", "Median", "P99") for m in ("TTFT", "TPOT", "ITL", "E2EL")),
    ):
        assert name in printed


def test_figures_are_what_vllm_would_make_of_them() -> None:
    outcomes = [
        completed(0.0, ttft=0.1, gaps=(0.02, 0.04), num=5),
        completed(1.0, ttft=0.3, gaps=(), num=1),
        completed(1.5, ttft=0.2, gaps=(1.3,), num=2),
        other(REFUSED, 1.6),
    ]
    results = tally_of(*outcomes, ttft_ms=250.0).results()
    assert (results["completed"], results["failed"], results["refused"]) == (3, 1, 1)
    assert (results["total_input_tokens"], results["total_output_tokens"]) == (21, 8)
    assert results["duration"] == pytest.approx(3.0)
    assert results["request_throughput"] == pytest.approx(3 / 3)
    assert results["request_goodput"] == pytest.approx(2 / 3)
    assert results["output_throughput"] == pytest.approx(8 / 3)
    assert results["total_token_throughput"] == pytest.approx(29 / 3)
    assert results["mean_ttft_ms"] == pytest.approx(200)
    assert results["std_ttft_ms"] == pytest.approx(1000 * statistics.pstdev([0.1, 0.3, 0.2]))
    assert results["mean_tpot_ms"] == pytest.approx(1000 * (0.06 / 4 + 1.3) / 2)  # a single token has none
    assert results["mean_itl_ms"] == pytest.approx(1000 * (0.02 + 0.04 + 1.3) / 3)
    assert results["mean_e2el_ms"] == pytest.approx(1000 * (0.16 + 0.3 + 1.5) / 3)
    assert results["max_output_tokens_per_s"] == pytest.approx(5)
    assert results["max_concurrent_requests"] == 1


def test_times_count_from_when_a_request_was_due() -> None:
    late = completed(2.0, ttft=0.5)
    late.sent = 2.4  # the client itself was late: that hides nothing
    tally = tally_of(late)
    assert tally.results()["mean_ttft_ms"] == pytest.approx(500)
    assert tally.results()["client"]["max_lag_ms"] == pytest.approx(400)
    assert any("sent late" in text for text in tally.warnings())


@pytest.mark.parametrize("seed", [1, 2])
def test_percentiles_are_right_to_a_bucket_and_the_rest_is_exact(seed: int) -> None:
    rng = random.Random(seed)
    values = [rng.lognormvariate(-3, 1.5) for _ in range(5001)] + [0.0]
    histogram = Histogram()
    for value in values:
        histogram.add(value)
    for percent in (1, 50, 90, 99):
        exact = float(np.percentile(values, percent, method="inverted_cdf"))
        assert histogram.percentile(percent) == pytest.approx(exact, rel=WIDTH)
    assert histogram.mean == pytest.approx(statistics.mean(values))
    assert histogram.std == pytest.approx(statistics.pstdev(values))
    assert (histogram.lowest, histogram.highest) == (0.0, max(values))
    assert histogram.shares()[-1][1] == 1.0


def test_workers_add_up_through_what_travels_between_them() -> None:
    rng = random.Random(5)
    outcomes = [completed(rng.random() * 20, ttft=rng.random(), gaps=(rng.random(),), num=2) for _ in range(200)]
    outcomes += [other(LOST, 3.0), other(FAILED, 4.0), other(REFUSED, 5.0)]
    whole, master = tally_of(*outcomes, ttft_ms=500.0), Tally(Slo(ttft_ms=500.0))
    for index in range(3):
        worker = tally_of(*outcomes[index::3], ttft_ms=500.0)
        worker.add_cpu(2.5, 0.1 * index, 0.5)
        travelled = msgpack.loads(msgpack.dumps(worker.to_data()), strict_map_key=False)  # as locust sends it
        master.merge(travelled)
    assert master.cpu == {2: pytest.approx(0.2)}
    found, expected = master.results(), whole.results()
    client = found.pop("client")
    assert (client["max_cpu"], client["cpu_s"]) == (pytest.approx(0.2), pytest.approx(1.5))
    del expected["client"]
    for name, value in expected.items():
        assert found[name] == (pytest.approx(value) if name not in ("reasons", "slo_ms") else value), name
    assert master.open_streams() == whole.open_streams()


def test_streams_that_are_open_at_a_time() -> None:
    tally = tally_of(completed(0.0, ttft=2.0, gaps=()), completed(1.0, ttft=2.0, gaps=()), completed(5.0))
    assert tally.results()["max_concurrent_requests"] == 2
    assert tally.open_streams()[-1][1] == 0


# ----------------------------------------------------------------------------------------------------------------- SLO


@pytest.mark.parametrize(
    ("slo", "is_good"),
    [
        ({}, True),
        ({"ttft_ms": 100.1, "tpot_ms": 60.1, "itl_ms": 100.1, "e2el_ms": 220.1}, True),
        ({"ttft_ms": 99.0}, False),
        ({"tpot_ms": 59.0}, False),
        ({"itl_ms": 99.0}, False),  # the longest gap
        ({"e2el_ms": 219.0}, False),
    ],
)
def test_a_request_is_good_if_it_keeps_every_limit(slo: dict[str, float], is_good: bool) -> None:
    tally = Tally(Slo(**slo))
    outcome = completed(ttft=0.1, gaps=(0.02, 0.1), num=3)
    assert tally.add(outcome) == is_good
    assert bool(tally.wrong()) == (not is_good)
    assert list(tally.missed) == ([] if is_good else [next(iter(slo)).removesuffix("_ms")])


def test_the_share_counts_refused_and_failed_requests_too() -> None:
    outcomes = [completed() for _ in range(98)] + [other(REFUSED), other(FAILED)]
    assert tally_of(*outcomes, ttft_ms=500.0, share=0.98).wrong() == []
    (text,) = tally_of(*outcomes, ttft_ms=500.0, share=0.99).wrong()
    assert text == "98.00% of 100 requests were good (ttft 500 ms); 99.00% must be"
    assert tally_of(*outcomes).wrong() == []  # without a limit nothing is promised but an end


def test_a_lost_stream_and_no_answer_at_all_are_always_wrong() -> None:
    assert "1 streams that had begun ended with neither" in tally_of(completed(), other(LOST)).wrong()[0]
    assert tally_of(other(REFUSED)).wrong() == ["no request was completed"]


def test_a_client_that_another_program_keeps_from_running_says_so() -> None:
    tally = tally_of(completed(9.0))
    for _ in range(200):  # 10 s, as it should have been
        tally.histograms["stall"].add(0.0)
    assert tally.warnings() == []
    tally.histograms["stall"].add(1.5)
    assert "could not run for 13% of the time (once for 1500 ms)" in tally.warnings()[0]


def test_a_busy_client_says_so() -> None:
    tally = tally_of(completed())
    for second in range(5):
        tally.add_cpu(second, 0.2)
    assert tally.warnings() == []
    for second in range(3):
        tally.add_cpu(second, 0.97)
    assert "computed for 90% or more of 3 seconds" in tally.warnings()[0]


# -------------------------------------------------------------------------------------------------------------- streams


def read(*events: bytes, broke: bool = False) -> Outcome:
    outcome = Outcome("/v1/chat/completions", 1.0)
    reading = StreamRead(outcome)
    for i, event in enumerate(events):
        reading.take(event, 2.0 + i)
    if broke:
        reading.finish(9.0, "ConnectionResetError: gone")
    else:
        reading.finish(9.0)
    return outcome


ROLE = b'{"choices":[{"index":0,"delta":{"role":"assistant","content":""},"finish_reason":null}]}'
TOKEN = b'{"choices":[{"index":0,"delta":{"content":"a"},"finish_reason":null}]}'
END = b'{"choices":[{"index":0,"delta":{},"finish_reason":"length"}]}'
USAGE = b'{"choices":[],"usage":{"prompt_tokens":5,"completion_tokens":6}}'
DONE = b"[DONE]"


def test_a_role_is_no_token() -> None:
    outcome = read(ROLE, TOKEN, TOKEN, END, USAGE, DONE)
    assert (outcome.kind, outcome.times, outcome.end) == (COMPLETED, [3.0, 4.0], 9.0)
    assert (outcome.num_prompt_tokens, outcome.num_output_tokens) == (5, 6)
    assert (outcome.ttft, outcome.tpot, outcome.itls) == (2.0, 6.0 / 5, [1.0])


def test_tokens_without_a_text_are_an_answer_all_the_same() -> None:
    assert read(ROLE, END, USAGE, DONE).kind == COMPLETED
    assert read(b'{"choices":[{"index":0,"text":"","finish_reason":"length"}]}', USAGE, DONE).times == [2.0]


@pytest.mark.parametrize(
    ("outcome", "kind", "reason"),
    [
        (read(ROLE, TOKEN), LOST, "the stream ended without [DONE]"),
        (read(ROLE, TOKEN, broke=True), LOST, "ConnectionResetError: gone"),
        (read(ROLE, TOKEN, b'{"error":{"code":"replica_lost"}}', DONE), FAILED, "error event: replica_lost"),
        (read(ROLE, DONE), FAILED, "an answer without a token"),
    ],
)
def test_what_became_of_a_stream(outcome: Outcome, kind: str, reason: str) -> None:
    assert (outcome.kind, outcome.reason) == (kind, reason)


def test_events_are_put_together_from_any_pieces() -> None:
    stream = b"id: 1\ndata: one\n\n: a comment\n\n5a\r\ndata: two\nid: 2\n\n\r\ndata: [DONE]\n\n"
    for size in (1, 2, 3, 7, 1000):
        reading = EventReader()
        found = [data for at in range(0, len(stream), size) for data in reading.feed(stream[at : at + size])]
        assert found == [b"one", b"two", b"[DONE]"]


# -------------------------------------------------------------------------------------------------------------- report


def test_the_report_is_one_file_with_pictures_that_loads_nothing() -> None:
    tally = tally_of(*(completed(at / 3, ttft=0.1 + at / 100) for at in range(300)), other(LOST, 4.0), ttft_ms=900.0)
    results = tally.results() | {"kills": [{"at": 12.0, "replica": "<one>"}]}
    page = report(tally, results, title="A <test>", options={"rate": 3}, wrong=tally.wrong())
    assert page.count("<svg") == 9
    for svg in page.split("<svg")[1:]:
        ElementTree.fromstring("<svg" + svg.split("</svg>")[0] + "</svg>")
    for outside in ("http://", "https://", "src=", "href=", "@import", "<script"):
        assert outside not in page
    for text in ("A &lt;test&gt;", "&lt;one&gt;", "Mean TTFT (ms)", "neither their end nor an error", 'class="mark"'):
        assert text in page
    assert "Passed" not in page
    assert "Passed" in report(Tally(Slo()), Tally(Slo()).results(), title="t", options={}, wrong=[])


def test_a_picture_without_values_says_so() -> None:
    assert chart([Line("x", [])], x="seconds") == "<p>no values</p>"
    ElementTree.fromstring(chart([Line("x", [(0.0, 0.0)])], x="seconds"))
    ElementTree.fromstring(chart([Line("x", [(0.0, 0.5)])], x="ms", is_log=True))
