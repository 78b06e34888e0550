"""The figures of a load test: tallies that workers fill and a master adds up, the names that `vllm bench serve` gives them,
and the verdict against an SLO. Knows no socket, no clock and no locust.

Percentiles come from histograms whose buckets are 1 % wide: they are right to half a percent, also when many workers' are
added up. Means, standard deviations and extremes are exact.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, field, fields
from typing import Any

from loadtests.load_stream import COMPLETED, FAILED, LOST, REFUSED, Outcome

Json = dict[str, Any]

WIDTH = 0.01
"""Of a histogram's bucket, relative."""
_LOG = math.log1p(WIDTH)
SMALLEST = 1e-6
"""Seconds; what is shorter counts in the first bucket."""
BINS_PER_SECOND = 1000
"""Open streams are counted in such bins: a stream that follows another in the same one does not overlap it."""
BUSY_CPU = 0.9
"""Share of a second that a client process computes: above, it may be what is measured."""
NUM_BUSY_SECONDS = 3
LOOK_SECONDS = 0.05
"""A client process sleeps so long between two looks at itself; what it sleeps longer is a stall."""
STALLED = 0.05
"""Share of the run for which a client process should have run and could not: another program had the core."""
MAX_LAG_MS = 100.0
"""p99 of how much later than due requests were sent: above, the client is what is measured."""
METRICS = (
    ("ttft", "TTFT", "Time to First Token"),
    ("tpot", "TPOT", "Time per Output Token (excl. 1st token)"),
    ("itl", "ITL", "Inter-token Latency"),
    ("e2el", "E2EL", "End-to-end Latency"),
)
"""Key, name and title, as `vllm bench serve` has them."""


class Histogram:
    """Seconds, in logarithmic buckets."""

    def __init__(self) -> None:
        self.num = 0
        self.total = self.squares = self.highest = 0.0
        self.lowest = math.inf
        self.buckets: Counter[int] = Counter()

    def add(self, value: float) -> None:
        value = max(0.0, value)
        self.num += 1
        self.total += value
        self.squares += value * value
        self.highest, self.lowest = max(self.highest, value), min(self.lowest, value)
        self.buckets[math.floor(math.log(max(value, SMALLEST)) / _LOG)] += 1

    def merge(self, other: Histogram) -> None:
        self.num += other.num
        self.total += other.total
        self.squares += other.squares
        self.highest, self.lowest = max(self.highest, other.highest), min(self.lowest, other.lowest)
        self.buckets.update(other.buckets)

    @property
    def mean(self) -> float:
        return self.total / self.num if self.num else 0.0

    @property
    def std(self) -> float:
        return math.sqrt(max(0.0, self.squares / self.num - self.mean**2)) if self.num else 0.0

    def percentile(self, percent: float) -> float:
        """The value at this rank (nearest), as the middle of its bucket; 0 without values."""
        if not self.num:
            return 0.0
        rank, seen = max(1, math.ceil(self.num * percent / 100)), 0
        for bucket in sorted(self.buckets):
            seen += self.buckets[bucket]
            if seen >= rank:
                return min(self.highest, max(self.lowest, math.exp((bucket + 0.5) * _LOG)))
        return self.highest

    def shares(self) -> list[tuple[float, float]]:
        """(value, share of the values that are at most it), ascending."""
        found, seen = [], 0
        for bucket in sorted(self.buckets):
            seen += self.buckets[bucket]
            found.append((math.exp((bucket + 1) * _LOG), seen / self.num))
        return found

    def to_data(self) -> list[Any]:
        return [self.num, self.total, self.squares, self.highest, self.lowest, dict(self.buckets)]

    @classmethod
    def from_data(cls, data: list[Any]) -> Histogram:
        made = cls()
        made.num, made.total, made.squares, made.highest, made.lowest, buckets = data
        made.buckets = Counter(buckets)
        return made


