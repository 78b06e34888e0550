"""Grammars in steps that a model runs: the same tokens alone, in company, preempted, replayed, with one step in flight and
with two. Tiny models with random weights: nothing but the mask makes their output a sentence."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from serve_app.engine.engine import Engine
from serve_app.engine.request import FinishReason, GenerateRequest
from serve_app.engine.scheduler import Key
from serve_app.errors import InvalidParameterError
from serve_app.llm import LLM, SamplingParams
from serve_app.runner import cuda_device, model_runner
from serve_app.runner.constraints import Constraints
from serve_app.runner.model_runner import ModelRunner
from serve_app.text import grammar
from serve_app.text.tokenizer import Tokenizer
from tests.runner.fake_gpu import FakeGpu, GreedySampler
from tests.tiny_models import IM_END, make_tiny_model
from tests.tiny_runs import Answer, make_engine, make_request, make_runner, run

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "kind": {"enum": ["fox", "dog"]},
        "ages": {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": 99}, "maxItems": 3},
    },
    "required": ["name", "kind", "ages"],
    "additionalProperties": False,
}
JSON = grammar.json_schema(SCHEMA)
DIGITS = grammar.regex("[0-9]{1,12}")
LETTERS = grammar.regex("[a-f]+")
"""Goes on for ever."""
OPTIONS: dict[str, Any] = {
    "num_kv_blocks": 240,
    "block_size": 16,
    "max_num_seqs": 33,
    "max_num_batched_tokens": 64,
    "max_model_len": 200,
}


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("model"), "Qwen3ForCausalLM", seed=3, layers=1, heads=3, kv_heads=1)


@pytest.fixture(scope="module")
def tokenizer(directory: Path) -> Tokenizer:
    return Tokenizer.from_directory(directory)


@pytest.fixture(scope="module")
def cpu_runner(directory: Path) -> ModelRunner:
    return make_runner(directory, deterministic=True, **OPTIONS)


@pytest.fixture(scope="module")
def gpu_runner(directory: Path) -> Iterator[ModelRunner]:
    """Two steps in flight, on CPU tensors; every row is greedy."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model_runner, "find_gpu", lambda name: FakeGpu() if name == "cuda" else None)
        patch.setattr(cuda_device, "DeviceSampler", GreedySampler)
        runner = make_runner(directory, device="cuda", **OPTIONS)
        assert runner.max_steps_in_flight == 2
        yield runner


def prompt_of(salt: int, length: int = 9) -> list[int]:
    return [(37 * i + 11 * salt + 5) % 250 for i in range(length)]


def constrained(name: str, text: str = JSON, **options: Any) -> GenerateRequest:
    return make_request(name, prompt_of(ord(name[-1])), **{"grammar": text, "max_tokens": 90, **options})


def company(num: int) -> list[GenerateRequest]:
    return [
        make_request(
            f"free{i}", prompt_of(i, 3 + i % 7), max_tokens=20 + i, temperature=float(i % 2), top_p=0.9, seed=i
        )
        for i in range(num)
    ]


def tokens(answers: dict[Key, Answer]) -> dict[Key, list[int]]:
    assert all(answer.error is None for answer in answers.values())
    return {key: answer.token_ids for key, answer in answers.items()}


def check_json(tokenizer: Tokenizer, answer: Answer) -> None:
    assert answer.finish_reason is FinishReason.STOP
    assert answer.stop_token_id is None, "no eos was spent"
    value = json.loads(tokenizer.decode(answer.token_ids, skip_special_tokens=False))
    assert list(value) == ["name", "kind", "ages"]
    assert value["kind"] in ("fox", "dog")
    assert all(0 <= age <= 99 for age in value["ages"])


# ---- the same tokens ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_alone_and_in_a_batch_of_32_with_free_neighbours(
    cpu_runner: ModelRunner, tokenizer: Tokenizer, temperature: float
) -> None:
    kind = {"temperature": temperature, "seed": 5}
    ours = [
        constrained("a", **kind),
        constrained("b", DIGITS, **kind),
        constrained("c", LETTERS, max_tokens=30, **kind),
    ]
    alone = {key: answer for one in ours for key, answer in run(make_engine(cpu_runner), [one]).items()}
    check_json(tokenizer, alone["a", 0])
    assert alone["c", 0].finish_reason is FinishReason.LENGTH
    free = company(29)
    free_alone = tokens(run(make_engine(cpu_runner), free))
    engine = make_engine(cpu_runner)
    together = run(engine, [*free[:14], *ours, *free[14:]], arrivals={3: 4, 20: 7})
    assert max(len(record.sequences) for record in engine.recorder.records) == 32
    assert tokens(together) == {**tokens(alone), **free_alone}
    assert [together[key].finish_reason for key in alone] == [answer.finish_reason for answer in alone.values()]
    assert all(record.seconds["masks"] >= 0.0 for record in engine.recorder.records if "masks" in record.seconds)
    assert any("masks" in record.seconds for record in engine.recorder.records)


