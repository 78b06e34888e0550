"""Tools and reasoning over real sockets, with a model that says what it is told: the shapes of answers, whole and streamed,
what reaches the template, and the openai package in a loop.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest

from serve_app.api.tools import ID_LENGTH, CallArguments, tool_call_id
from tests.api.house import House
from tests.api.tool_house import ANSWERS, CLOCK, ONE, TOOLS, WEATHER, make_house

CHAT = "/v1/chat/completions"
HTTP = httpx.Client(timeout=30, limits=httpx.Limits(max_keepalive_connections=0))
MODEL = "model"
ARGUMENTS = '{"place": "Paris, \\u00e9t\\u00e9 \\"là\\"", "days": 3}'


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> Iterator[House]:
    with make_house(tmp_path_factory.mktemp("model")) as made:
        yield made
        made.check_rest()


@pytest.fixture(scope="module")
def client(house: House) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=house.url + "/v1", api_key="any", max_retries=0) as made:
        yield made


def ask(house: House, text: str, **fields: Any) -> Any:
    body = {"messages": [{"role": "user", "content": text}], "tools": TOOLS, "max_tokens": 500, **fields}
    answer = HTTP.post(house.url + CHAT, json={name: value for name, value in body.items() if value is not None})
    assert answer.status_code == 200, answer.text
    if not body.get("stream"):
        return answer.json()
    events = [line[6:] for line in answer.text.split("\n\n") if line]
    assert events[-1] == "[DONE]"
    return [json.loads(event) for event in events[:-1]]


def assembled(chunks: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The choices of a whole answer from those of a stream, by OpenAI's rules."""
    choices: dict[int, dict[str, Any]] = {}
    for chunk in chunks:
        for piece in chunk["choices"]:
            choice = choices.setdefault(piece["index"], {"message": {}, "finish_reason": None, "token_ids": []})
            message, delta = choice["message"], piece["delta"]
            for name in ("content", "reasoning_content", "reasoning"):
                if delta.get(name):
                    message[name] = message.get(name, "") + delta[name]
            for call in delta.get("tool_calls", ()):
                calls = message.setdefault("tool_calls", [])
                if call["index"] == len(calls):
                    assert set(call) == {"index", "id", "type", "function"}
                    calls.append({"id": call["id"], "type": call["type"], "function": dict(call["function"])})
                else:
                    assert set(call) == {"index", "function"}
                    assert set(call["function"]) == {"arguments"}
                    calls[call["index"]]["function"]["arguments"] += call["function"]["arguments"]
            choice["token_ids"] += piece.get("token_ids", ())
            choice["finish_reason"] = piece["finish_reason"] or choice["finish_reason"]
    return [choices[i] for i in sorted(choices)]


# ---- shapes ----------------------------------------------------------------------------------------------------------


def test_a_call_is_an_answer_without_content(house: House) -> None:
    answer = ask(house, "one call", request_id="mine")
    (choice,) = answer["choices"]
    assert choice["finish_reason"] == "tool_calls"
    message = choice["message"]
    assert message["content"] is None
    (call,) = message["tool_calls"]
    assert call["id"] == tool_call_id("chatcmpl-mine", 0, 0)
    assert call["type"] == "function"
    assert call["function"] == {"name": "weather", "arguments": ARGUMENTS}
    assert "reasoning_content" not in message
    assert ask(house, "one call", request_id="mine")["choices"] == answer["choices"]


