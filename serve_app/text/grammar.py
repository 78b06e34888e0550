"""What an answer may be, as the text that SamplingParams.grammar carries: JSON, a schema, a regex, one of some strings, a
grammar. The text is llguidance's JSON form of a grammar.

Knows the library's input languages; loads no torch and compiles nothing: `grammar_check` does, where it can harm nobody.
What can be seen without compiling is refused here, with InvalidParameterError or UnsupportedParameterError and the place.

White space in JSON is at most one blank behind a comma and behind a colon. Models write JSON on one line so, or without
any blank, and may do either; a grammar that allows any white space lets a small model write blanks until max_tokens.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from serve_app.engine.request import MAX_GRAMMAR_LENGTH
from serve_app.errors import InvalidParameterError
from serve_app.text.json_schema import prepare

MAX_CHOICES = 1024
MAX_CHOICES_LENGTH = 65_536
"""Characters of all choices together."""
MAX_REGEX_LENGTH = 16_384
MAX_TEXT_LENGTH = 65_536
"""Characters of a grammar that a client writes."""

ONE_BLANK = {"whitespace_flexible": False, "item_separator": ", ?", "key_separator": ": ?"}
NO_BLANK = {"whitespace_flexible": False}
_ONLY_WHITE_SPACE = re.compile(r"(?:\\[snrt]|\\x20|\\x0[9AaDd]|\(\?:|\{\d{1,4}(?:,\d{0,4})?\}|[ \t\r\n\[\]()|?*+])*")
_CODE_POINT = re.compile(r"(?<!\\)((?:\\\\)*)\\(?:u([0-9a-fA-F]{4})|U([0-9a-fA-F]{8}))")


@dataclass(frozen=True)
class JsonOptions:
    """How JSON is written. The names are vLLM's."""

    whitespace_pattern: str | None = None
    """A regex of white space, allowed once at each place where JSON may have some. None: see above."""

    disable_any_whitespace: bool = False
    """No white space at all."""

    disable_additional_properties: bool = False
    """Objects that list their properties have no others, also where a schema is put together."""

    def separators(self, path: str = "") -> dict[str, Any]:
        """The library's options. ``path``: before the field's name in messages. Raises InvalidParameterError."""
        pattern = self.whitespace_pattern
        if pattern is None or pattern == "":
            return NO_BLANK if self.disable_any_whitespace or pattern == "" else ONE_BLANK
        if self.disable_any_whitespace:
            raise InvalidParameterError("whitespace_pattern", pattern, "left out where disable_any_whitespace is true")
        if _ONLY_WHITE_SPACE.fullmatch(pattern) is None or len(pattern) > 256:
            raise InvalidParameterError(
                path + "whitespace_pattern",
                pattern,
                "a regex of blanks, tabs and line ends: ' ', \\n, \\r, \\t, \\s, [], |, ?, *, +, {}",
            )
        return {**NO_BLANK, "whitespace_pattern": pattern.replace(r"\s", r"[ \n\r\t]")}


def json_object(options: JsonOptions | None = None) -> str:
    """Any JSON object."""
    return json_schema({"type": "object"}, options=options)


def json_schema(schema: Any, path: str = "schema", *, strict: bool = True, options: JsonOptions | None = None) -> str:
    """JSON that is valid under ``schema`` (an object, true or false). ``path`` and ``strict``: as `json_schema.prepare`."""
    options = options or JsonOptions()
    separators = options.separators()
    if not strict:
        separators = {**separators, "lenient": True}
    prepared = prepare(schema, path, strict=strict, disable_additional_properties=options.disable_additional_properties)
    return _text([{"json_schema": {**prepared, "x-guidance": separators}}], path)


