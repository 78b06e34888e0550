"""/v1/responses through the whole service in one process, read by OpenAI's own client. A scripted model says what it is
told."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import httpx
import openai
import pydantic
import pytest
from openai.types.responses import Response, ResponseStreamEvent

from serve_app.api.failover import FailoverLimits
from serve_app.api.prompts import EncodedPrompt
from serve_app.api.responses import ResponseAnswer
from serve_app.api.responses_protocol import ResponsesRequest
from serve_app.config import ServeArgs
from serve_app.engine.engine import Engine
from serve_app.engine.request import FinishReason, SamplingParams, TokenOutput
from serve_app.engine.sequence import Sequence
from serve_app.engine.simulated_runner import SimulatedRunner
from serve_app.text.tokenizer import Tokenizer
from tests.api.house import House
from tests.tiny_models import make_tiny_model

EVENTS: pydantic.TypeAdapter[Any] = pydantic.TypeAdapter(ResponseStreamEvent)
ENGINE = {"block_size": 16, "num_kv_blocks": 60, "max_num_seqs": 6, "max_num_batched_tokens": 64, "num_threads": 1}
TEMPLATE = (
    "{% if tools %}<tools>{% for tool in tools %}{{ tool | tojson }}{% endfor %}</tools>{% endif %}"
    "{% for m in messages %}[{{ m.role }}]{% if m.reasoning_content %}<think>{{ m.reasoning_content }}</think>{% endif %}"
    "{{ m.content or '' }}{% for call in m.tool_calls or [] %}"
    "<tool_call>{{ call.function.name }} {{ call.function.arguments | tojson }}</tool_call>{% endfor %}{% endfor %}"
    "{{ reasoning_effort or '' }}{{ mood or '' }}{% if add_generation_prompt %}[assistant]{% endif %}"
)
WEATHER = {
    "type": "function",
    "name": "get_weather",
    "description": "The weather of a city.",
    "parameters": {
        "type": "object",
        "properties": {"city": {"type": "string"}},
        "required": ["city"],
        "additionalProperties": False,
    },
    "strict": True,
}


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("model"), "Qwen3ForCausalLM", seed=2)


class Script:
    """What the model of the scripted house says, to everybody; and what it was asked."""

    def __init__(self, directory: Path) -> None:
        self.tokenizer = Tokenizer.from_directory(directory)
        self.eos = self.tokenizer.encode("<|im_end|>")[0]
        self.ids: list[int] = []
        self.asked: list[Sequence] = []

    def says(self, text: str) -> None:
        self.ids = self.tokenizer.encode(text)
        self.asked.clear()

    def __call__(self, sequence: Sequence, i: int) -> int:
        if i == 0:
            self.asked.append(sequence)
        return self.ids[i] if i < len(self.ids) else self.eos

    @property
    def prompt(self) -> str:
        return self.tokenizer.decode(self.asked[-1].request.prompt_token_ids, skip_special_tokens=False)


@pytest.fixture(scope="module")
def script(directory: Path) -> Script:
    return Script(directory)


class ScriptedRunner(SimulatedRunner):
    """It says what it is told, whatever a grammar wants."""

    def compile_grammar(self, text: str) -> object:
        return text


@pytest.fixture(scope="module")
def scripted(directory: Path, script: Script) -> Iterator[House]:
    def make_engine(args: ServeArgs) -> Engine:
        config = args.engine.to_engine_config()
        runner = ScriptedRunner(
            num_kv_blocks=200,
            block_size=16,
            max_model_len=1000,
            vocab_size=307,
            eos_token_ids=frozenset({script.eos}),
            script=script,
        )
        return Engine(config, runner)

    api = {"chat_template": TEMPLATE, "tool_parser": "hermes", "reasoning_parser": "think"}
    args = {"model": {"model": str(directory), "served_model_name": ["tiny", "other"]}, "engine": ENGINE, "api": api}
    with House(args, make_engine=make_engine, num_replicas=1) as house:
        yield house
        house.check_rest()


@pytest.fixture(scope="module")
def house(directory: Path) -> Iterator[House]:
    with House({"model": {"model": str(directory), "served_model_name": "tiny"}, "engine": ENGINE}) as house:
        yield house
        house.check_rest()


def client_of(house: House) -> openai.OpenAI:
    return openai.OpenAI(base_url=house.url + "/v1", api_key="none", max_retries=0)


def post(house: House, **fields: Any) -> Any:
    answer = httpx.post(house.url + "/v1/responses", json=fields)
    assert answer.status_code == 200, answer.text
    return answer.json()


def events_of(house: House, **fields: Any) -> list[dict[str, Any]]:
    """The events, each checked against the openai package's types."""
    found: list[dict[str, Any]] = []
    with httpx.stream("POST", house.url + "/v1/responses", json={**fields, "stream": True}) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        name = None
        for line in answer.iter_lines():
            if line.startswith("event: "):
                name = line[7:]
            elif line.startswith("data: "):
                event = json.loads(line[6:])
                assert event["type"] == name
                EVENTS.validate_python(event, strict=False)
                found.append(event)
    assert [event["sequence_number"] for event in found] == list(range(len(found)))
    return found


