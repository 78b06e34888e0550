"""Parsers of tool calls written as JSON: Hermes and Qwen, Llama 3, Mistral. Each class shows its format.

The text of the arguments is given out as the model wrote it, so that what is streamed is what comes in one piece. Knows
characters; knows no chat template and no request.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection

from serve_app.text.tool_reader import Reading, ToolReader

NAME = "name"
ARGUMENTS = ("arguments", "parameters")
"""Members of a call. Models take either word for the second, whatever their template says."""

KNOWN_MEMBERS = frozenset({NAME, *ARGUMENTS, "type", "id"})
"""What an object may hold that is read as a call although no marker says so."""

NAME_CHARACTERS = re.compile(r"[\w.\-]*")


class JsonCallReader(ToolReader):
    """Reads ``{"name": "f", "arguments": {...}}``, the members in any order, further ones skipped."""

    def _call(self, only_known_members: bool = False) -> Reading[bool]:
        """Reads the object at the cursor as one call. False where it is none, or breaks off; what was given out stays.

        Arguments that come before the name are kept until it is known. An object without arguments is a call with none.
        Arguments may be a string that holds the object as JSON, or null for none.
        """
        self._at += 1
        name: str | None = None
        early: str | None = None
        begun = False
        char = yield from self._skip_space()
        while char == '"':
            member = _string((yield from self._value()))
            if member is None or (only_known_members and member not in KNOWN_MEMBERS):
                return False
            yield from self._skip_space()
            if not (yield from self._literal(":")):
                return False
            char = yield from self._skip_space()
            if member == NAME and name is None:
                name = _string((yield from self._value())) if char == '"' else None
                if name not in self._tool_names:
                    return False
                if early is not None:
                    self._begin_call(name)
                    self._give_arguments(early)
                    begun = True
            elif member in ARGUMENTS and early is None and not begun:
                if char == "{" and name is not None:
                    self._begin_call(name)
                    begun = True
                    if not (yield from self._arguments()):
                        return False
                else:
                    early = _object_text((yield from self._value()))
                    if early is None:
                        return False
                    if name is not None:
                        self._begin_call(name)
                        self._give_arguments(early)
                        begun = True
            elif (yield from self._value()) is None:
                return False
            char = yield from self._skip_space()
            if char != ",":
                break
            self._at += 1
            char = yield from self._skip_space()
        if char != "}" or name is None:
            return False
        self._at += 1
        if not begun:
            self._begin_call(name)
            self._give_arguments("{}")
        self._take()
        return True


class HermesParser(JsonCallReader):
    """``<tool_call>{"name": "f", "arguments": {...}}</tool_call>``, also several objects in one pair of markers.

    A block ends with the closer, or where something else stands in it, which is content.
    """

    def __init__(self, tool_names: Collection[str]) -> None:
        super().__init__(tool_names, ("<tool_call>",), closer="</tool_call>")

    def _read(self) -> Reading[None]:
        while (yield from self._find_opener()):
            while (yield from self._skip_space()) == "{" and (yield from self._call()):
                pass
            self._give_up()


class Llama3JsonParser(JsonCallReader):
    """``{"name": "f", "parameters": {...}}`` at the beginning of a line, several with ";" or "," or a line break between
    them; anywhere behind ``<|python_tag|>``. Without the tag such an object may hold nothing but what a call holds.
    """

    def __init__(self, tool_names: Collection[str]) -> None:
        super().__init__(tool_names, ("<|python_tag|>",), line_openers="{")

    def _read(self) -> Reading[None]:
        while marker := (yield from self._find_opener()):
            if marker != "{" and (yield from self._skip_space()) != "{":
                self._give_up()
                continue
            while (yield from self._call(only_known_members=marker == "{")):
                # A separator belongs to the format only if a call follows it.
                if (yield from self._skip_space()) in (";", ","):
                    self._at += 1
                    yield from self._skip_space()
                if (yield from self._peek()) != "{":
                    break
            self._give_up()


class MistralParser(JsonCallReader):
    """``[TOOL_CALLS] [{"name": "f", "arguments": {...}}, ...]``, and of newer models ``[TOOL_CALLS]f[ARGS]{...}``, where
    ``[CALL_ID]`` and an id may stand before ``[ARGS]``; each further call has the marker again.
    """

    def __init__(self, tool_names: Collection[str]) -> None:
        super().__init__(tool_names, ("[TOOL_CALLS]",))

    def _read(self) -> Reading[None]:
        while (yield from self._find_opener()):
            char = yield from self._skip_space()
            if char == "[":
                is_read = yield from self._list()
            elif char == "{":
                is_read = yield from self._call()
            else:
                is_read = yield from self._named()
            if not is_read:
                self._give_up()

    def _list(self) -> Reading[bool]:
        self._at += 1
        while (yield from self._skip_space()) == "{":
            if not (yield from self._call()):
                return False
            char = yield from self._skip_space()
            if char in ("]", ","):
                self._at += 1
            if char != ",":
                return char == "]"
        return False

    def _named(self) -> Reading[bool]:
        name = yield from self._word(NAME_CHARACTERS)
        if name not in self._tool_names:
            return False
        if (yield from self._peek()) == "[":
            self._at += 1
            if (yield from self._peek()) == "C":
                if not (yield from self._literal("CALL_ID]")):
                    return False
                yield from self._word(NAME_CHARACTERS)
                if not (yield from self._literal("[")):
                    return False
            if not (yield from self._literal("ARGS]")):
                return False
        if (yield from self._skip_space()) != "{":
            return False
        self._begin_call(name)
        return (yield from self._arguments())


def _string(text: str | None) -> str | None:
    """The string that a JSON string stands for, or None if it is none."""
    try:
        value = json.loads(text or "null", strict=False)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, str) else None


def _object_text(text: str | None) -> str | None:
    """The text of an object that stands as itself, in a string, or as null; None if it is none of these."""
    if text is None or text.startswith("{"):
        return text
    if text == "null":
        return "{}"
    held = _string(text)
    try:
        return held if held is not None and isinstance(json.loads(held), dict) else None
    except (ValueError, RecursionError):
        return None
