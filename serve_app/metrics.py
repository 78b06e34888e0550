"""Every metric in one table, and the Prometheus text of what the router knows. Knows no Ray.

Who counts what:

    router     LEDGER and REPLICA, from Ledger.snapshot
    replica    ENGINE: its engine's totals, with the label replica
    ingress    INGRESS: requests as their clients saw them, one sum of all ingresses

Names with ``vllm:`` are those of vLLM's V1 engine (docs/design/metrics.md and vllm/v1/metrics/loggers.py there), with its
types and labels: what dashboards, autoscaling recipes and inference gateways read. Its label ``engine`` is ``replica`` here.
Bounds are vLLM's, and some more.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import accumulate
from typing import Any, NamedTuple

from prometheus_client import Metric as Family, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.registry import Collector

from serve_app.engine.totals import (
    QUEUE_SECONDS_BOUNDS,
    SEQUENCE_BOUNDS,
    STEP_SECONDS_BOUNDS,
    TOKEN_BOUNDS,
    Counts,
    Value,
)

PREFIX = "ragged_serve_"
VLLM = "vllm:"
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
ROUTER = "router"
"""Value of the label replica for requests that wait where no replica has them yet."""

LATENCY_BOUNDS = (
    *(0.01, 0.025, 0.05, 0.1, 0.2, 0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0),
    *(120.0, 240.0, 480.0, 960.0, 1920.0, 7680.0),
)
"""Seconds of a whole request, or of a part of it."""
FIRST_TOKEN_BOUNDS = (
    *(0.001, 0.0025, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.2, 0.25, 0.5, 0.75, 1.0, 2.0, 2.5, 5.0, 7.5, 10.0),
    *(20.0, 40.0, 80.0, 160.0, 640.0, 2560.0),
)
TOKEN_SECONDS_BOUNDS = (
    *(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0),
    *(20.0, 40.0, 80.0),
)
"""Seconds between two tokens."""
LENGTH_BOUNDS = tuple(float(m * 10**e) for e in range(6) for m in (1, 2, 5))
"""Tokens of a request: 1, 2, 5, 10, ... 500,000."""
CHOICES_BOUNDS = (1.0, 2.0, 5.0, 10.0, 20.0)


class Metric(NamedTuple):
    name: str
    """As it stands in the text; that of a counter ends in _total."""
    kind: str
    """gauge, counter or histogram, in Prometheus' sense."""
    help: str
    labels: tuple[str, ...] = ()
    bounds: tuple[float, ...] = ()
    """Of a histogram's buckets, without +Inf."""


def _own(name: str, kind: str, help: str, *labels: str, bounds: Sequence[float] = ()) -> Metric:
    return Metric(PREFIX + name, kind, help, labels, tuple(bounds))


def _vllm(name: str, kind: str, help: str, *labels: str, bounds: Sequence[float] = ()) -> Metric:
    return Metric(VLLM + name, kind, help, ("model_name", *labels), tuple(bounds))


LEDGER = {
    "epoch": _own("router_epoch", "gauge", "Milliseconds since 1970 at which this life of the router began"),
    "is_rebuilding": _own("router_rebuilding", "gauge", "1 while a restarted router waits for reports"),
    "seconds_left": _own("seconds_left", "gauge", "Until the server ends; absent while nobody has asked for it"),
    "num_leases": _own("leases", "gauge", "Live leases of all replicas"),
    "num_unshown_leases": _own("leases_unshown", "gauge", "Leases that no report of a replica has shown yet"),
    "num_holders": _own("ingresses", "gauge", "Ingresses heard of"),
    "num_queued_requests": _own("queued_requests", "gauge", "Requests that wait for budget"),
    "num_queued_tokens": _own("queued_tokens", "gauge", "Prompt and output tokens of those"),
    "oldest_wait_seconds": _own("oldest_wait_seconds", "gauge", "Age of the request that waits longest"),
    "drain_tokens_per_second": _own("drain_tokens_per_second", "gauge", "Budget freed per second under pressure"),
}
"""Key of Ledger.snapshot -> metric."""

EVENTS = _own(
    "ledger_events_total", "counter", "What happened in the ledger, by kind, in this life of the router", "kind"
)
DRIFT = _own("ledger_drift_total", "counter", "Leases that a replica's report has corrected in the ledger")
DRIFT_EVENT = "drift"
"""The kind of ledger event that is counted there too."""

