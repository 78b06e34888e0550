"""Bad input: each mistake is a clear error that names the value, and the engine goes on serving the others."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from serve_app.engine.request import FinishReason, GenerateRequest
from serve_app.errors import (
    ConfigurationError,
    ContextLengthError,
    InvalidParameterError,
    InvalidPromptError,
    InvalidRequestError,
    ModelNotFoundError,
    RequestTooLargeError,
    StartupError,
    UnsupportedModelError,
    WeightsError,
)
from serve_app.llm import LLM, SamplingParams
from tests.tiny_models import make_tiny_model, reference_greedy
from tests.tiny_runs import Answer, make_request, run

PROMPT = [8, 130, 2, 77, 91]
OPTIONS: dict[str, Any] = {
    "dtype": "float32",
    "block_size": 16,
    "num_kv_blocks": 12,
    "max_model_len": 200,
    "num_threads": 1,
}


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("model"), seed=4)


@pytest.fixture(scope="module")
def llm(directory: Path) -> LLM:
    return LLM(directory, **OPTIONS, max_num_seqs=4)


# ---- requests -------------------------------------------------------------------------------------------------------

BAD_PROMPTS: dict[str, tuple[list[int], type[InvalidRequestError], str]] = {
    "empty": ([], InvalidPromptError, "the prompt has 0 tokens; at least 1 is needed"),
    "id beyond the vocabulary": ([5, 307], InvalidPromptError, "token id 307 is outside the vocabulary 0..306"),
    "negative id": ([5, -1, 3], InvalidPromptError, "token id -1 is outside the vocabulary 0..306"),
    "huge id": ([2**70], InvalidPromptError, f"token id {2**70} is outside"),
    "as long as the context": (
        [1] * 200,
        ContextLengthError,
        "has 200 tokens; with max_model_len 200 it may have at most",
    ),
    "longer": ([1] * 5000, ContextLengthError, "the prompt has 5000 tokens; with max_model_len 200"),
    "more blocks than the pool": ([1] * 150, RequestTooLargeError, "need 13 KV blocks of 16 tokens; the pool has 12"),
}
BAD_PARAMETERS: dict[str, tuple[dict[str, Any], str]] = {
    "no tokens": ({"max_tokens": 0}, "max_tokens is 0; it must be an integer of at least 1"),
    "negative tokens": ({"max_tokens": -3}, "max_tokens is -3; it must be an integer of at least 1"),
    "half a token": ({"max_tokens": 2.5}, "max_tokens is 2.5"),
    "NaN temperature": ({"temperature": math.nan}, "temperature is nan; it must be a finite number"),
    "negative temperature": ({"temperature": -0.1}, "temperature is -0.1"),
    "infinite temperature": ({"temperature": math.inf}, "temperature is inf"),
    "top_p of zero": ({"top_p": 0.0}, "top_p is 0.0"),
    "NaN top_p": ({"top_p": math.nan}, "top_p is nan"),
    "NaN penalty": ({"presence_penalty": math.nan}, "presence_penalty is nan"),
    "NaN bias": ({"logit_bias": {3: math.nan}}, "logit_bias is nan"),
    "no choices": ({"n": 0}, "n is 0"),
    "min above max": ({"max_tokens": 4, "min_tokens": 5}, "min_tokens is 5"),
    "negative seed": ({"seed": -1}, "seed is -1"),
    "empty stop string": ({"stop": ("a", "")}, "stop is ''"),
    "nothing allowed": ({"allowed_token_ids": ()}, r"allowed_token_ids is \(\)"),
}
BAD_FOR_THE_MODEL: dict[str, tuple[dict[str, Any], str]] = {
    "allowed id": ({"allowed_token_ids": (3, 999)}, "allowed_token_ids is 999; it must be token ids below 307"),
    "stop id": ({"stop_token_ids": (307,)}, "stop_token_ids is 307"),
    "bias id": ({"logit_bias": {400: 1.0}}, "logit_bias is 400"),
    "more choices than places": ({"n": 5}, r"n is 5; it must be at most max_num_seqs \(4\)"),
}


@pytest.mark.parametrize("name", BAD_PROMPTS)
def test_bad_prompts(name: str, llm: LLM) -> None:
    prompt, family, message = BAD_PROMPTS[name]
    num_steps = llm.engine.recorder.num_steps
    with pytest.raises(family, match=message) as caught:
        llm.generate([PROMPT, prompt], SamplingParams(max_tokens=60))
    assert str(caught.value).startswith("prompt 1: ")
    assert caught.value.status == 400
    assert llm.engine.recorder.num_steps == num_steps  # nothing ran
    assert not llm.engine.has_work


@pytest.mark.parametrize("name", BAD_PARAMETERS)
def test_bad_parameters(name: str) -> None:
    options, message = BAD_PARAMETERS[name]
    with pytest.raises(InvalidParameterError, match=message) as caught:
        SamplingParams(**options)
    assert caught.value.param in options
    assert caught.value.status == 400


@pytest.mark.parametrize("name", BAD_FOR_THE_MODEL)
def test_bad_for_the_model(name: str, llm: LLM) -> None:
    options, message = BAD_FOR_THE_MODEL[name]
    with pytest.raises(InvalidParameterError, match=message):
        llm.generate([PROMPT], SamplingParams(**options))


def test_the_engine_goes_on_serving_the_others(llm: LLM, directory: Path) -> None:
    """All of the above between the steps of good requests, which notice nothing."""
    bad: list[GenerateRequest] = [
        make_request(name, prompt, max_tokens=60) for name, (prompt, _, _) in BAD_PROMPTS.items()
    ]
    bad += [
        make_request(name, PROMPT, **options) for name, (options, _) in BAD_FOR_THE_MODEL.items() if "n" not in options
    ]
    num_refused = 0

    def offend(step: int) -> None:
        nonlocal num_refused
        if step < len(bad):
            with pytest.raises(InvalidRequestError):
                llm.engine.add(bad[step])
            num_refused += 1

    prompts = [PROMPT, PROMPT[:1], PROMPT * 3]
    answers = run(
        llm.engine, [make_request(str(i), p, max_tokens=20) for i, p in enumerate(prompts)], before_step=offend
    )
    assert num_refused == len(bad) > 8
    for i, prompt in enumerate(prompts):
        assert answers[str(i), 0].token_ids == reference_greedy(directory, prompt, 20, eos=())[0]


@pytest.mark.parametrize("mode", ["logits", "hidden", "crash"])
def test_one_request_that_cannot_be_computed(
    mode: str, llm: LLM, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its own logits are NaN, or its hidden states are, or any step with it crashes: it ends, the others do not."""
    marker = 300
    prompts = [PROMPT, [4, marker, 9], PROMPT * 3]
    model = llm.runner.model
    forward = model.forward
    if mode == "hidden":
        embedding = model.embedding_VE.clone()
        embedding[marker] = torch.nan
        monkeypatch.setattr(model, "embedding_VE", embedding)
    else:

        def failing(input_ids: torch.Tensor, metadata: Any, *rest: Any) -> torch.Tensor:
            bad = (input_ids == marker).nonzero().flatten()
            logits_SV = forward(input_ids, metadata, *rest)
            if len(bad) and mode == "crash":
                raise MemoryError("planted")
            if len(bad):
                owner = int(torch.searchsorted(metadata.cu_seqlens_q, bad[:1].int(), right=True)) - 1
                logits_SV[owner, 7] = torch.nan
            return logits_SV

        monkeypatch.setattr(model, "forward", failing)
    # 300 may come out as a token, too: not here.
    allowed = tuple(i for i in range(307) if i != marker)
    names = ("first", "poisoned", "last")
    answers = run(
        llm.engine,
        [
            make_request(name, p, max_tokens=15, allowed_token_ids=allowed)
            for name, p in zip(names, prompts, strict=True)
        ],
    )
    failed = answers["poisoned", 0]
    assert (failed.finish_reason, failed.token_ids, failed.error_code) == (FinishReason.ERROR, [], "step_failed")
    assert failed.error is not None
    assert "request 'poisoned'" in failed.error or "request poisoned" in failed.error
    assert mode != "crash" or "MemoryError: planted" in failed.error
    monkeypatch.undo()
    again = run(
        llm.engine,
        [make_request(names[i], prompts[i], max_tokens=15, allowed_token_ids=allowed) for i in (0, 2)],
    )
    for i in (0, 2):
        expected: Answer = again[names[i], 0]
        assert answers[names[i], 0].token_ids == expected.token_ids
        assert len(expected.token_ids) == 15


