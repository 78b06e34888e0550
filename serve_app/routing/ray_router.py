"""The router as a Ray actor, and its RouterSeam: the one file of routing/ that calls Ray's actors. Decides nothing.

The actor is named, detached, restarted by Ray for ever; whoever comes first makes it. Each life has a higher epoch. It ends
itself when nobody has called it for IDLE_SECONDS. In its name are the application's, the model's key and PROTOCOL: while an
update replaces one model by another there are two routers, and no stream goes on with a model that has not begun it.
"""

from __future__ import annotations

import asyncio
import contextvars
import time
from typing import Any

import ray
from ray.exceptions import ActorDiedError, RayActorError, RayError, RayTaskError

from serve_app import logs
from serve_app.errors import RaggedServeError
from serve_app.logs import LogOptions, get_logger
from serve_app.metrics import samples
from serve_app.routing.ray_metrics import RayMetrics
from serve_app.routing.router import Router
from serve_app.routing.router_client import RouterUnavailableError

logger = get_logger(__name__)

NAMESPACE = "ragged-serve"
PROTOCOL = 4
"""Changes with any change of what crosses processes here: two versions of the code then have two routers."""
IDLE_SECONDS = 60.0
"""Without a call for so long the application is gone, and the router ends itself."""
PLACE = {"ragged-serve/role": "!in(head,replica)"}
"""Label selector of the nodes where it may be: with the ingresses, as deploy/config.gpu-cluster.yaml places them. A node
without the label will do. It takes no CPU, and yet keeps a node from being idle."""
PUBLISH_SECONDS = 10.0
"""Between two times that all metrics are told to Ray's agent: as often as Ray passes them on."""


class RouterActor(Router):
    """`Router` as a Ray actor."""

    def __init__(self, name: str, log_options: LogOptions, model_name: str) -> None:
        self._name = name
        self._model_name = model_name
        logs.configure("router", name, log_options)
        # Milliseconds since 1970: higher in each life, wherever it is started.
        super().__init__(epoch=int(time.time() * 1000))
        self._idle_check: asyncio.Task[None] | None = None
        self._publishing: asyncio.Task[None] | None = None
        logger.info("%s, epoch %d", name, self.ledger.epoch)

    async def set_logs(self, options: LogOptions) -> None:
        logs.configure("router", self._name, options)

    def _called(self) -> float:
        if self._idle_check is None:
            self._idle_check = asyncio.get_running_loop().create_task(self._end_when_idle())
            self._publishing = asyncio.get_running_loop().create_task(self._publish_forever())
        return super()._called()

    async def _publish_forever(self) -> None:
        """All of them from here, and on a thread of its own: 5 microseconds each."""
        ray_metrics = RayMetrics()
        while True:
            await asyncio.sleep(PUBLISH_SECONDS)
            snapshot = {**await self.snapshot(), **self.board.snapshot(self._clock())}
            try:
                await asyncio.to_thread(ray_metrics.publish, samples(snapshot, self._model_name))
            except Exception:
                logger.exception("the metrics could not be told to Ray")

    async def _end_when_idle(self) -> None:
        while (rest := self.called_at + IDLE_SECONDS - self._clock()) > 0:
            await asyncio.sleep(rest)
        logger.info("nobody has called for %.0f s: the router ends", IDLE_SECONDS)
        ray.kill(ray.get_runtime_context().current_actor)


def actor_name(app_name: str, model_key: str) -> str:
    """``model_key``: ModelArgs.key."""
    return f"router:{app_name}:{model_key}:v{PROTOCOL}"


def connect(name: str, log_options: LogOptions, model_name: str) -> Any:
    """The handle of the router of that name, which is made if there is none. May block for a while. ``model_name``: for
    metrics."""
    return (
        ray.remote(RouterActor)
        .options(
            name=name,
            namespace=NAMESPACE,
            lifetime="detached",
            get_if_exists=True,
            max_restarts=-1,
            num_cpus=0,
            label_selector=PLACE,
            max_concurrency=1000,
        )
        .remote(name, log_options, model_name)
    )


class RayRouter:
    """RouterSeam over the actor: looked up by `connect` on a thread of its own, since a lookup may block."""

    def __init__(self, app_name: str, model_key: str, log_options: LogOptions, model_name: str) -> None:
        self._name = actor_name(app_name, model_key)
        self._log_options = log_options
        self._model_name = model_name
        self._handle: Any = None
        self._lookup: asyncio.Task[Any] | None = None

    async def call(self, method: str, *args: Any) -> Any:
        try:
            if self._handle is None:
                self._handle = await self._look_up()
            return await getattr(self._handle, method).remote(*args)
        except RayTaskError as error:
            cause = error.cause
            if isinstance(cause, RaggedServeError):
                raise cause from error
            raise
        except RayActorError as error:
            # Unavailable: Ray restarts it, and the handle stays good. Died: it ended itself, and another is made.
            if isinstance(error, ActorDiedError):
                self._handle = None
            raise RouterUnavailableError(f"{type(error).__name__}: {str(error).splitlines()[0]}") from error
        except (RayError, ValueError) as error:
            self._handle = None
            raise RouterUnavailableError(f"{type(error).__name__}: {error}") from error

    async def _look_up(self) -> Any:
        """One lookup at a time, which goes on when its caller gives up."""
        if self._lookup is None or self._lookup.done():
            self._lookup = asyncio.get_running_loop().create_task(
                asyncio.to_thread(connect, self._name, self._log_options, self._model_name),
                context=contextvars.Context(),
            )
        return await asyncio.shield(self._lookup)