REPLICA = {
    "num_blocks": _own("replica_kv_blocks", "gauge", "KV blocks of the replica's pool: its budget", "replica"),
    "num_booked_blocks": _own("replica_kv_blocks_booked", "gauge", "Sum of its live leases", "replica"),
    "num_free_blocks": _own(
        "replica_kv_blocks_free", "gauge", "Budget left; below 0 after growth past the pool", "replica"
    ),
    "num_leases": _own("replica_leases", "gauge", "Its live leases", "replica"),
    "max_num_seqs": _own("replica_places", "gauge", "Sequences that one of its steps holds", "replica"),
    "num_booked_seqs": _own(
        "replica_places_booked", "gauge", "Choices of its live leases; an eighth more stand by", "replica"
    ),
    "num_running": _own("replica_running", "gauge", "Sequences in its steps", "replica"),
    "num_waiting": _own("replica_waiting", "gauge", "Sequences that wait inside its engine", "replica"),
    "is_draining": _own("replica_draining", "gauge", "1 while it ends what it has and takes nothing new", "replica"),
    "is_silent": _own("replica_silent", "gauge", "1 while it does not report", "replica"),
}
"""Key of a replica in Ledger.snapshot -> metric."""

RUNNING = _vllm("num_requests_running", "gauge", "Sequences in the steps of a replica", "replica")
WAITING = _vllm(
    "num_requests_waiting",
    "gauge",
    f'Sequences that wait inside a replica; with replica="{ROUTER}" requests that wait for a replica with room',
    "replica",
)
CACHE_CONFIG = _vllm(
    "cache_config_info",
    "gauge",
    "1; the KV cache of a replica in its labels",
    "replica",
    "block_size",
    "num_gpu_blocks",
)

OWN_BOOKS = "num_own_blocks"
"""Key among a replica's counts: blocks booked by its own table."""
REPLICA_DRIFT = _own(
    "replica_kv_blocks_drift",
    "gauge",
    "Blocks booked by the ledger less those in the replica's own table, by its newest report: grants and ends under way;"
    " 0 at rest",
    "replica",
)

ENGINE = {
    "kv_cache_usage": _vllm("kv_cache_usage_perc", "gauge", "Share of the KV blocks in use, 0 to 1", "replica"),
    "num_used_blocks": _own("replica_kv_blocks_used", "gauge", "KV blocks that sequences hold now", "replica"),
    "prompt_tokens": _vllm(
        "prompt_tokens_total",
        "counter",
        "Prompt tokens of requests in their first step, cached ones included",
        "replica",
    ),
    "generation_tokens": _vllm("generation_tokens_total", "counter", "Tokens generated", "replica"),
    "preemptions": _vllm("num_preemptions_total", "counter", "Sequences sent back to wait for blocks", "replica"),
    "prefix_queries": _vllm(
        "prefix_cache_queries_total", "counter", "Prompt tokens looked up in the prefix cache", "replica"
    ),
    "prefix_hits": _vllm("prefix_cache_hits_total", "counter", "Prompt tokens found in the prefix cache", "replica"),
    "step_tokens": _vllm(
        "iteration_tokens_total", "histogram", "Tokens computed by a step", "replica", bounds=TOKEN_BOUNDS
    ),
    "step_sequences": _own("step_sequences", "histogram", "Sequences in a step", "replica", bounds=SEQUENCE_BOUNDS),
    "step_seconds": _own(
        "step_seconds", "histogram", "Time of a step, all its parts", "replica", bounds=STEP_SECONDS_BOUNDS
    ),
    "expected_step_seconds": _own(
        "step_expected_seconds_total",
        "counter",
        "What the steps would have taken by a line fitted to the replica's earlier ones, over their tokens",
        "replica",
    ),
    "part_seconds": _own(
        "step_part_seconds_total",
        "counter",
        "Time of steps by part: schedule, launch, wait and update make up a step; the others are the runner's own parts"
        " of those",
        *("replica", "part"),
    ),
    "recomputed_tokens": _own(
        "recomputed_tokens_total", "counter", "Tokens computed again after a preemption", "replica"
    ),
    "padded_tokens": _own(
        "padded_tokens_total", "counter", "Rows computed and thrown away: CUDA-graph sizes, row tiles", "replica"
    ),
    "queue_seconds": _own(
        "engine_queue_seconds",
        "histogram",
        "Time of a request inside a replica before its first step",
        "replica",
        bounds=QUEUE_SECONDS_BOUNDS,
    ),
    "ended": _own(
        "sequences_ended_total",
        "counter",
        "Sequences that ended in a replica; those that a stop string ended are aborts here",
        *("replica", "finished_reason"),
    ),
}
"""Key of EngineTotals.counts -> metric."""

