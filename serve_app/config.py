"""All that a deploy/*.yaml may say about this server: the arguments of the application, and the Ingress's user_config.

Knows names, types, defaults and ranges. Knows no Ray, no model and no file: serve_app/check_config.py reads files, and
checks what belongs to Ray Serve around this.

- `ServeArgs` is the application's ``args``. Ray Serve restarts every deployment when one of its values changes.
- `IngressUserConfig` is the Ingress's ``user_config``. It applies in place.

An unknown key is an error that names the nearest known one. Values are taken strictly: no text for a number, no true
for 1.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import os
import re
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, Self, Union, get_args, get_origin

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ModelWrapValidatorHandler,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic_core import InitErrorDetails, PydanticCustomError

from serve_app.engine.config import EngineConfig
from serve_app.engine.request import MAX_N, MAX_STOP_STRINGS
from serve_app.errors import ConfigurationError
from serve_app.logs import LogOptions
from serve_app.routing.ledger_options import LedgerOptions

IMPORT_PATH = "serve_app.app:build"
"""``import_path`` of the application."""
INGRESS = "Ingress"
REPLICA = "Replica"
DEPLOYMENTS = (INGRESS, REPLICA)
"""Names of the deployments."""
AUTOSCALING_POLICY = "serve_app.replica.autoscaling:CommittedTokensPolicy"
"""The policy that scales the Replica by committed tokens."""
GRACEFUL_SHUTDOWN_SECONDS = 60.0
"""graceful_shutdown_timeout_s of a deployment for which the file says nothing: Ray Serve kills what then still runs."""
DRAIN_MARGIN_SECONDS = 5.0
"""Between the end of a drain and Ray Serve's kill: what is left is ended, its clients are told, books are settled."""
MAX_ONGOING_REQUESTS = 900
"""Above 1000 Ray Serve counts its own health checks among a replica's requests, and they queue behind streams."""

DEMO = "demo"
DEMO_MODEL = Path(__file__).parent / "demo_model"
"""The bundled toy model."""
API_KEYS_VARIABLE = "RAGGED_SERVE_API_KEYS"
"""Where API keys are looked for if nothing is configured."""

PositiveInt = Annotated[int, Field(ge=1)]
NotNegativeInt = Annotated[int, Field(ge=0)]
PositiveSeconds = Annotated[float, Field(gt=0.0)]
NotNegativeSeconds = Annotated[float, Field(ge=0.0)]
Text = Annotated[str, Field(min_length=1)]


class Options(BaseModel):
    """A group of options: frozen, strict, and without unknown keys. Errors are sentences."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        strict=True,
        allow_inf_nan=False,
        use_attribute_docstrings=True,
        protected_namespaces=(),
    )

    @model_validator(mode="wrap")
    @classmethod
    def _in_sentences(cls, data: Any, handler: ModelWrapValidatorHandler[Self]) -> Self:
        try:
            return handler(data)
        except ValidationError as error:
            details = []
            for line in error.errors(include_url=False, include_context=False):
                kind, sentence = line["type"], line["msg"]
                if kind == "extra_forbidden":
                    kind, sentence = "unknown_key", unknown_key(str(line["loc"][-1]), cls.model_fields, _places())
                elif _SHOULD.match(sentence):
                    sentence = _sentence(sentence, line["input"])
                details.append(
                    InitErrorDetails(type=PydanticCustomError(kind, sentence), loc=line["loc"], input=line["input"])  # type: ignore[arg-type]
                )
            raise ValidationError.from_exception_data(cls.__name__, details) from None

    @classmethod
    def parse(cls, data: object) -> Self:
        """``data`` as these options. Raises ConfigurationError with a sentence for each thing that is wrong."""
        try:
            return cls.model_validate(data)
        except ValidationError as error:
            raise ConfigurationError(
                "; ".join(about(path, sentence, data) for path, sentence in sentences(error, data))
            ) from error


class SimulatedArgs(Options):
    """A runner without weights: its tokens are made up, its time is a + b * tokens + c * pairs (query, key)."""

    vocab_size: PositiveInt | None = None
    """Token ids that can come. null: those of the tokenizer."""

    eos_token_ids: list[NotNegativeInt] = []
    """Token ids that end an answer. Empty: an answer ends at max_tokens, or at a stop."""

    answers: dict[Text, Text] = {}
    """What to say, instead of made-up tokens: a text that the prompt holds -> the answer. Of several, the one whose text
    stands last in the prompt. They end with the first of eos_token_ids, or with the tokenizer's."""

    seconds_per_step: NotNegativeSeconds = 0.0
    """Seconds of a step, whatever is in it."""

    seconds_per_token: NotNegativeSeconds = 0.0
    """Seconds for each token of a step."""

    seconds_per_pair: NotNegativeSeconds = 0.0
    """Seconds for each pair of a query and a key it attends to."""

    max_steps_in_flight: Annotated[int, Field(ge=1, le=2)] = 1
    """2: the host plans a step while the one before it runs, as on a GPU."""

    verify: bool = False
    """Read every KV entry behind a token, and fail where one is not the sequence's own."""


