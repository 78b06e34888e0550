"""Every field of the request models changes what a real (tiny) model's answer is, through the engine and back.

The table EFFECTS must name each field: a field that is added and does nothing, or is forgotten here, fails.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from serve_app.api.answer_formats import TokenTexts
from serve_app.api.answers import make_answer
from serve_app.api.prompts import EncodedPrompt
from serve_app.api.protocol import ChatCompletionRequest, CompletionRequest
from serve_app.engine.request import SamplingParams
from serve_app.llm import LLM
from serve_app.text.chat_template import ChatTemplate
from serve_app.text.output_format import OutputFormat
from serve_app.text.parsed_stream import ParsedStream
from serve_app.text.reasoning_formats import REASONING_FORMATS
from serve_app.text.text_stream import TextStream
from serve_app.text.tool_formats import TOOL_FORMATS
from tests.api.abuses import MESSAGES
from tests.text.tokenizers_made import write_directory
from tests.tiny_models import make_tiny_model

Request = CompletionRequest | ChatCompletionRequest
Fields = dict[str, Any]
EOS, SPECIAL = 2, 4
"""</s> and <|im_end|> of the made tokenizer."""

BASE: dict[type[Request], Fields] = {
    CompletionRequest: {"prompt": "the quick brown fox jumps over the lazy dog, and so on"},
    ChatCompletionRequest: {"messages": MESSAGES},
}
SHARED: Fields = {"max_tokens": 12, "temperature": 0, "seed": 3, "ignore_eos": True}
TEMPLATE = ChatTemplate(
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}.{% endfor %}{{ mood }}"
    "{% if tools %}{{ tools | tojson }}{% endif %}{{ reasoning_effort }}"
    "{% if add_generation_prompt %}[assistant]{% endif %}{{ ending }}"
)
FORMAT = OutputFormat(
    next(format for format in TOOL_FORMATS if format.name == "hermes"),
    next(format for format in REASONING_FORMATS if format.name == "think"),
)
NO_ARGUMENTS = {"type": "object", "properties": {}, "additionalProperties": False}
TOOLS: Fields = {"tools": [{"type": "function", "function": {"name": "f", "parameters": NO_ARGUMENTS}}]}


@dataclasses.dataclass(frozen=True)
class Plain:
    """The answer to the base request."""

    token_ids: list[int]
    text: str


Change = Callable[[Plain], tuple[Fields, Fields]]
"""The plain answer -> fields without, and with, the one in question. Both go on top of the base."""


def given(with_it: Fields, without: Fields | None = None) -> Change:
    return lambda plain: (without or {}, {**(without or {}), **with_it})


def middle(plain: Plain) -> str:
    """A character of the answer that is not its first."""
    return next(character for character in plain.text[1:] if character != plain.text[0])


HOT = {"temperature": 2.0}
FEW = {**HOT, "allowed_token_ids": [70, 71, 72]}
ENDS = {"ignore_eos": False, "logit_bias": {str(EOS): 100}}
SPECIAL_ONLY = {"allowed_token_ids": [SPECIAL]}

SHARED_EFFECTS: dict[str, Change] = {
    "model": given({"model": "other"}),
    "n": given({"n": 2}, HOT),
    "max_tokens": given({"max_tokens": 5}),
    "min_tokens": lambda plain: (
        {"stop_token_ids": plain.token_ids[:1]},
        {"stop_token_ids": plain.token_ids[:1], "min_tokens": 3},
    ),
    "temperature": given(HOT),
    "top_p": given({"top_p": 0.01}, HOT),
    "top_k": given({"top_k": 1}, HOT),
    "min_p": given({"min_p": 1.0}, HOT),
    "repetition_penalty": given({"repetition_penalty": 50.0}),
    "presence_penalty": given({"presence_penalty": -2.0}, {**HOT, "allowed_token_ids": list(range(70, 90))}),
    "frequency_penalty": given({"frequency_penalty": 2.0}, FEW),
    "logit_bias": given({"logit_bias": {"70": 100}}),
    "allowed_token_ids": given({"allowed_token_ids": [70]}),
    "response_format": given({"response_format": {"type": "json_object"}}),
    "structured_outputs": given({"structured_outputs": {"choice": ["yes", "no"]}}),
    "stop": lambda plain: ({}, {"stop": middle(plain)}),
    "stop_token_ids": lambda plain: ({}, {"stop_token_ids": plain.token_ids[3:4]}),
    "include_stop_str_in_output": lambda plain: (
        {"stop": middle(plain)},
        {"stop": middle(plain), "include_stop_str_in_output": True},
    ),
    "ignore_eos": lambda plain: (ENDS, {**ENDS, "ignore_eos": True}),
    "skip_special_tokens": given({"skip_special_tokens": False}, SPECIAL_ONLY),
    "seed": given({"seed": 4}, HOT),
    "stream": given({"stream": True}),
    "stream_options": given({"stream_options": {"include_usage": True}}, {"stream": True}),
    "request_id": given({"request_id": "mine"}),
    "return_token_ids": given({"return_token_ids": True}),
}
EFFECTS: dict[type[Request], dict[str, Change]] = {
    CompletionRequest: {
        **SHARED_EFFECTS,
        "prompt": given({"prompt": "go on"}),
        "add_special_tokens": given({"add_special_tokens": False}),
        "echo": given({"echo": True}),
        "logprobs": given({"logprobs": 2}),
    },
    ChatCompletionRequest: {
        **SHARED_EFFECTS,
        "messages": given({"messages": [*MESSAGES, *MESSAGES]}),
        "max_completion_tokens": given({"max_tokens": None, "max_completion_tokens": 5}),
        "logprobs": given({"logprobs": True}),
        "top_logprobs": given({"top_logprobs": 2}, {"logprobs": True}),
        "add_generation_prompt": given({"add_generation_prompt": False}),
        "continue_final_message": given({"continue_final_message": True}),
        "chat_template_kwargs": given({"chat_template_kwargs": {"mood": "[glad]"}}),
        "tools": given(TOOLS),
        "tool_choice": given({"tool_choice": "required"}, TOOLS),
        "parallel_tool_calls": given(
            {"parallel_tool_calls": False},
            {**TOOLS, "tool_choice": "required", "max_tokens": 120, "chat_template_kwargs": {"ending": "</think>"}},
        ),
        "reasoning_effort": given({"reasoning_effort": "low"}),
        "include_reasoning": given({"include_reasoning": False}, {"chat_template_kwargs": {"ending": "<think>"}}),
    },
}
ELSEWHERE = {
    "priority": "test_priority_decides_who_is_first",
    "cache_salt": "test_a_salt_keeps_prefixes_apart",
    "best_of": "must equal n, and is refused where it does not: a test of test_protocol.py",
}
"""Fields whose effect needs another request beside."""


@pytest.fixture(scope="module")
def tokenizer_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_directory(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("model"), seed=2, vocab_size=350, eos=[EOS])


def make_llm(directory: Path, tokenizer_directory: Path, **options: Any) -> LLM:
    options = {"num_kv_blocks": 60, "max_num_seqs": 4, "max_num_batched_tokens": 64, **options}
    return LLM(directory, dtype="float32", block_size=16, num_threads=1, tokenizer=tokenizer_directory, **options)


@pytest.fixture(scope="module")
def llm(directory: Path, tokenizer_directory: Path) -> LLM:
    return make_llm(directory, tokenizer_directory)


class Running:
    """One request on its way through an engine, as an ingress would lead it."""

    def __init__(self, llm: LLM, request: Request, request_id: str = "r") -> None:
        tokenizer = llm._need_tokenizer("a service")
        self.llm = llm
        self.request_id = request.request_id or request_id
        self.prompts: list[EncodedPrompt] = request.prompts(tokenizer, TEMPLATE)
        self.answer = make_answer(
            request,
            request_id=self.request_id,
            created=1,
            model=request.model or "tiny",
            prompts=self.prompts,
            token_texts=TokenTexts(tokenizer),
            counts_reasoning=True,
        )
        params = request.sampling_params(64).resolved(llm.generation_config)
        grammars = request.grammars(self.prompts[0], FORMAT)
        params = dataclasses.replace(params, seed=params.seed or 0, grammar=None if grammars is None else grammars.text)
        self.sampling: SamplingParams = params
        self.texts: dict[tuple[str, int], TextStream | ParsedStream] = {}
        self.data = b""
        for p, prompt in enumerate(self.prompts):
            group = request.generate_requests(f"{self.request_id}-{p}", prompt, params)
            llm.engine.add(group)
            for one in group:
                self.texts[one.request_id, one.choice_index] = request.text_stream(
                    tokenizer, params, prompt, output_format=FORMAT
                )

    def take(self, output: Any) -> None:
        text = self.texts.get((output.request_id, output.choice_index))
        if text is None:
            return
        delta = text.push(output.token_ids, output.finish_reason, output.stop_token_id)
        if delta.finish_reason is not None and output.finish_reason is None:
            self.llm.engine.abort(output.request_id, output.choice_index)
        self.data += self.answer.push(int(output.request_id.rsplit("-", 1)[1]), delta, output)


def run_all(llm: LLM, *running: Running) -> list[bytes]:
    """The answers, in full; in the order in which the requests came to their end."""
    ended: list[Running] = []
    while llm.engine.has_work:
        for output in llm.engine.step():
            for one in running:
                one.take(output)
        ended += [one for one in running if one.answer.has_ended and one not in ended]
    assert len(ended) == len(running)
    return [one.data + one.answer.end() for one in ended]


def parse(model: type[Request], fields: Fields) -> Request:
    return model.parse(json.dumps({**BASE[model], **SHARED, **fields}).encode())


def without_hits(data: bytes) -> bytes:
    """The second of two requests finds the first one's prompt in the cache; that is no effect of a field."""
    start = data.find(b'"prompt_tokens_details"')
    return data if start < 0 else data[:start] + data[data.index(b"}", start) :]


