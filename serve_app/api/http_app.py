"""The HTTP face as a FastAPI application over a Service: routes, keys, limits, request ids, errors. Knows HTTP; no Ray.

    every request     X-Request-Id in or made, out again; the body is read up to its limit; a key, except on OPEN_PATHS
    every failure     OpenAI's error shape, on every route, also the framework's own
    a stream          one ASGI message per engine step; when the client goes its request is closed, whatever the server
                      in front does: nobody but `receive` says so

Routes take the raw body: protocol.py's models do the reading, so that its messages are the same everywhere. Their schemas
stand in /openapi.json all the same.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import hmac
import importlib.metadata
import uuid
from collections.abc import AsyncGenerator, Awaitable, Callable, Collection, Mapping
from typing import Any, Protocol

from fastapi import FastAPI, Request
from fastapi.middleware.cors import CORSMiddleware
from pydantic import BaseModel
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve_app.api.disconnect import until_disconnect
from serve_app.api.embeddings import EmbeddingRequest
from serve_app.api.error_response import error_response
from serve_app.api.fields import MAX_REQUEST_ID_CHARS
from serve_app.api.generation import Generation
from serve_app.api.headers import EVENT_ID_HEADER, RESUMABLE_HEADER, TIMEOUT_HEADER, timeout_ms
from serve_app.api.live_feed import LiveFeed
from serve_app.api.protocol import (
    ChatCompletionRequest,
    CompletionRequest,
    DetokenizeRequest,
    TokenizeRequest,
)
from serve_app.api.request_notes import RequestNote
from serve_app.api.responses import answer_maker
from serve_app.api.responses_protocol import ResponsesRequest
from serve_app.api.resume import resumable_of
from serve_app.api.service import GenerationRequest, Service
from serve_app.api.ui_routes import OPEN_PATHS as UI_PATHS, add_ui_routes
from serve_app.errors import (
    BodyTooLargeError,
    InvalidApiKeyError,
    InvalidParameterError,
    InvalidRequestError,
    NotEnabledError,
    RaggedServeError,
)
from serve_app.logs import about, get_logger
from serve_app.metrics import CONTENT_TYPE

logger = get_logger(__name__)

OPEN_PATHS = UI_PATHS | {"/health", "/ready", "/version", "/docs", "/docs/oauth2-redirect", "/redoc", "/openapi.json"}
"""No key is asked for."""
STREAM_HEADERS = {"cache-control": "no-cache", "x-accel-buffering": "no"}
"""Proxies that gather what they pass on would undo the stream."""


class Face(Protocol):
    """What the routes want of the ingress beside the service."""

    service: Service
    max_body_bytes: int
    feed: LiveFeed | None
    """Of the page at /ui; None: there is no page."""

    async def metrics(self) -> str: ...


def build_app(
    face: Face,
    *,
    title: str = "ragged-serve",
    api_keys: tuple[str, ...] = (),
    cors_origins: tuple[str, ...] = (),
    server_sends_ids: bool = False,
) -> FastAPI:
    """The application. ``face`` is asked at each request, so its limits may change.

    ``server_sends_ids``: the server around it gives each request an X-Request-Id and each answer the same.
    """
    app = _App(title=title, version=version(), openapi_tags=_TAGS)
    _add_routes(app, face)
    if face.feed is not None:
        add_ui_routes(app, face.feed)
    for kind in (RaggedServeError, HTTPException, Exception):
        app.add_exception_handler(kind, _handle_error)
    if cors_origins:
        app.add_middleware(CORSMiddleware, allow_origins=list(cors_origins), allow_methods=["*"], allow_headers=["*"])
    # The last one added is the first to run.
    shortcuts = {} if cors_origins else _SHORTCUTS  # that middleware has a word on every answer
    app.add_middleware(Edge, face=face, api_keys=api_keys, server_sends_ids=server_sends_ids, shortcuts=shortcuts)
    return app


def version() -> str:
    """Of this package; 0 where it is not installed."""
    try:
        return importlib.metadata.version("ragged-serve")
    except importlib.metadata.PackageNotFoundError:
        return "0"


class _App(FastAPI):
    """Keeps the server's own ``send`` for `EventStream`, before any middleware wraps it."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        scope.setdefault("state", {})["send"] = send
        await super().__call__(scope, receive, send)


# ---- the edge --------------------------------------------------------------------------------------------------------


