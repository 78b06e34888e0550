"""Placement: the blocks to book for a request, and the replica that gets it. Pure choices; changes no book."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from serve_app.routing.admission import Admission
from serve_app.routing.lease_book import ReplicaBook
from serve_app.routing.leases import LeaseRequest, ReplicaReport, num_blocks_for
from serve_app.routing.watch import ReplicaView

NEAR_TIE = 0.05
"""Share of a pool. Replicas whose free budgets differ by less are equal; then the longest cached prefix wins."""


def whole_need(request: LeaseRequest, report: ReplicaReport) -> int | None:
    """Blocks for all that the request may have. None: this replica can never hold it."""
    room = report.max_model_len - request.num_prompt_tokens
    if room < min(1, request.max_output_tokens):
        return None
    num_output = min(request.max_output_tokens, room)
    need = num_blocks_for(request.num_prompt_tokens, num_output, request.num_choices, report.block_size)
    return need if need <= report.num_blocks else None


def freest_for(request: LeaseRequest, candidates: Mapping[str, ReplicaBook]) -> str | None:
    """The replica with the most free budget of those that can ever hold it."""
    able = [
        (replica.num_free_blocks * replica.report.block_size, replica_id)
        for replica_id, replica in candidates.items()
        if replica_id not in request.not_on and whole_need(request, replica.report) is not None
    ]
    return max(able)[1] if able else None


class Placement:
    """``admission``: whose allowance is booked."""

    def __init__(self, admission: Admission) -> None:
        self._admission = admission

    def booking(self, request: LeaseRequest, report: ReplicaReport) -> int | None:
        """Blocks. None: this replica can never hold the request."""
        whole = whole_need(request, report)
        if whole is None or self._admission.options.policy == "reserve":
            return whole
        room = report.max_model_len - request.num_prompt_tokens
        num_output = self._admission.allowance(min(request.max_output_tokens, room))
        return num_blocks_for(request.num_prompt_tokens, num_output, request.num_choices, report.block_size)

    def choose(self, request: LeaseRequest, candidates: Mapping[str, ReplicaBook]) -> tuple[str, int] | None:
        """The replica, and the blocks to book. Most free budget after the booking; the longest prefix among near ties."""
        fitting: list[tuple[int, int, str, int]] = []
        for replica_id, replica in candidates.items():
            if replica_id in request.not_on:
                continue
            need = self.booking(request, replica.report)
            if need is not None and need <= replica.num_free_blocks and replica.has_place(request.num_choices):
                free = (replica.num_free_blocks - need) * replica.report.block_size
                fitting.append((free, -replica.last_grant, replica_id, need))
        if request.fingerprint is not None:
            fitting = [
                fit for fit in fitting if candidates[fit[2]].report.fingerprint == request.fingerprint
            ] or fitting
        if not fitting:
            return None
        best = max(fitting)
        if len(fitting) > 1 and request.prefix_hashes:
            near = best[0] - NEAR_TIE * candidates[best[2]].report.num_tokens
            best = max(
                (candidates[fit[2]].num_cached_tokens(request.prefix_hashes), fit) for fit in fitting if fit[0] >= near
            )[1]
        return best[2], best[3]

    def views(
        self,
        request: LeaseRequest,
        replicas: Mapping[str, ReplicaBook],
        open_ones: Collection[str],
        candidates: Collection[str],
    ) -> dict[str, ReplicaView]:
        """What `choose` sees, for the watch. ``open_ones`` may get grants; ``candidates`` are those not held for another."""
        views = {}
        for replica_id, replica in replicas.items():
            report = replica.report
            need = self.booking(request, report)
            left_out = None
            if report.is_draining:
                left_out = "draining"
            elif replica_id not in open_ones:
                left_out = "silent"
            elif replica_id in request.not_on:
                left_out = "excluded"
            elif need is None:
                left_out = "too_small"
            elif need > replica.num_free_blocks:
                left_out = "budget"
            elif not replica.has_place(request.num_choices):
                left_out = "places"
            elif replica_id not in candidates:
                left_out = "held"
            views[replica_id] = ReplicaView(
                replica.num_free_blocks * report.block_size,
                None if need is None else need * report.block_size,
                replica.num_free_places,
                replica.num_cached_tokens(request.prefix_hashes),
                report.fingerprint,
                left_out,
            )
        wanted = request.fingerprint
        if wanted is not None and any(v.left_out is None and v.fingerprint == wanted for v in views.values()):
            for replica_id, view in views.items():
                if view.left_out is None and view.fingerprint != wanted:
                    views[replica_id] = view._replace(left_out="other_numerics")
        return views
