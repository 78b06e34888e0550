"""What the drill and the soak conclude, without a cluster: answers put together and compared, tables, leaks."""

from __future__ import annotations

import doctest
import json
import random
from collections import Counter
from typing import Any

import pytest

from loadtests import soak
from loadtests.drill import AFTER, BEFORE, IN, Hit, Killer, StreamRun, steps, verdict
from loadtests.soak import MAX_GROWTH_MIB, Sample, leaks
from loadtests.stream_mix import CHAT, KINDS, AnswerRead, first_difference, make_items, num_differing_bytes, stop_string


def test_examples() -> None:
    assert doctest.testmod(soak) == (0, 2)


# ---- the mix ---------------------------------------------------------------------------------------------------------


def test_the_mix_has_every_kind_and_is_the_same_again() -> None:
    items = make_items(2 * len(KINDS), seed=3)
    assert [item.body for item in items] == [item.body for item in make_items(2 * len(KINDS), seed=3)]
    assert {item.kind.path for item in items} == {"/v1/completions", CHAT}
    assert len({json.dumps(item.body) for item in items}) == len(items)
    fields = {name for item in items for name in item.body}
    assert fields >= {
        "n",
        "tools",
        "logprobs",
        "presence_penalty",
        "repetition_penalty",
        "min_tokens",
        "ignore_eos",
        "echo",
    }
    assert all(item.body["max_tokens"] >= 200 for item in items)
    sent = items[0].sent(stream=True)
    assert sent["stream"]
    assert "stream" not in items[0].body


def test_a_stop_string_occurs_late_for_the_first_time() -> None:
    texts = [random.Random(i).choice(["ab", "ba", "cab"]) for i in range(300)]
    text = "".join(texts)
    found = stop_string(text, texts)
    assert text.find(found) >= len("".join(texts[:205]))
    with pytest.raises(ValueError, match="no string of the last 95"):
        stop_string("a" * 300, ["a"] * 300)


# ---- answers ---------------------------------------------------------------------------------------------------------


def event(text: str, ids: list[int], reason: str | None = None, **more: Any) -> bytes:
    logprobs = {"token_logprobs": [-0.5] * len(ids)}
    choice = {"index": 0, "text": text, "token_ids": ids, "logprobs": logprobs, "finish_reason": reason}
    return json.dumps({"id": "cmpl-1", "choices": [choice], **more}).encode()


def read(*events: bytes) -> AnswerRead:
    answer = AnswerRead()
    for i, data in enumerate(events):
        answer.take_event(data, float(i * i))
    return answer


USAGE = json.dumps({"id": "cmpl-1", "choices": [], "usage": {"total_tokens": 5}}).encode()


def test_a_call_is_put_together_and_counts() -> None:
    def chunk(delta: dict[str, Any], reason: str | None = None) -> bytes:
        return json.dumps(
            {"id": "c", "choices": [{"index": 0, "delta": delta, "logprobs": None, "finish_reason": reason}]}
        ).encode()

    def part(index: int, arguments: str, **first: str) -> dict[str, Any]:
        name = {"name": first.pop("name")} if first else {}
        return {"tool_calls": [{"index": index, "function": {**name, "arguments": arguments}, **first}]}

    end = chunk({}, "tool_calls"), b"[DONE]"
    one = read(chunk(part(0, "", name="f", id="x")), chunk(part(0, "[1")), chunk(part(0, "]")), *end)
    other = read(chunk(part(0, "[1]", name="f", id="x")), *end)
    assert one.choices[0].calls == [{"id": "x", "name": "f", "arguments": "[1]"}]
    assert one.canonical() == other.canonical()
    whole = AnswerRead()
    call = {"id": "x", "type": "function", "function": {"name": "f", "arguments": "[1]"}}
    message = {"role": "assistant", "content": None, "tool_calls": [call]}
    choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": "tool_calls"}
    whole.take_body(json.dumps({"id": "c", "choices": [choice]}).encode())
    assert whole.canonical() == one.canonical()
    assert read(chunk(part(0, "[2]", name="f", id="x")), *end).canonical() != one.canonical()


def test_where_events_end_makes_no_difference_and_all_else_does() -> None:
    whole = AnswerRead()
    whole.take_body(event("abc", [1, 2, 3], "length", usage={"total_tokens": 5, "prompt_tokens_details": {"a": 1}}))
    one = read(event("a", [1]), event("bc", [2, 3], "length"), USAGE, b"[DONE]")
    two = read(event("ab", [1, 2]), event("", []), event("c", [3], "length"), USAGE, b"[DONE]")
    assert one.canonical() == two.canonical() == whole.canonical()
    assert one.is_done
    assert one.error is None
    assert one.longest_gap == 1.0
    for other in (
        read(event("a", [1]), event("bd", [2, 3], "length"), USAGE, b"[DONE]"),
        read(event("a", [1]), event("bc", [2, 4], "length"), USAGE, b"[DONE]"),
        read(event("a", [1]), event("bc", [2, 3], "stop"), USAGE, b"[DONE]"),
        read(event("a", [1]), event("bc", [2, 3], "length"), b"[DONE]"),
        read(event("a", [1]), event("a", [1]), event("bc", [2, 3], "length"), USAGE, b"[DONE]"),
    ):
        assert num_differing_bytes(one.canonical(), other.canonical()) > 0
        assert first_difference(one.canonical(), other.canonical()).startswith("at byte ")


