"""ChatTemplate: messages -> prompt text, by the Jinja template that comes with a model.

Renders what ``apply_chat_template`` of transformers renders (its ``utils/chat_template_utils.py`` is the source of the
rules), without loading it. Knows Jinja; knows no tokenizer and no HTTP.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from serve_app.errors import ConfigurationError, InvalidParameterError, InvalidRequestError

Message = Mapping[str, Any]

OWN_VARIABLES = ("messages", "tools", "documents", "add_generation_prompt")
"""Template variables that have an argument of their own in `render`."""

REASONING_FIELDS = ("reasoning_content", "thinking", "reasoning")
"""Names under which a message's reasoning comes. Templates read the first, or the second."""

CONTINUE_MARK = "@@THE-FINAL-MESSAGE-GOES-ON-HERE@@ "
"""Put behind the final message to find its end in the rendered text. The space tells whether the template trims."""

MAX_ERROR_CHARS = 300


class ChatTemplate:
    """The chat templates of one model, compiled.

    ``source`` is Jinja text, or named texts: "tool_use" is taken for a request with tools, else "default".
    ``special_tokens`` become variables (bos_token, eos_token, ...). Raises ConfigurationError if a text does not compile.
    """

    def __init__(self, source: str | Mapping[str, str], special_tokens: Mapping[str, str] | None = None) -> None:
        sources = {"default": source} if isinstance(source, str) else source
        self._templates = {name: _compile(text) for name, text in sources.items()}
        self._special_tokens = dict(special_tokens or {})

    def render(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool = False,
        continue_final_message: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        template_kwargs: Mapping[str, Any] | None = None,
    ) -> str:
        """The prompt text. Encode it with ``add_special_tokens=False``: the template writes bos itself.

        ``continue_final_message``: the text ends with the last message's content, for the model to go on with it.
        ``template_kwargs``: further variables (enable_thinking, ...); they win over the special tokens.

        Raises InvalidRequestError: no template for chats, no messages, or the template refuses them (it calls
        raise_exception, or uses something that the messages lack); InvalidParameterError: arguments that contradict.
        """
        if not messages:
            raise InvalidParameterError("messages", [], "at least one message")
        if continue_final_message and add_generation_prompt:
            raise InvalidParameterError("continue_final_message", True, "false where add_generation_prompt is true")
        if taken := sorted(set(OWN_VARIABLES) & set(template_kwargs or {})):
            raise InvalidParameterError("chat_template_kwargs", taken, "without " + ", ".join(OWN_VARIABLES))
        template = self._templates.get("tool_use") if tools is not None else None
        template = template or self._templates.get("default")
        if template is None:
            raise InvalidRequestError(
                f"the model has no default chat template (named ones: {', '.join(sorted(self._templates)) or 'none'})"
            )

        prepared = [_prepare(message) for message in messages]
        if continue_final_message:
            final_text = _mark_final(prepared)
        variables = {**self._special_tokens, **(template_kwargs or {})}
        try:
            text = template.render(
                variables,
                messages=prepared,
                tools=None if tools is None else list(tools),
                documents=None if documents is None else list(documents),
                add_generation_prompt=add_generation_prompt,
            )
        except Exception as error:
            # A template is a program that came with the model, run on what a client sent: TemplateError where it
            # refuses by itself, TypeError and the like where it meets data that it was not written for.
            raise InvalidRequestError(f"the chat template refused the messages: {_short(error)}") from error
        return _cut_at_mark(text, final_text) if continue_final_message else text


class _GenerationBlock(Extension):
    """``{% generation %} ... {% endgeneration %}`` marks the assistant's text for training. Here: its body, scoped."""

    tags = {"generation"}  # noqa: RUF012 - the name and type that Jinja asks for

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body).set_lineno(line)


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _strftime_now(format: str) -> str:
    return datetime.now().strftime(format)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Plain JSON. Jinja's own filter escapes < > & ', which no model was trained on."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _make_environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlock, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


_ENVIRONMENT = _make_environment()


@functools.lru_cache(maxsize=64)
def _compile(source: str) -> jinja2.Template:
    try:
        return _ENVIRONMENT.from_string(source)
    except jinja2.TemplateSyntaxError as error:
        raise ConfigurationError(f"the chat template does not compile: line {error.lineno}: {_short(error)}") from error


def _prepare(message: Message) -> dict[str, Any]:
    """A copy without null fields (clients send ``"content": null``; templates expect the key to be missing), and with
    reasoning under each name that a template may read."""
    if not isinstance(message, Mapping):
        raise InvalidParameterError("messages", message, "a list of objects")
    prepared = {name: value for name, value in message.items() if value is not None}
    reasoning = next((prepared[name] for name in REASONING_FIELDS if name in prepared), None)
    return prepared if reasoning is None else {"thinking": reasoning, **prepared, "reasoning_content": reasoning}


def _mark_final(prepared: list[dict[str, Any]]) -> str:
    """Puts the mark behind the final message's text (its last text part, if it has parts). Returns that text."""
    content = prepared[-1].get("content")
    if isinstance(content, str):
        prepared[-1]["content"] = content + CONTINUE_MARK
        return content
    if isinstance(content, list | tuple):
        parts = list(content)
        for i in reversed(range(len(parts))):
            if isinstance(parts[i], Mapping) and isinstance(parts[i].get("text"), str):
                text: str = parts[i]["text"]
                parts[i] = {**parts[i], "text": text + CONTINUE_MARK}
                prepared[-1]["content"] = parts
                return text
    raise InvalidRequestError("continue_final_message is true, but the final message has no text to go on with")


def _cut_at_mark(text: str, final_text: str) -> str:
    end = text.rfind(CONTINUE_MARK.strip())
    if end < 0 or final_text.strip() not in text:
        raise InvalidRequestError(
            "continue_final_message is true, but this model's chat template does not show the final message as it is"
        )
    # Without the mark's own space the template trims contents, and would have trimmed this one.
    return text[:end] if text.startswith(CONTINUE_MARK, end) else text[:end].rstrip()


def _short(error: Exception) -> str:
    message = " ".join(str(error).split()) or type(error).__name__
    return message if len(message) <= MAX_ERROR_CHARS else message[: MAX_ERROR_CHARS - 3] + "..."
