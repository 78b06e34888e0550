"""Calls are read as they were written, however the text is cut; what is no call is content, once and whole.

A vector: the text of an answer, and what must come out of it. "<call>" stands in the names of vectors for what they show.
"""

from __future__ import annotations

import json
import random
import string
from collections.abc import Iterator, Mapping
from itertools import pairwise
from typing import Any, NamedTuple

import pytest
from hypothesis import given, settings, strategies as st

from serve_app.text.output_parser import OutputDelta, ToolCallDelta, join
from serve_app.text.tool_formats import TOOL_FORMATS, ToolFormat, detect_tool_format

BY_NAME = {format.name: format for format in TOOL_FORMATS}
TOOLS: Mapping[str, Mapping[str, Any] | None] = {
    "f": {
        "type": "object",
        "properties": {
            "a": {"type": "integer"},
            "s": {"type": "string"},
            "o": {"type": "object"},
            "any": {"anyOf": [{"type": "string"}, {"type": "boolean"}]},
        },
    },
    "g": None,
    "get-weather.v2": {"type": "object"},
}


class Vector(NamedTuple):
    text: str
    content: str = ""
    calls: tuple[tuple[str, str], ...] = ()


def parse(format: ToolFormat, pieces: list[str]) -> OutputDelta:
    parser = format.parser(TOOLS)
    return join([*map(parser.push, pieces), parser.finish()])


def expected(vector: Vector) -> OutputDelta:
    calls = tuple(ToolCallDelta(i, name, arguments) for i, (name, arguments) in enumerate(vector.calls))
    return OutputDelta(vector.content, "", calls)


HARD = r'{"s": "a } ] \" \\ { é 東京 😀 \u00e9 \n", "o": {"x": [{}, {"y": [1, {"z": null}]}]}}'
"""Braces in strings, escapes, unicode, nesting. Spaces that writing it anew would lose."""
ODD_SPACES = '{ "a" :1 ,\n"s":  "x"}'


