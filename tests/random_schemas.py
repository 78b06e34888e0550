"""JSON schemas drawn at random, as people write them: nested objects, optional properties, enums, ranges, arrays, unicode.

Each is satisfiable, and its values are short: strings, lists and depth are bounded, so that a model that knows nothing
comes to an end. Knows no grammar and no server.
"""

from __future__ import annotations

import random
from typing import Any

NAMES = ("name", "id", "größe", "名前", "is ok", 'quo"te', "a/b~c", "x-1", "", "émoji 😀", "$ref", "type", "\n")
WORDS = ("red", "grün", "青い", "a b", 'say "hi"', "back\\slash", "tab\t", "😀👍", "0", "null", "{}")
PATTERNS = (r"^[a-z]{1,5}$", r"^\d{2}-\d{3}$", r"^(ja|nein)$", "[aeiou]{2}$", r"^é?x+$")
FORMATS = ("date", "time", "ipv4", "uuid")


def random_schema(rng: random.Random, depth: int = 3) -> dict[str, Any]:
    """An object at the top, as nearly all are. Some refer to themselves."""
    schema = _object(rng, depth)
    if rng.random() < 0.2:
        schema["$defs"] = {
            "node": {
                "type": "object",
                "properties": {"v": _scalar(rng), "next": {"anyOf": [{"type": "null"}, {"$ref": "#/$defs/node"}]}},
                "required": ["next"],
                "additionalProperties": False,
            }
        }
        schema.setdefault("properties", {})["list"] = {"$ref": "#/$defs/node"}
    return schema


def _any(rng: random.Random, depth: int) -> dict[str, Any]:
    if depth <= 0 or rng.random() < 0.5:
        return _scalar(rng)
    return rng.choice((_object, _object, _array, _any_of))(rng, depth)


def _object(rng: random.Random, depth: int) -> dict[str, Any]:
    names = rng.sample(NAMES, rng.randint(1, 4))
    schema: dict[str, Any] = {"type": "object", "properties": {name: _any(rng, depth - 1) for name in names}}
    if required := [name for name in names if rng.random() < 0.6]:
        schema["required"] = required
    if rng.random() < 0.5:
        schema["additionalProperties"] = False
    if rng.random() < 0.3:
        schema |= {"title": "T", "description": "something", "examples": [{}]}
    return schema


def _array(rng: random.Random, depth: int) -> dict[str, Any]:
    first = [_scalar(rng) for _ in range(rng.choice((0, 0, 0, 1, 2)))]
    least = rng.randint(0, 2)
    schema = {"type": "array", "minItems": least, "maxItems": max(least, len(first)) + rng.randint(0, 2)}
    schema["items"] = _any(rng, depth - 1)
    return {**schema, "prefixItems": first} if first else schema


def _any_of(rng: random.Random, depth: int) -> dict[str, Any]:
    return {"anyOf": [_any(rng, depth - 1) for _ in range(rng.randint(2, 3))]}


def _scalar(rng: random.Random) -> dict[str, Any]:
    return rng.choice((_string, _string, _integer, _number, _enum, _constant, _few_types))(rng)


def _string(rng: random.Random) -> dict[str, Any]:
    kind = rng.random()
    if kind < 0.25:
        return {"type": "string", "pattern": rng.choice(PATTERNS), "maxLength": 8}
    if kind < 0.4:
        return {"type": "string", "format": rng.choice(FORMATS)}
    least = rng.randint(0, 4)
    return {"type": "string", "minLength": least, "maxLength": least + rng.randint(0, 8)}


def _integer(rng: random.Random) -> dict[str, Any]:
    low = rng.randint(-1000, 1000)
    schema: dict[str, Any] = {"type": "integer", "minimum": low, "maximum": low + rng.choice((0, 7, 123, 10**6))}
    if rng.random() < 0.2:
        schema = {"type": "integer", "exclusiveMinimum": low, "exclusiveMaximum": low + 50, "multipleOf": 5}
    return schema


def _number(rng: random.Random) -> dict[str, Any]:
    low = round(rng.uniform(-50, 50), rng.randint(0, 2))
    if rng.random() < 0.5:
        return {"type": "number", "minimum": low, "maximum": low + rng.choice((0.5, 3, 1000))}
    return {"type": "number", "exclusiveMinimum": 0, "maximum": 1}


def _enum(rng: random.Random) -> dict[str, Any]:
    return {"enum": rng.sample([*WORDS, 1, -2.5, None, True, [1, "a"], {"b": None}], rng.randint(1, 6))}


def _constant(rng: random.Random) -> dict[str, Any]:
    return {"const": rng.choice([*WORDS, 17, False])}


def _few_types(rng: random.Random) -> dict[str, Any]:
    types = rng.sample(["null", "boolean", "string"], 2)
    return {"type": types, "maxLength": 6}
