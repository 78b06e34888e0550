"""RayMetrics: the metrics of the table through Ray's own agent, from one process. Knows ray.util.metrics, and no values.

Ray writes ``ray_`` before a name, takes no colon in it, and adds ``_total`` to a counter's: vllm:prompt_tokens_total is
``ray_vllm_prompt_tokens_total`` there. It takes single observations of a histogram and no counts, so a histogram is told as
gauges, bucket by bucket, with the label ``le``: the series have the names and values that a query asks for.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import accumulate

from ray.util import metrics as ray_metrics

from serve_app.metrics import Metric, Samples, edges_of


class RayMetrics:
    """For one thread at a time."""

    def __init__(self) -> None:
        self._gauges: dict[str, ray_metrics.Gauge] = {}
        self._counters: dict[str, ray_metrics.Counter] = {}
        self._counted: dict[tuple[str, tuple[str, ...]], float] = {}
        """What Ray's counters stand at."""

    def publish(self, items: Iterable[tuple[Metric, Samples]]) -> int:
        """Tells all of it: Ray forgets a gauge that is not told again. Returns how many values that were."""
        num_values = 0
        for metric, samples in items:
            name, labels = ray_name(metric), metric.labels
            for values, value in samples:
                tags = dict(zip(labels, values, strict=True))
                if isinstance(value, list):
                    buckets = list(accumulate(value[:-1]))
                    for edge, number in zip(edges_of(metric), buckets, strict=True):
                        self._gauge(f"{name}_bucket", metric, "le").set(number, {**tags, "le": edge})
                    self._gauge(f"{name}_count", metric).set(buckets[-1], tags)
                    self._gauge(f"{name}_sum", metric).set(value[-1], tags)
                    num_values += len(buckets) + 2
                    continue
                num_values += 1
                if metric.kind == "gauge":
                    self._gauge(name, metric).set(value, tags)
                else:
                    self._count(name, metric, values, value, tags)
        return num_values

    def _count(self, name: str, metric: Metric, values: tuple[str, ...], value: float, tags: dict[str, str]) -> None:
        more = value - self._counted.get((name, values), 0.0)
        if more > 0:
            if name not in self._counters:
                self._counters[name] = ray_metrics.Counter(name, metric.help, metric.labels)
            self._counters[name].inc(more, tags)
            self._counted[name, values] = value

    def _gauge(self, name: str, metric: Metric, *more: str) -> ray_metrics.Gauge:
        if name not in self._gauges:
            self._gauges[name] = ray_metrics.Gauge(name, metric.help, (*metric.labels, *more))
        return self._gauges[name]


def ray_name(metric: Metric) -> str:
    """Without the ending that Ray adds."""
    name = metric.name.replace(":", "_")
    return name.removesuffix("_total") if metric.kind == "counter" else name