HERMES: dict[str, Vector] = {
    "hard arguments": Vector(f'<tool_call>\n{{"name": "f", "arguments": {HARD}}}\n</tool_call>', "", (("f", HARD),)),
    "odd spaces stay": Vector(
        f'<tool_call>{{ "name" :"f" , "arguments":{ODD_SPACES} }}</tool_call>', "", (("f", ODD_SPACES),)
    ),
    "text before, between, after": Vector(
        'Let me see.\n\n<tool_call>\n{"name": "g", "arguments": {}}\n</tool_call>\nand\n'
        '<tool_call>{"name": "g", "arguments": {}}</tool_call> done ',
        "Let me see.\n\n\nand\n done",
        (("g", "{}"), ("g", "{}")),
    ),
    "arguments before the name": Vector(
        '<tool_call>{"arguments": {"a": 1}, "name": "f"}</tool_call>', "", (("f", '{"a": 1}'),)
    ),
    "parameters": Vector('<tool_call>{"name": "f", "parameters": {"a": 1}}</tool_call>', "", (("f", '{"a": 1}'),)),
    "no arguments": Vector('<tool_call>{"name": "g"}</tool_call>', "", (("g", "{}"),)),
    "arguments are null": Vector('<tool_call>{"name": "g", "arguments": null}</tool_call>', "", (("g", "{}"),)),
    "arguments in a string": Vector(
        r'<tool_call>{"name": "f", "arguments": "{\"a\": 1}"}</tool_call>', "", (("f", '{"a": 1}'),)
    ),
    "arguments in a string, before the name": Vector(
        r'<tool_call>{"arguments": "{\"a\": 1}", "name": "f"}</tool_call>', "", (("f", '{"a": 1}'),)
    ),
    "further members": Vector(
        '<tool_call>{"id": 7, "type": "function", "name": "f", "arguments": {"a": 1}, "x": [{"]": "}"}]}</tool_call>',
        "",
        (("f", '{"a": 1}'),),
    ),
    "arguments in a string that breaks a line": Vector(
        '<tool_call>{"name": "f", "arguments": "{\n}"}</tool_call>', "", (("f", "{\n}"),)
    ),
    "arguments twice": Vector(
        '<tool_call>{"name": "f", "arguments": {"a": 1}, "parameters": {"a": 2}}</tool_call>', "", (("f", '{"a": 1}'),)
    ),
    "name with an escape": Vector(r'<tool_call>{"name": "\u0067", "arguments": {}}</tool_call>', "", (("g", "{}"),)),
    "name with a dot and a dash": Vector('<tool_call>{"name": "get-weather.v2"}', "", (("get-weather.v2", "{}"),)),
    "two in one block": Vector(
        '<tool_call>\n{"name": "g", "arguments": {}}\n{"name": "f", "arguments": {}}\n</tool_call>',
        "",
        (("g", "{}"), ("f", "{}")),
    ),
    "no closer": Vector('<tool_call>{"name": "g"}\n<tool_call>{"name": "g"}', "", (("g", "{}"), ("g", "{}"))),
    "marker in a string": Vector(
        '<tool_call>{"name": "f", "arguments": {"s": "</tool_call><tool_call>"}}</tool_call>',
        "",
        (("f", '{"s": "</tool_call><tool_call>"}'),),
    ),
    "a brace too many": Vector('<tool_call>{"name": "g", "arguments": {}}}</tool_call> x', "} x", (("g", "{}"),)),
    "white space before a closer that comes late": Vector(
        'a  <tool_call>{"name": "g"}} \n</tool_call>b', "a  }b", (("g", "{}"),)
    ),
    "closer of a block without a call": Vector(
        '<tool_call>{"name": "g"}<tool_call>no</tool_call>', "<tool_call>no</tool_call>", (("g", "{}"),)
    ),
    "a brace too few": Vector('<tool_call>{"name": "g", "arguments": {}</tool_call> x', " x", (("g", "{}"),)),
    "arguments broken off": Vector(
        '<tool_call>{"name": "f", "arguments": {"a": 1</tool_call> x', " x", (("f", '{"a": 1'),)
    ),
    "arguments broken off by a call": Vector(
        '<tool_call>{"name": "f", "arguments": {"a": <tool_call>{"name": "g"}', "", (("f", '{"a": '), ("g", "{}"))
    ),
    "cut in the arguments": Vector(r'<tool_call>{"name": "f", "arguments": {"s": "x\"', "", (("f", r'{"s": "x\"'),)),
    "cut in the name": Vector('<tool_call>{"name": "f', '<tool_call>{"name": "f'),
    "cut behind the name": Vector('<tool_call>\n{"name": "f", "arg', '<tool_call>\n{"name": "f", "arg'),
    "cut in the opener": Vector("Well <tool_ca", "Well <tool_ca"),
    "cut in the closer": Vector('<tool_call>{"name": "g"}</tool_ca', "</tool_ca", (("g", "{}"),)),
    "unknown name": Vector(
        '<tool_call>\n{"name": "h", "arguments": {"a": 1}}\n</tool_call>',
        '<tool_call>\n{"name": "h", "arguments": {"a": 1}}\n</tool_call>',
    ),
    "unknown name, arguments first": Vector(
        '<tool_call>{"arguments": {"a": 1}, "name": "h"}</tool_call>',
        '<tool_call>{"arguments": {"a": 1}, "name": "h"}</tool_call>',
    ),
    "broken, then whole": Vector(
        'a <tool_call> oops <tool_call>{"name" "g"}</tool_call> <tool_call>{"name": "g"}</tool_call>',
        'a <tool_call> oops <tool_call>{"name" "g"}</tool_call>',
        (("g", "{}"),),
    ),
    "openers in a row": Vector('<tool_call><tool_call>{"name": "g"}', "<tool_call>", (("g", "{}"),)),
    "arguments that are no object": Vector(
        '<tool_call>{"name": "f", "arguments": [1]}</tool_call>',
        '<tool_call>{"name": "f", "arguments": [1]}</tool_call>',
    ),
    "name that is no string": Vector('<tool_call>{"name": 3}', '<tool_call>{"name": 3}'),
    "no object": Vector("<tool_call>f(a=1)</tool_call>", "<tool_call>f(a=1)</tool_call>"),
    "half of a surrogate pair for a name": Vector(r'<tool_call>{"name": "\ud83d"}', r'<tool_call>{"name": "\ud83d"}'),
    "JSON without a marker": Vector('{"name": "f", "arguments": {}}', '{"name": "f", "arguments": {}}'),
    "a tag in text": Vector("if a <b> c </tool_call>", "if a <b> c </tool_call>"),
}

