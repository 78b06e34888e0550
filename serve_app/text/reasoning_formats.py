"""Reasoning formats: how models mark what they think before they answer. One table, and the parser of its rows.

    [start] reasoning ... [end] content ...        start may stand in the prompt already, or the block may be missing

Knows characters and chat templates; knows no token and no request. White space is left as the model wrote it, as vLLM's
parsers leave it (``vllm/reasoning/basic_parsers.py``): reasoning and content are what stands around the markers.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from serve_app.text.output_parser import OutputDelta


@dataclass(frozen=True)
class ReasoningFormat:
    """One row of the table."""

    name: str
    """As the configuration calls it."""

    start: str
    """Opens the block. Never shown."""

    end: str
    """Ends it. Never shown."""

    @property
    def markers(self) -> tuple[str, ...]:
        """Texts that the text stream must show, also where they are special tokens."""
        return (self.start, self.end)

    def fits(self, chat_template: str) -> bool:
        """Whether a model with this chat template writes reasoning so: the template cuts it from earlier turns (and names
        the end for that), or opens the block itself."""
        return self.end in chat_template or self.start in chat_template

    def is_open(self, prompt: str, final_message: str | None = None) -> bool:
        """Whether the prompt ends inside of a block, so that the answer begins as reasoning.

        Only its very end counts: a user may write the markers too. ``final_message``: the text of the message that the
        answer goes on with (continue_final_message), if it does; there an open block may have begun earlier.
        """
        if final_message is not None and self.start in final_message:
            return final_message.rfind(self.start) > final_message.rfind(self.end)
        return prompt.rstrip().endswith(self.start)

    def is_over(self, prompt: str) -> bool:
        """Whether the prompt ends behind a block, so that the answer begins as content: enable_thinking=false."""
        return prompt.rstrip().endswith(self.end)

    def parser(self, is_open: bool, silent_end: str = "") -> ReasoningParser:
        """A parser for one choice. ``is_open``: see `is_open`."""
        return ReasoningParser(self.start, self.end, is_open, silent_end)


class ReasoningParser:
    """Reads one choice: at most one block, at its beginning.

    Not open, and the text does not begin with ``start`` (after white space, which is dropped with it): all is content.
    Open, and it begins with ``start`` all the same: the model said it again, and it is dropped. A block that never ends
    is reasoning to the last character.

    ``silent_end``: a text with which content begins also where the model has not ended its block before.
    """

    def __init__(self, start: str, end: str, is_open: bool, silent_end: str = "") -> None:
        self._start = start
        self._ends = (end, silent_end) if silent_end else (end,)
        self._end_pattern = re.compile("|".join(map(re.escape, self._ends)))
        self.in_reasoning = is_open
        self._at_beginning = True
        self._held = ""

    def push(self, text: str) -> OutputDelta:
        if not self._at_beginning and not self.in_reasoning:
            return OutputDelta(text)
        text = self._held + text
        if self._at_beginning:
            bare = text.lstrip()
            if bare != self._start and self._start.startswith(bare):  # also where bare is empty
                self._held = text
                return OutputDelta()
            if bare.startswith(self._start):
                text = bare[len(self._start) :]
                self.in_reasoning = True
            self._at_beginning = False
            if not self.in_reasoning:
                self._held = ""
                return OutputDelta(text)
        found = self._end_pattern.search(text)
        if found is not None:
            self.in_reasoning, self._held = False, ""
            content_start = found.end() if found.group() == self._ends[0] else found.start()
            return OutputDelta(text[content_start:], text[: found.start()])
        num_shown = len(text) - max(num_held_back(text, end) for end in self._ends)
        self._held = text[num_shown:]
        return OutputDelta(reasoning=text[:num_shown])

    def finish(self) -> OutputDelta:
        held, self._held = self._held, ""
        return OutputDelta(reasoning=held) if self.in_reasoning else OutputDelta(held)


def num_held_back(text: str, marker: str) -> int:
    """Length of the longest end of ``text`` that is a beginning of ``marker``, the whole of it excluded."""
    start = max(0, len(text) - len(marker) + 1)
    while (start := text.find(marker[0], start)) >= 0:
        if marker.startswith(text[start:]):
            return len(text) - start
        start += 1
    return 0


REASONING_FORMATS = (
    ReasoningFormat("think", "<think>", "</think>"),
    ReasoningFormat("mistral", "[THINK]", "[/THINK]"),
    ReasoningFormat("granite", "Here is my thought process:", "Here is my response:"),
)
"""think: DeepSeek R1, QwQ, Qwen3 and many others. mistral: Magistral. granite: Granite 3.2 and 3.3, in plain words."""


def detect_reasoning_format(chat_template: str) -> ReasoningFormat | None:
    """The format of a model with this chat template, or None: such a model does not mark its reasoning."""
    return next((format for format in REASONING_FORMATS if format.fits(chat_template)), None)
