"""The process in which grammars are compiled for the first time: a bad one may take all the time it has, or crash it.

Run as a script by `grammar_check`, with one line of JSON for each grammar on stdin and two on stdout: what is wrong with it
(null: nothing), and where. Knows the library alone; imports nothing of this project. Limits on itself: CPU time for each
grammar (then the system ends it), memory beyond what it starts with, and a stack smaller than that of the threads which
compile the grammar again elsewhere.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import threading
import time
from collections.abc import Iterator
from typing import Any, TextIO
from urllib.parse import unquote

import llguidance  # type: ignore[import-untyped]

CPU_SECONDS = 1.0
"""Of one grammar. Schemas of thousands of lines take a tenth of that."""
MEMORY_BYTES = 512 * 2**20
STACK_BYTES = 4 * 2**20
LIMITS: dict[str, Any] = {
    "initial_lexer_fuel": 50_000,
    "step_lexer_fuel": 20_000,
    "step_max_items": 20_000,
    "verbose_errors": False,
}
"""Of the library, also where masks are made (`token_masks`), so that both say the same. With its own, five times as high and
more, one mask of `(x{1000}){1000}` takes over a second; with these some 40 ms, and that of a common schema 1."""
LOOK_SECONDS = 0.5
"""CPU time after which no more is done to find the place of a mistake."""


class _Bytes:
    """256 tokens of one byte each, and an end."""

    eos_token_id = 256
    bos_token_id = None
    tokens = (*(bytes([i]) for i in range(256)), b"<no text can name this>")
    special_token_ids = (256,)

    def __call__(self, text: str | bytes) -> list[int]:
        return list(text.encode() if isinstance(text, str) else text)


def byte_tokenizer() -> Any:
    return llguidance.LLTokenizer(llguidance.TokenizerWrapper(_Bytes()), slices=[])


def problem_of(text: str, tokenizer: Any) -> str | None:
    """What is wrong with a grammar, in the library's words; None if it compiles and allows a first byte or no byte."""
    matcher = llguidance.LLMatcher(tokenizer, text, log_level=0, limits=_LIMITS)
    if not matcher.is_error():
        mask = matcher.compute_bitmask()
        if not matcher.is_error() and (any(mask) or matcher.is_accepting()):
            return None
    problem = str(matcher.get_error())
    return "no text fits it" if not problem or problem.startswith("NoExtension") else problem


def find_place(text: str, problem: str, tokenizer: Any) -> tuple[list[str | int], str]:
    """Which subschema has the problem: the deepest one that fails by itself, in the same way; and its own problem."""
    deadline = time.process_time() + LOOK_SECONDS
    schemas = [one["json_schema"] for one in json.loads(text)["grammars"] if one.get("json_schema")]
    schema = schemas[0] if len(schemas) == 1 else {}  # behind reasoning it is not the first grammar
    options = schema.pop("x-guidance", {})
    definitions = schema.pop("$defs", {})
    found: Any = schema
    place: list[str | int] = []
    seen = {""}
    while True:
        for child_place, child in _children(found, place, definitions):
            alone = {"anyOf": [child], "$defs": definitions, "x-guidance": options}
            its_own = problem_of(json.dumps({"grammars": [{"json_schema": alone}]}), tokenizer)
            if time.process_time() > deadline:
                return place, problem
            if its_own is None or (_UNSATISFIABLE in its_own) != (_UNSATISFIABLE in problem):
                continue
            if (name := json.dumps(child_place)) not in seen:  # else it is recursive
                seen.add(name)
                place, found, problem = child_place, child, its_own
                break
        else:
            return place, problem


def _children(
    schema: dict[str, Any], place: list[str | int], definitions: dict[str, Any]
) -> Iterator[tuple[list[str | int], dict[str, Any]]]:
    """What may fail by itself below ``place``, and where it stands."""
    found: list[tuple[list[str | int], Any]] = [([*place, name], schema[name]) for name in _ONE if name in schema]
    for name in _LISTS:
        found += [([*place, name, i], one) for i, one in enumerate(schema.get(name, []))]
    for name in _MAPS:
        found += [([*place, name, key], one) for key, one in schema.get(name, {}).items()]
    if "$ref" in schema:
        key = unquote(schema["$ref"].removeprefix("#/$defs/")).replace("~1", "/").replace("~0", "~")
        found.append((["$defs", key], definitions.get(key)))
    return ((where, child) for where, child in found if isinstance(child, dict))


_LIMITS = llguidance.LLParserLimits(**LIMITS)
_UNSATISFIABLE = "nsatisfiable"
_ONE = ("items", "additionalProperties")
_LISTS = ("prefixItems", "allOf", "anyOf", "oneOf")
_MAPS = ("properties", "patternProperties")


def _serve(requests: TextIO, answers: TextIO) -> None:
    tokenizer = byte_tokenizer()
    for line in requests:
        text = json.loads(line)
        # The default action of the signal ends the process, also where no Python runs.
        signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)
        problem = problem_of(text, tokenizer)
        print(json.dumps(problem), file=answers, flush=True)
        print(json.dumps(None if problem is None else find_place(text, problem, tokenizer)), file=answers, flush=True)
        signal.setitimer(signal.ITIMER_PROF, 0.0)


def main() -> None:
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # whatever the library prints
    os.nice(5)
    with open("/proc/self/statm") as file:
        in_use = int(file.read().split()[0]) * resource.getpagesize()
    limit = in_use + MEMORY_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    threading.stack_size(STACK_BYTES)
    requests = open(0, encoding="utf-8", closefd=False)  # noqa: SIM115 - as long as the process
    thread = threading.Thread(target=_serve, args=(requests, answers))
    thread.start()
    thread.join()


if __name__ == "__main__":
    main()