LLAMA3_JSON: dict[str, Vector] = {
    "hard arguments": Vector(f'{{"name": "f", "parameters": {HARD}}}', "", (("f", HARD),)),
    "behind the tag": Vector(f'<|python_tag|>{{"name": "f", "parameters": {HARD}}}', "", (("f", HARD),)),
    "odd spaces stay": Vector(f' {{"name": "f" ,"parameters": {ODD_SPACES}\n}} ', "", (("f", ODD_SPACES),)),
    "with a type": Vector('{"type": "function", "name": "f", "parameters": {"a": 1}}', "", (("f", '{"a": 1}'),)),
    "arguments": Vector('{"name": "f", "arguments": {"a": 1}}', "", (("f", '{"a": 1}'),)),
    "semicolon": Vector(
        '{"name": "f", "parameters": {}}; {"name": "g", "parameters": {}}', "", (("f", "{}"), ("g", "{}"))
    ),
    "line break": Vector('{"name": "f"}\n{"name": "g"}\n', "", (("f", "{}"), ("g", "{}"))),
    "comma": Vector('{"name": "f"}, {"name": "g"}', "", (("f", "{}"), ("g", "{}"))),
    "nothing between": Vector('{"name": "f"}{"name": "g"}', "", (("f", "{}"), ("g", "{}"))),
    "tag for each": Vector('<|python_tag|>{"name": "f"};<|python_tag|>{"name": "g"}', ";", (("f", "{}"), ("g", "{}"))),
    "text before and after": Vector('I will:\n\n{"name": "f"}\nNow.', "I will:\n\n\nNow.", (("f", "{}"),)),
    "text between": Vector('{"name": "f"}\nand\n{"name": "g"}', "\nand", (("f", "{}"), ("g", "{}"))),
    "behind the tag inside of a line": Vector('See <|python_tag|> {"name": "f"}', "See", (("f", "{}"),)),
    "inside of a line": Vector('Say {"name": "f"} and {"name": "g"}', 'Say {"name": "f"} and {"name": "g"}'),
    "separator without a call": Vector('{"name": "f"} ; no', " ; no", (("f", "{}"),)),
    "an answer in JSON": Vector('{"name": "Bob", "age": 3}', '{"name": "Bob", "age": 3}'),
    "an answer of another shape": Vector('{"f": {"name": "f"}}', '{"f": {"name": "f"}}'),
    "an answer with the name of a tool": Vector(
        '{"name": "f", "color": "red", "parameters": {}}', '{"name": "f", "color": "red", "parameters": {}}'
    ),
    "several lines of JSON": Vector('{\n  "a": 1,\n  "b": {\n"c": {}}}', '{\n  "a": 1,\n  "b": {\n"c": {}}}'),
    "unknown name behind the tag": Vector('<|python_tag|>{"name": "h"}', '<|python_tag|>{"name": "h"}'),
    "code behind the tag": Vector('<|python_tag|>f.call(a="b")', '<|python_tag|>f.call(a="b")'),
    "cut in the arguments": Vector('{"name": "f", "parameters": {"a": [1, 2', "", (("f", '{"a": [1, 2'),)),
    "cut in the name": Vector('{"name": "f', '{"name": "f'),
    "only a brace": Vector("{", "{"),
    "cut in the tag": Vector("<|python", "<|python"),
}

