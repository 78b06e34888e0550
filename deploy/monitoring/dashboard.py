"""Writes dashboard.json, Grafana's classic schema, from the panels below: `python deploy/monitoring/dashboard.py`.

A test compares the two, and the names with serve_app/metrics.py. Knows how panels lie beside each other; knows no server.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

FILE = Path(__file__).with_name("dashboard.json")
WIDTH, HEIGHT = 8, 8
"""Of a panel; the page is 24 wide."""
DATASOURCE = {"type": "prometheus", "uid": "${datasource}"}

JOB = 'job="$job"'
MODEL = f'{JOB}, model_name="$model"'
REPLICA = f'{JOB}, replica=~"$replica"'
MODEL_REPLICA = f'{MODEL}, replica=~"$replica"'
RATE = "[$__rate_interval]"


class Panel(NamedTuple):
    title: str
    unit: str
    """Of Grafana's: s, short, percentunit, ops (per second), ..."""
    about: str
    queries: dict[str, str]
    """Legend -> PromQL."""
    stacked: bool = False


def quantiles(name: str, labels: str) -> dict[str, str]:
    """Of a histogram, over all its labels."""
    rate = f"sum by (le) (rate({name}_bucket{{{labels}}}{RATE}))"
    return {f"p{round(100 * q)}": f"histogram_quantile({q}, {rate})" for q in (0.5, 0.9, 0.99)}


def mean(name: str, labels: str, by: str = "job") -> str:
    """Of a histogram's values."""
    total, number = (f"sum by ({by}) (rate({name}_{part}{{{labels}}}{RATE}))" for part in ("sum", "count"))
    return f"{total} / {number}"


def per_second(name: str, labels: str, by: str) -> str:
    return f"sum by ({by}) (rate({name}{{{labels}}}{RATE}))"


def newest(name: str, labels: str, by: str = "job") -> str:
    """A gauge. max: were a server scraped in two places, both would say the same."""
    return f"max by ({by}) ({name}{{{labels}}})"


def share_within(name: str, variable: str) -> str:
    within = f'sum(rate({name}_bucket{{{MODEL}, le="${variable}"}}{RATE}))'
    return f"{within} / sum(rate({name}_count{{{MODEL}}}{RATE}))"


def share_of_answers(statuses: str) -> str:
    name, routes = "ragged_serve_http_answers_total", f'{JOB}, route=~"/v1/.*"'
    some = f'sum(rate({name}{{{routes}, status=~"{statuses}"}}{RATE}))'
    return f"({some} or vector(0)) / sum(rate({name}{{{routes}}}{RATE}))"


def events(name: str, kind: str) -> str:
    return f'sum by (kind) (increase({name}{{{JOB}, kind=~"{kind}"}}{RATE}))'


def share_of_tokens(name: str) -> str:
    tokens = per_second("vllm:iteration_tokens_total_sum", MODEL_REPLICA, "replica")
    return f"{per_second(name, REPLICA, 'replica')} / {tokens}"


