"""RayMetrics: the metrics of the table through Ray's own agent, from one process. Knows ray.util.metrics, and no values.

Ray writes ``ray_`` before a name and takes no colon in it: vllm:prompt_tokens_total is ``ray_vllm_prompt_tokens_total``
there. All are gauges for Ray. Its histograms take single observations and no counts, so one is told bucket by bucket, with
the label ``le``. Its counters outlive who counted: the agent of a node shows what a dead process told it for as long as it
runs itself, beside what the next one tells, while a gauge that nobody tells any more is gone after twice the time between
two reports (10 s). Names, labels and values are what a query asks for.
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
                else:
                    self._gauge(name, metric).set(value, tags)
                    num_values += 1
        return num_values

    def _gauge(self, name: str, metric: Metric, *more: str) -> ray_metrics.Gauge:
        if name not in self._gauges:
            self._gauges[name] = ray_metrics.Gauge(name, metric.help, (*metric.labels, *more))
        return self._gauges[name]


def ray_name(metric: Metric) -> str:
    """Without the ``ray_`` that Ray adds."""
    return metric.name.replace(":", "_")
