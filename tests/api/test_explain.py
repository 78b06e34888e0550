"""GET /v1/requests/{id}/explain, and what is logged of a request, over the whole service in one process."""

from __future__ import annotations

import asyncio
import json
import logging
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from serve_app.config import ServeArgs
from serve_app.engine.engine import Engine
from serve_app.engine.sequence import Sequence
from serve_app.engine.simulated_runner import SimulatedRunner
from serve_app.errors import EngineUnavailableError
from serve_app.replica.load import load_engine
from tests.api.house import House
from tests.tiny_models import make_tiny_model

ENGINE = {"num_kv_blocks": 64, "block_size": 16, "max_model_len": 512, "max_num_batched_tokens": 32, "max_num_seqs": 4}
KEYS = ("first-key", "second-key")
SECRET = "a word that only its client knows"
HELD = 9


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("model"), vocab_size=300, eos=())


Make = Callable[..., House]


class Gate:
    """Engines whose steps stop where an answer to a prompt that begins with HELD reaches a token, until it is opened."""

    def __init__(self, index: int) -> None:
        self.index = index
        self._is_open = threading.Event()

    def open(self) -> None:
        self._is_open.set()

    def make_engine(self, args: ServeArgs) -> Engine:
        engine = load_engine(args)
        assert isinstance(engine.runner, SimulatedRunner)

        def script(sequence: Sequence, index: int) -> int:
            if index == self.index and sequence.request.prompt_token_ids[0] == HELD:
                assert self._is_open.wait(60), "nobody opened the gate"
            return 97 + index % 26

        engine.runner.script = script
        return engine


@pytest.fixture
def make(directory: Path) -> Iterator[Make]:
    made: list[House] = []

    def start(*, explain: bool = True, policy: str = "reserve", seconds_per_step: float = 0.01, **more: Any) -> House:
        model = {
            "model": str(directory),
            "runner": "simulated",
            "simulated": {"seconds_per_step": seconds_per_step, "max_steps_in_flight": 2},
        }
        engine = {**ENGINE, **more.pop("engine", {})}
        args = {"model": model, "engine": engine, "api": {"explain": explain}}
        house = House(args, user_config={"router": {"policy": policy}}, **more).start()
        made.append(house)
        return house

    yield start
    for house in made:
        house.check_rest()
        house.stop()


def complete(house: House, request_id: str, *, key: str = KEYS[0], **fields: Any) -> httpx.Response:
    headers = {"x-request-id": request_id, "authorization": f"Bearer {key}"}
    body = {"prompt": [1, 2, 3], "max_tokens": 8, "seed": 1, "ignore_eos": True, **fields}
    return httpx.post(house.url + "/v1/completions", json=body, headers=headers, timeout=60)


def explain(house: House, request_id: str, *, key: str = KEYS[0]) -> httpx.Response:
    headers = {"authorization": f"Bearer {key}"}
    return httpx.get(f"{house.url}/v1/requests/{request_id}/explain", headers=headers, timeout=60)


def the_request(house: House, request_id: str, state: str = "ended") -> dict[str, Any]:
    """The explanation of the only request of that id. Its client may have the answer before its end is noted."""
    found: dict[str, Any] = {}

    def is_there() -> bool:
        answer = explain(house, request_id)
        assert answer.status_code == 200, answer.text
        assert answer.json()["silent"] == []
        (one,) = answer.json()["requests"]
        found.update(one)
        return bool(one["state"] == state)

    house.wait_until(is_there)
    return found


class Asked:
    """A request on a thread of its own."""

    def __init__(self, house: House, request_id: str, **fields: Any) -> None:
        self.answer: httpx.Response | None = None
        self._thread = threading.Thread(target=self._ask, args=(house, request_id), kwargs=fields, daemon=True)
        self._thread.start()

    def _ask(self, house: House, request_id: str, **fields: Any) -> None:
        self.answer = complete(house, request_id, **fields)

    def join(self) -> dict[str, Any]:
        self._thread.join(60)
        assert self.answer is not None
        assert self.answer.status_code == 200, self.answer.text
        return dict(self.answer.json())


