"""Structured output through real engines: random schemas, models that know nothing, and every answer that stops is valid.

What a grammar is stands in tests/text, how masks are made in tests/runner; over HTTP: tests/api/test_json_answers.py.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable
from typing import Any

import jsonschema
import pytest

from serve_app.llm import LLM, Completion, SamplingParams
from serve_app.text.grammar import choice, grammar, json_object, json_schema, regex
from tests.random_schemas import random_schema
from tests.text.tokenizers_made import write_directory
from tests.tiny_models import make_tiny_model

NUM_SCHEMAS = 200
EOS = 2
"""</s> of the made tokenizer."""

MakeLLM = Callable[..., LLM]


@pytest.fixture(scope="module")
def make_llm(tmp_path_factory: pytest.TempPathFactory) -> MakeLLM:
    tokenizer = write_directory(tmp_path_factory.mktemp("tokenizer"))  # not the model's: grammars must mean this one
    made: dict[Any, LLM] = {}

    def make(seed: int, **options: Any) -> LLM:
        key = (seed, *options.items())
        if key not in made:
            directory = make_tiny_model(tmp_path_factory.mktemp("model"), seed=seed, vocab_size=350, eos=[EOS])
            options = {
                "num_kv_blocks": 800,
                "max_num_seqs": 32,
                "max_num_batched_tokens": 128,
                "deterministic": True,
                **options,
            }
            made[key] = LLM(directory, dtype="float32", block_size=16, num_threads=1, tokenizer=tokenizer, **options)
        return made[key]

    return make


def params(schema: Any, seed: int, **changes: Any) -> SamplingParams:
    """Hot, and drawn from all tokens: a greedy model that knows nothing says the same token for ever."""
    changes = {"max_tokens": 400, "temperature": 1.5, **changes}
    return SamplingParams(grammar=json_schema(schema), seed=seed, **changes)


def prompt(i: int) -> list[int]:
    return [(7 * i + j * j) % 300 + 5 for j in range(1 + i % 20)]


def check(answer: Completion, schema: Any) -> None:
    jsonschema.Draft202012Validator(schema).validate(json.loads(answer.text))


@pytest.mark.parametrize("seed", [2, 9])
def test_every_answer_that_stops_is_valid(make_llm: MakeLLM, seed: int) -> None:
    llm = make_llm(seed)
    rng = random.Random(seed)
    schemas = [random_schema(rng) for _ in range(NUM_SCHEMAS // 2)]
    requests = [params(schema, i) for i, schema in enumerate(schemas)]
    answers = llm.generate([prompt(i) for i in range(len(schemas))], requests, use_tqdm=False)
    stopped = [
        (answer, schema) for answer, schema in zip(answers, schemas, strict=True) if answer.finish_reason == "stop"
    ]
    for answer, schema in stopped:
        check(answer, schema)
    assert {answer.finish_reason for answer in answers} <= {"stop", "length"}
    assert len(stopped) > 0.8 * len(schemas)
    assert len({answer.text for answer in answers}) > 0.9 * len(schemas)  # one and the same answer would fit some
    assert any(len(answer.token_ids) > 100 for answer, _ in stopped)


def test_the_same_tokens_alone_and_in_a_batch_of_32(make_llm: MakeLLM) -> None:
    """Eight neighbours are free, and run before, beside and after the others. Nor does a small budget change a token."""
    rng = random.Random(3)
    schemas = [random_schema(rng) for _ in range(24)]
    requests = [params(schema, i, max_tokens=150, temperature=i % 2 * 1.5) for i, schema in enumerate(schemas)]
    requests[::3] = [
        SamplingParams(max_tokens=20 + 10 * i, temperature=1.0, seed=i, ignore_eos=True) if i % 3 == 0 else requests[i]
        for i in range(0, 24, 3)
    ]
    prompts = [prompt(i) for i in range(24)]
    llm = make_llm(2)
    num_steps = llm.engine.recorder.num_steps
    together = llm.generate([*prompts, *prompts[:8]], [*requests, *requests[:8]], use_tqdm=False)
    records = [record for record in llm.engine.recorder.records if record.index >= num_steps]
    assert max(record.num_running for record in records) == 32
    alone = [llm.generate([p], r, use_tqdm=False)[0] for p, r in zip(prompts, requests, strict=True)]
    narrow = make_llm(2, num_kv_blocks=30, max_num_seqs=5, max_num_batched_tokens=17)
    hostile = narrow.generate(prompts, requests, use_tqdm=False)
    for one, other, third in zip(alone, together, hostile, strict=False):
        assert one.token_ids == other.token_ids == third.token_ids
        assert (one.text, one.finish_reason) == (other.text, other.finish_reason) == (third.text, third.finish_reason)
    assert narrow.engine.scheduler.num_preemptions > 0


@pytest.mark.parametrize(
    ("text", "pattern"),
    [
        (regex(r"[A-F]{3}-\d{2,4}"), r"[A-F]{3}-\d{2,4}"),
        (choice(["red", "grün", "blue-green"]), "red|grün|blue-green"),
        (grammar('root ::= "(" [ab]{1,3} ("," [ab]{1,3})? ")"'), r"\([ab]{1,3}(,[ab]{1,3})?\)"),
        (grammar("start: /[0-9]{2}/ unit\nunit: \"kg\" | \"m\""), "[0-9]{2}(kg|m)"),
    ],
)  # fmt: skip
def test_other_grammars(make_llm: MakeLLM, text: str, pattern: str) -> None:
    sampling = SamplingParams(grammar=text, n=8, max_tokens=40, temperature=1.5, seed=5)
    answers = make_llm(2).generate("now:", sampling, use_tqdm=False)
    for answer in answers:
        assert answer.finish_reason == "stop"
        assert re.fullmatch(pattern, answer.text)
    assert len({answer.text for answer in answers}) > 1


def test_offline_as_the_readme_has_it(make_llm: MakeLLM) -> None:
    """ignore_eos, min_tokens and a bias against the end do not keep a finished sentence from ending it."""
    sampling = SamplingParams(
        grammar=choice(["yes", "no"]), max_tokens=20, ignore_eos=True, min_tokens=10, logit_bias={EOS: -100.0}
    )
    (answer,) = make_llm(2).generate("well?", sampling, use_tqdm=False)
    assert answer.text in ("yes", "no")
    assert answer.finish_reason == "stop"
    (answer,) = make_llm(2).generate("well?", SamplingParams(grammar=json_object(), max_tokens=3), use_tqdm=False)
    assert answer.finish_reason in ("length", "stop")
    assert answer.text.startswith("{")
