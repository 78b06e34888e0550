"""Overload: goodput from half of what the service can do to ten times that, against the same engines behind plain Ray Serve.

Load: Poisson arrivals at each multiple of the measured capacity, sent when they are due whatever became of the ones before
(loadtests/open_loop.py, a process of its own), each with a deadline. Replicas are simulated: a step takes --step-ms and no
CPU, so capacity is what --slots and --replicas give, far below what two cores can do over HTTP.

goodput      answers per second that were complete by their deadline, counted where the run is steady: they ended later than
             one deadline after its start and before its last arrival
TTFT         from when a request was due to its first token, of those that got one
refused      429 with Retry-After. late: ended by the server at the deadline (504 or an error event), or left by the client
other        anything else: a status, a cut stream, a wrong number of tokens. Must be 0
/health      asked ten times a second all the while
RSS          resident memory of the parts, each second

"busy" is the share of the machine's cores that was used by anybody, "stolen" what its host took, "lag" how late the client
sent: where the cores or the client were the limit, it shows there.

Plain Ray Serve is loadtests/plain_serve.py: its own proxy, router and queues, and no limit that binds. Its clients leave at
their deadline, and what they asked for is then aborted.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

import psutil

sys.path.insert(0, str(Path(__file__).parent))

from bench_service import ROOT, Server, cpu_time, free_port, make_tokenizer, part_of, service
from open_loop import DONE, ERROR, LATE, REFUSED
from workloads import make_requests, percentiles

Json = dict[str, Any]

GOODPUT_KEPT = 0.9
"""Asked for: goodput at the highest load against its peak."""
MAX_LAG_S = 0.1
"""A client that sends later than this (p99) is what was measured."""
MAX_GROWTH_MIB = 4.0
"""Of each part, in the second half of the highest load: what a burst needs once allocators have taken by then."""
MAX_HEALTH_S = 1.0
PARTS = ("haproxy", "proxy", "ingress", "router", "replica")
MARGIN_S = 1.0
"""Clients of a server that knows their deadline stay so much longer, to hear what it says."""


# ---------------------------------------------------------------------------------------------------------- arithmetic


def make_load(
    rate: float, seconds: float, arguments: argparse.Namespace, seed: int
) -> list[tuple[list[int], int, float]]:
    """Requests that arrive at ``rate`` a second for about ``seconds``."""
    made = make_requests(
        max(1, round(rate * seconds)),
        vocab_size=30_000,
        prompt_lens=(16, 128),
        output_lens=(arguments.tokens // 2, arguments.tokens * 3 // 2),
        rate=rate,
        seed=seed,
    )
    return [(list(r.prompt_token_ids), r.num_output_tokens, r.arrival) for r in made.requests]


def capacity_of(answers: Sequence[Json], warm_s: float) -> float:
    """Answers per second of a closed load, from ``warm_s`` until the last one was begun. RuntimeError if one failed."""
    bad = [a for a in answers if a["kind"] != DONE]
    if bad:
        raise RuntimeError(f"{len(bad)} of {len(answers)} requests failed with no load to speak of, first: {bad[0]}")
    until = max(a["due"] for a in answers)
    ended = [a["due"] + a["seconds"] for a in answers]
    return sum(warm_s < at <= until for at in ended) / (until - warm_s)


def summarize(run: Json, rate: float, deadline_s: float) -> Json:
    """One row of the table. ``run``: what the client printed."""
    answers = run["answers"]
    until = max(a["due"] for a in answers)
    kinds = Counter(a["kind"] for a in answers)
    good = [a for a in answers if a["kind"] == DONE and a["seconds"] <= deadline_s]
    steady_s = until - deadline_s
    if steady_s <= 0:
        raise ValueError(f"the run lasted {until:.1f} s; it must last longer than a deadline ({deadline_s} s)")
    firsts = [a["first"] for a in answers if a["first"] is not None]
    refused = [a for a in answers if a["kind"] == REFUSED]
    health = [seconds for _, seconds, _ in run["probes"]]
    return {
        "offered_per_s": rate,
        "requests": len(answers),
        "goodput_per_s": sum(deadline_s < a["due"] + a["seconds"] <= until for a in good) / steady_s,
        "good": len(good),
        "done_late": kinds[DONE] - len(good),
        "late": kinds[LATE],
        "refused": len(refused),
        "refused_without_retry_after": sum(a["retry_after"] is None for a in refused),
        "other": kinds[ERROR],
        "other_first": next((a["reason"] for a in answers if a["kind"] == ERROR), ""),
        "ttft_ms": percentiles(firsts, 1e3),
        "refusal_ms": percentiles([a["seconds"] for a in refused], 1e3),
        "retry_after_s": percentiles([a["retry_after"] or 0 for a in refused]),
        "health_ms": {**percentiles(health, 1e3), "max": 1e3 * max(health, default=math.nan)},
        "health_failed": sum(status != 200 for _, _, status in run["probes"]),
        "lag_ms": percentiles([a["lag"] for a in answers], 1e3),
        "client_cores": run["cpu_s"] / run["wall_s"],
        "wall_s": run["wall_s"],
    }


def verdicts(rows: Sequence[Json], deadline_s: float) -> list[Json]:
    """What is asked of ragged-serve, about its rows in the order of their load."""
    peak = max(row["goodput_per_s"] for row in rows)
    last = rows[-1]
    growth = max((last["rss_mib"][part] - last["rss_half_mib"][part] for part in last["rss_mib"]), default=0.0)
    checks = (
        ("goodput at the highest load, of its peak", last["goodput_per_s"] / peak, GOODPUT_KEPT, False),
        ("TTFT p99 of the accepted, deadlines", max(r["ttft_ms"]["p99"] for r in rows) / 1e3 / deadline_s, 1.0, True),
        ("errors other than 429 and the deadline", sum(row["other"] for row in rows), 0, True),
        ("429 without Retry-After", sum(row["refused_without_retry_after"] for row in rows), 0, True),
        ("/health not answered with 200", sum(row["health_failed"] for row in rows), 0, True),
        ("/health p99, s", max(row["health_ms"]["p99"] for row in rows) / 1e3, MAX_HEALTH_S, True),
        ("memory grown in half of that load, MiB of a part", growth, MAX_GROWTH_MIB, True),
        ("lag of the client p99, s", max(row["lag_ms"]["p99"] for row in rows) / 1e3, MAX_LAG_S, True),
    )
    return [
        {"what": what, "value": value, "limit": limit, "reached": value <= limit if at_most else value >= limit}
        for what, value, limit, at_most in checks
    ]


def before_overload(rows: Sequence[Json]) -> Json:
    """The row of the highest load that is not above capacity."""
    return max((row for row in rows if row["load"] <= 1), key=lambda row: row["load"], default=rows[0])


def cpu_per_refusal_us(rows: Sequence[Json]) -> Json:
    """What one refused request more costs each part, from 1x to the highest load; {} where none was refused."""
    low, high = before_overload(rows), rows[-1]
    num = high["refused"] / high["wall_s"] - low["refused"] / low["wall_s"]
    if num <= 0:
        return {}
    return {part: 1e6 * (high["cores"].get(part, 0.0) - low["cores"].get(part, 0.0)) / num for part in high["cores"]}


# ------------------------------------------------------------------------------------------------------------- measuring


class Memory:
    """Samples the resident memory of a server's parts in a thread of its own."""

    def __init__(self, server: Server, seconds: float = 1.0) -> None:
        self.samples: list[tuple[float, dict[str, float]]] = []
        self._parts = [(process, part_of(process)) for process in server.processes()]
        self._seconds = seconds
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Memory:
        self._thread.start()
        return self

    def __exit__(self, *failure: object) -> None:
        self._end.set()
        self._thread.join()

    def _run(self) -> None:
        started = time.monotonic()
        while True:
            found: dict[str, float] = {}
            for process, part in self._parts:
                if part in PARTS:
                    with contextlib.suppress(psutil.Error):
                        found[part] = found.get(part, 0.0) + process.memory_info().rss / 2**20
            self.samples.append((time.monotonic() - started, found))
            if self._end.wait(self._seconds):
                return


