"""Live feed: what the page at /ui shows, asked of replicas and router while somebody looks, and told to all who do.

    first viewer comes   one task begins to ask: each replica for the steps after the last one, the router for its snapshot
    every tick           what has come meanwhile is one message, the same bytes for every viewer
    last viewer leaves   the task ends; nothing is asked

A replica that hangs holds nobody up: each has a call of its own in flight, and no other until that is answered. A viewer
that does not read is dropped. Knows calls and snapshots; knows no HTTP, no Ray, no page. For one event loop.
"""

from __future__ import annotations

import asyncio
import contextvars
import json
import secrets
import time
from collections import Counter, deque
from collections.abc import AsyncGenerator, Awaitable, Callable, Collection, Iterable, Mapping
from typing import Any, Protocol

from serve_app.errors import (
    EngineUnavailableError,
    OverloadedError,
    ReplicaLostError,
    ReplicaUnreachableError,
    ServerDrainingError,
)
from serve_app.logs import get_logger

logger = get_logger(__name__)

TICK_SECONDS = 0.125
"""Between two messages, and between two questions to one replica."""
SNAPSHOT_TICKS = 2
"""Between two questions to the router: replicas report to it four times a second."""
QUIET_TICKS = 16
"""With nothing new, a message comes so often: the page knows that it is connected."""
SHOWN_STEPS = 128
"""Steps of each replica that a new viewer gets: some more than the columns of a wide screen."""
MAX_STEPS = 40
"""Newest steps of one replica in one message. An index that is left out says that there were more."""
MAX_VIEWERS = 16
MAX_UNREAD = 48
"""Messages kept for a viewer: six seconds. One that is further behind is dropped, and comes back by itself."""
VIEW_SECONDS = 120.0
"""A stream ends after so long, and the page reads the next one: what lies between here and a page that does not read is
kept by proxies, whose memory has no other bound."""
MAX_EVENTS = 50

LEDGER_EVENTS = {"refused": "refused", "refused_as_too_late": "refused", "timed_out": "timed_out"}
"""Counter of the ledger -> kind of event."""
STREAM_EVENTS = {
    "lost": "streams_lost",
    "resumed": "streams_resumed",
    "given_up": "streams_given_up",
    "replica_killers": "replica_killers",
}
"""Counter of `Failover` -> kind of event. Of this ingress's streams."""
ROUTER_FIELDS = (
    *("is_rebuilding", "seconds_left", "num_leases", "num_holders", "policy"),
    *("num_queued_requests", "num_queued_tokens", "oldest_wait_seconds"),
)
REPLICA_FIELDS = (
    *("block_size", "num_blocks", "num_booked_blocks", "num_free_blocks", "num_leases", "num_booked_seqs"),
    *("max_num_seqs", "num_running", "num_waiting", "is_draining", "is_silent"),
)
"""What of the ledger's snapshot is told."""

Json = dict[str, Any]


class Calls(Protocol):
    """What is used of Channels."""

    async def call_each(self, replica_ids: Iterable[str], method: str, *args: Any) -> dict[str, Any]: ...


class Viewer:
    """One page that looks. `LiveFeed.join` makes it; whoever reads it must call `leave`."""

    def __init__(self, feed: LiveFeed) -> None:
        self.is_over = False
        """It gets nothing more: dropped, or the feed has ended."""
        self._feed = feed
        self._unread: deque[bytes] = deque()
        self._arrived = asyncio.Event()

    async def messages(self) -> AsyncGenerator[bytes, None]:
        """Server-sent events, until the stream's time is over, the feed ends, or the viewer was too slow."""
        timer = asyncio.get_running_loop().call_later(VIEW_SECONDS, self._end)
        try:
            yield b"retry: 500\n\n"
            while not self.is_over:
                await self._arrived.wait()
                self._arrived.clear()
                while self._unread:
                    yield self._unread.popleft()
        finally:
            timer.cancel()

    def leave(self) -> None:
        self._feed._leave(self)

    def _put(self, message: bytes) -> None:
        if len(self._unread) >= MAX_UNREAD:
            self._unread.clear()
            self.is_over = True
        elif not self.is_over:
            self._unread.append(message)
        self._arrived.set()

    def _end(self) -> None:
        self.is_over = True
        self._arrived.set()


