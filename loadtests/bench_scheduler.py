"""Host cost of one engine step: schedule + update at 1 to 1,024 running decodes, without a runner.

Theory: everything the host does between two launches is time in which a GPU that is not launched ahead stands still, so
it has to stay small beside a decode step (about 10 ms for an 8B model on one GPU). The aims are 0.5 ms at 64 running
sequences and 4 ms at 1,024; the cost grows with the sequences of a step, not with the length of the queue.

    decode    every sequence decodes, none ends
    mixed     every sequence ends after 128 tokens and a new request takes its place, so a step also prefills chunks,
              hashes blocks, frees and admits
    queued    decode, with 2,000 further requests waiting for a place

schedule and update include the creation of every TokenOutput; record is what the engine adds for its StepRecord.
"""

from __future__ import annotations

import argparse
import gc
import json
import platform
import random
import statistics
import time
from collections.abc import Iterator

from serve_app.engine.config import EngineConfig
from serve_app.engine.request import GenerateRequest, SamplingParams
from serve_app.engine.scheduler import Scheduler, SchedulerOutput

BLOCK_SIZE = 32
MAX_MODEL_LEN = 4096
VOCAB_SIZE = 32_000
AIM_MS = {64: 0.5, 1024: 4.0}
SIZES = (1, 64, 256, 1024)


class Traffic:
    """Requests with prompts of 32 to 1,000 tokens; every fourth begins with the same 256 tokens, as a system prompt."""

    def __init__(self, max_tokens: int) -> None:
        self.rng = random.Random(0)
        self.sampling = SamplingParams(max_tokens=max_tokens).resolved()
        self.system = tuple(self.rng.randrange(VOCAB_SIZE) for _ in range(256))
        self.num_made = 0

    def __iter__(self) -> Iterator[GenerateRequest]:
        while True:
            self.num_made += 1
            own = tuple(self.rng.randrange(VOCAB_SIZE) for _ in range(self.rng.randint(32, 1000)))
            prompt = (self.system + own)[:1000] if self.num_made % 4 == 0 else own
            yield GenerateRequest(f"request-{self.num_made}", prompt, self.sampling)


def run(kind: str, num_seqs: int, caching: bool, num_steps: int) -> dict[str, float]:
    """Medians over ``num_steps`` steps, in milliseconds. p10: what the machine does when nobody else uses it."""
    config = EngineConfig(
        block_size=BLOCK_SIZE,
        max_num_seqs=num_seqs,
        max_num_batched_tokens=max(512, 2 * num_seqs),
        enable_prefix_caching=caching,
    )
    scheduler = Scheduler(
        config,
        num_blocks=num_seqs * 64 + 64,
        max_model_len=MAX_MODEL_LEN,
        vocab_size=VOCAB_SIZE,
        eos_token_ids=frozenset({2}),
    )
    requests = iter(Traffic(128 if kind == "mixed" else 2048))
    for _ in range(num_seqs + (2000 if kind == "queued" else 0)):
        scheduler.add([next(requests)])
    tokens = random.Random(1)

    def sample(plan: SchedulerOutput) -> list[int]:
        return [tokens.randrange(3, VOCAB_SIZE) for item in plan.scheduled if item.samples]

    def is_settled() -> bool:
        if kind == "mixed":  # all of the first wave ended: the ages of those that run are spread
            return num_left <= 0
        return len(scheduler.running) == num_seqs and all(s.num_missing_tokens == 1 for s in scheduler.running)

    num_left = 2 * num_seqs
    times: dict[str, list[float]] = {"schedule": [], "update": [], "record": []}
    num_tokens = []
    while len(num_tokens) < num_steps:
        settled = is_settled()
        started = time.perf_counter()
        plan = scheduler.schedule()
        scheduled = time.perf_counter()
        assert plan is not None
        token_ids = sample(plan)
        sampled = time.perf_counter()
        outputs = scheduler.update(plan, token_ids)
        updated = time.perf_counter()
        plan.sequence_steps()
        recorded = time.perf_counter()
        if settled:
            times["schedule"].append(scheduled - started)
            times["update"].append(updated - sampled)
            times["record"].append(recorded - updated)
            num_tokens.append(plan.num_tokens)
        if kind == "mixed":
            for output in outputs:
                if output.finish_reason is not None:
                    num_left -= 1
                    scheduler.add([next(requests)])
    result = {name: 1e3 * statistics.median(values) for name, values in times.items()}
    both = [1e3 * (a + b) for a, b in zip(times["schedule"], times["update"], strict=True)]
    ordered = sorted(both)
    result |= {"step": statistics.median(both), "p10": ordered[len(both) // 10], "p99": ordered[len(both) * 99 // 100]}
    return {name: round(value, 4) for name, value in result.items()} | {"tokens": statistics.median(num_tokens)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=400, help="steps measured for each row")
    arguments = parser.parse_args()
    gc.freeze()
    print(f"block_size {BLOCK_SIZE}, prompts of 32 to 1,000 tokens, medians of {arguments.steps} steps, milliseconds")
    print(
        f"{'kind':8}{'running':>8}{'prefix':>8}{'tokens':>8}{'schedule':>10}{'update':>9}{'step':>9}{'p10':>9}{'p99':>9}"
        f"{'record':>9}{'aim':>7}{'of aim':>8}"
    )
    rows = []
    for kind, sizes in (("decode", SIZES), ("mixed", SIZES[1:]), ("queued", (64, 1024))):
        for num_seqs in sizes:
            for caching in (True, False):
                row = run(kind, num_seqs, caching, arguments.steps)
                aim = AIM_MS.get(num_seqs)
                share = f"{aim:7.1f}{row['step'] / aim:8.0%}" if aim else ""
                print(
                    f"{kind:8}{num_seqs:8}{'on' if caching else 'off':>8}{row['tokens']:8.0f}{row['schedule']:10.3f}"
                    f"{row['update']:9.3f}{row['step']:9.3f}{row['p10']:9.3f}{row['p99']:9.3f}{row['record']:9.3f}{share}"
                )
                rows.append({"kind": kind, "running": num_seqs, "prefix_caching": caching, **row})
    print(
        json.dumps(
            {
                "bench": "scheduler",
                "unit": "ms",
                "python": platform.python_version(),
                "block_size": BLOCK_SIZE,
                "steps": arguments.steps,
                "aim_ms": AIM_MS,
                "rows": rows,
            }
        )
    )


if __name__ == "__main__":
    main()
