"""POST /v1/responses: what clients may send, and the chat that it stands for. Knows OpenAI's shapes and names; knows no
answer, no route and no engine.

The stateless part: nothing is stored, so what refers to an earlier response is refused by name. A request is translated into
a ChatCompletionRequest, which checks the rest; what that refuses is told in the names of this route.

    instructions                 a system message
    input: text                  a user message
           message               a message; its parts are joined by line ends
           reasoning             reasoning_content of the assistant's message that follows
           function_call         a tool call of an assistant's message; those that follow each other are one message
           function_call_output  a tool's message
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, NamedTuple

import pydantic
from pydantic import Field, PlainValidator, PrivateAttr

from serve_app.api.error_response import WrongValueError, error_response, shown
from serve_app.api.fields import CacheSalt, MinP, Priority, RequestId, Seed, Temperature, TopK, TopP
from serve_app.api.names import WITHOUT_EFFECT
from serve_app.api.protocol import ChatCompletionRequest
from serve_app.api.request_model import MAX_INT, IgnoredField, RequestLimits, RequestModel, Unimplemented
from serve_app.engine.request import MAX_LOGPROBS
from serve_app.errors import InvalidParameterError, RaggedServeError, UnsupportedParameterError

ROLES = ("user", "assistant", "system", "developer")
ITEMS = ("message", "function_call", "function_call_output", "reasoning")
TEXTS = {"input_text": "text", "output_text": "text", "text": "text", "refusal": "refusal"}
"""Type of a part -> the name of its text."""
LOGPROBS = "message.output_text.logprobs"
INCLUDABLE = (LOGPROBS, "reasoning.encrypted_content")
"""The second is without effect: reasoning is there as text, and may be sent back as it came."""

_MESSAGE_KEYS = frozenset({"type", "role", "content", "id", "status", "phase"})
_PART_KEYS = frozenset({"type", "text", "refusal", "annotations", "logprobs"})
_CALL_KEYS = frozenset({"type", "call_id", "name", "arguments", "id", "status", "caller", "namespace", "async"})
_OUTPUT_KEYS = frozenset({"type", "call_id", "output", "id", "status", "caller"})
_REASONING_KEYS = frozenset({"type", "summary", "content", "encrypted_content", "id", "status"})


# ---- input -----------------------------------------------------------------------------------------------------------


class Input(NamedTuple):
    """``input`` as messages of a chat."""

    messages: list[dict[str, Any]]
    places: list[str]
    """Of each message: where in ``input`` it came from."""


def _input(value: Any) -> Input:
    if type(value) is str:
        return Input([{"role": "user", "content": value}], [""])
    if type(value) is not list:
        raise WrongValueError(value, "a string, or a list of items")
    found = Input([], [])
    calls: set[str] = set()
    for i, item in enumerate(value):
        at = f"[{i}]"
        if type(item) is not dict:
            raise WrongValueError(item, "an item: an object with a type", at)
        kind = item.get("type", "message")
        if kind not in ITEMS:
            raise WrongValueError(kind, f"one of {', '.join(ITEMS)}: nothing else is read here", f"{at}.type")
        if kind == "message":
            _add_message(found, item, at)
        elif kind == "function_call":
            _add_call(found, item, at, calls)
        elif kind == "function_call_output":
            _add_output(found, item, at, calls)
        else:
            _add_reasoning(found, item, at)
    return found


def _add_message(found: Input, item: dict[str, Any], at: str) -> None:
    _check_keys(item, _MESSAGE_KEYS, at)
    role = item.get("role")
    if role not in ROLES:
        raise WrongValueError(role, f"one of {', '.join(ROLES)}", f"{at}.role")
    content = _text_of(item.get("content"), f"{at}.content")
    last = found.messages[-1] if found.messages else {}
    if role == "assistant" and last.get("role") == "assistant" and last.get("content") is None:
        last["content"] = content
        return
    found.messages.append({"role": role, "content": content})
    found.places.append(at)


def _add_call(found: Input, item: dict[str, Any], at: str, calls: set[str]) -> None:
    _check_keys(item, _CALL_KEYS, at)
    for name in ("call_id", "name", "arguments"):
        if type(item.get(name)) is not str or not item[name]:
            raise WrongValueError(item.get(name), "a string that is not empty", f"{at}.{name}")
    calls.add(item["call_id"])
    function = {"name": item["name"], "arguments": item["arguments"]}
    call = {"id": item["call_id"], "type": "function", "function": function}
    _assistant(found, at).setdefault("tool_calls", []).append(call)


def _add_output(found: Input, item: dict[str, Any], at: str, calls: set[str]) -> None:
    _check_keys(item, _OUTPUT_KEYS, at)
    call_id = item.get("call_id")
    if type(call_id) is not str or call_id not in calls:
        raise WrongValueError(call_id, "the call_id of a function_call before it", f"{at}.call_id")
    content = _text_of(item.get("output"), f"{at}.output")
    found.messages.append({"role": "tool", "tool_call_id": call_id, "content": content})
    found.places.append(at)


def _add_reasoning(found: Input, item: dict[str, Any], at: str) -> None:
    _check_keys(item, _REASONING_KEYS, at)
    texts = []
    for name in ("content", "summary"):
        parts = item.get(name) or []
        if type(parts) is not list:
            raise WrongValueError(parts, "a list of parts", f"{at}.{name}")
        for i, part in enumerate(parts):
            if type(part) is not dict or type(part.get("text")) is not str:
                raise WrongValueError(part, 'a part: {"type": ..., "text": ...}', f"{at}.{name}[{i}]")
            texts.append(part["text"])
        if texts:
            break
    if texts:
        found.messages.append({"role": "assistant", "reasoning_content": "\n".join(texts)})
        found.places.append(at)


def _assistant(found: Input, at: str) -> dict[str, Any]:
    """The assistant's message that goes on, or a new one."""
    if not found.messages or found.messages[-1]["role"] != "assistant":
        found.messages.append({"role": "assistant"})
        found.places.append(at)
    return found.messages[-1]


