"""What an ingress notes of each client request: for one line at its end and, where requests are explained, for a while
after that. Knows times, ids and counts; never what a prompt or an answer says. Knows no HTTP, no Ray.

    received -> [attempt: a lease is asked for -> granted -> first token -> ended, or lost and the next attempt] -> ended
"""

from __future__ import annotations

import asyncio
import copy
import json
import logging
import time
from collections import deque
from collections.abc import Iterable, Sequence
from typing import Any, Protocol

from serve_app.api.error_response import ErrorResponse, error_response
from serve_app.errors import ReplicaLostError
from serve_app.logs import about, get_logger
from serve_app.routing.leases import Lease

logger = get_logger(__name__)

MAX_ENDED = 1024
"""Requests that are remembered behind their end."""
MAX_STREAMS = 128
"""Prompts that are told of one request."""
MAX_ATTEMPTS = 40
"""Of one stream: more than the default of failover.max_losses."""


class AttemptNote:
    """One ask for a lease, and what ran under it. Times: seconds of the event loop."""

    __slots__ = (
        "asked_at",
        "ended_at",
        "failure",
        "first_at",
        "granted_at",
        "lease",
        "name",
        "num_asks",
        "num_tokens",
        "num_tokens_before",
        "number",
    )

    def __init__(self, name: str, number: int, num_tokens: int) -> None:
        self.name = name
        """Under which the router knows it."""
        self.number = number
        """Under which the replica knows it."""
        self.num_asks = 1
        """Above 1: earlier ones were in vain."""
        self.asked_at = asyncio.get_running_loop().time()
        self.lease: Lease | None = None
        self.granted_at: float | None = None
        self.first_at: float | None = None
        """Of its first output."""
        self.ended_at: float | None = None
        self.failure: Exception | None = None
        """Why it did not end by itself."""
        self.num_tokens_before = num_tokens
        """Of all choices, when it began."""
        self.num_tokens = num_tokens

    def grant(self, lease: Lease) -> None:
        self.lease, self.granted_at = lease, asyncio.get_running_loop().time()

    def end(self, num_tokens: int) -> None:
        self.ended_at, self.num_tokens = asyncio.get_running_loop().time(), num_tokens


def begin_attempt(attempts: list[AttemptNote], name: str, number: int, num_tokens: int) -> AttemptNote:
    """The note of the next attempt. One that got no lease goes on."""
    if attempts and attempts[-1].lease is None:
        last = attempts[-1]
        last.num_asks += 1
        last.ended_at = last.failure = None
        return last
    if len(attempts) == MAX_ATTEMPTS:
        del attempts[1]
    attempts.append(AttemptNote(name, number, num_tokens))
    return attempts[-1]


class Stream(Protocol):
    """What is used of GenerationStream."""

    request_id: str
    attempts: list[AttemptNote]


class Answer(Protocol):
    """What is used of an answer in the making."""

    @property
    def id(self) -> str: ...

    @property
    def finish_reasons(self) -> list[str | None]: ...

    def usage(self) -> dict[str, Any]: ...


class Generation(Protocol):
    """What is used of service.py's."""

    @property
    def answer(self) -> Answer: ...

    @property
    def streams(self) -> Sequence[Stream]: ...

    @property
    def error(self) -> BaseException | None: ...

    @property
    def has_ended(self) -> bool: ...


