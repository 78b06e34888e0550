"""The HTTP face over the whole service in one process (tests/api/house.py): answers, abuses, keys, clients that go away."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from serve_app.api.failover import FailoverLimits
from serve_app.api.json_body import parse_json
from serve_app.api.protocol import CompletionRequest
from serve_app.llm import LLM, SamplingParams
from tests.api.abuses import ABUSES, Abuse
from tests.api.house import House
from tests.tiny_models import make_tiny_model

ENGINE = {"num_threads": 1, "num_kv_blocks": 96, "max_model_len": 256, "max_num_batched_tokens": 64, "max_num_seqs": 16}
KEYS = ("first-key", "second-key")
NAMES = ["tiny", "tiny-alias"]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    # A vocabulary of the tokenizer's own size: every token is a text.
    return make_tiny_model(tmp_path_factory.mktemp("model"), vocab_size=300, eos=())


@pytest.fixture(scope="module")
def house(directory: Path) -> Iterator[House]:
    args = {"model": {"model": str(directory), "served_model_name": NAMES, "dtype": "float32"}, "engine": ENGINE}
    with House(args) as made:
        yield made
        made.check_rest()


@pytest.fixture(scope="module")
def client(house: House) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=house.url + "/v1", api_key="none", max_retries=0) as made:
        yield made


@pytest.fixture(scope="module")
def llm(directory: Path) -> LLM:
    return LLM(directory, dtype="float32", **ENGINE)


@pytest.fixture(scope="module")
def slow_house(directory: Path) -> Iterator[House]:
    """Simulated, 10 ms a step: long enough to go away in the middle."""
    model = {"model": str(directory), "runner": "simulated", "simulated": {"seconds_per_step": 0.01}}
    reserve = {"router": {"policy": "reserve"}}
    engine = {**ENGINE, "num_kv_blocks": 40}
    with House({"model": model, "engine": engine}, api_keys=KEYS, user_config=reserve) as made:
        yield made
        made.check_rest()


# ---- answers -----------------------------------------------------------------------------------------------------


def test_the_same_tokens_as_offline(client: openai.OpenAI, llm: LLM, house: House) -> None:
    """64 streams at once over two replicas, greedy and seeded, give what LLM gives one after the other."""
    prompts = [f"{i} the quick brown " + "fox " * (i % 7) for i in range(64)]
    params = [
        SamplingParams(max_tokens=3 + i % 17, temperature=float(i % 2), seed=i, ignore_eos=True) for i in range(64)
    ]
    expected = llm.generate(prompts, params, use_tqdm=False)

    def ask(i: int) -> tuple[str, list[int]]:
        text, ids = "", []
        with client.completions.create(
            model="tiny",
            prompt=prompts[i],
            max_tokens=params[i].max_tokens,
            temperature=params[i].temperature,
            seed=i,
            stream=True,
            extra_body={"ignore_eos": True, "return_token_ids": True},
        ) as stream:
            for chunk in stream:
                for choice in chunk.choices:
                    text += choice.text
                    ids += choice.model_extra["token_ids"]  # type: ignore[index]
        return text, ids

    steps = [replica.engine.num_steps for replica in house.replicas]
    with ThreadPoolExecutor(64) as pool:
        answers = list(pool.map(ask, range(64)))
    assert answers == [(e.text, e.token_ids) for e in expected]
    assert all(r.engine.num_steps > before for r, before in zip(house.replicas, steps, strict=True))
    assert ask(5) == answers[5]  # alone as in company


def test_chat_streams_what_it_answers_whole(client: openai.OpenAI) -> None:
    messages: list[Any] = [{"role": "user", "content": [{"type": "text", "text": "hello"}]}]
    asked: dict[str, Any] = {"model": "tiny-alias", "messages": messages, "max_completion_tokens": 9, "n": 2, "seed": 4}
    whole = client.chat.completions.create(**asked, temperature=1.0, logprobs=True, top_logprobs=2)
    assert [choice.finish_reason for choice in whole.choices] == ["length", "length"]
    assert whole.model == "tiny-alias"
    assert whole.choices[0].message.content != whole.choices[1].message.content
    for choice in whole.choices:
        assert choice.logprobs is not None
        assert choice.logprobs.content is not None
        assert [len(entry.top_logprobs) for entry in choice.logprobs.content] == [2] * 9
    texts = {0: "", 1: ""}
    usage = None
    for chunk in client.chat.completions.create(
        **asked, temperature=1.0, stream=True, stream_options={"include_usage": True}
    ):
        usage = chunk.usage or usage
        for piece in chunk.choices:
            texts[piece.index] += piece.delta.content or ""
    assert texts == {choice.index: choice.message.content for choice in whole.choices}
    assert usage is not None
    assert whole.usage is not None
    assert (usage.prompt_tokens, usage.completion_tokens) == (whole.usage.prompt_tokens, 18)


def test_stop_strings_end_the_sequence_itself(client: openai.OpenAI, house: House) -> None:
    free = client.completions.create(model="tiny", prompt="the quick", max_tokens=40, temperature=0)
    text = free.choices[0].text
    stop = text[8:10]
    stopped = client.completions.create(model="tiny", prompt="the quick", max_tokens=40, temperature=0, stop=stop)
    assert stopped.choices[0].text == text[: text.index(stop)]
    assert stopped.choices[0].finish_reason == "stop"
    assert stopped.usage is not None
    assert stopped.usage.completion_tokens < 40
    house.check_rest()


def test_many_prompts_in_one_request(client: openai.OpenAI) -> None:
    prompts = ["one", "the two", "and the three"]
    both = client.completions.create(model="tiny", prompt=prompts, max_tokens=6, temperature=0, n=2)
    assert [choice.index for choice in both.choices] == list(range(6))
    for i, prompt in enumerate(prompts):
        alone = client.completions.create(model="tiny", prompt=prompt, max_tokens=6, temperature=0)
        assert {both.choices[2 * i].text, both.choices[2 * i + 1].text} == {alone.choices[0].text}


def test_a_slow_reader_of_many_prompts_misses_nothing(client: openai.OpenAI, house: House) -> None:
    """All streams have ended before the second chunk is asked for; what was read ahead of it is still in the answer."""
    prompts = ["one", "the two", "and the three"]

    async def read() -> list[dict[str, Any]]:
        asked = {"prompt": prompts, "max_tokens": 6, "temperature": 0, "n": 2, "stream": True}
        generation = await house.service.start(CompletionRequest.parse(json.dumps(asked).encode()), "slow")
        chunks = b""
        async for chunk in generation.chunks():
            chunks += chunk
            while not all(replica.engine.num_unfinished == 0 for replica in house.replicas):
                await asyncio.sleep(0.01)
            await asyncio.sleep(0.05)
        *events, done, rest = chunks.split(b"\n\n")
        assert (done, rest) == (b"data: [DONE]", b"")
        return [json.loads(event[6:])["choices"][0] for event in events]

    pieces = house.run(read())
    for i in range(6):
        mine = [piece for piece in pieces if piece["index"] == i]
        alone = client.completions.create(model="tiny", prompt=prompts[i // 2], max_tokens=6, temperature=0)
        assert "".join(piece["text"] for piece in mine) == alone.choices[0].text
        assert [piece["finish_reason"] for piece in mine if piece["finish_reason"]] == ["length"]


def test_prefix_hits_are_in_the_usage(client: openai.OpenAI) -> None:
    prompt = "a common beginning of many tokens, " * 4
    first = client.completions.create(model="tiny", prompt=prompt, max_tokens=2)
    again = client.completions.create(model="tiny", prompt=prompt, max_tokens=2)
    salted = client.completions.create(model="tiny", prompt=prompt, max_tokens=2, extra_body={"cache_salt": "mine"})
    cached = [r.usage.prompt_tokens_details.cached_tokens for r in (first, again, salted)]  # type: ignore[union-attr]
    assert cached[0] == cached[2] == 0
    assert cached[1] > 0  # so the router sent it to the replica that has them


def test_models_health_and_the_rest(client: openai.OpenAI, house: House) -> None:
    assert [model.id for model in client.models.list().data] == NAMES
    assert client.models.retrieve("tiny-alias").id == "tiny-alias"
    with httpx.Client(base_url=house.url) as http:
        assert http.get("/health").json() == {"status": "ok"}
        assert http.get("/ready").status_code == 200
        assert set(http.get("/version").json()) == {"version"}
        paths = http.get("/openapi.json").json()["paths"]
        body = paths["/v1/chat/completions"]["post"]["requestBody"]["content"]["application/json"]["schema"]
        assert "messages" in body["properties"]
        assert http.get("/docs").status_code == 200
        ids = http.post("/tokenize", json={"prompt": "the quick brown"}).json()
        assert ids["count"] == len(ids["tokens"]) > 0
        assert ids["max_model_len"] == 256
        assert http.post("/detokenize", json={"tokens": ids["tokens"]}).json() == {"prompt": "the quick brown"}
        chat = http.post("/tokenize", json={"messages": [{"role": "user", "content": "hi"}]}).json()
        assert chat["count"] > 5
        assert http.post("/v1/completions", json={"prompt": "the quick", "max_tokens": 1}).status_code == 200
        metrics = http.get("/metrics").text
        assert 'ragged_serve_replica_kv_blocks{replica="replica0"} 96' in metrics
        assert 'ragged_serve_ledger_events_total{kind="granted"}' in metrics


def test_request_ids_come_back(house: House) -> None:
    body = {"prompt": "a", "max_tokens": 1}
    with httpx.Client(base_url=house.url) as http:
        made = http.post("/v1/completions", json=body)
        assert made.json()["id"] == "cmpl-" + made.headers["x-request-id"]
        given = http.post("/v1/completions", json=body, headers={"x-request-id": "mine-1"})
        assert given.headers["x-request-id"] == "mine-1"
        assert given.json()["id"] == "cmpl-mine-1"
        bad = http.post("/v1/completions", json=body, headers={"x-request-id": "a b"})
        assert bad.headers["x-request-id"] != "a b"
        in_body = http.post("/v1/completions", json={**body, "request_id": "other"})
        assert in_body.headers["x-request-id"] == "other"
        assert http.get("/nope", headers={"x-request-id": "on-errors-too"}).headers["x-request-id"] == "on-errors-too"


def test_the_same_request_id_twice_at_once(slow_house: House) -> None:
    """Two clients may choose one id; neither may lose its answer or get the other's."""
    headers = {"authorization": f"Bearer {KEYS[0]}", "x-request-id": "chosen"}

    def ask(prompt: str) -> dict[str, Any]:
        body = {"prompt": prompt, "max_tokens": 20}
        answer = httpx.post(slow_house.url + "/v1/completions", json=body, headers=headers, timeout=30)
        return {"status": answer.status_code, **answer.json()}

    with ThreadPoolExecutor(2) as pool:
        answers = list(pool.map(ask, ["one", "another and longer prompt"]))
    assert [answer["status"] for answer in answers] == [200, 200], answers
    assert [answer["usage"]["completion_tokens"] for answer in answers] == [20, 20]
    assert answers[0]["choices"][0]["text"] != answers[1]["choices"][0]["text"]


