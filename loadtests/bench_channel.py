"""One stream of messages per (ingress, replica) against one Ray stream per request: CPU per token at both ends.

Theory. A yield of a Ray generator is an object of its own: created, reported, fetched, released, some 100 to 200 us at both
ends together whatever is in it. With one stream per request a token costs that; with one message per engine step, that
is shared by all requests of the step, and a token adds two integers to a tuple. So the ratio should approach the number of
streams until the integers themselves count.

Both ways run on two Ray Serve replicas through the same handle, with nothing else on them: a source that yields, one step
every --step-ms, and a reader that counts. Neither detokenizes nor speaks HTTP; see bench_service.py for that.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import time
from collections.abc import AsyncGenerator
from typing import Any

os.environ.setdefault("RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD", "0")
os.environ.setdefault("RAY_SERVE_LOG_TO_STDERR", "0")

import ray
from ray import serve


class Source:
    """Steps at fixed times from a common start, as an engine's do."""

    async def tokens(self, num_steps: int, step_s: float) -> AsyncGenerator[tuple[int, int], None]:
        """One request's stream: (key, token)."""
        started = time.monotonic()
        for step in range(num_steps):
            await asyncio.sleep(max(0.0, started + (step + 1) * step_s - time.monotonic()))
            yield (7, step)

    async def messages(
        self, num_streams: int, num_steps: int, step_s: float
    ) -> AsyncGenerator[tuple[int, tuple[int, ...]], None]:
        """All requests' stream: (number, (key, token, key, token, ...)), as replica/messages.py encodes them."""
        started = time.monotonic()
        for step in range(num_steps):
            await asyncio.sleep(max(0.0, started + (step + 1) * step_s - time.monotonic()))
            yield (step, tuple(x for key in range(num_streams) for x in (key, step)))

    async def cpu(self) -> float:
        return time.process_time()


class Reader:
    def __init__(self, source: Any) -> None:
        self.source = source

    async def read(self, how: str, num_streams: int, num_steps: int, step_s: float) -> dict[str, float]:
        source_before, before = await self.source.cpu.remote(), time.process_time()
        started = time.monotonic()
        count = 0

        async def one() -> None:
            nonlocal count
            async for _ in self.source.options(stream=True).tokens.remote(num_steps, step_s):
                count += 1

        if how == "stream per request":
            await asyncio.gather(*(one() for _ in range(num_streams)))
        else:
            async for _, plain in self.source.options(stream=True).messages.remote(num_streams, num_steps, step_s):
                for _key, _token in zip(*[iter(plain)] * 2, strict=True):
                    count += 1
        wall = time.monotonic() - started
        assert count == num_streams * num_steps
        return {
            "reader_us": 1e6 * (time.process_time() - before) / count,
            "source_us": 1e6 * (await self.source.cpu.remote() - source_before) / count,
            "late": wall / (num_steps * step_s) - 1,
        }


def main() -> None:
    made = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    made.add_argument("--streams", type=int, nargs="+", default=[1, 16, 128])
    made.add_argument("--steps", type=int, default=100)
    made.add_argument("--step-ms", type=float, default=20.0)
    arguments = made.parse_args()
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    serve.start(proxy_location="Disabled")
    options: dict[str, Any] = {"max_ongoing_requests": 900, "ray_actor_options": {"num_cpus": 0}}
    source: Any = serve.deployment(Source, name="Source", **options)  # type: ignore[arg-type]
    reader: Any = serve.deployment(Reader, name="Reader", **options)  # type: ignore[arg-type]
    handle = serve.run(reader.bind(source.bind()), route_prefix=None)
    rows = []
    print(f"steps of {arguments.step_ms} ms; us of CPU per token")
    print(f"{'streams':>8}  {'way':24}{'source':>8}{'reader':>8}{'sum':>8}{'late':>8}")
    handle.read.remote("messages", 4, 20, 0.005).result()
    for num_streams in arguments.streams:
        for how in ("stream per request", "one stream of messages"):
            row = handle.read.remote(how, num_streams, arguments.steps, arguments.step_ms / 1e3).result()
            rows.append({"streams": num_streams, "way": how, **row})
            total = row["source_us"] + row["reader_us"]
            print(
                f"{num_streams:8}  {how:24}{row['source_us']:8.0f}{row['reader_us']:8.0f}{total:8.0f}{row['late']:8.0%}",
                flush=True,
            )
    print("late: how much longer the steps took than they should, for want of CPU")
    print(json.dumps({"bench": "channel", "step_ms": arguments.step_ms, "rows": rows}))
    serve.shutdown()
    ray.shutdown()


if __name__ == "__main__":
    main()