def without_times(response: dict[str, Any]) -> dict[str, Any]:
    """What does not depend on when it was asked."""
    usage = {**response["usage"], "input_tokens_details": None}
    return {**response, "created_at": 0, "usage": usage}


# ---- text ------------------------------------------------------------------------------------------------------------


def test_the_openai_package_reads_an_answer(house: House) -> None:
    with client_of(house) as client:
        fields: dict[str, Any] = {"model": "tiny", "temperature": 0, "max_output_tokens": 30}
        answer = client.responses.create(input="on and on", metadata={"a": "b"}, **fields)
        chat = client.chat.completions.create(
            model="tiny", messages=[{"role": "user", "content": "on and on"}], temperature=0, max_tokens=30
        )
    assert answer.output_text == chat.choices[0].message.content
    assert answer.id.startswith("resp_")
    assert answer.metadata == {"a": "b"}
    assert answer.model == "tiny"
    assert answer.usage is not None
    assert answer.usage.output_tokens == chat.usage.completion_tokens  # type: ignore[union-attr]
    assert answer.usage.total_tokens == answer.usage.input_tokens + answer.usage.output_tokens
    assert answer.status == ("incomplete" if chat.choices[0].finish_reason == "length" else "completed")
    Response.model_validate(json.loads(answer.model_dump_json()))


def test_a_stream_is_the_same_answer_in_openais_events(house: House) -> None:
    fields = {"input": "go on", "temperature": 1.0, "seed": 5, "max_output_tokens": 40, "request_id": "mine"}
    whole = post(house, **fields)
    events = events_of(house, **fields)
    kinds = [event["type"] for event in events]
    assert kinds[:4] == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
    ]
    num_deltas = kinds.count("response.output_text.delta")
    assert num_deltas > 3
    assert kinds[4 : 4 + num_deltas] == ["response.output_text.delta"] * num_deltas
    assert kinds[4 + num_deltas : -1] == [
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
    ]
    assert kinds[-1] == "response." + whole["status"]
    assert without_times(events[-1]["response"]) == without_times(whole)
    text = "".join(event["delta"] for event in events if event["type"] == "response.output_text.delta")
    assert text == whole["output"][0]["content"][0]["text"]
    assert events[0]["response"]["output"] == []
    assert events[0]["response"]["usage"] is None


def test_an_answer_that_reaches_its_limit_is_incomplete(scripted: House, script: Script) -> None:
    script.says("on and on and on")
    answer = post(scripted, input="a", max_output_tokens=3)
    assert answer["status"] == "incomplete"
    assert answer["incomplete_details"] == {"reason": "max_output_tokens"}
    assert answer["output"][0]["status"] == "incomplete"
    assert answer["usage"]["output_tokens"] == 3
    assert events_of(scripted, input="a", max_output_tokens=3)[-1]["type"] == "response.incomplete"


def test_an_empty_answer_has_a_message(scripted: House, script: Script) -> None:
    script.says("")
    answer = post(scripted, input="a")
    assert [item["type"] for item in answer["output"]] == ["message"]
    assert answer["output"][0]["content"][0]["text"] == ""
    assert answer["status"] == "completed"
    assert events_of(scripted, input="a")[-1]["response"]["output"][0]["content"][0]["text"] == ""


