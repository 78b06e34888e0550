"""/v1/embeddings through the whole service in one process: OpenAI's own client, real tiny models, replicas that are lost."""

from __future__ import annotations

import base64
import dataclasses
import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from serve_app.api.embeddings import EmbeddingRequest
from serve_app.api.request_model import RequestLimits
from serve_app.llm import LLM
from tests.api.house import House
from tests.tiny_models import make_tiny_model

TEXTS = ["the quick brown fox", "on and on", "the quick brown fox jumps over the lazy dog, " * 6, "x"]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("model"), "Qwen3ForCausalLM", seed=2, matryoshka_dimensions=[16, 32])


ENGINE = {"block_size": 16, "num_kv_blocks": 60, "max_num_seqs": 6, "max_num_batched_tokens": 64, "num_threads": 1}


@pytest.fixture(scope="module")
def house(directory: Path) -> Iterator[House]:
    args = {"model": {"model": str(directory), "served_model_name": ["tiny", "other"]}, "engine": ENGINE}
    with House(args) as house:
        yield house
        house.check_rest()


@pytest.fixture
def client(house: House) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=house.url + "/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def llm(directory: Path) -> LLM:
    options: dict[str, Any] = {**ENGINE, "max_num_batched_tokens": 7, "enable_prefix_caching": False}
    return LLM(directory, **options)


def test_the_openai_package_gets_what_the_engine_makes_alone(client: openai.OpenAI, llm: LLM) -> None:
    answer = client.embeddings.create(model="tiny", input=TEXTS)
    assert [data.index for data in answer.data] == [0, 1, 2, 3]
    assert answer.model == "tiny"
    assert answer.object == "list"
    expected = llm.embed(TEXTS)
    assert [data.embedding for data in answer.data] == [e.embedding for e in expected]
    assert answer.usage.prompt_tokens == answer.usage.total_tokens == sum(len(e.prompt_token_ids) for e in expected)
    assert all(abs(sum(x * x for x in data.embedding) - 1) < 1e-5 for data in answer.data)


def test_numbers_and_base64_are_the_same_vector(client: openai.OpenAI) -> None:
    as_numbers = client.embeddings.create(model="tiny", input="on and on", encoding_format="float")
    raw = client.embeddings.with_raw_response.create(model="tiny", input="on and on", encoding_format="base64")
    text = json.loads(raw.text)["data"][0]["embedding"]
    assert list(struct.unpack("<48f", base64.b64decode(text))) == as_numbers.data[0].embedding


def test_every_shape_of_input(client: openai.OpenAI, llm: LLM) -> None:
    assert llm.tokenizer is not None
    ids = llm.tokenizer.encode("on and on")
    shapes: list[Any] = ["on and on", ["on and on"], ids, [ids]]
    vectors = [client.embeddings.create(model="other", input=shape).data[0].embedding for shape in shapes]
    assert vectors == [vectors[0]] * 4


def test_shorter_vectors_where_the_model_was_trained_for_it(client: openai.OpenAI) -> None:
    whole = client.embeddings.create(model="tiny", input="on and on").data[0].embedding
    assert client.embeddings.create(model="tiny", input="on and on", dimensions=48).data[0].embedding == whole
    short = client.embeddings.create(model="tiny", input="on and on", dimensions=16).data[0].embedding
    length = sum(x * x for x in whole[:16]) ** 0.5
    assert short == pytest.approx([x / length for x in whole[:16]], rel=1e-6)
    with pytest.raises(openai.BadRequestError, match="dimensions is 20; it must be one of 16, 32, or 48"):
        client.embeddings.create(model="tiny", input="on and on", dimensions=20)


def test_more_inputs_than_run_at_once(client: openai.OpenAI, house: House, llm: LLM) -> None:
    texts = [f"number {i}" for i in range(150)]
    answer = client.embeddings.create(model="tiny", input=texts)
    assert [data.index for data in answer.data] == list(range(150))
    assert [data.embedding for data in answer.data] == [e.embedding for e in llm.embed(texts)]
    house.check_rest()


def test_beside_answers_and_with_hits(client: openai.OpenAI, house: House) -> None:
    """Chats and vectors share the steps, and the prefix cache."""
    alone = client.embeddings.create(model="tiny", input=TEXTS[2]).data[0].embedding
    with client.completions.create(model="tiny", prompt=TEXTS[2], max_tokens=60, stream=True) as stream:
        events = iter(stream)
        next(events)
        assert client.embeddings.create(model="tiny", input=TEXTS[2]).data[0].embedding == alone
        assert sum(1 for _ in events) > 10
    assert sum(replica.engine.engine.scheduler.num_prefix_hits for replica in house.replicas) > 0


