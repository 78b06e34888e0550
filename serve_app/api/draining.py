"""Draining: the end of what runs on an ingress that leaves, or on a server that ends. Knows times, the router's client and
the channels; knows no HTTP, no Ray.

Until its time is over an ingress answers as always: nothing new comes, since HAProxy knows before it does that it leaves,
and the router refuses what is new to a server that ends. Streams cannot move to another ingress: their connections end
here. So what still runs then hears an error, and its client an error event, while there is somebody left to say it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Protocol

from serve_app.errors import ServerDrainingError
from serve_app.logs import get_logger
from serve_app.routing.router import RouterState

logger = get_logger(__name__)


class Leases(Protocol):
    """What is used of RouterClient."""

    state: RouterState | None

    def end(self, reason: str | None) -> None: ...


class Streams(Protocol):
    """What is used of Channels."""

    def expire(self, error: Exception) -> int: ...


class Draining:
    """Of one ingress. ``is_leaving``: whether it was told to leave; ``seconds`` after that its time is over. The time of
    the server is what the router says."""

    def __init__(
        self,
        leases: Leases,
        streams: Streams,
        *,
        is_leaving: Callable[[], bool],
        seconds: float,
        look_seconds: float = 0.1,
    ) -> None:
        self._leases = leases
        self._streams = streams
        self._is_leaving = is_leaving
        self._seconds = seconds
        self._look_seconds = look_seconds

    async def run(self) -> None:
        """Until it is cancelled."""
        loop = asyncio.get_running_loop()
        leaves_at: float | None = None
        server_ends_at: float | None = None
        heard: RouterState | None = None
        has_ended = False
        while True:
            now = loop.time()
            if leaves_at is None and self._is_leaving():
                leaves_at = now + self._seconds
                logger.info("this ingress leaves: what runs has %g s to end", self._seconds)
            if self._leases.state is not heard:
                heard = self._leases.state
                left = None if heard is None else heard.seconds_left
                server_ends_at = None if left is None else now + left
            reason = None
            if leaves_at is not None and now >= leaves_at:
                reason = f"this ingress leaves, and the {self._seconds:g} s for answers to end are over"
            elif server_ends_at is not None and now >= server_ends_at:
                reason = "this server ends, and the time for answers to end is over"
            if (reason is not None) != has_ended:
                has_ended = reason is not None
                self._leases.end(reason)
                if reason is not None:
                    logger.warning(
                        "%s: %d answers are ended", reason, self._streams.expire(ServerDrainingError(reason))
                    )
            await asyncio.sleep(self._look_seconds)
