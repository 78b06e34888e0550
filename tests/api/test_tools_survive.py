"""Replicas die, and clients go away and come back, in the middle of calls and of reasoning: the answer is the one that
nothing disturbed, ids of calls and counts of reasoning included.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from serve_app.api.event_id import decode_event_id
from tests.api.house import House, Replica
from tests.api.test_resume import CHAT, HTTP, Client, Event, cut_records
from tests.api.test_same_bytes import die
from tests.api.test_tools import assembled
from tests.api.tool_house import ANSWERS, TOOLS, make_house

KINDS = ["text and two calls", "think and call", "think and answer", "broken call"]
FIELDS: dict[str, Any] = {"tools": TOOLS, "max_tokens": 500, "stream_options": {"include_usage": True}}


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> Iterator[House]:
    with make_house(tmp_path_factory.mktemp("model"), seconds_per_step=0.004) as made:
        yield made
        made.check_rest()


def body_of(kind: str, **fields: Any) -> dict[str, Any]:
    return {**FIELDS, "messages": [{"role": "user", "content": kind}], "stream": True, **fields}


def num_choices(kind: str) -> int:
    return 2 if kind in KINDS[:2] else 1


def story(events: list[Event]) -> tuple[Any, ...]:
    """All that a reader has at the end: choices, usage, number of ends."""
    chunks = [json.loads(event.data) for event in events if event.data != "[DONE]"]
    assert not any("error" in chunk for chunk in chunks), chunks[-1]
    usages = [chunk["usage"] for chunk in chunks if chunk.get("usage")]
    counts = [(usage["completion_tokens"], usage["completion_tokens_details"]) for usage in usages]
    return assembled(chunks), counts, sum(event.data == "[DONE]" for event in events)


def check_whole(kind: str, found: tuple[Any, ...]) -> None:
    choices, counts, num_ends = found
    assert num_ends == len(counts) == 1
    for choice in choices:
        assert len(choice["message"].get("tool_calls", ())) == ANSWERS[kind].count("<tool_call>")
        assert bool(choice["message"].get("reasoning")) == ("<think>" in ANSWERS[kind])
    assert bool(counts[0][1]["reasoning_tokens"]) == ("<think>" in ANSWERS[kind])


@pytest.mark.parametrize("kind", KINDS)
def test_deaths_in_calls_and_in_reasoning_leave_no_trace(house: House, kind: str) -> None:
    """Each time the replica that runs it dies at another token; the client reads one stream."""
    body = body_of(kind, n=num_choices(kind))
    headers = {"x-request-id": f"the-same-{kind.replace(' ', '-')}"}
    counters = house.service.failover.counters
    expected: Any = None
    with ThreadPoolExecutor(1) as pool:
        for num_before in (None, 3, 20, 35):
            num_resumed = counters["resumed"]
            asked = pool.submit(HTTP.post, house.url + CHAT, json=body, headers=headers)
            if num_before is not None:
                house.run(die(house, wait_for(house, num_before)))
            answer = asked.result()
            assert answer.status_code == 200, answer.text
            assert (counters["resumed"] > num_resumed) == (num_before is not None)
            found = story([Event(None, line[6:]) for line in answer.text.split("\n\n") if line])
            check_whole(kind, found)
            expected = expected or found
            assert found == expected
    house.check_rest()


def wait_for(house: House, num_tokens: int) -> Replica:
    """The replica on which a sequence has so many tokens of output."""
    found: list[Replica] = []

    def look() -> bool:
        for replica in house.replicas:
            sequences = list(replica.engine.engine.scheduler.sequences.values())
            if any(sequence.num_output_tokens >= num_tokens for sequence in sequences):
                found.append(replica)
        return bool(found)

    house.wait_until(look)
    return found[0]


@pytest.mark.parametrize("kind", KINDS)
def test_a_stream_is_resumed_from_its_events(house: House, kind: str) -> None:
    """From what is kept, and from where a cut left less: then the rest is generated again."""
    client = Client(house, CHAT, **body_of(kind, n=num_choices(kind)))
    events = client.read()
    whole = story(events)
    check_whole(kind, whole)
    random_ = random.Random(kind)
    before_usage = len(events) - 3
    for i in (before_usage, *random_.sample(range(before_usage), min(11, before_usage))):
        event_id = decode_event_id(events[i].id or "")
        if random_.random() < 0.4 and not event_id.is_over:
            cut_records(house, event_id, num_choices(kind), random_)
        assert story(events[: i + 1] + client.read(events[i].id)) == whole, i
    house.check_rest()