def test_logprobs(house: House) -> None:
    fields: dict[str, Any] = {"input": "a", "temperature": 0, "max_output_tokens": 5}
    plain = post(house, **fields)
    assert plain["output"][0]["content"][0]["logprobs"] == []
    answer = post(house, **fields, include=["message.output_text.logprobs"], top_logprobs=2)
    entries = answer["output"][0]["content"][0]["logprobs"]
    assert len(entries) == answer["usage"]["output_tokens"]
    assert all(len(entry["top_logprobs"]) == 2 for entry in entries)
    events = events_of(house, **fields, top_logprobs=2)
    shown = [x for e in events if e["type"] == "response.output_text.delta" for x in e["logprobs"]]
    assert shown == entries


# ---- items -----------------------------------------------------------------------------------------------------------

SAID = (
    "<think>which city? Paris.</think>Let me see."
    '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris"}}\n</tool_call>\n'
    '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Rome"}}\n</tool_call>'
)


def test_reasoning_text_and_calls_are_items(scripted: House, script: Script) -> None:
    script.says(SAID)
    fields: dict[str, Any] = {"input": "weather?", "tools": [WEATHER], "request_id": "mine"}
    whole = post(scripted, **fields)
    reasoning, message, first, second = whole["output"]
    assert reasoning["content"] == [{"type": "reasoning_text", "text": "which city? Paris."}]
    assert message["content"][0]["text"].strip() == "Let me see."
    assert [json.loads(call["arguments"]) for call in (first, second)] == [{"city": "Paris"}, {"city": "Rome"}]
    assert first["name"] == second["name"] == "get_weather"
    assert first["call_id"] != second["call_id"]
    assert len({item["id"] for item in whole["output"]}) == 4
    assert whole["status"] == "completed"
    assert whole["usage"]["output_tokens_details"]["reasoning_tokens"] > 0
    events = events_of(scripted, **fields)
    assert without_times(events[-1]["response"]) == without_times(whole)
    done = [event["item"] for event in events if event["type"] == "response.output_item.done"]
    assert sorted(done, key=lambda item: [x["id"] for x in whole["output"]].index(item["id"])) == whole["output"]
    arguments = ["", ""]
    for event in events:
        if event["type"] == "response.function_call_arguments.delta":
            arguments[event["output_index"] - 2] += event["delta"]
    assert arguments == [first["arguments"], second["arguments"]]
    thought = [event["delta"] for event in events if event["type"] == "response.reasoning_text.delta"]
    assert thought
    assert "".join(thought) == "which city? Paris."


def test_the_items_do_not_depend_on_how_the_tokens_come(scripted: House, script: Script) -> None:
    """One by one, in random groups, all at once: after a failover they come in other groups."""
    model = scripted.service.model
    body = {"input": "weather?", "tools": [WEATHER], "stream": True}
    ids = script.tokenizer.encode(SAID)
    sampling = SamplingParams(max_tokens=500).resolved()
    prompt = EncodedPrompt((1, 2), "")

    def answer_in(groups: list[int]) -> dict[str, Any]:
        asked = ResponsesRequest.parse(json.dumps(body).encode())
        known: dict[str, Any] = {"request_id": "r", "created": 1, "model": "m", "prompts": [prompt]}
        answer = ResponseAnswer(asked, **known, token_texts=scripted.service.token_texts, counts_reasoning=True)
        text = asked.chat.text_stream(script.tokenizer, sampling, prompt, output_format=model.output_format)
        data, start = b"", 0
        for num in groups:
            output = TokenOutput("r", 0, tuple(ids[start : start + num]))
            start += num
            if start == len(ids):
                output = output._replace(finish_reason=FinishReason.STOP)
            delta = text.push(output.token_ids, output.finish_reason)
            data += answer.push(0, delta, output)
        assert answer.has_ended
        data += answer.end()
        last: dict[str, Any] = json.loads(data.rsplit(b"data: ", 1)[1])["response"]
        return last

    whole = answer_in([len(ids)])
    assert [item["type"] for item in whole["output"]] == ["reasoning", "message", "function_call", "function_call"]
    for seed in range(20):
        rng, groups = random.Random(seed), []
        while sum(groups) < len(ids):
            groups.append(min(rng.choice((1, 1, 2, 7, 30)), len(ids) - sum(groups)))
        assert answer_in(groups) == whole
    assert answer_in([1] * len(ids)) == whole


