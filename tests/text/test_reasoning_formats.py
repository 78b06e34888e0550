"""Reasoning comes out as reasoning, content as content, and the markers never, however the text is cut."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import example, given, settings, strategies as st

from serve_app.text.output_parser import OutputDelta, join
from serve_app.text.reasoning_formats import REASONING_FORMATS, ReasoningFormat, detect_reasoning_format

BY_NAME = {format.name: format for format in REASONING_FORMATS}
THINK = BY_NAME["think"]


def parse(pieces: list[str], is_open: bool = False, format: ReasoningFormat = THINK) -> OutputDelta:
    parser = format.parser(is_open)
    return join([*map(parser.push, pieces), parser.finish()])


def cut(text: str, places: list[int]) -> list[str]:
    return [text[i:j] for i, j in pairwise([0, *sorted(min(place, len(text)) for place in places), len(text)])]


VECTORS = {
    "the block is there": (False, "<S>\nwhy?\n<E>\n\nyes", "\nwhy?\n", "\n\nyes"),
    "white space before it": (False, "\n <S>why?<E>yes", "why?", "yes"),
    "the prompt has opened it": (True, "why?\n<E>yes", "why?\n", "yes"),
    "opened twice": (True, "\n<S>\nwhy?<E>yes", "\nwhy?", "yes"),
    "the block is missing": (False, "yes", "", "yes"),
    "white space is content without a block": (False, "\n\n yes ", "", "\n\n yes "),
    "nothing": (False, "", "", ""),
    "nothing but white space": (False, " \n", "", " \n"),
    "nothing, opened": (True, "", "", ""),
    "white space, opened": (True, " \n", " \n", ""),
    "empty": (False, "<S>\n\n<E>\n\nyes", "\n\n", "\n\nyes"),
    "empty, opened": (True, "<E>yes", "", "yes"),
    "never ended": (False, "<S>why? because", "why? because", ""),
    "never ended, opened": (True, "why? because", "why? because", ""),
    "ends inside the end": (True, "why?<E", "why?<E", ""),
    "ends inside the start": (False, "<S", "", "<S"),
    "a block later is content": (False, "yes <S>why?<E>no", "", "yes <S>why?<E>no"),
    "only the first end counts": (False, "<S>a<E>b<E>c", "a", "b<E>c"),
    "start inside of reasoning": (False, "<S>a<S>b<E>c", "a<S>b", "c"),
    "an end without a start": (False, "why?<E>yes", "", "why?<E>yes"),
}


def spelled(text: str, format: ReasoningFormat) -> str:
    text = text.replace("<S>", format.start).replace("<E>", format.end)
    return text.replace("<S", format.start[:-1]).replace("<E", format.end[:-1])


@pytest.mark.parametrize("format", REASONING_FORMATS, ids=lambda format: format.name)
@pytest.mark.parametrize("vector", VECTORS.values(), ids=VECTORS.keys())
def test_vectors_whole_and_cut_at_every_character(format: ReasoningFormat, vector: tuple[bool, str, str, str]) -> None:
    is_open, *texts = vector
    text, reasoning, content = (spelled(part, format) for part in texts)
    assert parse([text], is_open, format) == OutputDelta(content, reasoning)
    assert parse(list(text), is_open, format) == OutputDelta(content, reasoning)
    for place in range(len(text)):
        assert parse([text[:place], text[place:]], is_open, format) == OutputDelta(content, reasoning)


@settings(max_examples=100)
@given(
    text=st.lists(st.sampled_from(["<think>", "</think>", "<th", "</", "ink>", " ", "\n", "a", "é", "<"])).map("".join),
    places=st.lists(st.integers(0, 60), max_size=8),
    is_open=st.booleans(),
)
@example(text="</</think>x", places=[2, 3], is_open=True)
def test_cuts_change_nothing_and_nothing_is_lost(text: str, places: list[int], is_open: bool) -> None:
    parsed = parse(cut(text, places), is_open)
    assert parsed == parse([text], is_open)
    written = [f"{parsed.reasoning}{end}{parsed.content}" for end in ("", "</think>")]
    assert text in written or text.lstrip() in [f"<think>{rest}" for rest in written]


def test_reasoning_is_shown_as_it_comes() -> None:
    parser = THINK.parser(is_open=False)
    pieces = ["<thi", "nk>", "so", " <", "b> is", "</", "think", ">", "\n", "yes"]
    assert [parser.push(piece) for piece in pieces] == [
        OutputDelta(),
        OutputDelta(),
        OutputDelta(reasoning="so"),
        OutputDelta(reasoning=" "),
        OutputDelta(reasoning="<b> is"),
        OutputDelta(),
        OutputDelta(),
        OutputDelta(),
        OutputDelta("\n"),
        OutputDelta("yes"),
    ]


@pytest.mark.parametrize(
    ("is_open", "tokens", "num_reasoning"),
    [
        (False, ["<think>", "a", "b", "</think>", "c"], 4),
        (True, ["a", "b", "</think>", "c"], 3),
        (False, ["a", "b"], 0),
        (True, ["a", "b"], 2),
        (False, ["\n", "<", "think>", "a", "</", "think>", "c"], 4),  # the "<" may still be anything
    ],
)
def test_tokens_of_reasoning_can_be_counted(is_open: bool, tokens: list[str], num_reasoning: int) -> None:
    parser = THINK.parser(is_open)
    num = 0
    for token in tokens:
        before = parser.in_reasoning
        parser.push(token)
        num += before or parser.in_reasoning
    assert num == num_reasoning


@pytest.mark.parametrize(
    ("prompt", "final_message", "is_open"),
    [
        ("<|im_start|>assistant\n", None, False),
        ("<|im_start|>assistant\n<think>\n", None, True),
        ("<|Assistant|><think>", None, True),
        ("<|im_start|>assistant\n<think>\n\n</think>\n\n", None, False),  # enable_thinking=false
        ("What does <think> mean?<|im_start|>assistant\n", None, False),
        ("user: go on\nassistant: <think>well, 3 + 4", "<think>well, 3 + 4", True),
        ("user: go on\nassistant: <think>well</think>It is", "<think>well</think>It is", False),
        ("user: what is <think>?\nassistant: It is", "It is", False),
        ("assistant\n<think>\nIt", "It", False),  # the template put a block before what goes on: not known to be open
    ],
)
def test_a_prompt_that_has_opened_the_block(prompt: str, final_message: str | None, is_open: bool) -> None:
    assert THINK.is_open(prompt, final_message) == is_open


PLAIN_TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:"


@pytest.mark.parametrize(
    ("template", "name"),
    [
        (PLAIN_TEMPLATE, None),
        (PLAIN_TEMPLATE + "{# think step by step #}", None),
        ("{%- set content = m.content.split('</think>')[-1] %}" + PLAIN_TEMPLATE, "think"),
        (PLAIN_TEMPLATE + "{{ '<think>\n\n</think>\n\n' if enable_thinking is false }}", "think"),
        (PLAIN_TEMPLATE + "{{ '[THINK]' + m.reasoning_content + '[/THINK]' }}", "mistral"),
        ("Write your thoughts after 'Here is my thought process:' and 'Here is my response:'", "granite"),
        (PLAIN_TEMPLATE + "<think>\n", "think"),
    ],
)
def test_detection(template: str, name: str | None) -> None:
    found = detect_reasoning_format(template)
    assert (found.name if found else None) == name


def test_names_are_given_once() -> None:
    assert len(BY_NAME) == len(REASONING_FORMATS)
