"""KeptRequests: what is kept, for whom, for how long, and never more than the bounds. Then the same in a replica's hub."""

from __future__ import annotations

import asyncio
import dataclasses
import random

import pytest

from serve_app.engine.request import FinishReason, GenerateRequest, SamplingParams, TokenLogprobs, TokenOutput
from serve_app.errors import StreamResumedError, UnknownStreamError
from serve_app.replica.channel import Outputs
from serve_app.replica.kept import FENCE_SECONDS, Keep, KeptRequests, Origin, Record
from tests.engine.harness import expected_tokens
from tests.replica.channel_harness import MAX_MODEL_LEN, Service, leased, read_on, run_virtual, simple_request

ME, OTHER = b"me", b"other"


def keep(name: str, prompt_index: int = 0, ticket: int = 0, **fields: object) -> Keep:
    origin = Origin(name, 17, (1, 2), (10, 10))
    return Keep(name.encode(), ME, origin, prompt_index, ticket)._replace(**fields)


def choices(n: int = 1, attempt: int = 0, emitted: tuple[int, ...] = ()) -> list[GenerateRequest]:
    sampling = SamplingParams(max_tokens=10, seed=1)
    return [GenerateRequest("r", (1, 2), sampling, emitted, i, attempt=attempt) for i in range(n)]


def output(*token_ids: int, choice: int = 0, **fields: object) -> TokenOutput:
    return TokenOutput("r", choice, token_ids)._replace(**fields)


def run(kept: KeptRequests, name: str, num_tokens: int, now: float = 0.0) -> Record:
    """One that runs, and has made so many tokens."""
    record = kept.begin(keep(name), choices(), now)
    for i in range(num_tokens):
        kept.add(record, output(i))
    return record


def test_it_gives_back_what_it_was_told() -> None:
    kept = KeptRequests()
    record = kept.begin(keep("a"), choices(n=2), 0.0)
    entries = [TokenLogprobs(i, -i / 2, ((i, -i / 2),)) for i in range(4)]
    first = output(5, logprobs=(entries[0],), prompt_logprobs=(None, entries[1]), num_cached_tokens=1)
    kept.add(record, first)
    kept.add(record, output(9, choice=1, finish_reason=FinishReason.STOP, stop_token_id=9))
    kept.add(record, output(6, 7, logprobs=(entries[2], entries[3]), num_cached_tokens=1))
    kept.add(record, output(finish_reason=FinishReason.ABORT))
    kept.check_invariants(0.0)
    assert kept.fetch(b"a", 0.0) == [], "some of it runs"
    kept.end(record, 1.0)
    (found,) = kept.fetch(b"a", 2.0)
    assert (found.origin, found.prompt_index, found.ticket, found.attempt) == (keep("a").origin, 0, 0, 0)
    assert found.choices == (
        TokenOutput("", 0, (5, 6, 7), (entries[0], entries[2], entries[3]), (None, entries[1]), num_cached_tokens=1),
        TokenOutput("", 1, (9,), finish_reason=FinishReason.STOP, stop_token_id=9),
    )
    kept.check_invariants(2.0)


def test_an_attempt_has_what_came_before_it() -> None:
    kept = KeptRequests()
    ended = output(1, 2, choice=1, finish_reason=FinishReason.LENGTH)
    record = kept.begin(keep("a", ended=(ended,)), choices(attempt=2, emitted=(3, 4)), 0.0)
    kept.add(record, output(5))
    kept.end(record, 0.0)
    (found,) = kept.fetch(b"a", 0.0)
    assert found.attempt == 2
    assert found.choices == (output(3, 4, 5)._replace(request_id=""), ended._replace(request_id=""))
    kept.check_invariants(0.0)


def test_each_prompt_has_its_record_and_a_later_attempt_takes_its_place() -> None:
    kept = KeptRequests()
    first, other = (kept.begin(keep("a", i), choices(), 0.0) for i in range(2))
    kept.add(first, output(1))
    again = kept.begin(keep("a"), choices(attempt=1, emitted=(1,)), 0.0)
    kept.add(first, output(7))  # the old one still runs for a moment; nobody wants that
    kept.add(again, output(2))
    late = kept.begin(keep("a"), choices(attempt=0), 0.0)
    kept.add(late, output(8))
    for record in (first, other, again, late):
        kept.check_invariants(0.0)
        kept.end(record, 0.0)
    found = {k.prompt_index: k for k in kept.fetch(b"a", 0.0)}
    assert found[0].choices[0].token_ids == (1, 2)
    assert found[1].choices[0].token_ids == ()
    assert len(kept) == 1
    kept.check_invariants(0.0)


