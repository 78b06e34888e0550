"""Answers: the bytes of streams and bodies, in both formats, and that a stream tells what a body tells."""

from __future__ import annotations

import json
import random
from typing import Any

import pytest
from openai.lib.streaming.chat import ChatCompletionStreamState
from openai.types import Completion
from openai.types.chat import ChatCompletion, ChatCompletionChunk

from serve_app.api.answer_formats import TokenTexts
from serve_app.api.answers import DONE, Answer, detokenize_body, make_answer, tokenize_body
from serve_app.api.prompts import EncodedPrompt
from serve_app.api.protocol import ChatCompletionRequest, CompletionRequest
from serve_app.engine.request import FinishReason, TokenLogprobs, TokenOutput
from serve_app.text.output_parser import ToolCallDelta
from serve_app.text.text_stream import Parsed, TextDelta
from tests.api.abuses import chat, completion
from tests.text.tokenizers_made import MAKERS, byte_ids, made

Request = CompletionRequest | ChatCompletionRequest
TOKENIZER = made("byte_level_bpe")
HEAD = {"created": 17, "model": 'a "model"'}
TRICKY = 'a "quote" \\ \n \u2028 \x85 \x00 日本 \U0001f600 "content":"?" "text":"?"'


def parse(kind: str, **fields: Any) -> Request:
    if kind == "chat":
        return ChatCompletionRequest.parse(chat(**fields))
    return CompletionRequest.parse(completion(**fields))


def answer_for(request: Request, prompts: list[EncodedPrompt] | None = None, **options: Any) -> Answer:
    prompts = prompts or [EncodedPrompt((1, 2, 3), "hi?")]
    options = {"token_texts": TokenTexts(TOKENIZER), "prompts": prompts, "request_id": "r1", **HEAD, **options}
    return make_answer(request, **options)


def output(choice: int = 0, ids: tuple[int, ...] = (), **fields: Any) -> TokenOutput:
    return TokenOutput("r1", choice, ids, **fields)


def events_of(data: bytes) -> list[Any]:
    events = data.split(b"\n\n")
    assert events.pop() == b""
    assert all(event.startswith(b"data: ") and b"\n" not in event for event in events)
    return [json.loads(event[6:]) if event != b"data: [DONE]" else "DONE" for event in events]


def logprobs_of(ids: tuple[int, ...], num_top: int) -> tuple[TokenLogprobs, ...]:
    return tuple(TokenLogprobs(i, -i / 8, tuple((i + k, -k / 8) for k in range(num_top))) for i in ids)


# ---- the plain delta -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["completion", "chat"])
@pytest.mark.parametrize("usage", [False, True])
def test_a_plain_delta_has_the_bytes_of_the_documented_structure(kind: str, usage: bool) -> None:
    fields = {"stream_options": {"include_usage": True}} if usage else {}
    answer = answer_for(parse(kind, stream=True, n=2, **fields), system_fingerprint='"text":"?"')
    for choice in (1, 0):
        answer.push(0, TextDelta("first", 1), output(choice, (9,)))
        data = answer.push(0, TextDelta(TRICKY, 1), output(choice, (8,)))
        text = {"delta": {"content": TRICKY}} if kind == "chat" else {"text": TRICKY}
        chunk = {
            "id": "chatcmpl-r1" if kind == "chat" else "cmpl-r1",
            "object": "chat.completion.chunk" if kind == "chat" else "text_completion",
            **HEAD,
            "system_fingerprint": '"text":"?"',
            "choices": [{"index": choice, **text, "logprobs": None, "finish_reason": None}],
            **({"usage": None} if usage else {}),
        }
        assert data == b"data: " + json.dumps(chunk, separators=(",", ":")).encode() + b"\n\n"
        assert data.isascii()
        assert len(data.decode().splitlines()) == 2  # no character in it ends a line, for any reader
        assert answer._choices[choice].before, "the short way was not taken"


@pytest.mark.parametrize("kind", ["completion", "chat"])
def test_text_that_is_held_back_makes_no_event_and_counts(kind: str) -> None:
    answer = answer_for(parse(kind, stream=True))
    answer.push(0, TextDelta("a", 1), output(0, (9,)))
    assert answer.push(0, TextDelta("", 2), output(0, (8, 7))) == b""
    assert answer.usage()["completion_tokens"] == 3


# ---- streams ---------------------------------------------------------------------------------------------------------


