"""TargetedRouter: sends a handle call to the replica named by its session id. Maps an id to a replica, decides nothing.

Who runs a request was decided by the ledger, before the call. Knows Ray Serve's replica set; knows no lease.

Three things differ from Serve's own routers (read in Ray 2.60, serve/_private/request_router/request_router.py and
router.py). The choice is made in `_choose_replica_for_request`, a private method that Ray's own
serve/experimental/capacity_queue_router.py overrides too: an exception in the public `choose_replicas` is logged there,
and the call waits for ever. A replica that left the set is called on: Serve takes a draining replica out at once, though
it still runs our sequences and must hear aborts and acknowledgements. And nothing is retried on another replica.

Serve pickles this module by value, so it holds no state, and nobody may compare its classes across processes.
"""

from __future__ import annotations

import asyncio
from typing import Any

from ray.serve.exceptions import ReplicaUnavailableError
from ray.serve.request_router import PendingRequest, ReplicaID, RequestRouter, RunningReplica

from serve_app.errors import ReplicaUnreachableError

MAX_DEPARTED = 256
"""Replicas remembered after they left the set, and as many that are known to be dead. Oldest are forgotten first."""


class TargetedRouter(RequestRouter):
    """Give it as ``request_router_class``; call with ``handle.options(session_id=replica_id)``."""

    def initialize_state(self, seconds_for_unknown: float = 1.0, **kwargs: Any) -> None:
        """``seconds_for_unknown``: how long a call waits for a replica that has not been in the set yet.

        A replica reports to the ledger as soon as it runs; Serve tells the handles of it a moment later.
        """
        if kwargs:
            raise TypeError(f"TargetedRouter knows no {', '.join(sorted(kwargs))}; it has seconds_for_unknown")
        self._seconds_for_unknown = seconds_for_unknown
        self._by_id: dict[str, RunningReplica] = {}
        self._departed: dict[str, RunningReplica] = {}
        """Left the set, perhaps to drain; oldest first."""
        self._dead: dict[str, None] = {}
        """Found dead by a call; oldest first."""
        self._changed: asyncio.Future[None] | None = None
        """Done when the set has changed."""

    def update_replicas(self, replicas: list[RunningReplica]) -> None:
        before, self._by_id = self._by_id, {replica.replica_id.unique_id: replica for replica in replicas}
        for replica_id, replica in before.items():
            if replica_id not in self._by_id:
                _remember(self._departed, replica_id, replica)
        for replica_id in self._by_id:
            self._departed.pop(replica_id, None)
            self._dead.pop(replica_id, None)
        super().update_replicas(replicas)
        self._tell_waiting()
        from serve_app.routing import replica_set  # here: this module is a copy, that one is the process's own

        replica_set.replace(tuple(self._by_id))

    def on_replica_actor_died(self, replica_id: ReplicaID) -> None:
        self._by_id.pop(replica_id.unique_id, None)
        self._departed.pop(replica_id.unique_id, None)
        _remember(self._dead, replica_id.unique_id, None)
        super().on_replica_actor_died(replica_id)
        self._tell_waiting()

    async def _choose_replica_for_request(
        self, pending_request: PendingRequest, *, is_retry: bool = False
    ) -> RunningReplica:
        """Raises ReplicaUnavailableError if it is not there; ReplicaUnreachableError if it did not take the call.

        Serve hands an exception on to the caller as it is, but for ActorDiedError and ActorUnavailableError, which it
        takes for the replica's and retries without a pause: they must not come from here.
        """
        wanted = pending_request.metadata.session_id
        replica = self._find(wanted)
        if replica is None and not is_retry and wanted and wanted not in self._dead:
            replica = await self._wait_for(wanted)
        if replica is None:
            raise ReplicaUnavailableError(wanted)
        if is_retry:
            # It is full, or the connection broke before it had the call. It has not run.
            raise ReplicaUnreachableError(f"replica {wanted} did not take the call")
        return replica

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """Abstract in the base class. Reached by nothing that we call."""
        return [candidate_replicas]

    def _find(self, replica_id: str) -> RunningReplica | None:
        return self._by_id.get(replica_id) or self._departed.get(replica_id)

    async def _wait_for(self, replica_id: str) -> RunningReplica | None:
        loop = asyncio.get_running_loop()
        give_up_at = loop.time() + self._seconds_for_unknown
        while (seconds := give_up_at - loop.time()) > 0.0:
            if self._changed is None:
                self._changed = loop.create_future()
            await asyncio.wait({self._changed}, timeout=seconds)
            if (replica := self._find(replica_id)) is not None:
                return replica
            if replica_id in self._dead:
                return None
        return None

    def _tell_waiting(self) -> None:
        changed, self._changed = self._changed, None
        if changed is not None and not changed.done():
            changed.set_result(None)


def _remember(known: dict[str, Any], replica_id: str, value: Any) -> None:
    known.pop(replica_id, None)
    known[replica_id] = value
    if len(known) > MAX_DEPARTED:
        del known[next(iter(known))]