@pytest.mark.parametrize("model", EFFECTS)
def test_the_table_names_every_field(model: type[Request]) -> None:
    assert sorted({*EFFECTS[model], *ELSEWHERE} - ({"best_of"} - model.model_fields.keys())) == sorted(
        model.model_fields
    )


@pytest.mark.parametrize(("model", "field"), [(model, field) for model, table in EFFECTS.items() for field in table])
def test_a_field_has_an_effect(llm: LLM, model: type[Request], field: str) -> None:
    (plain_answer,) = run_all(llm, Running(llm, parse(model, {"return_token_ids": True})))
    (choice,) = json.loads(plain_answer)["choices"]
    plain = Plain(choice["token_ids"], choice.get("text") or choice["message"]["content"])
    assert len(plain.token_ids) == 12

    without, with_it = EFFECTS[model][field](plain)
    assert field in with_it
    answers = [
        without_hits(run_all(llm, Running(llm, parse(model, fields)))[0]) for fields in (without, without, with_it)
    ]
    assert answers[0] == answers[1], "the same request gave two answers"
    assert answers[1] != answers[2], f"{field} changed nothing"


def test_priority_decides_who_is_first(directory: Path, tokenizer_directory: Path) -> None:
    llm = make_llm(directory, tokenizer_directory, max_num_seqs=1)
    for priorities, first in (((0, 0), b"one"), ((1, 0), b"two"), ((0, -1), b"two"), ((-1, 0), b"one")):
        running = [
            Running(llm, parse(CompletionRequest, {"priority": priority, "request_id": name}))
            for priority, name in zip(priorities, ("one", "two"), strict=True)
        ]
        assert b'"cmpl-' + first + b'"' in run_all(llm, *running)[0]


def test_a_salt_keeps_prefixes_apart(directory: Path, tokenizer_directory: Path) -> None:
    llm = make_llm(directory, tokenizer_directory)

    def num_cached(salt: str) -> int:
        fields = {"cache_salt": salt, "prompt": list(range(10, 60))}
        (data,) = run_all(llm, Running(llm, parse(CompletionRequest, fields)))
        number: int = json.loads(data)["usage"]["prompt_tokens_details"]["cached_tokens"]
        return number

    assert [num_cached(salt) for salt in ("a", "a", "b", "b", "a")] == [0, 48, 0, 48, 48]