@pytest.mark.parametrize(
    ("text", "content", "reasoning", "names", "finish_reason"),
    [
        ("plain", ANSWERS["plain"], None, [], "stop"),
        ("text and two calls", "I look.", None, ["weather", "clock"], "tool_calls"),
        ("think and call", None, "\nThe user wants it, née.\n", ["weather"], "tool_calls"),
        ("think and answer", "\n\nIt is 3.", "\nIt is 3, I think; 4?\n", [], "stop"),
        ("think without end", None, "\nand on and on", [], "stop"),
    ],
)
def test_content_reasoning_and_calls(
    house: House, text: str, content: str | None, reasoning: str | None, names: list[str], finish_reason: str
) -> None:
    answer = ask(house, text, return_token_ids=True)
    (choice,) = answer["choices"]
    message = choice["message"]
    assert (message["content"] or None) == content
    assert message.get("reasoning_content") == message.get("reasoning") == reasoning
    assert [call["function"]["name"] for call in message.get("tool_calls", ())] == names
    assert choice["finish_reason"] == finish_reason
    tokenizer = house.model.tokenizer
    assert tokenizer.decode(choice["token_ids"]) == ANSWERS[text]
    usage = answer["usage"]
    assert usage["completion_tokens"] == len(choice["token_ids"])
    num_reasoning = usage["completion_tokens_details"]["reasoning_tokens"]
    if reasoning is None:
        assert num_reasoning == 0
    else:  # the block and its markers, and the end of the sequence where it never ended
        block, end, _ = ANSWERS[text].partition("</think>")
        num_before = len(tokenizer.encode(ANSWERS[text][: block.index(">") + 1], False)) - 1
        num_all = len(tokenizer.encode(block + end, False))
        assert num_all - num_before - 1 <= num_reasoning <= num_all - num_before + 2


def test_nothing_is_lost_of_what_is_no_call(house: House) -> None:
    """A tool that nobody has is content. Arguments that break off were under way when they broke: they are given as they
    are, and what follows them is content."""
    (choice,) = ask(house, "unknown tool")["choices"]
    assert choice["message"] == {"role": "assistant", "content": ANSWERS["unknown tool"], "refusal": None}
    assert choice["finish_reason"] == "stop"
    (choice,) = ask(house, "broken call")["choices"]
    (call,) = choice["message"]["tool_calls"]
    assert call["function"]["arguments"].strip() == '{"place":'
    assert choice["message"]["content"].endswith("and on.")


@pytest.mark.parametrize("text", ANSWERS)
@pytest.mark.parametrize("fields", [{}, {"n": 2, "return_token_ids": True, "logprobs": True, "top_logprobs": 1}])
def test_a_stream_put_together_is_the_whole_answer(house: House, text: str, fields: dict[str, Any]) -> None:
    whole = ask(house, text, request_id="same", **fields)
    options = {"include_usage": True}
    chunks = ask(house, text, request_id="same", stream=True, stream_options=options, **fields)
    choices = assembled(chunks)
    assert len(choices) == fields.get("n", 1)
    for one, other in zip(whole["choices"], choices, strict=True):
        expected = {name: value for name, value in one["message"].items() if value and name != "role"}
        assert other["message"] == expected
        assert other["finish_reason"] == one["finish_reason"]
        assert other["token_ids"] == one.get("token_ids", [])
    first = [choice for chunk in chunks for choice in chunk["choices"] if choice["index"] == 0]
    entries = [entry for choice in first for entry in (choice["logprobs"] or {}).get("content", ())]
    if "logprobs" in fields:  # of the tokens as they came, markers too
        assert entries == whole["choices"][0]["logprobs"]["content"]
        assert bytes(byte for entry in entries for byte in entry["bytes"]).decode().startswith(ANSWERS[text])
    details = ("prompt_tokens", "completion_tokens", "completion_tokens_details")
    assert [chunks[-1]["usage"][name] for name in details] == [whole["usage"][name] for name in details]
    ids = [call["id"] for choice in choices for call in choice["message"].get("tool_calls", ())]
    assert len(set(ids)) == len(ids)
    assert all(len(call_id) == ID_LENGTH and call_id.isalnum() for call_id in ids)


def test_arguments_come_as_they_are_written(house: House) -> None:
    chunks = ask(house, "one call", stream=True)
    pieces = [c["delta"]["tool_calls"][0] for chunk in chunks for c in chunk["choices"] if "tool_calls" in c["delta"]]
    assert pieces[0]["function"]["name"] == "weather"  # how many pieces there are is the clock's choice
    assert "".join(piece["function"]["arguments"] for piece in pieces) == ARGUMENTS


def test_max_tokens_inside_of_a_call_is_length(house: House) -> None:
    (choice,) = ask(house, "one call", max_tokens=75)["choices"]
    assert choice["finish_reason"] == "length"
    (call,) = choice["message"]["tool_calls"]
    assert ARGUMENTS.startswith(call["function"]["arguments"])
    (streamed,) = assembled(ask(house, "one call", max_tokens=75, stream=True))
    assert streamed["message"]["tool_calls"][0]["function"] == call["function"]


