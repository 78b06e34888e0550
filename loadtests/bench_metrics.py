"""Cost of metrics and step records: nanoseconds per step, per sequence and per output, and as a share of real steps.

Theory: a step adds to three histograms, a dozen sums and a line's five moments, some 30 additions of Python; at 50 ns each
that is 1.5 us, whatever the number of sequences. A step record is one tuple for each sequence. The aim is that both together
take less than 1 % of a step of the bundled model on a CPU, whose steps are shorter than any that matter.

    step          EngineTotals.add_step, StepRecorder.append, and the StepRecord itself
    sequence      its tuple in the step record, in every step
    life          of a sequence: its first step and its end, once
    output        at the ingress: what an output of a choice adds to the histograms of its client's times
    answer        at the ingress: the end of a request
    report        a replica's counts as a message, four a second
    tell          an ingress's, one a second
    scrape        the text of /metrics, on a thread of the ingress
    ray           with --ray: one value told to Ray's agent, every ten seconds (starts a Ray of its own)

Medians of --repeat passes; a machine that does something else shows in all of them.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import pickle
import platform
import statistics
import timeit
from collections.abc import Callable
from pathlib import Path
from typing import Any

import serve_app.demo_model
from serve_app.api.ingress_counts import IngressCounts, RequestTimes
from serve_app.engine.request import FinishReason, GenerateRequest, SamplingParams
from serve_app.engine.scheduler import ScheduledSequence, SchedulerOutput
from serve_app.engine.sequence import Sequence
from serve_app.engine.step_record import StepRecord, StepRecorder
from serve_app.engine.totals import EngineTotals, Histogram
from serve_app.llm import LLM
from serve_app.metrics import OWN_BOOKS, render, samples
from serve_app.routing.leases import ReplicaReport
from serve_app.routing.ledger import Ledger
from serve_app.routing.ledger_options import LedgerOptions

AIM = 0.01
"""Share of a step."""
RUNNING = (1, 8, 32)
"""Sequences of the real steps."""
PARTS = ("schedule", "launch", "wait", "update", "batch", "model", "sampler", "head")


def nanoseconds(work: Callable[[], object], repeat: int, number: int) -> float:
    """Of one call, the call of the lambda among it."""
    return 1e9 * statistics.median(timeit.repeat(work, number=number, repeat=repeat)) / number


def a_plan(num_seqs: int) -> SchedulerOutput:
    """Decodes alone."""
    sampling = SamplingParams(max_tokens=64).resolved()
    items = []
    for i in range(num_seqs):
        request = GenerateRequest(f"request-{i}", tuple(range(32)), sampling)
        sequence = Sequence(request, arrival=i, max_output_tokens=64, stop_ids=frozenset(), deadline=None)
        items.append(ScheduledSequence(sequence, 32, 1, True))
    return SchedulerOutput(items, num_seqs)


def a_record(plan: SchedulerOutput) -> StepRecord:
    return StepRecord(
        index=0,
        started=0.0,
        sequences=plan.sequence_steps(),
        num_tokens=plan.num_tokens,
        token_budget=512,
        num_running=len(plan.scheduled),
        num_waiting=0,
        num_blocks=1024,
        num_used_blocks=512,
        num_recomputed_tokens=0,
        num_preempted=0,
        seconds=dict.fromkeys(PARTS, 0.001),
    )


def costs(repeat: int) -> dict[str, float]:
    """Nanoseconds by what is said above."""
    few, many = a_plan(1), a_plan(65)
    record = a_record(few)
    recorder, totals = StepRecorder(), EngineTotals()

    def step() -> None:
        a_record(few)
        recorder.append(record)
        totals.add_step(record)

    def life() -> None:
        totals.add_first_step(32, 0.01)
        totals.num_ended[FinishReason.LENGTH] += 1

    of_one, of_many = (nanoseconds(plan.sequence_steps, repeat, 4_000) for plan in (few, many))
    counts = IngressCounts()
    times = RequestTimes(counts, 0.0, 32, 1)
    now = iter(range(1 << 60))

    def answer() -> None:
        one = RequestTimes(counts, 0.0, 32, 1)
        one.output((0, 0), 1, 0.1)
        one.output((0, 0), 1, 0.2)
        one.ended((0, 0), FinishReason.LENGTH)
        one.answered(0.05, 0.2)

    queue, events = Histogram((0.1, 1.0)), dict.fromkeys(("lost", "resumed"), 3)
    return {
        "totals": nanoseconds(lambda: totals.add_step(record), repeat, 20_000),
        "step": nanoseconds(step, repeat, 10_000) - of_one,
        "sequence": (of_many - of_one) / 64,
        "life": nanoseconds(life, repeat, 20_000),
        "output": nanoseconds(lambda: times.output((0, 0), 1, float(next(now))), repeat, 20_000),
        "answer": nanoseconds(answer, repeat, 5_000),
        "report": nanoseconds(lambda: pickle.dumps(totals.counts()), repeat, 1_000),
        "tell": nanoseconds(lambda: pickle.dumps(counts.counts(queue, events, events)), repeat, 1_000),
    }


def a_snapshot(num_replicas: int, engine_counts: dict[str, Any]) -> dict[str, Any]:
    """What a router with so many replicas tells."""
    ledger = Ledger(LedgerOptions(), 1)
    for i in range(num_replicas):
        ledger.report(ReplicaReport(f"app#Replica#{i:08}", 1, 32, 1024, 4096, "bits"), 0.0)
    counts = IngressCounts()
    counts.http_answers["/v1/completions", "200"] = 7
    return {
        **ledger.snapshot(),
        "replica_counts": {r: {**engine_counts, OWN_BOOKS: {(): 1}} for r in ledger.snapshot()["replicas"]},
        "ingress_counts": counts.counts(Histogram(counts.request_seconds.bounds), {}, {}),
    }


def real_steps(llm: LLM, num_seqs: int, num_tokens: int) -> float:
    """Seconds of a step in which so many sequences decode: the median."""
    prompts = [[5 + i % 90] * (24 + i % 7) for i in range(num_seqs)]
    llm.generate(prompts, SamplingParams(max_tokens=num_tokens, ignore_eos=True))
    durations = [r.duration for r in llm.engine.recorder.records if r.num_tokens == len(r.sequences) == num_seqs]
    return statistics.median(durations)


def ray_cost(snapshot: dict[str, Any]) -> tuple[float, int]:
    """Nanoseconds of one value, and how many there are."""
    import ray

    from serve_app.routing.ray_metrics import RayMetrics

    ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False)
    try:
        publisher = RayMetrics()
        number = publisher.publish(samples(snapshot, "demo"))
        return nanoseconds(lambda: publisher.publish(samples(snapshot, "demo")), 5, 5) / number, number
    finally:
        ray.shutdown()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeat", type=int, default=7, help="passes")
    parser.add_argument("--tokens", type=int, default=100, help="tokens of each real answer")
    parser.add_argument("--ray", action="store_true", help="measure also what Ray's agent is told")
    arguments = parser.parse_args()
    gc.freeze()
    found = costs(arguments.repeat)
    for name, value in found.items():
        print(f"{name:10}{value:12,.0f} ns")
    llm = LLM(Path(serve_app.demo_model.__file__).parent, max_num_seqs=max(RUNNING))
    shares = {}
    print(f"{'running':>8}{'step, ms':>10}{'metrics and records, us':>25}{'share':>9}{'aim':>7}")
    for num_seqs in RUNNING:
        seconds = real_steps(llm, num_seqs, arguments.tokens)
        # A life is spread over the steps of its tokens.
        own = found["step"] + num_seqs * (found["sequence"] + found["life"] / arguments.tokens)
        shares[num_seqs] = 1e-9 * own / seconds
        print(f"{num_seqs:8}{1e3 * seconds:10.2f}{own / 1e3:25.1f}{shares[num_seqs]:9.2%}{AIM:7.0%}")
    engine_counts = llm.engine.counts()
    scrapes = {}
    for num_replicas in (2, 16, 64):
        snapshot = a_snapshot(num_replicas, engine_counts)
        text = render(snapshot, "demo")
        scrapes[num_replicas] = 1e-6 * nanoseconds(lambda s=snapshot: render(s, "demo"), 3, 1)  # type: ignore[misc]
        print(f"scrape of {num_replicas} replicas: {scrapes[num_replicas]:.1f} ms, {len(text) / 1024:.0f} KiB")
    ray_ns, num_values = ray_cost(a_snapshot(2, engine_counts)) if arguments.ray else (None, None)
    if ray_ns is not None:
        print(f"ray       {ray_ns:12,.0f} ns for each of {num_values} values of 2 replicas")
    print(
        json.dumps(
            {
                "bench": "metrics",
                "python": platform.python_version(),
                "load_average": round(os.getloadavg()[0], 2),
                "ns": {name: round(value, 1) for name, value in found.items()},
                "share_of_step": {str(k): round(v, 5) for k, v in shares.items()},
                "scrape_ms": {str(k): round(v, 2) for k, v in scrapes.items()},
                "ray_ns_per_value": ray_ns and round(ray_ns, 1),
                "ray_values": num_values,
            }
        )
    )


if __name__ == "__main__":
    main()
