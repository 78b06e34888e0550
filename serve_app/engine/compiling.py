"""Compiling: a request's grammars are compiled on helper threads before the engine sees it. Knows time; knows no engine.

A grammar may take a second. Neither the step thread nor an event loop may wait for it, nor a request that has none.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

from serve_app.engine.request import GenerateRequest
from serve_app.errors import DeadlineExceededError, InvalidParameterError, RaggedServeError

COMPILE_SECONDS = 10.0
"""A request whose grammars are not ready by then is refused. Far above what the compiler's own limits allow."""

NUM_COMPILERS = 4
"""Threads, so that one slow grammar does not hold up all others."""


class Compilation:
    """The grammars of one request, on their way."""

    def __init__(self, requests: list[GenerateRequest], grammars: Future[list[object]], started: float) -> None:
        self.requests = requests
        self.grammars = grammars
        """Holds what was compiled until the engine has found it."""
        self.started = started
        """Monotonic seconds; the request's deadline counts from here."""
        times = [request.remaining_ms / 1000.0 for request in requests if request.remaining_ms is not None]
        self.deadline = started + min([COMPILE_SECONDS, *times])
        """When it is given up."""
        self.aborted: set[int] = set()
        """Choices that were aborted meanwhile."""

    @property
    def is_done(self) -> bool:
        return self.grammars.done()

    def lateness(self) -> RaggedServeError:
        """What a request hears that was given up."""
        if self.deadline < self.started + COMPILE_SECONDS:
            request_id, remaining_ms = self.requests[0].request_id, (self.deadline - self.started) * 1000.0
            return DeadlineExceededError(f"request {request_id!r} did not end within its {remaining_ms:g} ms")
        text = next(r.sampling.grammar for r in self.requests if r.sampling.grammar is not None)
        return InvalidParameterError("grammar", text, f"simple enough to be compiled within {COMPILE_SECONDS:g} s")


class Compiler:
    """``compile_grammar``: the runner's. Its threads start with the first grammar."""

    def __init__(self, compile_grammar: Callable[[str], object], clock: Callable[[], float]) -> None:
        self._compile_grammar = compile_grammar
        self._clock = clock
        self._lock = threading.Lock()
        self._pool: ThreadPoolExecutor | None = None

    def start(self, requests: list[GenerateRequest]) -> Compilation | None:
        """From any thread. None if no choice has a grammar."""
        texts = list(dict.fromkeys(r.sampling.grammar for r in requests if r.sampling.grammar is not None))
        if not texts:
            return None
        with self._lock:
            if self._pool is None:
                self._pool = ThreadPoolExecutor(NUM_COMPILERS, "grammar")
            grammars = self._pool.submit(lambda: [self._compile_grammar(text) for text in texts])
        return Compilation(requests, grammars, self._clock())

    def close(self) -> None:
        """What has not begun never will."""
        with self._lock:
            if self._pool is not None:
                self._pool.shutdown(wait=False, cancel_futures=True)
