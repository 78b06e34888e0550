"""What a request wants its answer to be: OpenAI's `response_format` and vLLM's `structured_outputs`, and refusing them.

Knows the shapes of both and where in them something stands; what a grammar is and whether it compiles is for `text`.
"""

from __future__ import annotations

import difflib
import functools
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import PlainValidator

from serve_app.errors import InvalidParameterError, UnknownParameterError, UnsupportedParameterError
from serve_app.text import grammar
from serve_app.text.grammar import JsonOptions
from serve_app.text.grammar_check import Verdict
from serve_app.text.json_schema import place_of

KINDS = ("json", "regex", "choice", "grammar", "json_object")
"""Of structured_outputs; one is given."""
OPTIONS = ("whitespace_pattern", "disable_any_whitespace", "disable_additional_properties")
ELSEWHERE = ("structural_tag", "backend", "disable_fallback")
"""vLLM knows or knew them, and this server does not."""

MAX_REMEMBERED_LENGTH = 16_384
"""Characters of a schema whose grammar is remembered."""


@dataclass(frozen=True)
class Constraint:
    """What an answer must be."""

    kind: Literal["json", "regex", "choice", "grammar", "json_object"]
    value: Any
    """The schema, the regex, ...; None for json_object."""
    path: str
    """Where in the request the value stands."""
    strict: bool = True
    """False: of a schema, what cannot be enforced is left out."""
    options: JsonOptions | None = None

    def to_grammar(self) -> str:
        """For SamplingParams.grammar. Time in proportion to the value: 1 ms for 4,000 characters of a schema, less for one
        that was sent lately. Raises InvalidRequestErrors with the place."""
        if self.kind == "json":
            try:
                text = json.dumps(self.value)
            except RecursionError:
                text = ""  # refused below
            if 0 < len(text) <= MAX_REMEMBERED_LENGTH:
                return _grammar_of_schema(text, self.path, self.strict, self.options)
            return grammar.json_schema(self.value, self.path, strict=self.strict, options=self.options)
        if self.kind == "json_object":
            return grammar.json_object(self.options)
        make = {"regex": grammar.regex, "choice": grammar.choice, "grammar": grammar.grammar}[self.kind]
        return make(self.value, self.path)

    def refusal(self, verdict: Verdict) -> InvalidParameterError:
        """The error for a grammar that the check has found wrong."""
        place, value = verdict.place, self.value
        for i, step in enumerate(place):
            try:
                value = value[step]
            except (LookupError, TypeError):  # an old draft's items, which stand elsewhere in what was compiled
                place = place[:i]
                break
        keyword = _keyword_of(value, verdict.problem or "") if self.kind == "json" else None
        param = place_of(self.path, place if keyword is None else (*place, keyword))
        error = InvalidParameterError(param, None, "")
        shown = f" is {value[keyword]!r:.60} and" if keyword is not None and isinstance(value[keyword], str) else ""
        error.args = (f"{param}{shown} cannot be compiled: {verdict.problem}",)
        return error


@functools.lru_cache(maxsize=256)
def _grammar_of_schema(text: str, path: str, strict: bool, options: JsonOptions | None) -> str:
    return grammar.json_schema(json.loads(text), path, strict=strict, options=options)


def _keyword_of(schema: Any, problem: str) -> str | None:
    """Which keyword of a subschema a problem is about, if it says so."""
    if not isinstance(schema, dict):
        return None
    named = [name for name in schema if re.search(rf"\b{re.escape(name)}\b", problem)]
    if not named and "pattern" in schema and "type" not in problem:
        named = ["pattern"]
    return named[0] if named and "nsatisfiable" not in problem else None


