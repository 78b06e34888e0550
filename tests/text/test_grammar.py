"""Grammars as the library reads them: which texts they take. Bytes are the tokens here; no model."""

from __future__ import annotations

import json
import random
import re
from typing import Any

import jsonschema
import llguidance
import pytest

from serve_app.engine.request import MAX_GRAMMAR_LENGTH
from serve_app.errors import InvalidParameterError
from serve_app.text.grammar import (
    MAX_CHOICES,
    JsonOptions,
    choice,
    combined,
    grammar,
    json_object,
    json_schema,
    regex,
)
from serve_app.text.grammar_helper import byte_tokenizer
from tests.random_schemas import random_schema


def takes(text: str, sentence: str) -> bool:
    """Whether ``sentence`` is one, from its first byte to its last."""
    matcher = llguidance.LLMatcher(byte_tokenizer(), text, log_level=0)
    assert not matcher.is_error(), matcher.get_error()
    data = sentence.encode()
    return matcher.try_consume_tokens(list(data)) == len(data) and matcher.is_accepting()


PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "age": {"type": "integer", "minimum": 0, "maximum": 150}},
    "required": ["name"],
}


@pytest.mark.parametrize(
    ("sentence", "expected"),
    [
        ('{"name":"Ann"}', True),
        ('{"name": "Ann", "age": 31}', True),
        ('{"name":"Ann","age":31}', True),
        ('{"name":  "Ann"}', False),
        ('{ "name":"Ann"}', False),
        ('{"name":"Ann" }', False),
        ('{"name":"Ann",\n"age":31}', False),
        ('{"name":"Ann"}\n', False),
        ('{"name":"Ann","age":151}', False),
        ('{"age":31}', False),
        ('{"name":"Ann","more":1}', False),
        ('{"name":"é 😀 \\n \\u0000"}', True),
        ('{"name":"\\u00e9"}', False),  # what prints is written as it is
        ('{"name":"\n"}', False),
    ],
)
def test_a_schema_with_at_most_one_blank(sentence: str, expected: bool) -> None:
    assert takes(json_schema(PERSON), sentence) is expected


@pytest.mark.parametrize(
    ("options", "taken", "refused"),
    [
        ({"disable_any_whitespace": True}, '{"a":1,"b":[2,3]}', '{"a": 1}'),
        ({"whitespace_pattern": ""}, '{"a":1}', '{"a": 1}'),
        ({"whitespace_pattern": r"[ \n]{0,2}"}, '{ "a":\n 1 }', '{"a":   1}'),
        ({"whitespace_pattern": r"\s?"}, '{\t"a":1}', '{"a":  1}'),
    ],
)
def test_white_space_as_asked_for(options: dict[str, Any], taken: str, refused: str) -> None:
    text = json_object(JsonOptions(**options))
    assert takes(text, taken)
    assert not takes(text, refused)


@pytest.mark.parametrize("pattern", ["a", "[^a]", ".", r"\x41", " " * 300, "(?s:.)", r"\S"])
def test_white_space_is_nothing_else(pattern: str) -> None:
    with pytest.raises(InvalidParameterError, match="a regex of blanks") as caught:
        json_object(JsonOptions(whitespace_pattern=pattern))
    assert caught.value.param == "whitespace_pattern"
    with pytest.raises(InvalidParameterError, match="left out where disable_any_whitespace"):
        json_object(JsonOptions(whitespace_pattern=" ", disable_any_whitespace=True))


def test_any_object() -> None:
    assert takes(json_object(), '{"a": [1, -2.5e3, "x", null, {"b": true}]}')
    assert not takes(json_object(), "[1]")


def test_references_and_old_drafts_are_read() -> None:
    tree = {
        "type": "object",
        "properties": {"v": {"type": "integer"}, "kids": {"type": "array", "items": {"$ref": "#"}}},
        "required": ["v"],
    }
    assert takes(json_schema(tree), '{"v":1,"kids":[{"v":2},{"v":3,"kids":[]}]}')
    odd = {"$ref": "#/parts/a~1b %/c", "parts": {"a/b %": {"c": {"const": "x"}}}}
    assert takes(json_schema(odd), '"x"')
    pair = {"type": "array", "items": [{"type": "integer"}, {"type": "null"}], "minItems": 2, "additionalItems": False}
    assert takes(json_schema(pair), "[1,null]")
    assert not takes(json_schema(pair), "[1,null,2]")
    above = {"type": "integer", "minimum": 3, "exclusiveMinimum": True}
    assert [takes(json_schema(above), str(i)) for i in (3, 4)] == [False, True]


def test_lenient_schemas_are_enforced_as_far_as_they_can_be() -> None:
    schema = {"oneOf": [{"type": "array", "uniqueItems": True}, {"type": "array", "maxItems": 1}]}
    text = json_schema(schema, strict=False)
    assert takes(text, "[1,1]")
    assert not takes(text, "{}")


