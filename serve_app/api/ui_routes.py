"""The page at /ui: its files, and the stream that feeds it. Knows the files by name and the LiveFeed; knows no replica.

    /ui               index.html; it names the others relative to itself, so any route prefix will do
    /ui/<name>        one of FILES, read at start: no path of a request ever reaches the disk
    /ui/events        server-sent events of the LiveFeed

The files hold no secret and are given without a key. The stream, like all else, wants one where the server has keys.
"""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Final

from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from serve_app.api.disconnect import until_disconnect
from serve_app.api.live_feed import LiveFeed, Viewer

DIRECTORY = Path(__file__).parent / "ui"
INDEX = "index.html"
FILES: Final = {
    INDEX: "text/html; charset=utf-8",
    "icon.svg": "image/svg+xml",
    "style.css": "text/css; charset=utf-8",
    "main.js": "text/javascript; charset=utf-8",
    "feed.js": "text/javascript; charset=utf-8",
    "picture.js": "text/javascript; charset=utf-8",
    "chat.js": "text/javascript; charset=utf-8",
}
OPEN_PATHS = frozenset({"/ui", *(f"/ui/{name}" for name in FILES)})
"""No key is asked for."""

HEADERS = {
    # Nothing but this server's own files, and its API: no inline script or style, no frame around it, no form sent away.
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self';"
    " base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
    "cache-control": "no-cache",
}


def add_ui_routes(app: FastAPI, feed: LiveFeed) -> None:
    contents = {name: (DIRECTORY / name).read_bytes() for name in FILES}

    def file(name: str) -> Response:
        return Response(contents[name], headers=HEADERS, media_type=FILES[name])

    @app.get("/ui", tags=["server"], summary="The page that shows the batch as it runs", response_class=Response)
    async def ui() -> Response:
        return file(INDEX)

    @app.get("/ui/events", tags=["server"], summary="What feeds it, as server-sent events", response_class=Response)
    async def ui_events() -> Response:
        return _FeedStream(feed.join())

    @app.get("/ui/{name}", include_in_schema=False)
    async def ui_file(name: str) -> Response:
        if name not in contents:
            raise HTTPException(404)
        return file(name)


class _FeedStream(Response):
    """Until the viewer's messages end, or the client goes away."""

    def __init__(self, viewer: Viewer) -> None:
        super().__init__(
            media_type="text/event-stream",
            headers={"cache-control": "no-store", "x-accel-buffering": "no", "x-content-type-options": "nosniff"},
        )
        del self.headers["content-length"]
        self._viewer = viewer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await until_disconnect(receive, self._send_all(send))
        finally:
            self._viewer.leave()

    async def _send_all(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        async with contextlib.aclosing(self._viewer.messages()) as messages:
            async for message in messages:
                await send({"type": "http.response.body", "body": message, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})