def _text_of(value: Any, at: str) -> str:
    if type(value) is str:
        return value
    if type(value) is not list:
        raise WrongValueError(value, "a string, or a list of parts", at)
    texts: list[str] = []
    for i, part in enumerate(value):
        if type(part) is not dict:
            raise WrongValueError(part, 'a part: {"type": "input_text", "text": ...}', f"{at}[{i}]")
        name = TEXTS.get(part.get("type", "")) if type(part.get("type")) is str else None
        if name is None:
            raise WrongValueError(
                part.get("type"), "input_text or output_text: this server reads text alone", f"{at}[{i}].type"
            )
        _check_keys(part, _PART_KEYS, f"{at}[{i}]")
        if type(part.get(name)) is not str:
            raise WrongValueError(part.get(name), "a string", f"{at}[{i}].{name}")
        texts.append(part[name])
    return "\n".join(texts)


def _check_keys(value: dict[str, Any], known: frozenset[str], at: str) -> None:
    for name in value:
        if name not in known and value[name] is not None:
            raise WrongValueError(value[name], "left out: that name is not known here", f"{at}.{name[:60]}")


# ---- tools, text and the rest ----------------------------------------------------------------------------------------


def _tools(value: Any) -> list[dict[str, Any]]:
    """As they came. Only functions: everything else runs on OpenAI's machines."""
    if type(value) is not list:
        raise WrongValueError(value, "a list of tools")
    for i, tool in enumerate(value):
        if type(tool) is not dict:
            raise WrongValueError(tool, 'a tool: {"type": "function", "name": ...}', f"[{i}]")
        if tool.get("type") != "function":
            raise WrongValueError(tool.get("type"), '"function": there are no tools on the server', f"[{i}].type")
        _check_keys(tool, frozenset({"type", "name", "description", "parameters", "strict"}), f"[{i}]")
    return value


def _tool_choice(value: Any) -> Any:
    if type(value) is str and value in ("none", "auto", "required"):
        return value
    if type(value) is not dict:
        raise WrongValueError(value, '"none", "auto", "required", or an object')
    if value.get("type") == "function":
        if type(value.get("name")) is not str:
            raise WrongValueError(value.get("name"), "the name of a tool", ".name")
    elif value.get("type") != "allowed_tools":
        raise WrongValueError(value.get("type"), "function or allowed_tools", ".type")
    return value


def _include(value: Any) -> list[str]:
    if type(value) is not list:
        raise WrongValueError(value, "a list of strings")
    for i, name in enumerate(value):
        if name not in INCLUDABLE:
            raise WrongValueError(name, f"one of {', '.join(INCLUDABLE)}", f"[{i}]")
    return value


def _metadata(value: Any) -> dict[str, str]:
    if type(value) is not dict or not all(type(text) is str for text in value.values()):
        raise WrongValueError(value, "an object of strings")
    if len(value) > 16:
        raise WrongValueError(value, "an object of at most 16 entries")
    return value


def _format(value: Any) -> dict[str, Any]:
    if type(value) is not dict:
        raise WrongValueError(value, 'an object: {"type": ...}')
    if value.get("type") not in ("text", "json_object", "json_schema"):
        raise WrongValueError(value.get("type"), "text, json_object or json_schema", ".type")
    return value