def test_the_events_of_a_chat() -> None:
    answer = answer_for(parse("chat", stream=True, stream_options={"include_usage": True}, stop_token_ids=[7]))
    assert answer.media_type == "text/event-stream"
    data = answer.push(0, TextDelta("a", 1), output(0, (9,), num_cached_tokens=2))
    data += answer.push(0, TextDelta("b", 1), output(0, (8,), num_cached_tokens=2))
    assert not answer.has_ended
    data += answer.push(0, TextDelta("", 1, FinishReason.STOP), output(0, (7,), stop_token_id=7))
    assert answer.has_ended
    data += answer.end()
    *chunks, done = events_of(data)
    assert done == "DONE"
    assert all(ChatCompletionChunk.model_validate(chunk).model == HEAD["model"] for chunk in chunks)
    plain = {"index": 0, "logprobs": None, "finish_reason": None}
    assert [chunk["choices"] for chunk in chunks] == [
        [{**plain, "delta": {"role": "assistant", "content": ""}}],
        [{**plain, "delta": {"content": "a"}}],
        [{**plain, "delta": {"content": "b"}}],
        [{**plain, "delta": {}, "finish_reason": "stop", "stop_reason": 7}],
        [],
    ]
    usage = {
        "prompt_tokens": 3,
        "completion_tokens": 3,
        "total_tokens": 6,
        "prompt_tokens_details": {"cached_tokens": 2},
    }
    assert [chunk["usage"] for chunk in chunks] == [None, None, None, None, usage]


@pytest.mark.parametrize("fields", [{}, {"return_token_ids": True, "logprobs": True}])
def test_a_call_and_its_end_come_in_two_events(fields: dict[str, Any]) -> None:
    """Also where all is there at once: the openai package tells nobody that a call is done that began with its end."""
    answer = answer_for(parse("chat", stream=True, **fields))
    calls = (ToolCallDelta(0, "f", "{}"), ToolCallDelta(1, "g", "{}"))
    delta = TextDelta("I look.", 2, FinishReason.STOP, parsed=Parsed(tool_calls=calls, has_called=True))
    logprobs = logprobs_of((8, 9), 0) if fields else None
    chunks = events_of(answer.push(0, delta, output(0, (8, 9), logprobs=logprobs)))
    role, called, ended = (chunk["choices"][0] for chunk in chunks)
    assert role["delta"] == {"role": "assistant", "content": ""}
    assert called["delta"]["content"] == "I look."
    assert [call["function"] for call in called["delta"]["tool_calls"]] == [
        {"name": "f", "arguments": "{}"},
        {"name": "g", "arguments": "{}"},
    ]
    assert (called["finish_reason"], called.get("token_ids")) == (None, [8, 9] if fields else None)
    assert len((called["logprobs"] or {"content": []})["content"]) == (2 if fields else 0)
    assert (ended["delta"], ended["finish_reason"], ended["logprobs"]) == ({}, "tool_calls", None)
    assert ended.get("token_ids") == ([] if fields else None)

    state = ChatCompletionStreamState()
    events = [event for chunk in chunks for event in state.handle_chunk(ChatCompletionChunk.model_validate(chunk))]
    assert [event.name for event in events if event.type == "tool_calls.function.arguments.done"] == ["f", "g"]


def test_the_events_of_a_completion() -> None:
    answer = answer_for(parse("completion", stream=True))
    data = answer.push(0, TextDelta("", 1), output(0, (9,)))
    assert data == b""
    data += answer.push(0, TextDelta("ab", 1), output(0, (8,)))
    data += answer.push(0, TextDelta("c", 1, FinishReason.STOP, "STOP"), output(0, (7,)))
    data += answer.push(0, TextDelta(), output(0, (6,)))
    data += answer.push(
        0, TextDelta("late", 1, FinishReason.LENGTH), output(0, (6,), finish_reason=FinishReason.LENGTH)
    )
    assert answer.end() == DONE
    chunks = events_of(data)
    assert all("usage" not in chunk and Completion.model_construct(**chunk).id == "cmpl-r1" for chunk in chunks)
    assert [chunk["choices"] for chunk in chunks] == [
        [{"index": 0, "text": "ab", "logprobs": None, "finish_reason": None}],
        [{"index": 0, "text": "c", "logprobs": None, "finish_reason": "stop", "stop_reason": "STOP"}],
    ]
    assert answer.usage()["completion_tokens"] == 3


def test_an_eos_token_is_no_stop_reason() -> None:
    answer = answer_for(parse("completion", stop_token_ids=[5]))
    answer.push(0, TextDelta("a", 1, FinishReason.STOP), output(0, (7,), stop_token_id=7))
    (choice,) = json.loads(answer.end())["choices"]
    assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", None)


