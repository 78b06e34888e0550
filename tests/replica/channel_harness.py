"""What the channel's tests share: a loop whose time costs nothing, an engine on that loop, a transport full of trouble.

VirtualLoop     timers fire in order, at once; a test that waits for nothing fails
LoopEngine      AsyncEngine's two methods without a thread, on a SimulatedRunner
FakeTransport   calls hubs in the same process; `Trouble` says how often it delays, drops, repeats and breaks
Service         one ingress and some replicas, wired
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import inspect
import pickle
import random
import selectors
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Coroutine
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

from serve_app.engine.config import EngineConfig
from serve_app.engine.engine import Engine
from serve_app.engine.request import FinishReason, GenerateRequest, TokenOutput
from serve_app.engine.simulated_runner import SimulatedRunner
from serve_app.errors import EngineUnavailableError, ReplicaLostError, ReplicaUnreachableError
from serve_app.replica.channel import Channels, Outputs
from serve_app.replica.lease_table import LeaseTable
from serve_app.replica.messages import ChannelOptions
from serve_app.replica.output_hub import ChannelHub
from tests.engine.harness import EOS, VOCAB_SIZE, expected_tokens, make_request

MAX_MODEL_LEN = 200
MAX_SECONDS = 100_000.0
"""Of virtual time, in one test."""


class _Selector(selectors.DefaultSelector):
    loop: VirtualLoop

    def select(self, timeout: float | None = None) -> Any:
        events = super().select(0)
        if not events:
            assert timeout is not None, "stuck: no timer runs, and nothing else can happen"
            self.loop.now += max(0.0, timeout)
            assert self.loop.now < MAX_SECONDS, "stuck: timers run on and on"
        return events


class VirtualLoop(asyncio.SelectorEventLoop):
    """Nothing on it may wait for a thread."""

    def __init__(self) -> None:
        self.now = 0.0
        selector = _Selector()
        selector.loop = self
        super().__init__(selector)
        self.failures: list[dict[str, Any]] = []
        self.set_exception_handler(lambda _, context: self.failures.append(context))

    def time(self) -> float:
        return self.now


def run_virtual(test: Callable[[], Coroutine[Any, Any, None]]) -> None:
    """Runs a test on a virtual loop. Exceptions that nobody took are failures."""
    loop = VirtualLoop()
    try:
        with asyncio.Runner(loop_factory=lambda: loop) as runner:
            runner.run(test())
    finally:
        loop.close()
    assert loop.failures == []


class LoopEngine:
    """AsyncEngine for a virtual loop. A step takes ``seconds_per_step``; ``pause`` and ``resume`` hold it."""

    def __init__(self, *, num_blocks: int = 500, seconds_per_step: float = 0.02, max_num_seqs: int = 8) -> None:
        self.loop = asyncio.get_running_loop()
        runner = SimulatedRunner(
            num_kv_blocks=num_blocks,
            block_size=4,
            max_model_len=MAX_MODEL_LEN,
            vocab_size=VOCAB_SIZE,
            eos_token_ids=frozenset({EOS}),
            verify=True,
        )
        config = EngineConfig(block_size=4, max_num_seqs=max_num_seqs, max_num_batched_tokens=24)
        self.engine = Engine(config, runner, clock=self.loop.time)
        self.num_submits = 0
        self.num_aborts = 0
        self.num_refused = 0
        self._seconds_per_step = seconds_per_step
        self._commands: list[tuple[Any, ...]] = []
        self._sinks: dict[tuple[str, int], Any] = {}
        self._go = asyncio.Event()
        self._is_paused = False
        self._refusal: str | None = None
        self._task = self.loop.create_task(self._run())

    def submit_to(self, requests: list[GenerateRequest], sink: Callable[[list[TokenOutput]], None]) -> Future[None]:
        if self._refusal is not None:
            raise EngineUnavailableError(self._refusal)
        self.num_submits += 1
        future: Future[None] = Future()
        self._commands.append(("submit", requests, sink, future))
        self._go.set()
        return future

    def abort(self, request_id: str, choice_index: int | None = None) -> None:
        self.num_aborts += 1
        self._commands.append(("abort", request_id, choice_index))
        self._go.set()

    def pause(self) -> None:
        self._is_paused = True

    def resume(self) -> None:
        self._is_paused = False
        self._go.set()

    def die(self, message: str = "planted") -> None:
        self._refusal = f"the engine died of {message}"
        self._task.cancel()
        for kind, *command in self._commands:
            if kind == "submit":
                command[2].set_exception(EngineUnavailableError(self._refusal))
        by_sink: dict[Any, list[TokenOutput]] = {}
        for key, sink in self._sinks.items():
            output = TokenOutput(
                *key, finish_reason=FinishReason.ERROR, error=self._refusal, error_code="engine_unavailable"
            )
            by_sink.setdefault(sink, []).append(output)
        self._sinks.clear()
        for sink, outputs in by_sink.items():
            sink(outputs)

    async def stop(self) -> None:
        self._task.cancel()
        await asyncio.wait({self._task})

    async def _run(self) -> None:
        while True:
            while self._commands:
                self._apply(*self._commands.pop(0))
            if not self.engine.has_work or self._is_paused:
                self._go.clear()
                await self._go.wait()
                continue
            await asyncio.sleep(self._seconds_per_step)
            self._route(self.engine.step())

    def _apply(self, kind: str, *command: Any) -> None:
        if kind == "abort":
            self.engine.abort(*command)
            self._route(self.engine.scheduler.take_ended())
            return
        requests, sink, future = command
        try:
            self.engine.add(requests)
        except Exception as error:
            self.num_refused += 1
            future.set_exception(error)
            return
        for request in requests:
            self._sinks[request.request_id, request.choice_index] = sink
        future.set_result(None)

    def _route(self, outputs: list[TokenOutput]) -> None:
        by_sink: dict[Any, list[TokenOutput]] = {}
        for output in outputs:
            key = (output.request_id, output.choice_index)
            by_sink.setdefault(self._sinks[key], []).append(output)
            if output.finish_reason is not None:
                del self._sinks[key]
        for sink, some in by_sink.items():
            sink(some)


@dataclass
class Trouble:
    """Chances, each per call, stream or message; delays in seconds."""

    lost_calls: float = 0.0
    lost_replies: float = 0.0
    late_repeats: float = 0.0
    broken_streams: float = 0.0
    orphans: float = 0.0
    """Of the broken streams: the replica's end goes on."""
    late_streams: float = 0.0
    """Opened again, later, by nobody."""
    max_delay: float = 0.0


