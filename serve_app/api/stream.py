"""GenerationStream: the outputs of one prompt's choices, wherever they are computed. Knows leases and channels; knows no
HTTP, no text.

    lease -> submit -> outputs ... -> [replica lost, or it refused: lease again, submit with what was emitted] -> end

The reader sees one stream: nothing twice and nothing left out, since each attempt begins behind the tokens that the reader
has. However the reader goes away, the replica is told to end the request, and the lease is settled once it has.

How often and how long that goes on, and when the request itself is to blame, is failover.py's. A replica with the numerics
of the first one comes first; on another one the tokens before and after the loss may not be those of one undisturbed run.
"""

from __future__ import annotations

import asyncio
import contextvars
import dataclasses
import hashlib
from collections.abc import AsyncIterator, Sequence
from typing import Protocol

from serve_app.api.failover import Failover, Journey
from serve_app.api.request_notes import AttemptNote, begin_attempt
from serve_app.api.resume import Begun
from serve_app.engine.config import FAST_MODE
from serve_app.engine.request import GenerateRequest, TokenOutput
from serve_app.errors import (
    ChannelLostError,
    DeadlineExceededError,
    EngineUnavailableError,
    IngressStoppingError,
    LeaseRefusedError,
    OverloadedError,
    ReplicaDrainedError,
    ReplicaLostError,
    ServerDrainingError,
)
from serve_app.logs import about_stream, get_logger
from serve_app.replica.channel import Channels, Outputs
from serve_app.replica.kept import Keep
from serve_app.routing.leases import Lease, LeaseRequest

logger = get_logger(__name__)

PAUSE_SECONDS = 0.02
"""Before a request that was hindered asks again; longer each time, up to MAX_PAUSE_SECONDS. Reports come a few times a
second."""
MAX_PAUSE_SECONDS = 0.5
LATE_SECONDS = 0.25
"""Router and engine end a request at its deadline. One that they left alone so much longer is ended here: its replica
hangs, or computes a very long step."""


class Leases(Protocol):
    """What a stream wants of `RouterClient`."""

    @property
    def holder_id(self) -> str: ...

    async def lease(self, request: LeaseRequest) -> Lease: ...

    def settle(self, lease: Lease, num_output_tokens: int | None) -> None: ...

    def replica_lost(self, replica_id: str) -> None: ...


