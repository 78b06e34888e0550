"""The texts with tools and JSON that the toy model is to learn: what they call fits, and what is held out is held out."""

from __future__ import annotations

import json
import re
from collections import Counter
from itertools import pairwise
from random import Random

from serve_app.demo_model.tool_examples import FAMILIES, calling, is_held_out, reporting, tool_chat


def plain(prompt: str) -> str:
    return prompt.lower().rstrip(".?!")


def test_a_seed_gives_the_same_text_and_another_seed_another() -> None:
    def texts(seed: int) -> list[str]:
        rng = Random(seed)
        return [repr(tool_chat(rng).messages()) for _ in range(50)]

    assert texts(3) == texts(3)
    assert texts(3) != texts(4)


def test_no_training_text_holds_a_held_out_task() -> None:
    rng = Random(8)
    trained = [tool_chat(rng) for _ in range(4000)]
    called = {plain(user) for example in trained for user, answer in example.turns if answer.startswith("<tool_call>")}
    assert len(called) > 2000
    held_out = [kind(rng) for _ in range(400) for kind in (calling, reporting)]
    held_out = [example for example in held_out if example.is_held_out]
    assert len(held_out) > 20
    assert not called & {plain(example.turns[0][0]) for example in held_out if example.kind == "calling"}
    # What was asked may be known from another answer of the tool; the two together are not.
    told = {pair for example in trained for pair in pairwise(example.turns)}
    assert not told & {(example.turns[0], example.turns[1]) for example in held_out if example.kind == "reporting"}


def test_every_call_fits_the_tool_that_is_offered() -> None:
    rng = Random(9)
    num_calls = Counter[int]()
    for _ in range(400):
        example = calling(rng) if rng.random() < 0.5 else reporting(rng)
        offered = {tool["name"]: tool for tool in (json.loads(text)["function"] for text in example.tools)}
        assert len(offered) == len(example.tools)
        calls = re.findall("<tool_call>\n(.*)\n</tool_call>", example.turns[0][1])
        assert calls
        for call in map(json.loads, calls):
            properties = offered[call["name"]].get("parameters", {"properties": {}})["properties"]
            types = {"string": str, "integer": int, "number": int}
            assert list(call["arguments"]) == list(properties)
            for name, value in call["arguments"].items():
                assert isinstance(value, types[properties[name]["type"]])
                assert set(re.findall(r"\w+", str(value))) <= set(re.findall(r"\w+", example.turns[0][0]))
        num_calls.update([len(calls)])
    assert num_calls[2] > 5


def test_every_family_of_tools_is_asked_and_has_held_out_tasks() -> None:
    rng = Random(10)
    for name, family in FAMILIES.items():
        tasks = [family.ask(rng, family.tool(rng)) for _ in range(200)]
        share = sum(map(is_held_out, tasks)) / len(tasks)
        assert name == "clock" or 0.05 < share < 0.4, name
