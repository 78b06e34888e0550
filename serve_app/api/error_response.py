"""Any exception -> status, headers and body in OpenAI's error shape. Knows the family in errors.py, pydantic and Starlette;
knows no route and no request model.

    {"error": {"message": "n is 0; it must be ...", "type": "invalid_request_error", "param": "n", "code": "..."}}

``param`` and ``code`` are strings or null. A message is at most MAX_MESSAGE_CHARS long and shows at most MAX_SHOWN_CHARS
of a value that the client sent. What is not of the family is our own mistake: the answer says that it happened and no
more, the log has the rest.
"""

from __future__ import annotations

import http
import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import pydantic
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response

from serve_app.errors import InvalidParameterError, RaggedServeError, UnknownParameterError

MAX_MESSAGE_CHARS = 500
MAX_SHOWN_CHARS = 80
MAX_PARAM_CHARS = 100

EXPECTED = {
    "int_type": "an integer",
    "float_type": "a number",
    "finite_number": "a finite number",
    "bool_type": "true or false",
    "string_type": "a string",
    "list_type": "a list",
    "dict_type": "an object",
    "model_type": "an object",
    "model_attributes_type": "an object",
    "literal_error": "{expected}",
    "greater_than_equal": "at least {ge}",
    "greater_than": "above {gt}",
    "less_than_equal": "at most {le}",
    "less_than": "below {lt}",
    "string_too_short": "a string of at least {min_length} characters",
    "string_too_long": "a string of at most {max_length} characters",
    "too_short": "a list of at least {min_length} entries",
    "too_long": "a list of at most {max_length} entries",
}
"""What pydantic's error types ask for, in the words of this server. Of other types the answer has pydantic's own words."""

OWN_FAULT = "the server failed on this request; its log says why, under the same X-Request-Id"


class ErrorResponse(NamedTuple):
    """One refused request, ready to be sent."""

    status: int
    headers: dict[str, str]
    body: bytes

    def as_response(self) -> Response:
        return Response(self.body, self.status, self.headers)


class WrongValueError(ValueError):
    """For a pydantic validator to raise: ``allowed`` ends the sentence "stop[1] is 5; it must be". ``inside`` is what
    stands behind the field's own path ("[1]") where the validator looks into a list or an object."""

    def __init__(self, value: object, allowed: str, inside: str = "") -> None:
        super().__init__(f"must be {allowed}")
        self.value = value
        self.allowed = allowed
        self.inside = inside


