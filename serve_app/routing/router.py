"""The router: the ledger of an application with a clock and mailboxes. Knows calls and time, no Ray; ledger.py decides.

    ingress   ask(requests) -> leases or errors of those that need not wait      one call in flight, carrying all that wait
              take_grants() -> answers to those that waited                      a long poll, only while something waits
              tell(settled, withdrawn, ...) -> RouterState                       one call in flight; at least every second
    replica   report(its table, whether it drains) -> what waits                 a few times a second
    launcher  close(seconds)                                                     when the server ends
    explain   listen, inquire, answer, ... (inquiries.py), decisions             where api.explain is set

A plain class on one event loop, which ray_router.py makes an actor of. A new one grants nothing until replicas had time to
report.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import Callable
from typing import Any, NamedTuple

from serve_app.engine.totals import Counts
from serve_app.errors import RaggedServeError
from serve_app.logs import LogOptions, about_stream, get_logger
from serve_app.routing.decisions import Decisions
from serve_app.routing.inquiries import Answers, Inquiries
from serve_app.routing.leases import Lease, LeaseRequest, ReplicaReport
from serve_app.routing.ledger import Ledger
from serve_app.routing.ledger_options import LedgerOptions
from serve_app.routing.metrics_board import MetricsBoard

logger = get_logger(__name__)

GRACE_SECONDS = 1.5
"""A new router waits so long for reports before it grants: replicas report four times a second."""
POLL_SECONDS = 20.0
"""Longest time that one `take_grants` waits."""

Answer = Lease | RaggedServeError


class RouterState(NamedTuple):
    """What an ingress should know of the replicas."""

    epoch: int
    is_rebuilding: bool
    replica_ids: tuple[str, ...]
    """Those that report and do not drain."""
    block_size: int
    """0: no replica has reported."""
    num_blocks: int
    """Of the largest pool."""
    max_model_len: int
    """The smallest of all replicas, so that any of them can hold what was accepted."""
    fingerprints: tuple[str, ...]
    """Distinct numerics fingerprints, sorted."""
    seconds_left: float | None
    """Until the server ends; None: it does not."""


class Settled(NamedTuple):
    lease_id: str
    num_output_tokens: int | None
    """Of all choices; None: the answer was cut off."""


class Router:
    """The ledger with a clock and with mailboxes. Every method on one event loop."""

    def __init__(self, epoch: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self.ledger = Ledger(LedgerOptions(), epoch, rebuilding=True, grace_seconds=GRACE_SECONDS)
        self.called_at = clock()
        self.board = MetricsBoard(self.called_at)
        self._holder_of: dict[str, str] = {}
        """Request that waits -> who asked."""
        self._mailboxes: dict[str, list[tuple[str, Answer]]] = {}
        self._arrived = asyncio.Event()
        """Something came into some mailbox."""
        self._timer: asyncio.TimerHandle | None = None
        self._inquiries = Inquiries(clock, lambda: self.ledger.options.lease_seconds)
        self._decisions: Decisions | None = None
        """Kept while somebody listens: only then will anybody ask."""

    # ---- ingress -------------------------------------------------------------------------------------------------

    async def ask(self, requests: list[LeaseRequest]) -> list[Answer | None]:
        """For each request its lease, its error, or None: it waits, and `take_grants` will answer."""
        now = self._called()
        answers: list[Answer | None] = []
        for request in requests:
            if self._decisions is not None:
                self._decisions.asked(request.request_id, now)
            try:
                lease = self.ledger.request(request, now)
            except RaggedServeError as error:
                answers.append(error)
                self._note(request.request_id, error)
                continue
            answers.append(lease)
            if lease is None:
                self._holder_of[request.request_id] = request.holder_id
            self._note(request.request_id, lease)
        self._deliver()
        return answers

    async def take_grants(self, holder_id: str) -> list[tuple[str, Answer]]:
        """Answers for requests of this holder that waited. Waits until there is one, at most POLL_SECONDS."""
        deadline = self._called() + POLL_SECONDS
        while not self._mailboxes.get(holder_id):
            self._arrived.clear()
            try:
                async with asyncio.timeout(deadline - self._clock()):
                    await self._arrived.wait()
            except TimeoutError:
                break
        return self._mailboxes.pop(holder_id, [])

    async def tell(
        self,
        holder_id: str,
        settled: list[Settled],
        withdrawn: list[str],
        lost_replicas: list[str],
        counts: tuple[int, Counts] | None = None,
    ) -> RouterState:
        """What happened at an ingress; also its sign of life. Safe to say twice.

        ``lost_replicas``: calls to them fail. ``counts``: see MetricsBoard.tell.
        """
        now = self._called()
        self.board.tell(holder_id, counts, now)
        self._inquiries.is_alive(holder_id)
        self.ledger.renew(holder_id, now)
        for lease_id, num_output_tokens in settled:
            self.ledger.settle(lease_id, num_output_tokens, now)
        for request_id in withdrawn:
            self._holder_of.pop(request_id, None)
            self.ledger.withdraw(request_id)
            if self._decisions is not None:
                self._decisions.ended(request_id, "withdrawn", now)
        for replica_id in lost_replicas:
            self.ledger.forget_replica(replica_id, now)
        self._deliver()
        if self._decisions is not None and not self._inquiries.has_listeners():
            self._decisions = self.ledger.watch = None
        return self._state()

    async def set_options(self, options: LedgerOptions, version: int) -> bool:
        """Takes them unless a newer version is in force."""
        self._called()
        taken = self.ledger.set_options(options, version)
        self._deliver()
        return taken

    async def set_logs(self, options: LogOptions) -> None:
        """How this process is to log. An actor does so; a router inside another process leaves that process's logs alone."""

    # ---- explaining ----------------------------------------------------------------------------------------------

    async def listen(self, holder_id: str) -> list[tuple[int, Any]]:
        """See Inquiries. While anybody listens decisions are kept."""
        self._called()
        if self._decisions is None:
            self._decisions = self.ledger.watch = Decisions(lambda: time.time() * 1000.0)
        return await self._inquiries.listen(holder_id)

    async def stop_listening(self, holder_id: str) -> None:
        self._called()
        self._inquiries.stop_listening(holder_id)

    async def inquire(self, question: Any) -> Answers:
        """What all ingresses that listen answer."""
        self._called()
        return await self._inquiries.inquire(question)

    async def answer(self, number: int, holder_id: str, answer: Any) -> None:
        self._called()
        self._inquiries.answer(number, holder_id, answer)

    async def decisions(self, request_ids: list[str]) -> dict[str, dict[str, Any]]:
        """See Decisions.tell."""
        return {} if self._decisions is None else self._decisions.tell(request_ids, self._called())

    # ---- replica -------------------------------------------------------------------------------------------------

    async def report(self, report: ReplicaReport, counts: Counts | None = None) -> int:
        """The replica's table; see Ledger.report. ``counts``: see MetricsBoard.report. Returns the budget that the queue
        waits for, for autoscaling."""
        now = self._called()
        self.ledger.report(report, now)
        if counts is not None:
            self.board.report(report.replica_id, report.report_number, counts, now)
        self._deliver()
        return self.ledger.num_queued_budget

    # ---- the launcher --------------------------------------------------------------------------------------------

    async def close(self, seconds: float) -> None:
        """The server ends in ``seconds``; see Ledger.close. The ingresses hear of it with their next `tell`."""
        self.ledger.close(seconds, self._called())

    # ---- looking at it -------------------------------------------------------------------------------------------

    async def snapshot(self) -> dict[str, Any]:
        """Ledger.snapshot, with the process that it lives in."""
        return {**self.ledger.snapshot(), "pid": os.getpid()}

    async def metrics(self, holder_id: str, counts: tuple[int, Counts]) -> dict[str, Any]:
        """The same, and what all have counted, for serve_app.metrics. ``counts``: of the ingress that asks."""
        now = self._called()
        self.board.tell(holder_id, counts, now)
        return {**await self.snapshot(), **self.board.snapshot(now)}

    async def books(self) -> dict[str, Any]:
        """Each replica's live leases as the ledger has them: for tests and inspection."""
        return {replica_id: self.ledger.rows(replica_id) for replica_id in self.ledger.snapshot()["replicas"]}

    async def check_invariants(self) -> None:
        """Raises AssertionError if the books do not add up. For soaks."""
        self.ledger.check_invariants()

    # ---- parts ---------------------------------------------------------------------------------------------------

    def _called(self) -> float:
        self.called_at = self._clock()
        return self.called_at

    def _deliver(self) -> None:
        """Puts what the queue gives now into the mailboxes, and comes back when the ledger's next event is due."""
        now = self._clock()
        for request_id, answer in self.ledger.grants(now):
            self._note(request_id, answer)
            holder_id = self._holder_of.pop(request_id, None)
            if holder_id is not None:
                self._mailboxes.setdefault(holder_id, []).append((request_id, answer))
                self._arrived.set()
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        due = self.ledger.next_event_at(now)
        if due is not None:
            self._timer = asyncio.get_running_loop().call_later(max(0.01, due - now), self._deliver)

    def _note(self, request_id: str, answer: Answer | None) -> None:
        """Says what became of a request: a line at DEBUG, and the error for who keeps decisions."""
        if isinstance(answer, RaggedServeError) and self._decisions is not None:
            self._decisions.ended(request_id, answer.code, self._clock())
        if not logger.isEnabledFor(logging.DEBUG):
            return
        if answer is None:
            logger.debug("queued", extra=about_stream(request_id, num_queued=self.ledger.num_queued_requests))
        elif isinstance(answer, Lease):
            fields = {"replica": answer.replica_id, "lease": answer.lease_id, "tokens": answer.num_tokens}
            logger.debug("granted", extra=about_stream(request_id, **fields))
        else:
            logger.debug("refused: %s", answer, extra=about_stream(request_id, code=answer.code))

    def _state(self) -> RouterState:
        snapshot = self.ledger.snapshot()
        open_ones = {
            replica_id: replica
            for replica_id, replica in snapshot["replicas"].items()
            if not replica["is_draining"] and not replica["is_silent"]
        }
        return RouterState(
            self.ledger.epoch,
            self.ledger.is_rebuilding,
            tuple(open_ones),
            min((r["block_size"] for r in open_ones.values()), default=0),
            max((r["num_blocks"] for r in open_ones.values()), default=0),
            min((r["max_model_len"] for r in open_ones.values()), default=0),
            tuple(sorted({r["fingerprint"] for r in open_ones.values()})),
            self.ledger.seconds_left(self._clock()),
        )