MISTRAL: dict[str, Vector] = {
    "hard arguments": Vector(f'[TOOL_CALLS] [{{"name": "f", "arguments": {HARD}}}]', "", (("f", HARD),)),
    "hard arguments, newer": Vector(f"[TOOL_CALLS]f[ARGS]{HARD}", "", (("f", HARD),)),
    "two, newer": Vector(
        'Yes.[TOOL_CALLS]f[ARGS]{"a": 1}[TOOL_CALLS]get-weather.v2[ARGS]{}',
        "Yes.",
        (("f", '{"a": 1}'), ("get-weather.v2", "{}")),
    ),
    "with ids": Vector(
        '[TOOL_CALLS][{"name": "f", "arguments": {}, "id": "Ab1"} , {"id": "x", "name": "g", "arguments": {} }]',
        "",
        (("f", "{}"), ("g", "{}")),
    ),
    "with an id, newer": Vector("[TOOL_CALLS]f[CALL_ID]Ab12Cd34e[ARGS]{}", "", (("f", "{}"),)),
    "no marker of arguments": Vector('[TOOL_CALLS]f{"a": 1}', "", (("f", '{"a": 1}'),)),
    "one object": Vector('[TOOL_CALLS]{"name": "f", "arguments": {}}', "", (("f", "{}"),)),
    "text after": Vector('[TOOL_CALLS] [{"name": "g", "arguments": {}}] done', " done", (("g", "{}"),)),
    "lists and the marker in arguments": Vector(
        '[TOOL_CALLS]f[ARGS]{"o": [[1], ["[TOOL_CALLS]"]]}', "", (("f", '{"o": [[1], ["[TOOL_CALLS]"]]}'),)
    ),
    "arguments broken off by a call": Vector(
        '[TOOL_CALLS]f[ARGS]{"a": [1, [TOOL_CALLS]g[ARGS]{}', "", (("f", '{"a": [1, '), ("g", "{}"))
    ),
    "a comma and no more": Vector('[TOOL_CALLS] [{"name": "g"}, x', ", x", (("g", "{}"),)),
    "no bracket at the end": Vector('[TOOL_CALLS] [{"name": "g"}', "", (("g", "{}"),)),
    "empty list": Vector("[TOOL_CALLS] []", "[TOOL_CALLS] []"),
    "unknown name": Vector(
        '[TOOL_CALLS] [{"name": "h"}, {"name": "g"}]', '[TOOL_CALLS] [{"name": "h"}, {"name": "g"}]'
    ),
    "unknown name, newer": Vector("[TOOL_CALLS]h[ARGS]{}", "[TOOL_CALLS]h[ARGS]{}"),
    "name that only begins like one": Vector("[TOOL_CALLS]fg[ARGS]{}", "[TOOL_CALLS]fg[ARGS]{}"),
    "other marker": Vector("[TOOL_CALLS]f[ARGUS]{}", "[TOOL_CALLS]f[ARGUS]{}"),
    "no arguments, newer": Vector("[TOOL_CALLS]f[ARGS]1", "[TOOL_CALLS]f[ARGS]1"),
    "cut in the arguments": Vector('[TOOL_CALLS]f[ARGS]{"s": "[TO', "", (("f", '{"s": "[TO'),)),
    "cut outside of a string": Vector('[TOOL_CALLS]f[ARGS]{"s": [TO', "", (("f", '{"s": [TO'),)),
    "cut in the name": Vector("[TOOL_CALLS]f", "[TOOL_CALLS]f"),
    "cut in the marker": Vector("Yes [TOOL_", "Yes [TOOL_"),
    "list without a marker": Vector('[{"name": "f", "arguments": {}}]', '[{"name": "f", "arguments": {}}]'),
}

