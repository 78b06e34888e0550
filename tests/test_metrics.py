"""The table of metrics: names that Prometheus takes, vLLM's own spelling, and docs that say the same."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from serve_app.engine.engine import Engine
from serve_app.metrics import ENGINE, OWN_BOOKS, PREFIX, TABLE, VLLM, Metric, reference, render, samples
from serve_app.routing.ledger import Ledger
from serve_app.routing.ledger_options import LedgerOptions
from tests.engine.harness import Watched, make_request

DOCS = Path(__file__).parent.parent / "docs"

VLLM_NAMES = {
    "vllm:num_requests_running": "gauge",
    "vllm:num_requests_waiting": "gauge",
    "vllm:kv_cache_usage_perc": "gauge",
    "vllm:cache_config_info": "gauge",
    "vllm:prefix_cache_queries_total": "counter",
    "vllm:prefix_cache_hits_total": "counter",
    "vllm:num_preemptions_total": "counter",
    "vllm:prompt_tokens_total": "counter",
    "vllm:generation_tokens_total": "counter",
    "vllm:request_success_total": "counter",
    "vllm:iteration_tokens_total": "histogram",
    "vllm:time_to_first_token_seconds": "histogram",
    "vllm:inter_token_latency_seconds": "histogram",
    "vllm:request_time_per_output_token_seconds": "histogram",
    "vllm:e2e_request_latency_seconds": "histogram",
    "vllm:request_queue_time_seconds": "histogram",
    "vllm:request_inference_time_seconds": "histogram",
    "vllm:request_prefill_time_seconds": "histogram",
    "vllm:request_decode_time_seconds": "histogram",
    "vllm:request_prompt_tokens": "histogram",
    "vllm:request_generation_tokens": "histogram",
    "vllm:request_max_num_generation_tokens": "histogram",
    "vllm:request_params_n": "histogram",
    "vllm:request_params_max_tokens": "histogram",
}
"""As vLLM writes them (vllm/v1/metrics/loggers.py; a counter's _total is its client library's)."""

VLLM_LATENCY_BOUNDS = (0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0)


def test_names_are_prometheus_own() -> None:
    assert len({metric.name for metric in TABLE}) == len(TABLE)
    for metric in TABLE:
        assert re.fullmatch(r"[a-z_:][a-z0-9_:]*", metric.name)
        assert metric.name.startswith((PREFIX, VLLM))
        assert metric.name.endswith("_total") or metric.kind != "counter", metric
        assert not metric.help.endswith("."), metric
        assert (metric.kind == "histogram") == bool(metric.bounds)
        assert list(metric.bounds) == sorted(set(metric.bounds))
        assert metric.name.startswith(PREFIX) or metric.labels[0] == "model_name"


def test_vllms_names_are_vllms() -> None:
    assert {m.name: m.kind for m in TABLE if m.name.startswith(VLLM)} == VLLM_NAMES
    by_name = {metric.name: metric for metric in TABLE}
    for name in ("e2e_request_latency_seconds", "request_queue_time_seconds", "request_decode_time_seconds"):
        assert set(VLLM_LATENCY_BOUNDS) <= set(by_name[VLLM + name].bounds)


def test_the_docs_hold_the_table() -> None:
    assert (DOCS / "metrics.md").read_text().endswith("\n## All of them\n\n" + reference()), (
        "write the end of docs/metrics.md anew: python -m serve_app.metrics"
    )


def a_snapshot(engine: Engine | None = None, **more: Any) -> dict[str, Any]:
    counts = {} if engine is None else {"r": {**engine.counts(), OWN_BOOKS: {(): 3}}}
    return {**Ledger(LedgerOptions(), 17).snapshot(), "replica_counts": counts, "ingress_counts": {}, **more}


def test_every_count_of_an_engine_is_a_metric_and_the_other_way_round() -> None:
    watched = Watched()
    watched.add(make_request("a", 5, max_tokens=3))
    watched.run()
    counts = watched.engine.counts()
    assert counts.keys() == ENGINE.keys()
    for key, values in counts.items():
        for labels, value in values.items():
            metric: Metric = ENGINE[key]
            assert isinstance(value, list) == (metric.kind == "histogram")
            assert len(labels) == len(set(metric.labels) - {"model_name", "replica"})
    rendered = {m.name: dict(values) for m, values in samples(a_snapshot(watched.engine), "m")}
    assert rendered["vllm:generation_tokens_total"] == {("m", "r"): 3}
    assert rendered["ragged_serve_sequences_ended_total"]["r", "length"] == 1


def test_what_a_client_or_a_name_may_hold_is_escaped() -> None:
    odd = 'a"b\\c\nd\u20ac'
    counts = {"http_answers": {(odd, "200"): 2}, "request_prompt_tokens": {(): [1.0] * 20}}
    text = render(a_snapshot(ingress_counts=counts), odd)
    families = {family.name: family for family in text_string_to_metric_families(text)}
    (sample,) = families["ragged_serve_http_answers"].samples
    assert (sample.labels, sample.value) == ({"route": odd, "status": "200"}, 2)
    buckets = [s for s in families["vllm:request_prompt_tokens"].samples if s.name.endswith("_bucket")]
    assert {s.labels["model_name"] for s in buckets} == {odd}
    assert [s.value for s in buckets] == list(range(1, 20))


def test_a_number_where_a_histogram_belongs_is_our_mistake() -> None:
    with pytest.raises(AssertionError, match="is a histogram"):
        render(a_snapshot(ingress_counts={"request_prompt_tokens": {(): 1.0}}), "m")