def error_response(error: BaseException, *, method: str = "", path: str = "") -> ErrorResponse:
    """What the client gets for ``error``. ``method`` and ``path`` of the request go into the words of 404 and 405.

    An error with a ``retry_after`` (seconds) gives the header Retry-After: whole seconds, at least 1.
    """
    error = _unwrapped(error)
    status, content = _describe(error, method, path)
    headers = {"content-type": "application/json"}
    if isinstance(error, HTTPException):
        headers |= {name.lower(): value for name, value in (error.headers or {}).items()}
    if status == http.HTTPStatus.UNAUTHORIZED:
        headers.setdefault("www-authenticate", "Bearer")
    retry_after = getattr(error, "retry_after", None)
    if retry_after is not None:
        headers["retry-after"] = str(max(1, -int(-retry_after // 1)))
    return ErrorResponse(status, headers, _to_json(content))


def error_event(error: BaseException) -> bytes:
    """The server-sent event that tells a client what ended its stream, once the status can no longer say it."""
    return b"data: " + _to_json(_describe(_unwrapped(error), "", "")[1]) + b"\n\n"


def shown(value: object) -> str:
    """A value that a client sent, spelt as in JSON, at most MAX_SHOWN_CHARS characters. Its cost is bounded, too."""
    if isinstance(value, dict):
        return f"an object of {_entries(value)}" if value else "{}"
    if isinstance(value, list | tuple) and (len(value) > 8 or any(isinstance(v, list | dict) for v in value)):
        return f"a list of {_entries(value)}"
    if isinstance(value, int) and abs(value) >= 1 << 128:
        return f"{'-' if value < 0 else ''}10^{int(value.bit_length() * 0.30103)} or so"
    if isinstance(value, str):
        value = value[: MAX_SHOWN_CHARS + 1]
    elif isinstance(value, list | tuple):
        value = [v[: MAX_SHOWN_CHARS + 1] if isinstance(v, str) else v for v in value]
    try:
        text = json.dumps(value)
    except TypeError:
        text = type(value).__name__
    return text if len(text) <= MAX_SHOWN_CHARS else text[: MAX_SHOWN_CHARS - 3] + "..."


def path_of(location: Sequence[str | int]) -> str:
    """A pydantic location as a client would write it: ("messages", 0, "content") is ``messages[0].content``."""
    parts = [f"[{part}]" if isinstance(part, int) else f".{part}" for part in location]
    return "".join(parts).removeprefix(".")


def _unwrapped(error: BaseException) -> BaseException:
    """What a remote call raises is an error of Ray's that is one of ours too, with a traceback for its text: its
    ``cause`` is the one that was raised over there."""
    cause = getattr(error, "cause", None)
    return cause if isinstance(cause, RaggedServeError) else error


def _describe(error: BaseException, method: str, path: str) -> tuple[int, dict[str, Any]]:
    if isinstance(error, RaggedServeError):
        return error.status, _content(error.status, str(error), getattr(error, "param", None), error.code)
    if isinstance(error, pydantic.ValidationError | RequestValidationError):
        message, param, code = _describe_validation(error.errors())
        return 400, _content(400, message, param, code)
    if isinstance(error, HTTPException):
        return error.status_code, _describe_http(error, method, path)
    return 500, _content(500, OWN_FAULT, None, RaggedServeError.code)


def _content(status: int, message: str, param: str | None, code: str | None) -> dict[str, Any]:
    """OpenAI's error object. Its client tells errors apart by the status; the type is for those that read it."""
    kind = "server_error" if status >= 500 else "rate_limit_error" if status == 429 else "invalid_request_error"
    message = _short(" ".join(message.split()) or f"status {status}", MAX_MESSAGE_CHARS)
    param = None if param is None else _short(str(param), MAX_PARAM_CHARS)
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def _describe_validation(errors: Sequence[Mapping[str, Any]]) -> tuple[str, str | None, str]:
    """One sentence about the first error, its path, its code. The others show once this one is mended."""
    first = errors[0]
    location = first["loc"][1:] if first["loc"][:1] == ("body",) else first["loc"]  # FastAPI says where it looked
    path, value, context = path_of(location), first.get("input"), first.get("ctx") or {}
    if first["type"] == "missing":
        return f"{path} is missing", path, "missing_parameter"
    if first["type"] == "extra_forbidden":
        return f"unknown parameter {shown(path)}", path, UnknownParameterError.code
    if first["type"] in EXPECTED:
        allowed = EXPECTED[first["type"]].format(**context)
    elif isinstance(wrong := context.get("error"), WrongValueError):
        path, value, allowed = path + wrong.inside, wrong.value, wrong.allowed
    else:
        return f"{path or 'the body'}: {first['msg']}", path or None, InvalidParameterError.code
    return f"{path or 'the body'} is {shown(value)}; it must be {allowed}", path or None, InvalidParameterError.code


def _describe_http(error: HTTPException, method: str, path: str) -> dict[str, Any]:
    """The framework's own refusals. Its words for an unknown path and a wrong method say too little."""
    status = error.status_code
    allow = next((value for name, value in (error.headers or {}).items() if name.lower() == "allow"), "")
    message = str(error.detail)
    if status == http.HTTPStatus.NOT_FOUND and path:
        message = f"there is no path {shown(path)}"
    elif status == http.HTTPStatus.METHOD_NOT_ALLOWED and path:
        message = f"{shown(path)} does not take {_short(method, 20)}" + (f"; it takes {allow}" if allow else "")
    try:
        code = http.HTTPStatus(status).phrase.lower().replace(" ", "_").replace("-", "_")
    except ValueError:
        code = None
    return _content(status, message, None, code)


def _entries(value: Sequence[Any] | Mapping[str, Any]) -> str:
    return "1 entry" if len(value) == 1 else f"{len(value)} entries"


def _to_json(content: Mapping[str, Any]) -> bytes:
    return json.dumps(content, separators=(",", ":")).encode("ascii")


def _short(text: str, limit: int) -> str:
    return text if len(text) <= limit else text[: limit - 3] + "..."
