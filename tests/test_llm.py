"""LLM, end to end: text in and out, every sampling parameter, choices, logprobs against transformers, and clean ends."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from serve_app.engine.request import FinishReason, TokenLogprobs
from serve_app.errors import ConfigurationError, InvalidParameterError, InvalidPromptError
from serve_app.llm import LLM, Completion, SamplingParams
from tests.tiny_models import IM_END, make_tiny_model, reference_greedy
from tests.tiny_runs import make_engine, make_request, run

VOCAB_SIZE = 307
PROMPT = [17, 200, 31, 5, 91, 260, 44]
OPTIONS: dict[str, Any] = {
    "dtype": "float32",
    "block_size": 16,
    "num_kv_blocks": 60,
    "max_num_seqs": 16,
    "max_num_batched_tokens": 40,
    "num_threads": 1,
}


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("model"), "LlamaForCausalLM", seed=2)


@pytest.fixture(scope="module")
def model(directory: Path) -> Any:
    """transformers' own, in float64: what the exact logits are."""
    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float64, attn_implementation="eager")


@pytest.fixture
def llm(directory: Path) -> LLM:
    return LLM(directory, **OPTIONS)


def greedy(directory: Path, num: int, prompt: list[int] = PROMPT) -> list[int]:
    token_ids, margins = reference_greedy(directory, prompt, num, eos=())
    assert min(margins) > 1e-4
    return token_ids


@torch.no_grad()
def logprobs_TV(model: Any, token_ids: list[int]) -> torch.Tensor:
    return model(torch.tensor([token_ids])).logits[0].log_softmax(-1)


def assert_clean(llm: LLM) -> None:
    scheduler = llm.engine.scheduler
    scheduler.check_invariants()
    assert not llm.engine.has_work
    assert not scheduler.sequences
    assert scheduler.pool.num_used_blocks == 0


# ---- text -----------------------------------------------------------------------------------------------------------


