"""Draining in one process: a replica that leaves, an ingress that leaves, a server that ends. Two replicas, real sockets."""

from __future__ import annotations

import json
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import pytest

from serve_app.replica.load import load_engine
from tests.api.house import House, Replica
from tests.tiny_models import make_tiny_model

STEP_SECONDS = 0.01
LONG = 80
NUM_STREAMS = 8


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("draining") / "model", vocab_size=300, eos=())


def house_of(directory: Path, *, num_kv_blocks: int = 200, step_seconds: float = STEP_SECONDS, **drain: float) -> House:
    model = {"model": str(directory), "runner": "simulated", "simulated": {"seconds_per_step": step_seconds}}
    engine = {"block_size": 16, "num_kv_blocks": num_kv_blocks, "max_model_len": 600}
    return House({"model": model, "engine": engine, "drain": drain})


class Told(NamedTuple):
    """What one client got of a stream."""

    text: str
    finish_reason: str | None
    error: dict[str, Any] | None
    is_done: bool


def body_of(number: int, num_tokens: int = LONG) -> dict[str, Any]:
    return {"prompt": f"{number} and so on", "max_tokens": num_tokens, "seed": number, "ignore_eos": True}


def read(house: House, number: int, num_tokens: int = LONG, on_text: Callable[[], None] = lambda: None) -> Told:
    text, reason, error, is_done = "", None, None, False
    with (
        httpx.Client(timeout=60) as http,
        http.stream(
            "POST", house.url + "/v1/completions", json=body_of(number, num_tokens) | {"stream": True}
        ) as answer,
    ):
        assert answer.status_code == 200, answer.read()
        for line in answer.iter_lines():
            if not line:
                continue
            assert not is_done, f"{line} after the end"
            if line == "data: [DONE]":
                is_done = True
                continue
            event = json.loads(line.removeprefix("data: "))
            if "error" in event:
                error = event["error"]
                continue
            text += event["choices"][0]["text"]
            reason = event["choices"][0]["finish_reason"] or reason
            on_text()
    return Told(text, reason, error, is_done)


@pytest.fixture(scope="module")
def undisturbed(directory: Path) -> dict[int, Told]:
    with house_of(directory) as house, ThreadPoolExecutor(NUM_STREAMS) as pool:
        told = dict(enumerate(pool.map(lambda i: read(house, i), range(NUM_STREAMS))))
    assert all((one.finish_reason, one.error, one.is_done) == ("length", None, True) for one in told.values())
    return told


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(2 * NUM_STREAMS) as made:
        yield made


def all_run(house: House) -> bool:
    """All streams, some on each replica."""
    running = [replica.engine.num_unfinished for replica in house.replicas]
    return sum(running) == NUM_STREAMS and min(running) >= 2


def test_a_replica_that_leaves_ends_what_it_has(
    directory: Path, undisturbed: dict[int, Told], pool: ThreadPoolExecutor
) -> None:
    with house_of(directory, replica_seconds=30.0) as house:
        streams = [pool.submit(read, house, i) for i in range(NUM_STREAMS)]
        house.wait_until(lambda: all_run(house))
        leaving, staying = house.replicas
        num_steps = staying.engine.num_steps
        num_there = len(leaving.table)
        leaving.is_leaving = True
        house.wait_until(lambda: house.client.state.replica_ids == ("replica1",))
        assert not leaving.hub.is_over
        late = [pool.submit(read, house, i) for i in range(4)]
        assert [stream.result() for stream in streams] == list(undisturbed.values())
        assert [stream.result() for stream in late] == [undisturbed[i] for i in range(4)]
        house.wait_until(lambda: leaving.hub.is_drained)
        assert staying.engine.num_steps > num_steps
        assert leaving.table.num_ended == num_there >= 2, "it took what was new"
        assert house.service.failover.counters["lost"] == 0, "nothing had to move"
        house.wait_until(lambda: house.transport.num_streams("replica0") == 0)
        house.check_rest()


def test_what_is_left_on_a_replica_at_the_end_of_its_time_goes_on_elsewhere(
    directory: Path, undisturbed: dict[int, Told], pool: ThreadPoolExecutor
) -> None:
    with house_of(directory, replica_seconds=0.1) as house:
        streams = [pool.submit(read, house, i) for i in range(NUM_STREAMS)]
        house.wait_until(lambda: all_run(house) and house.replicas[0].engine.num_steps > 10)
        leaving, staying = house.replicas
        num_moved = len(leaving.table)
        leaving.is_leaving = True
        assert [stream.result() for stream in streams] == list(undisturbed.values())
        assert leaving.hub.is_drained
        assert staying.table.num_ended == NUM_STREAMS
        counters = house.service.failover.counters
        assert (counters["lost"], counters["resumed"]) == (num_moved, num_moved)
        assert num_moved >= 2
        assert counters["trials"] == 0, "no request is to blame"
        assert house.router is not None
        assert house.router.ledger.counters["lost_with_replica"] == 0, "it is not dead"
        house.check_rest()


