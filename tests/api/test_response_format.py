"""response_format and structured_outputs: what is read, what is refused and where; what the service does with a grammar."""

from __future__ import annotations

import json
from typing import Any

import pytest

from serve_app.api.error_response import error_response
from serve_app.api.protocol import ChatCompletionRequest, CompletionRequest
from serve_app.api.response_format import _grammar_of_schema
from serve_app.errors import UnsupportedParameterError
from serve_app.text import grammar
from serve_app.text.grammar import JsonOptions
from serve_app.text.grammar_check import Verdict

PERSON = {"type": "object", "properties": {"name": {"type": "string"}}, "required": ["name"]}


def parse(**fields: Any) -> CompletionRequest:
    return CompletionRequest.parse(json.dumps({"prompt": "a", **fields}).encode())


def schema_format(schema: Any, **fields: Any) -> dict[str, Any]:
    return {"response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": schema, **fields}}}


COMPACT = JsonOptions(disable_any_whitespace=True)
CLOSED = JsonOptions(disable_additional_properties=True)
READ: list[tuple[dict[str, Any], str | None]] = [
    ({}, None),
    ({"response_format": None}, None),
    ({"response_format": {"type": "text"}}, None),
    ({"response_format": {"type": "json_object"}}, grammar.json_object()),
    ({"response_format": {"type": "json_object", "json_schema": None}}, grammar.json_object()),
    (schema_format(PERSON), grammar.json_schema(PERSON)),
    (schema_format(PERSON, strict=True, description="d"), grammar.json_schema(PERSON)),
    (schema_format({"not": {}}, strict=False), grammar.json_schema({"not": {}}, strict=False)),
    (schema_format(True), grammar.json_schema(True)),
    ({"structured_outputs": {"json_object": True}}, grammar.json_object()),
    ({"structured_outputs": {"json": PERSON}}, grammar.json_schema(PERSON)),
    ({"structured_outputs": {"json": json.dumps(PERSON), "regex": None}}, grammar.json_schema(PERSON)),
    ({"structured_outputs": {"regex": "a+", "json_object": False, "backend": None}}, grammar.regex("a+")),
    ({"structured_outputs": {"choice": ["a", "b"]}}, grammar.choice(["a", "b"])),
    ({"structured_outputs": {"grammar": 'root ::= "a"'}}, grammar.grammar('root ::= "a"')),
    (
        {
            "structured_outputs": {
                "json": PERSON,
                "disable_any_whitespace": True,
                "disable_additional_properties": False,
            }
        },
        grammar.json_schema(PERSON, options=COMPACT),
    ),
    (
        {"structured_outputs": {"json": {"allOf": [PERSON]}, "disable_additional_properties": True}},
        grammar.json_schema({"allOf": [PERSON]}, options=CLOSED),
    ),
    (
        {"structured_outputs": {"json_object": True, "whitespace_pattern": r"\n?"}},
        grammar.json_object(JsonOptions(whitespace_pattern=r"\n?")),
    ),
    ({"response_format": {"type": "text"}, "structured_outputs": {"regex": "a"}}, grammar.regex("a")),
]


@pytest.mark.parametrize(("fields", "expected"), READ)
def test_a_request_has_its_grammar(fields: dict[str, Any], expected: str | None) -> None:
    request = parse(**fields)
    assert request.grammar == expected
    assert request.sampling_params().grammar == expected
    body = json.dumps({"messages": [{"role": "user", "content": "a"}], **fields}).encode()
    assert ChatCompletionRequest.parse(body).sampling_params(5).grammar == expected


def refusal(fields: dict[str, Any], problem: str, place: Any = ()) -> dict[str, str]:
    constraint = parse(**fields).constraint
    assert constraint is not None
    answer = error_response(constraint.refusal(Verdict(problem, place)))
    assert answer.status == 400
    return json.loads(answer.body)["error"]  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("schema", "place", "problem", "param"),
    [
        ({"properties": {"a": {"pattern": "(?=b)"}}}, ("properties", "a"), "look-around", "properties.a.pattern"),
        (
            {"properties": {"a": {"multipleOf": 0.3}}},
            ("properties", "a"),
            "'multipleOf' has",
            "properties.a.multipleOf",
        ),
        ({"anyOf": [{"maximum": 1}]}, ("anyOf", 0), "Unsatisfiable: maximum", "anyOf[0]"),
        ({"items": [{"pattern": "("}]}, ("prefixItems", 0), "unclosed group", ""),
        ({"type": "object"}, (), "too much", ""),
    ],
)
def test_a_verdict_is_told_with_its_place(schema: Any, place: Any, problem: str, param: str) -> None:
    path = ".".join(filter(None, ("response_format.json_schema.schema", param)))
    error = refusal(schema_format(schema), problem, place)
    assert (error["param"], error["code"]) == (path, "invalid_parameter")
    assert error["message"].startswith(path)
    assert error["message"].endswith(f"cannot be compiled: {problem}")


def test_other_verdicts_name_the_field() -> None:
    for kind, value in (("regex", "(?=a)"), ("choice", ["a"]), ("grammar", "start: b")):
        error = refusal({"structured_outputs": {kind: value}}, "no good")
        assert error["param"] == f"structured_outputs.{kind}"
        assert error["message"] == f"structured_outputs.{kind} cannot be compiled: no good"


def test_names_before_they_were_renamed() -> None:
    for old, new in {"guided_json": "json", "guided_regex": "regex", "guided_choice": "choice"}.items():
        with pytest.raises(UnsupportedParameterError, match=f"use structured_outputs.{new}$") as caught:
            parse(**{old: {"type": "object"}})
        assert caught.value.param == old


def test_a_grammar_is_made_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """At most once for all requests with the same schema, and once for one request, however large its schema is."""
    made = []
    json_schema = grammar.json_schema

    def counting(*arguments: Any, **options: Any) -> str:
        made.append(arguments)
        return json_schema(*arguments, **options)

    monkeypatch.setattr(grammar, "json_schema", counting)
    _grammar_of_schema.cache_clear()
    for schema, num_made in ((PERSON, 1), (PERSON, 1), ({"enum": ["a" * 20_000]}, 2), ({"enum": ["a" * 20_000]}, 3)):
        request = parse(**schema_format(schema))
        assert request.sampling_params().grammar is request.sampling_params().grammar
        assert len(made) == num_made