# ---- one request -----------------------------------------------------------------------------------------------------


def test_where_it_ran_and_in_which_steps(make: Make) -> None:
    house = make()
    prompt = list(range(1, 91))
    answer = complete(house, "my-id", prompt=prompt, max_tokens=6, n=2)
    one = the_request(house, "my-id")
    assert {**one, "streams": 0} == {**the_request(house, answer.json()["id"]), "streams": 0}
    assert (one["id"], one["answer_id"], one["ingress"]) == ("my-id", "cmpl-my-id", "ingress0")
    assert (one["state"], one["status"], one["error"]) == ("ended", 200, None)
    assert one["finish_reasons"] == ["length", "length"]
    assert one["usage"]["completion_tokens"] == 12
    assert 0 < one["first_token_ms"] <= one["duration_ms"]
    (stream,) = one["streams"]
    assert stream["failovers"] == []
    (attempt,) = stream["attempts"]
    assert (attempt["failure"], attempt["tokens_before"], attempt["tokens"]) == (None, 0, 12)

    router = attempt["router"]
    assert (router["answer"], router["replica"]) == ("granted", attempt["replica"])
    assert router["because"] == "granted_to_least_recently"
    assert set(router["replicas"]) == {"replica0", "replica1"}
    for view in router["replicas"].values():
        assert (view["num_free_tokens"], view["left_out"], view["num_free_places"]) == (1024, None, 5)
        # 5 whole blocks of the prompt, and for each choice the rest of 96 tokens.
        assert view["num_needed_tokens"] == (5 + 2) * 16 == attempt["lease_tokens"]

    engine = attempt["engine"]
    assert engine["attempt"] == 0
    assert engine["submitted_at"] <= engine["accepted_at"]
    leader, follower = engine["choices"]
    prefill = [step for step in leader["steps"] if step["kind"] == "prefill"]
    assert [(step["position"], step["tokens"], step["samples"]) for step in prefill] == [
        *((0, 32, False), (32, 32, False), (64, 26, True))
    ]
    for choice in (leader, follower):
        assert (choice["end"], choice["preemptions"], choice["num_steps_left_out"]) == ("length", [], 0)
        decodes = [step for step in choice["steps"] if step["kind"] == "decode"]
        # The first of the six tokens came of the prompt's last position.
        assert [step["position"] for step in decodes] == [90, 91, 92, 93, 94]
        assert all(step["tokens"] == 1 and step["samples"] for step in decodes)
        indices = [step["step"] for step in choice["steps"]]
        assert indices == sorted(set(indices))
        assert all(step["at"] >= engine["submitted_at"] - 1000 and step["ms"] >= 0 for step in choice["steps"])


def test_a_cached_prefix_is_the_reason(make: Make) -> None:
    house = make()
    prompt = list(range(1, 65))
    complete(house, "a", prompt=prompt)
    complete(house, "b", prompt=prompt)
    (first,), (second,) = (the_request(house, i)["streams"][0]["attempts"] for i in ("a", "b"))
    assert second["replica"] == first["replica"]
    assert second["router"]["because"] == "longest_cached_prefix"
    assert second["router"]["replicas"][second["replica"]]["num_cached_tokens"] == 64
    assert second["engine"]["choices"][0]["steps"][0]["position"] == 63  # somebody must make its logits


def test_a_request_that_runs(make: Make) -> None:
    gate = Gate(20)
    house = make(make_engine=gate.make_engine)
    asked = Asked(house, "long", prompt=[HELD], max_tokens=200)
    house.wait_until(lambda: any(r.engine.engine.recorder.num_steps > 10 for r in house.replicas))
    one = the_request(house, "long", "running")
    (attempt,) = one["streams"][0]["attempts"]
    assert attempt["router"]["answer"] == "granted"
    (choice,) = attempt["engine"]["choices"]
    assert choice["end"] is None
    assert 10 < len(choice["steps"]) <= 20
    gate.open()
    asked.join()
    ended = the_request(house, "long")
    assert ended["state"] == "ended"
    assert len(ended["streams"][0]["attempts"][0]["engine"]["choices"][0]["steps"]) == 200


