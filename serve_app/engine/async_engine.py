"""AsyncEngine: a thread around Engine. Knows threads and event loops; knows nothing of scheduling, models or Ray.

    any thread      submit, abort, stop  -> one queue of commands
    engine thread   all commands that are there, one step, one call of each sink, again
    event loop      one call_soon_threadsafe per step and loop -> the streams' inboxes

Only the engine thread touches the Engine. A command waits for the end of the step under way and no longer: it could
not have had an effect earlier. Every accepted choice gets exactly one output with a finish reason, also when the
thread stops or dies.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import queue
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from typing import NamedTuple

from serve_app.engine.compiling import Compilation, Compiler
from serve_app.engine.engine import Engine
from serve_app.engine.request import FinishReason, GenerateRequest, TokenOutput
from serve_app.engine.scheduler import Key
from serve_app.errors import EngineUnavailableError, InvalidParameterError
from serve_app.logs import get_logger

logger = get_logger(__name__)

Sink = Callable[[list[TokenOutput]], None]
"""Takes one step's outputs of all requests submitted to it. Called on the engine thread: it must return at once."""


class _Submit(NamedTuple):
    requests: list[GenerateRequest]
    sink: Sink
    settled: Callable[[Exception | None], None]
    """Told, on the engine thread, that the request was accepted (None) or why it was refused."""
    compilation: Compilation | None
    """Of its grammars: the engine takes the request when they are ready."""


class _Abort(NamedTuple):
    request_id: str
    choice_index: int | None


class _Stop(NamedTuple):
    pass


class _Compiled(NamedTuple):
    """Some request's grammars are ready, or will never be."""


_Command = _Submit | _Abort | _Stop | _Compiled


