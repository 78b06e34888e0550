"""Replica: the Ray Serve deployment around one AsyncEngine. Wires engine, lease table, channels and reports together.

Knows Ray Serve's hooks. engine/ knows what runs, channel.py and output_hub.py what travels, lease_table.py what is booked.

A replica is lost rather than sick: if the engine's thread has died, or a step has not returned for stuck_seconds, the
process ends at once, and whoever used it knows within milliseconds.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import os
import time
from collections.abc import AsyncGenerator
from typing import Any

import ray
from ray import serve

from serve_app import logs
from serve_app.config import ServeArgs
from serve_app.engine.async_engine import AsyncEngine
from serve_app.engine.recent_steps import recent_steps
from serve_app.engine.request import GenerateRequest
from serve_app.errors import RaggedServeError
from serve_app.replica.autoscaling import COMMITTED, POOL, QUEUED
from serve_app.replica.kept import Keep, KeptPrompt, KeptRequests
from serve_app.replica.lease_table import LeaseTable
from serve_app.replica.load import load_engine
from serve_app.replica.messages import Message
from serve_app.replica.output_hub import ChannelHub
from serve_app.replica.reporter import Reporter
from serve_app.replica.request_history import RequestHistory
from serve_app.routing import departure
from serve_app.routing.ray_router import RayRouter

logger = logs.get_logger(__name__)

STUCK_SECONDS = {"cuda": 20.0, "cpu": 120.0}
"""Default of stuck_seconds, by device: far above its longest step."""
WATCH_SECONDS = 0.25
"""Between two looks at the engine: Ray Serve's own health check asks less often."""