def test_an_embedding_has_a_stream_for_each_input(make: Make) -> None:
    house = make(seconds_per_step=0.0)
    headers = {"x-request-id": "vectors", "authorization": f"Bearer {KEYS[0]}"}
    answer = httpx.post(
        house.url + "/v1/embeddings", json={"input": [[1, 2, 3], [4] * 40]}, headers=headers, timeout=60
    )
    assert answer.status_code == 200
    one = the_request(house, "embd-vectors")
    assert one["route"] == "/v1/embeddings"
    assert len(one["streams"]) == 2
    lengths = [sum(s["tokens"] for s in x["attempts"][0]["engine"]["choices"][0]["steps"]) for x in one["streams"]]
    assert sorted(lengths) == [3, 40]


# ---- what it waited for, and what it lost ----------------------------------------------------------------------------


def test_a_queue_wait_by_cause(make: Make) -> None:
    """One replica with room for 5 sequences and 64 blocks."""
    gate = Gate(0)
    house = make(num_replicas=1, make_engine=gate.make_engine)
    others = [Asked(house, f"other{i}", prompt=[HELD, i], max_tokens=60) for i in range(5)]
    house.wait_until(lambda: len(house.replicas[0].table.rows()) == 5)
    places = Asked(house, "places", max_tokens=4)
    house.wait_until(lambda: house.client.num_waiting == 1)
    waiting = the_request(house, "places", "running")
    (attempt,) = waiting["streams"][0]["attempts"]
    assert (attempt["replica"], attempt["engine"], attempt["router"]["answer"]) == (None, None, "waits")
    gate.open()
    for each in (*others, places):
        each.join()
    one = the_request(house, "places")
    assert one["queue_ms"]["router_places"] > 0
    assert "router_budget" not in one["queue_ms"]
    # The fifth waited inside the engine, which holds four.
    assert max(the_request(house, f"other{i}")["queue_ms"]["engine"] for i in range(5)) > 0


def test_a_wait_for_budget(make: Make) -> None:
    gate = Gate(0)
    house = make(num_replicas=1, make_engine=gate.make_engine)
    big = [Asked(house, f"big{i}", prompt=[HELD, i], max_tokens=480) for i in range(2)]
    house.wait_until(lambda: len(house.replicas[0].table.rows()) == 2)
    budget = Asked(house, "budget", max_tokens=400)
    house.wait_until(lambda: house.client.num_waiting == 1)
    gate.open()
    for each in (*big, budget):
        each.join()
    one = the_request(house, "budget")
    assert one["queue_ms"]["router_budget"] > 0
    assert "router_places" not in one["queue_ms"]


def test_a_refusal_is_explained_too(make: Make) -> None:
    house = make()
    answer = complete(house, "refused", prompt=[1] * 600)
    assert answer.status_code == 400
    one = the_request(house, "refused")
    assert (one["status"], one["error"]["code"], one["streams"]) == (400, "context_length_exceeded", [])