def test_an_answer_says_its_error(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    def crash(*arguments: Any) -> torch.Tensor:
        raise RuntimeError("planted")

    monkeypatch.setattr(llm.runner.model, "forward", crash)
    answers = llm.generate([PROMPT, PROMPT[:2]], SamplingParams(max_tokens=3))
    for answer in answers:
        assert answer.finish_reason == "error"
        assert answer.token_ids == []
        assert answer.error is not None
        assert "RuntimeError: planted" in answer.error
    monkeypatch.undo()
    assert llm.generate([PROMPT], SamplingParams(max_tokens=3))[0].error is None


# ---- models ---------------------------------------------------------------------------------------------------------


def _change_config(**changes: Any) -> Callable[[Path], None]:
    def change(directory: Path) -> None:
        config = json.loads((directory / "config.json").read_text())
        (directory / "config.json").write_text(json.dumps({**config, **changes}))

    return change


def _truncate(directory: Path) -> None:
    path = directory / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])


def _truncate_header(directory: Path) -> None:
    path = directory / "model.safetensors"
    path.write_bytes(path.read_bytes()[:50])


def _change_weights(change: Callable[[dict[str, torch.Tensor]], None]) -> Callable[[Path], None]:
    def apply(directory: Path) -> None:
        tensors = load_file(directory / "model.safetensors")
        change(tensors)
        save_file(tensors, directory / "model.safetensors")

    return apply


