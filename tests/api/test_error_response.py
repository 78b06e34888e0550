"""Every failure has OpenAI's shape, the right status, and shows little of what was sent."""

from __future__ import annotations

import json
from typing import Any

import openai
import pydantic
import pytest
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException

from serve_app import errors
from serve_app.api.error_response import (
    MAX_MESSAGE_CHARS,
    MAX_SHOWN_CHARS,
    WrongValueError,
    error_event,
    error_response,
    path_of,
    shown,
)


def error_of(error: BaseException, **request: str) -> dict[str, Any]:
    content = json.loads(error_response(error, **request).body)
    assert list(content) == ["error"]
    assert list(content["error"]) == ["message", "type", "param", "code"]
    assert content["error"]["code"] is None or isinstance(content["error"]["code"], str)
    return content["error"]


FAMILY: list[tuple[errors.RaggedServeError, int, str, str | None, str]] = [
    (errors.InvalidParameterError("n", 0, "at least 1"), 400, "invalid_parameter", "n", "invalid_request_error"),
    (errors.UnknownParameterError("nn", "n"), 400, "unknown_parameter", "nn", "invalid_request_error"),
    (errors.UnsupportedParameterError("tools", "is x"), 400, "unsupported_parameter", "tools", "invalid_request_error"),
    (errors.InvalidBodyError("broken"), 400, "invalid_body", None, "invalid_request_error"),
    (errors.ContextLengthError("long"), 400, "context_length_exceeded", None, "invalid_request_error"),
    (errors.InvalidApiKeyError("no key"), 401, "invalid_api_key", None, "invalid_request_error"),
    (errors.UnknownModelError("gpt", ("tiny",)), 404, "model_not_found", "model", "invalid_request_error"),
    (errors.BodyTooLargeError("large"), 413, "body_too_large", None, "invalid_request_error"),
    (errors.StepFailedError("broken"), 500, "step_failed", None, "server_error"),
    (errors.EngineUnavailableError("stopping"), 503, "engine_unavailable", None, "server_error"),
    (errors.DeadlineExceededError("late"), 504, "deadline_exceeded", None, "server_error"),
]


@pytest.mark.parametrize(("error", "status", "code", "param", "kind"), FAMILY)
def test_the_family(error: errors.RaggedServeError, status: int, code: str, param: str | None, kind: str) -> None:
    assert error_of(error) == {"message": str(error), "type": kind, "param": param, "code": code}
    assert error_response(error).status == status
    response = error_response(error).as_response()
    assert (response.status_code, response.headers["content-type"]) == (status, "application/json")
    assert ("www-authenticate" in response.headers) == (status == 401)


class Full(errors.RaggedServeError):
    status = 429
    code = "overloaded"

    def __init__(self, retry_after: float) -> None:
        super().__init__("full")
        self.retry_after = retry_after


@pytest.mark.parametrize(("seconds", "header"), [(0, "1"), (0.2, "1"), (1, "1"), (1.01, "2"), (7.5, "8"), (30, "30")])
def test_retry_after(seconds: float, header: str) -> None:
    response = error_response(Full(seconds))
    assert response.status == 429
    assert response.headers["retry-after"] == header
    assert error_of(Full(seconds))["type"] == "rate_limit_error"
    assert "retry-after" not in error_response(errors.StepFailedError("x")).headers


def test_our_own_mistakes_tell_nothing() -> None:
    for error in (KeyError("secret"), RuntimeError("secret path"), MemoryError(), BaseException("secret")):
        response = error_response(error)
        assert response.status == 500
        assert b"secret" not in response.body
        assert error_of(error)["code"] == "internal_error"


def test_an_error_that_came_from_another_process_shows_its_cause() -> None:
    # Ray raises an object that is a RayTaskError and of the cause's class, too; its text is a traceback.
    class Remote(errors.InvalidPromptError):
        def __init__(self, cause: Exception) -> None:
            super().__init__("Traceback (most recent call last): ...")
            self.cause = cause

    cause = errors.InvalidParameterError("n", 9, "at most 4")
    assert error_of(Remote(cause)) == error_of(cause)
    assert "param" in error_event(Remote(cause)).decode()
    assert b"at most 4" in error_event(Remote(cause))


def test_the_framework_s_refusals() -> None:
    unknown = error_of(HTTPException(404), method="GET", path="/v1/nothing")
    assert unknown["message"] == 'there is no path "/v1/nothing"'
    assert unknown["code"] == "not_found"
    wrong = HTTPException(405, headers={"Allow": "POST"})
    assert error_of(wrong, method="GET", path="/v1/completions") == {
        "message": '"/v1/completions" does not take GET; it takes POST',
        "type": "invalid_request_error",
        "param": None,
        "code": "method_not_allowed",
    }
    assert error_response(wrong).headers["allow"] == "POST"
    assert error_of(HTTPException(418, "short and stout"))["message"] == "short and stout"
    assert error_of(HTTPException(599, ""))["code"] is None