def test_a_preemption(make: Make) -> None:
    """Three answers that grow where the pool has room for two."""
    gate = Gate(0)
    pool = {"num_kv_blocks": 32, "max_model_len": 320}
    house = make(num_replicas=1, engine=pool, policy="expect", seconds_per_step=0.0, make_engine=gate.make_engine)
    engine = house.replicas[0].engine.engine
    assert house.router is not None
    house.router.ledger.admission.lengths.expected = lambda allowed: 16  # type: ignore[method-assign]
    asked = [Asked(house, f"p{i}", max_tokens=240, prompt=[HELD, i]) for i in range(3)]
    house.wait_until(lambda: len(house.replicas[0].table.rows()) == 3)
    gate.open()
    for each in asked:
        each.join()
    assert engine.scheduler.num_preemptions > 0
    found = [the_request(house, f"p{i}") for i in range(3)]
    preempted = [one for one in found if one["queue_ms"].get("preempted", 0) > 0]
    assert preempted
    (choice,) = preempted[0]["streams"][0]["attempts"][0]["engine"]["choices"]
    loss = choice["preemptions"][0]
    assert loss["waited_ms"] > 0
    behind = [step for step in choice["steps"] if step["step"] >= loss["before_step"]]
    assert behind[0]["kind"] == "recompute" or behind[0]["position"] <= choice["steps"][-1]["position"]
    total = sum(len(one["streams"][0]["attempts"][0]["engine"]["choices"][0]["preemptions"]) for one in found)
    assert total == engine.scheduler.num_preemptions


async def lose(house: House, replica_id: str) -> None:
    """Nothing is heard of it any more. Its engine ends when it can."""
    (dead,) = (replica for replica in house.replicas if replica.replica_id == replica_id)
    dead.reporter.cancel()
    house.transport.kill(replica_id)
    house.replicas.remove(dead)
    await asyncio.to_thread(dead.engine.stop, 0.0)


def test_a_failover(make: Make) -> None:
    gate = Gate(30)
    house = make(make_engine=gate.make_engine)
    asked = Asked(house, "moves", prompt=[HELD, 2, 3], max_tokens=100)
    house.wait_until(lambda: any(r.engine.engine.recorder.num_steps > 20 for r in house.replicas))
    (before,) = the_request(house, "moves", "running")["streams"][0]["attempts"]
    assert before["engine"]["choices"][0]["steps"]
    house.run(lose(house, before["replica"]))
    gate.open()
    assert len(asked.join()["choices"]) == 1
    house.wait_until(lambda: explain(house, "moves").json()["requests"][0]["state"] == "ended")
    answer = explain(house, "moves").json()
    assert answer["silent"] == [f"replica {before['replica']}"]
    (one,) = answer["requests"]
    assert one["num_failovers"] == 1
    (stream,) = one["streams"]
    lost, last = stream["attempts"]
    (failover,) = stream["failovers"]
    other = {"replica0": "replica1", "replica1": "replica0"}[before["replica"]]
    assert (failover["from"], failover["to"]) == (before["replica"], other) == (lost["replica"], last["replica"])
    assert failover["why"]["code"] == "replica_lost"
    assert 0 < failover["tokens_kept"] == lost["tokens"] == last["tokens_before"] < 100 == last["tokens"]
    assert failover["first_token_after_ms"] > 0
    assert lost["engine"] is None  # its steps went with it
    steps = last["engine"]["choices"][0]["steps"]
    # What was kept is computed again: the prompt of 3 and those tokens.
    assert (
        sum(step["tokens"] for step in steps if step["position"] < 3 + failover["tokens_kept"])
        >= failover["tokens_kept"]
    )
    assert last["router"]["replicas"].keys() == {other}


# ---- who may ask, and whom -------------------------------------------------------------------------------------------


def test_off_it_says_what_would_switch_it_on(make: Make) -> None:
    house = make(explain=False)
    complete(house, "my-id")
    answer = explain(house, "my-id")
    assert answer.status_code == 404
    error = answer.json()["error"]
    assert (error["code"], error["param"]) == ("not_enabled", "api.explain")
    assert "api.explain: true" in error["message"]
    assert house.router is not None
    assert house.router._decisions is house.router.ledger.watch is None
    assert house.service.requests._running == house.service.requests._ended_by_id == {}