def test_usage_in_every_event() -> None:
    answer = answer_for(parse("completion", stream=True, stream_options={"continuous_usage_stats": True}))
    data = answer.push(0, TextDelta("a", 1), output(0, (9,)))
    data += answer.push(0, TextDelta("", 1), output(0, (8,)))
    data += answer.push(0, TextDelta("b", 2, FinishReason.LENGTH), output(0, (7, 6)))
    assert [chunk["usage"]["total_tokens"] for chunk in events_of(data)] == [4, 5, 7]


def test_prompts_and_choices_are_numbered_on() -> None:
    prompts = [EncodedPrompt((1,), "a"), EncodedPrompt((1, 2), "b")]
    request = parse("completion", prompt=["a", "b"], n=3)
    answer = answer_for(request, prompts)
    for prompt in (1, 0):
        for choice in (2, 0, 1):
            cached = 1 if choice == 0 else 99  # what a choice finds that its own sibling put there is no saving
            delta = TextDelta(f"{prompt}{choice}", 1, FinishReason.LENGTH)
            assert answer.push(prompt, delta, output(choice, (9,), num_cached_tokens=cached)) == b""
    body = json.loads(answer.end())
    assert [(c["index"], c["text"]) for c in body["choices"]] == list(enumerate(["00", "01", "02", "10", "11", "12"]))
    assert body["usage"] == {
        "prompt_tokens": 3,
        "completion_tokens": 6,
        "total_tokens": 9,
        "prompt_tokens_details": {"cached_tokens": 2},
    }


# ---- whole bodies, and that both tell the same -----------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["completion", "chat"])
def test_a_body_is_what_the_openai_package_expects(kind: str) -> None:
    fields: dict[str, Any] = {"logprobs": 2} if kind == "completion" else {"logprobs": True, "top_logprobs": 2}
    answer = answer_for(parse(kind, **fields))
    assert answer.media_type == "application/json"
    answer.push(0, TextDelta("ab", 2), output(0, (65, 66), logprobs=logprobs_of((65, 66), 2)))
    answer.push(0, TextDelta("c", 1, FinishReason.LENGTH), output(0, (67,), logprobs=logprobs_of((67,), 2)))
    body = answer.end()
    if kind == "chat":
        parsed = ChatCompletion.model_validate_json(body, strict=True)
        assert parsed.object == "chat.completion"
        assert parsed.choices[0].message.content == "abc"
        assert len(parsed.choices[0].logprobs.content) == 3  # type: ignore[union-attr,arg-type]
    else:
        whole = Completion.model_validate_json(body, strict=True)
        assert whole.choices[0].text == "abc"
        assert len(whole.choices[0].logprobs.tokens) == 3  # type: ignore[union-attr,arg-type]


def joined(events: list[Any]) -> list[dict[str, Any]]:
    """The choices that a client puts together from the chunks of a stream."""
    choices: dict[int, dict[str, Any]] = {}
    for chunk in events:
        for part in chunk["choices"]:
            whole = choices.setdefault(part["index"], {"text": "", "token_ids": [], "logprobs": {}, "prompt": None})
            whole["text"] += part["text"] if "text" in part else part["delta"].get("content", "")
            whole["token_ids"] += part.get("token_ids", [])
            for name, values in (part["logprobs"] or {}).items():
                whole["logprobs"].setdefault(name, []).extend(values)
            whole["prompt"] = part.get("prompt_token_ids", chunk.get("prompt_token_ids", whole["prompt"]))
            whole["finish"] = (part["finish_reason"], part.get("stop_reason"))
    return [choices[index] for index in sorted(choices)]