PYTHONIC: dict[str, Vector] = {
    "literals": Vector(
        "[f(a=-1, b=2.5e3, c=True, d=None, e=[1, 'x', (2,)], o={'k': [], \"l\": {}}, s=\"\")]",
        "",
        (("f", '{"a": -1, "b": 2.5e3, "c": true, "d": null, "e": [1, "x", [2]], "o": {"k": [], "l": {}}, "s": ""}'),),
    ),
    "numbers that JSON lacks": Vector(
        "[f(a=+1, b=0x1F, c=1_000, d=.5, e=1.)]", "", (("f", '{"a": 1, "b": 31, "c": 1000, "d": 0.5, "e": 1.0}'),)
    ),
    "constants of JSON": Vector("[f(a=true, b=null)]", "", (("f", '{"a": true, "b": null}'),)),
    "strings": Vector(
        r"""[f(a="it's )]", b='say "x"', c='\'\n\t\\\x41\u00e9\U0001f600\q', d='é東京😀')]""",
        "",
        (("f", r"""{"a": "it's )]", "b": "say \"x\"", "c": "'\n\t\\Aé😀\\q", "d": "é東京😀"}"""),),
    ),
    "a surrogate pair": Vector(r'[f(s="\ud83d\ude00")]', "", (("f", r'{"s": "\ud83d\ude00"}'),)),
    "string on several lines": Vector(
        '[f(s="""a\n"b" ""c\'""", t=\'\'\'\'\'\')]', "", (("f", r"""{"s": "a\n\"b\" \"\"c'", "t": ""}"""),)
    ),
    "a line break in a string": Vector("[f(s='a\n  b')]", "", (("f", r'{"s": "a\n  b"}'),)),
    "two": Vector("[f(a=1), g()]", "", (("f", '{"a": 1}'), ("g", "{}"))),
    "spaces and commas": Vector("[ f( a = 1 , ) ,\n g( ) , ]\n", "", (("f", '{"a": 1}'), ("g", "{}"))),
    "names": Vector("[get-weather.v2(größe=1)]", "", (("get-weather.v2", '{"größe": 1}'),)),
    "between the markers": Vector("<|python_start|>[g()]<|python_end|>", "", (("g", "{}"),)),
    "text before and after": Vector("I call:\n[g()]\nDone.", "I call:\n\nDone.", (("g", "{}"),)),
    "text between": Vector("[g()] and\n[g()]", " and", (("g", "{}"), ("g", "{}"))),
    "inside of a line": Vector("as in [g()]", "as in [g()]"),
    "right behind a call": Vector(
        "See <|python_start|>[g()]<|python_end|> [g()] [g()]", "See", (("g", "{}"), ("g", "{}"), ("g", "{}"))
    ),
    "a link": Vector("[f](http://x) and [1]", "[f](http://x) and [1]"),
    "a list": Vector("[1, 2]\n[]\n[[g()]]", "[1, 2]\n[]\n[[g()]]"),
    "unknown name": Vector("[h(a=1), g()]", "[h(a=1), g()]"),
    "second name unknown": Vector("[g(), h(a=1)]", ", h(a=1)]", (("g", "{}"),)),
    "no keyword": Vector("[f(1)]", "[f(1)]"),
    "then no keyword": Vector("[f(a=1, 2)]", ", 2)]", (("f", '{"a": 1'),)),
    "a variable": Vector("[f(a=x)] y", "x)] y", (("f", '{"a": '),)),
    "not a number": Vector("[f(a=nan)]", "nan)]", (("f", '{"a": '),)),
    "a set": Vector("[f(a={'x'})]", "})]", (("f", '{"a": {"x"'),)),
    "key that is no string": Vector("[f(a={1: 2})]", "1: 2})]", (("f", '{"a": {'),)),
    "broken escape": Vector(r"[f(a='\xg')]", r"\xg')]", (("f", '{"a": "'),)),
    "too deep": Vector("[f(a=" + "[" * 70, "[" * 6, (("f", '{"a": ' + "[" * 64),)),
    "cut in a string": Vector("[f(a='x", "", (("f", '{"a": "x'),)),
    "cut in a number": Vector("[f(a=12", "", (("f", '{"a": 12'),)),
    "cut in the name": Vector("[get-wea", "[get-wea"),
    "cut before the keyword": Vector("[f(", "[f("),
    "cut in the keyword": Vector("[f(ab", "[f(ab"),
    "only a bracket": Vector("[", "["),
    "no bracket at the end": Vector("[g()", "", (("g", "{}"),)),
}


def coder(name: str, **values: str) -> str:
    inner = "".join(f"<parameter={key}>\n{value}\n</parameter>\n" for key, value in values.items())
    return f"<tool_call>\n<function={name}>\n{inner}</function>\n</tool_call>"