def test_the_packages_stream_puts_the_items_together(scripted: House, script: Script) -> None:
    script.says(SAID)
    tools: Any = [WEATHER]
    with client_of(scripted) as client:
        with client.responses.stream(model="tiny", input="weather?", tools=tools) as stream:
            texts = [event.delta for event in stream if event.type == "response.output_text.delta"]
            final = stream.get_final_response()
        whole = client.responses.create(model="tiny", input="weather?", tools=tools)
    assert "".join(texts) == final.output_text == whole.output_text
    calls = [item for item in final.output if item.type == "function_call"]
    assert [call.parsed_arguments for call in calls] == [{"city": "Paris"}, {"city": "Rome"}]  # type: ignore[union-attr]


def test_a_loop_with_tools(scripted: House, script: Script) -> None:
    """What came out goes in again, as it is."""
    tools: Any = [WEATHER]
    with client_of(scripted) as client:
        script.says(SAID)
        answer = client.responses.create(model="tiny", input="weather?", instructions="be brief", tools=tools)
        assert script.prompt.startswith("<tools>{")
        assert script.prompt.endswith("</tools>[system]be brief[user]weather?[assistant]")
        items: list[Any] = [{"role": "user", "content": "weather?"}, *answer.output]
        items += [
            {"type": "function_call_output", "call_id": item.call_id, "output": "sunny"}
            for item in answer.output
            if item.type == "function_call"
        ]
        script.says("It is sunny.")
        answer = client.responses.create(model="tiny", input=items, tools=tools)
    assert answer.output_text == "It is sunny."
    assert script.prompt.split("</tools>")[1].replace("\n", "") == (
        "[user]weather?[assistant]<think>which city? Paris.</think>Let me see."
        '<tool_call>get_weather {"city": "Paris"}</tool_call><tool_call>get_weather {"city": "Rome"}</tool_call>'
        "[tool]sunny[tool]sunny[assistant]"
    )


class Weather(pydantic.BaseModel):
    city: str
    mood: Literal["sunny", "rainy"]


def test_parse_with_a_pydantic_model(scripted: House, script: Script) -> None:
    script.says('{"city": "Rome", "mood": "sunny"}')
    with client_of(scripted) as client:
        answer = client.responses.parse(model="tiny", input="weather?", text_format=Weather)
    assert answer.output_parsed == Weather(city="Rome", mood="sunny")
    assert answer.text is not None
    assert answer.text.format is not None
    assert answer.text.format.type == "json_schema"
    assert script.asked[-1].request.sampling.grammar is not None


# ---- what goes wrong -------------------------------------------------------------------------------------------------


def test_a_lost_replica_leaves_no_trace(house: House) -> None:
    fields = {"input": "go on and on", "temperature": 1.0, "seed": 9, "max_output_tokens": 120, "request_id": "same"}
    whole = post(house, **fields)
    lost = 0
    events = []
    with httpx.stream("POST", house.url + "/v1/responses", json={**fields, "stream": True}) as answer:
        for line in answer.iter_lines():
            if line.startswith("data: "):
                events.append(json.loads(line[6:]))
            if len(events) == 12 and not lost:
                (victim,) = [r for r in house.replicas if r.engine.num_unfinished]
                house.run(_restart_channel(house, victim.replica_id))
                lost = 1
    assert lost
    assert house.service.failover.counters["lost"] > 0
    assert without_times(events[-1]["response"]) == without_times(whole)
    text = "".join(event["delta"] for event in events if event["type"] == "response.output_text.delta")
    assert text == whole["output"][0]["content"][0]["text"]


async def _restart_channel(house: House, replica_id: str) -> None:
    house.transport.kill(replica_id)


