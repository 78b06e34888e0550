"""The types that parsers share: joining deltas, the pass-through, reasoning before tools."""

from __future__ import annotations

from serve_app.text.output_parser import OutputDelta, OutputParser, PlainParser, ReasoningThenTools, ToolCallDelta, join


def test_plain_text_passes_through() -> None:
    parser: OutputParser = PlainParser()
    assert [parser.push(piece) for piece in ("<tool_call>", "", "x")] == [
        OutputDelta("<tool_call>"),
        OutputDelta(),
        OutputDelta("x"),
    ]
    assert parser.finish() == OutputDelta()
    assert not parser.in_reasoning


def test_the_pieces_of_a_call_are_joined() -> None:
    pieces = [
        OutputDelta("a", "r", (ToolCallDelta(0, "f", "{"),)),
        OutputDelta(),
        OutputDelta("b", "s", (ToolCallDelta(0, None, "}"), ToolCallDelta(1, "g"))),
        OutputDelta(tool_calls=(ToolCallDelta(1, None, "{}"),)),
    ]
    assert join(pieces) == OutputDelta("ab", "rs", (ToolCallDelta(0, "f", "{}"), ToolCallDelta(1, "g", "{}")))
    assert join([]) == OutputDelta()


class Upper:
    """Reasoning up to the first "|", which is not shown; holds one character back, to show that the end gives it out."""

    def __init__(self) -> None:
        self.in_reasoning = True
        self._held = ""

    def push(self, text: str) -> OutputDelta:
        text, self._held = self._held + text[:-1], text[-1:]
        if not self.in_reasoning or "|" not in text:
            return OutputDelta(reasoning=text) if self.in_reasoning else OutputDelta(text)
        self.in_reasoning = False
        reasoning, _, content = text.partition("|")
        return OutputDelta(content, reasoning)

    def finish(self) -> OutputDelta:
        return OutputDelta(reasoning=self._held) if self.in_reasoning else OutputDelta(self._held)


class Calls:
    """Each character of content is a call."""

    in_reasoning = False
    num_calls = 0

    def push(self, text: str) -> OutputDelta:
        first, self.num_calls = self.num_calls, self.num_calls + len(text)
        return OutputDelta(tool_calls=tuple(ToolCallDelta(first + i, name) for i, name in enumerate(text)))

    def finish(self) -> OutputDelta:
        return OutputDelta(f"{self.num_calls} calls")


def test_reasoning_comes_first_and_the_rest_is_read_for_calls() -> None:
    parser = ReasoningThenTools(Upper(), Calls())
    assert parser.push("why") == OutputDelta(reasoning="wh")
    assert parser.in_reasoning
    assert parser.push("?|fg") == OutputDelta("", "y?", (ToolCallDelta(0, "f"),))
    assert not parser.in_reasoning
    assert parser.finish() == OutputDelta("2 calls", "", (ToolCallDelta(1, "g"),))
