"""Schemas before they are compiled: what is refused and where, what is left out, what is closed, what never ends."""

from __future__ import annotations

from typing import Any

import pytest

from serve_app.errors import InvalidParameterError, UnsupportedParameterError
from serve_app.text.json_schema import MAX_DEPTH, MAX_SUBSCHEMAS, UNSUPPORTED, place_of, place_of_pointer, prepare

NODE = {"type": "object", "properties": {"next": {"$ref": "#/$defs/N"}}}


def refusal(schema: Any, **options: Any) -> InvalidParameterError | UnsupportedParameterError:
    with pytest.raises((InvalidParameterError, UnsupportedParameterError)) as caught:
        prepare(schema, "s", **options)
    return caught.value


@pytest.mark.parametrize("keyword", UNSUPPORTED)
def test_a_keyword_that_cannot_be_enforced_is_named(keyword: str) -> None:
    schema = {"type": "object", "properties": {"a": {"items": {keyword: {"type": "string"}}}}}
    error = refusal(schema)
    assert isinstance(error, UnsupportedParameterError)
    assert error.param == f"s.properties.a.items.{keyword}"
    assert f"'{keyword}' cannot be enforced" in str(error)
    for neutral in UNSUPPORTED[keyword]:
        assert prepare({keyword: neutral}) == {}
    assert prepare(schema, strict=False)["properties"] == {"a": {"items": {}}}


@pytest.mark.parametrize(
    ("schema", "place", "words"),
    [
        (5, "s", "is 5; it must be a JSON schema"),
        ({"properties": []}, "s.properties", "an object of schemas"),
        ({"properties": {"a b": 5}}, 's.properties["a b"]', "a JSON schema"),
        ({"items": {"anyOf": []}}, "s.items.anyOf", "at least one schema"),
        ({"items": [{}, 1]}, "s.prefixItems[1]", "a JSON schema"),
        ({"type": "text"}, "s.type", "one of null, boolean"),
        ({"type": ["string", 5]}, "s.type", "one of null, boolean"),
        ({"type": []}, "s.type", "one of null, boolean"),
        ({"minLength": -1}, "s.minLength", "at least 0"),
        ({"minLength": True}, "s.minLength", "at least 0"),
        ({"minItems": 1.5}, "s.minItems", "at least 0"),
        ({"minimum": "3"}, "s.minimum", "a number"),
        ({"minimum": True}, "s.minimum", "a number"),
        ({"pattern": 5}, "s.pattern", "a string"),
        ({"enum": []}, "s.enum", "at least one value"),
        ({"enum": "ab"}, "s.enum", "at least one value"),
        ({"required": "a"}, "s.required", "a list of strings"),
        ({"$ref": 5}, "s.$ref", "a JSON pointer"),
        ({"$ref": "https://example.com/a.json"}, "s.$ref", "a JSON pointer"),
        ({"$ref": "#/$defs/a"}, "s.$ref", "something that is there"),
        ({"$defs": {"a": [1]}, "$ref": "#/$defs/a/1"}, "s.$ref", "something that is there"),
    ],
)
def test_what_is_no_schema_is_refused_with_its_place(schema: Any, place: str, words: str) -> None:
    error = refusal(schema)
    assert error.param == place
    assert words in str(error)


@pytest.mark.parametrize(
    ("schema", "place"),
    [
        ({"$ref": "#"}, "s"),
        ({"type": "object", "properties": {"a": {"$ref": "#"}}, "required": ["a"]}, "s"),
        ({"$defs": {"N": {**NODE, "required": ["next"]}}, "$ref": "#/$defs/N"}, "s.$defs.N"),
        ({"$defs": {"N": {"type": "array", "minItems": 1, "items": {"$ref": "#/$defs/N"}}}, "$ref": "#/$defs/N"}, None),
        ({"$defs": {"A": {"$ref": "#/$defs/B"}, "B": {"allOf": [{"$ref": "#/$defs/A"}]}}, "$ref": "#/$defs/A"}, None),
        # The property may be left out, but once begun it would never end.
        ({"type": "object", "properties": {"a": {"$ref": "#/x"}}, "x": {"$ref": "#/x"}}, "s.x"),
    ],
)
def test_recursion_without_an_end_is_refused(schema: Any, place: str | None) -> None:
    error = refusal(schema)
    assert "recursive without an end" in str(error)
    assert place is None or error.param == place


