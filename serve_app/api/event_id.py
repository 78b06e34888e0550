"""The ids of a resumable stream's events: what a reader that has this event has seen. Pure.

Once for the request: whether all but [DONE] has been shown. For each choice up to the last that has begun: tokens,
characters, tokens of reasoning, a checksum of the tokens, and whether its end has been shown. An id is "1" (the version)
and base64url of

    [ CRC-32 of the rest: 4 ][ resume id: 16 ][ is_over: 1 ][ choice 0 ][ choice 1 ] ...
    a choice        [ 0 ]  not begun, or  [ 1 + 2 * tokens + has_ended ][ characters ][ reasoning ][ checksum: 2 ]

with varints (LEB128) where no length is given. The CRC is there for ids that were cut. Nothing in an id is secret but the
resume id, which is random: who makes up the rest changes what he himself is shown, since body and key must be the same.

The checksum tells records apart that have as many tokens and not the same ones: in fast mode a replica that was given up
may have gone on in its own way.
"""

from __future__ import annotations

import base64
import binascii
import zlib
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from serve_app.errors import InvalidEventIdError

MAX_EVENT_ID_CHARS = 4096
VERSION = b"1"
MAX_COUNT = 2**40
NOT_BEGUN = b"\0"


class ChoiceShown(NamedTuple):
    """What a reader has of one choice that has begun."""

    num_tokens: int = 0
    num_chars: int = 0
    """Of the model's own text, before a parser reads it, without an echoed prompt."""
    checksum: int = 0
    """`fold` of the tokens."""
    has_ended: bool = False
    """The finish reason, too."""
    num_reasoning_tokens: int = 0
    """Of the tokens, for the usage."""


class EventId(NamedTuple):
    resume_id: bytes
    choices: tuple[ChoiceShown | None, ...]
    """By index; None: not begun. Those behind the last one have not begun either."""
    is_over: bool = False
    """All but [DONE] has been shown."""


def fold(token_ids: Iterable[int], before: int = 0) -> int:
    """16 bits that depend on every token and their order. ``before``: of the tokens before them."""
    for token_id in token_ids:
        before = (before * 0x9E3B + token_id + 1) & 0xFFFF
    return before


def encode_choice(shown: ChoiceShown | None) -> bytes:
    """One choice's part of an id."""
    if shown is None:
        return NOT_BEGUN
    head = 1 + 2 * shown.num_tokens + shown.has_ended
    counts = _varint(head) + _varint(shown.num_chars) + _varint(shown.num_reasoning_tokens)
    return counts + shown.checksum.to_bytes(2, "little")


def join_event_id(resume_id: bytes, choices: Sequence[bytes], is_over: bool) -> bytes:
    """The id, in ASCII, from the parts that `encode_choice` made."""
    num_begun = len(choices)
    while num_begun and choices[num_begun - 1] == NOT_BEGUN:
        num_begun -= 1
    rest = b"".join((resume_id, b"\1" if is_over else b"\0", *choices[:num_begun]))
    return VERSION + base64.urlsafe_b64encode(zlib.crc32(rest).to_bytes(4, "little") + rest).rstrip(b"=")


def encode_event_id(event_id: EventId) -> bytes:
    return join_event_id(event_id.resume_id, [encode_choice(shown) for shown in event_id.choices], event_id.is_over)


def decode_event_id(text: str) -> EventId:
    """Raises InvalidEventIdError: none of ours, of another version, or cut."""
    given = text.encode("ascii", errors="replace")
    if len(given) > MAX_EVENT_ID_CHARS:
        raise InvalidEventIdError(f"has {len(given)} characters; an id of this server has at most {MAX_EVENT_ID_CHARS}")
    try:
        data = base64.b64decode(given[1:] + b"=" * (-(len(given) - 1) % 4), altchars=b"-_", validate=True)
        found = _decode(data)
    except (binascii.Error, ValueError, IndexError):
        found = None
    if found is None or encode_event_id(found) != given:  # also one that spells the same in another way
        raise InvalidEventIdError("is not an id that this server gave, or not the whole of one")
    return found


def _decode(data: bytes) -> EventId:
    """Raises ValueError or IndexError, or returns something that encodes to something else."""
    resume_id, is_over, at = data[4:20], bool(data[20]), 21
    choices: list[ChoiceShown | None] = []
    while at < len(data):
        head, at = _read_varint(data, at)
        if not head:
            choices.append(None)
            continue
        num_chars, at = _read_varint(data, at)
        num_reasoning_tokens, at = _read_varint(data, at)
        if max(head, num_chars, num_reasoning_tokens) > MAX_COUNT:
            raise ValueError("nothing is so long")
        checksum = int.from_bytes(data[at : at + 2], "little")
        choices.append(ChoiceShown((head - 1) // 2, num_chars, checksum, head % 2 == 0, num_reasoning_tokens))
        at += 2
    return EventId(resume_id, tuple(choices), is_over)


def _varint(number: int) -> bytes:
    """LEB128, as in DWARF and protocol buffers."""
    found = bytearray()
    while number > 0x7F:
        found.append(number & 0x7F | 0x80)
        number >>= 7
    found.append(number)
    return bytes(found)


def _read_varint(data: bytes, at: int) -> tuple[int, int]:
    """The number, and where it ends."""
    number = shift = 0
    while data[at] & 0x80:
        number |= (data[at] & 0x7F) << shift
        shift += 7
        at += 1
    return number | data[at] << shift, at + 1