def test_replicas_are_replaced_one_by_one_and_nothing_is_lost(
    directory: Path, undisturbed: dict[int, Told], pool: ThreadPoolExecutor
) -> None:
    """A rolling update under load: each client asks again and again, all old replicas leave, with too little time."""
    with house_of(directory, replica_seconds=0.2) as house:
        has_ended = threading.Event()
        told: list[tuple[int, Told]] = []

        def ask(number: int) -> None:
            while not has_ended.is_set():
                told.append((number, read(house, number)))

        async def add(name: str) -> None:
            replica = Replica(name, load_engine(house.args), house)
            house.replicas.append(replica)
            house.transport.hubs[name] = replica.hub

        clients = [pool.submit(ask, i) for i in range(NUM_STREAMS)]
        for i in range(2):
            house.wait_until(lambda i=i: house.replicas[i].engine.num_unfinished >= 2)
            house.replicas[i].is_leaving = True
            house.wait_until(lambda i=i: house.replicas[i].hub.is_over and house.replicas[i].hub.is_drained)
            house.run(add(f"replica{2 + i}"))
            num_told = len(told)
            house.wait_until(lambda i=i: house.replicas[2 + i].engine.num_unfinished >= 2)
            house.wait_until(lambda n=num_told: len(told) >= n + NUM_STREAMS)
        has_ended.set()
        assert not house.replicas[0].table.rows()
        for client in clients:
            client.result()
        assert len(told) >= 3 * NUM_STREAMS
        assert [one for one in told if one[1] != undisturbed[one[0]]] == []
        assert house.service.failover.counters["resumed"] >= 4
        house.check_rest()


def check_is_error_event(told: Told, whole: Told, words: str) -> None:
    assert told.error is not None
    assert words in told.error["message"]
    assert (told.error["type"], told.error["code"]) == ("server_error", "engine_unavailable")
    assert (told.finish_reason, told.is_done) == (None, False)
    assert whole.text.startswith(told.text)
    assert len(told.text) < len(whole.text)


def test_at_the_end_of_its_time_the_clients_of_an_ingress_are_told(
    directory: Path, undisturbed: dict[int, Told], pool: ThreadPoolExecutor
) -> None:
    with house_of(directory, num_kv_blocks=24, step_seconds=0.04, ingress_seconds=0.4) as house:
        shown: Counter[int] = Counter()
        streams = [pool.submit(read, house, i, LONG, lambda i=i: shown.update([i])) for i in range(4)]
        house.wait_until(lambda: all(shown[i] >= 2 for i in range(4)))
        whole = pool.submit(httpx.post, house.url + "/v1/completions", json=body_of(9, 300), timeout=60)
        waiting = [
            pool.submit(httpx.post, house.url + "/v1/completions", json=body_of(i, 300), timeout=60)
            for i in range(10, 13)
        ]
        house.wait_until(lambda: house.client.num_waiting >= 2)
        house.is_leaving = True
        ended = [stream.result() for stream in streams]
        told = [(i, one) for i, one in enumerate(ended) if one.error is not None]
        for i, one in told:
            check_is_error_event(one, undisturbed[i], "this ingress leaves, and the 0.4 s for answers to end are over")
        assert len(told) >= 2
        for answer in [whole.result(), *(one.result() for one in waiting)]:
            assert answer.status_code == 503
            assert int(answer.headers["retry-after"]) >= 1
            assert "this ingress leaves" in answer.json()["error"]["message"]
        late = httpx.post(house.url + "/v1/completions", json=body_of(14, 3), timeout=60)
        assert late.status_code == 503, "late, by a connection that the proxy still had"
        house.check_rest()


def test_a_server_that_ends_takes_nothing_new_and_ends_what_it_has(
    directory: Path, undisturbed: dict[int, Told], pool: ThreadPoolExecutor
) -> None:
    with house_of(directory, step_seconds=0.04, replica_seconds=0.0) as house:
        assert house.router is not None
        streams = [pool.submit(read, house, i) for i in range(NUM_STREAMS)]
        house.wait_until(lambda: all_run(house))
        house.run(house.router.close(40.0))
        refused = httpx.post(house.url + "/v1/completions", json=body_of(20, 3), timeout=60)
        assert refused.status_code == 503
        assert 35 <= int(refused.headers["retry-after"]) <= 40
        assert "takes nothing new" in refused.json()["error"]["message"]
        assert refused.json()["error"]["code"] == "engine_unavailable"

        def ready() -> httpx.Response:
            return httpx.get(house.url + "/ready", timeout=60)

        house.wait_until(lambda: ready().status_code == 503)
        assert ready().json() == {"status": "draining"}
        house.replicas[0].is_leaving = True  # streams that must move are still let in
        assert [stream.result() for stream in streams] == list(undisturbed.values())
        assert house.service.failover.counters["resumed"] >= 2
        house.check_rest()

        # Its time is over before a stream is.
        house.run(house.router.close(-100.0))
        house.wait_until(lambda: ready().status_code == 200)
        has_begun = threading.Event()
        stream = pool.submit(read, house, 0, LONG, has_begun.set)
        assert has_begun.wait(60)

        async def close() -> None:
            assert house.router is not None
            await house.router.close(0.0)
            house.client._has_news.set()  # heard at once, and not with the next sign of life

        house.run(close())
        check_is_error_event(
            stream.result(), undisturbed[0], "this server ends, and the time for answers to end is over"
        )
        house.run(house.router.close(-100.0))
        house.wait_until(lambda: ready().status_code == 200)
        assert read(house, 1) == undisturbed[1]
        house.check_rest()