@dataclass(frozen=True)
class Slo:
    """What a request must keep to be good, and how many must be."""

    ttft_ms: float | None = None
    tpot_ms: float | None = None
    itl_ms: float | None = None
    """The longest gap of its stream. (`vllm bench serve` has no such limit.)"""
    e2el_ms: float | None = None
    share: float = 0.99
    """Of all requests, refused and failed ones included, that must be good."""

    @property
    def limits(self) -> dict[str, float]:
        """Those that are given, in milliseconds."""
        values = {name: getattr(self, f"{name}_ms") for name, _, _ in METRICS}
        return {name: value for name, value in values.items() if value is not None}

    def missed(self, outcome: Outcome) -> list[str]:
        """The limits that a completed request did not keep."""
        has = {
            "ttft": outcome.ttft,
            "tpot": outcome.tpot,
            "itl": max(outcome.itls, default=0.0),
            "e2el": outcome.e2el,
        }
        return [name for name, limit in self.limits.items() if has[name] * 1000 > limit]


@dataclass
class Second:
    """What was in one second of the run."""

    due: int = 0
    good: int = 0
    """By the end of the request; so are the next."""
    completed: int = 0
    refused: int = 0
    failed: int = 0
    lost: int = 0
    tokens: float = 0.0
    """A request's tokens, spread over its events."""
    ttft: Histogram = field(default_factory=Histogram)
    """Of the requests due in it."""
    gap: float = 0.0
    """The longest between two events, where it ended."""

    def merge(self, other: Second) -> None:
        for each in fields(self):
            if each.name == "ttft":
                self.ttft.merge(other.ttft)
            elif each.name == "gap":
                self.gap = max(self.gap, other.gap)
            else:
                setattr(self, each.name, getattr(self, each.name) + getattr(other, each.name))


