"""The messages of a chat, and how they become the text of a prompt. Knows the chat template; knows no sampling."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, PlainValidator

from serve_app.api.error_response import WrongValueError, path_of
from serve_app.api.request_model import RequestModel, Unimplemented
from serve_app.errors import InvalidParameterError
from serve_app.text.chat_template import ChatTemplate

MESSAGE_UNIMPLEMENTED: Unimplemented = {
    "annotations": ([],),
    "audio": (),
    "function_call": (),
    "refusal": ("",),
    "tool_calls": ([],),
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

    tool_call_id: str | None = None
    """Which call a tool's message answers, where the template shows it."""

    reasoning_content: str | None = None
    """An assistant's earlier reasoning, where the template shows it."""

    reasoning: str | None = None
    """Another name for reasoning_content."""

    unimplemented: ClassVar[Unimplemented] = MESSAGE_UNIMPLEMENTED

    def for_template(self) -> dict[str, Any]:
        message = self.model_dump(exclude_none=True)
        return {**message, "role": "system"} if self.role == "developer" else message


class ChatInput(RequestModel):
    """What makes the prompt of a chat; completions of chats and /tokenize share it."""

    add_generation_prompt: bool | None = None
    """End the prompt with the beginning of an assistant's message. By default the opposite of continue_final_message."""

    continue_final_message: bool = False
    """Leave the last message open: the answer goes on with it."""

    chat_template_kwargs: dict[str, Any] = Field({})
    """Further variables of the chat template (enable_thinking, ...)."""

    def _render(self, messages: Sequence[Message], template: ChatTemplate) -> str:
        add = not self.continue_final_message if self.add_generation_prompt is None else self.add_generation_prompt
        return template.render(
            [message.for_template() for message in messages],
            add_generation_prompt=add,
            continue_final_message=self.continue_final_message,
            template_kwargs=self.chat_template_kwargs,
        )

    def _check_chat(self, messages: Sequence[Message]) -> None:
        if not messages:
            raise InvalidParameterError("messages", [], "a list of at least one message")
        for i, message in enumerate(messages):
            if message.content is None and message.role != "assistant":
                raise InvalidParameterError(
                    f"messages[{i}].content", None, "text, in a message of any but the assistant"
                )
        if self.continue_final_message and self.add_generation_prompt:
            raise InvalidParameterError("add_generation_prompt", True, "false where continue_final_message is true")
        if self.continue_final_message and not messages[-1].content:
            raise InvalidParameterError("continue_final_message", True, "false where the last message has no text")

    @classmethod
    def _take_message_names(cls, data: dict[str, Any]) -> None:
        messages = data.get("messages")
        for i, message in enumerate(messages if type(messages) is list else []):
            if type(message) is dict:
                Message._take_names(message, path_of(("messages", i)) + ".")
