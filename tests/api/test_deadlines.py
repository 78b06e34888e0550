"""X-Request-Timeout-Ms over the whole service in one process: it ends a request wherever it is, and frees it."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from serve_app.api.headers import TIMEOUT_HEADER
from serve_app.config import ServeArgs
from serve_app.engine.engine import Engine
from serve_app.engine.simulated_runner import SimulatedRunner
from tests.api.house import House
from tests.tiny_models import make_tiny_model

ENGINE = {"num_threads": 1, "num_kv_blocks": 16, "max_model_len": 256, "max_num_batched_tokens": 64, "max_num_seqs": 16}
LONG = {"prompt": "a", "max_tokens": 200, "ignore_eos": True}


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("model"), vocab_size=300, eos=())


@contextmanager
def made(directory: Path, step: float, **engine: Any) -> Iterator[House]:
    model = {"model": str(directory), "runner": "simulated", "simulated": {"seconds_per_step": step}}
    reserve = {"router": {"policy": "reserve"}}
    with House({"model": model, "engine": {**ENGINE, **engine}}, num_replicas=1, user_config=reserve) as house:
        yield house
        house.check_rest()


def post(house: House, body: dict[str, Any], milliseconds: int | None) -> httpx.Response:
    headers = {} if milliseconds is None else {TIMEOUT_HEADER: str(milliseconds)}
    return httpx.post(house.url + "/v1/completions", json=body, headers=headers, timeout=60)


def code(answer: httpx.Response) -> tuple[int, str]:
    return answer.status_code, answer.json()["error"]["code"]


@pytest.mark.parametrize("given", ["0", "-5", "1.5", "soon", "", "99999999999", "1e3"])
def test_a_wrong_timeout_names_the_header_and_the_limit(directory: Path, given: str) -> None:
    from serve_app.api.headers import timeout_ms
    from serve_app.errors import InvalidParameterError

    with pytest.raises(InvalidParameterError, match=r"X-Request-Timeout-Ms is .*; it must be .* from 1 to 1000000000"):
        timeout_ms(given)
    assert timeout_ms(None) is None
    assert timeout_ms("1500") == 1500.0


def test_in_the_queue_of_the_router(directory: Path) -> None:
    """The pool is full of one answer; a second one waits for room until its deadline, and not longer."""
    with made(directory, 0.01, num_kv_blocks=8) as house, ThreadPoolExecutor(1) as pool:
        first = pool.submit(post, house, LONG, None)
        house.wait_until(lambda: len(house.replicas[0].table) == 1)
        assert code(post(house, LONG, 300)) == (504, "deadline_exceeded")
        assert not first.done()
        assert first.result().status_code == 200
        assert house.router is not None
        assert house.router.ledger.counters["deadlines_exceeded"] == 1
        assert post(house, LONG | {"max_tokens": 2}, 60_000).status_code == 200
        bad = post(house, LONG, 0)
        assert (bad.json()["error"]["param"], bad.status_code) == (TIMEOUT_HEADER, 400)


def test_in_the_queue_of_the_engine(directory: Path) -> None:
    """There is room in the pool, and no place in a step."""
    with made(directory, 0.01, max_num_seqs=1) as house, ThreadPoolExecutor(1) as pool:
        first = pool.submit(post, house, LONG, None)
        house.wait_until(lambda: house.replicas[0].engine.num_unfinished == 1)
        assert code(post(house, LONG, 300)) == (504, "deadline_exceeded")
        assert not first.done()
        assert first.result().status_code == 200
        assert house.router is not None
        assert house.router.ledger.counters["granted"] == 2
        assert house.router.ledger.counters["deadlines_exceeded"] == 0


def test_between_tokens(directory: Path) -> None:
    """A stream that has begun ends with an error event and without [DONE]; its blocks are free long before its tokens."""
    with made(directory, 0.05) as house:
        for milliseconds in (400, 1500, 5000):  # a busy machine may need longer for the first token
            headers = {TIMEOUT_HEADER: str(milliseconds)}
            body = LONG | {"stream": True}
            with httpx.stream("POST", house.url + "/v1/completions", json=body, headers=headers, timeout=60) as answer:
                events = [json.loads(line[6:]) for line in answer.iter_lines() if line.startswith("data: ")]
            if answer.status_code == 200:
                break
        assert answer.status_code == 200
        *tokens, last = events
        assert last["error"]["code"] == "deadline_exceeded"
        assert 1 <= len(tokens) < 150
        house.check_rest()
        # Two choices, and one of several prompts: the request ends as a whole.
        for more in ({"n": 2}, {"prompt": ["a", "b"]}):
            assert code(post(house, LONG | more, 300)) == (504, "deadline_exceeded")


class Gate:
    """Replaces a step's sleep: steps pass while it is open."""

    def __init__(self) -> None:
        self.open = threading.Event()
        self.num_stopped = 0

    def sleep(self, _: float) -> None:
        self.num_stopped += not self.open.is_set()
        assert self.open.wait(60)


def gated(gate: Gate) -> Callable[[ServeArgs], Engine]:
    def make(args: ServeArgs) -> Engine:
        runner = SimulatedRunner(num_kv_blocks=16, max_model_len=256, seconds_per_step=1.0, sleep=gate.sleep)
        return Engine(args.engine.to_engine_config(), runner)

    return make


def test_under_a_replica_that_hangs(directory: Path) -> None:
    gate = Gate()
    model = {"model": str(directory), "runner": "simulated"}
    with House({"model": model, "engine": ENGINE}, num_replicas=1, make_engine=gated(gate)) as house:
        assert code(post(house, LONG, 200)) == (504, "deadline_exceeded")
        assert gate.num_stopped == 1
        assert len(house.replicas[0].table) == 1  # booked until the replica has ended it
        gate.open.set()
        house.check_rest()
        assert post(house, LONG, 60_000).status_code == 200


def test_while_the_router_is_away(directory: Path) -> None:
    """What was asked before is asked again with the time that is left."""
    with made(directory, 0.001) as house:
        house.client._away_seconds = 60.0
        router, house.router = house.router, None
        assert code(post(house, LONG, 200)) == (504, "deadline_exceeded")
        with ThreadPoolExecutor(1) as pool:
            waiting = pool.submit(post, house, LONG, 50_000)
            house.wait_until(lambda: house.client.num_waiting == 1 and house.client.counters["failed_calls"] >= 2)
            asked = []

            async def call(method: str, *args: Any) -> Any:
                asked.extend(request.remaining_ms for request in args[0] if method == "ask")
                return await House.call(house, method, *args)

            house.router, house.call = router, call  # type: ignore[method-assign]
            assert waiting.result().status_code == 200
        assert len(asked) == 1
        assert 0 < asked[0] < 50_000
