"""The options: they mirror what they configure, are strict, and say in sentences what is wrong. No Ray, no weights."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
from pydantic import BaseModel, ValidationError

from serve_app import config
from serve_app.api.failover import FailoverLimits
from serve_app.api.request_model import RequestLimits
from serve_app.config import (
    ApiArgs,
    EngineArgs,
    FailoverOptions,
    IngressUserConfig,
    LimitOptions,
    ModelArgs,
    Options,
    RouterOptions,
    ServeArgs,
    SimulatedArgs,
)
from serve_app.engine.config import EngineConfig
from serve_app.engine.simulated_runner import SimulatedRunner
from serve_app.errors import ConfigurationError
from serve_app.replica.channel import MAX_BEHIND
from serve_app.routing.ledger_options import LedgerOptions
from serve_app.text.output_format import REASONING_FORMAT_NAMES, TOOL_FORMAT_NAMES


def docs_of(cls: type) -> dict[str, str]:
    """Field -> the docstring right below it."""
    (node,) = ast.parse(textwrap.dedent(inspect.getsource(cls))).body
    assert isinstance(node, ast.ClassDef)
    found = {}
    for field, after in zip(node.body, node.body[1:], strict=False):
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name) and isinstance(after, ast.Expr):
            assert isinstance(after.value, ast.Constant)
            found[field.target.id] = inspect.cleandoc(str(after.value.value))
    return found


def groups(model: type[BaseModel]) -> Iterator[type[BaseModel]]:
    yield model
    for field in model.model_fields.values():
        for inner in config.models_in(field.annotation):
            yield from groups(inner)


EVERY_GROUP = sorted({group for _, root in config.ROOTS for group in groups(root)}, key=lambda group: group.__name__)


def test_every_group_is_found() -> None:
    assert {group.__name__ for group in EVERY_GROUP} == {
        "ServeArgs",
        "ModelArgs",
        "SimulatedArgs",
        "EngineArgs",
        "FailoverOptions",
        "ApiArgs",
        "DrainArgs",
        "ResumeArgs",
        "LogArgs",
        "IngressUserConfig",
        "RouterOptions",
        "LimitOptions",
    }


@pytest.mark.parametrize("group", EVERY_GROUP)
def test_every_option_says_what_it_does(group: type[BaseModel]) -> None:
    assert (group.__doc__ or "").strip()
    for name, field in group.model_fields.items():
        assert (field.description or "").strip().endswith("."), name
        assert not field.is_required(), name


# ---- what the options mirror ---------------------------------------------------------------------------------------


def test_engine_args_are_the_engine_config() -> None:
    fields = {field.name: field.default for field in dataclasses.fields(EngineConfig)}
    assert list(EngineArgs.model_fields) == list(fields)
    assert {name: field.default for name, field in EngineArgs.model_fields.items()} == fields
    assert {name: field.description for name, field in EngineArgs.model_fields.items()} == docs_of(EngineConfig)
    assert EngineArgs().to_engine_config() == EngineConfig()


ENGINE_VALUES: dict[str, tuple[Any, Any]] = {
    "block_size": (16, 0),
    "num_kv_blocks": (7, -1),
    "kv_cache_memory_bytes": (12345, 0),
    "gpu_memory_utilization": (0.31, 1.01),
    "kv_cache_dtype": ("bfloat16", "int8"),
    "max_model_len": (33, 0),
    "max_num_seqs": (3, 513),
    "max_num_batched_tokens": (777, 127),
    "enable_prefix_caching": (False, "no"),
    "num_threads": (3, 0),
    "stuck_seconds": (1.5, 0),
    "cuda_graphs": (False, 2),
    "deterministic": (True, "auto"),
    "seed": (2**64 - 1, 2**64),
}
"""Option -> a value that is not its default, and one that it refuses."""


def test_every_engine_option_arrives() -> None:
    assert list(ENGINE_VALUES) == list(EngineArgs.model_fields)
    for name, (good, bad) in ENGINE_VALUES.items():
        assert EngineArgs.parse({name: good}).to_engine_config() == EngineConfig(**{name: good}) != EngineConfig()
        with pytest.raises(ConfigurationError, match=name):
            EngineArgs.parse({name: bad})


def test_what_the_engine_refuses_is_refused_in_its_words() -> None:
    with pytest.raises(ConfigurationError, match=r"max_num_seqs is 9; it must be at most max_num_batched_tokens \(8\)"):
        EngineArgs.parse({"max_num_seqs": 9, "max_num_batched_tokens": 8})


def test_the_parsers_are_those_of_the_tables() -> None:
    names = {name: get_args(ApiArgs.model_fields[name].annotation) for name in ("tool_parser", "reasoning_parser")}
    assert names == {"tool_parser": TOOL_FORMAT_NAMES, "reasoning_parser": REASONING_FORMAT_NAMES}


def test_the_simulated_runner_takes_these_costs() -> None:
    parameters = inspect.signature(SimulatedRunner).parameters
    given_elsewhere = {"num_kv_blocks", "block_size", "max_model_len", "script", "sleep"}
    assert set(SimulatedArgs.model_fields) - {"answers"} == set(parameters) - given_elsewhere
    for name, field in SimulatedArgs.model_fields.items():
        if name not in ("vocab_size", "eos_token_ids", "answers"):  # the tokenizer's, a list in YAML, and a script
            assert field.default == parameters[name].default, name


def test_router_options_are_the_ledger_options() -> None:
    fields = {field.name: field.default for field in dataclasses.fields(LedgerOptions)}
    assert {name: field.default for name, field in RouterOptions.model_fields.items()} == fields
    assert RouterOptions().to_ledger_options() == LedgerOptions()
    given = {"policy": "expect", **{name: 2 for name in fields if name != "policy"}}
    assert dataclasses.asdict(RouterOptions.parse(given).to_ledger_options()) == given


def test_limits_are_the_request_limits_and_that_of_the_body() -> None:
    fields = {field.name: field.default for field in dataclasses.fields(RequestLimits)}
    limits = {name: field.default for name, field in LimitOptions.model_fields.items()}
    assert limits == {"max_body_bytes": 8 * 2**20, **fields, "max_behind": MAX_BEHIND}


def test_failover_options_are_the_failover_limits() -> None:
    fields = {field.name: field.default for field in dataclasses.fields(FailoverLimits)}
    assert {name: field.default for name, field in FailoverOptions.model_fields.items()} == fields
    assert dataclasses.asdict(FailoverLimits(**FailoverOptions.parse({"max_losses": 3}).model_dump())) == {
        **fields,
        "max_losses": 3,
    }


def test_the_defaults_stand_together() -> None:
    assert RouterOptions().max_queued_requests < config.MAX_ONGOING_REQUESTS
    assert ServeArgs() == ServeArgs.parse({}) == ServeArgs.parse({"model": None, "engine": None, "api": None})
    assert IngressUserConfig() == IngressUserConfig.parse({"router": None, "limits": {}})
    assert ServeArgs.model_validate(ServeArgs.parse({}).model_dump()) == ServeArgs()


# ---- which model ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "source", "names"),
    [
        ({}, str(config.DEMO_MODEL), ("demo",)),
        ({"model": None}, str(config.DEMO_MODEL), ("demo",)),
        ({"model": "demo", "served_model_name": ["toy", "gpt"]}, str(config.DEMO_MODEL), ("toy", "gpt")),
        ({"model": "org/name"}, "org/name", ("org/name",)),
        ({"model": "/models/tiny-1b/"}, "/models/tiny-1b/", ("tiny-1b",)),
        ({"model": "./demo"}, "./demo", ("demo",)),
        ({"model": "org/name", "served_model_name": "short"}, "org/name", ("short",)),
    ],
)
def test_where_the_model_is_and_what_it_is_called(given: dict[str, Any], source: str, names: tuple[str, ...]) -> None:
    args = ModelArgs.parse(given)
    assert (args.source, args.names) == (source, names)


def test_the_home_directory_is_filled_in(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/someone")
    args = ModelArgs.parse({"model": "~/tiny"})
    assert (args.source, args.names) == ("/home/someone/tiny", ("tiny",))


def test_a_text_is_short_for_the_model() -> None:
    assert ServeArgs.parse({"model": "org/name"}) == ServeArgs(model=ModelArgs(model="org/name"))


# ---- what is refused -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("group", "given", "sentence"),
    [
        (ServeArgs, {"engnie": {}}, "engnie: that key is unknown; did you mean 'engine'?"),
        (
            ServeArgs,
            {"engine": {"block_sise": 16}},
            "engine.block_sise is 16; that key is unknown; did you mean 'block_s",
        ),
        (
            ServeArgs,
            {"engine": {"dtype": "auto"}},
            "engine.dtype is 'auto'; that key is unknown here; it belongs under arg",
        ),
        (ServeArgs, {"max_num_seqs": 8}, "max_num_seqs is 8; that key is unknown here; it belongs under args.engine"),
        (ServeArgs, {"api": {"polcy": "x"}}, "that key is unknown; did you mean 'policy' under user_config.router?"),
        (ServeArgs, {"api": {"zzz": 1}}, "api.zzz is 1; that key is unknown; known here: title, chat_template, "),
        (ServeArgs, {"engine": {"seed": True}}, "engine.seed is True; it must be a valid integer"),
        (ServeArgs, {"engine": {"block_size": "32"}}, "block_size is '32'; it must be a valid integer; this is text"),
        (ServeArgs, {"engine": []}, "engine is []; it must be a mapping: EngineArgs"),
        (
            ServeArgs,
            {"model": {"dtype": "fp16"}},
            "model.dtype is 'fp16'; it must be 'auto', 'float32', 'bfloat16' or 'f",
        ),
        (ServeArgs, {"model": ""}, "model is ''; it must have at least 1 character"),
        (
            ServeArgs,
            {"model": {"revision": 1234567, "model": "a/b"}},
            "model.revision is 1234567; it must be a valid str",
        ),
        (ServeArgs, {"model": {"revision": "main"}}, "revision does nothing for the bundled model"),
        (ServeArgs, {"model": {"served_model_name": []}}, "served_model_name needs at least one name"),
        (ServeArgs, {"model": {"served_model_name": ["a", "a"]}}, "none of them twice"),
        (
            ServeArgs,
            {"model": {"served_model_name": 3}},
            "is 3; it must be a valid string; put it in quotes or a valid li",
        ),
        (ServeArgs, {"model": {"simulated": {}}}, "'simulated' does nothing while runner is 'model'"),
        (ServeArgs, {"api": {"cors_origins": ["example.org"]}}, "'example.org' is no origin"),
        (ServeArgs, {"api": {"cors_origins": ["https://example.org/path"]}}, "'https://example.org/path' is no origin"),
        (ServeArgs, {"api": {"default_chat_max_tokens": 0}}, "is 0; it must be greater than or equal to 1"),
        (
            IngressUserConfig,
            {"log_level": "info"},
            "log_level is 'info'; it must be 'DEBUG', 'INFO', 'WARNING' or 'ERROR'",
        ),
        (
            IngressUserConfig,
            {"router": {"policy": "greedy"}},
            "router.policy is 'greedy'; it must be 'reserve' or 'expect'",
        ),
        (IngressUserConfig, {"router": {"lease_seconds": "1e1"}}, "is '1e1'; it must be a valid number; this is text"),
        (
            IngressUserConfig,
            {"router": {"lease_seconds": float("nan")}},
            "lease_seconds is nan; it must be a finite number",
        ),
        (IngressUserConfig, {"limits": {"max_n": 129}}, "limits.max_n is 129; it must be less than or equal to 128"),
        (
            IngressUserConfig,
            {"router": {"lease_seconds": 2}},
            "router: replica_seconds is 3.0; it must be at most lease_seconds (2",
        ),
        (IngressUserConfig, {"version": 3}, "version is 3; that key is unknown"),
        (IngressUserConfig, [1], "it must be a mapping: IngressUserConfig"),
    ],
)
def test_a_mistake_gets_a_sentence(group: type[Options], given: object, sentence: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        group.parse(given)
    assert sentence in str(caught.value)
    with pytest.raises(ValidationError):  # as Ray Serve calls it, by the builder's annotation
        group.model_validate(given)


def test_every_mistake_is_told_at_once() -> None:
    with pytest.raises(ConfigurationError) as caught:
        ServeArgs.parse({"engine": {"seed": -1, "blocksize": 1}, "api": {"titel": "x"}})
    assert [s.split(";")[0] for s in str(caught.value).split("; ") if " is " in s and "." in s.split(" ")[0]] == [
        "engine.seed is -1",
        "engine.blocksize is 1",
        "api.titel is 'x'",
    ]


def test_the_error_that_serve_shows_names_the_key_too() -> None:
    with pytest.raises(ValidationError, match="did you mean 'block_size'"):
        ServeArgs.model_validate({"engine": {"block_sise": 16}})


def test_options_do_not_change() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        LimitOptions().max_n = 3  # type: ignore[misc]


# ---- keys and template ---------------------------------------------------------------------------------------------


def test_keys_come_from_file_and_environment(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("# for the team\nalpha\n\n  beta \nalpha\n")
    args = ApiArgs(api_keys_file=str(file), api_keys_env="MY_KEYS")
    assert args.api_keys({"MY_KEYS": "gamma, beta,", "RAGGED_SERVE_API_KEYS": "not-this"}) == ("alpha", "beta", "gamma")


def test_without_keys_the_api_is_open() -> None:
    assert ApiArgs().api_keys({}) == ()
    assert ApiArgs().api_keys({"RAGGED_SERVE_API_KEYS": "one,two"}) == ("one", "two")


def test_a_server_meant_to_be_closed_does_not_start_open(tmp_path: Path) -> None:
    empty = tmp_path / "keys"
    empty.write_text("# nothing yet\n")
    for args, sentence in [
        (ApiArgs(api_keys_file=str(empty)), "there is no key in it"),
        (ApiArgs(api_keys_file=str(tmp_path / "absent")), "absent', which cannot be read"),
        (ApiArgs(api_keys_env="MY_KEYS"), "api_keys_env is 'MY_KEYS'; that variable is unset"),
    ]:
        with pytest.raises(ConfigurationError, match=sentence):
            args.api_keys({"MY_KEYS": " , "})


def test_a_template_is_text_or_a_file(tmp_path: Path) -> None:
    file = tmp_path / "chat.jinja"
    file.write_text("{{ messages }}")
    assert ApiArgs().chat_template_text() is None
    assert ApiArgs(chat_template="{% for m in messages %}").chat_template_text() == "{% for m in messages %}"
    assert ApiArgs(chat_template=str(file)).chat_template_text() == "{{ messages }}"
    with pytest.raises(ConfigurationError, match=r"chat_template is 'absent\.jinja', which cannot be read"):
        ApiArgs(chat_template="absent.jinja").chat_template_text()


def test_the_options_load_neither_ray_nor_torch() -> None:
    code = "import serve_app.config, sys; print(*{'ray', 'torch', 'yaml', 'fastapi'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


def test_the_key_of_a_model_says_what_an_answer_may_go_on_with() -> None:
    def key(**model: object) -> str:
        return ServeArgs.parse({"model": model}).model.key

    assert key() == key(model="demo") == key(dtype="bfloat16", device="cpu", served_model_name="x")
    others = {
        key(),
        key(model="a"),
        key(model="a", revision="r"),
        key(model="a", tokenizer="t"),
        key(runner="simulated"),
    }
    assert len(others | {key(load_format="dummy")}) == 6
