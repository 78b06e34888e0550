"""Streams that are cut and resumed, over real sockets: what a client saw before and after is what an undisturbed one sees.

The house is the whole service in one process (tests/api/house.py). `Story` puts together what a reader of events has.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import pytest
import uvicorn

from serve_app.api.event_id import EventId, decode_event_id, encode_event_id
from serve_app.api.http_app import build_app
from serve_app.engine.simulated_runner import _ROOT, _mix
from serve_app.metrics import render
from serve_app.replica.kept import KeptRequests, Record
from tests.api.house import House
from tests.tiny_models import TOKENIZER_SIZE, make_tiny_model

ENGINE = {"num_threads": 1, "num_kv_blocks": 96, "max_model_len": 256, "max_num_batched_tokens": 64, "max_num_seqs": 16}
RESUMABLE = {"x-resumable": "1"}
CHAT, COMPLETION = "/v1/chat/completions", "/v1/completions"
HTTP = httpx.Client(timeout=30, limits=httpx.Limits(max_keepalive_connections=0))
"""One for all: to make one costs more than most of these requests."""
MESSAGES = [{"role": "user", "content": "tell me of the fox"}]


class Event(NamedTuple):
    id: str | None
    data: str


class Client:
    """One request, as often as it takes."""

    def __init__(self, house: House, path: str, url: str | None = None, **body: Any) -> None:
        self.path = path
        self.body = json.dumps({**body, "stream": True}).encode()
        self.headers = {"content-type": "application/json", "authorization": "Bearer mine"}
        self._url = url or house.url

    def read(self, last_id: str | None = None, limit: int | None = None, url: str | None = None) -> list[Event]:
        """The events, at most ``limit`` of them; then it hangs up. Raises AssertionError with what is not a 200."""
        with self.open(last_id, url) as answer:
            assert answer.status_code == 200, (answer.status_code, answer.read())
            return list(events_of(answer, limit))

    @contextlib.contextmanager
    def open(self, last_id: str | None = None, url: str | None = None) -> Iterator[httpx.Response]:
        headers = {**self.headers, **RESUMABLE, **({} if last_id is None else {"last-event-id": last_id})}
        url = (url or self._url) + self.path
        with HTTP.stream("POST", url, content=self.body, headers=headers) as answer:
            yield answer

    def refused(self, last_id: str, url: str | None = None) -> tuple[int, str]:
        """Status and code of a resume that fails."""
        with self.open(last_id, url) as answer:
            error = json.loads(answer.read())["error"]
            assert set(error) == {"message", "type", "param", "code"}
            assert error["message"]
            return answer.status_code, error["code"]


def events_of(answer: httpx.Response, limit: int | None = None) -> Iterator[Event]:
    event_id = None
    num_left = limit
    for line in answer.iter_lines():
        if line.startswith("id: "):
            event_id = line[4:]
        elif line.startswith("data: "):
            yield Event(event_id, line[6:])
            event_id = None
            num_left = None if num_left is None else num_left - 1
            if num_left == 0:
                return


class Story:
    """What a reader has after these events."""

    def __init__(self, events: list[Event]) -> None:
        self.texts: dict[int, str] = {}
        self.token_ids: dict[int, list[int]] = {}
        self.logprobs: dict[int, dict[str, list[Any]]] = {}
        self.ends: dict[int, list[Any]] = {}
        self.roles: list[int] = []
        self.prompt_token_ids: list[Any] = []
        self.heads: set[Any] = set()
        self.usages: list[Any] = []
        self.num_done = 0
        for event in events:
            if event.data == "[DONE]":
                self.num_done += 1
            else:
                self._take(json.loads(event.data))

    def _take(self, chunk: dict[str, Any]) -> None:
        assert "error" not in chunk, chunk
        assert not self.num_done
        self.heads.add((chunk["id"], chunk["created"], chunk["model"], chunk["object"]))
        if chunk.get("usage") and not chunk["choices"]:
            self.usages.append({k: v for k, v in chunk["usage"].items() if k != "prompt_tokens_details"})
        if "prompt_token_ids" in chunk:
            self.prompt_token_ids.append(chunk["prompt_token_ids"])
        for choice in chunk["choices"]:
            i = choice["index"]
            delta = choice.get("delta", {})
            self.texts[i] = self.texts.get(i, "") + (choice.get("text") or delta.get("content") or "")
            self.token_ids.setdefault(i, []).extend(choice.get("token_ids", ()))
            for name, values in (choice["logprobs"] or {}).items():
                self.logprobs.setdefault(i, {}).setdefault(name, []).extend(values)
            if choice["finish_reason"] is not None:
                self.ends.setdefault(i, []).append((choice["finish_reason"], choice["stop_reason"]))
            if "role" in delta:
                self.roles.append(i)
            if "prompt_token_ids" in choice:
                self.prompt_token_ids.append((i, choice["prompt_token_ids"]))

    def check(self, other: Story, *, same_head: bool = False) -> None:
        """It is the same answer."""
        for name in ("texts", "token_ids", "logprobs", "ends", "usages", "num_done"):
            assert getattr(self, name) == getattr(other, name), name
        assert sorted(self.roles) == sorted(other.roles)
        assert sorted(self.prompt_token_ids) == sorted(other.prompt_token_ids)
        assert len(self.heads) == len(other.heads) == 1
        assert not same_head or self.heads == other.heads
        assert all(len(ends) == 1 for ends in self.ends.values())


SAMPLED = {"temperature": 1.0, "seed": 7}
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "greedy": (COMPLETION, {"prompt": "the quick", "max_tokens": 24, "temperature": 0}),
    "seeded, usage in each event": (
        COMPLETION,
        {
            "prompt": "the quick",
            "max_tokens": 24,
            "stream_options": {"include_usage": True},
            **SAMPLED,
        },
    ),
    "two choices, ids": (
        COMPLETION,
        {"prompt": "the quick", "max_tokens": 16, "n": 2, "return_token_ids": True, **SAMPLED},
    ),
    "prompts": (COMPLETION, {"prompt": ["one", "the two", "and three"], "max_tokens": 9, "n": 2, **SAMPLED}),
    "penalties": (
        COMPLETION,
        {
            "prompt": "the quick",
            "max_tokens": 30,
            "temperature": 0,
            "frequency_penalty": 1.5,
            "presence_penalty": 0.7,
            "repetition_penalty": 1.3,
            "min_tokens": 12,
            "return_token_ids": True,
        },
    ),
    "logprobs": (COMPLETION, {"prompt": "the quick", "max_tokens": 12, "logprobs": 3, **SAMPLED}),
    "echo and logprobs": (
        COMPLETION,
        {"prompt": "the quick", "max_tokens": 9, "logprobs": 1, "echo": True, "n": 2, **SAMPLED},
    ),
    "echo alone": (COMPLETION, {"prompt": "the quick", "max_tokens": 0, "echo": True, "temperature": 0}),
    "chat": (
        CHAT,
        {
            "messages": MESSAGES,
            "max_tokens": 14,
            "n": 2,
            "stream_options": {"include_usage": True},
            "logprobs": True,
            "top_logprobs": 2,
            **SAMPLED,
        },
    ),
    "plain chat": (
        CHAT,
        {
            "messages": MESSAGES,
            "max_tokens": 20,
            **SAMPLED,
            "stream_options": {"include_usage": True, "continuous_usage_stats": True},
        },
    ),
}


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("model"), vocab_size=300, eos=())


@pytest.fixture(scope="module")
def house(directory: Path) -> Iterator[House]:
    args = {"model": {"model": str(directory), "served_model_name": "tiny", "dtype": "float32"}, "engine": ENGINE}
    with House(args) as made:
        yield made
        made.check_rest()
        check_kept(made)


@pytest.fixture(scope="module")
def slow_house(directory: Path) -> Iterator[House]:
    """Simulated, 4 ms a step."""
    model = {"model": str(directory), "runner": "simulated", "simulated": {"seconds_per_step": 0.004}}
    with House({"model": model, "engine": ENGINE}) as made:
        yield made
        made.check_rest()
        check_kept(made)


def check_kept(house: House) -> None:
    async def check() -> None:
        for replica in house.replicas:
            now = asyncio.get_running_loop().time()
            replica.hub.kept.expire(now)
            replica.hub.kept.check_invariants(now)

    house.run(check())


def client_of(house: House, kind: str, **fields: Any) -> Client:
    path, body = KINDS[kind]
    return Client(house, path, **{**body, **fields})


def records_of(house: House, event_id: str | None) -> list[Record]:
    """What all replicas keep of a stream."""
    assert event_id is not None
    resume_id = decode_event_id(event_id).resume_id
    stores: list[KeptRequests] = [replica.hub.kept for replica in house.replicas]
    entries = [entry for kept in stores for box in (kept._running, kept._ended) if (entry := box.get(resume_id))]
    return [record for entry in entries for record in entry.records.values()]


# ---- the same bytes ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_a_resumable_stream_differs_by_its_ids_alone(house: House, kind: str) -> None:
    client = client_of(house, kind)
    ordinary = HTTP.post(house.url + client.path, content=client.body, headers=client.headers, timeout=30)
    plain = list(events_of(ordinary))
    assert all(event.id is None for event in plain)
    events = client.read()
    assert all(event.id is not None for event in events)
    Story(events).check(Story(plain))
    assert [event.id for event in events[-1:]] == [events[-1].id]
    seen = [decode_event_id(event.id or "") for event in events]
    assert len({event_id.resume_id for event_id in seen}) == 1
    assert [event_id.is_over for event_id in seen] == sorted(event_id.is_over for event_id in seen)


@pytest.mark.parametrize("kind", KINDS)
def test_a_finished_stream_is_resumed_from_each_of_its_events(house: House, kind: str) -> None:
    """Nothing is generated: the steps stand still."""
    client = client_of(house, kind)
    events = client.read()
    whole = Story(events)
    house.check_rest()
    steps = [replica.engine.num_steps for replica in house.replicas]
    for i, event in enumerate(events):
        rest = client.read(event.id)
        Story(events[: i + 1] + rest[(event.data == "[DONE]") :]).check(whole, same_head=True)
    assert steps == [replica.engine.num_steps for replica in house.replicas]
    house.check_rest()


@pytest.mark.parametrize("kind", KINDS)
def test_it_goes_on_from_where_it_was_aborted(house: House, kind: str) -> None:
    """What a disconnect leaves: some tokens, no end. Each kind is cut at every event, with more or less kept behind it."""
    client = client_of(house, kind)
    events = client.read()
    whole = Story(events)
    random_ = random.Random(kind)
    num_generated = 0
    cuts = [i for i in range(len(events)) if not decode_event_id(events[i].id or "").is_over]
    for i in random_.sample(cuts, min(6, len(cuts))):
        shown = decode_event_id(events[i].id or "")
        cut_records(house, shown, json.loads(client.body).get("n", 1), random_)
        before = sum(replica.engine.num_steps for replica in house.replicas)
        rest = client.read(events[i].id)
        num_generated += sum(replica.engine.num_steps for replica in house.replicas) > before
        Story(events[: i + 1] + rest).check(whole, same_head=True)
        again = rest[random_.randrange(len(rest))]
        second = client.read(again.id)
        Story(events[: i + 1] + rest[: rest.index(again) + 1] + second[(again.data == "[DONE]") :]).check(whole)
    assert num_generated or kind == "echo alone"
    house.check_rest()


def cut_records(house: House, shown: EventId, n: int, random_: random.Random) -> None:
    """Takes tokens from the records, down to what this reader has; now and then the logprobs of the first ones too."""
    for replica in house.replicas:
        kept = replica.hub.kept
        for record in (r for r in records_of(house, encode_event_id(shown).decode()) if r.entry is not None):
            if kept._ended.get(shown.resume_id) is not record.entry:
                continue
            for i, choice in record.choices.items():
                at = record.prompt_index * n + i
                seen = shown.choices[at] if at < len(shown.choices) else None
                if seen is not None and seen.has_ended:
                    continue
                least = 0 if seen is None else seen.num_tokens
                if len(choice.token_ids) < least:
                    continue  # an earlier cut of this test: a later record has them
                length = random_.randint(least, len(choice.token_ids))
                if length < len(choice.token_ids):
                    choice.finish_reason = choice.stop_token_id = None
                    if choice.logprobs is not None:
                        del choice.logprobs[max(0, len(choice.logprobs) - len(choice.token_ids) + length) :]
                    del choice.token_ids[length:]
                if choice.logprobs and random_.random() < 0.5:
                    del choice.logprobs[: random_.randint(1, len(choice.logprobs))]  # an attempt before had them
                    choice.prompt_logprobs = None


def test_text_that_is_held_back_at_the_cut(house: House) -> None:
    """The cut is inside of a stop string that comes, and inside of one that does not come."""
    free = client_of(house, "greedy", max_tokens=40)
    text = Story(free.read()).texts[0]
    stop = text[20:26]
    for strings in ([stop], [stop[:3] + "never", stop], [stop[:5] + "never"]):
        client = client_of(house, "greedy", max_tokens=40, stop=strings, return_token_ids=True)
        events = client.read()
        whole = Story(events)
        assert whole.texts[0] == (text[: text.index(stop)] if stop in strings else text)
        assert whole.ends[0] == [("stop", stop) if stop in strings else ("length", None)]
        is_held = [False] * len(events)
        for i, event in enumerate(events[:-1]):
            shown = decode_event_id(event.id or "").choices[0]
            assert shown is not None
            ids = [t for e in events[: i + 1] for c in json.loads(e.data)["choices"] for t in c["token_ids"]]
            assert len(ids) == shown.num_tokens
            is_held[i] = not shown.has_ended and shown.num_chars < len(house.model.tokenizer.decode(ids))
        held = [i for i, is_one in enumerate(is_held) if is_one]
        assert held
        for i in (*held[-4:], len(events) - 2):
            cut_records(house, decode_event_id(events[i].id or ""), 1, random.Random(i))
            Story(events[: i + 1] + client.read(events[i].id)).check(whole)
        house.check_rest()


def test_a_request_without_a_seed_keeps_the_one_it_drew(house: House) -> None:
    client = Client(house, COMPLETION, prompt=["the quick", "brown"], max_tokens=30, temperature=1.0)
    first = client.read(limit=6)
    (record, *_) = records_of(house, first[-1].id)
    assert record.entry is not None
    seeds = record.entry.keep.origin.seeds
    assert len(set(seeds)) == 2
    story = Story(first + client.read(first[-1].id))
    for i, (prompt, seed) in enumerate(zip(["the quick", "brown"], seeds, strict=True)):
        alone = Story(Client(house, COMPLETION, prompt=prompt, max_tokens=30, temperature=1.0, seed=seed).read())
        assert story.texts[i] == alone.texts[0]
    assert story.num_done == 1


# ---- clients that go away, and parts that are lost ---------------------------------------------------------------


LONG = {"prompt": "once upon a time", "max_tokens": 120, "temperature": 1.0, "seed": 3, "return_token_ids": True}


def test_a_client_hangs_up_again_and_again(slow_house: House) -> None:
    """Its KV is free while it is away; each time it gets what is new."""
    client = Client(slow_house, COMPLETION, **LONG)
    whole = Story(client.read())
    events = client.read(limit=1)
    for limit in (1, 2, 7, 20, 15):
        slow_house.check_rest()
        assert all(len(r.choices[0].token_ids) < 120 for r in records_of(slow_house, events[-1].id))
        events += client.read(events[-1].id, limit)
    Story(events + client.read(events[-1].id)).check(whole)
    slow_house.check_rest()


def test_what_still_runs_is_ended_first(slow_house: House) -> None:
    """Two more readers come while the first one still reads: each ends the one before it, with an error that says so."""
    client = Client(slow_house, COMPLETION, **LONG)
    whole = Story(client.read())
    with client.open() as first:
        seen = events_of(first)
        events = [next(seen) for _ in range(5)]
        with client.open(events[-1].id) as second:
            taken = events_of(second)
            events += [next(taken) for _ in range(5)]
            assert sum(replica.engine.num_unfinished for replica in slow_house.replicas) == 1
            assert error_at_end(list(seen)) == "stream_resumed"
            third = client.read(events[-1].id)
            assert error_at_end(list(taken)) == "stream_resumed"
    Story(events + third).check(whole)
    slow_house.check_rest()


def error_at_end(events: list[Event]) -> str:
    *_, last = events
    assert last.id is None
    return str(json.loads(last.data)["error"]["code"])


def test_many_resume_at_the_same_time(slow_house: House) -> None:
    """One of them gets the stream to its end; the others hear why not. At no time does it run twice."""
    client = Client(slow_house, COMPLETION, **LONG)
    whole = Story(client.read())
    events = client.read(limit=4)
    slow_house.check_rest()
    most = 0

    def resume(_: int) -> list[Event] | int:
        nonlocal most
        with client.open(events[-1].id) as answer:
            if answer.status_code != 200:
                assert json.loads(answer.read())["error"]["code"] == "stream_resumed"
                return answer.status_code
            found = []
            for event in events_of(answer):
                found.append(event)
                most = max(most, sum(replica.engine.num_unfinished for replica in slow_house.replicas))
            return found

    with ThreadPoolExecutor(6) as pool:
        answers = list(pool.map(resume, range(6)))
    whole_ones = [answer for answer in answers if isinstance(answer, list) and answer[-1].data == "[DONE]"]
    assert len(whole_ones) == 1
    Story(events + whole_ones[0]).check(whole)
    for answer in answers:
        if isinstance(answer, list):
            assert answer is whole_ones[0] or error_at_end(answer) == "stream_resumed"
        else:
            assert answer == 409
    assert most == 1
    slow_house.check_rest()


class OtherIngress:
    """A second ingress of a house, with a server of its own."""

    feed = None

    def __init__(self, house: House, name: str) -> None:
        self.max_body_bytes = house.max_body_bytes
        self._house = house
        self._name = name

    async def metrics(self) -> str:
        return render(await self.client.metrics(), self._house.model.names[0])

    def __enter__(self) -> OtherIngress:
        self._house.run(self._start())
        return self

    def __exit__(self, *failure: object) -> None:
        self._house.run(self._stop())

    async def _start(self) -> None:
        self.client, self.channels, self.service = self._house.make_client(self._name)
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._socket.getsockname()[1]}"
        config = uvicorn.Config(build_app(self), log_level="error", lifespan="off", timeout_graceful_shutdown=1)
        self._server = uvicorn.Server(config)
        self._serving = asyncio.get_running_loop().create_task(self._server.serve([self._socket]))
        while not (self._server.started and self.service.is_ready):
            await asyncio.sleep(0.01)

    async def _stop(self) -> None:
        self._server.should_exit = True
        await self._serving
        await self.channels.close()
        await self.client.close()


def test_another_ingress_goes_on(slow_house: House) -> None:
    """An ingress is cut off from its client without a word: what it runs is found running."""
    client = Client(slow_house, COMPLETION, **{**LONG, "n": 2})
    whole = Story(client.read())
    with OtherIngress(slow_house, "other") as other, client.open(url=other.url) as answer:
        seen = events_of(answer)
        events = [next(seen) for _ in range(9)]
        assert sum(replica.engine.num_unfinished for replica in slow_house.replicas) == 2
        events += client.read(events[-1].id)
        Story(events).check(whole)
        assert error_at_end(list(seen)) == "stream_resumed"
    slow_house.check_rest()


def test_a_replica_that_fails_over_hands_on_what_ended(directory: Path) -> None:
    """The first choice has ended when its replica dies; the client is cut after that, and resumes before that."""
    eos = range(6)
    costs = {"seconds_per_step": 0.004, "eos_token_ids": list(eos)}
    model = {"model": str(directory), "runner": "simulated", "simulated": costs}
    body: dict[str, Any] = {
        "prompt": [10, 11, 12],
        "max_tokens": 150,
        "n": 2,
        "return_token_ids": True,
        "temperature": 1.0,
        "logprobs": 1,
    }
    with House({"model": model, "engine": ENGINE}) as house:
        lengths = {seed: sorted(simulated_length(body["prompt"], seed, i, eos) for i in (0, 1)) for seed in range(200)}
        seed = next(seed for seed, (short, long) in lengths.items() if 15 < short < 40 and long > 140)
        client = Client(house, COMPLETION, **body, seed=seed)
        whole = Story(client.read())
        assert {len(whole.token_ids[0]), len(whole.token_ids[1])} == {lengths[seed][0], min(lengths[seed][1], 150)}
        with client.open() as answer:
            events = []
            seen = events_of(answer)
            while not Story(events).ends:
                events.append(next(seen))

            async def kill() -> None:
                victim = next(i for i, replica in enumerate(house.replicas) if len(replica.table))
                house.transport.kill(house.replicas[victim].replica_id)
                house.replicas[victim].reporter.cancel()
                replica = house.replicas.pop(victim)
                await asyncio.to_thread(replica.engine.stop, 5.0)

            house.run(kill())
            events += [next(seen) for _ in range(5)]
        for at in (len(events) - 1, len(events) - 12):
            rest = client.read(events[at].id)
            Story(events[: at + 1] + rest).check(whole)
        (record,) = [r for r in records_of(house, events[0].id) if r.attempt or r.ticket]
        assert set(record.choices) == {0, 1}
        house.check_rest()
        # The one that is left dies, too: then nothing is kept.
        events = Client(house, COMPLETION, **body, seed=seed).read(limit=5)
        house.check_rest()

        async def kill_all() -> None:
            house.transport.kill(house.replicas[0].replica_id)
            house.replicas[0].reporter.cancel()

        house.run(kill_all())
        assert client.refused(events[-1].id or "") == (410, "stream_gone")
        house.replicas.pop().engine.stop(5.0)


def simulated_length(prompt: list[int], seed: int, choice_index: int, eos: range) -> int:
    """Tokens up to the end, by the simulated model's definition."""
    digest = _ROOT
    for token in prompt:
        digest = _mix(digest, token)
    for length in range(1, 1000):
        token = _mix(digest, _mix(seed, choice_index)) % TOKENIZER_SIZE
        digest = _mix(digest, token)
        if token in eos:
            return length
    return 1000


