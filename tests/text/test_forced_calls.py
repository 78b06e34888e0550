"""The whole way of a forced call, with tokens drawn by chance: grammar, masks, text stream, parser."""

from __future__ import annotations

import json
import random

import numpy as np
import pytest

from serve_app.engine.request import FinishReason, SamplingParams
from serve_app.text.output_format import OutputFormat
from serve_app.text.output_parser import OutputDelta, join
from serve_app.text.text_stream import TextStream
from serve_app.text.token_masks import Grammar, GrammarTokenizer
from serve_app.text.tokenizer import Tokenizer
from serve_app.text.tool_grammars import CallableTool
from tests.text.test_output_format import HERMES_TEMPLATE, MISTRAL_TEMPLATE, THINK_TEMPLATE, tokenizer

PARAMETERS = {
    "type": "object",
    "properties": {"a": {"type": "integer", "minimum": 0, "maximum": 99}, "s": {"enum": ["x", "東京"]}},
    "required": ["a", "s"],
    "additionalProperties": False,
}
TOOLS = [CallableTool("f", PARAMETERS, strict=True), CallableTool("g", {**PARAMETERS, "required": []}, strict=True)]
LIKED = (("</s>",), ('"', "}", "]"), ("</think>", "[/THINK]", "<tool_call>", "[TOOL_CALLS]"))
"""Groups of tokens that are drawn more often: chance alone would never come to an end."""
MODELS = {
    "markers are special": (MISTRAL_TEMPLATE, ("[TOOL_CALLS]", "[ARGS]", "[THINK]", "[/THINK]"), ()),
    "markers are added": (
        HERMES_TEMPLATE + THINK_TEMPLATE,
        (),
        ("<tool_call>", "</tool_call>", "<think>", "</think>"),
    ),
}


def draw(grammar: Grammar, made: Tokenizer, seed: int, max_num_tokens: int = 1200) -> list[int]:
    """Tokens that the masks allow; empty if there came no end."""
    numbers = random.Random(seed)
    liked = [{made.token_to_id(token) for token in group} for group in (*LIKED, ())]
    matcher = grammar.matcher()
    words = np.zeros(grammar.num_words, np.int32)
    ids: list[int] = []
    while not matcher.has_ended:
        if len(ids) == max_num_tokens:
            return []
        matcher.fill(words)
        allowed = [int(i) for i in np.flatnonzero(np.unpackbits(words.view(np.uint8), bitorder="little"))]
        group = numbers.choice(liked)
        token_id = numbers.choice([i for i in allowed if i in group] or allowed)
        matcher.consume([token_id])
        ids.append(token_id)
    return ids


def read(made: Tokenizer, format: OutputFormat, ids: list[int], prompt: str, is_forced: bool) -> OutputDelta:
    stream = TextStream(made, SamplingParams(), shown_special_ids=format.special_ids)
    parser = format.parser(prompt, tools={tool.name: tool.parameters for tool in TOOLS}, is_forced=is_forced)
    assert parser is not None
    texts = [stream.push([token_id]).text for token_id in ids] + [stream.push((), FinishReason.STOP).text]
    return join([*map(parser.push, texts), parser.finish()])


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("is_forced", [True, False])
def test_what_the_masks_allow_is_read_as_right_calls(model: str, is_forced: bool) -> None:
    template, special, added = MODELS[model]
    made = tokenizer(template, special=special, added=added)
    eos = made.token_to_id("</s>")
    assert eos is not None
    format = OutputFormat.of(made)
    assert format.reasoning is not None
    vocabulary = GrammarTokenizer(lambda: made, made.vocab_size + 3, (eos,))
    num_calls, num_thoughts, num_ended = 0, 0, 0
    for prompt in ("", format.reasoning.start):
        make = format.forced_calls if is_forced else format.free_calls
        grammars = make(TOOLS, parallel=True, prompt=prompt)
        assert grammars is not None
        grammar = vocabulary.compile(grammars.text)
        for seed in range(5):
            ids = draw(grammar, made, seed)
            if not ids:
                continue
            num_ended += 1
            parsed = read(made, format, [i for i in ids if i != eos], prompt, is_forced)
            assert not is_forced or (parsed.tool_calls and not parsed.content.strip())
            for call in parsed.tool_calls:
                arguments = json.loads(call.arguments)
                assert set(arguments) == {"a", "s"} or (call.name == "g" and set(arguments) < {"a", "s"})
                assert arguments.get("a", 0) in range(100)
                assert arguments.get("s", "x") in ("x", "東京")
            num_calls += len(parsed.tool_calls)
            num_thoughts += bool(parsed.reasoning)
    assert num_ended >= 5
    assert num_thoughts > 0
    assert num_calls >= (num_ended if is_forced else 1)
