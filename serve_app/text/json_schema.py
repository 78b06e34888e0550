"""A client's JSON schema, made into the one that the grammar library gets. Refuses, with the place, what cannot be enforced.

Knows JSON Schema (draft 2020-12, and of older ones what is still sent) and which keywords llguidance enforces. Compiles
nothing. What comes out has no annotations and no keyword without effect; each `$ref` points into its own ``$defs``, where
an entry is named by the JSON pointer at which it stood.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any
from urllib.parse import quote, unquote

from serve_app.errors import InvalidParameterError, UnsupportedParameterError

MAX_DEPTH = 64
"""Subschemas inside each other."""
MAX_SUBSCHEMAS = 20_000

TYPES = ("null", "boolean", "integer", "number", "string", "array", "object")
SCALARS = frozenset(TYPES[:5])
FORMATS = frozenset(
    {"date-time", "time", "date", "duration", "email", "hostname", "ipv4", "ipv6", "uuid", "uri"},
)
"""What is enforced. Other formats are annotations, as the standard has it."""

UNSUPPORTED: Mapping[str, tuple[Any, ...]] = {
    "$dynamicRef": (),
    "$recursiveRef": (),
    "contains": (),
    "dependencies": ({},),
    "dependentRequired": ({},),
    "dependentSchemas": ({},),
    "if": (),
    "not": (False,),
    "propertyNames": (True, {}),
    "unevaluatedItems": (True, {}),
    "unevaluatedProperties": (True, {}),
    "uniqueItems": (False,),
}
"""Keywords that no grammar here can express -> the values with which they ask for nothing."""

SCHEMAS = frozenset({"items", "additionalItems", "additionalProperties"})
LISTS_OF_SCHEMAS = frozenset({"allOf", "anyOf", "oneOf", "prefixItems"})
MAPS_OF_SCHEMAS = frozenset({"properties", "patternProperties"})
COUNTS = frozenset({"minItems", "maxItems", "minLength", "maxLength", "minProperties", "maxProperties"})
BOUNDS = frozenset({"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"})
OBJECT_KEYWORDS = MAPS_OF_SCHEMAS | {"required", "additionalProperties", "minProperties", "maxProperties"}
APPLICATORS = frozenset({"$ref", "allOf", "anyOf", "oneOf"})

Place = tuple[str | int, ...]


def prepare(
    schema: Any, path: str = "schema", *, strict: bool = True, disable_additional_properties: bool = False
) -> dict[str, Any]:
    """The schema for the library. ``path``: how messages call it.

    An object that lists its properties has no others, unless it says additionalProperties or the schema is put together
    by allOf or beside a $ref: what it then generates is valid all the same, and a small model does not ramble on.
    ``disable_additional_properties`` closes all of them, as in vLLM. ``strict`` false leaves out what cannot be enforced.

    Raises UnsupportedParameterError naming the keyword, InvalidParameterError; both with the place.
    """
    return _Preparation(schema, path, strict, disable_additional_properties).result()


def place_of(path: str, place: Place) -> str:
    """``schema.properties.a.items[0]``; a name that is no word stands in brackets."""
    parts = []
    for step in place:
        if isinstance(step, int):
            parts.append(f"[{step}]")
        elif step.replace("$", "").replace("_", "").replace("-", "").isalnum():
            parts.append("." + step)
        else:
            parts.append(f"[{json.dumps(step[:64], ensure_ascii=False)}]")
    return path + "".join(parts)


def place_of_pointer(pointer: str) -> Place:
    """``/$defs/a/anyOf/0`` as steps."""
    steps = [step.replace("~1", "/").replace("~0", "~") for step in pointer.split("/")[1:]]
    return tuple(int(step) if step.isdecimal() else step for step in steps)


class _Preparation:
    def __init__(self, root: Any, path: str, strict: bool, closes_all: bool) -> None:
        self._root = root
        self._path = path
        self._strict = strict
        self._closes_all = closes_all
        self._num_subschemas = 0
        self._definitions: dict[str, Any] = {}
        """Pointer -> what stands there, prepared; None while it waits."""
        self._waiting: list[str] = []
        self._open_objects: list[dict[str, Any]] = []
        self._is_composed = False
        """Objects are intersected somewhere: closing one half would take away what the other half says."""

    def result(self) -> dict[str, Any]:
        schema = self._schema(self._root, ())
        while self._waiting:
            pointer = self._waiting.pop()
            self._definitions[pointer] = self._schema(self._resolve(pointer), place_of_pointer(pointer))
        if self._closes_all or not self._is_composed:
            for one in self._open_objects:
                one["additionalProperties"] = False
        if self._definitions:
            self._check_ends()
            if isinstance(schema, dict):
                schema = {**schema, "$defs": self._definitions}
        return schema if isinstance(schema, dict) else {"anyOf": [schema]}

    # ---- one subschema -------------------------------------------------------------------------------------------

    def _schema(self, schema: Any, place: Place, depth: int = 0) -> Any:
        self._num_subschemas += 1
        if self._num_subschemas > MAX_SUBSCHEMAS:
            raise self._wrong((), f"more than {MAX_SUBSCHEMAS} subschemas", f"at most {MAX_SUBSCHEMAS} subschemas")
        if isinstance(schema, bool):
            return schema
        if not isinstance(schema, dict):
            raise self._wrong(place, schema, "a JSON schema: an object, true or false")
        if depth > MAX_DEPTH:
            raise self._wrong(place, "nested deeper", f"nested at most {MAX_DEPTH} deep")
        if isinstance(schema.get("items"), list):  # before draft 2020-12
            schema = {
                "prefixItems" if name == "items" else "items" if name == "additionalItems" else name: value
                for name, value in schema.items()
            }
        made: dict[str, Any] = {}
        for name, value in schema.items():
            self._keyword(name, value, (*place, name), depth, made)
        for bound in ("Minimum", "Maximum"):  # draft 4: true beside a bound
            if isinstance(made.get("exclusive" + bound), bool) and made.pop("exclusive" + bound):
                made["exclusive" + bound] = made.pop(bound.lower(), 0)
        self._see_object(made)
        return made

    def _keyword(self, name: str, value: Any, place: Place, depth: int, made: dict[str, Any]) -> None:
        """Puts one keyword into ``made``, or leaves it out."""
        if name in SCHEMAS:
            made[name] = self._schema(value, place, depth + 1)
        elif name in LISTS_OF_SCHEMAS:
            if not isinstance(value, list) or not value:
                raise self._wrong(place, value, "a list of at least one schema")
            made[name] = [self._schema(one, (*place, i), depth + 1) for i, one in enumerate(value)]
        elif name in MAPS_OF_SCHEMAS:
            if not isinstance(value, dict):
                raise self._wrong(place, value, "an object of schemas")
            made[name] = {key: self._schema(one, (*place, key), depth + 1) for key, one in value.items()}
        elif name == "$ref":
            made[name] = self._reference(value, place)
        elif name == "type":
            types = value if isinstance(value, list) else [value]
            if not types or any(type(one) is not str or one not in TYPES for one in types):
                raise self._wrong(place, value, f"one of {', '.join(TYPES)}, or a list of those")
            made[name] = value
        elif name in COUNTS:
            if isinstance(value, bool) or not isinstance(value, int | float) or value < 0 or value != int(value):
                raise self._wrong(place, value, "an integer of at least 0")
            made[name] = int(value)
        elif name in BOUNDS:
            is_flag = isinstance(value, bool) and name.startswith("exclusive")
            if not is_flag and (isinstance(value, bool) or not isinstance(value, int | float)):
                raise self._wrong(place, value, "a number")
            made[name] = value
        elif name in ("pattern", "format"):
            if not isinstance(value, str):
                raise self._wrong(place, value, "a string")
            if name == "pattern" or value in FORMATS:
                made[name] = value
        elif name == "enum":
            if not isinstance(value, list) or not value:
                raise self._wrong(place, value, "a list of at least one value")
            made[name] = value
        elif name == "const":
            made[name] = value
        elif name == "required":
            if not isinstance(value, list) or any(not isinstance(one, str) for one in value):
                raise self._wrong(place, value, "a list of strings")
            made[name] = value
        elif name in UNSUPPORTED and self._strict and not any(value is v or value == v for v in UNSUPPORTED[name]):
            raise UnsupportedParameterError(
                place_of(self._path, place),
                f'is not implemented here: {name!r} cannot be enforced ("strict": false leaves it out)',
            )

    def _see_object(self, made: dict[str, Any]) -> None:
        keywords = made.keys()
        if "allOf" in keywords or (APPLICATORS & keywords and OBJECT_KEYWORDS & keywords):
            self._is_composed = True
        if not MAPS_OF_SCHEMAS & keywords or "additionalProperties" in keywords:
            return
        if self._closes_all or (
            made.get("properties", {}).keys() >= set(made.get("required", ())) and "minProperties" not in keywords
        ):
            self._open_objects.append(made)

    # ---- references ----------------------------------------------------------------------------------------------

    def _reference(self, value: Any, place: Place) -> str:
        if not isinstance(value, str) or not (value == "#" or value.startswith("#/")):
            raise self._wrong(place, value, "a JSON pointer into the same schema: # or #/...")
        pointer = unquote(value[1:])
        if pointer not in self._definitions:
            if self._resolve(pointer) is _MISSING:
                raise self._wrong(place, value, "a JSON pointer to something that is there")
            self._definitions[pointer] = None
            self._waiting.append(pointer)
        return _reference_to(pointer)

    def _resolve(self, pointer: str) -> Any:
        found = self._root
        for step in pointer.split("/")[1:]:
            step = step.replace("~1", "/").replace("~0", "~")
            if isinstance(found, dict) and step in found:
                found = found[step]
            elif isinstance(found, list) and step.isdecimal() and int(step) < len(found):
                found = found[int(step)]
            else:
                return _MISSING
        return found

    def _check_ends(self) -> None:
        """Refuses what each value of would hold another value of: the least fixed point of "can come to an end"."""
        ends = {_reference_to(pointer): False for pointer in self._definitions}
        has_changed = True
        while has_changed:
            has_changed = False
            for pointer, schema in self._definitions.items():
                if not ends[_reference_to(pointer)] and _can_end(schema, ends):
                    ends[_reference_to(pointer)] = has_changed = True
        for pointer in self._definitions:
            if not ends[_reference_to(pointer)]:
                shown = "recursive without an end"
                raise self._wrong(place_of_pointer(pointer), shown, "such that a value can end: each holds another one")

    def _wrong(self, place: Place, value: Any, allowed: str) -> InvalidParameterError:
        return InvalidParameterError(place_of(self._path, place), value, allowed)


_MISSING = object()


def _reference_to(pointer: str) -> str:
    return "#/$defs/" + quote(pointer.replace("~", "~0").replace("/", "~1"), safe="$~")


def _can_end(schema: Any, ends: Mapping[str, bool]) -> bool:
    """Whether some value is finite; ``ends``: of which references that is known. What has no value at all counts, too."""
    if isinstance(schema, bool) or "enum" in schema or "const" in schema:
        return True
    if "$ref" in schema and not ends[schema["$ref"]]:
        return False
    if not all(_can_end(one, ends) for one in schema.get("allOf", ())):
        return False
    for name in ("anyOf", "oneOf"):
        if name in schema and not any(_can_end(one, ends) for one in schema[name]):
            return False
    types = schema.get("type", "null")
    types = {types} if isinstance(types, str) else set(types)
    if types & SCALARS:
        return True
    return ("object" in types and _object_can_end(schema, ends)) or ("array" in types and _array_can_end(schema, ends))


def _object_can_end(schema: Mapping[str, Any], ends: Mapping[str, bool]) -> bool:
    properties, others = schema.get("properties", {}), schema.get("additionalProperties", True)
    return all(_can_end(properties.get(name, others), ends) for name in schema.get("required", ()))


def _array_can_end(schema: Mapping[str, Any], ends: Mapping[str, bool]) -> bool:
    num, first = schema.get("minItems", 0), schema.get("prefixItems", [])
    if not all(_can_end(one, ends) for one in first[:num]):
        return False
    return num <= len(first) or _can_end(schema.get("items", True), ends)