@pytest.mark.parametrize("kind", ["completion", "chat"])
@pytest.mark.parametrize("seed", range(6))
def test_a_stream_tells_what_a_body_tells(kind: str, seed: int) -> None:
    rng = random.Random(seed)
    prompts = [EncodedPrompt(tuple(TOKENIZER.encode(text)), text) for text in ("the fox", "日本 €")]
    prompts = prompts if kind == "completion" else prompts[:1]
    fields: dict[str, Any] = {"n": 2, "max_tokens": 99, "return_token_ids": rng.random() < 0.7, "stop": ["own f"]}
    with_logprobs = rng.random() < 0.7
    if kind == "completion":
        fields |= {
            "prompt": ["the fox", "日本 €"],
            "echo": rng.random() < 0.6,
            "logprobs": 2 if with_logprobs else None,
        }
    else:
        fields |= {"logprobs": with_logprobs}
    whole_request, stream_request = parse(kind, **fields), parse(kind, stream=True, **fields)
    whole, streamed = answer_for(whole_request, prompts), answer_for(stream_request, prompts)

    data, cut = b"", 0
    params = whole_request.sampling_params(99)
    for p, prompt in enumerate(prompts):
        for choice in range(2):
            text = whole_request.text_stream(TOKENIZER, params, prompt)
            ids = TOKENIZER.encode(
                rng.choice(("the brown fox, the end", "日本語 😀😀 😀", "go on")), add_special_tokens=False
            )
            is_first = True
            while ids:
                size = rng.randint(1, 3)
                step, ids = tuple(ids[:size]), ids[size:]
                reason = None if ids else FinishReason.LENGTH
                out = output(
                    choice,
                    step,
                    logprobs=logprobs_of(step, 2 if kind == "completion" else 0) if with_logprobs else None,
                    prompt_logprobs=(None, *logprobs_of(prompt.token_ids[1:], 2))
                    if with_logprobs and is_first and fields.get("echo")
                    else None,
                    finish_reason=reason,
                )
                delta = text.push(out.token_ids, out.finish_reason)
                cut += delta.stop_string is not None
                assert whole.push(p, delta, out) == b""
                data += streamed.push(p, delta, out)
                is_first = False
    assert streamed.end() == DONE
    body = json.loads(whole.end())
    expected = [
        {
            "text": c["text"] if kind == "completion" else c["message"]["content"],
            "token_ids": c.get("token_ids", []),
            "logprobs": c["logprobs"] or {},
            "prompt": c.get("prompt_token_ids", body.get("prompt_token_ids")),
            "finish": (c["finish_reason"], c["stop_reason"]),
        }
        for c in body["choices"]
    ]
    assert joined(events_of(data)) == expected
    assert whole.usage() == streamed.usage() == body["usage"]
    assert len(expected) == 2 * len(prompts)


def test_a_cut_by_a_stop_string_cuts_ids_and_logprobs() -> None:
    answer = answer_for(parse("completion", stop="x", logprobs=0, return_token_ids=True))
    answer.push(
        0, TextDelta("a", 2, FinishReason.STOP, "x"), output(0, (65, 66, 67), logprobs=logprobs_of((65, 66, 67), 0))
    )
    (choice,) = json.loads(answer.end())["choices"]
    assert choice["token_ids"] == [65, 66]
    assert [len(values) for values in choice["logprobs"].values()] == [2, 2, 2, 2]
    assert (choice["stop_reason"], answer.usage()["completion_tokens"]) == ("x", 2)


# ---- echo and logprobs -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("given_as_ids", [False, True])
def test_echo_with_logprobs(given_as_ids: bool) -> None:
    text = "the quick"
    ids = tuple(TOKENIZER.encode(text, add_special_tokens=False))
    assert len(ids) > 1
    more = tuple(TOKENIZER.encode(" brown fox", add_special_tokens=False))
    request = parse("completion", prompt=list(ids) if given_as_ids else text, echo=True, logprobs=1)
    answer = answer_for(request, [EncodedPrompt(ids, None if given_as_ids else text)])
    first = output(0, more, logprobs=logprobs_of(more, 1), prompt_logprobs=(None, *logprobs_of(ids[1:], 1)))
    answer.push(0, TextDelta(" brown fox", len(more), FinishReason.LENGTH), first)
    (choice,) = json.loads(answer.end())["choices"]
    assert choice["text"] == "the quick brown fox"
    logprobs = choice["logprobs"]
    assert "".join(logprobs["tokens"]) == choice["text"]
    for token, start in zip(logprobs["tokens"], logprobs["text_offset"], strict=True):
        assert choice["text"].startswith(token, start)
    assert logprobs["text_offset"] == sorted(set(logprobs["text_offset"]))
    assert logprobs["token_logprobs"][0] is None
    assert logprobs["top_logprobs"][0] is None
    assert None not in logprobs["token_logprobs"][1:]
    assert answer.usage()["completion_tokens"] == len(more)


@pytest.mark.parametrize("stream", [False, True])
def test_the_prompt_alone(stream: bool) -> None:
    answer = answer_for(parse("completion", max_tokens=0, echo=True, logprobs=0, stream=stream, return_token_ids=True))
    last = output(0, (9,), logprobs=logprobs_of((9,), 0), prompt_logprobs=(None, *logprobs_of((2, 3), 0)))
    data = answer.push(0, TextDelta("x", 1, FinishReason.STOP), last)
    (choice,) = events_of(data)[0]["choices"] if stream else json.loads(answer.end())["choices"]
    assert (choice["text"], choice["finish_reason"], choice["token_ids"]) == ("hi?", "length", [])
    assert len(choice["logprobs"]["tokens"]) == 3
    assert answer.usage()["completion_tokens"] == 0


