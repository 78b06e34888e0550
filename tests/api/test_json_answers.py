"""Structured output over HTTP, the whole service in one process: the openai package's parse, replicas that die in the middle
of an object, and schemas that are meant to hurt while somebody else's stream goes on."""

from __future__ import annotations

import asyncio
import enum
import json
import random
from collections.abc import Iterator
from typing import Any, Literal

import httpx
import jsonschema
import openai
import pytest
from pydantic import BaseModel, Field

from serve_app.text.grammar_check import TOO_MUCH
from tests.api.abuses import ABUSES
from tests.api.house import House, Replica
from tests.random_schemas import random_schema
from tests.tiny_models import make_tiny_model

ENGINE = {"num_threads": 1, "num_kv_blocks": 400, "max_model_len": 512, "max_num_seqs": 16, "deterministic": True}
EXTRA: dict[str, Any] = {"extra_body": {"ignore_eos": True}}
HOT = {"temperature": 1.5, "max_tokens": 400, "ignore_eos": True}


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> Iterator[House]:
    directory = make_tiny_model(tmp_path_factory.mktemp("model"), vocab_size=300, eos=())
    with House(
        {"model": {"model": str(directory), "served_model_name": "tiny", "dtype": "float32"}, "engine": ENGINE}
    ) as made:
        yield made
        made.check_rest()


@pytest.fixture
def client(house: House) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=house.url + "/v1", api_key="none", max_retries=0, timeout=60) as made:
        yield made


class Unit(enum.Enum):
    METRE = "m"
    FOOT = "ft"


class Part(BaseModel):
    label: str = Field(max_length=6)
    size: int = Field(ge=1, le=99)


class Plan(BaseModel):
    """What people send: nested models, enums, literals, optional and bounded fields."""

    title: str = Field(max_length=10, description="what it is called")
    unit: Unit
    kind: Literal["small", "large"] = "small"
    weight: float | None = Field(default=None, ge=0, le=10)
    parts: list[Part] = Field(max_length=2)


@pytest.mark.parametrize("seed", range(4))
def test_parse_with_pydantic_models(client: openai.OpenAI, seed: int) -> None:
    messages: Any = [{"role": "user", "content": "a plan, please"}]
    completion = client.chat.completions.parse(
        model="tiny", messages=messages, response_format=Plan, seed=seed, temperature=1.5, max_tokens=400, **EXTRA
    )
    choice = completion.choices[0]
    assert choice.finish_reason == "stop"
    assert isinstance(choice.message.parsed, Plan)
    assert choice.message.content is not None
    assert Plan.model_validate_json(choice.message.content) == choice.message.parsed
    with client.chat.completions.stream(
        model="tiny", messages=messages, response_format=Plan, seed=seed, temperature=1.5, max_tokens=400, **EXTRA
    ) as stream:
        for _ in stream:
            pass
        streamed = stream.get_final_completion()
    assert streamed.choices[0].message.content == choice.message.content
    assert streamed.choices[0].message.parsed == choice.message.parsed


def body_of(schema: Any, **fields: Any) -> dict[str, Any]:
    form = {"type": "json_schema", "json_schema": {"name": "a", "schema": schema}}
    return {"prompt": "so", "response_format": form, **HOT, **fields}


async def read_stream(http: httpx.AsyncClient, body: dict[str, Any]) -> tuple[str, str | None, int]:
    """Text, finish_reason, events with text."""
    text, reason, num_events = "", None, 0
    async with http.stream("POST", "/v1/completions", json={**body, "stream": True}) as answer:
        assert answer.status_code == 200, await answer.aread()
        async for line in answer.aiter_lines():
            if line.startswith("data: {"):
                data = json.loads(line[6:])
                assert "error" not in data, data
                for choice in data["choices"]:
                    text += choice["text"]
                    num_events += bool(choice["text"])
                    reason = choice["finish_reason"] or reason
    return text, reason, num_events


async def die(house: House, victim: Replica) -> None:
    house.transport.kill(victim.replica_id)
    victim.reporter.cancel()
    house.replicas.remove(victim)
    await asyncio.to_thread(victim.engine.stop, 10.0)
    fresh = Replica(f"{victim.replica_id}'", victim.engine.engine, house)
    house.replicas.append(fresh)
    house.transport.hubs[fresh.replica_id] = fresh.hub


