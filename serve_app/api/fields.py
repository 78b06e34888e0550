"""Types of fields that several request models share, or that come in more than one shape. Each says in its WrongValueError
what it must be. Knows no model.
"""

from __future__ import annotations

import re
from typing import Annotated, Any

from pydantic import Field, PlainValidator

from serve_app.api.error_response import WrongValueError, shown
from serve_app.api.request_model import MAX_INT
from serve_app.engine.request import MAX_SEED

MAX_REQUEST_ID_CHARS = 128
MAX_CACHE_SALT_CHARS = 1024


def _stop(value: Any) -> list[str]:
    strings = [value] if type(value) is str else value
    if type(strings) is not list:
        raise WrongValueError(value, "a string or a list of strings")
    for i, string in enumerate(strings):
        inside = f"[{i}]" if strings is value else ""
        if type(string) is not str or not string:
            raise WrongValueError(string, "a string that is not empty", inside)
    return list(strings)


def _prompt(value: Any) -> list[Any]:
    """Always a list of prompts, all of one kind."""
    if type(value) is str:
        return [value]
    if type(value) is not list:
        raise WrongValueError(value, "a string, a list of strings, a list of token ids or a list of such lists")
    if not value:
        raise WrongValueError(value, "a list that is not empty")
    kind = type(value[0])
    if kind is int:
        _check_token_ids(value, "")
        return [value]
    if kind is not str and kind is not list:
        raise WrongValueError(value[0], "a string, a token id or a list of token ids", "[0]")
    for i, prompt in enumerate(value):
        if type(prompt) is not kind:
            raise WrongValueError(prompt, "of the same type as the first prompt", f"[{i}]")
        if type(prompt) is list:
            _check_token_ids(prompt, f"[{i}]")
    return list(value)


def _token_ids(value: Any) -> list[int]:
    if type(value) is not list:
        raise WrongValueError(value, "a list of token ids")
    _check_token_ids(value, "", may_be_empty=True)
    return value


def _check_token_ids(ids: list[Any], inside: str, *, may_be_empty: bool = False) -> None:
    if not ids and not may_be_empty:
        raise WrongValueError(ids, "a list of at least one token id", inside)
    if set(map(type, ids)) <= {int} and (not ids or 0 <= min(ids) <= max(ids) <= MAX_INT):
        return
    i = next(i for i, x in enumerate(ids) if type(x) is not int or not 0 <= x <= MAX_INT)
    raise WrongValueError(ids[i], "a token id: an integer of at least 0", f"{inside}[{i}]")


def _logit_bias(value: Any) -> dict[int, float]:
    """Names of JSON objects are strings, so the ids come as such."""
    if type(value) is not dict:
        raise WrongValueError(value, "an object that maps token ids to numbers")
    bias = {}
    for name, number in value.items():
        if re.fullmatch(r"\d{1,10}", name, re.ASCII) is None:
            raise WrongValueError(name, "a token id, in digits alone", f"[{shown(name)}]")
        if type(number) not in (int, float) or not -100 <= number <= 100:
            raise WrongValueError(number, "a number from -100 to 100", f"[{name}]")
        if int(name) in bias:
            raise WrongValueError(name, "given once; the same id has another spelling", f"[{shown(name)}]")
        bias[int(name)] = float(number)
    return bias


def _request_id(value: Any) -> str:
    if type(value) is not str or re.fullmatch(r"[\x21-\x7e]+", value) is None or len(value) > MAX_REQUEST_ID_CHARS:
        raise WrongValueError(value, f"1 to {MAX_REQUEST_ID_CHARS} visible ASCII characters")
    return value


def _seed(value: Any) -> int:
    if type(value) is not int or not -(2**63) <= value <= MAX_SEED:
        raise WrongValueError(value, "an integer from -2**63 to 2**64 - 1")
    return value


IdList = list[Annotated[int, Field(ge=0)]]
TokenIds = Annotated[list[int], PlainValidator(_token_ids, json_schema_input_type=IdList)]
Prompts = Annotated[list[Any], PlainValidator(_prompt, json_schema_input_type=str | list[str] | IdList | list[IdList])]
Stop = Annotated[list[str], PlainValidator(_stop, json_schema_input_type=str | list[str])]
LogitBias = Annotated[dict[int, float], PlainValidator(_logit_bias, json_schema_input_type=dict[str, float])]
RequestId = Annotated[str, PlainValidator(_request_id, json_schema_input_type=str)]
Seed = Annotated[int, PlainValidator(_seed, json_schema_input_type=int)]
Count = Annotated[int, Field(ge=0, le=MAX_INT)]
Temperature = Annotated[float, Field(ge=0, le=100)]
TopP = Annotated[float, Field(gt=0, le=1)]
TopK = Annotated[int, Field(ge=-1, le=MAX_INT)]
MinP = Annotated[float, Field(ge=0, le=1)]
Priority = Annotated[int, Field(ge=-MAX_INT, le=MAX_INT)]
CacheSalt = Annotated[str, Field(max_length=MAX_CACHE_SALT_CHARS)]