INGRESS = {
    "first_token_seconds": _vllm(
        "time_to_first_token_seconds",
        "histogram",
        "From a request's arrival to its first token",
        bounds=FIRST_TOKEN_BOUNDS,
    ),
    "token_gap_seconds": _vllm(
        "inter_token_latency_seconds",
        "histogram",
        "Between two outputs of a choice, as they are sent to the client",
        bounds=TOKEN_SECONDS_BOUNDS,
    ),
    "token_seconds": _vllm(
        "request_time_per_output_token_seconds",
        "histogram",
        "Mean time between the tokens of a choice",
        bounds=TOKEN_SECONDS_BOUNDS,
    ),
    "request_seconds": _vllm(
        "e2e_request_latency_seconds",
        "histogram",
        "From the arrival of a request to its end, of those answered in full",
        bounds=LATENCY_BOUNDS,
    ),
    "queue_seconds": _vllm(
        "request_queue_time_seconds", "histogram", "A request's wait for a replica with room", bounds=LATENCY_BOUNDS
    ),
    "prefill_seconds": _vllm(
        "request_prefill_time_seconds", "histogram", "From a replica's room to the first token", bounds=LATENCY_BOUNDS
    ),
    "decode_seconds": _vllm(
        "request_decode_time_seconds", "histogram", "From the first token to the last", bounds=LATENCY_BOUNDS
    ),
    "inference_seconds": _vllm(
        "request_inference_time_seconds", "histogram", "From a replica's room to the last token", bounds=LATENCY_BOUNDS
    ),
    "request_prompt_tokens": _vllm(
        "request_prompt_tokens", "histogram", "Prompt tokens of a request", bounds=LENGTH_BOUNDS
    ),
    "request_generation_tokens": _vllm(
        "request_generation_tokens", "histogram", "Tokens of a request's answer, all choices", bounds=LENGTH_BOUNDS
    ),
    "longest_choice_tokens": _vllm(
        "request_max_num_generation_tokens", "histogram", "Tokens of a request's longest choice", bounds=LENGTH_BOUNDS
    ),
    "params_max_tokens": _vllm(
        "request_params_max_tokens", "histogram", "max_tokens of a request, if it gave it", bounds=LENGTH_BOUNDS
    ),
    "params_n": _vllm("request_params_n", "histogram", "n of a request", bounds=CHOICES_BOUNDS),
    "choices_ended": _vllm(
        "request_success_total",
        "counter",
        "Choices that ended, by reason: stop, length, abort, error",
        "finished_reason",
    ),
    "http_answers": _own(
        "http_answers_total",
        "counter",
        "HTTP answers by route and status; 499: the client was gone",
        *("route", "status"),
    ),
    "stream_events": _own("stream_events_total", "counter", "What lost replicas did to streams, by kind", "kind"),
    "router_client_events": _own(
        "router_client_events_total",
        "counter",
        "failed_calls of the router, own_leases made while it was away, router_lives seen",
        "kind",
    ),
}
"""Key of an ingress's counts -> metric."""

CHAPTERS: tuple[tuple[str, tuple[Metric, ...]], ...] = (
    ("The ledger", (*LEDGER.values(), EVENTS, DRIFT)),
    ("A replica as the ledger sees it", (*REPLICA.values(), REPLICA_DRIFT, RUNNING, WAITING, CACHE_CONFIG)),
    ("What a replica counts", tuple(ENGINE.values())),
    ("What ingresses count, one sum of all", tuple(INGRESS.values())),
)
TABLE: tuple[Metric, ...] = tuple(metric for _, chapter in CHAPTERS for metric in chapter)
"""All of them, in the order of the text."""

Samples = Iterable[tuple[tuple[str, ...], Value]]
"""Values of a metric's labels, and its value."""


