"""locust itself, headless, in processes of its own, against the service in this one: alone, and a master with two workers.

What it counts and computes is tested in test_load_plan.py and test_load_stats.py, without locust.
"""

from __future__ import annotations

import asyncio
import importlib.util
import json
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from loadtests.load_plan import Plan, PlanOptions, Vocabulary
from tests.api.house import House
from tests.tiny_models import make_tiny_model

REPOSITORY = Path(__file__).parents[2]
SECONDS, RATE = 1, 25
PLANNED = tuple(Plan(PlanOptions(rate=RATE, seconds=SECONDS, output_lens=(2, 8)), Vocabulary()).scheduled())
EASY = ("--slo-ttft-ms", "60000", "--slo-tpot-ms", "60000", "--slo-itl-ms", "60000", "--slo-e2el-ms", "60000")


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> Iterator[House]:
    model = make_tiny_model(tmp_path_factory.mktemp("load") / "model", vocab_size=300, eos=())
    args = {
        "model": {"model": str(model), "runner": "simulated", "simulated": {"seconds_per_step": 0.002}},
        "engine": {"block_size": 16, "num_kv_blocks": 2048, "max_model_len": 4096},
    }
    with House(args) as made:
        yield made


class Run(NamedTuple):
    code: int
    result: dict[str, Any]
    """The last line."""
    said: str
    page: str


@pytest.fixture(scope="module")
def runs(house: House, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Run]:
    """All of them at once: most of a run's time is the start of Python."""
    directory = tmp_path_factory.mktemp("runs")
    trace = directory / "trace.jsonl"
    rows = [{"timestamp": 90 * i, "input_length": 900, "output_length": 4, "hash_ids": [0, i]} for i in range(9)]
    trace.write_text("".join(json.dumps(row) + "\n" for row in rows))
    breaker = Breaker()
    wanted = {
        "open": (house.url, ("--rate", str(RATE), *EASY)),
        "closed, missed": (house.url, ("-u", "2", "-r", "2", "--slo-e2el-ms", "0.001")),
        "master": (house.url, ("--rate", str(RATE), "--processes", "2", *EASY)),
        "trace": (house.url, ("--workload", str(trace), "--endpoint", "completions")),
        "no trace": (house.url, ("--workload", "nothing.csv")),
        "breaks": (breaker.url, ("--rate", str(RATE), "--endpoint", "completions")),
    }
    try:
        with ThreadPoolExecutor(len(wanted)) as pool:
            asked = {
                name: pool.submit(run, url, directory / f"{number}.html", *arguments)
                for number, (name, (url, arguments)) in enumerate(wanted.items())
            }
            return {name: answer.result() for name, answer in asked.items()}
    finally:
        breaker.stop()


def run(url: str, report: Path, *arguments: str) -> Run:
    command = [sys.executable, "-m", "locust", "-f", "loadtests/locustfile.py", "--headless", "--only-summary"]
    command += ["--host", url, "--report", str(report), "-t", f"{SECONDS}s", "--output-lens", "2-8"]
    with socket.create_server(("127.0.0.1", 0)) as found:
        port = str(found.getsockname()[1])  # masters that run at once, of this test and of others
    if "--processes" in arguments:
        command += ["--master-bind-port", port, "--master-port", port]
    done = subprocess.run(
        [*command, *arguments], cwd=REPOSITORY, capture_output=True, text=True, check=False, timeout=300
    )
    said = done.stdout + done.stderr
    lines = [line for line in done.stdout.splitlines() if line.startswith('{"bench": "load"')]
    assert len(lines) == 1, said
    return Run(done.returncode, json.loads(lines[0]), said, report.read_text())