class ModelArgs(Options):
    """Which model, in which form."""

    model: Text = DEMO
    """A directory with config.json and safetensors, a Hugging Face id, or demo: the bundled toy model."""

    revision: Text | None = None
    """Branch, tag or commit of a Hugging Face repository. null: its main branch."""

    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Element type of the weights. auto: what suits the model and the device."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: the GPU that Ray gives to the replica, else the CPU."""

    load_format: Literal["auto", "dummy"] = "auto"
    """dummy: random weights from config.json alone."""

    implementation: Literal["auto", "transformers"] = "auto"
    """auto: our own page for Llama, Mistral, Qwen2 and Qwen3, transformers' layers for what else runs (docs/models.md).
    transformers: its layers in any case."""

    tokenizer: Text | None = None
    """Directory of the tokenizer, where it is not the model's."""

    served_model_name: Text | list[Text] | None = None
    """Name or names under which clients ask for the model; answers carry the first. null: the id, or the directory's
    last part."""

    pooling: Literal["last", "mean"] | None = None
    """How a prompt becomes the vector of /v1/embeddings. null: as the checkpoint's modules.json says; without one, last."""

    runner: Literal["model", "simulated"] = "model"
    """simulated: no weights, made-up tokens; for tests and benches. The tokenizer is still the model's."""

    simulated: SimulatedArgs | None = None
    """Costs of the simulated runner."""

    @field_validator("model", mode="before")
    @classmethod
    def _unset_is_demo(cls, value: Any) -> Any:
        return DEMO if value is None else value

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        names = self.names
        if not names or len(set(names)) < len(names):
            raise PydanticCustomError("names", "served_model_name needs at least one name, and none of them twice")
        if self.simulated is not None and self.runner != "simulated":
            raise PydanticCustomError(
                "unused", "'simulated' does nothing while runner is 'model'; set runner: simulated"
            )
        if self.revision is not None and self.model == DEMO:
            raise PydanticCustomError("unused", "revision does nothing for the bundled model; it belongs to a hub id")
        return self

    @property
    def source(self) -> str:
        """The directory or hub id to load from: demo and ~ are resolved."""
        return str(DEMO_MODEL) if self.model == DEMO else os.path.expanduser(self.model)

    @property
    def key(self) -> str:
        """Equal where an answer that was begun with one of two models can be ended with the other: the same weights and
        tokenizer by name, whatever the device, the element type, and the names that clients use."""
        same = self.model_dump(include={"model", "revision", "tokenizer", "load_format", "runner"})
        return hashlib.blake2b(json.dumps(same, sort_keys=True).encode(), digest_size=6).hexdigest()

    @property
    def names(self) -> tuple[str, ...]:
        """Every name under which clients may ask for the model; the first one is in the answers."""
        if self.served_model_name is None:
            looks_like_path = self.model.startswith(("/", ".", "~"))
            return (Path(self.source).resolve().name if looks_like_path else self.model,)
        return (self.served_model_name,) if isinstance(self.served_model_name, str) else tuple(self.served_model_name)


