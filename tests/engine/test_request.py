"""SamplingParams, GenerateRequest, TokenOutput and EngineConfig: what is allowed, and what crosses processes."""

from __future__ import annotations

import dataclasses
import math
import pickle
from collections.abc import Mapping

import pytest

from serve_app.engine.config import EngineConfig
from serve_app.engine.request import FinishReason, GenerateRequest, SamplingParams, TokenLogprobs, TokenOutput
from serve_app.errors import ConfigurationError, InvalidParameterError

# ---- SamplingParams ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("n", (1, 128)),
        ("max_tokens", (1, 10**6, None)),
        ("min_tokens", (0, 16)),
        ("temperature", (0, 0.0, 1, 100.0, None)),
        ("top_k", (-1, 0, 50, None)),
        ("top_p", (1e-9, 1.0, 1, None)),
        ("min_p", (0.0, 1.0, None)),
        ("repetition_penalty", (0.5, 1.0, 100, None)),
        ("presence_penalty", (-2.0, 0, 2.0)),
        ("frequency_penalty", (-2, 2)),
        ("logit_bias", (None, {}, {0: -100.0, 5: 100})),
        ("allowed_token_ids", (None, (1,), [1, 2])),
        ("grammar", (None, "a grammar", "x" * 2**18)),
        ("stop", ((), "a", ["a", "b"], ("x",) * 64)),
        ("stop_token_ids", ((), [1, 2])),
        ("logprobs", (None, 0, 64)),
        ("prompt_logprobs", (None, 0, 64)),
        ("seed", (None, 0, 2**64 - 1)),
    ],
)
def test_values_that_are_allowed(name: str, values: tuple[object, ...]) -> None:
    for value in values:
        SamplingParams(**{name: value})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "value", "allowed"),
    [
        ("n", 0, "an integer from 1 to 128"),
        ("n", 129, "an integer from 1 to 128"),
        ("n", True, "an integer from 1 to 128"),
        ("n", 1.0, "an integer from 1 to 128"),
        ("max_tokens", 0, "an integer of at least 1"),
        ("max_tokens", "5", "an integer of at least 1"),
        ("min_tokens", -1, "an integer from 0 to 16"),
        ("min_tokens", 17, "an integer from 0 to 16"),
        ("temperature", -0.1, "a finite number from 0 to 100"),
        ("temperature", 100.5, "a finite number from 0 to 100"),
        ("temperature", math.nan, "a finite number from 0 to 100"),
        ("temperature", math.inf, "a finite number from 0 to 100"),
        ("temperature", "hot", "a finite number from 0 to 100"),
        ("top_k", -2, "an integer of at least -1"),
        ("top_p", 0.0, "a finite number above 0 and at most 1"),
        ("top_p", 1.1, "a finite number above 0 and at most 1"),
        ("min_p", -0.1, "a finite number from 0 to 1"),
        ("repetition_penalty", 0.0, "a finite number above 0 and at most 100"),
        ("presence_penalty", 2.1, "a finite number from -2 to 2"),
        ("frequency_penalty", -2.1, "a finite number from -2 to 2"),
        ("frequency_penalty", None, "a finite number from -2 to 2"),
        ("logit_bias", {-1: 0.0}, "an integer of at least 0"),
        ("logit_bias", {1: 101.0}, "a finite number from -100 to 100"),
        ("allowed_token_ids", (), "a non-empty list, or None"),
        ("allowed_token_ids", (-1,), "an integer of at least 0"),
        ("allowed_token_ids", 5, "a list"),
        ("grammar", "", "a non-empty string, or None"),
        ("grammar", {"type": "object"}, "a non-empty string, or None"),
        ("grammar", "x" * (2**18 + 1), "at most 262144 characters long"),
        ("stop", ("",), "made of non-empty strings"),
        ("stop", (5,), "made of non-empty strings"),
        ("stop", ("x",) * 65, "at most 64 strings"),
        ("stop", 5, "a list"),
        ("stop_token_ids", (-3,), "an integer of at least 0"),
        ("stop_token_ids", (True,), "an integer of at least 0"),
        ("logprobs", 65, "an integer from 0 to 64"),
        ("logprobs", -1, "an integer from 0 to 64"),
        ("prompt_logprobs", 65, "an integer from 0 to 64"),
        ("seed", -1, f"an integer from 0 to {2**64 - 1:g}"),
        ("seed", 2**64, f"an integer from 0 to {2**64 - 1:g}"),
    ],
    ids=lambda value: repr(value)[:20],
)
def test_values_that_are_refused_by_name(name: str, value: object, allowed: str) -> None:
    with pytest.raises(InvalidParameterError) as refusal:
        SamplingParams(**{name: value})  # type: ignore[arg-type]
    assert refusal.value.param == name
    assert str(refusal.value).startswith(f"{name} is ")
    assert str(refusal.value).endswith(f"it must be {allowed}")
    assert (refusal.value.status, refusal.value.code) == (400, "invalid_parameter")


