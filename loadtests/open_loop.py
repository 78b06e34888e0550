"""An open-loop client for benches: requests are sent when they are due, whatever became of those before.

    python loadtests/open_loop.py      reads {"url": ..., "requests": [[prompt ids, max_tokens, arrival], ...], ...}

Sends OpenAI completions with `stream`, each on a connection of its own, and asks for /health all the while. A client that
has waited for its deadline (and ``patience_s``, to hear what the server says of it) goes away, as people do. With
``concurrency`` the load is closed: so many at a time, and no arrivals. Prints one JSON object; times are seconds, those of
a request since it was due. Uses the standard library alone.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import resource
import sys
import time
from dataclasses import asdict, dataclass
from typing import Any
from urllib.parse import urlsplit

from sse import DONE as STREAM_DONE, EventReader

TIMEOUT_HEADER = "X-Request-Timeout-Ms"
DONE, REFUSED, LATE, ERROR = "done", "refused", "late", "error"


@dataclass
class Answer:
    """What became of one request."""

    due: float
    """Since the run began."""
    kind: str = ERROR
    """done: all of it came. refused: 429. late: server or client gave it up at its deadline. error: anything else."""
    reason: str = ""
    """Of an error."""
    lag: float = 0.0
    """How much later than due it was sent: what the client itself adds."""
    first: float | None = None
    """The first token."""
    seconds: float = 0.0
    """The end."""
    tokens: int = 0
    retry_after: int | None = None


class Client:
    """One run against one server."""

    def __init__(self, spec: dict[str, Any]) -> None:
        parts = urlsplit(spec["url"])
        self.host, self.port = str(parts.hostname), parts.port or 80
        self.spec = spec
        self.deadline: float | None = spec.get("deadline_s")
        self.patience: float = spec.get("patience_s", 0.0)
        self.limit = asyncio.Semaphore(spec["concurrency"]) if spec.get("concurrency") else None
        self.probes: list[tuple[float, float, int]] = []
        """When, how long, status (0: no answer)."""

    async def run(self) -> dict[str, Any]:
        self.started = time.perf_counter()
        cpu = time.process_time()
        watch = asyncio.create_task(self.probe())
        answers = await asyncio.gather(*(self.one(*request) for request in self.spec["requests"]))
        watch.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await watch
        return {
            "wall_s": self.now(),
            "cpu_s": time.process_time() - cpu,
            "answers": [asdict(answer) for answer in answers],
            "probes": self.probes,
        }

    def now(self) -> float:
        return time.perf_counter() - self.started

    async def one(self, prompt: list[int], max_tokens: int, arrival: float) -> Answer:
        if self.limit is not None:
            async with self.limit:
                return await self.ask(prompt, max_tokens, self.now())
        await asyncio.sleep(max(0.0, arrival - self.now()))
        return await self.ask(prompt, max_tokens, arrival)

    async def ask(self, prompt: list[int], max_tokens: int, due: float) -> Answer:
        answer = Answer(due, lag=self.now() - due)
        left = None if self.deadline is None else due + self.deadline + self.patience - self.now()
        try:
            async with asyncio.timeout(left):
                await self.exchange(answer, prompt, max_tokens)
        except TimeoutError:
            answer.kind = LATE
        except (OSError, ValueError, IndexError, KeyError) as error:
            answer.reason = f"{type(error).__name__}: {error}"
        answer.seconds = self.now() - due
        return answer

    async def exchange(self, answer: Answer, prompt: list[int], max_tokens: int) -> None:
        fields = {
            "model": self.spec.get("model", "bench"),
            "prompt": prompt,
            "max_tokens": max_tokens,
            "temperature": 0.0,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        headers = "content-type: application/json\r\n"
        if self.deadline is not None and self.spec.get("says_deadline", True):
            left = answer.due + self.deadline - self.now()
            headers += f"{TIMEOUT_HEADER}: {max(1, int(left * 1000))}\r\n"
        reader, writer = await asyncio.open_connection(self.host, self.port)
        try:
            writer.write(request_bytes("POST", "/v1/completions", self.host, headers, json.dumps(fields).encode()))
            await self.read(answer, reader, max_tokens)
        finally:
            writer.close()

    async def read(self, answer: Answer, reader: asyncio.StreamReader, max_tokens: int) -> None:
        status, head = await read_head(reader)
        if status != 200:
            if "retry-after" in head:
                answer.retry_after = int(head["retry-after"])
            body = await reader.read()
            answer.kind = {429: REFUSED, 504: LATE}.get(status, ERROR)
            if answer.kind == ERROR:
                answer.reason = f"{status} {body[:200].decode(errors='replace')}"
            return
        is_done, usage = False, None
        reading = EventReader()  # of the raw bytes: a chunk's size may stand between two events
        while data := await reader.read(1 << 16):
            for payload in reading.feed(data):
                if payload == STREAM_DONE:
                    is_done = True
                elif payload.startswith(b'{"error"'):
                    code = json.loads(payload)["error"]["code"]
                    answer.kind = LATE if code == "deadline_exceeded" else ERROR
                    answer.reason = code
                    return
                elif b'"choices":[]' in payload:
                    usage = json.loads(payload)["usage"]
                elif answer.first is None:
                    answer.first = self.now() - answer.due
            if is_done:
                break
        answer.tokens = usage["completion_tokens"] if usage else 0
        if is_done and answer.tokens == max_tokens:
            answer.kind = DONE
        else:
            answer.reason = f"the stream ended with {answer.tokens} of {max_tokens} tokens, [DONE]: {is_done}"

    async def probe(self) -> None:
        """GET /health, again and again."""
        path, pause = self.spec.get("probe", "/health"), self.spec.get("probe_s", 0.1)
        while True:
            at, status = self.now(), 0
            with contextlib.suppress(OSError, ValueError, IndexError, TimeoutError):
                async with asyncio.timeout(10.0):
                    reader, writer = await asyncio.open_connection(self.host, self.port)
                    try:
                        writer.write(request_bytes("GET", path, self.host))
                        status, _ = await read_head(reader)
                    finally:
                        writer.close()
            self.probes.append((at, self.now() - at, status))
            await asyncio.sleep(pause)


def request_bytes(method: str, path: str, host: str, headers: str = "", body: bytes = b"") -> bytes:
    head = (
        f"{method} {path} HTTP/1.1\r\nhost: {host}\r\nconnection: close\r\n{headers}content-length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body


async def read_head(reader: asyncio.StreamReader) -> tuple[int, dict[str, str]]:
    """Status and headers. Raises ValueError or IndexError for what is no HTTP, also for an early end."""
    try:
        first, *lines = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")[:-2]
    except asyncio.IncompleteReadError as error:
        raise ValueError(f"the connection ended after {len(error.partial)} bytes") from error
    return int(first.split(" ", 2)[1]), {k.lower(): v.strip() for k, _, v in (line.partition(":") for line in lines)}


if __name__ == "__main__":
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    print(json.dumps(asyncio.run(Client(json.loads(sys.stdin.read())).run())))
