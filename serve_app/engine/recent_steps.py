"""Recent steps as little plain data, for a page that draws them. Knows step records; knows no page, no transport.

Asked only while somebody looks. A step does nothing for it: the records are there for metrics and traces anyway.
"""

from __future__ import annotations

import hashlib
import itertools
import re
from enum import IntEnum
from functools import lru_cache
from typing import Any

from serve_app.engine.engine import Engine
from serve_app.engine.step_record import SequenceStep, StepRecord

MAX_RUNS = 128
"""Sequences of one step that are told one by one. The others are one run: no screen shows more."""
_OWN_ID = re.compile(r"ui-([0-9a-f]{8})~")


class Kind(IntEnum):
    """What a sequence does in a step."""

    DECODE = 0
    """One token that samples the next one. The last chunk of a prompt looks the same if it is one token long."""
    CHUNK = 1
    """A part of a prompt, or of what was preempted or came from another replica; nothing is sampled yet."""
    LAST_CHUNK = 2
    """The same, and it samples."""
    OTHERS = 3
    """All sequences beyond MAX_RUNS."""


def recent_steps(engine: Engine, after: int, limit: int, wall_ms: float) -> dict[str, Any]:
    """The newest ``limit`` steps with an index above ``after``, oldest first. ``wall_ms``: milliseconds since 1970, now.

    May be called on any thread. The answer has

        steps       lists: index, start (milliseconds since 1970), duration (ms), tokens, sequences that run and that wait,
                    blocks in use, preemptions, padded tokens, runs
        runs        flat, four numbers for a sequence, in the plan's order: `short_id`, Kind, tokens, how many of those
                    had been computed before
        num_steps, num_tokens, num_recomputed_tokens, num_preempted     totals of this engine's life
        num_running, num_waiting, num_used_blocks                       now, whether a step runs or not
        num_blocks, block_size, token_budget, max_num_seqs              its limits
    """
    recorder, scheduler, config = engine.recorder, engine.scheduler, engine.config
    records = recorder.records.copy()  # one call: the engine's thread goes on appending
    newest = itertools.takewhile(lambda record: record.index > after, itertools.islice(reversed(records), limit))
    new = list(newest)[::-1]
    now = engine.clock()
    return {
        "steps": [_step(record, wall_ms - (now - record.started) * 1000.0) for record in new],
        "num_steps": recorder.num_steps,
        "num_tokens": recorder.num_tokens,
        "num_recomputed_tokens": recorder.num_recomputed_tokens,
        "num_preempted": recorder.num_preempted,
        "num_running": len(scheduler.running),
        "num_waiting": len(scheduler.waiting),
        "num_used_blocks": scheduler.pool.num_used_blocks,
        "num_blocks": scheduler.pool.num_blocks,
        "block_size": config.block_size,
        "token_budget": config.max_num_batched_tokens,
        "max_num_seqs": config.max_num_seqs,
    }


@lru_cache(maxsize=8192)
def short_id(request_id: str) -> int:
    """32 bits that say nothing of a client's id. The page's own begin with them, so that it knows its requests again.

    BLAKE2b (RFC 7693) over the whole id, of which the ingress has made up a part.
    """
    own = _OWN_ID.match(request_id)
    return int(own[1], 16) if own else int.from_bytes(hashlib.blake2b(request_id.encode(), digest_size=4).digest())


def _step(record: StepRecord, started_ms: float) -> list[Any]:
    runs: list[int] = []
    for item in record.sequences[:MAX_RUNS]:
        runs += (short_id(item.request_id), _kind(item), item.num_tokens, item.num_recomputed_tokens)
    if others := record.sequences[MAX_RUNS:]:
        runs += (0, int(Kind.OTHERS), sum(o.num_tokens for o in others), sum(o.num_recomputed_tokens for o in others))
    return [
        record.index,
        round(started_ms, 1),
        round(record.duration * 1000.0, 2),
        record.num_tokens,
        record.num_running,
        record.num_waiting,
        record.num_used_blocks,
        record.num_preempted,
        record.num_padded_tokens,
        runs,
    ]


def _kind(item: SequenceStep) -> int:
    if not item.samples:
        return int(Kind.CHUNK)
    return int(Kind.DECODE if item.num_tokens == 1 and item.start > 0 else Kind.LAST_CHUNK)