class AsyncEngine:
    """Runs ``engine`` on a daemon thread. Every method may be called from any thread."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.error: BaseException | None = None
        """What the thread died of."""
        self.num_steps = 0
        """Calls of Engine.step that returned."""
        self.last_step_time = engine.clock()
        """When the last of them returned, or the thread last found work: seconds on the engine's clock."""
        self._is_idle = True
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        # SimpleQueue.put is reentrant, so a stream may abort from __del__, wherever the collector happens to run.
        self._commands: queue.SimpleQueue[_Command] = queue.SimpleQueue()
        self._compiler = Compiler(engine.runner.compile_grammar, engine.clock)

        self._condition = threading.Condition()
        """Guards the three below. A submit is queued under it, so that none slips in behind the last sweep."""
        self._refusal: str | None = "the engine has not started"
        self._num_unfinished = 0
        self._hubs: dict[asyncio.AbstractEventLoop, _LoopHub] = {}

        # The engine thread's own.
        self._taken: deque[_Command] = deque()
        """Commands read from the queue and not yet applied."""
        self._compiling: list[_Submit] = []
        """Neither accepted nor refused yet."""
        self._sinks: dict[Key, Sink] = {}
        """Accepted choices that have not ended."""
        self._outgoing: dict[Sink, list[TokenOutput]] = {}
        self._num_ended = 0

    # ---- life ----------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Starts the thread. Once. What was loaded by now is taken out of the garbage collector's sight.

        A full collection walks every object; with a model's modules among them it stopped the steps for some 20 ms.
        """
        gc.collect()
        gc.freeze()
        with self._condition:
            self._thread.start()
            self._refusal = None

    @property
    def is_alive(self) -> bool:
        return self._thread.is_alive() and self.error is None

    @property
    def num_unfinished(self) -> int:
        """Choices submitted, and neither refused nor ended."""
        return self._num_unfinished

    @property
    def seconds_without_progress(self) -> float:
        """Seconds since the last step returned while there was work to do; 0 when idle. For a watchdog."""
        return 0.0 if self._is_idle else max(0.0, self.engine.clock() - self.last_step_time)

    def drain(self, timeout: float | None = None) -> bool:
        """Refuses new requests and waits for those under way. False if some are left after ``timeout`` seconds."""
        with self._condition:
            self._refusal = self._refusal or "the engine is draining"
            return self._condition.wait_for(lambda: self._num_unfinished == 0, timeout)

    def stop(self, timeout: float | None = None) -> bool:
        """Ends every request with an engine_unavailable error, then the thread. May be called again.

        False if the thread still runs after ``timeout`` seconds, inside a step that does not return.
        """
        with self._condition:
            self._refusal = self._refusal or "the engine has stopped"
        self._commands.put(_Stop())
        if self._thread.ident is not None and threading.current_thread() is not self._thread:
            self._thread.join(timeout)
        return not self._thread.is_alive()

    # ---- requests ------------------------------------------------------------------------------------------------

    async def submit(self, requests: list[GenerateRequest]) -> OutputStream:
        """Hands over the choices of one request; returns when the engine has accepted them.

        Raises InvalidRequestError if it cannot be served, EngineUnavailableError when draining, stopped or dead,
        DeadlineExceededError if its grammar took all its time.
        """
        loop = asyncio.get_running_loop()
        inbox: asyncio.Queue[TokenOutput] = asyncio.Queue()
        waiter: asyncio.Future[None] = loop.create_future()
        hub = self._hub(loop)
        keys = [(request.request_id, request.choice_index) for request in requests]
        self._post(requests, hub, lambda error: hub.settle(keys, inbox, waiter, error))
        try:
            await waiter
        except asyncio.CancelledError:
            for key in keys:
                self.abort(*key)
            raise
        return OutputStream(self, keys, inbox)

    def submit_to(self, requests: list[GenerateRequest], sink: Sink) -> Future[None]:
        """The same for a consumer of its own kind: ``sink`` gets one list per step, for all requests given to it.

        Raises EngineUnavailableError; what else `submit` raises is in the future, which is done before the first call
        of the sink for this request. A sink that raises has lost its consumer: its requests are aborted.
        """
        future: Future[None] = Future()
        self._post(requests, sink, lambda e: future.set_result(None) if e is None else future.set_exception(e))
        return future

    def abort(self, request_id: str, choice_index: int | None = None) -> None:
        """Ends a request, or one choice of it, after the step under way. Unknown or ended ones are left alone."""
        self._commands.put(_Abort(request_id, choice_index))

    def _post(self, requests: list[GenerateRequest], sink: Sink, settled: Callable[[Exception | None], None]) -> None:
        if not requests:
            raise InvalidParameterError("requests", requests, "a list of at least 1 choice")
        with self._condition:
            if self._refusal is not None:
                raise EngineUnavailableError(self._refusal)
            self._num_unfinished += len(requests)
            self._commands.put(_Submit(requests, sink, settled, self._compiler.start(requests)))

    def _hub(self, loop: asyncio.AbstractEventLoop) -> _LoopHub:
        with self._condition:
            if loop not in self._hubs:
                self._hubs = {other: hub for other, hub in self._hubs.items() if not other.is_closed()}
                self._hubs[loop] = _LoopHub(loop)
            return self._hubs[loop]

    # ---- the engine thread ---------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            self._loop()
        except BaseException as error:  # whatever it is, those who wait must hear of it
            logger.critical("the engine thread died", exc_info=error)
            self.error = error
            self._close(f"the engine died of {type(error).__name__}: {error}")
        else:
            self._close("the engine has stopped")

    def _loop(self) -> None:
        engine, scheduler = self.engine, self.engine.scheduler
        is_stalled = False
        while True:
            self._take_commands(is_stalled)
            while self._taken:
                command = self._taken[0]
                if isinstance(command, _Stop):
                    return self._abandon_all()
                self._apply(command)
                self._taken.popleft()
            if self._compiling:
                self._give_up_late()
            if engine.has_work:
                num_recorded = engine.recorder.num_steps
                outputs = engine.step()
                self.num_steps += 1
                self.last_step_time = engine.clock()
                self._route(outputs)
                # Requests wait, nothing runs and nothing was read: only a command or a deadline changes that.
                is_stalled = not outputs and not scheduler.running and engine.recorder.num_steps == num_recorded
            self._flush()

    def _take_commands(self, is_stalled: bool) -> None:
        """Takes all commands that are there; if there is nothing else to do, sleeps until the first one comes."""
        # queue.Empty: a deadline has come, and the next step ends its request.
        with contextlib.suppress(queue.Empty):
            if is_stalled or not self.engine.has_work:
                self._is_idle = True
                self._taken.append(self._commands.get(timeout=self._seconds_to_deadline()))
        if self._is_idle:
            self.last_step_time = self.engine.clock()
            self._is_idle = False
        while not self._commands.empty():  # nobody else takes from it
            self._taken.append(self._commands.get_nowait())

    def _seconds_to_deadline(self) -> float | None:
        deadlines = [s.deadline for s in self.engine.scheduler.sequences.values() if s.deadline is not None]
        deadlines += [c.compilation.deadline for c in self._compiling if c.compilation is not None]
        return max(0.0, min(deadlines) - self.engine.clock()) if deadlines else None

    def _apply(self, command: _Submit | _Abort | _Compiled) -> None:
        if isinstance(command, _Abort):
            if self._compiling:
                self._abort_compiling(command)
            self.engine.abort(command.request_id, command.choice_index)
            # At once, not with the next step: a new attempt may come under the same id before it.
            self._route(self.engine.scheduler.take_ended())
        elif isinstance(command, _Compiled):
            ready = [c for c in self._compiling if c.compilation is not None and c.compilation.is_done]
            self._compiling = [c for c in self._compiling if c not in ready]
            for submit in ready:
                self._accept(submit)
        elif self._is_compiling(command):
            request_id = command.requests[0].request_id
            self._refuse(
                command, InvalidParameterError("request_id", request_id, "unique among the requests under way")
            )
        elif command.compilation is not None and not command.compilation.is_done:
            self._compiling.append(command)
            command.compilation.grammars.add_done_callback(lambda _: self._commands.put(_Compiled()))
        else:
            self._accept(command)

    def _is_compiling(self, command: _Submit) -> bool:
        keys = {(r.request_id, r.choice_index) for r in command.requests}
        return any((r.request_id, r.choice_index) in keys for other in self._compiling for r in other.requests)

    def _abort_compiling(self, command: _Abort) -> None:
        """A request ends when all its choices are aborted; a choice alone when the engine has taken the others."""
        for submit in [c for c in self._compiling if c.requests[0].request_id == command.request_id]:
            compilation, choices = submit.compilation, {r.choice_index for r in submit.requests}
            assert compilation is not None
            compilation.aborted |= choices if command.choice_index is None else choices & {command.choice_index}
            if compilation.aborted == choices:
                self._compiling.remove(submit)
                compilation.grammars.cancel()
                self._begin(submit)
                self._route([TokenOutput(command.request_id, i, finish_reason=FinishReason.ABORT) for i in choices])

    def _give_up_late(self) -> None:
        now = self.engine.clock()
        for submit in list(self._compiling):
            compilation = submit.compilation
            assert compilation is not None
            if compilation.deadline <= now:
                self._compiling.remove(submit)
                compilation.grammars.cancel()
                self._refuse(submit, compilation.lateness())

    def _refuse(self, command: _Submit, error: Exception) -> None:
        self._num_ended += len(command.requests)
        self._settle(command.settled, error)

    def _accept(self, command: _Submit) -> None:
        compilation = command.compilation
        try:
            if compilation is None:
                self.engine.add(command.requests)
            else:
                compilation.grammars.result(0)
                self.engine.add(command.requests, compilation.started)
        except Exception as error:  # it goes to the caller
            return self._refuse(command, error)
        self._begin(command)
        for choice_index in () if compilation is None else compilation.aborted:
            self._apply(_Abort(command.requests[0].request_id, choice_index))

    def _begin(self, command: _Submit) -> None:
        """From here on its outputs go to its sink."""
        requests, sink, settled, _ = command
        if any(output.request_id == requests[0].request_id for output in self._outgoing.get(sink, ())):
            self._flush()  # the end of an earlier attempt arrives before the news of this one
        for request in requests:
            self._sinks[request.request_id, request.choice_index] = sink
        if not self._settle(settled, None):
            self._drop(sink)

    def _route(self, outputs: list[TokenOutput]) -> None:
        """Sorts outputs by sink. Outputs of a sink that was dropped go nowhere."""
        for output in outputs:
            key = (output.request_id, output.choice_index)
            sink = self._sinks.get(key)
            if sink is None:
                continue
            self._outgoing.setdefault(sink, []).append(output)
            if output.finish_reason is not None:
                del self._sinks[key]
                self._num_ended += 1

    def _flush(self) -> None:
        """One call per sink; then those who wait for the drain may count."""
        for sink in self._send():
            self._drop(sink)
        if self._num_ended:
            with self._condition:
                self._num_unfinished -= self._num_ended
                self._condition.notify_all()
            self._num_ended = 0

    def _send(self) -> list[Sink]:
        """Returns the sinks that raised."""
        lost = []
        outgoing, self._outgoing = self._outgoing, {}
        for sink, outputs in outgoing.items():
            try:
                sink(outputs)
            except Exception as error:
                logger.warning("a consumer is gone; its requests are aborted", exc_info=error)
                lost.append(sink)
        return lost

    def _settle(self, settled: Callable[[Exception | None], None], error: Exception | None) -> bool:
        try:
            settled(error)
        except Exception as error:
            logger.warning("a consumer is gone before its request was settled", exc_info=error)
            return False
        return True

    def _drop(self, sink: Sink) -> None:
        for key in [key for key, other in self._sinks.items() if other == sink]:
            del self._sinks[key]
            self._num_ended += 1
            self.engine.abort(*key)
        self._route(self.engine.scheduler.take_ended())

    def _abandon_all(self) -> None:
        """Frees what the engine holds and reads the steps in flight; the requests hear of it in `_close`."""
        for key in self._sinks:
            self.engine.abort(*key)
        while self.engine.has_work:
            self.engine.step()

    def _close(self, message: str) -> None:
        """The last thing the thread does: everyone who waits gets the message, everyone who comes later too."""
        with self._condition:
            self._refusal = message
        self._is_idle = True
        while not self._commands.empty():
            self._taken.append(self._commands.get_nowait())
        for command in self._taken:
            if isinstance(command, _Submit):
                self._settle(command.settled, EngineUnavailableError(message))
        for submit in self._compiling:
            self._settle(submit.settled, EngineUnavailableError(message))
        self._compiling.clear()
        self._compiler.close()
        code = EngineUnavailableError.code
        for (request_id, choice_index), sink in self._sinks.items():
            output = TokenOutput(
                request_id, choice_index, finish_reason=FinishReason.ERROR, error=message, error_code=code
            )
            self._outgoing.setdefault(sink, []).append(output)
        self._sinks.clear()
        self._send()
        with self._condition:
            self._num_unfinished = 0
            self._condition.notify_all()


class OutputStream:
    """The TokenOutputs of one request, of all its choices, until each has ended. For the loop that submitted it.

    A consumer that is cancelled while it waits, calls `aclose`, or drops the stream aborts what has not ended.
    """

    def __init__(self, engine: AsyncEngine, keys: list[Key], inbox: asyncio.Queue[TokenOutput]) -> None:
        self.request_id = keys[0][0]
        self._engine = engine
        self._open = {choice_index for _, choice_index in keys}
        self._inbox = inbox

    def __aiter__(self) -> OutputStream:
        return self

    async def __anext__(self) -> TokenOutput:
        if not self._open:
            raise StopAsyncIteration
        try:
            output = await self._inbox.get()
        except asyncio.CancelledError:
            self._abort()
            raise
        if output.finish_reason is not None:
            self._open.discard(output.choice_index)
        return output

    async def aclose(self) -> None:
        self._abort()

    def __del__(self) -> None:
        self._abort()

    def _abort(self) -> None:
        for choice_index in self._open:
            self._engine.abort(self.request_id, choice_index)
        self._open = set()


class _LoopHub:
    """The sink of one event loop: takes a whole step over in one call, and sorts it into the streams' inboxes there.

    Its calls run in the order they were posted, so a request is settled before its first output arrives.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._inboxes: dict[Key, asyncio.Queue[TokenOutput]] = {}

    def __call__(self, outputs: list[TokenOutput]) -> None:
        """Raises RuntimeError if the loop is closed."""
        self._loop.call_soon_threadsafe(self._deliver, outputs)

    def settle(
        self, keys: list[Key], inbox: asyncio.Queue[TokenOutput], waiter: asyncio.Future[None], error: Exception | None
    ) -> None:
        """Raises RuntimeError if the loop is closed."""
        self._loop.call_soon_threadsafe(self._settle, keys, inbox, waiter, error)

    def _settle(
        self, keys: list[Key], inbox: asyncio.Queue[TokenOutput], waiter: asyncio.Future[None], error: Exception | None
    ) -> None:
        if error is None:
            self._inboxes.update((key, inbox) for key in keys)
        if waiter.done():
            return  # cancelled: its abort is on the way
        if error is None:
            waiter.set_result(None)
        else:
            waiter.set_exception(error)

    def _deliver(self, outputs: list[TokenOutput]) -> None:
        for output in outputs:
            key = (output.request_id, output.choice_index)
            self._inboxes[key].put_nowait(output)
            if output.finish_reason is not None:
                del self._inboxes[key]