def test_without_tools_what_looks_like_a_call_is_text(house: House) -> None:
    for fields in ({"tools": None}, {"tool_choice": "none"}):
        (choice,) = ask(house, "one call", **fields)["choices"]
        assert choice["message"]["content"] == ONE
        assert choice["finish_reason"] == "stop"


def test_the_answer_ends_with_its_first_call(house: House) -> None:
    both = ask(house, "text and two calls", return_token_ids=True)
    one = ask(house, "text and two calls", return_token_ids=True, parallel_tool_calls=False)
    (choice,) = one["choices"]
    assert choice["message"]["tool_calls"][0]["function"]["name"] == "weather"
    assert len(choice["message"]["tool_calls"]) == 1
    assert choice["finish_reason"] == "tool_calls"
    assert one["usage"]["completion_tokens"] == len(choice["token_ids"]) < both["usage"]["completion_tokens"]
    (streamed,) = assembled(
        ask(house, "text and two calls", stream=True, return_token_ids=True, parallel_tool_calls=False)
    )
    assert streamed["token_ids"] == choice["token_ids"]
    house.check_rest()


def test_reasoning_can_be_left_out(house: House) -> None:
    shown, hidden = ask(house, "think and answer"), ask(house, "think and answer", include_reasoning=False)
    assert "reasoning" in shown["choices"][0]["message"]
    assert set(hidden["choices"][0]["message"]) == {"role", "content", "refusal"}
    assert shown["usage"]["completion_tokens_details"] == hidden["usage"]["completion_tokens_details"]
    (streamed,) = assembled(ask(house, "think and answer", include_reasoning=False, stream=True))
    assert streamed["message"] == {"content": "\n\nIt is 3."}


def test_a_stop_string_stands_before_the_parser(house: House) -> None:
    (choice,) = ask(house, "think and answer", stop=["; 4"])["choices"]
    assert choice["message"]["reasoning_content"] == "\nIt is 3, I think"
    assert choice["stop_reason"] == "; 4"


# ---- what reaches the template ---------------------------------------------------------------------------------------


def prompt_of(house: House, **fields: Any) -> str:
    answer = HTTP.post(house.url + "/tokenize", json={"messages": [{"role": "user", "content": "hi"}], **fields})
    assert answer.status_code == 200, answer.text
    return house.model.tokenizer.decode(answer.json()["tokens"], skip_special_tokens=False)


def test_tools_effort_and_earlier_calls_reach_the_template(house: House) -> None:
    assert '"name": "weather"' in prompt_of(house, tools=TOOLS)
    assert '"properties": {}' in prompt_of(house, tools=[CLOCK])
    assert "Tools" not in prompt_of(house)
    assert prompt_of(house, reasoning_effort="high").endswith("[high]")
    assert prompt_of(house, reasoning_effort="none").endswith("<think></think>[none]")
    over = {"reasoning_effort": "none", "chat_template_kwargs": {"enable_thinking": True}}
    assert prompt_of(house, **over).endswith("assistant\n[none]")
    messages = [
        {"role": "user", "content": "hi"},
        {
            "role": "assistant",
            "content": None,
            "reasoning": "because",
            "tool_calls": [
                {"index": 0, "id": "a", "type": "function", "function": {"name": "clock", "arguments": ""}},
                {"id": "b", "type": "function", "function": {"name": "weather", "arguments": ARGUMENTS}},
            ],
        },
        {"role": "tool", "tool_call_id": "b", "content": [{"type": "text", "text": "21"}]},
        {"role": "tool", "tool_call_id": "a", "content": "noon"},
    ]
    prompt = prompt_of(house, messages=messages, chat_template_kwargs={"mood": "open"})
    assert "<think>because</think>" in prompt
    assert '{"name": "clock", "arguments": {}}' in prompt
    assert '"arguments": {"place": "Paris, été \\"là\\"", "days": 3}' in prompt