class FakeTransport:
    def __init__(self, rng: random.Random, trouble: Trouble | None = None) -> None:
        self.rng = rng
        self.trouble = trouble or Trouble()
        self.hubs: dict[str, ChannelHub] = {}
        self.replicas: dict[str, Any] = {}
        """By id, what has the methods of a replica that are not its hub's."""
        self.counts: Counter[str] = Counter()
        self.hold: Callable[[str, str], bool] = lambda replica_id, method: False
        """Calls and streams that hang for which this is true when they are made."""
        self._tasks: set[asyncio.Task[None]] = set()
        self._breaks: dict[str, list[asyncio.Queue[Any]]] = {}

    def kill(self, replica_id: str) -> None:
        del self.hubs[replica_id]
        self.break_streams(replica_id, ReplicaLostError(f"{replica_id} died"))

    def break_streams(self, replica_id: str, error: BaseException) -> None:
        for queue in self._breaks.get(replica_id, []):
            queue.put_nowait(error)

    def num_streams(self, replica_id: str) -> int:
        return len(self._breaks.get(replica_id, []))

    async def call(self, replica_id: str, method: str, *args: Any) -> Any:
        self.counts[method] += 1
        await self._delay()
        if self.hold(replica_id, method):
            await asyncio.Event().wait()
        if self._happens("lost_calls"):
            raise ReplicaUnreachableError("planted: the call is lost")
        if self._happens("late_repeats"):
            self._spawn(self._repeat(replica_id, method, args))
        result = await self._execute(replica_id, method, args)
        await self._delay()
        if self._happens("lost_replies"):
            raise ReplicaUnreachableError("planted: the reply is lost")
        return pickle.loads(pickle.dumps(result))

    async def stream(self, replica_id: str, method: str, *args: Any) -> AsyncGenerator[Any, None]:
        self.counts[method] += 1
        await self._delay()
        if self.hold(replica_id, method):
            await asyncio.Event().wait()
        if self._happens("lost_calls"):
            raise ReplicaUnreachableError("planted: the stream does not open")
        if self._happens("late_streams"):
            self._spawn(self._read_late(replica_id, method, args))
        queue: asyncio.Queue[Any] = asyncio.Queue()  # without a bound, as in Ray
        reader = self._spawn(self._read(self._hub(replica_id), method, args, queue))
        self._breaks.setdefault(replica_id, []).append(queue)
        is_orphaned = False
        try:
            while True:
                item = await queue.get()
                await self._delay()
                if item is None:
                    return
                if isinstance(item, BaseException):
                    raise item
                if self._happens("broken_streams"):
                    is_orphaned = self._happens("orphans")
                    how = self.rng.choice(("error", "cancelled", "silent"))
                    self.counts[how] += 1
                    if how == "cancelled":
                        raise asyncio.CancelledError
                    if how == "error":
                        raise ReplicaUnreachableError("planted: the stream broke")
                    await asyncio.Event().wait()
                yield pickle.loads(pickle.dumps(item))
        finally:
            self._breaks[replica_id].remove(queue)
            if not is_orphaned:
                reader.cancel()

    async def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)

    def _hub(self, replica_id: str) -> ChannelHub:
        if replica_id not in self.hubs:
            raise ReplicaLostError(f"there is no replica {replica_id}")
        return self.hubs[replica_id]

    async def _execute(self, replica_id: str, method: str, args: tuple[Any, ...]) -> Any:
        hub = self._hub(replica_id)
        target = hub if hasattr(hub, method) else self.replicas[replica_id]
        result = getattr(target, method)(*pickle.loads(pickle.dumps(args)))
        return await result if inspect.isawaitable(result) else result

    async def _repeat(self, replica_id: str, method: str, args: tuple[Any, ...]) -> None:
        await asyncio.sleep(self.rng.uniform(0.0, 0.5))
        with contextlib.suppress(Exception):
            await self._execute(replica_id, method, args)

    async def _read(self, hub: ChannelHub, method: str, args: tuple[Any, ...], queue: asyncio.Queue[Any]) -> None:
        try:
            async with contextlib.aclosing(getattr(hub, method)(*args)) as stream:
                async for message in stream:
                    queue.put_nowait(message)
        except Exception as error:
            queue.put_nowait(error)
        else:
            queue.put_nowait(None)

    async def _read_late(self, replica_id: str, method: str, args: tuple[Any, ...]) -> None:
        await asyncio.sleep(self.rng.uniform(0.0, 0.5))
        with contextlib.suppress(Exception):
            async with contextlib.aclosing(getattr(self._hub(replica_id), method)(*args)) as stream:
                num_left = self.rng.randrange(4)
                async for _ in stream:
                    num_left -= 1
                    if num_left <= 0:
                        break

    async def _delay(self) -> None:
        if self.trouble.max_delay and self.rng.random() < 0.5:
            await asyncio.sleep(self.rng.uniform(0.0, self.trouble.max_delay))

    def _happens(self, what: str) -> bool:
        chance = getattr(self.trouble, what)
        happens = chance > 0.0 and self.rng.random() < chance
        self.counts[what] += happens
        return happens

    def _spawn(self, coroutine: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.get_running_loop().create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task


class Service:
    """Use as ``async with``. At its end everything must have come to rest: engines, hubs, tables."""

    def __init__(
        self,
        *,
        num_replicas: int = 1,
        seed: int = 0,
        trouble: Trouble | None = None,
        options: ChannelOptions | None = None,
        pool_blocks: int = 500,
        seconds_per_step: float = 0.02,
    ) -> None:
        self.loop = asyncio.get_running_loop()
        self.options = options or ChannelOptions()
        self.transport = FakeTransport(random.Random(seed), trouble)
        self.engines: list[LoopEngine] = []
        self.tables: list[LeaseTable] = []
        self.hubs: list[ChannelHub] = []
        self.replica_ids = [f"replica{i}" for i in range(num_replicas)]
        for replica_id in self.replica_ids:
            self.engines.append(LoopEngine(seconds_per_step=seconds_per_step))
            self.tables.append(LeaseTable(pool_blocks))
            self.hubs.append(ChannelHub(self.engines[-1], self.tables[-1], self.loop, self.options))
            self.transport.hubs[replica_id] = self.hubs[-1]
        self.ingresses: list[Channels] = []

    def ingress(self, ingress_id: str = "ingress") -> Channels:
        self.ingresses.append(Channels(self.transport, ingress_id, self.options))
        return self.ingresses[-1]

    async def __aenter__(self) -> Service:
        return self

    async def __aexit__(self, *failure: object) -> None:
        for ingress in self.ingresses:
            await ingress.close()
        if failure[0] is None:
            # An ingress that could not say goodbye is given up in time; a repeated call has been made by then.
            await asyncio.sleep(3 * self.options.lease_seconds)
            self.check_rest()
        await self.transport.close()
        for engine in self.engines:
            await engine.stop()

    def check_rest(self) -> None:
        for hub, table, engine in zip(self.hubs, self.tables, self.engines, strict=True):
            assert hub.num_live == 0, "a submit is left"
            assert hub.num_channels == 0, "a channel is left"
            assert hub.num_unread_tokens == 0
            assert hub._choices == hub._behind == hub._latest == {}
            assert table.rows() == (), "a lease is left"
            table.check_invariants()
            if engine._refusal is None:
                assert not engine.engine.has_work
                pool = engine.engine.scheduler.pool
                assert pool.num_free_blocks == pool.num_blocks
        for ingress in self.ingresses:
            assert ingress.replica_ids == []
            assert not ingress._tasks


def leased(requests: list[GenerateRequest], attempt: int = 0) -> list[GenerateRequest]:
    name = f"{requests[0].request_id}/{attempt}"
    return [dataclasses.replace(request, lease_id=name, attempt=attempt) for request in requests]


def simple_request(name: str, *, max_tokens: int = 12, n: int = 1, **sampling: Any) -> list[GenerateRequest]:
    return leased(make_request(name, 5, n=n, max_tokens=max_tokens, **sampling))


async def collect(outputs: Outputs) -> list[TokenOutput]:
    """All outputs until every choice has ended."""
    collected = []
    while some := await outputs.next():
        collected += some
    return collected


async def read_on(outputs: Outputs, collected: list[TokenOutput]) -> None:
    """Collects until it raises."""
    while some := await outputs.next():
        collected += some


def check_tokens(requests: list[GenerateRequest], outputs: list[TokenOutput]) -> None:
    """Complete, in order, once, with one end for each choice."""
    for request in requests:
        mine = [output for output in outputs if output.choice_index == request.choice_index]
        tokens, reason = expected_tokens(request, max_model_len=MAX_MODEL_LEN)
        assert all(output.request_id == request.request_id for output in mine)
        assert sum((output.token_ids for output in mine), ()) == tokens
        assert [output.finish_reason for output in mine if output.finish_reason] == [reason]
        assert mine[-1].finish_reason is reason
