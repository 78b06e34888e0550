"""A plain HTTP/1.1 client for the drill and the soak: one request on a connection of its own. Knows chunked bodies and
server-sent events as far as this server and HAProxy speak them; changes nothing of a path. What breaks raises OSError,
EOFError or ValueError.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from types import TracebackType

from loadtests.sse import EventReader


class Wire:
    """One connection. ``async with`` closes it, wherever the request is."""

    def __init__(self, host: str, port: int) -> None:
        self._host, self._port = host, port
        self._headers: list[str] | None = None
        """Lines of the answer's head, in lower case."""

    async def __aenter__(self) -> Wire:
        self._reader, self._writer = await asyncio.open_connection(self._host, self._port, limit=1 << 22)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        self._writer.transport.abort()

    async def send(self, method: str, path: str, headers: Mapping[str, str], body: bytes) -> None:
        """A server that has heard enough may close before all is sent: its answer counts, not that."""
        self._writer.write(self._head(method, path, headers, body) + body)

    async def send_part(self, method: str, path: str, headers: Mapping[str, str], body: bytes, until: str) -> None:
        """``until``: "in headers" or "in body", where it ends."""
        data = self._head(method, path, headers, body) + body
        self._writer.write(data[:30] if until == "in headers" else data[:-5])

    def _head(self, method: str, path: str, headers: Mapping[str, str], body: bytes) -> bytes:
        lines = [f"{method} {path} HTTP/1.1", f"host: {self._host}", f"content-length: {len(body)}"]
        lines += [f"{name}: {value}" for name, value in {"content-type": "application/json", **headers}.items()]
        return ("\r\n".join(lines) + "\r\n\r\n").encode()

    async def status(self) -> int:
        if self._headers is None:
            self._headers = (await self._reader.readuntil(b"\r\n\r\n")).decode("latin-1").lower().split("\r\n")
        return int(self._headers[0].split()[1])

    async def parts(self) -> AsyncIterator[bytes]:
        """The body as it comes."""
        await self.status()
        assert self._headers is not None
        values = dict(line.split(": ", 1) for line in self._headers[1:] if ": " in line)
        if values.get("transfer-encoding") == "chunked":
            while size := int(await self._line(), 16):
                yield (await self._reader.readexactly(size + 2))[:-2]
        elif "content-length" in values:
            yield await self._reader.readexactly(int(values["content-length"]))
        else:
            while data := await self._reader.read(1 << 16):
                yield data

    async def _line(self) -> bytes:
        line = await self._reader.readline()
        if not line:
            raise EOFError("the connection was closed between two chunks")
        return line

    async def body(self) -> bytes:
        return b"".join([part async for part in self.parts()])

    async def events(self) -> AsyncIterator[bytes]:
        """Server-sent events, without ``data: ``."""
        reading = EventReader()
        async for part in self.parts():
            for data in reading.feed(part):
                yield data
