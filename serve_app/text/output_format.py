"""OutputFormat: how one model writes reasoning and tool calls, found once from its tokenizer and the configuration.

Makes the parsers of requests. Knows the tables of formats and the tokenizer; knows no request and no HTTP.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol, TypeVar

from serve_app.errors import ConfigurationError, InvalidParameterError
from serve_app.text import tool_grammars
from serve_app.text.output_parser import OutputDelta, OutputParser, PlainParser, ReasoningThenTools
from serve_app.text.reasoning_formats import (
    REASONING_FORMATS,
    ReasoningFormat,
    detect_reasoning_format,
    num_held_back,
)
from serve_app.text.tokenizer import Tokenizer
from serve_app.text.tool_formats import TOOL_FORMATS, ToolFormat, ToolSchemas, detect_tool_format, forced_format
from serve_app.text.tool_grammars import CallableTool

AUTO, NONE = "auto", "none"
TOOL_FORMAT_NAMES = (AUTO, NONE, *(format.name for format in TOOL_FORMATS))
REASONING_FORMAT_NAMES = (AUTO, NONE, *(format.name for format in REASONING_FORMATS))
"""What the configuration may say. auto: as the chat template tells."""


@dataclass(frozen=True)
class OutputFormat:
    """The formats of one model."""

    tools: ToolFormat | None = None
    """None: the model has no tools, or writes its calls in a way that is not known here."""

    reasoning: ReasoningFormat | None = None
    """None: the model does not mark its reasoning."""

    special_markers: Mapping[str, int] = field(default_factory=dict)
    """Those of the markers that are special tokens of the model, and their ids."""

    @property
    def special_ids(self) -> frozenset[int]:
        """What the text stream must show (``shown_special_ids``) where a parser reads it."""
        return frozenset(self.special_markers.values())

    @classmethod
    def of(
        cls,
        tokenizer: Tokenizer,
        tool_format: str = AUTO,
        reasoning_format: str = AUTO,
        chat_template: str | None = None,
    ) -> OutputFormat:
        """The formats that the configuration names, or those that fit the model's chat template (the one for tools, if it
        has one), or the ``chat_template`` in its place. Raises ConfigurationError for a name that is none of the tables'."""
        templates = tokenizer.chat_templates if chat_template is None else {"default": chat_template}
        template = templates.get("tool_use") or templates.get("default") or ""
        tools = _named(tool_format, TOOL_FORMATS, "tool_format", detect_tool_format(template))
        reasoning = _named(reasoning_format, REASONING_FORMATS, "reasoning_format", detect_reasoning_format(template))
        markers = {
            marker: token_id
            for format in (tools, None if tools is None else forced_format(tools), reasoning)
            if format is not None
            for marker in format.markers
            if (token_id := tokenizer.token_to_id(marker)) is not None and token_id in tokenizer.special_ids
        }
        return cls(tools, reasoning, markers)

    def parser(
        self,
        prompt: str,
        *,
        tools: ToolSchemas | None = None,
        is_forced: bool = False,
        final_message: str | None = None,
        reads_reasoning: bool = True,
        skip_special_tokens: bool = True,
    ) -> OutputParser | None:
        """The parser of one choice, or None where all of its text is content.

        ``prompt``: its text, as the template rendered it. ``tools``: those that the model may call; without any, what
        looks like a call is content. ``is_forced``: a grammar of `forced_calls` holds the answer. ``final_message``: the
        text that the answer goes on with, if it does.

        With a parser, the text stream must show `special_ids`. Where the request wants no special
        tokens, those that are left over in content are dropped here.
        """
        reasoning_parser = tool_parser = None
        silent_end = ""
        if self.tools is not None and tools:
            tool_format = forced_format(self.tools) if is_forced else self.tools
            tool_parser, silent_end = tool_format.parser(tools), tool_format.ends_reasoning
        if self.reasoning is not None and reads_reasoning:
            reasoning_parser = self.reasoning.parser(self.reasoning.is_open(prompt, final_message), silent_end)
        parser: OutputParser
        if reasoning_parser is not None and tool_parser is not None:
            parser = ReasoningThenTools(reasoning_parser, tool_parser)
        elif reasoning_parser is not None or tool_parser is not None:
            parser = reasoning_parser or tool_parser or PlainParser()
        else:
            return None
        drops_markers = skip_special_tokens and self.special_markers
        return WithoutMarkers(parser, tuple(self.special_markers)) if drops_markers else parser

    def forced_calls(
        self, tools: Sequence[CallableTool], *, parallel: bool, prompt: str, final_message: str | None = None
    ) -> Grammars:
        """The grammar of an answer that must be calls of these tools, behind the reasoning if the model has any.

        Raises InvalidParameterError, also where the model has no format for calls; UnsupportedParameterError.
        """
        if self.tools is None:
            raise InvalidParameterError(
                "tool_choice", "required", "none or auto: this model has no format for tool calls"
            )
        shape = forced_format(self.tools).shape
        assert shape is not None
        grammars = Grammars(
            *(tool_grammars.tool_calls(shape, tools, parallel=parallel, special_ids=ids) for ids in self._id_tables)
        )
        return self.after_reasoning(grammars, prompt=prompt, final_message=final_message)

    def free_calls(
        self, tools: Sequence[CallableTool], *, parallel: bool, prompt: str, final_message: str | None = None
    ) -> Grammars | None:
        """The grammar of an answer that may be text and calls (tool_choice auto): strict tools get arguments that follow
        their schemas, and without ``parallel`` the answer ends with its first call. The answer is parsed as any other.

        None where that cannot be said: the format has no marker of its own for calls. Raises as `forced_calls`.
        """
        shape = None if self.tools is None else self.tools.shape
        if shape is None or not shape.trigger:
            return None
        grammars = Grammars(
            *(tool_grammars.text_and_calls(shape, tools, parallel=parallel, special_ids=ids) for ids in self._id_tables)
        )
        return self.after_reasoning(grammars, prompt=prompt, final_message=final_message)

    def after_reasoning(self, grammars: Grammars, *, prompt: str, final_message: str | None = None) -> Grammars:
        """The grammars, behind the reasoning where the model may write some at the end of this prompt."""
        if self.reasoning is None or (final_message is None and self.reasoning.is_over(prompt)):
            return grammars
        is_open = self.reasoning.is_open(prompt, final_message)
        if final_message and not is_open:
            return grammars
        return Grammars(
            *(
                tool_grammars.after_reasoning(self.reasoning, text, is_open=is_open, special_ids=ids)
                for text, ids in zip(grammars, self._id_tables, strict=True)
            )
        )

    @property
    def _id_tables(self) -> tuple[Mapping[str, int], Mapping[str, int]]:
        """For the two fields of Grammars."""
        return self.special_markers, tool_grammars.NO_IDS