# ---- abuses ------------------------------------------------------------------------------------------------------


def send(house: House, abuse: Abuse) -> httpx.Response:
    headers = dict(abuse.headers)
    if not abuse.needs_keys and house._api_keys:
        headers["authorization"] = f"Bearer {KEYS[1]}"
    with httpx.Client(base_url=house.url, timeout=30) as http:
        # The path as it stands in the table: httpx would tidy it.
        request = http.build_request(abuse.method, "/", content=abuse.made_body(), headers=headers)
        request.url = request.url.copy_with(raw_path=abuse.path.encode())
        return http.send(request)


@pytest.mark.parametrize("abuse", [a for a in ABUSES if a.level != "connection"], ids=lambda a: a.name)
def test_abuse(house: House, slow_house: House, abuse: Abuse) -> None:
    target = slow_house if abuse.needs_keys else house
    answer = send(target, abuse)
    assert answer.status_code == abuse.status, answer.text
    assert len(answer.content) < 2000
    assert set(answer.json()) == {"error"}
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert (error["code"], error["param"]) == (abuse.code, abuse.param)
    assert error["message"]
    assert "x-request-id" in answer.headers
    after = httpx.post(
        target.url + "/v1/completions",
        json={"prompt": "a", "max_tokens": 1},
        headers={"authorization": f"Bearer {KEYS[0]}"},
    )
    assert after.status_code == 200


