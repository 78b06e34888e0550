"""A model's formats are found in its tokenizer and template, and its parsers compose."""

from __future__ import annotations

import pytest
from tokenizers import AddedToken, Tokenizer as Backend

from serve_app.engine.request import FinishReason, SamplingParams
from serve_app.errors import ConfigurationError
from serve_app.text.output_format import OutputFormat, WithoutMarkers
from serve_app.text.output_parser import OutputDelta, OutputParser, PlainParser, ToolCallDelta, join
from serve_app.text.reasoning_formats import ReasoningParser
from serve_app.text.text_stream import TextStream
from serve_app.text.tokenizer import Tokenizer
from tests.text.tokenizers_made import tokenizer_json

TEMPLATE = "{% for m in messages %}{{ m.content }}{% endfor %}"
HERMES_TEMPLATE = TEMPLATE + """{% if tools %}{{ '<tool_call>{"name": "' }}{{ '", "arguments": ' }}{% endif %}"""
THINK_TEMPLATE = "{{ m.content.split('</think>')[-1] }}"
MISTRAL_TEMPLATE = TEMPLATE + "{% if tools %}{{ '[TOOL_CALLS]' + name + '[ARGS]' }}{% endif %}{{ '[THINK]' }}"
TOOLS = {"f": None, "g": {"type": "object"}}


def tokenizer(template: str | dict[str, str], special: tuple[str, ...] = (), added: tuple[str, ...] = ()) -> Tokenizer:
    backend = Backend.from_str(tokenizer_json("byte_level_bpe"))
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    backend.add_tokens([AddedToken(token, special=False, normalized=False) for token in added])
    templates = {"default": template} if isinstance(template, str) else template
    return Tokenizer(backend, chat_templates=templates)


def parse(parser: OutputParser | None, *pieces: str) -> OutputDelta:
    assert parser is not None
    return join([*map(parser.push, pieces), parser.finish()])


def test_a_plain_model_needs_no_parser() -> None:
    format = OutputFormat.of(tokenizer(TEMPLATE))
    assert (format.tools, format.reasoning, format.special_ids) == (None, None, frozenset())
    assert format.parser("Hello", tools=TOOLS) is None
    assert OutputFormat().parser("") is None


def test_tools_are_read_only_where_the_request_has_some() -> None:
    format = OutputFormat.of(tokenizer(HERMES_TEMPLATE))
    text = '<tool_call>{"name": "f"}</tool_call>'
    assert format.parser("") is None
    assert format.parser("", tools={}) is None
    assert parse(format.parser("", tools=TOOLS), text).tool_calls == (ToolCallDelta(0, "f", "{}"),)
    assert parse(format.parser("", tools={"g": None}), text) == OutputDelta(text)


def test_reasoning_and_then_tools() -> None:
    format = OutputFormat.of(tokenizer(HERMES_TEMPLATE + THINK_TEMPLATE))
    text = 'f or g? <tool_call></think>\n\n<tool_call>\n{"name": "f"}\n</tool_call>'
    for pieces in ([text], list(text)):
        assert parse(format.parser("<think>\n", tools=TOOLS), *pieces) == OutputDelta(
            "", "f or g? <tool_call>", (ToolCallDelta(0, "f", "{}"),)
        )
    assert parse(format.parser("", tools=TOOLS), text).content.startswith("f or g?")
    assert parse(format.parser("<think>"), "a</think>b") == OutputDelta("b", "a")
    assert format.parser("<think>", reads_reasoning=False) is None
    assert parse(format.parser("a<think>b", final_message="a<think>b"), "c</think>d") == OutputDelta("d", "c")


def test_a_call_ends_reasoning_where_the_model_forgets_to() -> None:
    template = HERMES_TEMPLATE + THINK_TEMPLATE + "<tool_call>\\n<function=f>\\n<parameter=p>"
    format = OutputFormat.of(tokenizer(template))
    assert format.tools is not None
    assert format.tools.name == "qwen3_coder"
    text = "a <tool_call> \n<tool_call>\n<function=f>\n</function>\n</tool_call>"
    for pieces in ([text], list(text)):
        parsed = parse(format.parser("<think>\n", tools=TOOLS), *pieces)
        assert parsed == OutputDelta("", "a <tool_call> \n", (ToolCallDelta(0, "f", "{}"),))
        assert parse(format.parser("<think>\n"), *pieces) == OutputDelta("", text)
        assert parse(format.parser("", tools=TOOLS), "<think></think>", *pieces).content == "a <tool_call>"


