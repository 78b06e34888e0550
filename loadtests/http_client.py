"""A client for benches: many streams over plain sockets, in a process of its own, cheap enough not to be what is measured.

    python loadtests/http_client.py '{"url": ..., "requests": [[prompt ids, max_tokens, seconds], ...], "concurrency": 64}'

Sends OpenAI completions with `stream` and prints one JSON line: for each request the times of its events since it was sent,
its tokens, and how it ended. Knows HTTP/1.1 with chunked bodies and server-sent events, as far as this server and vLLM
speak them. Uses the standard library alone.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from typing import Any
from urllib.parse import urlsplit

from sse import DONE, EventReader


async def stream(host: str, port: int, path: str, body: bytes) -> dict[str, Any]:
    """One request on a connection of its own. ``events``: seconds from sending to each event that carries text."""
    reader, writer = await asyncio.open_connection(host, port)
    head = f"POST {path} HTTP/1.1\r\nhost: {host}\r\ncontent-type: application/json\r\nconnection: close\r\n"
    sent = time.perf_counter()
    writer.write(head.encode() + f"content-length: {len(body)}\r\n\r\n".encode() + body)
    events: list[float] = []
    status, is_done, usage = 0, False, None
    reading = EventReader()  # of the raw bytes: a chunk's size may stand between two events
    while data := await reader.read(1 << 16):
        now = time.perf_counter() - sent
        if not status:
            status = int(data.split(b" ", 2)[1])
        for payload in reading.feed(data):
            if payload == DONE:
                is_done = True
            elif b'"choices":[]' in payload or b'"choices": []' in payload:
                usage = json.loads(payload)["usage"]
            else:
                events.append(now)
        if is_done and usage is not None:
            break
    writer.close()
    return {
        "status": status,
        "done": is_done,
        "events": events,
        "tokens": usage["completion_tokens"] if usage else 0,
        "seconds": time.perf_counter() - sent,
    }


async def main(spec: dict[str, Any]) -> dict[str, Any]:
    parts = urlsplit(spec["url"])
    assert parts.hostname is not None
    limit = asyncio.Semaphore(spec["concurrency"])
    started = time.perf_counter()

    async def one(prompt: Any, max_tokens: int, arrival: float) -> dict[str, Any]:
        await asyncio.sleep(max(0.0, started + arrival - time.perf_counter()))
        fields = {
            "model": spec["model"],
            "prompt": prompt,
            "max_tokens": max_tokens,
            "temperature": 0.0,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        async with limit:
            return await stream(parts.hostname, parts.port or 80, "/v1/completions", json.dumps(fields).encode())

    answers = await asyncio.gather(*(one(*request) for request in spec["requests"]))
    return {"wall_s": time.perf_counter() - started, "cpu_s": time.process_time(), "answers": answers}


if __name__ == "__main__":
    print(json.dumps(asyncio.run(main(json.loads(sys.stdin.read())))))