def _drop(tensors: dict[str, torch.Tensor]) -> None:
    del tensors["model.layers.1.mlp.up_proj.weight"]


def _add(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.layers.2.mlp.up_proj.weight"] = torch.zeros(80, 48)


def _reshape(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.norm.weight"] = torch.ones(47)


def _quantize(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.norm.weight"] = torch.ones(48, dtype=torch.int8)


def _remove(name: str) -> Callable[[Path], None]:
    return lambda directory: (directory / name).unlink()


BAD_MODELS: dict[str, tuple[Callable[[Path], None], type[StartupError], str]] = {
    "no weights": (_remove("model.safetensors"), WeightsError, r"model\.safetensors"),
    "no config": (_remove("config.json"), ModelNotFoundError, "has no config.json"),
    "config is no JSON": (
        lambda directory: (directory / "config.json").write_text("{") and None,
        ModelNotFoundError,
        "config.json is not valid JSON",
    ),
    "truncated": (_truncate, WeightsError, r"model\.safetensors"),
    "truncated header": (_truncate_header, WeightsError, r"model\.safetensors"),
    "tensor missing": (_change_weights(_drop), WeightsError, r"'model\.layers\.1\.mlp\.up_proj\.weight' .* is missing"),
    "tensor left over": (_change_weights(_add), WeightsError, r"model\.layers\.2\.mlp\.up_proj\.weight"),
    "wrong shape": (_change_weights(_reshape), WeightsError, r"shape \[47\]; the config asks for \[48\]"),
    "integers": (_change_weights(_quantize), WeightsError, "'model.norm.weight' .* is int8"),
    "config disagrees": (
        _change_config(intermediate_size=81),
        WeightsError,
        r"\[80, 48\]; the config asks for \[81, 48\]",
    ),
    "architecture": (_change_config(architectures=["GPT2LMHeadModel"]), UnsupportedModelError, "GPT2LMHeadModel"),
    "rope": (
        _change_config(rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}),
        UnsupportedModelError,
        "dynamic",
    ),
    "activation": (_change_config(hidden_act="gelu"), UnsupportedModelError, "gelu"),
    "quantization": (_change_config(quantization_config={"quant_method": "awq"}), UnsupportedModelError, "awq"),
}


@pytest.mark.parametrize("name", BAD_MODELS)
def test_bad_models(name: str, directory: Path, tmp_path: Path) -> None:
    damage, family, message = BAD_MODELS[name]
    copy = tmp_path / "copy"
    shutil.copytree(directory, copy)
    damage(copy)
    with pytest.raises(family, match=message):
        LLM(copy, **OPTIONS)


def test_unknown_directories_are_named(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFoundError, match="no-such-model' is not a directory"):
        LLM(tmp_path / "no-such-model")
    with pytest.raises(ModelNotFoundError, match=r"has no config\.json"):
        LLM(tmp_path)


def test_a_broken_model_leaves_a_running_engine_alone(llm: LLM, directory: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(directory, copy)
    _truncate(copy)

    def load(step: int) -> None:
        if step == 3:
            with pytest.raises(WeightsError):
                LLM(copy, **OPTIONS)

    answers = run(llm.engine, [make_request("a", PROMPT, max_tokens=9)], before_step=load)
    assert answers["a", 0].token_ids == reference_greedy(directory, PROMPT, 9, eos=())[0]


BAD_OPTIONS: dict[str, tuple[dict[str, Any], str]] = {
    "dtype": ({"dtype": "int8"}, "dtype is 'int8'; it must be one of auto, float32"),
    "device": ({"device": "tpu"}, "device is 'tpu'"),
    "load_format": ({"load_format": "gguf"}, "load_format is 'gguf'; it must be one of auto, dummy"),
    "implementation": ({"implementation": "vllm"}, "implementation is 'vllm'; it must be one of auto, transformers"),
    "block_size": ({"block_size": 24}, "block_size is 24; the CPU kernels need a multiple of 16"),
    "block_size beyond a chunk": ({"block_size": 512}, "block_size is 512; on a CPU it must divide 256"),
    "block_size of no power": ({"block_size": 48}, "block_size is 48; on a CPU it must divide 256"),
    "max_model_len": ({"max_model_len": 513}, "max_model_len is 513; the model's config allows at most 512"),
    "memory": (
        {"kv_cache_memory_bytes": 100},
        "kv_cache_memory_bytes is 100; one block of 32 tokens takes 16384 bytes",
    ),
    "kv_cache_dtype": ({"kv_cache_dtype": "fp8"}, "kv_cache_dtype is 'fp8'"),
    "max_num_seqs": ({"max_num_seqs": 9, "max_num_batched_tokens": 8}, "max_num_seqs is 9; .* at most .*8"),
    "revision": ({"revision": "main"}, "revision is 'main', but .* is a directory"),
}


@pytest.mark.parametrize("name", BAD_OPTIONS)
def test_bad_options(name: str, directory: Path) -> None:
    options, message = BAD_OPTIONS[name]
    with pytest.raises(ConfigurationError, match=message):
        LLM(directory, **options)
