"""Tools of a chat: what a client says of its functions, which of them the model may or must call, and earlier calls.

Knows names, JSON schemas' outermost level and limits; knows no format of a model (see `serve_app.text.tool_formats`) and
no message. Where it comes from: OpenAI's API reference.
"""

from __future__ import annotations

import hashlib
import json
import re
import string
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal, NamedTuple

from pydantic import Field, PlainValidator

from serve_app.api.error_response import WrongValueError, path_of, shown
from serve_app.api.json_body import parse_json
from serve_app.api.request_model import IgnoredField, RequestLimits, RequestModel
from serve_app.errors import InvalidBodyError, InvalidParameterError

MAX_NAME_CHARS = 64
MAX_ID_CHARS = 256

NO_PARAMETERS = {"type": "object", "properties": {}}

CHOICES = ("none", "auto", "required")
CHOICE_ALLOWED = (
    '"none", "auto", "required", {"type": "function", "function": {"name": ...}}, or {"type": "allowed_tools",'
    ' "allowed_tools": {"mode": "auto" or "required", "tools": [...]}}'
)


# ---- tools -----------------------------------------------------------------------------------------------------------


def _name(value: Any) -> str:
    if type(value) is not str or re.fullmatch(rf"[A-Za-z0-9_.-]{{1,{MAX_NAME_CHARS}}}", value) is None:
        raise WrongValueError(value, f"1 to {MAX_NAME_CHARS} letters, digits, underscores, hyphens or points")
    return value


def _parameters(value: Any) -> dict[str, Any]:
    """The outermost level; the rest is read where a grammar is made of it, and else by the model alone."""
    if type(value) is not dict:
        raise WrongValueError(value, "a JSON schema: an object")
    if value.get("type", "object") != "object":
        raise WrongValueError(value["type"], '"object": arguments have names', ".type")
    if type(properties := value.get("properties", {})) is not dict:
        raise WrongValueError(properties, "an object: name -> schema", ".properties")
    for name, schema in properties.items():
        if type(schema) not in (dict, bool):
            raise WrongValueError(schema, "a JSON schema", f".properties.{name}"[:80])
    required = value.get("required", [])
    if type(required) is not list or not all(type(name) is str for name in required):
        raise WrongValueError(required, "a list of names", ".required")
    return value


FunctionName = Annotated[str, PlainValidator(_name, json_schema_input_type=str)]
Parameters = Annotated[dict[str, Any], PlainValidator(_parameters, json_schema_input_type=dict[str, Any])]


class FunctionDefinition(RequestModel):
    """A function that the model may call. Who calls it is the client."""

    name: FunctionName
    """Letters, digits, `_`, `-` and `.`, at most 64."""

    description: str | None = None
    """What it does, for the model."""

    parameters: Parameters | None = None
    """JSON schema of its arguments, an object. Without one it takes none."""

    strict: bool | None = None
    """Arguments follow the schema also where the call is free, if the model's format has a marker for calls; and a keyword
    of the schema that cannot be enforced is an error. Those of forced calls always follow it."""


class Tool(RequestModel):
    """One entry of ``tools``."""

    type: Literal["function"] = "function"
    """There is no other kind."""

    function: FunctionDefinition
    """The function."""

    def for_template(self) -> dict[str, Any]:
        """Templates show it to the model as JSON, or look into its parameters."""
        function = {"name": self.function.name, "parameters": self.function.parameters or NO_PARAMETERS}
        if self.function.description is not None:
            function["description"] = self.function.description
        return {"type": self.type, "function": function}


def take_tool_names(tools: Any) -> None:
    """Refuses unknown names in ``tools`` by their path."""
    for i, tool in enumerate(tools if type(tools) is list else []):
        if type(tool) is dict:
            path = path_of(("tools", i))
            Tool._take_names(tool, path + ".")
            if type(function := tool.get("function")) is dict:
                FunctionDefinition._take_names(function, path + ".function.")


def check_tools(tools: Sequence[Tool], limits: RequestLimits) -> None:
    """How many, how large, and each name once. Raises InvalidParameterError."""
    if len(tools) > limits.max_tools:
        raise InvalidParameterError("tools", f"{len(tools)} tools", f"at most {limits.max_tools} tools")
    seen: dict[str, int] = {}
    for i, tool in enumerate(tools):
        if (name := tool.function.name) in seen:
            raise InvalidParameterError(
                f"tools[{i}].function.name", name, f"given once; tools[{seen[name]}] has it, too"
            )
        seen[name] = i
    num_bytes = sum(len(json.dumps(tool.for_template(), ensure_ascii=False).encode()) for tool in tools)
    if num_bytes > limits.max_tool_bytes:
        raise InvalidParameterError("tools", f"{num_bytes} bytes of JSON", f"at most {limits.max_tool_bytes} bytes")


# ---- tool_choice -----------------------------------------------------------------------------------------------------


class ToolChoice(NamedTuple):
    """Which tools may be called, and whether one must be."""

    mode: Literal["none", "auto", "required"] = "auto"
    names: tuple[str, ...] | None = None
    """Only these; None: all."""


def _tool_choice(value: Any) -> ToolChoice:
    if type(value) is str and value in CHOICES:
        return ToolChoice(value)  # type: ignore[arg-type]
    if type(value) is not dict:
        raise WrongValueError(value, CHOICE_ALLOWED)
    kind = value.get("type")
    if kind == "function":
        return ToolChoice("required", (_chosen_name(value, ""),))
    if kind != "allowed_tools":
        raise WrongValueError(kind, '"function" or "allowed_tools"', ".type")
    inside = value.get("allowed_tools", value)  # in /v1/responses they stand beside the type
    if type(inside) is not dict:
        raise WrongValueError(inside, 'an object: {"mode": ..., "tools": [...]}', ".allowed_tools")
    mode, tools = inside.get("mode", "auto"), inside.get("tools")
    if mode not in ("auto", "required"):
        raise WrongValueError(mode, '"auto" or "required"', ".allowed_tools.mode")
    if type(tools) is not list or not tools:
        raise WrongValueError(tools, "a list of at least one tool", ".allowed_tools.tools")
    names = [_chosen_name(tool, f".allowed_tools.tools[{i}]") for i, tool in enumerate(tools)]
    return ToolChoice(mode, tuple(dict.fromkeys(names)))