def test_it_is_kept_for_its_time_from_the_end_and_from_each_fetch() -> None:
    kept = KeptRequests(keep_seconds=10.0)
    record = run(kept, "a", 3)
    kept.expire(1000.0)
    kept.end(record, 1000.0)
    assert kept.fetch(b"a", 1009.0)
    assert kept.fetch(b"a", 1018.5)
    kept.check_invariants(1018.5)
    assert kept.fetch(b"a", 1028.5) == []
    assert (len(kept), kept.num_tokens) == (0, 0)
    off = KeptRequests(keep_seconds=0.0)
    off.end(run(off, "a", 3), 5.0)
    assert len(off) == 0


def test_what_ended_first_goes_first_and_then_what_began_first() -> None:
    kept = KeptRequests(max_entries=4, max_tokens=1000)
    records = {name: run(kept, name, 5) for name in "abcd"}
    kept.end(records["c"], 1.0)
    kept.end(records["a"], 2.0)
    run(kept, "e", 5, 3.0)
    assert kept.fetch(b"c", 3.0) == []
    assert kept.fetch(b"a", 3.0)
    run(kept, "f", 5, 3.0)
    run(kept, "g", 5, 3.0)  # only running ones are left: b is not kept any more
    kept.add(records["b"], output(1))
    kept.end(records["b"], 4.0)
    assert kept.fetch(b"b", 4.0) == kept.fetch(b"a", 4.0) == []
    kept.end(records["d"], 4.0)
    assert kept.fetch(b"d", 4.0)
    kept.check_invariants(4.0)


def test_tokens_are_bounded_with_their_logprobs() -> None:
    kept = KeptRequests(max_tokens=20)
    kept.end(run(kept, "a", 9), 0.0)
    record = run(kept, "b", 9)
    assert (len(kept), kept.num_tokens) == (2, 20)
    kept.add(record, output(1))
    assert (len(kept), kept.num_tokens) == (1, 11)
    entry = TokenLogprobs(1, -1.0, ((1, -1.0), (2, -2.0)))
    kept.add(record, output(1, 2, logprobs=(entry, entry)))
    assert kept.num_tokens == 19
    kept.add(record, output(3, 4))
    assert (len(kept), kept.num_tokens) == (0, 0)
    kept.end(record, 1.0)
    kept.check_invariants(1.0)


def test_another_owner_gets_nothing_and_disturbs_nobody() -> None:
    kept = KeptRequests()
    record = run(kept, "a", 2)
    with pytest.raises(UnknownStreamError):
        kept.fence(b"a", OTHER, 5, 0.0)
    kept.check(keep("a"))
    kept.fence(b"unknown", OTHER, 5, 0.0)
    kept.check(keep("unknown"))  # of ME
    kept.end(record, 0.0)
    with pytest.raises(UnknownStreamError):
        kept.fence(b"a", OTHER, 5, 0.0)


def test_the_latest_reader_wins() -> None:
    kept = KeptRequests(keep_seconds=5.0)
    kept.fence(b"a", ME, 7, 0.0)
    with pytest.raises(StreamResumedError) as caught:
        kept.check(keep("a", ticket=6))
    assert caught.value.ticket == 7
    kept.check(keep("a", ticket=7))
    kept.fence(b"a", ME, 7, 0.0)
    with pytest.raises(StreamResumedError) as caught:
        kept.fence(b"a", ME, 3, 1.0)
    assert caught.value.ticket == 7
    kept.fence(b"a", ME, 9, 2.0)
    with pytest.raises(StreamResumedError):
        kept.check(keep("a", ticket=7))
    kept.expire(2.0 + FENCE_SECONDS - 1.0)
    with pytest.raises(StreamResumedError):
        kept.check(keep("a"))
    kept.expire(2.0 + FENCE_SECONDS)
    kept.check(keep("a"))