# ---- who may, and for how long -----------------------------------------------------------------------------------


def test_another_key_body_or_path_is_not_found(house: House) -> None:
    client = client_of(house, "greedy")
    events = client.read(limit=5)
    last = events[-1].id or ""
    other = client_of(house, "greedy", max_tokens=25)
    assert other.refused(last) == (404, "stream_not_found")
    other = client_of(house, "greedy")
    other.headers["authorization"] = "Bearer another"
    assert other.refused(last) == (404, "stream_not_found")
    del other.headers["authorization"]
    assert other.refused(last) == (404, "stream_not_found")
    assert Story(events + client.read(last)).num_done == 1
    house.check_rest()


def test_ids_that_are_none(house: House) -> None:
    client = client_of(house, "greedy")
    events = client.read(limit=5)
    last = events[-1].id or ""
    seen = decode_event_id(last)
    assert seen.choices[0] is not None
    for wrong in ("1", "nonsense", last[:-1], last + "A", "é", "5", "1" * 5000):
        headers = [*client.headers.items(), ("last-event-id", wrong.encode("latin-1"))]
        answer = HTTP.post(house.url + COMPLETION, content=client.body, headers=headers)  # type: ignore[arg-type]
        assert (answer.status_code, answer.json()["error"]["code"]) == (400, "invalid_event_id"), wrong
        assert answer.json()["error"]["param"] == "Last-Event-ID"
    moved = seen.choices[0]._replace(num_chars=seen.choices[0].num_chars + 1)
    assert client.refused(encode_event_id(seen._replace(choices=(moved,))).decode()) == (400, "invalid_event_id")
    more = (*seen.choices, moved)
    assert client.refused(encode_event_id(seen._replace(choices=more)).decode()) == (400, "invalid_event_id")
    other = seen.choices[0]._replace(checksum=seen.choices[0].checksum ^ 1)
    assert client.refused(encode_event_id(seen._replace(choices=(other,))).decode()) == (410, "stream_gone")
    unknown = encode_event_id(seen._replace(resume_id=bytes(16))).decode()
    assert client.refused(unknown) == (410, "stream_gone")


