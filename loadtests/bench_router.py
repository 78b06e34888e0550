"""Routing policies on simulated replicas in virtual time: imbalance, waiting, preemptions. No Ray, no sleep, one core.

    reserve, expect   serve_app.routing.ledger as it is: leases on KV blocks, the queue is the router's
    round-robin       each request to the next replica at once; it waits in that replica's engine
    power of two      what Ray Serve's default router does: two replicas at random, the one with fewer ongoing requests.
                      Here it knows their number exactly and at once, and no limit on ongoing requests binds, both in
                      its favour. It is a model of that policy, not Ray itself

A replica is a continuous-batching engine: a pool of KV blocks, a token budget per step, steps of STEP_SECONDS plus
TOKEN_SECONDS for each token. It admits waiting requests for which their known tokens fit (looking past MAX_LOOK of those
that do not), allocates a block when an output grows into it, and if there is none preempts the youngest, which starts
anew later (recomputation). Under `reserve` it has nothing to preempt.

Load: lognormal prompts and outputs, Poisson arrivals. Half of the clients send no max_tokens (DEFAULT_MAX_TOKENS then),
the others the next power of two of what they need: what `reserve` books is what they say, what they use is less. The
rate is ``load`` times what the pools could carry if every request held, on average, half of its output.

imbalance: max / mean over the replicas of committed tokens (all that the requests there will need in the end, waiting or
running), mean over samples. wait: from arrival to the first step that works on it; ttft: to its first token.
"""

from __future__ import annotations

import argparse
import heapq
import json
import platform
import random
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from workloads import make_requests, percentiles

from serve_app.errors import LeaseRefusedError
from serve_app.replica.lease_table import LeaseTable
from serve_app.routing.leases import Lease, LeaseRequest, ReplicaReport
from serve_app.routing.ledger import Ledger
from serve_app.routing.ledger_options import LedgerOptions

BLOCK_SIZE = 32
NUM_BLOCKS = 512
MAX_NUM_SEQS = 128
MAX_BATCHED_TOKENS = 512
MAX_LOOK = 32
STEP_SECONDS = 0.010
TOKEN_SECONDS = 0.00002
PROMPT_LENS = (16, 4096)
OUTPUT_LENS = (8, 1024)
DEFAULT_MAX_TOKENS = 1024
MAX_MODEL_LEN = PROMPT_LENS[1] + DEFAULT_MAX_TOKENS
MESSAGE_SECONDS = 0.003
"""One way: ask and answer, submit, settle, report."""
REPORT_SECONDS = 0.25
POLICIES = ("reserve", "expect", "round-robin", "power of two")


@dataclass(eq=False)
class Request:
    name: str
    num_prompt_tokens: int
    num_output_tokens: int
    max_tokens: int
    arrival: float
    num_known: int = 0
    """Prompt and what was generated."""
    num_computed: int = 0
    num_blocks: int = 0
    lease: Lease | None = None
    started: float = -1.0
    first_token: float = -1.0
    ended: float = -1.0

    @property
    def num_tokens(self) -> int:
        return self.num_prompt_tokens + self.num_output_tokens


