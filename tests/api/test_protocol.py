"""Requests: what is taken, what it becomes, and that everything else is refused by name."""

from __future__ import annotations

import contextlib
import json
from typing import Any

import hypothesis
import pydantic
import pytest
from hypothesis import strategies as st
from openai.types import completion_create_params
from openai.types.chat import completion_create_params as chat_create_params

from serve_app.api.error_response import MAX_MESSAGE_CHARS, error_response
from serve_app.api.json_body import MAX_DEPTH, parse_json
from serve_app.api.names import CHAT_UNIMPLEMENTED, COMPLETION_UNIMPLEMENTED, WITHOUT_EFFECT
from serve_app.api.prompts import EncodedPrompt
from serve_app.api.protocol import (
    ChatCompletionRequest,
    CompletionRequest,
    DetokenizeRequest,
    TokenizeRequest,
    default_chat_max_tokens,
)
from serve_app.api.request_model import RequestLimits, RequestModel
from serve_app.engine.request import MAX_SEED, SamplingParams
from serve_app.errors import InvalidBodyError, InvalidPromptError, InvalidRequestError, UnsupportedParameterError
from serve_app.text.chat_template import ChatTemplate
from tests.api.abuses import ABUSES, CHAT, COMPLETIONS, DETOKENIZE, MESSAGES, TOKENIZE, Abuse, chat, completion
from tests.text.tokenizers_made import made

MODELS: dict[str, type[RequestModel]] = {
    COMPLETIONS: CompletionRequest,
    CHAT: ChatCompletionRequest,
    TOKENIZE: TokenizeRequest,
    DETOKENIZE: DetokenizeRequest,
}
TEMPLATE = ChatTemplate(
    "{% for m in messages %}[{{ m.role }}{{ ' ' + m.name if m.name }}]{{ m.content }}{% endfor %}"
    "{{ mood }}{% if add_generation_prompt %}[assistant]{% endif %}"
)


def parse_completion(**fields: Any) -> CompletionRequest:
    return CompletionRequest.parse(completion(**fields))


def parse_chat(**fields: Any) -> ChatCompletionRequest:
    return ChatCompletionRequest.parse(chat(**fields))


# ---- refusals --------------------------------------------------------------------------------------------------------


def test_the_table_of_abuses_is_large_and_its_names_differ() -> None:
    assert len(ABUSES) >= 100
    assert len({abuse.name for abuse in ABUSES}) == len(ABUSES)
    assert {abuse.level for abuse in ABUSES} == {"protocol", "engine", "route", "connection"}


@pytest.mark.parametrize("abuse", [a for a in ABUSES if a.level == "protocol"], ids=lambda a: a.name)
def test_an_abuse_is_refused(abuse: Abuse) -> None:
    with pytest.raises((InvalidRequestError, pydantic.ValidationError)) as caught:
        MODELS[abuse.path].parse(abuse.made_body())
    response = error_response(caught.value)
    error = json.loads(response.body)["error"]
    assert (response.status, error["code"], error["param"]) == (abuse.status, abuse.code, abuse.param)
    assert error["type"] == "invalid_request_error"
    assert len(response.body) < 700
    if abuse.param is not None:
        assert abuse.param.removesuffix("...") in error["message"]


@pytest.mark.parametrize("abuse", [a for a in ABUSES if a.level in ("engine", "connection")], ids=lambda a: a.name)
def test_what_others_refuse_passes_here(abuse: Abuse) -> None:
    MODELS[abuse.path].parse(abuse.made_body())


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda children: st.lists(children, max_size=3) | st.dictionaries(st.text(max_size=5), children, max_size=3),
    max_leaves=8,
)


@hypothesis.given(
    path=st.sampled_from(sorted(MODELS)),
    fields=st.dictionaries(
        st.sampled_from([*CompletionRequest.model_fields, *ChatCompletionRequest.model_fields, "tokens", "user", "?"]),
        VALUES,
        max_size=4,
    ),
    whole=st.booleans(),
)
def test_whatever_comes_is_taken_or_refused_in_a_sentence(path: str, fields: dict[str, Any], whole: bool) -> None:
    needed = {COMPLETIONS: {"prompt": "a"}, CHAT: {"messages": MESSAGES}, TOKENIZE: {}, DETOKENIZE: {"tokens": [1]}}
    body = json.dumps({**needed[path], **fields} if whole else fields).encode()
    try:
        request = MODELS[path].parse(body)
        if isinstance(request, CompletionRequest | ChatCompletionRequest):
            request.sampling_params(64)
    except (InvalidRequestError, pydantic.ValidationError) as error:
        response = error_response(error)
        assert response.status == 400
        message = json.loads(response.body)["error"]["message"]
        assert 0 < len(message) <= MAX_MESSAGE_CHARS


