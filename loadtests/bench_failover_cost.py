"""What it costs that a stream could be moved, when nothing fails: tokens/s, CPU per token and TTFT with and without.

    python loadtests/bench_failover_cost.py [--rounds 9] [--streams 128] [--tokens 256]

From the engine's outputs to the reader of a GenerationStream, in one process: hub, outbox, channel, stream; a model that
costs nothing, no pickling, no network, no HTTP. So the share shown here is of the smallest denominator that there is; the
last line gives the difference as a share of what the service spends on a token (loadtests/RESULTS.md). *Without* keeps no
emitted tokens and no sent messages, acknowledges nothing and does not look for losses: a replica lost under it would lose
its streams. Both take turns in one process, each round in another order; medians are compared.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import random
import statistics
import sys
import time
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from serve_app.api.stream import GenerationStream
from serve_app.engine.async_engine import AsyncEngine
from serve_app.engine.config import EngineConfig
from serve_app.engine.engine import Engine
from serve_app.engine.request import GenerateRequest, SamplingParams, TokenOutput
from serve_app.engine.simulated_runner import SimulatedRunner
from serve_app.replica.channel import Channels
from serve_app.replica.lease_table import LeaseTable
from serve_app.replica.messages import ChannelOptions, Message, Outbox
from serve_app.replica.output_hub import ChannelHub
from serve_app.routing.leases import Lease, LeaseRequest

SERVICE_US_PER_TOKEN = 128.0
"""CPU beyond the engine at 128 streams, all processes: loadtests/RESULTS.md."""
BLOCK_SIZE = 32


class Leases:
    """Grants at once, whatever is asked for."""

    holder_id = "ingress"

    def __init__(self) -> None:
        self._num = 0

    async def lease(self, request: LeaseRequest) -> Lease:
        self._num += 1
        num_blocks = -(-(request.num_prompt_tokens + request.max_output_tokens) // BLOCK_SIZE)
        return Lease(f"lease{self._num}", "replica", num_blocks * BLOCK_SIZE, 1)

    def settle(self, lease: Lease, num_output_tokens: int | None) -> None:
        pass

    def replica_lost(self, replica_id: str) -> None:
        raise AssertionError("nothing is lost here")


class Direct:
    """The Transport to one hub in the same process."""

    def __init__(self, hub: ChannelHub) -> None:
        self._hub = hub

    async def call(self, replica_id: str, method: str, *args: Any) -> Any:
        result = getattr(self._hub, method)(*args)
        return await result if asyncio.iscoroutine(result) else result

    async def stream(self, replica_id: str, method: str, *args: Any) -> AsyncGenerator[Message, None]:
        async with contextlib.aclosing(getattr(self._hub, method)(*args)) as messages:
            async for message in messages:
                yield message


# ---- without ---------------------------------------------------------------------------------------------------------


def _take(self: GenerationStream, batch: list[TokenOutput]) -> list[TokenOutput] | None:
    for output in batch:
        if output.finish_reason is not None:
            del self._open[output.choice_index]
    return batch


def _message_after(self: Outbox, number: int) -> Message | None:
    if not self._gathered:
        return None
    message = self._make()
    self._sent.clear()
    self.acked, self.size = self.number, 0
    return message


@contextlib.contextmanager
def without() -> Iterator[None]:
    """Nothing is kept that only a failure needs."""
    kept = GenerationStream._take, Outbox.message_after
    GenerationStream._take, Outbox.message_after = _take, _message_after  # type: ignore[method-assign]
    try:
        yield
    finally:
        GenerationStream._take, Outbox.message_after = kept  # type: ignore[method-assign]


# ---- one run ---------------------------------------------------------------------------------------------------------


async def run(num_streams: int, num_tokens: int, num_alone: int, *, keeps: bool) -> tuple[float, float, float]:
    """(tokens per second, CPU microseconds per token, median TTFT in ms of one request after the other)."""
    runner = SimulatedRunner(num_kv_blocks=1 << 16, block_size=BLOCK_SIZE, max_model_len=4096)
    config = EngineConfig(block_size=BLOCK_SIZE, max_num_seqs=num_streams, max_num_batched_tokens=4096)
    engine = AsyncEngine(Engine(config, runner))
    engine.start()
    options = ChannelOptions() if keeps else ChannelOptions(ack_messages=1 << 30, window_messages=1 << 30)
    hub = ChannelHub(engine, LeaseTable(1 << 16), asyncio.get_running_loop(), options)
    channels, leases = Channels(Direct(hub), "ingress", options), Leases()

    async def read(name: str, max_tokens: int) -> float:
        """Seconds to the first token."""
        sampling = SamplingParams(max_tokens=max_tokens, temperature=0.0, ignore_eos=True).resolved()
        stream = GenerationStream([GenerateRequest(name, (1, 2, 3), sampling)], leases, channels, block_size=BLOCK_SIZE)
        started, first, num = time.perf_counter(), 0.0, 0
        batches: AsyncIterator[list[TokenOutput]] = stream.batches()
        async for batch in batches:
            first = first or time.perf_counter() - started
            num += sum(len(output.token_ids) for output in batch)
        assert num == max_tokens
        return first

    await read("warm", 8)
    alone = [await read(f"alone{i}", 2) for i in range(num_alone)]
    cpu, wall = time.process_time(), time.perf_counter()
    await asyncio.gather(*(read(f"r{i}", num_tokens) for i in range(num_streams)))
    cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
    await channels.close()
    await asyncio.to_thread(engine.stop, 5.0)
    num = num_streams * num_tokens
    return num / wall, cpu / num * 1e6, statistics.median(alone) * 1e3


def measure(num_rounds: int, num_streams: int, num_tokens: int, num_alone: int = 50) -> dict[bool, list[Any]]:
    """Whether it keeps what a failure needs -> the rounds' results."""
    found: dict[bool, list[Any]] = {True: [], False: []}
    for i in range(num_rounds):
        for keeps in random.Random(i).sample((True, False), 2):
            with contextlib.nullcontext() if keeps else without():
                found[keeps].append(asyncio.run(run(num_streams, num_tokens, num_alone, keeps=keeps)))
        print(f"round {i + 1} of {num_rounds}", end="\r", file=sys.stderr, flush=True)
    return found


def table(found: dict[bool, list[Any]]) -> str:
    """
    >>> print(table({True: [(900.0, 11.0, 2.0)], False: [(1000.0, 10.0, 2.0)]}).splitlines()[2])
    | with | 900 | 11.00 | 2.00 |
    """
    medians = {
        keeps: [statistics.median(column) for column in zip(*rows, strict=True)] for keeps, rows in found.items()
    }
    lines = ["| failover | tokens/s | CPU us a token | TTFT alone, ms |", "|---|---|---|---|"]
    for keeps, name in ((True, "with"), (False, "without")):
        rate, cpu, ttft = medians[keeps]
        lines.append(f"| {name} | {rate:.0f} | {cpu:.2f} | {ttft:.2f} |")
    ratios = [a / b for a, b in zip(medians[True], medians[False], strict=True)]
    lines.append("| ratio | " + " | ".join(f"{ratio:.3f}" for ratio in ratios) + " |")
    more = medians[True][1] - medians[False][1]
    lines.append(
        f"\n{more:+.2f} us a token: {more / SERVICE_US_PER_TOKEN:+.1%} of the service's {SERVICE_US_PER_TOKEN:g} us"
    )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--streams", type=int, default=128)
    parser.add_argument("--tokens", type=int, default=256)
    arguments = parser.parse_args()
    print(table(measure(arguments.rounds, arguments.streams, arguments.tokens)))


if __name__ == "__main__":
    main()
