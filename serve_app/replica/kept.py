"""What a replica keeps of streams that their clients may resume: tokens, never KV. Pure: the clock is passed in.

    Keep          what a submit says of such a request      ingress -> replica
    KeptRequests  the replica's store: from the submit on, and for keep_seconds after its last prompt has ended here
    KeptPrompt    what `fetch` gives of one prompt          replica -> ingress

Each prompt of a request may have run on another replica, and on several, one after the other. A record holds all that its
attempt knows: the tokens with which it began, and those that it made. So of all records of a prompt the one with the
highest (ticket, attempt) has the most.

A ticket says which reader a submit belongs to: 0 for the first one, a time for each resume. A `fetch` leaves its ticket
here, whether it finds anything or not; a submit with a lower one is refused from then on. So a request never runs for two
readers, however their calls cross.

Bounded: entries, tokens (as messages.size_of counts) and seconds. Beyond: those that ended first go first, then those that
began first, which then run on without being kept.
"""

from __future__ import annotations

import dataclasses
import hmac
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from serve_app.engine.request import FinishReason, GenerateRequest, SamplingParams, TokenLogprobs, TokenOutput
from serve_app.errors import StreamResumedError, UnknownStreamError
from serve_app.replica.messages import size_of

KEEP_SECONDS = 60.0
MAX_ENTRIES = 4096
MAX_TOKENS = 1_000_000
"""Defaults of the configuration's ``resume``."""
FENCE_SECONDS = 60.0
"""A ticket is remembered at least so long: a submit may have waited in the router's queue."""


class Origin(NamedTuple):
    """What the first ingress chose for a request, and a resumed answer must have again."""

    request_id: str
    created: int
    """Seconds since 1970."""
    seeds: tuple[int, ...]
    max_tokens: tuple[int, ...]
    """Of each prompt."""

    @classmethod
    def of(cls, request_id: str, created: int, sampling: Sequence[SamplingParams]) -> Origin:
        """``sampling``: of each prompt, with a seed and max_tokens."""
        seeds, max_tokens = tuple(s.seed for s in sampling), tuple(s.max_tokens for s in sampling)
        assert None not in seeds + max_tokens
        return cls(request_id, created, seeds, max_tokens)  # type: ignore[arg-type]

    def applied_to(self, sampling: Sequence[SamplingParams]) -> list[SamplingParams]:
        """The parameters as they were."""
        return [
            dataclasses.replace(params, seed=seed, max_tokens=max_tokens)
            for params, seed, max_tokens in zip(sampling, self.seeds, self.max_tokens, strict=True)
        ]


class Keep(NamedTuple):
    """What a submit says of a request whose client may resume it."""

    resume_id: bytes
    """The same for all prompts and attempts. Its client alone knows it."""
    owner: bytes
    """Digest of body and key."""
    origin: Origin
    prompt_index: int
    ticket: int = 0
    ended: tuple[TokenOutput, ...] = ()
    """Choices that ended in earlier attempts, each with all its tokens. Not submitted again."""
    fingerprint: str | None = None
    """Numerics of the replica that made its first tokens, if that is known."""


class KeptPrompt(NamedTuple):
    """One record, as it is handed out."""

    origin: Origin
    prompt_index: int
    ticket: int
    attempt: int
    fingerprint: str | None
    choices: tuple[TokenOutput, ...]
    """By choice, each with all its tokens from the first on. ``logprobs`` may be those of the last tokens alone: an
    earlier attempt had the others. A finish reason only where the choice ended by itself."""


class _Choice:
    __slots__ = (
        "finish_reason",
        "logprobs",
        "num_cached_tokens",
        "prompt_logprobs",
        "stop_token_id",
        "token_ids",
    )

    def __init__(self, token_ids: Sequence[int]) -> None:
        self.token_ids = list(token_ids)
        self.logprobs: list[TokenLogprobs] | None = None
        self.prompt_logprobs: tuple[TokenLogprobs | None, ...] | None = None
        self.finish_reason: FinishReason | None = None
        self.stop_token_id: int | None = None
        self.num_cached_tokens = 0

    def add(self, output: TokenOutput) -> None:
        self.token_ids += output.token_ids
        if output.logprobs is not None:
            if self.logprobs is None:
                self.logprobs = []
            self.logprobs += output.logprobs
        if output.prompt_logprobs is not None:
            self.prompt_logprobs = output.prompt_logprobs
        self.num_cached_tokens = self.num_cached_tokens or output.num_cached_tokens
        if output.finish_reason in (FinishReason.STOP, FinishReason.LENGTH):
            self.finish_reason, self.stop_token_id = output.finish_reason, output.stop_token_id

    def output(self, choice_index: int) -> TokenOutput:
        return TokenOutput(
            "",
            choice_index,
            tuple(self.token_ids),
            None if self.logprobs is None else tuple(self.logprobs),
            self.prompt_logprobs,
            self.finish_reason,
            self.stop_token_id,
            self.num_cached_tokens,
        )


