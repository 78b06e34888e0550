"""RouterClient: the ingress's side of the router. Knows one lease at a time; knows no Ray, no HTTP, no channel.

Each ingress keeps one `ask` and one `tell` in flight, each carrying all that has come together meanwhile: batching
without a timer. Requests that wait in the router's queue are answered through `take_grants`.

While the router is away new requests wait for ``away_seconds``. Then the client makes a lease of its own on one of two
replicas, the one on which it has booked less itself (power of two choices, Mitzenmacher 2001). The replica may refuse it.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import dataclasses
import itertools
import math
import random
from collections import Counter
from collections.abc import Callable, Coroutine
from typing import Any, NamedTuple, Protocol

from serve_app.engine.totals import Counts, Histogram
from serve_app.errors import DeadlineExceededError, EngineUnavailableError, ServerDrainingError
from serve_app.logs import LogOptions, get_logger
from serve_app.metrics import INGRESS
from serve_app.routing.leases import Lease, LeaseRequest, num_blocks_for
from serve_app.routing.ledger_options import LedgerOptions
from serve_app.routing.router import Answer, RouterState, Settled

logger = get_logger(__name__)

RENEW_SECONDS = 1.0
"""An ingress speaks to the router at least this often."""
CALL_SECONDS = 5.0
"""A call unanswered for so long has failed."""
POLL_CALL_SECONDS = 30.0
"""The same for `take_grants`, which waits on purpose."""
LATE_SECONDS = 0.25
"""The router ends a wait at its deadline. One that it left alone so much longer is ended here."""
PAUSE_SECONDS = 0.05
"""After a call that failed."""


class RouterUnavailableError(Exception):
    """The router does not answer. Raised by a RouterSeam, caught here."""


class RouterSeam(Protocol):
    """Calls a method of `Router`. Raises RouterUnavailableError where it cannot be reached or does not answer."""

    async def call(self, method: str, *args: Any) -> Any: ...


class _Waiter(NamedTuple):
    """One call of `RouterClient.lease`. Times: seconds of the event loop's clock."""

    request: LeaseRequest
    answer: asyncio.Future[Lease]
    asked_at: float
    deadline: float | None