class RequestNote:
    """One client request, from its arrival to its end."""

    def __init__(self, request_id: str, route: str, owner: bytes) -> None:
        self.request_id = request_id
        self.answer_id: str | None = None
        """The id that stands in the answer."""
        self.route = route
        self.owner = owner
        self.model: str | None = None
        self.streams: list[Any] = []
        """Of its prompts: `Stream`."""
        self.generation: Generation | None = None
        self.error: ErrorResponse | None = None
        """What its client heard."""
        self.status: int | None = None
        """None: no answer has begun."""
        self.received_at = asyncio.get_running_loop().time()
        self.received_ms = time.time() * 1000.0
        self.ended_at: float | None = None

    @property
    def code(self) -> str | None:
        """The error's; client_gone where nobody heard the end."""
        if self.error is not None:
            return str(json.loads(self.error.body)["error"]["code"])
        is_cut = self.generation is not None and not self.generation.has_ended and self.ended_at is not None
        return "client_gone" if is_cut or self.status == 499 else None

    @property
    def answer(self) -> Answer | None:
        return None if self.generation is None else self.generation.answer

    @property
    def duration_ms(self) -> float:
        end = asyncio.get_running_loop().time() if self.ended_at is None else self.ended_at
        return round((end - self.received_at) * 1000.0, 1)

    @property
    def first_token_ms(self) -> float | None:
        firsts = [a.first_at for stream in self.streams for a in stream.attempts if a.first_at is not None]
        return round((min(firsts) - self.received_at) * 1000.0, 1) if firsts else None

    @property
    def replicas(self) -> list[str]:
        """Those that had it, in that order."""
        leases = (attempt.lease for stream in self.streams for attempt in stream.attempts)
        return list(dict.fromkeys(lease.replica_id for lease in leases if lease is not None))

    @property
    def num_failovers(self) -> int:
        """Replicas lost under it."""
        return sum(isinstance(a.failure, ReplicaLostError) for stream in self.streams for a in stream.attempts)

    def line(self) -> dict[str, Any]:
        """The fields of the line at its end."""
        usage = {} if self.answer is None else self.answer.usage()
        return {
            "route": self.route,
            "model": self.model,
            "status": self.status,
            "error": self.code,
            "finish_reasons": None if self.answer is None else self.answer.finish_reasons,
            "prompt_tokens": usage.get("prompt_tokens"),
            "completion_tokens": usage.get("completion_tokens"),
            "first_token_ms": self.first_token_ms,
            "duration_ms": self.duration_ms,
            "replicas": self.replicas or None,
            "failovers": self.num_failovers,
        }

    def describe(self, ingress_id: str) -> dict[str, Any]:
        """All of it, as plain data. Times named ``_at``: milliseconds since 1970."""
        return {
            "id": self.request_id,
            "answer_id": self.answer_id,
            "ingress": ingress_id,
            "route": self.route,
            "model": self.model,
            "state": "running" if self.ended_at is None else "ended",
            "status": self.status,
            "error": None if self.code is None else {"code": self.code, "message": self._message()},
            "finish_reasons": [] if self.answer is None else self.answer.finish_reasons,
            "usage": None if self.answer is None else self.answer.usage(),
            "received_at": round(self.received_ms, 1),
            "duration_ms": self.duration_ms,
            "first_token_ms": self.first_token_ms,
            "num_failovers": self.num_failovers,
            "streams": [
                {"id": stream.request_id, "attempts": [self._describe_attempt(a) for a in stream.attempts]}
                for stream in self.streams[:MAX_STREAMS]
            ],
        }

    def _message(self) -> str:
        if self.error is None:
            return "the client went away before the end"
        return str(json.loads(self.error.body)["error"]["message"])

    def _describe_attempt(self, attempt: AttemptNote) -> dict[str, Any]:
        lease, failure = attempt.lease, attempt.failure
        return {
            "name": attempt.name,
            "number": attempt.number,
            "asked_at": self._at(attempt.asked_at),
            "num_asks": attempt.num_asks,
            "granted_at": self._at(attempt.granted_at),
            "replica": None if lease is None else lease.replica_id,
            "lease": None if lease is None else lease.lease_id,
            "lease_tokens": None if lease is None else lease.num_tokens,
            "first_token_at": self._at(attempt.first_at),
            "ended_at": self._at(attempt.ended_at),
            "tokens_before": attempt.num_tokens_before,
            "tokens": attempt.num_tokens,
            "failure": None if failure is None else {"code": getattr(failure, "code", None), "message": str(failure)},
        }

    def _at(self, seconds: float | None) -> float | None:
        return None if seconds is None else round(self.received_ms + (seconds - self.received_at) * 1000.0, 1)


class RequestNotes:
    """Of one ingress. ``explains``: they are found by `find`; else nothing is kept behind a request's end."""

    def __init__(self, ingress_id: str = "", *, explains: bool = False) -> None:
        self.ingress_id = ingress_id
        self.explains = explains
        self.logs = True
        """A line for each request at its end. May change while it runs."""
        self._running: dict[str, list[RequestNote]] = {}
        """By each id that it has."""
        self._ended: deque[tuple[tuple[str, ...], bytes, dict[str, Any]]] = deque()
        self._ended_by_id: dict[str, list[tuple[bytes, dict[str, Any]]]] = {}

    def begin(self, request_id: str, route: str, owner: bytes) -> RequestNote:
        """``owner``: who may ask for it."""
        note = RequestNote(request_id, route, owner)
        if self.explains:
            self._running.setdefault(request_id, []).append(note)
        return note

    def name(self, note: RequestNote, request_id: str, answer_id: str | None = None) -> None:
        """The ids that its client knows it by from now on."""
        if self.explains:
            self._forget(note)
        note.request_id, note.answer_id = request_id, answer_id
        if self.explains:
            for one in _ids(note):
                self._running.setdefault(one, []).append(note)

    def attach(self, note: RequestNote, generation: Generation, model: str) -> None:
        """It has begun. The answer's request id may be another than the one it was asked under: an earlier stream's."""
        note.generation, note.model = generation, model
        note.streams = list(generation.streams)
        self.name(note, note.request_id, generation.answer.id)

    def end(self, note: RequestNote, status: int | None) -> None:
        """``status``: of the answer; None: there was none."""
        note.status, note.ended_at = status, asyncio.get_running_loop().time()
        if note.generation is not None and note.error is None and note.generation.error is not None:
            note.error = error_response(note.generation.error)
        if self.logs and logger.isEnabledFor(logging.INFO):
            logger.info("request ended", extra=about(note.request_id, **note.line()))
        if self.explains:
            self._forget(note)
            self._remember(note)

    def find(self, request_id: str, owner: bytes) -> list[dict[str, Any]]:
        """The requests of that id that this owner made, oldest first."""
        ended = [copy.deepcopy(told) for whose, told in self._ended_by_id.get(request_id, ()) if whose == owner]
        running = [n.describe(self.ingress_id) for n in self._running.get(request_id, ()) if n.owner == owner]
        return ended + running

    def _forget(self, note: RequestNote) -> None:
        for one in _ids(note):
            self._running[one].remove(note)
            if not self._running[one]:
                del self._running[one]

    def _remember(self, note: RequestNote) -> None:
        ids, told = tuple(_ids(note)), note.describe(self.ingress_id)
        self._ended.append((ids, note.owner, told))
        for one in ids:
            self._ended_by_id.setdefault(one, []).append((note.owner, told))
        if len(self._ended) > MAX_ENDED:
            ids, _, _ = self._ended.popleft()
            for one in ids:
                del self._ended_by_id[one][0]
                if not self._ended_by_id[one]:
                    del self._ended_by_id[one]


def _ids(note: RequestNote) -> Iterable[str]:
    return dict.fromkeys(one for one in (note.request_id, note.answer_id) if one is not None)