def test_the_template_for_tools_is_looked_at_first() -> None:
    format = OutputFormat.of(tokenizer({"default": TEMPLATE, "tool_use": HERMES_TEMPLATE}))
    assert format.tools is not None
    assert format.tools.name == "hermes"


def test_the_configuration_wins() -> None:
    made = tokenizer(HERMES_TEMPLATE + THINK_TEMPLATE)
    format = OutputFormat.of(made, tool_format="mistral", reasoning_format="none")
    assert format.tools is not None
    assert (format.tools.name, format.reasoning) == ("mistral", None)
    format = OutputFormat.of(made, tool_format="none", reasoning_format="granite")
    assert format.reasoning is not None
    assert (format.tools, format.reasoning.name) == (None, "granite")
    with pytest.raises(ConfigurationError, match=r"tool_format is 'hermess'; it must be one of auto, none, .*hermes"):
        OutputFormat.of(made, tool_format="hermess")
    with pytest.raises(ConfigurationError, match="reasoning_format is 'qwen'"):
        OutputFormat.of(made, reasoning_format="qwen")


def test_special_markers_reach_the_parser_and_no_reader() -> None:
    markers = ("[TOOL_CALLS]", "[ARGS]", "[THINK]", "[/THINK]")
    made = tokenizer(MISTRAL_TEMPLATE, special=(*markers, "[INST]"))
    format = OutputFormat.of(made)
    assert format.special_markers == {marker: made.token_to_id(marker) for marker in markers}
    assert format.special_ids == {made.token_to_id(marker) for marker in markers}

    def read(text: str, skip_special_tokens: bool = True) -> OutputDelta:
        sampling = SamplingParams(skip_special_tokens=skip_special_tokens)
        stream = TextStream(made, sampling, shown_special_ids=format.special_ids)
        parser = format.parser("", tools=TOOLS, skip_special_tokens=skip_special_tokens)
        assert parser is not None
        ids = made.encode(text, add_special_tokens=False)
        texts = [stream.push([token_id]).text for token_id in ids] + [stream.push((), FinishReason.LENGTH).text]
        return join([*map(parser.push, texts), parser.finish()])

    whole = '[THINK]why[/THINK]Yes[INST].[TOOL_CALLS]f[ARGS]{"a": 1}'
    assert read(whole) == OutputDelta("Yes.", "why", (ToolCallDelta(0, "f", '{"a": 1}'),))
    assert read("a[TOOL_CALLS]h[ARGS]{}[/THINK]b") == OutputDelta("ah{}b")
    assert read("[THINK]so[THINK] [[/THINK]b[") == OutputDelta("b[", "so [")
    assert read("[THINK]so[TOOL_CALLS]f[ARGS]{} [") == OutputDelta("", "sof{} [")
    assert read("a[TOOL_CALLS]h[ARGS]{}", skip_special_tokens=False) == OutputDelta("a[TOOL_CALLS]h[ARGS]{}")


def test_markers_that_are_no_special_tokens_are_ordinary_text() -> None:
    """As <tool_call> and <think> of Qwen."""
    made = tokenizer(HERMES_TEMPLATE + THINK_TEMPLATE, added=("<tool_call>", "</tool_call>", "<think>", "</think>"))
    format = OutputFormat.of(made)
    assert (format.special_markers, format.special_ids) == ({}, frozenset())
    assert parse(format.parser("", tools=TOOLS), "<tool_call>no") == OutputDelta("<tool_call>no")


@pytest.mark.parametrize(
    ("text", "content"),
    [
        ("a[B]c[B]", "ac"),
        ("[B", "[B"),
        ("[[B]B]", "[B]"),  # read once, from the left
        ("[B]]<x><x", "]<x"),
        ("", ""),
    ],
)
def test_markers_are_dropped_however_the_content_comes(text: str, content: str) -> None:
    for place in range(len(text) + 1):
        for pieces in ([text[:place], text[place:]], list(text)):
            assert parse(WithoutMarkers(PlainParser(), ("[B]", "<x>")), *pieces) == OutputDelta(content)
            thinking = WithoutMarkers(ReasoningParser("<s>", "<e>", is_open=True), ("[B]", "<x>"))
            assert parse(thinking, *pieces, "<e>!") == OutputDelta("!", content)


def test_reasoning_is_given_out_to_its_end_before_content_is() -> None:
    parser = WithoutMarkers(ReasoningParser("<s>", "<e>", is_open=True), ("[B]",))
    assert [parser.push(text) for text in ("why [", "B", "<e>so [B")] == [
        OutputDelta(reasoning="why "),
        OutputDelta(),
        OutputDelta("so ", "[B"),
    ]
    assert parser.finish() == OutputDelta("[B")
