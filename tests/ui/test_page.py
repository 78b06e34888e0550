"""The page at /ui in a real headless Chromium, against the whole service in this process: by keyboard, on a phone, in a bad
hour. Skips where there is no Chromium or Chrome (CONTRIBUTING.md says how to get one)."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.api.house import House
from tests.ui.chromium import VARIABLE, Chromium, Page, find

pytestmark = pytest.mark.may_skip("the browser is no part of this project: a machine may have none")

ENGINE = {
    "block_size": 16,
    "num_kv_blocks": 256,
    "max_model_len": 4000,
    "max_num_batched_tokens": 128,
    "max_num_seqs": 32,
}
ANSWER = "The ship is called Petrel, and she sails at noon."
STORY = " ".join(f"{i} gulls flew past the old harbour, and the ship went on;" for i in range(400))
KEY = "the-key"


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chromium]:
    path = find()
    if path is None:
        pytest.skip(f"there is no Chromium or Chrome on this machine, and {VARIABLE} names none")
    with Chromium(path, tmp_path_factory.mktemp("chromium")) as made:
        yield made


def make_house(**options: Any) -> House:
    answers = {"name of the ship": ANSWER, "long story": STORY}
    simulated = {"seconds_per_step": 0.01, "seconds_per_token": 0.0001, "answers": answers}
    model = {"model": "demo", "runner": "simulated", "simulated": simulated}
    return House({"model": model, "engine": ENGINE}, **options)


@pytest.fixture(scope="module")
def house() -> Iterator[House]:
    with make_house() as made:
        yield made
        made.check_rest()


@pytest.fixture
def page(browser: Chromium, house: House) -> Iterator[Page]:
    made = browser.page()
    made.goto(house.url + "/ui")
    made.wait("document.querySelectorAll('canvas').length == 2")
    yield made
    made.close()
    check(made, house)
    feed = house.feed
    assert feed is not None
    house.wait_until(lambda: feed.num_viewers == 0)


def check(page: Page, house: House) -> None:
    """What holds for every visit."""
    assert page.troubles == [], "the console is quiet"
    assert all(url.startswith(house.url + "/") for url in page.urls), "no request leaves the host"
    assert house.url + "/ui/events" in page.urls


def columns(page: Page) -> list[int]:
    """Drawn by each picture so far."""
    return [int(n or 0) for n in page.js("[...document.querySelectorAll('canvas')].map((c) => c.dataset.steps)")]


def colours(page: Page, number: int) -> int:
    """Different colours in a picture."""
    expression = (
        f"(() => {{ const c = document.querySelectorAll('canvas')[{number}];"
        " const copy = new OffscreenCanvas(c.width, c.height).getContext('2d', { willReadFrequently: true });"
        " copy.drawImage(c, 0, 0); const { data } = copy.getImageData(0, 0, c.width, c.height);"
        " return new Set(new Uint32Array(data.buffer)).size; })()"
    )
    return int(page.js(expression))


def send(page: Page, text: str, max_tokens: int | None = None) -> None:
    if max_tokens is not None:
        page.js(f"document.querySelector('#max-tokens').value = '{max_tokens}'")
    page.js("document.querySelector('#prompt').focus()")
    page.type(text)
    page.press("Enter")


def test_a_chat_streams_and_the_batch_moves(page: Page) -> None:
    empty = [colours(page, i) for i in range(2)]
    send(page, "What is the name of the ship?")
    page.wait(f"document.querySelector('#messages .model')?.textContent == {json.dumps('Model' + ANSWER)}")
    page.wait("document.querySelector('#messages').getAttribute('aria-busy') == 'false'")
    assert "tokens/s, the first after" in page.js("document.querySelector('#speed').textContent")
    page.wait("[...document.querySelectorAll('canvas')].some((c) => c.dataset.steps > 5)")
    (there,) = [i for i, number in enumerate(columns(page)) if number]
    assert colours(page, there) > empty[there]
    assert "decode" in page.js(f"document.querySelectorAll('canvas')[{there}].getAttribute('aria-label')")
    before = columns(page)
    page.click("#crowd")
    page.wait("document.querySelector('#crowd-state').textContent == '12 of 12 answered'")
    page.wait(f"[...document.querySelectorAll('canvas')].every((c, i) => Number(c.dataset.steps) > {before}[i] + 10)")
    assert min(colours(page, i) for i in range(2)) > max(empty) + 5, "many requests, in colours of their own"


def test_an_answer_is_stopped(page: Page, house: House) -> None:
    page.js("window.requestAnimationFrame = (paint) => setTimeout(paint, 200)")
    send(page, "Tell me a very long story", 3800)
    page.wait("document.querySelector('#messages .model')?.textContent.length > 20")
    assert page.js("document.activeElement.id") == "prompt", "one may go on typing"
    page.press("Tab")
    page.wait("document.activeElement.id == 'stop'")
    page.press("Enter")
    page.wait("document.querySelector('#speed').textContent.endsWith('stopped')")
    page.js("window.stoppedAt = Date.now()")
    page.wait("Date.now() - window.stoppedAt > 600")
    still = page.js("document.querySelector('#speed').textContent.endsWith('stopped')")
    assert still, "a frame that was due when it stopped changes nothing"
    house.check_rest()
    assert page.js("[document.activeElement.id, document.querySelector('#send').disabled]") == ["prompt", False]
    send(page, "And again", 900_000)  # more than the context has: the server's own words are shown
    page.wait("document.querySelector('#messages .model.bad')?.textContent.includes('max_tokens is 900000')")
    assert [t for t in page.troubles if "400" not in t] == []
    page.troubles.clear()


def test_a_killed_replica_and_the_answer_goes_on(browser: Chromium) -> None:
    with make_house() as house:
        page = browser.page()
        page.goto(house.url + "/ui")
        page.wait("document.querySelectorAll('canvas').length == 2")
        send(page, "Tell me a long story", 300)
        page.wait("document.querySelector('#messages .model')?.textContent.length > 20")
        (there,) = [i for i, replica in enumerate(house.replicas) if replica.table.rows()]

        async def kill() -> None:
            house.replicas[there].reporter.cancel()
            house.transport.kill(f"replica{there}")

        house.run(kill())
        log = "document.querySelector('#log').textContent"
        page.wait(f"{log}.includes('Replica replica{there} is lost')")
        page.wait(f"{log}.includes('1 stream resumed')")
        page.wait(f"{log}.includes('1 request of another replica goes on here: replica{1 - there}')")
        page.wait("document.querySelector('.replica.gone h3')?.textContent.endsWith('gone')")
        moving = columns(page)[1 - there]
        page.wait(f"document.querySelectorAll('canvas')[{1 - there}].dataset.steps > {moving} + 20")
        page.wait("document.querySelector('#speed').textContent.startsWith('300 tokens')")
        page.close()
        check(page, house)


def test_by_keyboard_alone(page: Page, house: House) -> None:
    send(page, "What is the name of the ship?")
    page.wait("[...document.querySelectorAll('canvas')].some((c) => c.dataset.steps > 5)")
    page.wait("document.querySelector('#stop').disabled")
    described = (
        "(() => { const e = document.activeElement, s = getComputedStyle(e);"
        " return [e.id || e.tagName, s.outlineStyle, parseFloat(s.outlineWidth)]; })()"
    )
    page.js("document.querySelector('#pause').focus()")
    order = []
    for _ in range(10):
        name, style, width = page.js(described)
        order.append(name)
        assert (style, width) == ("solid", 3), f"{name} has the focus, and it does not show"
        page.press("Tab")
    assert order == ["pause", "CANVAS", "CANVAS", "SUMMARY", "prompt", "send", "clear", "max-tokens", "crowd", "log"]
    page.js("[...document.querySelectorAll('canvas')].find((c) => c.dataset.steps > 5).focus()")
    page.press("ArrowLeft")
    page.wait("/, step .* of 128 tokens; .* ms$/.test(document.querySelector('#inspected').textContent)")
    page.press("Escape")
    page.wait("document.querySelector('#inspected').textContent.startsWith('Point at a column')")
    page.js("document.querySelector('#table summary').focus()")
    page.press("Enter")
    page.wait("document.querySelector('#tables').textContent.includes(\"this page's\")")
    page.js("document.querySelector('#pause').focus()")
    page.press(" ")
    page.wait("document.querySelector('#connection').textContent.startsWith('Paused')")
    feed = house.feed
    assert feed is not None
    house.wait_until(lambda: feed.num_viewers == 0)
    page.press(" ")
    page.wait("document.querySelector('#connection').textContent == 'Live'")


def test_what_a_screen_reader_is_told(page: Page) -> None:
    unnamed = "[...document.querySelectorAll('input, textarea')].filter((e) => !e.labels.length).length"
    assert page.js(unnamed) == 0
    nodes = page.call("Accessibility.getFullAXTree")["nodes"]
    told = [(n["role"]["value"], n.get("name", {}).get("value", "")) for n in nodes if not n["ignored"]]
    for role, name in told:
        if role in ("button", "textbox", "spinbutton", "image", "log", "list", "region", "article"):
            assert name or role == "list", f"a {role} without a name"
    assert ("log", "What happened") in told
    assert sum(role == "image" and name.startswith("Steps of replica") for role, name in told) == 2
    assert page.js("document.querySelector('#messages').getAttribute('aria-live')") == "polite"


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_on_a_phone(browser: Chromium, house: House, scheme: str) -> None:
    page = browser.page(320, 568, is_phone=True, scale=2.0)
    page.media(prefers_color_scheme=scheme, prefers_reduced_motion="reduce")
    page.goto(house.url + "/ui")
    page.wait("document.querySelectorAll('canvas').length == 2")
    send(page, "What is the name of the ship?")
    page.wait("[...document.querySelectorAll('canvas')].some((c) => c.dataset.steps > 0)")  # without motion, and yet
    page.js("document.querySelector('#table').open = true")
    page.wait("document.querySelector('#tables td') !== null")
    assert page.js("[innerWidth, document.documentElement.scrollWidth]") == [320, 320]
    wide = "[...document.querySelectorAll('body *')].filter((e) => e.getBoundingClientRect().right > 321)"
    assert page.js(f"{wide}.filter((e) => !e.closest('#tables') && !e.closest('svg')).map((e) => e.outerHTML)") == []
    assert min(page.js("[...document.querySelectorAll('button')].map((e) => e.clientHeight || 99)")) >= 30
    page.close()
    check(page, house)


def test_a_key_where_the_server_wants_one(browser: Chromium) -> None:
    with make_house(num_replicas=1, api_keys=(KEY,)) as house:
        page = browser.page()
        page.goto(house.url + "/ui")
        page.wait("!document.querySelector('#key-form').hidden && document.activeElement.id == 'key'")
        assert page.troubles
        assert all("401" in trouble for trouble in page.troubles)
        page.troubles.clear()
        page.type(KEY)
        page.press("Enter")
        page.wait("document.querySelectorAll('canvas').length == 1")
        page.wait("document.querySelector('#model').textContent == 'serves demo'")
        send(page, "What is the name of the ship?")
        page.wait(f"document.querySelector('#messages .model')?.textContent == {json.dumps('Model' + ANSWER)}")
        assert KEY not in page.js("document.documentElement.outerHTML")
        page.close()
        check(page, house)


def test_what_happens_is_told_when_the_page_has_come_back(browser: Chromium) -> None:
    """A server that nobody watched counts its events anew. A page left alone comes back every two minutes: it once held the
    first new events for old ones, and told nothing of a replica that was lost."""
    with make_house() as house:
        feed = house.feed
        assert feed is not None
        page = browser.page()
        page.goto(house.url + "/ui")
        page.wait("document.querySelectorAll('canvas').length == 2")
        log = "document.querySelector('#log').textContent"
        house.replicas[0].is_leaving = True
        page.wait(f"{log}.includes('replica0 drains')")
        page.click("#pause")
        house.wait_until(lambda: not feed.is_watched)
        page.click("#pause")
        house.wait_until(lambda: feed.is_watched and feed._snapshot is not None)
        assert feed._num_events == 0
        house.replicas[1].is_leaving = True
        page.wait(f"{log}.includes('replica1 drains')", 60)
        page.close()
        check(page, house)


def test_the_server_goes_and_comes_back(page: Page, house: House) -> None:
    """The feed ends on the server's side, then is refused, then is there again; the page asks until it is."""
    house.is_leaving = True
    page.wait("document.querySelector('#connection').textContent.includes('shows nothing any more')")
    house.is_leaving = False
    page.wait("document.querySelector('#connection').textContent == 'Live'")
    assert all("503" in trouble for trouble in page.troubles)
    page.troubles.clear()


def test_it_writes_nothing_outside_its_folder(browser: Chromium, tmp_path: Path) -> None:
    page = browser.page(200, 100)
    page.screenshot(tmp_path / "picture.png")
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")
    page.close()
