"""The answer of GET /v1/requests/{id}/explain, put together from what each part knows of a request.

    ingresses   which attempts there were, what was lost and kept, what its client got      asked through the router
    router      why it went to that replica, what it waited for                             asked of the router
    replicas    what it waited for inside, each step it took part in                        asked of those that had it

Nothing is sent while nobody asks. A part that is away, or has forgotten, is named as such. Knows plain data and who to ask;
knows no HTTP, no Ray.
"""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Iterable
from typing import Any

from serve_app.api.request_notes import RequestNotes
from serve_app.errors import EngineUnavailableError, RaggedServeError, RequestNotFoundError
from serve_app.replica.channel import Channels
from serve_app.routing.router_client import RouterClient

Json = dict[str, Any]


class Explainer:
    """Of one ingress. ``start`` makes it answer the others too."""

    def __init__(self, notes: RequestNotes, router: RouterClient, channels: Channels) -> None:
        self._notes = notes
        self._router = router
        self._channels = channels

    def start(self) -> None:
        self._router.listen(self._find)

    def _find(self, question: tuple[str, bytes]) -> list[Json]:
        request_id, owner = question
        return self._notes.find(request_id, owner)

    async def explain(self, request_id: str, owner: bytes) -> Json:
        """``request_id``: as its client saw it; ``owner``: who asks. Requests of that id, the latest one last.

        Raises RequestNotFoundError, EngineUnavailableError where an ingress that may know it does not answer.
        """
        silent = []
        try:
            answers, num_silent = await self._router.look("inquire", (request_id, owner))
        except EngineUnavailableError:
            answers, num_silent = [], 0
            silent.append("router")
        # Its own are known to it in any case.
        found = [one for answer in answers for one in answer if one["ingress"] != self._notes.ingress_id]
        found += self._notes.find(request_id, owner)
        if not found and (num_silent or silent):
            raise EngineUnavailableError(f"no answer from the router, or from an ingress that may know {request_id!r}")
        if not found:
            raise RequestNotFoundError(request_id)
        if num_silent:
            silent.append(f"{num_silent} of the ingresses")
        streams = [stream for one in found for stream in one["streams"]]
        decisions, histories = await asyncio.gather(self._decisions(streams), self._histories(streams))
        for one in found:
            for stream in one["streams"]:
                for number, attempt in enumerate(stream["attempts"]):
                    attempt["router"] = decisions.get(attempt["name"])
                    attempt["engine"] = _history_of(histories, stream["id"], attempt, number)
                stream["failovers"] = list(_failovers(stream["attempts"]))
            one["queue_ms"] = _queue_ms(one["streams"])
        silent += [f"replica {replica_id}" for replica_id, said in histories.items() if isinstance(said, str)]
        return {
            "object": "request.explanation",
            "id": request_id,
            "silent": silent,
            "requests": sorted(found, key=lambda one: float(one["received_at"])),
        }

    async def _decisions(self, streams: Iterable[Json]) -> Json:
        names = [attempt["name"] for stream in streams for attempt in stream["attempts"]]
        try:
            decisions: Json = await self._router.look("decisions", names)
        except EngineUnavailableError:
            return {}
        return decisions

    async def _histories(self, streams: Iterable[Json]) -> dict[str, Any]:
        """Replica -> its streams, or in words why it does not tell."""
        by_replica: dict[str, list[str]] = {}
        for stream in streams:
            for attempt in stream["attempts"]:
                if attempt["replica"] is not None:
                    by_replica.setdefault(attempt["replica"], []).append(stream["id"])

        async def ask(replica_id: str, stream_ids: list[str]) -> Any:
            answers = await self._channels.call_each([replica_id], "explain", list(dict.fromkeys(stream_ids)))
            answer = answers[replica_id]
            if isinstance(answer, RaggedServeError):
                return str(answer)
            if isinstance(answer, Exception):
                raise answer
            return answer

        told = await asyncio.gather(*(ask(*one) for one in by_replica.items()))
        return dict(zip(by_replica, told, strict=True))


def _history_of(histories: Json, stream_id: str, attempt: Json, number: int) -> Json | None:
    """What the replica of one attempt says of it; None: nothing ran, or the replica is away or has forgotten it."""
    said = histories.get(attempt["replica"])
    if not isinstance(said, dict):
        return None
    found: Json | None = next((one for one in said.get(stream_id, ()) if one["attempt"] == attempt["number"]), None)
    return found


def _failovers(attempts: list[Json]) -> Iterable[Json]:
    """Each loss of a replica, and where the request went on."""
    for i, attempt in enumerate(attempts):
        if attempt["failure"] is None or attempt["replica"] is None:
            continue
        later = next((other for other in attempts[i + 1 :] if other["replica"] is not None), None)
        yield {
            "at": attempt["ended_at"],
            "from": attempt["replica"],
            "to": None if later is None else later["replica"],
            "why": attempt["failure"],
            "tokens_kept": attempt["tokens"],
            "first_token_after_ms": None
            if later is None or later["first_token_at"] is None
            else round(later["first_token_at"] - attempt["ended_at"], 1),
        }


def _queue_ms(streams: list[Json]) -> dict[str, float]:
    """Cause -> milliseconds, of all its prompts and attempts together."""
    total: dict[str, float] = defaultdict(float)
    for stream in streams:
        for attempt in stream["attempts"]:
            for cause, ms in (attempt["router"] or {"waited_for_ms": {}})["waited_for_ms"].items():
                total[f"router_{cause}"] += ms
            engine = attempt["engine"]
            if engine is None:
                continue
            if engine["has_grammar"] and engine["accepted_at"] is not None:
                total["compiling"] += engine["accepted_at"] - engine["submitted_at"]
            for choice in engine["choices"]:
                total["engine"] += choice["waited_ms"] or 0.0
                total["preempted"] += sum(one["waited_ms"] or 0.0 for one in choice["preemptions"])
    return {cause: round(ms, 1) for cause, ms in total.items()}