def request_bytes(abuse: Abuse) -> bytes:
    body = abuse.made_body()
    head = f"POST {abuse.path} HTTP/1.1\r\nhost: test\r\ncontent-type: application/json\r\n"
    head += f"authorization: Bearer {KEYS[0]}\r\ncontent-length: {len(body)}\r\n\r\n"
    return head.encode() + body


@pytest.mark.parametrize("abuse", [a for a in ABUSES if a.level == "connection"], ids=lambda a: a.name)
def test_a_client_that_goes_away_frees_everything(slow_house: House, abuse: Abuse) -> None:
    data = request_bytes(abuse)
    aborted = sum(r.engine.engine.recorder.num_steps for r in slow_house.replicas)
    with socket.create_connection(("127.0.0.1", slow_house.port)) as connection:
        if abuse.leaves == "in headers":
            connection.sendall(data[:30])
        elif abuse.leaves == "in body":
            connection.sendall(data[:-5])
        else:
            connection.sendall(data)
            slow_house.wait_until(lambda: any(r.table.rows() for r in slow_house.replicas))
            if abuse.leaves == "after first byte":
                assert connection.recv(1)
            elif abuse.leaves == "in stream":
                seen = b""
                while seen.count(b"data: ") < 12:
                    seen += connection.recv(4096)
    slow_house.check_rest()
    if abuse.leaves in ("before answer", "after first byte", "in stream"):
        steps = sum(r.engine.engine.recorder.num_steps for r in slow_house.replicas) - aborted
        at_least = 0 if abuse.leaves == "before answer" else 1  # it may be gone before the first step
        assert at_least <= steps < 50, "the sequence ran to its end although nobody read it"