def test_a_stream_that_fails_ends_with_an_error_event(directory: Path) -> None:
    args = {"model": {"model": str(directory), "served_model_name": "tiny"}, "engine": ENGINE}
    with House(args, num_replicas=1) as house:
        house.service.failover.limits = FailoverLimits(max_seconds=0.1)
        with client_of(house) as client:
            stream = client.responses.create(
                model="tiny", input="go on and on", temperature=0, max_output_tokens=400, stream=True
            )
            events = iter(stream)
            assert next(events).type == "response.created"
            house.run(asyncio.to_thread(house.replicas[0].engine.stop, 5.0))
            house.transport.hubs.clear()
            with pytest.raises(openai.APIError, match="cannot go on within") as caught:
                list(events)
        assert isinstance(caught.value.body, dict)
        assert caught.value.body["code"] == "engine_unavailable"


def test_deadlines_and_overload(directory: Path, house: House) -> None:
    late = httpx.post(
        house.url + "/v1/responses",
        json={"input": "a", "max_output_tokens": 400},
        headers={"x-request-timeout-ms": "1"},
    )
    assert late.status_code in (429, 504)
    assert late.json()["error"]["code"] in ("deadline_exceeded", "overloaded")
    simulated = {"model": str(directory), "runner": "simulated", "simulated": {"seconds_per_step": 0.02}}
    args = {"model": simulated, "engine": {**ENGINE, "num_kv_blocks": 32}}
    with House(args, num_replicas=1, user_config={"router": {"max_queued_requests": 0}}) as small:
        fields = {"input": "a", "max_output_tokens": 450}
        with httpx.stream("POST", small.url + "/v1/responses", json={**fields, "stream": True}) as first:
            lines = first.iter_lines()  # held: one that is dropped closes its stream
            next(lines)
            refused = httpx.post(small.url + "/v1/responses", json=fields, timeout=60)
        assert refused.status_code == 429
        assert int(refused.headers["retry-after"]) >= 1
        small.check_rest()


# ---- fields ----------------------------------------------------------------------------------------------------------

HOT: dict[str, Any] = {"temperature": 2.0, "seed": 3}
EFFECTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "input": ({}, {"input": "other"}),
    "instructions": ({}, {"instructions": "be brief"}),
    "max_output_tokens": ({}, {"max_output_tokens": 5}),
    "temperature": ({"seed": 3}, HOT),
    "top_p": (HOT, {"top_p": 0.01}),
    "top_k": (HOT, {"top_k": 1}),
    "min_p": (HOT, {"min_p": 1.0}),
    "seed": (HOT, {"seed": 4}),
    "metadata": ({}, {"metadata": {"a": "b"}}),
    "request_id": ({}, {"request_id": "other"}),
    "include": ({}, {"include": ["message.output_text.logprobs"]}),
    "top_logprobs": ({}, {"top_logprobs": 2}),
}
ELSEWHERE = {
    "model": "test_what_reaches_the_model",
    "stream": "test_a_stream_is_the_same_answer_in_openais_events",
    "text": "test_parse_with_a_pydantic_model",
    "tools": "test_a_loop_with_tools",
    "tool_choice": "test_what_reaches_the_model",
    "parallel_tool_calls": "test_what_reaches_the_model",
    "reasoning": "test_what_reaches_the_model",
    "chat_template_kwargs": "test_what_reaches_the_model",
    "priority": "test_what_reaches_the_model",
    "cache_salt": "test_what_reaches_the_model",
}


def test_the_table_names_every_field() -> None:
    assert {*EFFECTS, *ELSEWHERE} == set(ResponsesRequest.model_fields)


@pytest.mark.parametrize("field", EFFECTS)
def test_a_field_has_an_effect(house: House, field: str) -> None:
    without, more = EFFECTS[field]
    assert field in more
    base = {"input": "on and on", "temperature": 0, "max_output_tokens": 12, "request_id": "mine", **without}
    first, second = (without_times(post(house, **base)) for _ in range(2))
    assert first == second
    other = without_times(post(house, **{**base, **more}))
    assert (other["output"], other["metadata"]) != (first["output"], first["metadata"])