class Tally:
    """What became of some requests. Workers fill one after the other; the master merges them all."""

    def __init__(self, slo: Slo) -> None:
        self.slo = slo
        self.kinds: Counter[str] = Counter()
        self.reasons: Counter[str] = Counter()
        """Of requests that were not completed, with their kind."""
        self.missed: Counter[str] = Counter()
        """Completed requests that did not keep a limit, by limit."""
        self.num_good = 0
        self.num_prompt_tokens = self.num_output_tokens = 0
        self.num_cut = 0
        """Requests that the model's length cut."""
        self.histograms = {
            name: Histogram() for name in ("ttft", "tpot", "itl", "e2el", "lag", "stall", "tokens_per_s")
        }
        """lag: sent after due. stall: a client process should have run, and did not. tokens_per_s: of each request, behind
        its first token."""
        self.seconds: dict[int, Second] = {}
        self.changes: Counter[int] = Counter()
        """By bin of `BINS_PER_SECOND`: completed streams that began, less those that ended."""
        self.cpu: dict[int, float] = {}
        """By second: the share of it that the busiest client process computed."""
        self.cpu_seconds = 0.0
        """Of all client processes together."""
        self.end = 0.0
        """Of the last request, in seconds since the run began."""

    def add(self, outcome: Outcome, *, is_cut: bool = False) -> bool:
        """Whether it was good."""
        self.kinds[outcome.kind] += 1
        self.num_cut += is_cut
        self.end = max(self.end, outcome.end)
        self.histograms["lag"].add(outcome.sent - outcome.due)
        self._second(outcome.due).due += 1
        last = self._second(outcome.end)
        setattr(last, outcome.kind, getattr(last, outcome.kind) + 1)
        if outcome.kind != COMPLETED:
            self.reasons[f"{outcome.kind}: {outcome.reason}"] += 1
            return False
        self.num_prompt_tokens += outcome.num_prompt_tokens
        self.num_output_tokens += outcome.num_output_tokens
        itls = outcome.itls
        for name, values in (("ttft", [outcome.ttft]), ("e2el", [outcome.e2el]), ("itl", itls)):
            for value in values:
                self.histograms[name].add(value)
        if outcome.num_output_tokens > 1:
            self.histograms["tpot"].add(outcome.tpot)
            if outcome.tpot > 0:
                self.histograms["tokens_per_s"].add(1 / outcome.tpot)
        self._second(outcome.due).ttft.add(outcome.ttft)
        weight = outcome.num_output_tokens / len(outcome.times)
        for at, gap in zip(outcome.times, [0.0, *itls], strict=True):
            second = self._second(at)
            second.tokens += weight
            second.gap = max(second.gap, gap)
        self.changes[math.floor(outcome.sent * BINS_PER_SECOND)] += 1
        self.changes[math.floor(outcome.end * BINS_PER_SECOND)] -= 1
        missed = self.slo.missed(outcome)
        self.missed.update(missed)
        if not missed:
            self.num_good += 1
            last.good += 1
        return not missed

    def add_cpu(self, at: float, share: float, seconds: float = 0.0) -> None:
        """A client process computed for this share of the second at ``at``, and for so many seconds."""
        second = math.floor(at)
        self.cpu[second] = max(self.cpu.get(second, 0.0), share)
        self.cpu_seconds += seconds

    def _second(self, at: float) -> Second:
        return self.seconds.setdefault(max(0, math.floor(at)), Second())

    @property
    def num_requests(self) -> int:
        return sum(self.kinds.values())

    # ---- between processes ---------------------------------------------------------------------------------------

    def to_data(self) -> Json:
        """Plain data, which `merge` takes."""
        return {
            "kinds": dict(self.kinds),
            "reasons": dict(self.reasons),
            "missed": dict(self.missed),
            "num_good": self.num_good,
            "num_prompt_tokens": self.num_prompt_tokens,
            "num_output_tokens": self.num_output_tokens,
            "num_cut": self.num_cut,
            "histograms": {name: histogram.to_data() for name, histogram in self.histograms.items()},
            "seconds": {
                at: {f.name: getattr(second, f.name) for f in fields(second)} | {"ttft": second.ttft.to_data()}
                for at, second in self.seconds.items()
            },
            "changes": dict(self.changes),
            "cpu": dict(self.cpu),
            "cpu_seconds": self.cpu_seconds,
            "end": self.end,
        }

    def merge(self, data: Json) -> None:
        """Adds what `to_data` of another one gave."""
        for name in ("kinds", "reasons", "missed", "changes"):
            getattr(self, name).update(data[name])
        for name in ("num_good", "num_prompt_tokens", "num_output_tokens", "num_cut", "cpu_seconds"):
            setattr(self, name, getattr(self, name) + data[name])
        for name, histogram in data["histograms"].items():
            self.histograms[name].merge(Histogram.from_data(histogram))
        for at, second in data["seconds"].items():
            self._second(at).merge(Second(**{**second, "ttft": Histogram.from_data(second["ttft"])}))
        for at, share in data["cpu"].items():
            self.add_cpu(at, share)
        self.end = max(self.end, data["end"])

    # ---- figures -------------------------------------------------------------------------------------------------

    def open_streams(self) -> list[tuple[float, int]]:
        """(seconds, completed streams that were open), one for each bin that changed it."""
        found, num = [], 0
        for at in sorted(self.changes):
            num += self.changes[at]
            found.append((at / BINS_PER_SECOND, num))
        return found

    def results(self) -> Json:
        """The figures under the keys of `vllm bench serve --save-result`; ours stand behind them."""
        kinds, duration = self.kinds, max(self.end, 1e-9)
        found: Json = {
            "duration": self.end,
            "completed": kinds[COMPLETED],
            "failed": self.num_requests - kinds[COMPLETED],
            "total_input_tokens": self.num_prompt_tokens,
            "total_output_tokens": self.num_output_tokens,
            "request_throughput": kinds[COMPLETED] / duration,
            "request_goodput": self.num_good / duration if self.slo.limits else None,
            "output_throughput": self.num_output_tokens / duration,
            "total_token_throughput": (self.num_prompt_tokens + self.num_output_tokens) / duration,
            "max_output_tokens_per_s": max((second.tokens for second in self.seconds.values()), default=0.0),
            "max_concurrent_requests": max((num for _, num in self.open_streams()), default=0),
        }
        for name, _, _ in METRICS:
            histogram = self.histograms[name]
            found[f"mean_{name}_ms"] = histogram.mean * 1000
            found[f"median_{name}_ms"] = histogram.percentile(50) * 1000
            found[f"std_{name}_ms"] = histogram.std * 1000
            found[f"p99_{name}_ms"] = histogram.percentile(99) * 1000
        speed, stall = self.histograms["tokens_per_s"], self.histograms["stall"]
        return found | {
            "refused": kinds[REFUSED],
            "failed_with_an_error": kinds[FAILED],
            "lost": kinds[LOST],
            "good": self.num_good,
            "good_share": self.num_good / self.num_requests if self.num_requests else 0.0,
            "slo_ms": self.slo.limits,
            "slo_missed": dict(self.missed),
            "tokens_per_s_of_a_request": {
                "mean": speed.mean,
                "median": speed.percentile(50),
                "p1": speed.percentile(1),
            },
            "cut_to_the_models_length": self.num_cut,
            "reasons": dict(self.reasons.most_common(10)),
            "client": {
                "max_cpu": max(self.cpu.values(), default=0.0),
                "cpu_s": self.cpu_seconds,
                "stalled_share": stall.total / max(1e-9, stall.total + stall.num * LOOK_SECONDS),
                "longest_stall_ms": stall.highest * 1000,
                "busy_seconds": sum(share >= BUSY_CPU for share in self.cpu.values()),
                "p99_lag_ms": self.histograms["lag"].percentile(99) * 1000,
                "max_lag_ms": self.histograms["lag"].highest * 1000,
            },
        }

    def wrong(self) -> list[str]:
        """Why a run has not passed: an SLO that was missed, a stream that was lost, no answer at all."""
        found = []
        if not self.kinds[COMPLETED]:
            found.append("no request was completed")
        if lost := self.kinds[LOST]:
            found.append(f"{lost} streams that had begun ended with neither their end nor an error")
        share = self.num_good / max(1, self.num_requests)
        if self.slo.limits and share < self.slo.share:
            limits = ", ".join(f"{name} {limit:g} ms" for name, limit in self.slo.limits.items())
            found.append(
                f"{share:.2%} of {self.num_requests} requests were good ({limits}); {self.slo.share:.2%} must be"
            )
        return found

    def warnings(self) -> list[str]:
        """Why the figures may be the client's and not the server's."""
        client, found = self.results()["client"], []
        if client["busy_seconds"] >= NUM_BUSY_SECONDS:
            found.append(
                f"a client process computed for {BUSY_CPU:.0%} or more of {client['busy_seconds']} seconds: "
                "it may be what was measured; use --processes or more workers"
            )
        if client["stalled_share"] > STALLED:
            found.append(
                f"the client's processes could not run for {client['stalled_share']:.0%} of the time "
                f"(once for {client['longest_stall_ms']:.0f} ms): the machine is busy, and events were read late"
            )
        if client["p99_lag_ms"] > MAX_LAG_MS:
            found.append(
                f"requests were sent late (p99 {client['p99_lag_ms']:.0f} ms, longest {client['max_lag_ms']:.0f} ms): "
                "times count from when they were due, so that is in all of them"
            )
        return found


