"""One choice's text: cut at stop strings, counted in tokens, and the same however its tokens arrive."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given, settings, strategies as st

from serve_app.engine.request import FinishReason, SamplingParams
from serve_app.text.text_stream import TextDelta, TextStream
from tests.text.tokenizers_made import MAKERS, TEXTS, byte_ids, made, some_ids

STOP, LENGTH = FinishReason.STOP, FinishReason.LENGTH
BYTES = made("byte_level_bpe")


def ids(text: str) -> list[int]:
    """One token per byte."""
    return byte_ids(BYTES, text.encode()) if text.isascii() and " " not in text else BYTES.encode(text, False)


def stream(**sampling: object) -> TextStream:
    return TextStream(BYTES, SamplingParams(**sampling))  # type: ignore[arg-type]


def test_a_stop_string_cuts_text_and_tokens() -> None:
    choice = stream(stop=("END",))
    assert choice.push(ids("abE")) == TextDelta("ab", 3, None, None)
    assert choice.push(ids("NDxyz")) == TextDelta("", 2, STOP, "END")
    assert (choice.num_tokens, choice.finish_reason, choice.stop_string) == (5, STOP, "END")
    assert choice.push(ids("late"), finish_reason=LENGTH) == TextDelta()
    assert choice.num_tokens == 5


def test_the_stop_string_stays_if_asked_for() -> None:
    choice = stream(stop=("END",), include_stop_str_in_output=True)
    assert choice.push(ids("abENDxyz")) == TextDelta("abEND", 5, STOP, "END")


def test_the_end_gives_out_what_was_held_back() -> None:
    choice = stream(stop=("END",))
    assert choice.push(ids("abEN")).text == "ab"
    assert choice.push((), finish_reason=LENGTH) == TextDelta("EN", 0, LENGTH, None)
    choice = stream(stop=("END",))
    half = byte_ids(BYTES, "€".encode()[:2])
    assert choice.push([*ids("E"), *half], finish_reason=LENGTH) == TextDelta("E\ufffd", 3, LENGTH, None)


def test_a_stop_string_that_the_end_completes_wins() -> None:
    """The last character of a byte-fallback run comes only with the flush."""
    tokenizer = made("metaspace_bpe")
    choice = TextStream(tokenizer, SamplingParams(stop=("€",), max_tokens=4))
    euros = byte_ids(tokenizer, "à€".encode())
    assert choice.push(euros, finish_reason=LENGTH) == TextDelta("à", 5, STOP, "€")


@pytest.mark.parametrize("kind", MAKERS)
def test_a_special_token_is_shown_where_a_parser_needs_it(kind: str) -> None:
    """And no other special token with it, nor a token of the prompt."""
    tokenizer = made(kind)
    start, end = (tokenizer.token_to_id(token) for token in ("<|im_start|>", "<|im_end|>"))
    assert start is not None
    assert end is not None
    words = tokenizer.encode("hello", add_special_tokens=False)
    tokens = [*words, start, *words, end, *words]
    sampling = SamplingParams()
    shown = TextStream(tokenizer, sampling, shown_special_ids=frozenset({start})).push(tokens, LENGTH).text
    skipped = TextStream(tokenizer, sampling).push(tokens, LENGTH).text
    assert shown.count("<|im_start|>") == 1
    assert "<|im_end|>" not in shown
    assert "<|im" not in skipped


def test_a_stop_token_counts_but_is_no_text() -> None:
    """Also where special tokens are shown, and for a stop token that is an ordinary word."""
    for stop_id in (BYTES.eos_token_id or 2, *ids("!")):
        choice = stream(skip_special_tokens=False)
        assert choice.push([*ids("ab"), stop_id], STOP, stop_id) == TextDelta("ab", 3, STOP, None)
    choice = stream(include_stop_str_in_output=True)
    assert choice.push(ids("ab!"), STOP, ids("!")[0]) == TextDelta("ab!", 3, STOP, None)


@pytest.mark.parametrize(
    ("min_tokens", "shown", "num_tokens"), [(0, "a", 2), (1, "a", 2), (2, "axbb", 5), (9, "axbbxy", 6)]
)
def test_no_stop_string_within_min_tokens(min_tokens: int, shown: str, num_tokens: int) -> None:
    """Tokens a x b b x y, stop string x: the second token may end the answer only if min_tokens is below 2."""
    choice = stream(stop=("x",), min_tokens=min_tokens)
    deltas = [choice.push([token_id]) for token_id in ids("axbbxy")]
    assert "".join(delta.text for delta in deltas) == shown
    assert sum(delta.num_tokens for delta in deltas) == choice.num_tokens == num_tokens


def test_a_prompt_gives_the_first_space() -> None:
    tokenizer = made("metaspace_bpe")
    hello = tokenizer.encode("hello", add_special_tokens=False)
    assert TextStream(tokenizer, SamplingParams()).push(hello).text == "hello"
    assert TextStream(tokenizer, SamplingParams(), prompt_token_ids=hello).push(hello).text == " hello"


def test_resuming_after_the_end_is_finished() -> None:
    choice = TextStream(BYTES, SamplingParams(stop=("b",)), output_token_ids=ids("abc"))
    assert (choice.finish_reason, choice.stop_string, choice.num_tokens) == (STOP, "b", 2)


@pytest.mark.parametrize("kind", MAKERS)
def test_any_grouping_and_any_resume_give_the_same(kind: str) -> None:
    tokenizer, num_matched, num_resumed = made(kind), 0, 0

    def run(
        sampling: SamplingParams, prompt: list[int], output: list[int], borders: list[int], resume_at: set[int]
    ) -> tuple[str, list[int], FinishReason | None, str | None]:
        """(text, tokens that count, why it ended, stop string) with the tokens in groups and new streams in between."""
        nonlocal num_resumed
        choice, shown, kept = TextStream(tokenizer, sampling, prompt), "", list[int]()
        for start, end in pairwise([0, *borders, len(output)]):
            if start in resume_at and choice.finish_reason is None:
                assert kept == output[:start]
                num_resumed += bool(kept)
                choice = TextStream(tokenizer, sampling, prompt, kept)
            group = output[start:end]
            delta = choice.push(group, LENGTH if end == len(output) else None)
            shown += delta.text
            kept += group[: delta.num_tokens]
        assert choice.num_tokens == len(kept)
        return shown, kept, choice.finish_reason, choice.stop_string

    @settings(max_examples=100)
    @given(data=st.data())
    def check(data: st.DataObject) -> None:
        nonlocal num_matched
        prompt, output = data.draw(some_ids(tokenizer, 2)), data.draw(some_ids(tokenizer, 6))
        output += tokenizer.encode(data.draw(st.sampled_from(TEXTS)), add_special_tokens=False)
        text = tokenizer.decode(output)
        starts = st.integers(0, max(0, len(text) - 2))
        spans = data.draw(st.lists(st.tuples(starts, st.integers(1, 4)), max_size=3))
        sampling = SamplingParams(
            stop=tuple(text[i : i + n] for i, n in spans if text[i : i + n]),
            min_tokens=data.draw(st.sampled_from([0, 0, 3, 9])),
            include_stop_str_in_output=data.draw(st.booleans()),
            skip_special_tokens=data.draw(st.booleans()),
            max_tokens=None,
        )
        one_by_one = run(sampling, prompt, output, list(range(1, len(output))), set())
        for _ in range(3):
            borders = sorted(data.draw(st.lists(st.integers(0, len(output)), max_size=5)))
            resume_at = {border for border in borders if data.draw(st.booleans())}
            assert run(sampling, prompt, output, borders, resume_at) == one_by_one
        shown, kept, finish_reason, stop_string = one_by_one
        num_matched += stop_string is not None
        if stop_string is None:
            assert (kept, finish_reason) == (output, LENGTH)
            unstopped = replace(sampling, stop=())
            assert shown == run(unstopped, prompt, output, [], set())[0]
        else:
            assert finish_reason is STOP
            assert len(kept) > sampling.min_tokens
            assert shown.endswith(stop_string) or not sampling.include_stop_str_in_output

    check()
    assert num_matched > 10
    assert num_resumed > 10
