"""Recorded requests of real services: when they came, how long they were, which began alike. Knows no text and no server.

Two formats: the Azure LLM inference traces (CSV: TIMESTAMP, ContextTokens, GeneratedTokens; Patel et al., Splitwise, ISCA
2024) and Mooncake's (JSON lines: timestamp in ms, input_length, output_length, hash_ids, one id for each 512 tokens of the
prompt; Qin et al., FAST 2025). No trace is part of this repository: a path, or a folder beside it, names one.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

NAMES = {"azure": "azure_llm_2023_conv.csv", "mooncake": "mooncake_conversation.jsonl"}
FOLDER = Path(__file__).resolve().parents[2] / "shared" / "traces"
"""Where the two above may lie: beside the repository."""
NUM_BLOCK_TOKENS = 512
"""Tokens of a prompt that one of Mooncake's ids stands for."""


@dataclass(frozen=True)
class TracedRequest:
    arrival: float
    """Seconds after the first."""
    num_prompt_tokens: int
    num_output_tokens: int
    block_ids: tuple[int, ...] = ()
    """One for each `NUM_BLOCK_TOKENS` of the prompt; prompts that begin with the same ids begin with the same tokens."""


def trace_path(name: str) -> Path:
    """``name``: azure, mooncake, or a path. Raises ValueError if no such file is there."""
    path = FOLDER / NAMES[name] if name in NAMES else Path(name)
    if not path.is_file():
        known = ", ".join(NAMES)
        raise ValueError(
            f"there is no trace at {path}; a workload is synthetic, {known}, or the path of a .csv or .jsonl"
        )
    return path


def read_trace(path: Path) -> list[TracedRequest]:
    """In the order of arrival; requests without a prompt or an answer are left out. Raises ValueError naming the line."""
    readers = {".csv": _azure_rows, ".jsonl": _mooncake_rows}
    if path.suffix not in readers:
        raise ValueError(f"{path} ends with {path.suffix!r}; a trace ends with {' or '.join(readers)}")
    rows = []
    with path.open(newline="") as lines:
        reader = readers[path.suffix](lines)
        number = 1
        while True:
            try:
                row = next(reader, None)
            except (KeyError, TypeError, ValueError) as error:
                raise ValueError(f"{path}: request {number} cannot be read: {error!r}") from error
            if row is None:
                break
            number += 1
            if row.num_prompt_tokens > 0 and row.num_output_tokens > 0:
                rows.append(row)
    if not rows:
        raise ValueError(f"{path} has no requests")
    rows.sort(key=lambda row: row.arrival)
    first = rows[0].arrival
    return [TracedRequest(r.arrival - first, r.num_prompt_tokens, r.num_output_tokens, r.block_ids) for r in rows]


def _azure_rows(lines: Iterator[str]) -> Iterator[TracedRequest]:
    for row in csv.DictReader(lines):
        at = datetime.fromisoformat(row["TIMESTAMP"]).timestamp()
        yield TracedRequest(at, int(row["ContextTokens"]), int(row["GeneratedTokens"]))


def _mooncake_rows(lines: Iterator[str]) -> Iterator[TracedRequest]:
    for line in lines:
        row = json.loads(line)
        at, ids = float(row["timestamp"]) / 1000, tuple(map(int, row["hash_ids"]))
        yield TracedRequest(at, int(row["input_length"]), int(row["output_length"]), ids)


def scaled(requests: list[TracedRequest], *, rate: float | None, length: float) -> list[TracedRequest]:
    """``rate``: requests a second on average, instead of the recorded ones. ``length``: factor of all lengths (at least one
    token stays); equal prefixes stay equal, see `block_tokens`. Raises ValueError for what is not above 0."""
    if not length > 0:
        raise ValueError(f"the scale of lengths is {length:g}; it must be above 0")
    seconds = requests[-1].arrival
    factor = 1.0 if rate is None or not seconds else (len(requests) / seconds) / rate
    return [
        TracedRequest(
            request.arrival * factor,
            max(1, round(request.num_prompt_tokens * length)),
            max(1, round(request.num_output_tokens * length)),
            request.block_ids,
        )
        for request in requests
    ]


def block_tokens(length: float) -> int:
    """Tokens of a prompt that one id stands for, once lengths are scaled."""
    return max(1, round(NUM_BLOCK_TOKENS * length))
