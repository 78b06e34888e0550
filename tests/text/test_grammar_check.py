"""Compiling where it harms nobody: verdicts with places, grammars that would take hours or the whole stack, the cache."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Callable
from typing import Any

import pytest

from serve_app.errors import OverloadedError
from serve_app.text import grammar_check
from serve_app.text.grammar import combined, grammar, json_object, json_schema, regex
from serve_app.text.grammar_check import TOO_MUCH, GrammarCheck, HelperDiedError, cleaned, original_place


@pytest.fixture(scope="module")
def check() -> Callable[..., Any]:
    made = GrammarCheck()

    def run(text: str) -> tuple[str | None, tuple[str | int, ...]]:
        return tuple(asyncio.run(made.check(text)))  # type: ignore[return-value]

    return run


NESTED = {
    "type": "object",
    "properties": {"a": {"type": "array", "items": {"$ref": "#/$defs/a~1b/0"}}},
    "required": ["a"],
    "$defs": {"a/b": [{"type": "object", "properties": {"c": {"pattern": "(?=x)"}}}]},
}
IMPOSSIBLE = {
    "type": "object",
    "properties": {"o": {"type": "array", "items": False}, "a": {"type": "integer", "minimum": 5, "maximum": 3}},
    "required": ["a"],
}


def test_good_grammars(check: Callable[..., Any]) -> None:
    for text in (
        json_object(),
        json_schema(True),
        regex("a*"),
        grammar('start: "a"'),
        json_schema({"$ref": "#/x", "x": {}}),
    ):
        assert check(text) == (None, ())


@pytest.mark.parametrize(
    ("text", "words", "place"),
    [
        (json_schema(NESTED), "look-around", ("$defs", "a/b", 0, "properties", "c")),
        (json_schema(IMPOSSIBLE), "minimum (5) is greater than maximum (3)", ("properties", "a")),
        (combined("start: /.*/ @a", {"a": json_schema(NESTED)}), "look-around", ("$defs", "a/b", 0, "properties", "c")),
        (json_schema(False), "schema is false", ()),
        (json_schema({"oneOf": [{"type": "object"}, {"minProperties": 1}]}), "oneOf is taken where no value", ()),
        (
            json_schema({"anyOf": [{"type": "null"}, {"type": "number", "multipleOf": 0.3333333333}]}),
            "too many digits",
            ("anyOf", 1),
        ),
        (regex("(a"), "unclosed group", ()),
        (regex(r"(a)\1"), "backreferences are not supported", ()),
        (regex("[a&&b]"), "no text fits", ()),
        (grammar("start: start"), "no text fits", ()),
        (grammar("start: <eos>"), "unknown special token", ()),
        (grammar("start: a"), "unknown name", ()),
        (grammar("start: " + "(" * 2000 + '"a"' + ")" * 2000), "nested", ()),
    ],
)  # fmt: skip
def test_verdicts_say_why_and_where(check: Callable[..., Any], text: str, words: str, place: Any) -> None:
    problem, found = check(text)
    assert problem is not None
    assert words in problem
    assert "\n" not in problem
    assert found == place


def chain(length: int) -> dict[str, Any]:
    definitions: dict[str, Any] = {
        f"a{i}": {"type": "object", "properties": {"x": {"$ref": f"#/$defs/a{i + 1}"}}} for i in range(length)
    }
    return {"$defs": {**definitions, f"a{length}": {"type": "null"}}, "$ref": "#/$defs/a0"}


HOSTILE = {
    "patterns that are all to hold": json_schema({"allOf": [{"pattern": f".*a.{{{i}}}b"} for i in range(10, 40)]}),
    "a remainder to be counted": json_schema({"type": "integer", "multipleOf": 99999999}),
    "references in a chain": json_schema(chain(1900)),
    "rules in a chain": grammar("start: a0\n" + "\n".join(f"a{i}: a{i + 1}" for i in range(3000)) + '\na3000: "x"'),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_what_takes_too_much_ends_the_helper_and_nothing_else(
    check: Callable[..., Any], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Unbounded, the first two compute for minutes and the others overflow the stack: the process would be gone."""
    assert check(HOSTILE[name]) == (TOO_MUCH, ())
    monkeypatch.setattr(grammar_check, "Helper", None)  # known by now: nobody is asked again
    assert check(HOSTILE[name]) == (TOO_MUCH, ())
    monkeypatch.undo()
    assert check(regex(f"[a-z]+{name}")) == (None, ())


def test_equal_grammars_are_compiled_once_and_the_rest_waits_its_turn() -> None:
    async def run() -> None:
        made = GrammarCheck(num_helpers=1, max_waiting=3)
        texts = [regex(f"a{{{i}}}") for i in range(4)]
        tasks = [asyncio.ensure_future(made.check(text)) for text in (*texts[:3], *texts[:3])]
        await asyncio.sleep(0)
        with pytest.raises(OverloadedError, match="3 grammars wait to be compiled; at most 3 may"):
            await made.check(texts[3])
        tasks[0].cancel()  # one that waits goes away: the other one that waits for the same grammar gets it
        assert [verdict.problem for verdict in await asyncio.gather(*tasks[1:])] == [None] * 5
        assert made.num_compiled == 3
        assert (await made.check(texts[3])).problem is None
        assert (await made.check(texts[0])).problem is None
        assert made.num_compiled == 4

    asyncio.run(run())


def test_what_was_not_asked_for_lately_is_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    async def run() -> None:
        made = GrammarCheck(num_helpers=1)
        texts = [regex(f"b{{{i}}}") for i in range(1, 4)]
        monkeypatch.setattr(grammar_check, "MAX_REMEMBERED_LENGTH", 2 * len(texts[0]))
        for text, num_compiled in (
            (texts[0], 1),
            (texts[1], 2),
            (texts[0], 2),
            (texts[2], 3),
            (texts[0], 3),
            (texts[1], 4),
        ):
            await made.check(text)
            assert made.num_compiled == num_compiled

    asyncio.run(run())


def test_a_helper_that_somebody_else_ends_is_replaced() -> None:
    async def run() -> None:
        made = GrammarCheck(num_helpers=1)
        await made.check(regex("c"))
        helper = await asyncio.get_running_loop().run_in_executor(made._threads, lambda: made._local.helper)
        os.kill(helper.pid, signal.SIGKILL)
        assert await made.check(regex("d")) == (None, ())
        assert helper.is_over
        with pytest.raises((HelperDiedError, ValueError)):
            helper.check(regex("e"))

    asyncio.run(run())


def test_the_words_of_the_library_are_put_in_one_line() -> None:
    assert cleaned("at 1(8): x:\n    a(?=b)\n     ^^^\nerror: look-around, y\n   1 | start: /a/\n") == "look-around, y"
    assert cleaned("at 1(8): unknown name: a\n   1 | start: a\n") == "at 1(8): unknown name: a"
    assert cleaned("a | b") == "a | b"
    assert original_place(["$defs", "/x/0/y~1z", "items"]) == ("x", 0, "y/z", "items")
    assert original_place(["properties", "$defs", "anyOf", 1]) == ("properties", "$defs", "anyOf", 1)