def test_text_prompts_and_answers(llm: LLM, directory: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(directory)
    texts = ["the quick brown fox", "dog", "on and on, in the end"]
    answers = llm.generate(texts, SamplingParams(max_tokens=9, ignore_eos=True, skip_special_tokens=False))
    assert [answer.prompt for answer in answers] == texts
    for answer, text in zip(answers, texts, strict=True):
        prompt = tokenizer(text).input_ids
        assert answer.prompt_token_ids == prompt
        assert answer.token_ids == greedy(directory, 9, prompt)
        both = tokenizer.decode(prompt + answer.token_ids, skip_special_tokens=False)
        assert both == text + answer.text
        assert answer.finish_reason == "length"
    assert_clean(llm)


def test_one_text_and_no_parameters(llm: LLM) -> None:
    (answer,) = llm.generate("dog")
    assert len(answer.token_ids) == 16 or answer.finish_reason == "stop"
    assert answer.prompt == "dog"
    assert answer.logprobs is None
    assert answer.prompt_logprobs is None


def test_no_prompts(llm: LLM) -> None:
    assert llm.generate([]) == []


def test_parameters_for_each_prompt(llm: LLM, directory: Path) -> None:
    params = [SamplingParams(max_tokens=n, ignore_eos=True) for n in (3, 1, 7)]
    answers = llm.generate([PROMPT] * 3, params)
    assert [answer.token_ids for answer in answers] == [greedy(directory, n) for n in (3, 1, 7)]
    with pytest.raises(InvalidParameterError, match="'3 entries'; it must be one for each of 2 prompts"):
        llm.generate([PROMPT] * 2, params)


def test_chat_renders_the_models_template(llm: LLM, directory: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(directory)
    conversation = [{"role": "user", "content": "the lazy dog"}]
    expected = tokenizer.apply_chat_template(conversation, add_generation_prompt=True, return_dict=False)
    one = llm.chat(conversation, SamplingParams(max_tokens=4, ignore_eos=True))
    two = llm.chat([conversation, conversation], SamplingParams(max_tokens=4, ignore_eos=True))
    assert [answer.prompt_token_ids for answer in (*one, *two)] == [expected] * 3
    assert [answer.token_ids for answer in (*one, *two)] == [greedy(directory, 4, expected)] * 3


def test_the_progress_bar_is_asked_for(llm: LLM, capsys: pytest.CaptureFixture[str]) -> None:
    llm.generate([PROMPT], SamplingParams(max_tokens=2))
    assert "Generating" not in capsys.readouterr().err
    llm.generate([PROMPT], SamplingParams(max_tokens=2), use_tqdm=True)
    assert "Generating" in capsys.readouterr().err


# ---- ends -----------------------------------------------------------------------------------------------------------


def _letters(llm: LLM, **options: Any) -> SamplingParams:
    """Greedy among tokens that are printable ASCII by themselves, so that each adds its own text."""
    assert llm.tokenizer is not None
    texts = [llm.tokenizer.decode([i]) for i in range(300)]
    allowed = tuple(i for i, text in enumerate(texts) if text.isascii() and text.isprintable() and text)
    return SamplingParams(
        **{"max_tokens": 30, "logprobs": 0, "ignore_eos": True, "allowed_token_ids": allowed, **options}
    )


def _stop_case(llm: LLM) -> tuple[Completion, str, int]:
    """The whole greedy answer, a stop string that spans two of its tokens, and how many tokens complete it."""
    (whole,) = llm.generate(["the quick brown fox"], _letters(llm))
    assert llm.tokenizer is not None
    texts = [llm.tokenizer.decode([i]) for i in whole.token_ids]
    assert "".join(texts) == whole.text
    for n in range(4, 20):
        stop = texts[n][-1] + texts[n + 1][0]
        if whole.text.index(stop) == len("".join(texts[: n + 1])) - 1:
            return whole, stop, n + 2
    raise AssertionError("no such place; choose another seed")


@pytest.mark.parametrize("include", [False, True])
def test_stop_strings_cut_text_tokens_and_logprobs(include: bool, llm: LLM) -> None:
    whole, stop, num = _stop_case(llm)
    params = _letters(llm, stop=("never to be seen", stop), include_stop_str_in_output=include)
    steps = llm.engine.recorder.num_steps
    (answer,) = llm.generate(["the quick brown fox"], params)
    at = whole.text.index(stop)
    assert answer.text == whole.text[: at + len(stop) * include]
    assert answer.token_ids == whole.token_ids[:num]
    assert answer.logprobs == whole.logprobs[:num]  # type: ignore[index]
    assert (answer.finish_reason, answer.stop_reason) == ("stop", stop)
    assert llm.engine.recorder.num_steps - steps == num  # aborted there, not run to the end
    assert_clean(llm)


def test_a_stop_string_leaves_the_others_running(llm: LLM) -> None:
    whole, stop, num = _stop_case(llm)
    plain = _letters(llm)
    answers = llm.generate(["the quick brown fox"] * 3, [plain, dataclasses.replace(plain, stop=(stop,)), plain])
    assert [len(answer.token_ids) for answer in answers] == [30, num, 30]
    assert answers[0].text == answers[2].text == whole.text


def test_several_eos_ids(directory: Path, tmp_path: Path) -> None:
    """generation_config.json has two; the first that comes ends the answer, and is its last token."""
    free = greedy(directory, 16)
    assert free.index(free[9]) == 9
    several = tmp_path / "several"
    shutil.copytree(directory, several)
    (several / "generation_config.json").write_text(json.dumps({"eos_token_id": [306, free[9]]}))
    llm = LLM(several, **OPTIONS)
    assert llm.runner.eos_token_ids == {306, free[9]}
    (answer,) = llm.generate([PROMPT], SamplingParams(max_tokens=16))
    assert answer.token_ids == free[:10]
    assert (answer.finish_reason, answer.stop_reason) == ("stop", free[9])
    (answer,) = llm.generate([PROMPT], SamplingParams(max_tokens=16, ignore_eos=True))
    assert (answer.token_ids, answer.finish_reason) == (free, "length")
    (answer,) = llm.generate([PROMPT], SamplingParams(max_tokens=16, ignore_eos=True, stop_token_ids=(free[5],)))
    assert answer.token_ids == free[: free.index(free[5]) + 1]
    assert answer.stop_reason == free[5]


def test_min_tokens_masks_what_would_end(directory: Path, model: Any, tmp_path: Path) -> None:
    free = greedy(directory, 8)
    eager = tmp_path / "eager"
    shutil.copytree(directory, eager)
    (eager / "generation_config.json").write_text(json.dumps({"eos_token_id": [free[2]]}))
    llm = LLM(eager, **OPTIONS)
    assert llm.generate([PROMPT], SamplingParams(max_tokens=8))[0].token_ids == free[:3]
    (answer,) = llm.generate([PROMPT], SamplingParams(max_tokens=12, min_tokens=6))
    assert len(answer.token_ids) >= 6
    assert free[2] not in answer.token_ids[:5]
    expected = free[:2]
    while len(expected) < 5:  # by hand: eos is -inf
        logits_V = logprobs_TV(model, PROMPT + expected)[-1].clone()
        logits_V[free[2]] = -torch.inf
        expected.append(int(logits_V.argmax()))
    assert answer.token_ids[:5] == expected


def test_the_context_ends_an_answer(directory: Path) -> None:
    llm = LLM(directory, **OPTIONS, max_model_len=19)
    (answer,) = llm.generate([PROMPT], SamplingParams(max_tokens=None, ignore_eos=True))
    assert (len(answer.token_ids), answer.finish_reason) == (12, "length")
    assert answer.token_ids == greedy(directory, 12)


# ---- logprobs -------------------------------------------------------------------------------------------------------


def check_logprobs(entry: TokenLogprobs | None, exact_V: torch.Tensor, token_id: int, num_top: int) -> None:
    assert entry is not None
    assert entry.token_id == token_id
    assert entry.logprob == pytest.approx(float(exact_V[token_id]), abs=2e-4)
    values, ids = exact_V.topk(num_top) if num_top else (torch.empty(0), torch.empty(0))
    assert [i for i, _ in entry.top] == ids.tolist()
    assert [x for _, x in entry.top] == pytest.approx(values.tolist(), abs=2e-4)


@pytest.mark.parametrize("num_top", [0, 1, 5])
def test_logprobs_are_those_of_transformers(num_top: int, llm: LLM, model: Any) -> None:
    params = SamplingParams(max_tokens=6, logprobs=num_top, ignore_eos=True, temperature=1.0, seed=3, top_k=40)
    for answer in llm.generate([PROMPT, PROMPT[:1], PROMPT * 8], params):
        exact_TV = logprobs_TV(model, answer.prompt_token_ids + answer.token_ids)
        assert answer.logprobs is not None
        assert len(answer.logprobs) == 6
        start = len(answer.prompt_token_ids) - 1
        for i, token_id in enumerate(answer.token_ids):
            check_logprobs(answer.logprobs[i], exact_TV[start + i], token_id, num_top)


@pytest.mark.parametrize("num_top", [0, 4])
def test_prompt_logprobs_in_chunks_and_past_the_prefix_cache(num_top: int, llm: LLM, model: Any) -> None:
    """Budget 40, so a prompt of 70 comes in chunks. The cache holds its prefix, which must not be taken."""
    prompt = (PROMPT * 10)[:70]
    llm.generate([prompt], SamplingParams(max_tokens=2))
    (plain,) = llm.generate([prompt], SamplingParams(max_tokens=2))
    assert plain.num_cached_tokens == 64
    answers = llm.generate([prompt, PROMPT[:1], PROMPT], SamplingParams(max_tokens=2, prompt_logprobs=num_top))
    for answer in answers:
        assert answer.num_cached_tokens == 0
        exact_TV = logprobs_TV(model, answer.prompt_token_ids)
        assert answer.prompt_logprobs is not None
        assert answer.prompt_logprobs[0] is None
        assert len(answer.prompt_logprobs) == len(answer.prompt_token_ids)
        for i, token_id in enumerate(answer.prompt_token_ids[1:], start=1):
            check_logprobs(answer.prompt_logprobs[i], exact_TV[i - 1], token_id, num_top)
    assert answers[0].token_ids == plain.token_ids


# ---- what changes logits --------------------------------------------------------------------------------------------


def test_allowed_token_ids(llm: LLM, model: Any) -> None:
    allowed = (3, 77, 205, 306)
    (answer,) = llm.generate([PROMPT], SamplingParams(max_tokens=8, allowed_token_ids=allowed))
    expected: list[int] = []
    for _ in range(8):
        logits_V = logprobs_TV(model, PROMPT + expected)[-1]
        expected.append(max(allowed, key=lambda i: float(logits_V[i])))
    assert answer.token_ids == expected
    assert len(set(expected)) > 1


def test_repetition_penalty_is_transformers(llm: LLM, directory: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    prompt = torch.tensor([PROMPT])
    config = GenerationConfig(max_new_tokens=20, do_sample=False, repetition_penalty=1.7, pad_token_id=0)
    model.generation_config = config
    expected = model.generate(prompt, attention_mask=torch.ones_like(prompt))[0, len(PROMPT) :].tolist()
    params = SamplingParams(max_tokens=20, ignore_eos=True)
    (plain,) = llm.generate([PROMPT], params)
    (answer,) = llm.generate([PROMPT], dataclasses.replace(params, repetition_penalty=1.7))
    assert answer.token_ids == expected != plain.token_ids


def test_other_penalties_and_bias(llm: LLM, model: Any) -> None:
    """By hand: bias, then minus frequency times count, minus presence, over the output only."""
    bias = {int(logprobs_TV(model, PROMPT)[-1].argmax()): -3.0, 12: 2.5}
    params = SamplingParams(
        max_tokens=20, ignore_eos=True, presence_penalty=1.5, frequency_penalty=0.75, logit_bias=bias
    )
    (answer,) = llm.generate([PROMPT], params)
    expected: list[int] = []
    for _ in range(20):
        logits_V = logprobs_TV(model, PROMPT + expected)[-1].clone()
        for token_id, value in bias.items():
            logits_V[token_id] += value
        for token_id in set(expected):
            logits_V[token_id] -= 0.75 * expected.count(token_id) + 1.5
        expected.append(int(logits_V.argmax()))
    assert answer.token_ids == expected


def test_defaults_of_the_generation_config(directory: Path, tmp_path: Path) -> None:
    samples = tmp_path / "samples"
    shutil.copytree(directory, samples)
    (samples / "generation_config.json").write_text(json.dumps({"do_sample": True, "temperature": 1.4, "top_k": 30}))
    llm = LLM(samples, **OPTIONS)
    by_default = llm.generate([PROMPT], SamplingParams(max_tokens=12, seed=4))
    by_name = llm.generate([PROMPT], SamplingParams(max_tokens=12, seed=4, temperature=1.4, top_k=30))
    assert by_default[0].token_ids == by_name[0].token_ids != greedy(directory, 12)
    (answer,) = llm.generate([PROMPT], SamplingParams(max_tokens=12, temperature=0.0))
    assert answer.token_ids == greedy(directory, 12)


def test_a_request_without_a_seed_draws_one(directory: Path) -> None:
    params = SamplingParams(max_tokens=12, temperature=1.5, ignore_eos=True)
    first, second = (LLM(directory, **OPTIONS, seed=8).generate([PROMPT] * 2, params) for _ in range(2))
    assert [answer.token_ids for answer in first] == [answer.token_ids for answer in second]
    assert first[0].token_ids != first[1].token_ids


# ---- choices --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_prompt", [1, 7, 16, 37], ids=lambda n: f"prompt of {n}")
@pytest.mark.parametrize("caching", [True, False], ids=["caching", "no caching"])
def test_choices_compute_the_prompt_once(caching: bool, num_prompt: int, directory: Path) -> None:
    """Each choice equals a lone request with the same seed and choice_index, and its prompt is computed once."""
    llm = LLM(directory, **OPTIONS, enable_prefix_caching=caching)
    prompt = (PROMPT * 6)[:num_prompt]
    params = SamplingParams(n=5, max_tokens=9, temperature=1.2, seed=21, ignore_eos=True, logprobs=2)
    answers = llm.generate([prompt], params)
    assert [answer.choice_index for answer in answers] == [0, 1, 2, 3, 4]
    records = list(llm.engine.recorder.records)
    assert sum(step.num_tokens for record in records for step in record.sequences if step.start < num_prompt - 1) <= (
        num_prompt
    )
    assert sum(record.num_tokens for record in records) <= num_prompt + 5 * 9  # each takes the last prompt token again
    assert len({tuple(answer.token_ids) for answer in answers}) == 5
    for answer in answers:
        request = make_request(
            "lone",
            prompt,
            choice_index=answer.choice_index,
            max_tokens=9,
            temperature=1.2,
            seed=21,
            logprobs=2,
        )
        lone = run(make_engine(llm.runner), [request])["lone", answer.choice_index]
        assert lone.token_ids == answer.token_ids
        assert lone.logprobs == answer.logprobs


def test_choices_with_prompt_logprobs(llm: LLM, model: Any) -> None:
    params = SamplingParams(n=3, max_tokens=3, temperature=1.0, seed=1, prompt_logprobs=1, ignore_eos=True)
    answers = llm.generate([PROMPT], params)
    exact_TV = logprobs_TV(model, PROMPT)
    for answer in answers:
        assert answer.prompt_logprobs is not None
        for i, token_id in enumerate(PROMPT[1:], start=1):
            check_logprobs(answer.prompt_logprobs[i], exact_TV[i - 1], token_id, 1)


# ---- the engine below: salt, replay, abort --------------------------------------------------------------------------


def test_cache_salts_keep_prefixes_apart(llm: LLM) -> None:
    engine = make_engine(llm.runner)
    prompt = (PROMPT * 6)[:40]
    cached = []
    for i, salt in enumerate(("", "a", "a", "b", "")):
        answers = run(engine, [make_request(str(i), prompt, cache_salt=salt, max_tokens=2)])
        cached.append(answers[str(i), 0].num_cached_tokens)
    assert cached == [0, 0, 32, 0, 32]


def test_replay_counts_as_output(llm: LLM) -> None:
    """Penalties, min_tokens, max_tokens and logprobs go on as if nothing had happened."""
    settings: dict[str, Any] = {
        "max_tokens": 14,
        "min_tokens": 9,
        "temperature": 1.1,
        "seed": 77,
        "frequency_penalty": 1.0,
        "presence_penalty": 0.5,
        "logprobs": 1,
    }
    whole = run(make_engine(llm.runner), [make_request("a", PROMPT, **settings)])["a", 0]
    for num in (1, 5, 13):
        request = make_request("a", PROMPT, output=whole.token_ids[:num], **settings)
        rest = run(make_engine(llm.runner), [request])["a", 0]
        assert whole.token_ids[:num] + rest.token_ids == whole.token_ids
        assert rest.logprobs == whole.logprobs[num:]
        assert rest.finish_reason is FinishReason.LENGTH


@pytest.mark.parametrize("step", [0, 1, 6])
def test_abort_in_the_middle(step: int, llm: LLM) -> None:
    engine = make_engine(llm.runner, max_num_batched_tokens=16)
    requests = [make_request(str(i), PROMPT * (i + 1), max_tokens=12) for i in range(4)]
    expected = run(make_engine(llm.runner), requests)

    def abort(now: int) -> None:
        if now == step:
            assert engine.abort("2") == 1
            engine.scheduler.check_invariants()

    answers = run(engine, requests, before_step=abort)
    assert answers["2", 0].finish_reason is FinishReason.ABORT
    assert len(answers["2", 0].token_ids) <= step
    for i in (0, 1, 3):
        assert answers[str(i), 0].token_ids == expected[str(i), 0].token_ids


@pytest.mark.parametrize("failing_launch", [1, 2, 5])
@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
def test_an_interrupt_leaves_the_engine_clean(
    error: type[BaseException], failing_launch: int, llm: LLM, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    launch, num_launches = llm.runner.launch, 0

    def interrupted(plan: Any) -> Any:
        nonlocal num_launches
        num_launches += 1
        if num_launches == failing_launch:
            raise error
        return launch(plan)

    monkeypatch.setattr(llm.runner, "launch", interrupted)
    prompts = [PROMPT * 5, PROMPT, PROMPT[:2]]
    with pytest.raises(error):
        llm.generate(prompts, SamplingParams(n=2, max_tokens=10, temperature=1.0))
    assert_clean(llm)
    answers = llm.generate(prompts, SamplingParams(max_tokens=10, ignore_eos=True))
    assert [answer.token_ids for answer in answers] == [greedy(directory, 10, prompt) for prompt in prompts]


# ---- models ---------------------------------------------------------------------------------------------------------


def test_dummy_weights_need_a_config_only(directory: Path, tmp_path: Path) -> None:
    shutil.copy(directory / "config.json", tmp_path)
    params = SamplingParams(max_tokens=8, ignore_eos=True)
    token_ids = []
    for seed in (1, 1, 2):
        llm = LLM(tmp_path, load_format="dummy", **OPTIONS, seed=seed)
        assert llm.tokenizer is None
        (answer,) = llm.generate([PROMPT], params)
        assert answer.text == ""
        token_ids.append(answer.token_ids)
    assert token_ids[0] == token_ids[1] != token_ids[2]
    for what in ({"prompts": "text"}, {"prompts": [PROMPT], "sampling_params": SamplingParams(stop=("x",))}):
        with pytest.raises(ConfigurationError, match=r"needs a tokenizer; .* has no tokenizer\.json"):
            llm.generate(**what)  # type: ignore[arg-type]


def test_a_tokenizer_of_another_directory(directory: Path, tmp_path: Path) -> None:
    for name in ("config.json", "model.safetensors"):
        shutil.copy(directory / name, tmp_path)
    llm = LLM(tmp_path, tokenizer=directory, **OPTIONS)
    (answer,) = llm.generate(["dog"], SamplingParams(max_tokens=3, ignore_eos=True))
    assert llm.tokenizer is not None
    assert answer.prompt_token_ids == llm.tokenizer.encode("dog")
    assert IM_END in llm.tokenizer.special_tokens.values()


def test_unknown_options_are_named(directory: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"unknown option 'block_sizes'; the engine's options are block_size,"):
        LLM(directory, block_sizes=16)


def test_prompts_of_the_wrong_kind(llm: LLM) -> None:
    for prompts in ([PROMPT, [1.5, 2]], [1, 2, 3], [None], [[1, "2"]], [[2.0]]):
        with pytest.raises(InvalidPromptError, match="a prompt is text or a list of token ids"):
            llm.generate(prompts)  # type: ignore[arg-type]
    assert_clean(llm)


def test_integers_of_other_libraries_are_token_ids(llm: LLM, directory: Path) -> None:
    params = SamplingParams(max_tokens=3, ignore_eos=True)
    answers = llm.generate([np.array(PROMPT), torch.tensor(PROMPT)], params)  # type: ignore[list-item]
    assert [answer.token_ids for answer in answers] == [greedy(directory, 3)] * 2
    assert [type(i) for i in answers[0].prompt_token_ids] == [int] * len(PROMPT)