QWEN3_CODER: dict[str, Vector] = {
    "values by schema": Vector(
        coder("f", a="1", s="1", o='{"x": [1, {"y": "</"}]}', any="true"),
        "",
        (("f", '{"a": 1, "s": "1", "o": {"x": [1, {"y": "</"}]}, "any": true}'),),
    ),
    "values that are no JSON": Vector(
        coder("f", a="one", o="{1}", any="yes"), "", (("f", '{"a": "one", "o": "{1}", "any": "yes"}'),)
    ),
    "constants": Vector(coder("f", any="True", a="None"), "", (("f", '{"any": true, "a": null}'),)),
    "not a number": Vector(coder("f", a="NaN"), "", (("f", '{"a": "NaN"}'),)),
    "unknown parameters are text": Vector(coder("g", z="12"), "", (("g", '{"z": "12"}'),)),
    "text on several lines": Vector(
        coder("f", s='\n  if a < b:\n\tprint("</p>\\n")\n\n'),
        "",
        (("f", r'{"s": "\n  if a < b:\n\tprint(\"</p>\\n\")\n\n"}'),),
    ),
    "no line breaks": Vector(
        "<tool_call><function=f><parameter=s>x</parameter></function></tool_call>", "", (("f", '{"s": "x"}'),)
    ),
    "empty text": Vector("<function=f><parameter=s>\n</parameter></function>", "", (("f", '{"s": ""}'),)),
    "without arguments": Vector(coder("g"), "", (("g", "{}"),)),
    "no tool_call around": Vector("<function=g>\n</function>", "", (("g", "{}"),)),
    "two, and text": Vector(
        f"I see.\n{coder('g')}\nand\n{coder('get-weather.v2')} done",
        "I see.\n\nand\n done",
        (("g", "{}"), ("get-weather.v2", "{}")),
    ),
    "two functions in one block": Vector(
        "<tool_call>\n<function=g>\n</function>\n<function=g></function>\n</tool_call>", "", (("g", "{}"), ("g", "{}"))
    ),
    "markers in text": Vector(coder("f", s="<tool_call>"), "", (("f", '{"s": "<tool_call>"}'),)),
    "unknown name": Vector(coder("h", a="1"), coder("h", a="1")),
    "JSON inside": Vector('<tool_call>{"name": "g"}</tool_call>', '<tool_call>{"name": "g"}</tool_call>'),
    "openers in a row": Vector(f"<tool_call>{coder('g')}", "<tool_call>", (("g", "{}"),)),
    "text in the function": Vector(
        "<function=f>\nhm <parameter=a>1</parameter></function>",
        "\nhm <parameter=a>1</parameter></function>",
        (("f", ""),),
    ),
    "cut in a text": Vector("<function=f><parameter=s>\nab\n</param", "", (("f", r'{"s": "ab\n</param'),)),
    "cut in another value": Vector("<function=f><parameter=o>\n{1", "{1", (("f", '{"o": '),)),
    "cut in the name": Vector("<tool_call>\n<function=get", "<tool_call>\n<function=get"),
    "cut in the opener": Vector("<tool_call>\n<func", "<tool_call>\n<func"),
}

VECTORS = {
    "hermes": HERMES,
    "llama3_json": LLAMA3_JSON,
    "mistral": MISTRAL,
    "mistral_list": MISTRAL,
    "pythonic": PYTHONIC,
    "qwen3_coder": QWEN3_CODER,
}
PLAIN = {
    "text": "Hello, what can I do?",
    "nothing": "",
    "white space": " \n",
    "white space around": "\n\n Hello\n ",
    "signs": "a < b, c > d; {x}, [y] (z) \"q\" 'r' \\ <|x|>",
    "lines": "# Title\n\n- one {\n- two [\n\n```json\n[]\n```\n",
}


def all_vectors() -> Iterator[Any]:
    for name, format in BY_NAME.items():
        for title, vector in VECTORS[name].items():
            yield pytest.param(format, vector, id=f"{name}: {title}")
        for title, text in PLAIN.items():
            yield pytest.param(format, Vector(text, text), id=f"{name}: plain {title}")


@pytest.mark.parametrize(("format", "vector"), list(all_vectors()))
def test_vectors_whole_and_cut_everywhere(format: ToolFormat, vector: Vector) -> None:
    text, wanted = vector.text, expected(vector)
    assert parse(format, [text]) == wanted
    assert parse(format, list(text)) == wanted
    for place in range(1, len(text)):
        assert parse(format, [text[:place], text[place:]]) == wanted


@pytest.mark.parametrize("format", TOOL_FORMATS, ids=BY_NAME)
def test_the_example_of_each_row(format: ToolFormat) -> None:
    calls = parse(format, [format.example])
    assert calls.content == ""
    assert [(call.name, json.loads(call.arguments)) for call in calls.tool_calls] == [("f", {"a": 1}), ("g", {})]


FRAGMENTS = [
    *{marker for format in TOOL_FORMATS for marker in format.markers},
    *('{"name": "f", "arguments": ', '{"name": "', "f", "g", '"', "{", "}", "[", "]", "(", ")", ",", ":", ";", "\\"),
    *(
        "<function=f>",
        "</function>",
        "<parameter=s>",
        "</parameter>",
        "f(a=",
        "'",
        "1",
        "null",
        " ",
        "\n",
        "é",
        "<",
        "x",
    ),
    *('{"a": 1}', '{"name": "g", "arguments": {}}', "[f(a=1), ", "g()]", "[TOOL_", "</tool", "\U0001f600"),
]