class EngineArgs(Options):
    """Options of each replica's engine: the fields of EngineConfig."""

    block_size: PositiveInt = 32
    """Tokens per KV block. The CPU kernel wants a multiple of 16."""

    num_kv_blocks: PositiveInt | None = None
    """Blocks in the KV pool. Given by hand it wins over both memory options below."""

    kv_cache_memory_bytes: PositiveInt | None = None
    """Bytes for the KV pool. On a CPU 1 GiB by default."""

    gpu_memory_utilization: Annotated[float, Field(gt=0.0, le=1.0)] = 0.9
    """Share of a GPU's memory the engine may use in all (weights, activations, KV pool). Ignored on a CPU."""

    kv_cache_dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Element type of the cache: auto (the model's), float32, bfloat16 or float16."""

    max_model_len: PositiveInt | None = None
    """Longest prompt + output in tokens. By default what the model's config says."""

    max_num_seqs: PositiveInt = 128
    """Most sequences in one step. At most max_num_batched_tokens, so that a decode never waits for a prefill."""

    max_num_batched_tokens: PositiveInt = 512
    """Token budget of one step."""

    enable_prefix_caching: bool = True
    """Reuse the KV blocks of equal prefixes between requests with the same cache_salt."""

    num_threads: PositiveInt | None = None
    """CPU threads of one step. By default the cores this process may use."""

    stuck_seconds: PositiveSeconds | None = None
    """A step that has not returned for so long never will: the replica's process ends, and its streams go on elsewhere. By
    default 20 on a GPU, 120 on a CPU."""

    cuda_graphs: bool = True
    """Capture decode steps as CUDA graphs. Ignored on a CPU."""

    deterministic: bool | None = None
    """Bits of a token independent of the batch. By default on for a CPU (if it passes the proof), off for a GPU."""

    seed: Annotated[int, Field(ge=0, le=2**64 - 1)] = 0
    """Seeds dummy weights, and the seeds drawn for requests that bring none."""

    @model_validator(mode="after")
    def _is_an_engine_config(self) -> Self:
        try:
            self.to_engine_config()
        except ConfigurationError as error:
            raise PydanticCustomError("engine_config", str(error)) from error  # type: ignore[arg-type]
        return self

    def to_engine_config(self) -> EngineConfig:
        """Raises ConfigurationError naming the option, its value and its limit."""
        return EngineConfig(**self.model_dump())


class ApiArgs(Options):
    """The HTTP face, as far as a change needs a restart."""

    title: Text = "ragged-serve"
    """Title of the API's description (/docs, /openapi.json)."""

    chat_template: Text | None = None
    """Path of a Jinja file, or Jinja text, in place of the model's chat template."""

    tool_parser: Literal[
        "auto", "none", "qwen3_coder", "hermes", "mistral", "mistral_list", "pythonic", "llama3_json"
    ] = "auto"
    """How the model writes tool calls. auto: as its chat template shows; none: tools are refused. What was found stands in
    the log at start."""

    reasoning_parser: Literal["auto", "none", "think", "mistral", "granite"] = "auto"
    """How the model marks its reasoning, which then comes in reasoning_content. auto: as its chat template shows; none: it
    stays in the content."""

    default_chat_max_tokens: PositiveInt = 1024
    """Most tokens of a chat answer whose request names no limit; the context may leave less."""

    api_keys_file: Text | None = None
    """File with one API key a line; empty lines and lines that start with # do not count. Read at start."""

    api_keys_env: Text | None = None
    """Environment variable of the Ingress with API keys, separated by commas. null: RAGGED_SERVE_API_KEYS, if it is
    set. Without file and variable every request is served."""

    cors_origins: list[Text] = []
    """Origins whose pages may call the API from a browser, such as https://example.org, or "*". Empty: CORS is off."""

    explain: bool = False
    """Answer GET /v1/requests/{id}/explain: where a recent request ran and why, and what it waited for. Costs little time,
    and some 50 MB in each process of a busy server."""

    ui: bool = True
    """Serve the page at /ui: a chat, and the batch of every replica as it runs. What it shows costs nothing while nobody
    looks, and wants an API key where there are any."""

    @field_validator("cors_origins")
    @classmethod
    def _are_origins(cls, origins: list[str]) -> list[str]:
        for origin in origins:
            scheme, separator, host = origin.partition("://")
            is_origin = scheme in ("http", "https") and separator and host and not set(host) & set("/?#* ")
            if origin != "*" and not is_origin:
                raise PydanticCustomError(
                    "origin",
                    "'{origin}' is no origin; it must be '*', or http(s)://host[:port] without a path",
                    {"origin": origin},
                )
        return origins

    def chat_template_text(self) -> str | None:
        """The Jinja text that replaces the model's template, or None. Raises ConfigurationError for an unread file."""
        if self.chat_template is None or "{{" in self.chat_template or "{%" in self.chat_template:
            return self.chat_template
        return _read_text("chat_template", self.chat_template)

    def api_keys(self, environ: Mapping[str, str]) -> tuple[str, ...]:
        """The keys that open the API, from file and environment. Empty: it is open to all.

        Raises ConfigurationError if a file or variable that was named has no key: a server that was meant to be closed
        does not start open.
        """
        keys: list[str] = []
        if self.api_keys_file is not None:
            lines = [line.strip() for line in _read_text("api_keys_file", self.api_keys_file).splitlines()]
            keys = [line for line in lines if line and not line.startswith("#")]
            if not keys:
                raise ConfigurationError(f"api_keys_file is {self.api_keys_file!r}; there is no key in it")
        found = [key.strip() for key in environ.get(self.api_keys_env or API_KEYS_VARIABLE, "").split(",")]
        found = [key for key in found if key]
        if self.api_keys_env is not None and not found:
            raise ConfigurationError(
                f"api_keys_env is {self.api_keys_env!r}; that variable is unset, or has no key in it"
            )
        return tuple(dict.fromkeys(keys + found))


class DrainArgs(Options):
    """How long running answers may take to end where their place leaves: scale-down, a new version, the server's end."""

    replica_seconds: NotNegativeSeconds = 30.0
    """A Replica that leaves gets nothing new. Answers that still run on it after so long go on at other replicas."""

    ingress_seconds: NotNegativeSeconds = 50.0
    """An Ingress that leaves cannot hand its clients on. Answers that still run after so long end with an error event; so
    this should be longer than the longest answer. `make serve` waits as long when it is told to end."""


class ResumeArgs(Options):
    """What each Replica keeps of streams whose clients may resume them (X-Resumable): token ids, never their KV cache."""

    keep_seconds: NotNegativeSeconds = 60.0
    """How long after a stream has ended, or its client has gone. 0: nothing is kept, and X-Resumable is refused."""

    max_requests: PositiveInt = 4096
    """Such requests at once, running ones included. Beyond: those that ended first are forgotten first."""

    max_tokens: PositiveInt = 1_000_000
    """Tokens of all of them; each reported log-probability counts as one more. Some 40 to 100 bytes each."""


class LogArgs(Options):
    """What every process of the server logs, to its stderr."""

    format: Literal["text", "json"] = "text"
    """json: one object a line, with the process and, where the line is about one request, its id."""

    level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = "INFO"
    """Of the router and of each Replica; an Ingress has log_level. DEBUG: some lines for each request."""

    def to_log_options(self) -> LogOptions:
        return LogOptions(self.format, self.level)


class ServeArgs(Options):
    """``args`` of the application. A changed value restarts every deployment."""

    model: ModelArgs = ModelArgs()
    """Which model; a text alone is its `model`."""

    engine: EngineArgs = EngineArgs()
    """Options of each replica's engine."""

    api: ApiArgs = ApiArgs()
    """The HTTP face."""

    drain: DrainArgs = DrainArgs()
    """The end of a Replica, of an Ingress, and of the server."""

    resume: ResumeArgs = ResumeArgs()
    """Streams that their clients may resume."""

    log: LogArgs = LogArgs()
    """What the processes log."""

    @model_validator(mode="before")
    @classmethod
    def _fill_in(cls, data: Any) -> Any:
        """A heading with nothing below it is null in YAML, and means the defaults. ``model: x`` is short for its model."""
        data = _without_empty(data)
        if isinstance(data, dict) and isinstance(data.get("model"), str):
            data["model"] = {"model": data["model"]}
        return data


class RouterOptions(Options):
    """The router's ledger: who is granted what, and who waits for how long. The fields of LedgerOptions."""

    policy: Literal["reserve", "expect"] = "expect"
    """What a request books. reserve: all tokens it may have, so that nothing is ever preempted; expect: the output
    length learned from what finished."""

    max_queued_requests: NotNegativeInt = 512
    """Requests that may wait for budget. One more is refused with 429."""

    max_queued_tokens: NotNegativeInt = 4_000_000
    """Prompt and output tokens of all waiting requests. A single one may be larger, if it is alone."""

    max_queue_seconds: PositiveSeconds = 30.0
    """Longest wait for budget, then 429; at once, where it would be longer by the rate at which budget is freed."""

    lease_seconds: PositiveSeconds = 10.0
    """An ingress not heard of for so long is gone, and its leases are freed; so is a replica."""

    replica_seconds: PositiveSeconds = 3.0
    """A replica that did not report for so long gets no grants. At most lease_seconds."""

    submit_seconds: PositiveSeconds = 5.0
    """A lease that its replica did not show for so long was never submitted, and is freed."""

    @model_validator(mode="after")
    def _are_ledger_options(self) -> Self:
        try:
            self.to_ledger_options()
        except ConfigurationError as error:
            raise PydanticCustomError("ledger_options", str(error)) from error  # type: ignore[arg-type]
        return self

    def to_ledger_options(self) -> LedgerOptions:
        """Raises ConfigurationError naming the option, its value and its limit."""
        return LedgerOptions(**self.model_dump())


class LimitOptions(Options):
    """What one HTTP request may ask for. Beyond it the answer is 400, or 413 for the body."""

    max_body_bytes: PositiveInt = 8 * 2**20
    """Bytes of a request's body."""

    max_prompts: PositiveInt = 128
    """Prompts of one completion request."""

    max_n: Annotated[int, Field(ge=1, le=MAX_N)] = MAX_N
    """Choices for each prompt (n)."""

    max_stop: Annotated[int, Field(ge=0, le=MAX_STOP_STRINGS)] = 16
    """Stop strings, and as many stop token ids."""

    max_bias: NotNegativeInt = 1024
    """Entries of logit_bias."""

    max_tools: PositiveInt = 128
    """Tools of a chat."""

    max_tool_bytes: PositiveInt = 262_144
    """Of all its tools, as JSON."""

    max_inputs: PositiveInt = 2048
    """Inputs of one embedding request."""

    max_behind: PositiveInt = 8192
    """Tokens of one request that wait for its client to read. Beyond it the stream ends with an error event."""


class FailoverOptions(Options):
    """How far a stream is carried when it loses replicas. At a limit its client gets an error event, or a 503 before the
    first token."""

    max_seconds: PositiveSeconds = 60.0
    """From the loss of a replica to the next token."""

    max_losses: PositiveInt = 32
    """Replicas that one request may lose."""


class IngressUserConfig(Options):
    """``user_config`` of the Ingress: what may change while the server runs."""

    router: RouterOptions = RouterOptions()
    """The router's ledger."""

    limits: LimitOptions = LimitOptions()
    """What one request may ask for."""

    failover: FailoverOptions = FailoverOptions()
    """How far a stream is carried when it loses replicas."""

    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = "INFO"
    """Level of the Ingress's log."""

    log_requests: bool = True
    """One line at INFO for each request that ends: how, where, how long, how many tokens. Never what it says."""

    @model_validator(mode="before")
    @classmethod
    def _fill_in(cls, data: Any) -> Any:
        return _without_empty(data)


ROOTS: tuple[tuple[str, type[Options]], ...] = (("args", ServeArgs), ("user_config", IngressUserConfig))
"""The two places where the options stand in a deploy/*.yaml."""


def _without_empty(data: Any) -> Any:
    return {key: value for key, value in data.items() if value is not None} if isinstance(data, dict) else data


def _read_text(name: str, path: str) -> str:
    try:
        return Path(path).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"{name} is {path!r}, which cannot be read: {error}") from error


