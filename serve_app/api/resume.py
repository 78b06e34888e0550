"""Resuming a stream: what a client asks for with its two headers, and where the stream goes on. No HTTP, no text."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from serve_app.api.event_id import ChoiceShown, EventId, decode_event_id, fold
from serve_app.api.headers import EVENT_ID_HEADER, RESUMABLE_HEADER
from serve_app.engine.request import TokenOutput
from serve_app.errors import (
    EngineUnavailableError,
    InvalidEventIdError,
    InvalidParameterError,
    ReplicaLostError,
    ReplicaUnreachableError,
    StreamGoneError,
    StreamResumedError,
    UnknownStreamError,
)
from serve_app.logs import get_logger
from serve_app.replica.channel import Channels
from serve_app.replica.kept import Keep, KeptPrompt, Origin

logger = get_logger(__name__)

MAX_CHOICES = 128
"""Choices of all prompts of a resumable request: each id tells of all that have begun."""
MAX_FETCHES = 4
"""Of one resume, where others of the same stream come in between."""


class Resumable(NamedTuple):
    """What a client asks for with the two headers."""

    owner: bytes
    """Of body and key: see `owner_of`."""
    event_id: EventId | None
    """None: a new stream."""


# ---- what the client asks for ----------------------------------------------------------------------------------------


def resumable_of(headers: Mapping[str, str], path: str, key: bytes, body: bytes) -> Resumable | None:
    """None: an ordinary request. Last-Event-ID alone is enough: nobody has such an id who did not ask for it, and to
    answer from the beginning would show it all twice.

    Raises InvalidParameterError for another value of X-Resumable, and InvalidEventIdError.
    """
    given, event_id = headers.get(RESUMABLE_HEADER, ""), headers.get(EVENT_ID_HEADER, "").strip()
    value = given.strip().lower()
    if value not in ("", "0", "1", "false", "true"):
        raise InvalidParameterError(RESUMABLE_HEADER, given, "1 (or true), 0 (or false), or left out")
    if value not in ("1", "true") and not event_id:
        return None
    return Resumable(owner_of(path, key, body), decode_event_id(event_id) if event_id else None)


def owner_of(path: str, key: bytes, body: bytes) -> bytes:
    """SHA-256 of what must be the same when a stream is resumed, byte for byte. ``key``: as given, empty without one."""
    digest = hashlib.sha256()
    for part in (path.encode(), key, body):
        digest.update(b"%d:" % len(part))
        digest.update(part)
    return digest.digest()


# ---- where a stream goes on ------------------------------------------------------------------------------------------


class Begun(NamedTuple):
    """One prompt of a stream that goes on: see `GenerationStream`."""

    shown: dict[int, ChoiceShown]
    """By choice, of those that have begun."""
    emitted: dict[int, tuple[int, ...]]
    """The tokens that the reader has, of those that have not ended."""
    replay: list[TokenOutput]
    """What was generated behind them and is kept. The reader gets it first."""
    ended: tuple[TokenOutput, ...]
    """Choices whose end the reader has. Kept on: he may come back with an older id."""
    num_cached_tokens: int
    fingerprint: str | None
    """Numerics of the replica that made the tokens, if that is known."""


def begin(owner: bytes, origin: Origin) -> Keep:
    """What the submits of a new stream carry; `_replace` the prompt_index."""
    return Keep(os.urandom(16), owner, origin, 0)


async def find(
    channels: Channels,
    replica_ids: Iterable[str],
    resumable: Resumable,
    *,
    num_prompts: int,
    n: int,
    with_logprobs: bool,
    with_prompt_logprobs: bool,
) -> tuple[Keep, list[Begun]]:
    """Where a stream goes on: what its submits carry, and each prompt's place. Asks all replicas, which end what still
    runs of it for an earlier reader.

    Raises InvalidEventIdError, UnknownStreamError (404), StreamGoneError (410), StreamResumedError (409: another resume
    of it came later), and EngineUnavailableError where a replica that may have it does not answer.
    """
    event_id = resumable.event_id
    assert event_id is not None
    if len(event_id.choices) > num_prompts * n:
        raise InvalidEventIdError("tells of more choices than this request has")
    ticket, found, silent = await _fetch(channels, replica_ids, event_id.resume_id, resumable.owner)
    shown = dict(enumerate(event_id.choices))
    prompts = []
    for i in range(num_prompts):
        mine = {c: seen for c in range(n) if (seen := shown.get(i * n + c)) is not None}
        of_prompt = [kept for kept in found if kept.prompt_index == i]
        best = max((kept for kept in of_prompt if _covers(kept, mine)), key=_rank, default=None)
        if best is None and any(not seen.has_ended for seen in mine.values()):
            raise _gone(silent)
        prompts.append(_begun(best, mine, with_logprobs=with_logprobs, with_prompt_logprobs=with_prompt_logprobs))
    if not found:
        raise _gone(silent)
    return Keep(event_id.resume_id, resumable.owner, found[0].origin, 0, ticket), prompts


async def _fetch(
    channels: Channels, replica_ids: Iterable[str], resume_id: bytes, owner: bytes
) -> tuple[int, list[KeptPrompt], list[str]]:
    """(ticket, records of all replicas, replicas that may live and did not answer)."""
    replica_ids = list(replica_ids)
    ticket = time.time_ns()
    for _ in range(MAX_FETCHES):
        answers = await channels.call_each(replica_ids, "fetch_kept", resume_id, owner, ticket)
        found: list[KeptPrompt] = []
        silent: list[str] = []
        later: list[int] = []
        for replica_id, answer in answers.items():
            if isinstance(answer, UnknownStreamError):
                raise answer
            if isinstance(answer, StreamResumedError):
                later.append(answer.ticket)
            elif not isinstance(answer, Exception):
                found += answer
            elif isinstance(answer, ReplicaUnreachableError) or not isinstance(answer, ReplicaLostError):
                logger.info("replica %s was not asked for what it keeps: %s", replica_id, answer)
                silent.append(replica_id)
        if not later:
            return ticket, found, silent
        # This one came behind that one, or both come now. The clocks of two ingresses may differ.
        ticket = max(later) + int.from_bytes(os.urandom(2), "little") + 1
    raise StreamResumedError(f"{MAX_FETCHES} others resumed this stream at the same time", ticket)


def _rank(kept: KeptPrompt) -> tuple[int, ...]:
    return kept.ticket, kept.attempt, sum(len(choice.token_ids) for choice in kept.choices)


def _covers(kept: KeptPrompt, shown: Mapping[int, ChoiceShown]) -> bool:
    """It has every token that the reader has, of the choices that go on."""
    outputs = {output.choice_index: output for output in kept.choices}
    return all(
        seen.has_ended
        or (
            (output := outputs.get(i)) is not None
            and len(output.token_ids) >= seen.num_tokens
            and fold(output.token_ids[: seen.num_tokens]) == seen.checksum
        )
        for i, seen in shown.items()
    )


def _begun(
    kept: KeptPrompt | None, shown: dict[int, ChoiceShown], *, with_logprobs: bool, with_prompt_logprobs: bool
) -> Begun:
    outputs = () if kept is None else kept.choices
    ended = tuple(c for c in outputs if (seen := shown.get(c.choice_index)) is not None and seen.has_ended)
    num_cached_tokens = max((c.num_cached_tokens for c in outputs), default=0)
    begun = Begun(shown, {}, [], ended, num_cached_tokens, None if kept is None else kept.fingerprint)
    for output in outputs:
        if output in ended:
            continue
        seen = shown.get(output.choice_index)
        num_shown = 0 if seen is None else seen.num_tokens
        begun.emitted[output.choice_index] = output.token_ids[:num_shown]
        num_new = len(output.token_ids) - num_shown
        logprobs = output.logprobs or ()
        is_whole = len(logprobs) >= num_new or not with_logprobs
        if with_prompt_logprobs and seen is None and output.prompt_logprobs is None:
            is_whole = False
        # What lacks its logprobs is generated once more: to the same bytes, in deterministic mode.
        if is_whole and (num_new or output.finish_reason is not None):
            begun.replay.append(
                output._replace(
                    token_ids=output.token_ids[num_shown:],
                    logprobs=logprobs[len(logprobs) - num_new :] if with_logprobs else None,
                )
            )
    return begun


def _gone(silent: list[str]) -> Exception:
    if silent:
        return EngineUnavailableError(f"{len(silent)} replicas do not answer, and one of them may keep this stream")
    return StreamGoneError("nothing is kept of this stream any more; send the request without Last-Event-ID")