class LiveFeed:
    """``look``: gives `Router.snapshot`, or raises EngineUnavailableError. ``stream_counters``: of `Failover`, of this
    ingress. ``is_leaving``: whether this ingress was told to leave; its viewers then go."""

    def __init__(
        self,
        replicas: Calls,
        look: Callable[[str], Awaitable[Json]],
        stream_counters: Mapping[str, int],
        *,
        is_leaving: Callable[[], bool] = bool,
        tick_seconds: float = TICK_SECONDS,
    ) -> None:
        self._replicas = replicas
        self._look = look
        self._stream_counters = stream_counters
        self._is_leaving = is_leaving
        self._tick_seconds = tick_seconds
        self._viewers: set[Viewer] = set()
        self._new_viewers: set[Viewer] = set()
        """They have not had the first message, which says all."""
        self._task: asyncio.Task[None] | None = None
        self._begin()

    def _begin(self) -> None:
        """As if nobody had ever looked."""
        self._calls: dict[str, asyncio.Task[None]] = {}
        """In flight, by replica; the router's is called ""."""
        self._snapshot: Json | None = None
        self._is_away = False
        self._shown: dict[str, deque[list[Any]]] = {}
        """Replica -> its last steps."""
        self._heads: dict[str, Json] = {}
        """Replica -> what it said last, but for the steps."""
        self._gone: dict[str, bool] = {}
        """Replicas that are not asked any more -> whether they were lost."""
        self._counts: Counter[str] | None = None
        self._watch = secrets.token_hex(8)
        """This life's name: another one, and another ingress, counts events anew."""
        self._events: deque[Json] = deque(maxlen=MAX_EVENTS)
        self._num_events = 0
        # What the next message has to say.
        self._news: dict[str, Json] = {}
        self._new_events: list[Json] = []
        self._told_router: Json | None = None

    # ---- viewers -------------------------------------------------------------------------------------------------

    def join(self) -> Viewer:
        """Raises OverloadedError where MAX_VIEWERS look already, ServerDrainingError where this ingress leaves."""
        if self._is_leaving():
            raise ServerDrainingError("this ingress leaves, and shows nothing any more")
        if len(self._viewers) >= MAX_VIEWERS:
            raise OverloadedError(f"{MAX_VIEWERS} pages look at this ingress already, which is the limit", 10)
        viewer = Viewer(self)
        self._viewers.add(viewer)
        self._new_viewers.add(viewer)
        if self._task is None:
            self._begin()
            # In an empty context: it belongs to no viewer's request.
            loop = asyncio.get_running_loop()
            self._task = loop.create_task(self._run(), context=contextvars.Context())
        return viewer

    def _leave(self, viewer: Viewer) -> None:
        viewer._end()
        self._viewers.discard(viewer)
        self._new_viewers.discard(viewer)
        if not self.is_watched and self._task is not None:
            self._task.cancel()
            self._task = None
            for call in list(self._calls.values()):  # here, and not in the task: the next life may begin before it runs
                call.cancel()

    @property
    def num_viewers(self) -> int:
        return len(self._viewers)

    @property
    def is_watched(self) -> bool:
        """Somebody reads. A viewer that was dropped counts among MAX_VIEWERS until its connection is gone."""
        return any(not viewer.is_over for viewer in self._viewers)

    # ---- the task ------------------------------------------------------------------------------------------------

    async def _run(self) -> None:
        calls = self._calls  # of this life: a later one has its own
        quiet, ticks = 0, 0
        try:
            while self.is_watched and not self._is_leaving():
                self._ask(with_router=ticks % SNAPSHOT_TICKS == 0)
                ticks += 1
                await asyncio.sleep(self._tick_seconds)
                quiet = 0 if self._tell(even_if_quiet=quiet >= QUIET_TICKS) else quiet + 1
        except Exception:
            logger.exception("the live feed failed")
        finally:
            for call in list(calls.values()):
                call.cancel()
            if asyncio.current_task() is self._task:
                self._task = None
                for viewer in self._viewers:
                    viewer._end()

    def _ask(self, *, with_router: bool) -> None:
        if with_router and "" not in self._calls:
            self._spawn("", self._ask_router())
        for replica_id in self._known_replicas():
            if replica_id not in self._calls and replica_id not in self._gone:
                self._spawn(replica_id, self._ask_replica(replica_id))

    def _spawn(self, name: str, coroutine: Any) -> None:
        calls = self._calls
        task = calls[name] = asyncio.get_running_loop().create_task(coroutine)

        def forget(ended: asyncio.Task[None]) -> None:
            del calls[name]
            if not ended.cancelled() and (error := ended.exception()) is not None:
                logger.error("the live feed: %s", name or "router", exc_info=error)

        task.add_done_callback(forget)

    def _known_replicas(self) -> Collection[str]:
        return () if self._snapshot is None else self._snapshot["replicas"]

    async def _ask_replica(self, replica_id: str) -> None:
        shown = self._shown.setdefault(replica_id, deque(maxlen=SHOWN_STEPS))
        after, limit = (shown[-1][0], MAX_STEPS) if shown else (-1, SHOWN_STEPS)
        answer = (await self._replicas.call_each([replica_id], "recent_steps", after, limit))[replica_id]
        if isinstance(answer, ReplicaUnreachableError):
            return  # it may answer the next time; the router says whether it is silent
        if isinstance(answer, ReplicaLostError):
            self._has_gone(replica_id, is_lost=True)
        elif isinstance(answer, Exception):
            logger.error("replica %s shows no steps: %r", replica_id, answer)
            self._gone[replica_id] = False
        else:
            self._take_steps(replica_id, answer)

    def _take_steps(self, replica_id: str, answer: Json) -> None:
        steps = answer.pop("steps")
        self._shown[replica_id] += steps
        before = self._heads.get(replica_id, answer)
        if steps or answer != self._heads.get(replica_id):
            self._heads[replica_id] = answer
            news = self._news.setdefault(replica_id, {"steps": []})
            news |= {**answer, "steps": (news["steps"] + steps)[-SHOWN_STEPS:]}
        if (number := answer["num_preempted"] - before["num_preempted"]) > 0:
            self._happened("preempted", replica_id, number)

    async def _ask_router(self) -> None:
        try:
            snapshot = await self._look("snapshot")
        except EngineUnavailableError:
            if not self._is_away:
                self._is_away = True
                self._happened("router_away")
            return
        before, self._snapshot = self._snapshot, snapshot
        if self._is_away or (before is not None and before["epoch"] != snapshot["epoch"]):
            self._happened("router_back")
        self._is_away = False
        self._compare(before["replicas"] if before is not None else snapshot["replicas"], snapshot)
        self._count(snapshot["counters"])

    def _compare(self, before: Mapping[str, Json], snapshot: Json) -> None:
        """What has become of the replicas. A router's new life begins without any, which says nothing of them."""
        replicas = snapshot["replicas"]
        for replica_id, replica in replicas.items():
            if replica_id not in before:
                if replica_id not in self._shown:
                    self._happened("replica_joined", replica_id)
                continue
            for field, kind in (("is_draining", "replica_draining"), ("is_silent", "replica_silent")):
                if replica[field] and not before[replica_id][field]:
                    self._happened(kind, replica_id)
        if not snapshot["is_rebuilding"]:
            for replica_id in before.keys() - replicas.keys():
                self._has_gone(replica_id, is_lost=not before[replica_id]["is_draining"])

    def _has_gone(self, replica_id: str, *, is_lost: bool) -> None:
        if replica_id not in self._gone:
            self._gone[replica_id] = is_lost
            self._news.setdefault(replica_id, {"steps": []})["is_gone"] = True
            self._happened("replica_lost" if is_lost else "replica_left", replica_id)

    def _count(self, ledger: Mapping[str, int]) -> None:
        counts: Counter[str] = Counter()
        for source, kinds in ((ledger, LEDGER_EVENTS), (self._stream_counters, STREAM_EVENTS)):
            for key, kind in kinds.items():
                counts[kind] += source.get(key, 0)
        before, self._counts = self._counts, counts
        for kind, number in counts.items():
            if before is not None and number > before[kind]:
                self._happened(kind, number=number - before[kind])

    def _happened(self, kind: str, replica_id: str | None = None, number: int = 1) -> None:
        self._num_events += 1
        event = {"event": self._num_events, "at_ms": _now_ms(), "kind": kind, "number": number}
        if replica_id is not None:
            event["replica"] = replica_id
        self._events.append(event)
        self._new_events.append(event)

    # ---- messages ------------------------------------------------------------------------------------------------

    def _tell(self, *, even_if_quiet: bool) -> bool:
        """Gives every viewer what is new. Returns whether anything was."""
        message: Json = {"at_ms": _now_ms(), "replicas": self._news, "events": self._new_events}
        if (router := self._router()) != self._told_router:
            message["router"] = self._told_router = router
        is_new = bool(self._news or self._new_events or "router" in message)
        self._news, self._new_events = {}, []
        if is_new or even_if_quiet:
            data = _event(message)
            for viewer in self._viewers - self._new_viewers:
                viewer._put(data)
        if self._new_viewers and (self._snapshot is not None or self._is_away):
            data = _event(self._everything())
            for viewer in self._new_viewers:
                viewer._put(data)
            self._new_viewers = set()
        return is_new or even_if_quiet

    def _everything(self) -> Json:
        replicas = {
            replica_id: {**head, "steps": list(self._shown[replica_id])}
            for replica_id, head in self._heads.items()
            if replica_id not in self._gone
        }
        return {
            "is_first": True,
            "watch": self._watch,
            "at_ms": _now_ms(),
            "tick_ms": self._tick_seconds * 1000.0,
            "replicas": replicas,
            "events": list(self._events),
            "router": self._router(),
        }

    def _router(self) -> Json:
        snapshot = self._snapshot
        if snapshot is None:
            return {"is_away": True, "replicas": {}}
        told: Json = {"is_away": self._is_away, **{field: snapshot[field] for field in ROUTER_FIELDS}}
        told["replicas"] = {
            replica_id: {field: replica[field] for field in REPLICA_FIELDS}
            for replica_id, replica in snapshot["replicas"].items()
        }
        return told


def _now_ms() -> int:
    return int(time.time() * 1000.0)


def _event(message: Json) -> bytes:
    return b"data: " + json.dumps(message, separators=(",", ":")).encode() + b"\n\n"