def read_response_format(value: Any) -> Constraint | None:
    """None for text. Raises InvalidRequestErrors."""
    path = "response_format"
    fields = _fields(value, path, ("type", "json_schema"))
    kind = fields.get("type")
    if kind not in ("text", "json_object", "json_schema"):
        if kind is None:
            raise InvalidParameterError(f"{path}.type", None, "'text', 'json_object' or 'json_schema'")
        if kind == "structural_tag":
            raise UnsupportedParameterError(f"{path}.type", "is 'structural_tag'; this server does not implement it")
        raise InvalidParameterError(f"{path}.type", kind, "'text', 'json_object' or 'json_schema'")
    if kind != "json_schema":
        if "json_schema" in fields:
            raise InvalidParameterError(f"{path}.json_schema", "given", f"left out where type is {kind!r}")
        return None if kind == "text" else Constraint("json_object", None, path)
    path += ".json_schema"
    given = _fields(fields.get("json_schema"), path, ("name", "description", "schema", "strict"))
    for name in ("name", "description"):
        if not isinstance(given.get(name, ""), str):
            raise InvalidParameterError(f"{path}.{name}", given[name], "a string")
    strict = given.get("strict", True)
    if not isinstance(strict, bool):
        raise InvalidParameterError(f"{path}.strict", strict, "true or false")
    if "schema" not in given:
        raise InvalidParameterError(f"{path}.schema", None, "a JSON schema")
    return Constraint("json", given["schema"], f"{path}.schema", strict)


def read_structured_outputs(value: Any) -> Constraint:
    """Raises InvalidRequestErrors."""
    path = "structured_outputs"
    given = _fields(value, path, (*KINDS, *OPTIONS), ELSEWHERE)
    if given.get("json_object") is False:
        del given["json_object"]
    kinds = [name for name in KINDS if name in given]
    if len(kinds) != 1:
        shown = "an object with " + (" and ".join(kinds) or "none of them")
        raise InvalidParameterError(path, shown, f"an object with one of {', '.join(KINDS)}")
    kind: Any = kinds[0]
    wanted = given[kind]
    path = f"{path}.{kind}"
    if kind == "json_object":
        if wanted is not True:
            raise InvalidParameterError(path, wanted, "true or false")
        wanted = None
    elif kind == "json" and isinstance(wanted, str):
        try:
            wanted = json.loads(wanted)
        except (ValueError, RecursionError) as error:
            raise InvalidParameterError(path, wanted, f"a JSON schema: {error}") from error
    return Constraint(kind, wanted, path, options=_options(given, kind))


def _options(given: Mapping[str, Any], kind: str) -> JsonOptions:
    path = "structured_outputs"
    for name in OPTIONS:
        value = given.get(name)
        is_right = isinstance(value, str) if name == "whitespace_pattern" else isinstance(value, bool)
        if name in given and not is_right:
            allowed = "a string" if name == "whitespace_pattern" else "true or false"
            raise InvalidParameterError(f"{path}.{name}", value, allowed)
        is_for = ("json",) if name == "disable_additional_properties" else ("json", "json_object")
        if value not in (None, False) and kind not in is_for:
            raise InvalidParameterError(f"{path}.{name}", value, f"left out beside {kind}: it has no effect there")
    options = JsonOptions(**{name: given[name] for name in OPTIONS if name in given})
    options.separators(path + ".")
    return options


def _fields(value: Any, path: str, known: Iterable[str], elsewhere: Iterable[str] = ()) -> dict[str, Any]:
    """What is given in an object, without nulls."""
    if not isinstance(value, dict):
        raise InvalidParameterError(path, value, "an object")
    known = tuple(known)
    for name in value:
        if name in elsewhere:
            if value[name] not in (None, False):
                raise UnsupportedParameterError(f"{path}.{name}", "is known, and this server does not implement it")
        elif name not in known:
            nearest = difflib.get_close_matches(name[:60].lower(), known, 1)
            raise UnknownParameterError(f"{path}.{name}", nearest[0] if nearest else None)
    return {name: one for name, one in value.items() if one is not None and name in known}


ResponseFormat = Annotated[
    Constraint | None, PlainValidator(read_response_format, json_schema_input_type=dict[str, Any])
]
StructuredOutputs = Annotated[
    Constraint, PlainValidator(read_structured_outputs, json_schema_input_type=dict[str, Any])
]