def test_any_of_the_keys_opens(slow_house: House) -> None:
    for key in KEYS:
        assert httpx.get(slow_house.url + "/v1/models", headers={"authorization": f"Bearer {key}"}).status_code == 200
        assert httpx.get(slow_house.url + "/v1/models", headers={"x-api-key": key}).status_code == 200
    for path in ("/health", "/ready", "/version", "/openapi.json", "/docs"):
        assert httpx.get(slow_house.url + path).status_code == 200
    assert httpx.get(slow_house.url + "/metrics").status_code == 401


# ---- under pressure ----------------------------------------------------------------------------------------------


def test_what_does_not_fit_waits_and_is_served(slow_house: House) -> None:
    """Bookings of 60 requests are many times the two pools of 40 blocks; all get their whole answer."""
    headers = {"authorization": f"Bearer {KEYS[0]}"}
    queued: list[int] = []
    over = threading.Event()

    def watch() -> None:
        assert slow_house.router is not None
        while not over.wait(0.01):
            queued.append(slow_house.router.ledger.snapshot()["num_queued_requests"])
            for replica in slow_house.replicas:
                assert replica.table.num_free_blocks >= 0

    def ask(i: int) -> int:
        body = {"prompt": "a" * (10 + i), "max_tokens": 40, "temperature": 1.0, "seed": i}
        answer = httpx.post(slow_house.url + "/v1/completions", json=body, headers=headers, timeout=60)
        assert answer.status_code == 200, answer.text
        return int(answer.json()["usage"]["completion_tokens"])

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        with ThreadPoolExecutor(60) as pool:
            assert list(pool.map(ask, range(60))) == [40] * 60
    finally:
        over.set()
        watcher.join()
    assert max(queued) > 5
    assert all(replica.engine.engine.recorder.num_preempted == 0 for replica in slow_house.replicas)
    slow_house.check_rest()


def test_answers_that_outgrow_their_booking(directory: Path) -> None:
    """Policy `expect`: forty short answers teach it to book little; then long ones grow in both books, past the pool."""
    costs = {"seconds_per_step": 0.004, "eos_token_ids": list(range(150))}  # every other token ends an answer
    model = {"model": str(directory), "runner": "simulated", "simulated": costs}
    engine = {**ENGINE, "num_kv_blocks": 24}
    with (
        House({"model": model, "engine": engine}, num_replicas=1) as house,
        ThreadPoolExecutor(40) as pool,
        httpx.Client(base_url=house.url, timeout=60) as http,
    ):

        def ask(i: int, num_tokens: int) -> int:
            body = {"prompt": f"{i} tokens", "max_tokens": 200, "min_tokens": num_tokens - 1, "seed": i}
            answer = http.post("/v1/completions", json=body)
            assert answer.status_code == 200, answer.text
            return int(answer.json()["usage"]["completion_tokens"])

        for i in range(40):
            assert 2 <= ask(i, 2) < 30
        assert all(150 <= num_tokens <= 200 for num_tokens in pool.map(ask, range(24), [150] * 24))
        assert house.router is not None
        counters = house.router.ledger.counters
        assert counters["grown_blocks"] > 0
        assert house.replicas[0].table.num_grown_past_pool > 0
        house.check_rest()


def test_overload_is_an_answer(directory: Path) -> None:
    model = {"model": str(directory), "runner": "simulated", "simulated": {"seconds_per_step": 0.02}}
    router = {"max_queued_requests": 3, "max_queue_seconds": 20.0}
    engine = {**ENGINE, "num_kv_blocks": 8}
    with (
        House({"model": model, "engine": engine}, num_replicas=1, user_config={"router": router}) as house,
        ThreadPoolExecutor(12) as pool,
    ):
        body = {"prompt": "a", "max_tokens": 100}
        answers = list(pool.map(lambda _: httpx.post(house.url + "/v1/completions", json=body, timeout=60), range(12)))
        statuses = sorted(answer.status_code for answer in answers)
        assert set(statuses) == {200, 429}
        assert statuses.count(200) >= 4  # one or two run, three wait
        for answer in answers:
            if answer.status_code == 429:
                assert int(answer.headers["retry-after"]) >= 1
                assert answer.json()["error"]["code"] == "overloaded"
        too_large = httpx.post(house.url + "/v1/completions", json={"prompt": "a", "max_tokens": 100, "n": 8})
        assert too_large.status_code == 400
        assert too_large.json()["error"]["code"] == "request_too_large"
        house.check_rest()