def test_a_prompt_may_fill_the_context(client: openai.OpenAI) -> None:
    assert len(client.embeddings.create(model="tiny", input=[5] * 512).data) == 1
    with pytest.raises(openai.BadRequestError, match="input 1 has 513 tokens; it may have at most 512") as caught:
        client.embeddings.create(model="tiny", input=[[5], [5] * 513])
    assert caught.value.code == "context_length_exceeded"


def test_request_ids(house: House) -> None:
    sent = {"input": "a", "request_id": "mine", "user": "me"}
    answer = httpx.post(house.url + "/v1/embeddings", json=sent)
    assert answer.json()["id"] == "embd-mine"
    assert answer.headers["x-request-id"] == "mine"


def test_a_deadline(house: House) -> None:
    headers = {"x-request-timeout-ms": "1"}
    answer = httpx.post(house.url + "/v1/embeddings", json={"input": ["a" * 400] * 100}, headers=headers)
    assert answer.status_code in (429, 504)
    assert answer.json()["error"]["code"] in ("deadline_exceeded", "overloaded")
    house.check_rest()


def test_a_client_that_leaves(house: House) -> None:
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(house.url + "/v1/embeddings", json={"input": ["a" * 480] * 190}, timeout=httpx.Timeout(5, read=0.05))
    house.check_rest()


def test_overload_is_an_answer(directory: Path) -> None:
    """With room for one prompt, and nobody allowed to wait: a list goes on one by one, and beside another client not."""
    simulated = {"model": str(directory), "runner": "simulated", "simulated": {"seconds_per_step": 0.02}}
    args = {"model": simulated, "engine": {**ENGINE, "num_kv_blocks": 32}}
    with House(args, num_replicas=1, user_config={"router": {"max_queued_requests": 0}}) as house:
        answer = httpx.post(house.url + "/v1/embeddings", json={"input": ["a" * 400] * 9}, timeout=60)
        assert answer.status_code == 200, answer.text
        assert len(answer.json()["data"]) == 9
        body = {"prompt": "a", "max_tokens": 450, "stream": True}
        with httpx.stream("POST", house.url + "/v1/completions", json=body) as other:
            lines = other.iter_lines()  # held: one that is dropped closes its stream
            next(lines)
            answer = httpx.post(house.url + "/v1/embeddings", json={"input": ["a" * 400] * 9}, timeout=60)
        assert answer.status_code == 429
        assert int(answer.headers["retry-after"]) >= 1
        house.check_rest()


# ---- mean pooling, and replicas that are lost ------------------------------------------------------------------------


def test_mean_pooling_by_configuration_and_a_replica_that_is_lost(directory: Path, llm: LLM) -> None:
    """A planted death: the engine of one replica stops in the middle, and the vectors are computed elsewhere."""
    args = {"model": {"model": str(directory), "pooling": "mean"}, "engine": {**ENGINE, "max_num_batched_tokens": 16}}
    texts = [f"{i} " + "the lazy dog " * 9 for i in range(40)]
    with House(args) as house:
        first = house.replicas[0]
        deliver, num_steps = first.engine.engine.step, 0

        def dying() -> Any:
            nonlocal num_steps
            num_steps += 1
            if num_steps == 12:
                raise RuntimeError("planted: this replica dies")
            return deliver()

        first.engine.engine.step = dying  # type: ignore[method-assign]
        answer = httpx.post(house.url + "/v1/embeddings", json={"input": texts}, timeout=60)
        assert answer.status_code == 200, answer.text
        assert num_steps == 12
        assert house.service.failover.counters["lost"] > 0
    vectors = [data["embedding"] for data in answer.json()["data"]]
    assert vectors == [e.embedding for e in llm.embed(texts, pooling="mean")]
    assert vectors != [e.embedding for e in llm.embed(texts)]


# ---- fields and abuses -----------------------------------------------------------------------------------------------


def effect(house: House, **fields: Any) -> Any:
    answer = httpx.post(house.url + "/v1/embeddings", json={"input": "the quick brown fox", **fields}).json()
    return answer["model"], answer["id"].startswith("embd-mine"), answer["data"][0]["embedding"]


EFFECTS: dict[str, Any] = {
    "input": "on and on",
    "model": "other",
    "encoding_format": "base64",
    "dimensions": 32,
    "request_id": "mine",
}
ELSEWHERE = {
    "priority": "test_priority_and_salt_reach_the_engine",
    "cache_salt": "test_priority_and_salt_reach_the_engine",
    "add_special_tokens": "the tiny tokenizer adds none: test_special_tokens",
}


def test_the_table_names_every_field() -> None:
    assert {*EFFECTS, *ELSEWHERE} == set(EmbeddingRequest.model_fields)


