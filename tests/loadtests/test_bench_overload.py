"""The overload bench: its arithmetic on made-up answers, its picture, and its client against the service in one process."""

from __future__ import annotations

import argparse
import asyncio
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import pytest

from loadtests import bench_overload, bench_service
from loadtests.open_loop import Client
from tests.api.house import House

SMALL = argparse.Namespace(tokens=8, slots=2, replicas=2, step_ms=20.0)


def answer(due: float, kind: str, seconds: float, **fields: Any) -> dict[str, Any]:
    return {"due": due, "kind": kind, "seconds": seconds, "first": None, "retry_after": None, "lag": 0.0, **fields}


def run(*answers: dict[str, Any]) -> dict[str, Any]:
    probes = [(0.0, 0.01, 200), (1.0, 0.05, 200), (2.0, 10.0, 0)]
    return {"answers": answers, "wall_s": 14.0, "cpu_s": 0.7, "probes": probes}


def test_goodput_counts_what_ended_in_time_while_the_run_was_steady() -> None:
    row = bench_overload.summarize(
        run(
            answer(0.0, "done", 1.0, first=0.5),  # too early: the queue is still filling
            answer(3.0, "done", 2.5, first=1.0),
            answer(4.0, "done", 5.0, first=1.5),
            answer(5.0, "done", 5.1, first=2.0),  # complete, and too late
            answer(6.0, "refused", 0.02, retry_after=3),
            answer(7.0, "refused", 0.03),
            answer(8.0, "late", 6.0, first=4.0),
            answer(8.5, "error", 0.1, reason="500 oh"),
            answer(9.0, "done", 2.0, first=0.1),  # ends after the last arrival
            answer(10.0, "late", 5.5),
        ),
        rate=1.0,
        deadline_s=5.0,
    )
    assert row["goodput_per_s"] == 2 / 5.0
    counted = [row[name] for name in ("requests", "good", "done_late", "late", "refused", "other")]
    assert counted == [10, 4, 1, 2, 2, 1]
    assert sum(counted[1:]) == counted[0]
    assert (row["refused_without_retry_after"], row["other_first"], row["health_failed"]) == (1, "500 oh", 1)
    assert row["ttft_ms"]["p50"] == pytest.approx(1250)
    assert row["health_ms"]["max"] == pytest.approx(10_000)
    assert row["client_cores"] == pytest.approx(0.05)
    with pytest.raises(ValueError, match="must last longer than a deadline"):
        bench_overload.summarize(run(answer(4.0, "done", 1.0)), 1.0, 5.0)


def test_capacity_is_counted_while_the_load_is_full() -> None:
    answers = [answer(i * 0.5, "done", 1.0) for i in range(21)]  # from 1 s to 10 s one ends each half second
    assert bench_overload.capacity_of(answers, 2.0) == 2.0
    with pytest.raises(RuntimeError, match="1 of 22 requests failed"):
        bench_overload.capacity_of([*answers, answer(0.0, "error", 1.0)], 2.0)


def made_row(load: float, goodput: float, **fields: Any) -> dict[str, Any]:
    row = bench_overload.summarize(run(answer(0.0, "done", 1.0, first=0.1), answer(9.0, "done", 1.0)), 20.0 * load, 5.0)
    row |= {"load": load, "goodput_per_s": goodput, "health_failed": 0, "rss_mib": {"ingress": 100.0}, "busy": 0.3}
    row |= {"rss_max_mib": {"ingress": 110.0}, "stolen": 0.02, "cores": {"ingress": 0.1}}
    return row | fields


def test_verdicts_and_the_cost_of_a_refusal() -> None:
    rows = [made_row(0.5, 10.0), made_row(1.0, 19.0), made_row(2.0, 20.0), made_row(10.0, 18.5)]
    rows[-1] |= {
        "rss_half_mib": {"ingress": 100.5},
        "rss_mib": {"ingress": 104.0},
        "refused": 2800,
        "cores": {"ingress": 0.3},
    }
    found = {one["what"]: one for one in bench_overload.verdicts(rows, 5.0)}
    assert found["goodput at the highest load, of its peak"]["value"] == 18.5 / 20.0
    assert found["memory grown in half of that load, MiB of a part"]["value"] == 3.5
    assert [what for what, one in found.items() if not one["reached"]] == ["/health p99, s"]
    assert bench_overload.cpu_per_refusal_us(rows) == {"ingress": pytest.approx(1e6 * 0.2 / (2800 / 14.0))}
    assert bench_overload.cpu_per_refusal_us(rows[:2]) == {}
    rows[-1]["goodput_per_s"] = 17.9
    assert not bench_overload.verdicts(rows, 5.0)[0]["reached"]
    assert bench_overload.line(rows[-1]).count("|") == bench_overload.HEAD.splitlines()[0].count("|")


def test_the_picture_shows_each_system_and_says_its_figures() -> None:
    rows = [made_row(load, 20.0 * min(load, 1.0)) for load in (0.5, 1.0, 10.0)]
    text = bench_overload.svg({"ragged-serve": rows, "plain Ray Serve": rows[:2]}, "a note, 5 < 6")
    drawn = ElementTree.fromstring(text)
    kinds = [element.tag.rpartition("}")[2] for element in drawn.iter()]
    assert kinds.count("polyline") == 3
    assert kinds.count("circle") == 5
    assert "ragged-serve: 50% at 0.5x, 100% at 1x, 100% at 10x; plain Ray Serve: 50% at 0.5x, 100% at 1x" in text
    assert "a note, 5 &lt; 6" in text


def test_the_client_against_four_times_what_the_service_can_do(tmp_path: Path) -> None:
    """Every request ends in one of the ways that are no error; the queue keeps its limit; nothing is left behind."""
    bench_service.make_tokenizer(tmp_path, 1000)
    args = bench_overload.engine_args(SMALL, tmp_path)
    router = {"max_queued_requests": 4}
    with House(args, num_replicas=SMALL.replicas, user_config={"router": router}) as house:
        load = bench_overload.make_load(100.0, 1.2, SMALL, seed=0)
        load = [([token % 1000 for token in prompt], num_tokens, arrival) for prompt, num_tokens, arrival in load]
        spec = {"url": house.url, "requests": load, "deadline_s": 30.0, "patience_s": 1.0}
        answers = asyncio.run(Client(spec).run())["answers"]
        assert {a["kind"] for a in answers} == {"done", "refused"}, {a["reason"] for a in answers}
        assert all(a["retry_after"] >= 1 for a in answers if a["kind"] == "refused")
        assert all(a["first"] is not None for a in answers if a["kind"] == "done")
        assert house.router is not None
        counters = house.router.ledger.counters
        num_refused = sum(a["kind"] == "refused" for a in answers)
        assert num_refused == counters["refused"] + counters["refused_as_too_late"] > 0
        # No deadline that can be kept: not one token is computed for what is refused, and none of it is an error.
        spec |= {"deadline_s": 0.05, "patience_s": 30.0}
        kinds = [a["kind"] for a in asyncio.run(Client(spec).run())["answers"]]
        assert set(kinds) <= {"done", "refused", "late"}
        assert kinds.count("refused") + kinds.count("late") > len(kinds) // 2
        closed = asyncio.run(Client(spec | {"deadline_s": None, "concurrency": 3, "requests": load[:12]}).run())
        assert [a["kind"] for a in closed["answers"]] == ["done"] * 12
        house.check_rest()
