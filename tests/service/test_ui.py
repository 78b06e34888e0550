"""The page at /ui on a real cluster. Its feed through Ray Serve's proxy and through HAProxy: it streams, shows every
replica, and wants a key. And the page in a headless Chromium: a replica is killed under its chat (tests/ui has the rest).
"""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.service.live import HEADERS, KEY, NAMES, PATIENCE, Service, launched, wait_until
from tests.ui.chromium import VARIABLE, Chromium, Page, find

LONG = 3800
"""Tokens of an answer that lasts longer than all that the test does meanwhile."""
# A card is shown for some seconds after its replica has gone, and the test may be slow to look: the page remembers.
WATCH = """
(() => {
  window.gone = new Set();
  const look = () => { for (const e of document.querySelectorAll(".replica.gone h3")) window.gone.add(e.id); };
  new MutationObserver(look).observe(document.body, { subtree: true, childList: true, attributes: true });
})()
"""


@pytest.fixture
def page(tmp_path: Path) -> Iterator[Page]:
    path = find()
    if path is None:
        pytest.skip(f"there is no Chromium or Chrome on this machine, and {VARIABLE} names none")
    with Chromium(path, tmp_path) as browser:
        yield browser.page()


def test_the_page_and_its_feed(service: Service) -> None:
    page = httpx.get(f"{service.url}/ui")
    assert page.status_code == 200
    assert "script-src 'self'" in page.headers["content-security-policy"]
    assert httpx.get(f"{service.url}/ui/main.js").headers["content-type"].startswith("text/javascript")
    assert httpx.get(f"{service.url}/ui/events").status_code == 401
    stream = service.stream(501, 100)
    tokens: dict[str, int] = {}
    num_messages = 0
    with httpx.stream("GET", f"{service.url}/ui/events", headers=HEADERS, timeout=PATIENCE) as feed:
        assert feed.status_code == 200
        for line in feed.iter_lines():  # to be read while it goes on: a proxy that gathered it would give nothing
            if not line.startswith("data: "):
                continue
            num_messages += 1
            message = json.loads(line.removeprefix("data: "))
            for replica_id, told in message["replicas"].items():
                tokens[replica_id] = max(tokens.get(replica_id, 0), told.get("num_tokens", 0))
            if num_messages >= 3 and len(tokens) == 2 and stream.has_ended and any(tokens.values()):
                break
    assert set(tokens) == set(service.pids("Replica"))
    stream.check()


@pytest.mark.may_skip("the browser is no part of this project: a machine may have none")
@launched
def test_a_replica_is_killed_under_the_chat(service: Service, page: Page) -> None:
    answer = "(document.querySelector('#messages .model')?.textContent ?? '').length"
    log = "document.querySelector('#log').textContent"

    def steps(replica_id: str) -> str:
        """The columns that its picture has drawn."""
        card = f"document.getElementById('replica-{replica_id}')?.parentNode"
        return f"Number({card}?.querySelector('canvas').dataset.steps ?? 0)"

    page.goto(f"{service.url}/ui")
    page.wait("!document.querySelector('#key-form').hidden && document.activeElement.id == 'key'")
    page.type(KEY)
    page.press("Enter")
    page.wait("document.querySelectorAll('canvas').length == 2")
    page.wait(f"document.querySelector('#model').textContent == 'serves {NAMES[0]}'")
    page.js(WATCH)

    page.js(f"document.querySelector('#max-tokens').value = '{LONG}'")
    page.js("document.querySelector('#prompt').focus()")
    page.type("hello")
    page.press("Enter")
    page.wait(f"{answer} > 20")
    (victim,) = wait_until(lambda: [replica_id for replica_id, rows in service.books().items() if rows])
    (other,) = set(service.pids("Replica")) - {victim}
    page.wait(f"{steps(victim)} > 20")
    [shown, moving] = page.js(f"[{answer}, {steps(other)}]")

    os.kill(service.pids("Replica")[victim], signal.SIGKILL)
    # A feed that has to begin anew has no line of it, but no picture of the replica either.
    page.wait(f"/Replica {victim} (is lost|has left)/.test({log}) || window.gone.has('replica-{victim}')")
    page.wait(f"{log}.includes('1 request of another replica goes on here: {other}')")
    page.wait(f"{steps(other)} > {moving} + 20")
    page.wait(f"{answer} > {shown} + 50")
    service.check_whole()
    (fresh,) = set(service.pids("Replica")) - {other}
    page.wait(f"document.getElementById('replica-{fresh}') !== null")
    page.click("#stop")
    page.wait("document.querySelector('#messages').getAttribute('aria-busy') == 'false'")
    assert page.js("document.querySelector('#messages .model.bad')") is None
    assert [t for t in page.troubles if "401" not in t] == [], (
        "the console is quiet, but for the key it lacked at first"
    )
    assert all(url.startswith(f"{service.url}/") for url in page.urls), "no request leaves the host"