class Edge:
    """ASGI middleware around everything: request id, key, the framework's failures.

    POSTs to the paths in ``shortcuts`` are answered here: the framework's layers cost a quarter of the CPU of a refused
    request, and refusals are what there is most of when it matters. Their routes stand below all the same.
    """

    def __init__(
        self,
        app: ASGIApp,
        face: Face,
        api_keys: tuple[str, ...],
        server_sends_ids: bool,
        shortcuts: Mapping[str, type[GenerationRequest]],
    ) -> None:
        self.app = app
        self.face = face
        self.shortcuts = shortcuts
        self.server_sends_ids = server_sends_ids
        self.api_keys = [key.encode() for key in api_keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        http_answers = self.face.service.counts.http_answers
        headers = Headers(scope=scope)
        request_id = clean_request_id(headers.get("x-request-id")) or new_request_id()
        scope["state"]["request_id"] = request_id
        # Who asks: where there are no keys everybody is the same.
        scope["state"]["owner"] = hashlib.sha256(given_key(headers)).digest() if self.api_keys else b""
        status: int | None = None

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                http_answers[route_of(scope, self.shortcuts), str(message["status"])] += 1
                status = message["status"]
                answered = MutableHeaders(scope=message)
                if self.server_sends_ids:
                    del answered["x-request-id"]  # a header that comes twice is read as "a, a"
                else:
                    answered.setdefault("x-request-id", request_id)
            await send(message)

        try:
            if self.api_keys and scope["path"] not in OPEN_PATHS and scope["method"] != "OPTIONS":
                self._check_key(headers)
            kind = self.shortcuts.get(scope["path"]) if scope["method"] == "POST" else None
            if kind is None:
                await self.app(scope, receive, send_with_id)
            else:
                answer = await self._answer(kind, Request(scope, receive))
                await answer(scope, receive, send_with_id)
        except Exception as error:  # what no handler took: our own mistake
            if not isinstance(error, RaggedServeError):
                logger.exception("%s %s failed", scope["method"], scope["path"], extra=about(request_id))
            if status is not None:
                raise
            await error_response(error).as_response()(scope, receive, send_with_id)
        finally:
            if (note := scope["state"].get("note")) is not None:
                self.face.service.requests.end(note, status)

    async def _answer(self, kind: type[GenerationRequest], request: Request) -> Response:
        try:
            return await _generate(self.face, request, kind)
        except Exception as error:
            return await _handle_error(request, error)

    def _check_key(self, headers: Headers) -> None:
        """All keys are compared, each in constant time: the time says nothing of which one was near."""
        key = given_key(headers)
        matches = [hmac.compare_digest(key, known) for known in self.api_keys]
        if not any(matches):
            raise InvalidApiKeyError(
                "the API key is not one of this server's"
                if key
                else "an API key is needed: Authorization: Bearer <key>"
            )


def route_of(scope: Scope, shortcuts: Collection[str]) -> str:
    """Its path as it was declared, for counting; "other" for what is no route: clients choose paths."""
    if scope["path"] in shortcuts:
        return str(scope["path"])
    path = getattr(scope.get("route"), "path", None)
    return path if isinstance(path, str) else "other"


def given_key(headers: Headers) -> bytes:
    """The API key of a request; empty without one."""
    scheme, _, given = headers.get("authorization", "").partition(" ")
    return given.strip().encode() if scheme.lower() == "bearer" else headers.get("x-api-key", "").encode()


def new_request_id() -> str:
    return uuid.uuid4().hex


def clean_request_id(given: str | None) -> str | None:
    """A client's id, if it is visible ASCII of a decent length; else None: it goes into logs and headers."""
    if given and len(given) <= MAX_REQUEST_ID_CHARS and all("!" <= character <= "~" for character in given):
        return given
    return None


async def read_body(request: Request, limit: int) -> bytes:
    """Raises BodyTooLargeError as soon as the limit is passed, by the header if it says so."""
    announced = request.headers.get("content-length", "")
    if announced.isdigit() and int(announced[:20]) > limit:
        raise BodyTooLargeError(f"the body has {announced[:20]} bytes; at most {limit} are taken")
    parts, size = [], 0
    async for part in request.stream():
        size += len(part)
        if size > limit:
            raise BodyTooLargeError(f"the body has more than {limit} bytes; at most {limit} are taken")
        parts.append(part)
    return b"".join(parts)


async def _handle_error(request: Request, error: Exception) -> Response:
    path, note = request.url.path, request.scope["state"].get("note")
    answer = error_response(error, method=request.method, path=path)
    # What a client got wrong is no failure, and its traceback would show what it sent.
    if answer.status >= 500 and not isinstance(error, RaggedServeError | HTTPException):
        logger.error("%s %s failed", request.method, path, exc_info=error, extra=about(request.state.request_id))
    if note is not None:
        note.error = answer
    return answer.as_response()


# ---- answers ---------------------------------------------------------------------------------------------------------


class EventStream(Response):
    """Server-sent events. Ends the generation when the client goes away."""

    def __init__(
        self, generation: Generation, first: bytes, rest: AsyncGenerator[bytes, None], request_id: str
    ) -> None:
        super().__init__(media_type="text/event-stream", headers=STREAM_HEADERS)
        del self.headers["content-length"]
        self._generation = generation
        self._first = first
        self._rest = rest
        self._request_id = request_id

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await until_disconnect(receive, self._send_all(send, scope["state"]["send"]))

    async def _send_all(self, send: Send, send_body: Send) -> None:
        """``send_body`` is the server's own, around the middleware, which cares for the start of an answer alone: six
        calls less for each token. The last event and the end of the body go together, as one packet."""
        generation = self._generation
        async with contextlib.aclosing(self._rest) as rest:
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            has_ended = generation.has_ended
            await send_body({"type": "http.response.body", "body": self._first, "more_body": not has_ended})
            try:
                async for data in rest:
                    has_ended = generation.has_ended
                    await send_body({"type": "http.response.body", "body": data, "more_body": not has_ended})
            except Exception as error:  # the status is gone: an event says it, and there is no [DONE]
                if not isinstance(error, RaggedServeError):
                    logger.exception("the stream failed", extra=about(self._request_id))
                if not has_ended:
                    await send_body(
                        {"type": "http.response.body", "body": generation.answer.error_event(error), "more_body": False}
                    )


async def _generate(face: Face, request: Request, kind: type[GenerationRequest]) -> Response:
    service, note = face.service, _note(face, request)
    remaining_ms = _remaining_ms(request)
    body = await read_body(request, face.max_body_bytes)
    asked = await service.parse(kind, body)
    resumable = None
    if RESUMABLE_HEADER in request.headers or EVENT_ID_HEADER in request.headers:
        resumable = resumable_of(request.headers, request.url.path, given_key(request.headers), body)
    request_id = asked.request_id or request.state.request_id
    service.requests.name(note, request_id)
    generation = await service.start(asked, request_id, remaining_ms(), resumable)
    service.requests.attach(note, generation, asked.model or service.model.names[0])
    return await _answer(request, generation, request_id, asked.request_id)


async def _respond(face: Face, request: Request) -> Response:
    service, note = face.service, _note(face, request)
    remaining_ms = _remaining_ms(request)
    for name in (RESUMABLE_HEADER, EVENT_ID_HEADER):
        if request.headers.get(name, "0").strip().lower() not in ("0", "false", ""):
            raise InvalidParameterError(name, request.headers[name], "left out: no stream of this route is kept")
    asked = await service.parse(ResponsesRequest, await read_body(request, face.max_body_bytes))
    request_id = asked.request_id or request.state.request_id
    service.requests.name(note, request_id)
    try:
        generation = await service.start(asked.chat, request_id, remaining_ms(), make=answer_maker(asked))
    except InvalidRequestError as error:
        raise asked.translated(error) from error
    service.requests.attach(note, generation, asked.model or service.model.names[0])
    return await _answer(request, generation, request_id, asked.request_id)


async def _embed(face: Face, request: Request) -> Response:
    service, note = face.service, _note(face, request)
    remaining_ms = _remaining_ms(request)
    asked = await service.parse(EmbeddingRequest, await read_body(request, face.max_body_bytes))
    request_id = asked.request_id or request.state.request_id
    service.requests.name(note, request_id, "embd-" + request_id)
    work = service.embed(asked, request_id, remaining_ms(), note.streams)
    body = await until_disconnect(request.receive, work)
    if body is None:
        return Response(status_code=499)  # nobody reads it
    headers = {} if asked.request_id is None else {"x-request-id": asked.request_id}
    return Response(body, headers=headers, media_type="application/json")


def _remaining_ms(request: Request) -> Callable[[], float | None]:
    """What it returns says how much is left of the time that the client gives; None: it names none. Time runs from here.

    Raises InvalidParameterError.
    """
    given, clock = timeout_ms(request.headers.get(TIMEOUT_HEADER)), asyncio.get_running_loop().time
    received_at = clock()
    return lambda: None if given is None else given - (clock() - received_at) * 1000.0


def _note(face: Face, request: Request) -> RequestNote:
    """Its end is noted by `Edge`."""
    state = request.scope["state"]
    note: RequestNote = face.service.requests.begin(state["request_id"], request.scope["path"], state["owner"])
    state["note"] = note
    return note


async def _answer(request: Request, generation: Generation, request_id: str, given_id: str | None) -> Response:
    """``given_id``: what the body calls the request, if it does."""
    # Up to the first bytes an error still has a status of its own, and a client that goes away is noticed here.
    answer = await until_disconnect(request.receive, _begin(generation, request_id))
    if answer is None:
        return Response(status_code=499)  # nobody reads it
    if given_id is not None:
        answer.headers["x-request-id"] = given_id
    return answer


async def _begin(generation: Generation, request_id: str) -> Response:
    chunks = generation.chunks()
    try:
        if generation.answer.media_type == "text/event-stream":
            return EventStream(generation, await anext(chunks), chunks, request_id)
        async with contextlib.aclosing(chunks):
            return Response(b"".join([data async for data in chunks]), media_type="application/json")
    except BaseException:
        await chunks.aclose()
        raise


_SHORTCUTS: Mapping[str, type[GenerationRequest]] = {
    "/v1/completions": CompletionRequest,
    "/v1/chat/completions": ChatCompletionRequest,
}

# ---- routes ----------------------------------------------------------------------------------------------------------

_TAGS = [{"name": "OpenAI"}, {"name": "text"}, {"name": "server"}]


def _takes(model: type[BaseModel]) -> dict[str, Any]:
    """The OpenAPI description of a body that the route reads by itself."""
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": _inlined(model)}}}}


def _inlined(model: type[BaseModel]) -> dict[str, Any]:
    """The JSON schema of ``model`` without references: FastAPI collects definitions only of bodies that it reads."""
    schema = model.model_json_schema()
    definitions = schema.pop("$defs", {})

    def resolve(value: Any) -> Any:
        if isinstance(value, dict):
            if "$ref" in value:
                return resolve(definitions[value["$ref"].rsplit("/", 1)[1]])
            return {key: resolve(inner) for key, inner in value.items()}
        return [resolve(inner) for inner in value] if isinstance(value, list) else value

    resolved: dict[str, Any] = resolve(schema)
    return resolved


Route = Callable[[Request], Awaitable[Response]]


def _add_routes(app: FastAPI, face: Face) -> None:
    def post(path: str, model: type[BaseModel], tag: str, about: str) -> Callable[[Route], Route]:
        return app.post(
            path, tags=[tag], summary=about, openapi_extra=_takes(model), response_class=Response, response_model=None
        )

    @post("/v1/completions", CompletionRequest, "OpenAI", "Continue a prompt")
    async def completions(request: Request) -> Response:
        return await _generate(face, request, CompletionRequest)

    @post("/v1/chat/completions", ChatCompletionRequest, "OpenAI", "Answer a conversation")
    async def chat_completions(request: Request) -> Response:
        return await _generate(face, request, ChatCompletionRequest)

    @post("/v1/responses", ResponsesRequest, "OpenAI", "Answer items with items")
    async def responses(request: Request) -> Response:
        return await _respond(face, request)

    @post("/v1/embeddings", EmbeddingRequest, "OpenAI", "Turn texts into vectors")
    async def embeddings(request: Request) -> Response:
        return await _embed(face, request)

    @app.get("/v1/models", tags=["OpenAI"], summary="The names of the model")
    async def models() -> JSONResponse:
        return JSONResponse(face.service.models())

    @app.get("/v1/models/{model:path}", tags=["OpenAI"], summary="One of them")
    async def model(model: str) -> JSONResponse:
        return JSONResponse(face.service.describe_model(model))

    @post("/tokenize", TokenizeRequest, "text", "Token ids of a text or a conversation")
    async def tokenize(request: Request) -> Response:
        asked = await face.service.parse(TokenizeRequest, await read_body(request, face.max_body_bytes))
        return Response(await face.service.tokenize(asked), media_type="application/json")

    @post("/detokenize", DetokenizeRequest, "text", "The text of token ids")
    async def detokenize(request: Request) -> Response:
        asked = await face.service.parse(DetokenizeRequest, await read_body(request, face.max_body_bytes))
        return Response(await face.service.detokenize(asked), media_type="application/json")

    @app.get("/health", tags=["server"], summary="200 as long as this process lives")
    async def health() -> JSONResponse:
        return JSONResponse({"status": "ok"})

    @app.get("/ready", tags=["server"], summary="200 once a replica can serve, else 503")
    async def ready() -> JSONResponse:
        status = face.service.status
        return JSONResponse({"status": status}, 200 if status == "ready" else 503)

    @app.get("/metrics", tags=["server"], summary="The whole deployment in Prometheus text")
    async def metrics() -> PlainTextResponse:
        return PlainTextResponse(await face.metrics(), media_type=CONTENT_TYPE)

    @app.get("/v1/requests/{request_id:path}/explain", tags=["server"], summary="Where a recent request ran, and why")
    async def explain(request: Request, request_id: str) -> JSONResponse:
        if face.service.explainer is None:
            raise NotEnabledError("api.explain")
        return JSONResponse(await face.service.explainer.explain(request_id, request.scope["state"]["owner"]))

    @app.get("/version", tags=["server"], summary="The version of this server")
    async def show_version() -> JSONResponse:
        return JSONResponse({"version": version()})