def cuts(text: str, places: list[int]) -> list[str]:
    return [text[i:j] for i, j in pairwise([0, *sorted(min(place, len(text)) for place in places), len(text)])]


@pytest.mark.parametrize("format", TOOL_FORMATS, ids=BY_NAME)
@settings(max_examples=50, deadline=None)
@given(
    text=st.lists(st.sampled_from(FRAGMENTS), max_size=25).map("".join),
    places=st.lists(st.integers(0, 150), max_size=8),
)
def test_any_text_comes_out_the_same_however_it_is_cut(format: ToolFormat, text: str, places: list[int]) -> None:
    whole = parse(format, [text])
    assert parse(format, cuts(text, places)) == whole
    assert parse(format, list(text)) == whole
    if not whole.tool_calls:
        assert whole.content == text


def damaged(seed: int, format: ToolFormat) -> str:
    """Some of the vectors in a row, with a few characters taken out, doubled or changed."""
    numbers = random.Random(f"{seed} {format.name}")
    vectors = list(VECTORS[format.name].values())
    text = numbers.choice(["", "\n", " x "]).join(vector.text for vector in numbers.choices(vectors, k=3))
    for _ in range(numbers.randrange(4)):
        at = numbers.randrange(len(text))
        text = text[:at] + numbers.choice(["", text[at] * 2, numbers.choice(string.printable)]) + text[at + 1 :]
    return text


@pytest.mark.parametrize("format", TOOL_FORMATS, ids=BY_NAME)
def test_damaged_answers(format: ToolFormat) -> None:
    """Cut by chance they give the same; content and arguments stand in the text, in their order, and are not doubled."""
    num_calls = 0
    for seed in range(100):
        text = damaged(seed, format)
        numbers = random.Random(seed)
        whole = parse(format, [text])
        assert parse(format, cuts(text, numbers.choices(range(len(text) + 1), k=6))) == whole
        num_calls += len(whole.tool_calls)
        if format.shape is not None:
            assert_nothing_is_lost(format, text)
    assert num_calls > 100


def assert_nothing_is_lost(format: ToolFormat, text: str) -> None:
    """What comes out stands in the text, in its order and once. Left out are white space, and of each call its name, what
    holds it together, and members that it has no place for."""
    parser = format.parser(TOOLS)
    at, num_out, num_calls = 0, 0, 0
    for delta in [*map(parser.push, text), parser.finish()]:
        for call in delta.tool_calls:
            num_calls += call.name is not None
        # "{}" in one piece is what stands for no arguments.
        out = "".join([*(c.arguments for c in delta.tool_calls if c.arguments != "{}"), delta.content])
        for char in "".join(out.split()):
            at = text.index(char, at) + 1
            num_out += 1
    num_characters = sum(not char.isspace() for char in text)
    assert num_characters - num_out <= 120 * num_calls


def test_arguments_come_as_they_grow() -> None:
    parser = BY_NAME["hermes"].parser(TOOLS)
    pieces = ["Hm <tool", "_call>\n", '{"name": "f"', ', "arguments": {"s', '": "x', " y", '"}', "}\n</tool_", "call>"]
    assert [parser.push(piece) for piece in pieces] == [
        OutputDelta("Hm"),
        OutputDelta(),
        OutputDelta(),
        OutputDelta(tool_calls=(ToolCallDelta(0, "f", '{"s'),)),
        OutputDelta(tool_calls=(ToolCallDelta(0, None, '": "x'),)),
        OutputDelta(tool_calls=(ToolCallDelta(0, None, " y"),)),
        OutputDelta(tool_calls=(ToolCallDelta(0, None, '"}'),)),
        OutputDelta(),
        OutputDelta(),
    ]
    assert parser.finish() == OutputDelta()


