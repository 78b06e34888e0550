"""Parser of tool calls written as Python: ``[f(a=1, b="x"), g()]``. Llama 3.2 and 4, and Gemma where asked for it.

The values are Python literals and are written as JSON while they come. Knows characters; knows no chat template and no
request.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Collection

from serve_app.text.tool_reader import Reading, ToolReader

MAX_DEPTH = 64
"""Lists and dicts inside of each other. A value that goes deeper breaks the call off."""

NAME_CHARACTERS = re.compile(r"[\w.\-]*")
KEYWORD_CHARACTERS = re.compile(r"\w*")
PLAIN_CHARACTERS = re.compile(r"""[^\\'"]*""")
JSON_NUMBER = re.compile(r"-?(0|[1-9]\d*)(\.\d+)?([eE][+-]?\d+)?", re.ASCII)
CONSTANTS = {"True": "true", "False": "false", "None": "null", "true": "true", "false": "false", "null": "null"}
ESCAPES = dict(zip("abfnrtv\\'\"\n", ["\a", "\b", "\f", "\n", "\r", "\t", "\v", "\\", "'", '"', ""], strict=True))
NUM_HEX_DIGITS = {"x": 2, "u": 4, "U": 8}


class PythonicParser(ToolReader):
    """A list of calls with keyword arguments at the beginning of a line, or between ``<|python_start|>`` and
    ``<|python_end|>``. A call begins with its first keyword, or where it turns out to have none.
    """

    def __init__(self, tool_names: Collection[str]) -> None:
        super().__init__(tool_names, ("<|python_start|>",), line_openers="[", closer="<|python_end|>")

    def _read(self) -> Reading[None]:
        while (yield from self._find_opener()):
            if (yield from self._skip_space()) == "[":
                self._at += 1
                if (yield from self._list()):
                    continue
            self._give_up()

    def _list(self) -> Reading[bool]:
        while True:
            yield from self._skip_space()
            name = yield from self._word(NAME_CHARACTERS)
            if name not in self._tool_names or not (yield from self._literal("(")):
                return False
            if not (yield from self._keywords(name)):
                return False
            char = yield from self._skip_space()
            if char == ",":
                self._at += 1
                char = yield from self._skip_space()
                if char != "]":
                    continue
            if char != "]":
                return False
            self._at += 1
            return True

    def _keywords(self, name: str) -> Reading[bool]:
        char = yield from self._skip_space()
        before = "{"
        while char != ")":
            keyword = yield from self._word(KEYWORD_CHARACTERS)
            yield from self._skip_space()
            if not keyword or not (yield from self._literal("=")):
                return False
            yield from self._skip_space()
            if before == "{":
                self._begin_call(name)
            self._give_arguments(f"{before}{json.dumps(keyword, ensure_ascii=False)}: ")
            before = ", "
            if not (yield from self._literal_value(0)):
                return False
            char = yield from self._skip_space()
            if char == ",":
                self._at += 1
                char = yield from self._skip_space()
            elif char != ")":
                return False
        self._at += 1
        if before == "{":
            self._begin_call(name)
        self._give_arguments("}" if before == ", " else "{}")
        return True

    def _literal_value(self, depth: int) -> Reading[bool]:
        """Gives out the Python literal at the cursor as JSON. False where it is none, or one that JSON lacks."""
        char = yield from self._peek()
        if char in ("'", '"'):
            return (yield from self._string(char))
        if char in ("[", "(", "{") and char:
            return depth < MAX_DEPTH and (yield from self._collection(char, depth))
        written = _json_scalar((yield from self._word()))
        if written is None:
            return False
        self._give_arguments(written)
        return True

    def _collection(self, opening: str, depth: int) -> Reading[bool]:
        closing = {"[": "]", "(": ")", "{": "}"}[opening]
        is_dict = opening == "{"
        self._at += 1
        self._give_arguments("{" if is_dict else "[")
        char = yield from self._skip_space()
        while char != closing:
            if is_dict:
                if char not in ("'", '"') or not char or not (yield from self._string(char)):
                    return False
                yield from self._skip_space()
                if not (yield from self._literal(":")):
                    return False
                self._give_arguments(": ")
                yield from self._skip_space()
            if not (yield from self._literal_value(depth + 1)):
                return False
            char = yield from self._skip_space()
            if char == ",":
                self._at += 1
                char = yield from self._skip_space()
                if char != closing:
                    self._give_arguments(", ")
            elif char != closing:
                return False
        self._at += 1
        self._give_arguments("}" if is_dict else "]")
        return True

    def _string(self, quote: str) -> Reading[bool]:
        """Gives out the string at the cursor as it comes."""
        num_quotes = yield from self._quotes(quote)
        if num_quotes == 2:
            self._give_arguments('""')
            return True
        self._give_arguments('"')
        while True:
            char = yield from self._peek()
            if not char:
                return False
            if char == quote:
                num_more = 1 if num_quotes == 1 else (yield from self._quotes(quote))
                if num_quotes == 1:
                    self._at += 1
                if num_more == num_quotes:
                    self._give_arguments('"')
                    return True
                self._give_arguments(_json_characters(quote * num_more))
            elif char == "\\":
                self._at += 1
                written = yield from self._escape()
                if written is None:
                    return False
                self._give_arguments(written)
            elif char in "'\"":
                self._at += 1
                self._give_arguments(_json_characters(char))
            else:
                found = PLAIN_CHARACTERS.match(self._text, self._at)
                assert found is not None
                self._at = found.end()
                self._give_arguments(_json_characters(found.group()))

    def _quotes(self, quote: str) -> Reading[int]:
        """Moves behind up to three quotes, and returns how many there were."""
        num = 0
        while num < 3 and (yield from self._peek()) == quote:
            self._at += 1
            num += 1
        return num

    def _escape(self) -> Reading[str | None]:
        """Moves behind what follows a backslash. Returns the character it stands for as JSON; None if there is none."""
        char = yield from self._peek()
        if not char:
            return None
        self._at += 1
        if char in ESCAPES:
            return _json_characters(ESCAPES[char])
        if char not in NUM_HEX_DIGITS:
            return _json_characters("\\" + char)
        digits = ""
        for _ in range(NUM_HEX_DIGITS[char]):
            digit = yield from self._peek()
            if digit not in "0123456789abcdefABCDEF" or not digit:
                return None
            digits += digit
            self._at += 1
        code = int(digits, 16)
        if code > 0x10FFFF:
            return None
        # Half of a surrogate pair is no character. As an escape its other half may still follow.
        return f"\\u{code:04x}" if 0xD800 <= code < 0xE000 else _json_characters(chr(code))


def _json_characters(text: str) -> str:
    """As they stand inside of a JSON string."""
    return json.dumps(text, ensure_ascii=False)[1:-1]


def _json_scalar(word: str) -> str | None:
    """A Python constant or number as JSON; None if JSON has none such."""
    if word in CONSTANTS:
        return CONSTANTS[word]
    if JSON_NUMBER.fullmatch(word):
        return word
    try:
        return str(int(word, 0))
    except ValueError:
        pass
    try:
        number = float(word)
    except ValueError:
        return None
    return repr(number) if math.isfinite(number) else None