def samples(snapshot: Mapping[str, Any], model_name: str) -> Iterator[tuple[Metric, Samples]]:
    """What `Router.snapshot` says, metric by metric, in the order of TABLE. What nobody has told is left out."""
    events, replicas = snapshot["counters"], snapshot["replicas"]
    engines: Mapping[str, Counts] = snapshot.get("replica_counts", {})
    ingresses: Counts = snapshot.get("ingress_counts", {})
    for key, metric in LEDGER.items():
        if snapshot[key] is not None:
            yield metric, [((), snapshot[key])]
    yield EVENTS, [((kind,), number) for kind, number in sorted(events.items())]
    yield DRIFT, [((), events.get(DRIFT_EVENT, 0))]
    for key, metric in REPLICA.items():
        yield metric, [((replica_id,), values[key]) for replica_id, values in replicas.items()]
    own_books = {r: counts[OWN_BOOKS][()] for r, counts in engines.items() if r in replicas and OWN_BOOKS in counts}
    yield REPLICA_DRIFT, [((r,), replicas[r]["num_booked_blocks"] - own) for r, own in own_books.items()]
    yield RUNNING, [((model_name, r), values["num_running"]) for r, values in replicas.items()]
    waiting = {**{r: values["num_waiting"] for r, values in replicas.items()}, ROUTER: snapshot["num_queued_requests"]}
    yield WAITING, [((model_name, r), number) for r, number in waiting.items()]
    caches = {r: (str(values["block_size"]), str(values["num_blocks"])) for r, values in replicas.items()}
    yield CACHE_CONFIG, [((model_name, r, *cache), 1) for r, cache in caches.items()]
    for key, metric in ENGINE.items():
        first = _first(metric, model_name)
        yield (
            metric,
            [
                ((*first, replica_id, *labels), value)
                for replica_id, counts in engines.items()
                # What a replica that has left holds is nothing; what it did stays known for a while.
                if metric.kind != "gauge" or replica_id in replicas
                for labels, value in counts.get(key, {}).items()
            ],
        )
    for key, metric in INGRESS.items():
        first = _first(metric, model_name)
        yield metric, [((*first, *labels), value) for labels, value in ingresses.get(key, {}).items()]


def _first(metric: Metric, model_name: str) -> tuple[str, ...]:
    return (model_name,) if metric.labels[:1] == ("model_name",) else ()


class _Collected(Collector):
    """What prometheus_client asks for metrics."""

    def __init__(self, families: list[Family]) -> None:
        self._families = families

    def collect(self) -> Iterable[Family]:
        return self._families


def render(snapshot: Mapping[str, Any], model_name: str) -> str:
    """Prometheus' text format, version 0.0.4, of `Router.snapshot`."""
    return generate_latest(_Collected([_family(*item) for item in samples(snapshot, model_name)])).decode()


def _family(metric: Metric, samples: Samples) -> Family:
    name, about, labels = metric.name, metric.help, metric.labels
    if metric.kind == "histogram":
        histogram = HistogramMetricFamily(name, about, labels=labels)
        edges = edges_of(metric)
        for values, value in samples:
            assert isinstance(value, list), f"{name} is a histogram"
            histogram.add_metric(values, list(zip(edges, accumulate(value[:-1]), strict=True)), value[-1])
        return histogram
    family = (CounterMetricFamily if metric.kind == "counter" else GaugeMetricFamily)(name, about, labels=labels)
    for values, value in samples:
        assert not isinstance(value, list), f"{name} is a number"
        family.add_metric(values, value)
    return family


def edges_of(metric: Metric) -> list[str]:
    """Values of the label le, in order."""
    return [*(str(float(bound)) for bound in metric.bounds), "+Inf"]


# ---- the reference -------------------------------------------------------------------------------------------------


def reference() -> str:
    """The table as markdown, for docs/metrics.md."""
    lines = []
    for title, chapter in CHAPTERS:
        lines += ["", f"### {title}", "", "| name | type | labels | what it says |", "|---|---|---|---|"]
        for metric in chapter:
            labels = ", ".join(f"`{label}`" for label in metric.labels)
            lines.append(f"| `{metric.name}` | {metric.kind} | {labels} | {metric.help}. |")
    return "\n".join(lines).strip() + "\n"


if __name__ == "__main__":
    sys.stdout.write(reference())
