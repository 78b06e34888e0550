"""The ingress end of the channels: one for each replica that is used, one stream of messages in each.

A channel opens with the first submit to its replica, and reads one stream (`ChannelHub.outputs`) for all its requests.
A stream may break, fall silent or reach its age; it is then opened again from the last number, and nothing is lost or
seen twice. When the replica is lost every request on it hears ReplicaLostError, after the tokens that have arrived.

Knows replicas by id and a Transport by its two methods. Knows no Ray, no HTTP, no leases. All tasks run in an empty
context: a call made for one client must not end with that client's request.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
from collections.abc import AsyncGenerator, Coroutine, Iterable
from typing import Any, NamedTuple, Protocol

from serve_app.engine.request import GenerateRequest, TokenOutput
from serve_app.errors import (
    ChannelLostError,
    IngressStoppingError,
    RaggedServeError,
    ReplicaLostError,
    ReplicaUnreachableError,
    SlowReaderError,
)
from serve_app.logs import get_logger
from serve_app.replica.kept import Keep
from serve_app.replica.messages import ChannelOptions, Message, decode

logger = get_logger(__name__)

MAX_BACKOFF_SECONDS = 0.5
MAX_BEHIND = 8192
"""Outputs kept for a consumer that does not take them."""
GOODBYE_SECONDS = 60.0
"""How long a lost replica is told that its channel is closed. One that hung and goes on ends those requests then."""
MAX_SUBMIT_CALLS = 4
"""Calls that submit to one replica at a time, and as many for requests with a grammar. A call returns when the engine
has taken its requests, which is between two steps; those that come meanwhile go together. A few, so that one that comes
just after a call need not wait for it."""


class Transport(Protocol):
    """Calls one replica, chosen by its id. Raises the exceptions of the called method, if they are RaggedServeErrors;
    ReplicaLostError if the replica is gone; ReplicaUnreachableError if that is not certain."""

    async def call(self, replica_id: str, method: str, *args: Any) -> Any: ...

    def stream(self, replica_id: str, method: str, *args: Any) -> AsyncGenerator[Any, None]: ...


class Outputs:
    """What comes of one submit: the choices of one request, on one replica. For one consumer."""

    def __init__(self, channel: _Channel, first_key: int, requests: list[GenerateRequest]) -> None:
        loop = asyncio.get_running_loop()
        self.replica_id = channel.replica_id
        self.request_id = requests[0].request_id
        self.error: Exception | None = None
        """ReplicaLostError, or why the submit was refused."""
        self._expired: Exception | None = None
        self._cut: SlowReaderError | None = None
        self._channel = channel
        self._keys = {request.choice_index: first_key + i for i, request in enumerate(requests)}
        """Choice -> key, of the choices that have not ended."""
        self._aborted: set[int] = set()
        self._arrived: list[TokenOutput] = []
        self._has_taken = False
        self._waiter: asyncio.Future[None] | None = None
        self._accepted: asyncio.Future[None] = loop.create_future()
        self._ended: asyncio.Future[None] = loop.create_future()

    async def accepted(self) -> None:
        """Returns when the replica's engine has taken the request.

        Raises ReplicaLostError, LeaseRefusedError, and what AsyncEngine.submit raises.
        """
        await asyncio.shield(self._accepted)

    async def next(self) -> list[TokenOutput]:
        """Everything that has come since the last call, at least one output. [] when every choice has ended.

        Raises ReplicaLostError when what came before it has been taken, or the reason of a refusal, or what `expire`
        was given; and SlowReaderError at once, where more has come than is kept for one consumer.
        """
        if self._cut is not None:
            raise self._cut
        while not self._arrived:
            if self.error is not None:
                raise self.error
            if self._expired is not None:
                raise self._expired
            if not self._keys:
                return []
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
            if self._cut is not None:
                raise self._cut
        self._has_taken = True
        arrived, self._arrived = self._arrived, []
        return arrived

    def abort(self, choice_index: int | None = None) -> None:
        """Asks the replica to end the request, or one choice. Its last output still comes. May be called again."""
        if self.error is not None:
            return
        keys = {key for choice, key in self._keys.items() if choice_index in (None, choice)} - self._aborted
        if keys:
            self._aborted |= keys
            self._channel.abort(keys)

    def expire(self, error: Exception) -> None:
        """The consumer waits no longer: `next` raises ``error`` behind what has come. The replica is told by `abort`."""
        self._expired = error
        self._wake()

    def _fall_behind(self, limit: int) -> None:
        """More than ``limit`` outputs wait for the consumer."""
        if self._cut is None:
            self._cut = SlowReaderError(
                f"{len(self._arrived)} tokens wait for this client, which does not read them; at most {limit} are kept"
            )
            self.abort()
        self._arrived.clear()

    async def ended(self) -> None:
        """Returns when the replica has ended every choice, has refused the request, or is lost. See ``error``."""
        await asyncio.shield(self._ended)

    @property
    def has_output(self) -> bool:
        """Something has come, taken or not: the replica has accepted the request."""
        return self._has_taken or bool(self._arrived)

    @property
    def has_ended(self) -> bool:
        return self._ended.done()

    def _wake(self) -> None:
        waiter, self._waiter = self._waiter, None
        if waiter is not None and not waiter.done():
            waiter.set_result(None)

    def _end_choice(self, choice_index: int) -> None:
        del self._keys[choice_index]
        if not self._keys:
            self._accept()  # the reply to the submit may come later than its end, or never
            self._ended.set_result(None)

    def _accept(self) -> None:
        if not self._accepted.done():
            self._accepted.set_result(None)

    def _fail(self, error: Exception) -> None:
        """Nothing more will come."""
        if self._ended.done():
            return
        self.error = error
        if not self._accepted.done():
            self._accepted.set_exception(error)
            self._accepted.exception()  # perhaps nobody asks
        self._ended.set_result(None)
        self._wake()


class Channels:
    """The channels of one ingress. For one event loop. ``ingress_id`` is the holder of its leases."""

    def __init__(self, transport: Transport, ingress_id: str, options: ChannelOptions | None = None) -> None:
        self.ingress_id = ingress_id
        self.options = options or ChannelOptions()
        self.max_behind = MAX_BEHIND
        """May change while it runs."""
        self._transport = transport
        self._channels: dict[str, _Channel] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._is_closed = False

    def start(
        self, replica_id: str, requests: list[GenerateRequest], num_blocks: int, keep: Keep | None = None
    ) -> Outputs:
        """Submits the choices of one request without waiting: see `Outputs.accepted`. ``keep``: its client may resume it.

        A caller that is cancelled keeps the Outputs, to abort it and to wait for its end before the lease is settled.
        """
        if self._is_closed:
            raise IngressStoppingError(f"this ingress is stopping; nothing is submitted to replica {replica_id}")
        channel = self._channels.get(replica_id)
        if channel is None:
            channel = self._channels[replica_id] = _Channel(self, self._transport, replica_id)
        return channel.start(requests, num_blocks, keep)

    async def submit(self, replica_id: str, requests: list[GenerateRequest], num_blocks: int) -> Outputs:
        """`start`, then `Outputs.accepted`. A caller that is cancelled meanwhile aborts the request."""
        outputs = self.start(replica_id, requests, num_blocks)
        try:
            await outputs.accepted()
        except asyncio.CancelledError:
            outputs.abort()
            raise
        return outputs

    def expire(self, error: Exception) -> int:
        """Every consumer hears ``error``: see `Outputs.expire`. Returns how many requests that are."""
        running = {choice.outputs for channel in self._channels.values() for choice in channel._choices.values()}
        for outputs in running:
            outputs.expire(error)
        return len(running)

    async def call_each(self, replica_ids: Iterable[str], method: str, *args: Any) -> dict[str, Any]:
        """Calls all of them at once. Replica -> the result, or the exception: also ReplicaUnreachableError in time."""

        async def call(replica_id: str) -> Any:
            try:
                async with asyncio.timeout(self.options.call_seconds):
                    return await self._transport.call(replica_id, method, *args)
            except TimeoutError:
                return ReplicaUnreachableError(f"no answer to {method} for {self.options.call_seconds:g} s")
            except Exception as error:  # for the caller to judge
                return error

        asked = list(dict.fromkeys(replica_ids))
        return dict(zip(asked, await asyncio.gather(*map(call, asked)), strict=True))

    @property
    def replica_ids(self) -> list[str]:
        """Replicas with an open channel."""
        return list(self._channels)

    async def close(self) -> None:
        """Ends every request that is left with IngressStoppingError, and tells the replicas."""
        self._is_closed = True
        for channel in list(self._channels.values()):
            channel.lose(IngressStoppingError(f"this ingress is stopping; what ran on {channel.replica_id} is aborted"))
        while self._tasks:
            await asyncio.wait(self._tasks)

    def _remove(self, channel: _Channel) -> None:
        if self._channels.get(channel.replica_id) is channel:
            del self._channels[channel.replica_id]

    def _spawn(self, coroutine: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.get_running_loop().create_task(coroutine, context=contextvars.Context())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task


_Submit = tuple[Outputs, tuple[int, list[GenerateRequest], int, Keep | None]]
"""Where its outputs go, and what ChannelHub.submit is told: first key, choices, blocks, what to keep."""


class _Choice(NamedTuple):
    outputs: Outputs
    choice_index: int
    num_cached_tokens: int = 0


class _Channel:
    """From the first submit to a replica until the replica is lost, or ends the stream with nothing left to come."""

    def __init__(self, channels: Channels, transport: Transport, replica_id: str) -> None:
        loop = asyncio.get_running_loop()
        self.replica_id = replica_id
        self.seen = 0
        """Number of the last message."""
        self._channels = channels
        self._options = channels.options
        self._transport = transport
        self._choices: dict[int, _Choice] = {}
        self._num_keys = 0
        self._unsent: dict[bool, list[_Submit]] = {False: [], True: []}
        """By whether a grammar has to be compiled, for which a call may wait: the others go past it."""
        self._num_submit_calls = {False: 0, True: 0}
        self._aborts: set[int] = set()
        """Keys whose abort the replica has not confirmed."""
        self._heard_at = loop.time()
        self._is_over = False
        self._opened: asyncio.Future[int] = loop.create_future()
        """The id that the replica gave this channel."""
        self._due = asyncio.Event()
        """There is something to tell the replica."""
        self._tasks: set[asyncio.Task[None]] = set()
        """Cancelled at the end of the channel; the reader of a stream is none of them."""
        self._spawn(self._run())
        self._spawn(self._tell())

    def _spawn(self, coroutine: Coroutine[Any, Any, None]) -> None:
        task = self._channels._spawn(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    # ---- what the requests do ------------------------------------------------------------------------------------

    def start(self, requests: list[GenerateRequest], num_blocks: int, keep: Keep | None) -> Outputs:
        first_key = self._num_keys
        self._num_keys += len(requests)
        outputs = Outputs(self, first_key, requests)
        # Before the call: a message may arrive before its reply.
        for i, request in enumerate(requests):
            self._choices[first_key + i] = _Choice(outputs, request.choice_index)
        compiles = any(request.sampling.grammar is not None for request in requests)
        self._unsent[compiles].append((outputs, (first_key, requests, num_blocks, keep)))
        if self._num_submit_calls[compiles] < MAX_SUBMIT_CALLS:
            self._num_submit_calls[compiles] += 1
            self._spawn(self._submit(compiles))
        return outputs

    def abort(self, keys: set[int]) -> None:
        self._aborts |= keys
        self._due.set()

    async def _submit(self, compiles: bool) -> None:
        """Sends all that wait, as one call, until nothing waits: calls cost more than what they carry."""
        try:
            channel_id = await asyncio.shield(self._opened)
            while self._unsent[compiles]:
                sent, self._unsent[compiles] = self._unsent[compiles], []
                await self._submit_all(channel_id, sent)
        except ReplicaLostError as error:
            unsent, self._unsent[compiles] = self._unsent[compiles], []
            for outputs, (first_key, requests, *_) in unsent:
                self._refused(outputs, range(first_key, first_key + len(requests)), error)
        finally:
            self._num_submit_calls[compiles] -= 1

    async def _submit_all(self, channel_id: int, sent: list[_Submit]) -> None:
        answers: list[Exception | None]
        try:
            answers = await self._call_twice("submit_all", channel_id, [submit for _, submit in sent])
        except Exception as error:
            answers = [error] * len(sent)
        for (outputs, (first_key, requests, *_)), answer in zip(sent, answers, strict=True):
            if answer is None:
                outputs._accept()
            else:
                self._refused(outputs, range(first_key, first_key + len(requests)), answer)

    def _refused(self, outputs: Outputs, keys: range, error: Exception) -> None:
        is_unreachable = isinstance(error, ReplicaUnreachableError)
        if is_unreachable and outputs.has_output:
            return outputs._accept()  # both replies were lost, and it runs
        if is_unreachable or not isinstance(error, RaggedServeError):
            self.abort(set(keys))  # it may run
        for key in keys:
            self._choices.pop(key, None)
        return outputs._fail(error)

    # ---- the stream ----------------------------------------------------------------------------------------------

    async def _run(self) -> None:
        try:
            self._opened.set_result(await self._open())
            await self._read_streams()
        except asyncio.CancelledError:
            raise
        except ReplicaLostError as error:
            self.lose(error)
        except Exception as error:
            logger.exception("the channel to replica %s failed", self.replica_id)
            self.lose(ReplicaLostError(f"replica {self.replica_id}: {type(error).__name__}: {error}"))
        else:
            self._close()

    async def _open(self) -> int:
        """Raises ReplicaLostError."""
        try:
            async with asyncio.timeout(self._options.lost_seconds):
                channel_id: int = await self._call_twice("open_channel", self._channels.ingress_id)
                return channel_id
        except TimeoutError:
            seconds = self._options.lost_seconds
            raise ReplicaLostError(f"replica {self.replica_id} opens no channel for {seconds:g} s") from None

    async def _read_streams(self) -> None:
        """Returns when a stream has ended and nothing more is to come; raises ReplicaLostError."""
        loop, options = asyncio.get_running_loop(), self._options
        num_empty = 0
        self._heard_at = loop.time()
        while True:
            last = self.seen, self._heard_at
            trouble = await self._read_stream()
            if trouble is None and not self._choices:
                return
            if trouble is not None and not isinstance(trouble, ReplicaUnreachableError):
                raise trouble
            silence = loop.time() - self._heard_at
            if silence >= options.lost_seconds:
                raise ReplicaLostError(f"replica {self.replica_id} is silent for {silence:.1f} s: {trouble}")
            if trouble is not None:
                logger.info("the stream of replica %s is opened again: %s", self.replica_id, trouble)
            num_empty = num_empty + 1 if (self.seen, self._heard_at) == last else 0
            if num_empty:
                await asyncio.sleep(min(MAX_BACKOFF_SECONDS, 0.01 * 2 ** min(num_empty, 10)))

    async def _read_stream(self) -> Exception | None:
        """Reads one stream to its end. Returns what broke it."""
        loop, options = asyncio.get_running_loop(), self._options
        opened_at = loop.time()
        reader = self._channels._spawn(self._take_all())
        try:
            while not reader.done():
                due = max(opened_at, self._heard_at) + options.silence_seconds
                if loop.time() >= due:
                    break
                # The read itself is never waited for with a timeout: one that is cancelled may lose a message.
                await asyncio.wait({reader}, timeout=due - loop.time())
                late = loop.time() - due
                if late > options.silence_seconds / 2:
                    self._heard_at += late  # this loop stood still: what has come could not be read
                    opened_at += late
        finally:
            reader.cancel()
        if not reader.done():
            await asyncio.wait({reader}, timeout=options.call_seconds)
            return ReplicaUnreachableError(f"no message for {options.silence_seconds:g} s")
        if reader.cancelled():
            # Not by us: whoever cancels the call at the other end makes this end raise CancelledError.
            return ReplicaUnreachableError("the stream was cancelled")
        error = reader.exception()
        if error is None or isinstance(error, ReplicaLostError):
            return error
        raise error

    async def _take_all(self) -> None:
        stream = self._transport.stream(self.replica_id, "outputs", self._opened.result(), self.seen)
        async with contextlib.aclosing(stream):
            async for message in stream:
                self._take(message)

    def _take(self, message: Message) -> None:
        number, plain, rich = message
        self._heard_at = asyncio.get_running_loop().time()
        if number <= self.seen:
            return  # a heart beat, or what we have
        if number > self.seen + 1:
            raise ReplicaUnreachableError(f"message {number} came after {self.seen}")
        self.seen = number
        choices = self._choices
        for key, token_id in zip(*[iter(plain)] * 2, strict=True):
            # Not there: its submit seemed to fail, and it was aborted.
            if (choice := choices.get(key)) is not None:
                outputs, choice_index, num_cached = choice
                outputs._arrived.append(
                    TokenOutput(outputs.request_id, choice_index, (token_id,), None, None, None, None, num_cached)
                )
                if outputs._waiter is not None:
                    outputs._wake()
                elif len(outputs._arrived) > self._channels.max_behind:
                    outputs._fall_behind(self._channels.max_behind)
        for entry in rich:
            if (choice := choices.get(entry[0])) is not None:
                self._take_rich(choice, entry)
        if number % self._options.ack_messages == 0:
            self._due.set()

    def _take_rich(self, choice: _Choice, entry: tuple[Any, ...]) -> None:
        key, outputs = entry[0], choice.outputs
        output = decode(entry, outputs.request_id, choice.choice_index)
        outputs._arrived.append(output)
        if outputs._waiter is not None:
            outputs._wake()
        elif len(outputs._arrived) > self._channels.max_behind:
            outputs._fall_behind(self._channels.max_behind)
        if output.finish_reason is not None:
            del self._choices[key]
            outputs._end_choice(choice.choice_index)
        elif output.num_cached_tokens != choice.num_cached_tokens:
            self._choices[key] = choice._replace(num_cached_tokens=output.num_cached_tokens)

    # ---- what the replica is told --------------------------------------------------------------------------------

    async def _tell(self) -> None:
        """Acknowledgements and aborts, in one call at a time. One that fails is made again: the stream says who lives."""
        loop, options = asyncio.get_running_loop(), self._options
        channel_id = await asyncio.shield(self._opened)
        num_failed = 0
        while True:
            timer = loop.call_later(options.ack_seconds, self._due.set)
            try:
                await self._due.wait()
            finally:
                timer.cancel()
            self._due.clear()
            aborts = tuple(self._aborts)
            try:
                await self._call("ack", channel_id, self.seen, aborts)
            except ChannelLostError as error:
                return self.lose(error)
            except Exception as error:
                num_failed += 1
                logger.info("replica %s was not told (%d times): %s", self.replica_id, num_failed, error)
                if aborts:
                    loop.call_later(min(MAX_BACKOFF_SECONDS, 0.01 * 2 ** min(num_failed, 10)), self._due.set)
            else:
                num_failed = 0
                self._aborts.difference_update(aborts)

    async def _call(self, method: str, *args: Any) -> Any:
        """One call. Raises ReplicaUnreachableError after call_seconds."""
        try:
            async with asyncio.timeout(self._options.call_seconds):
                return await self._transport.call(self.replica_id, method, *args)
        except TimeoutError as error:
            raise ReplicaUnreachableError(f"no answer to {method} for {self._options.call_seconds:g} s") from error
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if task is None or task.cancelling():
                raise
            raise ReplicaUnreachableError(f"{method} was cancelled by somebody else") from None

    async def _call_twice(self, method: str, *args: Any) -> Any:
        """A call that may run twice."""
        try:
            return await self._call(method, *args)
        except ReplicaUnreachableError:
            return await self._call(method, *args)

    # ---- the end -------------------------------------------------------------------------------------------------

    def lose(self, error: ReplicaLostError) -> None:
        """Every request on it hears of it."""
        if self._is_over:
            return
        lost, self._choices = self._choices, {}
        if lost:
            logger.warning("%d choices on replica %s are lost: %s", len(lost), self.replica_id, error)
        for outputs in {choice.outputs for choice in lost.values()}:
            outputs._fail(error)
        if not self._opened.done():
            self._opened.set_exception(error)
            self._opened.exception()
        self._close()

    def _close(self) -> None:
        self._is_over = True
        self._channels._remove(self)
        if self._opened.done() and self._opened.exception() is None:
            self._channels._spawn(self._say_goodbye(self._opened.result()))
        for task in list(self._tasks):
            if task is not asyncio.current_task():
                task.cancel()

    async def _say_goodbye(self, channel_id: int) -> None:
        """Lets the replica forget the channel now, and not after lease_seconds. One that hangs hears it when it goes on."""
        loop = asyncio.get_running_loop()
        until = loop.time() + GOODBYE_SECONDS
        while True:
            try:
                return await self._call("close_channel", channel_id)
            except Exception as error:
                is_open = isinstance(error, ReplicaUnreachableError) and not self._channels._is_closed
                if not is_open or loop.time() >= until:
                    logger.info("replica %s was not told of the channel's end: %s", self.replica_id, error)
                    return None
            await asyncio.sleep(MAX_BACKOFF_SECONDS)
