"""The page at /ui: its files and headers, and the feed: who is asked, when, and what a viewer gets. No browser."""

from __future__ import annotations

import asyncio
import itertools
import json
import re
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from serve_app.api import live_feed, ui_routes
from serve_app.api.live_feed import MAX_STEPS, MAX_UNREAD, MAX_VIEWERS, SHOWN_STEPS, LiveFeed, Viewer
from serve_app.errors import (
    EngineUnavailableError,
    OverloadedError,
    ReplicaLostError,
    ReplicaUnreachableError,
    ServerDrainingError,
)
from tests.api.house import House
from tests.replica.channel_harness import run_virtual
from tests.tiny_models import make_tiny_model

ENGINE = {"num_kv_blocks": 96, "max_model_len": 256, "max_num_batched_tokens": 64, "max_num_seqs": 16}
KEY = {"authorization": "Bearer the-key"}
PAGES = Path(ui_routes.__file__).parent / "ui"
Json = dict[str, Any]


# ---- the feed alone, on time that costs nothing ----------------------------------------------------------------------


class Scripted:
    """Replicas and router of one feed. Every replica makes a step with each question."""

    def __init__(self, *replica_ids: str) -> None:
        self.steps = dict.fromkeys(replica_ids, 0)
        self.asked: list[tuple[str, int, int]] = []
        self.num_looks = 0
        self.hanging: set[str] = set()
        self.lost: set[str] = set()
        self.unreachable: set[str] = set()
        self.is_router_away = False
        self.router_hangs = False
        self.epoch = 1
        self.ledger: dict[str, int] = {}
        self.streams: dict[str, int] = {}
        self.flags: dict[str, dict[str, bool]] = {}
        self.per_question = 1
        self.is_leaving = False
        self.feed = LiveFeed(self, self.look, self.streams, is_leaving=lambda: self.is_leaving)

    async def call_each(self, replica_ids: Any, method: str, after: int, limit: int) -> dict[str, Any]:
        assert method == "recent_steps"
        (replica_id,) = replica_ids
        self.asked.append((replica_id, after, limit))
        await asyncio.sleep(0.01)
        if replica_id in self.hanging:
            await asyncio.Event().wait()
        if replica_id in self.lost:
            return {replica_id: ReplicaLostError("planted")}
        if replica_id in self.unreachable:
            return {replica_id: ReplicaUnreachableError("planted")}
        self.steps[replica_id] += self.per_question
        indices = range(max(after + 1, self.steps[replica_id] - limit), self.steps[replica_id])
        steps = [[i, 0.0, 1.0, 1, 1, 0, 1, 0, 0, [7, 0, 1, 0]] for i in indices]
        return {replica_id: {"steps": steps, "num_preempted": 0, "num_steps": self.steps[replica_id]}}

    async def look(self, method: str) -> Json:
        assert method == "snapshot"
        self.num_looks += 1
        await asyncio.sleep(0.01)
        if self.router_hangs:
            await asyncio.Event().wait()
        if self.is_router_away:
            raise EngineUnavailableError("planted")
        replicas = {
            replica_id: dict.fromkeys(live_feed.REPLICA_FIELDS, 0)
            | {"is_draining": False, "is_silent": False}
            | self.flags.get(replica_id, {})
            for replica_id in self.steps
        }
        fields = dict.fromkeys(live_feed.ROUTER_FIELDS, 0)
        return {**fields, "epoch": self.epoch, "counters": dict(self.ledger), "replicas": replicas}


class Reader:
    """Reads a viewer on a task of its own."""

    def __init__(self, viewer: Viewer) -> None:
        self.messages: list[Json] = []
        self.viewer = viewer
        self.task = asyncio.get_running_loop().create_task(self._read())

    async def _read(self) -> None:
        async for data in self.viewer.messages():
            assert data.endswith(b"\n\n")
            if data.startswith(b"data: "):
                self.messages.append(json.loads(data.removeprefix(b"data: ")))
            else:
                assert data == b"retry: 500\n\n"

    async def leave(self) -> None:
        self.viewer.leave()
        await self.task

    def indices(self, replica_id: str) -> list[int]:
        told = [m["replicas"][replica_id]["steps"] for m in self.messages if replica_id in m["replicas"]]
        return [step[0] for step in itertools.chain(*told)]

    @property
    def events(self) -> list[tuple[str, str | None, int]]:
        return [(e["kind"], e.get("replica"), e["number"]) for m in self.messages for e in m["events"]]