class Record:
    """One attempt at one prompt. Made by `KeptRequests.begin`."""

    __slots__ = ("attempt", "choices", "entry", "fingerprint", "prompt_index", "size", "ticket")

    def __init__(self, entry: _Entry, keep: Keep, requests: Sequence[GenerateRequest]) -> None:
        self.entry: _Entry | None = entry
        """None: it is not kept any more."""
        self.prompt_index = keep.prompt_index
        self.ticket = keep.ticket
        self.fingerprint = keep.fingerprint
        self.attempt = requests[0].attempt
        self.choices = {request.choice_index: _Choice(request.output_token_ids) for request in requests}
        for output in keep.ended:
            self.choices[output.choice_index] = choice = _Choice(())
            choice.add(output)
        self.size = sum(len(choice.token_ids) for choice in self.choices.values()) + 1


class _Entry:
    """One client request."""

    __slots__ = ("ended_at", "keep", "live", "records")

    def __init__(self, keep: Keep) -> None:
        self.keep = keep
        self.records: dict[int, Record] = {}
        """By prompt."""
        self.live: set[Record] = set()
        """Those that still run."""
        self.ended_at: float | None = None
        """None: one of them still runs."""


class KeptRequests:
    """``now``: seconds of one monotonic clock. ``keep_seconds`` 0: nothing is kept behind its end."""

    def __init__(
        self, keep_seconds: float = KEEP_SECONDS, max_entries: int = MAX_ENTRIES, max_tokens: int = MAX_TOKENS
    ) -> None:
        self.keep_seconds = keep_seconds
        self.max_entries = max_entries
        self.max_tokens = max_tokens
        self.num_tokens = 0
        """Of all records."""
        self._running: dict[bytes, _Entry] = {}
        """By resume id, those that began first at the front."""
        self._ended: dict[bytes, _Entry] = {}
        """Those that ended first at the front."""
        self._fences: dict[tuple[bytes, bytes], tuple[int, float]] = {}
        """(resume id, owner) -> ticket of the latest resume, and when it came: oldest first."""

    def __len__(self) -> int:
        return len(self._running) + len(self._ended)

    def check(self, keep: Keep) -> None:
        """Raises StreamResumedError if a later reader has come."""
        ticket, _ = self._fences.get((keep.resume_id, keep.owner), (0, 0.0))
        if keep.ticket < ticket:
            raise _resumed(ticket)

    def begin(self, keep: Keep, requests: Sequence[GenerateRequest], now: float) -> Record:
        """A submit's choices run from now on. Takes the place of an earlier attempt's record, unless that one is later."""
        self.expire(now)
        entry = self._running.get(keep.resume_id) or self._ended.pop(keep.resume_id, None) or _Entry(keep)
        self._running.setdefault(keep.resume_id, entry)
        entry.ended_at = None
        record = Record(entry, keep, requests)
        earlier = entry.records.get(keep.prompt_index)
        if earlier is not None and (earlier.ticket, earlier.attempt) > (record.ticket, record.attempt):
            record.entry = None
            self._rest(entry, now)
            return record
        if earlier is not None:
            self._forget(earlier)
        entry.records[keep.prompt_index] = record
        entry.live.add(record)
        self.num_tokens += record.size
        self._shrink()
        return record

    def add(self, record: Record, output: TokenOutput) -> None:
        """What the engine made of one of its choices."""
        if record.entry is None:
            return
        record.choices[output.choice_index].add(output)
        size = size_of(output)
        record.size += size
        self.num_tokens += size
        if self.num_tokens > self.max_tokens:
            self._shrink()

    def end(self, record: Record, now: float) -> None:
        """All its choices have ended here, in whatever way."""
        if record.entry is not None:
            record.entry.live.discard(record)
            self._rest(record.entry, now)
        self.expire(now)

    def fetch(self, resume_id: bytes, now: float) -> list[KeptPrompt]:
        """The records of a request; [] if nothing is kept, or some of it still runs. Call `fence` before, and end that.

        It is kept on, for keep_seconds from now.
        """
        self.expire(now)
        entry = self._ended.pop(resume_id, None)
        if entry is None:
            return []
        entry.ended_at = now
        self._ended[resume_id] = entry
        return [
            KeptPrompt(
                entry.keep.origin,
                record.prompt_index,
                record.ticket,
                record.attempt,
                record.fingerprint,
                tuple(choice.output(i) for i, choice in sorted(record.choices.items())),
            )
            for record in entry.records.values()
        ]

    def fence(self, resume_id: bytes, owner: bytes, ticket: int, now: float) -> None:
        """From now on only this reader, or one with a higher ticket, may run the request. Safe to say twice.

        Raises UnknownStreamError if it is another owner's, StreamResumedError if there is a later reader.
        """
        self.expire(now)
        entry = self._running.get(resume_id) or self._ended.get(resume_id)
        if entry is not None and not hmac.compare_digest(entry.keep.owner, owner):
            raise UnknownStreamError(
                "Last-Event-ID names a stream that began with another body or another API key; send the same again"
            )
        latest, _ = self._fences.pop((resume_id, owner), (0, 0.0))
        self._fences[resume_id, owner] = max(latest, ticket), now
        while len(self._fences) > self.max_entries:
            del self._fences[next(iter(self._fences))]
        if ticket < latest:
            raise _resumed(latest)

    def expire(self, now: float) -> None:
        """Forgets what ended keep_seconds ago, or earlier."""
        over = now - self.keep_seconds
        while self._ended:
            entry = next(iter(self._ended.values()))
            assert entry.ended_at is not None
            if entry.ended_at > over:
                break
            self._drop(entry)
        while self._fences:
            key, (_, came_at) = next(iter(self._fences.items()))
            if came_at > now - max(self.keep_seconds, FENCE_SECONDS):
                break
            del self._fences[key]

    def check_invariants(self, now: float) -> None:
        """Raises AssertionError if a bound is passed or the sums are wrong. For tests and soaks."""
        assert len(self) <= self.max_entries
        assert self.num_tokens <= self.max_tokens
        assert len(self._fences) <= self.max_entries
        assert not self._running.keys() & self._ended.keys()
        entries = [*self._running.values(), *self._ended.values()]
        assert self.num_tokens == sum(record.size for entry in entries for record in entry.records.values())
        assert all(record.entry is entry for entry in entries for record in entry.records.values())
        assert all(entry.live and entry.ended_at is None for entry in self._running.values())
        assert all(not entry.live and entry.ended_at is not None for entry in self._ended.values())
        times = [entry.ended_at or 0.0 for entry in self._ended.values()]
        assert times == sorted(times)
        assert not times or times[0] > now - self.keep_seconds, "something is kept for too long"

    # ---- parts ---------------------------------------------------------------------------------------------------

    def _rest(self, entry: _Entry, now: float) -> None:
        """Its last record may have ended: its time begins."""
        if not entry.live and self._running.pop(entry.keep.resume_id, None) is not None:
            entry.ended_at = now
            self._ended[entry.keep.resume_id] = entry

    def _shrink(self) -> None:
        """Keeps the bounds."""
        while len(self) > self.max_entries or self.num_tokens > self.max_tokens:
            self._drop(_first((self._ended.values(), self._running.values())))

    def _drop(self, entry: _Entry) -> None:
        for record in list(entry.records.values()):
            self._forget(record)
        self._running.pop(entry.keep.resume_id, None)
        self._ended.pop(entry.keep.resume_id, None)

    def _forget(self, record: Record) -> None:
        assert record.entry is not None
        record.entry.live.discard(record)
        del record.entry.records[record.prompt_index]
        record.entry = None
        self.num_tokens -= record.size


def _first(boxes: Iterable[Iterable[_Entry]]) -> _Entry:
    return next(entry for box in boxes for entry in box)


def _resumed(ticket: int) -> StreamResumedError:
    return StreamResumedError("the client of this stream goes on reading it over another connection", ticket)