def test_lists_become_tuples_and_a_single_stop_string_a_list_of_one() -> None:
    sampling = SamplingParams(stop="end", stop_token_ids=[3, 4], allowed_token_ids=[1])  # type: ignore[arg-type]
    assert sampling.stop == ("end",)
    assert sampling.stop_token_ids == (3, 4)
    assert sampling.allowed_token_ids == (1,)


@pytest.mark.parametrize(
    ("given", "generation_config", "expected"),
    [
        ({}, None, (0.0, 0, 1.0, 0.0, 1.0)),
        ({}, {"temperature": 0.7, "top_k": 20, "top_p": 0.8}, (0.0, 0, 1.0, 0.0, 1.0)),
        ({}, {"do_sample": True}, (1.0, 0, 1.0, 0.0, 1.0)),
        (
            {},
            {"do_sample": True, "temperature": 0.7, "top_k": 20, "top_p": 0.8, "min_p": 0.1, "repetition_penalty": 1.1},
            (0.7, 20, 0.8, 0.1, 1.1),
        ),
        ({}, {"do_sample": False, "repetition_penalty": 1.1}, (0.0, 0, 1.0, 0.0, 1.1)),
        ({}, {"do_sample": True, "top_p": None, "repetition_penalty": None}, (1.0, 0, 1.0, 0.0, 1.0)),
        ({"temperature": 0.3, "top_k": 5}, {"do_sample": True, "temperature": 0.7, "top_p": 0.9}, (0.3, 5, 0.9, 0.0, 1.0)),
        ({"temperature": 0.0}, {"do_sample": True, "temperature": 0.7}, (0.0, 0, 1.0, 0.0, 1.0)),
    ],
    ids=[
        "nothing said", "greedy model", "sampling model", "all said", "greedy with a penalty", "nulls",
        "request first", "greedy asked",
    ],
)  # fmt: skip
def test_what_is_left_out_comes_from_the_models_generation_config(
    given: Mapping[str, float], generation_config: Mapping[str, object] | None, expected: tuple[float, ...]
) -> None:
    sampling = SamplingParams(**given)  # type: ignore[arg-type]
    assert not sampling.is_resolved
    resolved = sampling.resolved(generation_config)
    assert resolved.is_resolved
    found = (resolved.temperature, resolved.top_k, resolved.top_p, resolved.min_p, resolved.repetition_penalty)
    assert found == expected
    assert resolved.resolved({"do_sample": True, "temperature": 0.9}) is resolved


def test_a_bad_generation_config_is_refused_like_a_bad_request() -> None:
    with pytest.raises(InvalidParameterError, match="top_p is 7"):
        SamplingParams().resolved({"do_sample": True, "top_p": 7})


# ---- what crosses processes --------------------------------------------------------------------------------------


def test_a_request_is_frozen_and_crosses_processes_whole() -> None:
    request = GenerateRequest(
        "a", (1, 2), SamplingParams(logit_bias={1: 2.0}), output_token_ids=(3,), choice_index=1, remaining_ms=5.0
    )
    assert pickle.loads(pickle.dumps(request)) == request
    with pytest.raises(dataclasses.FrozenInstanceError):
        request.priority = 5  # type: ignore[misc]


