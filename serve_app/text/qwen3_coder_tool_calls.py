"""Parser of the tool calls of Qwen3-Coder, and of the models that took its format over (Qwen3.5, Nemotron 3, ...):

    <tool_call>
    <function=name>
    <parameter=key>
    value, on as many lines as it takes
    </parameter>
    </function>
    </tool_call>

Values are bare text. What they are in JSON is told by the tool's schema: text where the parameter is a string (given out
as it comes) or unknown; elsewhere the value is read as JSON once it is whole, and is text if it is none.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from serve_app.text.reasoning_formats import num_held_back
from serve_app.text.tool_reader import Reading, ToolReader

FUNCTION = "<function="
END_OF_FUNCTION = "</function>"
PARAMETER = "<parameter="
END_OF_VALUE = "</parameter>"
LABEL_CHARACTERS = re.compile(r"[^<>\n]*")
PYTHON_CONSTANTS = {"True": "true", "False": "false", "None": "null"}


class Qwen3CoderParser(ToolReader):
    """``tools``: for each name the JSON schema of its parameters, or None."""

    def __init__(self, tools: Mapping[str, Mapping[str, Any] | None]) -> None:
        super().__init__(tools, ("<tool_call>", FUNCTION), closer="</tool_call>")
        self._schemas = tools

    def _read(self) -> Reading[None]:
        while marker := (yield from self._find_opener()):
            if marker != FUNCTION:
                yield from self._skip_space()
                if not (yield from self._literal(FUNCTION)):
                    self._give_up()
                    continue
            if not (yield from self._function()):
                self._give_up()

    def _function(self) -> Reading[bool]:
        name = (yield from self._word(LABEL_CHARACTERS)).strip()
        if name not in self._tool_names or not (yield from self._literal(">")):
            return False
        self._begin_call(name)
        before = "{"
        while True:
            yield from self._skip_space()
            if (yield from self._literal(END_OF_FUNCTION)):
                self._give_arguments("{}" if before == "{" else "}")
                return True
            if not (yield from self._literal(PARAMETER)):
                return False
            key = (yield from self._word(LABEL_CHARACTERS)).strip()
            if not (yield from self._literal(">")):
                return False
            self._give_arguments(f"{before}{json.dumps(key, ensure_ascii=False)}: ")
            before = ", "
            is_whole = yield from (self._text_value() if self._is_text(name, key) else self._json_value())
            if not is_whole:
                return False

    def _is_text(self, name: str, key: str) -> bool:
        properties = (self._schemas[name] or {}).get("properties")
        schema = properties.get(key) if isinstance(properties, Mapping) else None
        return not isinstance(schema, Mapping) or schema.get("type") == "string"

    def _text_value(self) -> Reading[bool]:
        """Gives out the value as a JSON string, as it comes, without the line breaks next to its tags."""
        yield from self._skip_line_break()
        self._give_arguments('"')
        while True:
            end = self._text.find(END_OF_VALUE, self._at)
            is_whole = end >= 0
            if not is_whole:
                end = len(self._text)
                if not self._is_over:
                    end = max(self._at, end - num_held_back(self._text, END_OF_VALUE))
            shown = self._text[self._at : end]
            held = "\n" if shown.endswith("\n") and (is_whole or not self._is_over) else ""
            self._at = end + len(END_OF_VALUE) if is_whole else end - len(held)
            self._give_arguments(json.dumps(shown.removesuffix(held), ensure_ascii=False)[1:-1] + '"' * is_whole)
            if is_whole or self._is_over:
                return is_whole
            yield

    def _json_value(self) -> Reading[bool]:
        yield from self._skip_line_break()
        self._take()
        num_searched = 0
        while (end := self._text.find(END_OF_VALUE, max(self._at, num_searched))) < 0:
            num_searched = len(self._text) - self._mark - len(END_OF_VALUE)
            if self._is_over:
                self._at = len(self._text)
                return False
            yield
        value = self._text[self._at : end].removesuffix("\n")
        self._at = end + len(END_OF_VALUE)
        self._give_arguments(_as_json(value))
        return True

    def _skip_line_break(self) -> Reading[None]:
        if (yield from self._peek()) == "\n":
            self._at += 1


def _as_json(value: str) -> str:
    stripped = value.strip()
    try:
        json.loads(stripped, parse_constant=_no_constant)
    except (ValueError, RecursionError):
        return PYTHON_CONSTANTS.get(stripped) or json.dumps(value, ensure_ascii=False)
    return stripped


def _no_constant(name: str) -> None:
    raise ValueError(name)  # NaN and the infinities: Python reads them, JSON has none
