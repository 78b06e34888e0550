"""Stop strings are found wherever the pieces break, and never shown in part."""

from __future__ import annotations

import pytest
from hypothesis import given, settings, strategies as st

from serve_app.text.stop_strings import StopStrings


def run(stop: tuple[str, ...], pieces: list[str], include: bool = False) -> tuple[str, str | None]:
    """(all that was shown, the stop string that matched)."""
    stops, shown = StopStrings(stop, include), ""
    for piece in pieces:
        text, matched = stops.push(piece)
        shown += text
        if matched is not None:
            return shown, matched
    return shown + stops.flush(), None


@pytest.mark.parametrize(
    ("stop", "pieces", "shown", "matched"),
    [
        (("END",), ["go on E", "N", "D there"], "go on ", "END"),
        (("END",), ["EN", "EN", "D"], "EN", "END"),
        (("END",), ["go on EN"], "go on EN", None),
        ((), ["anything", ""], "anything", None),
        (("b", "ab"), ["xabc"], "x", "ab"),  # begins first
        (("ab", "abc"), ["xabcd"], "x", "abc"),  # begins together: the longest
        (("ab", "abc"), ["xab", "cd"], "x", "ab"),  # but it does not wait
        (("bc", "abcd"), ["abc", "d"], "a", "bc"),
        (("aab",), ["aa", "a", "b"], "a", "aab"),
        (("abab", "x"), ["aba", "ba", "b"], "", "abab"),
        (("\n\n",), ["a\n", "b\n", "\nc"], "a\nb", "\n\n"),
        (("😀",), ["a", "😀b"], "a", "😀"),
    ],
)
def test_matches(stop: tuple[str, ...], pieces: list[str], shown: str, matched: str | None) -> None:
    assert run(stop, pieces) == (shown, matched)
    assert run(stop, pieces, include=True) == (shown + (matched or ""), matched)


def test_what_cannot_be_a_stop_string_is_shown_at_once() -> None:
    stops = StopStrings(("END", "E-"))
    assert [stops.push(piece)[0] for piece in ("a", "E", "N", "X", "E", "x")] == ["a", "", "", "ENX", "", "Ex"]
    assert stops.flush() == ""


def test_what_was_let_through_does_not_match_later() -> None:
    """As with min_tokens: a stop string completed while matching is off is text, one completed later is not."""
    stops = StopStrings(("ab", "xaby"))
    assert stops.push("xab", may_match=False) == ("", None)
    assert stops.push("z") == ("xabz", None)
    stops = StopStrings(("ab", "xaby"))
    assert stops.push("xab", may_match=False) == ("", None)
    assert stops.push("y") == ("", "xaby")
    stops = StopStrings(("aa",))
    assert stops.push("aa", may_match=False) == ("a", None)
    assert stops.push("a") == ("", "aa")


@settings(max_examples=500)
@given(
    pieces=st.lists(st.text("abc", max_size=4), max_size=12),
    stop=st.lists(st.text("abc", min_size=1, max_size=5), max_size=4).map(tuple),
    include=st.booleans(),
    num_off=st.integers(0, 4),
)
def test_against_searching_the_whole_text_each_time(
    pieces: list[str], stop: tuple[str, ...], include: bool, num_off: int
) -> None:
    stops, shown, text, matched = StopStrings(stop, include), "", "", None
    for i, piece in enumerate(pieces):
        old, text = len(text), text + piece
        hits = [
            (start, -len(string), string)
            for string in stop
            for start in range(len(text))
            if i >= num_off and text.startswith(string, start) and start + len(string) > old
        ]
        new, matched = stops.push(piece, may_match=i >= num_off)
        shown += new
        assert matched == (min(hits)[2] if hits else None)
        if matched is not None:
            assert shown == text[: min(hits)[0]] + (matched if include else "")
            return
        held = max((k for k in range(5) for s in stop if k < len(s) and text.endswith(s[:k])), default=0)
        assert shown == text[: len(text) - held]
    assert shown + stops.flush() == text
