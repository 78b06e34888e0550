"""Calls that a request forces, on a model with random weights: it says nothing of sense, and every call is right."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

import serve_app
from tests.api.house import House
from tests.api.test_tools import assembled
from tests.tiny_models import make_tiny_model

TOKENIZER = Path(serve_app.__file__).parent / "demo_model"
ENGINE = {
    "num_threads": 1,
    "num_kv_blocks": 256,
    "max_model_len": 512,
    "max_num_batched_tokens": 256,
    "max_num_seqs": 8,
}
TEMPLATE = (
    "{% for m in messages %}{{ m.content }}{% endfor %}{% if reasoning_effort == 'none' %}<think></think>{% endif %}"
)
API = {"chat_template": TEMPLATE, "tool_parser": "hermes", "reasoning_parser": "think"}
HTTP = httpx.Client(timeout=120, limits=httpx.Limits(max_keepalive_connections=0))
SCHEMA = {
    "type": "object",
    "properties": {"unit": {"enum": ["C", "F"]}, "days": {"type": "integer", "minimum": 1, "maximum": 9}},
    "required": ["unit", "days"],
    "additionalProperties": False,
}
TOOLS = [
    {"type": "function", "function": {"name": "weather", "parameters": SCHEMA}},
    {"type": "function", "function": {"name": "on", "parameters": {**SCHEMA, "properties": {}, "required": []}}},
]
NO_THINKING = {"reasoning_effort": "none"}


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> Iterator[House]:
    vocab_size = json.loads((TOKENIZER / "config.json").read_text())["vocab_size"]
    directory = make_tiny_model(tmp_path_factory.mktemp("model"), vocab_size=vocab_size, eos=())
    model = {"model": str(directory), "tokenizer": str(TOKENIZER), "dtype": "float32", "served_model_name": "tiny"}
    with House({"model": model, "engine": ENGINE, "api": API}) as made:
        yield made
        made.check_rest()


def ask(house: House, status: int = 200, **fields: Any) -> Any:
    body = {
        "messages": [{"role": "user", "content": "go"}],
        "tools": TOOLS,
        "max_tokens": 400,
        "temperature": 50.0,
        "seed": 5,
        **NO_THINKING,
        **fields,
    }
    answer = HTTP.post(house.url + "/v1/chat/completions", json=body)
    assert answer.status_code == status, answer.text
    if not fields.get("stream"):
        return answer.json()
    return [json.loads(line[6:]) for line in answer.text.split("\n\n") if line and line != "data: [DONE]"]


def check_call(call: dict[str, Any]) -> str:
    name, arguments = call["function"]["name"], json.loads(call["function"]["arguments"])
    if name == "on":
        assert arguments == {}
    else:
        assert name == "weather"
        assert arguments["unit"] in ("C", "F")
        assert arguments["days"] in range(1, 10)
        assert len(arguments) == 2
    return str(name)


def test_required_and_named_choices_follow_the_schemas(house: House) -> None:
    names = set()
    for seed in range(6):
        answer = ask(house, tool_choice="required", parallel_tool_calls=False, seed=seed)
        (choice,) = answer["choices"]
        assert choice["finish_reason"] == "tool_calls", choice
        assert choice["message"]["content"] is None
        (call,) = choice["message"]["tool_calls"]
        names.add(check_call(call))
    assert names == {"weather", "on"}
    named = {"type": "function", "function": {"name": "weather"}}
    for seed in range(3):
        (choice,) = ask(house, tool_choice=named, parallel_tool_calls=False, seed=seed)["choices"]
        assert [check_call(call) for call in choice["message"]["tool_calls"]] == ["weather"]


def test_several_calls_streamed_and_whole(house: House) -> None:
    fields = {"tool_choice": "required", "n": 2, "request_id": "same", "seed": 8}
    whole = ask(house, **fields)
    streamed = assembled(ask(house, stream=True, **fields))
    assert sum(len(choice["message"]["tool_calls"]) for choice in whole["choices"]) >= 2
    for one, other in zip(whole["choices"], streamed, strict=True):
        assert one["message"]["tool_calls"] == other["message"]["tool_calls"]
        assert one["finish_reason"] == other["finish_reason"]
        if one["finish_reason"] == "tool_calls":
            assert all(check_call(call) for call in one["message"]["tool_calls"])


def test_reasoning_comes_before_a_forced_call(house: House) -> None:
    """The template leaves it to the model whether to think. This one begins, and is made to end by a bias."""
    end = house.model.tokenizer.encode("</think>", add_special_tokens=False)
    answer = ask(
        house,
        tool_choice="required",
        reasoning_effort="high",
        messages=[{"role": "user", "content": "go"}, {"role": "assistant", "content": "<think>Well"}],
        continue_final_message=True,
        add_generation_prompt=False,
        logit_bias={str(token): 30 for token in end},
        return_token_ids=True,
        max_tokens=440,
    )
    (choice,) = answer["choices"]
    text = house.model.tokenizer.decode(choice["token_ids"])
    if "</think>" in text:
        assert choice["message"]["reasoning"] == text.partition("</think>")[0]
        assert text.partition("</think>")[2].lstrip().startswith("<tool_call>")
    else:
        assert choice["message"]["content"] is None
        assert choice["message"]["reasoning"]
    assert answer["usage"]["completion_tokens_details"]["reasoning_tokens"] > 0


def test_a_schema_for_the_answer_and_tools_beside_it(house: House) -> None:
    """Every answer is a call or such JSON; over some seeds both come."""
    answer_format = {"type": "json_schema", "json_schema": {"name": "a", "schema": SCHEMA}}
    kinds = set()
    for seed in range(12):
        (choice,) = ask(house, response_format=answer_format, parallel_tool_calls=False, seed=seed)["choices"]
        if choice["message"].get("tool_calls"):
            kinds.add("call")
            assert choice["finish_reason"] == "tool_calls"
            assert [check_call(call) for call in choice["message"]["tool_calls"]]
        else:
            kinds.add("content")
            assert choice["finish_reason"] == "stop"
            check_call({"function": {"name": "weather", "arguments": choice["message"]["content"]}})
    assert kinds == {"call", "content"}


@pytest.mark.parametrize(
    ("parameters", "fields", "param"),
    [
        ({"properties": {"a": {"pattern": "(?=a)"}}}, {"tool_choice": "required"}, "tools"),
        ({"properties": {"a": {"$ref": "#/$defs/b"}}}, {"tool_choice": "required"}, "tools[0].function.parameters"),
    ],
)
def test_a_schema_that_cannot_be_followed_is_refused(
    house: House, parameters: Any, fields: dict[str, Any], param: str
) -> None:
    tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", **parameters}}}
    error = ask(house, 400, tools=[tool], **fields)["error"]
    assert error["param"].startswith(param)
    assert ask(house, tools=[tool], max_tokens=3)["choices"]
