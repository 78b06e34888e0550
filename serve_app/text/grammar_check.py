"""GrammarCheck: compiles a grammar once before any replica gets it, in a process of its own, and remembers what came out.

Knows helpers (`grammar_helper`) and texts of grammars; knows no request and no model. The library compiles in milliseconds
what people write, but there are schemas of a few lines on which it computes for hours, and some on which it overflows the
stack: none of that may reach a process that serves others. A helper ends itself at its limits; that is the verdict then.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import selectors
import signal
import subprocess
import sys
import threading
import weakref
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from serve_app.errors import OverloadedError
from serve_app.text import json_schema

HELPER = Path(__file__).with_name("grammar_helper.py")
NUM_HELPERS = 2
MAX_WAITING = 64
"""Grammars that are compiled or wait for it; more are refused for the moment."""
MAX_REMEMBERED_LENGTH = 2**23
"""Characters of all grammars whose verdict is remembered."""
WALL_SECONDS = 30.0
"""A helper that has not answered by then is ended: its own limit counts CPU time alone."""
OWN_LIMITS = frozenset({signal.SIGPROF, signal.SIGSEGV, signal.SIGBUS, signal.SIGABRT})
"""What a helper dies of where the grammar is too much: time, depth, memory."""
TOO_MUCH = "it takes more time, memory or depth to compile than a grammar may"


class Verdict(NamedTuple):
    """``problem``: why the grammar cannot be used; None: it can. ``place``: where in the client's schema."""

    problem: str | None
    place: json_schema.Place = ()


class GrammarCheck:
    """For one event loop. Helpers are started when they are first needed, and end with this object or the process."""

    def __init__(self, num_helpers: int = NUM_HELPERS, max_waiting: int = MAX_WAITING) -> None:
        self._threads = ThreadPoolExecutor(num_helpers, "grammar-check")
        self._local = threading.local()
        self._max_waiting = max_waiting
        self._waiting: dict[str, asyncio.Future[Verdict]] = {}
        self._known: OrderedDict[str, Verdict] = OrderedDict()
        self._known_length = 0
        self.num_compiled = 0

    async def check(self, text: str) -> Verdict:
        """What is to be said of a grammar. Raises OverloadedError where too many wait."""
        known = self._known.get(text)
        if known is not None:
            self._known.move_to_end(text)
            return known
        waiting = self._waiting.get(text)
        if waiting is None:
            if len(self._waiting) >= self._max_waiting:
                raise OverloadedError(
                    f"{len(self._waiting)} grammars wait to be compiled; at most {self._max_waiting} may"
                )
            waiting = asyncio.get_running_loop().run_in_executor(self._threads, self._compile, text)
            self._waiting[text] = waiting
            waiting.add_done_callback(lambda done: self._take(text, done))
        return await asyncio.shield(waiting)  # others may wait for the same one

    def _take(self, text: str, done: asyncio.Future[Verdict]) -> None:
        del self._waiting[text]
        if done.cancelled() or done.exception() is not None:
            return
        self.num_compiled += 1
        self._known[text] = done.result()
        self._known_length += len(text)
        while self._known_length > MAX_REMEMBERED_LENGTH:
            self._known_length -= len(self._known.popitem(last=False)[0])

    def _compile(self, text: str) -> Verdict:
        """On a thread, which has a helper of its own. A helper that died of something else gets a second try."""
        for _ in range(2):
            helper: Helper | None = getattr(self._local, "helper", None)
            if helper is None or helper.is_over:
                helper = self._local.helper = Helper()
            try:
                return helper.check(text)
            except HelperDiedError as error:
                if error.signal in OWN_LIMITS:
                    break
        return Verdict(TOO_MUCH)


class HelperDiedError(Exception):
    """In the middle of a grammar. ``signal``: which ended it."""

    def __init__(self, signal: int) -> None:
        super().__init__(signal)
        self.signal = signal


class Helper:
    """One helper process. For one thread."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, str(HELPER)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            encoding="utf-8",
        )
        self._end = weakref.finalize(self, _end, self._process)

    @property
    def is_over(self) -> bool:
        return not self._end.alive

    @property
    def pid(self) -> int:
        return self._process.pid

    def check(self, text: str) -> Verdict:
        """Raises HelperDiedError."""
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None and stdout is not None
        try:
            stdin.write(json.dumps(text) + "\n")
            stdin.flush()
            with selectors.DefaultSelector() as selector:
                selector.register(stdout, selectors.EVENT_READ)
                is_there = selector.select(WALL_SECONDS)
            answer = stdout.readline() if is_there else ""
        except BrokenPipeError:
            is_there, answer = [], ""
        if not answer:
            if is_there:
                self._process.wait(WALL_SECONDS)
            self._end()
            raise HelperDiedError(-self._process.returncode)
        problem = json.loads(answer)
        found = stdout.readline()  # soon, or the process ends
        if not found:
            self._end()
            return Verdict(cleaned(problem))
        if problem is None:
            return Verdict(None)
        place, problem = json.loads(found)
        return Verdict(cleaned(problem), original_place(place))


def _end(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.wait()
    assert process.stdin is not None and process.stdout is not None
    with contextlib.suppress(BrokenPipeError):  # what it did not read
        process.stdin.close()
    process.stdout.close()


def cleaned(problem: str) -> str:
    """The library's sentence without the source that it shows around it, and without its options."""
    if problem.startswith("oneOf "):
        return "oneOf is taken where no value can fit two of its schemas; anyOf always is"
    lines = [line.strip() for line in problem.splitlines()]
    reason = next((line.removeprefix("error: ") for line in lines if line.startswith("error: ")), "")
    words = [line for line in lines if line.strip("^") and ("|" not in line or len(lines) == 1)]
    return (reason or " ".join(" ".join(words).split()))[:300]


def original_place(place: list[str | int]) -> json_schema.Place:
    """A place in a prepared schema as one in the client's: definitions are named by where they stood."""
    if place[:1] == ["$defs"] and len(place) > 1:
        return (*json_schema.place_of_pointer(str(place[1])), *place[2:])
    return tuple(place)