def test_only_the_allowed_tools_are_shown(house: House) -> None:
    choice = {"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": [{**CLOCK}]}}
    shorter = ask(house, "plain", tool_choice=choice)["usage"]["prompt_tokens"]
    assert shorter == ask(house, "plain", tools=[CLOCK])["usage"]["prompt_tokens"]
    assert shorter < ask(house, "plain")["usage"]["prompt_tokens"]
    without = ask(house, "plain", tool_choice="none")["usage"]["prompt_tokens"]
    assert without == ask(house, "plain", tools=None)["usage"]["prompt_tokens"] < shorter


def test_arguments_are_an_object_and_a_text() -> None:
    """DeepSeek's templates put them between strings, most others look into them."""
    arguments = CallArguments({"a": 1}, '{"a":1}')
    assert "x" + arguments + "y" == 'x{"a":1}y'  # type: ignore[operator]
    assert str(arguments) == '{"a":1}'
    assert arguments == {"a": 1}
    assert json.dumps(arguments) == '{"a": 1}'


@pytest.mark.parametrize(
    ("template", "api"),
    [("{% for m in messages %}{{ m.content }}{% endfor %}", {}), (None, {"api_tool_parser": "none"})],
)
def test_a_model_that_knows_no_tools_says_so(tmp_path: Any, template: str | None, api: dict[str, Any]) -> None:
    with make_house(tmp_path, **({} if template is None else {"template": template}), **api) as house:
        for fields, status in (({}, 400), ({"tool_choice": "required"}, 400), ({"tool_choice": "none"}, 200)):
            body = {"messages": [{"role": "user", "content": "plain"}], "tools": [WEATHER], **fields}
            answer = HTTP.post(house.url + CHAT, json=body)
            assert answer.status_code == status
            if status == 400:
                error = answer.json()["error"]
                assert error["param"] == "tools"
                assert "template does not show tools" in error["message"]


def test_a_parser_that_is_switched_off(tmp_path: Any) -> None:
    with make_house(tmp_path, api_reasoning_parser="none") as house:
        answer = ask(house, "think and answer", tools=None)
        assert answer["choices"][0]["message"]["content"] == ANSWERS["think and answer"]
        assert "completion_tokens_details" not in answer["usage"]


# ---- the openai package ----------------------------------------------------------------------------------------------


def test_the_openai_package_in_a_loop(client: openai.OpenAI) -> None:
    messages: list[Any] = [{"role": "user", "content": "one call"}]
    tools: Any = TOOLS
    num_calls = 0
    while True:
        answer = client.chat.completions.create(model=MODEL, messages=messages, tools=tools, max_tokens=500)
        message = answer.choices[0].message
        messages.append(message)
        if not message.tool_calls:
            break
        for call in message.tool_calls:
            assert call.type == "function"
            assert json.loads(call.function.arguments)["days"] == 3
            messages.append({"role": "tool", "tool_call_id": call.id, "content": "the result is 21"})
            num_calls += 1
    assert num_calls == 1
    assert message.content == "It is 21 degrees."
    assert answer.usage is not None
    assert answer.usage.completion_tokens_details is not None
    assert answer.usage.completion_tokens_details.reasoning_tokens == 0


def test_the_openai_package_streams_the_same(client: openai.OpenAI) -> None:
    asked: Any = {"messages": [{"role": "user", "content": "text and two calls"}], "tools": TOOLS, "max_tokens": 500}
    headers = {"X-Request-Id": "one-and-the-same"}
    whole = client.chat.completions.create(model=MODEL, **asked, extra_headers=headers).choices[0]
    with client.chat.completions.stream(model=MODEL, **asked, extra_headers=headers) as stream:
        done = [event for event in stream if event.type == "tool_calls.function.arguments.done"]
        streamed = stream.get_final_completion().choices[0]
    assert [event.name for event in done] == ["weather", "clock"]
    assert streamed.finish_reason == whole.finish_reason == "tool_calls"
    assert streamed.message.content == whole.message.content
    assert streamed.message.tool_calls is not None
    assert whole.message.tool_calls is not None
    for one, other in zip(whole.message.tool_calls, streamed.message.tool_calls, strict=True):
        assert one.type == other.type == "function"
        assert (one.id, one.function.name, one.function.arguments) == (
            other.id,
            other.function.name,
            other.function.arguments,
        )