def table(results: Json) -> list[str]:
    """The lines that `vllm bench serve` prints, under its names, then ours."""

    def row(name: str, value: Any) -> str:
        return f"{name + ':':<40} {value:<10.2f}" if isinstance(value, float) else f"{name + ':':<40} {value:<10}"

    lines = [
        f"{' Serving Benchmark Result ':=^50}",
        row("Successful requests", results["completed"]),
        row("Failed requests", results["failed"]),
        row("Benchmark duration (s)", results["duration"]),
        row("Total input tokens", results["total_input_tokens"]),
        row("Total generated tokens", results["total_output_tokens"]),
        row("Request throughput (req/s)", results["request_throughput"]),
    ]
    if results["request_goodput"] is not None:
        lines.append(row("Request goodput (req/s)", results["request_goodput"]))
    lines += [
        row("Output token throughput (tok/s)", results["output_throughput"]),
        row("Peak output token throughput (tok/s)", results["max_output_tokens_per_s"]),
        row("Peak concurrent requests", results["max_concurrent_requests"]),
        row("Total token throughput (tok/s)", results["total_token_throughput"]),
    ]
    for key, name, title in METRICS:
        lines.append(f"{title:-^50}")
        for prefix, word in (("mean", "Mean"), ("median", "Median"), ("p99", "P99")):
            lines.append(row(f"{word} {name} (ms)", results[f"{prefix}_{key}_ms"]))
    lines += [
        f"{'Nothing lost':-^50}",
        row("Refused (429, 503)", results["refused"]),
        row("Failed with an error", results["failed_with_an_error"]),
        row("Lost streams", results["lost"]),
    ]
    if "kills" in results:
        lines.append(row("Replicas killed meanwhile", len(results["kills"])))
    lines += [
        f"{'The client itself':-^50}",
        row("Busiest second (CPU share)", results["client"]["max_cpu"]),
        row("P99 sent after due (ms)", results["client"]["p99_lag_ms"]),
        row("Longest stall (ms)", results["client"]["longest_stall_ms"]),
        "=" * 50,
    ]
    return lines