@pytest.mark.parametrize(
    "node",
    [
        NODE,
        {**NODE, "required": ["next"], "properties": {"next": {"anyOf": [{"$ref": "#/$defs/N"}, {"type": "null"}]}}},
        {"type": "array", "items": {"$ref": "#/$defs/N"}},
        {"type": ["array", "string"], "items": {"$ref": "#/$defs/N"}, "minItems": 1},
        {"oneOf": [{"type": "object", "properties": {"l": {"$ref": "#/$defs/N"}}, "required": ["l"]}, {"const": 1}]},
    ],
)
def test_recursion_with_an_end_is_taken(node: dict[str, Any]) -> None:
    prepared = prepare({"$defs": {"N": node, "unused": {"not": {}}}, "$ref": "#/$defs/N"})
    assert prepared["$ref"] == "#/$defs/~1$defs~1N"
    assert prepared["$defs"].keys() == {"/$defs/N"}  # what nobody refers to is not looked at


def test_limits() -> None:
    deep: dict[str, Any] = {}
    for _ in range(MAX_DEPTH):
        deep = {"items": deep}
    prepare(deep)
    error = refusal({"items": deep})
    assert error.param.endswith(".items.items")
    assert f"at most {MAX_DEPTH} deep" in str(error)
    assert f"at most {MAX_SUBSCHEMAS}" in str(refusal({"anyOf": [{}] * MAX_SUBSCHEMAS}))


def test_annotations_are_left_out() -> None:
    schema = {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "$id": "x:y",
        "title": "T",
        "type": "object",
        "properties": {"title": {"type": "string", "description": "d", "format": "binary", "minLength": 2.0}},
        "x-guidance": {"lenient": True},
    }
    assert prepare(schema) == {
        "type": "object",
        "properties": {"title": {"type": "string", "minLength": 2}},
        "additionalProperties": False,
    }


def test_older_drafts() -> None:
    assert prepare({"minimum": 3, "exclusiveMinimum": True}) == {"exclusiveMinimum": 3}
    assert prepare({"maximum": 3, "exclusiveMaximum": False}) == {"maximum": 3}
    assert prepare({"items": [{"type": "null"}], "additionalItems": False}) == {
        "prefixItems": [{"type": "null"}],
        "items": False,
    }
    assert prepare({"definitions": {"a/b %": {"type": "null"}}, "$ref": "#/definitions/a~1b%20%25"}) == {
        "$ref": "#/$defs/~1definitions~1a~01b%20%25",
        "$defs": {"/definitions/a~1b %": {"type": "null"}},
    }


def test_an_object_that_lists_its_properties_is_closed() -> None:
    one = {"properties": {"a": {"properties": {"b": {}}}}}
    closed = {
        "properties": {"a": {"properties": {"b": {}}, "additionalProperties": False}},
        "additionalProperties": False,
    }
    assert prepare(one) == closed
    assert prepare({**one, "additionalProperties": True})["additionalProperties"] is True
    # Closing one part of these would refuse what another part asks for.
    for open_one in (
        {"allOf": [one, {"properties": {"c": {}}, "required": ["c"]}]},
        {**one, "anyOf": [{"required": ["a"]}, {"required": ["b"]}]},
        {**one, "required": ["a", "z"]},
        {**one, "minProperties": 2},
        {"type": "object"},
    ):
        assert "additionalProperties" not in prepare(open_one)
    made = prepare({"allOf": [one, {"type": "object"}]}, disable_additional_properties=True)
    assert made == {"allOf": [closed, {"type": "object"}]}


def test_places() -> None:
    assert place_of("s", ("a", 3, "b c", "$defs", "é-1")) == 's.a[3]["b c"].$defs.é-1'
    assert place_of_pointer("/$defs/a~1b/anyOf/3/~01") == ("$defs", "a/b", "anyOf", 3, "~1")
    assert place_of_pointer("") == ()


def test_boolean_schemas() -> None:
    assert prepare(True) == {"anyOf": [True]}
    assert prepare(False) == {"anyOf": [False]}