# ---- sentences -----------------------------------------------------------------------------------------------------


def models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    """The pydantic models that an annotation (a union, a list, ...) may hold."""
    if isinstance(annotation, type) and get_origin(annotation) is None and issubclass(annotation, BaseModel):
        yield annotation
    for inner in get_args(annotation):
        yield from models_in(inner)


def holds_list(annotation: Any) -> bool:
    """Whether the annotation is a list, or a union with one."""
    origin = get_origin(annotation)
    return origin is list or (origin in (Union, UnionType) and any(holds_list(a) for a in get_args(annotation)))


def places_of(model: type[BaseModel], at: str) -> Iterator[tuple[str, str]]:
    """(key, the dotted place of the group it stands in) for every key in and below ``model``."""
    for name, field in model.model_fields.items():
        yield name, at
        for inner in models_in(field.annotation):
            yield from places_of(inner, f"{at}.{name}" + ("[]" if holds_list(field.annotation) else ""))


def _places() -> dict[str, list[str]]:
    places: dict[str, list[str]] = {}
    for at, model in ROOTS:
        for key, place in places_of(model, at):
            places.setdefault(key, []).append(place)
    return places


def unknown_key(key: str, known: Collection[str], places: Mapping[str, list[str]]) -> str:
    """What to say of a key that is not in ``known``. ``places``: known keys of the whole file -> where they belong."""
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.75)
    if near:
        return f"that key is unknown; did you mean {near[0]!r}?"
    if key in places:
        return f"that key is unknown here; it belongs under {' or '.join(dict.fromkeys(places[key]))}"
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.55)
    if near:
        return f"that key is unknown; did you mean {near[0]!r}?"
    elsewhere = difflib.get_close_matches(key, places, n=1, cutoff=0.75)
    if elsewhere:
        where = " or ".join(dict.fromkeys(places[elsewhere[0]]))
        return f"that key is unknown; did you mean {elsewhere[0]!r} under {where}?"
    return f"that key is unknown; known here: {', '.join(known)}"