def ask(spec: Json) -> Json:
    """Runs the client in a process of its own."""
    client = subprocess.run(
        [sys.executable, str(Path(__file__).parent / "open_loop.py")],
        input=json.dumps(spec),
        capture_output=True,
        text=True,
        check=False,
    )
    if client.returncode:
        raise RuntimeError(f"the client failed:\n{client.stderr[-3000:]}")
    answer: Json = json.loads(client.stdout)
    return answer


def measure(server: Server, spec: Json, rate: float, load: float) -> Json:
    """One row, with the CPU and memory of the server's parts meanwhile."""
    before, (total, stolen, idle) = server.cpu(), cpu_time()
    with Memory(server) as memory:
        run = ask(spec)
    after, (total_after, stolen_after, idle_after) = server.cpu(), cpu_time()
    row = summarize(run, rate, spec["deadline_s"])
    ticks = total_after - total
    return {
        "load": load,
        **row,
        "cores": {part: (after[part] - before.get(part, 0.0)) / row["wall_s"] for part in sorted(after)},
        "busy": 1.0 - (idle_after - idle) / ticks,
        "stolen": (stolen_after - stolen) / ticks,
        "rss_half_mib": memory.samples[len(memory.samples) // 2][1],
        "rss_mib": memory.samples[-1][1],
        "rss_max_mib": {
            part: max(found.get(part, 0.0) for _, found in memory.samples) for part in memory.samples[-1][1]
        },
    }


# --------------------------------------------------------------------------------------------------------------- systems


def engine_args(arguments: argparse.Namespace, directory: Path) -> Json:
    return {
        "model": {
            "model": str(directory),
            "runner": "simulated",
            "served_model_name": "bench",
            "simulated": {"seconds_per_step": arguments.step_ms / 1e3},
        },
        "engine": {
            "num_kv_blocks": 1024,
            "max_num_seqs": arguments.slots,
            "max_num_batched_tokens": 1024,
            "max_model_len": 1024,
        },
    }


@contextlib.contextmanager
def plain_server(arguments: argparse.Namespace, args: Json, directory: Path) -> Iterator[Server]:
    port = free_port()
    spec = {"port": port, "num_replicas": arguments.replicas, "max_ongoing_requests": 100_000, "args": args}
    environment = {"RAY_SERVE_ENABLE_HA_PROXY": "0", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(Path(__file__).parent / "plain_serve.py"), json.dumps(spec)]
    server = Server(command, f"http://127.0.0.1:{port}", environment, directory / "plain.log")
    try:
        server.wait_until_ready("/health")
        yield server
    finally:
        server.stop()


def bench(name: str, server: Server, arguments: argparse.Namespace, capacity: float | None) -> Json:
    """Measures one system; offers multiples of ``capacity``, by default of its own."""
    slots = arguments.slots * arguments.replicas
    service_s = arguments.tokens * arguments.step_ms / 1e3
    spec: Json = {"url": server.url, "says_deadline": name == "ragged-serve"}
    some = make_load(1.0, 6 * slots, arguments, seed=99)
    ask(spec | {"requests": some[: 2 * slots], "concurrency": 2 * slots})  # warm: connections, channels, estimates
    # One more than there are slots for each replica keeps every slot filled, and no more waits than that.
    closed = ask(spec | {"requests": some, "concurrency": slots + slots // 4})
    own = capacity_of(closed["answers"], 2 * service_s)
    print(f"{name}: capacity {own:.1f} requests/s measured, {slots / service_s:.1f} = slots / (tokens x step) at most")
    capacity = own if capacity is None else capacity
    rows = []
    print(HEAD, flush=True)
    for i, load in enumerate(arguments.loads):
        rate = load * capacity
        spec |= {
            "requests": make_load(rate, arguments.seconds, arguments, seed=i),
            "deadline_s": arguments.deadline_s,
            "patience_s": MARGIN_S if name == "ragged-serve" else 0.0,
        }
        rows.append(measure(server, spec, rate, load))
        print(line(rows[-1]), flush=True)
    return {"capacity_per_s": own, "rows": rows}


# ---------------------------------------------------------------------------------------------------------------- output

HEAD = (
    "| load | offered/s | goodput/s | TTFT p50, p99 ms | 429 (after ms p50) | late | other | /health p99, max ms |"
    " busy | client | stolen | RSS MiB |\n|---|---|---|---|---|---|---|---|---|---|---|---|"
)


def line(row: Json) -> str:
    """One row of the Markdown table."""
    memory = ", ".join(f"{part} {mib:.0f}" for part, mib in sorted(row["rss_max_mib"].items()))
    refused = f"{row['refused']} ({row['refusal_ms']['p50']:.0f})" if row["refused"] else "0"
    ttft, health = row["ttft_ms"], row["health_ms"]
    return (
        f"| {row['load']:g}x | {row['offered_per_s']:.1f} | {row['goodput_per_s']:.1f} | {ttft['p50']:.0f},"
        f" {ttft['p99']:.0f} | {refused} | {row['late'] + row['done_late']} | {row['other']} | {health['p99']:.0f},"
        f" {health['max']:.0f} | {row['busy']:.0%} | {row['client_cores']:.0%} | {row['stolen']:.0%} | {memory} |"
    )


_STYLE = (
    "text{font-family:Helvetica,Arial,sans-serif;font-size:13px;fill:#1a1a1a}.title{font-size:16px;font-weight:bold}"
)
_STYLE += ".small{font-size:12px;fill:#444444}.middle{text-anchor:middle}.end{text-anchor:end}"
COLORS = {"ragged-serve": "#0072b2", "plain Ray Serve": "#d55e00"}


def svg(systems: dict[str, Sequence[Json]], note: str) -> str:
    """Goodput over offered load as shares of the capacity, one curve for each system."""
    left, top, width, height = 64, 56, 560, 260
    loads = sorted({row["load"] for rows in systems.values() for row in rows})
    unit = next(row["offered_per_s"] / row["load"] for rows in systems.values() for row in rows)
    low, high = math.log(loads[0]), math.log(max(loads[-1], 2 * loads[0]))

    def x(load: float) -> float:
        return left + 20 + (width - 40) * (math.log(load) - low) / (high - low)

    def y(share: float) -> float:
        return top + height * (1 - share / 1.2)

    def text(at_x: float, at_y: float, words: str, style: str = "") -> str:
        classes = f' class="{style}"' if style else ""
        return f'<text x="{at_x:.1f}" y="{at_y:.1f}"{classes}>{escape(words)}</text>'

    body = [text(20, 28, "Answers within their deadline, of what the replicas can do", "title")]
    for share in (0.0, 0.25, 0.5, 0.75, 1.0):
        body.append(f'<path d="M{left} {y(share):.1f}H{left + width}" stroke="#dddddd"/>')
        body.append(text(left - 8, y(share) + 4, f"{share:.0%}", "end small"))
    body += [text(x(load), top + height + 20, f"{load:g}x", "middle") for load in loads]
    body.append(text(left + width / 2, top + height + 42, "offered load, of the measured capacity", "middle small"))
    ideal = " ".join(f"{x(load):.1f},{y(min(load, 1.0)):.1f}" for load in sorted({*loads, 1.0}))
    body.append(f'<polyline points="{ideal}" fill="none" stroke="#999999" stroke-dasharray="4 4"/>')
    for i, (name, rows) in enumerate(systems.items()):
        points = [(x(row["load"]), y(row["goodput_per_s"] / unit)) for row in rows]
        joined = " ".join(f"{a:.1f},{b:.1f}" for a, b in points)
        body.append(f'<polyline points="{joined}" fill="none" stroke="{COLORS[name]}" stroke-width="2.5"/>')
        body += [f'<circle cx="{a:.1f}" cy="{b:.1f}" r="4" fill="{COLORS[name]}"/>' for a, b in points]
        at = top + height + 66 + 20 * i
        body.append(f'<path d="M{left} {at - 4}h28" stroke="{COLORS[name]}" stroke-width="2.5"/>')
        body.append(text(left + 36, at, name))
    bottom = top + height + 66 + 20 * len(systems)
    body.append(text(left, bottom, note, "small"))
    words = "; ".join(
        f"{name}: " + ", ".join(f"{row['goodput_per_s'] / unit:.0%} at {row['load']:g}x" for row in rows)
        for name, rows in systems.items()
    )
    size = f'width="{left + width + 20}" height="{bottom + 16}" viewBox="0 0 {left + width + 20} {bottom + 16}"'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img">\n<title>Goodput under overload</title>'
    head += (
        f'\n<desc>{escape(words)}</desc>\n<style>{_STYLE}</style>\n<rect width="100%" height="100%" fill="#ffffff"/>'
    )
    return "\n".join([head, *body, "</svg>\n"])


def main() -> None:
    made = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    made.add_argument("--loads", type=float, nargs="+", default=[0.5, 1, 2, 5, 10], help="multiples of the capacity")
    made.add_argument("--seconds", type=float, default=20.0, help="of arrivals at each load")
    made.add_argument("--deadline-s", type=float, default=5.0)
    made.add_argument("--replicas", type=int, default=2)
    made.add_argument("--slots", type=int, default=16, help="sequences in a step of one replica")
    made.add_argument("--step-ms", type=float, default=50.0, help="of a simulated step")
    made.add_argument("--tokens", type=int, default=32, help="of an answer on average")
    made.add_argument("--systems", nargs="+", choices=tuple(COLORS), default=list(COLORS))
    made.add_argument("--capacity", type=float, help="requests per second that the loads are multiples of")
    made.add_argument("--default-proxy", action="store_true", help="Ray Serve's Python proxy, not HAProxy, for our own")
    made.add_argument("--quick", action="store_true", help="our own alone, at 1x and 10x, a minute in all")
    made.add_argument("--svg", type=Path, metavar="FILE", help="write the picture there")
    made.add_argument("--json", type=Path, metavar="FILE", help="write the results there, and not to the screen")
    arguments = made.parse_args()
    if arguments.quick:
        arguments.systems, arguments.loads, arguments.seconds = ["ragged-serve"], [1, 10], 8.0
    note = (
        f"{arguments.replicas} simulated replicas of {arguments.slots} slots, steps of {arguments.step_ms:g} ms, answers of"
        f" {arguments.tokens // 2} to {arguments.tokens * 3 // 2} tokens, deadline {arguments.deadline_s:g} s"
    )
    print(f"{note}; {os.cpu_count()} cores")
    systems: dict[str, Json] = {}
    capacity = arguments.capacity
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        make_tokenizer(directory, 32_000)
        args = engine_args(arguments, directory)
        for system in arguments.systems:
            is_ours = system == "ragged-serve"
            with (
                service(arguments, args, directory, arguments.replicas)
                if is_ours
                else plain_server(arguments, args, directory)
            ) as server:
                systems[system] = bench(system, server, arguments, capacity)
            capacity = capacity or systems[system]["capacity_per_s"]
    found = []
    if "ragged-serve" in systems:
        rows = systems["ragged-serve"]["rows"]
        found = verdicts(rows, arguments.deadline_s)
        for one in found:
            word = "reached" if one["reached"] else "NOT reached"
            print(f"{one['what']:50}{one['value']:9.2f}  limit {one['limit']:g}: {word}")
        costs = ", ".join(f"{part} {us:.0f}" for part, us in cpu_per_refusal_us(rows).items() if us >= 1)
        print(f"us of CPU for one refused request more: {costs}")
    if arguments.svg is not None:
        arguments.svg.write_text(svg({name: found["rows"] for name, found in systems.items()}, note), encoding="utf-8")
    result = json.dumps({"bench": "overload", "note": note, "systems": systems, "verdicts": found})
    if arguments.json is None:
        print(result)
    else:
        arguments.json.write_text(result, encoding="utf-8")


if __name__ == "__main__":
    main()
