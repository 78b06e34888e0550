"""Event ids: what goes in comes out, and nothing else is taken for one."""

from __future__ import annotations

import os

import pytest
from hypothesis import given, strategies as st

from serve_app.api.event_id import ChoiceShown, EventId, decode_event_id, encode_event_id, fold
from serve_app.errors import InvalidEventIdError

counts = st.integers(0, 300) | st.integers(0, 2**31)
choices = st.none() | st.builds(ChoiceShown, counts, counts, st.integers(0, 0xFFFF), st.booleans(), counts)
event_ids = st.builds(
    EventId, st.binary(min_size=16, max_size=16), st.lists(choices, max_size=128).map(tuple), st.booleans()
)


def trimmed(event_id: EventId) -> EventId:
    """Choices behind the last that has begun are not told."""
    begun = list(event_id.choices)
    while begun and begun[-1] is None:
        begun.pop()
    return event_id._replace(choices=tuple(begun))


@given(event_ids)
def test_what_goes_in_comes_out(event_id: EventId) -> None:
    text = encode_event_id(event_id).decode("ascii")
    assert decode_event_id(text) == trimmed(event_id)
    assert text.replace("-", "").replace("_", "").isalnum()


@given(event_ids, st.data())
def test_one_that_was_cut_or_changed_is_refused(event_id: EventId, data: st.DataObject) -> None:
    text = encode_event_id(event_id).decode("ascii")
    at = data.draw(st.integers(0, len(text) - 1))
    other = data.draw(st.characters(min_codepoint=33, max_codepoint=126).filter(lambda c: c != text[at]))
    for wrong in (text[:at], text[at + 1 :], text[:at] + other + text[at + 1 :], text + other, text + "="):
        with pytest.raises(InvalidEventIdError):
            decode_event_id(wrong)


@given(st.text(max_size=100))
def test_anything_else_is_refused(text: str) -> None:
    with pytest.raises(InvalidEventIdError, match="Last-Event-ID"):
        decode_event_id(text)


def test_the_extremes_of_length() -> None:
    one = encode_event_id(EventId(os.urandom(16), (ChoiceShown(1, 4, 5),)))
    assert len(one) <= 36
    many = encode_event_id(EventId(os.urandom(16), (ChoiceShown(4000, 16_000, 5),) * 128))
    assert len(many) < 1300
    with pytest.raises(InvalidEventIdError, match="4096"):
        decode_event_id("1" * 5000)


def test_the_checksum_tells_order_and_number() -> None:
    assert fold((1, 2, 3)) == fold((2, 3), fold((1,)))
    found = {fold(ids) for ids in [(), (0,), (0, 0), (1, 2), (2, 1), (1,), (2,), (1, 2, 0)]}
    assert len(found) == 8