STREAMS = "ragged_serve_stream_events_total"
ROWS: dict[str, list[Panel]] = {
    "What clients see": [
        Panel(
            "Time to first token",
            "s",
            "From a request's arrival to its first token, the queue included.",
            quantiles("vllm:time_to_first_token_seconds", MODEL),
        ),
        Panel(
            "Time between tokens",
            "s",
            "Between two outputs of a choice, as they are sent.",
            quantiles("vllm:inter_token_latency_seconds", MODEL),
        ),
        Panel(
            "Whole request",
            "s",
            "From a request's arrival to its end.",
            quantiles("vllm:e2e_request_latency_seconds", MODEL),
        ),
        Panel(
            "Within the SLO",
            "percentunit",
            "Share of requests whose first token, and whose mean time per token, kept the limits chosen above.",
            {
                "first token within $slo_ttft s": share_within("vllm:time_to_first_token_seconds", "slo_ttft"),
                "a token within $slo_tpot s": share_within("vllm:request_time_per_output_token_seconds", "slo_tpot"),
            },
        ),
        Panel(
            "Answers by status",
            "reqps",
            "HTTP answers of the API's routes. 499: the client was gone.",
            {"{{status}}": per_second("ragged_serve_http_answers_total", f'{JOB}, route=~"/v1/.*"', "status")},
            stacked=True,
        ),
        Panel(
            "Refused and failed",
            "percentunit",
            "Share of the API's answers.",
            {"429, no room": share_of_answers("429"), "5xx": share_of_answers("5..")},
        ),
        Panel(
            "Where a request's time goes",
            "s",
            "Means: wait for a replica with room, then prefill, then decode.",
            {
                "queue": mean("vllm:request_queue_time_seconds", MODEL),
                "prefill": mean("vllm:request_prefill_time_seconds", MODEL),
                "decode": mean("vllm:request_decode_time_seconds", MODEL),
            },
            stacked=True,
        ),
        Panel(
            "Tokens per second",
            "short",
            "Prompt tokens count when a request runs for the first time, cached ones included.",
            {
                "generated": per_second("vllm:generation_tokens_total", MODEL, "job"),
                "prompt": per_second("vllm:prompt_tokens_total", MODEL, "job"),
            },
        ),
        Panel(
            "How choices end",
            "ops",
            "stop, length, abort, error.",
            {"{{finished_reason}}": per_second("vllm:request_success_total", MODEL, "finished_reason")},
            stacked=True,
        ),
    ],
    "The batch": [
        Panel(
            "Tokens in a step",
            "short",
            "Mean. The more, the better a step's weights are used.",
            {"{{replica}}": mean("vllm:iteration_tokens_total", MODEL_REPLICA, "replica")},
        ),
        Panel(
            "Running",
            "short",
            "Sequences in the steps of a replica.",
            {"{{replica}}": newest("vllm:num_requests_running", MODEL_REPLICA, "replica")},
        ),
        Panel(
            "Waiting",
            "short",
            "Inside a replica; at router: requests that wait for a replica with room.",
            {"{{replica}}": newest("vllm:num_requests_waiting", MODEL, "replica")},
        ),
        Panel(
            "Computed in vain",
            "percentunit",
            "Rows thrown away, and tokens computed again after a preemption, as shares of the tokens computed.",
            {
                "padding {{replica}}": share_of_tokens("ragged_serve_padded_tokens_total"),
                "again {{replica}}": share_of_tokens("ragged_serve_recomputed_tokens_total"),
            },
        ),
        Panel(
            "Preemptions",
            "ops",
            "Sequences sent back to wait for blocks.",
            {"{{replica}}": per_second("vllm:num_preemptions_total", MODEL_REPLICA, "replica")},
        ),
        Panel(
            "Prefix cache hits",
            "percentunit",
            "Share of the prompt tokens looked up.",
            {
                "{{replica}}": per_second("vllm:prefix_cache_hits_total", MODEL_REPLICA, "replica")
                + " / "
                + per_second("vllm:prefix_cache_queries_total", MODEL_REPLICA, "replica")
            },
        ),
    ],
    "The budget": [
        Panel(
            "Free KV blocks",
            "short",
            "Budget left by the router's ledger. Below 0: answers grew past the pool.",
            {"{{replica}}": newest("ragged_serve_replica_kv_blocks_free", REPLICA, "replica")},
        ),
        Panel(
            "KV cache in use",
            "percentunit",
            "Share of the blocks that sequences hold.",
            {"{{replica}}": newest("vllm:kv_cache_usage_perc", MODEL_REPLICA, "replica")},
        ),
        Panel(
            "Leases",
            "short",
            "Live ones of each replica, and those that no report has shown yet.",
            {
                "{{replica}}": newest("ragged_serve_replica_leases", REPLICA, "replica"),
                "not shown yet": newest("ragged_serve_leases_unshown", JOB),
            },
        ),
        Panel(
            "Queue",
            "short",
            "Requests that wait at the router.",
            {"requests": newest("ragged_serve_queued_requests", JOB)},
        ),
        Panel(
            "Longest wait",
            "s",
            "Age of the oldest request in the queue, and the slowest hundredth of waits that ended.",
            {
                "oldest now": newest("ragged_serve_oldest_wait_seconds", JOB),
                "p99": quantiles("vllm:request_queue_time_seconds", MODEL)["p99"],
            },
        ),
        Panel(
            "Drift of the ledger",
            "short",
            "Blocks booked less those in the replica's own table: moves under load, 0 at rest. Corrections: always 0.",
            {
                "blocks {{replica}}": newest("ragged_serve_replica_kv_blocks_drift", REPLICA, "replica"),
                "corrections": f"sum by (job) (increase(ragged_serve_ledger_drift_total{{{JOB}}}{RATE}))",
            },
        ),
    ],
    "When parts are lost": [
        Panel(
            "Streams that lost their replica",
            "short",
            "lost and resumed come in pairs; given_up and replica_killers were answered with an error.",
            {"{{kind}}": events(STREAMS, "lost|resumed|given_up|replica_killers|trials")},
        ),
        Panel(
            "Replicas",
            "short",
            "That the router knows.",
            {
                "known": f"count(max by (replica) (ragged_serve_replica_silent{{{JOB}}}))",
                "draining": f"sum(max by (replica) (ragged_serve_replica_draining{{{JOB}}}))",
                "silent": f"sum(max by (replica) (ragged_serve_replica_silent{{{JOB}}}))",
            },
        ),
        Panel(
            "Router and ingresses",
            "short",
            "Ingresses heard of; 1 while a restarted router rebuilds; requests that went past a router that was away.",
            {
                "ingresses": newest("ragged_serve_ingresses", JOB),
                "rebuilding": newest("ragged_serve_router_rebuilding", JOB),
                "{{kind}}": events("ragged_serve_router_client_events_total", "own_leases|router_lives"),
            },
        ),
        Panel(
            "The ledger's events",
            "short",
            "Why leases and waits ended other than by an answer.",
            {
                "{{kind}}": events(
                    "ragged_serve_ledger_events_total",
                    "lost_with_replica|silent_replicas|holders_lost|expired|never_shown|timed_out|refused|refused_as_too_late",
                )
            },
        ),
        Panel(
            "Tokens computed again",
            "short",
            "Per second, after a preemption.",
            {"{{replica}}": per_second("ragged_serve_recomputed_tokens_total", REPLICA, "replica")},
        ),
        Panel(
            "Continued otherwise",
            "short",
            "Streams that went on where the bytes may differ: fast mode, or a replica with other numerics.",
            {"{{kind}}": events(STREAMS, "resumed_in_fast_mode|resumed_with_other_numerics")},
        ),
    ],
    "The engine's steps": [
        Panel(
            "Time of a step",
            "s",
            "All replicas chosen above.",
            quantiles("ragged_serve_step_seconds", REPLICA),
        ),
        Panel(
            "Against what it should take",
            "short",
            "1: as the replica's earlier steps of that many tokens. Longer contexts make steps longer, too.",
            {
                "{{replica}}": per_second("ragged_serve_step_seconds_sum", REPLICA, "replica")
                + " / "
                + per_second("ragged_serve_step_expected_seconds_total", REPLICA, "replica")
            },
        ),
        Panel(
            "Parts of a step",
            "percentunit",
            "Share of the time of all replicas chosen above; what is missing to their number is idle.",
            {
                "{{part}}": per_second(
                    "ragged_serve_step_part_seconds_total",
                    f'{REPLICA}, part=~"schedule|launch|wait|update"',
                    "part",
                )
            },
            stacked=True,
        ),
        Panel(
            "Steps per second",
            "ops",
            "0 with sequences running: stuck.",
            {"{{replica}}": per_second("ragged_serve_step_seconds_count", REPLICA, "replica")},
        ),
        Panel(
            "Sequences in a step",
            "short",
            "Mean.",
            {"{{replica}}": mean("ragged_serve_step_sequences", REPLICA, "replica")},
        ),
        Panel(
            "Wait inside a replica",
            "s",
            "Before a request's first step.",
            quantiles("ragged_serve_engine_queue_seconds", REPLICA),
        ),
    ],
}

