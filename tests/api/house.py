"""The whole service in one process, on a thread of its own: HTTP server, ingress, router, replicas. No Ray, real sockets.

What is real: uvicorn, http_app, service, stream, router client, router, ledger, channels, hubs, lease tables, engines on
their threads. What stands in: Ray's calls (FakeTransport, and direct calls of the router), and where ``engines`` are not
given, the model (SimulatedRunner).
"""

from __future__ import annotations

import asyncio
import pickle
import random
import socket
import threading
import time
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

import uvicorn

from serve_app.api.draining import Draining
from serve_app.api.explain import Explainer
from serve_app.api.http_app import build_app
from serve_app.api.live_feed import LiveFeed
from serve_app.api.request_notes import RequestNotes
from serve_app.api.served_model import ServedModel
from serve_app.api.service import Service
from serve_app.config import IngressUserConfig, ServeArgs
from serve_app.engine.async_engine import AsyncEngine
from serve_app.engine.engine import Engine
from serve_app.engine.recent_steps import recent_steps
from serve_app.metrics import render
from serve_app.replica.channel import Channels
from serve_app.replica.kept import KeptRequests
from serve_app.replica.lease_table import LeaseTable
from serve_app.replica.load import load_engine
from serve_app.replica.output_hub import ChannelHub
from serve_app.replica.reporter import Reporter
from serve_app.replica.request_history import RequestHistory
from serve_app.routing.router import Router
from serve_app.routing.router_client import RouterClient, RouterUnavailableError
from tests.replica.channel_harness import FakeTransport

T = TypeVar("T")


class Replica:
    """As serve_app/replica/replica.py, without Ray."""

    def __init__(self, replica_id: str, engine: Engine, house: House) -> None:
        self.replica_id = replica_id
        self.engine = AsyncEngine(engine)
        self.engine.start()
        self.table = LeaseTable(engine.runner.num_kv_blocks)
        resume = house.args.resume
        kept = KeptRequests(resume.keep_seconds, resume.max_requests, resume.max_tokens)
        self.hub = ChannelHub(self.engine, self.table, asyncio.get_running_loop(), kept=kept)
        if house.args.api.explain:  # collected when somebody asks, and by nothing else
            self.hub.history = RequestHistory(engine.recorder, engine.clock, lambda: time.time() * 1000.0)
        self.is_leaving = False
        """What Ray Serve tells the real one."""
        reporter = Reporter(
            house,
            replica_id,
            self.engine,
            self.table,
            self.hub,
            "one",
            report_seconds=0.02,
            is_leaving=lambda: self.is_leaving,
            drain_seconds=house.args.drain.replica_seconds,
            look_seconds=0.01,
        )
        self.reporter = asyncio.get_running_loop().create_task(reporter.run())

    async def recent_steps(self, after: int, limit: int) -> dict[str, Any]:
        return recent_steps(self.engine.engine, after, limit, time.time() * 1000.0)


