"""How much the load generator itself can take: locust against a server that does nothing but stream.

    python loadtests/bench_load_client.py              64 users in a closed loop, one process of locust
    python loadtests/bench_load_client.py --processes 2

The server (this file with --serve, a process of its own) sends one event to every open stream, then the next one to each, as
fast as it can: each event is a packet of its own, which costs a client most. What theory allows is one core of the client:
tokens a second over the share of a core it took. A load test that asks for more than half of that measures its client.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
NUM_TOKENS = 64
EVENT = {
    "id": "cmpl-0123456789abcdef0123456789abcdef",
    "object": "text_completion",
    "created": 1,
    "model": "none",
    "system_fingerprint": "none",
    "choices": [{"index": 0, "text": " word", "logprobs": None, "finish_reason": None}],
    "usage": None,
}
USAGE = {"choices": [], "usage": {"prompt_tokens": 32, "completion_tokens": NUM_TOKENS}}


def chunk(data: str) -> bytes:
    body = f"data: {data}\n\n".encode()
    return b"%x\r\n%s\r\n" % (len(body), body)


HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
TOKEN, END = chunk(json.dumps(EVENT)), chunk(json.dumps(USAGE)) + chunk("[DONE]") + b"0\r\n\r\n"


async def serve() -> None:
    """Prints its port, and streams until it is ended."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            try:
                head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").lower()
            except (asyncio.IncompleteReadError, ConnectionError):
                writer.close()
                return
            length = next((line for line in head.split("\r\n") if line.startswith("content-length:")), ":0")
            await reader.readexactly(int(length.split(":")[1]))
            if head.startswith("get /v1/models"):
                body = b'{"data": [{"id": "none"}]}'
                writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n%s" % (len(body), body))
            elif "completions" not in head.split("\r\n")[0]:
                writer.write(b"HTTP/1.1 404 Not Found\r\ncontent-length: 2\r\n\r\n{}")
            else:
                writer.write(HEAD)
                for _ in range(NUM_TOKENS):
                    writer.write(TOKEN)
                    await asyncio.sleep(0)  # every other stream has its token first
                writer.write(END)
            await writer.drain()

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    server = subprocess.Popen(
        [sys.executable, __file__, "--serve"],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert server.stdout is not None
    try:
        url = f"http://127.0.0.1:{server.stdout.readline().strip()}"
        with tempfile.TemporaryDirectory() as directory:
            command = [sys.executable, "-m", "locust", "-f", "loadtests/locustfile.py", "--headless", "--only-summary"]
            command += ["--host", url, "-u", str(arguments.users), "-r", str(arguments.users)]
            command += [
                "-t",
                f"{arguments.seconds}s",
                "--endpoint",
                "completions",
                "--report",
                f"{directory}/report.html",
            ]
            if arguments.processes > 1:
                command += ["--processes", str(arguments.processes)]
            said = Path(directory) / "said.txt"
            with said.open("wb") as output:
                code = subprocess.run(
                    command, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT, check=False
                ).returncode
            text = said.read_text()
    finally:
        server.kill()
        server.wait()
    line = next((line for line in text.splitlines() if line.startswith('{"bench"')), None)
    if line is None or code:
        raise RuntimeError(f"locust ended with {code}:\n{text[-3000:]}")
    result = json.loads(line)
    cpu = result["client"]["cpu_s"]
    return {
        "bench": "load_client",
        "users": arguments.users,
        "processes": arguments.processes,
        "tokens_per_s": result["output_throughput"],
        "requests_per_s": result["request_throughput"],
        "busiest_second_cpu": result["client"]["max_cpu"],
        "cpu_s": cpu,
        "us_of_cpu_per_token": cpu / result["total_output_tokens"] * 1e6,
        "tokens_per_s_of_a_core": result["total_output_tokens"] / cpu,
        "stalled_share": result["client"]["stalled_share"],
        "load_average": os.getloadavg()[0],
    }


def main() -> None:
    made = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    made.add_argument("--users", type=int, default=64)
    made.add_argument("--seconds", type=int, default=15)
    made.add_argument("--processes", type=int, default=1, help="of locust")
    made.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    arguments = made.parse_args()
    if arguments.serve:
        asyncio.run(serve())
        return
    found = measure(arguments)
    for name, value in found.items():
        print(f"{name:28}{value if isinstance(value, str | int) else f'{value:.2f}'}")
    print(json.dumps(found))


if __name__ == "__main__":
    main()