class Grammars(NamedTuple):
    """One grammar, twice."""

    text: str
    """For the model: SamplingParams.grammar. Names special tokens by their ids."""

    checked: str
    """To be compiled first, where a bad one harms nobody and there is no tokenizer: special tokens are spelled out."""


class WithoutMarkers:
    """Drops markers from what a parser gives out, as skip_special_tokens asks: from calls that could not be read, and
    where a model repeats itself. Arguments are left as they are."""

    def __init__(self, parser: OutputParser, markers: Sequence[str]) -> None:
        self._parser = parser
        self._content = _Dropped(markers)
        self._reasoning = _Dropped(markers)

    @property
    def in_reasoning(self) -> bool:
        return self._parser.in_reasoning

    def push(self, text: str) -> OutputDelta:
        return self._without(self._parser.push(text))

    def finish(self) -> OutputDelta:
        delta = self._without(self._parser.finish())
        return delta._replace(
            content=delta.content + self._content.flush(), reasoning=delta.reasoning + self._reasoning.flush()
        )

    def _without(self, delta: OutputDelta) -> OutputDelta:
        if not delta.content and not delta.reasoning:
            return delta
        content, reasoning = self._content.push(delta.content), self._reasoning.push(delta.reasoning)
        if not self._parser.in_reasoning:
            reasoning += self._reasoning.flush()
        return delta._replace(content=content, reasoning=reasoning)


class _Dropped:
    """A growing text without the markers in it. Holds back what may become one."""

    def __init__(self, markers: Sequence[str]) -> None:
        self._markers = tuple(markers)
        self._pattern = re.compile("|".join(map(re.escape, markers)))
        self._held = ""

    def push(self, text: str) -> str:
        *before, last = self._pattern.split(self._held + text)
        num_held = max(num_held_back(last, marker) for marker in self._markers)
        self._held = last[len(last) - num_held :]
        return "".join(before) + last[: len(last) - num_held]

    def flush(self) -> str:
        held, self._held = self._held, ""
        return held


class _Named(Protocol):
    @property
    def name(self) -> str: ...


F = TypeVar("F", bound=_Named)


def _named(name: str, table: tuple[F, ...], option: str, detected: F | None) -> F | None:
    if name in (AUTO, NONE):
        return detected if name == AUTO else None
    found = next((format for format in table if format.name == name), None)
    if found is None:
        names = ", ".join((AUTO, NONE, *(format.name for format in table)))
        raise ConfigurationError(f"{option} is {name!r}; it must be one of {names}")
    return found
