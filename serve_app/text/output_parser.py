"""OutputParser: from the text of one choice to its content, its reasoning and its tool calls.

Knows characters; knows no token, no model and no HTTP. The formats of models stand in `tool_formats` and
`reasoning_formats`; `output_format` picks those of a model and makes its parsers.

A parser's state follows from the text alone: what comes out, put together, is the same however the text is cut. That is
what lets an answer go on after a failover or a resume: a new parser, given the text so far, stands where the old one
stood. What cannot be read comes out as content; nothing is lost and nothing comes twice.

Where parsers stand, and how markers reach them:

    tokens -> TextStream (stop strings cut here) -> OutputParser -> OutputDelta

In some tokenizers the marker that opens a call is a special token ("[TOOL_CALLS]" in Mistral's), which
skip_special_tokens leaves out of the text. The parser needs it, so the stream is told to show those of the format's
markers that are special, and only those (``shown_special_ids`` of TextStream). In turn a parser is told which markers
are to stay out of content: where a call cannot be read, such a marker is dropped, as it is without a parser, and the
rest is content.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Protocol


@dataclass(frozen=True, slots=True)
class ToolCallDelta:
    """A piece of one call. All pieces of a call stand together: once a call with a higher index has begun, or content
    has come, the ones before are whole."""

    index: int
    """Which call of the choice, from 0 on."""

    name: str | None = None
    """The function's name, in the first piece of a call and only there."""

    arguments: str = ""
    """The next characters of the arguments: JSON text as the model wrote it, never written anew."""


class OutputDelta(NamedTuple):
    """What one push made. Empty where the parser holds text back that may turn out to be a marker."""

    content: str = ""

    reasoning: str = ""

    tool_calls: tuple[ToolCallDelta, ...] = ()
    """In the order of the text. Pieces of the same call are joined, so that no index comes twice."""


class OutputParser(Protocol):
    """Reads one choice. Push pieces of text as they come, of any length; finish once, at the end."""

    @property
    def in_reasoning(self) -> bool:
        """Whether the text stands inside of a reasoning block, which is certain to have been opened.

        A token counts as one of reasoning if this is true before its text was pushed, or after: so the markers count too.
        For a count that does not depend on how tokens come, push the text of one token at a time while this may change.
        """
        ...

    def push(self, text: str) -> OutputDelta:
        """Takes the next piece and returns what became certain by it. It never changes, whatever comes after."""
        ...

    def finish(self) -> OutputDelta:
        """Ends the text and returns what was held back. Nothing may be pushed afterwards."""
        ...


class PlainParser:
    """All text is content: a model without tools and reasoning, or a request that wants its text as it is."""

    in_reasoning = False

    def push(self, text: str) -> OutputDelta:
        return OutputDelta(text)

    def finish(self) -> OutputDelta:
        return OutputDelta()


class ReasoningThenTools:
    """Reasoning first; what that leaves as content is read for tool calls."""

    def __init__(self, reasoning: OutputParser, tools: OutputParser) -> None:
        self._reasoning, self._tools = reasoning, tools

    @property
    def in_reasoning(self) -> bool:
        return self._reasoning.in_reasoning

    def push(self, text: str) -> OutputDelta:
        content, reasoning, _ = self._reasoning.push(text)
        if not content:
            return OutputDelta(reasoning=reasoning)
        return self._tools.push(content)._replace(reasoning=reasoning)

    def finish(self) -> OutputDelta:
        content, reasoning, _ = self._reasoning.finish()
        pieces = [self._tools.push(content), self._tools.finish()] if content else [self._tools.finish()]
        return join(pieces)._replace(reasoning=reasoning)


def join(deltas: list[OutputDelta]) -> OutputDelta:
    """The deltas as one: texts appended, the pieces of each call put together."""
    calls: list[ToolCallDelta] = []
    for delta in deltas:
        for call in delta.tool_calls:
            if calls and calls[-1].index == call.index:
                first = calls[-1]
                calls[-1] = ToolCallDelta(first.index, first.name, first.arguments + call.arguments)
            else:
                calls.append(call)
    return OutputDelta("".join(d.content for d in deltas), "".join(d.reasoning for d in deltas), tuple(calls))
