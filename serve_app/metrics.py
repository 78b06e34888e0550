"""Every metric's name, type and help in one table, and the Prometheus text of what the router knows. Knows no Ray."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

PREFIX = "ragged_serve_"


class Metric(NamedTuple):
    name: str
    kind: str
    """gauge or counter, in Prometheus' sense."""
    help: str


LEDGER = {
    "epoch": Metric("router_epoch", "gauge", "Milliseconds since 1970 at which this life of the router began"),
    "is_rebuilding": Metric("router_rebuilding", "gauge", "1 while a restarted router waits for reports"),
    "seconds_left": Metric("seconds_left", "gauge", "Until the server ends; absent while nobody has asked for it"),
    "num_leases": Metric("leases", "gauge", "Live leases of all replicas"),
    "num_unshown_leases": Metric("leases_unshown", "gauge", "Leases that no report of a replica has shown yet"),
    "num_holders": Metric("ingresses", "gauge", "Ingresses heard of"),
    "num_queued_requests": Metric("queued_requests", "gauge", "Requests that wait for budget"),
    "num_queued_tokens": Metric("queued_tokens", "gauge", "Prompt and output tokens of those"),
    "oldest_wait_seconds": Metric("oldest_wait_seconds", "gauge", "Age of the request that waits longest"),
    "drain_tokens_per_second": Metric("drain_tokens_per_second", "gauge", "Budget freed per second under pressure"),
}
"""Key of Ledger.snapshot -> metric."""

REPLICA = {
    "num_blocks": Metric("replica_kv_blocks", "gauge", "KV blocks of the replica's pool: its budget"),
    "num_booked_blocks": Metric("replica_kv_blocks_booked", "gauge", "Sum of its live leases"),
    "num_free_blocks": Metric("replica_kv_blocks_free", "gauge", "Budget left; below 0 after growth past the pool"),
    "num_leases": Metric("replica_leases", "gauge", "Its live leases"),
    "max_num_seqs": Metric("replica_places", "gauge", "Sequences that one of its steps holds"),
    "num_booked_seqs": Metric("replica_places_booked", "gauge", "Choices of its live leases; an eighth more stand by"),
    "num_running": Metric("replica_running", "gauge", "Sequences in its steps"),
    "num_waiting": Metric("replica_waiting", "gauge", "Sequences that wait inside its engine"),
    "is_draining": Metric("replica_draining", "gauge", "1 while it ends what it has and takes nothing new"),
    "is_silent": Metric("replica_silent", "gauge", "1 while it does not report"),
}
"""Key of a replica in Ledger.snapshot -> metric, with the label replica."""

STREAMS = Metric("stream_events_total", "counter", "What lost replicas did to streams, by kind, in one ingress")
EVENTS = Metric("ledger_events_total", "counter", "What happened in the ledger, by kind, in this life of the router")


def render(snapshot: Mapping[str, Any], ingress_id: str, streams: Mapping[str, int]) -> str:
    """Prometheus' text format, version 0.0.4, of a Ledger.snapshot and of the Failover.counters of the ingress asked."""
    lines: list[str] = []
    for key, metric in LEDGER.items():
        lines += _lines(metric, [("", snapshot[key])])
    for key, metric in REPLICA.items():
        lines += _lines(metric, [(_label("replica", r), values[key]) for r, values in snapshot["replicas"].items()])
    lines += _lines(EVENTS, [(_label("kind", kind), number) for kind, number in sorted(snapshot["counters"].items())])
    ingress = _label("ingress", ingress_id)[1:-1]
    lines += _lines(STREAMS, [(f"{{{ingress},{_label('kind', k)[1:]}", n) for k, n in sorted(streams.items())])
    return "\n".join(lines) + "\n"


def _lines(metric: Metric, samples: list[tuple[str, Any]]) -> Iterator[str]:
    name = PREFIX + metric.name
    yield f"# HELP {name} {metric.help}"
    yield f"# TYPE {name} {metric.kind}"
    for label, value in samples:
        if value is not None:
            yield f"{name}{label} {float(value):.12g}"


def _label(name: str, value: str) -> str:
    escaped = value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
    return f'{{{name}="{escaped}"}}'