def test_nothing_is_asked_when_nobody_looks() -> None:
    async def test() -> None:
        world = Scripted("a", "b")
        await asyncio.sleep(60.0)
        assert (world.asked, world.num_looks) == ([], 0)
        readers = [Reader(world.feed.join()) for _ in range(3)]
        await asyncio.sleep(2.0)
        num_asked = len(world.asked)
        assert 2 * 12 <= num_asked <= 2 * 17, "one question a tick to each replica, however many look"
        assert 6 <= world.num_looks <= 9
        await readers[0].leave()
        await readers[1].leave()
        await asyncio.sleep(1.0)
        assert len(world.asked) > num_asked, "one looks on"
        await readers[2].leave()
        num_asked, num_looks = len(world.asked), world.num_looks
        await asyncio.sleep(60.0)
        assert (len(world.asked), world.num_looks) == (num_asked, num_looks)
        assert world.feed.num_viewers == 0
        assert len(asyncio.all_tasks()) == 1

    run_virtual(test)


def test_each_viewer_gets_each_step_once() -> None:
    async def test() -> None:
        world = Scripted("a", "b")
        world.per_question = 3
        first = Reader(world.feed.join())
        await asyncio.sleep(3.3)
        second = Reader(world.feed.join())
        await asyncio.sleep(3.0)
        assert first.messages[0]["is_first"]
        assert second.messages[0]["is_first"]
        assert first.messages[0]["watch"] == second.messages[0]["watch"], "one life, whoever looks"
        assert not any("is_first" in message for message in first.messages[1:])
        for replica_id in ("a", "b"):
            last = first.indices(replica_id)[-1]
            assert last > 100
            assert first.indices(replica_id) == list(range(last + 1))
            assert second.indices(replica_id) == list(range(last + 1)), "it begins with what others have seen"
        await first.leave()
        await second.leave()
        again = Reader(world.feed.join())
        await asyncio.sleep(1.0)
        assert again.indices("a")[: SHOWN_STEPS // 2], "a new life begins with the last steps, too"
        await again.leave()

    run_virtual(test)


def test_steps_that_no_screen_shows_are_left_out() -> None:
    async def test() -> None:
        world = Scripted("a")
        world.per_question = 1000
        reader = Reader(world.feed.join())
        await asyncio.sleep(1.0)
        await reader.leave()
        per_message = [len(m["replicas"]["a"]["steps"]) for m in reader.messages if "a" in m["replicas"]]
        assert per_message[0] == SHOWN_STEPS
        assert set(per_message[1:]) == {MAX_STEPS}
        indices = reader.indices("a")
        assert indices == sorted(set(indices))
        assert indices[-1] == world.steps["a"] - 1, "the newest are shown"

    run_virtual(test)


def test_a_replica_that_hangs_holds_nobody_up() -> None:
    async def test() -> None:
        world = Scripted("a", "b")
        world.hanging.add("a")
        reader = Reader(world.feed.join())
        await asyncio.sleep(3.0)
        assert len([name for name, *_ in world.asked if name == "a"]) == 1
        assert len(reader.indices("b")) > 15
        world.router_hangs = True
        num = len(reader.indices("b"))
        await asyncio.sleep(3.0)
        assert len(reader.indices("b")) > num + 15
        await reader.leave()
        await asyncio.sleep(0.1)
        assert len(asyncio.all_tasks()) == 1, "the calls that hung are given up"

    run_virtual(test)


def test_events() -> None:
    async def test() -> None:
        world = Scripted("a", "b")
        reader = Reader(world.feed.join())
        await asyncio.sleep(1.0)
        assert reader.events == []
        world.lost.add("a")
        world.unreachable.add("b")
        world.streams.update(lost=3, resumed=1)
        await asyncio.sleep(1.0)
        assert sorted(reader.events) == [
            ("replica_lost", "a", 1),
            ("streams_lost", None, 3),
            ("streams_resumed", None, 1),
        ]
        assert any(m["replicas"].get("a", {}).get("is_gone") for m in reader.messages)
        num_asked = len([name for name, *_ in world.asked if name == "a"])
        del world.steps["a"]
        world.unreachable.clear()
        world.streams.update(resumed=3)
        world.steps["c"] = 0
        world.flags["b"] = {"is_draining": True}
        await asyncio.sleep(1.0)
        assert sorted(reader.events[3:]) == [
            ("replica_draining", "b", 1),
            ("replica_joined", "c", 1),
            ("streams_resumed", None, 2),
        ]
        del world.steps["b"]
        world.ledger.update(refused=5, refused_as_too_late=2)
        await asyncio.sleep(1.0)
        assert sorted(reader.events[6:]) == [("refused", None, 7), ("replica_left", "b", 1)]
        world.is_router_away = True
        await asyncio.sleep(1.0)
        assert reader.messages[-1].get("router", {"is_away": True})["is_away"]
        world.is_router_away, world.epoch, world.ledger = False, 2, {}
        await asyncio.sleep(1.0)
        assert reader.events[8:] == [("router_away", None, 1), ("router_back", None, 1)]
        assert len([name for name, *_ in world.asked if name == "a"]) == num_asked, "the dead are left alone"
        late = Reader(world.feed.join())
        await asyncio.sleep(0.5)
        assert late.events == reader.events, "who comes later sees what happened"
        await late.leave()
        await reader.leave()

    run_virtual(test)


def test_a_slow_viewer_is_dropped_and_the_others_are_not() -> None:
    async def test() -> None:
        world = Scripted("a")
        reader, slow = Reader(world.feed.join()), world.feed.join()
        await asyncio.sleep(0.125 * (MAX_UNREAD + 20))
        assert slow.is_over
        assert not slow._unread
        assert not reader.viewer.is_over
        assert len(reader.messages) > MAX_UNREAD
        assert [data async for data in slow.messages()] == [b"retry: 500\n\n"], "it ends, and the page comes again"
        await reader.leave()
        await asyncio.sleep(1.0)
        num_asked = len(world.asked)
        await asyncio.sleep(10.0)
        assert len(world.asked) == num_asked, "one that was dropped does not look"
        slow.leave()

    run_virtual(test)


def test_bounds_and_ends() -> None:
    async def test() -> None:
        world = Scripted("a")
        readers = [Reader(world.feed.join()) for _ in range(MAX_VIEWERS)]
        with pytest.raises(OverloadedError, match=f"{MAX_VIEWERS} pages"):
            world.feed.join()
        await asyncio.sleep(live_feed.VIEW_SECONDS + 1.0)
        assert all(reader.task.done() for reader in readers), "a stream's time is bounded"
        for reader in readers:
            reader.viewer.leave()
        reader = Reader(world.feed.join())
        await asyncio.sleep(1.0)
        world.is_leaving = True
        await reader.task
        with pytest.raises(ServerDrainingError):
            world.feed.join()
        reader.viewer.leave()
        await asyncio.sleep(0.1)
        assert len(asyncio.all_tasks()) == 1

    run_virtual(test)


def test_a_quiet_server_still_says_that_it_is_there() -> None:
    async def test() -> None:
        world = Scripted()
        reader = Reader(world.feed.join())
        await asyncio.sleep(60.0)
        assert 20 < len(reader.messages) < 40
        await reader.leave()

    run_virtual(test)


# ---- over HTTP -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> Iterator[House]:
    """Simulated, 5 ms a step, three replicas, a key."""
    directory = tmp_path_factory.mktemp("model")
    make_tiny_model(directory, vocab_size=300, eos=())
    model = {"model": str(directory), "runner": "simulated", "simulated": {"seconds_per_step": 0.005}}
    with House({"model": model, "engine": ENGINE}, num_replicas=3, api_keys=("the-key",)) as made:
        yield made


@pytest.fixture(autouse=True)
def _nobody_looks_on(request: pytest.FixtureRequest) -> Iterator[None]:
    yield
    if "house" in request.fixturenames:
        house: House = request.getfixturevalue("house")
        feed = house.feed
        assert feed is not None
        house.wait_until(lambda: feed.num_viewers == 0 and feed._task is None)


def messages_until(house: House, is_enough: Callable[[list[Json]], bool], headers: dict[str, str] = KEY) -> list[Json]:
    got: list[Json] = []
    with httpx.stream("GET", house.url + "/ui/events", headers=headers, timeout=30) as response:
        assert response.status_code == 200
        assert response.headers["content-type"].startswith("text/event-stream")
        assert "content-length" not in response.headers
        for line in response.iter_lines():
            if line.startswith("data: "):
                got.append(json.loads(line.removeprefix("data: ")))
                if is_enough(got):
                    return got
    raise AssertionError("the stream has ended")


def ask(house: House, prompt: str, max_tokens: int, request_id: str) -> None:
    body = {"prompt": prompt, "max_tokens": max_tokens, "ignore_eos": True}
    headers = {**KEY, "x-request-id": request_id}
    assert httpx.post(house.url + "/v1/completions", json=body, headers=headers, timeout=30).status_code == 200


def steps_of(messages: list[Json]) -> list[tuple[str, list[Any]]]:
    return [(name, step) for m in messages for name, told in m["replicas"].items() for step in told["steps"]]


def test_the_feed_shows_a_request_and_nothing_of_what_it_says(house: House) -> None:
    ask(house, "a secret prompt", 9, "ui-00c0ffee")
    ask(house, "a secret prompt", 9, "customer-4711")

    def has_both(messages: list[Json]) -> bool:
        ids = {step[-1][0] for _, step in steps_of(messages)}
        return 0x00C0FFEE in ids and len(ids) >= 2 and "router" in messages[0]

    messages = messages_until(house, has_both)
    assert messages[0]["is_first"]
    assert {"replica0", "replica1"} <= set(messages[0]["router"]["replicas"])
    assert messages[0]["router"]["replicas"]["replica0"]["num_free_blocks"] == 96
    text = json.dumps(messages)
    for told in ("customer", "4711", "secret"):
        assert told not in text
    mine = [step[-1] for _, step in steps_of(messages) if step[-1][0] == 0x00C0FFEE]
    assert [run[1] for run in mine] == [2] + [0] * 8, "a last chunk, then decodes"
    assert mine[0][2] > 8
    assert [run[2] for run in mine[1:]] == [1] * 8


def test_a_page_that_goes_away_ends_the_questions(house: House) -> None:
    messages_until(house, lambda messages: len(messages) >= 2)
    assert house.feed is not None
    feed = house.feed
    house.wait_until(lambda: feed.num_viewers == 0)
    num_asked = house.transport.counts["recent_steps"]
    assert num_asked > 0
    ask(house, "abc", 30, "r")
    assert house.transport.counts["recent_steps"] == num_asked


def test_a_killed_replica_is_shown(house: House) -> None:
    def is_shown(messages: list[Json]) -> bool:
        if messages[0]["is_first"] and len(messages) == 1:
            house.run(kill())
        return any(e["kind"] == "replica_lost" and e["replica"] == "replica2" for m in messages for e in m["events"])

    async def kill() -> None:
        house.replicas[2].reporter.cancel()
        house.transport.kill("replica2")

    messages = messages_until(house, is_shown)
    assert any(m["replicas"].get("replica2", {}).get("is_gone") for m in messages)


def test_the_feed_wants_a_key_and_the_files_none(house: House) -> None:
    refused = httpx.get(house.url + "/ui/events")
    assert refused.status_code == 401
    assert refused.json()["error"]["code"] == "invalid_api_key"
    for name, kind in ui_routes.FILES.items():
        answer = httpx.get(f"{house.url}/ui/{name}")
        assert (answer.status_code, answer.headers["content-type"]) == (200, kind)
        assert answer.content == (PAGES / name).read_bytes()
    assert httpx.get(house.url + "/ui").content == (PAGES / "index.html").read_bytes()


def test_the_page_may_load_nothing_from_elsewhere(house: House) -> None:
    for path in ("/ui", "/ui/main.js", "/ui/style.css"):
        headers = httpx.get(house.url + path).headers
        policy = dict(part.strip().split(" ", 1) for part in headers["content-security-policy"].split(";"))
        assert policy["default-src"] == "'none'"
        assert {policy[f"{kind}-src"] for kind in ("script", "style", "connect", "img")} == {"'self'"}
        assert policy["frame-ancestors"] == policy["base-uri"] == policy["form-action"] == "'none'"
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["referrer-policy"] == "no-referrer"
    for file in PAGES.iterdir():
        text = file.read_text().replace('xmlns="http://www.w3.org/2000/svg"', "")
        assert not re.search(r"https?://|\bstyle=|<style|\bon\w+=\"|innerHTML|eval\(", text), file.name


def test_every_file_has_its_type_and_a_module_loads_only_those() -> None:
    assert {file.name for file in PAGES.iterdir()} == set(ui_routes.FILES)
    for file in PAGES.glob("*.js"):
        for loaded in re.findall(r'from "(.+?)"', file.read_text()):
            assert loaded.removeprefix("./") in ui_routes.FILES
    for loaded in re.findall(r'(?:src|href)="ui/(.+?)"', (PAGES / "index.html").read_text()):
        assert loaded in ui_routes.FILES


@pytest.mark.parametrize(
    "path",
    [
        "/ui/../app.py",
        "/ui/..%2fservice.py",
        "/ui/%2e%2e/service.py",
        "/ui//etc/passwd",
        "/ui/ui_routes.py",
        "/ui/main.js%00",
    ],
)
def test_no_path_leads_out(house: House, path: str) -> None:
    """Sent as it stands: a client library would tidy it up."""
    with socket.create_connection(("127.0.0.1", house.port)) as connection:
        connection.sendall(f"GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n{KEY_LINE}\r\n\r\n".encode())
        answer = b"".join(iter(lambda: connection.recv(65536), b""))
    assert answer.startswith(b"HTTP/1.1 404")
    assert b"not_found" in answer or b"Not Found" in answer
    assert b"import" not in answer


KEY_LINE = f"Authorization: {KEY['authorization']}"


def test_no_page_where_it_is_switched_off(tmp_path: Path) -> None:
    make_tiny_model(tmp_path, vocab_size=300, eos=())
    args = {"model": {"model": str(tmp_path), "runner": "simulated"}, "engine": ENGINE, "api": {"ui": False}}
    with House(args, num_replicas=1) as house:
        assert house.feed is None
        for path in ("/ui", "/ui/events", "/ui/main.js"):
            assert httpx.get(house.url + path).status_code == 404


# ---- colours ---------------------------------------------------------------------------------------------------------


def contrast(one: str, other: str) -> float:
    """WCAG 2.2, "contrast ratio"."""

    def luminance(colour: str) -> float:
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_colours_have_enough_contrast(scheme: str) -> None:
    light, dark = re.findall(r":root \{(.*?)\}", (PAGES / "style.css").read_text(), re.DOTALL)
    colours = dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6});", light if scheme == "light" else dark))
    runs = [name for name in colours if name.startswith("run-")]
    assert len(runs) == 8
    for name in (*runs, "others", "blocks", "line"):
        assert contrast(colours[name], colours["frame"]) >= 3.0, name
    for back in ("page", "card", "frame"):
        for name in ("text", "hint", "bad", "accent"):
            assert contrast(colours[name], colours[back]) >= 4.5, (name, back)
        assert contrast(colours["line"], colours[back]) >= 3.0
    assert contrast(colours["on-accent"], colours["accent"]) >= 4.5