# ---- when parts are lost -----------------------------------------------------------------------------------------


def stream_text(house: House, i: int) -> tuple[str, str]:
    """The text and the finish reason of one stream, which must end with [DONE]."""
    body = {"prompt": f"{i} and on", "max_tokens": 60, "temperature": 1.0, "seed": i, "stream": True}
    text, reason, is_done = "", "", False
    with httpx.stream("POST", house.url + "/v1/completions", json=body, timeout=60) as answer:
        assert answer.status_code == 200, answer.read()
        for line in answer.iter_lines():
            if line == "data: [DONE]":
                is_done = True
            elif line.startswith("data: "):
                choice = parse_json(line[6:].encode())["choices"][0]
                text += choice["text"]
                reason = choice["finish_reason"] or reason
    assert is_done
    return text, reason


def test_streams_outlive_their_replica(directory: Path) -> None:
    """One of two replicas dies under 12 streams: each client gets the text of an undisturbed run."""
    model = {"model": str(directory), "runner": "simulated", "simulated": {"seconds_per_step": 0.01}}
    args = {"model": model, "engine": ENGINE}
    with House(args) as house, ThreadPoolExecutor(12) as pool:
        expected = list(pool.map(lambda i: stream_text(house, i), range(12)))
        futures = [pool.submit(stream_text, house, i) for i in range(12)]
        house.wait_until(lambda: all(len(r.table) >= 4 and r.engine.num_unfinished >= 4 for r in house.replicas))
        moved = len(house.replicas[0].table)

        async def kill() -> None:
            house.transport.kill("replica0")
            house.replicas[0].reporter.cancel()

        house.run(kill())
        assert [future.result() for future in futures] == expected
        assert moved >= 4
        house.replicas.pop(0).engine.stop(5.0)
        house.check_rest()


def test_a_router_that_is_away_and_comes_back_empty(directory: Path) -> None:
    """Streams go on; new requests are sent to replicas that are known; the new router adopts what runs."""
    model = {"model": str(directory), "runner": "simulated", "simulated": {"seconds_per_step": 0.01}}
    with House({"model": model, "engine": ENGINE}) as house, ThreadPoolExecutor(8) as pool:
        running = [pool.submit(stream_text, house, i) for i in range(4)]
        house.wait_until(lambda: sum(len(r.table) for r in house.replicas) >= 4)

        async def lose() -> None:
            house.router = None

        house.run(lose())
        new = [pool.submit(stream_text, house, i) for i in range(4, 8)]
        house.wait_until(lambda: house.client.counters["own_leases"] > 0)

        async def restart() -> None:
            house.make_router()

        house.run(restart())
        assert [future.result()[1] for future in running + new] == ["length"] * 8
        assert stream_text(house, 9)[1] == "length"
        house.check_rest()
        assert house.router is not None
        assert house.router.ledger.counters["granted"] >= 1


def test_no_replica_is_a_clear_answer(directory: Path) -> None:
    model = {"model": str(directory), "runner": "simulated"}
    with House({"model": model, "engine": ENGINE}, num_replicas=1) as house:

        async def lose() -> None:
            house.transport.kill("replica0")
            house.replicas[0].reporter.cancel()

        house.run(lose())
        house.client._away_seconds = 0.1
        house.service.failover.limits = FailoverLimits(max_seconds=1.0)
        body = {"prompt": "a", "max_tokens": 4}
        house.run(_short_queue(house))
        answer = httpx.post(house.url + "/v1/completions", json=body, timeout=60)
        assert answer.status_code in (429, 503), answer.text
        assert json.loads(answer.text)["error"]["type"] in ("server_error", "rate_limit_error")
        house.replicas[0].engine.stop(5.0)
        house.replicas.clear()


async def _short_queue(house: House) -> None:
    from serve_app.routing.ledger_options import LedgerOptions

    house.client.set_options(LedgerOptions(max_queue_seconds=0.5, lease_seconds=1.0, replica_seconds=0.5), 2)