def test_replicas_that_die_in_the_middle_of_an_object(house: House) -> None:
    """The replica that goes on has only the tokens: it brings the grammar to where the other one stood."""
    rng = random.Random(8)
    schemas = [random_schema(rng) for _ in range(10)]
    bodies = [body_of(schema, seed=i) for i, schema in enumerate(schemas)]
    in_the_middle = 0

    async def kill_often() -> None:
        nonlocal in_the_middle
        while True:
            victim = rng.choice(house.replicas)
            last_step = victim.engine.num_steps + rng.randrange(5, 30)
            while victim.engine.num_steps < last_step and victim.engine.num_unfinished:
                await asyncio.sleep(0.002)
            sequences = list(victim.engine.engine.scheduler.sequences.values())
            in_the_middle += sum(sequence.num_tokens > sequence.num_prompt_tokens for sequence in sequences)
            if sequences:
                await die(house, victim)
            await asyncio.sleep(0.01)

    async def run() -> None:
        async with httpx.AsyncClient(base_url=house.url, timeout=60) as http:
            expected = await asyncio.gather(*(read_stream(http, body) for body in bodies))
            killer = asyncio.create_task(kill_often())
            try:
                answers = await asyncio.gather(*(read_stream(http, body) for body in bodies))
            finally:
                killer.cancel()
                await asyncio.wait({killer})
        for schema, one, other in zip(schemas, expected, answers, strict=True):
            assert one[:2] == other[:2]
            if one[1] == "stop":
                jsonschema.Draft202012Validator(schema).validate(json.loads(one[0]))
        assert sum(one[1] == "stop" for one in expected) >= 7

    asyncio.run_coroutine_threadsafe(run(), house._loop).result(120)
    assert in_the_middle >= 5
    assert house.service.failover.counters["resumed"] >= 5


HOSTILE = [abuse for abuse in ABUSES if "5 MB" in abuse.name or "hours" in abuse.name or "in a row" in abuse.name]


def test_schemas_that_are_meant_to_hurt(house: House) -> None:
    """All at once, and twice over, while a stream runs: it gets every event, with the text that it has alone."""
    schema = {"type": "array", "items": {"type": "string", "minLength": 9, "maxLength": 9}, "minItems": 200}
    body = body_of(schema, seed=3, max_tokens=300)

    async def send(http: httpx.AsyncClient, abuse: Any) -> httpx.Response:
        return await http.post(abuse.path, content=await asyncio.to_thread(abuse.made_body), headers=abuse.headers)

    async def run() -> None:
        async with httpx.AsyncClient(base_url=house.url, timeout=60) as http:
            alone = await read_stream(http, body)
            before = house.service.grammars.num_compiled
            beside, *refusals = await asyncio.gather(
                read_stream(http, body), *(send(http, abuse) for abuse in HOSTILE * 2)
            )
        assert beside[:2] == alone[:2]
        assert alone[1] == "length"
        for abuse, refusal in zip(HOSTILE * 2, refusals, strict=True):
            assert refusal.status_code == 400
            error = refusal.json()["error"]
            assert (error["param"], error["code"]) == (abuse.param, abuse.code)
            assert "MB" in abuse.name or TOO_MUCH in error["message"]
        assert house.service.grammars.num_compiled - before == 2  # each once; what is too long is never compiled

    assert len(HOSTILE) == 4
    asyncio.run_coroutine_threadsafe(run(), house._loop).result(120)


def test_every_choice_of_every_prompt_is_constrained(client: openai.OpenAI) -> None:
    completion = client.completions.create(
        model="tiny",
        prompt=["one", "two"],
        n=3,
        echo=True,
        logprobs=2,
        temperature=1.5,
        max_tokens=20,
        extra_body={"structured_outputs": {"regex": "[0-9]{4}"}, "ignore_eos": True},
    )
    texts = [choice.text for choice in completion.choices]
    assert [text[:3] for text in texts] == ["one"] * 3 + ["two"] * 3
    assert all(len(text) == 7 and text[3:].isdecimal() for text in texts)
    assert len(set(texts)) > 2
    for choice in completion.choices:
        assert choice.finish_reason == "stop"
        assert choice.logprobs is not None
        assert choice.logprobs.tokens is not None
        assert "".join(choice.logprobs.tokens[-4:]) == choice.text[3:]


def test_a_stop_string_cuts_json(client: openai.OpenAI) -> None:
    """It is what the client asked for, and what vLLM does."""
    completion = client.completions.create(
        model="tiny", prompt="a", stop=['"a"'], extra_body={"structured_outputs": {"json": {"const": {"a": 1}}}}
    )
    assert (completion.choices[0].text, completion.choices[0].finish_reason) == ("{", "stop")