@pytest.mark.parametrize(
    ("name", "begin", "grows"),
    [
        ("llama3_json", '{"name": "f", "parameters": {"s": "', '{"s": "'),
        ("mistral", '[TOOL_CALLS]f[ARGS]{"s": "', '{"s": "'),
        ("pythonic", "[f(s='", '{"s": "'),
        ("qwen3_coder", "<function=f><parameter=s>\n", '{"s": "'),
    ],
)
def test_a_long_string_is_not_kept_back(name: str, begin: str, grows: str) -> None:
    parser = BY_NAME[name].parser(TOOLS)
    assert parser.push(begin + "x").tool_calls == (ToolCallDelta(0, "f", grows + "x"),)
    for _ in range(50):
        assert parser.push("yy zz") == OutputDelta(tool_calls=(ToolCallDelta(0, None, "yy zz"),))


def test_content_is_not_kept_back() -> None:
    for format in TOOL_FORMATS:
        parser = format.parser(TOOLS)
        assert [parser.push(piece).content for piece in ("One", " and", " ", "two.\n", "x")] == [
            *("One", " and", "", " two.", "\nx")
        ]


@pytest.mark.parametrize("format", TOOL_FORMATS, ids=BY_NAME)
def test_hostile_text_is_read_once(format: ToolFormat) -> None:
    """A model can be made to repeat anything. Long texts that look like calls at every place take no second look."""
    units = [
        *(
            *format.markers,
            '{"name": "f", "arguments": {"',
            '<tool_call>{"arguments": {"a": "',
            "[f(a=[",
            "[TOOL_CALLS] [",
        ),
        *(
            '<tool_call>{"arguments": {"',
            "<function=f><parameter=s>",
            "<function=f><parameter=a>",
            "{",
            "[",
            "<",
            "'",
            "\\",
        ),
    ]
    for unit in units:
        text = unit * (40_000 // len(unit))
        parser = format.parser(TOOLS)
        num_out, num_places = 0, 0
        for i in range(0, len(text), 1000):
            delta = parser.push(text[i : i + 1000])
            num_places += 1
            num_out += len(delta.content) + sum(len(call.arguments) for call in delta.tool_calls)
        delta = parser.finish()
        num_out += len(delta.content) + sum(len(call.arguments) for call in delta.tool_calls)
        assert num_places >= 39
        assert num_out > len(text) / 10


PLAIN_TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:"
WITH_TOOLS = "{% if tools %}{% for tool in tools %}{{ tool | tojson }}{% endfor %}{% endif %}" + PLAIN_TEMPLATE


@pytest.mark.parametrize(
    ("template", "name"),
    [
        (PLAIN_TEMPLATE, None),
        (PLAIN_TEMPLATE + "{# <tool_call> \"name\" 'arguments' [TOOL_CALLS] #}", None),  # looks at no tools
        (WITH_TOOLS, None),
        (WITH_TOOLS + r"""{{ '<tool_call>\n{\"name\": \"' + t.name + '\", \"arguments\": ' }}""", "hermes"),
        (WITH_TOOLS + """{{- '<tool_call>\n{"name": "' + t.name + '", "arguments": ' }}""", "hermes"),
        (WITH_TOOLS + "<tool_call>\n{'arguments': <args-dict>, 'name': <function-name>}\n</tool_call>", "hermes"),
        (WITH_TOOLS + "<tool_call>{function-name}\n<arg_key>{arg-key}</arg_key>", None),  # GLM 4.5
        (WITH_TOOLS + "<tool_call>\n<function=example>\n<parameter=p>\nvalue\n</parameter>", "qwen3_coder"),
        (WITH_TOOLS + "{{ '[TOOL_CALLS] [' }}", "mistral_list"),
        (WITH_TOOLS + "{{ '[TOOL_CALLS]' + t.name + '[ARGS]' }}", "mistral"),
        (WITH_TOOLS + "Respond in the format [func_name1(params_name1=params_value1), func_name2(params)]", "pythonic"),
        (
            WITH_TOOLS
            + """{{- 'Respond in the format {"name": function name, "parameters": dictionary of argument}.' }}""",
            "llama3_json",
        ),
        (WITH_TOOLS + """{{ '<tool_call>[{"type": "function"}]' }}""", None),
    ],
)
def test_detection(template: str, name: str | None) -> None:
    found = detect_tool_format(template)
    assert (found.name if found else None) == name


def test_every_row_has_vectors() -> None:
    assert VECTORS.keys() == BY_NAME.keys()
    assert len(BY_NAME) == len(TOOL_FORMATS)