def test_the_books_add_up_whatever_comes() -> None:
    """Random calls against small bounds; what is kept at the end is what a plain model of it has."""
    random_ = random.Random(0)
    num_dropped = num_found = 0
    for _ in range(60):
        kept = KeptRequests(keep_seconds=20.0, max_entries=6, max_tokens=120)
        running: list[tuple[str, int, Record]] = []
        told: dict[tuple[str, int], list[int]] = {}
        now = 0.0
        for _ in range(150):
            now += random_.expovariate(1.0)
            what = random_.randrange(5)
            if what == 0:
                name, prompt_index = random_.choice("abcdefghij"), random_.randrange(2)
                if not any((name, prompt_index) == entry[:2] for entry in running):
                    emitted = tuple(told.get((name, prompt_index), ()))
                    requests = [dataclasses.replace(r, output_token_ids=emitted) for r in choices()]
                    running.append((name, prompt_index, kept.begin(keep(name, prompt_index), requests, now)))
            elif what in (1, 2) and running:
                name, prompt_index, record = random_.choice(running)
                tokens = tuple(random_.randrange(9) for _ in range(random_.randrange(1, 9)))
                kept.add(record, output(*tokens))
                told.setdefault((name, prompt_index), []).extend(tokens)
            elif what == 3 and running:
                kept.end(running.pop(random_.randrange(len(running)))[2], now)
            elif what == 4:
                name = random_.choice("abcdefghij")
                for found in kept.fetch(name.encode(), now):
                    assert list(found.choices[0].token_ids) == told.get((name, found.prompt_index), [])
                    num_found += 1
            kept.expire(now)
            kept.check_invariants(now)
            num_dropped += sum(record.entry is None for _, _, record in running)
    assert num_dropped > 30
    assert num_found > 300


# ---- in a hub ----------------------------------------------------------------------------------------------------


async def some_of(outputs: Outputs) -> list[TokenOutput]:
    """The first few tokens of a request that has many more."""
    found: list[TokenOutput] = []
    while sum(len(o.token_ids) for o in found) < 3:
        found += await outputs.next()
    return found


@pytest.mark.parametrize("how", ["goodbye", "silence", "hang-up"])
def test_an_ingress_that_goes_leaves_what_it_had(how: str) -> None:
    async def test() -> None:
        async with Service(seconds_per_step=0.2) as service:
            requests = simple_request("a", max_tokens=150)
            outputs = service.ingress().start("replica0", requests, 40, keep("a"))
            seen = await some_of(outputs)
            (hub,), (ingress,) = service.hubs, service.ingresses
            if how == "goodbye":
                await ingress.close()
            elif how == "silence":
                service.transport.hold = lambda replica_id, method: method in ("ack", "outputs", "close_channel")
                service.transport.break_streams("replica0", RuntimeError("planted"))
            else:
                outputs.abort()
            while hub.num_live:
                await asyncio.sleep(0.1)
            service.transport.hold = lambda replica_id, method: False
            (found,) = await hub.fetch_kept(b"a", ME, 5)
            (choice,) = found.choices
            tokens = sum((o.token_ids for o in seen), ())
            assert choice.token_ids[: len(tokens)] == tokens
            assert (
                choice.token_ids
                == expected_tokens(requests[0], max_model_len=MAX_MODEL_LEN)[0][: len(choice.token_ids)]
            )
            assert len(tokens) <= len(choice.token_ids) < 150
            assert choice.finish_reason is None
            hub.kept.check_invariants(service.loop.time())

    run_virtual(test)


def test_a_fetch_ends_what_runs_and_keeps_out_what_comes_late() -> None:
    async def test() -> None:
        async with Service(num_replicas=2) as service:
            requests = simple_request("a", max_tokens=150)
            outputs = service.ingress("old").start("replica0", requests, 40, keep("a"))
            seen = await some_of(outputs)
            answers = await service.ingress("new").call_each(["replica1", "replica0"], "fetch_kept", b"a", ME, 5)
            assert service.hubs[0].num_live == 0
            assert answers["replica1"] == []
            (found,) = answers["replica0"]
            await read_on(outputs, seen)
            assert seen[-1].error_code == StreamResumedError.code
            assert sum((o.token_ids for o in seen), ()) == found.choices[0].token_ids
            again = leased(simple_request("b", max_tokens=150), attempt=1)
            with pytest.raises(StreamResumedError):
                await service.ingresses[0].start("replica1", again, 40, keep("a")).accepted()
            with pytest.raises(UnknownStreamError):
                await service.hubs[0].fetch_kept(b"a", OTHER, 9)
            later = leased(simple_request("b", max_tokens=5), attempt=2)
            await read_on(service.ingresses[1].start("replica1", later, 40, keep("a", ticket=5)), [])
            assert [k.ticket for k in await service.hubs[1].fetch_kept(b"a", ME, 6)] == [5]

    run_virtual(test)
