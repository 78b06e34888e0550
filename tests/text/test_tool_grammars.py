"""What the grammars of forced calls let through, the parsers read as calls of the right tools with the right arguments."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from typing import Any

import llguidance
import numpy as np
import pytest

from serve_app.errors import InvalidParameterError, UnsupportedParameterError
from serve_app.text import grammar
from serve_app.text.output_format import Grammars, OutputFormat
from serve_app.text.output_parser import OutputDelta, join
from serve_app.text.reasoning_formats import REASONING_FORMATS
from serve_app.text.tool_formats import TOOL_FORMATS, ToolFormat, forced_format
from serve_app.text.tool_grammars import MAX_CALLS, CallableTool, after_reasoning, text_and_calls, tool_calls

END = 256
SPECIAL = ("[TOOL_CALLS]", "[ARGS]", "[THINK]", "[/THINK]")
IDS = {marker: 257 + i for i, marker in enumerate(SPECIAL)}
FORMATS = {format.name: format for format in TOOL_FORMATS}
SHAPED = [format for format in TOOL_FORMATS if format.shape is not None]
REASONING = {format.name: format for format in REASONING_FORMATS}


class Vocabulary:
    """A token for each byte, an end, and the special tokens."""

    eos_token_id = END
    bos_token_id = None
    tokens = (*(bytes([i]) for i in range(256)), b"", *(marker.encode() for marker in SPECIAL))
    special_token_ids = (END, *IDS.values())

    def __call__(self, text: str | bytes) -> list[int]:
        return list(text.encode() if isinstance(text, str) else text)


TOKENIZER = llguidance.LLTokenizer(llguidance.TokenizerWrapper(Vocabulary()), slices=[])


def ids_of(text: str, specials: Mapping[str, int]) -> list[int]:
    ids: list[int] = []
    while text:
        marker = next((marker for marker in specials if text.startswith(marker)), text[0])
        ids += [specials[marker]] if marker in specials else marker.encode()
        text = text[len(marker) :]
    return ids


def text_of(ids: Sequence[int]) -> str:
    return b"".join(Vocabulary.tokens[i] for i in ids).decode()


def matcher(text: str) -> llguidance.LLMatcher:
    made = llguidance.LLMatcher(TOKENIZER, text, log_level=0)
    assert not made.is_error(), made.get_error()
    return made


def accepts(grammar_text: str, text: str, specials: Mapping[str, int] | None = None) -> bool:
    """Whether the text is a whole sentence."""
    made = matcher(grammar_text)
    ids = ids_of(text, specials or {})
    return made.try_consume_tokens(ids) == len(ids) and made.is_accepting()


F = CallableTool(
    "f",
    {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"], "additionalProperties": False},
)
G = CallableTool("g")
FG = CallableTool("fg", {"properties": {"s": {"enum": ["x", "é"]}}, "required": ["s"], "additionalProperties": False})
TOOLS = [F, G, FG]


def shape_text(format: ToolFormat, *calls: tuple[str, str]) -> str:
    shape = format.shape
    assert shape is not None
    texts = [
        shape.before_name + name + shape.before_arguments + arguments + shape.after_arguments
        for name, arguments in calls
    ]
    return shape.opening + shape.separator.join(texts) + shape.closing


def parse(format: ToolFormat, text: str) -> OutputDelta:
    parser = format.parser({tool.name: tool.parameters for tool in TOOLS})
    return join([parser.push(text), parser.finish()])


@pytest.mark.parametrize("format", SHAPED, ids=lambda format: format.name)
def test_the_words_are_those_of_the_format(format: ToolFormat) -> None:
    assert format.shape is not None
    several = tool_calls(format.shape, TOOLS, parallel=True)
    one = tool_calls(format.shape, TOOLS, parallel=False)
    assert accepts(several, format.example)
    assert not accepts(one, format.example)
    assert accepts(one, shape_text(format, ("f", '{"a":-3}')))
    assert accepts(one, shape_text(format, ("fg", '{"s": "é"}')))
    assert accepts(one, shape_text(format, ("g", '{"any": [{"thing": null}]}')))


@pytest.mark.parametrize("format", SHAPED, ids=lambda format: format.name)
def test_a_name_goes_with_its_own_arguments(format: ToolFormat) -> None:
    assert format.shape is not None
    several = tool_calls(format.shape, TOOLS, parallel=True)
    for name, arguments in [
        ("f", '{"s": "x"}'),
        ("f", "{}"),
        ("f", '{"a": 1, "b": 2}'),
        ("fg", '{"a": 1}'),
        ("g", "[]"),
        ("h", "{}"),
        ("", "{}"),
    ]:
        assert not accepts(several, shape_text(format, (name, arguments)))
        assert not accepts(several, shape_text(format, ("f", '{"a": 1}'), (name, arguments)))
    for text in ("", "Hello", " ", shape_text(format, ("f", '{"a": 1}'))[:-1]):
        assert not accepts(several, text)


def test_a_named_tool_is_the_only_one() -> None:
    shape = FORMATS["hermes"].shape
    assert shape is not None
    only = tool_calls(shape, [G], parallel=False)
    assert accepts(only, shape_text(FORMATS["hermes"], ("g", "{}")))
    assert not accepts(only, shape_text(FORMATS["hermes"], ("f", '{"a": 1}')))


def test_one_call_is_the_end_and_several_have_one() -> None:
    format = FORMATS["llama3_json"]
    assert format.shape is not None
    made = matcher(tool_calls(format.shape, TOOLS, parallel=False))
    assert made.try_consume_tokens(ids_of(shape_text(format, ("f", '{"a": 1}')), {})) > 20
    assert made.is_stopped()

    made = matcher(tool_calls(format.shape, TOOLS, parallel=True))
    for i in range(MAX_CALLS):
        assert not made.is_stopped()
        text = ("; " if i else "") + '{"name": "g", "parameters": {}}'
        assert made.try_consume_tokens(ids_of(text, {})) == len(text)
        assert made.is_accepting()
    assert made.is_stopped()


@pytest.mark.parametrize("name", ["mistral", "mistral_list"])
def test_special_tokens_are_named_by_their_ids(name: str) -> None:
    format = FORMATS[name]
    assert format.shape is not None
    with_ids = tool_calls(format.shape, TOOLS, parallel=True, special_ids=IDS)
    assert f"<[{IDS['[TOOL_CALLS]']}]>" in with_ids
    assert accepts(with_ids, format.example, IDS)
    assert not accepts(with_ids, format.example)
    spelled_out = tool_calls(format.shape, TOOLS, parallel=True)
    assert accepts(spelled_out, format.example)
    assert not accepts(spelled_out, format.example, IDS)


ANSWER = '{"a": 1}'
JSON = grammar.json_schema(F.parameters)


@pytest.mark.parametrize(
    ("is_open", "text", "is_sentence"),
    [
        (True, "why?\n</think>\n\n" + ANSWER, True),
        (True, "</think>" + ANSWER, True),
        (True, "{} < </thin </think>\n" + ANSWER, True),
        (True, ANSWER, False),
        (True, "why?</think>", False),
        (True, "why?</think>\n\n\n" + ANSWER, False),
        (True, "why?</think>so " + ANSWER, False),
        (False, ANSWER, True),
        (False, "<think>\nwhy?\n</think>\n\n" + ANSWER, True),
        (False, "why?</think>" + ANSWER, False),
        (False, "<think>why?", False),
    ],
)
@pytest.mark.parametrize("special_ids", [{}, IDS], ids=["text", "special"])
def test_reasoning_comes_first(is_open: bool, text: str, is_sentence: bool, special_ids: dict[str, int]) -> None:
    format = REASONING["mistral" if special_ids else "think"]
    for ours, theirs in (("<think>", format.start), ("</think>", format.end)):
        text = text.replace(ours, theirs)
    behind = after_reasoning(format, JSON, is_open=is_open, special_ids=special_ids)
    assert accepts(behind, text, special_ids) == is_sentence
    hermes = FORMATS["hermes"]
    assert hermes.shape is not None
    behind = after_reasoning(
        format,
        tool_calls(hermes.shape, TOOLS, parallel=False, special_ids=special_ids),
        is_open=is_open,
        special_ids=special_ids,
    )
    text = text.replace(ANSWER, shape_text(hermes, ("f", ANSWER)))
    assert accepts(behind, text, special_ids) == is_sentence


def walk(grammar_text: str, seed: int, max_num_steps: int = 3000) -> str:
    """A sentence of the grammar, by chance: each token one of those that the mask allows, the end if it may come."""
    made = matcher(grammar_text)
    numbers = random.Random(seed)
    ids: list[int] = []
    for _ in range(max_num_steps):
        mask = np.unpackbits(np.frombuffer(made.compute_bitmask(), np.uint8), bitorder="little")
        allowed = [int(i) for i in np.flatnonzero(mask) if i < len(Vocabulary.tokens)]
        # The library sets the end's bit also where a name might end; whether the sentence may is told by is_accepting.
        if made.is_stopped() or (made.is_accepting() and numbers.random() < 0.5):
            assert made.is_accepting()
            return text_of(ids)
        closing = [i for i in allowed if i > END or chr(i) in '"}]<']
        token_id = numbers.choice(closing if closing and numbers.random() < 0.3 else [i for i in allowed if i != END])
        assert made.consume_token(token_id)
        ids.append(token_id)
    raise AssertionError(f"no end in {max_num_steps} tokens: {text_of(ids)[-300:]}")


WALK_TOOLS = [
    F,
    CallableTool("fg", FG.parameters, strict=True),
    CallableTool(
        "get-weather.v2",
        {
            "type": "object",
            "properties": {
                "city": {"type": "string", "maxLength": 12},
                "days": {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": 7}, "maxItems": 3},
                "unit": {"$ref": "#/$defs/unit"},
            },
            "required": ["city", "unit"],
            "additionalProperties": False,
            "$defs": {"unit": {"anyOf": [{"const": "C"}, {"type": "null"}]}},
        },
    ),
]


def is_valid(name: str, arguments: Any) -> bool:
    if name == "f":
        return set(arguments) == {"a"} and type(arguments["a"]) is int
    if name == "fg":
        return arguments in ({"s": "x"}, {"s": "é"})
    days = arguments.pop("days", [])
    city, unit = arguments.pop("city"), arguments.pop("unit")
    return not arguments and len(city) <= 12 and unit in ("C", None) and all(0 <= day <= 7 for day in days)


@pytest.mark.parametrize("format", SHAPED, ids=lambda format: format.name)
@pytest.mark.parametrize("special_ids", [{}, IDS], ids=["text", "special"])
def test_what_the_grammar_allows_is_read_as_calls(format: ToolFormat, special_ids: dict[str, int]) -> None:
    assert format.shape is not None
    names = set()
    tools = {tool.name: tool.parameters for tool in WALK_TOOLS}
    text = tool_calls(format.shape, WALK_TOOLS, parallel=True, special_ids=special_ids)
    thinking = after_reasoning(REASONING["think"], tool_calls(format.shape, WALK_TOOLS, parallel=False), is_open=True)
    for seed in range(8):
        sentence = walk(text, seed)
        parser = format.parser(tools)
        parsed = join([parser.push(sentence), parser.finish()])
        assert parsed.content == ""
        assert 1 <= len(parsed.tool_calls) <= MAX_CALLS
        for call in parsed.tool_calls:
            assert call.name is not None
            assert is_valid(call.name, json.loads(call.arguments)), call
            names.add(call.name)
    assert names == set(tools)
    composed = OutputFormat(format, REASONING["think"]).parser("<think>\n", tools=tools)
    assert composed is not None
    parsed = join([composed.push("well?\n</think>\n\n" + shape_text(format, ("f", ANSWER))), composed.finish()])
    assert accepts(thinking, "well?\n</think>\n\n" + shape_text(format, ("f", ANSWER)))
    assert (parsed.reasoning, parsed.content.strip(), len(parsed.tool_calls)) == ("well?\n", "", 1)


TRIGGERED = [format for format in SHAPED if format.shape is not None and format.shape.trigger]
STRICT_F = CallableTool("f", F.parameters, strict=True)


@pytest.mark.parametrize("format", TRIGGERED, ids=lambda format: format.name)
@pytest.mark.parametrize("special_ids", [{}, IDS], ids=["text", "special"])
def test_text_in_which_every_call_is_right(format: ToolFormat, special_ids: dict[str, int]) -> None:
    """tool_choice auto with strict functions."""
    assert format.shape is not None
    text = text_and_calls(
        format.shape, [STRICT_F, CallableTool("fg", FG.parameters)], parallel=True, special_ids=special_ids
    )
    right, loose = shape_text(format, ("f", ANSWER)), shape_text(format, ("fg", '{"not": ["checked"]}'))
    trigger = format.shape.trigger
    for sentence in ["", "Hello", right, loose, f"Well,\n\n{right}", f"{right}{loose}", f"{right}\n{loose} and\n"]:
        assert accepts(text, sentence, special_ids), sentence
    assert accepts(text, shape_text(format, ("f", ANSWER), ("f", ANSWER)), special_ids)
    assert accepts(text, trigger[:-1]) == (trigger != "")
    wrong = shape_text(format, ("f", '{"a": "1"}'))
    for sentence in [
        f"{trigger} oops",
        wrong,
        f"Hi {wrong}",
        f"{right} {wrong}",
        shape_text(format, ("h", "{}")),
        right[:-1],
    ]:
        assert not accepts(text, sentence, special_ids), sentence

    one = text_and_calls(format.shape, [STRICT_F], parallel=False, special_ids=special_ids)
    for sentence in ["", "Hello", right, f"Well {right}"]:
        assert accepts(one, sentence, special_ids), sentence
    for sentence in [
        f"{right}{right}",
        f"{right} and",
        shape_text(format, ("f", ANSWER), ("f", ANSWER)),
        f"a {trigger} b",
    ]:
        assert not accepts(one, sentence, special_ids), sentence
    made = matcher(one)
    ids = ids_of(f"Well {right}", special_ids)
    assert made.try_consume_tokens(ids) == len(ids)
    assert made.is_stopped()


def test_a_format_without_a_marker_has_no_grammar_for_text_and_calls() -> None:
    for format in TOOL_FORMATS:
        found = OutputFormat(format).free_calls([STRICT_F], parallel=True, prompt="")
        assert (found is not None) == (format in TRIGGERED)
    assert OutputFormat().free_calls([STRICT_F], parallel=True, prompt="") is None
    output = OutputFormat(FORMATS["hermes"], REASONING["think"])
    grammars = output.free_calls([STRICT_F], parallel=True, prompt="assistant\n<think>\n")
    assert grammars is not None
    assert accepts(grammars.text, "so <tool_call>?</think>\n\nHm. " + shape_text(FORMATS["hermes"], ("f", ANSWER)))
    assert not accepts(grammars.text, "so</think>" + shape_text(FORMATS["hermes"], ("f", "{}")))


def test_schemas_are_checked_with_their_place() -> None:
    shape = FORMATS["hermes"].shape
    assert shape is not None
    unique = {"type": "object", "properties": {"a": {"type": "array", "uniqueItems": True}}}
    strict = CallableTool("f", unique, strict=True, path="tools[3].function.parameters")
    with pytest.raises(
        UnsupportedParameterError, match=r"tools\[3\]\.function\.parameters\.properties\.a.*uniqueItems"
    ):
        tool_calls(shape, [G, strict], parallel=True)
    lenient = tool_calls(shape, [CallableTool("f", unique)], parallel=True)
    assert accepts(lenient, shape_text(FORMATS["hermes"], ("f", '{"a": [1]}')))
    wrong = CallableTool("f", {"type": "object", "properties": {"a": {"type": "int"}}}, path="tools[0].parameters")
    with pytest.raises(InvalidParameterError, match=r"tools\[0\]\.parameters\.properties\.a\.type"):
        tool_calls(shape, [wrong], parallel=True)


def test_two_hundred_tools_are_compiled() -> None:
    shape = FORMATS["hermes"].shape
    assert shape is not None
    tools = [
        CallableTool(f"tool_{i}", {"type": "object", "properties": {f"p{i}": {"type": "string"}}}) for i in range(200)
    ]
    text = tool_calls(shape, tools, parallel=True)
    assert accepts(text, shape_text(FORMATS["hermes"], ("tool_17", '{"p17": ""}'), ("tool_170", '{"p170": ""}')))
    assert not accepts(text, shape_text(FORMATS["hermes"], ("tool_17", '{"p170": ""}')))


@pytest.mark.parametrize("format", TOOL_FORMATS, ids=lambda format: format.name)
def test_a_forced_call_is_parsed_in_the_words_it_is_forced_in(format: ToolFormat) -> None:
    output = OutputFormat(format, REASONING["think"], {})
    grammars = output.forced_calls([F, G], parallel=False, prompt="assistant\n<think>\n\n</think>\n\n")
    text = shape_text(forced_format(format), ("f", ANSWER))
    assert accepts(grammars.text, text)
    parser = output.parser("", tools={"f": F.parameters, "g": None}, is_forced=True)
    assert parser is not None
    parsed = join([parser.push(text), parser.finish()])
    assert [(call.name, call.arguments) for call in parsed.tool_calls] == [("f", ANSWER)]
    if format.shape is None:
        assert forced_format(format).name == format.forced_in != format.name


def test_the_prompt_tells_where_reasoning_may_stand() -> None:
    output = OutputFormat(FORMATS["mistral"], REASONING["mistral"], IDS)

    def allowed(prompt: str, final_message: str | None = None) -> list[bool]:
        grammars = output.forced_calls([G], parallel=False, prompt=prompt, final_message=final_message)
        call = "[TOOL_CALLS]g[ARGS]{}"
        texts = (call, "why[/THINK]" + call, "[THINK]why[/THINK]" + call)
        found = [accepts(grammars.text, text, IDS) for text in texts]
        assert all(accepts(grammars.checked, text) for text, fits in zip(texts, found, strict=True) if fits)
        return found

    assert allowed("[/INST]") == [True, False, True]
    assert allowed("[/INST][THINK]") == [False, True, False]
    assert allowed("[/INST][THINK][/THINK]") == [True, False, False]
    assert allowed("[/INST][THINK]so", "[THINK]so") == [False, True, False]
    assert allowed("[/INST]so", "so") == [True, False, False]
    behind = output.after_reasoning(Grammars(JSON, JSON), prompt="[/INST][THINK]")
    assert accepts(behind.text, "why[/THINK]\n" + ANSWER, IDS)
    assert OutputFormat().after_reasoning(Grammars(JSON, JSON), prompt="") == (JSON, JSON)


def test_a_model_without_a_format_cannot_be_made_to_call() -> None:
    with pytest.raises(InvalidParameterError, match="tool_choice is 'required'; it must be none or auto"):
        OutputFormat().forced_calls([G], parallel=True, prompt="")