class Part(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)
    text: str
    size: float = pydantic.Field(default=0, ge=0, lt=10)
    kind: int = 0
    odd: int = 1

    @pydantic.field_validator("kind")
    @classmethod
    def _check_kind(cls, kind: int) -> int:
        if kind == 7:
            raise WrongValueError("seven", "another", "[2].name")
        return kind

    @pydantic.field_validator("odd")
    @classmethod
    def _check_odd(cls, odd: int) -> int:
        if odd % 2 == 0:
            raise ValueError("is even")
        return odd


class Whole(pydantic.BaseModel):
    parts: list[Part]


@pytest.mark.parametrize(
    ("part", "message", "param", "code"),
    [
        ({}, "parts[1].text is missing", "parts[1].text", "missing_parameter"),
        ({"text": 5}, "parts[1].text is 5; it must be a string", "parts[1].text", "invalid_parameter"),
        (
            {"text": "", "size": -1},
            "parts[1].size is -1; it must be at least 0.0",
            "parts[1].size",
            "invalid_parameter",
        ),
        ({"text": "", "size": 10}, "parts[1].size is 10; it must be below 10.0", "parts[1].size", "invalid_parameter"),
        (
            {"text": "", "size": float("inf")},
            "parts[1].size is Infinity; it must be a finite number",
            "parts[1].size",
            "invalid_parameter",
        ),
        (
            {"text": "", "kind": 7},
            'parts[1].kind[2].name is "seven"; it must be another',
            "parts[1].kind[2].name",
            None,
        ),
        ({"text": "", "odd": 2}, "parts[1].odd: Value error, is even", "parts[1].odd", None),
        ({"text": "", "x": 1}, 'unknown parameter "parts[1].x"', "parts[1].x", "unknown_parameter"),
        ("a", 'parts[1] is "a"; it must be an object', "parts[1]", "invalid_parameter"),
    ],
)
def test_validation_is_one_sentence_and_a_path(part: Any, message: str, param: str, code: str | None) -> None:
    with pytest.raises(pydantic.ValidationError) as caught:
        Whole.model_validate({"parts": [{"text": ""}, part]})
    expected = {"message": message, "param": param, "code": code or "invalid_parameter"}
    assert error_of(caught.value) == {"type": "invalid_request_error", **expected}
    # FastAPI reports the same errors, with the place it looked in before the path.
    located = [{**error, "loc": ("body", *error["loc"])} for error in caught.value.errors()]
    assert error_of(RequestValidationError(located)) == error_of(caught.value)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (True, "true"),
        (None, "null"),
        (1.5, "1.5"),
        ([], "[]"),
        ({}, "{}"),
        ([1, "a"], '[1, "a"]'),
        ([[1]], "a list of 1 entry"),
        (list(range(99)), "a list of 99 entries"),
        ({"a": 1}, "an object of 1 entry"),
        (-(10**40), "-10^40 or so"),
        (object, "type"),
    ],
)
def test_values_are_shown_as_json(value: object, text: str) -> None:
    assert shown(value) == text


def test_what_was_sent_is_shown_in_part() -> None:
    for value in ("x" * 10_000_000, "\x00" * 10_000_000, ["y" * 1_000_000] * 8, 10**4000, "\ud800" * 500):
        assert len(shown(value)) <= MAX_SHOWN_CHARS
    error = error_of(errors.InvalidPromptError("bad\n " * 100_000))
    assert len(error["message"]) == MAX_MESSAGE_CHARS
    assert "\n" not in error["message"]
    param = errors.InvalidPromptError("x")
    param.param = "p" * 10_000  # type: ignore[attr-defined]
    assert len(error_of(param)["param"]) <= 100


def test_paths() -> None:
    assert path_of(("messages", 0, "content", 2, "text")) == "messages[0].content[2].text"
    assert path_of(()) == ""


def test_an_error_in_a_stream_is_an_event_that_the_openai_client_raises() -> None:
    event = error_event(errors.StepFailedError("the model could not\ncompute this"))
    assert event.startswith(b"data: {")
    assert event.endswith(b"}\n\n")
    assert event.count(b"\n") == 2
    import httpx

    def answer(request: httpx.Request) -> httpx.Response:
        return httpx.Response(200, headers={"content-type": "text/event-stream"}, content=event)

    with openai.OpenAI(
        api_key="k", base_url="http://test/v1", http_client=httpx.Client(transport=httpx.MockTransport(answer))
    ) as client:
        stream = client.completions.create(model="m", prompt="p", stream=True)
        with pytest.raises(openai.APIError, match="the model could not compute this"):
            list(stream)