@hypothesis.given(st.binary(max_size=40))
def test_whatever_bytes_come_are_an_object_or_refused(body: bytes) -> None:
    with contextlib.suppress(InvalidBodyError):
        assert type(parse_json(body)) is dict


def test_nesting_is_allowed_up_to_its_limit() -> None:
    # {"a": [[...]]}: the object is one level, so MAX_DEPTH - 1 lists fit in it; siblings do not count.
    for num_lists, fits in ((MAX_DEPTH - 1, True), (MAX_DEPTH, False)):
        body = b'{"siblings": [' + b"[]," * 500 + b'[]], "a": ' + b"[" * num_lists + b"]" * num_lists + b"}"
        if fits:
            assert len(parse_json(body)["siblings"]) == 501
        else:
            with pytest.raises(InvalidBodyError, match=f"more than {MAX_DEPTH} deep"):
                parse_json(body)


def test_a_pair_of_surrogates_is_a_character() -> None:
    assert parse_completion(prompt="\U0001f600").prompt == ["\U0001f600"]
    assert b"\\ud83d\\ude00" in completion(prompt="\U0001f600")


def test_an_escaped_null_character_is_text() -> None:
    assert parse_completion(prompt="a\x00b").prompt == ["a\x00b"]


@pytest.mark.parametrize(
    ("field", "value", "passes", "fails"),
    [
        ("n", 4, RequestLimits(max_n=4), RequestLimits(max_n=3)),
        ("prompt", ["a", "b"], RequestLimits(max_prompts=2), RequestLimits(max_prompts=1)),
        ("stop", ["a", "b"], RequestLimits(max_stop=2), RequestLimits(max_stop=1)),
        ("stop_token_ids", [1, 2, 3], RequestLimits(max_stop=3), RequestLimits(max_stop=2)),
        ("logit_bias", {"1": 1, "2": 2}, RequestLimits(max_bias=2), RequestLimits(max_bias=1)),
    ],
)
def test_limits_name_value_and_limit(field: str, value: Any, passes: RequestLimits, fails: RequestLimits) -> None:
    body = completion(**{field: value})
    CompletionRequest.parse(body, passes)
    size = value if isinstance(value, int) else len(value)
    with pytest.raises(InvalidRequestError, match=rf"^{field} is '?{size}\b.* at most {size - 1}\b"):
        CompletionRequest.parse(body, fails)


# ---- the tables of names ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", [CompletionRequest, ChatCompletionRequest])
def test_each_name_stands_in_one_table(model: type[RequestModel]) -> None:
    fields, ignored, unimplemented = set(model.model_fields), set(model.ignored), set(model.unimplemented)
    assert not fields & ignored
    assert not fields & unimplemented
    assert not ignored & unimplemented


def test_each_field_of_the_openai_package_is_known() -> None:
    for model, theirs in (
        (CompletionRequest, completion_create_params.CompletionCreateParamsBase),
        (ChatCompletionRequest, chat_create_params.CompletionCreateParamsBase),
    ):
        known = {*model.model_fields, *model.ignored, *model.unimplemented}
        assert set(theirs.__annotations__) - known == set()
        assert len(theirs.__annotations__) > 15


UNIMPLEMENTED_CASES = [(completion, CompletionRequest, name) for name in COMPLETION_UNIMPLEMENTED] + [
    (chat, ChatCompletionRequest, name) for name in CHAT_UNIMPLEMENTED
]


@pytest.mark.parametrize(("make", "model", "name"), UNIMPLEMENTED_CASES)
def test_what_is_not_implemented_is_refused_unless_it_asks_for_nothing(make: Any, model: Any, name: str) -> None:
    plain = model.parse(make())
    for neutral in (None, *model.unimplemented[name]):
        assert model.parse(make(**{name: neutral})) == plain
    for value in ("something", 1.5, {"a": 1}, ["b"]):
        with pytest.raises(UnsupportedParameterError, match=f"^{name} is .*; this server does not implement it"):
            model.parse(make(**{name: value}))


def test_true_is_not_one() -> None:
    assert parse_completion(length_penalty=1) == parse_completion(stream_interval=1) == parse_completion()
    for fields in ({"length_penalty": True}, {"stream_interval": True}, {"watermarking": 0}):
        with pytest.raises(UnsupportedParameterError):
            parse_completion(**fields)