def test_the_ids_of_one_key_are_unknown_to_another(make: Make) -> None:
    house = make(api_keys=KEYS)
    complete(house, "same/id?", key=KEYS[0], max_tokens=3)
    complete(house, "same/id?", key=KEYS[1], max_tokens=5)
    complete(house, "mine", key=KEYS[0])
    for key, num_tokens in ((KEYS[0], 3), (KEYS[1], 5)):
        (one,) = explain(house, "same%2Fid%3F", key=key).json()["requests"]
        assert one["usage"]["completion_tokens"] == num_tokens
    for unknown in (explain(house, "mine", key=KEYS[1]), explain(house, "nobody's")):
        assert unknown.status_code == 404
        assert unknown.json()["error"]["code"] == "request_not_found"
    assert explain(house, "mine", key="no key").status_code == 401
    assert explain(house, "mine").status_code == 200


def test_any_ingress_answers(make: Make) -> None:
    """Also where the router is away, or another ingress is silent: as far as it can."""
    house = make()
    complete(house, "my-id")

    async def second() -> None:
        client, channels, service = house.make_client("ingress1")
        try:
            await client.has_answered()
            explainer = service.explainer
            assert explainer is not None
            (one,) = (await explainer.explain("my-id", b""))["requests"]
            assert one["ingress"] == "ingress0"
            assert one["streams"][0]["attempts"][0]["router"]["answer"] == "granted"
            assert one["streams"][0]["attempts"][0]["engine"]["choices"][0]["steps"]
            router, house.router = house.router, None
            with pytest.raises(EngineUnavailableError, match="may know 'my-id'"):
                await explainer.explain("my-id", b"")
            assert house.service.explainer is not None
            alone = await house.service.explainer.explain("my-id", b"")
            assert alone["silent"] == ["router"]
            assert alone["requests"][0]["streams"][0]["attempts"][0]["router"] is None
            house.router = router
        finally:
            await channels.close()
            await client.close()

    house.run(second())
    answer = explain(house, "nobody's")
    assert (answer.status_code, answer.json()["error"]["code"]) == (404, "request_not_found"), "the second has ended"


# ---- the log ---------------------------------------------------------------------------------------------------------


def lines_about(caplog: pytest.LogCaptureFixture, request_id: str) -> set[tuple[str, str]]:
    """Package and message of each."""
    found = [record for record in list(caplog.records) if record.__dict__.get("request_id") == request_id]
    return {(record.name.split(".")[1], record.getMessage()) for record in found}


def fields_of(record: logging.LogRecord) -> dict[str, Any]:
    return dict(record.__dict__["fields"])


def test_one_line_at_the_end_of_each_request(make: Make, caplog: pytest.LogCaptureFixture) -> None:
    house = make(seconds_per_step=0.0, explain=False)
    with caplog.at_level(logging.INFO, "serve_app.api.request_notes"):
        complete(house, "good", prompt=SECRET)
        complete(house, "bad", prompt=SECRET, temperature=-1)
        ended = ("api", "request ended")
        house.wait_until(lambda: all(ended in lines_about(caplog, i) for i in ("good", "bad")))
        house.service.requests.logs = False
        complete(house, "not told")
    found = {record.__dict__["request_id"]: record for record in caplog.records if record.msg == "request ended"}
    assert set(found) == {"good", "bad"}
    good, bad = fields_of(found["good"]), fields_of(found["bad"])
    assert (good["status"], good["error"], good["finish_reasons"]) == (200, None, ["length"])
    assert (good["prompt_tokens"] > 0, good["completion_tokens"]) == (True, 8)
    assert good["replicas"][0] in ("replica0", "replica1")
    assert (bad["status"], bad["error"], bad["replicas"]) == (400, "invalid_parameter", None)
    assert SECRET not in caplog.text + json.dumps([good, bad])


def test_the_way_of_a_request_at_debug(make: Make, caplog: pytest.LogCaptureFixture) -> None:
    house = make(seconds_per_step=0.0, explain=False)
    with caplog.at_level(logging.DEBUG, "serve_app"):
        complete(house, "followed")
        wanted = {("routing", "granted"), ("replica", "accepted"), ("replica", "ended"), ("api", "request ended")}
        house.wait_until(lambda: wanted <= lines_about(caplog, "followed"))
