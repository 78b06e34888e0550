"""The replica end of all channels: one for each ingress, one stream of messages in each.

    engine thread   one call of the sink per step, which posts it to the event loop
    event loop      outputs sorted into the channels' outboxes, one wake-up per channel; everything else here

Knows the engine by submit_to and abort, and the table of leases. Knows no Ray: the replica's deployment class hands its
calls on to these methods. Rules:

- Every call may come twice, late, or not at all. A submit is known by its channel and first key, an abort may overtake
  its submit, an acknowledgement may be older than the last one.
- Outputs are kept until they are acknowledged, whether a stream is open or not, and sent again on a stream that is
  opened from an older number. A newer stream ends the older one.
- An ingress that is not heard for lease_seconds is given up: its requests are aborted, its channel is unknown from then
  on (ChannelLostError). One that is heard but does not acknowledge keeps at most max_unread_tokens waiting.
- A replica that leaves ends each stream with the last choice of its ingress. What is left at the end of its time is
  ended with ReplicaDrainedError, and goes on elsewhere.
- A lease ends when the engine has ended every choice of its request, and not before.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import AsyncGenerator, Callable, Iterable
from concurrent.futures import Future
from typing import Any, Protocol

from serve_app.engine.request import FinishReason, GenerateRequest, TokenOutput
from serve_app.errors import (
    ChannelLostError,
    IngressStalledError,
    InvalidParameterError,
    RaggedServeError,
    ReplicaDrainedError,
    StreamResumedError,
)
from serve_app.logs import about_stream, get_logger
from serve_app.replica.kept import Keep, KeptPrompt, KeptRequests, Record
from serve_app.replica.messages import HEARTBEAT, ChannelOptions, Message, Outbox
from serve_app.replica.request_history import RequestHistory

logger = get_logger(__name__)

MAX_REMEMBERED = 4096
"""Ended submits, and aborts of submits that have not come, remembered for each channel. They differ by a few calls."""


class EngineSeam(Protocol):
    """What is used of AsyncEngine."""

    def submit_to(self, requests: list[GenerateRequest], sink: Callable[[list[TokenOutput]], None]) -> Future[None]: ...

    def abort(self, request_id: str, choice_index: int | None = None) -> None: ...


class LeaseBook(Protocol):
    """What is used of LeaseTable."""

    def open(self, lease_id: str, holder_id: str, num_blocks: int, now: float, num_seqs: int = 1) -> Any: ...

    def end(self, lease_id: str) -> Any: ...

    def grow(self, lease_id: str, num_blocks: int) -> Any: ...

    def renew(self, holder_id: str, now: float) -> Any: ...


class _Submission:
    """One submit, from its arrival until the engine has ended every choice of it."""

    def __init__(
        self, channel: _Channel, first_key: int, requests: list[GenerateRequest], accepted: asyncio.Future[None]
    ) -> None:
        first = requests[0]
        assert first.lease_id is not None
        self.channel = channel
        self.first_key = first_key
        self.request_id = first.request_id
        self.attempt = first.attempt
        self.lease_id = first.lease_id
        self.choices = {first_key + i: request.choice_index for i, request in enumerate(requests)}
        """Key -> choice_index, of the choices that have not ended."""
        self.num_prompt_tokens = len(first.prompt_token_ids)
        self.num_output_tokens = {first_key + i: len(request.output_token_ids) for i, request in enumerate(requests)}
        """By key, of all choices."""
        self.accepted = accepted
        self.is_superseded = False
        """A later attempt has aborted it; under its id there may already run that one."""
        self.error: RaggedServeError | None = None
        """Why it was aborted, where that was not the ingress's wish."""
        self.keep: Keep | None = None
        """Of one that its client may resume."""
        self.record: Record | None = None
        self.ended: asyncio.Future[None] | None = None
        """Where somebody waits for its end."""


class _Channel:
    def __init__(self, channel_id: int, ingress_id: str, window_messages: int, now: float) -> None:
        self.channel_id = channel_id
        self.ingress_id = ingress_id
        self.heard_at = now
        self.outbox = Outbox(window_messages)
        self.submissions: dict[int, _Submission] = {}
        """First key -> a submit whose choices have not all ended."""
        self.keys: dict[int, _Submission] = {}
        """Key -> the same, of the choices that have not ended."""
        self.ended: dict[int, None] = {}
        """First keys of submits that are over, latest last."""
        self.early_aborts: dict[int, None] = {}
        """Keys aborted before their submit came, latest last."""
        self.stream_number = 0
        """Counts the streams opened; the latest one is served, the others end."""
        self.waiter: asyncio.Future[None] | None = None
        """Where the stream sleeps."""
        self.was_idle = False
        """No message since the last tick of the clock."""
        self.is_beat_due = False
        self.is_gone = False

    def wake(self) -> None:
        waiter, self.waiter = self.waiter, None
        if waiter is not None and not waiter.done():
            waiter.set_result(None)