ANNOTATIONS = {
    "Streams lost a replica": f'sum(increase({STREAMS}{{{JOB}, kind="lost"}}[1m])) > 0',
    "The router began a new life": f"max(changes((max by (job) (ragged_serve_router_epoch{{{JOB}}}))[1m:5s])) > 0",
}


def dashboard() -> dict[str, Any]:
    """The whole of it."""
    return {
        "uid": "ragged-serve",
        "title": "ragged-serve",
        "tags": ["llm", "ray"],
        "schemaVersion": 39,
        "editable": True,
        "graphTooltip": 1,
        "refresh": "10s",
        "time": {"from": "now-30m", "to": "now"},
        "timezone": "browser",
        "annotations": {
            "list": [
                {
                    "name": name,
                    "enable": True,
                    "hide": False,
                    "iconColor": "red",
                    "datasource": DATASOURCE,
                    "expr": expr,
                    "step": "10s",
                    "titleFormat": name,
                }
                for name, expr in ANNOTATIONS.items()
            ]
        },
        "templating": {
            "list": [
                {"name": "datasource", "label": "Prometheus", "type": "datasource", "query": "prometheus"},
                _found("job", "Server", "label_values(ragged_serve_router_epoch, job)"),
                _found("model", "Model", f"label_values(vllm:num_requests_running{{{JOB}}}, model_name)"),
                _found("replica", "Replica", f"label_values(ragged_serve_replica_kv_blocks{{{JOB}}}, replica)")
                | {"multi": True, "includeAll": True, "allValue": ".*", "current": {"text": "All", "value": "$__all"}},
                _chosen("slo_ttft", "First token within (s)", ["0.25", "0.5", "1.0", "2.5", "5.0", "10.0"], "1.0"),
                _chosen("slo_tpot", "A token within (s)", ["0.025", "0.05", "0.1", "0.2", "0.5"], "0.1"),
            ]
        },
        "panels": list(_laid_out()),
    }