class GenerationStream:
    """One prompt, all its choices. Made for each request; read once.

    ``requests``: the choices, resolved and with a seed. ``max_output_tokens``: of each, what the lease is for.
    ``block_size``: of the replicas, for the lease. ``keep``: its client may resume it; each attempt's replica keeps it.
    ``begun``: where it goes on.
    """

    def __init__(
        self,
        requests: Sequence[GenerateRequest],
        leases: Leases,
        channels: Channels,
        *,
        block_size: int,
        prefix_hashes: tuple[int, ...] = (),
        failover: Failover | None = None,
        keep: Keep | None = None,
        begun: Begun | None = None,
    ) -> None:
        self.request_id = requests[0].request_id
        self.num_attempts = 0
        """Submits so far."""
        self.replica_id: str | None = None
        """Where it runs, or ran last."""
        self.leased_at: float | None = None
        """When it first got room on a replica: seconds of the event loop's clock."""
        self.attempts: list[AttemptNote] = []
        """What became of each."""
        self._leases = leases
        self._channels = channels
        self._block_size = block_size
        self._prefix_hashes = prefix_hashes
        self._open = {request.choice_index: request for request in requests}
        """Choices that have not ended, each with what it has emitted."""
        self._outputs: Outputs | None = None
        self._failure: ReplicaLostError | None = None
        """What the engine said instead of an output."""
        self._failover = failover or Failover()
        self._fingerprint = None if begun is None else begun.fingerprint
        """Numerics of the replica that made the first token; None before it, or not known."""
        self._emitted: dict[int, list[int]] = {request.choice_index: [] for request in requests}
        self._keep = keep
        self._ended: dict[int, TokenOutput] = {}
        """Choices that have ended, each with all its tokens: for the next attempt to keep. Empty if nothing is kept."""
        self._replay: list[TokenOutput] = []
        """What is to be shown before anything is generated."""
        self._goes_on = begun is not None
        """It has tokens of an earlier stream, and none of its own."""
        if begun is not None:
            self._begin_with(begun)
        loop = asyncio.get_running_loop()
        remaining_ms = requests[0].remaining_ms
        self._deadline = None if remaining_ms is None else loop.time() + remaining_ms / 1000.0

    def end_choice(self, choice_index: int) -> None:
        """The reader wants no more of it (a stop string matched). What still comes of it is not shown."""
        if self._open.pop(choice_index, None) is not None:
            self._has_ended(choice_index, None)
        if self._outputs is not None:
            self._outputs.abort(choice_index)

    async def batches(self) -> AsyncIterator[list[TokenOutput]]:
        """Outputs as they come, until every choice has ended. Close it (``aclose``) to give up.

        Raises what the ledger or the engine answers, DeadlineExceededError, and where a replica was lost what
        `Journey.lost` raises.
        """
        journey = Journey(self._failover, len(self._open))
        avoid: frozenset[str] = frozenset()
        num_hindered = 0
        if self._replay and (taken := self._take(self._replay)) is not None:
            yield taken
        while self._open:
            note = begin_attempt(self.attempts, self._attempt_name, self.num_attempts, self._num_emitted)
            try:
                await journey.begin_attempt()
                lease = await self._lease(avoid, journey)
                note.grant(lease)
                if self.leased_at is None:
                    self.leased_at = asyncio.get_running_loop().time()
                attempt = self._attempt(lease)
                try:
                    self._outputs = outputs = attempt.start(self._kept(lease))
                    while self._open and (batch := await outputs.next()):
                        if (taken := self._take(batch)) is not None:
                            if note.first_at is None:
                                note.first_at = asyncio.get_running_loop().time()
                            if self._fingerprint is None:
                                self._fingerprint = lease.fingerprint
                            if journey.is_moving or self._goes_on:
                                num_hindered = 0
                                if journey.progress(self._num_emitted) or self._goes_on:
                                    self._check_numerics(lease)
                                self._goes_on = False
                            yield taken
                        if self._failure is not None:
                            raise self._failure
                except ServerDrainingError:
                    raise
                except EngineUnavailableError as error:  # its engine takes nothing: the process is about to end
                    raise ReplicaLostError(f"replica {lease.replica_id}: {error}") from error
                finally:
                    self._failure = None
                    attempt.finish(self._num_emitted if not self._open else None)
            except IngressStoppingError:
                raise
            except ReplicaLostError as error:
                note.failure = error
                about = about_stream(self.request_id, attempt=self.num_attempts, replica=lease.replica_id)
                logger.warning("%s", error, extra=about)
                if error.may_be_a_death:
                    self._leases.replica_lost(lease.replica_id)
                # A channel that was given up is made anew; who drains or does not answer is not asked again.
                avoid = frozenset() if isinstance(error, ChannelLostError) else frozenset({lease.replica_id})
                journey.lost(error, self._num_emitted)
            except (LeaseRefusedError, _Hindered) as error:
                note.failure = error
                logger.info("%s", error, extra=about_stream(self.request_id))
                journey.end_attempt()
                journey.hindered()
                journey.check_time(error)
                num_hindered += 1
                avoid = frozenset()  # better the one that was lost than none
                await asyncio.sleep(min(MAX_PAUSE_SECONDS, PAUSE_SECONDS * num_hindered))
            finally:
                journey.end_attempt()
                note.end(self._num_emitted)

    # ---- parts ---------------------------------------------------------------------------------------------------

    @property
    def _attempt_name(self) -> str:
        """Each attempt asks under a name of its own: an answer to an earlier one is not for this one."""
        return f"{self.request_id}#{self.num_attempts}"

    @property
    def _num_emitted(self) -> int:
        return sum(map(len, self._emitted.values()))

    async def _lease(self, avoid: frozenset[str], journey: Journey) -> Lease:
        """Raises _Hindered where a request that has already been accepted is told what new ones are told."""
        try:
            async with asyncio.timeout(journey.seconds_left):
                return await self._leases.lease(self._wanted(avoid, is_continuation=journey.is_moving))
        except TimeoutError:
            raise journey.give_up("no replica had room") from None
        except ServerDrainingError:
            raise
        except (OverloadedError, EngineUnavailableError) as error:
            if not journey.is_moving:
                raise
            raise _Hindered(str(error)) from error

    def _attempt(self, lease: Lease) -> _Attempt:
        try:
            submitted = self._submitted(lease)
        except DeadlineExceededError:
            self._leases.settle(lease, None)
            raise
        self.num_attempts += 1
        self.replica_id = lease.replica_id
        return _Attempt(self._leases, lease, self._channels, submitted, self._block_size, self._deadline)

    def _check_numerics(self, lease: Lease) -> None:
        """Of the first tokens after a loss: what is promised of them."""
        if lease.fingerprint.startswith(FAST_MODE):
            self._failover.counters["resumed_in_fast_mode"] += 1
            logger.info(
                "goes on in fast mode: a valid continuation, perhaps not the same bytes",
                extra=about_stream(self.request_id),
            )
        if self._fingerprint and lease.fingerprint and lease.fingerprint != self._fingerprint:
            self._failover.counters["resumed_with_other_numerics"] += 1
            logger.warning(
                "goes on with numerics %s after %s: a valid continuation, not the same bytes",
                lease.fingerprint,
                self._fingerprint,
                extra=about_stream(self.request_id),
            )
            self._fingerprint = lease.fingerprint

    def _wanted(self, not_on: frozenset[str], *, is_continuation: bool) -> LeaseRequest:
        first = next(iter(self._open.values()))
        assert first.sampling.max_tokens is not None
        return LeaseRequest(
            self._attempt_name,
            self._leases.holder_id,
            len(first.prompt_token_ids),
            first.sampling.max_tokens if first.pooling is None else 0,
            len(self._open),
            first.priority,
            self._prefix_hashes,
            not_on,
            self._remaining_ms(),
            self._fingerprint or None,
            is_continuation,
        )

    def _submitted(self, lease: Lease) -> list[GenerateRequest]:
        remaining_ms = self._remaining_ms()
        return [
            dataclasses.replace(
                request,
                output_token_ids=tuple(self._emitted[choice_index]),
                lease_id=lease.lease_id,
                attempt=self.num_attempts,
                remaining_ms=remaining_ms,
            )
            for choice_index, request in self._open.items()
        ]

    def _begin_with(self, begun: Begun) -> None:
        self._replay = begun.replay
        self._ended = {output.choice_index: output for output in begun.ended}
        for choice_index, token_ids in begun.emitted.items():
            self._emitted[choice_index] += token_ids
        for choice_index, shown in begun.shown.items():
            if shown.has_ended:
                del self._open[choice_index]

    def _kept(self, lease: Lease) -> Keep | None:
        """What the next attempt's replica keeps beside the tokens that are submitted to it."""
        if self._keep is None:
            return None
        fingerprint = self._fingerprint or lease.fingerprint
        return self._keep._replace(ended=tuple(self._ended.values()), fingerprint=fingerprint)

    def _remaining_ms(self) -> float | None:
        if self._deadline is None:
            return None
        remaining = (self._deadline - asyncio.get_running_loop().time()) * 1000.0
        if remaining <= 0:
            raise _late()
        return remaining

    def _take(self, batch: list[TokenOutput]) -> list[TokenOutput] | None:
        """What the reader should see of it. An engine that stops is a replica that is lost: told in ``_failure``, since
        what came before that in the same batch is shown."""
        shown = []
        for output in batch:
            if output.choice_index not in self._open:
                continue
            if output.error_code in (EngineUnavailableError.code, ReplicaDrainedError.code):
                kind = ReplicaLostError if output.error_code == EngineUnavailableError.code else ReplicaDrainedError
                self._failure = kind(f"replica {self.replica_id}: {output.error}")
                break
            self._emitted[output.choice_index] += output.token_ids
            if output.finish_reason is not None:
                del self._open[output.choice_index]
                self._has_ended(output.choice_index, output)
            shown.append(output)
        return shown or None

    def _has_ended(self, choice_index: int, last: TokenOutput | None) -> None:
        """``last``: its last output; None: a stop string ended it."""
        if self._keep is not None:
            output = TokenOutput("", choice_index, tuple(self._emitted[choice_index]))
            if last is not None:
                output = output._replace(finish_reason=last.finish_reason, stop_token_id=last.stop_token_id)
            self._ended[choice_index] = output


