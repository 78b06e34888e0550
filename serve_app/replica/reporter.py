"""Reporter: tells the router what a replica holds, again and again, and drains it when it leaves. Knows no Ray."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable

from serve_app.engine.async_engine import AsyncEngine
from serve_app.engine.totals import Counts
from serve_app.logs import get_logger
from serve_app.metrics import OWN_BOOKS
from serve_app.replica.lease_table import LeaseTable
from serve_app.replica.output_hub import ChannelHub
from serve_app.routing.leases import ReplicaReport
from serve_app.routing.router_client import RouterSeam, RouterUnavailableError

logger = get_logger(__name__)

REPORT_SECONDS = 0.25
"""Between two reports."""
REPORT_CALL_SECONDS = 2.0
"""A report that is unanswered for so long is given up; the next one says all of it."""


class Reporter:
    """The reports of one replica. ``fingerprint``: of its numerics. ``is_leaving``: whether it was told to leave; asked
    every ``look_seconds``. Its requests then have ``drain_seconds`` to end."""

    def __init__(
        self,
        router: RouterSeam,
        replica_id: str,
        engine: AsyncEngine,
        table: LeaseTable,
        hub: ChannelHub,
        fingerprint: str,
        report_seconds: float = REPORT_SECONDS,
        *,
        is_leaving: Callable[[], bool] = bool,
        drain_seconds: float = 0.0,
        look_seconds: float = 0.1,
    ) -> None:
        self.num_queued_tokens = 0
        """Tokens of budget that the router's queue waited for at the last report, for autoscaling."""
        self._router = router
        self._replica_id = replica_id
        self._engine = engine
        self._table = table
        self._hub = hub
        self._fingerprint = fingerprint
        self._report_seconds = report_seconds
        self._is_leaving = is_leaving
        self._drain_seconds = drain_seconds
        self._look_seconds = look_seconds
        self._due = asyncio.Event()
        """A report is due before its time."""
        self._num_reports = 0

    async def run(self) -> None:
        """Reports, and drains when it is time, until it is cancelled."""
        await asyncio.gather(self._report_forever(), self._drain())

    async def _report_forever(self) -> None:
        while True:
            self._due.clear()
            try:
                async with asyncio.timeout(REPORT_CALL_SECONDS):
                    self.num_queued_tokens = await self._router.call("report", self._report(), self._counts())
            except (RouterUnavailableError, TimeoutError) as error:
                logger.info("the router did not take a report: %s %s", type(error).__name__, error)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._report_seconds):
                    await self._due.wait()

    async def _drain(self) -> None:
        """From the word to leave to the end of the time that it leaves."""
        while not self._is_leaving():
            await asyncio.sleep(self._look_seconds)
        logger.info("replica %s drains: %d requests in %g s", self._replica_id, self._hub.num_live, self._drain_seconds)
        self._hub.start_draining()
        self._due.set()  # no more grants: the router is told now
        await asyncio.sleep(self._drain_seconds)
        num_left = self._hub.end_drain()
        if num_left:
            logger.warning(
                "replica %s: %d requests still run after %g s and go on elsewhere",
                self._replica_id,
                num_left,
                self._drain_seconds,
            )

    def _report(self) -> ReplicaReport:
        self._num_reports += 1
        block_size = self._engine.engine.config.block_size
        self._hub.grow_leases(block_size)
        scheduler = self._engine.engine.scheduler
        return ReplicaReport(
            replica_id=self._replica_id,
            report_number=self._num_reports,
            block_size=block_size,
            num_blocks=self._table.num_blocks,
            max_model_len=scheduler.max_model_len,
            fingerprint=self._fingerprint,
            max_num_seqs=self._engine.engine.config.max_num_seqs,
            leases=self._table.rows(),
            num_ended_leases=self._table.num_ended,
            num_running=len(scheduler.running),
            num_waiting=len(scheduler.waiting),
            is_draining=self._hub.is_draining,
        )

    def _counts(self) -> Counts:
        return {**self._engine.engine.counts(), OWN_BOOKS: {(): self._table.num_booked_blocks}}