def test_fields_without_effect_have_none() -> None:
    taken = {
        "user": "me",
        "safety_identifier": "x",
        "metadata": {"a": "b"},
        "store": False,
        "service_tier": "auto",
        "prompt_cache_key": "k",
    }
    assert set(taken) == set(WITHOUT_EFFECT)
    for name, value in taken.items():
        assert parse_completion(**{name: value}) == parse_completion(**{name: None}) == parse_completion()
        assert parse_chat(**{name: value}) == parse_chat()
        for wrong in (5, {"a": 1}, True):
            with pytest.raises(UnsupportedParameterError, match=f"^{name} is"):
                parse_completion(**{name: wrong})


@pytest.mark.parametrize("model", [CompletionRequest, ChatCompletionRequest])
def test_null_means_not_given(model: Any) -> None:
    needed = {"prompt": "a"} if model is CompletionRequest else {"messages": MESSAGES}
    nulls = {name: None for name in model.model_fields if name not in needed}
    assert len(nulls) > 25
    assert model.parse(json.dumps({**nulls, **needed}).encode()) == model.parse(json.dumps(needed).encode())


@pytest.mark.parametrize("model", MODELS.values())
def test_every_field_is_described_in_the_schema(model: type[RequestModel]) -> None:
    properties = model.model_json_schema()["properties"]
    assert set(properties) == set(model.model_fields)
    assert all(entry.get("description") for entry in properties.values()), properties


# ---- what a request becomes ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("ab", ["ab"]),
        (["ab", "c"], ["ab", "c"]),
        ([5, 6], [[5, 6]]),
        ([[5], [6, 7]], [[5], [6, 7]]),
    ],
)
def test_each_shape_of_prompt(given: Any, expected: Any) -> None:
    request = parse_completion(prompt=given)
    assert request.prompt == expected
    tokenizer = made("byte_level_bpe")
    for prompt, encoded in zip(expected, request.prompts(tokenizer), strict=True):
        if isinstance(prompt, str):
            assert encoded == EncodedPrompt(tuple(tokenizer.encode(prompt)), prompt)
        else:
            assert encoded == EncodedPrompt(tuple(prompt), None)


def test_an_empty_text_is_a_prompt_only_where_the_tokenizer_adds_something() -> None:
    tokenizer = made("byte_level_bpe")
    (prompt,) = parse_completion(prompt="").prompts(tokenizer)
    assert prompt.token_ids == (tokenizer.token_to_id("<s>"),)
    with pytest.raises(InvalidPromptError, match="prompt 1 has 0 tokens"):
        parse_completion(prompt=["a", ""], add_special_tokens=False).prompts(tokenizer)


def test_sampling_params_carry_every_field() -> None:
    fields: dict[str, Any] = {
        "n": 3,
        "max_tokens": 20,
        "min_tokens": 2,
        "temperature": 1,
        "top_k": 5,
        "top_p": 0.5,
        "min_p": 0.1,
        "repetition_penalty": 1.1,
        "presence_penalty": 0.3,
        "frequency_penalty": -0.3,
        "logit_bias": {"7": 2},
        "allowed_token_ids": [1, 7],
        "stop": "x",
        "stop_token_ids": [9],
        "include_stop_str_in_output": True,
        "ignore_eos": True,
        "skip_special_tokens": False,
        "seed": 11,
    }
    expected = SamplingParams(**{**fields, "logit_bias": {7: 2.0}})
    assert parse_completion(**fields).sampling_params(99) == expected
    assert parse_chat(**fields).sampling_params(99) == expected
    assert type(expected.temperature) is int  # equal, but the request's is a float
    assert type(parse_completion(**fields).sampling_params().temperature) is float


def test_max_tokens_that_nobody_gave() -> None:
    assert CompletionRequest.parse(b'{"prompt": "a"}').sampling_params(99).max_tokens == 16
    body = json.dumps({"messages": MESSAGES}).encode()
    assert ChatCompletionRequest.parse(body).sampling_params(99).max_tokens == 99
    assert ChatCompletionRequest.parse(body).sampling_params().max_tokens is None
    assert parse_chat(max_tokens=None, max_completion_tokens=7).sampling_params(99).max_tokens == 7
    assert parse_chat(max_tokens=7, max_completion_tokens=7).sampling_params(99).max_tokens == 7
    assert [default_chat_max_tokens(prompt, 100, 30) for prompt in (10, 80, 99, 200)] == [30, 20, 1, 1]


def test_a_prompt_alone_still_needs_a_token() -> None:
    request = parse_completion(max_tokens=0, echo=True, logprobs=2)
    assert request.shows_prompt_alone
    params = request.sampling_params()
    assert (params.max_tokens, params.logprobs, params.prompt_logprobs) == (1, 2, 2)


