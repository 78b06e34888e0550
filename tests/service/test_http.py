"""The service over HTTP: what clients ask for, and what they get wrong. Both ways to start it, where a proxy may matter."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import openai
import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.service.live import HEADERS, KEY, NAMES, Service, completion, launched, tokens_of, wait_until

NUM_STREAMS = 64


def test_readiness(service: Service) -> None:
    for path, expected in (
        ("/health", 200),
        ("/ready", 200),
        ("/version", 200),
        ("/openapi.json", 200),
        ("/docs", 200),
    ):
        assert httpx.get(service.url + path).status_code == expected, path
    assert httpx.get(f"{service.url}/ready").json() == {"status": "ready"}
    metrics = httpx.get(f"{service.url}/metrics", headers=HEADERS)
    assert metrics.status_code == 200
    assert metrics.text.count("\nragged_serve_replica_kv_blocks{") == 2
    haproxies = [process for process in service.processes() if process.name() == "haproxy"]
    assert bool(haproxies) == (service.mode == "launch")


@launched
def test_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == NAMES
    assert client.models.retrieve(NAMES[1]).id == NAMES[1]
    with pytest.raises(openai.NotFoundError) as caught:
        client.models.retrieve("another")
    assert caught.value.code == "model_not_found"


def test_completion(client: openai.OpenAI) -> None:
    answer: Any = client.completions.create(
        model=NAMES[1],
        prompt=completion(5, 12)["prompt"],
        max_tokens=12,
        seed=5,
        n=3,
        logprobs=2,
        extra_body={"ignore_eos": True, "return_token_ids": True},
    )
    assert answer.model == NAMES[1]
    assert [choice.token_ids for choice in answer.choices] == [tokens_of(5, 12, i) for i in range(3)]
    assert len({choice.text for choice in answer.choices}) == 3
    for choice in answer.choices:
        assert choice.finish_reason == "length"
        assert len(choice.logprobs.token_logprobs) == len(choice.logprobs.tokens) == 12
        assert all(1 <= len(top) <= 3 for top in choice.logprobs.top_logprobs)
    assert answer.usage.completion_tokens == 36


@launched
def test_seeds(client: openai.OpenAI) -> None:
    def text(**fields: Any) -> str:
        return client.completions.create(model=NAMES[0], prompt="once upon", max_tokens=12, **fields).choices[0].text

    assert text(seed=1) == text(seed=1) != text(seed=2)
    assert text() != text()


@launched
def test_stop(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {"model": NAMES[0], "prompt": "once upon", "max_tokens": 40, "seed": 7}
    free = client.completions.create(**asked).choices[0].text
    stop = free[10:12]
    stopped = client.completions.create(**asked, stop=["nothing like it", stop])
    assert stopped.choices[0].text == free[: free.index(stop)]
    assert stopped.choices[0].finish_reason == "stop"
    assert stopped.usage is not None
    assert stopped.usage.completion_tokens < 40


def test_chat(client: openai.OpenAI) -> None:
    messages: list[Any] = [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": [{"type": "text", "text": "hello"}]},
    ]
    asked: dict[str, Any] = {"model": NAMES[0], "messages": messages, "max_completion_tokens": 9, "n": 2, "seed": 4}
    whole = client.chat.completions.create(**asked, logprobs=True, top_logprobs=2)
    assert [choice.finish_reason for choice in whole.choices] == ["length", "length"]
    for choice in whole.choices:
        assert choice.logprobs is not None
        assert choice.logprobs.content is not None
        assert [len(entry.top_logprobs) for entry in choice.logprobs.content] == [2] * 9
    texts = {0: "", 1: ""}
    usage = None
    for chunk in client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}):
        usage = chunk.usage or usage
        for piece in chunk.choices:
            texts[piece.index] += piece.delta.content or ""
    assert texts == {choice.index: choice.message.content for choice in whole.choices}
    assert texts[0] != texts[1]
    assert usage is not None
    assert whole.usage is not None
    assert (usage.prompt_tokens, usage.completion_tokens) == (whole.usage.prompt_tokens, 18)


@launched
def test_embeddings(client: openai.OpenAI) -> None:
    texts = ["once upon a time", "there was", "once upon a time"]
    answer = client.embeddings.create(model=NAMES[0], input=texts)
    first, second, again = (data.embedding for data in answer.data)
    assert first == again != second
    assert sum(x * x for x in first) == pytest.approx(1.0)


@launched
def test_responses(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {"model": NAMES[0], "input": "hello", "max_output_tokens": 9, "extra_body": {"seed": 4}}
    whole = client.responses.create(**asked)
    assert whole.status == "incomplete"
    assert whole.usage is not None
    assert whole.usage.output_tokens == 9
    events = list(client.responses.create(**asked, stream=True))
    assert events[0].type == "response.created"
    assert events[-1].type == "response.incomplete"
    assert "".join(event.delta for event in events if event.type == "response.output_text.delta") == whole.output_text


def test_a_stream_comes_in_pieces(service: Service) -> None:
    """Each event by itself, the last is [DONE], and what the proxy passes on was not gathered."""
    arrived: list[bytes] = []
    body = completion(3, 30, stream=True)
    with httpx.stream("POST", f"{service.url}/v1/completions", json=body, headers=HEADERS, timeout=60) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        arrived.extend(response.iter_raw())
    assert b"".join(arrived).endswith(b"\n\ndata: [DONE]\n\n")
    assert len(arrived) > 5
    service.stream(3, 30).check()


@pytest.mark.parametrize(
    ("path", "content", "headers", "status", "code"),
    [
        ("/v1/nothing", b"{}", {}, 404, None),
        ("/v1/completions", b"{", {}, 400, None),
        ("/v1/completions", b'{"prompt": "x", "n": -1}', {}, 400, "invalid_parameter"),
        ("/v1/completions", b'{"prompt": "x", "max_token": 4}', {}, 400, None),
        ("/v1/completions", b'{"prompt": "x", "model": "another"}', {}, 404, "model_not_found"),
        ("/v1/completions", b'{"prompt": "x", "max_tokens": 99999}', {}, 400, "context_length_exceeded"),
        ("/v1/completions", b'{"prompt": "x"}', {"authorization": "Bearer wrong"}, 401, "invalid_api_key"),
        ("/v1/completions", None, {}, 405, None),
        ("/metrics", None, {"authorization": ""}, 401, "invalid_api_key"),
    ],
)
def test_errors(
    service: Service, path: str, content: bytes | None, headers: dict[str, str], status: int, code: str | None
) -> None:
    response = httpx.request(
        "GET" if content is None else "POST",
        service.url + path,
        content=content,
        headers=HEADERS | {"content-type": "application/json", "x-request-id": "mine-4"} | headers,
    )
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"]
    assert code is None or error["code"] == code
    assert response.headers["x-request-id"] == "mine-4"


def test_request_ids(service: Service) -> None:
    """One id on each answer, whoever chose it: Serve adds its own header to what the ingress sends."""

    def ids(body: dict[str, object] | None = None, **headers: str) -> list[str]:
        body = completion(1, 2) if body is None else body
        answer = httpx.post(f"{service.url}/v1/completions", json=body, headers=HEADERS | headers, timeout=60)
        return answer.headers.get_list("x-request-id")

    assert ids(**{"x-request-id": "mine-5"}) == ["mine-5"]
    assert ids(completion(1, 2, stream=True), **{"x-request-id": "mine-6"}) == ["mine-6"]
    made = [ids(), ids(), ids({}), ids(completion(1, 2, request_id="mine-7"))]
    assert [len(one) for one in made] == [1] * 4
    assert len({one for (one,) in made}) == 4
    check_explained(service, "mine-5")


def check_explained(service: Service, request_id: str) -> None:
    """Whichever ingress answers, and to its own key alone."""

    def explain(key: str) -> httpx.Response:
        headers = {"authorization": f"Bearer {key}"}
        return httpx.get(f"{service.url}/v1/requests/{request_id}/explain", headers=headers, timeout=60)

    def is_explained() -> httpx.Response | None:
        """None: an ingress that may know it was too busy to say so."""
        answer = explain(KEY)
        assert answer.status_code in (200, 503), answer.text
        return answer if answer.status_code == 200 else None

    for _ in range(4):
        answer = wait_until(is_explained, "an explanation")
        (one,) = answer.json()["requests"]
        (attempt,) = one["streams"][0]["attempts"]
        assert attempt["router"]["answer"] == "granted"
        assert attempt["replica"] in service.pids("Replica")
        (choice,) = attempt["engine"]["choices"]
        assert (choice["end"], len(choice["steps"])) == ("length", 2)
    assert explain("another").json()["error"]["code"] == "request_not_found"


def test_streams_at_once_give_what_each_gives_alone(service: Service) -> None:
    lengths = [3 + i % 9 for i in range(NUM_STREAMS)]
    expected = [tokens_of(i, lengths[i]) for i in range(NUM_STREAMS)]
    with httpx.Client(timeout=60, headers=HEADERS) as client:
        for i in range(0, NUM_STREAMS, 10):  # of seven lengths
            answer = client.post(f"{service.url}/v1/completions", json=completion(i, lengths[i])).json()
            assert answer["choices"][0]["token_ids"] == expected[i]
    before = {replica_id: said["num_steps"] for replica_id, said in service.describe().items()}
    with ThreadPoolExecutor(NUM_STREAMS) as pool:
        streams = list(pool.map(lambda i: service.stream(i, lengths[i]).join(), range(NUM_STREAMS)))
    assert [stream.error for stream in streams] == [None] * NUM_STREAMS
    assert [stream.tokens for stream in streams] == expected
    assert all(stream.is_done for stream in streams)
    used = {replica_id: said["num_steps"] - before[replica_id] for replica_id, said in service.describe().items()}
    assert len(used) == 2
    assert all(used.values()), used


@launched
def test_what_was_done_is_counted_here_and_by_rays_agent(service: Service, client: openai.OpenAI) -> None:
    """Late in this file: the router tells Ray's agent all it knows every ten seconds."""
    client.completions.create(model=NAMES[0], prompt=completion(3, 9)["prompt"], max_tokens=9)
    ray = service._ray
    agent = f"http://127.0.0.1:{ray.nodes()[0]['MetricsExportPort']}/metrics"

    def sums(url: str, prefix: str) -> dict[str, float]:
        """By name, over all replicas."""
        found: dict[str, float] = {}
        for family in text_string_to_metric_families(httpx.get(url, headers=HEADERS).text):
            for sample in family.samples:
                if sample.name.startswith(prefix):
                    name = sample.name.removeprefix("ray_").replace("vllm_", "vllm:", 1)
                    found[name] = found.get(name, 0.0) + sample.value
        return found

    def has_both() -> bool:
        """Not the same: what an earlier router told Ray stands there for twenty seconds more."""
        ours, rays = sums(f"{service.url}/metrics", "vllm:"), sums(agent, "ray_vllm_")
        least = {"generation_tokens_total": 9, "request_success_total": 1, "e2e_request_latency_seconds_count": 1}
        return all(min(ours[f"vllm:{name}"], rays.get(f"vllm:{name}", 0)) >= n for name, n in least.items())

    wait_until(has_both, "the counts of a request at Ray's agent")
