"""The JSON object in a body, read more strictly than `json.loads` does. Knows no request model."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any, NoReturn

from serve_app.api.error_response import path_of, shown
from serve_app.errors import InvalidBodyError

MAX_DEPTH = 64
"""Objects and lists inside each other. Nothing that a client means needs more, and checks of a body may recurse."""


def parse_json(body: bytes, name: str = "the body") -> dict[str, Any]:
    """The JSON object in a body. Raises InvalidBodyError: not UTF-8, broken, no object, a name given twice in one object,
    more than MAX_DEPTH deep, NaN or Infinity, thousands of digits, an unpaired surrogate.

    ``name``: what messages call it."""
    if not body.strip():
        raise InvalidBodyError(f"{name} is empty; it must be a JSON object")
    try:
        text = body.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InvalidBodyError(
            f"{name} is not valid UTF-8: byte 0x{body[error.start]:02x} at position {error.start}"
        ) from error
    try:
        value = json.loads(text, object_pairs_hook=_object, parse_constant=_refuse_constant)
    except json.JSONDecodeError as error:
        raise InvalidBodyError(
            f"{name} is not valid JSON: {error.msg}, line {error.lineno} column {error.colno}"
        ) from error
    except ValueError as error:  # an integer of thousands of digits, which Python refuses to read; or _refuse_constant
        reason = str(error) if str(error).endswith("in JSON") else "a number has too many digits"
        raise InvalidBodyError(f"{name} is not valid JSON: {reason}") from error
    except RecursionError as error:
        raise InvalidBodyError(f"{name} is nested more than {MAX_DEPTH} deep") from error
    if type(value) is not dict:
        raise InvalidBodyError(f"{name} is {shown(value)}; it must be a JSON object")
    if body.count(b"[") + body.count(b"{") > MAX_DEPTH:
        _check_depth(value, name)
    if re.search(rb"\\u[dD][89a-fA-F]", body):
        _check_surrogates(value)
    return value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Two values under one name: which one a client meant nobody knows, and parsers differ."""
    value = dict(pairs)
    if len(value) < len(pairs):
        seen: set[str] = set()
        for name, _ in pairs:
            if name in seen:
                raise InvalidBodyError(f"the name {shown(name)} is given twice in one object")
            seen.add(name)
    return value


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number in JSON")


def _check_depth(value: Any, name: str) -> None:
    level = [value]
    for _ in range(MAX_DEPTH):
        level = [
            child
            for container in level
            for child in (container.values() if type(container) is dict else container)
            if type(child) is dict or type(child) is list
        ]
        if not level:
            return
    raise InvalidBodyError(f"{name} is nested more than {MAX_DEPTH} deep")


def _check_surrogates(value: Any) -> None:
    """JSON can spell half a character. Nothing that reads text later expects it."""
    for path, text in _strings(value, ()):
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise InvalidBodyError(
                f"{path_of(path) or 'a name'} holds an unpaired surrogate, U+{ord(text[error.start]):04X}, at character"
                f" {error.start}; it must be valid Unicode"
            ) from error


def _strings(value: Any, path: tuple[str | int, ...]) -> Iterator[tuple[tuple[str | int, ...], str]]:
    if type(value) is str:
        yield path, value
    elif type(value) is list:
        for i, child in enumerate(value):
            yield from _strings(child, (*path, i))
    elif type(value) is dict:
        for name, child in value.items():
            yield path, name
            yield from _strings(child, (*path, name))