@pytest.mark.parametrize("steps_in_flight", [1, 2])
def test_after_preemption_and_recomputation(
    request: pytest.FixtureRequest, cpu_runner: ModelRunner, tokenizer: Tokenizer, steps_in_flight: int
) -> None:
    runner = cpu_runner if steps_in_flight == 1 else request.getfixturevalue("gpu_runner")
    ours = [constrained(name, JSON if name in "ab" else LETTERS, max_tokens=60) for name in "abcd"]
    alone = {key: answer for one in ours for key, answer in run(make_engine(runner), [one]).items()}
    engine = make_engine(runner, num_kv_blocks=9)
    answers = run(engine, ours)
    assert engine.scheduler.num_preemptions > 1
    assert tokens(answers) == tokens(alone)
    for name in "ab":
        check_json(tokenizer, answers[name, 0])


@pytest.mark.parametrize("cut", [1, 7, 20])
@pytest.mark.parametrize("steps_in_flight", [1, 2])
def test_after_a_failover_replay(
    request: pytest.FixtureRequest, cpu_runner: ModelRunner, steps_in_flight: int, cut: int
) -> None:
    """Another replica goes on from the tokens that had arrived."""
    runner = cpu_runner if steps_in_flight == 1 else request.getfixturevalue("gpu_runner")
    whole = run(make_engine(runner), [constrained("a")])["a", 0]
    assert len(whole.token_ids) > 21
    rest = run(make_engine(runner), [constrained("a", output=whole.token_ids[:cut]), *company(3)])["a", 0]
    assert rest.token_ids == whole.token_ids[cut:]
    assert rest.finish_reason is whole.finish_reason is FinishReason.STOP