def test_what_must_not_come_is_an_error() -> None:
    late = read(event("a", [1], "length"), event("b", [2]))
    assert late.error is not None
    assert "behind its end" in late.error
    behind = read(event("a", [1], "length"), b"[DONE]", USAGE)
    assert behind.error is not None
    assert "an event behind the end" in behind.error
    said = read(event("a", [1]), b'{"error": {"message": "no"}}')
    assert said.has_ended
    assert said.error is not None
    assert "no" in said.error


# ---- the drill's verdict ---------------------------------------------------------------------------------------------


def killer(num_kills: int = 4, num_in: int = 2, num_after: int = 4, num_alone: int = 1) -> Killer:
    made = Killer.__new__(Killer)
    made.num_kills, made.num_alone, made.num_hung, made.num_dropped, made.num_router_kills = (
        num_kills,
        num_alone,
        1,
        3,
        1,
    )
    made.landed = Counter({IN: num_in, AFTER: num_after})
    return made


def runs() -> list[StreamRun]:
    items = make_items(4)
    made = [StreamRun(i, item, num_differing=0) for i, item in enumerate(items)]
    for run in made:
        run.answer = read(event("a" * 200, [1] * 200, "length"), USAGE, b"[DONE]")
    made[0].hits = [Hit(AFTER, False), Hit(IN, False)]
    made[1].hits = [Hit(BEFORE, False)]
    return made


def test_a_drill_without_fault_has_nothing_wrong() -> None:
    table, wrong = verdict(runs(), killer(), 4)
    assert wrong == []
    said = dict(table)
    assert (said["streams hit"], said["resumed"], said["resumed more than once"]) == ("2", "2", "1")
    assert (said["differing bytes"], said["lost"]) == ("0", "0")


def test_a_drill_fails_for_each_of_its_reasons() -> None:
    lost, differs, short, calm = runs(), runs(), runs(), runs()
    lost[1].num_differing, lost[1].answer.error = None, "the body ended"
    differs[2].num_differing = 7
    short[3].answer = read(event("a", [1], "length"), USAGE, b"[DONE]")
    for run in calm:
        run.hits = []
    reasons = {
        "the body ended": verdict(lost, killer(), 4),
        "7 bytes differ": verdict(differs, killer(), 4),
        "fewer than 200 tokens": verdict(short, killer(), 4),
        "no stream was resumed": verdict(calm, killer(), 4),
        "4 kills; 5 are needed": verdict(runs(), killer(), 5),
        "no kill while only one": verdict(runs(), killer(num_alone=0), 4),
        "0 of 4 kills hit a stream in": verdict(runs(), killer(num_in=0), 4),
        "1 of 4 kills hit a stream after": verdict(runs(), killer(num_after=1), 4),
    }
    for reason, (_, wrong) in reasons.items():
        assert len(wrong) == 1, (reason, wrong)
        assert reason in wrong[0]
    assert dict(reasons["the body ended"][0])["lost"] == "1"


def test_the_steps_of_a_drill() -> None:
    counted = Counter(steps(20, 3, 2))
    assert counted["router"] == 3
    assert counted["hang"] == 2
    assert counted["alone"] + counted["in prefill"] + counted["kill"] == 20
    assert counted["alone"] >= 2
    assert counted["in prefill"] >= 2
    for made in (steps(20, 3, 2), steps(4, 1, 1)):
        before = [made[i - 1] for i, step in enumerate(made) if step == "alone"]
        assert set(before) <= {"kill", "in prefill"}, "two replicas are up again, and it would wait for ever"
    assert set(steps(4, 1, 1)) == {"kill", "in prefill", "alone", "router", "hang"}


# ---- the soak's leaks ------------------------------------------------------------------------------------------------


def samples(**values: list[float]) -> list[Sample]:
    rows = len(next(iter(values.values())))
    flat: dict[str, list[Any]] = {
        "fds": [20] * rows,
        "threads": [9] * rows,
        "tasks": [30] * rows,
        "rss": [300.0] * rows,
    }
    flat |= values
    return [Sample(float(i), **{name: column[i] for name, column in flat.items()}) for i in range(rows)]


def test_what_is_flat_does_not_leak() -> None:
    assert leaks("a", samples(rss=[250, 290, 300, 301, 300, 302, 301, 300, 302])) == []
    assert leaks("a", samples(fds=[20, 24, 21, 22, 20, 23])) == []
    assert leaks("a", samples(tasks=[None] * 6)) == []


@pytest.mark.parametrize("kind", ["fds", "threads", "tasks"])
def test_what_grows_is_named(kind: str) -> None:
    (found,) = leaks("the replica", samples(**{kind: [20, 21, 22, 23, 24, 25, 26]}))
    assert found == f"the replica: {kind} 20 21 22 23 24 25 26"


def test_memory_that_rises_at_the_end_is_a_leak() -> None:
    values = [300 + 2 * MAX_GROWTH_MIB * i / 9 for i in range(10)]
    (found,) = leaks("the ingress", samples(rss=values))
    assert found.startswith("the ingress: RSS rises by 1.7")