def test_offsets_wait_for_a_character_that_comes_in_parts() -> None:
    ids = tuple(byte_ids(TOKENIZER, "é€!".encode()))
    assert len(ids) == 6
    answer = answer_for(parse("completion", logprobs=0), [EncodedPrompt((1,), None)])
    for token_id in ids:
        answer.push(0, TextDelta("", 1), output(0, (token_id,), logprobs=logprobs_of((token_id,), 0)))
    (choice,) = json.loads(answer.end())["choices"]
    assert choice["logprobs"]["text_offset"] == [0, 0, 1, 1, 1, 2]


def test_logprobs_of_a_chat_have_true_bytes() -> None:
    ids = tuple(byte_ids(TOKENIZER, "€".encode()))
    answer = answer_for(parse("chat", logprobs=True, top_logprobs=1))
    entries = tuple(TokenLogprobs(i, float("-inf"), ((65, -0.5),)) for i in ids)
    answer.push(0, TextDelta("€", 3, FinishReason.LENGTH), output(0, ids, logprobs=entries))
    (choice,) = json.loads(answer.end())["choices"]
    content = choice["logprobs"]["content"]
    assert bytes(byte for entry in content for byte in entry["bytes"]) == "€".encode()
    assert [entry["token"] for entry in content] == ["\ufffd"] * 3
    assert {entry["logprob"] for entry in content} == {-9999.0}
    text = TokenTexts(TOKENIZER).text(65)
    assert content[0]["top_logprobs"] == [{"token": text, "logprob": -0.5, "bytes": list(text.encode())}]


def test_of_tokens_that_read_the_same_the_likelier_one_is_told() -> None:
    first, second = byte_ids(TOKENIZER, b"\xe2\x82")
    answer = answer_for(parse("completion", logprobs=2))
    entry = TokenLogprobs(first, -0.1, ((first, -0.1), (second, -2.0)))
    answer.push(0, TextDelta("", 1, FinishReason.LENGTH), output(0, (first,), logprobs=(entry,)))
    assert json.loads(answer.end())["choices"][0]["logprobs"]["top_logprobs"] == [{"\ufffd": -0.1}]


@pytest.mark.parametrize("kind", sorted(MAKERS))
def test_texts_of_single_tokens_join_to_the_text(kind: str) -> None:
    tokenizer = made(kind)
    texts = TokenTexts(tokenizer)
    ids = tokenizer.encode("the quick brown fox jumps", add_special_tokens=False)
    # The last kind marks the ends of words, and shows no space at the end of a text.
    expected = "thequickbrownfoxjumps" if kind == "suffix_bpe" else "the quick brown fox jumps"
    assert "".join(texts.text(token_id) for token_id in ids).strip() == expected
    assert b"".join(bytes(texts.utf8(token_id)) for token_id in ids).decode().strip() == expected
    assert texts.text(tokenizer.vocab_size + 5) == ""
    assert texts.utf8(tokenizer.vocab_size + 5) == []


@pytest.mark.parametrize("kind", ["byte_level_bpe", "metaspace_bpe"])
def test_bytes_of_tokens_that_are_parts_of_characters(kind: str) -> None:
    tokenizer = made(kind)
    texts = TokenTexts(tokenizer)
    data = bytes(range(0x80, 0x100))
    ids = byte_ids(tokenizer, data)
    assert len(ids) == len(data)
    assert [texts.utf8(token_id) for token_id in ids] == [[byte] for byte in data]


def test_token_ids_are_returned() -> None:
    body = json.loads(_ended("chat").end())
    assert body["prompt_token_ids"] == [1, 2, 3]
    assert body["choices"][0]["token_ids"] == [65]
    (choice,) = json.loads(_ended("completion").end())["choices"]
    assert (choice["prompt_token_ids"], choice["token_ids"]) == ([1, 2, 3], [65])


def _ended(kind: str) -> Answer:
    answer = answer_for(parse(kind, return_token_ids=True))
    answer.push(0, TextDelta("a", 1, FinishReason.LENGTH), output(0, (65,)))
    return answer


def test_tokenize_and_detokenize() -> None:
    assert json.loads(tokenize_body([1, 2], 99)) == {
        "count": 2,
        "max_model_len": 99,
        "tokens": [1, 2],
        "token_strs": None,
    }
    ids = TOKENIZER.encode("the fox", add_special_tokens=False)
    assert "".join(json.loads(tokenize_body(ids, 99, TokenTexts(TOKENIZER)))["token_strs"]) == "the fox"
    assert json.loads(detokenize_body(TRICKY)) == {"prompt": TRICKY}
