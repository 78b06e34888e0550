"""Grammars of answers with tool calls, in the words of the model's own format, and of what follows reasoning.

Each tool's name stands beside the grammar of its own arguments, so that no call can have those of another. The schemas are
enforced by `serve_app.text.grammar`. Knows formats and schemas; knows no request and no tokenizer: ids of special tokens
are passed in.

    tool_calls       calls and nothing else             tool_choice: required, or a function by its name
    text_and_calls   text in which every call is right  tool_choice auto, with strict functions or without parallel calls
    after_reasoning  the block of reasoning first, where a model writes one

A marker that is a special token is no text to a grammar, and is named by its id. A grammar with ids can be compiled for
that model alone; without ``special_ids`` the same grammar spells the markers out, and costs the same to compile: that is
the one to check first.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from serve_app.text import grammar
from serve_app.text.reasoning_formats import ReasoningFormat
from serve_app.text.tool_formats import CallShape

MAX_CALLS = 32
"""Calls of one answer. A model that never comes to an end by itself ends there."""

NO_IDS: Mapping[str, int] = {}


@dataclass(frozen=True)
class CallableTool:
    """A tool that the model may be made to call."""

    name: str

    parameters: Mapping[str, Any] | None = None
    """JSON schema of its arguments, an object. None: any object."""

    strict: bool = False
    """A keyword of the schema that cannot be enforced is an error; else it is left out. And see `text_and_calls`."""

    path: str = "parameters"
    """How messages call the schema."""


def tool_calls(
    shape: CallShape, tools: Sequence[CallableTool], *, parallel: bool, special_ids: Mapping[str, int] = NO_IDS
) -> str:
    """Calls of these tools and nothing else: one, or with ``parallel`` up to MAX_CALLS.

    ``shape``: of the format that the answer is parsed in. Raises InvalidParameterError or UnsupportedParameterError for a
    schema, with the tool's path.
    """
    rules, arguments = _calls(shape, tools, special_ids)
    rules.append(f"start: {_symbols(shape.opening, special_ids)} {_one_or_more(shape, parallel, special_ids)}")
    return grammar.combined("\n".join(rules), arguments, "tools")


def text_and_calls(
    shape: CallShape, tools: Sequence[CallableTool], *, parallel: bool, special_ids: Mapping[str, int] = NO_IDS
) -> str:
    """Any text, in which each `trigger` of the shape begins a call of one of these tools. The arguments of strict tools
    follow their schemas, those of the others are any object. Without ``parallel`` the first call is the end.

    Only for a shape with a trigger. Raises as `tool_calls`.
    """
    assert shape.trigger, "calls without a marker cannot be told from text"
    is_first = shape.opening.startswith(shape.trigger)
    shape = replace(
        shape,
        opening=shape.opening.removeprefix(shape.trigger),
        before_name=shape.before_name if is_first else shape.before_name.removeprefix(shape.trigger),
        separator=shape.separator if is_first else "",
    )
    tools = [tool if tool.strict else replace(tool, parameters=None) for tool in tools]
    rules, arguments = _calls(shape, tools, special_ids)
    # Where each call has a trigger of its own, the text between two is text.
    rules.append(
        f"calls: {_symbols(shape.opening, special_ids)} {_one_or_more(shape, parallel and is_first, special_ids)}"
    )
    rules.append("start: (head calls)* text" if parallel else "start: head calls | text")
    rules.append(r"text: /(.|\n)*/")
    if shape.trigger in special_ids:
        rules.append(f"head: /(.|\\n)*/ <[{special_ids[shape.trigger]}]>")
    else:
        rules.append(f"head[lazy]: /(.|\\n)*/ {grammar.quoted(shape.trigger)}")
    return grammar.combined("\n".join(rules), arguments, "tools")


def _calls(
    shape: CallShape, tools: Sequence[CallableTool], special_ids: Mapping[str, int]
) -> tuple[list[str], dict[str, str]]:
    """The rule ``call`` and those it needs, and the grammars that they name."""
    assert tools, "a call needs a tool"
    rules = ["call: " + " | ".join(f"call{i}" for i in range(len(tools)))]
    arguments = {}
    for i, tool in enumerate(tools):
        name = json.dumps(tool.name, ensure_ascii=False)[1:-1]
        before = _symbols(shape.before_name + name + shape.before_arguments, special_ids)
        rules.append(f"call{i}: {before} @arguments{i} {_symbols(shape.after_arguments, special_ids)}")
        if tool.parameters is None:
            arguments[f"arguments{i}"] = grammar.json_object()
        else:
            arguments[f"arguments{i}"] = grammar.json_schema(_an_object(tool.parameters), tool.path, strict=tool.strict)
    return rules, arguments


def _one_or_more(shape: CallShape, parallel: bool, special_ids: Mapping[str, int]) -> str:
    more = f"({_symbols(shape.separator, special_ids)} call){{0,{MAX_CALLS - 1}}}" if parallel else ""
    return f"call {more} {_symbols(shape.closing, special_ids)}"


def after_reasoning(
    format: ReasoningFormat, text: str, *, is_open: bool, special_ids: Mapping[str, int] = NO_IDS
) -> str:
    """Free text up to the end of the reasoning, up to two line ends, and then what the grammar ``text`` says.

    ``is_open``: the prompt has opened the block. Else the model may open one, or answer at once.
    """
    end = special_ids.get(format.end)
    rules = ["start: " + ("thoughts" if is_open else "block?") + " @answer"]
    if not is_open:
        rules.append(f"block: {_symbols(format.start, special_ids)} thoughts")
    if end is None:
        rules += [
            r"thoughts: reasoning /\n{0,2}/",
            f"reasoning[suffix={grammar.quoted(format.end)}]: /(.|\\n)*/",
        ]
    else:
        rules.append(f"thoughts: /(.|\\n)*/ <[{end}]> /\\n{{0,2}}/")
    return grammar.combined("\n".join(rules), {"answer": text})


def _symbols(text: str, special_ids: Mapping[str, int]) -> str:
    """``text`` as symbols of Lark: literals, and the special tokens in it by their ids. Empty for no text."""
    if not special_ids:
        return grammar.quoted(text) if text else ""
    pieces = re.split("(" + "|".join(map(re.escape, special_ids)) + ")", text)
    return " ".join(
        f"<[{special_ids[piece]}]>" if piece in special_ids else grammar.quoted(piece) for piece in pieces if piece
    )


def _an_object(schema: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments are an object, also where the schema does not say so."""
    return dict(schema) if "type" in schema else {"type": "object", **schema}
