"""Tool formats: how models write tool calls. One table; the parsers of its rows stand in files of their own.

    name           as in the configuration
    fits           detection: does a model with this chat template write calls so?
    parser         of one choice
    shape          the words of a call, for the grammar of calls that are forced (`tool_grammars`)
    example        how two calls look

Knows characters and chat templates; knows no token and no request. A template that does not look at ``tools`` has no
format, whatever else it says: its model was never shown a tool.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from serve_app.text.json_tool_calls import HermesParser, Llama3JsonParser, MistralParser
from serve_app.text.output_parser import OutputParser
from serve_app.text.pythonic_tool_calls import PythonicParser
from serve_app.text.qwen3_coder_tool_calls import Qwen3CoderParser

ToolSchemas = Mapping[str, Mapping[str, Any] | None]
"""The tools of a request: for each name the JSON schema of its parameters, or None where it has none."""


@dataclass(frozen=True)
class CallShape:
    """What is written around names and arguments, as chat templates write it:

    opening (before_name NAME before_arguments ARGUMENTS after_arguments) separator (...) ... closing
    """

    before_name: str
    before_arguments: str
    after_arguments: str = ""
    separator: str = ""
    opening: str = ""
    closing: str = ""

    trigger: str = ""
    """The marker that all of it begins with, and that stands nowhere else. Empty if there is none: then calls in free
    text cannot be told from text by a grammar."""


@dataclass(frozen=True)
class ToolFormat:
    """One row of the table."""

    name: str
    """As the configuration calls it."""

    models: str
    """Who writes so."""

    example: str
    """A call of ``f`` with a = 1, and one of ``g`` without arguments."""

    template_signs: tuple[str, ...]
    """Patterns that are all found in the chat templates of such models."""

    markers: tuple[str, ...]
    """Texts that the text stream must show, also where they are special tokens."""

    parser: Callable[[ToolSchemas], OutputParser]
    """Makes the parser of one choice for the tools of its request."""

    shape: CallShape | None
    """None: arguments are no JSON there, so that a JSON schema cannot be said in its words (see `forced_in`)."""

    ends_reasoning: str = ""
    """The beginning of a call that ends reasoning by itself: models of this format forget the marker (vLLM's parser
    for Qwen3 reads them so, ``vllm/reasoning/qwen3_reasoning_parser.py``)."""

    forced_in: str = ""
    """Where ``shape`` is None: the row in whose words calls are forced, and so parsed. These models can write both."""

    def fits(self, chat_template: str) -> bool:
        """Whether a model with this chat template writes calls so. The first row that fits is the one."""
        return "tools" in chat_template and all(re.search(sign, chat_template) for sign in self.template_signs)


HERMES_SHAPE = CallShape('<tool_call>\n{"name": "', '", "arguments": ', "}\n</tool_call>", "\n", trigger="<tool_call>")
MISTRAL_SHAPE = CallShape("[TOOL_CALLS]", "[ARGS]", trigger="[TOOL_CALLS]")
MISTRAL_LIST_SHAPE = CallShape(
    '{"name": "', '", "arguments": ', "}", ", ", "[TOOL_CALLS] [", "]", trigger="[TOOL_CALLS]"
)
LLAMA3_JSON_SHAPE = CallShape('{"name": "', '", "parameters": ', "}", "; ")

QUOTE = r"""\\?["']"""
"""A quote in the text of a template, which may stand in a string of the template's own."""

TOOL_FORMATS = (
    ToolFormat(
        "qwen3_coder",
        "Qwen3-Coder, Qwen3.5, Nemotron 3",
        "<tool_call>\n<function=f>\n<parameter=a>\n1\n</parameter>\n</function>\n</tool_call>\n"
        "<tool_call>\n<function=g>\n</function>\n</tool_call>",
        ("<function=", "<parameter="),
        ("<tool_call>", "</tool_call>"),
        Qwen3CoderParser,
        None,
        ends_reasoning="<tool_call>\n<function=",
        forced_in="hermes",
    ),
    ToolFormat(
        "hermes",
        "Hermes 2 and 3, Qwen2.5, Qwen3",
        '<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call>\n'
        '<tool_call>\n{"name": "g", "arguments": {}}\n</tool_call>',
        ("<tool_call>", f"{QUOTE}name{QUOTE}", f"{QUOTE}arguments{QUOTE}"),
        ("<tool_call>", "</tool_call>"),
        HermesParser,
        HERMES_SHAPE,
    ),
    ToolFormat(
        "mistral",
        "Mistral Small 3.2, Magistral, Devstral, Ministral 3 and later",
        '[TOOL_CALLS]f[ARGS]{"a": 1}[TOOL_CALLS]g[ARGS]{}',
        (r"\[TOOL_CALLS\]", r"\[ARGS\]"),
        ("[TOOL_CALLS]", "[ARGS]", "[CALL_ID]"),
        MistralParser,
        MISTRAL_SHAPE,
    ),
    ToolFormat(
        "mistral_list",
        "Mistral 7B v0.3, Nemo, Large 2, Small 3.1 and before",
        '[TOOL_CALLS] [{"name": "f", "arguments": {"a": 1}}, {"name": "g", "arguments": {}}]',
        (r"\[TOOL_CALLS\]",),
        ("[TOOL_CALLS]", "[ARGS]", "[CALL_ID]"),
        MistralParser,
        MISTRAL_LIST_SHAPE,
    ),
    ToolFormat(
        "pythonic",
        "Llama 3.2 and 4 with a pythonic template, Gemma 3 likewise",
        "[f(a=1), g()]",
        (r"\[func_name1\(",),
        ("<|python_start|>", "<|python_end|>"),
        PythonicParser,
        None,
        forced_in="llama3_json",
    ),
    ToolFormat(
        "llama3_json",
        "Llama 3.1, 3.2 and 3.3, Llama 4 with a JSON template",
        '{"name": "f", "parameters": {"a": 1}}; {"name": "g", "parameters": {}}',
        (f"{QUOTE}name{QUOTE}: function name, {QUOTE}parameters{QUOTE}",),
        ("<|python_tag|>",),
        Llama3JsonParser,
        LLAMA3_JSON_SHAPE,
    ),
)


def detect_tool_format(chat_template: str) -> ToolFormat | None:
    """The format of a model with this chat template, or None: it has no tools, or writes its calls in another way."""
    return next((format for format in TOOL_FORMATS if format.fits(chat_template)), None)


def forced_format(format: ToolFormat) -> ToolFormat:
    """The row in whose words a model with this format is made to call: its own, where a grammar can say it."""
    return format if format.shape is not None else next(row for row in TOOL_FORMATS if row.name == format.forced_in)