class RouterClient:
    """For one event loop. ``replica_ids``: the replicas that calls can reach now, as Ray Serve says."""

    def __init__(
        self,
        seam: RouterSeam,
        holder_id: str,
        replica_ids: Callable[[], list[str]] = list,
        *,
        away_seconds: float = 2.0,
        seed: int | None = None,
    ) -> None:
        self.holder_id = holder_id
        self.state: RouterState | None = None
        """What the router said last."""
        self.is_away = False
        """The last call failed."""
        self.counters: Counter[str] = Counter(failed_calls=0, own_leases=0, router_lives=0)
        self.queue_seconds = Histogram(INGRESS["queue_seconds"].bounds)
        """How long the leases were waited for."""
        self._seam = seam
        self._replica_ids = replica_ids
        self._away_seconds = away_seconds
        self._random = random.Random(seed)
        self._numbers = itertools.count(1)
        self._tasks: set[asyncio.Task[None]] = set()
        self._new: dict[str, LeaseRequest] = {}
        """Not yet asked."""
        self._waiters: dict[str, _Waiter] = {}
        """Those without a lease."""
        self._away_since = 0.0
        """Seconds of the event loop's clock."""
        self._alone: asyncio.Task[None] | None = None
        """`_lease_alone`, while the router is away."""
        self._queued: dict[str, LeaseRequest] = {}
        """Told to wait."""
        self._settled: dict[str, Settled] = {}
        self._withdrawn: dict[str, None] = {}
        self._lost: dict[str, None] = {}
        self._own: dict[str, tuple[str, int]] = {}
        """Lease -> replica and tokens, of all leases that this ingress holds."""
        self._options: tuple[LedgerOptions, int] | None = None
        self._told_options: tuple[int, int] | None = None
        """Epoch and version that the router has."""
        self._count: Callable[[], Counts] = dict
        self._counted_at = -math.inf
        """Seconds of the event loop's clock: when the router was told last, or there was nothing new."""
        self._num_counts = 0
        self._told_counts: Counts = {}
        """What the router has."""
        self._logs: LogOptions | None = None
        self._told_logs: int | None = None
        """Epoch of the router that has heard of them."""
        self._has_new = asyncio.Event()
        self._has_news = asyncio.Event()
        """There is something to tell."""
        self._has_queued = asyncio.Event()
        self._answered = asyncio.Event()
        self._is_closed = False
        self._is_listening = False
        self._end: str | None = None
        """Why nobody gets a lease any more."""

    def start(self) -> None:
        """Starts the three loops. In an empty context: they belong to no client's request."""
        for loop in (self._ask_forever, self._tell_forever, self._take_forever):
            self._spawn(loop())

    async def close(self) -> None:
        """Tells the router the last settlements, if it answers, and ends."""
        self._is_closed = True
        for task in list(self._tasks):
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)
        with contextlib.suppress(RouterUnavailableError):
            await self._tell()
            if self._is_listening:
                await self._call(CALL_SECONDS, "stop_listening", self.holder_id)

    # ---- for requests --------------------------------------------------------------------------------------------

    async def lease(self, request: LeaseRequest) -> Lease:
        """Waits for a lease. A caller that is cancelled gives it back, whenever it comes.

        Raises what the ledger answers (OverloadedError, RequestTooLargeError, DeadlineExceededError, ...), and
        EngineUnavailableError if the router is away and no replica is known either.
        """
        if self._end is not None:
            raise ServerDrainingError(self._end)
        request_id = request.request_id
        answer: asyncio.Future[Lease] = asyncio.get_running_loop().create_future()
        now = asyncio.get_running_loop().time()
        deadline = None if request.remaining_ms is None else now + request.remaining_ms / 1000.0
        waiter = self._waiters[request_id] = _Waiter(request, answer, now, deadline)
        self._new[request_id] = request
        self._has_new.set()
        try:
            lease = await self._wait(waiter)
        except BaseException:
            self._drop(request_id, answer)
            raise
        self._waiters.pop(request_id, None)
        self.queue_seconds.observe(asyncio.get_running_loop().time() - now)
        self._own[lease.lease_id] = lease.replica_id, lease.num_tokens
        return lease

    def settle(self, lease: Lease, num_output_tokens: int | None) -> None:
        """The replica has ended it, or is lost. ``num_output_tokens``: of all choices; None: learn nothing from it."""
        self._own.pop(lease.lease_id, None)
        self._settled[lease.lease_id] = Settled(lease.lease_id, num_output_tokens)
        self._has_news.set()

    def end(self, reason: str | None) -> None:
        """Whoever waits for a lease, or asks for one later, hears ServerDrainingError. None: no longer so."""
        self._end = reason
        for waiter in self._waiters.values():
            if reason is not None:
                _fail(waiter.answer, ServerDrainingError(reason))

    def replica_lost(self, replica_id: str) -> None:
        """Calls to it fail: the router forgets it at once."""
        self._lost[replica_id] = None
        self._has_news.set()

    def set_options(self, options: LedgerOptions, version: int) -> None:
        """Hands them to the router, again after each of its lives."""
        self._options = options, version
        self._has_news.set()

    def set_counts(self, count: Callable[[], Counts]) -> None:
        """What ``count`` returns goes to the router about once in RENEW_SECONDS, if it has changed, and at the end."""
        self._count = count

    def set_logs(self, options: LogOptions) -> None:
        """The same for how its process logs: a router outlives the configuration that it was made with."""
        self._logs = options

    def listen(self, answer: Callable[[Any], Any]) -> None:
        """From now on ``answer`` is asked what any ingress inquires of all."""
        self._is_listening = True
        self._spawn(self._listen_forever(answer))

    async def has_answered(self) -> None:
        """Returns when the router has answered once."""
        await self._answered.wait()

    async def look(self, method: str, *args: Any) -> Any:
        """One of `Router`'s methods that change nothing. Raises EngineUnavailableError."""
        try:
            return await self._call(CALL_SECONDS, method, *args)
        except RouterUnavailableError as error:
            raise EngineUnavailableError(f"the router does not answer: {error}") from error

    async def metrics(self) -> dict[str, Any]:
        """`Router.metrics`, with what this ingress has counted up to now. Raises EngineUnavailableError."""
        self._num_counts += 1
        return await self.look("metrics", self.holder_id, (self._num_counts, self._count()))

    @property
    def num_waiting(self) -> int:
        """Requests without a lease."""
        return len(self._waiters)

    # ---- waiting -------------------------------------------------------------------------------------------------

    async def _wait(self, waiter: _Waiter) -> Lease:
        """While the router answers there is no limit here but the request's own: its queue has one. Nobody looks again and
        again, since thousands may wait: timers and `_lease_alone` end a wait."""
        if waiter.deadline is None:
            return await waiter.answer
        ends_at = waiter.deadline + LATE_SECONDS
        timer = asyncio.get_running_loop().call_at(ends_at, _fail, waiter.answer, _late())
        try:
            return await waiter.answer
        finally:
            timer.cancel()

    async def _lease_alone(self) -> None:
        """While the router is away: leases of its own for those that have waited for away_seconds of that time."""
        loop = asyncio.get_running_loop()
        while self.is_away:
            await asyncio.sleep(self._away_seconds / 4)
            for waiter in list(self._waiters.values()):
                is_due = loop.time() - max(self._away_since, waiter.asked_at) >= self._away_seconds
                if not self.is_away or not is_due or waiter.answer.done():
                    continue
                try:
                    lease = self._make_lease(waiter.request)
                except EngineUnavailableError as error:
                    waiter.answer.set_exception(error)
                else:
                    waiter.answer.set_result(lease)

    def _make_lease(self, request: LeaseRequest) -> Lease:
        # Of those that can be reached now the ones that the router knew: others may run another model, or leave.
        known = () if self.state is None else self.state.replica_ids
        candidates = [r for r in self._replica_ids() if r in known and r not in request.not_on]
        if not candidates or self.state is None or not self.state.block_size:
            raise EngineUnavailableError(
                f"the router does not answer for {self._away_seconds:g} s, and no replica is known"
            )
        loads: Counter[str] = Counter()
        for replica_id, num_tokens in self._own.values():
            loads[replica_id] += num_tokens
        replica_id = min(self._random.sample(candidates, min(2, len(candidates))), key=lambda r: loads[r])
        block_size = self.state.block_size
        num_blocks = num_blocks_for(
            request.num_prompt_tokens, request.max_output_tokens, request.num_choices, block_size
        )
        self.counters["own_leases"] += 1
        lease_id = f"{self.holder_id}.{next(self._numbers)}"
        self._forget(request.request_id)
        self._own[lease_id] = replica_id, num_blocks * block_size
        return Lease(lease_id, replica_id, num_blocks * block_size, 0)

    def _drop(self, request_id: str, answer: asyncio.Future[Lease]) -> None:
        """The caller does not wait any more. What is on its way is given back when it arrives."""
        if answer.done() and not answer.cancelled() and answer.exception() is None:
            self.settle(answer.result(), None)
        self._forget(request_id)

    def _forget(self, request_id: str) -> None:
        self._waiters.pop(request_id, None)
        was_asked = self._new.pop(request_id, None) is None
        if self._queued.pop(request_id, None) is not None or was_asked:
            self._withdrawn[request_id] = None
            self._has_news.set()

    def _resolve(self, request_id: str, answer: Answer) -> None:
        self._queued.pop(request_id, None)
        waiter = self._waiters.get(request_id)
        if waiter is None or waiter.answer.done():
            if isinstance(answer, Lease):
                self.settle(answer, None)
        elif isinstance(answer, Lease):
            waiter.answer.set_result(answer)
        else:
            waiter.answer.set_exception(answer)

    # ---- the three loops -----------------------------------------------------------------------------------------

    async def _ask_forever(self) -> None:
        while True:
            await self._has_new.wait()
            self._has_new.clear()
            asked, self._new = self._new, {}
            if not asked:
                continue
            try:
                answers = await self._call(CALL_SECONDS, "ask", [self._as_of_now(r) for r in asked.values()])
            except RouterUnavailableError:
                # Asked again: a request that was heard keeps its place, or gets the same lease.
                again = {i: r for i, r in asked.items() if i in self._waiters}
                self._new = {**again, **self._new}
                await asyncio.sleep(PAUSE_SECONDS)
                self._has_new.set()
                continue
            for (request_id, request), answer in zip(asked.items(), answers, strict=True):
                if answer is not None:
                    self._resolve(request_id, answer)
                elif request_id in self._waiters:
                    self._queued[request_id] = request
                    self._has_queued.set()

    def _as_of_now(self, request: LeaseRequest) -> LeaseRequest:
        waiter = self._waiters.get(request.request_id)
        if waiter is None or waiter.deadline is None:
            return request
        remaining_ms = max(0.0, (waiter.deadline - asyncio.get_running_loop().time()) * 1000.0)
        return dataclasses.replace(request, remaining_ms=remaining_ms)

    async def _take_forever(self) -> None:
        while True:
            await self._has_queued.wait()
            if not self._queued:
                self._has_queued.clear()
                continue
            try:
                answers = await self._call(POLL_CALL_SECONDS, "take_grants", self.holder_id)
            except RouterUnavailableError:
                # A new router does not know who waits: all are asked for again.
                self._new = {**self._queued, **self._new}
                self._queued = {}
                await asyncio.sleep(PAUSE_SECONDS)
                self._has_new.set()
                continue
            for request_id, answer in answers:
                self._resolve(request_id, answer)

    async def _listen_forever(self, answer: Callable[[Any], Any]) -> None:
        while True:
            try:
                for number, question in await self._call(POLL_CALL_SECONDS, "listen", self.holder_id):
                    await self._call(CALL_SECONDS, "answer", number, self.holder_id, answer(question))
            except RouterUnavailableError:
                await asyncio.sleep(PAUSE_SECONDS)
            except Exception:
                logger.exception("a question of another ingress could not be answered")
                await asyncio.sleep(PAUSE_SECONDS)

    async def _tell_forever(self) -> None:
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(RENEW_SECONDS):
                    await self._has_news.wait()
            try:
                await self._tell()
            except RouterUnavailableError:
                await asyncio.sleep(PAUSE_SECONDS)

    async def _tell(self) -> None:
        self._has_news.clear()
        boxes: tuple[dict[str, Any], ...] = (self._settled, self._withdrawn, self._lost)
        told = tuple(dict(box) for box in boxes)
        epoch = None if self.state is None else self.state.epoch
        counts = self._new_counts()
        state: RouterState = await self._call(
            CALL_SECONDS, "tell", self.holder_id, list(told[0].values()), *(list(box) for box in told[1:]), counts
        )
        if counts is not None:
            self._told_counts = counts[1]
        for box, sent in zip(boxes, told, strict=True):
            for key in sent:
                box.pop(key, None)
        self.state = state
        if self._options is not None and self._told_options != (state.epoch, self._options[1]):
            options, version = self._options
            await self._call(CALL_SECONDS, "set_options", options, version)
            self._told_options = state.epoch, version
        if self._logs is not None and self._told_logs != state.epoch:
            await self._call(CALL_SECONDS, "set_logs", self._logs)
            self._told_logs = state.epoch
        if epoch is not None and state.epoch != epoch:
            self.counters["router_lives"] += 1
            logger.warning("the router has begun a new life, epoch %d", state.epoch)
            self._new = {**self._queued, **self._new}  # its queue is empty
            self._queued = {}
            self._has_new.set()
            self._told_counts, self._counted_at = {}, -math.inf
            self._has_news.set()
        self._answered.set()

    def _new_counts(self) -> tuple[int, Counts] | None:
        """With an ascending number. None: it is too early, or the router has them."""
        now = asyncio.get_running_loop().time()
        if now - self._counted_at < RENEW_SECONDS and not self._is_closed:
            return None
        counts = self._count()
        self._counted_at = now
        if counts == self._told_counts:
            return None
        self._num_counts += 1
        return self._num_counts, counts

    async def _call(self, seconds: float, method: str, *args: Any) -> Any:
        try:
            # Not wait_for: in Python 3.11 a cancel that comes just after the answer is lost in it.
            async with asyncio.timeout(seconds):
                result = await self._seam.call(method, *args)
        except TimeoutError as error:
            self._has_failed(method, f"no answer in {seconds:g} s")
            raise RouterUnavailableError(f"{method}: no answer in {seconds:g} s") from error
        except RouterUnavailableError as error:
            self._has_failed(method, str(error))
            raise
        self.is_away = False
        return result

    def _has_failed(self, method: str, reason: str) -> None:
        if not self.is_away:
            logger.warning("the router does not answer to %s: %s", method, reason)
            self._away_since = asyncio.get_running_loop().time()
        self.is_away = True
        if not self._is_closed and (self._alone is None or self._alone.done()):
            self._alone = self._spawn(self._lease_alone())
        self.counters["failed_calls"] += 1

    def _spawn(self, coroutine: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.get_running_loop().create_task(coroutine, context=contextvars.Context())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task


def _fail(answer: asyncio.Future[Lease], error: Exception) -> None:
    if not answer.done():
        answer.set_exception(error)


def _late() -> DeadlineExceededError:
    return DeadlineExceededError("no lease before this request's deadline")
