"""RayMetrics against a stand-in of ray.util.metrics' gauges: the names and values of the text."""

from __future__ import annotations

from typing import Any, ClassVar

import pytest
from prometheus_client.parser import text_string_to_metric_families

from serve_app.metrics import TABLE, render, samples
from serve_app.routing import ray_metrics
from serve_app.routing.leases import ReplicaReport
from serve_app.routing.ledger import Ledger
from serve_app.routing.ledger_options import LedgerOptions
from serve_app.routing.ray_metrics import RayMetrics, ray_name

Labels = tuple[tuple[str, str], ...]


class FakeMetric:
    """What Ray's agent would show: name and labels -> value."""

    shown: ClassVar[dict[tuple[str, Labels], float]] = {}

    def __init__(self, name: str, description: str, tag_keys: tuple[str, ...]) -> None:
        assert ":" not in name
        assert description
        self.name = name
        self.tag_keys = tag_keys

    def key(self, tags: dict[str, str]) -> tuple[str, Labels]:
        assert set(tags) == set(self.tag_keys)
        return self.name, tuple(sorted(tags.items()))


class FakeGauge(FakeMetric):
    def set(self, value: float, tags: dict[str, str]) -> None:
        self.shown[self.key(tags)] = value


@pytest.fixture(autouse=True)
def shown(monkeypatch: pytest.MonkeyPatch) -> dict[tuple[str, Labels], float]:
    monkeypatch.setattr(ray_metrics.ray_metrics, "Gauge", FakeGauge)
    monkeypatch.delattr(ray_metrics.ray_metrics, "Counter")  # its series stay after its process has died
    FakeMetric.shown.clear()
    return FakeMetric.shown


def a_snapshot(num_tokens: int, num_fast: int) -> dict[str, Any]:
    ledger = Ledger(LedgerOptions(), 5)
    ledger.report(ReplicaReport("a", 1, 16, 64, 512, "bits"), 0.0)
    seconds = next(m for m in TABLE if m.name == "vllm:time_to_first_token_seconds")
    return {
        **ledger.snapshot(),
        "replica_counts": {"a": {"generation_tokens": {(): num_tokens}, "ended": {("stop",): 0}}},
        "ingress_counts": {"first_token_seconds": {(): [num_fast, *[1.0] * len(seconds.bounds), 12.5]}},
    }


def test_the_same_values_as_in_the_text(shown: dict[tuple[str, Labels], float]) -> None:
    snapshot = a_snapshot(7, 3)
    RayMetrics().publish(samples(snapshot, "m"))
    families = text_string_to_metric_families(render(snapshot, "m"))
    expected = {
        (s.name.replace(":", "_"), tuple(sorted(s.labels.items()))): s.value
        for family in families
        for s in family.samples
    }
    assert shown == expected
    assert shown["vllm_generation_tokens_total", (("model_name", "m"), ("replica", "a"))] == 7
    first = (("le", "0.001"), ("model_name", "m"))
    assert shown["vllm_time_to_first_token_seconds_bucket", first] == 3


def test_a_new_router_tells_the_same_as_one_that_has_told_before(shown: dict[tuple[str, Labels], float]) -> None:
    """It once told increments to Ray's counters, and those of a router that was killed stood beside its successor's."""
    old, new = RayMetrics(), RayMetrics()
    number = old.publish(samples(a_snapshot(7, 3), "m"))
    for told in (old, new):
        for num_tokens in (9, 30):
            assert told.publish(samples(a_snapshot(num_tokens, 4), "m")) == number
            assert shown["vllm_generation_tokens_total", (("model_name", "m"), ("replica", "a"))] == num_tokens


def test_names_are_rays() -> None:
    names = {metric.name: ray_name(metric) for metric in TABLE}
    assert names["vllm:prompt_tokens_total"] == "vllm_prompt_tokens_total"
    assert names["vllm:iteration_tokens_total"] == "vllm_iteration_tokens_total"
    assert names["ragged_serve_leases"] == "ragged_serve_leases"
    assert len(set(names.values())) == len(TABLE)