def test_an_output_crosses_processes_whole() -> None:
    output = TokenOutput(
        "a", 1, (5,), (TokenLogprobs(5, -0.5, ((5, -0.5),)),), finish_reason=FinishReason.STOP, stop_token_id=5
    )
    copy = pickle.loads(pickle.dumps(output))
    assert copy == output
    assert copy.finish_reason is FinishReason.STOP
    assert str(copy.finish_reason) == "stop"


@pytest.mark.parametrize(
    ("data", "fields"),
    [
        (
            GenerateRequest,
            (
                "request_id prompt_token_ids sampling output_token_ids choice_index priority cache_salt remaining_ms"
                " lease_id attempt pooling"
            ),
        ),
        (
            TokenOutput,
            (
                "request_id choice_index token_ids logprobs prompt_logprobs finish_reason stop_token_id num_cached_tokens"
                " error error_code embedding"
            ),
        ),
        (
            EngineConfig,
            (
                "block_size num_kv_blocks kv_cache_memory_bytes gpu_memory_utilization kv_cache_dtype max_model_len"
                " max_num_seqs max_num_batched_tokens enable_prefix_caching num_threads stuck_seconds"
                " cuda_graphs deterministic seed"
            ),
        ),
        (FinishReason, "STOP LENGTH ABORT ERROR"),
    ],
    ids=lambda value: value.__name__ if isinstance(value, type) else "",
)
def test_the_list_of_fields_is_frozen(data: type, fields: str) -> None:
    """Others write these names down: config files, callers, other processes. A new one is a decision, not a detail."""
    if dataclasses.is_dataclass(data):
        names = [field.name for field in dataclasses.fields(data)]
    else:
        names = list(getattr(data, "_fields", None) or data.__members__)  # type: ignore[attr-defined]
    assert names == fields.split()


# ---- EngineConfig ------------------------------------------------------------------------------------------------


def test_the_defaults_are_these() -> None:
    assert dataclasses.astuple(EngineConfig()) == (
        32, None, None, 0.9, "auto", None, 128, 512, True, None, None, True, None, 0,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"block_size": 0}, "block_size is 0; it must be an integer of at least 1"),
        ({"block_size": 16.0}, "block_size is 16.0; it must be an integer of at least 1"),
        ({"max_num_seqs": True}, "max_num_seqs is True; it must be an integer of at least 1"),
        ({"max_num_batched_tokens": -5}, "max_num_batched_tokens is -5; it must be an integer of at least 1"),
        ({"num_kv_blocks": 0}, "num_kv_blocks is 0; it must be an integer of at least 1, or None"),
        ({"kv_cache_memory_bytes": 1e9}, "kv_cache_memory_bytes is 1000000000.0; it must be an integer"),
        ({"max_model_len": "4096"}, "max_model_len is '4096'; it must be an integer of at least 1, or None"),
        ({"num_threads": 0}, "num_threads is 0; it must be an integer of at least 1, or None"),
        (
            {"max_num_seqs": 100, "max_num_batched_tokens": 64},
            "max_num_seqs is 100; it must be at most max_num_batched_tokens (64)",
        ),
        ({"gpu_memory_utilization": 0.0}, "gpu_memory_utilization is 0.0; it must be above 0 and at most 1"),
        ({"gpu_memory_utilization": 1.5}, "gpu_memory_utilization is 1.5; it must be above 0 and at most 1"),
        ({"kv_cache_dtype": "fp8"}, "kv_cache_dtype is 'fp8'; it must be one of auto, float32, bfloat16, float16"),
        ({"seed": -1}, "seed is -1; it must be an integer from 0 to 2**64 - 1"),
        ({"seed": 2**64}, f"seed is {2**64}; it must be an integer from 0 to 2**64 - 1"),
    ],
    ids=lambda value: str(value)[:40] if isinstance(value, dict) else "",
)  # fmt: skip
def test_an_option_out_of_range_is_refused_with_its_limit(options: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigurationError) as refusal:
        EngineConfig(**options)  # type: ignore[arg-type]
    assert str(refusal.value).startswith(message)


def test_the_limits_themselves_are_allowed() -> None:
    config = EngineConfig(block_size=1, max_num_seqs=64, max_num_batched_tokens=64, gpu_memory_utilization=1.0)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.seed = 5  # type: ignore[misc]