def test_the_header_is_taken_at_its_word(house: House) -> None:
    body: dict[str, Any] = {"prompt": "the quick", "max_tokens": 2}

    def ask(headers: dict[str, str], **fields: Any) -> httpx.Response:
        return HTTP.post(house.url + COMPLETION, json={**body, **fields}, headers=headers)

    for value in ("1", "true", "TRUE"):
        assert ask({"x-resumable": value}, stream=True).text.startswith("id: ")
    for value in ("0", "false", ""):
        assert ask({"x-resumable": value}, stream=True).text.startswith("data: ")
        assert ask({"x-resumable": value}).status_code == 200
    for headers, fields, param in (
        ({"x-resumable": "yes"}, {"stream": True}, "X-Resumable"),
        ({"x-resumable": "1"}, {}, "X-Resumable"),
        ({"x-resumable": "1"}, {"stream": True, "n": 65, "prompt": ["a", "b"]}, "n"),
    ):
        answer = ask(headers, **fields)  # type: ignore[arg-type]
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)
    last = client_of(house, "greedy").read(limit=1)[0].id or ""
    answer = ask({"last-event-id": last})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "Last-Event-ID")


def test_the_time_is_over(directory: Path) -> None:
    model = {"model": str(directory), "runner": "simulated"}
    with House({"model": model, "engine": ENGINE, "resume": {"keep_seconds": 0.2}}) as house:
        client = client_of(house, "greedy")
        events = client.read()
        assert Story(events[:1] + client.read(events[0].id)).num_done == 1
        deadline = time.monotonic() + 20
        while True:
            with client.open(events[0].id) as answer:
                if answer.status_code == 410:
                    assert json.loads(answer.read())["error"]["code"] == "stream_gone"
                    break
                assert answer.status_code == 200
            assert time.monotonic() < deadline
            time.sleep(0.25)
        house.check_rest()
    with House({"model": model, "engine": ENGINE, "resume": {"keep_seconds": 0}}) as house:
        answer = HTTP.post(house.url + COMPLETION, json={"prompt": "a", "stream": True}, headers=RESUMABLE)
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, "X-Resumable")


def test_a_replica_that_does_not_answer_may_have_it(slow_house: House) -> None:
    """Not 410, which would tell the client to begin again: it may come back."""
    client = Client(slow_house, COMPLETION, **LONG)
    whole = Story(client.read())
    events = client.read(limit=3)
    slow_house.check_rest()
    slow_house.channels.options = slow_house.channels.options.__class__(call_seconds=0.05)
    slow_house.transport.hold = lambda replica_id, method: method == "fetch_kept"
    try:
        assert client.refused(events[-1].id or "") == (503, "engine_unavailable")
    finally:
        slow_house.transport.hold = lambda replica_id, method: False
        slow_house.channels.options = slow_house.channels.options.__class__()
    Story(events + client.read(events[-1].id)).check(whole)


def test_ordinary_requests_are_not_kept(house: House) -> None:
    before = [len(replica.hub.kept) for replica in house.replicas]
    for kind in ("greedy", "chat"):
        client = client_of(house, kind)
        HTTP.post(house.url + client.path, content=client.body, headers=client.headers)
    assert [len(replica.hub.kept) for replica in house.replicas] == before