def test_what_reaches_the_model(scripted: House, script: Script) -> None:
    script.says("a")
    assert post(scripted, input="x", model="other")["model"] == "other"
    answer = post(
        scripted,
        input="x",
        reasoning={"effort": "high", "summary": "auto"},
        chat_template_kwargs={"mood": "[glad]"},
        priority=3,
        cache_salt="s",
    )
    assert script.prompt == "[user]xhigh[glad][assistant]"
    assert (script.asked[-1].request.priority, script.asked[-1].request.cache_salt) == (3, "s")
    assert answer["reasoning"] == {"effort": "high", "summary": None}
    script.says(SAID)
    fields: dict[str, Any] = {"input": "x", "tools": [WEATHER]}
    assert len(post(scripted, **fields, parallel_tool_calls=False)["output"]) == 3
    forced = {"type": "function", "name": "get_weather"}
    post(scripted, **fields, tool_choice=forced)
    assert script.asked[-1].request.sampling.grammar is not None
    allowed = {"type": "allowed_tools", "mode": "auto", "tools": [{"type": "function", "name": "get_weather"}]}
    assert post(scripted, **fields, tool_choice=allowed)["tool_choice"] == allowed
    assert not post(scripted, **fields, tool_choice="none", store=True)["store"]
    assert "<tools>" not in script.prompt


# ---- abuses ----------------------------------------------------------------------------------------------------------


def bad(fields: Any, param: str | None, code: str = "invalid_parameter", status: int = 400) -> tuple[Any, ...]:
    return fields if isinstance(fields, list) else {"input": "a", **fields}, param, code, status


def item(**fields: Any) -> dict[str, Any]:
    return {"input": [fields]}