class TextOptions(RequestModel):
    """What the answer's text is."""

    format: Annotated[dict[str, Any], PlainValidator(_format, json_schema_input_type=dict[str, Any])] = Field(
        {"type": "text"}
    )
    """`{"type": "text"}`, `{"type": "json_object"}`, or `{"type": "json_schema", "name": ..., "schema": ...}`."""

    unimplemented: ClassVar[Unimplemented] = {"verbosity": ("medium",)}


class ReasoningOptions(RequestModel):
    """How much to think."""

    effort: Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"] | None = None
    """As reasoning_effort of a chat."""

    summary: Literal["auto"] | None = None
    """Without effect: reasoning comes in full, as reasoning_text."""

    unimplemented: ClassVar[Unimplemented] = {"context": (), "generate_summary": ("auto",), "mode": ()}


_STATELESS = "; this server stores no responses: send the items again"
REFUSED: Mapping[str, str] = {
    "previous_response_id": _STATELESS,
    "conversation": _STATELESS,
    "prompt": "; prompts are not stored here",
    "background": "; an answer is made while its client waits",
}
"""What needs a store."""


class ResponsesRequest(RequestModel):
    """POST /v1/responses."""

    input: Annotated[Input, PlainValidator(_input, json_schema_input_type=str | list[dict[str, Any]])]
    """Text, or a list of items: messages, function_call, function_call_output, and reasoning as it came."""

    instructions: str | None = None
    """A system message before the input."""

    model: str | None = None
    """A served name. By default the model that is there."""

    stream: bool = False
    """Answer in OpenAI's typed events, as the tokens come."""

    max_output_tokens: Annotated[int, Field(ge=1, le=MAX_INT)] | None = None
    """Most tokens of the answer, reasoning and calls included. An answer that reaches it is `incomplete`."""

    temperature: Temperature | None = None
    """0 is greedy. By default what the model's generation_config.json says; so for top_p, top_k, min_p."""

    top_p: TopP | None = None
    """Sample from the most likely tokens that have this probability together."""

    text: TextOptions = TextOptions(format={"type": "text"})
    """`{"format": ...}`: text, JSON, or JSON of a schema."""

    tools: Annotated[list[dict[str, Any]], PlainValidator(_tools, json_schema_input_type=list[dict[str, Any]])] = Field(
        []
    )
    """Functions that the model may call: `{"type": "function", "name": ..., "parameters": ...}`."""

    tool_choice: Annotated[Any, PlainValidator(_tool_choice, json_schema_input_type=str | dict[str, Any])] = "auto"
    """`auto`, `none`, `required`, `{"type": "function", "name": ...}`, or `allowed_tools`."""

    parallel_tool_calls: bool = True
    """false: the answer ends with its first call."""

    reasoning: ReasoningOptions = ReasoningOptions()
    """`{"effort": ...}`."""

    include: Annotated[list[str], PlainValidator(_include, json_schema_input_type=list[str])] = Field([])
    """`message.output_text.logprobs`."""

    top_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    """Report each token's log-probability, and of so many likeliest tokens."""

    metadata: Annotated[dict[str, str], PlainValidator(_metadata, json_schema_input_type=dict[str, str])] = Field({})
    """Comes back with the answer."""

    seed: Seed | None = None
    """The same seed, input and parameters give the same answer. This and what follows: as in a chat."""

    top_k: TopK | None = None
    """Sample from that many most likely tokens."""

    min_p: MinP | None = None
    """Leave out tokens less likely than this share of the likeliest one's probability."""

    priority: Priority = 0
    """Lower is served earlier."""

    cache_salt: CacheSalt = ""
    """Prefixes are shared only among requests with an equal salt."""

    request_id: RequestId | None = None
    """Names the request in the answer's id and in the logs; wins over the header X-Request-Id."""

    chat_template_kwargs: dict[str, Any] = Field({})
    """Further variables of the chat template."""

    ignored: ClassVar[Mapping[str, IgnoredField]] = {
        **{name: field for name, field in WITHOUT_EFFECT.items() if name not in ("metadata", "store")},
        "store": IgnoredField("true or false", lambda v: type(v) is bool, "nothing is stored; the answer says false"),
        "prompt_cache_retention": IgnoredField("a string", lambda v: type(v) is str, "blocks stay while there is room"),
    }
    unimplemented: ClassVar[Unimplemented] = {
        "background": (False,),
        "context_management": ([],),
        "conversation": (),
        "max_tool_calls": (),
        "moderation": (),
        "previous_response_id": (),
        "prompt": (),
        "prompt_cache_options": (),
        "stream_options": ({}, {"include_obfuscation": False}),
        "truncation": ("disabled",),
    }

    _chat: ChatCompletionRequest = PrivateAttr()

    @property
    def chat(self) -> ChatCompletionRequest:
        """The chat that it stands for. Once `check` has passed."""
        return self._chat

    def check(self, limits: RequestLimits) -> None:
        try:
            self._chat = ChatCompletionRequest.parse(json.dumps(self.chat_fields()).encode(), limits)
        except (RaggedServeError, pydantic.ValidationError) as error:
            raise self.translated(error) from error

    def chat_fields(self) -> dict[str, Any]:
        """The body of the chat."""
        before = [] if self.instructions is None else [{"role": "system", "content": self.instructions}]
        names = ("model", "stream", "temperature", "top_p", "seed", "top_k", "min_p", "priority", "cache_salt")
        fields = {name: getattr(self, name) for name in (*names, "request_id")}
        fields["messages"] = [*before, *self.input.messages]
        fields["max_completion_tokens"] = self.max_output_tokens
        if self.chat_template_kwargs:
            fields["chat_template_kwargs"] = self.chat_template_kwargs
        if self.tools:
            fields["tools"] = [
                {"type": "function", "function": {name: value for name, value in tool.items() if name != "type"}}
                for tool in self.tools
            ]
        if self.tool_choice != "auto":
            fields["tool_choice"] = _chat_choice(self.tool_choice)
        if not self.parallel_tool_calls:
            fields["parallel_tool_calls"] = False
        if self.text.format["type"] != "text":
            fields["response_format"] = _chat_format(self.text.format)
        if self.reasoning.effort is not None:
            fields["reasoning_effort"] = self.reasoning.effort
        if self.with_logprobs:
            fields |= {"logprobs": True, "top_logprobs": self.top_logprobs or 0}
        return fields

    @property
    def with_logprobs(self) -> bool:
        return LOGPROBS in self.include or self.top_logprobs is not None

    def translated(self, error: BaseException) -> RaggedServeError:
        """What a chat refuses, in the names of this route."""
        if isinstance(error, RaggedServeError):
            told, param = error, getattr(error, "param", None)
            message = str(error)
        else:
            content = json.loads(error_response(error).body)["error"]
            told, param, message = InvalidParameterError("", None, ""), content["param"], content["message"]
        if param is not None:
            mine = self._name_of(str(param))
            message = message.replace(str(param), mine)
            told.param = mine  # type: ignore[attr-defined]
        message = re.sub(r"\bmax_(completion_)?tokens\b", "max_output_tokens", message)
        told.args = (message.replace("response_format", "text.format"),)
        return told

    def _name_of(self, param: str) -> str:
        if found := re.match(r"messages\[(\d+)\]", param):
            i = int(found[1]) - (self.instructions is not None)
            place = "instructions" if i < 0 else f"input{self.input.places[i]}"
            rest = param[found.end() :]
            return place + (".arguments" if rest.endswith("arguments") else "")
        for theirs, mine in _NAMES:
            if re.match(rf"{re.escape(theirs)}(?![a-z_])", param):
                return (mine + param[len(theirs) :]).replace(".function", "")
        return param

    @classmethod
    def _take_names(cls, data: dict[str, Any], path: str = "") -> None:
        for name, why in REFUSED.items():
            if data.get(name) not in (None, False):
                raise UnsupportedParameterError(name, f"is {shown(data[name])}{why}")
        super()._take_names(data, path)
        for name, model in (("text", TextOptions), ("reasoning", ReasoningOptions)):
            if type(inner := data.get(name)) is dict:
                model._take_names(inner, f"{name}.")


_NAMES = (
    ("messages", "input"),
    ("response_format.json_schema", "text.format"),
    ("response_format", "text.format"),
    ("reasoning_effort", "reasoning.effort"),
    ("max_completion_tokens", "max_output_tokens"),
    ("max_tokens", "max_output_tokens"),
    ("tools", "tools"),
    ("tool_choice", "tool_choice"),
)


def _chat_choice(choice: Any) -> Any:
    if type(choice) is str:
        return choice
    if choice["type"] == "function":
        return {"type": "function", "function": {"name": choice["name"]}}
    tools = choice.get("tools")
    named = [
        {"type": "function", "function": {"name": tool["name"]}} if type(tool) is dict and "name" in tool else tool
        for tool in (tools if type(tools) is list else [])
    ]
    return {"type": "allowed_tools", "allowed_tools": {"mode": choice.get("mode", "auto"), "tools": named}}


def _chat_format(format: dict[str, Any]) -> dict[str, Any]:
    if format["type"] == "json_object":
        return {"type": "json_object"}
    return {"type": "json_schema", "json_schema": {name: value for name, value in format.items() if name != "type"}}