def test_logprobs_in_both_shapes() -> None:
    assert [parse_completion(logprobs=k).num_logprobs for k in (None, 0, 3)] == [None, 0, 3]
    assert parse_completion(logprobs=3).sampling_params().prompt_logprobs is None
    chats = [{}, {"logprobs": True}, {"logprobs": True, "top_logprobs": 3}, {"logprobs": False, "top_logprobs": 0}]
    assert [parse_chat(**fields).num_logprobs for fields in chats] == [None, 0, 3, None]


@pytest.mark.parametrize(
    ("given", "used"), [(None, None), (-1, None), (5, 5), (-2, MAX_SEED - 1), (MAX_SEED, MAX_SEED)]
)
def test_seeds(given: int | None, used: int | None) -> None:
    assert parse_completion(seed=given).sampling_params().seed == used


def test_generate_requests_carry_what_is_no_sampling() -> None:
    request = parse_completion(n=2, priority=-3, cache_salt="tenant")
    requests = request.generate_requests("r-0", EncodedPrompt((1, 2), None), request.sampling_params())
    assert [r.choice_index for r in requests] == [0, 1]
    assert {(r.request_id, r.priority, r.cache_salt, r.prompt_token_ids) for r in requests} == {
        ("r-0", -3, "tenant", (1, 2))
    }


def test_a_chat_is_rendered() -> None:
    tokenizer = made("byte_level_bpe")
    messages = [
        {"role": "developer", "content": "be brief"},
        {"role": "user", "name": "ann", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        {"role": "assistant", "content": "c", "refusal": None, "tool_calls": None, "annotations": []},
    ]
    for fields, expected in (
        ({}, "[system]be brief[user ann]a\nb[assistant]c[assistant]"),
        ({"add_generation_prompt": False}, "[system]be brief[user ann]a\nb[assistant]c"),
        ({"continue_final_message": True}, "[system]be brief[user ann]a\nb[assistant]c"),
        ({"chat_template_kwargs": {"mood": "!"}}, "[system]be brief[user ann]a\nb[assistant]c![assistant]"),
    ):
        (prompt,) = parse_chat(messages=messages, **fields).prompts(tokenizer, TEMPLATE)
        assert prompt.text == expected
        assert prompt.token_ids == tuple(tokenizer.encode(expected, add_special_tokens=False))


def test_a_model_without_a_template_cannot_chat() -> None:
    with pytest.raises(InvalidRequestError, match="no chat template"):
        parse_chat().prompts(made("byte_level_bpe"), None)


def test_the_text_of_an_answer_goes_on_from_the_prompt_or_stands_alone() -> None:
    tokenizer = made("metaspace_bpe")  # drops the space before the first word of a text
    ids = tokenizer.encode("the quick", add_special_tokens=False)
    for request, prompt, expected in (
        (parse_completion(prompt="the quick"), EncodedPrompt(tuple(ids), "the quick"), " brown"),
        (parse_completion(prompt=ids), EncodedPrompt(tuple(ids), None), "brown"),
        (parse_completion(prompt=ids, echo=True), EncodedPrompt(tuple(ids), None), " brown"),
        (parse_chat(), EncodedPrompt(tuple(ids), "the quick"), "brown"),
        (parse_chat(continue_final_message=True), EncodedPrompt(tuple(ids), "the quick"), " brown"),
    ):
        stream = request.text_stream(tokenizer, request.sampling_params(16), prompt)
        delta = stream.push(tokenizer.encode("brown", add_special_tokens=False))
        assert delta.text == expected


def test_tokenize_takes_a_text_or_a_chat() -> None:
    tokenizer = made("byte_level_bpe")
    bos = tokenizer.token_to_id("<s>")

    def tokens(**fields: Any) -> list[int]:
        return TokenizeRequest.parse(json.dumps(fields).encode()).tokens(tokenizer, TEMPLATE)

    plain = tokenizer.encode("hello", add_special_tokens=False)
    assert tokens(prompt="hello") == [bos, *plain]
    assert tokens(prompt="hello", add_special_tokens=False) == plain
    chat_ids = tokenizer.encode("[user]hello[assistant]", add_special_tokens=False)
    assert tokens(messages=MESSAGES) == chat_ids
    assert tokens(messages=MESSAGES, add_special_tokens=True) == [bos, *chat_ids]
    for fields in ({"prompt": "a", "messages": MESSAGES}, {"prompt": "a", "continue_final_message": True}):
        with pytest.raises(InvalidRequestError):
            tokens(**fields)


def test_detokenize_takes_ids() -> None:
    assert DetokenizeRequest.parse(b'{"tokens": [3, 1]}').tokens == [3, 1]
    assert DetokenizeRequest.parse(b'{"tokens": []}').tokens == []
