"""What a PromQL expression names: metrics, label matchers, labels to group by. A tokenizer, no parser: promtool is one."""

from __future__ import annotations

import re
from typing import NamedTuple

_TOKEN = re.compile(
    r"""(?P<space>\s+|\#.*)
    |(?P<string>"(?:[^"\\]|\\.)*"|'(?:[^'\\]|\\.)*'|`[^`]*`)
    |(?P<range>\[[^\]]*\])
    |(?P<number>(?:\d+(?:ms|[smhdwy]))+|(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)
    |(?P<name>[a-zA-Z_:][a-zA-Z0-9_:]*)
    |(?P<mark>=~|!~|!=|==|>=|<=|[-+*/%^(){},=<>@])""",
    re.VERBOSE,
)
_WORDS = frozenset({"and", "or", "unless", "offset", "bool", "inf", "nan", "start", "end"})
_GROUPS = frozenset({"by", "without", "on", "ignoring", "group_left", "group_right"})


class Selector(NamedTuple):
    """One metric as it is asked for."""

    metric: str
    matchers: tuple[tuple[str, str, str], ...]
    """Label, operator, value."""

    def values(self, label: str) -> list[str]:
        """What the matchers of a label allow, a regex of alternatives as its alternatives."""
        return [
            v
            for name, sign, text in self.matchers
            if name == label
            for v in (text.split("|") if "~" in sign else [text])
        ]


class Named(NamedTuple):
    selectors: tuple[Selector, ...]
    grouped_by: frozenset[str]


def named(expression: str) -> Named:
    """Raises ValueError for what is no token, and for a selector without a metric's name."""
    tokens = _tokens(expression)
    selectors: list[Selector] = []
    grouped_by: set[str] = set()
    at = 0
    while at < len(tokens):
        kind, text = tokens[at]
        at += 1
        if text == "{":
            raise ValueError(f"a selector without a name in {expression!r}")
        if kind != "name" or text.lower() in _WORDS:
            continue
        following = tokens[at][1] if at < len(tokens) else ""
        if text in _GROUPS:
            if following == "(":
                end = tokens.index(("mark", ")"), at)
                grouped_by.update(name for kind, name in tokens[at:end] if kind == "name")
                at = end + 1
        elif following == "{":
            end = tokens.index(("mark", "}"), at)
            selectors.append(Selector(text, _matchers(tokens[at + 1 : end])))
            at = end + 1
        elif following != "(" and following not in _GROUPS:
            selectors.append(Selector(text, ()))  # else it is a function: f(...), sum by (...) (...)
    return Named(tuple(selectors), frozenset(grouped_by))


def _tokens(expression: str) -> list[tuple[str, str]]:
    found, at = [], 0
    while at < len(expression):
        match = _TOKEN.match(expression, at)
        if match is None:
            raise ValueError(f"{expression[at : at + 20]!r} in {expression!r} is no PromQL")
        at = match.end()
        if match.lastgroup != "space":
            found.append((str(match.lastgroup), match[0]))
    return found


def _matchers(tokens: list[tuple[str, str]]) -> tuple[tuple[str, str, str], ...]:
    rest = [text for _, text in tokens if text != ","]
    if len(rest) % 3:
        raise ValueError(f"matchers {rest} are not label, sign, value")
    return tuple((rest[i], rest[i + 1], rest[i + 2][1:-1]) for i in range(0, len(rest), 3))