@pytest.mark.parametrize(
    ("pattern", "taken", "refused"),
    [
        (r"\d{3}-\d{4}", "555-1234", "555-12345"),
        (r"^a/b$", "a/b", "a/bc"),
        (r"\d", "5", "٣"),
        (r"\w", "x", "é"),
        ("a\nb", "a\nb", "a b"),
        ("(?i)ja|nein", "NEIN", "jan"),
        (r"[/\]]+", "/]", "/}"),
        (r'"\\?"', '"\\"', '"\\\\"'),
        (r"\p{Greek}+", "αβ", "ab"),
    ],
)
def test_a_regex_is_all_of_the_text(pattern: str, taken: str, refused: str) -> None:
    assert takes(regex(pattern), taken)
    assert not takes(regex(pattern), refused)


def test_choices_are_taken_as_they_are() -> None:
    strings = ["no", "none", 'a "b" \\ /', "\x00\n\t", "é😀", "{}", "<b>", "@a", "no"]
    text = choice(strings)
    for string in strings:
        assert takes(text, string)
    assert not takes(text, "non")


@pytest.mark.parametrize(
    ("text", "taken", "refused"),
    [
        ('root ::= "SELECT " name\nname ::= [a-z]+', "SELECT ab", "SELECT 1"),
        ('root ::= "\\u0041\\x42" [\\u0043-\\u0045]', "ABD", "ABF"),
        ('root ::= expr\nexpr ::= term ("+" term)*\nterm ::= "(" expr ")" | [0-9]+ # a sum', "(1+2)+3", "(1+2"),
        ('?start: sum\n?sum: NUMBER ("+" NUMBER)*\n%import common.NUMBER', "1+2.5", "+"),
        ('start: "a" | start "b"', "abb", "ba"),
    ],
)
def test_grammars_in_both_languages(text: str, taken: str, refused: str) -> None:
    assert takes(grammar(text), taken)
    assert not takes(grammar(text), refused)


@pytest.mark.parametrize(
    ("make", "param"),
    [
        (lambda: regex(""), "regex"),
        (lambda: regex("a" * 20_000), "regex"),
        (lambda: choice([]), "choice"),
        (lambda: choice(["a", ""]), "choice[1]"),
        (lambda: choice(["a"] * (MAX_CHOICES + 1)), "choice"),
        (lambda: choice(["a" * 70_000]), "choice"),
        (lambda: choice("ab"), "choice"),  # type: ignore[arg-type]
        (lambda: grammar(" "), "grammar"),
        (lambda: grammar("#" * 70_000), "grammar"),
        (lambda: grammar("root ::= there-is-none"), "grammar"),
        (lambda: grammar("root ::= " + "(" * 5000 + '"a"' + ")" * 5000), "grammar"),
        (lambda: grammar('root ::= "\\ud800"'), "grammar"),
        (lambda: json_schema({"enum": ["x" * MAX_GRAMMAR_LENGTH]}), "schema"),
        (lambda: json_schema({"const": "\ud800"}), "schema"),
        (lambda: json_schema({"const": float("nan")}), "schema"),
    ],
)
def test_what_is_refused_before_anything_is_compiled(make: Any, param: str) -> None:
    with pytest.raises(InvalidParameterError) as caught:
        make()
    assert caught.value.param == param
    assert len(str(caught.value)) < 500


def test_grammars_are_put_together() -> None:
    text = combined('start: "f(" @f ")" | "g(" @g ")"', {"f": json_schema(PERSON), "g": regex("[a-z]+")})
    assert [grammar.get("name") for grammar in json.loads(text)["grammars"]] == [None, "f", "g"]
    assert takes(text, 'f({"name": "Ann"})')
    assert takes(text, "g(ab)")
    assert not takes(text, "g(1)")


def test_what_random_schemas_let_through_is_valid() -> None:
    """A walk of one random allowed byte after the other, which prefers none: whatever a model may do."""
    rng = random.Random(5)
    num_long = 0
    for _ in range(200):
        schema = random_schema(rng)
        matcher = llguidance.LLMatcher(byte_tokenizer(), json_schema(schema), log_level=0)
        data = bytearray()
        while not matcher.is_stopped():
            assert not matcher.is_error(), matcher.get_error()
            mask = matcher.compute_bitmask()
            allowed = [i for i in range(256) if mask[i // 8] >> i % 8 & 1]
            # Else a number goes on for very long: nothing bounds its digits.
            closing = [i for i in allowed if i in b'"}],' and rng.random() < 0.3]
            data.append(rng.choice(closing or allowed))
            assert matcher.consume_token(data[-1])
        value = json.loads(data.decode())
        jsonschema.Draft202012Validator(schema).validate(value)
        assert re.search(rb"[,:]  |[\[{] |\n", re.sub(rb'"(?:[^"\\]|\\.)*"', b"", bytes(data))) is None
        num_long += len(data) > 100
    assert num_long > 20
