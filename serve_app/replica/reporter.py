"""Reporter: tells the router what a replica holds, again and again, and passes on what the router answers. Knows no Ray."""

from __future__ import annotations

import asyncio

from serve_app.engine.async_engine import AsyncEngine
from serve_app.logs import get_logger
from serve_app.replica.lease_table import LeaseTable
from serve_app.replica.output_hub import ChannelHub
from serve_app.routing.ledger import ReplicaReport
from serve_app.routing.router_client import RouterSeam, RouterUnavailableError

logger = get_logger(__name__)

REPORT_SECONDS = 0.25
"""Between two reports."""
REPORT_CALL_SECONDS = 2.0
"""A report that is unanswered for so long is given up; the next one says all of it."""


class Reporter:
    """The reports of one replica. ``fingerprint``: of its numerics."""

    def __init__(
        self,
        router: RouterSeam,
        replica_id: str,
        engine: AsyncEngine,
        table: LeaseTable,
        hub: ChannelHub,
        fingerprint: str,
        report_seconds: float = REPORT_SECONDS,
    ) -> None:
        self.num_queued_tokens = 0
        """Tokens that waited in the router at the last report, for autoscaling."""
        self._router = router
        self._replica_id = replica_id
        self._engine = engine
        self._table = table
        self._hub = hub
        self._fingerprint = fingerprint
        self._report_seconds = report_seconds
        self._num_reports = 0

    async def run(self) -> None:
        """Reports until it is cancelled."""
        while True:
            try:
                answer, self.num_queued_tokens = await asyncio.wait_for(
                    self._router.call("report", self._report()), REPORT_CALL_SECONDS
                )
                if answer.is_draining and not self._hub.is_draining:
                    logger.info("replica %s drains", self._replica_id)
                    self._hub.start_draining()
            except (RouterUnavailableError, TimeoutError) as error:
                logger.info("the router did not take a report: %s %s", type(error).__name__, error)
            await asyncio.sleep(self._report_seconds)

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
            leases=self._table.rows(),
            num_ended_leases=self._table.num_ended,
            num_running=len(scheduler.running),
            num_waiting=len(scheduler.waiting),
        )