class House:
    """``start`` returns when it is ready. ``args``: as in a deploy/*.yaml."""

    def __init__(
        self,
        args: dict[str, Any],
        *,
        num_replicas: int = 2,
        user_config: dict[str, Any] | None = None,
        api_keys: tuple[str, ...] = (),
        make_engine: Callable[[ServeArgs], Engine] = load_engine,
        cors_origins: tuple[str, ...] = (),
    ) -> None:
        self.args = ServeArgs.parse(args)
        self.config = IngressUserConfig.parse(user_config or {})
        self.max_body_bytes = self.config.limits.max_body_bytes
        self.num_replicas = num_replicas
        self.router: Router | None = None
        """None: the router is away."""
        self._api_keys = api_keys
        self._cors_origins = cors_origins
        self._make_engine = make_engine
        self.is_leaving = False
        """What Ray Serve tells an ingress."""
        self._epoch = 0
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="house", daemon=True)

    # ---- from the test's thread ----------------------------------------------------------------------------------

    def start(self) -> House:
        self._thread.start()
        self.run(self._start())
        return self

    def run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(60)

    def stop(self) -> None:
        self.run(self._stop())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def __enter__(self) -> House:
        return self.start()

    def __exit__(self, *failure: object) -> None:
        self.stop()

    def wait_until(self, condition: Callable[[], bool], seconds: float = 20.0) -> None:
        """Polls a condition of the house's state."""
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, "the condition never held"
            time.sleep(0.005)

    def is_at_rest(self) -> bool:
        """Nobody runs, waits or holds anything."""
        assert self.router is not None
        return (
            all(not r.table.rows() and not r.engine.num_unfinished for r in self.replicas)
            and not self.router.ledger.snapshot()["num_leases"]
            and not self.router.ledger.snapshot()["num_queued_requests"]
            and self.service.num_running == 0
            and self.client.num_waiting == 0
        )

    def check_rest(self) -> None:
        self.wait_until(self.is_at_rest)
        assert self.router is not None
        self.router.ledger.check_invariants()
        for replica in self.replicas:
            replica.table.check_invariants()
            pool = replica.engine.engine.scheduler.pool
            assert pool.num_free_blocks == pool.num_blocks

    # ---- the parts -----------------------------------------------------------------------------------------------

    async def call(self, method: str, *args: Any) -> Any:
        if self.router is None:
            raise RouterUnavailableError("planted: it is away")
        result = await getattr(self.router, method)(*pickle.loads(pickle.dumps(args)))
        return pickle.loads(pickle.dumps(result))

    def make_router(self) -> None:
        self._epoch += 1
        self.router = Router(self._epoch)
        self.router.ledger.rebuilding.grace_seconds = 0.1
        self.router.board._settled_at = 0.0

    async def metrics(self) -> str:
        return render(await self.client.metrics(), self.model.names[0])

    def make_client(self, name: str) -> tuple[RouterClient, Channels, Service]:
        client = RouterClient(self, name, lambda: list(self.transport.hubs), away_seconds=0.2, seed=0)
        channels = Channels(self.transport, name)
        service = Service(self.model, client, channels, lambda: client.state, seeds=random.Random(0))
        service.keeps_streams = self.args.resume.keep_seconds > 0
        client.set_counts(
            lambda: service.counts.counts(client.queue_seconds, service.failover.counters, client.counters)
        )
        service.requests = RequestNotes(name, explains=self.args.api.explain)
        client.start()
        if self.args.api.explain:
            service.explainer = Explainer(service.requests, client, channels)
            service.explainer.start()
        return client, channels, service

    async def _start(self) -> None:
        from serve_app.api.served_model import load_served_model

        self.make_router()
        self.transport = FakeTransport(random.Random(0))
        self.replicas: list[Replica] = []
        for i in range(self.num_replicas):
            replica = Replica(f"replica{i}", self._make_engine(self.args), self)
            self.replicas.append(replica)
            self.transport.hubs[replica.replica_id] = replica.hub
            self.transport.replicas[replica.replica_id] = replica
        self.model: ServedModel = load_served_model(self.args)
        self.client, self.channels, self.service = self.make_client("ingress0")
        self.feed: LiveFeed | None = None
        if self.args.api.ui:
            self.feed = LiveFeed(
                self.channels,
                self.client.look,
                self.service.failover.counters,
                is_leaving=lambda: self.is_leaving,
                tick_seconds=0.02,
            )
        draining = Draining(
            self.client,
            self.channels,
            is_leaving=lambda: self.is_leaving,
            seconds=self.args.drain.ingress_seconds,
            look_seconds=0.01,
        )
        self._draining = self._loop.create_task(draining.run())
        self.client.set_options(self.config.router.to_ledger_options(), 1)
        app = build_app(self, api_keys=self._api_keys, cors_origins=self._cors_origins)
        self.socket = socket.create_server(("127.0.0.1", 0))
        self.port: int = self.socket.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.server = uvicorn.Server(
            uvicorn.Config(app, log_level="error", lifespan="off", timeout_graceful_shutdown=1)
        )
        self._serving = self._loop.create_task(self.server.serve([self.socket]))
        while not (self.server.started and self.service.is_ready and not self.client.state.is_rebuilding):
            await asyncio.sleep(0.01)

    async def _stop(self) -> None:
        self.server.should_exit = True
        await self._serving
        self._draining.cancel()
        await self.channels.close()
        await self.client.close()
        await self.transport.close()
        for replica in self.replicas:
            replica.reporter.cancel()
            await asyncio.to_thread(replica.engine.stop, 5.0)
        if self.router is not None and self.router._timer is not None:
            self.router._timer.cancel()