class _Hindered(Exception):
    """A request that has lost its replica finds no place now."""


class _Attempt:
    """One lease and what runs under it."""

    def __init__(
        self,
        leases: Leases,
        lease: Lease,
        channels: Channels,
        requests: list[GenerateRequest],
        block_size: int,
        deadline: float | None,
    ) -> None:
        self._leases = leases
        self._lease = lease
        self._channels = channels
        self._requests = requests
        self._num_blocks = -(-lease.num_tokens // block_size)
        self._outputs: Outputs | None = None
        self._deadline = deadline
        self._timer: asyncio.TimerHandle | None = None

    def start(self, keep: Keep | None) -> Outputs:
        self._outputs = self._channels.start(self._lease.replica_id, self._requests, self._num_blocks, keep)
        if self._deadline is not None:
            loop = asyncio.get_running_loop()
            self._timer = loop.call_at(self._deadline + LATE_SECONDS, self._outputs.expire, _late())
        return self._outputs

    def finish(self, num_output_tokens: int | None) -> None:
        """Aborts what still runs. The lease is settled when the replica has ended it: at once, or in a task of its
        own, since the reader may be cancelled, and then every await in it raises."""
        if self._timer is not None:
            self._timer.cancel()
        if self._outputs is None or self._outputs.has_ended:
            self._leases.settle(self._lease, num_output_tokens)
            return
        self._outputs.abort()
        task = asyncio.get_running_loop().create_task(
            self._settle_later(self._outputs, num_output_tokens), context=contextvars.Context()
        )
        _settling.add(task)
        task.add_done_callback(_settling.discard)

    async def _settle_later(self, outputs: Outputs, num_output_tokens: int | None) -> None:
        await outputs.ended()
        self._leases.settle(self._lease, num_output_tokens)


def _late() -> DeadlineExceededError:
    return DeadlineExceededError("the deadline of this request has passed")


_settling: set[asyncio.Task[None]] = set()
"""Tasks that wait for a replica to end an aborted request; the event loop keeps only weak references."""


def prefix_hashes(token_ids: Sequence[int], block_size: int, salt: str) -> tuple[int, ...]:
    """One 64-bit hash per full block of a prompt, each over the whole prefix up to there and the salt.

    Only the router compares them, with those of other requests: any stable hash will do. BLAKE2b (RFC 7693).
    """
    hashes = []
    parent = salt.encode("utf-8", errors="surrogatepass")
    for start in range(0, len(token_ids) - block_size + 1, block_size):
        block = b",".join(b"%d" % token_id for token_id in token_ids[start : start + block_size])
        parent = hashlib.blake2b(parent + b"|" + block, digest_size=8).digest()
        hashes.append(int.from_bytes(parent, "little"))
    return tuple(hashes)
