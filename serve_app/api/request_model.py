"""RequestModel: the base of what clients may send, and how it takes names that are not its fields. Knows no field.

Each name that a client may send stands in one of three tables, and all others are refused with the nearest known one:

- the fields of a model: every one has an effect, which a test shows field by field;
- ``ignored``: accepted, checked, and of no effect on the answer;
- ``unimplemented``: known elsewhere, not here. Accepted with the value that asks for nothing, else refused.

``null`` means "not given", for each field of each object.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

from pydantic import BaseModel, ConfigDict, model_validator

from serve_app.api.error_response import shown
from serve_app.api.json_body import parse_json
from serve_app.engine.request import MAX_N
from serve_app.errors import UnknownParameterError, UnsupportedParameterError

MAX_INT = 2**31 - 1
"""Counts, ids and priorities above it are nobody's wish, and would not fit the tensors."""

Model = TypeVar("Model", bound="RequestModel")


@dataclass(frozen=True)
class RequestLimits:
    """How much one request may ask for. Messages name the value and the limit."""

    max_prompts: int = 128
    """Prompts of one completion request."""

    max_n: int = MAX_N
    """Choices for each prompt."""

    max_stop: int = 16
    """Stop strings, and as many stop token ids."""

    max_bias: int = 1024
    """Entries of logit_bias."""

    max_inputs: int = 2048
    """Inputs of one embedding request."""

    max_tools: int = 128
    """Tools of a chat."""

    max_tool_bytes: int = 262_144
    """Of all its tools, as JSON."""


@dataclass(frozen=True)
class IgnoredField:
    """A field that is accepted and changes nothing."""

    allowed: str
    """What it must be, for the message."""
    accepts: Callable[[Any], bool]
    why: str


Unimplemented = Mapping[str, tuple[Any, ...]]
"""Name -> the values with which it asks for nothing (null always does)."""


class RequestModel(BaseModel):
    """A JSON object that a client may send."""

    model_config = ConfigDict(
        strict=True,
        extra="forbid",
        frozen=True,
        allow_inf_nan=False,
        use_attribute_docstrings=True,
        protected_namespaces=(),
    )

    unimplemented: ClassVar[Unimplemented] = {}
    ignored: ClassVar[Mapping[str, IgnoredField]] = {}
    renamed: ClassVar[Mapping[str, str]] = {}
    """What is said instead of an unimplemented name, where there is something."""

    @model_validator(mode="before")
    @classmethod
    def _drop_nulls(cls, data: Any) -> Any:
        return {name: value for name, value in data.items() if value is not None} if isinstance(data, dict) else data

    @classmethod
    def parse(cls: type[Model], body: bytes, limits: RequestLimits | None = None) -> Model:
        """The request in a body. Raises InvalidRequestErrors and pydantic's ValidationError; `error_response` takes both.

        Costs a few milliseconds for the longest of prompts that come as ids.
        """
        data = parse_json(body)
        cls._take_names(data)
        request = cls.model_validate(data)
        request.check(limits or RequestLimits())
        return request

    def check(self, limits: RequestLimits) -> None:
        """What concerns more than one field, or a limit. Raises InvalidParameterError naming field, value and limit."""

    @classmethod
    def _take_names(cls, data: dict[str, Any], path: str = "") -> None:
        """Takes out of ``data`` what has no effect here, and refuses by name what is unknown or not implemented."""
        for name in [name for name in data if name not in cls.model_fields]:
            value = data.pop(name)
            if name in cls.ignored:
                if value is not None and not cls.ignored[name].accepts(value):
                    raise UnsupportedParameterError(
                        path + name, f"is {shown(value)}; this server takes only {cls.ignored[name].allowed}"
                    )
            elif name in cls.unimplemented:
                if value is not None and not any(_same(value, neutral) for neutral in cls.unimplemented[name]):
                    instead = f": use {cls.renamed[name]}" if name in cls.renamed else ""
                    raise UnsupportedParameterError(
                        path + name, f"is {shown(value)}; this server does not implement it{instead}"
                    )
            else:
                known = [*cls.model_fields, *cls.ignored]
                nearest = difflib.get_close_matches(name[:60].lower(), known, 1)
                raise UnknownParameterError(path + name, nearest[0] if nearest else None)


def _same(value: Any, neutral: Any) -> bool:
    """Equal, and of one kind: true is not 1."""
    number = type(value) is int and type(neutral) is float
    return (number or type(value) is type(neutral)) and value == neutral