@pytest.mark.parametrize("field", EFFECTS)
def test_a_field_has_an_effect(house: House, field: str) -> None:
    plain = effect(house)
    assert effect(house) == plain
    assert effect(house, **{field: EFFECTS[field]}) != plain


def test_priority_and_salt_reach_the_engine(house: House) -> None:
    request = EmbeddingRequest.parse(b'{"input": "a", "priority": 3, "cache_salt": "s"}')
    (prompt,) = request.prompts(house.model.tokenizer)
    made = request.generate_request("r", prompt, house.model.pooling.params(), 5.0)
    assert (made.priority, made.cache_salt, made.remaining_ms) == (3, "s", 5.0)
    assert made.pooling is not None


def test_special_tokens(house: House) -> None:
    class Tokenizer:
        def encode(self, text: str, add_special_tokens: bool) -> list[int]:
            return [1, 2] if add_special_tokens else [2]

    for add, ids in ((True, (1, 2)), (False, (2,))):
        request = EmbeddingRequest.parse(json.dumps({"input": "a", "add_special_tokens": add}).encode())
        assert request.prompts(Tokenizer())[0].token_ids == ids  # type: ignore[arg-type]


@dataclasses.dataclass(frozen=True)
class Bad:
    fields: Any
    code: str
    param: str | None
    status: int = 400


ABUSES: dict[str, Bad] = {
    "nothing": Bad({}, "missing_parameter", "input"),
    "null": Bad({"input": None}, "missing_parameter", "input"),
    "a number": Bad({"input": 5}, "invalid_parameter", "input"),
    "an object": Bad({"input": {"text": "a"}}, "invalid_parameter", "input"),
    "no inputs": Bad({"input": []}, "invalid_parameter", "input"),
    "an empty text": Bad({"input": ["a", ""]}, "invalid_prompt", None),
    "an empty list of ids": Bad({"input": [[1], []]}, "invalid_parameter", "input[1]"),
    "two kinds": Bad({"input": ["a", [1]]}, "invalid_parameter", "input[1]"),
    "a negative id": Bad({"input": [-1]}, "invalid_parameter", "input[0]"),
    "an id outside the vocabulary": Bad({"input": [5, 100_000]}, "invalid_prompt", None),
    "true as an id": Bad({"input": [1, True]}, "invalid_parameter", "input[1]"),
    "too many inputs": Bad({"input": ["a"] * 2049}, "invalid_parameter", "input"),
    "too long a text": Bad({"input": "a b " * 2000}, "context_length_exceeded", None),
    "no such format": Bad({"input": "a", "encoding_format": "hex"}, "invalid_parameter", "encoding_format"),
    "no dimensions": Bad({"input": "a", "dimensions": 0}, "invalid_parameter", "dimensions"),
    "too many dimensions": Bad({"input": "a", "dimensions": 10**9}, "invalid_parameter", "dimensions"),
    "dimensions as text": Bad({"input": "a", "dimensions": "16"}, "invalid_parameter", "dimensions"),
    "another model": Bad({"input": "a", "model": "gpt"}, "model_not_found", "model", 404),
    "a field of chats": Bad({"input": "a", "temperature": 1}, "unknown_parameter", "temperature"),
    "messages": Bad({"input": "a", "messages": [{}]}, "unsupported_parameter", "messages"),
    "truncation": Bad({"input": "a", "truncate_prompt_tokens": 5}, "unsupported_parameter", "truncate_prompt_tokens"),
    "a user that is a number": Bad({"input": "a", "user": 5}, "unsupported_parameter", "user"),
    "a list": Bad([], "invalid_body", None),
    "a line end in an id": Bad({"input": "a", "request_id": "a\n"}, "invalid_parameter", "request_id"),
    "a long salt": Bad({"input": "a", "cache_salt": "s" * 5000}, "invalid_parameter", "cache_salt"),
}


@pytest.mark.parametrize("name", ABUSES)
def test_abuse(house: House, name: str) -> None:
    bad = ABUSES[name]
    answer = httpx.post(house.url + "/v1/embeddings", json=bad.fields)
    error = answer.json()["error"]
    assert (answer.status_code, error["code"], error["param"]) == (bad.status, bad.code, bad.param), error
    assert error["message"]
    assert error["type"] == "invalid_request_error"


def test_a_wrong_method(house: House) -> None:
    answer = httpx.get(house.url + "/v1/embeddings")
    assert (answer.status_code, answer.json()["error"]["code"]) == (405, "method_not_allowed")


def test_the_limit_is_named() -> None:
    request = EmbeddingRequest.parse(b'{"input": ["a", "b"]}')
    with pytest.raises(Exception, match="input is '2 inputs'; it must be at most 1 inputs"):
        request.check(RequestLimits(max_inputs=1))