def _chosen_name(value: Any, inside: str) -> str:
    """Of {"type": "function", "function": {"name": ...}}."""
    if type(value) is not dict or value.get("type") != "function":
        raise WrongValueError(value, '{"type": "function", "function": {"name": ...}}', inside)
    function = value.get("function")
    if type(function) is not dict or type(function.get("name")) is not str:
        raise WrongValueError(function, 'an object: {"name": ...}', f"{inside}.function")
    if more := sorted({*value} - {"type", "function"}) or sorted({*function} - {"name"}):
        raise WrongValueError(more[0], "left out: a chosen function has a name alone", inside)
    name: str = function["name"]
    return name


ChosenTool = Annotated[
    ToolChoice,
    PlainValidator(_tool_choice, json_schema_input_type=Literal["none", "auto", "required"] | dict[str, Any]),
]


def check_choice(choice: ToolChoice | None, tools: Sequence[Tool]) -> None:
    """What is chosen is there. Raises InvalidParameterError."""
    if choice is None:
        return
    if not tools and (choice.mode == "required" or choice.names):
        raise InvalidParameterError("tool_choice", choice.names or choice.mode, "left out where there are no tools")
    known = [tool.function.name for tool in tools]
    for name in choice.names or ():
        if name not in known:
            raise InvalidParameterError("tool_choice", name, f"the name of one of tools ({shown(known)})")


def allowed_tools(tools: Sequence[Tool], choice: ToolChoice | None) -> list[Tool]:
    """The tools that this choice leaves, in their order."""
    choice = choice or ToolChoice()
    if choice.mode == "none":
        return []
    return [tool for tool in tools if choice.names is None or tool.function.name in choice.names]


# ---- calls -----------------------------------------------------------------------------------------------------------


class CallArguments(dict[str, Any]):
    """Arguments of an earlier call. An object for the templates that look into it or write it with ``tojson`` (most, and so
    vLLM gives one), and its JSON text for those that put it between other text (DeepSeek's)."""

    def __init__(self, values: Mapping[str, Any], text: str) -> None:
        super().__init__(values)
        self.text = text

    def __str__(self) -> str:
        return self.text

    def __add__(self, behind: object) -> str:
        return self.text + behind if isinstance(behind, str) else NotImplemented

    def __radd__(self, before: object) -> str:
        return before + self.text if isinstance(before, str) else NotImplemented


def _arguments(value: Any) -> CallArguments:
    """A string of JSON, as in answers; an empty one is an empty object, as in vLLM."""
    if type(value) is not str:
        raise WrongValueError(value, "a string that holds a JSON object")
    text = value.strip() or "{}"
    try:
        return CallArguments(parse_json(text.encode(), "it"), text)
    except InvalidBodyError as error:
        raise WrongValueError(value, f"a string that holds a JSON object; {error}") from error


def _call_id(value: Any) -> str:
    if type(value) is not str or not 1 <= len(value) <= MAX_ID_CHARS:
        raise WrongValueError(value, f"a string of 1 to {MAX_ID_CHARS} characters")
    return value


Arguments = Annotated[CallArguments, PlainValidator(_arguments, json_schema_input_type=str)]
CallId = Annotated[str, PlainValidator(_call_id, json_schema_input_type=str)]


class CalledFunction(RequestModel):
    """What was called."""

    name: FunctionName
    """The function."""

    arguments: Arguments = Field(default_factory=lambda: CallArguments({}, "{}"))
    """A string that holds a JSON object."""


class ToolCall(RequestModel):
    """A call that an assistant's message made earlier."""

    id: CallId
    """What the tool's message names in its tool_call_id."""

    type: Literal["function"] = "function"
    """There is no other kind."""

    function: CalledFunction
    """What was called."""

    ignored: ClassVar[Mapping[str, IgnoredField]] = {
        "index": IgnoredField("an integer", lambda v: type(v) is int, "streams number their calls"),
    }

    def for_template(self) -> dict[str, Any]:
        function = {"name": self.function.name, "arguments": self.function.arguments}
        return {"id": self.id, "type": self.type, "function": function}


def take_call_names(calls: Any, path: str) -> None:
    """Refuses unknown names in the ``tool_calls`` of the message at ``path``."""
    for i, call in enumerate(calls if type(calls) is list else []):
        if type(call) is dict:
            at = f"{path}.tool_calls[{i}]"
            ToolCall._take_names(call, at + ".")
            if type(function := call.get("function")) is dict:
                CalledFunction._take_names(function, at + ".function.")


ID_LETTERS = string.digits + string.ascii_letters
ID_LENGTH = 9
"""Mistral's templates refuse every other length."""


def tool_call_id(request_id: str, choice_index: int, call_index: int) -> str:
    """Id of a call: the same for the same call, also after a failover, and in a stream that is resumed."""
    seed = f"{choice_index}/{call_index}/{request_id}".encode()
    number = int.from_bytes(hashlib.sha256(seed).digest()[:12], "big")
    letters = []
    for _ in range(ID_LENGTH):
        number, digit = divmod(number, len(ID_LETTERS))
        letters.append(ID_LETTERS[digit])
    return "".join(letters)