def _found(name: str, label: str, query: str) -> dict[str, Any]:
    """A variable whose values are those of a label."""
    kind = {"name": name, "label": label, "type": "query", "datasource": DATASOURCE}
    return kind | {"query": query, "definition": query, "refresh": 2, "sort": 1}


def _chosen(name: str, label: str, values: list[str], chosen: str) -> dict[str, Any]:
    """A variable with set values: bounds of the buckets, as they are written."""
    options = [{"text": value, "value": value, "selected": value == chosen} for value in values]
    current = {"text": chosen, "value": chosen}
    return {
        "name": name, "label": label, "type": "custom", "query": ",".join(values), "options": options, "current": current
    }  # fmt: skip


def _laid_out() -> list[dict[str, Any]]:
    made: list[dict[str, Any]] = []
    y = 0
    for title, panels in ROWS.items():
        made.append(
            {
                "id": len(made) + 1,
                "type": "row",
                "title": title,
                "collapsed": False,
                "panels": [],
                "gridPos": {"x": 0, "y": y, "w": 24, "h": 1},
            }
        )
        y += 1
        for i, panel in enumerate(panels):
            column, row = i % (24 // WIDTH), i // (24 // WIDTH)
            place = {"x": column * WIDTH, "y": y + row * HEIGHT, "w": WIDTH, "h": HEIGHT}
            made.append(_panel(len(made) + 1, panel, place))
        y += -(-len(panels) // (24 // WIDTH)) * HEIGHT
    return made


def _panel(panel_id: int, panel: Panel, place: dict[str, int]) -> dict[str, Any]:
    drawn: dict[str, Any] = {"fillOpacity": 10, "showPoints": "never"}
    if panel.stacked:
        drawn |= {"fillOpacity": 40, "stacking": {"mode": "normal"}}
    return {
        "id": panel_id,
        "type": "timeseries",
        "title": panel.title,
        "description": panel.about,
        "gridPos": place,
        "datasource": DATASOURCE,
        "fieldConfig": {"defaults": {"unit": panel.unit, "custom": drawn}, "overrides": []},
        "options": {"legend": {"showLegend": True, "displayMode": "list", "placement": "bottom"}},
        "targets": [
            {"refId": chr(ord("A") + i), "datasource": DATASOURCE, "expr": expr, "legendFormat": legend}
            for i, (legend, expr) in enumerate(panel.queries.items())
        ],
    }


def text() -> str:
    return json.dumps(dashboard(), indent=1) + "\n"


if __name__ == "__main__":
    FILE.write_text(text(), encoding="utf-8")
