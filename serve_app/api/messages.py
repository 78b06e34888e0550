"""The messages of a chat, and how they become the text of a prompt. Knows the chat template; knows no sampling."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, PlainValidator

from serve_app.api.error_response import WrongValueError, path_of
from serve_app.api.request_model import RequestLimits, RequestModel, Unimplemented
from serve_app.api.tools import Tool, ToolCall, check_tools, take_call_names, take_tool_names
from serve_app.errors import InvalidParameterError
from serve_app.text.chat_template import ChatTemplate

MESSAGE_UNIMPLEMENTED: Unimplemented = {
    "annotations": ([],),
    "audio": (),
    "function_call": (),
    "refusal": ("",),
}


def _content(value: Any) -> str:
    """Text, or parts of text, which are joined by line ends as vLLM does: templates of text models expect a string."""
    if type(value) is str:
        return value
    if type(value) is not list:
        raise WrongValueError(value, "a string or a list of content parts")
    texts = []
    for i, part in enumerate(value):
        if type(part) is not dict:
            raise WrongValueError(part, 'a content part: {"type": "text", "text": ...}', f"[{i}]")
        if part.get("type") != "text":
            raise WrongValueError(part.get("type"), '"text": this server reads text alone', f"[{i}].type")
        if type(part.get("text")) is not str:
            raise WrongValueError(part.get("text"), "a string", f"[{i}].text")
        if more := sorted(part.keys() - {"type", "text"}):
            raise WrongValueError(part[more[0]], "left out: a part has a type and a text", f"[{i}].{more[0]}")
        texts.append(part["text"])
    return "\n".join(texts)


Content = Annotated[str, PlainValidator(_content, json_schema_input_type=str | list[dict[str, str]])]


class Message(RequestModel):
    """One message of a chat."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    """developer is shown to the template as system, which it was before OpenAI renamed it."""

    content: Content | None = None
    """Text, or a list of {"type": "text", "text": ...}."""

    name: str | None = None
    """Who speaks, where the template shows it."""

    tool_calls: list[ToolCall] = Field([])
    """The calls that an assistant's message made."""

    tool_call_id: str | None = None
    """Which call a tool's message answers: the id of one in an earlier message."""

    reasoning_content: str | None = None
    """An assistant's earlier reasoning, where the template shows it."""

    reasoning: str | None = None
    """Another name for reasoning_content."""

    unimplemented: ClassVar[Unimplemented] = MESSAGE_UNIMPLEMENTED
    renamed: ClassVar[Mapping[str, str]] = {"function_call": "tool_calls"}

    def for_template(self) -> dict[str, Any]:
        message = self.model_dump(exclude_none=True, exclude={"tool_calls"})
        if self.tool_calls:
            message["tool_calls"] = [call.for_template() for call in self.tool_calls]
        return {**message, "role": "system"} if self.role == "developer" else message


class ChatInput(RequestModel):
    """What makes the prompt of a chat; completions of chats and /tokenize share it."""

    add_generation_prompt: bool | None = None
    """End the prompt with the beginning of an assistant's message. By default the opposite of continue_final_message."""

    continue_final_message: bool = False
    """Leave the last message open: the answer goes on with it."""

    chat_template_kwargs: dict[str, Any] = Field({})
    """Further variables of the chat template (enable_thinking, ...). They win over those that other fields make."""

    tools: list[Tool] = Field([])
    """Functions that the model may call. Their calls come back in tool_calls."""

    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"] | None = None
    """How much to think first: the template's variables reasoning_effort, and enable_thinking (false for none)."""

    @property
    def shown_tools(self) -> list[Tool]:
        """Those that the template shows to the model."""
        return self.tools

    @property
    def template_kwargs(self) -> dict[str, Any]:
        """Variables of the template beside its own."""
        if self.reasoning_effort is None:
            return self.chat_template_kwargs
        effort = {"reasoning_effort": self.reasoning_effort, "enable_thinking": self.reasoning_effort != "none"}
        return {**effort, **self.chat_template_kwargs}

    def _render(self, messages: Sequence[Message], template: ChatTemplate) -> str:
        add = not self.continue_final_message if self.add_generation_prompt is None else self.add_generation_prompt
        return template.render(
            [message.for_template() for message in messages],
            add_generation_prompt=add,
            continue_final_message=self.continue_final_message,
            tools=[tool.for_template() for tool in self.shown_tools] or None,
            template_kwargs=self.template_kwargs,
        )

    def _check_chat(self, messages: Sequence[Message], limits: RequestLimits) -> None:
        if not messages:
            raise InvalidParameterError("messages", [], "a list of at least one message")
        check_tools(self.tools, limits)
        calls: set[str] = set()
        for i, message in enumerate(messages):
            if message.content is None and message.role != "assistant":
                raise InvalidParameterError(
                    f"messages[{i}].content", None, "text, in a message of any but the assistant"
                )
            if message.tool_calls and message.role != "assistant":
                raise InvalidParameterError(
                    f"messages[{i}].tool_calls",
                    f"{len(message.tool_calls)} calls",
                    "left out of all but the assistant's",
                )
            if message.role == "tool" and message.tool_call_id not in calls:
                raise InvalidParameterError(
                    f"messages[{i}].tool_call_id", message.tool_call_id, "the id of a call in an earlier message"
                )
            calls.update(call.id for call in message.tool_calls)
        if self.continue_final_message and self.add_generation_prompt:
            raise InvalidParameterError("add_generation_prompt", True, "false where continue_final_message is true")
        if self.continue_final_message and not messages[-1].content:
            raise InvalidParameterError("continue_final_message", True, "false where the last message has no text")

    @classmethod
    def _take_message_names(cls, data: dict[str, Any]) -> None:
        take_tool_names(data.get("tools"))
        messages = data.get("messages")
        for i, message in enumerate(messages if type(messages) is list else []):
            if type(message) is dict:
                path = path_of(("messages", i))
                Message._take_names(message, path + ".")
                take_call_names(message.get("tool_calls"), path)