class Replica:
    """``args``: the application's, as plain data."""

    async def __init__(self, args: dict[str, Any]) -> None:  # type: ignore[misc]
        context = serve.get_replica_context()
        self.replica_id = context.replica_id.unique_id
        parsed = ServeArgs.parse(args)
        logs.configure("replica", self.replica_id, parsed.log.to_log_options())
        engine = await asyncio.to_thread(load_engine, parsed)
        self.engine = AsyncEngine(engine)
        self.engine.start()
        loop = asyncio.get_running_loop()
        self._collects: asyncio.Task[None] | None = None
        self.table = LeaseTable(engine.runner.num_kv_blocks)
        resume = parsed.resume
        kept = KeptRequests(resume.keep_seconds, resume.max_requests, resume.max_tokens)
        self.hub = ChannelHub(self.engine, self.table, loop, kept=kept)
        if parsed.api.explain:
            self.hub.history = RequestHistory(engine.recorder, engine.clock, lambda: time.time() * 1000.0)
            self._collects = loop.create_task(self.hub.history.run(), context=contextvars.Context())
        fingerprint: str = getattr(engine.runner, "fingerprint", "simulated")
        router = RayRouter(context.app_name, parsed.model.key, parsed.log.to_log_options(), parsed.model.names[0])
        departure.is_leaving()  # raises here, and not in the middle of a drain
        self._reporter = Reporter(
            router,
            self.replica_id,
            self.engine,
            self.table,
            self.hub,
            fingerprint,
            is_leaving=departure.is_leaving,
            drain_seconds=parsed.drain.replica_seconds,
            look_seconds=departure.LOOK_SECONDS,
        )
        # In an empty context: it belongs to no call.
        self._reports = loop.create_task(self._reporter.run(), context=contextvars.Context())
        kind = engine.runner.device.torch_device.type if hasattr(engine.runner, "device") else "cpu"
        self._stuck_seconds = engine.config.stuck_seconds or STUCK_SECONDS[kind]
        self._watch = loop.create_task(self._watch_engine(), context=contextvars.Context())
        logger.info("replica %s is ready", self.replica_id)

    # ---- the channel's replica end -------------------------------------------------------------------------------

    async def open_channel(self, ingress_id: str) -> int:
        return self.hub.open_channel(ingress_id)

    async def close_channel(self, channel_id: int) -> None:
        self.hub.close_channel(channel_id)

    async def submit_all(
        self, channel_id: int, submits: list[tuple[int, list[GenerateRequest], int, Keep | None]]
    ) -> list[RaggedServeError | None]:
        return await self.hub.submit_all(channel_id, submits)

    async def fetch_kept(self, resume_id: bytes, owner: bytes, ticket: int) -> list[KeptPrompt]:
        return await self.hub.fetch_kept(resume_id, owner, ticket)

    async def ack(self, channel_id: int, number: int, aborts: list[int]) -> None:
        self.hub.ack(channel_id, number, aborts)

    async def outputs(self, channel_id: int, after: int) -> AsyncGenerator[Message, None]:
        async with contextlib.aclosing(self.hub.outputs(channel_id, after)) as messages:
            async for message in messages:
                yield message

    async def explain(self, stream_ids: list[str]) -> dict[str, list[dict[str, Any]]]:
        return self.hub.explain(stream_ids)

    async def ping(self) -> None:
        """The process lives: see RayTransport."""

    # ---- looking at it -------------------------------------------------------------------------------------------

    async def recent_steps(self, after: int, limit: int) -> dict[str, Any]:
        """For the page, while somebody looks: `serve_app.engine.recent_steps`."""
        return recent_steps(self.engine.engine, after, limit, time.time() * 1000.0)

    # ---- Ray Serve's hooks ---------------------------------------------------------------------------------------

    async def check_health(self) -> None:
        """Ends the process if the engine is dead or stuck: its streams then move at once."""
        error = None
        if not self.engine.is_alive:
            error = f"the engine has died: {self.engine.error}"
        elif self.engine.seconds_without_progress > self._stuck_seconds:
            error = f"a step has not returned for {self.engine.seconds_without_progress:.0f} s"
        if error is not None:
            logger.critical("replica %s ends: %s", self.replica_id, error)
            os._exit(1)

    async def _watch_engine(self) -> None:
        while True:
            await self.check_health()
            await asyncio.sleep(WATCH_SECONDS)

    def record_autoscaling_stats(self) -> dict[str, float]:
        config = self.engine.engine.config
        # What is scarce: room in the pool, or places in a step.
        share = max(
            self.table.num_booked_blocks / self.table.num_blocks, self.table.num_booked_seqs / config.max_num_seqs
        )
        pool = float(self.table.num_blocks * config.block_size)
        return {
            COMMITTED: share * pool,
            POOL: pool,
            QUEUED: float(self._reporter.num_queued_tokens),
        }

    async def __del__(self) -> None:
        self._reports.cancel()
        self._watch.cancel()
        if self._collects is not None:
            self._collects.cancel()
        await asyncio.to_thread(self.engine.stop, 5.0)

    async def describe(self) -> dict[str, Any]:
        """Its own books, for tests and inspection. ``sequences``: request, choice, then tokens of the prompt, of the
        output, and in the KV cache."""
        scheduler = self.engine.engine.scheduler
        return {
            "replica_id": self.replica_id,
            "pid": os.getpid(),
            "leases": self.table.rows(),
            "num_blocks": self.table.num_blocks,
            "num_free_blocks": self.table.num_free_blocks,
            "sequences": [
                (*s.key, s.num_prompt_tokens, s.num_output_tokens, s.num_computed_tokens)
                for s in (*scheduler.running, *scheduler.waiting)
            ],
            "num_unfinished": self.engine.num_unfinished,
            "num_used_blocks": scheduler.pool.num_used_blocks,
            "num_steps": self.engine.num_steps,
            "num_channels": self.hub.num_channels,
            "num_unread_tokens": self.hub.num_unread_tokens,
            "num_tasks": len(asyncio.all_tasks()),
            "gpu_ids": ray.get_runtime_context().get_accelerator_ids().get("GPU", []),
        }

    async def check_invariants(self) -> None:
        """Raises AssertionError if the lease table or the scheduler's books do not add up. For soaks, and only at rest:
        the scheduler is the step thread's."""
        self.table.check_invariants()
        self.engine.engine.scheduler.check_invariants()
