"""Ingress: the Ray Serve deployment of the HTTP face. Wires tokenizer, router client and channels to the FastAPI app.

Knows Ray Serve's hooks. What a request means, service.py knows; what HTTP means, http_app.py. Loads no torch.
"""

from __future__ import annotations

import asyncio
import contextvars
import dataclasses
import logging
import os
import time
from typing import Any

from fastapi import FastAPI
from ray import serve

from serve_app import logs
from serve_app.api.draining import Draining
from serve_app.api.explain import Explainer
from serve_app.api.failover import FailoverLimits
from serve_app.api.http_app import build_app
from serve_app.api.live_feed import LiveFeed
from serve_app.api.request_model import RequestLimits
from serve_app.api.request_notes import RequestNotes
from serve_app.api.served_model import load_served_model
from serve_app.api.service import Service
from serve_app.config import IngressUserConfig, ServeArgs
from serve_app.engine.totals import Counts
from serve_app.metrics import render
from serve_app.replica.channel import Channels
from serve_app.replica.ray_transport import RayTransport
from serve_app.routing import departure, replica_set
from serve_app.routing.ray_router import RayRouter
from serve_app.routing.router_client import RouterClient

logger = logs.get_logger(__name__)


class Ingress:
    """``args``: the application's, as plain data. ``replicas``: handle of the Replica deployment."""

    async def __init__(self, args: dict[str, Any], replicas: Any) -> None:  # type: ignore[misc]
        self.args = ServeArgs.parse(args)
        context = serve.get_replica_context()
        self.ingress_id = context.replica_id.unique_id
        log_options = self.args.log.to_log_options()
        logs.configure("ingress", self.ingress_id, log_options)
        self.max_body_bytes = IngressUserConfig().limits.max_body_bytes
        self.router = RouterClient(
            RayRouter(context.app_name, self.args.model.key, log_options, self.args.model.names[0]),
            self.ingress_id,
            replica_set.current,
        )
        self.router.set_logs(log_options)
        self.channels = Channels(RayTransport(replicas), self.ingress_id)
        model = await asyncio.to_thread(load_served_model, self.args)
        self.service = Service(model, self.router, self.channels, lambda: self.router.state)
        self.service.keeps_streams = self.args.resume.keep_seconds > 0
        self.router.set_counts(self._counts)
        self.service.requests = RequestNotes(self.ingress_id, explains=self.args.api.explain)
        self.router.start()
        if self.args.api.explain:
            self.service.explainer = Explainer(self.service.requests, self.router, self.channels)
            self.service.explainer.start()
        departure.is_leaving()  # raises here, and not in the middle of a drain
        self.feed: LiveFeed | None = None
        if self.args.api.ui:
            counters = self.service.failover.counters
            self.feed = LiveFeed(self.channels, self.router.look, counters, is_leaving=departure.is_leaving)
        draining = Draining(
            self.router,
            self.channels,
            is_leaving=departure.is_leaving,
            seconds=self.args.drain.ingress_seconds,
            look_seconds=departure.LOOK_SECONDS,
        )
        # In an empty context: it belongs to no call.
        self._draining = asyncio.get_running_loop().create_task(draining.run(), context=contextvars.Context())
        logger.info("ingress %s serves %s", self.ingress_id, ", ".join(model.names))

    def __serve_build_asgi_app__(self) -> FastAPI:
        api = self.args.api
        return build_app(
            self,
            title=api.title,
            api_keys=api.api_keys(os.environ),
            cors_origins=tuple(api.cors_origins),
            # Serve 2.60 adds X-Request-ID to every answer, whatever stands there (serve/_private/http_util.py).
            server_sends_ids=True,
        )

    async def reconfigure(self, user_config: dict[str, Any]) -> None:
        """The run-time knobs. The time of this call is their version: an older one never overwrites a newer."""
        config = IngressUserConfig.parse(user_config)
        self.max_body_bytes = config.limits.max_body_bytes
        limits = config.limits
        self.service.limits = RequestLimits(
            **{field.name: getattr(limits, field.name) for field in dataclasses.fields(RequestLimits)}
        )
        self.channels.max_behind = limits.max_behind
        self.service.failover.limits = FailoverLimits(**config.failover.model_dump())
        logging.getLogger(logs.ROOT).setLevel(config.log_level)
        self.service.requests.logs = config.log_requests
        self.router.set_options(config.router.to_ledger_options(), int(time.time() * 1000))

    def _counts(self) -> Counts:
        router, service = self.router, self.service
        return service.counts.counts(router.queue_seconds, service.failover.counters, router.counters)

    async def metrics(self) -> str:
        snapshot = await self.router.metrics()
        return await asyncio.to_thread(render, snapshot, self.service.model.names[0])

    async def describe(self) -> dict[str, Any]:
        """What it has in hand, for tests and inspection."""
        return {
            "ingress_id": self.ingress_id,
            "pid": os.getpid(),
            "num_running": self.service.num_running,
            "num_waiting": self.router.num_waiting,
            "num_tasks": len(asyncio.all_tasks()),
        }

    async def check_health(self) -> None:
        """The process answers: that is all there is to know. A router or replica that is away ends no ingress."""

    async def __del__(self) -> None:
        self._draining.cancel()
        await self.channels.close()
        await self.router.close()