def test_two_steps_in_flight_give_the_tokens_of_one(
    cpu_runner: ModelRunner, gpu_runner: ModelRunner, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Greedy: mixed with free neighbours, arriving late, ending while a step of theirs is in flight, with graphs."""
    requests = [constrained(name) for name in "abc"]
    requests += [constrained("d", DIGITS), constrained("e", LETTERS, max_tokens=25)]
    requests += [make_request(f"free{i}", prompt_of(i, 5), max_tokens=12 + i) for i in range(6)]
    arrivals = {1: 3, 4: 6, 7: 9}
    expected = run(make_engine(cpu_runner), requests, arrivals=arrivals)
    masked = [0]
    begin = Constraints.begin

    def spy(constraints: Constraints, sequences: Any) -> Any:
        step = begin(constraints, sequences)
        masked[0] += step is not None
        assert all(s.num_pending <= 1 for s in sequences), "the step before was read"
        return step

    monkeypatch.setattr(Constraints, "begin", spy)
    engine = make_engine(gpu_runner)
    answers = run(engine, requests, arrivals=arrivals)
    assert tokens(answers) == tokens(expected)
    assert masked[0] > 20
    assert gpu_runner.device.graphs.num_replays > 5  # type: ignore[attr-defined]
    for name in "abc":
        check_json(tokenizer, answers[name, 0])
    ahead = [r for r in engine.recorder.records if any(s.start > 0 and s.num_tokens == 1 for s in r.sequences)]
    assert len(ahead) > 10
    assert any("masks" in record.seconds for record in ahead)


@pytest.mark.parametrize("seed", range(3))
def test_random_traffic_with_aborts_and_choices(cpu_runner: ModelRunner, gpu_runner: ModelRunner, seed: int) -> None:
    rng = random.Random(seed)
    runner = gpu_runner if seed % 2 else cpu_runner
    groups = []
    for i in range(9):
        text = rng.choice([JSON, DIGITS, LETTERS, None])
        n = rng.choice([1, 1, 2])
        groups.append(
            [
                make_request(
                    str(i), prompt_of(i, 4), choice_index=c, n=n, grammar=text, max_tokens=rng.randint(3, 40), seed=i
                )
                for c in range(n)
            ]
        )
    aborted = {str(rng.randrange(9)): rng.randint(2, 12) for _ in range(2)}
    arrivals = {i: rng.randint(0, 10) for i in range(9)}
    expected = {key: a for group in groups for key, a in run(make_engine(runner), [group]).items()}
    engine = make_engine(runner, num_kv_blocks=12)

    def abort(step: int) -> None:
        for name, at in aborted.items():
            if at == step:
                engine.abort(name)

    answers = run(engine, groups, arrivals=arrivals, before_step=abort)
    for key, answer in answers.items():
        if answer.finish_reason is FinishReason.ABORT:
            assert key[0] in aborted
            assert answer.token_ids == expected[key].token_ids[: len(answer.token_ids)]
        else:
            assert answer.token_ids == expected[key].token_ids
            assert answer.finish_reason is expected[key].finish_reason


# ---- the end --------------------------------------------------------------------------------------------------------


def test_eos_ends_where_the_grammar_accepts_and_nowhere_else(cpu_runner: ModelRunner, tokenizer: Tokenizer) -> None:
    eos = tokenizer.token_to_id(IM_END)
    assert eos is not None
    bias = {eos: 100.0}
    (early,) = run(make_engine(cpu_runner), [constrained("a", DIGITS, ignore_eos=False, logit_bias=bias)]).values()
    assert early.token_ids[1:] == [eos]
    assert (early.finish_reason, early.stop_token_id) == (FinishReason.STOP, eos)
    late = constrained("a", DIGITS, ignore_eos=False, logit_bias=bias, min_tokens=5)
    (answer,) = run(make_engine(cpu_runner), [late]).values()
    assert answer.token_ids[5:] == [eos]
    most = constrained("a", DIGITS, ignore_eos=False, logit_bias=bias, min_tokens=50)
    (answer,) = run(make_engine(cpu_runner), [most]).values()
    assert answer.stop_token_id is None
    assert tokenizer.decode(answer.token_ids).isdigit()
    assert len(tokenizer.decode(answer.token_ids)) == 12, "the mask wins: no digit may follow"
    (answer,) = run(make_engine(cpu_runner), [constrained("a", DIGITS, logit_bias=bias)]).values()
    assert len(tokenizer.decode(answer.token_ids)) == 12, "ignored, it never comes"


def test_a_model_without_eos_ends_with_its_sentence(tmp_path: Path) -> None:
    runner = make_runner(make_tiny_model(tmp_path, layers=1, eos=()), **{**OPTIONS, "max_num_seqs": 4})
    assert not runner.eos_token_ids
    (answer,) = run(make_engine(runner), [constrained("a", DIGITS, ignore_eos=False)]).values()
    assert answer.finish_reason is FinishReason.STOP
    assert len(Tokenizer.from_directory(tmp_path).decode(answer.token_ids)) == 12


def test_max_tokens_cuts_a_sentence(cpu_runner: ModelRunner) -> None:
    (answer,) = run(make_engine(cpu_runner), [constrained("a", max_tokens=4)]).values()
    assert answer.finish_reason is FinishReason.LENGTH
    assert len(answer.token_ids) == 4


# ---- with other parameters, and errors ------------------------------------------------------------------------------


def test_a_grammar_composes_with_bias_penalties_and_allowed_ids(cpu_runner: ModelRunner, tokenizer: Tokenizer) -> None:
    a, b, seven = (tokenizer.encode(c, add_special_tokens=False)[0] for c in "ab7")
    (answer,) = run(make_engine(cpu_runner), [constrained("a", LETTERS, logit_bias={b: 100.0, seven: 100.0})]).values()
    assert set(answer.token_ids) == {b}
    only = constrained("a", LETTERS, allowed_token_ids=(a, b, seven), max_tokens=20, frequency_penalty=2.0)
    (answer,) = run(make_engine(cpu_runner), [only]).values()
    assert set(answer.token_ids) == {a, b}
    plain = run(make_engine(cpu_runner), [constrained("a", LETTERS, logprobs=2)])["a", 0]
    free = make_request("a", prompt_of(ord("a")), max_tokens=1, logprobs=2)
    assert plain.logprobs[0].top == run(make_engine(cpu_runner), [free])["a", 0].logprobs[0].top, "of the raw logits"


@pytest.mark.parametrize("steps_in_flight", [1, 2])
def test_where_nothing_may_come_the_request_fails_alone(
    request: pytest.FixtureRequest, cpu_runner: ModelRunner, tokenizer: Tokenizer, steps_in_flight: int
) -> None:
    runner = cpu_runner if steps_in_flight == 1 else request.getfixturevalue("gpu_runner")
    free = make_request("free", prompt_of(1), max_tokens=9)
    ended = tokenizer.encode("123456789012", add_special_tokens=False)
    requests = [free, constrained("over", DIGITS, output=[*ended, *ended])]
    if steps_in_flight == 1:
        x = tokenizer.encode("x", add_special_tokens=False)[0]
        requests.append(constrained("stuck", LETTERS, allowed_token_ids=(x,)))
    answers = run(make_engine(runner), requests)
    assert answers["free", 0].token_ids == run(make_engine(runner), [free])["free", 0].token_ids
    for name, reason in (("over", "does not continue the grammar's sentence"), ("stuck", "no token that is allowed")):
        if (name, 0) in answers:
            assert answers[name, 0].error_code == "step_failed"
            assert answers[name, 0].token_ids == []
            assert f"request {name} (choice 0) cannot be sampled: " in str(answers[name, 0].error)
            assert reason in str(answers[name, 0].error)


@pytest.mark.parametrize("steps_in_flight", [1, 2])
def test_a_step_that_fails_behind_the_matchers_is_run_again(
    request: pytest.FixtureRequest,
    cpu_runner: ModelRunner,
    steps_in_flight: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The matcher has seen a token that the sequence never got."""
    runner = cpu_runner if steps_in_flight == 1 else request.getfixturevalue("gpu_runner")
    requests = [constrained("a"), constrained("b", LETTERS, max_tokens=30)]
    expected = run(make_engine(runner), requests)
    engine = make_engine(runner)
    launch, num = runner.launch, [0]

    def launch_and_lose(plan: Any) -> Any:
        step = launch(plan)
        num[0] += 1
        if num[0] in (4, 11):
            take = step.token_ids

            def lost() -> list[int]:
                take()
                raise ValueError("planted")

            step.token_ids = lost
        return step

    monkeypatch.setattr(runner, "launch", launch_and_lose)
    answers = run(engine, requests)
    assert num[0] > 11
    assert tokens(answers) == tokens(expected)


def test_only_rows_that_sample_have_masks(cpu_runner: ModelRunner, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[tuple[int, int]] = []
    begin = Constraints.begin

    def spy(constraints: Constraints, sequences: Any) -> Any:
        step = begin(constraints, sequences)
        sizes.append((len(sequences), 0 if step is None else len(step._rows)))
        return step

    monkeypatch.setattr(Constraints, "begin", spy)
    long = make_request("long", prompt_of(1, 150), grammar=DIGITS, max_tokens=3)
    run(make_engine(cpu_runner), [long, make_request("free", prompt_of(2), max_tokens=9)])
    assert (1, 0) in sizes, "a chunk of the prompt, and the neighbour samples"
    assert (2, 1) in sizes
    assert max(num for _, num in sizes) == 1


# ---- offline --------------------------------------------------------------------------------------------------------


def test_offline(directory: Path) -> None:
    llm = LLM(directory, device="cpu", **OPTIONS)
    params = [SamplingParams(max_tokens=90, grammar=JSON), SamplingParams(max_tokens=5)]
    answers = llm.generate(["one fox", "two"], params)
    assert answers[0].finish_reason == "stop"
    assert answers[0].stop_reason is None
    assert list(json.loads(answers[0].text)) == ["name", "kind", "ages"]
    with pytest.raises(InvalidParameterError, match="prompt 1: grammar is 'start: x'"):
        llm.generate(["one", "two"], [params[0], SamplingParams(grammar="start: x")])
    assert not llm.engine.has_work
    assert torch.is_grad_enabled()


def test_engine_add_compiles(cpu_runner: ModelRunner) -> None:
    engine: Engine = make_engine(cpu_runner)
    with pytest.raises(InvalidParameterError, match="must be a grammar"):
        engine.add(constrained("a", "start: nobody"))
    assert not engine.has_work