CALL = {"type": "function_call", "call_id": "1", "name": "f", "arguments": "{}"}
ABUSES: dict[str, tuple[Any, ...]] = {
    "a list": bad([], None, "invalid_body"),
    "no input": bad({"input": None}, "input", "missing_parameter"),
    "input is a number": bad({"input": 5}, "input"),
    "no items": bad({"input": []}, "input"),
    "an item is a string": bad({"input": ["a"]}, "input[0]"),
    "an unknown item": bad(item(type="computer_call"), "input[0].type"),
    "a reference": bad(item(type="item_reference", id="msg_1"), "input[0].type"),
    "an unknown role": bad(item(role="robot", content="a"), "input[0].role"),
    "no content": bad(item(role="user"), "input[0].content"),
    "an image": bad(item(role="user", content=[{"type": "input_image", "image_url": "x"}]), "input[0].content[0].type"),
    "a part without text": bad(item(role="user", content=[{"type": "input_text"}]), "input[0].content[0].text"),
    "an unknown field of an item": bad(item(role="user", content="a", mood="bad"), "input[0].mood"),
    "an output without its call": bad(item(type="function_call_output", call_id="1", output="a"), "input[0].call_id"),
    "a call without a name": bad(item(**{**CALL, "name": None}), "input[0].name"),
    "arguments that are no JSON": bad({"input": [{**CALL, "arguments": "{"}]}, "input[0].arguments"),
    "an output that is a number": bad(
        {"input": [CALL, {"type": "function_call_output", "call_id": "1", "output": 5}]}, "input[1].output"
    ),
    "previous_response_id": bad({"previous_response_id": "resp_1"}, "previous_response_id", "unsupported_parameter"),
    "conversation": bad({"conversation": "conv_1"}, "conversation", "unsupported_parameter"),
    "background": bad({"background": True}, "background", "unsupported_parameter"),
    "a stored prompt": bad({"prompt": {"id": "x"}}, "prompt", "unsupported_parameter"),
    "truncation": bad({"truncation": "auto"}, "truncation", "unsupported_parameter"),
    "max_tool_calls": bad({"max_tool_calls": 3}, "max_tool_calls", "unsupported_parameter"),
    "messages": bad({"messages": []}, "messages", "unknown_parameter"),
    "max_tokens": bad({"max_tokens": 5}, "max_tokens", "unknown_parameter"),
    "max_output_tokens is 0": bad({"max_output_tokens": 0}, "max_output_tokens"),
    "max_output_tokens is beyond int32": bad({"max_output_tokens": 2**40}, "max_output_tokens"),
    "max_output_tokens is more than the context": bad({"max_output_tokens": 4000}, None, "context_length_exceeded"),
    "a long input": bad({"input": "a b " * 5000}, None, "context_length_exceeded"),
    "temperature is text": bad({"temperature": "1"}, "temperature"),
    "metadata is a list": bad({"metadata": []}, "metadata"),
    "an unknown include": bad({"include": ["file_search_call.results"]}, "include[0]"),
    "too many logprobs": bad({"top_logprobs": 1000}, "top_logprobs"),
    "a tool of the server": bad({"tools": [{"type": "web_search"}]}, "tools[0].type"),
    "a tool in a chat's shape": bad({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools[0].function"),
    "a tool without a name": bad({"tools": [{"type": "function"}]}, "tools[0].name"),
    "a tool with a bad name": bad({"tools": [{**WEATHER, "name": "a b"}]}, "tools[0].name"),
    "parameters that are a list": bad({"tools": [{**WEATHER, "parameters": []}]}, "tools[0].parameters"),
    "the same tool twice": bad({"tools": [WEATHER, WEATHER]}, "tools[1].name"),
    "200 tools": bad({"tools": [{**WEATHER, "name": f"f{i}"} for i in range(200)]}, "tools"),
    "a choice without tools": bad({"tool_choice": "required"}, "tool_choice"),
    "an unknown choice": bad({"tool_choice": "any"}, "tool_choice"),
    "a chosen tool that is not there": bad(
        {"tools": [WEATHER], "tool_choice": {"type": "function", "name": "g"}}, "tool_choice"
    ),
    "text is a string": bad({"text": "json"}, "text"),
    "an unknown format": bad({"text": {"format": {"type": "xml"}}}, "text.format.type"),
    "a format without a schema": bad({"text": {"format": {"type": "json_schema", "name": "a"}}}, "text.format.schema"),
    "verbosity": bad({"text": {"verbosity": "low"}}, "text.verbosity", "unsupported_parameter"),
    "an unknown effort": bad({"reasoning": {"effort": "huge"}}, "reasoning.effort"),
    "an unknown field of reasoning": bad({"reasoning": {"budget": 5}}, "reasoning.budget", "unknown_parameter"),
    "another model": bad({"model": "gpt"}, "model", "model_not_found", 404),
    "service_tier": bad({"service_tier": "flex"}, "service_tier", "unsupported_parameter"),
    "store is text": bad({"store": "yes"}, "store", "unsupported_parameter"),
}  # fmt: skip


@pytest.mark.parametrize("name", ABUSES)
def test_abuse(scripted: House, name: str) -> None:
    fields, param, code, status = ABUSES[name]
    answer = httpx.post(scripted.url + "/v1/responses", json=fields)
    error = answer.json()["error"]
    assert (answer.status_code, error["code"], error["param"]) == (status, code, param), error
    assert "messages" not in error["message"] or name == "messages"
    assert "response_format" not in error["message"]
    assert "max_tokens" not in error["message"] or name == "max_tokens"


def test_no_name_of_max_tokens_is_cut_silently(scripted: House) -> None:
    """max_tokens was refused where it and the prompt exceed the context; max_completion_tokens and max_output_tokens, which
    may be all that a newer client sends, were lowered without a word. vLLM refuses all three (its TokenizeParams)."""
    chat = {"messages": [{"role": "user", "content": "a"}]}
    for path, fields, name in (
        ("/v1/chat/completions", chat, "max_tokens"),
        ("/v1/chat/completions", chat, "max_completion_tokens"),
        ("/v1/completions", {"prompt": "a"}, "max_tokens"),
        ("/v1/responses", {"input": "a"}, "max_output_tokens"),
    ):
        answer = httpx.post(scripted.url + path, json={**fields, name: 4000})
        error = answer.json()["error"]
        assert (answer.status_code, error["code"]) == (400, "context_length_exceeded"), error
        assert error["message"].startswith(f"{name} is 4000 and the prompt has "), error


def test_streams_of_this_route_are_not_kept(scripted: House) -> None:
    sent = {"input": "a", "stream": True}
    answer = httpx.post(scripted.url + "/v1/responses", json=sent, headers={"x-resumable": "1"})
    assert answer.status_code == 400
    assert "X-Resumable is '1'; it must be left out" in answer.json()["error"]["message"]


def test_there_is_no_store_to_ask(scripted: House) -> None:
    answer = httpx.get(scripted.url + "/v1/responses/resp_1")
    assert (answer.status_code, answer.json()["error"]["code"]) == (404, "not_found")
