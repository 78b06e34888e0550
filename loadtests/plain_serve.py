"""Plain Ray Serve around the same simulated engine, to compare with: one deployment, Serve's own router and proxy, one Ray
stream per request. Knows nothing of leases and deadlines: a request ends when it is done, or when its client goes away.

    python loadtests/plain_serve.py '{"port": 8000, "num_replicas": 2, "max_ongoing_requests": 1000, "args": {...}}'
"""

from __future__ import annotations

import contextlib
import json
import sys
import uuid
from collections.abc import AsyncIterator
from typing import Any

from ray import serve
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response, StreamingResponse

from serve_app.config import ServeArgs
from serve_app.engine.async_engine import AsyncEngine
from serve_app.engine.request import GenerateRequest, SamplingParams
from serve_app.replica.load import load_engine


class Plain:
    """``args``: as ragged-serve's application has them."""

    def __init__(self, args: dict[str, Any]) -> None:
        self.engine = AsyncEngine(load_engine(ServeArgs.parse(args)))
        self.engine.start()

    async def __call__(self, request: Request) -> Response:
        if request.url.path == "/health":
            return PlainTextResponse("ok")
        fields = await request.json()
        sampling = SamplingParams(max_tokens=fields["max_tokens"], temperature=0.0, ignore_eos=True, seed=0).resolved()
        made = GenerateRequest(uuid.uuid4().hex, tuple(fields["prompt"]), sampling)
        return StreamingResponse(self.events(made), media_type="text/event-stream")

    async def events(self, request: GenerateRequest) -> AsyncIterator[bytes]:
        outputs = await self.engine.submit([request])
        num_tokens = 0
        async with contextlib.aclosing(outputs):
            async for output in outputs:
                num_tokens += len(output.token_ids)
                content = {"choices": [{"index": 0, "token_ids": output.token_ids, "text": ""}]}
                yield b"data: " + json.dumps(content).encode() + b"\n\n"
        usage = {"choices": [], "usage": {"completion_tokens": num_tokens}}
        yield b"data: " + json.dumps(usage, separators=(",", ":")).encode() + b"\n\ndata: [DONE]\n\n"


def main(spec: dict[str, Any]) -> None:
    serve.start(http_options={"host": "127.0.0.1", "port": spec["port"]})
    deployment = serve.deployment(
        name="Plain",
        num_replicas=spec["num_replicas"],
        max_ongoing_requests=spec["max_ongoing_requests"],
        ray_actor_options={"num_cpus": 0.1},
    )(Plain)
    serve.run(deployment.bind(spec["args"]), name="plain", blocking=True)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