def num_blocks(num_tokens: int) -> int:
    return -(-num_tokens // BLOCK_SIZE)


@dataclass(eq=False)
class Engine:
    replica_id: str
    is_stepping: bool = False
    num_free: int = NUM_BLOCKS
    running: list[Request] = field(default_factory=list)
    waiting: deque[Request] = field(default_factory=deque)
    table: LeaseTable = field(default_factory=lambda: LeaseTable(NUM_BLOCKS))
    num_reports: int = 0
    num_preemptions: int = 0
    num_recomputed: int = 0

    @property
    def num_ongoing(self) -> int:
        return len(self.running) + len(self.waiting)

    def num_committed(self) -> int:
        return sum(request.num_tokens for queue in (self.running, self.waiting) for request in queue)

    def preempt(self) -> Request:
        victim = self.running.pop()
        self.num_free += victim.num_blocks
        self.num_preemptions += 1
        self.num_recomputed += victim.num_computed
        victim.num_blocks = victim.num_computed = 0
        self.waiting.appendleft(victim)
        return victim

    def step(self, now: float) -> tuple[float, list[tuple[Request, int]]]:
        """Plans one step: its length in seconds, and who gets how many tokens."""
        plan: list[tuple[Request, int]] = []
        budget = MAX_BATCHED_TOKENS
        i = 0
        while i < len(self.running):  # decodes, oldest first; a decode may need a block
            request = self.running[i]
            if request.num_known - request.num_computed == 1:
                while request.num_known > request.num_blocks * BLOCK_SIZE and self.num_free == 0:
                    if self.preempt() is request:
                        break
                if i >= len(self.running):
                    break
                if request.num_known > request.num_blocks * BLOCK_SIZE:
                    self.num_free -= 1
                    request.num_blocks += 1
                    if request.lease is not None:
                        self.table.grow(request.lease.lease_id, request.num_blocks)
                plan.append((request, 1))
                budget -= 1
            i += 1
        for request in self.running:
            missing = request.num_known - request.num_computed
            if missing > 1 and budget > 0:
                plan.append((request, min(missing, budget)))
                budget -= plan[-1][1]
        i = 0
        while budget > 0 and i < min(MAX_LOOK, len(self.waiting)) and len(self.running) < MAX_NUM_SEQS:
            request = self.waiting[i]
            need = num_blocks(request.num_known)
            if need > self.num_free:
                i += 1
                continue
            del self.waiting[i]
            self.num_free -= need
            request.num_blocks = need
            if request.started < 0:
                request.started = now
            self.running.append(request)
            plan.append((request, min(request.num_known, budget)))
            budget -= plan[-1][1]
        return STEP_SECONDS + TOKEN_SECONDS * (MAX_BATCHED_TOKENS - budget), plan

    def update(self, now: float, plan: list[tuple[Request, int]]) -> list[Request]:
        """Takes the tokens of a step; returns who has all."""
        done = []
        for request, num in plan:
            request.num_computed += num
            if request.num_computed == request.num_known:
                if request.first_token < 0:
                    request.first_token = now
                if request.num_known + 1 >= request.num_tokens:
                    done.append(request)
                else:
                    request.num_known += 1
        for request in done:
            request.ended = now
            self.num_free += request.num_blocks
        if done:
            self.running = [request for request in self.running if request.ended < 0]
        return done


class Simulation:
    """One policy on one request set."""

    def __init__(self, policy: str, num_replicas: int, requests: list[Request]) -> None:
        self.policy = policy
        self.requests = {request.name: request for request in requests}
        self.engines = {f"replica-{i}": Engine(f"replica-{i}") for i in range(num_replicas)}
        self.order = list(self.engines.values())
        self.num_left = len(requests)
        self.now = 0.0
        self.num_events = 0
        self.num_refused = 0
        self.events: list[tuple[float, int, Callable[[], None]]] = []
        self.rng = random.Random(0)
        self.samples: list[float] = []
        self.ledger: Ledger | None = None
        self.router_seconds = 0.0
        if policy in ("reserve", "expect"):
            no_limit = LedgerOptions(
                policy=policy, max_queued_requests=10**9, max_queued_tokens=10**12, max_queue_seconds=1e9
            )
            self.ledger = Ledger(no_limit, 1)
            for engine in self.order:
                self.report(engine)
        for i, request in enumerate(requests):
            self.at(request.arrival, lambda request=request, i=i: self.arrive(request, i))  # type: ignore[misc]
        self.sample()

    def at(self, when: float, event: Callable[[], None]) -> None:
        self.num_events += 1
        heapq.heappush(self.events, (when, self.num_events, event))

    def run(self) -> None:
        while self.num_left:
            self.now, _, event = heapq.heappop(self.events)
            event()

    def sample(self) -> None:
        committed = [engine.num_committed() for engine in self.order]
        if sum(committed):
            self.samples.append(max(committed) * len(committed) / sum(committed))
        self.at(self.now + 0.1, self.sample)

    # ---- routing

    def arrive(self, request: Request, i: int) -> None:
        if self.ledger is not None:
            self.at(self.now + MESSAGE_SECONDS, lambda: self.lease(request))
        elif self.policy == "round-robin":
            self.submit(request, self.order[i % len(self.order)])
        else:
            pair = self.rng.sample(self.order, 2)
            self.submit(request, min(pair, key=lambda engine: engine.num_ongoing))

    def timed(self, call: Callable[..., Any], *args: Any) -> Any:
        started = time.perf_counter()
        result = call(*args, self.now)
        self.router_seconds += time.perf_counter() - started
        return result

    def lease(self, request: Request) -> None:
        assert self.ledger is not None
        wanted = LeaseRequest(request.name, "ingress", request.num_prompt_tokens, request.max_tokens)
        lease = self.timed(self.ledger.request, wanted)
        if lease is not None:
            self.granted(request, lease)
        self.pump()

    def pump(self) -> None:
        assert self.ledger is not None
        for name, lease in self.timed(self.ledger.grants):
            assert isinstance(lease, Lease), lease
            self.granted(self.requests[name], lease)

    def granted(self, request: Request, lease: Lease) -> None:
        request.lease = lease
        self.at(self.now + 2 * MESSAGE_SECONDS, lambda: self.submit(request, self.engines[lease.replica_id]))

    def submit(self, request: Request, engine: Engine) -> None:
        if request.lease is not None:
            try:
                engine.table.open(request.lease.lease_id, "ingress", request.lease.num_tokens // BLOCK_SIZE, self.now)
            except LeaseRefusedError:
                self.num_refused += 1
                self.settle(request.lease, None)
                self.at(self.now + 2 * MESSAGE_SECONDS, lambda: self.lease(request))
                return
        request.num_known = request.num_prompt_tokens
        engine.waiting.append(request)
        if not engine.is_stepping:
            self.step(engine)

    def settle(self, lease: Lease, num_output_tokens: int | None) -> None:
        def take() -> None:
            assert self.ledger is not None
            self.timed(self.ledger.settle, lease.lease_id, num_output_tokens)
            self.pump()

        self.at(self.now + MESSAGE_SECONDS, take)

    def report(self, engine: Engine) -> None:
        engine.num_reports += 1
        report = ReplicaReport(
            engine.replica_id,
            engine.num_reports,
            BLOCK_SIZE,
            NUM_BLOCKS,
            MAX_MODEL_LEN,
            "simulated",
            engine.table.rows(),
            engine.table.num_ended,
            len(engine.running),
            len(engine.waiting),
        )

        def take() -> None:
            assert self.ledger is not None
            self.timed(self.ledger.renew, "ingress")
            self.timed(self.ledger.report, report)
            self.pump()

        self.at(self.now + MESSAGE_SECONDS, take)
        self.at(self.now + REPORT_SECONDS, lambda: self.report(engine))

    # ---- replicas

    def step(self, engine: Engine) -> None:
        seconds, plan = engine.step(self.now)
        engine.is_stepping = bool(plan)
        if plan:
            self.at(self.now + seconds, lambda: self.stepped(engine, plan))

    def stepped(self, engine: Engine, plan: list[tuple[Request, int]]) -> None:
        for request in engine.update(self.now, plan):
            self.num_left -= 1
            if request.lease is not None:
                engine.table.end(request.lease.lease_id)
                self.settle(request.lease, request.num_output_tokens)
        self.step(engine)

    # ---- result

    def result(self) -> dict[str, Any]:
        requests = list(self.requests.values())
        waits = percentiles([request.started - request.arrival for request in requests])
        ttfts = percentiles([request.first_token - request.arrival for request in requests])
        seconds = max(request.ended for request in requests)
        tokens = sum(request.num_tokens for request in requests)
        recomputed = sum(engine.num_recomputed for engine in self.order)
        grown = 0 if self.ledger is None else self.ledger.counters["grown_blocks"]
        return {
            "imbalance": float(np.mean(self.samples)),
            "wait_p50_s": waits["p50"],
            "wait_p99_s": waits["p99"],
            "ttft_p99_s": ttfts["p99"],
            "latency_mean_s": percentiles([request.ended - request.arrival for request in requests])["mean"],
            "preemptions": sum(engine.num_preemptions for engine in self.order),
            "recomputed_share": recomputed / tokens,
            "tokens_per_s": tokens / seconds,
            "refused": self.num_refused,
            "grown_blocks": grown,
            "router_us_per_request": 1e6 * self.router_seconds / len(requests),
        }


def make_load(num_replicas: int, load: float, per_replica: int, seed: int) -> list[Request]:
    drawn = make_requests(
        num_replicas * per_replica,
        vocab_size=2,
        prompt_lens=PROMPT_LENS,
        output_lens=OUTPUT_LENS,
        distribution="lognormal",
        rate=1.0,
        seed=seed,
    ).requests
    rng = random.Random(seed)
    held = np.mean([(len(r.prompt_token_ids) + r.num_output_tokens / 2) * r.num_output_tokens for r in drawn])
    step_seconds = STEP_SECONDS + TOKEN_SECONDS * MAX_BATCHED_TOKENS / 2
    rate = load * num_replicas * NUM_BLOCKS * BLOCK_SIZE / (float(held) * step_seconds)
    made = []
    for i, r in enumerate(drawn):
        says = DEFAULT_MAX_TOKENS if rng.random() < 0.5 else 1 << (r.num_output_tokens - 1).bit_length()
        prompt = len(r.prompt_token_ids)
        made.append(Request(f"r{i}", prompt, r.num_output_tokens, says, r.arrival / rate))
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--replicas", type=int, nargs="+", default=[2, 4, 8])
    parser.add_argument("--loads", type=float, nargs="+", default=[0.7, 1.0], help="share of what the pools carry")
    parser.add_argument("--requests", type=int, default=400, help="per replica")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    print(
        f"{NUM_BLOCKS} blocks of {BLOCK_SIZE}; prompts {PROMPT_LENS}, outputs {OUTPUT_LENS}, lognormal;"
        f" {arguments.requests} requests per replica; steps of {1e3 * STEP_SECONDS:.0f} ms + {1e6 * TOKEN_SECONDS:.0f} us"
        " per token; virtual seconds"
    )
    print(
        f"{'replicas':>8}{'load':>6}  {'policy':14}{'imbalance':>10}{'wait p50':>10}{'wait p99':>10}{'ttft p99':>10}"
        f"{'latency':>9}{'preempted':>10}{'recomp.':>9}{'tokens/s':>10}{'refused':>9}{'us/req':>8}"
    )
    rows = []
    started = time.perf_counter()
    for num_replicas in arguments.replicas:
        for load in arguments.loads:
            for policy in POLICIES:
                simulation = Simulation(
                    policy, num_replicas, make_load(num_replicas, load, arguments.requests, arguments.seed)
                )
                simulation.run()
                row = simulation.result()
                print(
                    f"{num_replicas:8}{load:6.2f}  {policy:14}{row['imbalance']:10.3f}{row['wait_p50_s']:10.3f}"
                    f"{row['wait_p99_s']:10.3f}{row['ttft_p99_s']:10.3f}{row['latency_mean_s']:9.2f}"
                    f"{row['preemptions']:10}{row['recomputed_share']:9.1%}{row['tokens_per_s']:10.0f}"
                    f"{row['refused']:9}{row['router_us_per_request']:8.0f}",
                    flush=True,
                )
                row = {name: round(value, 4) if isinstance(value, float) else value for name, value in row.items()}
                rows.append({"replicas": num_replicas, "load": load, "policy": policy, **row})
    print(
        json.dumps(
            {
                "bench": "router",
                "unit": "virtual seconds",
                "python": platform.python_version(),
                "requests_per_replica": arguments.requests,
                "seed": arguments.seed,
                "num_blocks": NUM_BLOCKS,
                "block_size": BLOCK_SIZE,
                "wall_seconds": round(time.perf_counter() - started, 1),
                "rows": rows,
            }
        )
    )


if __name__ == "__main__":
    main()