def test_an_open_loop_that_keeps_its_slo(runs: dict[str, Run], house: House) -> None:
    code, result, said, page = runs["open"]
    assert code == 0, said
    assert result["completed"] == result["good"] == len(PLANNED) >= 10
    assert (result["lost"], result["failed"], result["wrong"]) == (0, 0, [])
    assert result["total_output_tokens"] == sum(request.num_output_tokens for request in PLANNED)
    assert 0 < result["median_ttft_ms"] <= result["median_e2el_ms"]
    assert "Successful requests:" in said
    rows = [line.split() for line in said.splitlines()]
    for kind in ("TTFT", "TPOT", "ITL", "TOKENS/S", "GOODPUT"):  # locust's own table
        assert {words[1] for words in rows if words and words[0] == kind} == {"chat", "completions"}
    assert page.count("<svg") == 9
    assert "Passed" in page
    house.check_rest()


def test_a_missed_slo_is_an_exit_code(runs: dict[str, Run]) -> None:
    code, result, said, page = runs["closed, missed"]
    assert code == 1, said
    assert result["completed"] == result["slo_missed"]["e2el"] > 0
    assert "0.00% of" in result["wrong"][0]
    assert "0.00% of" in page


def test_a_master_adds_up_what_its_workers_count(runs: dict[str, Run]) -> None:
    """Each worker sends its share of one plan: together what one process sends."""
    code, result, said, _ = runs["master"]
    assert code == 0, said
    assert "2 workers" in said or "2 ready workers" in said
    alone = runs["open"].result
    for name in ("completed", "total_input_tokens", "total_output_tokens"):
        assert result[name] == alone[name] > 0


def test_a_trace(runs: dict[str, Run]) -> None:
    code, result, said, _ = runs["trace"]
    assert code == 0, said
    assert (result["completed"], result["total_input_tokens"], result["total_output_tokens"]) == (9, 8100, 36)


def test_what_cannot_start(runs: dict[str, Run]) -> None:
    code, result, said, _ = runs["no trace"]
    assert code == 1
    assert "the load cannot start" in said
    assert "there is no trace at nothing.csv" in said
    assert result["wrong"] == ["no request was completed"]


class Breaker:
    """A server whose streams break off, or say an error, behind their first token; every third one is refused."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self._server = asyncio.run_coroutine_threadsafe(
            asyncio.start_server(self._serve, "127.0.0.1", 0), self._loop
        ).result(60)
        self.url = f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"
        self._num_streams = 0

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        length = next((line for line in head.lower().split("\r\n") if line.startswith("content-length")), ":0")
        await reader.readexactly(int(length.split(":")[1]))
        answer = b"HTTP/1.1 404 Not Found\r\ncontent-length: 2\r\nconnection: close\r\n\r\n{}"
        if head.startswith("GET /v1/models"):
            body = b'{"data": [{"id": "broken"}]}'
            answer = b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\nconnection: close\r\n\r\n%s" % (len(body), body)
        elif "completions" in head.split("\r\n")[0]:
            self._num_streams += 1
            event = b'data: {"choices": [{"index": 0, "text": "a", "finish_reason": null}]}\n\n'
            if self._num_streams % 3 == 1:
                event += b'data: {"error": {"code": "engine_failed"}}\n\n'
            answer = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n%x\r\n%s\r\n" % (len(event), event)
            if self._num_streams % 3 == 0:
                answer = b"HTTP/1.1 429 Too Many Requests\r\ncontent-length: 2\r\nconnection: close\r\n\r\n{}"
        writer.write(answer)
        await writer.drain()
        writer.close()

    def stop(self) -> None:
        async def close() -> None:
            self._server.close()

        asyncio.run_coroutine_threadsafe(close(), self._loop).result(60)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


def test_what_breaks_is_told_apart(runs: dict[str, Run]) -> None:
    code, result, said, _ = runs["breaks"]
    assert code == 1, said
    assert result["completed"] == 0
    assert result["failed"] == result["lost"] + result["refused"] + result["failed_with_an_error"] >= 10
    assert min(result["lost"], result["refused"], result["failed_with_an_error"]) >= 1
    assert "failed: error event: engine_failed" in result["reasons"]
    assert any("ended with neither their end nor an error" in text for text in result["wrong"])


def test_this_process_is_not_patched() -> None:
    assert importlib.util.find_spec("locust") is not None
    assert "locust" not in sys.modules
    assert socket.socket.__module__ == "socket"  # and not gevent's