class ChannelHub:
    """Made on the replica's event loop, on which every method must be called. Times are the loop's seconds."""

    def __init__(
        self,
        engine: EngineSeam,
        table: LeaseBook,
        loop: asyncio.AbstractEventLoop,
        options: ChannelOptions | None = None,
        kept: KeptRequests | None = None,
    ) -> None:
        self.kept = KeptRequests() if kept is None else kept
        self.history: RequestHistory | None = None
        """Where requests are explained."""
        self.is_draining = False
        self.is_over = False
        """The time of the drain is over."""
        self.num_messages = 0
        """Messages put on streams: sent again ones too, heart beats not."""
        self._engine = engine
        self._table = table
        self._loop = loop
        self._options = options or ChannelOptions()
        self._channels: dict[int, _Channel] = {}
        self._channel_ids = itertools.count(1)
        self._choices: dict[tuple[str, int], tuple[_Submission, int]] = {}
        """(request id, choice_index) -> the submit and key that the engine's outputs of it belong to."""
        self._behind: dict[tuple[str, int], list[tuple[_Submission, int]]] = {}
        """The same for submits under an id that has not ended: their outputs come after that one's end."""
        self._latest: dict[str, _Submission] = {}
        """Request id -> the live submit of the highest attempt."""
        self._num_live = 0
        self._tick_due: float | None = None

    # ---- what the ingress calls ----------------------------------------------------------------------------------

    def open_channel(self, ingress_id: str) -> int:
        """A new channel's id. One that is never used goes away by itself."""
        channel = _Channel(next(self._channel_ids), ingress_id, self._options.window_messages, self._loop.time())
        self._channels[channel.channel_id] = channel
        if self._tick_due is None:
            self._schedule_tick()
        return channel.channel_id

    def close_channel(self, channel_id: int) -> None:
        """Aborts what runs for it. Unknown ones are left alone."""
        if (channel := self._channels.get(channel_id)) is not None:
            self._drop(channel)

    async def submit(
        self,
        channel_id: int,
        first_key: int,
        requests: list[GenerateRequest],
        num_blocks: int,
        keep: Keep | None = None,
    ) -> None:
        """Returns when the engine has accepted the choices of one request, whose keys count up from ``first_key``.

        The same submit may come again: it joins the first, or returns if that one has ended. A request id that runs as
        an earlier attempt is aborted first. ``keep``: its client may resume it. Raises ChannelLostError, LeaseRefusedError
        (of the table), StreamResumedError, and what AsyncEngine.submit raises.
        """
        channel = self._heard(channel_id)
        if first_key in channel.ended:
            return
        submission = channel.submissions.get(first_key) or self._start(channel, first_key, requests, num_blocks, keep)
        await asyncio.shield(submission.accepted)

    async def submit_all(
        self, channel_id: int, submits: list[tuple[int, list[GenerateRequest], int, Keep | None]]
    ) -> list[RaggedServeError | None]:
        """`submit` for each (first_key, requests, num_blocks, keep): None, or why it was refused.

        Raises ChannelLostError.
        """
        self._heard(channel_id)
        results = await asyncio.gather(*(self.submit(channel_id, *one) for one in submits), return_exceptions=True)
        answers: list[RaggedServeError | None] = []
        for result in results:
            if result is not None and not isinstance(result, RaggedServeError):
                raise result
            answers.append(result)
        return answers

    def ack(self, channel_id: int, number: int, aborts: Iterable[int] = ()) -> None:
        """All messages up to ``number`` have arrived; the choices with these keys shall end. The ingress lives.

        Raises ChannelLostError.
        """
        channel = self._heard(channel_id)
        channel.outbox.ack(number)
        for key in aborts:
            submission = channel.keys.get(key)
            if submission is None:
                _remember(channel.early_aborts, key)
            elif not submission.is_superseded:
                self._engine.abort(submission.request_id, submission.choices[key])
        channel.wake()  # the window may have opened

    async def outputs(self, channel_id: int, after: int) -> AsyncGenerator[Message, None]:
        """The messages that follow number ``after``, for ever, with a heart beat where there are none.

        Ends after stream_messages or stream_seconds, when a newer stream is opened, when the channel is given up or
        closed, and when the replica drains and nothing is left to run or to send. Raises ChannelLostError.
        """
        channel = self._heard(channel_id)
        outbox, options, loop = channel.outbox, self._options, self._loop
        if after > outbox.number:
            raise ChannelLostError(
                f"message {after} was never sent in channel {channel_id}; the last is {outbox.number}"
            )
        outbox.ack(after)
        number = outbox.acked
        channel.stream_number += 1
        my_number = channel.stream_number
        channel.wake()  # the older stream, to its end
        num_left, ends_at = options.stream_messages, loop.time() + options.stream_seconds
        while num_left > 0 and loop.time() < ends_at and channel.stream_number == my_number and not channel.is_gone:
            number = max(number, outbox.acked)
            message = outbox.message_after(number)
            if message is not None:
                number = message[0]
                num_left -= 1
                self.num_messages += 1
                channel.was_idle = channel.is_beat_due = False
                yield message
            elif self.is_draining and not channel.submissions and not outbox.has_gathered:
                return
            elif channel.is_beat_due:
                channel.is_beat_due = False
                num_left -= 1
                yield HEARTBEAT
            else:
                channel.waiter = loop.create_future()
                await channel.waiter

    async def fetch_kept(self, resume_id: bytes, owner: bytes, ticket: int) -> list[KeptPrompt]:
        """What is kept here of a request that its client resumes; [] if nothing is. See KeptRequests.

        What runs of it for an earlier reader is ended first, and that one is told. Raises UnknownStreamError,
        StreamResumedError. The same call may come again.
        """
        self.kept.fence(resume_id, owner, ticket, self._loop.time())
        live = {s for s, _ in itertools.chain(self._choices.values(), *self._behind.values())}
        running = [s for s in live if s.keep is not None and s.keep.resume_id == resume_id and s.keep.ticket < ticket]
        for submission in running:
            submission.error = StreamResumedError(
                "the client of this stream goes on reading it over another connection"
            )
            submission.ended = submission.ended or self._loop.create_future()
            if not submission.is_superseded:
                self._engine.abort(submission.request_id)
        for submission in running:
            assert submission.ended is not None
            await asyncio.shield(submission.ended)
        return self.kept.fetch(resume_id, self._loop.time())

    def explain(self, stream_ids: list[str]) -> dict[str, list[dict[str, Any]]]:
        """See RequestHistory.tell. Empty where requests are not explained."""
        return {} if self.history is None else self.history.tell(stream_ids)

    # ---- bookings ------------------------------------------------------------------------------------------------

    def grow_leases(self, block_size: int) -> None:
        """Books what answers that outgrew their booking really hold, and their next token if there is one. A lease never
        shrinks.

        Only leases of the policy `expect` grow: `reserve` has booked all that an answer may have.
        """
        for channel in self._channels.values():
            for submission in channel.submissions.values():
                full = submission.num_prompt_tokens // block_size
                lengths = (
                    submission.num_prompt_tokens + n + (key in submission.choices)
                    for key, n in submission.num_output_tokens.items()
                )
                self._table.grow(submission.lease_id, full + sum(-(-length // block_size) - full for length in lengths))

    # ---- life ----------------------------------------------------------------------------------------------------

    def start_draining(self) -> None:
        """From now on a stream ends with the last choice of its ingress. Submits of granted leases are still taken."""
        self.is_draining = True
        for channel in self._channels.values():
            channel.wake()

    def end_drain(self) -> int:
        """What still runs is ended with ReplicaDrainedError, and so is what still comes. Returns how many submits that
        were."""
        self.is_over = True
        self.start_draining()
        left = [s for c in self._channels.values() for s in c.submissions.values() if not s.is_superseded]
        for submission in left:
            submission.error = ReplicaDrainedError("the replica leaves, and its time to drain is over")
            self._engine.abort(submission.request_id)
        return len(left)

    @property
    def is_drained(self) -> bool:
        """Draining, nothing runs, and everything has arrived at an ingress that is still there."""
        return self.is_draining and not self._num_live and all(c.outbox.is_empty for c in self._channels.values())

    @property
    def num_channels(self) -> int:
        return len(self._channels)

    @property
    def num_live(self) -> int:
        """Submits whose choices have not all ended."""
        return self._num_live

    @property
    def num_unread_tokens(self) -> int:
        """Tokens kept for all ingresses until they are acknowledged."""
        return sum(channel.outbox.size for channel in self._channels.values())

    # ---- submits -------------------------------------------------------------------------------------------------

    def _start(
        self,
        channel: _Channel,
        first_key: int,
        requests: list[GenerateRequest],
        num_blocks: int,
        keep: Keep | None,
    ) -> _Submission:
        if self.is_over:
            raise ReplicaDrainedError("the replica leaves and takes nothing any more")
        if not requests or requests[0].lease_id is None:
            raise InvalidParameterError("lease_id", None, "the id of the lease that the request was granted")
        if keep is not None:
            self.kept.check(keep)
        submission = _Submission(channel, first_key, requests, self._loop.create_future())
        self._table.open(submission.lease_id, channel.ingress_id, num_blocks, self._loop.time(), len(requests))
        earlier = self._latest.get(submission.request_id)
        is_latest = earlier is None or earlier.attempt < submission.attempt
        if earlier is not None and is_latest and not earlier.is_superseded:
            earlier.is_superseded = True
            self._engine.abort(earlier.request_id)
        try:
            accepted = self._engine.submit_to(requests, self._sink)
        except BaseException:
            self._table.end(submission.lease_id)
            raise
        if keep is not None:
            submission.keep = keep
            submission.record = self.kept.begin(keep, requests, self._loop.time())
        if self.history is not None:
            self.history.submitted(requests)
        if is_latest:
            self._latest[submission.request_id] = submission
        self._num_live += 1
        channel.submissions[first_key] = submission
        for key, choice_index in submission.choices.items():
            channel.keys[key] = submission
            if key in channel.early_aborts:
                del channel.early_aborts[key]
                self._engine.abort(submission.request_id, choice_index)
            name = (submission.request_id, choice_index)
            if name in self._choices:
                self._behind.setdefault(name, []).append((submission, key))
            else:
                self._choices[name] = (submission, key)
        accepted.add_done_callback(lambda future: self._post(self._settle, submission, future))
        return submission

    def _settle(self, submission: _Submission, future: Future[None]) -> None:
        """The engine has accepted or refused it. Its first outputs may have come before this news."""
        error = future.exception()
        if logger.isEnabledFor(logging.DEBUG):
            fields = {"attempt": submission.attempt, "lease": submission.lease_id}
            what = "accepted" if error is None else f"refused: {error}"
            logger.debug("%s", what, extra=about_stream(submission.request_id, **fields))
        if error is None:
            if self.history is not None:
                self.history.accepted(submission.request_id, submission.attempt)
            submission.accepted.set_result(None)
            return
        if self.history is not None:
            self.history.refused(submission.request_id, submission.attempt, error)
        for key in list(submission.choices):
            self._forget(submission, key)
        self._end(submission)
        del submission.channel.ended[submission.first_key]  # sent again, it is judged again
        submission.accepted.set_exception(error)
        submission.accepted.exception()  # the caller may have gone

    def _forget(self, submission: _Submission, key: int) -> None:
        """One choice is over: what comes under its name now is for the submit behind it."""
        name = (submission.request_id, submission.choices.pop(key))
        del submission.channel.keys[key]
        behind = self._behind.get(name, [])
        if self._choices.get(name) != (submission, key):
            behind.remove((submission, key))
        elif behind:
            self._choices[name] = behind.pop(0)
        else:
            del self._choices[name]
        if not behind:
            self._behind.pop(name, None)

    def _end(self, submission: _Submission) -> None:
        self._table.end(submission.lease_id)
        self._num_live -= 1
        del submission.channel.submissions[submission.first_key]
        _remember(submission.channel.ended, submission.first_key)
        if self._latest.get(submission.request_id) is submission:
            del self._latest[submission.request_id]
        if submission.record is not None:
            self.kept.end(submission.record, self._loop.time())
        if submission.ended is not None:
            submission.ended.set_result(None)

    # ---- outputs -------------------------------------------------------------------------------------------------

    def _sink(self, outputs: list[TokenOutput]) -> None:
        """On the engine thread. Raises RuntimeError if the loop is closed: the engine then aborts the requests."""
        self._loop.call_soon_threadsafe(self._deliver, outputs)

    def _post(self, function: Callable[..., None], *args: Any) -> None:
        """From any thread. Where the loop is closed nobody waits any more."""
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(function, *args)

    def _deliver(self, outputs: list[TokenOutput]) -> None:
        """One step's outputs of all channels."""
        choices = self._choices
        for output in outputs:
            found = choices.get((output[0], output[1]))
            if found is None:
                logger.error("an output of nobody: %s", output)
                continue
            submission, key = found
            submission.num_output_tokens[key] += len(output[2])
            channel = submission.channel
            if submission.record is not None:
                self.kept.add(submission.record, output)
            if output[5] is not None:
                output = self._end_choice(submission, key, output)
            if not channel.is_gone:
                channel.outbox.put(key, output)
        for channel in self._channels.values():
            if channel.outbox.size > self._options.max_unread_tokens:
                self._stall(channel)
            if channel.outbox.has_gathered:
                channel.wake()

    def _end_choice(self, submission: _Submission, key: int, output: TokenOutput) -> TokenOutput:
        assert output.finish_reason is not None
        if self.history is not None:
            reason = str(output.finish_reason)
            self.history.ended(submission.request_id, submission.attempt, output.choice_index, reason)
        if logger.isEnabledFor(logging.DEBUG):
            what = "aborted" if output.finish_reason is FinishReason.ABORT else "ended"
            fields = {"choice": output.choice_index, "reason": str(output.finish_reason), "error": output.error}
            fields["output_tokens"] = submission.num_output_tokens[key]
            logger.debug("%s", what, extra=about_stream(submission.request_id, attempt=submission.attempt, **fields))
        self._forget(submission, key)
        if not submission.choices:
            self._end(submission)
        if submission.error is None or output.finish_reason is not FinishReason.ABORT:
            return output
        error = submission.error
        return output._replace(finish_reason=FinishReason.ERROR, error=str(error), error_code=error.code)

    def _stall(self, channel: _Channel) -> None:
        fresh = [s for s in channel.submissions.values() if s.error is None and not s.is_superseded]
        if not fresh:
            return
        error = IngressStalledError(
            f"{channel.outbox.size} tokens wait for an ingress that does not take them;"
            f" at most {self._options.max_unread_tokens} are kept"
        )
        logger.warning("ingress %s: %s; %d requests are aborted", channel.ingress_id, error, len(fresh))
        for submission in fresh:
            submission.error = error
            self._engine.abort(submission.request_id)

    # ---- the clock -----------------------------------------------------------------------------------------------

    def _heard(self, channel_id: int) -> _Channel:
        channel = self._channels.get(channel_id)
        if channel is None:
            raise ChannelLostError(
                f"channel {channel_id} is not known; an ingress is given up that is silent for"
                f" {self._options.lease_seconds:g} s"
            )
        channel.heard_at = self._loop.time()
        self._table.renew(channel.ingress_id, channel.heard_at)
        return channel

    def _drop(self, channel: _Channel) -> None:
        del self._channels[channel.channel_id]
        channel.is_gone = True
        channel.outbox.clear()
        for submission in channel.submissions.values():
            if not submission.is_superseded:
                self._engine.abort(submission.request_id)
        channel.wake()

    def _schedule_tick(self) -> None:
        self._tick_due = self._loop.time() + self._options.heartbeat_seconds
        self._loop.call_at(self._tick_due, self._tick)

    def _tick(self) -> None:
        now = self._loop.time()
        self.kept.expire(now)
        assert self._tick_due is not None
        late = now - self._tick_due
        """While this loop stood still nobody could be heard."""
        for channel in list(self._channels.values()):
            channel.heard_at += late
            if now - channel.heard_at > self._options.lease_seconds:
                logger.warning(
                    "ingress %s is silent for %.1f s; its %d requests are aborted",
                    channel.ingress_id,
                    now - channel.heard_at,
                    len(channel.submissions),
                )
                self._drop(channel)
                continue
            channel.is_beat_due = channel.was_idle
            channel.was_idle = True
            channel.wake()
        self._tick_due = None
        if self._channels:
            self._schedule_tick()


def _remember(keys: dict[int, None], key: int) -> None:
    keys[key] = None
    if len(keys) > MAX_REMEMBERED:
        del keys[next(iter(keys))]