_SHOULD = re.compile(r"(Input|String|List|Dictionary) should")
"""How pydantic's own messages begin."""


def _sentence(message: str, value: Any) -> str:
    message = _SHOULD.sub("it must", message).replace("a valid dictionary or instance of", "a mapping:")
    if isinstance(value, str) and ("valid integer" in message or "valid number" in message):
        try:
            float(value)
        except ValueError:
            return message
        message += "; this is text: write it without quotes, and an exponent with point and sign (1.0e-3)"
    if not isinstance(value, str) and message == "it must be a valid string":
        message += "; put it in quotes"
    return message


KeyPath = tuple[str | int, ...]


def sentences(error: ValidationError, data: object) -> list[tuple[KeyPath, str]]:
    """(path into ``data``, sentence) for every error. What a union's branches say of one value is one sentence."""
    found: dict[KeyPath, list[str]] = {}
    for line in error.errors(include_url=False, include_context=False):
        message = line["msg"].removeprefix("Value error, ")
        message = _sentence(message, line["input"]) if _SHOULD.match(message) else message
        if line["type"] == "missing":
            message = "is missing"
        path: list[str | int] = []
        value: Any = data
        for part in line["loc"]:  # the names of a union's branches stand in loc, but not in data
            if _has(value, part):
                value = value[part]
            elif not (line["type"] == "missing" and part == line["loc"][-1]):
                continue
            path.append(part)
        messages = found.setdefault(tuple(path), [])
        if message not in messages:
            messages.append(message)
    return [(path, " or ".join(messages).replace(" or it must be", " or")) for path, messages in found.items()]


def _has(value: Any, part: str | int) -> bool:
    if isinstance(value, Mapping):
        return part in value
    return isinstance(value, list) and isinstance(part, int) and part < len(value)


def dotted(path: KeyPath) -> str:
    """applications[0].args.engine.seed"""
    text = ""
    for part in path:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else str(part)
    return text


def about(path: KeyPath, sentence: str, data: object) -> str:
    """``sentence`` with the path before it, and the value if it is a plain one."""
    value: Any = data
    for part in path:
        if not _has(value, part):
            return f"{dotted(path)} {sentence}"
        value = value[part]
    if not path:
        return sentence
    shown = repr(value)
    shown = shown if len(shown) <= 60 else shown[:57] + "..."
    parts = value if isinstance(value, list) else [value]
    is_plain = all(part is None or isinstance(part, str | int | float) for part in parts)
    return f"{dotted(path)} is {shown}; {sentence}" if is_plain else f"{dotted(path)}: {sentence}"
