"""ToolReader: what the parsers of tool calls share. Reads a growing text with a cursor, gives out content and calls.

A parser is a generator that reads as if the whole text were there, and yields where it needs more of it:

    given out ........ | region ...... | not read yet
                     _mark           _at

Content is given out at once. A region is text that may turn out to be a call. It is kept until that is certain, which is
when the name is known to be one of the tools and the arguments begin; from then on the arguments are given out as they
come. Text that breaks the format ends the region: what was not given out of it is content, and reading goes on with the
character that did not fit. So every character is read once, whatever a model writes.

White space around calls is content only if content follows it.

Knows characters; knows no format: those are in `tool_parsers` and its neighbours.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Generator
from typing import TypeVar

from serve_app.text.output_parser import OutputDelta, ToolCallDelta, join
from serve_app.text.reasoning_formats import num_held_back

T = TypeVar("T")
Reading = Generator[None, None, T]
"""Reads on until it can return a T. Each yield asks for more text, or for its end."""

IN_STRING = re.compile(r'["\\]')
SCALAR_CHARACTERS = re.compile(r"[\w+.\-]*")


class ToolReader:
    """Base of the parsers (see `OutputParser`); they fill in `_read`.

    ``tool_names``: a call of any other name is content. ``openers``: texts that open a call wherever they stand.
    ``line_openers``: single characters that may open one at the beginning of a line, and right after another call.
    ``closer``: ends a call, or a group of them; "" if the format has none. Behind a call it is not shown.
    """

    in_reasoning = False

    def __init__(
        self, tool_names: Collection[str], openers: tuple[str, ...], line_openers: str = "", closer: str = ""
    ) -> None:
        self._tool_names = frozenset(tool_names)
        self._openers = openers
        self._line_openers = line_openers
        self._closer = closer
        self._markers = (*openers, closer) if closer else openers
        self._marker = re.compile("|".join(map(re.escape, (*self._markers, *line_openers))))
        starts = "".join(sorted({marker[0] for marker in self._markers}))
        self._structure = re.compile("[" + re.escape('"{}[]' + starts) + "]")

        self._text = ""
        self._mark = self._at = 0
        self._is_over = False
        self._content: list[str] = []
        self._deltas: list[ToolCallDelta] = []
        self._num_calls = 0
        self._space = ""
        """White space that is content if content follows."""
        self._num_space_before = 0
        """How much of that stood before the last call. What stands between a call and its closer is never content."""
        self._line_is_blank = True
        """Nothing but blanks has come since the last line break or call."""
        self._closer_is_due = False
        """A call has come since the last opener: the next closer is its own."""
        self._reading = self._read()
        next(self._reading)

    def push(self, text: str) -> OutputDelta:
        self._text = self._text[self._mark :] + text
        self._at -= self._mark
        self._mark = 0
        next(self._reading)
        return self._given_out()

    def finish(self) -> OutputDelta:
        self._is_over = True
        next(self._reading, None)
        if not self._num_calls:
            self._content.append(self._space)
        return self._given_out()

    def _read(self) -> Reading[None]:
        """Reads the whole text. Returns only where it is over."""
        raise NotImplementedError

    # What is given out

    def _given_out(self) -> OutputDelta:
        delta = OutputDelta("".join(self._content), "", tuple(self._deltas))
        if self._content:
            self._content = []
        if self._deltas:
            self._deltas = []
        return join([delta]) if len(delta.tool_calls) > 1 else delta

    def _give_content(self, text: str) -> None:
        kept = text.rstrip()
        if kept:
            self._content += self._space, kept
            self._space, self._num_space_before = "", 0
        self._space += text[len(kept) :]
        if self._line_openers:
            _, line_break, line = text.rpartition("\n")
            self._line_is_blank = (self._line_is_blank or bool(line_break)) and not line.strip()

    def _give_up(self) -> None:
        """The region is no call."""
        self._give_content(self._text[self._mark : self._at])
        self._mark = self._at

    def _take(self) -> None:
        """The region is the format's own and shown nowhere."""
        self._mark = self._at

    def _begin_call(self, name: str) -> None:
        self._deltas.append(ToolCallDelta(self._num_calls, name))
        self._num_calls += 1
        self._line_is_blank = True
        self._closer_is_due = bool(self._closer)
        self._num_space_before = len(self._space)
        self._take()

    def _give_arguments(self, text: str) -> None:
        """The next characters of the call that began last. The region up to the cursor is done with."""
        self._deltas.append(ToolCallDelta(self._num_calls - 1, None, text))
        self._take()

    # Content mode

    def _find_opener(self) -> Reading[str]:
        """Gives out content up to an opener, with which a region then begins; returns it, or "" where the text is over.

        The cursor stands behind the opener, and at it if it is a line opener.
        """
        while True:
            self._take()
            found = self._marker.search(self._text, self._at)
            if found is not None:
                self._give_content(self._text[self._at : found.start()])
                self._mark, self._at = found.start(), found.end()
                marker = found.group()
                if marker in self._openers:
                    self._closer_is_due = False
                    return marker
                if marker == self._closer:
                    if self._closer_is_due:
                        self._space = self._space[: self._num_space_before]
                        self._closer_is_due = False
                    else:
                        self._give_up()
                elif self._line_is_blank:
                    self._at = self._mark
                    return marker
                else:
                    self._give_up()
                continue
            num_held = 0 if self._is_over else max((num_held_back(self._text, m) for m in self._markers), default=0)
            end = max(self._at, len(self._text) - num_held)
            self._give_content(self._text[self._at : end])
            self._at = self._mark = end
            if self._is_over:
                return ""
            yield

    # Reading inside of a region

    def _peek(self) -> Reading[str]:
        """The character at the cursor; "" where the text is over."""
        while self._at == len(self._text):
            if self._is_over:
                return ""
            yield
        return self._text[self._at]

    def _skip_space(self) -> Reading[str]:
        """Moves to the next character that is no white space, and returns it; "" where the text is over."""
        while (char := (yield from self._peek())) and char.isspace():
            self._at += 1
        return char

    def _literal(self, literal: str) -> Reading[bool]:
        """Moves behind ``literal`` if it stands at the cursor; else stays."""
        start = self._at - self._mark
        for wanted in literal:
            if (yield from self._peek()) != wanted:
                self._at = self._mark + start  # a marker may stand there
                return False
            self._at += 1
        return True

    def _word(self, characters: re.Pattern[str] = SCALAR_CHARACTERS) -> Reading[str]:
        """Moves behind a run of ``characters`` and returns it."""
        start = self._at - self._mark
        while True:
            found = characters.match(self._text, self._at)
            assert found is not None
            self._at = found.end()
            if self._at < len(self._text) or self._is_over:
                return self._text[self._mark + start : self._at]
            yield

    def _value(self) -> Reading[str | None]:
        """Moves behind a JSON value and returns its text; None if that breaks off."""
        start = self._at - self._mark
        char = yield from self._peek()
        if char in ("{", "[", '"') and char:
            if not (yield from self._nested(gives_out=False)):
                return None
            return self._text[self._mark + start : self._at]
        return (yield from self._word()) or None

    def _arguments(self) -> Reading[bool]:
        """Gives out the JSON object at the cursor as the arguments of the call that began last, as it comes.

        Only its braces and strings are looked at: that it is valid JSON is the model's business. It breaks off (False)
        where the text is over, and at a marker outside of strings, which stays unread.
        """
        return self._nested(gives_out=True)

    def _nested(self, gives_out: bool) -> Reading[bool]:
        """Moves behind the object, list or string at the cursor."""
        depth, in_string, is_escaped = 0, False, False
        while True:
            text, at = self._text, self._at
            start, ended = at, False
            while at < len(text) and not ended:
                if is_escaped:
                    at, is_escaped = at + 1, False
                    continue
                found = (IN_STRING if in_string else self._structure).search(text, at)
                if found is None:
                    at = len(text)
                    break
                char, at = found.group(), found.end()
                if in_string:
                    in_string, is_escaped = char != '"', char == "\\"
                    ended = not in_string and depth == 0
                elif char == '"':
                    in_string = True
                else:
                    rest = text[found.start() : found.start() + max(map(len, self._markers), default=0)]
                    if any(rest.startswith(marker) for marker in self._markers):
                        self._at = found.start()
                        if gives_out:
                            self._give_arguments(text[start : self._at])
                        return False
                    if not self._is_over and any(m.startswith(rest) and m != rest for m in self._markers):
                        at = found.start()
                        break  # it may become a marker
                    depth += (char in "{[") - (char in "}]")
                    ended = depth == 0 and char in "}]"
            self._at = at
            if gives_out and at > start:
                self._give_arguments(text[start:at])
            if ended:
                return True
            if self._is_over:
                return False
            yield
