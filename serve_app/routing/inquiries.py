"""Inquiries: a question that one ingress has for all of them, handed on by the router. Knows mailboxes; knows no question.

    ingress that is asked    listen(id) -> questions      a long poll, in flight all the time where somebody may ask
                             answer(number, id, answer)
                             stop_listening(id)           when it ends
    ingress that asks        inquire(question) -> answers

So nobody pushes what nobody asks for, and ingresses need not know each other.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

POLL_SECONDS = 20.0
"""Longest time that one `listen` waits."""
BETWEEN_SECONDS = 5.0
"""A listener that has not called again for so long has gone."""
ANSWER_SECONDS = 4.0
"""Listeners that have not answered by then are silent. Below the time that a call of the router may take."""


class Answers(NamedTuple):
    """What came of a question."""

    answers: list[Any]
    """Of each listener that answered."""
    num_silent: int
    """Listeners that did not."""


@dataclass(eq=False)
class _Listener:
    num_polls: int = 0
    """In flight: a call that its caller has given up goes on for a while."""
    heard_at: float = 0.0
    """When a poll ended."""
    alive_at: float = 0.0
    """When anything was heard of it."""
    questions: list[tuple[int, Any]] = field(default_factory=list)
    arrived: asyncio.Event = field(default_factory=asyncio.Event)


@dataclass(eq=False)
class _Question:
    awaited: set[str]
    answers: list[Any] = field(default_factory=list)
    answered: asyncio.Event = field(default_factory=asyncio.Event)


class Inquiries:
    """Every method on one event loop. ``clock``: monotonic seconds. ``gone_seconds``: one not heard of for so long has gone,
    though a poll of it be in flight: nobody says that the caller has died."""

    def __init__(self, clock: Callable[[], float], gone_seconds: Callable[[], float]) -> None:
        self._clock = clock
        self._gone_seconds = gone_seconds
        self._listeners: dict[str, _Listener] = {}
        self._questions: dict[int, _Question] = {}
        self._num_questions = 0

    def has_listeners(self) -> bool:
        """Forgets those that have gone."""
        now = self._clock()
        between, gone = now - BETWEEN_SECONDS, now - self._gone_seconds()
        for holder_id, one in list(self._listeners.items()):
            if one.alive_at <= gone or (not one.num_polls and one.heard_at < between):
                del self._listeners[holder_id]
        return bool(self._listeners)

    def is_alive(self, holder_id: str) -> None:
        """Something was heard of it."""
        if (listener := self._listeners.get(holder_id)) is not None:
            listener.alive_at = self._clock()

    def stop_listening(self, holder_id: str) -> None:
        """It ends, and will answer nothing."""
        self._listeners.pop(holder_id, None)

    async def listen(self, holder_id: str) -> list[tuple[int, Any]]:
        """Questions, each with its number. Waits until there is one, at most POLL_SECONDS."""
        listener = self._listeners.setdefault(holder_id, _Listener())
        listener.num_polls += 1
        listener.alive_at = self._clock()
        try:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(POLL_SECONDS):
                    while not listener.questions:
                        listener.arrived.clear()
                        await listener.arrived.wait()
        finally:
            listener.num_polls -= 1
            listener.heard_at = self._clock()
        questions, listener.questions = listener.questions, []
        return questions

    async def inquire(self, question: Any) -> Answers:
        """Asks all listeners, and waits for them at most ANSWER_SECONDS."""
        self.has_listeners()
        self._num_questions += 1
        number = self._num_questions
        asked = self._questions[number] = _Question(set(self._listeners))
        for listener in self._listeners.values():
            listener.questions.append((number, question))
            listener.arrived.set()
        try:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(ANSWER_SECONDS):
                    while asked.awaited:
                        asked.answered.clear()
                        await asked.answered.wait()
        finally:
            del self._questions[number]
        return Answers(asked.answers, len(asked.awaited))

    def answer(self, number: int, holder_id: str, answer: Any) -> None:
        """One that comes twice, or too late, changes nothing."""
        asked = self._questions.get(number)
        if asked is not None and holder_id in asked.awaited:
            asked.awaited.discard(holder_id)
            asked.answers.append(answer)
            asked.answered.set()