def regex(pattern: str, path: str = "regex") -> str:
    """Text that the whole of ``pattern`` matches: Rust's regex syntax, which is Python's without look-around and
    back-references. ``\\d`` and ``\\w`` are ASCII. ``.`` is no line end."""
    if not isinstance(pattern, str) or not pattern:
        raise InvalidParameterError(path, pattern, "a regex that is not empty")
    if len(pattern) > MAX_REGEX_LENGTH:
        raise InvalidParameterError(path, f"{len(pattern)} characters long", f"at most {MAX_REGEX_LENGTH} long")
    import llguidance  # a tenth of a second: not when this file is imported

    return _text([{"lark_grammar": f"start: /{llguidance.regex_to_lark(pattern, 'dw')}/"}], path)


def choice(strings: Sequence[str], path: str = "choice") -> str:
    """One of the strings, exactly."""
    if not isinstance(strings, list | tuple) or not strings:
        raise InvalidParameterError(path, strings, "a list of at least one string")
    if len(strings) > MAX_CHOICES:
        raise InvalidParameterError(path, f"{len(strings)} entries", f"at most {MAX_CHOICES} entries")
    for i, one in enumerate(strings):
        if not isinstance(one, str) or not one:
            raise InvalidParameterError(f"{path}[{i}]", one, "a string that is not empty")
    if (length := sum(map(len, strings))) > MAX_CHOICES_LENGTH:
        raise InvalidParameterError(path, f"{length} characters in all", f"at most {MAX_CHOICES_LENGTH} in all")
    return _text([{"lark_grammar": "start: " + " | ".join(map(quoted, dict.fromkeys(strings)))}], path)


def grammar(text: str, path: str = "grammar") -> str:
    """A sentence of a context-free grammar: Lark as llguidance has it (the rule ``start``), or EBNF as GBNF of llama.cpp
    and xgrammar have it (``root ::= ...``)."""
    if not isinstance(text, str) or not text.strip():
        raise InvalidParameterError(path, text, "a grammar in Lark or EBNF")
    if len(text) > MAX_TEXT_LENGTH:
        raise InvalidParameterError(path, f"{len(text)} characters long", f"at most {MAX_TEXT_LENGTH} long")
    if "::=" in text:
        from llguidance.gbnf_to_lark import gbnf_to_lark

        try:
            text = gbnf_to_lark(_CODE_POINT.sub(_spelled, text))
        except (Exception, RecursionError) as error:  # the library raises plain Exception
            shown = " ".join(str(error).split())[:200]
            raise InvalidParameterError(path, text, f"EBNF that can be read: {shown}") from error
    else:
        text = re.sub(r"(?m)^([ \t]*)[?!]+(?=[a-z_])", r"\1", text)  # Lark's marks of how a tree is shaped
    return _text([{"lark_grammar": text}], path)


def combined(lark: str, named: dict[str, str], path: str = "grammar") -> str:
    """A grammar in Lark whose rules name others by ``@name``."""
    grammars: list[dict[str, Any]] = [{"lark_grammar": lark}]
    for name, text in named.items():
        first, *others = json.loads(text)["grammars"]
        grammars += [{"name": name, **first}, *others]
    return _text(grammars, path)


def quoted(text: str) -> str:
    """A literal of Lark."""
    return json.dumps(text, ensure_ascii=False)


def _spelled(escape: re.Match[str]) -> str:
    """\\u0041 as the library's converter can take it: the character, or in two digits."""
    code = int(escape[2] or escape[3], 16)
    if code > 0x10FFFF or 0xD800 <= code < 0xE000:
        raise ValueError(f"{escape[0]} is no character")
    return escape[1] + (chr(code) if code > 0xFF or chr(code).isalnum() else f"\\x{code:02x}")


def _text(grammars: list[dict[str, Any]], path: str) -> str:
    try:
        text = json.dumps({"grammars": grammars}, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
        text.encode()
    except (ValueError, TypeError, RecursionError) as error:
        raise InvalidParameterError(path, type(error).__name__, f"JSON: {error}") from error
    if len(text) > MAX_GRAMMAR_LENGTH:
        raise InvalidParameterError(path, f"{len(text)} characters long", f"at most {MAX_GRAMMAR_LENGTH} long")
    return text
